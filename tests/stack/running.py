"""Running a coroutine from a test."""

import asyncio
import threading
from collections.abc import Coroutine
from concurrent.futures import Future
from typing import Any, TypeVar

T = TypeVar("T")


def run(work: Coroutine[Any, Any, T]) -> T:
    """What `work` returns, run in an event loop on a thread of its own.

    Not `asyncio.run`: Playwright keeps a loop running on the main thread for as long
    as a browser is open, and two loops cannot share a thread.
    """
    result: Future[T] = Future()

    def target() -> None:
        try:
            result.set_result(asyncio.run(work))
        except BaseException as e:  # handed to the waiting thread, whatever it is
            result.set_exception(e)

    threading.Thread(target=target, name="run", daemon=True).start()
    return result.result()
