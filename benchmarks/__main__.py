"""Measure the plugin beside native chats and two rivals, and say which limits hold.

python -m benchmarks               all rows, plots included; 15 minutes
python -m benchmarks 5 11          these rows
python -m benchmarks curve         the curve of the flush interval
python -m benchmarks --quick       the rows that need no server
"""

from __future__ import annotations

import argparse
import asyncio
import platform
import sys
import time
from collections.abc import Awaitable, Callable, Sequence
from dataclasses import dataclass
from importlib.metadata import version
from pathlib import Path
from typing import Any

from benchmarks import core, plots, served, verdicts
from benchmarks import page as on_page
from benchmarks.measure import Bench, stack
from benchmarks.table import (
    FIGURES,
    Measured,
    Results,
    aligned,
    lines_of,
    load,
    markdown,
)
from tests.stack.page import Page

RESULTS = Path(__file__).parent / "results.json"
DOCS = Path(__file__).parents[1] / "docs"
CURVE = 0
"""Stands for the curve of the flush interval, which is no row of the table."""


@dataclass(frozen=True, slots=True)
class Pure:
    """Rows that need nothing but the plugin."""

    rows: tuple[int, ...]
    measure: Callable[[], dict[str, Measured]]
    curves: Callable[[], dict[str, Any]] = dict


@dataclass(frozen=True, slots=True)
class Served:
    """Rows that need a server."""

    rows: tuple[int, ...]
    measure: Callable[[Bench, Page, Results], Awaitable[None]]


@dataclass(frozen=True, slots=True)
class Shown:
    """Rows that need a browser too."""

    rows: tuple[int, ...]
    measure: Callable[[Bench, Results], None]


PURE = (
    Pure((9,), core.tool_arguments),
    Pure((10,), core.stream_cost),
    Pure((14,), core.memory),
    Pure((15,), verdicts.measure, verdicts.curves),
)
SERVED = (
    Served((1, 2, 3), served.streaming_200),
    Served((1, 2, 3), served.streaming_50),
    Served((2,), served.council_events),
    Served((4,), served.throughput),
    Served((5,), served.first_character),
    Served((6,), served.growth),
    Served((7,), served.database),
    Served((8,), served.lookups),
    Served((11,), served.council_first),
    Served((CURVE,), served.interval_curve),
    Served((13,), served.fifty),
)
SHOWN = (Shown((12,), on_page.measure),)
Group = Pure | Served | Shown


def machine() -> dict[str, str]:
    """What the figures were taken on."""
    cpu = platform.processor() or platform.machine()
    info = Path("/proc/cpuinfo")
    lines = info.read_text().splitlines() if info.exists() else []
    names = [line.partition(":")[2].strip() for line in lines if "model name" in line]
    return {
        "processor": f"{len(names) or '?'} × {names[0] if names else cpu}",
        "system": f"{platform.system()} {platform.machine()}",
        "python": platform.python_version(),
        "open-webui": version("open-webui"),
        "day": time.strftime("%Y-%m-%d", time.gmtime()),
    }


def keep(results: Results) -> None:
    """Save what there is so far, over what an earlier run found."""
    kept = load(RESULTS)
    kept.figures.update(results.figures)
    kept.curves.update(results.curves)
    Results(kept.figures, kept.curves, results.machine).save(RESULTS)


class Progress:
    """Says what is being measured and for how long the whole has run."""

    def __init__(self) -> None:
        self._begun = time.monotonic()

    def __call__(self, group: Group) -> None:
        """Announce one group of rows."""
        numbers = [str(row) if row else "curve" for row in group.rows]
        name = getattr(group.measure, "__name__", "").replace("_", " ")
        seconds = time.monotonic() - self._begun
        print(f"{seconds:5.0f} s  {', '.join(numbers):8} {name}", flush=True)


async def serve(bench: Bench, groups: Sequence[Served], results: Results) -> None:
    """Take the rows that need a server and a socket."""
    async with bench.page() as page:
        await served.warm_up(bench, page)
    for group in groups:
        PROGRESS(group)
        async with bench.page() as page:
            await group.measure(bench, page, results)
        keep(results)


PROGRESS = Progress()


def run(rows: set[int], results: Results) -> None:
    """Take these rows."""
    for pure in PURE:
        if rows & {*pure.rows}:
            PROGRESS(pure)
            results.figures.update(pure.measure())
            results.curves.update(pure.curves())
            keep(results)
    with_server = [group for group in SERVED if rows & {*group.rows}]
    with_browser = [group for group in SHOWN if rows & {*group.rows}]
    if not with_server and not with_browser:
        return
    with stack() as bench:
        if with_server:
            asyncio.run(serve(bench, with_server, results))
        for shown in with_browser:
            PROGRESS(shown)
            shown.measure(bench, results)
            keep(results)


def chosen_rows(arguments: Sequence[str] | None) -> set[int]:
    """The rows the command line asks for, all of them by default, or none."""
    parser = argparse.ArgumentParser(
        prog="benchmarks",
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("--quick", action="store_true", help="what needs no server")
    parser.add_argument("--table", action="store_true", help="show the last results")
    # A row is a number; the curve of the flush interval is asked for by name.
    known = {*(str(figure.row) for figure in FIGURES.values()), "curve"}
    parser.add_argument("rows", nargs="*", metavar="row", help="a number, or curve")
    given = parser.parse_args(arguments)
    unknown = [row for row in given.rows if row not in known]
    if unknown:
        parser.error(f"there is no row {unknown[0]}")
    rows = {CURVE if row == "curve" else int(row) for row in given.rows}
    if given.table:
        return set()
    if given.quick:
        return {row for pure in PURE for row in pure.rows if not rows or row in rows}
    return rows or {CURVE, *(figure.row for figure in FIGURES.values())}


CURVE_HEAD = "| interval (ms) | bytes a token | CPU s per 1,000 tokens | {} |\n{}"
GAPS = "median gap (ms) | p99 gap (ms)"


def report(results: Results) -> str:
    """What was found last, as Markdown."""
    machine = ", ".join(f"{name} {value}" for name, value in results.machine.items())
    lines = [machine, "", markdown(lines_of(results.figures)), ""]
    curve = results.curves.get("interval")
    if curve:
        lines.append(CURVE_HEAD.format(GAPS, "|" + "--|" * 5))
        rows = [*curve["ours"], ["native", *curve["native"]]]
        for name, size, cpu, *gaps in rows:
            numbers = [f"{size:.1f}", f"{cpu:.3f}", *(f"{gap:.1f}" for gap in gaps)]
            lines.append(f"| {' | '.join([str(name), *numbers])} |")
    return "\n".join(lines)


def main(arguments: Sequence[str] | None = None) -> int:
    """Measure, print the table, keep the results; 1 when a limit was missed."""
    rows, results = chosen_rows(arguments), Results(machine=machine())
    if not rows:
        print(report(load(RESULTS)))
        return 0
    run(rows, results)
    print("\n" + aligned(lines_of(results.figures)))
    for name in plots.write(results.curves, DOCS):
        print(f"drawn: {name}")
    missed = results.missed()
    print("All limits hold." if not missed else f"Missed: {', '.join(missed)}")
    return bool(missed)


if __name__ == "__main__":
    sys.exit(main())
