"""Row 12: what the page costs Chromium, by Chromium's own metrics."""

from __future__ import annotations

import asyncio
import time
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, field
from statistics import median

import playwright.async_api as playwright

from benchmarks.measure import Ask, Bench
from benchmarks.table import Measured, Results
from tests.stack.browser import COPY, REPLY, STOP, Browser, OpenPage
from tests.stack.host import Json

LOOK_EVERY = 1.0
"""Seconds between two looks at a page."""
TIMEOUT = 240.0
"""Seconds an answer may take on the page."""
TRACE = {"includedCategories": ["scheduler.long_tasks"]}
"""What Chromium traces: the begin and the end of each task of some milliseconds."""
MAIN_THREAD = "CrRendererMain"
LENGTH = f"""() => {{
  const replies = document.querySelectorAll("{REPLY}");
  return replies.length ? replies[replies.length - 1].textContent.length : 0;
}}"""

TIMES = 2
"""How often 40,000 characters are streamed on each side, in turn."""
STREAMED = {
    "ours": Ask("ours", ("tokens-1900-600",) * 2, 2),
    "native": Ask("native", ("tokens-7600-600",)),
}
"""40,000 characters, every one of them streamed."""
RIVALS = {
    "message": Ask("message", ("tokens-950-600",) * 2),
    "replace": Ask("replace", ("tokens-950-600",) * 2),
}
"""A quarter of that."""
LONG = {
    "ours": Ask("ours", ("tokens-925-600",) * 2, 20),
    "native": Ask("native", ("tokens-37000-600",)),
}
"""200,000 characters."""


OVER_RUNS: dict[str, Callable[[Sequence[float]], float]] = {
    "main": median,
    "script": median,
    "longest": max,
    "heap": max,
}
"""What is taken of several runs: the median of what adds up, the highest peak."""


@dataclass(slots=True)
class Spent:
    """What a page has spent on one answer: seconds, megabytes, milliseconds."""

    main: float = 0.0
    script: float = 0.0
    heap: float = 0.0
    longest: float = 0.0
    curve: list[list[float]] = field(default_factory=list)


class Meter:
    """Reads the metrics of one tab."""

    def __init__(self, page: OpenPage):
        self.page = page
        self._trace: list[Json] = []
        self._traced = False
        self.spent = Spent()

    async def begin(self) -> None:
        """Count from here."""
        tab = self.page.tab
        self._session = await tab.context.new_cdp_session(tab)
        await self._session.send("Performance.enable")
        self._before = await self._metrics()
        self._session.on("Tracing.dataCollected", self._keep)
        self._session.on("Tracing.tracingComplete", self._end)
        start = {"transferMode": "ReportEvents", "traceConfig": TRACE}
        await self._session.send("Tracing.start", start)

    def _keep(self, part: Json) -> None:
        self._trace += part["value"]

    def _end(self, _: Json) -> None:
        self._traced = True

    async def _metrics(self) -> dict[str, float]:
        found = await self._session.send("Performance.getMetrics")
        return {metric["name"]: metric["value"] for metric in found["metrics"]}

    async def look(self) -> None:
        """Note what was spent so far."""
        now, spent = await self._metrics(), self.spent
        spent.main = now["TaskDuration"] - self._before["TaskDuration"]
        spent.script = now["ScriptDuration"] - self._before["ScriptDuration"]
        spent.heap = max(spent.heap, now["JSHeapUsedSize"] / 1e6)
        length = await self.page.tab.evaluate(LENGTH)
        if not spent.curve or length > spent.curve[-1][0]:
            spent.curve.append([length, round(spent.main, 2)])

    async def close(self) -> None:
        """Look for the last time, and note the longest task."""
        await self.look()
        await self._session.send("Tracing.end")
        deadline = time.monotonic() + TIMEOUT
        while not self._traced:
            if time.monotonic() > deadline:
                raise TimeoutError(f"no end of the trace after {TIMEOUT:g} s")
            await asyncio.sleep(0.1)
        self.spent.longest = longest_task(self._trace)

    async def finished(self) -> bool:
        """Whether the answer is there with its buttons."""
        tab = self.page.tab
        running = await tab.locator(STOP).count()
        return not running and bool(await tab.locator(COPY).count())


def longest_task(trace: Iterable[Json]) -> float:
    """Milliseconds of the longest task of a page's main thread in a trace.

    The page's own `longtask` entries lack tasks without a script: style and layout.

    Raises:
        ValueError: there is no task in the trace.
    """
    events = sorted(trace, key=lambda event: float(event["ts"]))
    named = [event for event in events if event["name"] == "thread_name"]
    mains = {(e["pid"], e["tid"]) for e in named if e["args"]["name"] == MAIN_THREAD}
    begun: dict[tuple[int, str], float] = {}
    lengths = []
    for event in events:
        if (event["pid"], event["tid"]) not in mains:
            continue
        task = event["pid"], event.get("id2", {}).get("local")
        if event["ph"] == "b":
            begun[task] = event["ts"]
        elif event["ph"] == "e" and task in begun:
            lengths.append(event["ts"] - begun.pop(task))
    return float(max(lengths)) / 1000


async def watch(browser: Browser, bench: Bench, ask: Ask) -> Spent:
    """Ask in a fresh tab, and give what the answer cost it."""
    page = await browser.open_as(bench.host, bench.admin, bench.seat(ask))
    try:
        meter = Meter(page)
        await meter.begin()
        await page.ask("Talk.")
        deadline = time.monotonic() + TIMEOUT
        while not await meter.finished():
            if time.monotonic() > deadline:
                raise TimeoutError(f"{ask.side}: no end after {TIMEOUT:g} s")
            await asyncio.sleep(LOOK_EVERY)
            await meter.look()
        await asyncio.sleep(LOOK_EVERY)
        await meter.close()
        return meter.spent
    except playwright.Error as error:
        raise RuntimeError(f"{ask.side}: the page failed: {error}") from error
    finally:
        await page.close()


async def repeated(
    browser: Browser, bench: Bench, asks: dict[str, Ask], times: int
) -> dict[str, list[Spent]]:
    """What each side costs, so often, in turn."""
    found: dict[str, list[Spent]] = {side: [] for side in asks}
    for _ in range(times):
        for side, ask in asks.items():
            found[side].append(await watch(browser, bench, ask))
    return found


async def stream_all(bench: Bench) -> Sequence[dict[str, list[Spent]]]:
    """Stream 40,000 characters, a quarter of them on rivals, and 200,000."""
    async with Browser() as browser:
        return [
            await repeated(browser, bench, asks, times)
            for asks, times in ((STREAMED, TIMES), (RIVALS, 1), (LONG, 1))
        ]


def measure(bench: Bench, results: Results) -> None:
    """Stream 40,000 characters on all sides and reach 200,000 on two."""
    bench.host.set_interface(bench.admin, {"title": {"auto": False}})
    streamed, rivals, long = asyncio.run(stream_all(bench))
    for length, found in (("40", streamed), ("200", long)):
        for name, over_runs in OVER_RUNS.items():
            sides = (
                over_runs([getattr(one, name) for one in times])
                for times in found.values()
            )
            results.figures[f"page_{length}_{name}"] = Measured(*sides)
    found = streamed | rivals
    results.curves["page"] = {side: times[0].curve for side, times in found.items()}
