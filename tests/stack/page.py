"""A client that speaks to Open WebUI as its page does, and sees what it would show.

    async with Page(host, account) as page:
        reply = await page.ask("alice", "Hello")
        assert reply.text == "Hello to you"

The requests, the socket and the rules by which events change a message are those of
the page of 0.12.4 (`Chat.svelte`, `structuredOutput.ts`), port by port.
"""

import asyncio
import contextlib
import inspect
import time
from collections.abc import Awaitable, Callable
from dataclasses import dataclass, field
from datetime import UTC, datetime
from typing import Any, Required, Self, TypedDict, Unpack
from uuid import uuid4

import httpx
import socketio

from tests.stack.host import KEPT_ALIVE, Account, Api, Json
from tests.stack.structured_output import Output, apply_response_event, get_output_text

TIMEOUT = 60.0
"""Seconds an answer may take when a test does not say."""


@dataclass(frozen=True, slots=True)
class Event:
    """One event as it came over the socket.

    `at` is `time.monotonic()` on arrival, `size` its bytes on the socket.
    """

    type: str
    data: Any
    at: float
    size: int


@dataclass(slots=True)
class Call:
    """A question of the server to the page (a dialog, a tool to run)."""

    type: str
    data: Json
    chat_id: str | None
    message_id: str | None
    at: float
    answer: Any = None
    expected: bool = True
    closed: asyncio.Event = field(default_factory=asyncio.Event)
    """Set when the server takes the question back."""


CallHandler = Callable[[Call], Any | Awaitable[Any]]


@dataclass(slots=True)
class Chat:
    """A chat as the page holds it: a tree of messages and the leaf that is shown."""

    id: str | None = None
    messages: dict[str, Json] = field(default_factory=dict)
    current_id: str | None = None
    title: str | None = None
    temporary: bool = False
    active: bool = False
    """Whether the server still has a task for this chat."""

    def add(self, message: Json) -> None:
        """Hang a message into the tree and show it."""
        self.messages[message["id"]] = message
        self.current_id = message["id"]
        if message["parentId"] is not None:
            self.messages[message["parentId"]]["childrenIds"].append(message["id"])

    def branch(self, message_id: str | None) -> list[Json]:
        """The messages from the first one to this one."""
        found: list[Json] = []
        while message_id is not None and message_id in self.messages:
            found.append(self.messages[message_id])
            message_id = self.messages[message_id]["parentId"]
        return found[::-1]


class Asking(TypedDict, total=False):
    """What a question can carry besides its model and its text."""

    chat: Chat | None
    """Go on in this chat; a new one by default."""
    parent: "str | Reply | None"
    """Answer this message of the chat; the one shown by default."""
    files: list[Json] | None
    features: Json | None
    """Switched on beside the input: `web_search`, `memory`, ..."""
    tool_ids: list[str] | None
    """The tools switched on; the model's own by default, as on the page."""
    params: Json | None
    """The chat's own parameters; `system` is its system prompt."""
    tools: list[Json] | None
    background_tasks: Json | None
    """Title, tags and follow-ups as the page asks for them by default."""
    stream: bool
    temporary: bool
    extra: Json | None
    """Further fields of the request; they win."""
    timeout: float


class Envelope(TypedDict):
    """What a packet says about the event in it."""

    size: int
    asks: Required[bool]


class SizedPacket(socketio.packet.Packet):  # type: ignore[misc]
    """A packet that hands its handler, after the event, what it says of itself."""

    def decode(self, encoded_packet: str) -> Any:
        """Read the packet; events get an `Envelope` as their last argument."""
        attachments = super().decode(encoded_packet)
        if self.packet_type == socketio.packet.EVENT and self.data[0] == "events":
            # One character more: the engine's own packet type.
            size = len(encoded_packet.encode()) + 1
            self.data.append(Envelope(size=size, asks=self.id is not None))
        return attachments


