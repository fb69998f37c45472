"""The scripted models as a process of their own, with more families of ids.

`stamped-N-R` begins with the monotonic time at which it was asked and goes on with
N tokens at R tokens/s; `member-N-R` answers with N tokens at R, and ranks and
concludes briefly. Those of a crowd and those with a fault are here too.
"""

from __future__ import annotations

import re
import sys
import threading
import time
from collections.abc import Sequence

from tests.integration.crowd import of_crowd
from tests.integration.faults import FAULTY, STEADY
from tests.integration.members import member
from tests.stack.behaviours import of_family, prose, with_tasks
from tests.stack.models import ModelServer
from tests.stack.prompts import stage_of
from tests.stack.scripts import Behaviour, Body, Script, Text

STAMP = re.compile(r"t=(\d+\.\d+)\s")
STAMPED = re.compile(r"stamped-(\d+)-(\d+)")
MEMBER = re.compile(r"member-(\d+)-(\d+)")


def stamped(count: int, pace: float) -> Behaviour:
    """Make a model that says when its first token left."""

    def behave(body: Body) -> Script:
        return Script([Text(f"t={time.monotonic():.6f} {prose(count)}")], pace=pace)

    return with_tasks(behave)


def council_member(count: int, pace: float) -> Behaviour:
    """Make a member of a council whose answer alone is long."""
    brief = member("oak")

    def behave(body: Body) -> Script:
        if stage_of(body) == "answer":
            return Script([Text(prose(count))], pace=pace)
        return brief(body)

    return behave


def behaviour(model: str) -> Behaviour | None:
    """Make the model an id describes."""
    if match := STAMPED.fullmatch(model):
        return stamped(int(match[1]), float(match[2]))
    if match := MEMBER.fullmatch(model):
        return council_member(int(match[1]), float(match[2]))
    known = FAULTY.get(model) or STEADY.get(model)
    return known or of_crowd(model) or of_family(model)


def main(models: Sequence[str]) -> int:
    """Serve these models until the other end of standard input is closed."""
    server = ModelServer(models=[])
    for model in models:
        server.add(model, behaviour(model))
    with server:
        print(server.openai_url, flush=True)
        ended = threading.Thread(target=sys.stdin.read)
        ended.start()
        ended.join()
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
