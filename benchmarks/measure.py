"""A real Open WebUI, scripted models in a process of their own, and what a run costs.

Socket bytes and events are counted at the client, processor time by the kernel,
statements, look-ups and memory by the probe inside the server.
"""

from __future__ import annotations

import asyncio
import subprocess
import sys
import tempfile
import time
from collections.abc import Awaitable, Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal

from tests.conftest import FUNCTION, FUNCTION_ID, FUNCTION_NAME
from tests.stack.host import Account, Counts, OpenWebUI
from tests.stack.page import Event, Page, Reply

Side = Literal["ours", "native", "message", "replace"]

RIVALS: dict[Side, str] = {
    "message": "message_per_token",
    "replace": "replace_per_token",
}
MODELS = (
    "tokens-20-0",
    "tokens-50-200",
    "tokens-400-0",
    "tokens-400-1600",
    "tokens-100-10",
    "tokens-200-10",
    "tokens-400-50",
    "tokens-1600-50",
    "tokens-1000-50",
    "tokens-2000-50",
    "tokens-400-200",
    "tokens-800-200",
    "tokens-1600-200",
    "tokens-3200-200",
    "tokens-950-600",
    "tokens-1900-600",
    "tokens-7600-600",
    "tokens-925-600",
    "tokens-37000-600",
    "tokens-5700-2000",
    "tokens-57000-2000",
    "stamped-20-0",
    "stamped-200-0",
    "stamped-5000-0",
    "stamped-20000-0",
    "stamped-1600-200",
    "stamped-3200-200",
    "member-400-200",
    "wait-0.4",
)
SAMPLE_EVERY = 0.25
"""Seconds between two looks at a run."""
SAME_FRAME = 0.001
"""Events that arrive within so many seconds are one frame."""
IDLE_SECONDS = 5.0
"""For so long the server is watched when nobody asks."""
NO_POLLING = {"TIMER_POLL_INTERVAL": "3600", "SCHEDULER_POLL_INTERVAL": "3600"}
"""Seconds between two looks of the host at its own timers.

By default it looks every second, and that is nearly all that an idle server does.
"""
TIMEOUT = 240.0
"""Seconds one run may take."""
TOOLS = "def tool_{at}(self, place: str) -> str:\n        return place"


def toolbox(count: int = 20) -> str:
    """The source of a workspace tool with this many functions."""
    functions = "\n\n    ".join(TOOLS.format(at=at) for at in range(count))
    return f'"""\ntitle: Toolbox\n"""\n\n\nclass Tools:\n    {functions}\n'


# --- processor time -----------------------------------------------------------------


def family(pid: int) -> list[int]:
    """A process and its descendants."""
    path = Path(f"/proc/{pid}/task/{pid}/children")
    children = [int(child) for child in path.read_text().split()]
    return [pid, *(one for child in children for one in family(child))]


def cpu_seconds(pid: int) -> float:
    """Processor time of a process and its descendants so far, to the nanosecond."""
    # Linux numbers the clocks of processes so: clock_getcpuclockid(3)
    return sum(time.clock_gettime(~one << 3 | 2) for one in family(pid))


# --- what a run costs ---------------------------------------------------------------


@dataclass(frozen=True, slots=True)
class Sample:
    """How far a run has come: characters shown, bytes received, CPU spent."""

    characters: int
    bytes: int
    cpu: float


@dataclass(slots=True)
class Cost:
    """What one run cost. `cpu` is without what the server costs when idle."""

    tokens: int
    reply: Reply
    cpu: float
    seconds: float
    samples: list[Sample] = field(default_factory=list)

    @property
    def bytes_per_token(self) -> float:
        """Socket bytes."""
        return self.reply.size / self.tokens

    @property
    def events_per_token(self) -> float:
        """Events on the socket."""
        return len(self.reply.events) / self.tokens

    @property
    def cpu_per_thousand(self) -> float:
        """Seconds of the server's CPU."""
        return self.cpu / self.tokens * 1000

    @property
    def streamed(self) -> list[Sample]:
        """The samples without the host's last event, which repeats the whole text."""
        ends = (event for event in self.reply.events if is_end(event))
        most = self.reply.size - sum(event.size for event in ends)
        *before, last = self.samples
        before = [sample for sample in before if sample.bytes <= most]
        return [*before, Sample(last.characters, most, last.cpu)]

    @property
    def gaps(self) -> list[float]:
        """Seconds between two frames with text."""
        events = self.reply.events
        times = [event.at for event in events if "status" not in event.type]
        gaps = [later - at for at, later in zip(times, times[1:], strict=False)]
        return [gap for gap in gaps if gap > SAME_FRAME]


def is_end(event: Event) -> bool:
    """Whether this is the host's last word on an answer."""
    return event.type == "chat:completion" and bool(event.data.get("done"))


def percentile(values: Sequence[float], share: float) -> float:
    """The value that this share of the values does not exceed."""
    ordered = sorted(values)
    return ordered[min(int(len(ordered) * share), len(ordered) - 1)]


@dataclass(frozen=True, slots=True)
class Ask:
    """A question to measure: on which side, of which models, how often each."""

    side: Side
    models: tuple[str, ...]
    rounds: int = 1
    tokens: int = 1
    mode: str = "round_robin"


