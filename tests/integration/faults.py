"""What can go wrong with a model, a tool or a manager: one list, each fault a script.

`FAULTS` says of each how it behaves, what stands in its place, how often its model is
called, and how long it may take. `tests/integration/test_faults.py` plays every one of
them in each of the four modes, and `docs/reliability.md` shows the list as a table.
"""

from __future__ import annotations

import gzip
import json
import re
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from functools import cache
from itertools import repeat
from typing import Literal

import pytest

from tests.stack.behaviours import manager, refuses, says, with_tasks
from tests.stack.prompts import (
    fresh_results,
    last_user_text,
    offered_tools,
    read_candidates,
    stage_of,
)
from tests.stack.scripts import (
    Answer,
    Behaviour,
    Body,
    Cut,
    Disconnect,
    Fail,
    Headers,
    Pause,
    Raw,
    Reasoning,
    Script,
    Silence,
    Step,
    Text,
    ToolCall,
)
from tests.versions import LONG_LINES, PASSES_RETRY_AFTER

MODES = ("round_robin", "manager", "council", "debate")

VALVES = {
    "fold_drafts": False,
    "first_token_timeout": 3,
    "silence_timeout": 2,
    "turn_timeout": 9,
    "tool_timeout": 2,
    "busy_patience": 3,
    "skip_after": 0,
    "max_tool_rounds": 3,
}
"""The limits under which the faults are played; seconds, but for the last two."""

# --- what must never be shown ---------------------------------------------------------

KEY = "sk-proj-4242abcdef4242abcdef4242"
ADDRESS = "http://10.1.2.3:8080/v1"
SECRET = f"The key {KEY} was refused by {ADDRESS}."
TRACE = (
    'Traceback (most recent call last):\n  File "/srv/app/serve.py", line 7, in run\n'
    "    raise RuntimeError('out of memory')\nRuntimeError: out of memory"
)
PAGE = (
    "<!DOCTYPE html><html><head><title>502 Bad Gateway</title></head><body>"
    f"<h1>Bad Gateway</h1><p>upstream {ADDRESS} is down</p></body></html>"
)

# --- those who work -------------------------------------------------------------------


def steady(word: str) -> Behaviour:
    """Make a member who does what every stage asks for, whoever else sits there."""

    def behave(body: Body) -> Script:
        match stage_of(body):
            case "review":
                asked = last_user_text(body)
                letters = re.findall(r'<message from="(.)">', asked)
                ranks = {"ranking": [[letter] for letter in letters], "comments": {}}
                return Script([Text(json.dumps(ranks))])
            case "vote":
                vote = (read_candidates(body) or [""])[0]
                return Script([Text(json.dumps({"vote": vote, "reason": "It is so."}))])
            case "conclusion":
                return Script([Text(f"In the end it is the {word}.")])
        return Script([Text(f"The {word} it is.")])

    return with_tasks(behave)


STEADY = {
    "steady-oak": steady("oak"),
    "steady-elm": steady("elm"),
    "steady-lead": with_tasks(manager),
}

# --- how a fault is written down ------------------------------------------------------

Seat = Literal["one", "all", "lead"]


@dataclass(frozen=True, slots=True)
class Fault:
    """One thing that goes wrong, and what is to come of it.

    `calls` is how often its model is asked in each of `MODES`. `shows` stands in the
    line of the failure, in its place; nothing where the turn goes well after all.
    `said` stays of its own words, `card` stands in a tool's card. It sits between two
    who work, or in all seats, or leads: then it is Manager's manager, else a member.
    """

    name: str
    what: str
    behaviour: Behaviour
    calls: tuple[int, int, int, int]
    shows: str = ""
    said: str = ""
    card: str = ""
    seat: Seat = "one"
    limit: float = 15.0
    heavy: bool = False
    marks: tuple[pytest.MarkDecorator, ...] = field(default=(), compare=False)

    @property
    def model(self) -> str:
        """The id of its model; who is never reached sits behind a closed port."""
        return f"fault-{self.name}" if any(self.calls) else f"closed.{self.name}"

    @property
    def models(self) -> tuple[str, ...]:
        """The ids of all who have it: one, or one for each seat and the manager."""
        names = ("", "-two", "-three", "-lead") if self.seat == "all" else ("",)
        return tuple(self.model + name for name in names)


