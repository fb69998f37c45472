"""Rows 1 to 8, 11 and 13, and the curve of the flush interval: on a real server."""

from __future__ import annotations

import asyncio
import re
import time
from bisect import bisect_left
from collections.abc import Sequence
from itertools import accumulate
from statistics import mean, median
from typing import Any

from benchmarks.measure import (
    Ask,
    Bench,
    Cost,
    Sample,
    Side,
    percentile,
)
from benchmarks.models import STAMP
from benchmarks.table import Measured, Results
from tests.stack.host import difference
from tests.stack.page import Event, Page, Reply, choice_text
from tests.stack.structured_output import get_output_text

ALL_SIDES: tuple[Side, ...] = ("ours", "native", "message", "replace")
INTERVALS = (10, 20, 40, 60, 100, 125, 150, 250)
DATABASE = ("writes_tokens", "writes_turn", "written_bytes")
CROWD = 50
"""Conversations at once."""
CROWD_PACE = 200
"""Tokens/s of each model of a crowd."""
CROWD_SPEED = ("crowd_wall", "crowd_delay")
CROWD_TEXT = 5500
"""Characters each of them has at least when its memory is taken: a turn and more."""
STATUS_LOOKUP = "Chats.get_current_message_id"
"""What the host itself looks up for each status line."""


def two(side: Side, model: str, tokens: int, rounds: int = 1) -> Ask:
    """Two participants; `tokens` is for each turn."""
    return Ask(side, (model, model), rounds, tokens * 2 * rounds)


async def warm_up(bench: Bench, page: Page) -> None:
    """Let every side run once, and take what an idle server costs."""
    asks = [two(side, "tokens-50-200", 50) for side in ALL_SIDES]
    for ask in asks:
        await bench.cost(page, ask)
    await bench.measure_idle()


# --- rows 1 to 3 --------------------------------------------------------------------


async def streaming_200(bench: Bench, page: Page, results: Results) -> None:
    """Bytes, events and CPU at 200 tokens/s, and how they grow with the text."""
    asks = [
        two("ours", "tokens-400-200", 400, 8),
        Ask("native", ("tokens-3200-200",), 1, 3200),
    ]
    twice = [(await bench.cost(page, ask))[0] for ask in asks * 2]
    rivals = [two(side, "tokens-400-200", 400, 2) for side in ("message", "replace")]
    costs = [*twice[:2], *[(await bench.cost(page, ask))[0] for ask in rivals]]
    note_streaming(results, "200", costs)
    cpu = results.figures["cpu_200"]
    cpu.ours, cpu.native = (
        mean(cost.cpu_per_thousand for cost in twice[side::2]) for side in (0, 1)
    )
    results.curves["by_length"] = {
        side: points(cost.samples) for side, cost in zip(ALL_SIDES, costs, strict=True)
    }


async def streaming_50(bench: Bench, page: Page, results: Results) -> None:
    """The same at 50 tokens/s, ours and native."""
    ours, _ = await bench.cost(page, two("ours", "tokens-400-50", 400, 4))
    native, _ = await bench.cost(page, Ask("native", ("tokens-1600-50",), 1, 1600))
    note_streaming(results, "50", [ours, native])


def note_streaming(results: Results, speed: str, costs: Sequence[Cost]) -> None:
    """Put rows 1 to 3 into the table."""
    found = {
        f"bytes_{speed}": [cost.bytes_per_token for cost in costs],
        f"events_{speed}": [cost.events_per_token for cost in costs],
        f"cpu_{speed}": [cost.cpu_per_thousand for cost in costs],
    }
    results.figures.update({key: Measured(*sides) for key, sides in found.items()})


def points(samples: Sequence[Sample]) -> list[list[float]]:
    """Samples as lists: characters, bytes, CPU seconds."""
    return [[one.characters, one.bytes, round(one.cpu, 3)] for one in samples]


