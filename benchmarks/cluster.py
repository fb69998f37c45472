"""Many conversations at once on a cluster, beside as many plain chats.

    python -m benchmarks.cluster [conversations [tokens [tokens a second [seconds]]]]

prints a table: each side asks that many questions (200) within so many seconds (30)
through the balancer, spread over three servers that share PostgreSQL and Redis. A
conversation has two participants with a turn each (60 tokens at 2 tokens/s); a plain
chat has one model that says as much.
"""

from __future__ import annotations

import asyncio
import os
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator, Sequence
from contextlib import AsyncExitStack, contextmanager
from dataclasses import dataclass
from pathlib import Path

import httpx
import socketio

from benchmarks.measure import (
    NO_POLLING,
    cpu_seconds,
    percentile,
    scripted_models,
)
from tests.cluster.cluster import Cluster
from tests.cluster.services import Service
from tests.conftest import FUNCTION, FUNCTION_ID, FUNCTION_NAME
from tests.stack.host import Counts
from tests.stack.page import Page, Reply

PAGES = 20
"""Sockets at most."""
TIMEOUT = 100.0
"""Seconds one side may take longer than at best."""
READS = "MODELS._refresh_cache"
REFUSALS = (httpx.HTTPError, socketio.exceptions.SocketIOError)
"""What a question raises that does not get through."""
POOL = {"DATABASE_POOL_SIZE": "20", "DATABASE_POOL_MAX_OVERFLOW": "10"}
"""As docs/scaling.md advises."""


@dataclass(frozen=True, slots=True)
class Size:
    """How much is asked for."""

    conversations: int = 200
    tokens: int = 60
    pace: int = 2
    spread: int = 30  # s in which they begin

    @property
    def member(self) -> str:
        """The model of each of two participants."""
        return f"tokens-{self.tokens}-{self.pace}"

    @property
    def single(self) -> str:
        """The model of a plain chat, which says as much as both."""
        return f"tokens-{2 * self.tokens}-{self.pace}"

    @property
    def sides(self) -> dict[str, str]:
        """Whom each side asks."""
        return {"ours": f"{FUNCTION_ID}.round_robin", "native": self.single}

    @property
    def seconds(self) -> float:
        """How long a conversation takes at best."""
        return 2 * self.tokens / self.pace

    def describe(self) -> str:
        """For the title."""
        said = f"{2 * self.tokens} tokens each at {self.pace} tokens/s"
        asked = f"{self.conversations} asked in {self.spread} s"
        return f"{asked}, {said}: {self.seconds:g} s each at best"


@dataclass(frozen=True, slots=True)
class State:
    """What all servers have done so far."""

    counts: Sequence[Counts]
    redis_commands: int
    cpu: dict[str, float]


@dataclass(frozen=True, slots=True)
class Load:
    """What one side's conversations cost."""

    count: int
    replies: Sequence[Reply]
    lost: Sequence[str]  # questions and sockets, and why
    seconds: float
    before: State
    after: State

    def rows(self, tokens: int) -> dict[str, float]:
        """The figures by name, of conversations of so many tokens."""
        count = self.count
        ended = [reply for reply in self.replies if reply.done and not reply.error]
        counts = [
            later - earlier
            for later, earlier in zip(
                self.after.counts, self.before.counts, strict=True
            )
        ]
        ends = [
            reply.done_at - reply.asked_at for reply in self.replies if reply.done_at
        ]
        waits = [
            reply.first_text_at - reply.asked_at
            for reply in self.replies
            if reply.first_text_at
        ]
        reads = sum(one.lookups.get(READS, 0) for one in counts)
        inside = sum(one.inside.get(READS, 0) for one in counts)
        statements = sum(sum(one.sql.values()) for one in counts)
        commands = self.after.redis_commands - self.before.redis_commands
        spent = {
            f"CPU of {name}, s": self.after.cpu[name] - self.before.cpu[name]
            for name in self.after.cpu
        }
        return {
            "errors, or not ended": count - len(ended),
            "sockets lost": sum(each.startswith("a socket") for each in self.lost),
            "all ended after, s": self.seconds,
            "median conversation, s": percentile(ends, 0.5) if ends else 0.0,
            "first character, median, s": percentile(waits, 0.5) if waits else 0.0,
            "first character, p99, s": percentile(waits, 0.99) if waits else 0.0,
            **spent,
            "SQL statements each": statements / count,
            "Redis commands each": commands / count,
            "reads of the model list each, the file's": reads / count,
            "reads of the model list each, in the host's calls": inside / count,
            "events each": sum(len(reply.events) for reply in self.replies) / count,
            "socket bytes a token": sum(r.size for r in self.replies) / count / tokens,
        }


