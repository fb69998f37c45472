"""The scripted model server, over real HTTP."""

from __future__ import annotations

import http.client
import json
import threading
import urllib.error
import urllib.request
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import pytest

from tests.stack.models import BEHAVIOURS, ModelServer
from tests.stack.scripts import Script, Step, Text, ToolCall, Usage

QUESTION = "Should we plant oaks or birches?"
LOOKUP = {
    "type": "function",
    "function": {
        "name": "lookup_fact",
        "parameters": {
            "type": "object",
            "properties": {"topic": {"type": "string"}, "limit": {"type": "integer"}},
            "required": ["topic", "limit"],
        },
    },
}
TITLE_TASK = """### Task:
Generate a concise title summarizing the chat history.
### Output:
JSON format: { "title": "your concise title here" }
### Chat History:
<chat_history>
USER: Should we plant oaks or birches?
ASSISTANT: Oaks.
</chat_history>"""


@pytest.fixture(scope="module")
def running() -> Iterator[ModelServer]:
    with ModelServer() as server:
        yield server


@pytest.fixture
def server(running: ModelServer) -> ModelServer:
    running.clear()
    return running


def post(server: ModelServer, path: str, body: dict[str, Any]) -> str:
    """Post JSON and read the whole answer."""
    request = urllib.request.Request(
        server.url + path,
        json.dumps(body).encode(),
        {"Content-Type": "application/json"},
    )
    with urllib.request.urlopen(request, timeout=10) as response:
        return str(response.read().decode())


def ask(model: str, *said: str | dict[str, Any], **more: Any) -> dict[str, Any]:
    """Make a Chat Completions body; plain strings are user messages."""
    messages = [
        {"role": "user", "content": one} if isinstance(one, str) else one
        for one in said or (QUESTION,)
    ]
    return {"model": model, "messages": messages, **more}


def chat(server: ModelServer, body: dict[str, Any]) -> dict[str, Any]:
    """Ask for an answer in one piece and read its message."""
    answer = json.loads(post(server, "/v1/chat/completions", body))
    message: dict[str, Any] = answer["choices"][0]["message"]
    return message


def sse(text: str) -> list[dict[str, Any]]:
    """Read the JSON events of a stream as the standard says."""
    events = []
    for block in text.replace("\r\n", "\n").split("\n\n"):
        lines = [one for one in block.split("\n") if one.startswith("data:")]
        value = "\n".join(one.removeprefix("data:").strip() for one in lines)
        if value and value != "[DONE]":
            events.append(json.loads(value))
    return events


def stream(server: ModelServer, body: dict[str, Any]) -> list[dict[str, Any]]:
    """Ask for a stream of Chat Completions and read its chunks."""
    return sse(post(server, "/v1/chat/completions", {**body, "stream": True}))


def deltas(chunks: list[dict[str, Any]], key: str) -> str:
    """Join what the chunks say under one key."""
    choices = [choice for chunk in chunks for choice in chunk.get("choices", [])]
    return "".join(choice["delta"].get(key) or "" for choice in choices)


@pytest.mark.parametrize("model", ["alice", "crlf", "thinker", "thinker-cut"])
def test_a_stream_says_what_the_answer_in_one_piece_says(
    server: ModelServer, model: str
) -> None:
    whole = chat(server, ask(model))
    chunks = stream(server, ask(model))
    assert deltas(chunks, "content") == whole["content"]
    assert deltas(chunks, "reasoning_content") == whole.get("reasoning_content", "")
    assert not any("usage" in chunk for chunk in chunks)


def test_usage_is_streamed_when_it_is_asked_for(server: ModelServer) -> None:
    options = {"stream_options": {"include_usage": True}}
    usage = stream(server, ask("alice", **options))[-1]["usage"]
    assert usage["prompt_tokens"] == len(QUESTION.split())
    words = len(chat(server, ask("alice"))["content"].split())
    assert usage["completion_tokens"] == words
    assert usage["total_tokens"] == words + len(QUESTION.split())


def test_all_three_wires_say_the_same(server: ModelServer) -> None:
    said = chat(server, ask("thinker"))
    events = sse(
        post(
            server,
            "/v1/responses",
            {"model": "thinker", "input": QUESTION, "stream": True},
        )
    )
    texts = [
        one["delta"] for one in events if one["type"] == "response.output_text.delta"
    ]
    assert "".join(texts) == said["content"]
    assert events[-1]["type"] == "response.completed"
    output = events[-1]["response"]["output"]
    assert [item["type"] for item in output] == ["reasoning", "message"]
    assert output[0]["summary"][0]["text"] == said["reasoning_content"]

    lines = post(server, "/api/chat", ask("thinker")).splitlines()
    messages = [json.loads(line)["message"] for line in lines]
    assert "".join(one["content"] for one in messages) == said["content"]
    thought = "".join(one.get("thinking", "") for one in messages)
    assert thought == said["reasoning_content"]
    assert json.loads(lines[-1])["eval_count"] > 0


