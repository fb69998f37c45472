"""One account at one page, with the valves a test gives it."""

import asyncio
import inspect
import json
import sqlite3
from collections.abc import AsyncIterator, Callable, Iterator
from contextlib import asynccontextmanager, closing, contextmanager
from pathlib import Path
from typing import Any, Unpack

from tests.conftest import FUNCTION_ID
from tests.stack.host import Account, Json, OpenWebUI
from tests.stack.models import ModelServer, Seen
from tests.stack.page import Asking, Call, Page, Reply, assert_same_text, error_text
from tests.stack.scripts import Behaviour

ROUND_ROBIN = f"{FUNCTION_ID}.round_robin"
MANAGER = f"{FUNCTION_ID}.manager"


class Talk:
    """What most tests need: valves, a question, and what came of it."""

    def __init__(self, host: OpenWebUI, models: ModelServer, account: Account):
        self.host = host
        self.models = models
        self.account = account
        self.standing: Json = {}
        """What the administrator has set in every test of a module."""

    # -- before ----------------------------------------------------------------------

    def seat(self, *lines: str, account: Account | None = None, **valves: Any) -> None:
        """Set the user's valves whole: these lines are the team, one round."""
        values = {
            "rounds": 1,
            **({"team": "\n".join(lines)} if lines else {}),
            **valves,
        }
        self.host.set_user_valves(account or self.account, FUNCTION_ID, values)

    def admin_sets(self, **valves: Any) -> None:
        """Set the administrator's valves whole; the next test finds them unset."""
        self.host.set_valves(FUNCTION_ID, {**self.standing, **valves})

    def add_model(self, model_id: str, behaviour: Behaviour | None = None) -> None:
        """One more scripted model, for everybody."""
        self.models.add(model_id, behaviour)
        self.host.models(refresh=True)
        self.host.grant_read(model_id, "public")

    @contextmanager
    def workspace_model(self, model_id: str, base: str, **form: Any) -> Iterator[str]:
        """A workspace model for everybody, for a while."""
        self.host.create_model({"id": model_id, "base_model_id": base, **form})
        self.host.grant_read(model_id, "public")
        try:
            yield model_id
        finally:
            self.host.delete_model(model_id)

    # -- the question ----------------------------------------------------------------

    @asynccontextmanager
    async def page(self, account: Account | None = None) -> AsyncIterator[Page]:
        """The account's page."""
        async with Page(self.host, account or self.account) as page:
            try:
                yield page
            finally:
                await page.stop_all()

    async def ask(
        self, text: str, model: str = ROUND_ROBIN, **asking: Unpack[Asking]
    ) -> Reply:
        """Ask in a page of its own; what is shown at the end is what is stored."""
        async with self.page() as page:
            return await ask(page, text, model, **asking)

    # -- what the models were sent ----------------------------------------------------

    def sent(self, model: str, turn: int = 0) -> list[Json]:
        """The messages of a model's turn."""
        return self.models.turns(model)[turn].messages

    async def freed(self, *aborted: str) -> None:
        """Wait until no request is being answered; these were cut off."""
        await reached(lambda: self.models.wait_for(lambda m: m.in_flight == 0))
        assert self.models.aborted == list(aborted)

    @contextmanager
    def host_configured(self, values: Json) -> Iterator[set[str]]:
        """Change the host's settings for a while; gives the models it then lists."""
        with self.host.configured(values):
            yield {model["id"] for model in self.host.models(refresh=True)}
        self.host.models(refresh=True)

    def order(self) -> list[str]:
        """The models that were asked, in order."""
        return [seen.model for seen in self.models.turns()]


async def ask(
    page: Page, text: str, model: str = ROUND_ROBIN, **asking: Unpack[Asking]
) -> Reply:
    """Ask, see it end, and see that what is shown is stored; no background tasks."""
    asking.setdefault("background_tasks", {})
    reply = await page.send(model, text, **asking)
    return await finish(page, reply)


async def finish(page: Page, reply: Reply) -> Reply:
    """See a reply end; what the page shows is then what is stored."""
    await reply.wait_done()
    await reply.wait_idle()
    await assert_stored(page, reply)
    return reply


async def assert_stored(page: Page, reply: Reply) -> Json:
    """What the page shows is what the database has; gives the latter."""
    assert reply.chat.id
    stored = await page.stored(reply.chat.id, reply.id)
    assert_same_text(reply, stored)
    for shown, kept in zip(reply.output, stored.get("output") or [], strict=True):
        assert text_of_item(shown) == text_of_item(kept)
    return stored


async def reached(condition: Callable[[], Any]) -> Any:
    """Wait on another thread, so that the page goes on listening."""
    return await asyncio.to_thread(condition)


# -- the card above the input --------------------------------------------------------


def title_of(call: Call) -> str:
    """What a card asks, or the dialog that is in its place before 0.12."""
    (asked,) = call.data.get("questions") or [{"header": call.data.get("title")}]
    return str(asked["header"])


