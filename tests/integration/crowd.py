"""Many conversations at once, whose every word tells to which of them it belongs."""

from __future__ import annotations

import asyncio
import re
import time
from collections.abc import Sequence
from contextlib import AsyncExitStack
from dataclasses import dataclass, field

from tests.conftest import FUNCTION_ID
from tests.integration.faults import MODES, steady
from tests.stack.behaviours import manager, with_tasks
from tests.stack.host import Account, OpenWebUI
from tests.stack.page import Page, Reply, assert_same_text
from tests.stack.prompts import stage_of, whole_text
from tests.stack.scripts import Behaviour, Body, Script, Text

MARK = re.compile(r"\bm\d{4}\b")
TURNS = {"round_robin": 4, "manager": 4, "council": 3, "debate": 5}
"""Speeches of two participants in two rounds, conclusions included."""
FAMILY = re.compile(r"crowd-(\d+)-(\d+)")
LEAD = "crowd-lead"
REFUSED = "INSERT INTO chat "
"""Of the host's own error where its SQLite does not take a new chat: at once, where a
write of another one came between its reading and its writing. No model is asked then.
"""


def speech(mark: str, count: int) -> str:
    """So many words, each with the mark."""
    return " ".join(f"{mark}.{number}" for number in range(count))


def marked(count: int, pace: float) -> Behaviour:
    """Make a member whose every word has the mark of its conversation."""
    judges = steady("")

    def behave(body: Body) -> Script:
        if stage_of(body) in ("review", "vote"):
            return judges(body)
        marks = set(MARK.findall(whole_text(body)))
        mark = marks.pop() if len(marks) == 1 else f"mixed up: {sorted(marks)}"
        return Script([Text(speech(mark, count))], pace=pace)

    return with_tasks(behave)


def of_crowd(model: str) -> Behaviour | None:
    """Make the model an id describes: `crowd-40-20` says 40 words, 20 a second."""
    if model == LEAD:
        return with_tasks(manager)
    match = FAMILY.fullmatch(model)
    return marked(int(match[1]), float(match[2])) if match else None


@dataclass(frozen=True, slots=True)
class Plan:
    """How many conversations, how long a turn's speech, and at which pace.

    With `native` each is one plain answer, as long as four turns.
    """

    count: int
    words: int
    pace: int
    native: bool = False

    @property
    def member(self) -> str:
        """The model that everybody is, or that answers alone."""
        return f"crowd-{self.length}-{self.pace}"

    @property
    def length(self) -> int:
        """Words of one speech."""
        return self.words * (4 if self.native else 1)

    @property
    def models(self) -> tuple[str, ...]:
        """All models it takes."""
        return (self.member, LEAD)


@dataclass(slots=True)
class Crowd:
    """What came of it; times in seconds."""

    first_words: list[float] = field(default_factory=list)
    problems: list[str] = field(default_factory=list)
    refused: int = 0
    """Questions that the host could not store."""
    seconds: float = 0.0
    stall: float = 0.0
    """The longest delay of the server's event loop."""
    collection: float = 0.0
    """The longest collection of garbage, in which the loop stands still."""
    most: int = 0
    """How many were under way at the same time."""


async def ask_all(host: OpenWebUI, accounts: Sequence[Account], plan: Plan) -> Crowd:
    """Ask them all, one after the other, as fast as the host takes the questions.

    All at the same instant is more than the host's SQLite can do, natively too.
    """
    crowd, begun = Crowd(), time.monotonic()
    await asyncio.to_thread(host.counts, watch=True)
    async with AsyncExitStack() as stack:
        pages = [
            await stack.enter_async_context(Page(host, account)) for account in accounts
        ]
        asked: list[tuple[Reply, asyncio.Task[None]]] = []
        for number in range(plan.count):
            page = pages[number % len(pages)]
            mode = MODES[number // len(pages) % len(MODES)]
            mark = f"m{number:04}"
            reply = await page.send(
                plan.member if plan.native else f"{FUNCTION_ID}.{mode}",
                f"What do you say to {mark}?",
                background_tasks={},
                extra={} if plan.native else team(plan),
            )
            turns = 1 if plan.native else TURNS[mode]
            told = [speech(mark, plan.length)] * turns
            watching = asyncio.create_task(follow(page, reply, told, crowd))
            asked.append((reply, watching))
            under_way = sum(1 for one, _ in asked if not one.done)
            crowd.most = max(crowd.most, under_way)
        await asyncio.gather(*(watching for _, watching in asked))
    crowd.seconds = time.monotonic() - begun
    counts = await asyncio.to_thread(host.counts, watch=True)
    crowd.stall, crowd.collection = counts.stall, counts.collection
    return crowd


def team(plan: Plan) -> dict[str, object]:
    """Two participants in two rounds, as a preset of the request."""
    lines = f"Ann | {plan.member}\nBen | {plan.member}"
    return {"team": lines, "rounds": 2, "manager_model": LEAD}


async def follow(page: Page, reply: Reply, told: list[str], crowd: Crowd) -> None:
    """Note when its first word comes; at its end, what is wrong with it."""
    first, mark = told[0].split()[0], told[0].partition(".")[0]
    try:
        await reply.wait_for(lambda one: first in one.text, 120)
        crowd.first_words.append(time.monotonic() - reply.asked_at)
        await reply.wait_done(240)
        await reply.wait_idle(60)
        stored = await page.stored(str(reply.chat.id), reply.id)
        assert_same_text(reply, stored)
    except (TimeoutError, AssertionError) as error:
        if REFUSED in str(reply.error):
            crowd.refused += 1
            return
        crowd.problems.append(f"{mark}: {error}")
    crowd.problems += [f"{mark}: {found}" for found in wrong_with(reply, told, mark)]


def wrong_with(reply: Reply, told: list[str], mark: str) -> list[str]:
    """What is lost or foreign in an answer."""
    found = []
    if reply.error:
        found.append(f"an error: {reply.error}")
    if foreign := set(MARK.findall(reply.text)) - {mark}:
        found.append(f"words of {sorted(foreign)}")
    if "mixed up" in reply.text or "⚠️" in reply.text:
        found.append(f"a failure: {reply.text[-200:]}")
    whole = reply.text.count(told[0])
    if whole != len(told):
        found.append(f"{whole} whole turns, not {len(told)}: {reply.text[-200:]}")
    return found
