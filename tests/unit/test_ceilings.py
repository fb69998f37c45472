"""Section 7: what an admin allows at a time, and how much may be said."""

import asyncio
import logging
from contextlib import AsyncExitStack
from dataclasses import replace
from types import SimpleNamespace
from typing import Any

import pytest

from tests.unit.fakes import ScriptedHost, TellingEvent, call, make_run, text
from tests.unit.plugin import mmc

Json = dict[str, Any]
LONG = "x" * 50_000


async def count(run: mmc.Run, stack: AsyncExitStack, user_id: str) -> None:
    """One more conversation of this user, going until the stack ends."""
    host = replace(run.host, user=SimpleNamespace(id=user_id))
    await stack.enter_async_context(mmc.counted_run(host, run.settings))


def ask(run: mmc.Run, alias: str = "Ann") -> mmc.ModelCall:
    """A call of a participant's model."""
    voice = run.cast.participants[alias].voice
    return mmc.ModelCall(alias, voice, lambda _: [], mmc.Deadline(5.0))


async def converse(run: mmc.Run, rounds: int = 1) -> str:
    """Everybody once per round; gives the last status."""
    settings = run.settings.model_copy(update={"rounds": rounds})
    aliases = tuple(run.cast.participants)
    await run.converse(mmc.round_robin(mmc.Agenda(aliases, "Which tree?", settings)))
    assert isinstance(run.host, ScriptedHost)
    return run.host.statuses[-1]


def shown(run: mmc.Run) -> str:
    """All text of the message."""
    return "\n".join(block.text for block in run.screen.transcript.blocks)


# -- how many run at a time ------------------------------------------------------------


async def test_a_user_has_only_so_many_conversations_and_others_have_theirs() -> None:
    run, _ = make_run(max_runs_per_user=1)
    async with AsyncExitStack() as going:
        await count(run, going, "Ann")
        with pytest.raises(mmc.ConversationError, match="as you may have at a time"):
            await count(run, going, "Ann")
        await count(run, going, "Bob")
    async with AsyncExitStack() as going:
        await count(run, going, "Ann")


async def test_only_so_many_run_in_all_whoever_asks() -> None:
    run, _ = make_run(max_runs=2)
    async with AsyncExitStack() as going:
        await count(run, going, "Ann")
        await count(run, going, "Bob")
        for _ in range(2):
            with pytest.raises(mmc.ConversationError, match="Wait a little"):
                await count(run, going, "Cat")
        await count(make_run()[0], going, "Cat")


async def test_a_conversation_that_breaks_gives_its_place_back() -> None:
    run, _ = make_run(max_runs_per_user=1)
    for _ in range(2):
        with pytest.raises(KeyError):
            async with mmc.counted_run(run.host, run.settings):
                raise KeyError


async def test_who_may_not_begin_is_told_and_no_model_is_asked() -> None:
    run, host = make_run(max_runs_per_user=1)
    async with mmc.counted_run(host, run.settings):
        status = await converse(run)
    assert status.startswith("Not begun · 0 turns")
    assert "> ⚠️ You have as many conversations going" in shown(run)
    assert host.payloads == []


async def test_the_calls_of_two_runs_to_one_connection_wait_for_each_other() -> None:
    gate = TellingEvent()
    first, there = make_run([[gate, *text("Oaks.")]], calls_in_all=1)
    second, queued = make_run([text("Elms.")], calls_in_all=1)
    async with asyncio.TaskGroup() as group:
        oaks = group.create_task(first.models.text(ask(first)))
        await gate.awaited.wait()
        elms = group.create_task(second.models.text(ask(second)))
        for _ in range(20):
            await asyncio.sleep(0)
        assert (len(there.payloads), len(queued.payloads)) == (1, 0)
        gate.set()
    assert (oaks.result(), elms.result()) == ("Oaks.", "Elms.")


async def test_who_is_stopped_in_the_queue_keeps_nobody_waiting() -> None:
    gate = TellingEvent()
    first, _ = make_run([[gate, *text("Oaks.")]], calls_in_all=1)
    second, _ = make_run(calls_in_all=1)
    third, _ = make_run([text("Firs.")], calls_in_all=1)
    async with asyncio.TaskGroup() as group:
        group.create_task(first.models.text(ask(first)))
        await gate.awaited.wait()
        queued = asyncio.create_task(second.models.text(ask(second)))
        firs = group.create_task(third.models.text(ask(third)))
        await asyncio.sleep(0)
        queued.cancel()
        gate.set()
    assert firs.result() == "Firs."
    assert queued.cancelled()


