"""A long mixed run on a real server, and a crowd: what is left of them.

python -m benchmarks.soak              30 minutes, after a crowd of a hundred
python -m benchmarks.soak --minutes 3

Writes `docs/soak.svg` and the figures of `docs/reliability.md`; ends with 1 where the
server holds more and more, or where a conversation was not as it should be. `soak.log`
then has these conversations whole, and what the server logged.
"""

from __future__ import annotations

import argparse
import asyncio
import random
import sys
import tempfile
import time
from collections import Counter
from collections.abc import Awaitable, Callable, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from statistics import median
from typing import Any

from benchmarks import plots
from benchmarks.__main__ import DOCS, machine
from benchmarks.measure import NO_POLLING, percentile, scripted_models
from tests.conftest import FUNCTION, FUNCTION_ID, FUNCTION_NAME
from tests.integration.crowd import LEAD, REFUSED, Crowd, Plan, ask_all
from tests.integration.document import write_part
from tests.integration.faults import (
    FAULTS,
    MODES,
    STEADY,
    TROUBLE,
    TROUBLE_ID,
    VALVES,
    Fault,
)
from tests.stack.host import Account, Counts, OpenWebUI
from tests.stack.page import Page, Reply, assert_same_text

SEED = 20_260_101
LOG = Path("soak.log")
PEOPLE = 10
CROWD = 100
WORKERS = 6
"""Conversations at a time in the long run."""
SAMPLES = 40
LEAST_GAP = 10.0
"""Seconds of work between two samples, at least."""
PATIENCE = 90.0
"""Seconds a conversation of the long run may take."""
OURS = Plan(CROWD, words=150, pace=8)
NATIVE = Plan(CROWD, words=150, pace=8, native=True)
WARM = Plan(8, words=10, pace=50)
SPEAKER = "crowd-40-100"
GROWTH = {"tasks": 2, "threads": 3, "files": 6, "memory": 0.05}
"""The most by which the median of the last third of the samples may be above that of
the second; memory as a share of it, the others as they are counted."""
LEAVES_TASKS = "tool-clings"
"""What goes on when it is cancelled would be counted as left behind."""
PLAYED = [
    fault
    for fault in FAULTS
    if any(fault.calls) and not fault.heavy and fault.seat == "one"
    if fault.name != LEAVES_TASKS
]


@dataclass(frozen=True, slots=True)
class Sample:
    """What the server held at rest: MB in use, and counts; `stall` in seconds."""

    minute: float
    conversations: int
    memory: float
    tasks: int
    threads: int
    files: int
    stall: float


@dataclass(slots=True)
class Soak:
    """A long run under way."""

    host: OpenWebUI
    accounts: Sequence[Account]
    chance: random.Random = field(default_factory=lambda: random.Random(SEED))
    work: asyncio.Event = field(default_factory=asyncio.Event)
    done: Counter[str] = field(default_factory=Counter)
    problems: list[str] = field(default_factory=list)
    refused: int = 0
    samples: list[Sample] = field(default_factory=list)
    busy: int = 0

    async def run(self, minutes: float) -> None:
        """Work and rest by turns; a sample at each rest."""
        await asyncio.to_thread(self.host.counts, memory=True)
        gap = max(minutes * 60 / SAMPLES, LEAST_GAP)
        begun = time.monotonic()
        people = zip(range(WORKERS), self.accounts, strict=False)
        workers = [asyncio.create_task(self._go_on(one)) for _, one in people]
        try:
            while time.monotonic() - begun < minutes * 60:
                self.work.set()
                await asyncio.sleep(gap)
                self.work.clear()
                await self._rest()
                await self._sample((time.monotonic() - begun) / 60)
        finally:
            for worker in workers:
                worker.cancel()
            await asyncio.gather(*workers, return_exceptions=True)

    async def _rest(self) -> None:
        async with asyncio.timeout(PATIENCE * 2):
            while self.busy:
                await asyncio.sleep(0.1)

    async def _sample(self, minute: float) -> None:
        # first, since counting the memory holds everything up
        stall = (await asyncio.to_thread(self.host.counts, watch=True)).stall
        await asyncio.to_thread(self.host.settled_counts)
        now: Counts = await asyncio.to_thread(self.host.counts, memory=True)
        sample = Sample(
            round(minute, 2),
            self.done.total(),
            round(now.memory / 1e6, 2),
            now.tasks,
            now.threads,
            now.files,
            round(stall, 3),
        )
        self.samples.append(sample)
        print(sample, flush=True)

    async def _go_on(self, account: Account) -> None:
        while True:
            await self.work.wait()
            self.busy += 1
            kind, play = self.chance.choice(SCENES)
            try:
                async with Page(self.host, account) as page, asyncio.timeout(PATIENCE):
                    await play(self, page)
                self.done[kind] += 1
            except (TimeoutError, AssertionError) as error:
                if REFUSED in str(error):
                    self.refused += 1
                    continue
                self.problems.append(f"{time.strftime('%X')} {kind}: {error!r}")
            finally:
                self.busy -= 1

    async def ask(self, page: Page, fault: Fault | None = None) -> Reply:
        """Ask, in any mode, two who work, or one with a fault between them."""
        mode = self.chance.choice(MODES)
        seats = ("steady-oak", fault.model, "steady-elm") if fault else (SPEAKER,) * 2
        lines = [f"{name} | {model}" for name, model in zip("ABC", seats, strict=False)]
        team = {"team": "\n".join(lines), "rounds": 2, "manager_model": LEAD}
        text = f"What do you say to m{self.chance.randrange(10_000):04}?"
        tools = [TROUBLE_ID] if fault and "tool" in fault.name else []
        return await page.send(
            f"{FUNCTION_ID}.{mode}",
            text,
            background_tasks={},
            tool_ids=tools,
            extra=team,
        )


