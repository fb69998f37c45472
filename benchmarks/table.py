"""What is measured, the limit of each figure, and the verdict."""

from __future__ import annotations

import json
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal

Against = Literal["native", "added", "itself"]
"""A limit holds for ours divided by native, for ours less native, or for ours."""

SIDES = ("ours", "native", "message per token", "replace per token")


@dataclass(frozen=True, slots=True)
class Figure:
    """One line of the table; `most` None is reported without a verdict."""

    row: int
    what: str
    unit: str
    most: float | None
    against: Against = "itself"
    at_least: bool = False


def native(
    row: int, what: str, unit: str, most: float | None, at_least: bool = False
) -> Figure:
    """Make a figure whose limit is a ratio to native in the same run."""
    return Figure(row, what, unit, most, "native", at_least)


def added(row: int, what: str, unit: str, most: float) -> Figure:
    """Make a figure whose limit is what may be added to native in the same run."""
    return Figure(row, what, unit, most, "added")


def judged(what: str, least: float | None) -> Figure:
    """Make a figure of the simulated verdicts, in points of a hundred questions."""
    return Figure(15, what, "points", least, at_least=True)


FIGURES: dict[str, Figure] = {
    "bytes_200": native(1, "socket bytes a token, 200 tokens/s", "bytes", 0.12),
    "bytes_50": native(1, "socket bytes a token, 50 tokens/s", "bytes", 0.45),
    "events_200": native(2, "events a token, 200 tokens/s", "", 0.08),
    "events_50": native(2, "events a token, 50 tokens/s", "", 0.45),
    "events_council": native(2, "events a token, council of 5", "", 0.06),
    "cpu_200": native(3, "server CPU per 1,000 tokens, 200 tokens/s", "s", 0.34),
    "cpu_50": native(3, "server CPU per 1,000 tokens, 50 tokens/s", "s", 0.55),
    "throughput": native(4, "tokens/s, models that do not wait", "", 1.5, True),
    "first_character": added(5, "first character, 5 participants, 20 tools", "ms", 25),
    "first_word": Figure(5, "first word of a participant, the same", "ms", None),
    "growth_cpu": Figure(6, "CPU a token, last quarter over first", "x", 1.1),
    "growth_bytes": Figure(6, "bytes a token, last quarter over first", "x", 1.1),
    "writes_tokens": Figure(7, "database writes a turn more, 8 x the tokens", "", 0.05),
    "writes_turn": Figure(7, "database writes a turn beyond native's 7", "", 2.5),
    "written_bytes": Figure(7, "bytes written for each byte of text more", "x", None),
    "lookups": Figure(8, "look-ups more in 20 rounds than in 1", "", 0),
    "pieces": Figure(9, "tool arguments: 500 pieces, 200 tools", "ms", 3),
    "pieces_json": Figure(9, "the same with JSON decoding", "ms", 12),
    "pieces_5000": Figure(9, "5,000 pieces with JSON decoding", "ms", 110),
    "pieces_tools": Figure(9, "cost a piece, 200 tools over 1", "x", 1.15),
    "pieces_length": Figure(9, "cost a piece, 5,000 pieces over 500", "x", 1.15),
    "chunk": Figure(10, "bytes to planned emission, a chunk", "µs", 8),
    "chunk_length": Figure(10, "cost a chunk, 10 MB over 1 MB", "x", 1.15),
    "council_first": Figure(11, "council: shown after the first token", "ms", 60),
    "page_40_main": native(12, "page at 40,000: main thread", "s", 0.60),
    "page_40_script": native(12, "page at 40,000: script", "s", 0.20),
    "page_40_longest": native(12, "page at 40,000: longest task", "ms", None),
    "page_40_heap": native(12, "page at 40,000: heap", "MB", 0.5),
    "page_200_main": native(12, "page at 200,000: main thread", "s", 0.55),
    "page_200_script": native(12, "page at 200,000: script", "s", 0.20),
    "page_200_longest": native(12, "page at 200,000: longest task", "ms", None),
    "page_200_heap": native(12, "page at 200,000: heap", "MB", 0.5),
    "crowd_wall": native(13, "50 at once: wall time", "s", 1),
    "crowd_delay": added(13, "50 at once: p99 delay of a word", "ms", 400),
    "crowd_memory": added(13, "50 at once: memory in use a run, in its text", "x", 3),
    "memory": Figure(14, "memory kept per 1,000 tokens", "kB", None),
    "memory_length": Figure(14, "the same, last quarter over first", "x", 1.1),
    "pause": Figure(14, "longest pause of the garbage collector", "ms", None),
    "verdict_gain": judged("best of 4 answers found more often than before", 4),
    "verdict_least": judged("the same, in the worst setting", 0),
    "worth_shuffling": judged("worth of shuffled answers", 0),
    "worth_scores": judged("worth of scores beside places", 0),
    "worth_places": judged("worth of places beside scores", None),
    "worth_places_high": judged("worth of places, scores near ten", 0),
    "worth_limit": judged("worth of the limit, one judge repeats the order", 0),
    "worth_levels": judged("worth of taking levels out", None),
    "worth_levels_spoiled": judged("worth of levels, one judge gives noughts", 0),
    "worth_kin": judged("worth of keeping the ballots of one model's seats", 0),
}


