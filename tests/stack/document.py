"""The parts of `docs/reliability.md` that commands write, between two comments each."""

from __future__ import annotations

import re
from pathlib import Path

RELIABILITY = Path(__file__).parents[2] / "docs" / "reliability.md"


def _pattern(name: str) -> re.Pattern[str]:
    return re.compile(rf"(<!-- {name} -->\n)(.*?)(<!-- end of {name} -->)", re.DOTALL)


def read_part(name: str) -> str:
    """What stands in a part; raises `LookupError` where there is no such part."""
    found = _pattern(name).search(RELIABILITY.read_text("utf-8"))
    if found is None:
        raise LookupError(f"{RELIABILITY.name} has no part {name!r}")
    return found[2]


def write_part(name: str, text: str) -> None:
    """Put a text into a part, in place of what stands there."""
    read_part(name)
    document = RELIABILITY.read_text("utf-8")
    written = _pattern(name).sub(
        lambda found: f"{found[1]}{text}\n{found[3]}", document
    )
    RELIABILITY.write_text(written, "utf-8")
