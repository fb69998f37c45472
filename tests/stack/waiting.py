"""Waiting for a condition, always with a deadline."""

import asyncio
import time
from collections.abc import Callable

INTERVAL = 0.05
"""Seconds between two looks at a condition."""


def wait_until(condition: Callable[[], object], timeout: float, what: str) -> None:
    """Return once `condition()` is true.

    Raises `TimeoutError` naming `what` after `timeout` seconds.
    """
    deadline = time.monotonic() + timeout
    while not condition():
        if time.monotonic() > deadline:
            raise TimeoutError(f"{what}: still not so after {timeout:g} s")
        time.sleep(INTERVAL)


async def wait_until_async(
    condition: Callable[[], object], timeout: float, what: str
) -> None:
    """Do what `wait_until` does, without holding up the event loop."""
    deadline = time.monotonic() + timeout
    while not condition():
        if time.monotonic() > deadline:
            raise TimeoutError(f"{what}: still not so after {timeout:g} s")
        await asyncio.sleep(INTERVAL)
