"""Section 4: what a question asks for beside its text."""

from dataclasses import replace
from typing import Any

import pytest

from tests.unit.plugin import mmc

Json = dict[str, Any]

CARDS = {
    card.id: card
    for card in (
        mmc.ModelCard("openai/gpt-4.1", "GPT 4.1"),
        mmc.ModelCard("openai/gpt-4.1-mini", "GPT 4.1 mini"),
        mmc.ModelCard("claude-sonnet", "Claude Sonnet 4"),
        mmc.ModelCard("llama3.1:8b", "llama3.1:8b"),
        mmc.ModelCard("old", "Hidden", by_default=False),
        mmc.ModelCard("talk.council", "Council", is_self=True),
    )
}
GPT, MINI, CLAUDE, LLAMA = list(CARDS)[:4]


def read(*texts: str) -> tuple[str, mmc.Commands]:
    """What is left of the last of these questions, and what it asks for."""
    entries, commands = mmc.read_commands([mmc.Question(text) for text in texts], CARDS)
    return mmc.last_question(entries), commands


@pytest.mark.parametrize(
    ("text", "left", "rounds"),
    [
        ("/rounds 3", "", 3),
        ("/rounds 3 Trees?", "Trees?", 3),
        ("Trees? /rounds 3", "Trees?", 3),
        ("Trees?\n/rounds 12", "Trees?", 12),
        ("/rounds 0", "", 0),
        ("/rounds 500 Trees?", "Trees?", 500),
        ("Trees?\n\n    code  \n/rounds 3 \n", "Trees?\n\n    code  ", 3),
        ("/rounds 3\n    code  \n", "    code  \n", 3),
        ("/rounds 3 Trees? /rounds 5", "Trees? /rounds 5", 3),
        ("`x`\n\n```\na\n```\n> b\n\n/rounds 3", "`x`\n\n```\na\n```\n> b\n", 3),
        ("<context>\na\n</context>\n/rounds 3 T?", "<context>\na\n</context>\nT?", 3),
        (
            "<attached_files>\n</attached_files>\n\n/rounds 3\nT?",
            "<attached_files>\n</attached_files>\n\nT?",
            3,
        ),
        ("Trees?", "Trees?", None),
        ("/rounds", "/rounds", None),
        ("/rounds x", "/rounds x", None),
        ("/rounds 1000", "/rounds 1000", None),
        ("see a/rounds 3", "see a/rounds 3", None),
        ("/rounds 3rd", "/rounds 3rd", None),
    ],
)
def test_rounds_are_named_in_the_question(
    text: str, left: str, rounds: int | None
) -> None:
    before = mmc.Turn("Ann", "Oaks. /rounds 9")
    entries: list[mmc.Entry] = [mmc.Question("Hi"), before, mmc.Question(text)]
    found, commands = mmc.read_commands(entries, CARDS)
    assert found == [mmc.Question("Hi"), before, mmc.Question(left)]
    assert commands.settings.get("rounds") == rounds
    assert entries[-1] == mmc.Question(text)


@pytest.mark.parametrize(
    "text",
    [
        "Oaks /rounds 2 or elms?",
        "https://example.com/with claude",
        "https://example.com/vote",
        "/voter or /joined or /within claude",
        "/with",
        "/with\nclaude",
        "How do I sit down /with claude in one room?",
        "What is behind /vote",
        "What does IRC do with /join",
        "Two commands:\n    /vote",
        "```\n/with claude\n```",
        "> /with claude",
        "> /vote",
        "http://example.com: is it up?",
        "    Ann: bread",
        "Ann:bread",
        "Trees?\n/rounds 2\nBe brief.",
        "```\n/rounds 9\n```",
        "Run this:\n```\n/rounds 9",
        "~~~sh\n/rounds 9",
        "Type `say /rounds 9`",
        "`/rounds 9`",
        "> /rounds 9",
        "Bob said:\n > try /rounds 9",
        "    /rounds 9",
        "Code:\n\n\t/rounds 9",
        "<source id='1'>a /rounds 9</source>",
        "/rounds 9 <context> of a file\n</context>\nTrees?",
        "<context>\na </context>\n/rounds 9\n</context>\nTrees?",
        "<attached_files>\n/rounds 9\n</attached_files>\n\n",
    ],
)
def test_what_is_not_meant_as_a_command_is_left_as_it_is(text: str) -> None:
    entries = [mmc.Question(text), mmc.Question([{"type": "text", "text": text}])]
    for entry in entries:
        found, commands = mmc.read_commands([entry], CARDS)
        assert found == [entry]
        assert replace(commands, only=()) == mmc.Commands()


