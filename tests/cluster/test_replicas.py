"""A run on one replica, its page at another: everything is as on a single server."""

import asyncio

import pytest

from tests.cluster.cluster import Cluster
from tests.cluster.scene import (
    MODES,
    QUESTION,
    TOKENS,
    assert_stored_everywhere,
    seat_three,
    split_page,
    start,
    turns_in,
)
from tests.integration.talk import (
    Talk,
    ask,
    finish,
    headings,
    last_status,
    on_card,
    reached,
    results,
    title_of,
)
from tests.stack.page import Call, Page

STOPS = 20
ENDS = 12.0
"""Seconds after which what was stopped has ended, also on a busy machine; a run that
knows nothing of it goes on for 18 s."""


@pytest.mark.parametrize("mode", MODES)
async def test_every_token_reaches_a_page_at_another_replica(
    cluster: Cluster, talk: Talk, mode: str
) -> None:
    seat_three(talk, pace=400)
    async with split_page(cluster, talk, socket=1, requests=0) as page:
        reply = await finish(page, await start(page, mode))
    assert_stored_everywhere(cluster, talk, reply)
    chaired = mode.endswith(("council", "debate"))
    assert turns_in(reply.text) == (4 if chaired else 3)
    began, ended = reply.first_text_at, reply.done_at
    assert began and ended and ended - began > TOKENS / 400
    assert 10 < len(reply.events) < 3 * TOKENS


@pytest.mark.parametrize("sticky", [False, True])
async def test_behind_the_balancer_a_second_question_knows_the_first(
    cluster: Cluster, talk: Talk, sticky: bool
) -> None:
    talk.seat("Ann | alice", "Ben | bob")
    balanced = cluster.sticky if sticky else cluster.spread
    async with Page(balanced, talk.account) as page:
        first = await ask(page, QUESTION)
        await ask(page, "And maples?", chat=first.chat)
    assert headings(first) == ["🔵 Ann", "🔴 Ben"]
    assert_stored_everywhere(cluster, talk, first)
    sent = talk.sent("alice", 1)[-1]["content"]
    assert '<message from="Ben">\nBob here. On' in sent


async def test_a_page_that_comes_back_at_another_replica_sees_all(
    cluster: Cluster, talk: Talk
) -> None:
    talk.seat("Ann | alice", "Ben | bob", "Cy | carol")
    async with (
        split_page(cluster, talk, socket=1, requests=0) as first,
        split_page(cluster, talk, socket=2, requests=2) as second,
    ):
        with talk.models.hold("bob", after=3) as hold:
            reply = await start(first)
            await reached(hold.wait_until_reached)
            await reply.wait_for(lambda r: "Bob here. On" in r.text)
            chat = await second.open(reply.chat.id or "")
            again = second.reply(chat.current_id or "")
            assert headings(again)[:1] == ["🔵 Ann"] and "Alice here." in again.text
        await finish(first, reply)
        await again.wait_done()
    assert again.text == reply.text
    assert_stored_everywhere(cluster, talk, again)


# -- Stop ------------------------------------------------------------------------------


async def test_stop_through_another_replica_ends_the_run_and_keeps_the_text(
    cluster: Cluster, talk: Talk
) -> None:
    talk.seat("Ann | alice", "Ben | bob", "Cy | carol")
    async with (
        split_page(cluster, talk, socket=1, requests=0) as first,
        split_page(cluster, talk, socket=2, requests=2) as second,
    ):
        with talk.models.hold("bob", after=3) as hold:
            reply = await start(first)
            await reached(hold.wait_until_reached)
            await reply.wait_for(lambda r: "Bob here. On" in r.text)
            await second.stop(reply)
            await talk.freed("bob")
        await finish(first, reply)
    assert_stored_everywhere(cluster, talk, reply)
    assert last_status(reply).startswith("Stopped")
    assert talk.order() == ["alice", "bob"]


