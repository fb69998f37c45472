"""Whatever reads foreign input gives a value or a named error, whatever it is given.

And who reads in pieces gives the same however the input is cut. `make test` tries each
reader a few dozen times, always the same; `make fuzz` tries new inputs for as long as
`SECONDS` says. To add a reader: a check in `CHECKS`, with what it is given.
"""

import json
import math
import os
import re
import time
from collections.abc import Callable, Iterable, Sequence
from contextlib import suppress
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from pydantic import ValidationError
from starlette.responses import Response

from tests.unit.plugin import mmc

Json = dict[str, Any]

SECONDS = float(os.environ.get("FUZZ_SECONDS", 0))
STREAMS = sorted(Path(__file__).parents[1].glob("streams/*.txt"))
TAGS = (("<think>", "</think>"), ("<|begin|>", "<|end|>"), ("◁think▷", "◁/think▷"))
CARDS = {
    name: mmc.ModelCard(name, name.title()) for name in ("oak", "llama3.1:8b", "a|b")
}
PAPER = mmc.BallotPaper("Zoe", "", {"A": "Ann", "B": "Bob (2)", "C": "C"})
SPEC: Json = {
    "name": "look",
    "parameters": {
        "properties": {"a": {"type": "string"}, "b": {"type": "integer"}, "c": 1},
        "required": ["a", 7],
    },
}
BROKEN = re.compile("[\0\ud800-\udfff]")

# -- what is given ---------------------------------------------------------------------

SCRAP_WORDS = """\
data: |data:|event: x|id: 1|retry: 1|[DONE]|{|}|[|]|"|\\|,|:|\\u0000|\\ud83d|\\"|\\n|\
NaN|Infinity|1e999|-0|null|true|{}|[]|{{|<|>|</|<think>|</think>|<think x|◁|◁think▷|\
◁/think▷|<details>|<status |### |🔵 Ann|🏆|> ⚠️ |---|===|```|~~~|&#|&lt;|:::|# |- |1) |\
/rounds 2|/rounds|A > B = C|1. A|ranking|vote|next|done|Ann|Bob (2)|oak|a|b|12|{name}|\
{question}|Traceback (most|  at x|sk-abcdef12|Bearer |http://|10.0.0.5:80|<html>|\
<title>|</message>|<message from=|</context>"""
KEY_WORDS = """
type choices delta message content reasoning reasoning_content thinking usage name part
tool_calls function arguments index id error item output_index response output text url
annotations url_citation title sources timings eval_count object role prompt_tokens
function_call detail call_id speaker model modelName ranking comments vote next reason
done finished A B C a b participants team rounds chair temperature top_k image_url
instructions manager_model NUM_PARTICIPANTS ROUNDS_PER_CONVERSATION Participant1Model
Participant1Alias Participant2Model Temperature Top_k user assistant system tool
"""
EVENT_KINDS = """
output_text.delta refusal.delta reasoning_text.delta function_call_arguments.delta
output_item.added output_item.done completed failed error
"""
SCRAPS = st.sampled_from([*SCRAP_WORDS.split("|"), "<|begin|>", "<|end|>", "<|"])
ODD = st.sampled_from(
    [*"\n\r\t\0\ud83d\udf33\u200b\u202e\u2067\ufeff\u2028\xa0\x1b\x85 ", "\r\n"]
)
TEXT = st.lists(SCRAPS | ODD | st.text(max_size=4), max_size=14).map("".join)
KEYS = st.sampled_from(KEY_WORDS.split())
NUMBERS = st.integers() | st.floats() | st.sampled_from([10**4000, -1, 0, 3, 1e16])
VALUES = st.recursive(
    st.none() | st.booleans() | NUMBERS | KEYS | TEXT,
    lambda inner: (
        st.lists(inner, max_size=4) | st.dictionaries(KEYS | TEXT, inner, max_size=5)
    ),
    max_leaves=20,
)
OBJECTS = st.dictionaries(KEYS, VALUES, max_size=6)
EVENTS = st.builds(
    lambda kind, rest: {**rest, "type": f"response.{kind}"},
    st.sampled_from(EVENT_KINDS.split()),
    OBJECTS,
)
MESSAGES = st.lists(
    st.builds(
        lambda role, rest: {"role": role, **rest},
        st.sampled_from(["user", "assistant", "tool", "system", "developer", ""]),
        st.dictionaries(
            st.sampled_from(["content", "tool_calls", "output", "model", "modelName"]),
            TEXT | st.lists(OBJECTS | TEXT, max_size=3) | VALUES,
        ),
    ),
    max_size=6,
)
BYTES = st.binary() | TEXT.map(lambda text: text.encode("utf-8", "surrogatepass"))
PLACES = st.lists(st.integers(0, 3000), max_size=6)


