"""What came of the tests against a version, and its row in the document."""

from collections.abc import Iterable
from dataclasses import dataclass, replace
from pathlib import Path

from tests.versions import version_key

BEGIN, END = "<!-- rows: make compat -->", "<!-- end of rows -->"
HEAD = """\
| Open WebUI | names | integration tests | browser | file | Python | day |
|--|--|--|--|--|--|--|"""


@dataclass(frozen=True, slots=True)
class Outcome:
    """How a suite ended: counts, the names of what failed, and seconds."""

    passed: int = 0
    skipped: int = 0
    failed: tuple[str, ...] = ()
    seconds: float = 0.0
    again: int = 0
    """How many of those that passed did so only when they were run again."""

    def then(self, second: "Outcome") -> "Outcome":
        """With a run of just those that failed; itself where that ran others."""
        if second.passed + len(second.failed) != len(self.failed):
            return self
        return replace(
            self,
            passed=self.passed + second.passed,
            failed=second.failed,
            seconds=self.seconds + second.seconds,
            again=second.passed,
        )

    def cell(self) -> str:
        """For the table."""
        again = f" ({self.again} of them when run again)" if self.again else ""
        parts = [f"{self.passed} passed{again}"]
        parts += [f"**{len(self.failed)} failed**"] if self.failed else []
        parts += [f"{self.skipped} skipped"] if self.skipped else []
        return f"{', '.join(parts)} in {self.seconds:.0f} s"


@dataclass(frozen=True, slots=True)
class Row:
    """One version: what it lacks, and how the tests ended there."""

    version: str
    plugin: str
    python: str
    day: str
    missing: tuple[str, ...]
    done_without: tuple[str, ...]
    integration: Outcome
    smoke: Outcome

    @property
    def good(self) -> bool:
        """Whether nothing is missing and nothing failed."""
        return not (self.missing or self.integration.failed or self.smoke.failed)

    def names(self) -> str:
        """Whether all names of the host that the file uses are there."""
        if self.missing:
            return f"**{len(self.missing)} missing**"
        without = len(self.done_without)
        return f"all but {without} it does without" if without else "all"

    def line(self) -> str:
        """The row as Markdown."""
        suites = (self.integration.cell(), self.smoke.cell())
        cells = (self.version, self.names(), *suites, self.plugin, self.python)
        return f"| {' | '.join(cells)} | {self.day} |"

    def summary(self) -> str:
        """The row for a reader of the terminal, with every name."""
        bad = (*self.missing, *self.integration.failed, *self.smoke.failed)
        return "\n  ".join((self.line(), *self.done_without, *bad))


def row_key(line: str) -> tuple[list[int], list[int]]:
    """What a row is about: an Open WebUI in a Python. Sorts 0.9 before 0.12."""
    cells = [cell.strip() for cell in line.strip("|").split("|")]
    return version_key(cells[0]), version_key(cells[-2])


def with_rows(text: str, rows: Iterable[Row]) -> str:
    """The document with these rows in place of those about the same."""
    before, _, rest = text.partition(BEGIN)
    table, _, after = rest.partition(END)
    lines = [*table.strip().splitlines()[2:], *(row.line() for row in rows)]
    last = {str(row_key(line)): line for line in lines}
    in_order = sorted(last.values(), key=row_key)
    return "\n".join((f"{before}{BEGIN}", HEAD, *in_order, f"{END}{after}"))


def write_rows(document: Path, rows: Iterable[Row]) -> None:
    """Change the document."""
    text = document.read_text("utf-8")
    document.write_text(with_rows(text, rows), "utf-8")
