"""What models, users and clients write is read in time that grows with its length.

Each case is a text that was slow once, or would be with a careless pattern.
"""

import json
from collections.abc import Callable, Sequence
from contextlib import suppress
from functools import partial
from itertools import pairwise
from typing import Any

import pytest

from tests.unit.linear import LENGTHS, MOST, TRIES, again, seconds
from tests.unit.plugin import mmc

TINY = 0.004  # s; below that a machine's noise is all there is
Reader = Callable[[str], Any]

PAPER = mmc.BallotPaper("Zoe", "", {"A": "Ann", "B": "Bob", "C": "Cat"})
CARDS = {f"oak-{n}": mmc.ModelCard(f"oak-{n}", f"Oak {n}") for n in range(300)}
SETTINGS = mmc.Settings(manager_prompt="{history}{last_speaker}")


def manager(answer: str) -> None:
    aliases = ("Ann", "Bob", "Cat")
    mmc.read_choice(answer, mmc.AskManager(aliases, "Ann", aliases))


def arguments(text: str) -> None:
    with suppress(mmc.ToolFailure):
        mmc.parse_arguments(mmc.ToolCall("c1", "look", text), {})
    mmc.echo_arguments(text)


def history(text: str) -> None:
    messages: list[dict[str, Any]] = [
        {"role": "user", "content": text},
        {"role": "assistant", "content": text},
    ]
    parts = [{"type": "text", "text": text}, {"type": "image_url"}]
    messages += [{"role": "user", "content": parts}, {"role": "tool", "content": text}]
    _, entries = mmc.read_history(messages * 2, ["Ash", None])
    entries, _ = mmc.read_commands(mmc.keep_conclusions(entries), CARDS)
    for alias in ("Ann", "Bob"):
        person = mmc.Participant(alias, "🔵", "", mmc.Voice("oak-1", sees=False))
        mmc.messages_for(person, entries)
    mmc.messages_for_manager(
        SETTINGS, entries, mmc.AskManager(("Ann",), None, ("Ann",))
    )


def team(text: str) -> None:
    mmc.choose_seats(mmc.Settings(team=text), CARDS)


def ticked(text: str) -> None:
    mmc.choose_seats(mmc.Settings(participants=text.split("\n")), CARDS)


READERS: dict[str, Reader] = {
    "a ballot": partial(mmc.read_ranking, paper=PAPER),
    "a vote": partial(mmc.read_vote, paper=PAPER),
    "a manager": manager,
    "arguments": arguments,
    "a history": history,
    "a team": team,
    "a list": ticked,
    "a line": mmc.plain_line,
    "a refusal": mmc.read_limit,
    "a prompt": lambda text: mmc.squeeze([{"role": "user", "content": text}], 1000),
    "a label": mmc.escape_labels,
    "a fold": lambda text: mmc.unfold(mmc.render_fold("🔵 Ann", text) + text),
    "letters": lambda text: mmc.NameFilter({"A": "Ann"}).feed(text),
    "names": partial(mmc.hide_names, names={"A": "Ann", "B": "木"}),
    "a template": partial(mmc.fill_template, values={"history": "x", "name": "{"}),
}

SCRAPS = [
    *('<details type="draft">\n', "</details>\n\n", "</summary>\n\n", "<summary>"),
    *("[A", "[A, ", "[A]", "[", "&amp;", "&", "&lt;/details"),
    *("<", "< ", "</", "<\n", "<\u200b", "<message", " ", "\n", "\t", "\u00a0", "#"),
    *("{", '{"', '{"a":', '{"\n', "{'a':", '{"a":[', '[{"a":1},', "[", "(", "-", "1"),
    *("A", "A ", "A>", "A=", "A\n\n-", "A, then ", "\n1. A", "and then ", "\n\n-"),
    *('"', "'", "\\", "\\u", '"A",', "木", "\0", "|", "a|b\n", "oak-1\n", "a\n"),
    *("---\n", "### 🔵 ", "### 🔵 a\n", "### 🔵 Ann\nx\n", "> ⚠️ ", "> ⏳ x\n", "***"),
    *("/rounds ", "/rounds 1 ", "/rounds 1\n", "`", "```\n", "~~~ ", "</context>\n"),
    *("/with ", "/with oak-1, ", "oak-1, ", "/vote\n", "\n/join", "Ann, ", "Ann: "),
    *("Ann ", "Ann", "Bob or Ann ", "{history}", "</attached_files>", ">> "),
]  # fmt: skip
TEXTS = {
    **{repr(scrap): again(scrap) for scrap in SCRAPS},
    "a prompt that is never too long": again("prompt is exceeds the a "),
    "a number without an end": again("1,", "prompt too long: "),
    "a letter and a chain of links": again("\n\n-", "A", "x"),
    "a letter and blanks": again(" ", "A", "x"),
    "a link and blank lines": again("\n", "A >", "x"),
    "a list without an end": again("1,", '{"ranking": ['),
    "a list of places": again('"A=B",', '{"ranking": [', '"C"]}'),
    "a long place": again(" ", '{"ranking": ["A', 'x"]}'),
    "a place of many": again("A,", '{"ranking": ["', 'A"]}'),
    "lists in lists": again('{"a":[', '{"a":' * 80 + '["', "1,1,1"),
    "a rule and blank lines": again("\n", "---", "x"),
    "a command and blanks": again(" ", "Which? /rounds 1", "x"),
    "a command and names": again("oak-1, ", "/with ", "oak-1"),
    "an address and names": again("Ann, ", "", "Ann: x"),
    "a word of the command and blanks": again(" ", "Which? /rounds", "x"),
    "a whole dictionary": again("'a': (1,), ", "{", "}"),
    "a whole object": again('"a": [1], ', "{", '"b": 2}'),
}


def ranks_of_many(size: int) -> str:
    """A ranking with many names, each once."""
    return json.dumps({"ranking": {str(n): n for n in range(size // 14)}})


TEXTS["ranks of many"] = ranks_of_many


def is_linear(times: Sequence[float]) -> bool:
    """Whether no doubling of the text took more than so many times as long."""
    return all(b <= MOST * max(a, TINY) for a, b in pairwise(times))


@pytest.mark.parametrize("text", TEXTS)
@pytest.mark.parametrize("reader", READERS)
def test_a_text_twice_as_long_takes_about_twice_as_long(reader: str, text: str) -> None:
    read, texts = READERS[reader], [TEXTS[text](size) for size in LENGTHS]
    times = [seconds(read, each) for each in texts]
    for _ in range(TRIES - 1):  # the shortest of several tries, where one is not enough
        if is_linear(times):
            break
        times = [min(a, seconds(read, b)) for a, b in zip(times, texts, strict=True)]
    assert is_linear(times), times
    assert times[-1] < 0.4


@pytest.mark.parametrize("reader", READERS)
def test_a_short_text_is_read_at_once(reader: str) -> None:
    """A pattern that is exponential needs no long text."""
    for text in ("A" + "\n\n-" * 26 + "x", "A" + " \n" * 26 + "x", "{" * 60, "[" * 60):
        assert seconds(READERS[reader], text) < 0.05