@st.composite
def streams(draw: st.DrawFn) -> bytes:
    """A golden stream in which something is gone, doubled, moved or new."""
    data = draw(st.sampled_from(STREAMS)).read_bytes()
    for _ in range(draw(st.integers(0, 4))):
        at, end = sorted(draw(st.integers(0, len(data))) for _ in range(2))
        new = draw(
            BYTES
            | st.just(data[at:end] * 2)
            | VALUES.map(lambda value: json.dumps(value).encode())
        )
        data = data[:at] + new + data[draw(st.sampled_from([at, at, end])) :]
    return data


def cut(whole: Any, places: Sequence[int]) -> list[Any]:
    """A text or bytes in pieces."""
    cuts = [0, *sorted(place % (len(whole) + 1) for place in places), len(whole)]
    return [whole[a:b] for a, b in zip(cuts, cuts[1:], strict=False)]


def fed(reader: Any, pieces: Iterable[Any]) -> list[Any]:
    """All that a reader gives, up to the error that it read as one."""
    found: list[Any] = []
    try:
        for piece in pieces:
            found.extend(reader.feed(piece))
        found.extend(reader.close())
    except mmc.ModelFailure as failure:
        found.append(failure)
    return found


# -- what is checked -------------------------------------------------------------------


def check_plain(text: str, limit: int = 300) -> None:
    """One line that can be stored and cannot pose as markup."""
    assert len(text) <= limit
    assert not BROKEN.search(text)
    assert not re.search(r"[\n\r`<>\[\]\u202e\u2067]", text)


def joined(events: Iterable[mmc.ReplyEvent | mmc.ModelFailure]) -> list[Any]:
    """Events with neighbouring texts of a kind as one: what a cut may not change."""
    found: list[Any] = []
    for event in events:
        text = getattr(event, "text", None)
        if text is None:
            found.append(repr(event))
            continue
        assert isinstance(text, str) and not BROKEN.search(text)
        if not text:
            continue
        if found and found[-1][0] == type(event).__name__:
            found[-1][1] += text
        else:
            found.append([type(event).__name__, text])
    return found


def check_events(events: Iterable[mmc.ReplyEvent | mmc.ModelFailure]) -> None:
    for event in events:
        match event:
            case mmc.ToolCallDelta(index, call_id, name, arguments):
                assert index is None or isinstance(index, int)
                assert isinstance(call_id, str)
                assert not BROKEN.search(name + arguments)
            case mmc.ModelFailure():
                assert str(event)
                check_plain(str(event))
            case mmc.SourceFound(source):
                assert isinstance(source, dict)
            case mmc.UsageReport(usage):
                assert usage
                check_numbers(usage)


def check_numbers(usage: Json) -> None:
    for value in usage.values():
        if isinstance(value, dict):
            check_numbers(value)
        else:
            assert type(value) in (int, float) and math.isfinite(value)


def stream_decoder(data: bytes, places: list[int]) -> None:
    values = fed(mmc.SSEDecoder(), [data])
    assert repr(fed(mmc.SSEDecoder(), cut(data, places))) == repr(values)


def reply_decoder(data: bytes, places: list[int]) -> None:
    events = fed(mmc.ReplyDecoder(TAGS), [data])
    check_events(events)
    pieces = fed(mmc.ReplyDecoder(TAGS), cut(data, places))
    assert joined(pieces) == joined(events)


def reply_items(values: list[Any]) -> None:
    events = fed(mmc.ReplyDecoder(TAGS), values)
    check_events(events)
    joined(events)


def think_splitter(text: str, places: list[int], own: list[str]) -> None:
    for tags in (TAGS, (), ((own[0], own[1]),) if all(own) else ()):
        whole = joined(fed(mmc.ThinkSplitter(tags), [text]))
        assert joined(fed(mmc.ThinkSplitter(tags), cut(text, places))) == whole