def at_turns(behaviour: Behaviour, word: str = "fir") -> Behaviour:
    """Go wrong where it answers; ballots and the conclusion are in order."""
    well = steady(word)
    return lambda body: (behaviour if stage_of(body) == "answer" else well)(body)


def plays(*steps: Step) -> Behaviour:
    """Make a model that always does the same."""
    return lambda _: Script(steps)


def goes_on(step: Step, pace: float) -> Behaviour:
    """Make a model that never ends, at so many chunks a second."""
    return lambda _: Script(repeat(step), pace=pace)


def once(fault: Behaviour, well: Behaviour) -> Behaviour:
    """Make a model that goes wrong the first time it is asked something."""
    return lambda body: (well if body.get("earlier") else fault)(body)


def event(value: object) -> bytes:
    """Render one event of a stream."""
    return b"data: " + json.dumps(value).encode() + b"\n\n"


def piece(content: object) -> Raw:
    """Render one piece of an answer, of any type."""
    return Raw(event({"choices": [{"index": 0, "delta": {"content": content}}]}))


def raw_piece(content: bytes) -> Raw:
    """Render one piece of an answer whose text is these bytes, inside JSON."""
    return Raw(b'data: {"choices":[{"index":0,"delta":{"content":"' + content + END)


END = b'"}}]}\n\n'
BEGUN = "The fir it is, said Rex"
WELL = Text(f"{BEGUN}.")
BEGINS = Text(f"{BEGUN} before the end ")
# A client may throw away what it has not read yet when the connection dies.
READ = Pause(0.3)


def slow_bytes() -> Iterator[Step]:
    """An event that comes byte by byte and is never complete."""
    for byte in b'data: {"choices":[{"index":0,"delta":{"content":"':
        yield Raw(bytes([byte]))
    yield from repeat(Raw(b"x"))


@cache
def bomb(megabytes: int) -> Answer:
    """So much of one line, packed into a thousandth."""
    packed = gzip.compress(b"data: " + b"x" * (megabytes * 2**20), 9)
    return Answer(packed, "text/event-stream", headers={"Content-Encoding": "gzip"})


