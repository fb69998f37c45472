"""The benchmarks measure what their table lists, and the pure rows run."""

import ast
import re
from pathlib import Path

import pytest

from benchmarks import core, plots, served, verdicts
from benchmarks.page import longest_task
from benchmarks.table import FIGURES, Measured, Results, compared, load, met
from tests.stack.host import Json
from tests.stack.page import Chat, Event, Reply

BENCHMARKS = Path(core.__file__).parent
RIVALS = sorted((BENCHMARKS / "rivals").glob("*_per_token.py"))


def names_in(*files: str) -> set[str]:
    """The texts that stand in these files of the benchmarks."""
    trees = [ast.parse((BENCHMARKS / name).read_text("utf-8")) for name in files]
    nodes = (node for tree in trees for node in ast.walk(tree))
    return {str(n.value) for n in nodes if isinstance(n, ast.Constant)}


def test_the_table_has_every_row() -> None:
    assert {figure.row for figure in FIGURES.values()} == set(range(1, 16))


def test_every_figure_is_taken_somewhere() -> None:
    texts = names_in("core.py", "served.py", "page.py", "verdicts.py")
    made = {f"{name}_{speed}" for name in ("bytes", "events", "cpu") for speed in texts}
    made |= {f"page_{length}_{name}" for length in texts for name in texts}
    assert FIGURES.keys() <= texts | made


def test_the_pure_rows_run() -> None:
    figures = core.tool_arguments(times=1)
    figures |= core.stream_cost(megabytes=0.05, times=1)
    figures |= core.memory(tokens=400)
    assert all(measured.ours >= 0 for measured in figures.values())
    figures |= verdicts.measure(trials=20)
    pure = {key for key, figure in FIGURES.items() if figure.row in (9, 10, 14, 15)}
    assert figures.keys() == pure


def test_simulated_judges_find_the_best_answer_more_often_than_chance() -> None:
    for found in verdicts.curves(trials=60)["verdicts"].values():
        assert [members for members, _ in found] == list(range(3, 9))
        assert all(percent > 30 for _, percent in found)


def test_without_noise_and_bias_the_best_answer_is_always_found() -> None:
    clear = verdicts.Setting(8, 0, 0, 0, 0, 0, step=0.5, middle=5.0, invalid=0)
    (found,) = verdicts.found_by([verdicts.ours], clear, 50)
    assert verdicts.share_of(found) == verdicts.Share(100.0, 0.0)


def test_what_is_measured_is_all_of_the_stream() -> None:
    section = core.make_section()
    events = core.consume(section, core.text_stream(100))
    _, text = section.screen.transcript.blocks
    assert text.text == (core.CHUNK_TEXT * 100).lstrip()
    assert 5 < events < 15
    section = core.make_section(tools=3)
    core.consume(section, core.call_stream(20))
    (card,) = (b for b in section.screen.transcript.blocks if b.kind == "function_call")
    assert card.text == core.PIECE * 20


@pytest.mark.parametrize(
    ("key", "measured", "number", "verdict"),
    [
        ("bytes_200", Measured(10, 100), 0.1, True),
        ("bytes_200", Measured(50, 100), 0.5, False),
        ("bytes_200", Measured(50), None, None),
        ("throughput", Measured(100, 100), 1.0, False),
        ("throughput", Measured(150, 100), 1.5, True),
        ("first_character", Measured(70, 50), 20, True),
        ("chunk", Measured(9), 9, False),
        ("pause", Measured(9), 9, None),
    ],
)
def test_a_verdict_is_about_the_limit(
    key: str, measured: Measured, number: float | None, verdict: bool | None
) -> None:
    assert compared(key, measured) == number
    assert met(key, measured) is verdict


def test_a_word_is_late_by_what_lies_between_its_model_and_the_socket() -> None:
    def added(text: str) -> Json:
        item = {"type": "message", "content": [{"type": "output_text", "text": text}]}
        return {"type": "response.output_item.added", "item": item}

    pieces: list[tuple[str, Json, float]] = [
        ("response:completion", added("### P0"), 9.9),
        ("response:completion", added("t=10.0 One tw"), 10.5),
        ("status", {"delta": "nothing"}, 11.0),
        ("response:completion", {"delta": "o "}, 12.0),
        ("response:completion", {"choices": [{"delta": {"content": "three"}}]}, 12.1),
        ("chat:completion", {"done": True, "content": "t=10.0 One"}, 99.0),
    ]
    reply = Reply(Chat(), {})
    reply.events = [Event(kind, data, at, 0) for kind, data, at in pieces]
    late = served.delays(reply, pace=2.0)
    assert late == pytest.approx([10.5 - 10.5, 12.0 - 11.0, 12.1 - 11.5])


def test_the_longest_task_is_the_main_threads() -> None:
    def mark(phase: str, task: str, thread: int, milliseconds: float) -> Json:
        where = {"pid": 1, "tid": thread, "ts": milliseconds * 1000}
        return {"name": "Task", "ph": phase, "id2": {"local": task}, **where}

    def named(thread: int, name: str) -> Json:
        return mark("M", "", thread, 0) | {
            "name": "thread_name",
            "args": {"name": name},
        }

    trace = [
        mark("e", "a", 1, 5),
        mark("b", "a", 1, 0),
        *(mark("b", "b", 2, 0), mark("e", "b", 2, 900)),
        *(mark("b", "a", 1, 20), mark("e", "a", 1, 140)),
        mark("b", "c", 1, 150),
        named(1, "CrRendererMain"),
        named(2, "Compositor"),
    ]
    assert longest_task(trace) == 120
    with pytest.raises(ValueError, match="empty"):
        longest_task(trace[-2:])


def test_results_are_the_same_after_a_round_trip(tmp_path: Path) -> None:
    figures = {"chunk": Measured(9.5), "bytes_200": Measured(1, 2, 3, 4)}
    results = Results(figures, {"page": {"ours": [[1, 2]]}}, {"python": "3"})
    results.save(tmp_path / "results.json")
    assert load(tmp_path / "results.json") == results
    assert results.missed() == ["chunk", "bytes_200"]
    assert load(tmp_path / "nothing.json") == Results()


def test_every_plot_is_drawn_from_what_was_measured(tmp_path: Path) -> None:
    samples = {side: [[10, 100, 0.1], [2000, 9000, 0.5]] for side in plots.NAMES}
    curves = {needed: samples for needed, _, _ in plots.DRAWN.values()}
    names = plots.write(curves, tmp_path)
    assert names == list(plots.DRAWN)
    for name in names:
        drawing = (tmp_path / name).read_text("utf-8")
        assert drawing.startswith("<svg")
        assert drawing.count("<polyline") == len(plots.NAMES)
    assert plots.write({}, tmp_path) == []


@pytest.mark.parametrize("path", RIVALS, ids=lambda path: path.stem)
def test_a_rival_is_small(path: Path) -> None:
    assert len(path.read_text("utf-8").splitlines()) <= 60


def test_the_readme_lists_every_figure_and_plot() -> None:
    readme = (BENCHMARKS / "README.md").read_text("utf-8")
    assert len(RIVALS) == 2
    for figure in FIGURES.values():
        assert re.search(rf"\| {figure.row} \| {re.escape(figure.what)} \|", readme)
    for name in plots.DRAWN:
        assert f"../docs/{name}" in readme
