"""A scripted model server: OpenAI's Chat Completions and Responses, and Ollama.

In a test: `with ModelServer() as server:` and point a client at `server.openai_url` or,
for Ollama, at `server.url`. What a model does depends on its id alone; see
`behaviours.py` and `demo_models.py`.
"""

from __future__ import annotations

import asyncio
import hashlib
import socket
import struct
import threading
import time
from collections import Counter
from collections.abc import AsyncIterator, Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Literal, Self

from aiohttp import web

from tests.stack.behaviours import BEHAVIOURS, OLLAMA_BEHAVIOURS, of_family
from tests.stack.demo_models import DEMO_NAMES
from tests.stack.prompts import messages_of, read_prompt, task_of, text_of, whole_text
from tests.stack.scripts import (
    Answer,
    Behaviour,
    Body,
    CallStart,
    Cut,
    Delta,
    Disconnect,
    Fail,
    Gate,
    Headers,
    Pause,
    Script,
    Silence,
    Status,
    Usage,
    expand,
)
from tests.stack.wires import (
    ChatStream,
    OllamaStream,
    Reply,
    ResponsesStream,
    StreamWire,
    Tally,
    chat_body_of_responses,
    error_body,
    whole_chat,
    whole_ollama,
    whole_responses,
)

__all__ = ["BEHAVIOURS", "DEMO_NAMES", "Hold", "ModelServer", "Seen"]

WireName = Literal["chat", "responses", "ollama"]

_STREAMS: dict[WireName, Callable[[Reply], StreamWire]] = {
    "chat": ChatStream,
    "responses": ResponsesStream,
    "ollama": OllamaStream,
}
_WHOLES: dict[WireName, Callable[[Reply, Sequence[Delta]], Body]] = {
    "chat": whole_chat,
    "responses": whole_responses,
    "ollama": whole_ollama,
}
_CLOSE_SECONDS = 0.2
_RESET = struct.pack("ii", 1, 0)  # linger for no time: a close is a reset
_YIELD_EVERY = 16


@dataclass(frozen=True, slots=True)
class Seen:
    """One request as it arrived: `at` is a monotonic time in seconds.

    `body` is what was sent, `chat` the same in the shape of Chat Completions; `model`
    is empty for requests that name none (listings).
    """

    model: str
    path: str
    body: Body
    at: float
    chat: Body = field(default_factory=dict)

    @property
    def messages(self) -> list[Body]:
        """The messages, whichever wire they came by."""
        return messages_of(self.chat)

    @property
    def text(self) -> str:
        """All text of the messages."""
        return whole_text(self.chat)

    @property
    def task(self) -> str | None:
        """The background task this is, if it is one."""
        return task_of(self.chat)


class Hold:
    """A closed gate: requests that reach it wait until `release`.

    As a context manager it releases at the end.
    """

    def __init__(self, server: ModelServer, name: str, after: int) -> None:
        self.name = name
        self.after = after
        self._server = server
        self._released = asyncio.Event()
        self._waiting = 0

    @property
    def waiting(self) -> int:
        """How many requests wait here now."""
        return self._waiting

    def wait_until_reached(self, count: int = 1, timeout: float = 10.0) -> None:
        """Wait until `count` requests stand here; raises `TimeoutError`."""
        self._server.wait_for(lambda _: self._waiting >= count, timeout)

    def release(self) -> None:
        """Let everybody through, now and later."""
        self._server.drop(self)

    def open(self) -> None:
        """Wake those who wait; runs on the server's loop."""
        self._released.set()

    async def passed(self, change: Callable[[], None]) -> None:
        """Wait here, telling `change` when the number of those who wait changes."""
        self._waiting += 1
        change()
        try:
            await self._released.wait()
        finally:
            self._waiting -= 1
            change()

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *exc: object) -> None:
        self.release()


class _Ended(Exception):
    """The script ends the response: by another one, or by letting it die."""

    def __init__(self, instead: Status | Answer | None = None, reset: bool = False):
        super().__init__()
        self.instead = instead
        self.reset = reset


