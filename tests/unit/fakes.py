"""Stand-ins for the host, each named for its trick."""

import asyncio
from collections.abc import AsyncIterator, Callable, Sequence
from contextlib import asynccontextmanager
from dataclasses import dataclass, field
from types import SimpleNamespace
from typing import Any, Literal

from starlette.requests import Request

from tests.unit.plugin import mmc

Json = dict[str, Any]


class HandTurnedClock:
    """A clock that stands still until a test moves it."""

    def __init__(self) -> None:
        self.now = 100.0

    def __call__(self) -> float:
        return self.now


class TellingEvent(asyncio.Event):
    """An event that tells when somebody has begun to wait for it."""

    def __init__(self) -> None:
        super().__init__()
        self.awaited = asyncio.Event()

    async def wait(self) -> Literal[True]:
        self.awaited.set()
        return await super().wait()


@dataclass(frozen=True)
class ScriptedHost(mmc.Host):
    """A host whose models say what a script says, one reply after another.

    An item of a reply is given out as it is; an exception is raised; an event is
    waited for. Tools are plain functions of their arguments.
    """

    replies: list[Sequence[Any]] = field(default_factory=list)
    payloads: list[Json] = field(default_factory=list)
    events: list[Json] = field(default_factory=list)

    @asynccontextmanager
    async def completion(self, payload: Json) -> AsyncIterator[AsyncIterator[Any]]:
        self.payloads.append(payload)
        yield self._items(self.replies.pop(0))

    async def _items(self, reply: Sequence[Any]) -> AsyncIterator[Any]:
        for item in reply:
            if isinstance(item, Exception):
                raise item
            if isinstance(item, asyncio.Event):
                await item.wait()
            else:
                yield item

    async def _emit(self, event: Json) -> None:
        self.events.append(event)

    @property
    def can_replace(self) -> bool:
        return self.in_chat

    @property
    def has_card(self) -> bool:
        return True

    async def may_save(self) -> bool:
        return False

    @staticmethod
    def add_usage(total: Json, report: Json) -> Json:
        names = ("input_tokens", "output_tokens", "total_tokens")
        inputs = int(report.get("input_tokens") or report["prompt_tokens"])
        outputs = int(report.get("output_tokens") or report["completion_tokens"])
        more = (inputs, outputs, inputs + outputs)
        return {n: total.get(n, 0) + m for n, m in zip(names, more, strict=True)}

    async def run_tool(
        self, tool: Json, call: mmc.ToolCall, arguments: Json, messages: list[Json]
    ) -> Any:
        with mmc.foreign_errors(mmc.ToolFailure):
            return await tool["callable"](**arguments)

    async def read_tool_result(
        self, tool: Json, call: mmc.ToolCall, arguments: Json, value: Any
    ) -> mmc.ToolResult:
        found: mmc.ToolResult = (
            value if isinstance(value, mmc.ToolResult) else mmc.ToolResult(str(value))
        )
        return found

    @property
    def statuses(self) -> list[str]:
        """The status lines, in order."""
        return [
            event["data"]["description"]
            for event in self.events
            if event["type"] == "status"
        ]


def on_card(said: str) -> Json:
    """What the page answers where a person chose this option."""
    return {"status": "answered", "answers": {"answer": {"label": said}}}


def text(*pieces: str) -> list[Json]:
    """A reply in which these pieces are said."""
    return [{"choices": [{"delta": {"content": piece}}]} for piece in pieces]


def call(name: str, arguments: str = "{}", call_id: str = "c1", index: int = 0) -> Json:
    """A chunk with one whole tool call."""
    function = {"name": name, "arguments": arguments}
    piece = {"index": index, "id": call_id, "function": function}
    return {"choices": [{"delta": {"tool_calls": [piece]}}]}


def usage(inputs: int, outputs: int) -> Json:
    """A chunk with usage."""
    return {"usage": {"prompt_tokens": inputs, "completion_tokens": outputs}}


def tool(function: Callable[..., Any], **types: str) -> Json:
    """A tool as the host would hand it over."""
    properties = {name: {"type": kind} for name, kind in types.items()}
    parameters = {"type": "object", "properties": properties, "required": list(types)}
    return {"callable": function, "spec": {"name": "tool", "parameters": parameters}}


def make_run(
    replies: Sequence[Sequence[Any]] = (),
    *,
    aliases: Sequence[str] = ("Ann", "Bob"),
    tools: Json | None = None,
    in_chat: bool = True,
    **fields: Any,
) -> tuple[mmc.Run, ScriptedHost]:
    """A run of these participants on a scripted host, asked "Which tree?"."""
    app = SimpleNamespace(state=SimpleNamespace(redis=None))
    request = Request({"type": "http", "headers": [], "state": {}, "app": app})
    metadata = {"chat_id": "chat", "message_id": "message"} if in_chat else {}
    host = ScriptedHost(request, None, metadata, replies=list(replies))
    voice = mmc.Voice(
        "oak-1",
        tools=tools or {},
        specs=tuple({"type": "function", "function": {"name": n}} for n in tools or {}),
    )
    participants = {
        alias: mmc.Participant(alias, colour, f"You are {alias}.", voice)
        for alias, colour in zip(aliases, mmc.COLOURS, strict=False)
    }
    settings = mmc.merge_settings(mmc.Settings(**fields), None)
    transcript = mmc.Transcript("t", in_order=True)
    plan = mmc.plan_items if in_chat else mmc.plan_chunk
    emitter = mmc.Emitter(transcript, plan, 0.0)
    ledger = mmc.Ledger(host.add_usage)
    run = mmc.Run(
        host,
        settings,
        mmc.Cast(participants, voice),
        [mmc.Question("Which tree?")],
        mmc.Screen(transcript, emitter, in_chat, False),
        ledger,
        mmc.ModelCalls(host, settings, ledger, emitter),
        mmc.Saver(host, transcript, emitter, ledger.report),
    )
    return run, host


def host_messages(items: Sequence[Json]) -> list[Json]:
    """What the host makes of a stored reply for the next request.

    After `convert_output_to_messages` of Open WebUI 0.12.4, for our kinds of items.
    """
    messages: list[Json] = []
    texts: list[str] = []
    calls: list[Json] = []

    def flush() -> None:
        if texts or calls:
            message: Json = {"role": "assistant", "content": "\n".join(texts)}
            messages.append(message | ({"tool_calls": list(calls)} if calls else {}))
        texts.clear()
        calls.clear()

    for item in items:
        if item["type"] == "message" and item["content"][0]["text"]:
            texts.append(item["content"][0]["text"])
        elif item["type"] == "function_call":
            function = {"name": item["name"], "arguments": item["arguments"]}
            calls.append(
                {"id": item["call_id"], "type": "function", "function": function}
            )
        elif item["type"] == "function_call_output":
            flush()
            content = "".join(part.get("text", "") for part in item["output"])
            messages.append(
                {"role": "tool", "tool_call_id": item["call_id"], "content": content}
            )
    flush()
    return messages
