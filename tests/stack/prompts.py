"""How a scripted model reads what it was sent: our prompts, and the host's tasks."""

from __future__ import annotations

import json
import re
import tomllib
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

from tests.stack.scripts import Body

_TAGGED = re.compile(r'<message from="([^"\n]*)">(.*?)</message>', re.DOTALL)
_CUE = re.compile(
    r"\b(?:your turn|go on\.|(?:respond|reply|answer|speak) as|now (?:speak|it is))"
)
WORDS = {
    kind: frozenset(words.split())
    for kind, words in tomllib.loads(
        Path(__file__).with_name("words.toml").read_text("utf-8")
    ).items()
}
"""The words of each kind in `words.toml`."""


@dataclass(frozen=True, slots=True)
class Said:
    """One contribution: `speaker` is "" for the user and None for the model itself."""

    speaker: str | None
    text: str


def text_of(message: Body) -> str:
    """Read a message's text, whether its content is a string or a list of parts."""
    content = message.get("content")
    if isinstance(content, list):
        parts = [part.get("text") for part in content if isinstance(part, dict)]
        return "\n".join(part for part in parts if isinstance(part, str))
    return content if isinstance(content, str) else ""


def messages_of(body: Body) -> list[Body]:
    """Read the messages of a Chat Completions body."""
    messages = body.get("messages")
    return messages if isinstance(messages, list) else []


def split_speakers(text: str) -> list[Said]:
    """Split a user message into the contributions of labelled speakers."""
    said: list[Said] = []
    start = 0
    for match in _TAGGED.finditer(text):
        said += [Said("", text[start : match.start()]), Said(*match.groups())]
        start = match.end()
    said.append(Said("", text[start:]))
    return [Said(one.speaker, found) for one in said if (found := one.text.strip())]


def conversation(body: Body) -> list[Said]:
    """Read who said what, in order, without instructions and tool messages."""
    said: list[Said] = []
    for message in messages_of(body):
        text = text_of(message).strip()
        if message.get("role") == "assistant" and text:
            said.append(Said(None, text))
        elif message.get("role") == "user":
            said.extend(split_speakers(text))
    return [one for one in said if one.speaker != "" or not _is_cue(one.text)]


def _is_cue(text: str) -> bool:
    return bool(_CUE.search(text[:80].lower()))


@dataclass(frozen=True, slots=True)
class Prompt:
    """What a speaker needs to know: the question and what followed it."""

    question: str
    since: tuple[Said, ...]

    @property
    def own_turns(self) -> int:
        """How often the model itself has spoken since the question."""
        return sum(one.speaker is None for one in self.since)

    @property
    def previous(self) -> Said | None:
        """What somebody else said last since the question."""
        others = [one for one in self.since if one.speaker]
        return others[-1] if others else None


def read_prompt(body: Body) -> Prompt:
    """Find the user's last question and everything said after it."""
    said = conversation(body)
    asked = [place for place, one in enumerate(said) if one.speaker == ""]
    if not asked:
        return Prompt("", tuple(said))
    return Prompt(said[asked[-1]].text, tuple(said[asked[-1] + 1 :]))


def whole_text(body: Body) -> str:
    """Join the texts of all messages."""
    return "\n".join(text_of(message) for message in messages_of(body))


def last_user_text(body: Body) -> str:
    """Read the last user message as it is."""
    users = [one for one in messages_of(body) if one.get("role") == "user"]
    return text_of(users[-1]) if users else ""


def few_words(text: str, count: int = 8) -> str:
    """Take the first words of a text, on one line."""
    return " ".join(text.split()[:count]).rstrip(".,:;!?")


def keywords(text: str, count: int = 3) -> list[str]:
    """Take the words of a text that carry its meaning, in their own order."""
    found: list[str] = []
    for word in re.findall(r"[^\W\d_][\w'’-]*", text):
        known = {one.lower() for one in found}
        if len(word) > 2 and word.lower() not in WORDS["small"] | known:
            found.append(word)
    if len(found) > count:
        longest = sorted(found, key=len, reverse=True)[:count]
        found = [word for word in found if word in longest]
    return found[:count]


# --- tools -----------------------------------------------------------------------


