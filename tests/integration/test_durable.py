"""A server that dies in mid-run loses no turn that was over, and the chat goes on."""

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
from tests.integration.members import member
from tests.integration.talk import ask, headings, locked, reached, stored_row
from tests.stack.behaviours import choice
from tests.stack.browser import Browser
from tests.stack.host import Json, OpenWebUI
from tests.stack.models import ModelServer
from tests.stack.page import Page, Reply
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

    def text(self, reply: Reply) -> str:
        """Its text there."""
        return str(stored_row(self.data_dir, reply).get("content") or "")

    def output(self, reply: Reply) -> list[Json]:
        """Its items there."""
        return list(stored_row(self.data_dir, reply)["output"])

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


@pytest.fixture(scope="module")
def doomed(
    model_server: ModelServer, tmp_path_factory: pytest.TempPathFactory
) -> Iterator[Doomed]:
    """The server, with models of its own."""
    model_server.wait_for(lambda server: server.in_flight == 0)
    model_server.clear()
    server = Doomed(tmp_path_factory.mktemp("doomed"), model_server)
    try:
        yield server
    finally:
        server.host.stop()


def has_all(doomed: Doomed, reply: Reply, words: tuple[str, ...]) -> bool:
    """Whether all these words are stored."""
    text = doomed.text(reply)
    return all(word in text for word in (*words, SAVED))


@pytest.fixture(scope="module")
async def lost(doomed: Doomed) -> dict[str, Reply]:
    """The replies of all scenes, whose server was killed and is there again."""
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
    return begun


@pytest.mark.parametrize("name", scenes())
async def test_a_killed_server_has_kept_every_turn(
    doomed: Doomed, lost: dict[str, Reply], name: str
) -> None:
    text, output = doomed.text(lost[name]), doomed.output(lost[name])
    assert has_all(doomed, lost[name], scenes()[name].there)
    assert text.count(SAVED) == 1 and text.rstrip().endswith("or ask on.")
    assert "in_progress" not in str(output)


async def test_the_page_says_in_one_line_what_happened(
    doomed: Doomed, lost: dict[str, Reply], browser: Browser, tmp_path: Path
) -> None:
    pictures = Path(os.environ.get("MMC_SCREENSHOTS", tmp_path))
    for name in ("turns", "conclusion"):
        chat_id = lost[name].chat.id
        page = await browser.open_as(doomed.host, doomed.account, chat_id=chat_id)
        await page.wait_text("The oak it is")
        await page.wait_finished()
        for width in (1280, 390):
            await page.tab.set_viewport_size({"width": width, "height": 900})
            line = page.tab.get_by_text("the server went down")
            await line.scroll_into_view_if_needed()
            await page.screenshot(pictures / f"lost-{name}-{width}.png")
        assert (await page.visible_reply_text()).count(SAVED[2:]) == 1
        assert await page.tab.get_by_label("Continue Response").count() == 1
        assert page.errors == []
        await page.close()


@pytest.mark.parametrize("name", scenes())
async def test_a_next_question_is_answered_by_models_that_know_what_was_said(
    doomed: Doomed, lost: dict[str, Reply], name: str
) -> None:
    scene, model = scenes()[name], f"doomed-{name}-ann"
    before = len(doomed.models.turns(model))
    preset = {"team": f"Ann | {model}\nBen | doomed-{name}-ben", "rounds": 1}
    async with Page(doomed.host, doomed.account) as page:
        chat = await page.open(lost[name].chat.id or "")
        mode = f"{FUNCTION_ID}.round_robin"
        reply = await ask(page, "Why?", mode, chat=chat, extra=preset)
    assert headings(reply)[:2] == ["🔵 Ann", "🔴 Ben"]
    sent = str(doomed.models.turns(model)[before].messages)
    if scene.mode in ("round_robin", "manager"):
        assert all(word in sent for word in scene.there if "it is" in word)
    assert SAVED[2:] not in sent and "⏳" not in sent


async def continue_all(doomed: Doomed, page: Page, lost: dict[str, Reply]) -> None:
    """Press Continue in these chats; Ben stops in the middle of his second turn."""
    for name, reply in lost.items():
        ids = {alias: f"doomed-{name}-{alias.lower()}" for alias in ("Ann", "Ben")}
        doomed.models.add(ids["Ann"], member("yew"))
        doomed.models.add(ids["Ben"], halts(2, member("box")))
        doomed.models.add("doomed-manager-lead", leads(0))
        team = "\n".join(f"{alias} | {ids[alias]}" for alias in ids)
        lead: Json = {"rounds": 3, "manager_model": "doomed-manager-lead"}
        await page.open(reply.chat.id or "")
        again = page.reply(reply.id)
        await page.continue_(again, background_tasks={}, extra={"team": team} | lead)


async def test_continue_goes_on_and_a_kill_in_a_write_leaves_the_one_before(
    doomed: Doomed, lost: dict[str, Reply]
) -> None:
    going = {name: lost[name] for name in ("turns", "manager")}
    first = {name: doomed.output(going[name]) for name in going}
    there = ("The yew it is", "The box it is")
    async with Page(doomed.host, doomed.account) as page:
        with doomed.models.hold("doom") as gate:
            await continue_all(doomed, page, going)
            for name, reply in going.items():
                stored = partial(has_all, doomed, reply, there)
                await reached(partial(wait_until, stored, 20, f"{name} is stored"))
            await reached(partial(gate.wait_until_reached, 2))
            with (
                locked(doomed.data_dir),
                doomed.models.hold("doomed-turns-ann") as next_turn,
            ):
                second = {name: doomed.output(going[name]) for name in going}
                gate.release()
                await reached(next_turn.wait_until_reached)
                doomed.die()  # for good: what is left is read from its files
    sent = str(doomed.models.turns("doomed-turns-ann")[-1].messages)
    assert SAVED[2:] not in sent and all(word in sent for word in (OAK, *there))
    for name, reply in going.items():
        assert second[name][: len(first[name])] == first[name]
        assert doomed.output(reply) == second[name]
        assert has_all(doomed, reply, (*scenes()[name].there, *there))
        assert "is whole" not in doomed.text(reply)
    with closing(sqlite3.connect(doomed.data_dir / "webui.db")) as database:
        assert database.execute("PRAGMA integrity_check").fetchone() == ("ok",)
