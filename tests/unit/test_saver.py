"""Section 7: what is stored while a conversation goes on."""

import asyncio
from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from typing import Any

import pytest

from tests.unit.fakes import ScriptedHost, call, make_run, text, tool, usage
from tests.unit.plugin import mmc

Json = dict[str, Any]


@dataclass(frozen=True)
class KeepingHost(ScriptedHost):
    """A host that keeps what is saved; the first writes fail, as often as it says."""

    saved: list[list[Json]] = field(default_factory=list)
    usages: list[Json] = field(default_factory=list)
    ended: list[bool] = field(default_factory=list)
    failures: list[None] = field(default_factory=list)
    is_ours: bool = True

    async def may_save(self) -> bool:
        return self.is_ours

    async def save_output(self, items: list[Json], usage: Json, done: bool) -> bool:
        if self.failures:
            self.failures.pop()
            return False
        self.saved.append(items)
        self.usages.append(usage)
        self.ended.append(done)
        return True

    def texts(self) -> list[str]:
        """The text of each write."""
        return [texts_of(items) for items in self.saved]


class HastySaver(mmc.Saver):
    """It looks many times a second whether there is something new."""

    EVERY = 0.02  # s


def texts_of(items: list[Json]) -> str:
    """What these items say."""
    parts = [part for item in items for part in item.get("content") or ()]
    return "\n".join(part["text"] for part in parts)


def keeping_run(
    replies: Sequence[Sequence[Any]], tools: Json | None = None, **host_fields: Any
) -> tuple[mmc.Run, KeepingHost]:
    """A run of two whose host keeps what is saved."""
    run, old = make_run(replies, tools=tools, rounds=1)
    host = KeepingHost(
        old.request, None, old.metadata, replies=list(replies), **host_fields
    )
    screen, report = run.screen, run.ledger.report
    saver = HastySaver(host, screen.transcript, screen.emitter, report)
    models = replace(run.models, host=host)
    return replace(run, host=host, saver=saver, models=models), host


async def play(run: mmc.Run) -> None:
    """The run to its end, as a page reads it."""
    agenda = mmc.Agenda(tuple(run.cast.participants), "Which tree?", run.settings)
    async for _ in mmc.stream_items(run, mmc.round_robin(agenda)):
        pass


async def until(condition: Any) -> None:
    """Wait until this is so, for five seconds at most."""
    async with asyncio.timeout(5):
        while not condition():
            await asyncio.sleep(0.01)


async def test_every_turn_is_saved_with_a_line_that_says_what_this_is() -> None:
    hold = asyncio.Event()
    run, host = keeping_run([text("Oaks."), [hold, *text("Elms.")]])
    playing = asyncio.create_task(play(run))
    await until(lambda: host.saved)
    assert "Oaks." in host.texts()[0] and "Elms." not in host.texts()[0]
    assert host.saved[0][-1]["id"] == "t_saved"
    assert host.texts()[0].endswith("*Continue Response*, or ask on.")
    hold.set()
    await playing


async def test_a_long_turn_is_saved_in_between_and_only_where_there_is_more() -> None:
    more, end = asyncio.Event(), asyncio.Event()
    run, host = keeping_run(
        [[*text("Oaks "), more, *text("are old."), end], text("Elms.")]
    )
    playing = asyncio.create_task(play(run))
    await until(lambda: host.saved)
    first = len(host.saved)
    assert "Oaks" in host.texts()[-1] and "are old" not in host.texts()[-1]
    await asyncio.sleep(10 * HastySaver.EVERY)  # in which nothing must happen
    assert len(host.saved) <= first + 1
    more.set()
    await until(lambda: "are old." in host.texts()[-1])
    assert all(i["status"] == "completed" for i in host.saved[-1])
    end.set()
    await playing


async def test_a_tool_call_that_is_open_is_saved_as_one_that_ended() -> None:
    hold = asyncio.Event()
    replies = [[call("dig")], text("Dug."), text("Elms.")]
    run, host = keeping_run(replies, tools={"dig": tool(hold.wait)})
    playing = asyncio.create_task(play(run))
    await until(lambda: any(i["type"] == "function_call" for i in sum(host.saved, [])))
    (card,) = [i for i in host.saved[-1] if i["type"] == "function_call"]
    assert card["status"] == "incomplete"
    hold.set()
    await playing


async def test_nothing_is_saved_after_the_end() -> None:
    run, host = keeping_run([text("Oaks."), text("Elms.")])
    await play(run)
    saved = len(host.saved)
    assert saved <= 3
    await asyncio.sleep(5 * HastySaver.EVERY)  # in which nothing must happen
    assert len(host.saved) == saved
    assert asyncio.all_tasks() == {asyncio.current_task()}


async def test_the_last_write_is_the_whole_reply_without_the_line() -> None:
    run, host = keeping_run([text("Oaks."), text("Elms.")], failures=[None])
    await play(run)
    shown = [mmc.render_item(block) for block in run.screen.transcript.blocks]
    assert [i["id"] for i in host.saved[-1]] == [i["id"] for i in shown]
    assert texts_of(host.saved[-1]) == texts_of(shown)
    assert host.ended == [*[False] * (len(host.ended) - 1), True]


async def test_what_was_there_before_stays_before_what_is_saved() -> None:
    hold = asyncio.Event()
    run, host = keeping_run([text("Oaks."), [hold, *text("Elms.")]])
    before = [{"type": "message", "id": "b", "content": [{"text": "Long ago."}]}]
    run.saver.before = before
    playing = asyncio.create_task(play(run))
    await until(lambda: host.saved)
    assert host.saved[0][:1] == before
    hold.set()
    await playing


@pytest.mark.parametrize("why", ["not ours", "no beginning"])
async def test_nothing_is_saved_where_it_must_not_be(why: str) -> None:
    run, host = keeping_run([text("Oaks."), text("Elms.")], is_ours=why != "not ours")
    if why == "no beginning":
        run.saver.before = None
    await play(run)
    assert host.saved == []


async def test_a_run_ends_only_when_the_database_is_there_again() -> None:
    run, host = keeping_run([text("Oaks."), text("Elms.")], failures=[None] * 3)
    await play(run)
    assert "Elms." in host.texts()[-1]


async def test_a_run_ends_though_the_database_stays_away() -> None:
    run, host = keeping_run([text("Oaks."), text("Elms.")], failures=[None] * 1000)
    settings = run.settings.model_copy(update={"busy_patience": 1.5})
    await asyncio.wait_for(play(replace(run, settings=settings)), 5)
    assert host.saved == []


async def test_stop_saves_the_usage_of_all_calls_so_far() -> None:
    hold = asyncio.Event()
    run, host = keeping_run(
        [[*text("Oaks."), usage(10, 5)], [usage(7, 1), *text("El"), hold]]
    )
    playing = asyncio.create_task(play(run))
    blocks = run.screen.transcript.blocks
    await until(lambda: any(block.text == "El" for block in blocks))
    playing.cancel()
    with pytest.raises(asyncio.CancelledError):
        await playing
    assert host.usages[0]["total_tokens"] == 15
    assert host.usages[-1]["total_tokens"] == 23
    assert "El" in host.texts()[-1]
