"""Many conversations at once on a cluster, beside as many plain chats.

    python -m benchmarks.cluster [conversations, 200 by default]

prints a table: each side asks that many questions through the balancer, spread over
three servers that share PostgreSQL and Redis. A conversation has two participants with
100 tokens each at 10 tokens/s; a plain chat has one model with 200.
"""

from __future__ import annotations

import asyncio
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator, Sequence
from contextlib import AsyncExitStack, contextmanager
from dataclasses import dataclass
from pathlib import Path

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

CONVERSATIONS = 200
PAGES = 20
"""Sockets, of ten chats each with 200 conversations."""
TOKENS = 200
"""Of one conversation, whichever side."""
IDEAL = 20.0
"""Seconds it takes to say them."""
SIDES = {
    "ours": f"{FUNCTION_ID}.round_robin",
    "native": "tokens-200-10",
}
TIMEOUT = 100.0
"""Seconds one side may take."""
READS = "MODELS._refresh_cache"


@dataclass(frozen=True, slots=True)
class State:
    """What all servers have done so far."""

    counts: Sequence[Counts]
    redis_commands: int
    cpu: dict[str, float]


@dataclass(frozen=True, slots=True)
class Load:
    """What one side's conversations cost."""

    replies: Sequence[Reply]
    seconds: float
    before: State
    after: State

    def rows(self) -> dict[str, float]:
        """The figures by name."""
        count = len(self.replies)
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
            "errors, or not ended": sum(
                bool(r.error) or not r.done for r in self.replies
            ),
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
            "socket bytes a token": sum(r.size for r in self.replies) / count / TOKENS,
        }


@contextmanager
def stack() -> Iterator[Cluster]:
    """A cluster with the function installed, and the models beside it."""
    with (
        tempfile.TemporaryDirectory(prefix="benchmarks-") as directory,
        scripted_models() as url,
        Cluster.start(Path(directory), url, NO_POLLING) as cluster,
    ):
        admin = cluster.sign_up_admin()
        first = cluster.replicas[0]
        source = FUNCTION.read_text("utf-8")
        first.install_function(FUNCTION_ID, FUNCTION_NAME, source)
        team = "P0 | tokens-100-10\nP1 | tokens-100-10"
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
        name: sum(cpu_seconds(process.pid) for process in those)
        for name, those in processes.items()
    }
    return State(counts, sum(cluster.redis.calls().values()), cpu)


def process_of(service: Service) -> subprocess.Popen[bytes]:
    """The process of a service that runs."""
    assert service.process is not None
    return service.process


async def crowd(cluster: Cluster, model: str, count: int) -> Load:
    """Ask so many questions, each as soon as the one before is taken."""
    before = await asyncio.to_thread(state, cluster)
    admin = cluster.replicas[0].admin
    async with AsyncExitStack() as opened:
        pages = [
            await opened.enter_async_context(Page(cluster.spread, admin))
            for _ in range(min(PAGES, count))
        ]
        began = time.monotonic()

        async def ask_in(page: Page, questions: int) -> list[Reply]:
            return [
                await page.send(model, "Talk.", background_tasks={})
                for _ in range(questions)
            ]

        shares = [len(range(at, count, len(pages))) for at in range(len(pages))]
        asked = await asyncio.gather(*map(ask_in, pages, shares))
        replies = [reply for some in asked for reply in some]
        waits = (reply.wait_idle(TIMEOUT) for reply in replies)
        await asyncio.gather(*waits, return_exceptions=True)
        seconds = time.monotonic() - began
    return Load(replies, seconds, before, await asyncio.to_thread(state, cluster))


def show(figures: dict[str, dict[str, float]]) -> str:
    """The sides beside each other."""
    names = next(iter(figures.values()))
    lines = [f"| | {' | '.join(figures)} |", f"|--|{'--:|' * len(figures)}"]
    for name in names:
        cells = (f"{rows[name]:,.2f}" for rows in figures.values())
        lines.append(f"| {name} | {' | '.join(cells)} |")
    return "\n".join(lines)


async def main(count: int) -> int:
    """Both sides, after a small one of each that nobody counts."""
    figures = {}
    print(f"{count} at once; at best {IDEAL:g} s each", flush=True)
    with stack() as cluster:
        for model in SIDES.values():
            await crowd(cluster, model, 3)
        for side, model in SIDES.items():
            load = await crowd(cluster, model, count)
            figures[side] = load.rows()
            print(f"{side}: {load.seconds:.1f} s", flush=True)
    print(f"\n{show(figures)}")
    return 0


if __name__ == "__main__":
    sys.exit(asyncio.run(main(int(sys.argv[1]) if sys.argv[1:] else CONVERSATIONS)))
