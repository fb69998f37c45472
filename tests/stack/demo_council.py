"""The demo's speakers in a council or debate: each at its own speed, and as judges.

Asked together with the others they are as different as models are: Ada is quick, Grace
thinks first, Alan looks something up and is slow, and Edsger's connection breaks half
way. They judge each other and conclude in sentences about what was really said.
"""

from __future__ import annotations

import json
import re
import zlib
from collections.abc import Callable, Iterator, Mapping
from dataclasses import replace

from tests.stack.demo_models import (
    ADA,
    ALAN,
    CHARACTERS,
    EDSGER,
    GRACE,
    PACE,
    SAID,
    Character,
    moderator,
    point_of,
    quoted,
    things,
    write_turn,
)
from tests.stack.demo_models import DEMO_BEHAVIOURS as SPEAKERS
from tests.stack.prompts import (
    Said,
    conversation,
    fresh_results,
    messages_of,
    read_candidates,
    read_prompt,
    split_speakers,
    stage_of,
    text_of,
)
from tests.stack.scripts import Behaviour, Body, Fail, Pause, Script, Text

_BRIEF = re.compile(
    r"(?:\A|\n\n)(?=This is a debate\.|The debate is over\."
    r"|Several participants answered|The participants have answered\.)"
)
BREAKS_OFF: str = SAID["breaks_off"]


SPEEDS = {
    "Ada": (0.1, 90.0),
    "Grace": (0.6, 50.0),
    "Alan": (1.5, 22.0),
    "Edsger": (0.9, 30.0),
}
"""Seconds to the first token, and tokens per second, of who is asked alone."""


def without_brief(body: Body) -> tuple[Body, str]:
    """Part what was said in the conversation from what a member is told to do now."""
    messages = messages_of(body)
    places = [at for at, one in enumerate(messages) if one.get("role") == "user"]
    if not places:
        return body, ""
    before, *brief = _BRIEF.split(text_of(messages[places[-1]]), maxsplit=1)
    if not brief:
        return body, ""
    said = {"role": "user", "content": before}
    after = messages[places[-1] + 1 :]
    messages = [*messages[: places[-1]], said, *after]
    return {**body, "messages": messages}, brief[0]


def is_asked_alone(body: Body) -> bool:
    """Whether a participant hears nothing but the question, as in a council."""
    system = "".join(map(text_of, messages_of(body)[:1]))
    prompt = read_prompt(body)
    return "take part in a conversation" in system and not prompt.since


# --- what a member is asked for ----------------------------------------------------


def seated(who: Character, speaks: Behaviour) -> Behaviour:
    """Let a speaker judge and conclude as well, and answer alone at its own speed."""
    stages: dict[str, Callable[[Character, Body, str], str]] = {
        "review": review,
        "vote": vote,
        "conclusion": conclude,
    }

    def behave(body: Body) -> Script:
        asked, brief = without_brief(body)
        does = stages.get(stage_of(body))
        if does:
            return Script([Text(does(who, asked, brief))], pace=PACE)
        if not is_asked_alone(asked):
            return speaks(asked)
        pause, pace = SPEEDS[who.name]
        breaks = who is EDSGER and not brief  # in a debate it holds
        script = breaks_off(asked) if breaks else speaks(asked)
        wait = Pause(0.0 if fresh_results(asked) else pause)
        return replace(script, steps=[wait, *script.steps], pace=pace)

    return behave


def breaks_off(body: Body) -> Script:
    """Answer well until the connection breaks."""
    begun = write_turn(EDSGER, read_prompt(body)).split("\n\n")[0]
    return Script([Text(begun.rsplit(" ", 3)[0]), Fail(BREAKS_OFF)])


def favour(question: str) -> list[str]:
    """Put the speakers in an order, another one for another question."""
    names = [who.name for who in (ADA, GRACE, ALAN)]
    at = zlib.crc32(question.encode()) % len(names)
    return [*names[at:], *names[:at], EDSGER.name]


def author_of(said: Said) -> str:
    """Name who wrote an answer that has no name, by the claims it makes."""
    text = " ".join(said.text.split())
    for who in CHARACTERS:
        if any(claim in text for stage in who.claims for claim, _ in stage):
            return who.name
    return EDSGER.name


def review(who: Character, asked: Body, brief: str) -> str:
    """Rank the others' answers, with a sentence on each."""
    answers = [said for said in split_speakers(brief) if said.speaker]
    order = favour(read_prompt(asked).question)
    answers.sort(key=lambda said: order.index(author_of(said)))
    first, later = SAID["review"]["verdicts"]
    comments = {
        said.speaker: (later if at else first).format(point=point_of(said))
        for at, said in enumerate(answers)
    }
    verdict = {
        "comments": comments,
        "scores": {said.speaker: 9 - 2 * at for at, said in enumerate(answers)},
        "ranking": [[said.speaker] for said in answers],
    }
    return json.dumps(verdict, ensure_ascii=False)


def vote(who: Character, asked: Body, brief: str) -> str:
    """Vote for one of the others."""
    candidates = read_candidates({"messages": [{"role": "user", "content": brief}]})
    order = [*favour(read_prompt(asked).question), *candidates]
    chosen = min(candidates, key=order.index, default="")
    reason = SAID["review"]["vote"].format(name=chosen)
    return json.dumps({"vote": chosen, "reason": reason}, ensure_ascii=False)


def conclude(who: Character, asked: Body, brief: str) -> str:
    """Write the conclusion of a council, or of a debate, with letters for names."""
    question = read_prompt(asked).question
    a, b = things(question, 0)
    slots = {"q": quoted(question), "a": a, "b": b}
    answers = {str(s.speaker): s for s in split_speakers(brief) if s.speaker}
    got = dict(re.findall(r"(?m)^\| \[([A-H])\] \| ([\d.]+|–) \|", brief))
    if answers:
        order = [letter for letter in got if letter in answers] or list(answers)
        points = {f"[{letter}]": point_of(answers[letter]) for letter in order}
        parts = _of_council(points, slots)
    else:
        # The last point of everybody who spoke since the question.
        said = [one for one in conversation(asked) if one.speaker]
        points = {f"[{one.speaker}]": point_of(one) for one in said}
        parts = _of_debate(
            {f"[{who}]": count for who, count in got.items()}, points, slots
        )
    return "\n\n".join(parts)


Slots = Mapping[str, str]


def _of_council(points: Slots, slots: Slots) -> Iterator[str]:
    words = SAID["council"]
    *agreeing, last = points
    wanted = ", then ".join(points[name] for name in agreeing) or points[last]
    yield words["first"].format(wanted=wanted, **slots)
    if len(agreeing) > 1:
        listed = f"{', '.join(agreeing[:-1])} and {agreeing[-1]}"
        yield words["agreed"].format(names=listed, **slots)
    yield words["minority"].format(name=last, point=points[last], **slots)


def _of_debate(counts: Slots, points: Slots, slots: Slots) -> Iterator[str]:
    words = SAID["debate"]
    first, second = [*counts, "", ""][:2]
    yield words["first"].format(
        whose=f"{first}’s",
        point=points.get(first, "a first step"),
        votes=", ".join(f"{name} {count}" for name, count in counts.items()),
        **slots,
    )
    if second in points:
        yield words["other"].format(name=second, point=points[second])
    yield words["open"].format_map(slots)


BY_NAME = {who.name.lower(): who for who in CHARACTERS}
DEMO_BEHAVIOURS: dict[str, Behaviour] = {
    **{name: seated(who, SPEAKERS[name]) for name, who in BY_NAME.items()},
    "moderator": moderator,
}
