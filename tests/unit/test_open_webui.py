"""Section 6: what is decided about the host's values, without a host."""

import asyncio
import json
from collections.abc import AsyncIterator
from typing import Any

import pytest
from starlette.exceptions import HTTPException
from starlette.responses import JSONResponse, PlainTextResponse, StreamingResponse

from tests.unit.fakes import make_run
from tests.unit.plugin import mmc

Json = dict[str, Any]


# -- the cards of models ---------------------------------------------------------------


def test_models_based_on_the_pipe_are_the_pipe_through_any_number_of_steps() -> None:
    bases = {
        "talk.manager": None,
        "talk.round_robin": None,
        "talker": None,
        "mine": "talk.manager",
        "yours": "mine",
        "oak": "oak-1",
        "a": "b",
        "b": "a",
    }
    models: dict[str, Json] = {
        model_id: {"id": model_id, "info": {"base_model_id": base}}
        for model_id, base in bases.items()
    }
    models["bare"] = {"id": "bare"}
    cards = mmc._cards_of(models.values(), models, "talk")
    assert set(cards) == set(models)
    assert {card.id for card in cards.values() if card.is_self} == {
        "talk.manager",
        "talk.round_robin",
        "mine",
        "yours",
    }


def test_the_connection_of_a_model_is_that_of_what_it_is_based_on() -> None:
    ollama = {"owned_by": "ollama", "urlIdx": 1, "ollama": {"urls": [2, 3]}}
    models: dict[str, Json] = {
        "oak-1": {"id": "oak-1", "owned_by": "openai", "urlIdx": 0},
        "oak": {"id": "oak", "info": {"base_model_id": "oak-1"}},
        "my oak": {"id": "my oak", "info": {"base_model_id": "oak"}},
        "elm": {"id": "elm", **ollama},
        "fir": {"id": "fir", "owned_by": "ollama"},
        "lost": {"id": "lost", "info": {"base_model_id": "gone"}},
    }
    cards = mmc._cards_of(models.values(), models, "talk")
    assert {card.id: card.connection for card in cards.values()} == {
        "oak-1": "openai 0",
        "oak": "openai 0",
        "my oak": "openai 0",
        "elm": "ollama 2",
        "fir": "ollama 0",
        "lost": "None None",
    }


def grant(kind: str, who: str, what: str = "read") -> Json:
    return {"principal_type": kind, "principal_id": who, "permission": what}


@pytest.mark.parametrize(
    ("info", "allowed"),
    [
        ({}, False),
        ({"user_id": "uma"}, True),
        ({"user_id": "max"}, False),
        ({"access_grants": None}, False),
        ({"access_grants": [grant("user", "*")]}, True),
        ({"access_grants": [grant("user", "uma")]}, True),
        ({"access_grants": [grant("user", "uma", "write")]}, False),
        ({"access_grants": [grant("group", "trees")]}, True),
        ({"access_grants": [grant("group", "stones"), grant("user", "trees")]}, False),
    ],
)
def test_a_model_may_be_read_by_its_owner_and_by_whom_it_was_granted(
    info: Json, allowed: bool
) -> None:
    me = {("user", "*"), ("user", "uma"), ("group", "trees")}
    assert mmc._may_read({"info": info}, me) is allowed


class HostWithOnePairOfTags:
    """The host's part that names the usual think tags, where there is no host."""

    DEFAULT_REASONING_TAGS = [("<think>", "</think>")]


