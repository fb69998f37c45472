"""The demo's speakers: scripted, but they read like people in a conversation.

Each turn is put together from a speaker's own sentences, which stand in `demo.toml`: an
answer to the point the speaker before made, a claim that moves the conversation on
(opening, refinement, closing), and a remark that uses the question's words. Which
sentences are taken follows from a hash of question and turn, so the same question gives
the same talk.
"""

from __future__ import annotations

import json
import re
import tomllib
import zlib
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, TypeVar

from tests.stack.prompts import (
    WORDS,
    Prompt,
    Said,
    few_words,
    fresh_results,
    keywords,
    offered_tools,
    read_candidates,
    read_prompt,
    sensible_arguments,
    task_question,
    task_topic,
    turns_seen,
)
from tests.stack.scripts import (
    Behaviour,
    Body,
    Pause,
    Reasoning,
    Script,
    Text,
    ToolCall,
)

T = TypeVar("T")
PACE = 60.0
"""Tokens per second of the demo's speakers."""
SAID: dict[str, Any] = tomllib.loads(
    Path(__file__).with_name("demo.toml").read_text("utf-8")
)


@dataclass(frozen=True, slots=True)
class Character:
    """A speaker's sentences; a claim comes with its point as others refer to it."""

    name: str
    openers: Sequence[str]
    answers: Sequence[Sequence[str]]
    claims: Sequence[Sequence[tuple[str, str]]]
    remarks: Sequence[str]
    asks: Sequence[str]
    closers: Sequence[str]


ADA, GRACE, ALAN, EDSGER = CHARACTERS = tuple(
    Character(name, **SAID[name]) for name in ("Ada", "Grace", "Alan", "Edsger")
)

# --- writing a turn ----------------------------------------------------------------

_NOT_THINGS, _ARTICLES = WORDS["acts"], WORDS["articles"]


def pick(options: Sequence[T], seed: str, turn: int) -> T:
    """Choose by hash, going through all options from turn to turn."""
    return options[(zlib.crc32(seed.encode()) + turn) % len(options)]


def things(question: str, turn: int) -> tuple[str, str]:
    """Choose two things the question speaks about, others in other turns."""
    found = named_things(question)
    if len(found) < 2:
        found = list(dict.fromkeys([*found, *keywords(question, 3)]))
    if len(found) < 2:
        return (found or ["the answer"])[0], "the price of it"
    start = turn % (len(found) - 1)
    return found[start], found[start + 1]


def named_things(question: str) -> list[str]:
    """Find the things a question names, as somebody else would call them.

    A guess by articles and small words: "my old car" becomes "your old car".
    """
    found: list[str] = []
    for part in re.split(r"[^\w\s'’-]+", question):
        names = (_named(chunk, after) for chunk, after in _chunks(part.split()))
        found.extend(name for name in names if name)
    return list(dict.fromkeys(found))


def _chunks(words: Sequence[str]) -> Iterator[tuple[list[str], str]]:
    chunk: list[str] = []
    before = ""
    for word in [*words, ""]:
        if chunk and not _continues(chunk, word):
            yield chunk, word
            chunk = []
        if chunk or _begins(word, before):
            chunk.append(word)
        before = word.lower()


def _begins(word: str, before: str) -> bool:
    low = word.lower()
    acts = low in _NOT_THINGS or before in WORDS["pronouns"]
    return low in _ARTICLES or (_is_content(low) and not acts)


def _continues(chunk: Sequence[str], word: str) -> bool:
    low, last = word.lower(), chunk[-1].lower()
    acts = low in _NOT_THINGS and last not in _NOT_THINGS | _ARTICLES
    return _is_content(low) and len(chunk) <= 3 and not acts


def _is_content(word: str) -> bool:
    return len(word) > 1 and word not in (WORDS["small"] - _NOT_THINGS) | _ARTICLES


def _named(chunk: Sequence[str], after: str) -> str:
    words = [word for word in chunk if word.lower() not in _ARTICLES]
    article = chunk[0].lower() if len(words) < len(chunk) else ""
    if len(words) > 2 and words[-1] == "work":
        words.pop()  # "a four-day week work" does; "remote work" is a thing.
    if after.lower() in _ARTICLES and len(words) > 1:
        words.pop()  # "the team rewrite | the app": the last word is what it does.
    elif after.lower() in _ARTICLES and not article and words[0].islower():
        return ""
    if not words or words[-1].lower() in _NOT_THINGS:
        return ""
    article = {"my": "your", "our": "your", "your": "our"}.get(article, article)
    return " ".join(filter(None, [article, *words]))


def demo_topic(body: Body) -> list[str]:
    """Name what a chat is about, for its title and for further questions."""
    found = named_things(task_question(body))
    return max(found, key=len).split() if found else task_topic(body)