def many_chunks(count: int) -> Iterator[Step]:
    """So many events, a thousand at a write."""
    one = piece("x ").content
    for _ in range(count // 1000):
        yield Raw(one * 1000)


# --- tools that go wrong --------------------------------------------------------------

TROUBLE_ID = "trouble"
TROUBLE = f'''
import asyncio


class Tools:
    async def quick(self) -> str:
        """Answers at once."""
        return "done"

    async def hang(self) -> str:
        """Waits for ever."""
        await asyncio.Event().wait()

    async def fail(self) -> str:
        """Always fails."""
        raise ValueError("{SECRET}")

    async def cancel(self) -> str:
        """Raises a cancellation."""
        raise asyncio.CancelledError

    async def clings(self) -> str:
        """Goes on when it is cancelled, up to three times."""
        for _ in range(3):
            try:
                await asyncio.sleep(20)
            except asyncio.CancelledError:
                continue
        return "late"

    async def big(self) -> str:
        """Gives ten megabytes."""
        return "leaf " * 2_000_000

    async def odd(self, number: int) -> str:
        """Gives what is no text."""
        loop = []
        loop.append(loop)
        given = [b"\\xff\\x00", object(), {{1, 2}}, float("nan"), (n for n in ()),
                 ValueError("no"), None, loop, {{1: {{2}}}}, "\\ud800\\x00"]
        return given[number]
'''
"""A workspace tool with functions that go wrong."""


def uses(name: str, count: int = 1, arguments: str = "{}") -> Behaviour:
    """Make a member who calls a tool so often at once, and then answers."""

    def behave(body: Body) -> Script:
        if fresh_results(body):
            return Script([WELL])
        calls = [
            ToolCall(name, arguments.replace("N", str(n)), n) for n in range(count)
        ]
        return Script(calls)

    return at_turns(behave)


def never_stops_calling(body: Body) -> Script:
    """Call a tool whatever came back, and whether or not any is offered."""
    return Script([Text("Once more. "), ToolCall("quick")])


def calls_while_offered(body: Body) -> Script:
    """Call a tool as long as any is offered, whatever came back."""
    return Script([ToolCall("quick")] if offered_tools(body) else [WELL])


# --- the list -------------------------------------------------------------------------

Make = Callable[[], Sequence[Fault]]
NEVER_SPEAKS = (1, 1, 1, 1)
ASKED_TWICE = (2, 2, 2, 2)
GOES_WELL = (1, 1, 3, 3)
"""A turn, and a ballot that cannot be read, which is asked for once more."""
BREAKS_OFF = (1, 1, 1, 1)
"""Who broke off is judged nowhere, and asked for no ballot."""
CALLS_A_TOOL = (2, 2, 3, 3)


def refused() -> list[Fault]:
    """Those that never say a word, by HTTP or below it."""
    named = f"The shed is locked. {SECRET}"
    plain = "The shed is locked."

    def status(code: int, calls: int, **headers: str) -> Fault:
        name = f"http-{code}"
        behaviour = refuses(code, named, **headers)
        return Fault(name, f"HTTP {code}", behaviour, (calls,) * 4, plain)

    return [
        Fault(
            "refused",
            "the connection is refused",
            plays(WELL),
            (0, 0, 0, 0),
            "Server Connection Error",
        ),
        Fault(
            "reset-first",
            "the connection is reset before the first byte",
            plays(Disconnect(reset=True)),
            ASKED_TWICE,
            "Server Connection Error",
        ),
        status(400, 1),
        status(401, 1),
        status(403, 1),
        status(404, 1),
        status(408, 1),
        status(413, 1),
        status(422, 2),
        status(500, 2),
        status(501, 2),
        Fault(
            "http-502",
            "HTTP 502 with a gateway's page",
            plays(Answer(PAGE.encode(), "text/html", 502)),
            ASKED_TWICE,
            "502 Bad Gateway",
        ),
        Fault(
            "trace-500",
            "HTTP 500 with a stack trace",
            refuses(500, TRACE),
            ASKED_TWICE,
            "HTTP 500",
        ),
        Fault(
            "tags-500",
            "HTTP 500 with tags, a link and a megabyte of text",
            refuses(500, "<details open><b>No</b></details> " + "no " * 350_000),
            ASKED_TWICE,
            "No",
            heavy=True,
        ),
        Fault(
            "loop-302",
            "a redirection to itself, which the host follows ten times",
            plays(Answer(b"", code=307, headers={"Location": "completions"})),
            (20, 20, 20, 20),
            "Server Connection Error",
        ),
    ]


def busy() -> list[Fault]:
    """Those that ask for patience."""
    said = "Too many of them."

    def fault(name: str, what: str, calls: int, code: int = 429, **more: str) -> Fault:
        behaviour = refuses(code, said, **more)
        marks = (PASSES_RETRY_AFTER,) if calls == 1 else ()
        return Fault(name, what, behaviour, (calls,) * 4, said, limit=20, marks=marks)

    well = at_turns(plays(WELL))
    return [
        fault("http-429", "HTTP 429 without `Retry-After`, for ever", 3),
        fault("after-1", "HTTP 429, `Retry-After: 1`, for ever", 3, Retry_After="1"),
        fault("after-3600", "`Retry-After: 3600`", 1, Retry_After="3600"),
        fault("after-tiny", "`Retry-After: 0.0001`, for ever", 3, Retry_After="0.0001"),
        fault("after-nan", "`Retry-After: nan`", 3, Retry_After="nan"),
        fault("after-minus", "`Retry-After: -5`", 3, Retry_After="-5"),
        fault(
            "after-date",
            "`Retry-After` with a date",
            3,
            Retry_After="Wed, 21 Oct 2015 07:28:00 GMT",
        ),
        fault("http-503", "HTTP 503, for ever", 3, code=503),
        Fault(
            "busy-once",
            "HTTP 429 the first time",
            once(refuses(429, said, Retry_After="0.5"), well),
            (2, 2, 4, 4),
            said=BEGUN,
        ),
    ]


def silent() -> list[Fault]:
    """Those who keep everybody waiting."""
    nothing, pause = "it said nothing for 3 s", "it said nothing for 2 s"
    long = "it took longer than 9 s"
    return [
        Fault("silent", "no answer at all", plays(Silence()), NEVER_SPEAKS, nothing),
        Fault(
            "silent-open",
            "headers, then nothing",
            plays(Headers(), Silence()),
            NEVER_SPEAKS,
            nothing,
        ),
        Fault(
            "silent-midway",
            "silence in the middle",
            plays(BEGINS, Silence()),
            BREAKS_OFF,
            pause,
            said=BEGUN,
        ),
        Fault(
            "byte-by-byte",
            "an event that comes byte by byte, for ever",
            lambda _: Script(slow_bytes(), pace=20),
            NEVER_SPEAKS,
            nothing,
        ),
        Fault(
            "drip",
            "a word a second, for ever",
            goes_on(Text("drip "), 1),
            BREAKS_OFF,
            long,
            said="drip drip",
            limit=25,
        ),
        Fault(
            "endless",
            "a stream that never ends, 200 chunks a second",
            goes_on(Text("word "), 200),
            BREAKS_OFF,
            long,
            said="word word",
            limit=25,
        ),
        Fault(
            "pings",
            "comments in the stream for ever, and no words",
            goes_on(Raw(b": ping\n\n"), 5),
            NEVER_SPEAKS,
            nothing,
        ),
        Fault(
            "thinks",
            "reasoning that never ends",
            goes_on(Reasoning("hm "), 50),
            NEVER_SPEAKS,
            long,
            limit=25,
        ),
        Fault(
            "only-thinks",
            "reasoning and no answer",
            plays(Reasoning("Let me see.")),
            ASKED_TWICE,
            "it gave an empty answer, asked twice",
        ),
        Fault(
            "empty",
            "a stream without words",
            plays(),
            ASKED_TWICE,
            "it gave an empty answer, asked twice",
        ),
        Fault(
            "blank",
            "nothing but white space",
            plays(Text(" \n\n \t\n")),
            ASKED_TWICE,
            "it gave an empty answer, asked twice",
        ),
    ]


def broken() -> list[Fault]:
    """Streams that end badly."""
    failing = f"The shed burns. {SECRET}"
    burns = "The shed burns."
    return [
        Fault(
            "error-first",
            "an error as the stream's first event",
            plays(Fail(failing)),
            ASKED_TWICE,
            burns,
        ),
        Fault(
            "error-midway",
            "an error in the stream, after some words",
            plays(BEGINS, Fail(failing)),
            BREAKS_OFF,
            burns,
            said=BEGUN,
        ),
        Fault(
            "reset-midway",
            "the connection is reset in mid-answer",
            plays(BEGINS, READ, Disconnect(reset=True)),
            BREAKS_OFF,
            "connection",
            said=BEGUN,
        ),
        Fault(
            "closed-midway",
            "the connection is closed in mid-answer",
            plays(BEGINS, READ, Disconnect()),
            BREAKS_OFF,
            "connection",
            said=BEGUN,
        ),
        Fault(
            "no-done",
            "a stream that ends without `[DONE]`",
            plays(WELL, Cut()),
            GOES_WELL,
            said=BEGUN,
        ),
        Fault(
            "short-body",
            "a body shorter than it says",
            plays(BEGINS, READ, Raw(b"data: {"), Disconnect()),
            BREAKS_OFF,
            "connection",
            said=BEGUN,
        ),
    ]


def odd() -> list[Fault]:
    """Answers that are not what an answer is."""
    empty = "it gave an empty answer, asked twice"
    deep = b"[" * 100_000
    return [
        Fault(
            "html-200",
            "a web page with status 200",
            plays(Answer(PAGE.encode(), "text/html")),
            ASKED_TWICE,
            "web page",
        ),
        Fault(
            "html-stream",
            "a web page as a stream",
            plays(Answer(PAGE.encode(), "text/event-stream")),
            ASKED_TWICE,
            empty,
        ),
        Fault(
            "bare-text",
            "an error as bare text with status 200",
            plays(Answer(b'{"error": "The shed burns."}')),
            ASKED_TWICE,
            "The shed burns.",
        ),
        Fault(
            "no-body",
            "status 200 and no body",
            plays(Answer(b"")),
            ASKED_TWICE,
            empty,
        ),
        Fault(
            "truncated-whole",
            "JSON that breaks off, with status 200",
            plays(Answer(b'{"choices": [{"message": {"content": "The fir')),
            ASKED_TWICE,
            empty,
        ),
        Fault(
            "truncated-event",
            "an event whose JSON breaks off, among others",
            plays(Raw(b'data: {"choices": [{"delta": {"cont\n\n'), WELL),
            GOES_WELL,
            said=BEGUN,
        ),
        Fault(
            "nested",
            "JSON nested 100,000 deep, among other events",
            plays(Raw(b"data: " + deep + b"\n\n"), WELL),
            GOES_WELL,
            said=BEGUN,
        ),
        Fault(
            "nested-whole",
            "JSON nested 100,000 deep, and nothing else",
            plays(Answer(b'{"choices": ' + deep + b"]" * 100_000 + b"}")),
            ASKED_TWICE,
            empty,
        ),
        Fault(
            "no-choices",
            "`choices: []`, `null` and numbers, among others",
            plays(
                Raw(event({"choices": []})),
                Raw(event({"choices": None})),
                Raw(event({"choices": [7]})),
                Raw(event({"choices": {"a": 1}})),
                WELL,
            ),
            GOES_WELL,
            said=BEGUN,
        ),
        Fault(
            "no-delta",
            "`delta: null` and odd deltas, among others",
            plays(
                Raw(event({"choices": [{"delta": None}]})),
                Raw(event({"choices": [{"delta": [1]}]})),
                piece(None),
                piece(7),
                piece({"a": [None]}),
                Raw(event({"choices": [{"delta": {"tool_calls": [None, 7, {}]}}]})),
                Raw(event([None])),
                Raw(event("text")),
                WELL,
            ),
            GOES_WELL,
            said=BEGUN,
        ),
        Fault(
            "bad-utf8",
            "bytes that are not UTF-8",
            plays(raw_piece(b"caf\xe9 \xff\xfe "), WELL),
            GOES_WELL,
            said=BEGUN,
        ),
        Fault(
            "nul",
            "NUL and control characters",
            plays(piece("\x00 \x01\x02 \x1b[31m \x7f"), WELL),
            GOES_WELL,
            said=BEGUN,
        ),
        Fault(
            "surrogates",
            "lone surrogates",
            plays(piece("\ud800 and \udfff "), WELL),
            GOES_WELL,
            said=BEGUN,
        ),
        Fault(
            "one-line",
            "5 MB in one chunk",
            plays(piece("leaf " * 1_000_000), WELL),
            BREAKS_OFF,
            "it said over 500,000 characters",
            said="leaf leaf",
            limit=60,
            heavy=True,
            marks=(LONG_LINES,),
        ),
        Fault(
            "many-chunks",
            "100,000 chunks as fast as they go",
            lambda _: Script(many_chunks(100_000)),
            GOES_WELL,
            said="x x x",
            limit=60,
            heavy=True,
        ),
        Fault(
            "bomb",
            "50 MB packed into 50 kB, in one line",
            lambda _: Script([bomb(50)]),
            (1, 1, 1, 1),
            "one piece of its answer has over 32 MB",
            limit=60,
            heavy=True,
            marks=(LONG_LINES,),
        ),
    ]


def of_tools() -> list[Fault]:
    """Tools, and models that use them badly."""

    def fault(
        name: str, what: str, behaviour: Behaviour, card: str, heavy: bool = False
    ) -> Fault:
        limit = 60.0 if heavy else 15.0
        return Fault(
            name, what, behaviour, CALLS_A_TOOL, "", BEGUN, card, "one", limit, heavy
        )

    endless = at_turns(never_stops_calling)
    return [
        fault("tool-hangs", "a tool that hangs", uses("hang"), "longer than 2 s"),
        fault(
            "tool-fails",
            "a tool that raises, with a key in its message",
            uses("fail"),
            "Error: The key",
        ),
        fault(
            "tool-cancels",
            "a tool that raises a cancellation",
            uses("cancel"),
            "it was cancelled from inside",
        ),
        fault(
            "tool-clings",
            "a tool that goes on when it is cancelled",
            uses("clings"),
            "longer than 2 s",
        ),
        fault("tool-odd", "ten tools that return odd types", uses("odd", 10, ODD), ""),
        fault("tool-big", "a tool's result of 10 MB", uses("big"), "leaf leaf", True),
        fault("tool-unknown", "a tool nobody has", uses("nope"), "there is no tool"),
        fault(
            "tool-broken",
            "arguments that are not JSON",
            uses("odd", 1, '{"number": '),
            "Error",
        ),
        fault("tool-200", "200 tool calls at once", uses("quick", 200), "done", True),
        Fault(
            "tool-rounds",
            "tool calls for as long as tools are offered",
            at_turns(calls_while_offered),
            (4, 4, 5, 5),
            said=BEGUN,
            card="done",
        ),
        Fault(
            "tool-endless",
            "tool calls for ever, offered or not",
            endless,
            (4, 4, 4, 4),
            "it still called tools after 3 tool rounds",
            said="Once more.",
            card="done",
        ),
    ]


ODD = '{"number": N}'


def of_leaders() -> list[Fault]:
    """Managers and ballots that go wrong, and everybody at once."""
    nonsense = says("I would rather talk about the weather.")
    down = refuses(500, f"The shed is locked. {SECRET}")
    return [
        Fault(
            "lead-nonsense",
            "a manager, or a ballot, that says nonsense for ever",
            nonsense,
            (1, 6, 3, 3),
            said="I would rather talk",
            seat="lead",
        ),
        Fault(
            "lead-silent",
            "a manager that says nothing",
            plays(Silence()),
            (1, 2, 1, 1),
            "it said nothing for 3 s",
            seat="lead",
            limit=20,
        ),
        Fault(
            "lead-busy",
            "a manager that is busy for ever (HTTP 429)",
            refuses(429, "Too many of them."),
            (3, 6, 3, 3),
            "Too many of them.",
            seat="lead",
            limit=20,
        ),
        Fault(
            "all-down",
            "HTTP 500 from everybody",
            down,
            (6, 10, 6, 6),
            "The shed is locked.",
            seat="all",
        ),
        Fault(
            "all-silent",
            "nobody says anything",
            plays(Headers(), Silence()),
            (3, 5, 3, 3),
            "it said nothing for 3 s",
            seat="all",
            limit=25,
        ),
    ]


GROUPS: tuple[Make, ...] = (refused, busy, silent, broken, odd, of_tools, of_leaders)
FAULTS: tuple[Fault, ...] = tuple(fault for group in GROUPS for fault in group())
FAULTY = {model: fault.behaviour for fault in FAULTS for model in fault.models}
"""Every model that has a fault, by its id."""

# --- the table ------------------------------------------------------------------------

HEAD = ("fault", "what stands in its place", "calls upstream", "limit, s", "longest, s")


def row(fault: Fault) -> tuple[str, ...]:
    """What the list says of a fault, as the first cells of its row."""
    shown = f"“{fault.shows}”" if fault.shows else "its turn goes well"
    if fault.card and not fault.shows:
        shown = f"“{fault.card}” in the tool's card"
    calls = " · ".join(str(count) for count in fault.calls)
    return (fault.what.replace("|", r"\|"), shown, calls, f"{fault.limit:g}")


def table(held: Mapping[tuple[str, str], float]) -> str:
    """The list as Markdown, with the longest time each took; negative: it failed."""
    lines = [HEAD, ("--",) * len(HEAD)]
    for fault in FAULTS:
        times = {mode: held.get((fault.name, mode), -1.0) for mode in MODES}
        failed = [mode for mode, seconds in times.items() if seconds < 0]
        longest = f"{max(times.values()):.1f}"
        lines.append(
            (*row(fault), f"fails: {', '.join(failed)}" if failed else longest)
        )
    return "\n".join(f"| {' | '.join(line)} |" for line in lines)
