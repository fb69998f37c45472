"""The table of versions keeps what was not run again, and names what failed."""

import sys
from pathlib import Path

import pytest

from tests.compat.__main__ import DOCUMENT, environment_of, read_report
from tests.compat.table import BEGIN, END, HEAD, Outcome, Row, with_rows
from tests.versions import from_version, program, server_version

REPORT = """<testsuites><testsuite>
<testcase classname="tests.integration.test_a" name="test_one"/>
<testcase classname="tests.integration.test_a" name="test_two"><failure/></testcase>
<testcase classname="tests.integration.test_a" name="test_three"><skipped/></testcase>
<testcase classname="tests.integration.test_b" name="test_four"><error/></testcase>
</testsuite></testsuites>"""


def row(version: str, **changed: object) -> Row:
    """A version in which everything is well."""
    well = Outcome(3, 0, (), 12.0)
    fields = {
        "plugin": "0.2.0",
        "python": "3.11",
        "day": "2026-01-31",
        "missing": (),
        "done_without": (),
        "integration": well,
        "smoke": well,
        **changed,
    }
    return Row(version, **fields)  # type: ignore[arg-type]


def test_a_report_is_read_with_the_names_of_what_failed(tmp_path: Path) -> None:
    report = tmp_path / "report.xml"
    report.write_text(REPORT)
    failed = ("tests.integration.test_a.test_two", "tests.integration.test_b.test_four")
    assert read_report(report, 2.0) == Outcome(1, 1, failed, 2.0)
    assert read_report(report, 2.0).cell() == (
        "1 passed, **2 failed**, 1 skipped in 2 s"
    )


def test_no_report_is_a_failure(tmp_path: Path) -> None:
    assert read_report(tmp_path / "none.xml", 1.0).failed


def test_what_failed_is_run_again_and_the_table_says_so() -> None:
    first = Outcome(5, 1, ("a", "b"), 20.0)
    assert first.then(Outcome(1, 0, ("b",), 2.0)).cell() == (
        "6 passed (1 of them when run again), **1 failed**, 1 skipped in 22 s"
    )
    assert first.then(Outcome(2)).cell() == (
        "7 passed (2 of them when run again), 1 skipped in 20 s"
    )
    nothing_ran, did_not_start = Outcome(), Outcome(failed=("no start",))
    assert first.then(nothing_ran) == first == first.then(did_not_start)


def test_a_row_replaces_that_of_its_version_and_leaves_the_others() -> None:
    text = f"# Title\n\n{BEGIN}\n{HEAD}\n{END}\n\nText.\n"
    both = with_rows(text, [row("0.12.4"), row("0.9.1")])
    again = with_rows(both, [row("0.12.4", missing=("a is gone",))])
    lines = [line for line in again.splitlines() if line.startswith("| 0.")]
    assert [line.split("|")[1].strip() for line in lines] == ["0.9.1", "0.12.4"]
    assert "**1 missing**" in lines[1] and "all" in lines[0]
    assert again.startswith("# Title\n\n") and again.endswith(f"{END}\n\nText.\n")


def test_each_python_has_a_row_of_its_own() -> None:
    text = f"{BEGIN}\n{HEAD}\n{END}\n"
    both = with_rows(text, [row("0.12.4", python="3.12"), row("0.12.4")])
    again = with_rows(both, [row("0.12.4", python="3.12", day="2026-02-01")])
    lines = [line for line in again.splitlines() if line.startswith("| 0.")]
    assert [line.split("|")[-3:-1] for line in lines] == [
        [" 3.11 ", " 2026-01-31 "],
        [" 3.12 ", " 2026-02-01 "],
    ]


def test_our_own_version_is_run_where_it_is_installed() -> None:
    folder = environment_of(server_version())
    assert folder == Path(sys.prefix)
    assert environment_of("0.11.0") != folder
    assert program() == folder / "bin" / "open-webui"


def test_a_test_of_what_came_later_is_skipped_with_the_reason() -> None:
    assert not from_version(server_version(), "it is there").args[0]
    later = from_version("999.1", "it is there")
    assert later.args[0] and later.kwargs["reason"] == "it is there from 999.1"


@pytest.mark.parametrize(
    ("changed", "good"),
    [
        ({}, True),
        ({"done_without": ("a is gone",)}, True),
        ({"missing": ("a is gone",)}, False),
        ({"smoke": Outcome(failed=("a",))}, False),
        ({"integration": Outcome(failed=("a",))}, False),
    ],
)
def test_a_row_is_good_where_nothing_is_missing_and_nothing_failed(
    changed: dict[str, object], good: bool
) -> None:
    assert row("0.12.4", **changed).good is good


def test_the_document_has_a_place_for_rows() -> None:
    text = DOCUMENT.read_text("utf-8")
    assert with_rows(text, []) == text