def forgery_guard(text: str, places: list[int]) -> None:
    guard = mmc.ForgeryGuard()
    whole = guard.feed(text) + guard.close()
    guard = mmc.ForgeryGuard()
    assert "".join([*map(guard.feed, cut(text, places)), guard.close()]) == whole
    assert not mmc.HEADING.search(whole)
    assert "<details" not in whole


def tool_calls(pieces: list[tuple[int | None, str, str, str]]) -> None:
    calls = mmc.ToolCallAccumulator()
    kept: dict[int, str] = {}
    for piece in pieces:
        call = calls.feed(mmc.ToolCallDelta(*piece))
        kept[id(call)] = kept.get(id(call), "") + piece[3]
    closed = calls.close()
    assert [id(call) for call, _ in closed] == list(kept)
    for call, texts in closed:
        assert texts
        whole = "".join(kept[id(call)].split())
        assert "".join("".join(texts).split()) == whole


def json_texts(text: str) -> None:
    with suppress(ValueError):
        mmc.parse_json(text)
    for at in range(min(len(text), 5)):
        with suppress(ValueError):
            _, end = mmc.parse_json_at(text, at)
            assert at < end <= len(text)
    texts = mmc.split_objects(text)
    assert texts == [text] or all(isinstance(mmc.parse_json(t), dict) for t in texts)


def errors(error: Any) -> None:
    text = mmc.error_text(error)
    assert text
    check_plain(text)
    check_plain(mmc.plain_line(error, 40), 40)


def error_responses(body: bytes, status: int, wait: str) -> None:
    response = Response(body, status)
    with suppress(UnicodeEncodeError):  # of the test's own: no header could carry it
        response.headers["retry-after"] = wait
    try:
        mmc._read_whole(response)
        assert status < 400
    except mmc.ModelFailure as failure:
        assert status >= 400 and failure.status == status
        seconds = failure.retry_after
        assert 0 <= seconds < math.inf
        check_plain(str(failure), 320)


def numbers_in_headers(text: str) -> None:
    assert 0 <= mmc.read_seconds(text) < math.inf


def templates(template: str, values: list[str]) -> None:
    filled = mmc.fill_template(template, {"name": values[0], "question": values[1]})
    if "{name}" not in template and "{question}" not in template:
        assert filled == template


def stored_settings(user: Json, request: Json, rounds: int | None) -> None:
    asked = {} if rounds is None else {"rounds": rounds}
    try:
        own = mmc.UserSettings.model_validate(user)
    except ValidationError:  # the host's own answer to what is stored
        own = mmc.UserSettings()
    try:
        merged = mmc.merge_settings(mmc.Settings(), own, request, asked)
    except mmc.ConversationError as error:
        assert "Correct them" in str(error)
    else:
        assert 1 <= merged.rounds <= merged.max_rounds
        seats(merged.team, merged.participants)


def seats(team: str, ticked: list[str]) -> None:
    settings = mmc.Settings(team=team, participants=ticked)
    chosen, problems = mmc.choose_seats(settings, CARDS)
    aliases = [seat.alias for seat in chosen]
    assert len(set(map(str.casefold, aliases))) == len(aliases) <= 8
    for alias in aliases:
        assert alias.strip()
        check_plain(alias, 43)
    for problem in problems:
        assert "\n" not in problem and not BROKEN.search(problem)


def ballots(text: str, verdict: Any) -> None:
    for answer in (text, json.dumps(verdict), f"{text}{json.dumps(verdict)}{text}"):
        ballot = mmc.read_ranking(answer, PAPER)
        if not isinstance(ballot, str):
            assert set(ballot.values) == set(PAPER.choices.values())
            assert all(-1 <= value <= 11 for value in ballot.values.values())
            for remark in ballot.remarks.values():
                check_plain(remark, 250)  # with what disarms it
        vote = mmc.read_vote(answer, PAPER)
        assert isinstance(vote, str) or sum(vote.values.values()) == 1