class ModelServer:
    """The scripted server on a thread and event loop of its own.

    `models` limits which models are listed (all others still answer); `port` 0 takes
    a free one. All public members may be used from any thread.
    """

    def __init__(
        self,
        port: int = 0,
        models: Sequence[str] | None = None,
        host: str = "127.0.0.1",
    ) -> None:
        self._host, self._port = host, port
        self._behaviours = dict(BEHAVIOURS)
        self._ollama = dict(OLLAMA_BEHAVIOURS)
        self._listed = list(models if models is not None else BEHAVIOURS)
        self._changed = threading.Condition()
        self._requests: list[Seen] = []
        self._asked: Counter[tuple[str, str]] = Counter()
        self._aborted: list[str] = []
        self._in_flight: list[str] = []
        self._max_in_flight = 0
        self._holds: list[Hold] = []
        self._tasks: set[asyncio.Task[object]] = set()
        self._closing = False
        self._loop: asyncio.AbstractEventLoop | None = None
        self._stop: asyncio.Event | None = None
        self._started = threading.Event()
        self._failure: OSError | None = None
        self._thread: threading.Thread | None = None

    # --- life ----------------------------------------------------------------------

    def start(self) -> Self:
        """Listen; raises `OSError` if the port is taken."""
        self._thread = threading.Thread(target=self._run, name="models", daemon=True)
        self._thread.start()
        self._started.wait()
        if self._failure:
            self._thread.join()
            raise self._failure
        return self

    def stop(self) -> None:
        """Cut all connections and stop listening."""
        if self._thread is None or self._loop is None or self._stop is None:
            return
        self._closing = True
        if self._thread.is_alive():
            self._loop.call_soon_threadsafe(self._stop.set)
        self._thread.join()
        self._thread = None

    def __enter__(self) -> Self:
        return self.start()

    def __exit__(self, *exc: object) -> None:
        self.stop()

    def _run(self) -> None:
        asyncio.run(self._serve())

    async def _serve(self) -> None:
        self._loop, self._stop = asyncio.get_running_loop(), asyncio.Event()
        runner = web.AppRunner(
            self._app(),
            access_log=None,
            handler_cancellation=True,
            shutdown_timeout=_CLOSE_SECONDS,
        )
        await runner.setup()
        try:
            await web.TCPSite(runner, self._host, self._port).start()
            self._port = int(runner.addresses[0][1])
            self._started.set()
            await self._stop.wait()
        except OSError as error:
            self._failure = error
            self._started.set()
        finally:
            for task in self._tasks:
                task.cancel()
            await runner.cleanup()

    def _app(self) -> web.Application:
        app = web.Application(client_max_size=64 * 2**20)
        app.add_routes(
            [
                web.get("/", self._alive),
                web.get("/v1/models", self._list_openai),
                web.post("/v1/chat/completions", self._chat),
                web.post("/v1/responses", self._responses),
                web.post("/v1/embeddings", self._embeddings),
                web.get("/api/version", self._version),
                web.get("/api/tags", self._list_ollama),
                web.get("/api/ps", self._running),
                web.post("/api/show", self._show),
                web.post("/api/chat", self._ollama_chat),
            ]
        )
        return app

    # --- what tests ask --------------------------------------------------------------

    @property
    def url(self) -> str:
        """The address without a path, which is also Ollama's base URL."""
        return f"http://{self._host}:{self._port}"

    @property
    def openai_url(self) -> str:
        """OpenAI's base URL."""
        return f"{self.url}/v1"

    @property
    def requests(self) -> list[Seen]:
        """All requests so far, listings included, in order of arrival."""
        with self._changed:
            return list(self._requests)

    def turns(self, *models: str) -> list[Seen]:
        """The completions asked of these models (or of any), background tasks not."""
        seen = [one for one in self.requests if one.model and one.task is None]
        return [one for one in seen if not models or one.model in models]

    @property
    def aborted(self) -> list[str]:
        """The models whose client left before the end, in order."""
        with self._changed:
            return list(self._aborted)

    @property
    def in_flight(self) -> int:
        """How many completions are being given now."""
        with self._changed:
            return len(self._in_flight)

    @property
    def max_in_flight(self) -> int:
        """The most completions that were given at once since `clear`."""
        with self._changed:
            return self._max_in_flight

    def clear(self) -> None:
        """Forget all requests, aborts and the maximum; holds and models stay."""
        with self._changed:
            self._requests.clear()
            self._asked.clear()
            self._aborted.clear()
            self._max_in_flight = len(self._in_flight)
            self._changed.notify_all()

    def wait_for(
        self, predicate: Callable[[ModelServer], bool], timeout: float = 10.0
    ) -> None:
        """Wait until the predicate holds of this server; raises `TimeoutError`."""
        with self._changed:
            if not self._changed.wait_for(lambda: predicate(self), timeout):
                raise TimeoutError(f"not so after {timeout} s")

    def add(
        self,
        model: str,
        behaviour: Behaviour | None = None,
        surface: Literal["openai", "ollama"] = "openai",
        listed: bool = True,
    ) -> None:
        """Add or replace a model; without a behaviour the id must be a family's."""
        made = behaviour or of_family(model)
        if made is None:
            raise ValueError(f"no behaviour is known for {model!r}")
        with self._changed:
            if surface == "ollama":
                self._ollama[model] = made
                return
            self._behaviours[model] = made
            if listed and model not in self._listed:
                self._listed.append(model)

    def hold(self, name: str, after: int = 0) -> Hold:
        """Stop requests of a model (or at a `Gate`) until the handle is released.

        `after` counts the chunks a request sends before it stops; 0 is before its
        first byte.
        """
        hold = Hold(self, name, after)
        with self._changed:
            self._holds.append(hold)
        return hold

    def drop(self, hold: Hold) -> None:
        """Release a hold, as `Hold.release` does."""
        with self._changed:
            if hold in self._holds:
                self._holds.remove(hold)
        if self._loop is not None and not self._loop.is_closed():
            self._loop.call_soon_threadsafe(hold.open)

    # --- listings --------------------------------------------------------------------

    async def _alive(self, request: web.Request) -> web.Response:
        return web.Response(text="Ollama is running")

    async def _list_openai(self, request: web.Request) -> web.Response:
        self._note("", request.path, {})
        models = [
            {
                "id": model,
                "object": "model",
                "created": 1_700_000_000,
                "owned_by": "scripted",
                "name": DEMO_NAMES.get(model, model),
            }
            for model in self._listed
        ]
        return web.json_response({"object": "list", "data": models})

    async def _list_ollama(self, request: web.Request) -> web.Response:
        self._note("", request.path, {})
        models = [_ollama_model(model) for model in self._ollama]
        return web.json_response({"models": models})

    async def _running(self, request: web.Request) -> web.Response:
        self._note("", request.path, {})
        return web.json_response({"models": []})

    async def _version(self, request: web.Request) -> web.Response:
        return web.json_response({"version": "0.12.0"})

    async def _show(self, request: web.Request) -> web.Response:
        body = await request.json()
        model = body.get("model") or body.get("name") or ""
        self._note("", request.path, body)
        if model not in self._ollama:
            return web.json_response(
                {"error": f"model {model!r} not found"}, status=404
            )
        capabilities = ["completion", "tools", "thinking"]
        return web.json_response(
            {**_ollama_model(model), "capabilities": capabilities, "model_info": {}}
        )

    async def _embeddings(self, request: web.Request) -> web.Response:
        body = await request.json()
        self._note("", request.path, body)
        given = body.get("input", "")
        texts = given if isinstance(given, list) else [given]
        data = [
            {"object": "embedding", "index": at, "embedding": embedding(str(text))}
            for at, text in enumerate(texts)
        ]
        usage = {"prompt_tokens": len(texts), "total_tokens": len(texts)}
        return web.json_response(
            {"object": "list", "data": data, "model": body.get("model"), "usage": usage}
        )

    # --- completions -----------------------------------------------------------------

    async def _chat(self, request: web.Request) -> web.StreamResponse:
        body = await request.json()
        return await self._answer(request, "chat", body, body)

    async def _responses(self, request: web.Request) -> web.StreamResponse:
        body = await request.json()
        chat = chat_body_of_responses(body)
        return await self._answer(request, "responses", body, chat)

    async def _ollama_chat(self, request: web.Request) -> web.StreamResponse:
        body = await request.json()
        chat = {**body, "stream": body.get("stream", True)}
        return await self._answer(request, "ollama", body, chat)

    async def _answer(
        self, request: web.Request, wire: WireName, body: Body, chat: Body
    ) -> web.StreamResponse:
        model = str(chat.get("model", ""))
        earlier = self._earlier(model, chat)
        self._note(model, request.path, body, chat)
        behaviour = self._behaviour(model)
        if behaviour is None:
            error = {"error": {"message": f"The model {model!r} does not exist."}}
            return _refusal(Status(404, error), wire)
        script = behaviour({**chat, "earlier": earlier})
        reply = self._reply(model, script, chat)
        streamed = bool(chat.get("stream")) and not script.style.whole_json
        with self._exchange(model):
            exchange = _Exchange(self, request, wire, script, reply)
            return await (exchange.stream() if streamed else exchange.whole())

    def _behaviour(self, model: str) -> Behaviour | None:
        known = self._behaviours.get(model) or self._ollama.get(model)
        return known or of_family(model)

    def _reply(self, model: str, script: Script, chat: Body) -> Reply:
        words = sum(len(text_of(one).split()) for one in messages_of(chat))
        options = chat.get("stream_options") or {}
        return Reply(
            model=model,
            created=int(time.time()),
            style=script.style,
            tally=Tally(prompt=words),
            wants_usage=bool(options.get("include_usage")),
        )

    def _earlier(self, model: str, chat: Body) -> int:
        """Count this model's earlier requests about the same question."""
        key = (model, read_prompt(chat).question)
        with self._changed:
            self._asked[key] += 1
            return self._asked[key] - 1

    def _note(
        self, model: str, path: str, body: Body, chat: Body | None = None
    ) -> None:
        with self._changed:
            seen = Seen(model, path, body, time.monotonic(), chat or {})
            self._requests.append(seen)
            self._changed.notify_all()

    @contextmanager
    def _exchange(self, model: str) -> Iterator[None]:
        task = asyncio.current_task()
        if task is not None:
            self._tasks.add(task)
        with self._changed:
            self._in_flight.append(model)
            self._max_in_flight = max(self._max_in_flight, len(self._in_flight))
            self._changed.notify_all()
        try:
            yield
        except (asyncio.CancelledError, ConnectionResetError):
            self._cut_off(model)
            raise
        finally:
            if task is not None:
                self._tasks.discard(task)
            with self._changed:
                self._in_flight.remove(model)
                self._changed.notify_all()

    def _cut_off(self, model: str) -> None:
        if self._closing:
            return
        with self._changed:
            self._aborted.append(model)

    async def pass_holds(self, name: str, sent: int) -> None:
        """Wait at the holds of this name that stop after `sent` chunks."""
        with self._changed:
            here = [
                hold for hold in self._holds if hold.name == name and hold.after == sent
            ]
        for hold in here:
            await hold.passed(self._notify)

    def _notify(self) -> None:
        with self._changed:
            self._changed.notify_all()