def quoted(question: str) -> str:
    """Shorten a question so that it can be quoted in a sentence."""
    line = " ".join(question.split())
    sentences = re.split(r"(?<=[.!?])\s+", line)
    asked = next((one for one in sentences if one.endswith("?")), sentences[0])
    words = asked.split()
    return asked if len(words) <= 16 else " ".join(words[:14]) + " …"


def point_of(said: Said) -> str:
    """Name the point somebody made: a known claim's, else their own words."""
    text = " ".join(said.text.split())
    claims = [one for who in CHARACTERS for stage in who.claims for one in stage]
    points = (point for claim, point in claims if claim in text)
    return next(points, f"the remark “{few_words(said.text, 7)}”")


def slots_of(prompt: Prompt) -> dict[str, str]:
    """What the sentences of a turn are filled with."""
    a, b = things(prompt.question, prompt.own_turns)
    slots = {"q": quoted(prompt.question), "a": a, "b": b}
    if prompt.previous is None:
        return slots
    point = point_of(prompt.previous)
    capital = point[0].upper() + point[1:]
    other = str(prompt.previous.speaker)
    return {**slots, "other": other, "point": point, "Point": capital}


def write_turn(who: Character, prompt: Prompt, fact: str = "") -> str:
    """Write one turn of 60 to 120 words in two paragraphs."""
    turn, stage = prompt.own_turns, min(prompt.own_turns, 2)
    slots = slots_of(prompt)

    def say(options: Sequence[str]) -> str:
        return pick(options, who.name + prompt.question, turn).format_map(slots)

    claim = say([text for text, _ in who.claims[stage]])
    first = [say(who.openers), claim]
    if prompt.previous:
        bridge = say(SAID["last_bridges" if stage > 1 else "bridges"])
        first = [say(who.answers[stage]), bridge, claim]
    last = say(who.closers if stage else who.asks)
    second = filter(None, [fact, say(who.remarks), last])
    return f"{' '.join(first)}\n\n{' '.join(second)}"


# --- what each of them does --------------------------------------------------------


def plain(who: Character) -> Behaviour:
    """Make a speaker who just speaks."""

    def behave(body: Body) -> Script:
        return Script([Text(write_turn(who, read_prompt(body)))], pace=PACE)

    return behave


def grace(body: Body) -> Script:
    """Reason about what was said, then speak."""
    prompt = read_prompt(body)
    slots, words = slots_of(prompt), SAID["thought"]
    thought = words["whole"].format(
        before=words["later" if prompt.previous else "first"].format_map(slots),
        stage=words["stages"][min(prompt.own_turns, 2)],
        **slots,
    )
    said = Text(write_turn(GRACE, prompt))
    return Script([Reasoning(thought), Pause(0.8), said], pace=PACE)


_CHANGES = re.compile(
    r"add|create|delete|update|write|generate|execute|save|edit|set|send|replace"
)


def alan(body: Body) -> Script:
    """Look something up in the first turn if a tool is offered, then speak."""
    prompt = read_prompt(body)
    if results := fresh_results(body):
        text = write_turn(ALAN, prompt, _fact(results[0], prompt))
        return Script([Text(text)], pace=PACE)
    harmless = (one for one in offered_tools(body) if not _CHANGES.search(one["name"]))
    spec = next(harmless, None)
    if spec is None or prompt.own_turns:
        return Script([Text(write_turn(ALAN, prompt))], pace=PACE)
    arguments = sensible_arguments(spec, " and ".join(things(prompt.question, 0)))
    return Script([ToolCall(spec["name"], arguments, pieces=4)], pace=PACE)


def _fact(result: str, prompt: Prompt) -> str:
    words: dict[str, str] = SAID["lookup"]
    if re.search(r"\b(error|failed|exception|traceback)\b", result.lower()):
        return words["failed"]
    line = " ".join(result.split()).rstrip(".")
    fact = line if len(line) <= 160 else line[:159].rsplit(" ", 1)[0] + " …"
    return words["later" if prompt.previous else "first"].format(fact=fact)


def moderator(body: Body) -> Script:
    """Hear everybody, those who were heard least first, and end it soon after."""
    candidates, turns = read_candidates(body), turns_seen(body)
    heard = set(candidates) <= set(turns) and len(turns) > len(set(turns))
    name = "" if heard else min(candidates, key=turns.count, default="")
    why = "answers" if name in turns else "unheard" if turns else "opens"
    why = why if name else "done" if heard and candidates else "nobody"
    reason = SAID["moderator"][why].format(name=name, last=turns[-1] if turns else "")
    chosen = {"next": name, "done": not name, "reason": reason}
    return Script([Text(json.dumps(chosen, ensure_ascii=False))])


DEMO_NAMES = {
    name.lower(): name for name in (*(who.name for who in CHARACTERS), "Moderator")
}
DEMO_BEHAVIOURS: dict[str, Behaviour] = {
    "ada": plain(ADA),
    "grace": grace,
    "alan": alan,
    "edsger": plain(EDSGER),
    "moderator": moderator,
}