async def council_events(bench: Bench, page: Page, results: Results) -> None:
    """Events of five who speak at once."""
    ask = Ask("ours", ("member-400-200",) * 5, 1, 2000, "council")
    ours, _ = await bench.cost(page, ask)
    native, _ = await bench.cost(page, Ask("native", ("tokens-1600-200",), 1, 1600))
    sides = ours.events_per_token, native.events_per_token
    results.figures["events_council"] = Measured(*sides)


# --- row 4 --------------------------------------------------------------------------


def stamp_of(reply: Reply) -> float:
    """When the first model of a reply was asked.

    The text of rivals is gone from the page at the end: then it is in their events.
    """
    pieces = (event.data.get("content") for event in reply.events if event.data)
    text = reply.text or "".join(piece for piece in pieces if piece)
    found = STAMP.search(text)
    if not found:
        raise RuntimeError(f"there is no stamp in {text[:200]!r}")
    return float(found[1])


async def speed(bench: Bench, page: Page, ask: Ask) -> float:
    """Tokens/s from the first byte of a model to the last event."""
    cost, _ = await bench.cost(page, ask)
    ended = cost.reply.done_at or time.monotonic()
    return ask.tokens / (ended - stamp_of(cost.reply))


async def throughput(bench: Bench, page: Page, results: Results) -> None:
    """How fast models come through that do not wait."""
    long = Ask("native", ("stamped-20000-0",), 1, 20000)
    asks = [two("ours", "stamped-5000-0", 5000, 2), long] * 3
    speeds = [await speed(bench, page, ask) for ask in asks]
    rivals = [two(side, "stamped-200-0", 200, 2) for side in ("message", "replace")]
    sides = [median(speeds[::2]), median(speeds[1::2])]
    sides += [await speed(bench, page, ask) for ask in rivals]
    results.figures["throughput"] = Measured(*sides)


# --- rows 5 and 11 ------------------------------------------------------------------


async def first_seen(
    bench: Bench, page: Page, model: str, tool_ids: Sequence[str] = ()
) -> tuple[float, float, float]:
    """Milliseconds to the first character, to a model's word, and from that's stamp."""
    reply = await bench.send(page, model, tool_ids)
    await reply.wait_for(lambda one: STAMP.search(one.text))
    seen = time.monotonic()
    await reply.wait_idle()
    shown = (reply.first_text_at or seen) - reply.asked_at
    word = seen - reply.asked_at
    return shown * 1000, word * 1000, (seen - stamp_of(reply)) * 1000


async def repeated(
    bench: Bench, page: Page, asks: Sequence[Ask], times: int, *tool_ids: str
) -> list[list[float]]:
    """Medians of `first_seen` of each question, asked in turn."""
    found: list[list[tuple[float, float, float]]] = [[] for _ in asks]
    for _ in range(times):
        for ask, trials in zip(asks, found, strict=True):
            model = await asyncio.to_thread(bench.seat, ask)
            trials.append(await first_seen(bench, page, model, tool_ids))
    return [[median(column) for column in zip(*one, strict=True)] for one in found]


async def first_character(bench: Bench, page: Page, results: Results) -> None:
    """Five participants and twenty tools, beside one model with the same tools."""
    asks = [Ask(side, ("stamped-20-0",) * 5) for side in ALL_SIDES]
    found = await repeated(bench, page, asks, 12, "toolbox")
    for at, key in enumerate(("first_character", "first_word")):
        results.figures[key] = Measured(*(side[at] for side in found))


async def council_first(bench: Bench, page: Page, results: Results) -> None:
    """The fastest of five members, and the first word by the number of members."""
    models = ("stamped-20-0", *("wait-0.4",) * 4)
    asks = [
        Ask("ours", models, mode="council"),
        Ask("native", ("stamped-20-0",)),
    ]
    ours, native = await repeated(bench, page, asks, 6)
    results.figures["council_first"] = Measured(ours[2], native[2])
    curve: dict[str, Any] = {side: [] for side in ALL_SIDES}
    for members in (1, 2, 4, 8):
        seats = ("stamped-20-0",) * members
        asks = [Ask(side, seats, mode="council") for side in ALL_SIDES]
        found = await repeated(bench, page, asks, 3)
        for side, medians in zip(ALL_SIDES, found, strict=True):
            curve[side].append([members, round(medians[1], 1)])
    results.curves["by_members"] = curve