@pytest.mark.parametrize("at_once", [True, False])
async def test_no_stop_through_another_replica_is_lost(
    cluster: Cluster, talk: Talk, at_once: bool
) -> None:
    seat_three(talk, pace=50)
    async with (
        split_page(cluster, talk, socket=1, requests=0) as first,
        split_page(cluster, talk, socket=2, requests=2) as second,
    ):

        async def stopped() -> bool:
            reply = await start(first)
            if not at_once:
                await reply.wait_for(lambda r: len(r.text) > 200)
            await second.stop(reply)
            try:
                await reply.wait_idle(timeout=ENDS)
            except TimeoutError:
                return False
            return True

        async with asyncio.timeout(90):
            ended = await asyncio.gather(*(stopped() for _ in range(STOPS)))
        assert ended.count(False) == 0
        await reached(lambda: talk.models.wait_for(lambda m: m.in_flight == 0, 8))


# -- dialogs ---------------------------------------------------------------------------


async def test_a_skip_dialog_reaches_the_page_and_is_answered(
    cluster: Cluster, talk: Talk
) -> None:
    talk.seat("Ann | silent", "Ben | bob")
    talk.admin_sets(skip_after=0.5)
    async with split_page(cluster, talk, socket=1, requests=0) as page:
        on_card(page, lambda call: "Skip it")
        reply = await finish(page, await start(page))
    assert [title_of(call) for call in page.calls] == ["Skip Ann?"]
    assert "**Ann** could not answer: it was skipped" in reply.text
    assert "Bob here." in reply.text
    assert_stored_everywhere(cluster, talk, reply)


async def test_a_skip_dialog_closes_when_the_model_speaks(
    cluster: Cluster, talk: Talk
) -> None:
    async def never(call: Call) -> None:
        await asyncio.Event().wait()

    talk.seat("Ann | alice", "Ben | bob")
    talk.admin_sets(skip_after=0.5)
    async with split_page(cluster, talk, socket=1, requests=0) as page:
        on_card(page, never)
        with talk.models.hold("alice") as hold:
            reply = await start(page)
            await reached(hold.wait_until_reached)
            await reply.wait_for(lambda _: page.calls)
        await finish(page, reply)
        async with asyncio.timeout(10):
            await page.calls[0].closed.wait()
    assert "Alice here." in reply.text and "Bob here." in reply.text


@pytest.mark.parametrize("allowed", [True, False])
async def test_a_tool_runs_only_if_the_page_at_another_replica_says_yes(
    cluster: Cluster, talk: Talk, allowed: bool
) -> None:
    talk.seat("Tim | toolie", "Ben | bob")
    with talk.host.configured({"chat.tool_permissions.enable": True}):
        async with split_page(cluster, talk, socket=1, requests=0) as page:
            page.on_call("confirmation", lambda call: allowed)
            reply = await ask(
                page,
                'Use look_up. ARGS: {"topic": "oaks"}',
                tool_ids=["garden"],
                params={"tool_approval_mode": "ask"},
            )
    (call,) = page.calls
    assert call.data["tool_call"]["name"] == "look_up"
    expected = "The almanac on oaks: 3 lines."
    refused = "Error: the user did not approve this tool call."
    assert results(reply) == [expected if allowed else refused]


# -- what the host shares --------------------------------------------------------------


@pytest.mark.parametrize("mode", MODES)
async def test_the_model_list_is_read_at_most_three_times_a_run(
    cluster: Cluster, talk: Talk, mode: str
) -> None:
    names = ("alice", "bob", "carol", "dave", "erin")
    for rounds, seats in ((1, 2), (3, 5)):
        team = [f"{name.capitalize()} | {name}" for name in names[:seats]]
        talk.seat(*team, rounds=rounds, manager_model="manager")
        before = await reached(talk.host.settled_counts)
        async with Page(talk.host, talk.account) as page:
            await ask(page, QUESTION, mode)
        counts = await reached(talk.host.settled_counts) - before
        assert 0 < counts.lookups["MODELS._refresh_cache"] <= 3
