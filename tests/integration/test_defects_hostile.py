"""What a hostile or broken model, tool or client does costs only its own place."""

import json
import re
import threading
import time
from collections.abc import Awaitable, Callable, Iterator
from typing import Self

import httpx
import pytest

from tests.conftest import FUNCTION_ID
from tests.integration.members import member, stage_of
from tests.integration.talk import (
    MANAGER,
    ROUND_ROBIN,
    Talk,
    ask,
    headings,
    last_status,
    results,
)
from tests.stack.behaviours import says, with_tasks
from tests.stack.host import OpenWebUI
from tests.stack.page import Reply
from tests.stack.prompts import fresh_results, last_user_text
from tests.stack.scripts import Behaviour, Body, Raw, Script, Style, Text, ToolCall

COUNCIL = f"{FUNCTION_ID}.council"
QUESTION = "Should we plant oaks or birches?"
HEALTHY = 0.4
"""Seconds in which the host answers /health, whatever a model says."""


# -- 1: nothing a model says holds up the server ---------------------------------------


class Pulse:
    """The longest that /health took to answer while this was open, in s."""

    def __init__(self, url: str) -> None:
        self.slowest = 0.0
        self._url = f"{url}/health"
        self._stop = threading.Event()
        self._thread = threading.Thread(target=self._beat, daemon=True)

    def _beat(self) -> None:
        with httpx.Client(trust_env=False, timeout=120) as client:
            while not self._stop.wait(0.02):
                began = time.monotonic()
                assert client.get(self._url).status_code == 200
                self.slowest = max(self.slowest, time.monotonic() - began)

    def __enter__(self) -> Self:
        self._thread.start()
        return self

    def __exit__(self, *exc: object) -> None:
        self._stop.set()
        self._thread.join()


async def stays_awake(talk: Talk, work: Callable[[], Awaitable[Reply]]) -> Reply:
    """See the server answer others meanwhile; tried twice, as the machine may be busy
    with something else."""
    for _ in range(2):
        with Pulse(talk.host.url) as pulse:
            reply = await work()
        if pulse.slowest <= HEALTHY:
            break
    assert pulse.slowest <= HEALTHY
    return reply


@pytest.mark.parametrize(
    "hostile",
    [
        pytest.param(says("\n" + " " * 20_000 + "x"), id="blanks"),
        pytest.param(
            says("\n" + "\u00a0" * 10_000 + "x", Style(cut="characters")),
            id="blanks in pieces",
        ),
        pytest.param(says("<" + " " * 30_000 + "x"), id="half a label"),
    ],
)
async def test_the_server_answers_others_while_a_hostile_reply_streams(
    talk: Talk, hostile: Behaviour
) -> None:
    talk.add_model("hostile", hostile)
    talk.seat("Ann | hostile", "Ben | bob")
    reply = await stays_awake(talk, lambda: talk.ask(QUESTION))
    assert headings(reply) == ["🔵 Ann", "🔴 Ben"]
    assert "Bob here." in reply.text


@pytest.mark.parametrize(
    "ballot",
    [
        pytest.param("A" + "\n\n-" * 22 + "x", id="a chain"),
        pytest.param("{" * 40_000, id="braces"),
    ],
)
async def test_the_server_answers_others_while_a_hostile_ballot_is_read(
    talk: Talk, ballot: str
) -> None:
    plain = member("oak")

    def judges_oddly(body: Body) -> Script:
        asked = last_user_text(body)
        concludes = stage_of(body) == "conclusion"
        return plain(body) if concludes or asked == QUESTION else Script([Text(ballot)])

    talk.add_model("hostile", with_tasks(judges_oddly))
    talk.add_model("elm", member("elm", "oak fir"))
    talk.add_model("fir", member("fir", "oak elm"))
    talk.seat("Ann | hostile", "Ben | elm", "Cy | fir")
    reply = await stays_awake(talk, lambda: talk.ask(QUESTION, COUNCIL))
    assert "3 of 3 answered · chaired by Ann" in reply.text