@contextmanager
def stack(size: Size) -> Iterator[Cluster]:
    """A cluster with the function installed, and the models beside it."""
    with (
        tempfile.TemporaryDirectory(prefix="benchmarks-") as directory,
        scripted_models((size.member, size.single)) as url,
        Cluster.start(Path(directory), url, NO_POLLING | POOL) as cluster,
    ):
        admin = cluster.sign_up_admin()
        first = cluster.replicas[0]
        source = FUNCTION.read_text("utf-8")
        first.install_function(FUNCTION_ID, FUNCTION_NAME, source)
        team = f"P0 | {size.member}\nP1 | {size.member}"
        first.set_user_valves(admin, FUNCTION_ID, {"team": team, "rounds": 1})
        yield cluster


def state(cluster: Cluster) -> State:
    """What has been done so far, once the servers are quiet."""
    processes = {
        "the three servers": [one.server.process for one in cluster.replicas],
        "PostgreSQL": [process_of(cluster.postgresql)],
        "Redis": [process_of(cluster.redis)],
        "nginx": [process_of(cluster.nginx)],
    }
    counts = [replica.settled_counts() for replica in cluster.replicas]
    cpu = {
        name: sum(cpu_seconds(one.pid) + ended_seconds(one.pid) for one in those)
        for name, those in processes.items()
    }
    cpu["the pages, all in one process"] = time.process_time()
    return State(counts, sum(cluster.redis.calls().values()), cpu)


def ended_seconds(pid: int) -> float:
    """CPU of a process's children that have ended: PostgreSQL has one a connection."""
    fields = Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()
    return (int(fields[13]) + int(fields[14])) / os.sysconf("SC_CLK_TCK")


def process_of(service: Service) -> subprocess.Popen[bytes]:
    """The process of a service that runs."""
    assert service.process is not None
    return service.process


async def warm_up(cluster: Cluster, model: str) -> None:
    """Let every server begin to answer."""
    for replica in cluster.replicas:
        async with Page(replica, replica.admin) as page:
            reply = await page.send(model, "Talk.", background_tasks={})
            await reply.wait_for(lambda one: one.text)
            await page.stop(reply)
            await reply.wait_idle()


async def crowd(cluster: Cluster, model: str, size: Size) -> Load:
    """Ask all questions, spread over their time."""
    count = size.conversations
    before = await asyncio.to_thread(state, cluster)
    admin = cluster.replicas[0].admin
    async with AsyncExitStack() as opened:
        pages = [
            await opened.enter_async_context(Page(cluster.spread, admin))
            for _ in range(min(PAGES, count))
        ]
        began = time.monotonic()

        replies: list[Reply] = []
        lost: list[str] = []

        async def ask_in(page: Page, questions: Sequence[int]) -> None:
            for number in questions:
                due = began + number * size.spread / count
                await asyncio.sleep(due - time.monotonic())
                try:
                    reply = await page.send(model, "Talk.", background_tasks={})
                    replies.append(reply)
                except REFUSALS as error:
                    lost.append(f"a question: {error!r}")

        shares = [range(at, count, len(pages)) for at in range(len(pages))]
        await asyncio.gather(*map(ask_in, pages, shares))
        waits = (reply.wait_idle(size.seconds + TIMEOUT) for reply in replies)
        await asyncio.gather(*waits, return_exceptions=True)
        seconds = time.monotonic() - began
        lost += [f"a socket: {reason}" for page in pages for reason in page.lost]
    after = await asyncio.to_thread(state, cluster)
    return Load(count, replies, lost, seconds, before, after)


def show(figures: dict[str, dict[str, float]]) -> str:
    """The sides beside each other."""
    names = next(iter(figures.values()))
    lines = [f"| | {' | '.join(figures)} |", f"|--|{'--:|' * len(figures)}"]
    for name in names:
        cells = (f"{rows[name]:,.2f}" for rows in figures.values())
        lines.append(f"| {name} | {' | '.join(cells)} |")
    return "\n".join(lines)


async def main(size: Size) -> int:
    """Both sides, after a word or two of each that nobody counts."""
    figures = {}
    print(size.describe(), flush=True)
    with stack(size) as cluster:
        for model in size.sides.values():
            await warm_up(cluster, model)
        for side, model in size.sides.items():
            load = await crowd(cluster, model, size)
            figures[side] = load.rows(2 * size.tokens)
            print(f"{side}: {load.seconds:.1f} s", *load.lost, sep="\n", flush=True)
    print(f"\n{show(figures)}")
    return 0


if __name__ == "__main__":
    sys.exit(asyncio.run(main(Size(*map(int, sys.argv[1:])))))
