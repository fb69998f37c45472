"""`make demo`: Open WebUI with the conversation installed, ready to type into.

With `OPENAI_API_BASE_URL` and `OPENAI_API_KEY` set, the models are theirs; otherwise
scripted ones. Everything runs on this machine only, on `PORT` or 8080 if it is
free, and ends with Ctrl-C.
"""

import json
import os
import shutil
import signal
import socket
import tempfile
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager, suppress
from pathlib import Path
from typing import NoReturn

import httpx

from release.dist import function
from tests.stack.demo_models import SAID
from tests.stack.host import Json, OpenWebUI, free_port
from tests.stack.models import ModelServer

ROOT = Path(__file__).parent.parent.parent
FUNCTION_ID = "multi_model_conversation"
MODEL = f"{FUNCTION_ID}.round_robin"
SPEAKERS = ("ada", "grace", "alan")
COUNCIL = "council-of-four"
FOUR = (*SPEAKERS, "edsger")
MODERATOR = "moderator"
ENDINGS = (signal.SIGINT, signal.SIGTERM, signal.SIGHUP)
TOOL_ID = "almanac"


def preferred_port() -> int:
    """`PORT`, or the usual one; any free one if somebody has it."""
    port = int(os.environ.get("PORT") or 8080)
    with socket.socket() as probe, suppress(OSError):
        probe.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        probe.bind(("127.0.0.1", port))
        return port
    return free_port()


@contextmanager
def data_directory() -> Iterator[Path]:
    """A fresh directory under `.demo`, removed at the end."""
    parent = ROOT / ".demo"
    parent.mkdir(exist_ok=True)
    path = Path(tempfile.mkdtemp(dir=parent))
    try:
        yield path
    finally:
        shutil.rmtree(path, ignore_errors=True)


def provider(stack: ExitStack) -> tuple[str, str]:
    """URL and key of the models: the user's own, or a scripted server's."""
    url = os.environ.get("OPENAI_API_BASE_URL", "")
    key = os.environ.get("OPENAI_API_KEY", "")
    if url and key:
        return url, key
    server = stack.enter_context(ModelServer(models=(*FOUR, MODERATOR)))
    return server.openai_url, "not-a-key"


def start_host(stack: ExitStack) -> OpenWebUI:
    """Open WebUI without a login, on its own data."""
    url, key = provider(stack)
    environment = {
        "PORT": str(preferred_port()),
        "WEBUI_AUTH": "False",
        "OPENAI_API_KEY": key,
        "RAG_OPENAI_API_KEY": key,
        "DEFAULT_MODELS": MODEL,
    }
    data_dir = stack.enter_context(data_directory())
    return stack.enter_context(
        OpenWebUI.start(data_dir, url, extra_env=environment, probe=False)
    )


def presets() -> list[Json]:
    """What `docs/teams` holds to import: the four models' icons, and teams."""
    files = sorted((ROOT / "docs" / "teams").glob("*.json"))
    return [model for file in files for model in json.loads(file.read_text("utf-8"))]


def furnish(host: OpenWebUI) -> None:
    """Install the function, a tool that is switched on for it, and teams."""
    host.sign_in_without_login()
    ours = function()
    host.install_function(ours["id"], ours["name"], ours["content"], ours["meta"])
    host.create_tool(TOOL_ID, SAID["tool"], "Almanac")
    meta = {"toolIds": [TOOL_ID], "capabilities": {"builtin_tools": False}}
    models = presets()
    host.import_models([{**each, "meta": each["meta"] | meta} for each in models])
    listed = {model["id"] for model in host.models()}
    if listed.issuperset((*FOUR, MODERATOR)):
        valves = {"participants": list(SPEAKERS), "manager_model": MODERATOR}
        host.set_valves(FUNCTION_ID, valves)
        council = {
            "id": COUNCIL,
            "name": "Council of four",
            "base_model_id": f"{FUNCTION_ID}.council",
            "meta": meta,
            "params": {"custom_params": {"participants": list(FOUR)}},
        }
        host.create_model(council)


def interrupt(number: int, frame: object) -> NoReturn:
    """End once, however often the signal comes."""
    for ignored in ENDINGS:
        signal.signal(ignored, signal.SIG_IGN)
    raise KeyboardInterrupt


def main() -> None:
    """Start everything, say where, and wait until told to end or the server has."""
    for number in ENDINGS:
        signal.signal(number, interrupt)
    with suppress(KeyboardInterrupt), ExitStack() as stack:
        print("Starting Open WebUI ...", flush=True)
        host = start_host(stack)
        try:
            furnish(host)
        except httpx.HTTPStatusError:
            print(host.log_tail())
            raise
        print(f"\n  {host.url}\n\nCtrl-C ends it.", flush=True)
        host.server.process.wait()
        print(host.log_tail())
    print("\nStopped.")


if __name__ == "__main__":
    main()