# --- row 6 --------------------------------------------------------------------------


def at_length(samples: Sequence[Sample], characters: float) -> tuple[float, float]:
    """CPU and bytes when a run had come so far, between two looks in proportion."""
    before = Sample(0, 0, 0.0)
    for after in samples:
        if after.characters >= characters:
            share = characters - before.characters
            share /= max(after.characters - before.characters, 1)
            cpu = before.cpu + share * (after.cpu - before.cpu)
            return cpu, before.bytes + share * (after.bytes - before.bytes)
        before = after
    return before.cpu, before.bytes


def quarters(samples: Sequence[Sample]) -> tuple[float, float]:
    """CPU and bytes of the last quarter of the characters over the first's."""
    length = samples[-1].characters
    steps = [at_length(samples, length * part / 4) for part in (0, 1, 3, 4)]
    first = [one - zero for zero, one in zip(steps[0], steps[1], strict=True)]
    last = [one - zero for zero, one in zip(steps[2], steps[3], strict=True)]
    return last[0] / first[0], last[1] / first[1]


async def growth(bench: Bench, page: Page, results: Results) -> None:
    """A conversation of 300,000 characters, and a plain answer as long."""
    asks = [
        two("ours", "tokens-5700-2000", 5700, 5),
        Ask("native", ("tokens-57000-2000",), 1, 57000),
    ]
    ours, native = [(await bench.cost(page, ask))[0] for ask in asks]
    grown = [quarters(cost.streamed) for cost in (ours, native)]
    for at, key in enumerate(("growth_cpu", "growth_bytes")):
        results.figures[key] = Measured(*(side[at] for side in grown))
    results.curves["to_300000"] = {
        "ours": points(ours.streamed),
        "native": points(native.streamed),
    }


# --- rows 7 and 8 -------------------------------------------------------------------


async def database(bench: Bench, page: Page, results: Results) -> None:
    """What is written, for few and many tokens in as many turns.

    The host writes now and then by itself, so a write or two in forty turns are chance.
    """
    rounds = 20
    turns = 2 * rounds
    # turns of a quarter of a second each: faster ones share a write
    few, little = await bench.cost(page, two("ours", "tokens-50-200", 50, rounds))
    many, much = await bench.cost(page, two("ours", "tokens-400-1600", 400, rounds))
    _, native = await bench.cost(page, Ask("native", ("tokens-400-0",), 1, 400))
    beyond = (much.writes - native.writes) / turns
    more_bytes = sum(much.sql_bytes.values()) - sum(little.sql_bytes.values())
    more_text = len(many.reply.text) - len(few.reply.text)
    more = (much.writes - little.writes) / turns
    found = (more, beyond, more_bytes / more_text)
    for key, number in zip(DATABASE, found, strict=True):
        results.figures[key] = Measured(number)


async def lookups(bench: Bench, page: Page, results: Results) -> None:
    """What is looked up, in one round and in twenty."""
    found = []
    for rounds in (1, 20):
        ask = two("ours", "tokens-20-0", 20, rounds)
        found.append((await bench.cost(page, ask, ["toolbox"]))[1].lookups)
    grown = difference(found[1], found[0])
    grown.pop(STATUS_LOOKUP, None)
    results.figures["lookups"] = Measured(sum(map(abs, grown.values())))


# --- row 13 -------------------------------------------------------------------------


async def crowd(bench: Bench, page: Page, ask: Ask) -> list[Reply]:
    """Ask one question after the other, as fast as the host takes them.

    All at the same instant is more than the host's SQLite can do: some fail.
    """
    model = await asyncio.to_thread(bench.seat, ask)
    return [await bench.send(page, model) for _ in range(CROWD)]


def piece_of(event: Event) -> str:
    """The text that a frame of a stream adds; nothing for any other event."""
    if event.type not in ("chat:completion", "response:completion"):
        return ""
    if event.data.get("type") == "response.output_item.added":
        return "\n" + get_output_text([event.data["item"]])
    return event.data.get("delta") or choice_text(event.data.get("choices") or [])