def tagged(*turns: tuple[str, str]) -> str:
    """Turns as a prompt of ours shows them."""
    told = (f'<message from="{name}">\n{text}\n</message>' for name, text in turns)
    return "\n\n".join(told)


def test_a_speaker_answers_the_one_before_it(server: ModelServer) -> None:
    before = tagged(("Bob", "Oaks outlive us all."))
    said = chat(server, ask("carol", f"{QUESTION}\n\n{before}"))
    assert said["content"].startswith(f'Carol here. On "{QUESTION.rstrip("?")}"')
    assert 'Bob said "Oaks outlive us all"' in said["content"]


def test_a_tool_is_called_with_required_arguments_and_its_result_quoted(
    server: ModelServer,
) -> None:
    first = chat(server, ask("toolie", tools=[LOOKUP]))
    call = first["tool_calls"][0]
    assert call["function"]["name"] == "lookup_fact"
    assert set(json.loads(call["function"]["arguments"])) == {"topic", "limit"}
    result = {"role": "tool", "tool_call_id": call["id"], "content": "oaks live long"}
    asked = {"role": "assistant", "content": "", "tool_calls": first["tool_calls"]}
    second = chat(server, ask("toolie", QUESTION, asked, result, tools=[LOOKUP]))
    assert '"oaks live long"' in second["content"]
    given = chat(server, ask("toolie", 'Please. ARGS:{"topic": "x"}', tools=[LOOKUP]))
    assert given["tool_calls"][0]["function"]["arguments"] == '{"topic": "x"}'


def test_streamed_calls_may_share_an_index_or_have_none(server: ModelServer) -> None:
    def indices(model: str) -> list[int | None]:
        chunks = stream(server, ask(model, tools=[LOOKUP]))
        calls = [
            call
            for chunk in chunks
            for call in chunk["choices"][0]["delta"].get("tool_calls", [])
        ]
        return [call.get("index") for call in calls if "id" in call]

    assert indices("toolie-two") == [0, 1]
    assert indices("toolie-index0") == [0, 0]
    assert indices("toolie-noindex") == [None, None]
    assert indices("toolie-mixed") == [1, 0]


def test_the_manager_picks_a_candidate_and_ends_when_told(
    server: ModelServer,
) -> None:
    turns = tagged(("Alice", "one"), ("Bob", "two"))
    prompt = f'{turns}\n\nCandidates: ["Alice", "Carol"]'
    chosen = json.loads(chat(server, ask("manager", QUESTION, prompt))["content"])
    assert (chosen["next"], chosen["done"]) == ("Carol", False)
    goes_on = chat(server, ask("manager", f"{QUESTION} MANAGER:end-after-3", prompt))
    assert json.loads(goes_on["content"])["done"] is False
    ended = chat(server, ask("manager", f"{QUESTION} MANAGER:end-after-2", prompt))
    assert json.loads(ended["content"])["done"] is True
    wrong = chat(server, ask("manager", f"{QUESTION} MANAGER:wrong", prompt))
    name = json.loads(wrong["content"])["next"]
    assert name not in ("Alice", "Bob", "Carol")
    again = f'There is no {name}. Choose one of: ["Alice", "Carol"]'
    right = ask("manager", f"{QUESTION} MANAGER:wrong", prompt, again)
    assert json.loads(chat(server, right)["content"])["next"] == "Carol"


def test_the_moderator_ends_when_all_were_heard_and_one_twice_since_the_question(
    server: ModelServer,
) -> None:
    def turns(*names: str) -> str:
        return tagged(*((name, "Well.") for name in names))

    def choose(history: str) -> dict[str, Any]:
        asked = f'So far:\n\n{history}\n\nWho is next? Choose one of: ["Ada", "Grace"]'
        chosen: dict[str, Any] = json.loads(
            chat(server, ask("moderator", asked))["content"]
        )
        return chosen

    three = turns("Ada", "Grace", "Ada")
    assert choose(QUESTION)["next"] == "Ada"
    assert choose(f"{QUESTION}\n\n{turns('Ada')}")["next"] == "Grace"
    assert choose(f"{QUESTION}\n\n{turns('Ada', 'Grace')}")["done"] is False
    assert choose(f"{QUESTION}\n\n{three}")["done"] is True
    second = choose(f"{QUESTION}\n\n{three}\n\nAnd elms?\n\n{turns('Ada')}")
    assert (second["next"], second["done"]) == ("Grace", False)


def test_background_tasks_get_the_json_they_ask_for(server: ModelServer) -> None:
    title = json.loads(chat(server, ask("alice", TITLE_TASK))["content"])
    assert "Oaks" in title["title"]
    assert server.turns() == []
    assert server.requests[0].task == "title"