async def test_the_server_answers_others_while_a_hostile_manager_is_read(
    talk: Talk,
) -> None:
    talk.add_model("hostile", says("{" * 40_000))
    talk.seat("Ann | alice", "Ben | bob", "Cy | carol", manager_model="hostile")
    reply = await stays_awake(talk, lambda: talk.ask(QUESTION, MANAGER))
    assert headings(reply) == ["🔵 Ann", "🔴 Ben", "🟢 Cy"]


async def test_the_server_answers_others_while_a_team_of_thousands_is_read(
    talk: Talk,
) -> None:
    talk.seat(*["Ann | alice"] * 5_000)
    reply = await stays_awake(talk, lambda: talk.ask(QUESTION))
    assert headings(reply)[:2] == ["🔵 Ann", "🔴 Ann 2"]


# -- 2: odd arguments are a mistake of one call ----------------------------------------


@pytest.mark.parametrize(
    "arguments",
    ["{'topic': {1, 2}}", "{'topic': b'oaks'}", "{('topic', 1): 'oaks'}"],
)
async def test_arguments_that_are_no_json_cost_one_call_and_no_later_question(
    talk: Talk, garden: str, arguments: str
) -> None:
    def writes_python(body: Body) -> Script:
        if fresh_results(body):
            return Script([Text("Tim here, without the almanac.")])
        return Script([ToolCall("look_up", arguments)])

    talk.add_model("writes-python", with_tasks(writes_python))
    talk.seat("Tim | writes-python", "Ben | bob")
    async with talk.page() as page:
        first = await ask(page, QUESTION, tool_ids=[garden])
        second = await ask(page, "And maples?", chat=first.chat, tool_ids=[garden])
    for reply in (first, second):
        (result,) = results(reply)
        assert result.startswith("Error: ")
        assert "Tim here" in reply.text and "Bob here." in reply.text
        assert last_status(reply).startswith("Finished after 1 round · 2 turns")


def test_a_clients_history_may_have_arguments_that_are_an_object(
    talk: Talk,
) -> None:
    talk.seat("Ann | alice", "Ben | bob")
    function = {"name": "look_up", "arguments": {"topic": "oaks"}}
    call = {"id": "call_1", "type": "function", "function": function}
    messages = [
        {"role": "user", "content": QUESTION},
        {"role": "assistant", "content": "", "tool_calls": [call]},
        {"role": "tool", "tool_call_id": "call_1", "content": "Oaks live long."},
        {"role": "assistant", "content": "Oaks, then."},
        {"role": "user", "content": "And maples?"},
    ]
    body = {"model": ROUND_ROBIN, "messages": messages, "stream": False}
    answer = talk.host.request(
        "POST", "/api/chat/completions", body, account=talk.account
    )
    assert "choices" in answer, answer
    said = answer["choices"][0]["message"]["content"]
    assert "Alice here." in said and "Bob here." in said
    assert "Oaks, then." in str(talk.sent("alice"))


async def test_a_tool_that_calls_all_of_its_arguments_required_works(
    talk: Talk,
) -> None:
    talk.account = talk.host.admin
    talk.seat("Tim | toolie", "Ben | bob")
    parameters = {
        "type": "object",
        "properties": {"zone": {"type": "string", "required": True}},
        "required": True,
    }
    spec = {"name": "read_clock", "description": "Reads.", "parameters": parameters}
    server = {"url": "http://page.example", "info": {}, "openapi": {}, "specs": [spec]}
    with talk.host.configured({"direct.integrations.enable": True}):
        async with talk.page() as page:
            page.on_call("execute:tool", lambda call: {"time": "noon"})
            reply = await ask(
                page,
                'Use read_clock. ARGS: {"zone": "Rome"}',
                extra={"tool_servers": [server]},
            )
    assert last_status(reply).startswith("Finished after 1 round · 2 turns")
    (result,) = results(reply)
    assert "noon" in result
    assert "Bob here." in reply.text


