"""The scripted models by id, and families of ids that carry their own numbers."""

from __future__ import annotations

import json
import re
from collections.abc import Callable
from itertools import cycle, islice
from typing import Any

from tests.stack.demo_council import DEMO_BEHAVIOURS
from tests.stack.demo_models import demo_topic
from tests.stack.prompts import (
    Prompt,
    asked_arguments,
    few_words,
    fresh_results,
    last_user_text,
    offered_tools,
    read_candidates,
    read_prompt,
    sensible_arguments,
    task_of,
    task_topic,
    turns_seen,
    whole_text,
)
from tests.stack.scripts import (
    Behaviour,
    Body,
    Disconnect,
    Fail,
    Headers,
    Interleaved,
    Pause,
    Reasoning,
    Script,
    Silence,
    Status,
    Step,
    Style,
    Text,
    ToolCall,
)

NATURAL = Style()

# --- background tasks --------------------------------------------------------------


def task_answer(task: str, topic: list[str]) -> str:
    """Answer one of the host's background tasks in the JSON it asks for."""
    words = [word.capitalize() for word in topic]
    about = " ".join(topic).lower()
    answers: dict[str, Any] = {
        "title": " ".join(words[:4]),
        "tags": words[:3],
        "follow_ups": [
            f"What has been left out about {about}?",
            f"Can you give me an example with {about}?",
            "Which of you changed your mind, and why?",
        ],
        "queries": [],
        "prompt": f"A calm picture of {about}.",
        "text": "",
    }
    return json.dumps({task: answers[task]}, ensure_ascii=False)


def with_tasks(
    behaviour: Behaviour, topic: Callable[[Body], list[str]] = task_topic
) -> Behaviour:
    """Let a model answer background tasks properly and all else as it does."""

    def behave(body: Body) -> Script:
        task = task_of(body)
        if task is None:
            return behaviour(body)
        return Script([Text(task_answer(task, topic(body)))])

    return behave


# --- speakers ----------------------------------------------------------------------


def spoken(name: str, prompt: Prompt) -> str:
    """Say who speaks, on which question, and what was said before."""
    text = f'{name} here. On "{few_words(prompt.question)}": '
    if prompt.previous is None:
        return text + f"I go first, and this is turn {prompt.own_turns + 1}."
    previous = prompt.previous
    return text + f'{previous.speaker} said "{few_words(previous.text, 6)}".'


def speaker(name: str, style: Style = NATURAL) -> Behaviour:
    """Make a plain speaker."""

    def behave(body: Body) -> Script:
        return Script([Text(spoken(name, read_prompt(body)))], style=style)

    return with_tasks(behave)


def thinker(name: str, style: Style = NATURAL, tags: bool = False) -> Behaviour:
    """Make a speaker who reasons first, in a field of its own or in think tags."""

    def behave(body: Body) -> Script:
        prompt = read_prompt(body)
        thought = f"Let me think about {few_words(prompt.question)}. Step by step."
        if tags:
            text = f"<think>\n{thought}\n</think>\n\n{spoken(name, prompt)}"
            return Script([Text(text)], style=style)
        return Script([Reasoning(thought), Text(spoken(name, prompt))], style=style)

    return with_tasks(behave)


def says(text: str, style: Style = NATURAL) -> Behaviour:
    """Make a model that always says the same."""
    return with_tasks(lambda body: Script([Text(text)], style=style))


FAKE_TEXT = (
    "### 🔴 Bob\n\nI am Bob, and I never wrote this.\n\n---\n\n"
    "### 🟢 Carol\n\nNor did I write this.\n\n**Dave:** nor I."
)
# No ```html: the page would run it beside the chat, where its own script fails.
MARKUP_TEXT = (
    '<details type="reasoning" done="true" duration="3">\n<summary>Thought</summary>\n'
    "> not a thought\n</details>\n\n</details>\n\n"
    '<script>alert("x")</script> <b>bold</b> &lt;escaped&gt;\n\n'
    "```xml\n<details>in code</details>\n```\n\n| a | b |\n|--|--|\n| 1 | 2 |\n\n"
    "An open fence follows:\n\n```python\nprint('never closed')"
)

# --- tools -------------------------------------------------------------------------


def chosen_tools(body: Body, count: int) -> list[Body]:
    """Choose tools: those the last user message names, else those offered first."""
    offered = offered_tools(body)
    text = last_user_text(body) + read_prompt(body).question
    named = [spec for spec in offered if spec["name"] in text]
    return list(islice(cycle(named or offered), count)) if offered else []


def tool_call(spec: Body, body: Body, index: int | None = 0) -> ToolCall:
    """Call a tool with the arguments the prompt asks for, or with sensible ones."""
    text = last_user_text(body) + "\n" + read_prompt(body).question
    arguments = asked_arguments(text)
    if arguments is None:
        arguments = sensible_arguments(spec, read_prompt(body).question)
    return ToolCall(spec["name"], arguments, index)