class Reply:
    """An assistant's message as the page holds it."""

    def __init__(self, chat: Chat, message: Json):
        self.chat = chat
        self.message = message
        self.events: list[Event] = []
        self.asked_at = time.monotonic()
        self.first_text_at: float | None = None
        self.done_at: float | None = None
        self._changed = asyncio.Event()

    @property
    def id(self) -> str:
        """The message's id."""
        return str(self.message["id"])

    @property
    def output(self) -> Output:
        """The items, as the page has them."""
        return self.message.get("output") or []

    @property
    def text(self) -> str:
        """What the page shows: the text of the items, or the plain content."""
        if self.output:
            return get_output_text(self.output)
        return self.message.get("content") or ""

    @property
    def statuses(self) -> list[Json]:
        """The status lines, oldest first."""
        return self.message.get("statusHistory") or []

    @property
    def usage(self) -> Json | None:
        """The tokens the message says it took."""
        return self.message.get("usage")

    @property
    def sources(self) -> list[Json]:
        """The citations."""
        return self.message.get("sources") or []

    @property
    def files(self) -> list[Json]:
        """The files attached to the answer."""
        return self.message.get("files") or []

    @property
    def error(self) -> Any:
        """What went wrong, as the page shows it, or nothing."""
        error = self.message.get("error")
        return error.get("content", error) if isinstance(error, dict) else error

    @property
    def done(self) -> bool:
        """Whether the page shows the answer as finished."""
        return bool(self.message.get("done"))

    @property
    def size(self) -> int:
        """Bytes that all events of this message took on the socket."""
        return sum(event.size for event in self.events)

    def end_siblings(self) -> None:
        """Show all answers to the question as finished, as Stop does."""
        for sibling in self.chat.messages[self.message["parentId"]]["childrenIds"]:
            self.chat.messages[sibling]["done"] = True

    def notice(self) -> None:
        """Note the times of what has just become visible, and wake who waits."""
        if self.first_text_at is None and self.text:
            self.first_text_at = time.monotonic()
        if self.done_at is None and self.done:
            self.done_at = time.monotonic()
        self._changed.set()

    async def wait_for(
        self, predicate: "Callable[[Reply], object]", timeout: float = TIMEOUT
    ) -> Self:
        """Return once `predicate(reply)` is true, looked at after every event.

        Raises `TimeoutError` with what the page shows after `timeout` seconds.
        """
        try:
            async with asyncio.timeout(timeout):
                while not predicate(self):
                    self._changed.clear()
                    await self._changed.wait()
        except TimeoutError as e:
            types = [event.type for event in self.events[-5:]]
            shown = f"{self.text[-300:]!r}, error {self.error!r}, last events {types}"
            raise TimeoutError(f"after {timeout:g} s the page shows {shown}") from e
        return self

    async def wait_done(self, timeout: float = TIMEOUT) -> Self:
        """Return once the page shows the answer as finished."""
        return await self.wait_for(lambda reply: reply.done, timeout)

    async def wait_idle(self, timeout: float = TIMEOUT) -> Self:
        """Return once the server has no task left for this chat.

        Later than `wait_done` by titles and follow-ups, and by the saving of what
        Stop has cut off.
        """
        return await self.wait_for(lambda reply: not reply.chat.active, timeout)


# -- how events change a message: `chatEventHandler` of the page ---------------------


ERROR_PATHS = (
    "detail.error.message",
    "detail.message",
    "detail.content",
    "detail.error",
    "detail",
    "error.message",
    "error.content",
    "error",
    "message",
    "content",
)


def at_path(value: Any, path: str) -> Any:
    """What is at a dotted path of nested objects, if anything."""
    for name in path.split("."):
        value = value.get(name) if isinstance(value, dict) else None
    return value


def error_text(error: Any) -> str:
    """What the page shows of an error object: `getErrorMessage`."""
    found = [at_path(error, path) for path in ERROR_PATHS] + [error]
    texts = (value for value in found if isinstance(value, str))
    return next(texts, "Server connection failed")


def set_error(message: Json, error: Any) -> None:
    """Show an error in place of, or under, the text."""
    message["error"] = {"content": error_text(error)}
    message["done"] = True
    statuses = message.get("statusHistory")
    if statuses is not None:
        message["statusHistory"] = [
            s for s in statuses if s.get("action") != "knowledge_search"
        ]