# -- 3: a look-up that fails costs its participant only --------------------------------

FLIMSY = '''
from pydantic import BaseModel


class Tools:
    class Valves(BaseModel):
        key: int

    def __init__(self):
        self.valves = None

    def never(self) -> str:
        """Cannot be loaded without a key."""
        return "never"
'''


async def test_a_tool_that_cannot_be_loaded_costs_its_participant_only(
    talk: Talk, garden: str
) -> None:
    talk.host.create_tool("flimsy", FLIMSY)
    meta = {"toolIds": ["flimsy"]}
    with talk.workspace_model("keyless", "alice", meta=meta):
        talk.seat("Tim | keyless", "Ben | bob")
        reply = await talk.ask(QUESTION)
    assert reply.error is None
    assert "Bob here." in reply.text
    notices = [line for line in reply.text.splitlines() if line.startswith("> ⚠️ ")]
    assert any("flimsy" in line or "Tim" in line for line in notices)
    assert "validation error" not in reply.text


# -- 4 and 5: what pipes, tools and the host raise -------------------------------------

ODD_PIPES = """
import asyncio

from fastapi import HTTPException, Request


class Pipe:
    def __init__(self):
        self.asked = {}

    def pipes(self):
        names = ("cancels", "stubborn", "deaf", "busy-503", "busy-429", "slow-page")
        return [{"id": name, "name": name} for name in names]

    async def pipe(
        self,
        body: dict,
        __user__: dict,
        __request__: Request,
        __metadata__: dict,
        __event_emitter__=None,
        __event_call__=None,
    ):
        kind = body["model"].partition(".")[2]
        if kind == "cancels":
            yield "Half an "
            raise asyncio.CancelledError
        elif kind == "stubborn":
            yield "Half an "
            for _ in range(40):
                try:
                    await asyncio.sleep(0.1)
                except asyncio.CancelledError:
                    pass
                yield "and still more "
        elif kind == "deaf":
            yield "Half an "
            try:
                await asyncio.sleep(5)
            except asyncio.CancelledError:
                pass
            for _ in range(10):
                yield "and still more "
                await asyncio.sleep(0.1)
        elif kind.startswith("busy"):
            self.asked[kind] = self.asked.get(kind, 0) + 1
            if self.asked[kind] > 1:
                yield "whole answer"
                return
            yield "Half an "
            raise HTTPException(int(kind[5:]), "The pipe is busy.")
        else:

            async def emit(event):
                if event["type"] == "status":
                    raise TimeoutError("The page is slow.")
                return await __event_emitter__(event)

            from open_webui.functions import get_function_module_by_id

            module = await get_function_module_by_id(
                __request__, "multi_model_conversation"
            )
            valves = module.UserValves(team="Ann | alice\\nBen | bob", rounds=1)
            events = await module.pipe(
                {**body, "model": "multi_model_conversation.round_robin"},
                {**__user__, "valves": valves},
                __request__,
                __metadata__,
                emit,
                __event_call__,
            )
            async for event in events:
                yield event
"""


@pytest.fixture
def odd_pipes(host: OpenWebUI) -> Iterator[str]:
    """Models that are pipes of somebody else, and break in their own ways."""
    host.install_function("odd", "Odd", ODD_PIPES)
    for model in host.models(refresh=True):
        if model["id"].startswith("odd."):
            host.grant_read(model["id"], "public")
    yield "odd"
    host.request("DELETE", "/api/v1/functions/id/odd/delete")
    host.models(refresh=True)


async def test_a_page_that_times_out_costs_no_text(talk: Talk, odd_pipes: str) -> None:
    async with talk.page() as page:
        reply = await ask(page, QUESTION, f"{odd_pipes}.slow-page")
    assert reply.error is None
    assert headings(reply) == ["🔵 Ann", "🔴 Ben"]
    assert "Alice here." in reply.text and "Bob here." in reply.text