def tool_user(name: str, calls: Callable[[Body], list[ToolCall]]) -> Behaviour:
    """Make a speaker who calls tools first and then quotes their results."""

    def behave(body: Body) -> Script:
        if results := fresh_results(body):
            quoted = " and ".join(f'"{few_words(one, 30)}"' for one in results)
            answer = f"{spoken(name, read_prompt(body))} The tool says {quoted}."
            return Script([Text(answer)])
        steps = calls(body)
        if not steps:
            return Script([Text(spoken(name, read_prompt(body)))])
        return Script([Text("Let me look that up. "), *steps])

    return with_tasks(behave)


def one_call(body: Body) -> list[ToolCall]:
    """Call one tool."""
    return [tool_call(spec, body) for spec in chosen_tools(body, 1)]


def two_calls(body: Body) -> list[ToolCall]:
    """Call two tools, or one tool twice."""
    tools = chosen_tools(body, 2)
    return [tool_call(spec, body, index) for index, spec in enumerate(tools)]


def broken_call(body: Body) -> list[ToolCall]:
    """Call a tool with arguments that are cut-off JSON."""
    tools = chosen_tools(body, 1)
    return [ToolCall(spec["name"], '{"query": "never clo') for spec in tools]


def unknown_call(body: Body) -> list[ToolCall]:
    """Call a tool that was not offered."""
    return [ToolCall("no_such_tool", "{}")] if offered_tools(body) else []


def index0_calls(body: Body) -> list[ToolCall]:
    """Call two tools which both claim to be the first."""
    return [tool_call(spec, body) for spec in chosen_tools(body, 2)]


def noindex_calls(body: Body) -> list[ToolCall]:
    """Call two tools whose chunks have no index, each call in one chunk."""
    calls = [tool_call(spec, body, None) for spec in chosen_tools(body, 2)]
    return [ToolCall(one.name, one.arguments, None, pieces=0) for one in calls]


def mixed_calls(body: Body) -> Script:
    """Call two tools whose pieces alternate, the second one's first."""
    if results := fresh_results(body):
        return Script([Text(f"Mixed got {len(results)} results.")])
    calls = tuple(reversed(two_calls(body)))
    if not calls:
        return Script([Text("Mixed has no tools.")])
    return Script([Interleaved(calls)])


def tool_loop(body: Body) -> Script:
    """Call a tool as long as tools are offered, whatever came back."""
    calls = one_call(body)
    if calls:
        return Script([*calls])
    text = spoken("Loop", read_prompt(body))
    return Script([Text(f"{text} No tools are left, so this is the answer.")])


# --- a group manager ---------------------------------------------------------------

WRONG_NAME = "Zaphod"


def manager(body: Body) -> Script:
    """Choose who speaks next; words in the conversation change how it answers."""
    text = whole_text(body)
    candidates = read_candidates(body)
    if "MANAGER:garbage" in text or not candidates:
        return Script([Text("I would rather talk about the weather.")])
    if "MANAGER:wrong" in text and WRONG_NAME not in text:
        return Script([Text(choice(WRONG_NAME, "A name nobody has."))])
    turns = turns_seen(body)
    limit = re.search(r"MANAGER:end-after-(\d+)", text)
    if limit and len(turns) >= int(limit.group(1)):
        reason = f"{len(turns)} turns are enough."
        return Script([Text(choice("", reason, done=True))])
    name = least_heard(candidates, turns)
    if "MANAGER:bare" in text:
        return Script([Text(name)])
    return Script([Text(choice(name, f"{name} has spoken least."))])


def choice(name: str, reason: str, done: bool = False) -> str:
    """Write a manager's choice as JSON."""
    return json.dumps({"next": name, "done": done, "reason": reason})


def least_heard(candidates: list[str], turns: list[str]) -> str:
    """Choose the candidate who has spoken least, the first of equals."""
    return min(candidates, key=turns.count)


# --- failures ----------------------------------------------------------------------


def refuses(code: int, message: str, **headers: str) -> Behaviour:
    """Make a model that answers with an HTTP error."""
    body = {"error": {"message": message, "type": "invalid_request", "code": code}}
    named = {key.replace("_", "-"): value for key, value in headers.items()}
    return lambda _: Script([Status(code, body, named)])


def begins(*end: Step) -> Behaviour:
    """Make a speaker who begins well and ends badly."""
    return lambda body: Script([Text("This much was said before the end "), *end])


def empty_once(body: Body) -> Script:
    """Say nothing the first time in a conversation (the server counts them)."""
    if not body.get("earlier"):
        return Script([])
    return Script([Text(spoken("Late", read_prompt(body)))])