class _Exchange:
    """One answer on its way: plays a script into a response."""

    def __init__(
        self,
        server: ModelServer,
        request: web.Request,
        wire: WireName,
        script: Script,
        reply: Reply,
    ) -> None:
        self._server = server
        self._request = request
        self._wire = wire
        self._script = script
        self._reply = reply
        self._began = time.monotonic()
        self._cut = False

    async def stream(self) -> web.StreamResponse:
        """Send the answer as it is made."""
        wire = _STREAMS[self._wire](self._reply)
        response = web.StreamResponse(
            headers={"Content-Type": wire.content_type, "Cache-Control": "no-cache"}
        )
        opening = wire.opening()
        try:
            async for delta in self._play():
                if not response.prepared:
                    await response.prepare(self._request)
                if isinstance(delta, Headers):
                    continue
                await response.write(opening + wire.render(delta))
                opening = b""
        except _Ended as ended:
            return self._end(ended, response)
        if not response.prepared:
            await response.prepare(self._request)
        if not self._reply.failed and not self._cut:
            await response.write(opening + wire.closing())
        return response

    async def whole(self) -> web.StreamResponse:
        """Send the answer in one piece when it is complete."""
        try:
            played = [delta async for delta in self._play()]
        except _Ended as ended:
            return self._end(ended, web.Response())
        deltas = [delta for delta in played if not isinstance(delta, Headers)]
        for delta in deltas:
            if isinstance(delta, Fail):
                return _refusal(Status(delta.code, error_body(delta)), self._wire)
        return web.json_response(_WHOLES[self._wire](self._reply, deltas))

    def _end(self, ended: _Ended, response: web.StreamResponse) -> web.StreamResponse:
        match ended.instead:
            case Status() as status:
                return _refusal(status, self._wire)
            case Answer() as answer:
                return _answer(answer)
        transport = self._request.transport
        if transport is not None and ended.reset:
            connection = transport.get_extra_info("socket")
            connection.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, _RESET)
            transport.abort()
        elif transport is not None:
            transport.close()
        return response

    async def _play(self) -> AsyncIterator[Delta | Headers]:
        model, tally = self._reply.model, self._reply.tally
        await self._pass_holds(model, 0)
        for step in self._script.steps:
            await self._wait(step)
            if isinstance(step, Headers):
                yield step
            for delta in expand(step, self._script.style.cut):
                await self._pace(tally.chunks)
                if tally.chunks:
                    await self._pass_holds(model, tally.chunks)
                tally.count(delta)
                self._reply.called |= isinstance(delta, CallStart)
                self._reply.failed |= isinstance(delta, Fail)
                yield delta
        if tally.chunks:
            await self._pass_holds(model, tally.chunks)

    async def _wait(self, step: object) -> None:
        match step:
            case Pause(seconds):
                await asyncio.sleep(seconds)
                self._began += seconds
            case Gate(name):
                await self._pass_holds(name, 0)
            case Usage():
                self._reply.tally.override = step
            case Silence():
                await asyncio.Event().wait()
            case Status() | Answer():
                raise _Ended(step)
            case Disconnect(reset):
                raise _Ended(reset=reset)
            case Cut():
                self._cut = True
            case _:
                pass

    async def _pass_holds(self, name: str, sent: int) -> None:
        began = time.monotonic()
        await self._server.pass_holds(name, sent)
        self._began += time.monotonic() - began  # time held is not made up for

    async def _pace(self, sent: int) -> None:
        if self._script.pace:
            due = self._began + sent / self._script.pace
            await asyncio.sleep(max(0.0, due - time.monotonic()))
        elif sent % _YIELD_EVERY == 0:
            await asyncio.sleep(0)


def _refusal(status: Status, wire: WireName) -> web.Response:
    body = dict(status.body)
    if wire == "ollama" and isinstance(body.get("error"), dict):
        body["error"] = body["error"].get("message")
    return web.json_response(body, status=status.code, headers=dict(status.headers))


def _answer(answer: Answer) -> web.Response:
    headers = {"Content-Type": answer.content_type, **answer.headers}
    return web.Response(body=answer.content, status=answer.code, headers=headers)


def _ollama_model(model: str) -> Body:
    return {
        "name": model,
        "model": model,
        "modified_at": "2026-01-31T12:00:00Z",
        "size": 4_000_000_000,
        "digest": hashlib.sha256(model.encode()).hexdigest(),
        "details": {"format": "gguf", "family": "llama", "parameter_size": "8.0B"},
    }


def embedding(text: str, size: int = 32) -> list[float]:
    """Embed a text by its words, so that texts with common words are alike."""
    vector = [0.0] * size
    for word in text.lower().split():
        vector[hashlib.sha256(word.encode()).digest()[0] % size] += 1.0
    length = sum(one * one for one in vector) ** 0.5 or 1.0
    return [one / length for one in vector]
