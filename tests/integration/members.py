"""Scripted members of a council or debate: what they say in each of its stages."""

from __future__ import annotations

import json
import re
from collections.abc import Sequence
from typing import Any

from tests.stack.behaviours import with_tasks
from tests.stack.prompts import (
    few_words,
    last_user_text,
    read_candidates,
    read_prompt,
    split_speakers,
    stage_of,
)
from tests.stack.scripts import Behaviour, Body, Script, Status, Step, Text

__all__ = ["busy", "member", "ranking", "stage_of"]


def ranking(body: Body, prefers: str, scores: Sequence[float] = ()) -> str:
    """Rank the answers by the words in them: "oak elm=fir", the best first; with these
    scores, place by place, if any."""
    answers = [s for s in split_speakers(last_user_text(body)) if s.speaker]
    letters = {
        word: one.speaker
        for word in re.split("[ =]", prefers)
        for one in answers
        if one.speaker and word in one.text
    }
    places = [
        [letters[word] for word in place.split("=") if word in letters]
        for place in prefers.split()
    ]
    comments = {letter: f"It says {word}." for word, letter in letters.items()}
    ranked = [place for place in places if place]
    verdict = {"ranking": ranked, "comments": comments}
    if scores:
        given = zip(ranked, scores, strict=False)
        verdict["scores"] = {each: score for place, score in given for each in place}
    return json.dumps(verdict)


def member(
    word: str,
    prefers: str = "",
    votes: str = "",
    scores: Sequence[Any] = (),
    **instead: Sequence[Step],
) -> Behaviour:
    """Make a member whose answers have `word` in them, and the question's first words.

    It ranks by `prefers`, votes for `votes` where it may, else for the first; a stage
    named in `instead` goes as its steps say.
    """

    def behave(body: Body) -> Script:
        stage = stage_of(body)
        if stage in instead:
            return Script(instead[stage])
        question = read_prompt(body).question
        about = few_words(question if stage == "answer" else last_user_text(body), 3)
        if stage == "review":
            return Script([Text(ranking(body, prefers, scores))])
        if stage == "vote":
            candidates = read_candidates(body)
            choice = votes if votes in candidates else (candidates or [""])[0]
            return Script([Text(json.dumps({"vote": choice, "reason": "It is so."}))])
        if stage == "conclusion":
            return Script([Text(f"In the end it is the {word}: {about}.")])
        return Script([Text(f"The {word} it is: {about}.")])

    return with_tasks(behave)


def busy(times: int, behaviour: Behaviour, retry_after: float | None) -> Behaviour:
    """Make a model that is overloaded the first times it is asked."""
    left = times
    headers = {} if retry_after is None else {"Retry-After": f"{retry_after:g}"}
    error = {"error": {"message": "Too many scripted requests.", "code": 429}}

    def behave(body: Body) -> Script:
        nonlocal left
        if left <= 0:
            return behaviour(body)
        left -= 1
        return Script([Status(429, error, headers)])

    return behave