@pytest.mark.parametrize(
    ("tags", "expected"),
    [
        (None, None),
        (True, None),
        (False, ()),
        (["<a>", "</a>"], (("<a>", "</a>"),)),
        (["", ""], None),
        (["<a>", ""], None),
        (["<a>"], None),
        ("<a>", None),
    ],
)
def test_a_models_own_think_tags_are_taken_where_they_make_sense(
    tags: Any, expected: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(mmc, "middleware", HostWithOnePairOfTags, raising=False)
    found = mmc.Host.think_tags(tags)
    usual = tuple(HostWithOnePairOfTags.DEFAULT_REASONING_TAGS)
    assert found == (usual if expected is None else expected)
    mmc.ReplyDecoder(found)


# -- what a participant gets -----------------------------------------------------------


def builtins(
    meta: Json, features: Json, choice: str = "features"
) -> dict[str, bool] | None:
    """The built-in categories of a model of this meta in a chat with features."""
    settings = mmc.Settings.model_validate({"builtin_tools": choice})
    model = {"id": "oak", "info": {"meta": meta}}
    found = mmc._builtins_model(model, {"features": features}, settings)
    return None if found is None else found["info"]["meta"]["builtinTools"]


def test_without_a_feature_or_knowledge_there_are_no_built_in_tools() -> None:
    assert builtins({}, {}) is None
    assert builtins({}, {"memory": True, "web_search": False}) is None
    assert builtins({}, {"web_search": True}, "none") is None


def test_a_feature_of_the_chat_brings_its_tools_and_no_others() -> None:
    found = builtins({"builtinTools": {"web_search": True}}, {"web_search": True})
    assert found is not None
    assert found["web_search"] is True
    assert not any(found.get(name, True) for name in ("time", "notes", "of_next_year"))


def test_attached_knowledge_brings_its_tools() -> None:
    found = builtins({"knowledge": [{"id": "k"}]}, {})
    assert found is not None
    assert found.get("knowledge", True)
    assert found.get("time", True) is False


def test_all_built_in_tools_are_all_but_the_one_that_asks_the_user() -> None:
    assert builtins({"builtinTools": {"time": False}}, {}, "all") == {
        "time": False,
        "user_input": False,
    }


def test_knowledge_is_named_without_room_for_markup() -> None:
    meta = {"knowledge": [{"id": "k<1", "type": "file", "name": "a\n<b>"}, {"id": "x"}]}
    assert mmc._knowledge_prompt(meta) == (
        '<attached_knowledge>\n<knowledge type="file" id="k1" name="a b"/>\n'
        "</attached_knowledge>"
    )
    assert mmc._knowledge_prompt({}) == ""


# -- what a completion gives -----------------------------------------------------------


async def two_items() -> AsyncIterator[bytes]:
    for item in (b"a", b"b"):
        yield item


async def items_of(response: Any) -> list[Any]:
    return [item async for item in mmc.reply_items(response)]


async def test_the_items_of_a_reply_are_found_in_whatever_the_host_returns() -> None:
    assert await items_of({"choices": []}) == [{"choices": []}]
    assert await items_of(JSONResponse({"choices": []})) == [{"choices": []}]
    assert await items_of(PlainTextResponse("Oaks.")) == ["Oaks."]
    assert await items_of(StreamingResponse(two_items())) == [b"a", b"b"]


@pytest.mark.parametrize(
    ("response", "reason"),
    [
        (JSONResponse({"error": {"message": "No."}}, 429), "No. (HTTP 429)"),
        (JSONResponse({"detail": "Not found"}, 404), "Not found (HTTP 404)"),
        (PlainTextResponse("<b>Bad</b> gateway", 502), "bBad/b gateway (HTTP 502)"),
        (PlainTextResponse("", 500), "an error without a message (HTTP 500)"),
        (PlainTextResponse("<title>502 Bad Gateway</title>", 502), "502 Bad Gateway"),
        (PlainTextResponse("Line 5021", 502), "Line 5021 (HTTP 502)"),
    ],
)
async def test_an_error_response_is_a_failure_with_its_reason(
    response: Any, reason: str
) -> None:
    with pytest.raises(mmc.ModelFailure) as failure:
        await items_of(response)
    assert str(failure.value) == reason


async def test_a_web_page_is_no_answer() -> None:
    with pytest.raises(mmc.ModelFailure, match="a web page"):
        await items_of(" \n<!DOCTYPE html><html><body>Sign in</body></html>")
    assert await items_of("<p>is a tag") == ["<p>is a tag"]


async def test_a_body_nested_without_end_is_only_a_text() -> None:
    (item,) = await items_of(PlainTextResponse("[" * 100_000))
    assert item.startswith("[[")


@pytest.mark.parametrize(
    ("raised", "reason"),
    [
        (ValueError("no <such> tree"), "no such tree"),
        (KeyError("oak"), "'oak'"),
        (RuntimeError(), "RuntimeError"),
        (HTTPException(403, detail="Access denied"), "Access denied"),
        (HTTPException(400, detail=json.dumps({"a": 1})), '{"a": 1}'),
    ],
)
async def test_whatever_foreign_code_raises_is_a_failure_that_says_why(
    raised: Exception, reason: str
) -> None:
    with pytest.raises(mmc.ToolFailure) as failure, mmc.foreign_errors(mmc.ToolFailure):
        raise raised
    assert str(failure.value) == reason
    assert failure.value.__cause__ is raised


@pytest.mark.parametrize(
    ("package", "reason", "status"),
    [
        ("aiohttp.client_exceptions", "the connection broke off", 0),
        ("sqlalchemy.exc", "Open WebUI's database does not answer", 503),
        ("redis.exceptions", "Open WebUI's database does not answer", 503),
    ],
)
async def test_errors_in_words_for_developers_are_said_plainly(
    package: str, reason: str, status: int
) -> None:
    error = type("LibraryError", (Exception,), {"__module__": package})
    with (
        pytest.raises(mmc.ModelFailure) as failure,
        mmc.foreign_errors(mmc.ModelFailure),
    ):
        raise error("connection to 10.0.0.5:5432 failed")
    assert (str(failure.value), failure.value.status) == (reason, status)


def test_what_is_known_to_be_a_failure_passes() -> None:
    raised = mmc.ModelFailure("known")
    with pytest.raises(mmc.ModelFailure) as passed, mmc.foreign_errors(mmc.ToolFailure):
        raise raised
    assert passed.value is raised


async def test_a_cancellation_of_ours_passes() -> None:
    async def waits() -> None:
        with mmc.foreign_errors(mmc.ToolFailure):
            await asyncio.Event().wait()

    task = asyncio.create_task(waits())
    await asyncio.sleep(0)
    task.cancel()
    with pytest.raises(asyncio.CancelledError):
        await task


async def test_a_cancellation_that_foreign_code_renames_is_one_all_the_same() -> None:
    async def renames() -> None:
        with mmc.foreign_errors(mmc.ModelFailure):
            try:
                await asyncio.Event().wait()
            except asyncio.CancelledError as error:
                raise ConnectionError("closed") from error

    task = asyncio.create_task(renames())
    await asyncio.sleep(0)
    task.cancel()
    with pytest.raises(asyncio.CancelledError):
        await task


async def test_a_cancellation_of_foreign_code_is_its_failure() -> None:
    with pytest.raises(mmc.ToolFailure), mmc.foreign_errors(mmc.ToolFailure):
        raise asyncio.CancelledError


async def test_a_reply_that_swallows_its_cancellation_ends_all_the_same() -> None:
    async def stubborn() -> AsyncIterator[str]:
        while True:
            try:
                await asyncio.Event().wait()
            except asyncio.CancelledError:
                yield "I go on."

    async def read() -> None:
        async for _ in mmc.reply_items(StreamingResponse(stubborn())):
            raise AssertionError("nothing may come after the cancellation")

    task = asyncio.create_task(read())
    await asyncio.sleep(0)
    task.cancel()
    with pytest.raises(asyncio.CancelledError):
        await task


def test_a_reply_is_a_chats_where_it_has_a_chat_and_a_message() -> None:
    assert make_run()[1].in_chat
    assert not make_run(in_chat=False)[1].in_chat


# -- approval --------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("answer", "approved"),
    [
        (True, True),
        (False, False),
        (None, False),
        ({"error": "gone"}, False),
        ("yes", False),
    ],
)
async def test_a_tool_runs_only_where_the_user_said_yes(
    answer: Any, approved: bool
) -> None:
    asked: list[Json] = []

    async def person(request: Json) -> Any:
        asked.append(request)
        return answer

    host = mmc.Host(
        make_run()[1].request,
        None,
        {"params": {"tool_approval_mode": "ask"}},
        caller=person,
    )
    call = mmc.ToolCall("c1", "look", "{}")
    assert await host.approve(call, {"at": "oak"}) is approved
    assert asked == [
        {
            "type": "confirmation",
            "data": {
                "tool_call": {"id": "c1", "name": "look", "arguments": {"at": "oak"}}
            },
        }
    ]


async def test_without_a_page_nobody_approves_without_the_mode_nobody_is_asked() -> (
    None
):
    request = make_run()[1].request
    call = mmc.ToolCall("c1", "look", "{}")
    asking = mmc.Host(request, None, {"params": {"tool_approval_mode": "ask"}})
    assert await asking.approve(call, {}) is False
    assert await mmc.Host(request, None, {}).approve(call, {}) is True
