"""How deltas look on each wire: Chat Completions, Responses, Ollama.

A stream wire turns one delta at a time into bytes; `whole_*` turn all deltas of an
answer into one JSON value. Nothing here waits or knows HTTP.
"""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import dataclass, field
from datetime import UTC, datetime
from typing import Any, Literal, Protocol
from uuid import uuid4

from tests.stack.prompts import text_of
from tests.stack.scripts import (
    Body,
    CallEnd,
    CallPiece,
    CallStart,
    Delta,
    Fail,
    Raw,
    Reasoning,
    Style,
    Text,
    ToolCall,
    Usage,
)


@dataclass(slots=True)
class Tally:
    """Tokens read and sent; `override` is reported in their place if set."""

    prompt: int
    text: int = 0
    reasoning: int = 0
    calls: int = 0
    chunks: int = 0
    override: Usage | None = None

    def count(self, delta: Delta) -> None:
        """Count a delta as sent."""
        self.chunks += 1
        match delta:
            case Text():
                self.text += 1
            case Reasoning():
                self.reasoning += 1
            case CallStart() | CallPiece():
                self.calls += 1
            case _:
                pass

    @property
    def read(self) -> int:
        """Tokens of the prompt."""
        return self.override.prompt if self.override else self.prompt

    @property
    def sent(self) -> int:
        """Tokens of the answer, reasoning and tool calls included."""
        if self.override:
            return self.override.completion
        return self.text + self.reasoning + self.calls


@dataclass(slots=True)
class Reply:
    """One answer being given: who answers, in which style, and what it has cost."""

    model: str
    created: int
    style: Style
    tally: Tally
    wants_usage: bool = False
    called: bool = False
    failed: bool = False
    id: str = field(default_factory=lambda: uuid4().hex)

    @property
    def finish_reason(self) -> str:
        """Why the answer ends, in OpenAI's words."""
        return "tool_calls" if self.called else "stop"


class StreamWire(Protocol):
    """A wire for answers that are streamed."""

    content_type: str

    def opening(self) -> bytes:
        """Render what comes before the first delta."""

    def render(self, delta: Delta) -> bytes:
        """Render one delta."""

    def closing(self) -> bytes:
        """Render what comes after the last delta."""


def chat_usage(tally: Tally) -> Body:
    """Count in the words of Chat Completions."""
    return {
        "prompt_tokens": tally.read,
        "completion_tokens": tally.sent,
        "total_tokens": tally.read + tally.sent,
        "completion_tokens_details": {"reasoning_tokens": tally.reasoning},
    }


def responses_usage(tally: Tally) -> Body:
    """Count in the words of the Responses API."""
    return {
        "input_tokens": tally.read,
        "output_tokens": tally.sent,
        "total_tokens": tally.read + tally.sent,
        "output_tokens_details": {"reasoning_tokens": tally.reasoning},
    }


def ollama_usage(tally: Tally) -> Body:
    """Count in Ollama's words, with durations in nanoseconds."""
    return {
        "total_duration": 1_000_000 * (tally.read + tally.sent + 1),
        "load_duration": 1_000_000,
        "prompt_eval_count": tally.read,
        "prompt_eval_duration": 1_000_000 * tally.read,
        "eval_count": tally.sent,
        "eval_duration": 1_000_000 * tally.sent,
    }


def error_body(fail: Fail) -> Body:
    """Render a failure as OpenAI's error object."""
    error = {"message": fail.message, "type": "server_error", "code": fail.code}
    return {"error": error}


def _json(value: Any) -> bytes:
    return json.dumps(value, ensure_ascii=False, separators=(",", ":")).encode()


def _sse(value: Any, event: str = "") -> bytes:
    head = f"event: {event}\n".encode() if event else b""
    return head + b"data: " + _json(value) + b"\n\n"


def _sse_crlf(value: Any) -> bytes:
    # One event over several data lines, with a comment and a blank line in between:
    # all of it allowed, little of it seen in the wild.
    lines = json.dumps(value, ensure_ascii=False, indent=1).split("\n")
    rendered = "".join(f"data: {line}\r\n" for line in lines)
    return f": ping\r\n\r\n\r\n{rendered}\r\n".encode()