@pytest.mark.parametrize(
    ("model", "code"), [("fails-500", 500), ("fails-401", 401), ("fails-429", 429)]
)
def test_a_refusal_is_an_http_error(server: ModelServer, model: str, code: int) -> None:
    with pytest.raises(urllib.error.HTTPError) as caught:
        stream(server, ask(model))
    with caught.value as error:
        assert error.code == code
        assert json.loads(error.read())["error"]["message"]
        assert error.headers.get("Retry-After") == ("2" if code == 429 else None)


def test_a_stream_can_break_with_an_error_or_a_dead_connection(
    server: ModelServer,
) -> None:
    chunks = stream(server, ask("fails-midway"))
    assert chunks[-1]["error"]["message"]
    assert deltas(chunks, "content").startswith("This much was said")
    with pytest.raises(http.client.IncompleteRead) as caught:
        stream(server, ask("drops-midway"))
    assert b"This " in caught.value.partial
    assert b"[DONE]" not in caught.value.partial
    assert server.aborted == []


def test_a_model_that_was_empty_once_speaks_when_asked_again(
    server: ModelServer,
) -> None:
    assert chat(server, ask("empty-once"))["content"] == ""
    assert chat(server, ask("empty-once"))["content"].startswith("Late here.")
    server.clear()
    assert chat(server, ask("empty-once"))["content"] == ""


def test_a_held_model_waits_and_is_seen_in_flight(server: ModelServer) -> None:
    with ThreadPoolExecutor() as pool, server.hold("alice", after=3) as hold:
        answers = [pool.submit(stream, server, ask("alice")) for _ in range(2)]
        hold.wait_until_reached(2)
        assert (server.in_flight, server.max_in_flight) == (2, 2)
        assert chat(server, ask("bob"))["content"]
        assert not any(answer.done() for answer in answers)
        hold.release()
        assert all(deltas(one.result(10), "content") for one in answers)
    server.wait_for(lambda one: one.in_flight == 0)
    assert server.max_in_flight == 3


@pytest.mark.parametrize("model", ["silent", "stalls", "wait-20"])
def test_a_client_that_leaves_frees_the_connection(
    server: ModelServer, model: str
) -> None:
    host = server.url.removeprefix("http://")
    connection = http.client.HTTPConnection(host, timeout=10)
    connection.request(
        "POST", "/v1/chat/completions", json.dumps(ask(model, stream=True))
    )
    server.wait_for(lambda one: one.in_flight == 1)
    connection.close()
    server.wait_for(lambda one: one.in_flight == 0)
    assert server.aborted == [model]


def test_behaviours_can_be_added_while_it_runs(server: ModelServer) -> None:
    steps: list[Step] = [Text("Two words."), ToolCall("add", "{}"), Usage(5, 7)]
    server.add("mine", lambda body: Script(steps))
    server.add("tokens-90-0")
    with urllib.request.urlopen(f"{server.openai_url}/models", timeout=10) as got:
        listed = [one["id"] for one in json.load(got)["data"]]
    assert set(BEHAVIOURS) | {"mine", "tokens-90-0"} == set(listed)
    answer = json.loads(post(server, "/v1/chat/completions", ask("mine")))
    assert answer["usage"]["total_tokens"] == 12
    text = chat(server, ask("tokens-90-0"))["content"]
    assert len(text.split()) == 90
    assert 400 < len(text) < 540
    with pytest.raises(ValueError, match="nonsense"):
        server.add("nonsense")


def test_the_demo_speakers_take_up_each_others_points(server: ModelServer) -> None:
    cast, heard = ["ada", "grace", "edsger"], list[tuple[str, str]]()
    for turn in range(6):
        who = cast[turn % 3]
        said = [
            (
                {"role": "assistant", "content": text}
                if name == who
                else f"{name.capitalize()}: {text}"
            )
            for name, text in heard
        ]
        # A demo speaker takes its time; what it says does not depend on it.
        script = BEHAVIOURS[who](ask(who, QUESTION, *said))
        spoken = "".join(step.text for step in script.steps if isinstance(step, Text))
        assert 55 <= len(spoken.split()) <= 125
        assert ("oaks" if turn < 1 else heard[-1][0].capitalize()) in spoken
        heard.append((who, spoken))
    assert len({text for _, text in heard}) == 6


def test_it_stops_while_clients_wait() -> None:
    before = threading.active_count()
    with ThreadPoolExecutor() as pool, ModelServer() as server:
        waiting = pool.submit(stream, server, ask("silent"))
        server.wait_for(lambda one: one.in_flight == 1)
        server.stop()
        with pytest.raises((OSError, http.client.HTTPException)):
            waiting.result(10)
    assert server.aborted == []
    assert threading.active_count() == before
