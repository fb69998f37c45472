"""Whatever reads foreign text is linear in its length, on its own worst case.

To add one: a reader in `READERS`, which takes a text in pieces (`fed` and `whole` make
one), and in `UNITS` what would have to be repeated to stall it, or a case in `CASES`.
"""

import random
from collections.abc import Callable, Iterable, Sequence
from contextlib import suppress
from typing import Any

import pytest

from tests.unit.linear import LENGTHS, MOST, TRIES, again, seconds
from tests.unit.plugin import mmc

Reader = Callable[[Sequence[str]], object]
Maker = Callable[[int], str]

TINY = 0.05  # s for the longest: nobody waits for that, and it measures nothing
TAGS = (("<think>", "</think>"), ("<|begin|>", "<|end|>"), ("◁think▷", "◁/think▷"))


def fed(make: Callable[[], Any]) -> Reader:
    """A reader with `feed` and `close`, new for each text."""

    def read(pieces: Sequence[str]) -> None:
        reader = make()
        for piece in pieces:
            consume(reader.feed(piece))
        consume(reader.close())

    return read


def whole(function: Callable[[str], object]) -> Reader:
    """A reader of a whole text, which may refuse it."""

    def read(pieces: Sequence[str]) -> None:
        with suppress(ValueError):
            function("".join(pieces))

    return read


def consume(values: Iterable[object]) -> None:
    for _ in values:
        pass


def calls_with_ids(pieces: Sequence[str]) -> None:
    """A call of its own for each three characters, told apart by id only."""
    calls = mmc.ToolCallAccumulator()
    text = "".join(pieces)
    for place in range(0, len(text), 3):
        calls.feed(mmc.ToolCallDelta(None, f"call_{place}", "look", "{}"))
    calls.close()


def arguments_in_pieces(pieces: Sequence[str]) -> None:
    calls = mmc.ToolCallAccumulator()
    for piece in pieces:
        calls.feed(mmc.ToolCallDelta(0, "a", "look", piece))
    calls.close()


def growing_text(pieces: Sequence[str]) -> None:
    """A block that is flushed at every hundredth piece."""
    block = mmc.Transcript("t").add("message", "Ann")
    for number, piece in enumerate(pieces):
        block.append(piece)
        if number % 100 == 0:
            mmc.plan_items(block, 0)
            block.mark_sent()


