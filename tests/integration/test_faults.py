"""Every fault of the list, in every mode: it costs its own place and nothing else.

`make test` plays each fault in one mode, by turns, and a few in all four; `make faults`
plays all of them in all modes and writes the table of `docs/reliability.md`.
"""

import asyncio
import os
import re
import time
from collections.abc import AsyncIterator, Iterator
from dataclasses import dataclass, field
from itertools import cycle
from typing import Any

import pytest

from tests.conftest import FUNCTION_ID
from tests.integration.document import write_part
from tests.integration.faults import (
    FAULTS,
    FAULTY,
    MODES,
    STEADY,
    TROUBLE,
    TROUBLE_ID,
    VALVES,
    Fault,
    table,
)
from tests.integration.talk import assert_stored, items, reached, text_of_item
from tests.stack.host import OpenWebUI, free_port
from tests.stack.models import ModelServer
from tests.stack.page import Page, Reply

ALL = "MMC_FAULTS" in os.environ
AT_ONCE = 8
"""Conversations at a time; those with a heavy fault go alone, after the others."""
IN_ALL_MODES = ("http-500", "error-midway")
NAMES = ("Ann", "Rex", "Ben")

KEYS = re.compile(r"sk-[\w-]{8,}|Bearer \S{8,}")
ADDRESSES = re.compile(r"\d{1,3}(\.\d{1,3}){3}|localhost|https?://|/srv/")
TAGS = re.compile(r"<[a-zA-Z/!]|!DOCTYPE|/html|/body")
TRACES = re.compile(r"Traceback|File \"|line \d+, in |0x[0-9a-f]{6}|errno|\.py\b")


@dataclass(frozen=True, slots=True)
class Case:
    """One fault in one mode; its mark tells its requests from all others."""

    fault: Fault
    mode: str

    @property
    def mark(self) -> str:
        """What stands in the question and so in every prompt."""
        return f"[{self.mode}/{self.fault.name}]"


def chosen_cases() -> Iterator[Case]:
    """All of them, or each fault in one mode and a few in all."""
    for fault, turn in zip(FAULTS, cycle(range(4)), strict=False):
        for at, mode in enumerate(MODES):
            if ALL or at == turn or fault.name in IN_ALL_MODES:
                yield Case(fault, mode)


CASES = tuple(chosen_cases())


@dataclass(slots=True)
class Outcome:
    """What became of a case."""

    reply: Reply
    seconds: float
    calls: int
    complaints: list[str]


@dataclass(slots=True)
class Play:
    """All cases at work, so many at a time, and what each test found."""

    host: OpenWebUI
    models: ModelServer
    tasks: dict[Case, asyncio.Task[Outcome]] = field(default_factory=dict)
    held: dict[Case, float] = field(default_factory=dict)

    def begin(self, cases: list[Case]) -> None:
        """Start them: the light ones together, then each heavy one alone."""
        gate = asyncio.Semaphore(AT_ONCE)
        light = [case for case in cases if not case.fault.heavy]
        for case in light:
            self.tasks[case] = asyncio.create_task(self._in_turn(case, gate))
        before = list(self.tasks.values())
        for case in cases:
            if case.fault.heavy:
                task = asyncio.create_task(self._alone(case, before))
                self.tasks[case] = task
                before = [task]

    async def _in_turn(self, case: Case, gate: asyncio.Semaphore) -> Outcome:
        async with gate:
            return await self.converse(case)

    async def _alone(self, case: Case, before: list[asyncio.Task[Outcome]]) -> Outcome:
        if before:
            await asyncio.wait(before)
        return await self.converse(case)

    async def converse(self, case: Case) -> Outcome:
        """One conversation, from the question until the server is done with it."""
        fault = case.fault
        async with Page(self.host, self.host.admin) as page:
            begun = time.monotonic()
            reply = await page.send(
                f"{FUNCTION_ID}.{case.mode}",
                f"Which tree lasts? {case.mark}",
                background_tasks={},
                tool_ids=[TROUBLE_ID] if fault.card or "tool" in fault.name else [],
                extra=team_of(case),
            )
            found = []
            try:
                await reply.wait_done(2 * fault.limit)
                seconds = time.monotonic() - begun
                await reply.wait_idle(fault.limit)
                await assert_stored(page, reply)
            except TimeoutError as error:
                seconds = time.monotonic() - begun
                found.append(f"it did not end: {error}")
            except (AssertionError, ValueError) as error:
                found.append(f"what is stored is not what was shown: {error!s:.500}")
            finally:
                await page.stop_all()
        calls = [s for s in self.models.turns(*fault.models) if case.mark in s.text]
        return Outcome(reply, seconds, len(calls), found)

    async def end(self) -> None:
        """Stop what nobody waited for."""
        for task in self.tasks.values():
            task.cancel()
        await asyncio.gather(*self.tasks.values(), return_exceptions=True)


