"""The document on reliability says what the list of faults and the settings say."""

import ast
import re
from pathlib import Path

import pytest

from benchmarks.soak import GROWTH, Sample, curves, grown, growth
from tests.integration import document, faults
from tests.integration.crowd import Plan, of_crowd, speech
from tests.integration.faults import FAULTS, MODES, row
from tests.stack.scripts import Text
from tests.unit.plugin import SOURCE, mmc

WAITS = ("asyncio.timeout", "asyncio.wait", "asyncio.wait_for", "apart", "end_tasks")
LIMITS = ("timeout", "seconds")
SIZES = ("MOST_SAID", "MOST_IN_ALL", "MOST_RESULT", "MOST_FAILURES")
TEXT = document.RELIABILITY.read_text("utf-8")


def cells(line: str) -> tuple[str, ...]:
    """The cells of a table's line; a bar that is text has a backslash before it."""
    return tuple(
        cell.strip() for cell in re.split(r"(?<!\\)\|", line.strip().strip("|"))
    )


def test_the_table_of_faults_is_the_list() -> None:
    _, _, *lines = document.read_part("faults").strip().splitlines()
    assert [cells(line)[:4] for line in lines] == [row(fault) for fault in FAULTS]


def test_there_are_enough_faults_and_each_has_its_own_name() -> None:
    assert len(FAULTS) >= 30
    assert len({fault.name for fault in FAULTS}) == len(FAULTS)
    assert len({fault.what for fault in FAULTS}) == len(FAULTS)
    assert all(len(fault.calls) == len(MODES) == len(mmc.MODES) for fault in FAULTS)


def test_a_part_is_written_in_place_of_what_was_there(tmp_path: Path) -> None:
    path = tmp_path / "document.md"
    path.write_text("a\n<!-- x -->\nold\n<!-- end of x -->\nb\n")
    document.write_part("x", r"new \1", path)
    assert path.read_text() == "a\n<!-- x -->\nnew \\1\n<!-- end of x -->\nb\n"
    assert document.read_part("x", path) == "new \\1\n"
    with pytest.raises(LookupError):
        document.write_part("y", "", path)


def fixed_limits() -> set[float]:
    """The seconds that the code itself gives a wait, as numbers or named numbers."""
    found = set()
    for node in ast.walk(ast.parse(SOURCE)):
        if isinstance(node, ast.Call) and ast.unparse(node.func) in WAITS:
            named = [word.value for word in node.keywords if word.arg in LIMITS]
            for limit in (*node.args, *named):
                name = limit.id if isinstance(limit, ast.Name) else ""
                value = getattr(mmc, name, getattr(limit, "value", None))
                found |= {float(value)} if isinstance(value, int | float) else set()
    return found


def test_every_limit_in_time_is_listed_with_its_default() -> None:
    listed = TEXT.split("## Every wait has a limit")[1].split("\n## ")[0]
    fields = mmc.Settings.model_fields
    named = [n for n in fields if n.endswith(("timeout", "deadline", "patience"))]
    assert len(named) >= 6
    for name in named:
        assert f"`{name}`, {fields[name].default:g} s" in listed, name
    for seconds in fixed_limits():
        assert re.search(rf"\| {seconds:g} s\b", listed), seconds


@pytest.mark.parametrize("name", SIZES)
def test_every_limit_in_size_is_listed(name: str) -> None:
    assert f"| `{name}`, {getattr(mmc, name):,}" in TEXT


def test_the_limits_of_the_run_are_told() -> None:
    told = TEXT.split("The limits of the run")[1].split("\n\n")[0].replace("\n", " ")
    for name, value in faults.VALVES.items():
        told_of = name not in ("skip_after", "fold_drafts")
        assert not told_of or f"{value} " in told, name


def sample(minute: float, **held: float) -> Sample:
    """A sample with these counts; the others stay as they are."""
    values = {"memory": 100.0, "tasks": 10, "threads": 8, "files": 30, **held}
    counts = {name: int(values[name]) for name in ("tasks", "threads", "files")}
    return Sample(minute, 10, values["memory"], **counts, stall=0.0)


@pytest.mark.parametrize("name", GROWTH)
def test_what_grows_is_found_and_what_goes_up_and_down_is_not(name: str) -> None:
    level = {"memory": 100.0, "tasks": 10, "threads": 8, "files": 30}[name]
    swings = [sample(at, **{name: level + at % 2}) for at in range(30)]
    grows = [sample(at, **{name: level + at}) for at in range(30)]
    late = [sample(at, **{name: level + 20 * (at > 3)}) for at in range(30)]
    assert grown(swings) == [] and grown(late) == []
    assert [told.split()[0] for told in grown(grows)] == [name]
    assert set(growth(grows)) == set(GROWTH)
    minute, times = curves(grows)[name][-1]
    assert minute == 29 and times == pytest.approx((level + 29) / level)


def test_a_speaker_of_a_crowd_says_whose_it_is_or_that_it_was_mixed_up() -> None:
    plan = Plan(1, words=3, pace=0)
    assert of_crowd("crowd") is None

    def says(question: str) -> list[str]:
        behaviour = of_crowd(plan.member)
        assert behaviour is not None
        steps = behaviour({"messages": [{"role": "user", "content": question}]}).steps
        return [step.text for step in steps if isinstance(step, Text)]

    assert says("What of m0017?") == [speech("m0017", 3)] == ["m0017.0 m0017.1 m0017.2"]
    assert "mixed up" in says("What of m0017 and m0018?")[0]