class ChatStream:
    """Server-sent events of Chat Completions."""

    content_type = "text/event-stream"

    def __init__(self, reply: Reply) -> None:
        self._reply = reply

    def _event(self, value: Body) -> bytes:
        return _sse_crlf(value) if self._reply.style.crlf else _sse(value)

    def _chunk(self, delta: Body, finish_reason: str | None = None) -> bytes:
        choice = {"index": 0, "delta": delta, "finish_reason": finish_reason}
        return self._event({**self._envelope(), "choices": [choice]})

    def _envelope(self) -> Body:
        return {
            "id": f"chatcmpl-{self._reply.id}",
            "object": "chat.completion.chunk",
            "created": self._reply.created,
            "model": self._reply.model,
        }

    def opening(self) -> bytes:
        """Render the chunk that only names the role."""
        return self._chunk({"role": "assistant", "content": ""})

    def render(self, delta: Delta) -> bytes:
        """Render one delta as a chunk."""
        match delta:
            case Text(text):
                return self._chunk({"content": text})
            case Reasoning(text):
                return self._chunk({self._reply.style.reasoning_key: text})
            case CallStart() | CallPiece() | CallEnd():
                return self._tool_chunk(delta)
            case Raw(content):
                return content
            case Fail():
                return self._event(error_body(delta))

    def _tool_chunk(self, delta: CallStart | CallPiece | CallEnd) -> bytes:
        call = delta.call
        value: Body
        match delta:
            case CallStart():
                arguments = "" if call.pieces else call.arguments
                function = {"name": call.name, "arguments": arguments}
                value = {"id": call.id, "type": "function", "function": function}
            case CallPiece():
                value = {"function": {"arguments": delta.arguments}}
            case CallEnd():
                return b""
        index = {} if call.index is None else {"index": call.index}
        return self._chunk({"tool_calls": [{**index, **value}]})

    def closing(self) -> bytes:
        """Render the finish reason, the usage if it is wanted, and the end mark."""
        usage = self._reply.style.usage
        out = self._chunk({}, self._reply.finish_reason)
        if usage == "always" or (usage == "asked" and self._reply.wants_usage):
            counts = chat_usage(self._reply.tally)
            out += self._event({**self._envelope(), "choices": [], "usage": counts})
        end = "\r\n\r\n" if self._reply.style.crlf else "\n\n"
        return out + f"data: [DONE]{end}".encode()


@dataclass(slots=True)
class Gathered:
    """All of an answer, put together."""

    text: str = ""
    reasoning: str = ""
    calls: list[ToolCall] = field(default_factory=list)


def gather(deltas: Sequence[Delta]) -> Gathered:
    """Put an answer's deltas together; bytes meant for a stream are left out."""
    return Gathered(
        text="".join(one.text for one in deltas if isinstance(one, Text)),
        reasoning="".join(one.text for one in deltas if isinstance(one, Reasoning)),
        calls=[one.call for one in deltas if isinstance(one, CallEnd)],
    )


def whole_chat(reply: Reply, deltas: Sequence[Delta]) -> Body:
    """Render an answer as one `chat.completion`."""
    got = gather(deltas)
    message: Body = {"role": "assistant", "content": got.text}
    if got.reasoning:
        message[reply.style.reasoning_key] = got.reasoning
    if got.calls:
        message["tool_calls"] = [_chat_call(call) for call in got.calls]
    choice = {"index": 0, "message": message, "finish_reason": reply.finish_reason}
    body: Body = {
        "id": f"chatcmpl-{reply.id}",
        "object": "chat.completion",
        "created": reply.created,
        "model": reply.model,
        "choices": [choice],
    }
    if reply.style.usage != "never":
        body["usage"] = chat_usage(reply.tally)
    return body


def _chat_call(call: ToolCall) -> Body:
    function = {"name": call.name, "arguments": call.arguments}
    return {"id": call.id, "type": "function", "function": function}


# --- Ollama ----------------------------------------------------------------------


def _ollama_line(reply: Reply, message: Body, done: bool = False) -> Body:
    created = datetime.fromtimestamp(reply.created, UTC).isoformat()
    said = {"role": "assistant", "content": "", **message}
    return {
        "model": reply.model,
        "created_at": created,
        "message": said,
        "done": done,
    }


def _ollama_call(call: ToolCall) -> Body:
    try:
        arguments = json.loads(call.arguments)
    except json.JSONDecodeError:
        # Ollama parses the arguments itself; what it cannot parse never leaves it.
        arguments = {}
    function = {"index": call.index or 0, "name": call.name, "arguments": arguments}
    return {"id": call.id, "function": function}


