"""Section 5: the blocks of a message, and how a client's copy follows them."""

from collections.abc import Iterator
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from tests.stack.structured_output import Output, apply_response_event
from tests.unit.plugin import mmc

Json = dict[str, Any]

KINDS: tuple[mmc.BlockKind, ...] = (
    "message",
    "reasoning",
    "function_call",
    "function_call_output",
)


class Client:
    """A page's copy of a transcript, kept up to date by the planned events."""

    def __init__(self) -> None:
        self.output: Output = []

    def follow(self, block: mmc.Block, place: int = 0) -> Json | None:
        """Plan for one block, remember it as sent, apply it; the event."""
        event = mmc.plan_items(block, place)
        block.mark_sent()
        if event is not None:
            self.output = apply_response_event(self.output, event)
            assert self.output[event["output_index"]]["id"] == block.id
        return event


def test_where_items_only_grow_no_text_goes_into_one_that_is_not_read() -> None:
    transcript = mmc.Transcript("t")
    for kind in ("reasoning", "function_call"):
        block = transcript.add(kind, "Ann")
        block.append("Let ")
        added = mmc.plan_items(block, 0, only_grows=True)
        assert added and added["type"] == "response.output_item.added"
        block.mark_sent()
        block.append("me")
        block.fields["status"] = "completed"
        grown = mmc.plan_items(block, 0, only_grows=True)
        assert grown and grown["type"].endswith(".delta") and grown["delta"] == "me"
        block.mark_sent()
        block.fields["status"] = "failed"
        assert mmc.plan_items(block, 0, only_grows=True) is None


TEXTS = st.text("ab \n木", max_size=4)
FIELDS = st.dictionaries(
    st.sampled_from(["status", "name", "duration", "files"]),
    st.sampled_from(["completed", "failed", 2, [1], {"a": 1}]),
    max_size=2,
)
EDITS = st.one_of(
    st.tuples(st.just("add"), st.sampled_from(KINDS), TEXTS),
    st.tuples(st.just("append"), st.integers(0, 20), TEXTS),
    st.tuples(st.just("replace"), st.integers(0, 20), TEXTS),
    st.tuples(st.just("fields"), st.integers(0, 20), FIELDS),
    st.tuples(st.just("flush"), st.none(), st.none()),
)


def edit(transcript: mmc.Transcript, verb: str, what: Any, value: Any) -> None:
    """One change of a transcript."""
    if verb == "add":
        transcript.add(what, "Ann").append(value)
    elif transcript.blocks and verb != "flush":
        block = transcript.blocks[what % len(transcript.blocks)]
        if verb == "append":
            block.append(value)
        elif verb == "replace":
            block.replace(value)
        else:
            block.fields |= value


def check_event(event: Json | None, before: Json | None, after: Json) -> None:
    """An event that turns a block's item `before` into `after`; none where none is."""
    if event is None:
        assert before == after
    elif before is None:
        assert event["type"] == "response.output_item.added"
    elif "delta" in event:
        assert text_of(before) + event["delta"] == text_of(after)
        assert without_text(before) == without_text(after)
    else:
        assert event["type"] == "response.output_item.done"


def text_of(item: Json) -> str:
    if item["type"] == "function_call":
        return str(item["arguments"])
    parts = item["output" if item["type"] == "function_call_output" else "content"]
    return str(parts[0]["text"])


def without_text(item: Json) -> Json:
    names = ("content", "output", "arguments")
    return {name: value for name, value in item.items() if name not in names}


@given(st.lists(EDITS, max_size=25))
def test_a_page_that_applies_every_event_has_exactly_the_transcript(
    edits: list[tuple[str, Any, Any]],
) -> None:
    transcript, client = mmc.Transcript("t"), Client()
    for verb, what, value in [*edits, ("flush", None, None)]:
        edit(transcript, verb, what, value)
        if verb == "flush":
            for place, block in enumerate(transcript.blocks):
                known = place < len(client.output)
                before = client.output[place] if known else None
                event = client.follow(block, place)
                check_event(event, before, mmc.render_item(block))
            assert client.output == list(map(mmc.render_item, transcript.blocks))


def test_the_items_of_each_kind_are_the_hosts() -> None:
    transcript = mmc.Transcript("t")
    for kind in KINDS:
        transcript.add(kind, "Ann").append(kind)
    transcript.blocks[1].fields |= {"status": "completed", "duration": 1.5}
    text = {"type": "output_text", "text": "message"}
    assert list(map(mmc.render_item, transcript.blocks)) == [
        {
            "type": "message",
            "id": "t_0",
            "speaker": "Ann",
            "status": "in_progress",
            "role": "assistant",
            "content": [text],
        },
        {
            "type": "reasoning",
            "id": "t_1",
            "speaker": "Ann",
            "status": "completed",
            "summary": None,
            "content": [{"type": "output_text", "text": "reasoning"}],
            "duration": 1.5,
        },
        {
            "type": "function_call",
            "id": "t_2",
            "speaker": "Ann",
            "status": "in_progress",
            "arguments": "function_call",
        },
        {
            "type": "function_call_output",
            "id": "t_3",
            "speaker": "Ann",
            "status": "in_progress",
            "output": [{"type": "input_text", "text": "function_call_output"}],
        },
    ]


