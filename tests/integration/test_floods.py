"""A model that never ends: its turn does, and the server's memory stays as it was."""

import json
import os
from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.integration.talk import ROUND_ROBIN, Talk, finish, headings
from tests.stack.host import OpenWebUI
from tests.stack.scripts import Raw, Script, Step, Text

MB = 2**20
OFFERED = 1024 * MB
"""Bytes that an endless model would send."""
WAITED_OUT = int(os.environ.get("FLOOD_MB", "32")) * MB
"""Bytes of comments that are waited out; 1024 for the figure in the documentation."""
MOST_MEMORY = 200 * MB


def event(**delta: str) -> bytes:
    """A chunk of a stream."""
    return f"data: {json.dumps({'choices': [{'delta': delta}]})}\n\n".encode()


WORDS = "and on and on it goes " * 40
FLOODS = {
    "text": event(content=WORDS),
    "one event": b'data: "' + b"x" * 60_000 + b'",\n',
    "reasoning": event(reasoning_content=WORDS),
    "tags": event(content="<think>" + WORDS),
}


def peak_memory(host: OpenWebUI) -> Iterator[int]:
    """The server's memory now, then the most it has had since, in bytes."""
    process = Path(f"/proc/{host.server.process.pid}")
    (process / "clear_refs").write_text("5")  # the most so far is what it is now
    while True:
        lines = (process / "status").read_text().splitlines()
        (line,) = (line for line in lines if line.startswith("VmHWM"))
        yield int(line.split()[1]) * 1024


def pours(piece: bytes, size: int, *then: Step) -> Script:
    """So many bytes of this as fast as can be, and what comes then."""
    return Script([*[Raw(piece)] * (size // len(piece)), *then])


@pytest.mark.parametrize("kind", FLOODS)
async def test_a_model_that_never_ends_loses_its_turn(
    talk: Talk, host: OpenWebUI, kind: str
) -> None:
    model = f"pours-{kind.replace(' ', '-')}"
    talk.add_model(model, lambda body: pours(FLOODS[kind], OFFERED))
    talk.seat("Ann | alice", f"Ben | {model}", "Cy | carol")
    memory = peak_memory(host)
    before = next(memory)
    async with talk.page() as page:
        reply = await page.send(ROUND_ROBIN, "Which tree?", background_tasks={})
        await reply.wait_done(30)
        await talk.freed(model)
        await finish(page, reply)
    grown = next(memory) - before
    print(f"{kind}: {grown / MB:.0f} MB more memory at most")
    assert grown < MOST_MEMORY
    assert headings(reply) == ["🔵 Ann", "🔴 Ben", "🟢 Cy"]
    reason = (
        "one piece of its answer" if kind == "one event" else "it said over 500,000"
    )
    assert f": {reason}" in reply.text and "**Ben** " in reply.text
    assert "Carol here." in reply.text and len(reply.text) < 600_000


async def test_comments_without_end_cost_no_memory(talk: Talk, host: OpenWebUI) -> None:
    comment = b": " + b"." * 4000 + b"\n\n"
    said = Text("Here I am.")
    talk.add_model("mumbles", lambda body: pours(comment, WAITED_OUT, said))
    talk.seat("Ann | mumbles")
    memory = peak_memory(host)
    before = next(memory)
    async with talk.page() as page:
        reply = await page.send(ROUND_ROBIN, "Which tree?", background_tasks={})
        await reply.wait_done(150)
        await finish(page, reply)
    grown = next(memory) - before
    print(f"comments: {grown / MB:.0f} MB more memory at most")
    assert "Here I am." in reply.text
    assert grown < MOST_MEMORY
