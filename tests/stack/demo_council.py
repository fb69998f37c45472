"""The demo's speakers in a council or debate: each at its own speed, and as judges.

Asked together with the others they are as different as models are: Ada is quick, Grace
thinks first, Alan looks something up and is slow, and Edsger's connection breaks half
way. They judge each other and conclude in sentences about what was really said.
"""

from __future__ import annotations

import json
import re
import zlib
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace

from tests.stack.demo_models import (
    ADA,
    ALAN,
    CHARACTERS,
    EDSGER,
    GRACE,
    PACE,
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
    r"|(?:The|Several) participants answered the question independently)"
)
BREAKS_OFF = "The server had an error while processing your request."


@dataclass(frozen=True, slots=True)
class Speed:
    """Seconds to the first token, and tokens per second."""

    pause: float
    pace: float


SPEEDS: Mapping[str, Speed] = {
    "Ada": Speed(0.1, 90.0),
    "Grace": Speed(0.6, 50.0),
    "Alan": Speed(1.5, 22.0),
    "Edsger": Speed(0.9, 30.0),
}


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
        if who is EDSGER:
            return breaks_off(asked)
        speed = SPEEDS[who.name]
        script = speaks(asked)
        wait = Pause(0.0 if fresh_results(asked) else speed.pause)
        return replace(script, steps=[wait, *script.steps], pace=speed.pace)

    return behave


def breaks_off(body: Body) -> Script:
    """Answer well until the connection breaks."""
    speed = SPEEDS["Edsger"]
    begun = write_turn(EDSGER, read_prompt(body)).split("\n\n")[0]
    text = begun.rsplit(" ", 3)[0]
    return Script([Pause(speed.pause), Text(text), Fail(BREAKS_OFF)], pace=speed.pace)


def favour(question: str) -> list[str]:
    """Put the speakers in an order, another one for another question."""
    names = [who.name for who in (ADA, GRACE, ALAN)]
    at = zlib.crc32(question.encode()) % len(names)
    return [*names[at:], *names[:at], EDSGER.name]


def author_of(said: Said) -> str:
    """Name who wrote an answer that has no name, by the claims it makes."""
    text = " ".join(said.text.split())
    for who in CHARACTERS:
        if any(claim.text in text for stage in who.claims for claim in stage):
            return who.name
    return EDSGER.name


def review(who: Character, asked: Body, brief: str) -> str:
    """Rank the others' answers, with a sentence on each."""
    answers = [said for said in split_speakers(brief) if said.speaker]
    order = favour(read_prompt(asked).question)
    answers.sort(key=lambda said: order.index(author_of(said)))
    verdicts = ("This can be done next week: {}.", "True, but it comes second: {}.")
    comments = {
        str(said.speaker): verdicts[min(at, 1)].format(point_of(said))
        for at, said in enumerate(answers)
    }
    ranking = [[said.speaker] for said in answers]
    return json.dumps({"ranking": ranking, "comments": comments}, ensure_ascii=False)


def vote(who: Character, asked: Body, brief: str) -> str:
    """Vote for one of the others."""
    brief_alone: Body = {"messages": [{"role": "user", "content": brief}]}
    candidates = read_candidates(brief_alone)
    order = favour(read_prompt(asked).question)
    chosen = min(candidates, key=lambda name: _place(name, order), default="")
    reason = f"{chosen} answered what was said against it."
    return json.dumps({"vote": chosen, "reason": reason}, ensure_ascii=False)


def _place(name: str, order: Sequence[str]) -> int:
    return order.index(name) if name in order else len(order)


def conclude(who: Character, asked: Body, brief: str) -> str:
    """Write the conclusion of a council, or of a debate."""
    question = read_prompt(asked).question
    a, b = things(question, 0)
    slots = {"q": quoted(question), "a": a, "b": b}
    answers = {str(s.speaker): s for s in split_speakers(brief) if s.speaker}
    if answers:
        ranked = re.findall(r"(?m)^- (.+?) \((?:mean rank|not ranked)", brief)
        order = [name for name in ranked if name in answers] or list(answers)
        return _of_council(
            who, {name: point_of(answers[name]) for name in order}, slots
        )
    counts = dict(re.findall(r"(\w+) has (\d+)", brief))
    return _of_debate(who, counts, _last_points(who, asked), slots)


def _of_council(
    who: Character, points: Mapping[str, str], slots: Mapping[str, str]
) -> str:
    *agreeing, last = points
    wanted = ", then ".join(points[name] for name in agreeing)
    parts = [
        f"“{slots['q']}” has a plainer answer than any one of us gave. What comes "
        f"first is {wanted or points[last]}. It is small enough to begin with next "
        f"week, and {slots['a']} will look different after it."
    ]
    if len(agreeing) > 1:
        parts.append(
            f"**Where we agree.** {_names(who, agreeing)} agree on the direction: see "
            f"what {slots['b']} does to us before anybody makes a promise, and argue "
            "about the rest when there is a result."
        )
    parts.append(_minority(who, last, points[last], slots))
    return "\n\n".join(parts)


def _minority(who: Character, name: str, point: str, slots: Mapping[str, str]) -> str:
    if name == who.name:
        return (
            f"**The minority view** is my own: {point}. The others put it last, so "
            f"take it as a doubt about {slots['a']}, and not as advice."
        )
    return (
        f"**The minority view** is {name}’s: {point}, before anything else is done. I "
        f"side with the others, because it would leave {slots['b']} as it is for "
        "longer than it needs to; but it is a fair doubt, and whoever decides about "
        f"{slots['a']} should have an answer to it."
    )


def _names(who: Character, names: Sequence[str]) -> str:
    said = [name for name in names if name != who.name]
    said += ["I"] if who.name in names else []
    return ", ".join(said[:-1]) + f" and {said[-1]}"


def _last_points(who: Character, asked: Body) -> dict[str, str]:
    """The last point of everybody who spoke since the question."""
    said = conversation(asked)
    return {one.speaker or who.name: point_of(one) for one in said if one.speaker != ""}


def _of_debate(
    who: Character,
    counts: Mapping[str, str],
    points: Mapping[str, str],
    slots: Mapping[str, str],
) -> str:
    order = sorted(counts, key=lambda name: -int(counts[name]))
    first, second = [*order, "", ""][:2]
    votes = ", ".join(f"{name} {counts[name]}" for name in order)
    mine = "my point" if first == who.name else f"{first}’s point"
    parts = [
        f"On “{slots['q']}” the debate came to rest on {mine}: "
        f"{points.get(first, 'a first step')}. The votes fell like this: {votes}."
    ]
    if second in points:
        parts.append(
            f"**The strongest point on the other side** is {second}’s: "
            f"{points[second]}. Nobody has refuted it; it has to wait for its turn."
        )
    parts.append(
        f"**What stays open** is how much {slots['a']} depends on {slots['b']}. No "
        "vote decides that, but the first result will."
    )
    return "\n\n".join(parts)


BY_NAME = {who.name.lower(): who for who in CHARACTERS}
DEMO_BEHAVIOURS: dict[str, Behaviour] = {
    **{name: seated(who, SPEAKERS[name]) for name, who in BY_NAME.items()},
    "moderator": moderator,
}