class OllamaStream:
    """Ollama's lines of JSON."""

    content_type = "application/x-ndjson"

    def __init__(self, reply: Reply) -> None:
        self._reply = reply

    def opening(self) -> bytes:
        """Render nothing: Ollama's first line is already content."""
        return b""

    def render(self, delta: Delta) -> bytes:
        """Render one delta as a line; a call goes out whole when it is complete."""
        match delta:
            case Text(text):
                return self._line({"content": text})
            case Reasoning(text):
                return self._line({"thinking": text})
            case CallEnd(call):
                return self._line({"tool_calls": [_ollama_call(call)]})
            case Raw(content):
                return content
            case Fail(message):
                return _json({"error": message}) + b"\n"
            case CallStart() | CallPiece():
                return b""

    def _line(self, message: Body) -> bytes:
        return _json(_ollama_line(self._reply, message)) + b"\n"

    def closing(self) -> bytes:
        """Render the last line, with the counts."""
        return _json(whole_ollama(self._reply, [])) + b"\n"


def whole_ollama(reply: Reply, deltas: Sequence[Delta]) -> Body:
    """Render an answer as one line, which is also what ends a stream."""
    got = gather(deltas)
    message: Body = {"content": got.text}
    if got.reasoning:
        message["thinking"] = got.reasoning
    if got.calls:
        message["tool_calls"] = [_ollama_call(call) for call in got.calls]
    line = {**_ollama_line(reply, message, done=True), "done_reason": "stop"}
    if reply.style.usage == "never":
        return line
    return {**line, **ollama_usage(reply.tally)}


# --- Responses API ---------------------------------------------------------------


def _message_item(item_id: str, text: str, status: str = "completed") -> Body:
    part = {"type": "output_text", "text": text, "annotations": []}
    return {
        "type": "message",
        "id": item_id,
        "status": status,
        "role": "assistant",
        "content": [part] if status == "completed" else [],
    }


def _reasoning_item(item_id: str, text: str) -> Body:
    summary = [{"type": "summary_text", "text": text}] if text else []
    return {"type": "reasoning", "id": item_id, "summary": summary}


def _call_item(call: ToolCall, arguments: str, status: str = "completed") -> Body:
    return {
        "type": "function_call",
        "id": f"fc_{call.id}",
        "call_id": call.id,
        "name": call.name,
        "arguments": arguments,
        "status": status,
    }


def _response(reply: Reply, status: str, output: list[Body]) -> Body:
    body: Body = {
        "id": f"resp_{reply.id}",
        "object": "response",
        "created_at": reply.created,
        "model": reply.model,
        "status": status,
        "output": output,
        "error": None,
        "usage": None,
    }
    if status == "completed" and reply.style.usage != "never":
        body["usage"] = responses_usage(reply.tally)
    return body


def whole_responses(reply: Reply, deltas: Sequence[Delta]) -> Body:
    """Render an answer as one response."""
    got = gather(deltas)
    output: list[Body] = []
    if got.reasoning:
        output.append(_reasoning_item(f"rs_{reply.id}", got.reasoning))
    if got.text:
        output.append(_message_item(f"msg_{reply.id}", got.text))
    output.extend(_call_item(call, call.arguments) for call in got.calls)
    return _response(reply, "completed", output)


_Kind = Literal["message", "reasoning"] | None


