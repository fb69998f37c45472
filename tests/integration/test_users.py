"""Many at the same time: nothing of one reaches another."""

import asyncio

import pytest

from tests.integration.talk import (
    MANAGER,
    ROUND_ROBIN,
    Talk,
    ask,
    finish,
    headings,
    in_rounds,
    items,
    reached,
)
from tests.stack.host import Account, OpenWebUI


@pytest.fixture(scope="session")
def other(host: OpenWebUI) -> Account:
    """One more plain user."""
    return host.add_user("Otto Other")


async def test_two_users_at_the_same_time_see_only_their_own(
    talk: Talk, other: Account
) -> None:
    talk.seat("Ann | thinker", "Ben | bob", instructions="MARK-ONE", rounds=2)
    talk.seat(
        "Cy | thinker", "Di | bob", account=other, instructions="MARK-TWO", rounds=2
    )
    with talk.models.hold("thinker", after=2) as hold:
        async with talk.page() as mine, talk.page(other) as theirs:
            first = await mine.send(ROUND_ROBIN, "Is WORD-ONE so?", background_tasks={})
            second = await theirs.send(
                ROUND_ROBIN, "Is WORD-TWO so?", background_tasks={}
            )
            await reached(lambda: hold.wait_until_reached(2))
            hold.release()
            await finish(mine, first)
            await finish(theirs, second)
            assert "TWO" not in str(mine.unknown_events)
            assert "ONE" not in str(theirs.unknown_events)
            assert str(second.chat.id) not in str(mine.unknown_events)
            assert str(first.chat.id) not in str(theirs.unknown_events)
    assert headings(first) == in_rounds(2, "🔵 Ann", "🔴 Ben")
    assert headings(second) == in_rounds(2, "🔵 Cy", "🔴 Di")
    for reply, own, foreign in ((first, "ONE", "TWO"), (second, "TWO", "ONE")):
        shown = str(reply.message) + str([event.data for event in reply.events])
        assert f"WORD-{own}" in shown and foreign not in shown
    for seen in talk.models.turns():
        one, two = "-ONE" in seen.text, "-TWO" in seen.text
        assert one != two
        assert ("You are Ann" in seen.text or "You are Ben" in seen.text) is one


async def test_one_user_in_two_chats_at_once(talk: Talk) -> None:
    talk.seat("Ann | alice", "Ben | bob")
    with talk.models.hold("bob", after=2) as hold:
        async with talk.page() as page:
            replies = [
                await page.send(model, f"Is WORD-{mark} so?", background_tasks={})
                for model, mark in ((ROUND_ROBIN, "ONE"), (MANAGER, "TWO"))
            ]
            await reached(lambda: hold.wait_until_reached(2))
            hold.release()
            for reply in replies:
                await finish(page, reply)
    first, second = replies
    assert "WORD-ONE" in first.text and "TWO" not in first.text
    assert "WORD-TWO" in second.text and "ONE" not in second.text


async def test_ten_chats_at_once_all_come_right(talk: Talk, garden: str) -> None:
    talk.seat("Ann | thinker", "Tim | toolie", "Ben | bob", rounds=2)

    async def one(number: int) -> None:
        mark = f"WORD{number}X"
        question = f'Use look_up on {mark}. ARGS: {{"topic": "{mark}"}}'
        async with talk.page() as page:
            reply = await ask(page, question, tool_ids=[garden])
        assert headings(reply) == in_rounds(2, "🔵 Ann", "🔴 Tim", "🟢 Ben")
        assert len(items(reply, "reasoning")) == 2
        shown = str(reply.message)
        assert f"The almanac on {mark}: 3 lines." in shown
        assert not [n for n in range(10) if n != number and f"WORD{n}X" in shown]

    async with asyncio.TaskGroup() as group:
        for number in range(10):
            group.create_task(one(number))
    for seen in talk.models.turns():
        assert len([n for n in range(10) if f"WORD{n}X" in seen.text]) == 1