def test_a_command_in_a_later_part_is_attached_text() -> None:
    parts: list[Json] = [
        {"type": "text", "text": "<attached_files>\n</attached_files>\n\n"},
        {"type": "image_url", "image_url": {"url": "x"}},
        {"type": "text", "text": "Trees?\n/rounds 4"},
        {"type": "text", "text": "A file.\n/rounds 9"},
    ]
    (found,), commands = mmc.read_commands([mmc.Question(parts)], CARDS)
    assert commands.settings == {"rounds": 4}
    cut = {"type": "text", "text": "Trees?"}
    assert found == mmc.Question([*parts[:2], cut, parts[3]])
    assert parts[2]["text"] == "Trees?\n/rounds 4"


def test_rounds_are_named_beside_an_image() -> None:
    image: Json = {"type": "image_url", "image_url": {"url": "x"}}
    content = [{"type": "text", "text": "Trees? /rounds 2"}, image]
    found, commands = mmc.read_commands([mmc.Question(content)], CARDS)
    assert commands.settings == {"rounds": 2}
    assert found == [mmc.Question([{"type": "text", "text": "Trees?"}, image])]


def test_the_command_is_taken_out_of_earlier_questions_too() -> None:
    entries: list[mmc.Entry] = [
        mmc.Question("Trees? /rounds 1"),
        mmc.Turn("Ann", "Oaks."),
        mmc.Question("Why?"),
    ]
    found, commands = mmc.read_commands(entries, CARDS)
    assert found[0] == mmc.Question("Trees?")
    assert commands.settings == {}


def test_without_a_question_there_are_no_rounds() -> None:
    assert mmc.read_commands([], CARDS) == ([], mmc.Commands())
    turn = mmc.Turn("Ann", "/rounds 3")
    assert mmc.read_commands([turn], CARDS) == ([turn], mmc.Commands())


@pytest.mark.parametrize(
    ("text", "left", "seats"),
    [
        ("/with claude, gpt-4.1 Trees?", "Trees?", (CLAUDE, GPT)),
        ("/with claude, gpt-4.1\nTrees?", "Trees?", (CLAUDE, GPT)),
        ("Trees? /with Claude-Sonnet-4, GPT-4.1-mini", "Trees?", (CLAUDE, MINI)),
        ("Trees?\n/with mini，llama3.1:8b\n", "Trees?", (MINI, LLAMA)),
        ("/with sonnet 4 Trees?", "4 Trees?", (CLAUDE,)),
        ("/with openai/gpt-4.1, old, claude, claude", "", (GPT, "old", CLAUDE)),
        ("/with claude\n/rounds 3\nTrees?", "Trees?", (CLAUDE,)),
        ("/with claude /rounds 3 Trees?", "Trees?", (CLAUDE,)),
        ("/with claude What, then, is a tree?", "What, then, is a tree?", (CLAUDE,)),
    ],
)
def test_with_names_models_by_any_part_of_a_name_that_only_one_has(
    text: str, left: str, seats: tuple[str, ...]
) -> None:
    found, commands = read(text)
    rounds = {"rounds": 3} if "/rounds" in text else {}
    assert (found, commands.problem) == (left, "")
    assert commands.settings == {"participants": list(seats), **rounds}


@pytest.mark.parametrize(
    ("text", "problem"),
    [
        ("/with gtp-4.1 Trees?", 'there is no model "gtp-4.1" that you may use'),
        ("/with claude, gtp-4.1", 'did you mean "openai/gpt-4.1"'),
        ("/with gpt Trees?", '"gpt" may be any of openai/gpt-4.1, openai/gpt-4.1-mini'),
        ("/with council", '"Council" is this conversation itself'),
        ("/with regards to your letter", 'there is no model "regards"'),
        ("/with ?! Trees", 'there is no model "?!"'),
    ],
)
def test_what_names_no_model_stays_text_and_a_line_says_why(
    text: str, problem: str
) -> None:
    found, commands = read(text)
    assert (found, commands.settings) == (text, {})
    assert commands.problem.startswith("`/with` is read as text: ")
    assert problem in commands.problem


def test_with_stays_for_the_chat_until_another_names_others() -> None:
    asked = read("/with claude Trees?", "And elms?")[1].settings
    assert asked == {"participants": [CLAUDE]}
    later = read("/with claude", "/with mini", "/with yew", "So? /rounds 1")[1]
    assert later == mmc.Commands({"participants": [MINI], "rounds": 1})


