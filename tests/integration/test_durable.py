"""A server that dies in mid-run loses no turn that was over, and the chat goes on."""

import json
import os
import signal
import sqlite3
from collections.abc import Iterator
from contextlib import closing
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path

import pytest

from tests.conftest import FUNCTION, FUNCTION_ID, FUNCTION_NAME
from tests.integration.conftest import GARDEN
from tests.integration.talk import ask, headings, reached
from tests.stack.behaviours import choice
from tests.stack.host import Json, OpenWebUI
from tests.stack.members import member
from tests.stack.models import ModelServer
from tests.stack.page import Chat, Page, Reply
from tests.stack.prompts import stage_of
from tests.stack.scripts import Behaviour, Body, Gate, Script, Text, ToolCall
from tests.stack.waiting import wait_until

SAVED = "> ⏳ This is what was saved while the conversation went on."
OAK, ELM, FIR = (f"The {tree} it is" for tree in ("oak", "elm", "fir"))


def halts(at: int, usually: Behaviour, stage: str = "answer") -> Behaviour:
    """Make a model that stops in mid-sentence the nth time it is asked for this."""
    asked = 0

    def behave(body: Body) -> Script:
        nonlocal asked
        asked += stage_of(body) == stage
        if asked == at and stage_of(body) == stage:
            return Script([Text("Half a word "), Gate("doom"), Text("is whole.")])
        return usually(body)

    return behave


def leads(at: int) -> Behaviour:
    """Make a manager that does not answer the nth question."""
    asked = 0

    def behave(body: Body) -> Script:
        nonlocal asked
        asked += 1
        answer = Text(choice("Ann" if asked % 2 else "Ben", "So be it."))
        return Script([Gate("doom"), answer] if asked == at else [answer])

    return behave


def digs(body: Body) -> Script:
    """Call a tool that never ends."""
    return Script([Text("Let me dig. "), ToolCall("never_ends")])


@dataclass(frozen=True, slots=True)
class Scene:
    """A conversation that stands still in one stage, and what is stored by then."""

    mode: str
    models: dict[str, Behaviour]
    there: tuple[str, ...]
    preset: Json = field(default_factory=dict)


def scenes() -> dict[str, Scene]:
    """Each mode in each of its stages."""
    oak, elm, fir = (member(tree) for tree in ("oak", "elm", "fir"))
    halt_at_the_end = {
        name: halts(1, each, "conclusion")
        for name, each in (("Ann", oak), ("Ben", elm), ("Cy", fir))
    }
    return {
        "turns": Scene(
            "round_robin",
            {"Ann": oak, "Ben": halts(4, elm)},
            ("· round 4 of 5", OAK, ELM),
            {"rounds": 5},
        ),
        "tool": Scene("round_robin", {"Ann": oak, "Ben": digs}, (OAK,)),
        "manager": Scene(
            "manager", {"Ann": oak, "Ben": elm, "Lead": leads(3)}, (OAK, ELM)
        ),
        "answers": Scene(
            "council", {"Ann": oak, "Ben": elm, "Cy": halts(1, fir)}, (OAK, ELM)
        ),
        "ranking": Scene(
            "council",
            {"Ann": oak, "Ben": elm, "Cy": halts(1, fir, "review")},
            (OAK, ELM, FIR),
        ),
        "conclusion": Scene("council", halt_at_the_end, (OAK, ELM, FIR, "🏆 Ranking")),
        "debate": Scene(
            "debate", {"Ann": oak, "Ben": halts(2, elm)}, (OAK, ELM), {"rounds": 2}
        ),
        "votes": Scene(
            "debate",
            {"Ann": oak, "Ben": elm, "Cy": halts(1, fir, "vote")},
            (OAK, ELM, FIR),
            {"rounds": 1},
        ),
    }