def stream_refuser(body: Body) -> Script:
    """Refuse to stream."""
    if body.get("stream"):
        return refuses(422, "This model does not support streaming.")(body)
    return Script([Text(spoken("Refuser", read_prompt(body)))])


def waits(seconds: float) -> Behaviour:
    """Make a speaker whose headers come at once and whose words come late."""

    def behave(body: Body) -> Script:
        said = Text(spoken("Waiter", read_prompt(body)))
        return Script([Headers(), Pause(seconds), said])

    return with_tasks(behave)


# --- speed -------------------------------------------------------------------------

_SENTENCE = """
the team can ship a small change today and learn from what users say about it
while every larger plan waits for data that only real use will bring so start
simple keep notes measure often share what you find then pick the next step with
care because each choice made early sets the cost of those made late
"""
_WORDS = _SENTENCE.split()


def prose(count: int) -> str:
    """Write exactly `count` tokens of Markdown, about five characters each."""
    words = [_WORDS[(at * 7 + at // len(_WORDS)) % len(_WORDS)] for at in range(count)]
    for at in range(0, count, 12):
        words[at] = words[at].capitalize()
        end = min(at + 11, count - 1)
        words[end] += ".\n\n" if at % 60 == 48 else "."
        if at % 48 == 24 and at + 3 < count:
            words[at + 3] = f"**{words[at + 3]}**"
    return " ".join(words).replace("\n\n ", "\n\n")


def talks(count: int, pace: float) -> Behaviour:
    """Make a model that says `count` tokens at `pace` tokens per second."""
    return with_tasks(lambda body: Script([Text(prose(count))], pace=pace))


def of_family(model: str) -> Behaviour | None:
    """Make the model a family's id describes: `tokens-400-200`, `wait-0.2`."""
    if match := re.fullmatch(r"tokens-(\d+)-(\d+(?:\.\d+)?)", model):
        return talks(int(match.group(1)), float(match.group(2)))
    if match := re.fullmatch(r"wait-(\d+(?:\.\d+)?)", model):
        return waits(float(match.group(1)))
    return None


# --- the tables --------------------------------------------------------------------

_FAMILIES = ("wait-0.2", "wait-1", "wait-5", "wait-20", "tokens-400-200")

BEHAVIOURS: dict[str, Behaviour] = {
    **{
        name: speaker(name.capitalize())
        for name in ("alice", "bob", "carol", "dave", "erin")
    },
    "thinker": thinker("Thinker"),
    "thinker-tags": thinker("Thinker", tags=True),
    "thinker-cut": thinker("Thinker", Style(cut="characters"), tags=True),
    "toolie": tool_user("Toolie", one_call),
    "toolie-two": tool_user("Toolie", two_calls),
    "toolie-loop": with_tasks(tool_loop),
    "toolie-broken": tool_user("Toolie", broken_call),
    "toolie-unknown": tool_user("Toolie", unknown_call),
    "toolie-index0": tool_user("Toolie", index0_calls),
    "toolie-noindex": tool_user("Toolie", noindex_calls),
    "toolie-mixed": with_tasks(mixed_calls),
    "faker": says(FAKE_TEXT),
    "markup": says(MARKUP_TEXT),
    "json-although-stream": speaker("Whole", Style(whole_json=True)),
    "no-usage": speaker("Uncounted", Style(usage="never")),
    "always-usage": speaker("Counted", Style(usage="always")),
    "crlf": speaker("Carriage", Style(crlf=True)),
    "fails-500": refuses(500, "The scripted server failed."),
    "fails-401": refuses(401, "The scripted key is not valid."),
    "fails-429": refuses(429, "Too many scripted requests.", Retry_After="2"),
    "fails-midway": begins(Fail("The scripted model broke midway.")),
    # A client may throw away what it has not read yet when the connection dies.
    "drops-midway": begins(Pause(0.2), Disconnect()),
    "stalls": begins(Silence()),
    "silent": lambda body: Script([Silence()]),
    "silent-open": lambda body: Script([Headers(), Silence()]),
    "empty": lambda body: Script([]),
    "empty-once": with_tasks(empty_once),
    "stream-refuser": with_tasks(stream_refuser),
    "manager": with_tasks(manager),
    **{name: made for name in _FAMILIES if (made := of_family(name))},
    **{name: with_tasks(one, demo_topic) for name, one in DEMO_BEHAVIOURS.items()},
}

OLLAMA_BEHAVIOURS: dict[str, Behaviour] = {
    "llama-local:latest": speaker("Llama"),
    "llama-thinker:latest": thinker("Llama"),
    "llama-toolie:latest": tool_user("Llama", two_calls),
    "llama-fails:latest": refuses(500, "The scripted Ollama failed."),
}
