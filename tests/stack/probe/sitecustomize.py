"""Counts, from inside a server process, what a run costs the host.

Python imports this module at start when its folder is on `PYTHONPATH`. It does
nothing unless `MMC_PROBE` names a file. Then it counts

- SQL statements by verb, and the bytes of their parameters;
- calls of the host's look-ups (`Models.get_model_by_id`, `get_tools`, ...) for the
  answers of pipes, apart for those made inside the host's own
  `generate_chat_completion`;
- the processor time of the process, its tasks, threads and open files;
- where asked for, its memory in use, and how late its event loop has been at most.

A reader writes a nonce, as a line, into the pipe `<MMC_PROBE>.ask`; the counts so
far, with that nonce, then appear in `<MMC_PROBE>`. Where nobody asks, the probe does
nothing. The host's own files are not changed: the named modules are wrapped once,
right after they are first imported.
"""

import asyncio
import ctypes
import functools
import gc
import inspect
import json
import os
import re
import sys
import threading
import time
from collections import Counter
from collections.abc import Callable, Sequence
from contextvars import ContextVar
from importlib.machinery import ModuleSpec, PathFinder
from pathlib import Path
from types import ModuleType
from typing import Any

MEMORY = "memory"
"""How a nonce begins that asks for the memory in use too; that stops the server."""
WATCH = "watch"
"""How a nonce begins that asks for the event loop's delays from then on."""
WATCH_EVERY = 0.01
"""Seconds between two looks at the clock in the event loop."""

inside_host: ContextVar[bool] = ContextVar("inside_host", default=False)
answering: ContextVar[bool] = ContextVar("answering", default=False)
lock = threading.Lock()
sql: Counter[str] = Counter()
sql_bytes: Counter[str] = Counter()
lookups: Counter[str] = Counter()
inside: Counter[str] = Counter()

CLASSES = {
    "open_webui.models.models": ("ModelsTable", "Models", r"get_"),
    "open_webui.models.functions": ("FunctionsTable", "Functions", r"get_"),
    "open_webui.models.chats": ("ChatTable", "Chats", r"get_"),
    "open_webui.models.tools": ("ToolsTable", "Tools", r"get_"),
    "open_webui.models.access_grants": (
        "AccessGrantsTable",
        "AccessGrants",
        r"(has_|get_accessible)",
    ),
    "open_webui.models.config": ("Config", "Config", r"get"),
    # the model list where Redis holds it: each a round trip (from 0.12)
    "open_webui.socket.utils": ("CachedRedisDict", "MODELS", r"_refresh"),
}
"""Module -> its class, the name calls are counted under, which methods."""

FUNCTIONS = {
    "open_webui.utils.tools": ("get_tools", "get_builtin_tools"),
    "open_webui.utils.models": ("get_all_models", "check_model_access"),
}


def size_of(parameters: Any) -> int:
    """Bytes of the values bound to one statement (a number counts eight)."""
    if isinstance(parameters, str):
        return (
            len(parameters) if parameters.isascii() else len(parameters.encode("utf-8"))
        )
    if isinstance(parameters, bytes | bytearray | memoryview):
        return len(parameters)
    if isinstance(parameters, dict):
        return sum(size_of(value) for value in parameters.values())
    if isinstance(parameters, list | tuple):
        return sum(size_of(value) for value in parameters)
    return 0 if parameters is None else 8


def count_statement(*event: Any) -> None:
    """Listener of SQLAlchemy's `before_cursor_execute`."""
    statement, parameters = event[2], event[3]
    words = statement.split(None, 1)
    verb = words[0].upper() if words else ""
    with lock:
        sql[verb] += 1
        sql_bytes[verb] += size_of(parameters)


def count_lookup(name: str) -> None:
    """One call of the look-up `name`, if it is for a pipe's answer.

    The host's timers look things up whenever they like.
    """
    if not answering.get():
        return
    with lock:
        (inside if inside_host.get() else lookups)[name] += 1


def counted(name: str, function: Callable[..., Any]) -> Callable[..., Any]:
    """`function`, or coroutine function, counting each of its calls under `name`."""

    @functools.wraps(function)
    def call(*args: Any, **kwargs: Any) -> Any:
        count_lookup(name)
        return function(*args, **kwargs)

    return call