async def test_a_tool_that_cancels_itself_has_failed_and_no_more(talk: Talk) -> None:
    source = (
        "import asyncio\n\n\nclass Tools:\n    async def cancel(self) -> str:\n"
        '        """Cancels itself."""\n        raise asyncio.CancelledError\n'
    )
    talk.host.create_tool("cancelling", source)
    talk.seat("Tim | toolie", "Ben | bob")
    reply = await talk.ask("Use cancel.", tool_ids=["cancelling"])
    (result,) = results(reply)
    assert result.startswith("Error: ")
    assert "Toolie here." in reply.text and "Bob here." in reply.text
    assert last_status(reply).startswith("Finished after 1 round · 2 turns")


@pytest.mark.parametrize(
    ("kind", "limits"),
    [
        ("cancels", {}),
        ("stubborn", {"turn_timeout": 1}),
        ("deaf", {"silence_timeout": 0.5}),
    ],
)
async def test_a_reply_with_a_mind_of_its_own_about_cancelling_costs_one_turn(
    talk: Talk, odd_pipes: str, kind: str, limits: dict[str, float]
) -> None:
    talk.admin_sets(**limits)
    talk.seat(f"Rex | {odd_pipes}.{kind}", "Ben | bob")
    reply = await talk.ask(QUESTION)
    assert headings(reply) == ["🔵 Rex", "🔴 Ben"]
    assert "Half an" in reply.text and "> ⚠️ **Rex** broke off: " in reply.text
    assert "Bob here." in reply.text
    assert last_status(reply).startswith("Finished after 1 round · 2 turns")


@pytest.mark.parametrize("status", [503, 429])
async def test_who_is_busy_in_the_middle_is_not_asked_again_into_the_same_text(
    talk: Talk, odd_pipes: str, status: int
) -> None:
    talk.seat(f"Rex | {odd_pipes}.busy-{status}", "Ben | bob")
    reply = await talk.ask(QUESTION)
    assert headings(reply) == ["🔵 Rex", "🔴 Ben"]
    assert "Half an" in reply.text and "whole answer" not in reply.text
    assert "> ⚠️ **Rex** broke off: " in reply.text
    assert "Bob here." in reply.text


# -- 6: what no database takes ---------------------------------------------------------

HALVES = (
    '"""Tools."""\n\n\nclass Tools:\n    def read_tape(self, label: str) -> str:\n'
    '        """Reads a tape."""\n        return f"tape {label}: \\0\\ud83c end"\n'
)


def delta(**fields: object) -> Raw:
    """A chunk in which everything but ASCII is escaped, as many providers do."""
    chunk = {"choices": [{"index": 0, "delta": fields}]}
    return Raw(f"data: {json.dumps(chunk)}\n\n".encode())


def speaks_in_halves(body: Body) -> Script:
    if fresh_results(body):
        texts = ("Oaks \ud83c", "\udf33 grow\0 ", "slowly\ud83c.")
        return Script([*(delta(content=text) for text in texts), Text(" So be it.")])
    function = {"name": "read_tape", "arguments": '{"label": "a\0\ud83c"}'}
    call = {"index": 0, "id": "call\0", "type": "function", "function": function}
    return Script(
        [delta(reasoning_content="Which\0 \ud83c?"), delta(tool_calls=[call])]
    )


async def test_what_no_database_takes_is_shown_as_it_is_stored(talk: Talk) -> None:
    talk.host.create_tool("tapes", HALVES)
    talk.add_model("halves", with_tasks(speaks_in_halves))
    talk.seat("Ha\0lf | halves", "Ben | bob")
    reply = await talk.ask("Use read_tape.", tool_ids=["tapes"])  # sees it stored, too
    assert "Oaks 🌳 grow\ufffd slowly\ufffd. So be it." in reply.text
    assert "Bob here." in reply.text
    assert results(reply)[0].startswith("tape a\ufffd")
    shown = json.dumps(reply.output)
    assert "\\u0000" not in shown
    assert not re.search(r"\\ud[89ab]\w\w(?!\\ud[c-f])", shown)