def manager_choices(text: str, verdict: Any) -> None:
    step = mmc.AskManager(("Ann", "Bob (2)"), "Ann", ("Ann", "Bob (2)", "C"))
    for answer in (text, json.dumps(verdict), text + json.dumps(verdict)):
        found = mmc.read_choice(answer, step)
        if not isinstance(found, str):
            assert found[0] in ("", *step.candidates)
            check_plain(found[1], 200)


def histories(messages: list[Json], chain: list[Json]) -> None:
    authors = mmc.reply_authors(chain, {"oak"})
    for known in ((), authors):
        _, entries = mmc.read_history(messages, known)
        asked, _ = mmc.read_commands(mmc.keep_conclusions(entries), CARDS)
        for sees in (True, False):
            voice = mmc.Voice("oak", sees=sees)
            ann = mmc.Participant("Ann", "🔵", "", voice)
            sent = mmc.messages_for(ann, asked)
            json.dumps(sent)
            assert sent[-1]["role"] == "user"
        step = mmc.AskManager(("Ann",), None, ("Ann",))
        mmc.messages_for_manager(mmc.Settings(), asked, step)
        mmc.last_question(asked)


def arguments(given_as: Any) -> None:
    text = given_as if isinstance(given_as, str) else json.dumps(given_as)
    echoed = json.loads(mmc.echo_arguments(given_as))
    assert isinstance(echoed, dict)
    with suppress(mmc.ToolFailure):
        read = mmc.parse_arguments(mmc.ToolCall("c", "look", text), SPEC)
        assert isinstance(read["a"], str) and json.dumps(read, allow_nan=False)


def specs(spec: Json) -> None:
    call = mmc.ToolCall("c", "look", '{"a": 1, "b": [null]}')
    with suppress(mmc.ToolFailure):
        mmc.parse_arguments(call, spec)


PIECES = st.lists(
    st.tuples(
        st.none() | st.integers(0, 2),
        st.sampled_from(["", "", "x", "y"]),
        st.sampled_from(["", "f", "g"]),
        st.sampled_from(["", "{}", '{"a": 1}', "{", " ", '"'])
        | TEXT.map(lambda text: "".join(text.split())),
    ),
    max_size=8,
)
Check = Callable[..., None]
CHECKS: list[tuple[Check, tuple[st.SearchStrategy[Any], ...]]] = [
    (stream_decoder, (streams() | BYTES, PLACES)),
    (reply_decoder, (streams() | BYTES, PLACES)),
    (reply_items, (st.lists(VALUES | OBJECTS | EVENTS | TEXT, max_size=4),)),
    (think_splitter, (TEXT, PLACES, st.lists(TEXT, min_size=2, max_size=2))),
    (forgery_guard, (TEXT, PLACES)),
    (tool_calls, (PIECES,)),
    (json_texts, (TEXT | VALUES.map(json.dumps),)),
    (errors, (VALUES | OBJECTS | TEXT,)),
    (
        error_responses,
        (
            streams() | BYTES,
            st.sampled_from([200, 400, 429, 500, 503]),
            TEXT | NUMBERS.map(str),
        ),
    ),
    (numbers_in_headers, (TEXT,)),
    (templates, (TEXT, st.lists(TEXT, min_size=2, max_size=2))),
    (stored_settings, (OBJECTS, OBJECTS, st.none() | st.integers(0, 999))),
    (seats, (TEXT, st.lists(TEXT | st.sampled_from(list(CARDS)), max_size=4))),
    (ballots, (TEXT, VALUES | OBJECTS)),
    (manager_choices, (TEXT, VALUES | OBJECTS)),
    (histories, (MESSAGES, MESSAGES)),
    (arguments, (VALUES | OBJECTS | TEXT,)),
    (specs, (OBJECTS | st.fixed_dictionaries({"parameters": OBJECTS}),)),
]


@pytest.mark.parametrize(
    ("check", "inputs"), CHECKS, ids=[check.__name__ for check, _ in CHECKS]
)
def test_no_input_is_fatal(
    check: Check, inputs: tuple[st.SearchStrategy[Any], ...]
) -> None:
    @settings(max_examples=300 if SECONDS else 40)
    @given(st.tuples(*inputs))
    def attempt(drawn: tuple[Any, ...]) -> None:
        check(*drawn)

    until = time.monotonic() + SECONDS / len(CHECKS)
    attempt()
    while time.monotonic() < until:
        attempt()