def on_card(page: Page, choose: Callable[[Call], Any]) -> None:
    """Answer cards by what `choose(call)` gives or awaits: a label, or other words."""

    async def answer(call: Call) -> Json:
        said = choose(call)
        said = await said if inspect.isawaitable(said) else said
        (question,) = call.data["questions"]
        is_option = said in [option["label"] for option in question["options"]]
        assert is_option or question["allow_other"]
        answer = {"label": said} if is_option else {"type": "other", "text": said}
        return {"status": "answered", "answers": {question["id"]: answer}}

    async def agree(call: Call) -> bool:
        said = choose(call)
        said = await said if inspect.isawaitable(said) else said
        return bool(said == "Skip it")

    page.on_call("request:user_input", answer)
    page.on_call("confirmation", agree)


# -- the host's database -------------------------------------------------------------


def stored_row(data_dir: Path, reply: Reply) -> Json:
    """A reply as the database has it; the API mixes in what is streaming."""
    path = f"file:{data_dir / 'webui.db'}?mode=ro"
    with closing(sqlite3.connect(path, uri=True)) as database:
        query = "SELECT chat FROM chat WHERE id = ?"
        (found,) = database.execute(query, [reply.chat.id]).fetchone()
    message: Json = json.loads(found)["history"]["messages"][reply.id]
    return message


@contextmanager
def locked(data_dir: Path) -> Iterator[None]:
    """Nobody else can write to the database; reading goes on."""
    with closing(sqlite3.connect(data_dir / "webui.db", timeout=30)) as database:
        database.isolation_level = None
        database.execute("BEGIN IMMEDIATE")
        yield
        database.execute("ROLLBACK")


# -- reading a reply -----------------------------------------------------------------


def text_of_item(item: Json) -> str:
    """The text of a message, a reasoning block, a tool call or a tool's result."""
    if "arguments" in item:
        return str(item["arguments"])
    parts = item.get("content") or item.get("output") or []
    return "".join(str(part.get("text", "")) for part in parts)


def items(reply: Reply, kind: str) -> list[Json]:
    """The items of one type."""
    return [item for item in reply.output if item["type"] == kind]


def kinds(reply: Reply) -> list[str]:
    """The types of the items, in order."""
    return [str(item["type"]) for item in reply.output]


def headings(reply: Reply) -> list[str]:
    """Who speaks, as the page shows it, in order."""
    lines = (line.strip() for line in reply.text.splitlines())
    return [line[4:].strip() for line in lines if line.startswith("### ")]


def in_rounds(rounds: int, first: str, *others: str) -> list[str]:
    """The headings of rounds in which these speak; the first one's names the round."""
    numbers = range(1, rounds + 1)
    names = [[f"{first} · round {number} of {rounds}", *others] for number in numbers]
    return [name for one_round in names for name in one_round]


def results(reply: Reply) -> list[str]:
    """What the tool cards say, in the order of the calls; each call has just one."""
    outputs = {item["call_id"]: item for item in items(reply, "function_call_output")}
    calls = [item["call_id"] for item in items(reply, "function_call")]
    assert len(outputs) == len(items(reply, "function_call_output"))
    assert set(calls) == set(outputs) and len(set(calls)) == len(calls)
    return [text_of_item(outputs[call_id]) for call_id in calls]


def shown_error(reply: Reply) -> str:
    """The error as the page words it."""
    return error_text(reply.error)


def last_status(reply: Reply) -> str:
    """The last status line."""
    assert reply.statuses and reply.statuses[-1]["done"] is True
    return str(reply.statuses[-1]["description"])


def system_of(messages: list[Json]) -> str:
    """The system prompt a model was sent."""
    assert messages[0]["role"] == "system"
    return str(messages[0]["content"])


def question_of(messages: list[Json]) -> Any:
    """The content of the last user message."""
    return [m["content"] for m in messages if m["role"] == "user"][-1]


def tool_names(seen: Seen) -> list[str]:
    """The tools a model was offered."""
    return [tool["function"]["name"] for tool in seen.chat.get("tools") or []]


# -- what a prompt must be ------------------------------------------------------------


def assert_goes_on(earlier: list[Json], later: list[Json]) -> None:
    """The earlier prompt is, byte by byte, the beginning of the later one."""
    for at, (was, is_now) in enumerate(zip(earlier, later, strict=False)):
        first, again = json.dumps(was), json.dumps(is_now)
        assert first == again, f"message {at}:\n{first}\nbecame\n{again}"
    assert len(later) > len(earlier)


def assert_alternates(messages: list[Json]) -> None:
    """A system prompt, then user and assistant in turn, the user last."""
    roles = [message["role"] for message in messages]
    assert roles[0] == "system"
    rest = roles[1:]
    assert rest == ["user", "assistant"] * (len(rest) // 2) + ["user"]
