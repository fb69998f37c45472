"""Stop ends everything a run holds, keeps what was said, and touches nobody else."""

import pytest

from tests.integration.talk import (
    ROUND_ROBIN,
    Talk,
    ask,
    finish,
    headings,
    items,
    last_status,
    reached,
    results,
)
from tests.stack.host import Account, OpenWebUI
from tests.stack.page import Page, Reply
from tests.versions import REPLACES

QUESTION = "Should we plant oaks or birches?"


async def start(page: Page, text: str = QUESTION) -> Reply:
    """Ask, and do not wait."""
    return await page.send(ROUND_ROBIN, text, background_tasks={})


async def stop(page: Page, reply: Reply) -> None:
    """Press Stop; what is then shown is stored, and every call has a result."""
    await page.stop(reply)
    await finish(page, reply)
    results(reply)
    assert last_status(reply).startswith("Stopped")


async def test_stop_in_the_text_keeps_it_and_frees_the_connection(talk: Talk) -> None:
    talk.seat("Ann | alice", "Ben | bob", "Cy | carol")
    with talk.models.hold("bob", after=3) as hold:
        async with talk.page() as page:
            reply = await start(page)
            await reached(hold.wait_until_reached)
            await reply.wait_for(lambda r: "Bob here. On" in r.text)
            await stop(page, reply)
            await talk.freed("bob")
            assert headings(reply) == ["🔵 Ann", "🔴 Ben"]
            assert "Bob here. On" in reply.text
            assert talk.order() == ["alice", "bob"]


async def test_the_question_after_stop_finds_what_was_said(talk: Talk) -> None:
    talk.seat("Ann | alice", "Ben | bob")
    async with talk.page() as page:
        with talk.models.hold("bob", after=3) as hold:
            reply = await start(page)
            await reached(hold.wait_until_reached)
            await reply.wait_for(lambda r: "Bob here. On" in r.text)
            await stop(page, reply)
        second = await ask(page, "And maples?", chat=reply.chat)
    assert headings(second) == ["🔵 Ann", "🔴 Ben"]
    sent = talk.sent("alice", 1)[-1]["content"]
    assert '<message from="Ben">\nBob here. On' in sent and "⚠️" not in sent


@REPLACES
async def test_stop_while_a_model_reasons(talk: Talk) -> None:
    talk.seat("Ann | thinker", "Ben | bob")
    with talk.models.hold("thinker", after=3) as hold:
        async with talk.page() as page:
            reply = await start(page)
            await reached(hold.wait_until_reached)
            await reply.wait_for(lambda r: items(r, "reasoning"))
            await stop(page, reply)
            await talk.freed("thinker")
    (block,) = items(reply, "reasoning")
    assert block["status"] == "completed" and "duration" in block
    assert talk.order() == ["thinker"]


async def test_stop_before_the_first_token(talk: Talk) -> None:
    talk.seat("Ann | alice", "Ben | bob")
    async with talk.page() as page:
        with talk.models.hold("alice") as hold:
            reply = await start(page)
            await reached(hold.wait_until_reached)
            await stop(page, reply)
            await talk.freed("alice")
        assert talk.order() == ["alice"]
        second = await ask(page, "And maples?", chat=reply.chat)
    assert headings(second) == ["🔵 Ann", "🔴 Ben"]


async def test_stop_while_the_manager_thinks(talk: Talk) -> None:
    talk.seat("Ann | alice", "Ben | bob", manager_model="manager")
    with talk.models.hold("manager") as hold:
        async with talk.page() as page:
            reply = await page.send(
                ROUND_ROBIN.replace("round_robin", "manager"),
                QUESTION,
                background_tasks={},
            )
            await reached(hold.wait_until_reached)
            await stop(page, reply)
            await talk.freed("manager")
    assert talk.order() == ["manager"]


@pytest.mark.parametrize("question", ["Use never_ends.", "Use never_ends and wait."])
async def test_stop_while_a_tool_runs_ends_the_tool(
    talk: Talk, garden: str, question: str
) -> None:
    model = "toolie-two" if "and" in question else "toolie"
    talk.seat(f"Ann | {model}", "Ben | bob")
    async with talk.page() as page:
        reply = await page.send(
            ROUND_ROBIN, question, tool_ids=[garden], background_tasks={}
        )
        await reply.wait_for(lambda r: "started" in str(r.statuses))
        await stop(page, reply)
        second = await ask(page, "How many were ended?", chat=reply.chat)
    assert all(result.startswith("Error: ") for result in results(reply))
    assert len(results(reply)) == (2 if model == "toolie-two" else 1)
    assert "Ben" in str(headings(second))
    calls = [
        message
        for message in talk.sent(model, 1)
        if message["role"] == "tool" or message.get("tool_calls")
    ]
    asked = [c["id"] for m in calls for c in m.get("tool_calls") or ()]
    assert asked == [m["tool_call_id"] for m in calls if m["role"] == "tool"]


async def test_stop_of_one_run_leaves_another_users_run_alone(
    talk: Talk, host: OpenWebUI, admin: Account
) -> None:
    talk.seat("Ann | alice", "Ben | bob")
    talk.seat("Cy | carol", "Di | dave", account=admin)
    with (
        talk.models.hold("alice", after=3) as mine,
        talk.models.hold("carol", after=3) as theirs,
    ):
        async with talk.page() as one, talk.page(admin) as other:
            stopped = await start(one)
            untouched = await start(other)
            await reached(mine.wait_until_reached)
            await reached(theirs.wait_until_reached)
            await stop(one, stopped)
            assert not untouched.done
            theirs.release()
            await finish(other, untouched)
    assert talk.models.aborted == ["alice"]
    assert headings(untouched) == ["🔵 Cy", "🔴 Di"]
    assert last_status(untouched).startswith("Finished after 1 round · 2 turns")
