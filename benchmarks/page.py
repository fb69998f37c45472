"""Row 12: what the page costs Chromium, by Chromium's own metrics."""

from __future__ import annotations

import time
from dataclasses import dataclass, field
from statistics import median

import playwright.sync_api as playwright

from benchmarks.measure import Ask, Bench
from benchmarks.table import Measured, Results
from tests.stack.browser import COPY, REPLY, STOP, Browser, OpenPage

LOOK_EVERY = 1.0
"""Seconds between two looks at a page."""
TIMEOUT = 240.0
"""Seconds an answer may take on the page."""
WATCH_TASKS = """() => {
  window.longestTask = 0;
  const note = list => list.getEntries().forEach(
    entry => window.longestTask = Math.max(window.longestTask, entry.duration));
  new PerformanceObserver(note).observe({entryTypes: ["longtask"]});
}"""
LENGTH = f"""() => {{
  const replies = document.querySelectorAll("{REPLY}");
  return replies.length ? replies[replies.length - 1].textContent.length : 0;
}}"""

TIMES = 3
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
    "ours": Ask("ours", ("tokens-4600-600",) * 2, 4),
    "native": Ask("native", ("tokens-37000-600",)),
}
"""200,000 characters."""


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
        self._session = page.tab.context.new_cdp_session(page.tab)
        self._session.send("Performance.enable")
        self._before = self._metrics()
        self.spent = Spent()
        page.tab.evaluate(WATCH_TASKS)

    def _metrics(self) -> dict[str, float]:
        found = self._session.send("Performance.getMetrics")["metrics"]
        return {metric["name"]: metric["value"] for metric in found}

    def look(self) -> None:
        """Note what was spent so far."""
        now, spent = self._metrics(), self.spent
        spent.main = now["TaskDuration"] - self._before["TaskDuration"]
        spent.script = now["ScriptDuration"] - self._before["ScriptDuration"]
        spent.heap = max(spent.heap, now["JSHeapUsedSize"] / 1e6)
        length = self.page.tab.evaluate(LENGTH)
        spent.longest = self.page.tab.evaluate("() => window.longestTask")
        if not spent.curve or length > spent.curve[-1][0]:
            spent.curve.append([length, round(spent.main, 2)])

    def finished(self) -> bool:
        """Whether the answer is there with its buttons."""
        tab = self.page.tab
        return not tab.locator(STOP).count() and bool(tab.locator(COPY).count())


def watch(browser: Browser, bench: Bench, ask: Ask) -> Spent:
    """Ask in a fresh tab, and give what the answer cost it."""
    page = browser.open_as(bench.host, bench.admin, bench.seat(ask))
    try:
        meter = Meter(page)
        page.ask("Talk.")
        deadline = time.monotonic() + TIMEOUT
        while not meter.finished():
            if time.monotonic() > deadline:
                raise TimeoutError(f"{ask.side}: no end after {TIMEOUT:g} s")
            page.tab.wait_for_timeout(LOOK_EVERY * 1000)
            meter.look()
        page.tab.wait_for_timeout(LOOK_EVERY * 1000)
        meter.look()
        return meter.spent
    except playwright.Error as error:
        raise RuntimeError(f"{ask.side}: the page failed: {error}") from error
    finally:
        page.close()


def repeated(
    browser: Browser, bench: Bench, asks: dict[str, Ask], times: int
) -> dict[str, list[Spent]]:
    """What each side costs, so often, in turn."""
    found: dict[str, list[Spent]] = {side: [] for side in asks}
    for _ in range(times):
        for side, ask in asks.items():
            found[side].append(watch(browser, bench, ask))
    return found


def measure(bench: Bench, results: Results) -> None:
    """Stream 40,000 characters on all sides and reach 200,000 on two."""
    bench.host.set_interface(bench.admin, {"title": {"auto": False}})
    with Browser() as browser:
        streamed = repeated(browser, bench, STREAMED, TIMES)
        rivals = repeated(browser, bench, RIVALS, 1)
        long = repeated(browser, bench, LONG, 1)
    for length, found in (("40", streamed), ("200", long)):
        for name in ("main", "script", "longest", "heap"):
            sides = (
                median(getattr(one, name) for one in times) for times in found.values()
            )
            results.figures[f"page_{length}_{name}"] = Measured(*sides)
    found = streamed | rivals
    results.curves["page"] = {side: times[0].curve for side, times in found.items()}