@dataclass(slots=True)
class Measured:
    """A figure as it was taken on each side; None where it makes no sense."""

    ours: float
    native: float | None = None
    message: float | None = None
    replace: float | None = None

    @property
    def sides(self) -> tuple[float | None, ...]:
        """The values in the order of `SIDES`."""
        return self.ours, self.native, self.message, self.replace


@dataclass(frozen=True, slots=True)
class Results:
    """All that a run of the benchmarks found: figures, and the curves of the plots."""

    figures: dict[str, Measured] = field(default_factory=dict)
    curves: dict[str, Any] = field(default_factory=dict)
    machine: dict[str, str] = field(default_factory=dict)

    def missed(self) -> list[str]:
        """The figures that are beyond their limits."""
        return [key for key, one in self.figures.items() if met(key, one) is False]

    def save(self, path: Path) -> None:
        """Write everything as JSON."""
        sides = {
            key: dict(zip(SIDES, one.sides, strict=True))
            for key, one in self.figures.items()
        }
        whole = {"machine": self.machine, "figures": sides, "curves": self.curves}
        path.write_text(json.dumps(whole, indent=1, ensure_ascii=False) + "\n")


def load(path: Path) -> Results:
    """Read what `save` wrote; nothing where there is no such file."""
    if not path.exists():
        return Results()
    whole = json.loads(path.read_text())
    figures = {
        key: Measured(*(sides[name] for name in SIDES))
        for key, sides in whole["figures"].items()
        if key in FIGURES
    }
    return Results(figures, whole["curves"], whole["machine"])


def compared(key: str, measured: Measured) -> float | None:
    """The number a limit is about."""
    if FIGURES[key].against == "itself":
        return measured.ours
    if measured.native is None:
        return None
    if FIGURES[key].against == "added":
        return measured.ours - measured.native
    return measured.ours / measured.native if measured.native else None


def met(key: str, measured: Measured) -> bool | None:
    """Whether a figure keeps its limit; None where there is none, or no number."""
    figure, number = FIGURES[key], compared(key, measured)
    if figure.most is None or number is None:
        return None
    return number >= figure.most if figure.at_least else number <= figure.most


def number_text(number: float | None) -> str:
    """A number with three digits that mean something."""
    if number is None:
        return ""
    if number == 0 or abs(number) >= 100:
        return f"{number:,.0f}"
    return f"{number:.3g}"


def limit_text(figure: Figure) -> str:
    """A limit as the table shows it."""
    if figure.most is None:
        return "reported"
    sign = "≥" if figure.at_least else "≤"
    plus = "+" if figure.against == "added" else ""
    unit = f" {figure.unit}" if figure.against != "native" and figure.unit else ""
    times = " × native" if figure.against == "native" else ""
    return f"{sign} {plus}{figure.most:g}{unit}{times}"


VERDICTS = {True: "met", False: "MISSED", None: ""}
HEAD = ("row", "figure", "unit", *SIDES, "compared", "limit", "verdict")


def cells(key: str, measured: Measured) -> tuple[str, ...]:
    """One line of the table."""
    figure = FIGURES[key]
    sides = [number_text(side) for side in measured.sides]
    ratio = "" if figure.against == "itself" else number_text(compared(key, measured))
    verdict = VERDICTS[met(key, measured)]
    return (
        str(figure.row),
        figure.what,
        figure.unit,
        *sides,
        ratio,
        limit_text(figure),
        verdict,
    )


def lines_of(figures: Mapping[str, Measured]) -> list[tuple[str, ...]]:
    """The table's lines in the order of `FIGURES`."""
    return [cells(key, figures[key]) for key in FIGURES if key in figures]


def aligned(lines: Iterable[tuple[str, ...]]) -> str:
    """The table for a terminal."""
    table = [HEAD, *lines]
    widths = [max(len(line[at]) for line in table) for at in range(len(HEAD))]
    return "\n".join(
        "  ".join(cell.ljust(width) for cell, width in zip(line, widths, strict=True))
        for line in table
    )


def markdown(lines: Iterable[tuple[str, ...]]) -> str:
    """The table for a README."""
    rule = tuple("--" for _ in HEAD)
    return "\n".join(f"| {' | '.join(line)} |" for line in [HEAD, rule, *lines])