async def undisturbed(soak: Soak, page: Page) -> None:
    """A conversation to its end."""
    await finish(page, await soak.ask(page))


async def faulty(soak: Soak, page: Page) -> None:
    """A conversation with a fault in it."""
    fault = soak.chance.choice(PLAYED)
    reply = await soak.ask(page, fault)
    await reply.wait_idle(PATIENCE)
    said = f"{fault.name}: {reply.error}\n{reply.text}"
    assert not reply.error and "internal error" not in reply.text, said


async def stopped(soak: Soak, page: Page) -> None:
    """A conversation that is stopped at some moment."""
    fault = soak.chance.choice([None, *PLAYED])
    reply = await soak.ask(page, fault)
    await asyncio.sleep(soak.chance.uniform(0, 2))
    await page.stop(reply)
    await reply.wait_idle(PATIENCE)
    assert "internal error" not in reply.text, reply.text


async def left(soak: Soak, page: Page) -> None:
    """A conversation whose page is closed and opened again in the middle."""
    reply = await soak.ask(page)
    await asyncio.sleep(soak.chance.uniform(0, 1))
    async with Page(soak.host, page.account) as again:
        chat = await again.open(str(reply.chat.id))
        await again.reply(reply.id).wait_idle(PATIENCE)
        assert chat.id == reply.chat.id
    await finish(page, reply)


async def finish(page: Page, reply: Reply) -> None:
    """See an answer end; what is shown is stored, and nothing failed."""
    await reply.wait_idle(PATIENCE)
    said = f"{reply.error}\n{reply.text}"
    assert not reply.error and "⚠️" not in reply.text, said
    assert_same_text(reply, await page.stored(str(reply.chat.id), reply.id))


Scene = Callable[[Soak, Page], Awaitable[None]]
SCENES: list[tuple[str, Scene]] = [
    ("to the end", undisturbed),
    ("with a fault", faulty),
    ("with a fault", faulty),
    ("stopped", stopped),
    ("page closed and opened again", left),
]


# --- what is found --------------------------------------------------------------------


