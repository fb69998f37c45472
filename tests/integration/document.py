"""The parts of `docs/reliability.md` that commands write, between two comments each."""

from __future__ import annotations

import re
from pathlib import Path

RELIABILITY = Path(__file__).parents[2] / "docs" / "reliability.md"


def _pattern(name: str) -> re.Pattern[str]:
    return re.compile(rf"(<!-- {name} -->\n)(.*?)(<!-- end of {name} -->)", re.DOTALL)


def read_part(name: str, document: Path = RELIABILITY) -> str:
    """What stands in a part; raises `LookupError` where there is no such part."""
    found = _pattern(name).search(document.read_text("utf-8"))
    if found is None:
        raise LookupError(f"{document.name} has no part {name!r}")
    return found[2]


def write_part(name: str, text: str, document: Path = RELIABILITY) -> None:
    """Put a text into a part, in place of what stands there."""
    read_part(name, document)
    before = document.read_text("utf-8")
    after = _pattern(name).sub(lambda at: f"{at[1]}{text}\n{at[3]}", before)
    document.write_text(after, "utf-8")
