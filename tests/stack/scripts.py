"""What a scripted model does: steps, scripts, and how a script is cut into deltas.

A behaviour reads a request body (always in the shape of Chat Completions, whichever
wire it came in by) and returns a `Script`; the server plays it and a wire renders it.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import dataclass, field, replace
from typing import Any, Literal
from uuid import uuid4

Body = dict[str, Any]


@dataclass(frozen=True, slots=True)
class Text:
    """Words of the answer."""

    text: str


@dataclass(frozen=True, slots=True)
class Reasoning:
    """Words of the model's reasoning."""

    text: str


@dataclass(frozen=True, slots=True)
class ToolCall:
    """A call of a tool; `pieces` 0 sends name and arguments in one chunk.

    `index` None leaves the index out of the stream, an empty `id` gets one made up.
    """

    name: str
    arguments: str = "{}"
    index: int | None = 0
    id: str = ""
    pieces: int = 3


@dataclass(frozen=True, slots=True)
class Interleaved:
    """Several calls whose pieces arrive in turn, one of each."""

    calls: tuple[ToolCall, ...]


@dataclass(frozen=True, slots=True)
class Pause:
    """Nothing for `seconds`."""

    seconds: float


@dataclass(frozen=True, slots=True)
class Gate:
    """A point where `ModelServer.hold(name)` stops the script."""

    name: str


@dataclass(frozen=True, slots=True)
class Headers:
    """The response's headers leave now, not with the first delta."""


@dataclass(frozen=True, slots=True)
class Usage:
    """Token counts to report in place of the counted ones."""

    prompt: int
    completion: int


@dataclass(frozen=True, slots=True)
class Raw:
    """Bytes for the stream as they are; left out of an answer in one piece."""

    content: bytes


@dataclass(frozen=True, slots=True)
class Fail:
    """An error object in the stream, which ends there; HTTP 500 without streaming."""

    message: str
    code: int = 500


@dataclass(frozen=True, slots=True)
class Status:
    """The whole response is an HTTP error."""

    code: int
    body: Mapping[str, Any]
    headers: Mapping[str, str] = field(default_factory=dict)


@dataclass(frozen=True, slots=True)
class Answer:
    """The whole response is these bytes, streaming asked for or not."""

    content: bytes
    content_type: str = "application/json"
    code: int = 200
    headers: Mapping[str, str] = field(default_factory=dict)


@dataclass(frozen=True, slots=True)
class Disconnect:
    """The connection dies: closed, or reset, with what was on its way lost."""

    reset: bool = False


@dataclass(frozen=True, slots=True)
class Cut:
    """The response ends in good order here, without a last chunk or an end mark."""


@dataclass(frozen=True, slots=True)
class Silence:
    """Nothing more until the client leaves."""


Step = (
    Text
    | Reasoning
    | ToolCall
    | Interleaved
    | Pause
    | Gate
    | Headers
    | Usage
    | Raw
    | Fail
    | Status
    | Answer
    | Disconnect
    | Cut
    | Silence
)


@dataclass(frozen=True, slots=True)
class Style:
    """How a provider's stream looks beyond what it says."""

    reasoning_key: str = "reasoning_content"
    crlf: bool = False
    usage: Literal["asked", "always", "never"] = "asked"
    whole_json: bool = False
    cut: Literal["words", "characters"] = "words"


@dataclass(frozen=True, slots=True)
class Script:
    """Steps in order, at `pace` tokens per second (0: as fast as it can)."""

    steps: Iterable[Step]
    pace: float = 0.0
    style: Style = Style()


Behaviour = Callable[[Body], Script]


@dataclass(frozen=True, slots=True)
class CallStart:
    """The first chunk of a tool call, with its name."""

    call: ToolCall


@dataclass(frozen=True, slots=True)
class CallPiece:
    """A piece of a call's arguments."""

    call: ToolCall
    arguments: str


@dataclass(frozen=True, slots=True)
class CallEnd:
    """All of a call's arguments have been sent."""

    call: ToolCall


Delta = Text | Reasoning | CallStart | CallPiece | CallEnd | Raw | Fail


def tokens(text: str, cut: str = "words") -> list[str]:
    """Cut a text into the pieces it is streamed in, losing nothing."""
    if cut == "characters":
        return list(text)
    return re.findall(r"\s*\S+\s*|\s+", text)


def expand(step: Step, cut: str = "words") -> Iterator[Delta]:
    """Cut a step into what one chunk each carries; other steps give nothing."""
    match step:
        case Text(text):
            yield from (Text(token) for token in tokens(text, cut))
        case Reasoning(text):
            yield from (Reasoning(token) for token in tokens(text, cut))
        case ToolCall():
            yield from _call_deltas(step)
        case Interleaved(calls):
            yield from _in_turn([list(_call_deltas(call)) for call in calls])
        case Raw() | Fail():
            yield step
        case _:
            pass


def _call_deltas(call: ToolCall) -> Iterator[Delta]:
    call = replace(call, id=call.id or f"call_{uuid4().hex[:24]}")
    yield CallStart(call)
    if call.pieces:
        size = max(1, -(-len(call.arguments) // call.pieces))
        for start in range(0, len(call.arguments), size):
            yield CallPiece(call, call.arguments[start : start + size])
    yield CallEnd(call)


def _in_turn(queues: list[list[Delta]]) -> Iterator[Delta]:
    while any(queues):
        for queue in queues:
            if queue:
                yield queue.pop(0)