def delays(reply: Reply, pace: float) -> list[float]:
    """Seconds that each word of a reply came after its model should have said it.

    Each turn begins with the time at which its model was asked; the model says `pace`
    words a second from then on.
    """
    pieces = [(piece_of(event), event.at) for event in reply.events]
    ends = list(accumulate(len(piece) for piece, _ in pieces))
    found: list[float] = []
    asked: float | None = None
    for word in re.finditer(r"\S+", "".join(piece for piece, _ in pieces)):
        _, at = pieces[bisect_left(ends, word.end())]
        if stamp := STAMP.match(word[0] + " "):
            asked, words = float(stamp[1]), 0
        elif asked is not None:
            words += 1
            found.append(at - asked - words / pace)
    return found


async def crowd_speed(bench: Bench, page: Page, ask: Ask) -> tuple[float, float]:
    """Seconds from the first question to the last answer, and the p99 of the words'
    delays in ms."""
    await bench.settle()
    replies = await crowd(bench, page, ask)
    for reply in replies:
        await reply.wait_idle(240)
        if reply.error:
            raise RuntimeError(f"{ask.side}: {reply.error}")
    ended = max(reply.done_at or 0.0 for reply in replies)
    late = [delay for reply in replies for delay in delays(reply, CROWD_PACE)]
    return ended - replies[0].asked_at, percentile(late, 0.99) * 1000


async def crowd_memory(bench: Bench, page: Page, ask: Ask) -> tuple[float, float]:
    """Bytes in use for each conversation while all are under way, and its text's."""
    await bench.settle()
    before = await asyncio.to_thread(bench.host.counts, memory=True)
    replies = await crowd(bench, page, ask)
    for reply in replies:
        await reply.wait_for(lambda one: len(one.text) > CROWD_TEXT, 240)
    text = mean(len(reply.text) for reply in replies)
    now = await asyncio.to_thread(bench.host.counts, memory=True)
    if any(reply.done for reply in replies):
        raise RuntimeError(f"{ask.side}: an answer was over before all were under way")
    await page.stop_all()
    for reply in replies:
        await reply.wait_idle(240)
    return (now - before).memory / CROWD, text


async def fifty(bench: Bench, page: Page, results: Results) -> None:
    """Fifty conversations at once, and fifty plain chats."""
    fast = [
        two("ours", "stamped-1600-200", 1600),
        Ask("native", ("stamped-3200-200",), 1, 3200),
    ]
    slow = [
        two("ours", "tokens-1000-50", 1000),
        Ask("native", ("tokens-2000-50",), 1, 2000),
    ]
    speeds = [await crowd_speed(bench, page, ask) for ask in fast]
    memory = [await crowd_memory(bench, page, ask) for ask in slow]
    for key, sides in zip(CROWD_SPEED, zip(*speeds, strict=True), strict=True):
        results.figures[key] = Measured(*sides)
    text = memory[0][1]
    results.figures["crowd_memory"] = Measured(*(held / text for held, _ in memory))


# --- the flush interval -------------------------------------------------------------


async def interval_curve(bench: Bench, page: Page, results: Results) -> None:
    """What the interval costs and how smooth it looks."""
    curve = []
    for interval in INTERVALS:
        await asyncio.to_thread(bench.set_interval, interval)
        cost, _ = await bench.cost(page, two("ours", "tokens-400-200", 400))
        curve.append([interval, *smoothness(cost)])
    await asyncio.to_thread(bench.set_interval)
    cost, _ = await bench.cost(page, Ask("native", ("tokens-800-200",), 1, 800))
    results.curves["interval"] = {"ours": curve, "native": smoothness(cost)}


def smoothness(cost: Cost) -> list[float]:
    """Bytes a token, CPU per 1,000 tokens, median and p99 gap in ms."""
    gaps = [percentile(cost.gaps, share) * 1000 for share in (0.5, 0.99)]
    numbers = [cost.bytes_per_token, cost.cpu_per_thousand, *gaps]
    return [round(number, 4) for number in numbers]
