"""Section 6: ceilings over workers, each a copy of the file, with a real Redis."""

import asyncio
import os
import signal
from collections.abc import AsyncIterator, Iterator
from contextlib import AsyncExitStack, suppress
from functools import partial
from types import SimpleNamespace
from typing import Any

import pytest
import redis.asyncio
from starlette.requests import Request

from tests.cluster.services import Redis, find_program
from tests.stack.browser import missing
from tests.stack.waiting import wait_until_async
from tests.unit.plugin import load

PREFIX = "the-hosts-prefix"
KEY = f"{PREFIX}:mmc:{{calls}}"


@pytest.fixture(scope="module")
def service() -> Iterator[Redis]:
    """A Redis of our own."""
    if find_program("redis-server") is None:
        missing("redis-server: apt install redis-server")
    with Redis() as running:
        yield running


@pytest.fixture(autouse=True)
def server(service: Redis) -> Iterator[Redis]:
    """The Redis, running and empty."""
    service.client.flushall()
    service.client.config_resetstat()
    yield service
    if service.process is None:
        service.start()


class Worker:
    """One of several processes of a host, as far as the file can tell."""

    def __init__(self, file: Any, url: str) -> None:
        self.file = file
        self.redis = redis.asyncio.from_url(url)
        app = SimpleNamespace(state=SimpleNamespace(redis=self.redis))
        self.request = Request({"type": "http", "app": app})

    def host(self, user_id: str = "Ann") -> Any:
        """The host as a run of this user sees it."""
        return self.file.Host(self.request, SimpleNamespace(id=user_id), {})

    async def begins(
        self, going: AsyncExitStack, user_id: str = "Ann", **ceilings: int
    ) -> bool:
        """Whether a conversation may begin; it goes on until the stack ends."""
        settings = self.file.Settings(**ceilings)
        run = self.file.counted_run(self.host(user_id), settings)
        with suppress(self.file.ConversationError):
            await going.enter_async_context(run)
            return True
        return False

    async def calls(self, let_in: list[str], name: str, leave: asyncio.Event) -> None:
        """Wait for the only place of a call, and have it until told to leave."""
        async with self.host().place("calls", 1, waits=True) as has_place:
            assert has_place
            let_in.append(name)
            await leave.wait()


@pytest.fixture(scope="module")
def files() -> list[Any]:
    """The file as each of two processes has it."""
    both: list[Any] = [load(f"function_mmc_{digit * 32}") for digit in "12"]
    for file in both:
        file.REDIS_KEY_PREFIX = PREFIX
    return both


@pytest.fixture
async def workers(server: Redis, files: list[Any]) -> AsyncIterator[list[Worker]]:
    """Two workers."""
    both = [Worker(file, server.url) for file in files]
    yield both
    for worker in both:
        await worker.redis.aclose()


@pytest.fixture
def brief_lease(files: list[Any], monkeypatch: pytest.MonkeyPatch) -> None:
    """Places that are free after two seconds."""
    for file in files:
        monkeypatch.setattr(file, "LEASE", 2)


# -- runs ------------------------------------------------------------------------------


async def test_only_so_many_run_whichever_worker_is_asked(
    workers: list[Worker],
) -> None:
    one, other = workers
    async with AsyncExitStack() as going:
        async with AsyncExitStack() as first:
            assert await one.begins(first, max_runs=2)
            assert await other.begins(going, "Bob", max_runs=2)
            assert not await one.begins(going, "Cat", max_runs=2)
            assert not await other.begins(going, "Cat", max_runs=2)
        assert await other.begins(going, "Cat", max_runs=2)


async def test_a_user_has_only_so_many_at_all_workers_and_others_have_theirs(
    workers: list[Worker],
) -> None:
    one, other = workers
    async with AsyncExitStack() as going:
        assert await one.begins(going, max_runs_per_user=1)
        assert not await other.begins(going, max_runs_per_user=1)
        assert await other.begins(going, "Bob", max_runs_per_user=1)


async def test_of_many_who_begin_at_once_exactly_so_many_do(
    workers: list[Worker],
) -> None:
    async with AsyncExitStack() as going:
        tries = (
            workers[at % 2].begins(going, f"user {at}", max_runs=3) for at in range(20)
        )
        assert (await asyncio.gather(*tries)).count(True) == 3


async def test_without_ceilings_redis_is_not_asked(
    workers: list[Worker], server: Redis
) -> None:
    async with AsyncExitStack() as going:
        for worker in workers:
            assert await worker.begins(going)
    assert "eval" not in server.calls()


async def test_nothing_stays_in_redis_for_long(
    workers: list[Worker], server: Redis
) -> None:
    key = f"{PREFIX}:mmc:{{runs}}"
    async with AsyncExitStack() as going:
        assert await workers[0].begins(going, max_runs=1)
        kept: Any = server.client.keys()
        assert {*kept} == {key, f"{key}:until"}
        for each in kept:
            assert 0 < server.client.ttl(each) <= 60
    assert server.client.keys() == [f"{key}:until"]


