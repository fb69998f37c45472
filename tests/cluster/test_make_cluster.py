"""`make cluster`, as a person starts and ends it, with the page in a browser."""

import os
import re
import signal
import subprocess
import sys
from collections.abc import Iterator
from contextlib import suppress
from pathlib import Path

import pytest

from tests.cluster.services import PACKAGES, missing_programs
from tests.integration.test_demo import QUESTION, family, processes
from tests.stack.browser import Browser, missing
from tests.stack.demo import ROOT
from tests.stack.host import Api


@pytest.fixture
def running() -> Iterator["subprocess.Popen[str]"]:
    """The cluster as a process, with scripted models."""
    if missing_programs():
        missing(f"{', '.join(missing_programs())}: apt install {PACKAGES}")
    kept = {k: v for k, v in os.environ.items() if not k.startswith("OPENAI_")}
    process = subprocess.Popen(
        [sys.executable, "-m", "tests.cluster"],
        cwd=ROOT,
        env=kept,
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


def read_urls(process: "subprocess.Popen[str]") -> list[str]:
    """The addresses it prints until it says how to end it: the balancer's first."""
    assert process.stdout is not None
    found = []
    for line in process.stdout:
        found += re.findall(r"http://127\.0\.0\.1:\d+", line)
        if "Ctrl-C" in line:
            return found
    raise AssertionError("the cluster ended without printing its addresses")


@pytest.mark.skipif(not Path("/proc/self/stat").exists(), reason="reads /proc")
async def test_the_cluster_opens_ready_to_type_and_leaves_nothing_behind(
    running: "subprocess.Popen[str]", browser: Browser
) -> None:
    spread, sticky, *replicas = read_urls(running)
    assert len(replicas) == 3
    started = family(running.pid) - {running.pid}
    for url in (spread, sticky):
        page = await browser.open_as(Api(url), None)
        await page.ask(QUESTION)
        await page.wait_finished()
        await page.wait_status("Finished after")
        shown = await page.visible_reply_text()
        assert await page.reply_text_after_reload() == shown
        await page.close()
    running.send_signal(signal.SIGINT)
    assert running.wait(timeout=60) == 0
    assert not started & set(processes())
