"""The demo's speakers: scripted, but they read like people in a conversation.

Each turn is put together from a speaker's own sentences: an answer to the point the
speaker before made, a claim that moves the conversation on (opening, refinement,
closing), and a remark that uses the question's words. Which sentences are taken
follows from a hash of question and turn, so the same question gives the same talk.
"""

from __future__ import annotations

import json
import re
import zlib
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any

from tests.stack.prompts import (
    STOPWORDS,
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

PACE = 60.0
"""Tokens per second of the demo's speakers."""


@dataclass(frozen=True, slots=True)
class Claim:
    """A sentence that makes a point, and the point as others refer to it."""

    text: str
    point: str


@dataclass(frozen=True, slots=True)
class Character:
    """A speaker's sentences by stage; each sequence is gone through turn by turn.

    Slots: {q} the question, {a} and {b} words of it, {other} the speaker before,
    {point} that speaker's point.
    """

    name: str
    openers: Sequence[str]
    answers: Sequence[Sequence[str]]
    claims: Sequence[Sequence[Claim]]
    remarks: Sequence[str]
    asks: Sequence[str]
    closers: Sequence[str]


_BRIDGES = (
    "I would add one thing.",
    "My own point is a different one.",
    "Where I differ is the order of things.",
    "Let me put something beside it.",
    "There is something else I would not skip.",
)
_LAST_BRIDGES = (
    "So this is where I end up.",
    "Here is my side of it in one sentence.",
    "One thing I want us to remember.",
)

ADA = Character(
    name="Ada",
    openers=(
        (
            "“{q}” hides two questions, one about {a} and one about {b}, and they do "
            "not have the same answer."
        ),
        (
            "Let me make “{q}” smaller before we answer it, because {a} and {b} pull "
            "in different directions here."
        ),
    ),
    answers=(
        (
            "{other}, I like {point}, because it gives us something we can check.",
            (
                "{other} argues for {point}, and I agree with more of that than I "
                "expected."
            ),
        ),
        (
            "{other} has moved me a little: {point} belongs in the plan.",
            (
                "I was not sure at first, {other}, but {point} would answer the doubt "
                "I came with."
            ),
        ),
        (
            "With {point}, {other} has named the part I was missing.",
            "I take {point} from {other}, and I think that closes the gap.",
        ),
    ),
    claims=(
        (
            Claim(
                "I would begin with the smallest step that can still be undone, and "
                "write down beforehand what would count as success.",
                "starting with a step that can still be undone",
            ),
            Claim(
                "I would put a number on it first: how often does the problem really "
                "occur, and what does it cost each time?",
                "putting a number on the problem first",
            ),
        ),
        (
            Claim(
                "So my proposal is a trial of two weeks, with one person who owns it "
                "and one measure that everybody can read.",
                "a two-week trial with one owner and one measure",
            ),
            Claim(
                "So let us agree on a default, and on the one observation that would "
                "make us leave it.",
                "a default with a named way out of it",
            ),
        ),
        (
            Claim(
                "My summary fits in one line: try it small, measure it honestly, and "
                "decide on a date that is already in the calendar.",
                "deciding on a date that is already in the calendar",
            ),
            Claim(
                "What I take home is an order: first the measure, then the trial, and "
                "only then the opinion.",
                "having the measure before the opinion",
            ),
        ),
    ),
    remarks=(
        (
            "With {a}, most of the disagreement disappears once a first result is on "
            "the table; with {b}, it usually just moves somewhere else."
        ),
        (
            "People argue about {a} as if there were one decision to make, when there "
            "is a row of small ones, and only the last of them has to do with {b}."
        ),
        (
            "Half of what is hard about {a} is that nobody says out loud what they "
            "expect from {b}."
        ),
    ),
    asks=(
        "What would each of you need to see before changing your mind?",
        "I would like to hear where you think that fails.",
    ),
    closers=(
        "That is a plan I could explain to somebody who was not in the room.",
        "If we agree on that much, the rest can wait for the first result.",
    ),
)

GRACE = Character(
    name="Grace",
    openers=(
        (
            "I have seen “{q}” settled in long meetings and in short experiments, and "
            "the experiments were cheaper."
        ),
        (
            "My first reaction to “{q}” is to ask who has to get up at night when it "
            "goes wrong."
        ),
    ),
    answers=(
        (
            "I am with {other} on {point}, as long as it takes days and not months.",
            (
                "{point^} sounds right to me, {other}, but I would want to see it "
                "survive a busy week."
            ),
        ),
        (
            (
                "Fair enough, {other}: {point} costs little, and I have no better way "
                "to find out."
            ),
            (
                "{other}, you speak of {point}, and that is where I stop arguing and "
                "start doing."
            ),
        ),
        (
            "Good, then {point} is where {other} and I meet.",
            (
                "I can work with that, {other}: {point} is something one can do before "
                "lunch."
            ),
        ),
    ),
    claims=(
        (
            Claim(
                "Build the ugly version this week, put it in front of three people, "
                "and listen more than you explain.",
                "showing an ugly first version to three people",
            ),
            Claim(
                "The people who do the work should choose, because they will live with "
                "the result on a bad day as well.",
                "letting the people who do the work choose",
            ),
        ),
        (
            Claim(
                "I would write the rule on one page, and let anybody break it who can "
                "say why in one sentence.",
                "a one-page rule that anybody may break with a reason",
            ),
            Claim(
                "I would keep the old way running beside the new one for a month, so "
                "that nobody has to be brave.",
                "keeping the old way running beside the new one",
            ),
        ),
        (
            Claim(
                "Do the small thing on Monday, and talk again when there is something "
                "to look at.",
                "doing the small thing on Monday",
            ),
            Claim(
                "Give it to two people who disagree, and take whatever they hand back "
                "together.",
                "giving it to two people who disagree",
            ),
        ),
    ),
    remarks=(
        (
            "In practice the first surprise comes from {a}, and the second one hides "
            "behind {b}."
        ),
        (
            "Nobody has ever complained to me that we thought of {a} too early; about "
            "{b} I have heard it more than once."
        ),
        (
            "I would rather be half right about {a} this week than completely right "
            "about {b} next year."
        ),
    ),
    asks=(
        "If that sounds too quick, tell me what we would learn by waiting.",
        (
            "It is easier to ask forgiveness for a small mistake than permission for a "
            "large one."
        ),
    ),
    closers=(
        "I have nothing to add that doing it would not teach us faster.",
        "Somebody write it down, and let us begin.",
    ),
)

ALAN = Character(
    name="Alan",
    openers=(
        (
            "Before we answer “{q}”, I want to know which part of it could turn out to "
            "be false."
        ),
        (
            "I am suspicious of “{q}”, because it sounds as if the answer were the "
            "same for everybody."
        ),
    ),
    answers=(
        (
            (
                "{other} suggests {point}, and I would like to know what we do if it "
                "tells us nothing."
            ),
            "I have no quarrel with {point}, {other}, only with how sure it sounds.",
        ),
        (
            (
                "{point^}, as {other} puts it, would convince me if it could also have "
                "come out the other way."
            ),
            (
                "{other} is close to what I was looking for: {point} can fail, so it "
                "can teach us something."
            ),
        ),
        (
            "Then {other} and I agree after all: {point} is a test, not a belief.",
            (
                "I have tried to find the hole in {point}, {other}, and have not found "
                "one."
            ),
        ),
    ),
    claims=(
        (
            Claim(
                "An opinion that no result could change is a habit, so each of us "
                "should name the result that would change ours.",
                "naming the result that would change our minds",
            ),
            Claim(
                "Most of what one hears about this comes from people for whom it "
                "worked, and the others have stopped writing about it.",
                "counting those for whom it did not work",
            ),
        ),
        (
            Claim(
                "I would compare two cases rather than two arguments: one that "
                "changes, one that does not, and the same question to both afterwards.",
                "comparing two cases instead of two arguments",
            ),
            Claim(
                "The honest answer has a condition in it: yes where mistakes are cheap "
                "and noticed early, no where they are neither.",
                "saying yes only where mistakes are cheap and noticed early",
            ),
        ),
        (
            Claim(
                "I withdraw my objection if we write today what we expect, so that we "
                "cannot remember it differently later.",
                "writing down today what we expect",
            ),
            Claim(
                "My last doubt is only about us: we should look at the result "
                "together, before anybody has explained it.",
                "looking at the result before anybody explains it",
            ),
        ),
    ),
    remarks=(
        (
            "A lot depends on what exactly we mean by {a}, and hardly anything on what "
            "we mean by {b}."
        ),
        (
            "Take away {a}, and the question is still hard; take away {b}, and it "
            "nearly answers itself."
        ),
        (
            "I notice that we all say the same things about {b}, and that each of us "
            "means something else by {a}."
        ),
    ),
    asks=(
        "Who can give me a case where the opposite was true?",
        "I would gladly be shown wrong on this one.",
    ),
    closers=(
        "That is as much certainty as I am willing to sell.",
        "On those terms you can count me in.",
    ),
)

EDSGER = Character(
    name="Edsger",
    openers=(
        (
            "The difficulty with “{q}” is not that it has no answer, but that it has "
            "too many comfortable ones."
        ),
        (
            "“{q}” is a question about {a} only on the surface; underneath it asks how "
            "much complexity we are willing to own."
        ),
    ),
    answers=(
        (
            "{other} proposes {point}, which treats the symptom politely.",
            "I can follow {other} as far as {point}, but not the haste behind it.",
        ),
        (
            (
                "{point^} is better than I first thought, {other}, because it can be "
                "stated in one breath."
            ),
            "{other}, if {point} makes the whole thing smaller, I am for it.",
        ),
        (
            "I accept {point} from {other}, for it leaves us with less than before.",
            "{other} has said it more plainly than I could: {point}.",
        ),
    ),
    claims=(
        (
            Claim(
                "Whatever cannot be explained on one page is not understood yet, and "
                "should not be built yet either.",
                "explaining it on one page before building it",
            ),
            Claim(
                "Remove something first; only what still hurts afterwards deserves an "
                "addition.",
                "removing something before adding anything",
            ),
        ),
        (
            Claim(
                "A boundary that is drawn clearly today costs an hour, and one that is "
                "drawn late costs a year.",
                "drawing the boundary clearly today",
            ),
            Claim(
                "Of two plans that both work, take the one that a newcomer can follow "
                "without asking.",
                "taking the plan a newcomer can follow",
            ),
        ),
        (
            Claim(
                "Simplicity is what remains when we have had the patience to disagree "
                "properly, and today we had it.",
                "having the patience to disagree properly",
            ),
            Claim(
                "Let us keep the sentence we can defend, and cross out the three that "
                "only sound well.",
                "keeping only the sentence we can defend",
            ),
        ),
    ),
    remarks=(
        (
            "Much that is said about {a} is really about {b}, and loses its force as "
            "soon as the two are kept apart."
        ),
        (
            "The trouble with {a} rarely comes from a lack of cleverness; it comes "
            "from the third exception made for the sake of {b}."
        ),
        ("If we cannot talk about {a} without mentioning {b}, we have found the knot."),
    ),
    asks=(
        "Which part of this would you be glad to do without?",
        "I ask you to resist the second feature before the first is understood.",
    ),
    closers=(
        "More words would only make it less clear.",
        "I am content to leave it at that.",
    ),
)

CHARACTERS = (ADA, GRACE, ALAN, EDSGER)

# --- writing a turn ----------------------------------------------------------------

# Words that would read oddly where a sentence wants the name of a thing.
_ACTS = """
adopt ask avoid become begin best big build buy call change choose come compare
create deal decide design different early easy end fast feel few find fix good great
handle hard high hire important improve introduce keep large late learn leave live
long look lot low make makes move new old open organise organize own pay pick plan
possible prefer put rather read real replace right run send set short slow small
spend split start stay step stop switch teach try turn wait works worth
"""
_NOT_THINGS = frozenset(_ACTS.split())
_ARTICLES = frozenset(
    ["a", "an", "the", "my", "our", "your", "this", "these", "every", "some"]
)
_PRONOUNS = frozenset(["i", "we", "you", "they", "it", "he", "she", "who"])


def pick(options: Sequence[Any], seed: str, turn: int) -> Any:
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
    acts = low in _NOT_THINGS or before in _PRONOUNS
    return low in _ARTICLES or (_is_content(low) and not acts)


def _continues(chunk: Sequence[str], word: str) -> bool:
    low, last = word.lower(), chunk[-1].lower()
    acts = low in _NOT_THINGS and last not in _NOT_THINGS | _ARTICLES
    return _is_content(low) and len(chunk) <= 3 and not acts


def _is_content(word: str) -> bool:
    return len(word) > 1 and word not in (STOPWORDS - _NOT_THINGS) | _ARTICLES


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
    claims = [one for who in CHARACTERS for stage in who.claims for one in stage]
    for claim in claims:
        if claim.text in " ".join(said.text.split()):
            return claim.point
    return f"the remark “{few_words(said.text, 7)}”"


def write_turn(who: Character, prompt: Prompt, fact: str = "") -> str:
    """Write one turn of 60 to 120 words in two paragraphs."""
    turn = prompt.own_turns
    stage = min(turn, 2)
    seed = who.name + prompt.question
    a, b = things(prompt.question, turn)
    claim: Claim = pick(who.claims[stage], seed, turn)
    slots = {"q": quoted(prompt.question), "a": a, "b": b}
    first = [_reaction(who, prompt, seed), claim.text]
    if prompt.previous is not None:
        first.insert(1, pick(_LAST_BRIDGES if stage > 1 else _BRIDGES, seed, turn))
    last = pick(who.closers if stage else who.asks, seed, turn)
    second = [fact, pick(who.remarks, seed, turn), last]
    paragraphs = [" ".join(filter(None, part)) for part in (first, second)]
    return _fill("\n\n".join(paragraphs), slots)


def _reaction(who: Character, prompt: Prompt, seed: str) -> str:
    previous = prompt.previous
    turn = prompt.own_turns
    if previous is None or previous.speaker is None:
        text: str = pick(who.openers, seed, turn)
        return text
    answer: str = pick(who.answers[min(turn, 2)], seed, turn)
    point = point_of(previous)
    capital = point[0].upper() + point[1:]
    slots = {"other": previous.speaker, "point": point, "point^": capital}
    return _fill(answer, slots)


def _fill(text: str, slots: dict[str, str]) -> str:
    # Not str.format: a question or a tool's result may contain braces.
    pattern = "|".join(re.escape("{" + name + "}") for name in slots)
    return re.sub(pattern, lambda match: slots[match.group()[1:-1]], text)


# --- what each of them does --------------------------------------------------------


def plain(who: Character) -> Behaviour:
    """Make a speaker who just speaks."""

    def behave(body: Body) -> Script:
        return Script([Text(write_turn(who, read_prompt(body)))], pace=PACE)

    return behave


def grace(body: Body) -> Script:
    """Reason about what was said, then speak."""
    prompt = read_prompt(body)
    thought = Reasoning(_thought(prompt))
    said = Text(write_turn(GRACE, prompt))
    return Script([thought, Pause(0.8), said], pace=PACE)


def _thought(prompt: Prompt) -> str:
    a, b = things(prompt.question, prompt.own_turns)
    if prompt.previous is None:
        before = "Nobody has spoken yet, so I set the tone."
    else:
        point = point_of(prompt.previous)
        before = f"{prompt.previous.speaker} has just brought up {point}."
    stages = (
        "I should say what I would do first, and keep it practical.",
        "This is my second turn: no repetition, something that can be agreed on.",
        "Time to close. One sentence that says what happens next is enough.",
    )
    return (
        f"The question turns on {a} and {b}. {before}\n\n"
        f"What would that look like on an ordinary working day? "
        f"{stages[min(prompt.own_turns, 2)]}"
    )


_FITTING = ("fact", "lookup", "look_up", "time", "calc", "weather", "search", "get")
_UNFITTING = re.compile(
    r"add|create|delete|update|write|generate|execute|save|edit|set|send|replace"
)


def fitting_tool(tools: Sequence[Body]) -> Body | None:
    """Choose a tool that looks something up and changes nothing."""
    harmless = [spec for spec in tools if not _UNFITTING.search(spec["name"].lower())]
    for word in _FITTING:
        for spec in harmless:
            if word in spec["name"].lower():
                return spec
    return harmless[0] if harmless else None


def alan(body: Body) -> Script:
    """Look something up in the first turn if a tool is offered, then speak."""
    prompt = read_prompt(body)
    results = fresh_results(body)
    spec = fitting_tool(offered_tools(body))
    if results:
        text = write_turn(ALAN, prompt, _fact(results[0], prompt))
        return Script([Text(text)], pace=PACE)
    if spec is None or prompt.own_turns:
        return Script([Text(write_turn(ALAN, prompt))], pace=PACE)
    topic = " and ".join(things(prompt.question, 0))
    arguments = sensible_arguments(spec, topic)
    return Script([ToolCall(spec["name"], arguments, pieces=4)], pace=PACE)


def _fact(result: str, prompt: Prompt) -> str:
    said = result_in_words(result)
    if re.search(r"\b(error|failed|exception|traceback)\b", said.lower()):
        return "I tried to look it up, and the tool let me down, so take this as mine."
    when = "while you were talking" if prompt.previous else "before I answer"
    return f"I looked it up {when}, and what came back is: {said}."


def result_in_words(result: str) -> str:
    """Put a tool's result into half a sentence."""
    try:
        value = json.loads(result)
    except json.JSONDecodeError:
        value = result
    if isinstance(value, list) and value:
        value = value[0]
    if isinstance(value, dict):
        texts = [str(one) for one in value.values() if isinstance(one, str) and one]
        value = max(texts, key=len) if texts else next(iter(value.values()), "")
    line = " ".join(str(value).split()).rstrip(".")
    return line if len(line) <= 160 else line[:159].rsplit(" ", 1)[0] + " …"


def moderator(body: Body) -> Script:
    """Hear everybody, those who were heard least first, and end it soon after."""
    candidates = read_candidates(body)
    turns = turns_seen(body, [*candidates, *DEMO_NAMES.values()])
    if not candidates:
        chosen = {"next": "", "done": True, "reason": "There is nobody to choose from."}
    elif all(name in turns for name in candidates) and len(turns) > len(set(turns)):
        reason = "Everybody has been heard, and they agree on a next step."
        chosen = {"next": "", "done": True, "reason": reason}
    else:
        name = min(candidates, key=turns.count)
        chosen = {"next": name, "done": False, "reason": _why(name, turns)}
    return Script([Text(json.dumps(chosen, ensure_ascii=False))])


def _why(name: str, turns: Sequence[str]) -> str:
    if not turns:
        return f"{name} can open with a first proposal."
    if name not in turns:
        return f"{name} has not been heard yet and may see what {turns[-1]} left out."
    return f"{name} should answer what {turns[-1]} just said."


DEMO_NAMES: dict[str, str] = {
    "ada": "Ada",
    "grace": "Grace",
    "alan": "Alan",
    "edsger": "Edsger",
    "moderator": "Moderator",
}

DEMO_BEHAVIOURS: dict[str, Behaviour] = {
    "ada": plain(ADA),
    "grace": grace,
    "alan": alan,
    "edsger": plain(EDSGER),
    "moderator": moderator,
}
