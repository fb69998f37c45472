"""Which Open WebUI the tests run against, and what only a later one can do."""

import os
import re
import sys
from functools import cache
from importlib import metadata
from pathlib import Path

import pytest


def program() -> Path:
    """The `open-webui` that is started: ours, or that of another version."""
    installed = Path(sys.executable).parent / "open-webui"
    return Path(os.environ.get("MMC_OPEN_WEBUI", installed))


def version_key(version: str) -> list[int]:
    """Sorts 0.9 before 0.12."""
    return [int(part) for part in re.findall(r"\d+", version)]


@cache
def server_version() -> str:
    """The version of what is started."""
    environment = program().parents[1]
    paths = [str(path) for path in environment.glob("lib/python*/site-packages")]
    found = metadata.distributions(name="open-webui", path=paths)
    return next(iter(found)).version


def from_version(version: str, why: str) -> pytest.MarkDecorator:
    """A test of what an older server cannot do, as docs/compatibility.md says.

    `why` names what is missing there.
    """
    is_older = version_key(server_version()) < version_key(version)
    return pytest.mark.skipif(is_older, reason=f"{why} from {version}")


# What docs/compatibility.md lists under "What is reduced where".
REPLACES = from_version("0.11.1", "items are put between others and replaced")
SMALL_EVENTS = from_version("0.11.1", "the page is sent what is new")
RELOADS = from_version("0.11.1", "a page that is reloaded gets what streams")
APPROVES = from_version("0.11.1", "a chat can be set to ask before a tool runs")
PREFERS_THE_CHATS = from_version("0.11.1", "a request's parameters go before a model's")
LONG_LINES = from_version("0.11.1", "a line of a reply may be longer than 64 kB")
ENDS_ITEMS = from_version("0.11.4", "a Stop marks what was cut off")
CARDS = from_version("0.12.0", "a card asks above the input and is taken back")
SHARES = from_version("0.12.0", "a chat is shared for others to write in it")
KEEPS_BOTH = from_version("0.12.0", "of two writes to a chat at once both are kept")
PASSES_RETRY_AFTER = from_version("0.12.0", "a function is told `Retry-After`")
TELLS_TASKS = from_version("0.12.1", "a temporary chat's reply is shown to its tasks")