def team_of(case: Case) -> dict[str, Any]:
    """Who talks, as a preset of the request: the fault between two who work."""
    seated = {"Ann": "steady-oak", "Rex": case.fault.model, "Ben": "steady-elm"}
    lead = "steady-lead"
    if case.fault.seat == "all":
        *models, lead = case.fault.models
        seated = dict(zip(NAMES, models, strict=True))
    if case.fault.seat == "lead" and case.mode == "manager":
        lead, seated["Rex"] = case.fault.model, "steady-elm"
    lines = [f"{name} | {model}" for name, model in seated.items()]
    team = {"team": "\n".join(lines), "rounds": 1, "manager_model": lead}
    return team | ({"chair": "Ann"} if case.fault.seat != "all" else {})


@pytest.fixture(scope="module")
async def play(
    host: OpenWebUI, model_server: ModelServer, request: pytest.FixtureRequest
) -> AsyncIterator[Play]:
    """The faulty models, listed and limited, and every chosen case under way."""
    closed = {model for model in FAULTY if model.startswith("closed.")}
    served = STEADY | {m: FAULTY[m] for m in FAULTY if m not in closed}
    for name, behaviour in served.items():
        model_server.add(name, behaviour, listed=False)
    host.create_tool(TROUBLE_ID, TROUBLE)
    unheard = [model.removeprefix("closed.") for model in closed]
    settings = {
        "openai.api_base_urls": [
            model_server.openai_url,
            f"http://127.0.0.1:{free_port()}/v1",
            model_server.openai_url,
        ],
        "openai.api_keys": ["not-a-key"] * 3,
        "openai.api_configs": {
            "0": {},
            "1": {"prefix_id": "closed", "model_ids": unheard},
            "2": {"model_ids": list(served)},
        },
    }
    playing = Play(host, model_server)
    with host.configured(settings):
        host.models(refresh=True)
        host.set_valves(FUNCTION_ID, VALVES)
        try:
            calls = (getattr(item, "callspec", None) for item in request.session.items)
            params = [call.params.get("case") for call in calls if call]
            playing.begin([one for one in params if isinstance(one, Case)])
            yield playing
        finally:
            await playing.end()
            host.set_valves(FUNCTION_ID, {})
    host.models(refresh=True)
    if ALL and set(playing.tasks) == set(CASES):
        held = {(c.fault.name, c.mode): found for c, found in playing.held.items()}
        write_part("faults", table(held))


def section_of(reply: Reply, name: str) -> str:
    """What stands under a participant's first heading; nothing without one."""
    begun = re.search(rf"(?m)^### \S+ {name}\b.*$", reply.text)
    if begun is None:
        return ""
    return re.split(r"(?m)^### ", reply.text[begun.end() :])[0]


def notices(text: str) -> list[str]:
    """The lines in which somebody's failure is reported."""
    return [line for line in text.splitlines() if line.startswith("> ⚠️ **")]


def own_words(reply: Reply) -> list[str]:
    """Whatever the function itself says: notices, outcomes, states."""
    lines = [line for line in reply.text.splitlines() if line.startswith("> ")]
    return [*lines, *(str(status["description"]) for status in reply.statuses)]