# -- calls -----------------------------------------------------------------------------


async def test_calls_of_all_workers_wait_for_each_other_in_order(
    workers: list[Worker], server: Redis
) -> None:
    let_in: list[str] = []
    leave = [asyncio.Event() for _ in range(4)]

    def is_queued(at: int) -> bool:
        return bool(server.client.zcard(KEY) > at)

    def is_let_in(at: int) -> bool:
        return len(let_in) > at

    async with asyncio.TaskGroup() as group:
        for at in range(4):
            name = f"call {at}"
            group.create_task(workers[at % 2].calls(let_in, name, leave[at]))
            queued = partial(is_queued, at)
            await wait_until_async(queued, 5, "it stands in the queue")
        for at in range(4):
            await wait_until_async(partial(is_let_in, at), 5, "it is let in")
            assert let_in == [f"call {each}" for each in range(at + 1)]
            leave[at].set()
    assert server.client.zcard(KEY) == 0


async def test_who_is_stopped_in_the_queue_keeps_nobody_waiting(
    workers: list[Worker], server: Redis
) -> None:
    let_in: list[str] = []
    leave = asyncio.Event()
    async with asyncio.TaskGroup() as group:
        group.create_task(workers[0].calls(let_in, "first", leave))
        await wait_until_async(lambda: let_in, 5, "the first is let in")
        stopped = asyncio.create_task(workers[1].calls(let_in, "stopped", leave))
        await wait_until_async(lambda: server.client.zcard(KEY) == 2, 5, "it waits")
        stopped.cancel()
        await asyncio.wait({stopped})
        assert server.client.zcard(KEY) == 1
        group.create_task(workers[1].calls(let_in, "next", leave))
        leave.set()
    assert let_in == ["first", "next"]


# -- what dies or goes away ------------------------------------------------------------


@pytest.mark.usefixtures("brief_lease")
async def test_the_place_of_a_killed_worker_is_free_when_its_lease_ends(
    workers: list[Worker], server: Redis
) -> None:
    queue = workers[0].file._QUEUE
    server.client.eval(queue, 2, KEY, f"{KEY}:until", "killed", 2)
    async with workers[1].host().place("calls", 1, waits=False) as has_place:
        assert not has_place
    async with asyncio.timeout(4), workers[1].host().place("calls", 1, waits=True):
        assert server.client.zrange(KEY, 0, -1) != ["killed"]


def lease_end(server: Redis) -> float:
    """When the only lease of a call ends, in the server's time."""
    found: Any = server.client.zrange(f"{KEY}:until", 0, -1, withscores=True)
    return float(found[0][1])


@pytest.mark.usefixtures("brief_lease")
async def test_a_place_is_kept_for_longer_than_its_lease(
    workers: list[Worker], server: Redis
) -> None:
    async with workers[0].host().place("calls", 1, waits=False):
        began = lease_end(server)
        await wait_until_async(
            lambda: lease_end(server) > began + 2, 5, "it outlives its first end"
        )
        async with workers[1].host().place("calls", 1, waits=False) as has_place:
            assert not has_place


@pytest.mark.usefixtures("brief_lease")
async def test_a_redis_that_lost_its_data_learns_who_has_a_place(
    workers: list[Worker], server: Redis
) -> None:
    async with workers[0].host().place("calls", 1, waits=False):
        server.client.flushall()
        await wait_until_async(lambda: server.client.zcard(KEY), 5, "it is there again")
        async with workers[1].host().place("calls", 1, waits=False) as has_place:
            assert not has_place


async def test_without_redis_each_worker_counts_its_own(
    workers: list[Worker], server: Redis
) -> None:
    server.stop()
    await counts_its_own(workers)


async def test_a_redis_that_hangs_holds_nobody_up(
    workers: list[Worker], server: Redis, monkeypatch: pytest.MonkeyPatch
) -> None:
    for worker in workers:
        monkeypatch.setattr(worker.file, "_REDIS_TIMEOUT", 0.2)
    assert server.process
    os.kill(server.process.pid, signal.SIGSTOP)
    try:
        async with asyncio.timeout(4):
            await counts_its_own(workers)
    finally:
        os.kill(server.process.pid, signal.SIGCONT)


async def counts_its_own(workers: list[Worker]) -> None:
    """Each worker lets one conversation begin, and so many calls as are allowed."""
    async with AsyncExitStack() as going:
        for worker in workers:
            assert await worker.begins(going, max_runs=1)
            assert not await worker.begins(going, max_runs=1)
            call = worker.host().place("calls", 1, waits=True)
            assert await going.enter_async_context(call)