@dataclass(slots=True)
class Bench:
    """The stack, and an administrator who asks."""

    host: OpenWebUI
    idle: float = 0.0
    """CPU seconds the server takes each second when nobody asks."""

    @property
    def admin(self) -> Account:
        """Who asks."""
        return self.host.admin

    @property
    def pid(self) -> int:
        """The server's process."""
        return self.host.server.process.pid

    def page(self) -> Page:
        """A socket of the administrator's."""
        return Page(self.host, self.admin)

    def seat(self, ask: Ask, **valves: Any) -> str:
        """Get a side ready for a question; gives the model to ask."""
        if ask.side == "native":
            return ask.models[0]
        if ask.side == "ours":
            lines = [f"P{at} | {model}" for at, model in enumerate(ask.models)]
            values = {"team": "\n".join(lines), "rounds": ask.rounds, **valves}
            self.host.set_user_valves(self.admin, FUNCTION_ID, values)
            return f"{FUNCTION_ID}.{ask.mode}"
        rival = RIVALS[ask.side]
        values = {"models": ",".join(ask.models), "rounds": ask.rounds}
        self.host.set_valves(rival, values)
        return rival

    def set_interval(self, milliseconds: float | None = None) -> None:
        """Set the function's flush interval; its default by default."""
        values: dict[str, Any] = {"max_rounds": 20}
        if milliseconds is not None:
            values["flush_interval"] = milliseconds
        self.host.set_valves(FUNCTION_ID, values)

    async def settle(self) -> Counts:
        """Wait until the server is quiet, and give its counts."""
        return await asyncio.to_thread(self.host.settled_counts)

    async def measure_idle(self) -> None:
        """Take what the server costs when nobody asks."""
        await self.settle()
        before = cpu_seconds(self.pid)
        await asyncio.sleep(IDLE_SECONDS)
        self.idle = (cpu_seconds(self.pid) - before) / IDLE_SECONDS

    async def cost(
        self, page: Page, ask: Ask, tool_ids: Sequence[str] = ()
    ) -> tuple[Cost, Counts]:
        """Ask, and give what it cost, from a quiet server to a quiet server."""
        model = await asyncio.to_thread(self.seat, ask)
        before = await self.settle()
        cost = await self.run(page, model, ask.tokens, tool_ids)
        return cost, await self.settle() - before

    async def run(
        self, page: Page, model: str, tokens: int, tool_ids: Sequence[str] = ()
    ) -> Cost:
        """Ask a model, and look at the run until the server is done with it."""
        begun, cpu = time.monotonic(), cpu_seconds(self.pid)
        reply = await self.send(page, model, tool_ids)
        samples: list[Sample] = []

        def look() -> None:
            spent = cpu_seconds(self.pid) - cpu
            spent -= self.idle * (time.monotonic() - begun)
            samples.append(Sample(len(reply.text), reply.size, spent))

        await sampled(reply.wait_idle(TIMEOUT), look)
        look()
        if reply.error:
            raise RuntimeError(f"{model}: {reply.error}")
        seconds = (reply.done_at or time.monotonic()) - reply.asked_at
        return Cost(tokens, reply, samples[-1].cpu, seconds, samples)

    @staticmethod
    async def send(page: Page, model: str, tool_ids: Sequence[str] = ()) -> Reply:
        """Ask a question that needs no answer to anything else."""
        ids = list(tool_ids)
        return await page.send(model, "Talk.", background_tasks={}, tool_ids=ids)


async def sampled(work: Awaitable[object], look: Callable[[], None]) -> None:
    """Wait for `work`, calling `look` now and then."""
    task = asyncio.ensure_future(work)
    try:
        while not task.done():
            await asyncio.wait({task}, timeout=SAMPLE_EVERY)
            look()
        task.result()
    finally:
        task.cancel()


# --- the stack ------------------------------------------------------------------------


@contextmanager
def scripted_models(models: Sequence[str] = MODELS) -> Iterator[str]:
    """The scripted models in a process of their own; gives their address."""
    command = [sys.executable, "-m", "benchmarks.models", *models]
    pipe = subprocess.PIPE
    with subprocess.Popen(command, stdin=pipe, stdout=pipe, text=True) as process:
        try:
            assert process.stdout is not None
            yield process.stdout.readline().strip()
        finally:
            process.terminate()


def install_rivals(host: OpenWebUI) -> None:
    """Add the two rivals."""
    for name in RIVALS.values():
        path = Path(__file__).parent / "rivals" / f"{name}.py"
        host.install_function(name, name, path.read_text("utf-8"))


@contextmanager
def stack() -> Iterator[Bench]:
    """Everything that rows on a real server need, and its end."""
    with (
        tempfile.TemporaryDirectory(prefix="benchmarks-") as directory,
        scripted_models() as url,
        OpenWebUI.start(Path(directory), url, extra_env=NO_POLLING) as host,
    ):
        host.sign_up_admin()
        source = FUNCTION.read_text("utf-8")
        host.install_function(FUNCTION_ID, FUNCTION_NAME, source)
        install_rivals(host)
        host.create_tool("toolbox", toolbox())
        bench = Bench(host)
        bench.set_interval()
        yield bench
