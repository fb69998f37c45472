"""What the server's log says of a conversation: nothing of what was said."""

import json
import re
from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.conftest import FUNCTION, FUNCTION_ID, FUNCTION_NAME
from tests.integration.conftest import GARDEN
from tests.integration.talk import Talk, reached
from tests.stack.behaviours import choice, with_tasks
from tests.stack.host import Json, OpenWebUI
from tests.stack.models import ModelServer
from tests.stack.page import Page
from tests.stack.prompts import fresh_results
from tests.stack.scripts import (
    Behaviour,
    Body,
    Fail,
    Script,
    Status,
    Step,
    Text,
    ToolCall,
)

MODES = ("round_robin", "manager", "council", "debate")
KEY = "sk-proj-Zx81Zx81Zx81Zx81Zx81Zx81"
MARKS = {
    "question": "MARKQUESTION",
    "persona": "MARKPERSONA",
    "reply": "MARKREPLY",
    "argument": "MARKARGUMENT",
    "error": "MARKERROR",
}
LINE = re.compile(r"^[\d-]{10} [\d:.]{8,} \| (?P<level>\w+) +\| (?P<name>[\w.]+):")


def tells(body: Body) -> Script:
    """Call a tool with marked arguments, then say something that is marked."""
    if fresh_results(body):
        return Script([Text(f"{MARKS['reply']} it is.")])
    arguments = json.dumps({"topic": MARKS["argument"]})
    return Script([ToolCall("look_up", arguments), ToolCall("breaks", index=1)])


def breaks(midway: bool) -> Behaviour:
    """Make a model whose provider quotes its key in an error."""
    message = f"{MARKS['error']}: Incorrect API key provided: {KEY}"
    status = Status(500, {"error": {"message": message}})
    begun: list[Step] = [Text(f"{MARKS['reply']} begins "), Fail(message)]
    steps = begun if midway else [status]
    return lambda _: Script(steps)


MODELS: dict[str, Behaviour] = {
    "log-tells": with_tasks(tells),
    "log-breaks": breaks(False),
    "log-midway": breaks(True),
    "log-leads": lambda _: Script([Text(choice("Ann", f"{MARKS['reply']}."))]),
}
TEAM = "\n".join(
    f"{alias} | {model} | {MARKS['persona']}"
    for alias, model in (
        ("Ann", "log-tells"),
        ("Ben", "log-breaks"),
        ("Cy", "log-midway"),
        ("Di", "alice"),
    )
)
NOBODY = f"Eve | no-such-model | {MARKS['persona']}"


def lines_of(log: str) -> Iterator[tuple[str, str, str]]:
    """The level, the logger and the text of each record, with its traceback."""
    record: list[str] = []
    level = name = ""
    for line in log.splitlines():
        if found := LINE.match(line):
            if record:
                yield level, name, "\n".join(record)
            record, level, name = [], found["level"], found["name"]
        record.append(line)
    yield level, name, "\n".join(record)


async def run_all(host: OpenWebUI, models: ModelServer, page: Page) -> str:
    """Conversations in all modes, one that cannot begin, and one API client's; gives
    what the server has logged of them."""
    for model, behaviour in MODELS.items():
        models.add(model, behaviour)
    host.models(refresh=True)
    for model in MODELS:
        host.grant_read(model, "public")
    path: Path = host.server.log_path
    before = len(path.read_bytes())
    for mode in MODES:
        extra: Json = {"team": TEAM, "rounds": 1, "manager_model": "log-leads"}
        reply = await page.ask(
            f"{FUNCTION_ID}.{mode}",
            f"{MARKS['question']}?",
            tool_ids=["garden"],
            background_tasks={"title_generation": True},
            extra=extra,
        )
        await reply.wait_idle()
        assert MARKS["reply"] in reply.text, mode
    model = f"{FUNCTION_ID}.council"
    lost = await page.send(model, "Who?", background_tasks={}, extra={"team": NOBODY})
    await lost.wait_idle()
    assert "Nobody can take part" in str(lost.error)
    await reached(lambda: models.wait_for(lambda server: server.in_flight == 0))
    return path.read_bytes()[before:].decode("utf-8", "replace")


@pytest.mark.usefixtures("garden")
async def test_nothing_that_was_said_is_logged_above_debug(talk: Talk) -> None:
    talk.admin_sets(busy_patience=0)
    async with talk.page() as page:
        log = await run_all(talk.host, talk.models, page)
    ours = [each for each in lines_of(log) if FUNCTION_ID in each[1]]
    texts = [text for _, _, text in ours]
    assert sum("conversation begins: " in text for text in texts) == len(MODES)
    assert sum("conversation ended: " in text for text in texts) == len(MODES)
    assert len(texts) == 2 * len(MODES)
    for what, mark in MARKS.items():
        assert mark not in "".join(texts), what
    # the host logs what is raised to it
    raised = [text for _, _, text in lines_of(log) if "Nobody can take part" in text]
    assert raised and MARKS["persona"] not in "".join(raised)


async def test_not_even_at_debug_is_a_key_logged(
    model_server: ModelServer, tmp_path: Path
) -> None:
    level = {"GLOBAL_LOG_LEVEL": "DEBUG"}
    url = model_server.openai_url
    with OpenWebUI.start(tmp_path / "debug", url, extra_env=level) as host:
        admin = host.sign_up_admin()
        host.install_function(FUNCTION_ID, FUNCTION_NAME, FUNCTION.read_text("utf-8"))
        wrong = GARDEN.replace("The shed is locked.", f"Your key {KEY} is wrong.")
        host.create_tool("garden", wrong)
        host.set_valves(FUNCTION_ID, {"busy_patience": 0})
        async with Page(host, admin) as page:
            log = await run_all(host, model_server, page)
    ours = [text for _, name, text in lines_of(log) if FUNCTION_ID in name]
    assert [text for text in ours if "foreign code failed" in text and "(key)" in text]
    assert KEY not in "".join(ours) and KEY[8:] not in "".join(ours)
