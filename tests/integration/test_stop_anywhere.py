"""Stop at random moments of every mode: nothing is left, nothing said is lost."""

import os
import random
import sqlite3
import threading
import time
from contextlib import closing
from functools import partial
from pathlib import Path
from typing import Self

import pytest

from tests.conftest import FUNCTION_ID
from tests.integration.members import member
from tests.integration.talk import (
    Talk,
    finish,
    items,
    last_status,
    reached,
    results,
)
from tests.stack.host import Counts, OpenWebUI
from tests.stack.page import Page, Reply
from tests.stack.scripts import Behaviour, Body, Reasoning, Script, ToolCall, Usage
from tests.stack.waiting import wait_until
from tests.versions import ENDS_ITEMS

STOPS = int(os.environ.get("STOPS", "4"))
"""How often each mode is stopped; 50 for the figures in docs/reliability.md."""
MODES = ("round_robin", "manager", "council", "debate")
USED_BY_A_TOOL_CALL = 15


class LockMonitor:
    """Tries to write to the host's database all the time; knows the longest wait."""

    def __init__(self, path: Path) -> None:
        self.longest = 0.0
        self._path = path
        self._ended = threading.Event()
        self._thread = threading.Thread(target=self._watch, daemon=True)

    def _watch(self) -> None:
        with closing(sqlite3.connect(self._path, timeout=30)) as database:
            database.isolation_level = None
            while not self._ended.wait(0.01):
                begun = time.monotonic()
                database.execute("BEGIN IMMEDIATE")
                database.execute("ROLLBACK")
                self.longest = max(self.longest, time.monotonic() - begun)

    def __enter__(self) -> Self:
        self._thread.start()
        return self

    def __exit__(self, *exc: object) -> None:
        self._ended.set()
        self._thread.join()


def works(word: str) -> Behaviour:
    """Make a member that thinks, uses a tool once and then answers, in no hurry."""
    speaks = member(word)

    def behave(body: Body) -> Script:
        script = speaks(body)
        fresh = body["messages"][-1]["role"] != "tool"
        if body.get("tools") and fresh:
            call = ToolCall("look_up", '{"topic": "trees"}')
            thought = Reasoning("Let me think about trees. ")
            return Script([thought, call, Usage(10, 5)], pace=200)
        return Script([*script.steps, Usage(20, 10)], pace=100)

    return behave


@ENDS_ITEMS
@pytest.mark.parametrize("mode", MODES)
async def test_stop_at_any_moment(
    talk: Talk, host: OpenWebUI, garden: str, mode: str
) -> None:
    for name in ("ann", "ben", "cy"):
        talk.add_model(f"stops-{name}", works(name))
    team = ("Ann | stops-ann", "Ben | stops-ben", "Cy | stops-cy")
    talk.seat(*team, rounds=2, manager_model="manager")
    chance = random.Random(mode)
    longest_stop, cut_off = 0.0, 0
    async with talk.page() as page:
        await finish(page, await begin(page, mode, garden))
        before = await reached(host.settled_counts)
        with LockMonitor(host.data_dir / "webui.db") as monitor:
            for _ in range(STOPS):
                reply = await begin(page, mode, garden)
                took = await stop(talk, page, reply, chance.randrange(1, 60))
                longest_stop = max(longest_stop, took)
                cut_off += last_status(reply).startswith("Stopped")
        print(f"{mode}: {cut_off} of {STOPS} cut off", end=", ")
        print(f"closed after {longest_stop:.2f} s at most", end=", ")
        print(f"the database locked for {monitor.longest:.2f} s at most")
        assert cut_off >= STOPS / 2
        assert longest_stop < 0.5
        assert monitor.longest < 1.0
        back = partial(is_back, host, before)
        await reached(partial(wait_until, back, 10, "no task and no file is left"))


async def begin(page: Page, mode: str, tool: str) -> Reply:
    """Ask, and do not wait."""
    return await page.send(
        f"{FUNCTION_ID}.{mode}", "Which tree?", background_tasks={}, tool_ids=[tool]
    )


async def stop(talk: Talk, page: Page, reply: Reply, event: int) -> float:
    """Press Stop after so many events, if it has not ended by then; gives the seconds
    until no model is asked any more."""
    await reply.wait_for(lambda r: len(r.events) >= event or r.done)
    used = bool(items(reply, "function_call_output"))
    await page.stop(reply)
    stopped_at = time.monotonic()
    await reached(partial(talk.models.wait_for, lambda m: m.in_flight == 0))
    took = time.monotonic() - stopped_at
    await finish(page, reply)
    results(reply)
    assert "in_progress" not in str(reply.output)
    assert "This is what was saved" not in reply.text
    assert all(call.closed.is_set() for call in page.calls)
    if used:
        stored = await page.stored(reply.chat.id or "", reply.id)
        assert stored["usage"]["total_tokens"] >= USED_BY_A_TOOL_CALL
    return took


def is_back(host: OpenWebUI, before: Counts) -> bool:
    """Whether the server has no more tasks and open files than it had."""
    now = host.counts()
    return now.tasks <= before.tasks and now.files <= before.files
