"""What an admin allows at a time holds over all replicas."""

import asyncio
from contextlib import AsyncExitStack

from tests.cluster.cluster import Cluster
from tests.cluster.scene import (
    MODES,
    QUESTION,
    seat_three,
    split_page,
    start,
    turns_in,
)
from tests.integration.talk import Talk, ask, finish, last_status, reached
from tests.stack.page import Page


async def pages(cluster: Cluster, talk: Talk, stack: AsyncExitStack) -> list[Page]:
    """A page for each replica, its socket at the next one."""
    count = len(cluster.replicas)
    return [
        await stack.enter_async_context(
            split_page(cluster, talk, socket=(at + 1) % count, requests=at)
        )
        for at in range(count)
    ]


async def test_only_so_many_conversations_run_on_all_replicas(
    cluster: Cluster, talk: Talk
) -> None:
    talk.seat("Ann | alice", "Ben | bob")
    talk.admin_sets(max_runs=2)
    async with AsyncExitStack() as stack:
        first, second, third = await pages(cluster, talk, stack)
        with talk.models.hold("bob", after=3) as hold:
            going = [await start(first), await start(second)]
            await reached(lambda: hold.wait_until_reached(2))
            for page in (first, second, third):
                refused = await ask(page, "And maples?")
                assert "Wait a little, and ask again." in refused.text
                assert last_status(refused).startswith("Not begun · 0 turns")
            await second.stop(going[1])
            await going[1].wait_idle()
            hold.release()
            assert "Bob here." in (await ask(third, "And maples?")).text
        await finish(first, going[0])
    assert talk.order().count("alice") == 3


async def test_the_calls_of_all_replicas_to_one_connection_are_counted_together(
    cluster: Cluster, talk: Talk
) -> None:
    seat_three(talk, pace=400)
    talk.admin_sets(calls_in_all=2)
    council, rounds = MODES[2], MODES[0]
    async with AsyncExitStack() as stack:
        opened = await pages(cluster, talk, stack)
        asked = [
            (page, await page.send(mode, QUESTION, background_tasks={}))
            for page in opened
            for mode in (council, rounds)
        ]
        async with asyncio.timeout(120):
            ended = [await finish(page, reply) for page, reply in asked]
    assert talk.models.max_in_flight == 2
    assert [turns_in(reply.text) for reply in ended] == [4, 3] * len(opened)
    assert not any("⚠️" in reply.text for reply in ended)
