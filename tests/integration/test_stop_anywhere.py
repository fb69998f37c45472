"""Stop at random moments of every mode: nothing is left, nothing said is lost."""

import os
import random
import sqlite3
import threading
import time
from contextlib import closing
from pathlib import Path

import pytest

from tests.conftest import FUNCTION_ID
from tests.integration.talk import Talk, finish, reached, results
from tests.stack.host import OpenWebUI
from tests.stack.members import member
from tests.stack.page import Page
from tests.stack.scripts import (
    Behaviour,
    Body,
    Reasoning,
    Script,
    ToolCall,
    Usage,
)

STOPS = int(os.environ.get("STOPS", "8"))
"""How often each mode is stopped; 50 for the figures in docs/reliability.md."""
MODES = ("round_robin", "manager", "council", "debate")


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
                took = time.monotonic() - begun
                if took > 0.3:
                    print("WAITED", round(took, 2), time.strftime("%H:%M:%S"))
                self.longest = max(self.longest, took)

    def __enter__(self) -> "LockMonitor":
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


@pytest.mark.parametrize("mode", MODES)
async def test_stop_at_any_moment(
    talk: Talk, host: OpenWebUI, garden: str, mode: str
) -> None:
    for name in ("ann", "ben", "cy"):
        try:
            talk.add_model(f"stops-{name}", works(name))
        except Exception:
            print(host.log_tail(80))
            raise
    talk.seat(
        "Ann | stops-ann",
        "Ben | stops-ben",
        "Cy | stops-cy",
        rounds=2,
        manager_model="manager",
    )
    chance = random.Random(mode)
    with LockMonitor(host.data_dir / "webui.db") as monitor:
        async with talk.page() as page:
            for _ in range(STOPS):
                await stop_once(talk, page, mode, garden, chance.randrange(1, 60))
    print("LONGEST", monitor.longest)
    assert monitor.longest < 1.0


async def stop_once(talk: Talk, page: Page, mode: str, tool: str, event: int) -> None:
    """Press Stop after so many events, if it has not ended by then."""
    reply = await page.send(
        f"{FUNCTION_ID}.{mode}", "Which tree?", background_tasks={}, tool_ids=[tool]
    )
    await reply.wait_for(lambda r: len(r.events) >= event or r.done)
    used = reply.usage
    if reply.chat.id is None:
        print("ERROR", reply.error, talk.host.log_tail(150))
    await page.stop(reply)
    stopped_at = time.monotonic()
    await reached(lambda: talk.models.wait_for(lambda m: m.in_flight == 0, 5))
    assert time.monotonic() - stopped_at < 0.5
    try:
        await finish(page, reply)
    except Exception:
        print(time.strftime("%H:%M:%S"), "FAILED", talk.host.log_tail(300))
        raise
    results(reply)
    assert "in_progress" not in str(reply.output)
    assert all(call.closed.is_set() for call in page.calls)
    print(
        mode,
        event,
        len(reply.events),
        used is not None,
        reply.usage is not None,
        reply.statuses[-1:],
        len(reply.text),
    )