@pytest.mark.parametrize(
    ("text", "only"),
    [
        ("Ann: why?", ("Ann",)),
        ("Ann, Bob: why?\nCat: because.", ("Ann", "Bob")),
        ("Ann，木：为什么？", ("Ann", "木")),
        ("\n llama3.1:8b: why?", ("llama3.1:8b",)),
        ("<context>\nEve: x\n</context>\nAnn: why?", ("Ann",)),
        ("/rounds 1 Ann: why?", ("Ann",)),
        ("Note: this is text", ("Note",)),
    ],
)
def test_what_stands_before_a_colon_may_be_names_and_stays_in_the_text(
    text: str, only: tuple[str, ...]
) -> None:
    left, commands = read(text)
    assert commands.only == only
    assert left == text.removeprefix("/rounds 1 ")
    assert read(text, "And Bob?")[1].only == ()


@pytest.mark.parametrize(
    ("text", "left", "asked"),
    [
        ("/vote", "", {"vote": True}),
        ("/join Trees?", "Trees?", {"settings": {"join": True}}),
        ("Trees?\n/join\n", "Trees?", {"settings": {"join": True}}),
        ("/join\n/vote\n", "", {"settings": {"join": True}, "vote": True}),
        ("/vote /rounds 2", "", {"settings": {"rounds": 2}, "vote": True}),
    ],
)
def test_a_vote_and_a_seat_are_asked_for_at_the_start_or_on_the_last_line(
    text: str, left: str, asked: Json
) -> None:
    assert read(text) == (left, mmc.Commands(**asked))
    assert read(text, "So?") == ("So?", mmc.Commands())


# -- who sits at the table, in one line ------------------------------------------------


@pytest.mark.parametrize(
    ("names", "addressed"),
    [
        (("ann",), ("Ann",)),
        (("Gpt-4.1", "Ann", "ann"), ("GPT 4.1", "Ann")),
        (("Ann", "Note"), ()),
        (("Ann", ""), ()),
        ((), ()),
        (("🙂",), ("🙂",)),
        (("🌲",), ()),
    ],
)
def test_only_participants_are_addressed_and_all_names_must_be_theirs(
    names: tuple[str, ...], addressed: tuple[str, ...]
) -> None:
    assert mmc.choose_addressed(names, ("Ann", "GPT 4.1", "🙂")) == addressed


def table(
    mode: str = "round_robin",
    models: Json | None = None,
    only: tuple[str, ...] = (),
    asked: Json | None = None,
    **commands: Any,
) -> str:
    """The line on a table of these models by alias, two unless told."""
    models = models or {"Ann": CLAUDE, "Bob": GPT}
    fields = {**(asked or {}), "max_rounds": 10}
    found = mmc.Commands(commands)
    own = mmc.UserSettings(**fields)
    settings = mmc.merge_settings(mmc.Settings(), own, None, found.settings)
    agenda = mmc.Agenda(only or tuple(models), "", settings, models=models)
    line: str = mmc.describe_table(mode, agenda, found, CARDS)
    return line


@pytest.mark.parametrize(
    ("asked", "line"),
    [
        ({}, ""),
        ({"rounds": 3}, "Rounds: 3"),
        ({"participants": [CLAUDE, GPT]}, "In this chat: Ann and Bob"),
        ({"only": ("Bob",)}, "Only Bob may answer"),
        ({"only": ("Bob",), "rounds": 3}, "Only Bob may answer"),
        ({"rounds": 3, "mode": "council"}, "A council has no rounds"),
        ({"rounds": 3, "mode": "debate"}, "Rounds: 3"),
        (
            {"rounds": 500},
            "Rounds: 10, the most that the administrator allows",
        ),
        ({"rounds": 0}, "Rounds: 1"),
        (
            {"asked": {"rounds": 50}},
            "Rounds: 10, the most that the administrator allows",
        ),
        ({"asked": {"rounds": 50}, "mode": "council"}, ""),
        ({"asked": {"rounds": 5}}, ""),
        ({"models": {"A": GPT, "B": GPT, "C": GPT}}, "A, B and C are all GPT 4.1"),
        ({"models": {"A": GPT, "B": GPT}, "asked": {"team": "A|x"}}, ""),
        (
            {"models": {"Ann": GPT}},
            "Ann is alone: a conversation needs at least two seats",
        ),
        ({"models": {"Ann": GPT}, "join": True}, ""),
    ],
)
def test_one_line_says_what_was_understood_and_what_is_not_the_usual(
    asked: Json, line: str
) -> None:
    assert table(**asked) == line
