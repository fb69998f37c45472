"""The plots, as SVG written by hand."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from html import escape
from pathlib import Path
from typing import Any

Points = Sequence[tuple[float, float]]

WIDTH, HEIGHT = 720, 400
LEFT, RIGHT, TOP, BOTTOM = 76, 24, 76, 56
COLOURS = {
    "ours": "#1a7f4b",
    "native": "#2563b8",
    "message": "#c2570c",
    "replace": "#a31f5a",
    "memory": "#1a7f4b",
    "tasks": "#2563b8",
    "threads": "#c2570c",
    "files": "#a31f5a",
    "mean rank": "#2563b8",
    "majority": "#c2570c",
    "mean score": "#a31f5a",
}
NAMES = {
    "ours": "this plugin",
    "native": "native, one model",
    "message": "message per token",
    "replace": "replace per token",
    "mean rank": "mean rank (before)",
    "majority": "most first places",
    "mean score": "mean score",
}
HELD = {
    "memory": "memory in use",
    "tasks": "tasks",
    "threads": "threads",
    "files": "open files",
}
"""What a server holds on to, in place of sides."""
TEXT = "#333"
GRID = "#e3e3e3"


@dataclass(frozen=True, slots=True)
class Plot:
    """What a plot says; `logarithmic` is about its y axis."""

    title: str
    x_label: str
    y_label: str
    logarithmic: bool = False


@dataclass(frozen=True, slots=True)
class Axis:
    """Numbers from `low` to `high` on pixels from `start` to `end`."""

    low: float
    high: float
    start: float
    end: float
    logarithmic: bool = False

    def at(self, number: float) -> float:
        """The pixel of a number."""
        low, high, number = self.low, self.high, max(number, self.low)
        if self.logarithmic:
            low, high, number = math.log(low), math.log(high), math.log(number)
        return self.start + (number - low) / (high - low) * (self.end - self.start)

    def ticks(self) -> list[float]:
        """Round numbers along the axis."""
        if self.logarithmic:
            powers = range(
                round(math.log10(self.low)), round(math.log10(self.high)) + 1
            )
            return [10.0**power for power in powers]
        step = round_up(self.high / 6)
        return [step * n for n in range(int(self.high / step + 1e-9) + 1)]


def round_up(number: float) -> float:
    """The next of 1, 2 or 5 times a power of ten."""
    power: float = 10.0 ** math.floor(math.log10(number))
    return next(power * n for n in (1, 2, 5, 10) if power * n >= number * 0.999)


def axes(curves: Mapping[str, Points], plot: Plot) -> tuple[Axis, Axis]:
    """Axes that hold all curves."""
    xs = [x for points in curves.values() for x, _ in points]
    ys = [y for points in curves.values() for _, y in points if y > 0]
    low, high = 0.0, max(ys) * 1.05
    if plot.logarithmic:
        low = 10.0 ** math.floor(math.log10(min(ys)))
        high = 10.0 ** math.ceil(math.log10(max(ys)))
    x_axis = Axis(0, max(xs), LEFT, WIDTH - RIGHT)
    return x_axis, Axis(low, high, HEIGHT - BOTTOM, TOP, plot.logarithmic)


def label(x: float, y: float, text: str, more: str = "") -> str:
    """A text at a place."""
    return f'<text x="{x:.1f}" y="{y:.1f}" {more}>{escape(text)}</text>'


def line(x1: float, y1: float, x2: float, y2: float) -> str:
    """A line of the grid."""
    ends = f'x1="{x1:.1f}" y1="{y1:.1f}" x2="{x2:.1f}" y2="{y2:.1f}"'
    return f'<line {ends} stroke="{GRID}"/>'


def grid(x_axis: Axis, y_axis: Axis, plot: Plot) -> list[str]:
    """Both axes with their numbers and names."""
    parts = []
    for tick in y_axis.ticks():
        y = y_axis.at(tick)
        parts.append(line(LEFT, y, WIDTH - RIGHT, y))
        parts.append(label(LEFT - 8, y + 4, f"{tick:,g}", 'text-anchor="end"'))
    for tick in x_axis.ticks():
        x = x_axis.at(tick)
        parts.append(label(x, HEIGHT - BOTTOM + 20, f"{tick:,g}", MIDDLE))
    middle = (LEFT + WIDTH - RIGHT) / 2
    parts.append(label(middle, HEIGHT - 12, plot.x_label, MIDDLE))
    turned = f'{MIDDLE} transform="rotate(-90 18 {HEIGHT / 2})"'
    parts.append(label(18, HEIGHT / 2, plot.y_label, turned))
    return parts


MIDDLE = 'text-anchor="middle"'


def curve(points: Points, colour: str, x_axis: Axis, y_axis: Axis) -> str:
    """One curve."""
    shown = points if not y_axis.logarithmic else [p for p in points if p[1] > 0]
    places = " ".join(f"{x_axis.at(x):.1f},{y_axis.at(y):.1f}" for x, y in shown)
    style = f'fill="none" stroke="{colour}" stroke-width="2.5"'
    return f'<polyline points="{places}" {style} stroke-linejoin="round"/>'


def legend(sides: Sequence[str]) -> list[str]:
    """Which colour is whose."""
    parts = []
    for at, side in enumerate(sides):
        x = LEFT + at * 160
        box = f'x="{x}" y="46" width="14" height="4" fill="{COLOURS[side]}"'
        parts += [f"<rect {box}/>", label(x + 20, 52, (NAMES | HELD)[side])]
    return parts


def draw(plot: Plot, curves: Mapping[str, Points]) -> str:
    """A plot as an SVG document."""
    x_axis, y_axis = axes(curves, plot)
    size = f'width="{WIDTH}" height="{HEIGHT}" viewBox="0 0 {WIDTH} {HEIGHT}"'
    font = f'font-family="sans-serif" font-size="12" fill="{TEXT}"'
    lines = [curve(curves[s], COLOURS[s], x_axis, y_axis) for s in reversed([*curves])]
    parts = [
        f'<svg xmlns="http://www.w3.org/2000/svg" {size} {font} role="img">',
        f"<title>{escape(plot.title)}</title>",
        f'<rect width="{WIDTH}" height="{HEIGHT}" fill="white"/>',
        label(LEFT, 26, plot.title, 'font-size="16" font-weight="bold"'),
        *legend([*curves]),
        *grid(x_axis, y_axis, plot),
        *lines,
        "</svg>",
    ]
    return "\n".join(parts) + "\n"


# --- what is drawn from what was measured -------------------------------------------

LENGTH = "characters of the conversation so far"
BYTES = Plot("Bytes on the socket (200 tokens/s)", LENGTH, "megabytes", True)
CPU = Plot("Processor time of the server (200 tokens/s)", LENGTH, "seconds", True)
MEMBERS = Plot("First word of a model on the page", "members", "milliseconds")
SOAK = Plot(
    "What a server at rest holds, over a long run", "minutes", "times the first sample"
)
VERDICTS = Plot("How often the best answer is found", "members", "per cent")
PAGE = Plot("Busy time of the page (600 tokens/s)", LENGTH, "seconds of main thread")


def column(of: Mapping[str, Any], at: int, unit: float = 1.0) -> dict[str, Points]:
    """One column of each side's samples against the first one."""
    return {
        side: [(sample[0], sample[at] / unit) for sample in samples if sample[0]]
        for side, samples in of.items()
    }


DRAWN: dict[str, tuple[str, Plot, Callable[[Mapping[str, Any]], dict[str, Points]]]] = {
    "bytes.svg": ("by_length", BYTES, lambda of: column(of, 1, 1e6)),
    "cpu.svg": ("by_length", CPU, lambda of: column(of, 2)),
    "first_word.svg": ("by_members", MEMBERS, lambda of: column(of, 1)),
    "page.svg": ("page", PAGE, lambda of: column(of, 1)),
    "verdicts.svg": ("verdicts", VERDICTS, lambda of: column(of, 1)),
}
"""File -> the curves it needs, what it says, how its points are read."""


def write(curves: Mapping[str, Any], directory: Path) -> list[str]:
    """Draw what was measured; gives the names of the files."""
    written = []
    for name, (needed, plot, read) in DRAWN.items():
        if needed in curves:
            (directory / name).write_text(draw(plot, read(curves[needed])))
            written.append(name)
    return written