# -- how long, and how much ------------------------------------------------------------


async def test_after_the_time_of_a_run_no_step_begins() -> None:
    run, host = make_run([text("Oaks."), text("Elms.")], run_timeout=100)
    run.ledger.begun -= 99.9
    assert (await converse(run)).startswith("Finished after 1 round")
    run, host = make_run([text("Oaks.")], run_timeout=100)
    run.ledger.begun -= 101
    assert (await converse(run)).startswith("Ended after 100 s, the time of a conv")
    assert host.payloads == []


@pytest.mark.parametrize("kind", ["content", "reasoning_content"])
async def test_a_reply_that_never_ends_is_ended_with_a_line(kind: str) -> None:
    endless = [{"choices": [{"delta": {kind: LONG}}]}] * 1000
    run, host = make_run([endless, text("Elms.")])
    await converse(run)
    assert "broke off: it said over 500,000 characters" in shown(run) or (
        "could not answer: it said over 500,000 characters" in shown(run)
    )
    assert "Elms." in shown(run)
    assert len(host.payloads) == 2
    said = sum(block.length for block in run.screen.transcript.blocks)
    assert said < mmc.MOST_SAID + 2 * len(LONG)


@pytest.mark.parametrize(
    "endless",
    [
        call("look", LONG),
        call(LONG),
        {"choices": [{"delta": {"annotations": [{"url": f"http://{LONG}"}]}}]},
    ],
)
async def test_calls_and_sources_count_too(endless: Json) -> None:
    run, _ = make_run([[endless] * 1000] * 2)
    begun: list[mmc.Reply] = []

    def begin() -> mmc.Reply:
        begun.append(mmc.Reply())
        return begun[-1]

    with pytest.raises(mmc.ModelFailure, match="it said over 500,000"):
        await run.models.complete(ask(run), begin)
    assert all(reply.size < mmc.MOST_SAID + 5 * len(LONG) for reply in begun)


async def test_all_replies_of_a_run_have_a_limit_together() -> None:
    long = text(*[LONG] * 9)
    run, host = make_run([long] * 13)
    for _ in range(12):
        await run.models.text(ask(run))
    with pytest.raises(mmc.ModelFailure, match="all have said over 5,000,000"):
        await run.models.text(ask(run))
    assert len(host.payloads) == 12


async def test_a_model_that_failed_twice_in_a_row_is_not_asked_again() -> None:
    refused = [mmc.ModelFailure("no", 401)]
    run, host = make_run([refused, text("Oaks."), refused, refused])
    for fails in (True, False, True, True):
        if fails:
            with pytest.raises(mmc.ModelFailure, match="no"):
                await run.models.text(ask(run))
        else:
            await run.models.text(ask(run))
    with pytest.raises(mmc.ModelFailure, match="failed twice and is not asked again"):
        await run.models.text(ask(run, "Bob"))  # whichever seat it takes
    assert len(host.payloads) == 4


# -- what is logged --------------------------------------------------------------------

KEY = "sk-proj-1234567890abcdefghijklmnop"


async def test_a_bug_is_logged_with_its_place_and_without_what_was_said(
    caplog: pytest.LogCaptureFixture,
) -> None:
    run, _ = make_run([[TypeError(f"Oaks, said with {KEY}")]])
    with caplog.at_level(logging.DEBUG):
        await converse(run)
    loud = [each.getMessage() for each in caplog.records if each.levelno > 10]
    failed = next(each for each in loud if "a conversation failed" in each)
    assert "TypeError" in failed and "in _items" in failed
    assert "Oaks" not in "".join(loud)
    assert "Oaks, said with (key)" in caplog.text and KEY not in caplog.text


async def test_foreign_errors_are_logged_below_info_and_without_keys(
    caplog: pytest.LogCaptureFixture,
) -> None:
    with (
        caplog.at_level(logging.DEBUG),
        pytest.raises(mmc.ToolFailure),
        mmc.foreign_errors(mmc.ToolFailure),
    ):
        raise ValueError(f"wrong key: {KEY}")
    (record,) = caplog.records
    assert record.levelno == logging.DEBUG
    assert "ValueError: wrong key" in caplog.text and KEY not in caplog.text
