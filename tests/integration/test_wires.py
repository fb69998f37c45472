"""Participants that are reached by other ways than Chat Completions."""

from collections.abc import Iterator

import pytest

from tests.integration.talk import (
    Talk,
    ask,
    headings,
    in_rounds,
    items,
    question_of,
    results,
    tool_names,
)
from tests.stack.host import OpenWebUI
from tests.stack.models import ModelServer

QUESTION = "Should we plant oaks or birches?"
LOOK_UP = 'Use look_up. ARGS: {"topic": "oaks"}'


@pytest.fixture(scope="module")
def responses(host: OpenWebUI, model_server: ModelServer) -> Iterator[None]:
    """A second connection, which speaks the Responses API: `resp.<model>`."""
    config = {"api_type": "responses", "prefix_id": "resp", "model_ids": RESPONSES}
    settings = {
        "openai.api_base_urls": [model_server.openai_url] * 2,
        "openai.api_keys": ["not-a-key"] * 2,
        "openai.api_configs": {"0": {}, "1": config},
    }
    with host.configured(settings):
        host.models(refresh=True)
        for model in RESPONSES:
            host.grant_read(f"resp.{model}", "public")
        yield
    host.models(refresh=True)


RESPONSES = ["alice", "thinker", "toolie", "fails-midway", "fails-500"]


@pytest.mark.usefixtures("responses")
async def test_a_responses_connection_speaks_reasons_and_counts(talk: Talk) -> None:
    talk.seat("Ann | resp.thinker", "Ben | bob", "Cy | resp.alice", rounds=2)
    reply = await talk.ask(QUESTION)
    assert headings(reply) == in_rounds(2, "🔵 Ann", "🔴 Ben", "🟢 Cy")
    assert {s.path for s in talk.models.turns("thinker")} == {"/v1/responses"}
    assert "Thinker here." in reply.text
    assert [b["speaker"] for b in items(reply, "reasoning")] == ["Ann", "Ann"]
    assert "Let me think about" not in reply.text
    assert '<message from="Ann">' in question_of(talk.sent("alice"))
    assert reply.usage and reply.usage["participants"]["Ann"]["output_tokens"] > 0
    roles = [m["role"] for m in talk.sent("alice", 1)]
    assert roles == ["system", "user", "assistant", "user"]


@pytest.mark.usefixtures("responses")
async def test_a_responses_connection_calls_tools(talk: Talk, garden: str) -> None:
    talk.seat("Tim | resp.toolie", "Ben | bob")
    async with talk.page() as page:
        reply = await ask(page, LOOK_UP, tool_ids=[garden])
        await ask(page, "And maples?", chat=reply.chat, tool_ids=[garden])
    assert results(reply) == ["The almanac on oaks: 3 lines."]
    assert "look_up" in tool_names(talk.models.turns("toolie")[0])
    later = talk.models.turns("toolie")[-1].messages
    assert "The almanac on oaks: 3 lines." in [
        m["content"] for m in later if m["role"] == "tool"
    ]


@pytest.mark.usefixtures("responses")
async def test_a_responses_connection_that_fails_is_named(talk: Talk) -> None:
    talk.seat("Rex | resp.fails-midway", "Max | resp.fails-500", "Ben | bob")
    reply = await talk.ask(QUESTION)
    assert "This much was said before the end" in reply.text
    assert "**Rex** broke off: The scripted model broke midway." in reply.text
    assert "**Max** could not answer: " in reply.text
    assert "Bob here." in reply.text


async def test_ollama_models_speak_reason_and_call_tools(
    talk: Talk, garden: str
) -> None:
    talk.seat(
        "Ann | llama-local:latest",
        "Ben | llama-thinker:latest",
        "Tim | llama-toolie:latest",
        rounds=2,
    )
    reply = await talk.ask(LOOK_UP, tool_ids=[garden])
    assert headings(reply) == in_rounds(2, "🔵 Ann", "🔴 Ben", "🟢 Tim")
    assert {seen.path for seen in talk.models.turns()} == {"/api/chat"}
    assert [b["speaker"] for b in items(reply, "reasoning")] == ["Ben", "Ben"]
    assert set(results(reply)) == {"The almanac on oaks: 3 lines."}
    assert len(results(reply)) in (2, 4)
    assert "⚠️" not in reply.text
    assert reply.usage
    parts = reply.usage["participants"]
    assert all(parts[name]["output_tokens"] > 0 for name in ("Ann", "Ben", "Tim"))


async def test_an_ollama_model_that_fails_is_named(talk: Talk) -> None:
    talk.seat("Rex | llama-fails:latest", "Ben | bob")
    reply = await talk.ask(QUESTION)
    assert "The scripted Ollama failed." in reply.text and "Bob here." in reply.text


PARROT = '''
"""
title: Parrot
"""


class Pipe:
    async def pipe(self, body, __metadata__=None, __event_emitter__=None):
        known = sorted(key for key in (__metadata__ or {}) if key.endswith("_id"))
        if __event_emitter__:
            for kind in ("replace", "message", "status"):
                data = {"content": "HIJACKED", "description": "HIJACKED", "done": True}
                await __event_emitter__({"type": kind, "data": data})
        said = body["messages"][-1]["content"].split("says ")[-1].split("\\n")[0]
        for word in ("Polly ", "heard ", str(len(said)), " characters."):
            yield word
'''


async def test_another_pipe_takes_part_but_cannot_write_into_our_message(
    talk: Talk, host: OpenWebUI
) -> None:
    host.install_function("parrot", "Parrot", PARROT)
    host.grant_read("parrot", "public")
    talk.seat("Polly | parrot", "Ben | bob")
    async with talk.page() as page:
        reply = await ask(page, QUESTION)
        stored = await page.stored(reply.chat.id or "", reply.id)
    assert headings(reply) == ["🔵 Polly", "🔴 Ben"]
    assert "Polly heard 32 characters." in reply.text and "Bob here." in reply.text
    assert "HIJACKED" not in str(stored) and "HIJACKED" not in str(reply.message)
    assert '<message from="Polly">\nPolly heard 32' in question_of(talk.sent("bob"))


async def test_an_arena_model_may_be_chosen(talk: Talk) -> None:
    talk.account = talk.host.admin
    arena = {
        "id": "small-arena",
        "name": "Small Arena",
        "meta": {"model_ids": ["alice"], "description": "", "profile_image_url": ""},
    }
    settings = {"evaluation.arena.enable": True, "evaluation.arena.models": [arena]}
    with talk.host_configured(settings) as listed:
        assert "small-arena" in listed
        talk.seat("Ann | small-arena", "Ben | bob")
        reply = await talk.ask(QUESTION)
    assert talk.order() == ["alice", "bob"]
    assert "Alice here." in reply.text