def not_plain(reply: Reply) -> Iterator[str]:
    """A key or an address anywhere; a tag or a trace in what we say."""
    for line in (*reply.text.splitlines(), *map(text_of_item, reply.output)):
        for what, pattern in {"a key": KEYS, "an address": ADDRESSES}.items():
            if pattern.search(line):
                yield f"{what} is shown: {line[:300]}"
    for line in own_words(reply):
        for what, pattern in {"a tag": TAGS, "a trace": TRACES}.items():
            if pattern.search(line):
                yield f"{what} is shown: {line[:300]}"
        if len(line) > 1000:
            yield f"a line of {len(line)} characters: {line[:80]}"


def not_in_its_place(case: Case, reply: Reply) -> Iterator[str]:
    """The failure is named once, where it happened, and what was said stays."""
    fault = case.fault
    names = list(NAMES) if fault.seat == "all" else ["Rex"]
    if fault.seat == "lead" and case.mode == "manager":
        names = []
    for name in names:
        section = section_of(reply, name)
        said = notices(section)
        if len(said) != bool(fault.shows) or not all(fault.shows in s for s in said):
            yield f"{name}: {fault.shows!r} is to be shown, and {said} is"
        if fault.said not in section:
            yield f"{name}: {fault.said!r} is lost: {section[:200]!r}"
    if fault.card:
        cards = [text_of_item(item) for item in items(reply, "function_call_output")]
        calls = items(reply, "function_call")
        if not cards or len(cards) != len(calls):
            yield f"{len(calls)} calls have {len(cards)} results"
        if fault.card not in "\n".join(cards):
            yield f"{fault.card!r} is to be in a card: {str(cards)[:300]}"


def not_gone_on(case: Case, reply: Reply) -> Iterator[str]:
    """Those who work have spoken, and a council or debate has its conclusion."""
    wanted = {"Ann": "The oak it is.", "Ben": "The elm it is."}
    for name, words in wanted.items():
        if case.fault.seat != "all" and words not in section_of(reply, name):
            yield f"{name} did not say its words: {section_of(reply, name)[:200]!r}"
    concludes = case.mode in ("council", "debate") and case.fault.seat != "all"
    if concludes and "In the end it is the oak." not in reply.text:
        yield f"there is no conclusion: {reply.text[-300:]!r}"
    if reply.error is not None:
        yield f"an error stands over all: {reply.error}"
    if "internal error" in reply.text or not reply.statuses[-1]["done"]:
        yield f"it ended badly: {reply.text[-300:]!r}, {reply.statuses[-1]}"


def complaints(case: Case, outcome: Outcome) -> list[str]:
    """Everything about an outcome that is not as it should be."""
    fault, reply = case.fault, outcome.reply
    found = [*not_in_its_place(case, reply), *not_gone_on(case, reply)]
    found += [*not_plain(reply), *outcome.complaints]
    if outcome.seconds > fault.limit:
        found.append(f"it took {outcome.seconds:.1f} s, its limit is {fault.limit:g}")
    wanted = fault.calls[MODES.index(case.mode)]
    if outcome.calls != wanted:
        found.append(f"its model was asked {outcome.calls} times, not {wanted}")
    return found


@pytest.mark.parametrize(
    "case",
    [pytest.param(case, marks=case.fault.marks) for case in CASES],
    ids=lambda case: case.mark[1:-1],
)
async def test_a_fault_costs_its_own_place_and_nothing_else(
    play: Play, case: Case
) -> None:
    play.held[case] = -1.0
    outcome = await play.tasks[case]
    found = complaints(case, outcome)
    assert not found, "\n".join(["", *found])
    play.held[case] = outcome.seconds


async def test_after_all_faults_nothing_is_left_under_way(play: Play) -> None:
    if play.tasks:
        await asyncio.wait(play.tasks.values())
    await reached(lambda: play.models.wait_for(lambda m: m.in_flight == 0))