def growth(samples: Sequence[Sample]) -> dict[str, float]:
    """By how much each count's last third is above its second, by their medians."""
    third = max(len(samples) // 3, 1)
    found = {}
    for name in GROWTH:
        values = [float(getattr(sample, name)) for sample in samples]
        before, after = median(values[third : 2 * third]), median(values[-third:])
        share = before if name == "memory" else 1.0
        found[name] = (after - before) / share
    return found


def grown(samples: Sequence[Sample]) -> list[str]:
    """What has grown more than it may."""
    return [
        f"{name} grew by {by:.3g}, which may be {GROWTH[name]:g} at most"
        for name, by in growth(samples).items()
        if by > GROWTH[name]
    ]


def curves(samples: Sequence[Sample]) -> dict[str, plots.Points]:
    """Each count over the minutes, in times of its first sample."""
    found: dict[str, plots.Points] = {}
    for name in plots.HELD:
        first = max(float(getattr(samples[0], name)), 1.0)
        found[name] = [(s.minute, getattr(s, name) / first) for s in samples]
    return found


def soak_table(soak: Soak) -> str:
    """The long run as Markdown."""
    first, last = soak.samples[0], soak.samples[-1]
    by = growth(soak.samples)
    kinds = ", ".join(f"{count} {kind}" for kind, count in soak.done.most_common())
    lines = [
        f"{last.conversations} conversations in {last.minute:.0f} minutes, "
        f"{WORKERS} at a time: {kinds}. {len(soak.problems)} were not as they should "
        f"be, and {soak.refused} questions were not stored by Open WebUI.",
        "",
        "| at rest | first sample | last sample | last third over the second | limit |",
        "|--|--|--|--|--|",
    ]
    for name, what in plots.HELD.items():
        unit, change = ("", f"{by[name]:+g}")
        if name == "memory":
            unit, change = (" MB", f"{by[name]:+.1%}")
        limit = f"{GROWTH[name]:.0%}" if name == "memory" else f"{GROWTH[name]:g}"
        values = [f"{getattr(one, name):g}{unit}" for one in (first, last)]
        lines.append(f"| {what} | {' | '.join(values)} | {change} | +{limit} |")
    return "\n".join([*lines, *told_about(soak.problems)])


def told_about(problems: Sequence[str]) -> list[str]:
    """The first problems, for the table's foot."""
    return ["", *(f"- {problem.splitlines()[0][:200]}" for problem in problems[:10])][
        : 11 if problems else 0
    ]


def crowd_table(ours: Crowd, native: Crowd, memory: tuple[float, float]) -> str:
    """The crowd as Markdown."""

    def cells(crowd: Crowd) -> list[str]:
        words = crowd.first_words or [0.0]
        return [
            str(CROWD - crowd.refused - len({p.split(":")[0] for p in crowd.problems})),
            str(crowd.refused),
            str(crowd.most),
            f"{median(words) * 1000:,.0f} ms",
            f"{percentile(words, 0.95) * 1000:,.0f} ms",
            f"{crowd.stall * 1000:,.0f} ms",
            f"{crowd.collection * 1000:,.0f} ms",
            f"{crowd.seconds:.0f} s",
        ]

    names = [
        "whole, and without a foreign word",
        "questions that Open WebUI could not store",
        "most at the same time",
        "first word, median",
        "first word, 95th percentile",
        "longest stall of the event loop",
        "longest collection of garbage",
        "all of them",
    ]
    rows = zip(names, cells(ours), cells(native), strict=True)
    before, after = memory
    lines = [f"| {CROWD} at once | conversations | native chats |", "|--|--|--|"]
    lines += [f"| {' | '.join(row)} |" for row in rows]
    lines += ["", f"Memory in use: {before:.1f} MB before, {after:.1f} MB after both."]
    return "\n".join([*lines, *told_about(ours.problems + native.problems)])


# --- the stack ------------------------------------------------------------------------


def models() -> list[str]:
    """All models that are needed."""
    speaking = [*OURS.models, *NATIVE.models, *WARM.models, SPEAKER]
    faulty = [model for fault in PLAYED for model in fault.models]
    return list(dict.fromkeys([*speaking, *STEADY, *faulty]))


async def measure_crowd(host: OpenWebUI, people: Sequence[Account]) -> list[str]:
    """A hundred at once, beside native chats; gives what was wrong."""
    await ask_all(host, people, WARM)
    await asyncio.to_thread(host.settled_counts)
    before = (await asyncio.to_thread(host.counts, memory=True)).memory / 1e6
    native = await ask_all(host, people, NATIVE)
    await asyncio.to_thread(host.settled_counts)
    ours = await ask_all(host, people, OURS)
    await asyncio.to_thread(host.settled_counts)
    after = (await asyncio.to_thread(host.counts, memory=True)).memory / 1e6
    table = crowd_table(ours, native, (before, after))
    print(table, flush=True)
    write_part("crowd", table)
    problems = ours.problems + native.problems
    if after > before * 1.1:
        problems.append(f"memory is {after:.1f} MB after {before:.1f} MB")
    return problems


async def measure(host: OpenWebUI, people: Sequence[Account], minutes: float) -> int:
    """Everything, on a server that is ready."""
    problems = await measure_crowd(host, people)
    await asyncio.to_thread(host.set_valves, FUNCTION_ID, VALVES)
    soak = Soak(host, people)
    await soak.run(minutes)
    table = soak_table(soak)
    write_part("soak", f"{on_machine()}\n\n{table}")
    (DOCS / "soak.svg").write_text(plots.draw(plots.SOAK, curves(soak.samples)))
    problems += soak.problems + grown(soak.samples)
    print("\n".join([table, *(problem[:400] for problem in problems)]))
    if problems:
        LOG.write_text("\n\n".join([*problems, host.log_tail(sys.maxsize)]))
    return bool(problems)


def on_machine() -> str:
    """What it was run on."""
    parts: dict[str, Any] = machine()
    return ", ".join(f"{name} {value}" for name, value in parts.items())


def main(arguments: Sequence[str] | None = None) -> int:
    """Run it all; 1 where something grew or was not as it should be."""
    parser = argparse.ArgumentParser(
        prog="benchmarks.soak",
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("--minutes", type=float, default=30)
    given = parser.parse_args(arguments)
    with (
        tempfile.TemporaryDirectory(prefix="soak-") as directory,
        scripted_models(models()) as url,
        OpenWebUI.start(Path(directory), url, extra_env=NO_POLLING) as host,
    ):
        host.sign_up_admin()
        host.install_function(FUNCTION_ID, FUNCTION_NAME, FUNCTION.read_text("utf-8"))
        host.create_tool(TROUBLE_ID, TROUBLE)
        host.open_models_to_all()
        people = [host.add_user(f"Person {number}") for number in range(PEOPLE)]
        return asyncio.run(measure(host, people, given.minutes))


if __name__ == "__main__":
    sys.exit(main())