def offered_tools(body: Body) -> list[Body]:
    """Read the function specs of the tools offered."""
    tools = body.get("tools") or []
    specs = [tool.get("function") for tool in tools if isinstance(tool, dict)]
    return [spec for spec in specs if isinstance(spec, dict) and spec.get("name")]


def fresh_results(body: Body) -> list[str]:
    """Read the tool results that the model is to answer now."""
    results: list[str] = []
    for message in reversed(messages_of(body)):
        if message.get("role") != "tool":
            break
        results.insert(0, text_of(message))
    return results


def asked_arguments(text: str) -> str | None:
    """Read the JSON value after `ARGS:` in a prompt, if there is one."""
    place = text.find("ARGS:")
    if place < 0:
        return None
    rest = text[place + len("ARGS:") :].lstrip()
    try:
        _, end = json.JSONDecoder().raw_decode(rest)
    except json.JSONDecodeError:
        return None
    return rest[:end]


def sensible_arguments(spec: Body, question: str) -> str:
    """Fill a tool's required parameters according to their schema."""
    schema = spec.get("parameters") or {}
    properties = schema.get("properties") or {}
    required = schema.get("required") or []
    values = {
        name: _sensible_value(properties.get(name) or {}, question) for name in required
    }
    return json.dumps(values, ensure_ascii=False)


def _sensible_value(schema: Body, question: str) -> Any:
    if "default" in schema:
        return schema["default"]
    if schema.get("enum"):
        return schema["enum"][0]
    topic = " ".join(keywords(question)) or "sample"
    by_type = {"integer": 3, "number": 1.5, "boolean": True, "array": [], "object": {}}
    return by_type.get(schema.get("type") or "", topic)


# --- the host's background tasks -------------------------------------------------

_TASKS = ("title", "tags", "follow_ups", "queries", "prompt", "text")


def task_of(body: Body) -> str | None:
    """Name the background task a prompt asks for: the key of its JSON answer."""
    text = last_user_text(body)
    if "### Task:" not in text or "JSON" not in text:
        return None
    # A text may speak of other keys too: the first one asked for is the answer's.
    places = {key: text.find(f'"{key}":') for key in _TASKS}
    found = {key: place for key, place in places.items() if place >= 0}
    return min(found, key=lambda key: found[key]) if found else None


def task_question(body: Body) -> str:
    """Read the first question of the chat history that a task prompt carries."""
    text = last_user_text(body)
    history = text.split("<chat_history>")[-1].split("</chat_history>")[0]
    first = re.sub(r"^\W*(?:USER|user):?\W*", "", history.strip())
    return first.split("ASSISTANT:")[0]


def task_topic(body: Body) -> list[str]:
    """Take the keywords of the question that a task prompt is about."""
    return keywords(task_question(body)) or ["General"]


# --- choosing a speaker ----------------------------------------------------------


def read_candidates(body: Body) -> list[str]:
    """Find the names to choose from: the last list of texts there is."""
    decoder = json.JSONDecoder()
    for message in reversed(messages_of(body)):
        text = "" if message.get("role") == "assistant" else text_of(message)
        for match in reversed(list(re.finditer(r"\[", text))):
            with suppress(json.JSONDecodeError):
                names, _ = decoder.raw_decode(text[match.start() :])
                if names and all(isinstance(name, str) for name in names):
                    return list(names)
    return []


def turns_seen(body: Body) -> list[str]:
    """Name who has spoken, by a manager's prompt, since the user's last question."""
    said = split_speakers(whole_text(body))
    if said and said[-1].speaker == "":
        said.pop()  # what the manager is asked, after the conversation
    asked = [place for place, one in enumerate(said) if one.speaker == ""]
    since = said[asked[-1] + 1 :] if asked else said
    return [one.speaker for one in since if one.speaker]


# --- the stages of a council or debate ---------------------------------------------

Stage = Literal["answer", "review", "vote", "conclusion"]

_CUES: dict[Stage, str] = {
    "review": "Rank these answers by",
    "vote": "Who argued best, yourself excluded?",
    "conclusion": "Now write ",
}


def stage_of(body: Body) -> Stage:
    """What a member is asked for."""
    asked = last_user_text(body)
    return next((stage for stage, cue in _CUES.items() if cue in asked), "answer")
