"""Rows 9, 10 and 14: the plugin's own work on a stream, in this process."""

from __future__ import annotations

import gc
import json
import time
import tracemalloc
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from statistics import median

from benchmarks.table import Measured
from tests.unit.fakes import make_run
from tests.unit.fakes import tool as make_tool
from tests.unit.plugin import mmc

FLUSH_EVERY = 12
"""Chunks between two flushes: 60 ms at 200 tokens/s."""
PIECE = "x" * 128
CHUNK_TEXT = " token"
MEGABYTE = 1_000_000


def chunk(delta: dict[str, object], number: int = 0) -> bytes:
    """One server-sent event of a model's stream, as a provider sends it."""
    choice = {"index": 0, "delta": delta, "logprobs": None, "finish_reason": None}
    event = {
        "id": "chatcmpl-0123456789abcdef",
        "object": "chat.completion.chunk",
        "created": 1_700_000_000 + number,
        "model": "a-model",
        "choices": [choice],
    }
    return f"data: {json.dumps(event, separators=(',', ':'))}\n\n".encode()


def text_stream(count: int) -> Iterator[bytes]:
    """`count` chunks of plain text."""
    return (chunk({"content": CHUNK_TEXT}, number) for number in range(count))


def call_chunk(arguments: str, first: bool) -> bytes:
    """A piece of a tool call."""
    head = {"id": "call_1", "type": "function"} if first else {}
    function = {"arguments": arguments, **({"name": "tool_7"} if first else {})}
    return chunk({"tool_calls": [{"index": 0, **head, "function": function}]})


def call_stream(count: int) -> list[bytes]:
    """`count` chunks with a piece of one tool call each."""
    return [call_chunk(PIECE, number == 0) for number in range(count)]


def make_section(tools: int = 0) -> mmc.Section:
    """A participant's section on a run of its own, with so many tools in the table."""
    table = {f"tool_{at}": make_tool(print, place="string") for at in range(tools)}
    run, _ = make_run(tools=table)
    clock = mmc.Deadline(600.0)
    return mmc.Section(run.screen, next(iter(run.cast.participants.values())), clock)


def consume(section: mmc.Section, items: Iterable[bytes]) -> int:
    """Bytes of a stream to planned events, as a reply is read; the events planned."""
    decoder, reply = mmc.ReplyDecoder(), section.begin_reply()
    flush, events = section.screen.emitter.flush, 0
    for number, item in enumerate(items):
        for event in decoder.feed(item):
            reply.apply(event)
        if number % FLUSH_EVERY == 0:
            events += len(flush())
    for event in decoder.close():
        reply.apply(event)
    return events + len(flush())


def consume_pieces(section: mmc.Section, pieces: Iterable[mmc.ToolCallDelta]) -> None:
    """Decoded pieces of a tool call to planned events."""
    reply, flush = section.begin_reply(), section.screen.emitter.flush
    for number, piece in enumerate(pieces):
        reply.apply(piece)
        if number % FLUSH_EVERY == 0:
            flush()
    flush()


def best(work: Callable[[], object], times: int) -> float:
    """The shortest time of several, in seconds."""
    durations = []
    for _ in range(times):
        gc.collect()
        begun = time.perf_counter()
        work()
        durations.append(time.perf_counter() - begun)
    return min(durations)


def tool_arguments(times: int = 15) -> dict[str, Measured]:
    """Row 9."""
    short, long = call_stream(500), call_stream(5000)
    pieces = [mmc.ToolCallDelta(0, "call_1" * (not n), "", PIECE) for n in range(5000)]

    def decoded(tools: int, count: int) -> float:
        section = [make_section(tools) for _ in range(times)]
        return best(lambda: consume_pieces(section.pop(), pieces[:count]), times)

    def with_json(stream: list[bytes]) -> float:
        section = [make_section(200) for _ in range(times)]
        return best(lambda: consume(section.pop(), stream), times)

    many, one = decoded(200, 500), decoded(1, 500)
    return {
        "pieces": Measured(many * 1000),
        "pieces_json": Measured(with_json(short) * 1000),
        "pieces_5000": Measured(with_json(long) * 1000),
        "pieces_tools": Measured(many / one),
        "pieces_length": Measured(decoded(200, 5000) / 10 / many),
    }


def chunk_cost(items: list[bytes], times: int) -> float:
    """Seconds a chunk of a stream takes."""
    sections = [make_section() for _ in range(times)]
    return best(lambda: consume(sections.pop(), items), times) / len(items)


def stream_cost(megabytes: float = 10, times: int = 5) -> dict[str, Measured]:
    """Row 10."""
    size = len(next(text_stream(1)))
    whole = list(text_stream(round(megabytes * MEGABYTE / size)))
    tenth = whole[: max(len(whole) // 10, 1)]
    small = chunk_cost(tenth, times * 3)
    return {
        "chunk": Measured(small * 1e6),
        "chunk_length": Measured(chunk_cost(whole, times) / small),
    }


@contextmanager
def pauses() -> Iterator[list[float]]:
    """The seconds each collection of garbage takes meanwhile."""
    found: list[float] = []
    begun = 0.0

    def watch(phase: str, _: dict[str, int]) -> None:
        nonlocal begun
        if phase == "start":
            begun = time.perf_counter()
        else:
            found.append(time.perf_counter() - begun)

    gc.callbacks.append(watch)
    try:
        yield found
    finally:
        gc.callbacks.remove(watch)


def memory(tokens: int = 40_000) -> dict[str, Measured]:
    """Row 14: what is kept of each quarter of a stream, and pauses meanwhile."""
    quarter = tokens // 4
    section = make_section()
    kept = []
    tracemalloc.start()
    try:
        for _ in range(4):
            gc.collect()
            before = tracemalloc.get_traced_memory()[0]
            consume(section, text_stream(quarter))
            gc.collect()
            kept.append(tracemalloc.get_traced_memory()[0] - before)
    finally:
        tracemalloc.stop()
    with pauses() as found:
        consume(make_section(), text_stream(tokens))
    return {
        "memory": Measured(median(kept) / quarter * 1000 / 1000),
        "memory_length": Measured(kept[-1] / kept[0]),
        "pause": Measured(max(found, default=0.0) * 1000),
    }
