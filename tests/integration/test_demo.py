"""`make demo`, as a person starts, uses and ends it."""

import os
import re
import signal
import socket
import subprocess
import sys
from collections.abc import Iterator
from contextlib import suppress
from pathlib import Path

import pytest

from tests.integration.talk import in_rounds
from tests.stack.browser import Browser
from tests.stack.demo import COUNCIL, ROOT
from tests.stack.demo_council import BREAKS_OFF
from tests.stack.host import Api, free_port
from tests.versions import REPLACES

QUESTION = "Should our small team rewrite the old billing system?"


def processes() -> dict[int, tuple[int, int]]:
    """Every process of this machine: its parent and its session."""
    found: dict[int, tuple[int, int]] = {}
    for entry in Path("/proc").iterdir():
        with suppress(OSError, ValueError):
            stat = (entry / "stat").read_text().rpartition(")")[2].split()
            if stat[0] != "Z":
                found[int(entry.name)] = (int(stat[1]), int(stat[3]))
    return found


def family(ancestor: int) -> set[int]:
    """A process and everything that descends from it."""
    running = processes()
    found = {ancestor}
    while more := {p for p, (parent, _) in running.items() if parent in found} - found:
        found |= more
    return found


@pytest.fixture
def demo() -> Iterator[subprocess.Popen[str]]:
    """The demo as a process, with scripted models, on a port of its own."""
    kept = {k: v for k, v in os.environ.items() if not k.startswith("OPENAI_")}
    process = subprocess.Popen(
        [sys.executable, "-m", "tests.stack.demo"],
        cwd=ROOT,
        env={**kept, "PORT": str(free_port())},
        stdout=subprocess.PIPE,
        text=True,
    )
    try:
        yield process
    finally:
        for pid in family(process.pid):
            with suppress(ProcessLookupError):
                os.kill(pid, signal.SIGKILL)
        process.communicate()


def read_url(demo: subprocess.Popen[str]) -> str:
    """The address it prints when it is ready."""
    assert demo.stdout is not None
    for line in demo.stdout:
        if found := re.search(r"http://127\.0\.0\.1:(\d+)", line):
            return found[0]
    raise AssertionError("the demo ended without printing an address")


async def ask(browser: Browser, url: str, status: str, model: str | None = None) -> str:
    """Type the question into a new chat; gives the whole reply."""
    page = await browser.open_as(Api(url), None, model)
    try:
        await page.ask(QUESTION)
        await page.wait_finished()
        await page.wait_status(status)
        await page.wait_text("View Result from look_up")
        return await page.visible_reply_text()
    finally:
        await page.close()


@pytest.mark.skipif(not Path("/proc/self/stat").exists(), reason="reads /proc")
@REPLACES
async def test_the_demo_opens_ready_to_type_and_leaves_nothing_behind(
    demo: subprocess.Popen[str], browser: Browser
) -> None:
    url = read_url(demo)
    everybody = ["Ada", "Grace", "Alan"]
    shown = await ask(browser, url, "Finished after 2 rounds · 6 turns")
    names = in_rounds(2, *everybody)
    assert re.findall(r"[🔵🔴🟢🟠] (.+)", shown) == names
    assert shown.count("Thought for") == 2
    assert shown.count("View Result from look_up") == 1
    assert "⚠️" not in shown

    council = await ask(browser, url, "Chaired by Grace", COUNCIL)
    lines = re.findall(r"[🔵🔴🟢🟠] (\w+) · (conclusion|rank \d|not ranked)", council)
    assert lines[0] == ("Grace", "conclusion")
    assert sorted(lines[1:]) == [  # on the page as they began to speak
        *(("Ada", "rank 3"), ("Alan", "rank 2"), ("Edsger", "not ranked")),
        ("Grace", "rank 1"),
    ]
    assert council.count("Thought for") == 1
    assert council.count("View Result from look_up") == 1
    reason = BREAKS_OFF.rstrip(".")
    outcome = f"3 of 4 answered · Edsger failed: {reason} · chaired by Grace"
    _, conclusion = council.split(outcome)
    assert QUESTION in conclusion.split("Ranking")[0]
    assert "Grace and Alan agree" in conclusion
    assert "Ada has another view" in conclusion

    of_the_demo = family(demo.pid)
    running = processes()
    sessions = {running[pid][1] for pid in of_the_demo} - {os.getsid(0)}
    data = {Path(os.readlink(f"/proc/{pid}/cwd")) for pid in of_the_demo} - {ROOT}
    assert sessions and data, "the server has a session and a directory of its own"
    demo.send_signal(signal.SIGINT)
    rest, _ = demo.communicate(timeout=30)
    assert (demo.returncode, rest.split()[-1]) == (0, "Stopped.")
    left = processes()
    assert not of_the_demo & left.keys()
    assert not sessions & {session for _, session in left.values()}
    with socket.socket() as probe:
        assert probe.connect_ex(("127.0.0.1", int(url.rpartition(":")[2]))) != 0
    assert not any(directory.exists() for directory in data)