def marked(function: Callable[..., Any], value: bool) -> Callable[..., Any]:
    """Coroutine `function`, with look-ups during it marked as (not) the host's."""

    @functools.wraps(function)
    async def call(*args: Any, **kwargs: Any) -> Any:
        token = inside_host.set(value)
        try:
            return await function(*args, **kwargs)
        finally:
            inside_host.reset(token)

    return call


def replace_everywhere(
    module: ModuleType, old: object, new: Callable[..., Any]
) -> None:
    """Put `new` under every name by which `module` knows `old`."""
    for name, value in list(vars(module).items()):
        if value is old:
            setattr(module, name, new)


def wrap_class(module: ModuleType) -> None:
    """Count the look-up methods of the module's table class."""
    class_name, label, pattern = CLASSES[module.__name__]
    table = getattr(module, class_name, object)
    for name, member in list(vars(table).items()):
        static = isinstance(member, staticmethod)
        function = member.__func__ if static else member
        if not re.match(pattern, name) or not inspect.isfunction(function):
            continue
        wrapped = counted(f"{label}.{name}", function)
        setattr(table, name, staticmethod(wrapped) if static else wrapped)


def wrap_functions(module: ModuleType) -> None:
    """Count the named functions of the module."""
    for name in FUNCTIONS[module.__name__]:
        function = getattr(module, name)
        replace_everywhere(module, function, counted(name, function))


def wrap_completion(module: ModuleType) -> None:
    """Mark everything the host does to answer one completion as its own."""
    function = module.generate_chat_completion
    inner = marked(function, True)

    @functools.wraps(function)
    async def call(*args: Any, **kwargs: Any) -> Any:
        watch.loop = asyncio.get_running_loop()
        return await inner(*args, **kwargs)

    replace_everywhere(module, function, call)


OF_THE_HOST = "AsyncSocket._send_ping"
"""A task of each socket, which outlives it by up to 25 seconds."""


class Watch:
    """The event loop that answers, how late it has been at most, and whether for
    collections of garbage, which take longer the more the host has loaded."""

    def __init__(self) -> None:
        self.loop: asyncio.AbstractEventLoop | None = None
        self.running = False
        self._worst = 0.0
        self._longest_collection = 0.0
        self._begun = 0.0

    def start(self) -> None:
        """Look at the clock again and again from now on."""
        if self.loop is not None and not self.running:
            self.running = True
            gc.callbacks.append(self._collecting)
            self.loop.call_soon_threadsafe(self._look)

    def _look(self, due: float | None = None) -> None:
        if self.loop is None:
            return
        now = self.loop.time()
        self._worst = max(self._worst, now - due if due is not None else 0.0)
        due = now + WATCH_EVERY
        self.loop.call_at(due, self._look, due)

    def _collecting(self, phase: str, _: dict[str, int]) -> None:
        now = time.monotonic()
        if phase == "start":
            self._begun = now
        else:
            took = now - self._begun
            self._longest_collection = max(self._longest_collection, took)

    def stall(self) -> tuple[float, float]:
        """The longest delay and collection, in seconds, since this was asked last."""
        found = self._worst, self._longest_collection
        self._worst = self._longest_collection = 0.0
        return found

    def tasks(self) -> int:
        """How many tasks the loop has, without those of sockets."""
        if self.loop is None:
            return 0
        tasks = asyncio.all_tasks(self.loop)
        names = [getattr(one.get_coro(), "__qualname__", "") for one in tasks]
        return len(names) - names.count(OF_THE_HOST)


watch = Watch()


def wrap_pipes(module: ModuleType) -> None:
    """Mark the task that answers through a pipe, from there to its end."""
    function = module.generate_function_chat_completion

    @functools.wraps(function)
    async def call(*args: Any, **kwargs: Any) -> Any:
        answering.set(True)
        return await function(*args, **kwargs)

    replace_everywhere(module, function, call)


