"""What both tests of linear reading measure with."""

import gc
import time
from collections.abc import Callable
from typing import TypeVar

Text = TypeVar("Text")

LENGTHS = (10_000, 20_000, 40_000)  # characters
MOST = 3.0  # times as long for a text of twice the length: linear is 2, quadratic 4
TRIES = 6  # before it is called slow: a machine may be busy with something else


def again(unit: str, before: str = "", after: str = "") -> Callable[[int], str]:
    """A text of about any length that is one unit again and again."""
    return lambda length: before + unit * (length // len(unit)) + after


def seconds(read: Callable[[Text], object], text: Text) -> float:
    """What reading a text costs this thread alone.

    Without the garbage collector, as `timeit` does: whether it walks all that earlier
    tests left in memory depends on how many objects the longest text makes.
    """
    gc.disable()
    try:
        begun = time.thread_time()
        read(text)
        return time.thread_time() - begun
    finally:
        gc.enable()
