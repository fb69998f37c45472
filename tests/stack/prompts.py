"""How a scripted model reads what it was sent.

Everything here is a guess at the format of somebody's prompt, kept in small functions
so that each can be tuned alone.
"""

from __future__ import annotations

import json
import re
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, Literal

from tests.stack.scripts import Body

_TAGGED = re.compile(r'<message from="([^"\n]*)">\s*(.*?)\s*</message>', re.DOTALL)
# Without such tags, at the start of a paragraph: "Bob: …", "**Bob:** …", "[Bob] …",
# "### 🔴 Bob".
_LABEL = re.compile(
    r"(?:\A|\n\s*\n|(?<=\n)(?=\[|\*\*|\#))\s*"
    r"(?:\#{1,6}\s+(?:[^\w\s]+\s+)?(?P<heading>[^\n:]{1,40})\s*(?:\n|\Z)"
    r"|\*\*(?P<bold>[^\n*:]{1,40})(?::\*\*\s|\*\*:\s|\*\*[ ]*\n)"
    r"|\[(?P<bracket>[^\n\]]{1,40})\]:?\s"
    r"|(?P<plain>[A-Z][\w'.-]*(?: [\w'.-]+){0,3}):\s)"
)
_USERS = {"user", "human", "question", "the user", "user question"}
_NOT_NAMES = _USERS | set(
    [
        *("candidates", "participants", "speakers", "available participants", "names"),
        *("conversation", "the conversation", "the conversation so far", "transcript"),
        *("rules", "note", "notes", "task", "answer", "last speaker", "reason", "next"),
        *("example", "format", "output", "instructions", "previous speaker", "history"),
    ]
)
_CUE = re.compile(
    r"\b(?:your turn|go on\.|(?:respond|reply|answer|speak) as|now (?:speak|it is))"
)
_SMALL_WORDS = """
    again alive already always enough maybe never often sometimes together today
    a about after all also am an and any are as at be because been being best better
    between but by can could did do does doing down during each ever explain first for
    from get give going good had has have having he help her here him his how i if in
    instead into is it its just kind know let like make many me more most much must my
    need next no not now of on one only or other our out over own please really right
    say shall she should so some still such take talk tell than that the their them
    then there these they thing things think this those through to too two under until
    up us use using very want was way we well were what when where whether which while
    who whom whose why will with without word words would write yes you your yours
"""
STOPWORDS = frozenset(_SMALL_WORDS.split())


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
    if _TAGGED.search(text):
        return _split_tagged(text)
    said: list[Said] = []
    speaker, start = "", 0
    for match in _LABEL.finditer(text):
        if before := text[start : match.start()].strip():
            said.append(Said(speaker, before))
        name = next(group for group in match.groups() if group).strip()
        speaker, start = "" if name.lower() in _USERS else name, match.end()
    if rest := text[start:].strip():
        said.append(Said(speaker, rest))
    return said


def _split_tagged(text: str) -> list[Said]:
    said: list[Said] = []
    start = 0
    for match in _TAGGED.finditer(text):
        if before := text[start : match.start()].strip():
            said.append(Said("", before))
        said.append(Said(match.group(1), match.group(2)))
        start = match.end()
    if rest := text[start:].strip():
        said.append(Said("", rest))
    return said


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
        if len(word) > 2 and word.lower() not in STOPWORDS | known:
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
        name: _sensible_value(name, properties.get(name) or {}, question)
        for name in required
    }
    return json.dumps(values, ensure_ascii=False)


def _sensible_value(name: str, schema: Body, question: str) -> Any:
    if "default" in schema:
        return schema["default"]
    if schema.get("enum"):
        return schema["enum"][0]
    by_type: dict[str, Any] = {
        "integer": 3,
        "number": 1.5,
        "boolean": True,
        "array": [],
        "object": {},
    }
    kind = schema.get("type")
    if isinstance(kind, str) and kind in by_type:
        return by_type[kind]
    by_name = {"expression": "6 * 7", "timezone": "UTC", "date": "2026-01-31"}
    return by_name.get(name) or " ".join(keywords(question)) or "sample"


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
    """Find the names a group manager may choose from, in the last message with any."""
    for message in reversed(messages_of(body)):
        text = text_of(message)
        if message.get("role") == "assistant":
            continue
        if names := _names_in_json(text) or _names_in_list(text):
            return names
    return []


def _names_in_json(text: str) -> list[str]:
    decoder = json.JSONDecoder()
    for match in reversed(list(re.finditer(r"\[", text))):
        try:
            value, _ = decoder.raw_decode(text[match.start() :])
        except json.JSONDecodeError:
            continue
        if names := [name for one in value if (name := _name_of(one))]:
            return names
    return []


def _name_of(value: Any) -> str:
    if isinstance(value, dict):
        value = value.get("alias") or value.get("name")
    return value if isinstance(value, str) else ""


def _names_in_list(text: str) -> list[str]:
    lines = re.findall(r"^\s*[-*] +(.+)$", text, re.MULTILINE)
    names = [re.split(r"\s+[(–—-]|\s*:", line)[0].strip("*`\"' ") for line in lines]
    return [name for name in names if 0 < len(name) <= 40]


def turns_seen(body: Body, names: Sequence[str] = ()) -> list[str]:
    """Name the speakers whose turns a manager's prompt shows, in order.

    Where turns are tagged, only those since the user's last question.
    """
    text = "\n\n".join(text_of(message) for message in messages_of(body))
    if _TAGGED.search(text):
        return _tagged_turns(text)
    labels = re.finditer(
        r"^\s*(?:\#{1,6}\s+(?:[^\w\s]+\s+)?|\*\*|\[)?"
        r"([A-Z][\w'.-]*(?: [\w'.-]+){0,3}?)(?:\]|:?\*\*)?(?::\s|\]|$)",
        text,
        re.MULTILINE,
    )
    found = [label.group(1) for label in labels]
    if names:
        return [name for name in found if name in names]
    return [name for name in found if name.lower() not in _NOT_NAMES]


def _tagged_turns(text: str) -> list[str]:
    said = _split_tagged(text)
    if said[-1].speaker == "":
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