def wrap_loading(module: ModuleType) -> None:
    """Mark what a pipe does as not the host's, though the host awaits it."""
    load = module.load_function_module_by_id

    @functools.wraps(load)
    async def load_marked(*args: Any, **kwargs: Any) -> Any:
        loaded = await load(*args, **kwargs)
        pipe = getattr(loaded[0], "pipe", None)
        if inspect.iscoroutinefunction(pipe):
            loaded[0].pipe = marked(pipe, False)
        return loaded

    replace_everywhere(module, load, load_marked)


def watch_engines(module: ModuleType) -> None:
    """Count what both engines of the host execute, and start answering."""
    from sqlalchemy import event

    for engine in (module.engine, module.async_engine.sync_engine):
        event.listen(engine, "before_cursor_execute", count_statement)
    answer = threading.Thread(target=answer_forever, name="mmc-probe", daemon=True)
    answer.start()


class AllocatorFigures(ctypes.Structure):
    """What the C library's `mallinfo2` returns: [4] is mapped, [7] is allocated."""

    _fields_ = [("figures", ctypes.c_size_t * 10)]


def bytes_in_use() -> int:
    """What is allocated and reachable: no garbage, no slack of the allocators."""
    gc.collect()
    reading, writing = os.pipe()
    stderr = os.dup(2)
    os.dup2(writing, 2)
    sys._debugmallocstats()  # what it writes fits into a pipe
    os.dup2(stderr, 2)
    os.close(writing)
    os.close(stderr)
    with open(reading, encoding="utf-8") as stats:
        found = re.search(r"# bytes in allocated blocks\s*=\s*([\d,]+)", stats.read())
    if found is None:
        raise RuntimeError("Python's allocator does not tell what it has given out")
    mallinfo = ctypes.CDLL(None).mallinfo2
    mallinfo.restype = AllocatorFigures
    large = mallinfo().figures
    return int(found[1].replace(",", "")) + int(large[4]) + int(large[7])


def snapshot(nonce: str) -> str:
    """The counts so far as JSON."""
    memory = bytes_in_use() if nonce.startswith(MEMORY) else 0
    if nonce.startswith(WATCH):
        watch.start()
    stall, collection = watch.stall()
    with lock:
        counts = {
            "nonce": nonce,
            "sql": dict(sql),
            "sql_bytes": dict(sql_bytes),
            "lookups": dict(lookups),
            "inside": dict(inside),
            "cpu_seconds": time.process_time(),
            "memory": memory,
            "tasks": watch.tasks(),
            "threads": threading.active_count(),
            "files": len(os.listdir("/proc/self/fd")),
            "stall": stall,
            "collection": collection,
        }
    return json.dumps(counts)


def answer_forever() -> None:
    """Write the counts each time somebody asks, until the process ends."""
    path = Path(os.environ["MMC_PROBE"])
    question, draft = Path(f"{path}.ask"), Path(f"{path}.draft")
    question.unlink(missing_ok=True)
    os.mkfifo(question)
    # Open for writing too: a pipe without writers would end.
    with open(os.open(question, os.O_RDWR), encoding="utf-8") as nonces:
        for nonce in nonces:
            draft.write_text(snapshot(nonce.strip()))
            draft.replace(path)


WRAPPERS: dict[str, Callable[[ModuleType], None]] = {
    "open_webui.internal.db": watch_engines,
    "open_webui.utils.chat": wrap_completion,
    "open_webui.functions": wrap_pipes,
    "open_webui.utils.plugin": wrap_loading,
    **dict.fromkeys(CLASSES, wrap_class),
    **dict.fromkeys(FUNCTIONS, wrap_functions),
}


class WrappingFinder:
    """Finds the named modules as usual, and wraps them after they are executed."""

    @staticmethod
    def find_spec(
        name: str,
        path: Sequence[str] | None = None,
        target: ModuleType | None = None,
    ) -> ModuleSpec | None:
        """The module's ordinary spec, with a loader that wraps at the end."""
        spec = PathFinder.find_spec(name, path, target) if name in WRAPPERS else None
        if spec is None or spec.loader is None:
            return None
        execute = spec.loader.exec_module

        def execute_and_wrap(module: ModuleType) -> None:
            execute(module)
            WRAPPERS[name](module)

        spec.loader.exec_module = execute_and_wrap  # type: ignore[method-assign]
        return spec


if os.environ.get("MMC_PROBE"):
    sys.meta_path.insert(0, WrappingFinder)