class Doomed:
    """A server of its own that can be killed and comes back on the same data."""

    def __init__(self, data_dir: Path, models: ModelServer) -> None:
        self.models, self.data_dir = models, data_dir
        self.start()
        self.account = self.host.sign_up_admin()
        source = FUNCTION.read_text("utf-8")
        self.host.install_function(FUNCTION_ID, FUNCTION_NAME, source)
        self.host.create_tool("garden", GARDEN.replace("PIXEL", ""))

    def start(self) -> None:
        """Start it on its data, whatever is there."""
        url = self.models.openai_url
        self.host = OpenWebUI.start(self.data_dir, url, probe=False)

    def die(self) -> None:
        """End it as a power cut would."""
        os.killpg(self.host.server.process.pid, signal.SIGKILL)
        self.host.stop()

    def revive(self) -> None:
        """Start it again, for the same account."""
        self.start()
        self.host.adopt(self.account)

    def stored(self, reply: Reply) -> Json:
        """A reply as the database has it; the API would mix in what is streaming."""
        path = f"file:{self.data_dir / 'webui.db'}?mode=ro"
        with closing(sqlite3.connect(path, uri=True)) as database:
            query = "SELECT chat FROM chat WHERE id = ?"
            (found,) = database.execute(query, [reply.chat.id]).fetchone()
        message: Json = json.loads(found)["history"]["messages"][reply.id]
        return message

    def text(self, reply: Reply) -> str:
        """Its text there."""
        return str(self.stored(reply).get("content") or "")

    async def begin(self, page: Page, name: str, scene: Scene) -> Reply:
        """Seat a scene's models and ask."""
        ids = {alias: f"doomed-{name}-{alias.lower()}" for alias in scene.models}
        for alias, behaviour in scene.models.items():
            self.models.add(ids[alias], behaviour)
        self.host.models(refresh=True)
        preset = {"manager_model": ids.pop("Lead")} if "Lead" in ids else {}
        preset["team"] = "\n".join(f"{alias} | {ids[alias]}" for alias in ids)
        return await page.send(
            f"{FUNCTION_ID}.{scene.mode}",
            "Which tree?",
            background_tasks={},
            tool_ids=["garden"] if digs in scene.models.values() else [],
            extra={**scene.preset, **preset},
        )


@pytest.fixture
def doomed(model_server: ModelServer, tmp_path: Path) -> Iterator[Doomed]:
    """The server, with models of its own."""
    model_server.wait_for(lambda server: server.in_flight == 0)
    model_server.clear()
    server = Doomed(tmp_path / "doomed", model_server)
    try:
        yield server
    finally:
        server.host.stop()


def has_all(doomed: Doomed, reply: Reply, words: tuple[str, ...]) -> bool:
    """Whether all these words are stored."""
    text = doomed.text(reply)
    return all(word in text for word in (*words, SAVED))


async def test_a_killed_server_has_kept_every_turn_in_every_mode_and_stage(
    doomed: Doomed,
) -> None:
    begun: dict[str, Reply] = {}
    shown = scenes()
    with doomed.models.hold("doom"):
        async with Page(doomed.host, doomed.account) as page:
            for name, scene in shown.items():
                begun[name] = await doomed.begin(page, name, scene)
            for name, scene in shown.items():
                stored = partial(has_all, doomed, begun[name], scene.there)
                await reached(partial(wait_until, stored, 20, f"{name} is stored"))
            doomed.die()
    doomed.revive()
    async with Page(doomed.host, doomed.account) as page:
        for name, scene in shown.items():
            text = doomed.text(begun[name])
            assert has_all(doomed, begun[name], scene.there), name
            assert text.count(SAVED) == 1 and text.rstrip().endswith("or ask on.")
            output = doomed.stored(begun[name])["output"]
            assert "in_progress" not in str(output), name
            chat = await page.open(begun[name].chat.id or "")
            await assert_goes_on(doomed, page, name, chat, scene)


async def assert_goes_on(
    doomed: Doomed, page: Page, name: str, chat: Chat, scene: Scene
) -> None:
    """A next question is answered by models that know what was said."""
    model = f"doomed-{name}-ann"
    before = len(doomed.models.turns(model))
    preset = {"team": f"Ann | {model}\nBen | doomed-{name}-ben", "rounds": 1}
    mode = f"{FUNCTION_ID}.round_robin"
    reply = await ask(page, "Why?", mode, chat=chat, extra=preset)
    assert headings(reply)[:2] == ["🔵 Ann", "🔴 Ben"]
    sent = str(doomed.models.turns(model)[before].messages)
    if scene.mode in ("round_robin", "manager"):
        assert all(word in sent for word in scene.there if "it is" in word)
    assert SAVED[2:] not in sent and "⏳" not in sent