def test_an_item_once_rendered_does_not_change_with_its_block() -> None:
    transcript = mmc.Transcript("t")
    block = transcript.add("message", "Ann", status="in_progress")
    item = mmc.render_item(block)
    block.append("more")
    block.fields["status"] = "completed"
    assert item["status"] == "in_progress"
    assert item["content"][0]["text"] == ""


@pytest.mark.parametrize(
    ("kind", "delta_type", "has_part"),
    [
        ("message", "response.output_text.delta", True),
        ("reasoning", "response.reasoning_text.delta", True),
        ("function_call", "response.function_call_arguments.delta", False),
    ],
)
def test_a_block_that_grew_sends_its_suffix(
    kind: Any, delta_type: str, has_part: bool
) -> None:
    transcript, client = mmc.Transcript("t"), Client()
    block = transcript.add(kind, "Ann")
    block.append("Oaks ")
    client.follow(block)
    block.append("grow ")
    block.append("slowly.")
    expected = {
        "type": delta_type,
        "item_id": "t_0",
        "output_index": 0,
        "delta": "grow slowly.",
    }
    assert client.follow(block) == expected | ({"content_index": 0} if has_part else {})
    assert client.follow(block) is None


def test_a_text_that_is_said_again_whole_sends_only_what_is_new() -> None:
    transcript, client = mmc.Transcript("t"), Client()
    block = transcript.add("message", "Ann")
    for text in ("Oaks", "Oaks grow", "Oaks grow", "Oaks grow slowly"):
        block.replace(text)
        client.follow(block)
    block.replace("Oaks grow slowly.")
    event = client.follow(block)
    assert event is not None
    assert event["delta"] == "."


def chunks_of(transcript: mmc.Transcript, steps: Iterator[None]) -> list[Json]:
    """What an API client gets, when each block is planned after every step."""
    chunks = []
    for _ in steps:
        for place, block in enumerate(transcript.blocks):
            chunk = mmc.plan_chunk(block, place)
            block.mark_sent()
            chunks += [chunk] if chunk else []
    return chunks


WORDS = st.lists(st.text("ab", min_size=1, max_size=3), min_size=1, max_size=4)


@given(st.lists(st.tuples(st.sampled_from(KINDS), WORDS), max_size=6))
def test_an_api_client_that_appends_has_the_texts_in_their_order(
    said: list[tuple[Any, list[str]]],
) -> None:
    transcript = mmc.Transcript("t")

    def steps() -> Iterator[None]:
        for kind, words in said:
            block = transcript.add(kind, "Ann")
            for word in words:
                block.append(word)
                yield

    chunks = chunks_of(transcript, steps())
    content = "".join(chunk.get("content", "") for chunk in chunks)
    reasoning = "".join(chunk.get("reasoning_content", "") for chunk in chunks)
    assert content.strip() == mmc.render_markdown(transcript)
    assert reasoning == "".join(
        "".join(words) for kind, words in said if kind == "reasoning"
    )
    assert {name for chunk in chunks for name in chunk} <= {
        "content",
        "reasoning_content",
    }


def test_an_api_client_never_sees_tool_calls() -> None:
    transcript = mmc.Transcript("t")
    for kind in ("function_call", "function_call_output"):
        transcript.add(kind, "Ann").append("{}")
    assert chunks_of(transcript, iter([None])) == []


def test_markdown_is_the_headings_and_texts_with_blank_lines_between() -> None:
    transcript = mmc.Transcript("t")
    said: list[tuple[mmc.BlockKind, str]] = [
        ("message", "### 🔵 Ann"),
        ("reasoning", "Hm."),
        ("message", "Oaks.\n"),
        ("function_call", "{}"),
        ("message", "  \n"),
        ("message", "\n### 🔴 Bob"),
    ]
    for kind, text in said:
        transcript.add(kind, "Ann").append(text)
    assert mmc.render_markdown(transcript) == "### 🔵 Ann\n\nOaks.\n\n### 🔴 Bob"


def test_the_ids_of_blocks_begin_with_the_runs_own_prefix() -> None:
    ids = {mmc.Transcript(prefix).add("message", "").id for prefix in "abc"}
    assert ids == {"a_0", "b_0", "c_0"}


@given(st.lists(st.text("ab", max_size=3)), st.text("ab", max_size=6))
def test_a_text_that_grows_reads_as_what_was_last_said(
    pieces: list[str], replaced: str
) -> None:
    block = mmc.Transcript("t").add("message", "Ann")
    for piece in pieces:
        block.append(piece)
    assert block.text == "".join(pieces)
    block.replace(replaced)
    assert block.text == replaced
