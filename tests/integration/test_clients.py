"""Programs that call the API, and chats that do not stream."""

from collections.abc import Iterator

import openai
import pytest

from tests.integration.talk import (
    MANAGER,
    ROUND_ROBIN,
    Talk,
    headings,
    in_rounds,
    kinds,
)
from tests.stack.host import Account, OpenWebUI

QUESTION = "Should we plant oaks or birches?"


@pytest.fixture(scope="module")
def api_key(host: OpenWebUI, user: Account) -> str:
    """A plain user's key."""
    return host.create_api_key(user)


@pytest.fixture
def client(talk: Talk, api_key: str) -> Iterator[openai.OpenAI]:
    """The openai client, pointed at the host."""
    url = f"{talk.host.url}/api"
    with openai.OpenAI(base_url=url, api_key=api_key, max_retries=0) as made:
        yield made


def stream(client: openai.OpenAI, model: str = ROUND_ROBIN) -> tuple[str, str, int]:
    """Ask for a stream: the text, the reasoning, and the tokens it says it took."""
    chunks = client.chat.completions.create(
        model=model,
        messages=[{"role": "user", "content": QUESTION}],
        stream=True,
        stream_options={"include_usage": True},
    )
    text = reasoning = ""
    tokens = 0
    for chunk in chunks:
        tokens = chunk.usage.total_tokens if chunk.usage else tokens
        for choice in chunk.choices:
            text += choice.delta.content or ""
            reasoning += getattr(choice.delta, "reasoning_content", None) or ""
            assert not choice.delta.tool_calls
    return text, reasoning, tokens


def whole(
    client: openai.OpenAI, model: str = ROUND_ROBIN, counted: bool = True
) -> tuple[str, int]:
    """Ask for an answer in one piece: its text and its tokens, if it is `counted`."""
    answer = client.chat.completions.create(
        model=model, messages=[{"role": "user", "content": QUESTION}]
    )
    assert answer.choices and answer.choices[0].finish_reason == "stop"
    assert bool(answer.usage) is counted
    tokens = answer.usage.total_tokens if answer.usage else 0
    return answer.choices[0].message.content or "", tokens


def test_a_stream_says_what_the_answer_in_one_piece_says(
    talk: Talk, client: openai.OpenAI
) -> None:
    talk.seat("Ann | alice", "Ben | bob", rounds=2)
    streamed, _, tokens = stream(client)
    said, counted = whole(client)
    assert streamed.split() == said.split()
    assert tokens == counted > 0
    lines = [line for line in said.splitlines() if line.startswith("### ")]
    assert lines == [f"### {name}" for name in in_rounds(2, "🔵 Ann", "🔴 Ben")]
    assert "Alice here." in said and "Bob here." in said


def test_a_manager_leads_api_clients_too(talk: Talk, client: openai.OpenAI) -> None:
    talk.seat("Ann | alice", "Ben | bob", manager_model="manager")
    text, _, _ = stream(client, MANAGER)
    assert "### 🔵 Ann" in text and "### 🔴 Ben" in text


def test_reasoning_is_streamed_beside_the_text(
    talk: Talk, client: openai.OpenAI
) -> None:
    talk.seat("Ann | thinker", "Ben | thinker-tags")
    text, reasoning, _ = stream(client)
    assert reasoning.count("Let me think about") == 2
    assert "Let me think about" not in text and "<think" not in text
    assert "Let me think about" not in whole(client)[0]


def test_a_failure_is_part_of_the_text(talk: Talk, client: openai.OpenAI) -> None:
    talk.seat("Ann | fails-500", "Ben | bob")
    text, _, _ = stream(client)
    assert "could not answer" in text and "The scripted server failed." in text
    assert "Bob here." in text
    assert "could not answer" in whole(client)[0]


def test_clients_may_send_the_conversation_so_far(
    talk: Talk, client: openai.OpenAI
) -> None:
    talk.seat("Ann | alice", "Ben | bob")
    first, _ = whole(client)
    client.chat.completions.create(
        model=ROUND_ROBIN,
        messages=[
            {"role": "system", "content": "Answer in rhymes."},
            {"role": "user", "content": QUESTION},
            {"role": "assistant", "content": first},
            {"role": "user", "content": "And maples?"},
        ],
    )
    sent = talk.sent("alice", 1)
    assert "Answer in rhymes." in sent[0]["content"]
    assert [m["role"] for m in sent] == ["system", "user", "assistant", "user"]
    assert sent[2]["content"].startswith("Alice here.")
    assert '<message from="Ben">\nBob here.' in sent[3]["content"]


@pytest.mark.parametrize("streamed", [True, False])
def test_an_error_says_what_to_do(
    talk: Talk, client: openai.OpenAI, streamed: bool
) -> None:
    talk.seat("Ann | no-such-model")
    try:
        told = stream(client)[0] if streamed else whole(client, counted=False)[0]
    except openai.APIError as error:
        told = str(error)
    assert "Nobody can take part" in told and "no-such-model" in told


def test_a_client_that_leaves_ends_the_run(talk: Talk, client: openai.OpenAI) -> None:
    talk.seat("Ann | alice", "Ben | bob")
    with talk.models.hold("bob", after=2) as hold:
        chunks = client.chat.completions.create(
            model=ROUND_ROBIN,
            messages=[{"role": "user", "content": QUESTION}],
            stream=True,
        )
        assert next(iter(chunks)).choices
        hold.wait_until_reached()
        chunks.close()
        talk.models.wait_for(lambda models: models.in_flight == 0)
    assert talk.models.aborted == ["bob"]


async def test_a_chat_without_streaming_shows_and_stores_the_same(talk: Talk) -> None:
    talk.seat("Ann | thinker", "Ben | bob")
    streamed = await talk.ask(QUESTION)
    at_once = await talk.ask(QUESTION, stream=False)
    assert headings(at_once) == ["🔵 Ann", "🔴 Ben"]
    assert at_once.text == streamed.text
    assert kinds(at_once) == kinds(streamed)
    assert at_once.usage and streamed.usage
    assert at_once.usage["total_tokens"] == streamed.usage["total_tokens"]


async def test_a_workspace_model_that_never_streams_shows_the_same(
    talk: Talk,
) -> None:
    talk.seat("Ann | thinker", "Ben | bob")
    params = {"stream_response": False}
    with talk.workspace_model("calm-panel", ROUND_ROBIN, params=params):
        at_once = await talk.ask(QUESTION, "calm-panel")
    assert headings(at_once) == ["🔵 Ann", "🔴 Ben"]
    assert "reasoning" in kinds(at_once)


async def test_tools_work_in_a_chat_without_streaming(talk: Talk, garden: str) -> None:
    talk.seat("Tim | toolie", "Ben | bob")
    question = 'Use look_up. ARGS: {"topic": "oaks"}'
    reply = await talk.ask(question, stream=False, tool_ids=[garden])
    assert "The tool says" in reply.text
    assert kinds(reply).count("function_call") == 1
    assert kinds(reply).count("function_call_output") == 1