class ResponsesStream:
    """Server-sent events of the Responses API."""

    content_type = "text/event-stream"

    def __init__(self, reply: Reply) -> None:
        self._reply = reply
        self._output: list[Body] = []
        self._open: _Kind = None
        self._text = ""
        self._calls: dict[str, int] = {}
        self._sequence = 0

    def _event(self, kind: str, **values: Any) -> bytes:
        event = {"type": kind, "sequence_number": self._sequence, **values}
        self._sequence += 1
        return _sse(event, kind)

    def opening(self) -> bytes:
        """Render the events that announce the response."""
        response = _response(self._reply, "in_progress", [])
        created = self._event("response.created", response=response)
        return created + self._event("response.in_progress", response=response)

    def render(self, delta: Delta) -> bytes:
        """Render one delta, opening and closing items as the kind of delta changes."""
        match delta:
            case Text(text):
                return self._switch("message") + self._grow(text)
            case Reasoning(text):
                return self._switch("reasoning") + self._grow(text)
            case CallStart(call):
                return self._switch(None) + self._start_call(call)
            case CallPiece(call, arguments):
                return self._call_arguments(call, arguments)
            case CallEnd(call):
                return self._end_call(call)
            case Raw(content):
                return content
            case Fail():
                return self._fail(delta)

    def _switch(self, kind: _Kind) -> bytes:
        if kind == self._open:
            return b""
        out = self._close_item() if self._open else b""
        self._open, self._text = kind, ""
        if kind is None:
            return out
        item = self._item(f"{kind}_{self._reply.id}_{len(self._output)}")
        self._output.append(item)
        return out + self._item_event("response.output_item.added", item) + self._part()

    def _item(self, item_id: str, status: str = "in_progress") -> Body:
        if self._open == "message":
            return _message_item(item_id, self._text, status)
        return _reasoning_item(item_id, self._text)

    def _item_event(self, kind: str, item: Body) -> bytes:
        ids = [one["id"] for one in self._output]
        return self._event(kind, output_index=ids.index(item["id"]), item=item)

    def _text_event(self, what: str, **values: Any) -> bytes:
        """An event about the open item's text, or about the part the text is in."""
        index = "content_index" if self._open == "message" else "summary_index"
        place = {"output_index": len(self._output) - 1, index: 0}
        item_id = self._output[-1]["id"]
        return self._event(f"response.{what}", item_id=item_id, **place, **values)

    def _part(self, which: str = "added") -> bytes:
        if self._open == "message":
            part = {"type": "output_text", "text": self._text, "annotations": []}
            return self._text_event(f"content_part.{which}", part=part)
        part = {"type": "summary_text", "text": self._text}
        return self._text_event(f"reasoning_summary_part.{which}", part=part)

    def _text_kind(self) -> str:
        return "output_text" if self._open == "message" else "reasoning_summary_text"

    def _grow(self, text: str) -> bytes:
        self._text += text
        return self._text_event(f"{self._text_kind()}.delta", delta=text)

    def _close_item(self) -> bytes:
        done = self._text_event(f"{self._text_kind()}.done", text=self._text)
        out = done + self._part("done")
        item = self._output[-1] = self._item(self._output[-1]["id"], "completed")
        return out + self._item_event("response.output_item.done", item)

    def _start_call(self, call: ToolCall) -> bytes:
        item = _call_item(call, "", "in_progress")
        self._calls[call.id] = len(self._output)
        self._output.append(item)
        return self._item_event("response.output_item.added", item)

    def _call_at(self, call: ToolCall) -> Body:
        return {"item_id": f"fc_{call.id}", "output_index": self._calls[call.id]}

    def _call_arguments(self, call: ToolCall, arguments: str) -> bytes:
        kind = "response.function_call_arguments.delta"
        return self._event(kind, **self._call_at(call), delta=arguments)

    def _end_call(self, call: ToolCall) -> bytes:
        kind = "response.function_call_arguments.done"
        done = self._event(kind, **self._call_at(call), arguments=call.arguments)
        item = _call_item(call, call.arguments)
        self._output[self._calls[call.id]] = item
        return done + self._item_event("response.output_item.done", item)

    def _fail(self, fail: Fail) -> bytes:
        response = _response(self._reply, "failed", self._output)
        response["error"] = {"code": str(fail.code), "message": fail.message}
        return self._event("response.failed", response=response)

    def closing(self) -> bytes:
        """Render the end of the open item and of the response."""
        out = self._switch(None)
        response = _response(self._reply, "completed", self._output)
        return out + self._event("response.completed", response=response)


# --- from other wires into the shape of Chat Completions ---------------------------


def chat_body_of_responses(body: Body) -> Body:
    """Turn a Responses-API request into a Chat Completions one."""
    items = body.get("input") or []
    if isinstance(items, str):
        items = [{"type": "message", "role": "user", "content": items}]
    messages = [_message_of_item(item) for item in items]
    if body.get("instructions"):
        messages.insert(0, {"role": "system", "content": body["instructions"]})
    tools = [
        {"type": "function", "function": {k: v for k, v in one.items() if k != "type"}}
        for one in body.get("tools") or []
    ]
    kept = {k: v for k, v in body.items() if k not in ("input", "instructions")}
    return {**kept, "messages": messages, "tools": tools}


def _message_of_item(item: Body) -> Body:
    match item.get("type", "message"):
        case "function_call":
            function = {"name": item.get("name"), "arguments": item.get("arguments")}
            call = {"id": item.get("call_id"), "type": "function", "function": function}
            return {"role": "assistant", "content": "", "tool_calls": [call]}
        case "function_call_output":
            output = text_of({"content": item.get("output")})
            call_id = item.get("call_id")
            return {"role": "tool", "tool_call_id": call_id, "content": output}
        case _:
            return {"role": item.get("role"), "content": text_of(item)}