READERS: dict[str, Reader] = {
    "ForgeryGuard": fed(mmc.ForgeryGuard),
    "ThinkSplitter": fed(lambda: mmc.ThinkSplitter(TAGS)),
    "SSEDecoder": fed(mmc.SSEDecoder),
    "ReplyDecoder": fed(lambda: mmc.ReplyDecoder(TAGS)),
    "split_objects": whole(mmc.split_objects),
    "parse_json": whole(mmc.parse_json),
    "parse_json_at": whole(mmc.parse_json_at),
    "error_text": whole(mmc.error_text),
    "storable": whole(mmc.storable),
    "calls with ids": calls_with_ids,
    "arguments in pieces": arguments_in_pieces,
    "growing text": growing_text,
}
UNITS: dict[str, list[str]] = {  # what is repeated, for each reader
    "ForgeryGuard": [
        *(
            " ",
            "\xa0",
            "\t",
            "\n",
            "\r",
            "\ufeff",
            "# ",
            "#",
            "\n# ",
            "> ",
            ">",
            ">\xa0",
        ),
        *(
            "> &zwnj;",
            "&",
            "&#",
            "&#0",
            "&lt;",
            "<",
            "</",
            "<a",
            "<details ",
            "{",
            "{{",
        ),
        *("-", "- ", "=", "🔴\n-", "🔴 a\n---\n", "🔴", ":::", ":::x ", "`", "\n```\n"),
        *("```\n# ", "$$\n", "\\", "\\[\n", "[", "1. ", "- a\n   ```\n", "a\n", "<\n"),
    ],
    "ThinkSplitter": [
        *("<", "</", "<th", "<think ", "<think x", "<think>", "<think></think> "),
        *(
            "<think>x</think>",
            "<|",
            "<|begin",
            "◁",
            "◁think",
            " ",
            "< ",
            "\0",
            "\ud83d",
        ),
    ],
    "SSEDecoder": [
        *("x", " ", "\r", "data: ", "data: x", "data: {\n", "data: a}\n", "data: }\n"),
        *(
            "{\n",
            "}\n",
            '"\n',
            "data: [\n",
            'data: {"a":\n',
            'data: "}\n',
            "data: {}\n",
        ),
    ],
    "ReplyDecoder": ["x", " ", "<think>", "data: {\n", "{", 'data: "<think>"\n'],
    "split_objects": ["{}", "{} ", '{"a":1}', "{", '{"a":', "[", "{}{", " "],
    "parse_json": ["[", '{"a":', '"', "9"],
    "parse_json_at": ["[", '{"a":', '"', "9", "{}"],
    "error_text": [
        *("<", " ", "`", "a ", "\n", "\n at x", "<title", "<title>", "<html><script>"),
        *("a.", "a:", "a:a@", "a@", "a://", "http://.", "1.", "1.1.1.1", "::1", "f:"),
        *("sk-", "sk-.", "eyJ", "a1", "key=", "key: 1", "Bearer 1", "pwd=", "a-a.a "),
    ],
    "storable": ["a", "\0", "\ud83d", "\udf33", "\ud83d\udf33", "é"],
    "calls with ids": ["abc"],
    "arguments in pieces": ["{", '{"a": 1}'],
    "growing text": ["a"],
}
CASES: list[tuple[str, Maker]] = [
    *((name, again(unit)) for name, units in UNITS.items() for unit in units),
    ("ThinkSplitter", again("<", before="<think>")),
    ("ThinkSplitter", again("</thin", before="<think>")),
    ("ThinkSplitter", again(" ", before="<think></think>")),
    *(("error_text", again(u, before="<html>")) for u in ("<", "<script>", "a ")),
    ("error_text", again("\n at x", before="Traceback (")),
    ("SSEDecoder", again("x", before='data: {"a": "')),
    ("SSEDecoder", again('data: "a}",\n', before="data: {\n")),
    ("SSEDecoder", again("data: x}\n", before='data: {"a": [\n')),
    ("split_objects", again(" ", before="{}", after="x")),
]


def in_pieces(text: str) -> dict[str, list[str]]:
    """The text whole, and cut in the ways in which it may arrive."""
    cuts, place = [0], 0
    shuffled = random.Random(0)
    while place < len(text):
        place += shuffled.randint(1, 40)
        cuts.append(place)
    return {
        "whole": [text],
        "by 1": list(text),
        "by 7": [text[at : at + 7] for at in range(0, len(text), 7)],
        "cut at random": [text[a:b] for a, b in zip(cuts, cuts[1:], strict=False)],
    }


def is_linear(read: Reader, texts: Sequence[Sequence[str]]) -> bool:
    """Whether each doubling of the text takes less than `MOST` times as long.

    The fastest of a few tries counts for each length.
    """
    best = [float("inf")] * len(texts)
    for _ in range(TRIES):
        best[-1] = min(best[-1], seconds(read, texts[-1]))
        if best[-1] < TINY:
            return True
        rest = [seconds(read, pieces) for pieces in texts[:-1]]
        best[:-1] = map(min, best[:-1], rest)
        if best[-1] < best[0] * MOST ** (len(texts) - 1):
            return True
    return False


@pytest.mark.parametrize(
    ("name", "make"), CASES, ids=[f"{n} {m(24)!r:.26}" for n, m in CASES]
)
def test_a_text_of_twice_the_length_takes_twice_the_time(
    name: str, make: Maker
) -> None:
    cut = [in_pieces(make(length)) for length in LENGTHS]
    for way in cut[0]:
        assert is_linear(READERS[name], [each[way] for each in cut]), way


def test_a_reader_that_is_not_linear_is_found() -> None:
    def quadratic(pieces: Sequence[str]) -> None:
        read = ""
        for piece in pieces:
            read += piece
            list(read)

    assert not is_linear(quadratic, [[" " * 20] * (length // 20) for length in LENGTHS])