def on_response(reply: Reply, data: Json) -> None:
    """`response:completion`: one event of the Responses API."""
    message = reply.message
    message["output"] = apply_response_event(message.get("output") or [], data)
    kind = data.get("type") or ""
    if kind == "response.output_text.delta":
        value = data.get("delta") or ""
        if not (message["content"] == "" and value == "\n"):
            message["content"] += value
    elif kind == "response.completed" or kind.endswith(".done"):
        message["content"] = get_output_text(message["output"]) or message["content"]


def choice_text(choices: list[Json]) -> str:
    """The text in the first choice of a completion or a chunk."""
    first = choices[0] if choices else {}
    whole = (first.get("message") or {}).get("content")
    return whole or (first.get("delta") or {}).get("content") or ""


def set_content(message: Json, data: Json) -> None:
    """Take over the text of a `chat:completion`, in whatever form it comes."""
    output = data.get("output")
    if output is not None:  # an empty list counts too: it is true in JavaScript
        message["output"] = output
        message["content"] = get_output_text(output)
        return
    if data.get("choices"):
        text = choice_text(data["choices"])
        if not (not message.get("content") and text == "\n"):
            message["content"] = (message.get("content") or "") + text
    if data.get("content"):
        message["content"] = data["content"]


def on_completion(reply: Reply, data: Json) -> None:
    """`chat:completion`: a chunk, the whole output so far, or the end."""
    message = reply.message
    if data.get("error"):
        set_error(message, data["error"])
    set_content(message, data)
    if not message.get("sources"):
        message["sources"] = data.get("sources")
    if data.get("usage"):
        message["usage"] = data["usage"]
    if data.get("done"):
        message["done"] = True


def on_cancel(reply: Reply, data: Json) -> None:
    """`chat:tasks:cancel`: the run was stopped."""
    if data.get("output") is not None:
        reply.message["output"] = data["output"]
    reply.end_siblings()


def on_active(reply: Reply, data: Json) -> None:
    """`chat:active`: the chat's last task has ended.

    That one has begun is known from asking: the event may come after its end.
    """
    if not data.get("active"):
        reply.chat.active = False


def on_status(reply: Reply, data: Json) -> None:
    """`status`: one more status line."""
    reply.message.setdefault("statusHistory", []).append(data)


def on_message(reply: Reply, data: Json) -> None:
    """`message`: more plain text."""
    reply.message["content"] += data["content"]


def sets(name: str, key: str) -> Callable[[Reply, Json], None]:
    """The rule of an event that only replaces one field."""
    return lambda reply, data: reply.message.update({name: data[key]})


def on_files(reply: Reply, data: Json) -> None:
    """`files`: the files of the answer."""
    before = (reply.message.get("files") or []) if reply.chat.temporary else []
    reply.message["files"] = [*before, *data["files"]]


def on_source(reply: Reply, data: Json) -> None:
    """`source`: one more citation, or a code execution."""
    if data.get("type") == "code_execution":
        executions = reply.message.setdefault("code_executions", [])
        kept = [e for e in executions if e.get("id") != data.get("id")]
        reply.message["code_executions"] = [*kept, data]
    else:
        reply.message["sources"] = [*reply.sources, data]


def on_error(reply: Reply, data: Json) -> None:
    """`chat:message:error`: the run failed."""
    set_error(reply.message, data.get("error"))


def on_title(reply: Reply, data: Any) -> None:
    """`chat:title`: the chat has a name."""
    reply.chat.title = data


def on_outlet(reply: Reply, data: Json) -> None:
    """`chat:outlet`: a filter of the server has changed messages."""
    for changed in data.get("messages") or []:
        known = reply.chat.messages.get(changed.get("id"))
        if known is not None and known.get("content") != changed.get("content"):
            known.update({"originalContent": known.get("content"), **changed})


