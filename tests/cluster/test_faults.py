"""A replica, Redis or PostgreSQL that goes away in mid-run costs at most one turn."""

from collections.abc import Iterator

import pytest

from tests.cluster.cluster import Cluster, SplitPage
from tests.cluster.scene import (
    TOKENS,
    seat_three,
    split_page,
    start,
    stored_everywhere,
    turns_in,
)
from tests.conftest import FUNCTION, FUNCTION_ID, FUNCTION_NAME
from tests.integration.talk import (
    Talk,
    ask,
    finish,
    headings,
    in_rounds,
    last_status,
    reached,
)
from tests.stack.host import Json
from tests.stack.page import Page, Reply
from tests.stack.structured_output import get_output_text
from tests.stack.waiting import wait_until_async

GONE = 4.0
"""Seconds the database is away."""


def text_of(stored: Json) -> str:
    """What the page shows of a stored message after a reload."""
    return get_output_text(stored.get("output")) or stored.get("content") or ""


async def in_the_first_turn(reply: Reply) -> None:
    """Wait until the first of three speaks."""
    await reply.wait_for(lambda r: len(r.text) > TOKENS)


# -- a killed replica ------------------------------------------------------------------


@pytest.fixture
def revived(cluster: Cluster) -> Iterator[None]:
    """The second replica is there again for the next test."""
    yield
    cluster.revive(1)


@pytest.mark.usefixtures("revived")
async def test_a_killed_replica_costs_at_most_the_running_turn(
    cluster: Cluster, talk: Talk
) -> None:
    talk.seat("Ann | alice", "Ben | bob", "Cy | carol")
    at = cluster.replicas
    async with SplitPage(at[0], at[1], talk.account) as first:
        with talk.models.hold("bob", after=3) as hold:
            reply = await start(first)
            await reached(hold.wait_until_reached)
            await reply.wait_for(lambda r: "Bob here. On" in r.text)
            cluster.replicas[1].kill()
        async with split_page(cluster, talk, socket=2, requests=2) as second:
            chat = await second.open(reply.chat.id or "")
            again = second.reply(chat.current_id or "")
            assert "Alice here." in again.text
            await second.stop(again)
            await wait_until_async(
                lambda: "Alice here." in text_of(stored(cluster, talk, reply)),
                5,
                "the finished turn is stored",
            )
            next_one = await ask(second, "And maples?", chat=chat)
    assert headings(next_one)[0] == "🔵 Ann"
    assert "Alice here." in str(talk.sent("alice", 1))
    assert "the server went down" in text_of(stored(cluster, talk, reply))


def stored(cluster: Cluster, talk: Talk, reply: Reply) -> Json:
    """The message as a replica that lives gives it."""
    return cluster.replicas[2].stored(talk.account, reply.chat.id or "", reply.id)


# -- Redis -----------------------------------------------------------------------------


def turns_stored(cluster: Cluster, talk: Talk, reply: Reply) -> list[int]:
    """How many whole turns each replica gives."""
    return [turns_in(text_of(one)) for one in stored_everywhere(cluster, talk, reply)]


@pytest.mark.parametrize("with_data", [True, False])
async def test_redis_may_restart_in_mid_run(
    cluster: Cluster, talk: Talk, with_data: bool
) -> None:
    seat_three(talk, pace=100)
    redis = cluster.redis
    async with split_page(cluster, talk, socket=1, requests=0) as page:
        reply = await start(page)
        await in_the_first_turn(reply)
        restart = redis.restart_with_data if with_data else redis.restart
        await reached(lambda: restart(0.5))
        await wait_until_async(
            lambda: turns_stored(cluster, talk, reply) == [3, 3, 3],
            TOKENS / 100 * 3 + 15,
            "the whole text is stored and read through every replica",
        )
    assert "could not answer" not in text_of(stored(cluster, talk, reply))
    async with split_page(cluster, talk, socket=2, requests=1) as later:
        assert turns_in((await ask(later, "And maples?")).text) == 3


# -- PostgreSQL ------------------------------------------------------------------------


@pytest.mark.parametrize("seconds", [0.0, GONE])
async def test_postgresql_may_be_away_in_mid_run(
    cluster: Cluster, talk: Talk, seconds: float
) -> None:
    seat_three(talk, pace=100)
    async with split_page(cluster, talk, socket=1, requests=0) as page:
        reply = await start(page)
        await in_the_first_turn(reply)
        await reached(lambda: cluster.postgresql.restart(seconds))
        # the host may have ended the socket: a page then reads the chat again
        await wait_until_async(
            lambda: turns_stored(cluster, talk, reply) == [3, 3, 3],
            TOKENS / 100 * 3 + 20,
            "the whole text is stored and read through every replica",
        )
    shown = str(stored(cluster, talk, reply))
    for secret in (str(cluster.postgresql.port), "127.0.0.1", "psycopg", "sqlalche"):
        assert secret not in shown


# -- what is changed meanwhile ---------------------------------------------------------


async def statuses_of_new_runs(cluster: Cluster, talk: Talk) -> list[str]:
    """The last status of a run on each replica."""
    found = []
    for replica in cluster.replicas:
        async with Page(replica, talk.account) as page:
            found.append(last_status(await ask(page, "And maples?")))
    return found


@pytest.fixture
def source(cluster: Cluster) -> Iterator[str]:
    """The function's source, which is installed again at the end."""
    text = FUNCTION.read_text("utf-8")
    yield text
    update(cluster, text)


def update(cluster: Cluster, text: str) -> None:
    """Save another source, as the admin's editor does."""
    form = {"id": FUNCTION_ID, "name": FUNCTION_NAME, "content": text, "meta": {}}
    path = f"/api/v1/functions/id/{FUNCTION_ID}/update"
    cluster.replicas[2].request("POST", path, form)


async def test_an_update_in_mid_run_is_for_the_next_run_on_every_replica(
    cluster: Cluster, talk: Talk, source: str
) -> None:
    talk.seat("Ann | alice", "Ben | bob", "Cy | carol")
    changed = source.replace("Finished after", "Through after")
    assert changed != source
    with talk.models.hold("bob", after=3) as hold:
        async with split_page(cluster, talk, socket=1, requests=0) as page:
            reply = await start(page)
            await reached(hold.wait_until_reached)
            await reached(lambda: update(cluster, changed))
            hold.release()
            await finish(page, reply)
    assert headings(reply) == ["🔵 Ann", "🔴 Ben", "🟢 Cy"]
    assert last_status(reply).startswith("Finished after 1 round")
    for status in await statuses_of_new_runs(cluster, talk):
        assert status.startswith("Through after 1 round")


async def test_valves_changed_in_mid_run_are_for_the_next_run_on_every_replica(
    cluster: Cluster, talk: Talk
) -> None:
    talk.seat("Ann | alice", "Ben | bob", rounds=2)
    with talk.models.hold("bob", after=3) as hold:
        async with split_page(cluster, talk, socket=1, requests=0) as page:
            reply = await start(page)
            await reached(hold.wait_until_reached)
            await reached(lambda: talk.seat("Cy | carol", "Ben | bob"))
            await reached(lambda: talk.admin_sets(max_rounds=1))
            hold.release()
            await finish(page, reply)
    assert headings(reply) == in_rounds(2, "🔵 Ann", "🔴 Ben")
    for replica in cluster.replicas:
        async with Page(replica, talk.account) as page:
            later = await ask(page, "And maples?")
            assert headings(later) == ["🔵 Cy", "🔴 Ben"]