RULES: dict[str, Callable[[Reply, Any], None]] = {
    "response:completion": on_response,
    "chat:completion": on_completion,
    "chat:tasks:cancel": on_cancel,
    "chat:active": on_active,
    "status": on_status,
    "message": on_message,
    "chat:message:delta": on_message,
    "replace": sets("content", "content"),
    "chat:message": sets("content", "content"),
    "files": on_files,
    "chat:message:files": on_files,
    "embeds": sets("embeds", "embeds"),
    "chat:message:embeds": sets("embeds", "embeds"),
    "source": on_source,
    "citation": on_source,
    "chat:message:error": on_error,
    "chat:message:follow_ups": sets("followUps", "follow_ups"),
    "chat:title": on_title,
    "chat:outlet": on_outlet,
}


# -- the page itself -----------------------------------------------------------------


def now() -> int:
    """Seconds since the epoch, as the page stamps its messages."""
    return int(time.time())


def prompt_variables(account: Account) -> Json:
    """The values the page sends for the host's template variables."""
    moment = datetime.now(UTC)
    return {
        "{{USER_NAME}}": account.name,
        "{{USER_EMAIL}}": account.email,
        "{{USER_LOCATION}}": "Unknown",
        "{{CURRENT_DATETIME}}": moment.strftime("%Y-%m-%d %H:%M:%S"),
        "{{CURRENT_DATE}}": moment.strftime("%Y-%m-%d"),
        "{{CURRENT_TIME}}": moment.strftime("%H:%M:%S"),
        "{{CURRENT_WEEKDAY}}": moment.strftime("%A"),
        "{{CURRENT_TIMEZONE}}": "UTC",
        "{{USER_LANGUAGE}}": "en-US",
    }


def temporary_message(message: Json) -> Json:
    """A message of a temporary chat, which the server does not know, as it is sent."""
    if message["role"] == "assistant" and message.get("output"):
        return {k: message.get(k) for k in ("role", "model", "output")}
    return {k: message.get(k) for k in ("id", "role", "content", "model")}


class Page:
    """One open page of one account, over one socket."""

    def __init__(self, host: Api, account: Account):
        self.host = host
        self.account = account
        self.calls: list[Call] = []
        self.unknown_events: list[Event] = []
        self._handlers: dict[str, CallHandler] = {}
        self._replies: dict[str, Reply] = {}
        self._open_calls: dict[str, Call] = {}
        self._joined: set[str] = set()
        self._models: dict[str, Json] = {}
        self._config: Json = {}
        self._heart: asyncio.Task[None] | None = None
        self.lost: list[str] = []  # why the socket was, each time
        self._socket = socketio.AsyncClient(
            reconnection=False,
            serializer=SizedPacket,
            websocket_extra_options={"max_msg_size": 0},
        )
        self._socket.on("events", self._on_event)
        self._socket.on("disconnect", self._note_loss)
        self._http = httpx.AsyncClient(
            base_url=host.url,
            headers={"Authorization": f"Bearer {account.token}"},
            timeout=120,
            trust_env=False,
            limits=KEPT_ALIVE,
        )

    # -- the socket ----------------------------------------------------------------

    async def __aenter__(self) -> Self:
        self._config = await self._get("/api/config")
        await self._connect()
        self._heart = asyncio.create_task(self._beat())
        return self

    async def _connect(self) -> None:
        token = {"token": self.account.token}
        await self._socket.connect(
            self.host.url,
            socketio_path="/ws/socket.io",
            transports=["websocket"],
            auth=token,
            wait_timeout=20,  # s; one is the usual, and a busy server needs more
        )
        # Who has had nothing to answer for 30 s is given up by the library; the server
        # asks every 25 s, under load later, and a browser waits for 45 s.
        self._socket.eio.ping_timeout = 40
        await self._socket.call("user-join", {"auth": token})

    async def __aexit__(self, *exc: object) -> None:
        if self._heart:
            self._heart.cancel()
            lost = socketio.exceptions.BadNamespaceError
            with contextlib.suppress(asyncio.CancelledError, lost):
                await self._heart
        await self._socket.disconnect()
        await self._http.aclose()

    async def _note_loss(self, reason: str) -> None:
        if reason != self._socket.reason.CLIENT_DISCONNECT:
            self.lost.append(reason)

    async def lose_socket(self) -> None:
        """The connection breaks; what is sent meanwhile is lost."""
        await self._socket.disconnect()

    async def regain_socket(self) -> None:
        """The connection is there again: `handleSocketConnect` of the page."""
        await self._connect()
        self._joined.clear()
        for reply in list(self._replies.values()):
            await self._join(reply.chat)
            running = await self._get(f"/api/tasks/chat/{reply.chat.id}")
            reply.chat.active = bool(running["task_ids"])
            if not (reply.chat.active or reply.done):
                await self._reload(reply)
            reply.notice()

    async def _beat(self) -> None:
        features = self._config.get("features") or {}
        interval = features.get("websocket_heartbeat_interval") or 30
        await asyncio.sleep(interval)
        while self._socket.connected:
            await self._socket.emit("heartbeat", {})
            await asyncio.sleep(interval)

    async def _join(self, chat: Chat) -> None:
        if chat.id and not chat.temporary and chat.id not in self._joined:
            self._joined.add(chat.id)
            body = {"chat_id": chat.id, "data": {"type": "join"}}
            await self._socket.call("events:chat", body)

    async def _on_event(self, event: Json, envelope: Envelope) -> Any:
        content = event.get("data") or {}
        kind, data = content.get("type") or "", content.get("data")
        arrived = Event(kind, data, time.monotonic(), envelope["size"])
        if envelope["asks"]:
            return await self._answer(event, arrived)
        if kind == "request:interaction:done":
            self._close_call(data or {})
        if not (event.get("shared") and event.get("user_id") == self.account.id):
            await self._apply(event, arrived)
        return None

    async def _apply(self, event: Json, arrived: Event) -> None:
        reply = self._replies.get(event.get("message_id") or "")
        if reply is None:
            self.unknown_events.append(arrived)
            return
        reply.chat.id = reply.chat.id or event.get("chat_id")
        reply.events.append(arrived)
        rule = RULES.get(arrived.type)
        if rule:
            empty: Json = {}
            rule(reply, empty if arrived.data is None else arrived.data)
        ended = arrived.type == "chat:active" and not reply.chat.active
        if ended and not reply.done:
            await self._reload(reply)
        reply.notice()

    async def _reload(self, reply: Reply) -> None:
        """The page reads the chat again when a task ends without an end of the text."""
        if reply.chat.id and not reply.chat.temporary:
            stored = await self.stored(reply.chat.id, reply.id)
            reply.message.update(stored)

    # -- questions of the server ---------------------------------------------------

    def on_call(self, type: str, handler: CallHandler) -> None:
        """Answer calls of this type by what `handler(call)` returns (or awaits).

        Calls nobody handles are answered `False` and kept with `expected = False`.
        """
        self._handlers[type] = handler

    async def _answer(self, event: Json, arrived: Event) -> Any:
        data = arrived.data or {}
        call = Call(
            arrived.type,
            data,
            event.get("chat_id"),
            event.get("message_id"),
            arrived.at,
        )
        self.calls.append(call)
        self._open_calls[str(data.get("interaction_id"))] = call
        reply = self._replies.get(call.message_id or "")
        if reply:
            reply.events.append(arrived)
            reply.notice()
        handler = self._handlers.get(call.type)
        if handler is None:
            call.expected, call.answer = False, False
        else:
            call.answer = await self._until_closed(call, handler)
        return call.answer

    async def _until_closed(self, call: Call, handler: CallHandler) -> Any:
        answer = handler(call)
        if not inspect.isawaitable(answer):
            return answer
        answering = asyncio.ensure_future(answer)
        closing = asyncio.create_task(call.closed.wait())
        await asyncio.wait({answering, closing}, return_when=asyncio.FIRST_COMPLETED)
        closing.cancel()
        if answering.done():
            return answering.result()
        answering.cancel()
        return {"status": "cancelled", "answers": {}}

    def _close_call(self, data: Json) -> None:
        call = self._open_calls.pop(str(data.get("interaction_id")), None)
        if call:
            call.closed.set()

    # -- reading -------------------------------------------------------------------

    async def _get(self, path: str) -> Any:
        answer = await self._http.get(path)
        answer.raise_for_status()
        return answer.json()

    async def _model(self, model_id: str) -> Json:
        if model_id not in self._models:
            listed = await self._get("/api/models")
            self._models = {model["id"]: model for model in listed["data"]}
        return self._models.get(model_id, {"id": model_id, "name": model_id})

    async def stored(self, chat_id: str, message_id: str) -> Json:
        """A message as the database has it."""
        chat = await self._get(f"/api/v1/chats/{chat_id}")
        message: Json = chat["chat"]["history"]["messages"][message_id]
        return message

    async def open(self, chat_id: str) -> Chat:
        """Open a chat as after a reload; its running answers go on here."""
        loaded = (await self._get(f"/api/v1/chats/{chat_id}"))["chat"]
        history = loaded["history"]
        chat = Chat(
            chat_id, history["messages"], history["currentId"], loaded.get("title")
        )
        for message in chat.messages.values():
            if message["role"] == "assistant":
                reply = Reply(chat, message)
                self._replies[message["id"]] = reply
                chat.active = chat.active or message.get("done") is False
        await self._join(chat)
        return chat

    def reply(self, message_id: str) -> Reply:
        """The assistant's message with this id, of any chat open here."""
        return self._replies[message_id]

    # -- asking --------------------------------------------------------------------

    async def ask(self, model: str, text: str, **asking: Unpack[Asking]) -> Reply:
        """Ask, and return when the page shows the answer as finished."""
        reply = await self.send(model, text, **asking)
        return await reply.wait_done(asking.get("timeout", TIMEOUT))

    async def send(self, model: str, text: str, **asking: Unpack[Asking]) -> Reply:
        """Ask, and return as soon as the server has accepted the question."""
        temporary = asking.get("temporary", False)
        chat = asking.get("chat") or Chat(temporary=temporary)
        if chat.temporary:
            chat.id = f"temporary:{self._socket.get_sid()}"
        parent = asking.get("parent") or chat.current_id
        question = self._user_message(model, text)
        question["parentId"] = parent.id if isinstance(parent, Reply) else parent
        if asking.get("files"):
            question["files"] = asking["files"]
        chat.add(question)
        return await self._send(model, chat, question, asking)

    async def regenerate(self, reply: Reply, **asking: Unpack[Asking]) -> Reply:
        """Ask the same question again; the new answer is a sibling of `reply`.

        Returns as soon as the server has accepted it, like `send`.
        """
        question = reply.chat.messages[reply.message["parentId"]]
        return await self._send(reply.message["model"], reply.chat, question, asking)

    async def edit_and_resend(
        self, reply: Reply, text: str, **asking: Unpack[Asking]
    ) -> Reply:
        """Change the question that `reply` answers, in a new branch, and send it."""
        chat = reply.chat
        before = chat.messages[reply.message["parentId"]]
        question = self._user_message(reply.message["model"], text)
        question["parentId"] = before["parentId"]
        if before.get("files"):
            question["files"] = before["files"]
        chat.add(question)
        return await self._send(reply.message["model"], chat, question, asking)

    async def continue_(self, reply: Reply, **asking: Unpack[Asking]) -> Reply:
        """Let the model go on with its finished answer, in the same message."""
        reply.message["done"] = False
        reply.done_at = None
        body = await self._body(reply, asking)
        body["assistant_message_id"] = reply.id
        await self._post(reply, body)
        return reply

    async def stop(self, reply: Reply) -> None:
        """Press Stop."""
        path = f"/api/tasks/chat/{reply.chat.id}/stop"
        (await self._http.post(path)).raise_for_status()
        reply.end_siblings()
        reply.notice()

    async def stop_all(self) -> None:
        """Press Stop wherever a run of this page still goes on."""
        for reply in list(self._replies.values()):
            if reply.chat.active and reply.chat.id:
                await self.stop(reply)

    def _user_message(self, model: str, text: str) -> Json:
        return {
            "id": str(uuid4()),
            "parentId": None,
            "childrenIds": [],
            "role": "user",
            "user_id": self.account.id,
            "user": {"id": self.account.id, "name": self.account.name},
            "content": text,
            "models": [model],
            "timestamp": now(),
        }

    async def _send(
        self, model: str, chat: Chat, question: Json, asking: Asking
    ) -> Reply:
        listed = await self._model(model)
        message = {
            "id": str(uuid4()),
            "parentId": question["id"],
            "childrenIds": [],
            "role": "assistant",
            "user_id": self.account.id,
            "content": "",
            "done": False,
            "model": model,
            "modelName": listed.get("name") or model,
            "modelIdx": 0,
            "timestamp": now(),
        }
        chat.add(message)
        reply = Reply(chat, message)
        self._replies[reply.id] = reply
        body = await self._body(reply, asking)
        body["message_ids"] = [
            {"model_id": model, "message_id": reply.id, "modelIdx": 0}
        ]
        await self._post(reply, body)
        return reply

    async def _body(self, reply: Reply, asking: Asking) -> Json:
        model = await self._model(reply.message["model"])
        chat, params = reply.chat, asking.get("params") or {}
        question = chat.messages[reply.message["parentId"]]
        meta = (model.get("info") or {}).get("meta") or {}
        tool_ids = asking.get("tool_ids")
        body: Json = {
            "stream": asking.get("stream", True),
            "model": model["id"],
            "params": {**params, "model_controls": {}},
            "tool_ids": meta.get("toolIds") or [] if tool_ids is None else tool_ids,
            "tool_servers": [],
            "features": {**self._features(), **(asking.get("features") or {})},
            "variables": prompt_variables(self.account),
            "model_item": model,
            "session_id": self._socket.get_sid(),
            "id": reply.id,
            "parent_id": question["parentId"],
            "user_message": question,
            "background_tasks": self._tasks(chat, question, asking),
        }
        body |= {"chat_id": chat.id} if chat.id else {}
        messages = self._messages(chat, question, params)
        body |= {"messages": messages} if messages else {}
        files = [f for f in question.get("files") or [] if f.get("type") != "image"]
        body |= {"files": files} if files else {}
        body |= {"tools": asking["tools"]} if asking.get("tools") else {}
        return body | (asking.get("extra") or {})

    def _features(self) -> Json:
        features = self._config.get("features") or {}
        memory = {"memory": True} if features.get("enable_memories") else {}
        names = ("voice", "image_generation", "code_interpreter", "web_search")
        return {**dict.fromkeys(names, False), **memory}

    def _messages(self, chat: Chat, question: Json, params: Json) -> list[Json]:
        system = params.get("system")
        messages = [{"role": "system", "content": system}] if system else []
        if chat.temporary:
            messages += [temporary_message(m) for m in chat.branch(question["id"])]
        return messages

    def _tasks(self, chat: Chat, question: Json, asking: Asking) -> Json:
        wanted = asking.get("background_tasks")
        if wanted is not None:
            return wanted
        first = question["parentId"] is None and not chat.temporary
        names = ("title_generation", "tags_generation") if first else ()
        return {**dict.fromkeys(names, True), "follow_up_generation": True}

    async def _post(self, reply: Reply, body: Json) -> None:
        reply.chat.active = True
        answer = await self._http.post("/api/chat/completions", json=body)
        if answer.is_error:
            reply.chat.active = False
            detail = answer.json() if answer.content else answer.reason_phrase
            set_error(reply.message, detail)
        else:
            accepted = answer.json() or {}  # null: what it began was ended
            reply.chat.id = accepted.get("chat_id") or reply.chat.id
            await self._join(reply.chat)
        reply.notice()


def assert_same_text(reply: Reply, stored: Json) -> None:
    """What the page shows is what the database has, item by item."""
    shown, kept = reply.text, get_output_text(stored.get("output"))
    kept = kept or stored.get("content") or ""
    assert shown == kept, f"shown {shown!r}\nstored {kept!r}"
    items = [(i.get("type"), i.get("id")) for i in reply.output]
    kept_items = [(i.get("type"), i.get("id")) for i in stored.get("output") or []]
    assert items == kept_items, f"shown {items}\nstored {kept_items}"
