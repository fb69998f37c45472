"""What the documents say is what the code does."""

import ast
import re
import tomllib
from pathlib import Path

import pytest
from pydantic import BaseModel
from pydantic.fields import FieldInfo

from tests.unit.plugin import SOURCE, mmc

ROOT = Path(__file__).parents[2]
README = (ROOT / "README.md").read_text("utf-8")
DOCUMENTS = ("README.md", "CONTRIBUTING.md", "CHANGELOG.md", "SECURITY.md")


def default_text(value: object) -> str:
    """A default as the table shows it."""
    if value is None:
        return "unset"
    if value in ("", []):
        return "none"
    return "a text" if len(str(value)) > 40 else f"`{value}`"


def row(name: str, field: FieldInfo) -> str:
    """A setting's row in the table."""
    description = str(field.description).replace("|", r"\|")
    default = default_text(field.default)
    title = name.replace("_", " ").title()
    return f"| {title} | `{name}` | {default} | {description} |"


def rows(valves: type[BaseModel]) -> list[str]:
    """The rows of what a panel shows."""
    shown = valves.model_json_schema()["properties"]
    return [row(name, valves.model_fields[name]) for name in shown]


def between(start: str, end: str) -> list[str]:
    """The table rows between two lines that stand in the README."""
    part = README.split(start)[1].split(end)[0]
    return [line for line in part.splitlines() if re.match(r"\| .* \| `", line)]


def test_the_readme_lists_every_setting_of_a_user() -> None:
    listed = between("## All settings", "Only the administrator sets these")
    assert listed == rows(mmc.Pipe.UserValves)


def test_the_readme_lists_every_other_setting_of_the_administrator() -> None:
    users = rows(mmc.Pipe.UserValves)
    listed = between("Only the administrator sets these", "## What participants see")
    assert listed == [each for each in rows(mmc.Pipe.Valves) if each not in users]


def test_the_readme_names_the_settings_that_no_panel_shows() -> None:
    shown = mmc.Pipe.Valves.model_json_schema()["properties"]
    hidden = mmc.Pipe.Valves.model_fields.keys() - shown.keys()
    assert hidden
    assert [name for name in hidden if f"`{name}`" not in README] == []


def texts_of_the_code() -> str:
    """Every text in the code; what an f-string fills in is left out."""
    parts = [
        (
            "".join(str(v.value) for v in node.values if isinstance(v, ast.Constant))
            if isinstance(node, ast.JoinedStr)
            else node.value
        )
        for node in ast.walk(ast.parse(SOURCE))
        if isinstance(node, ast.JoinedStr | ast.Constant)
    ]
    return "\n".join(part for part in parts if isinstance(part, str))


def quoted_messages() -> list[str]:
    """What the troubleshooting table quotes of ours."""
    table = README.split("## Troubleshooting")[1].split("\n## ")[0]
    symptoms = [line.split(" | ")[0] for line in table.splitlines()]
    return [quote for text in symptoms for quote in re.findall(r"`([^`]+)`", text)]


def test_the_code_says_what_the_troubleshooting_table_quotes() -> None:
    said = texts_of_the_code()
    quoted = quoted_messages()
    assert len(quoted) > 20
    for message in quoted:
        pieces = re.split(r'…|\d+|\*\*Ann\*\*|"', message)
        assert all(piece.strip(" :.") in said for piece in pieces), message


def test_the_comparison_has_the_figures_of_the_last_benchmark() -> None:
    last = (ROOT / "benchmarks" / "README.md").read_text("utf-8")
    measured = {
        "Socket bytes a token": "socket bytes a token, 200 tokens/s",
        "Server CPU per 1,000 tokens, s": "server CPU per 1,000 tokens, 200 tokens/s",
        "Tokens a second, models that do not wait": "tokens/s, models that do not wait",
    }
    for ours, theirs in measured.items():
        shown = README.split(f"| {ours} |")[1].split("\n")[0]
        cells = last.split(f" | {theirs} |")[1].split("\n")[0].split("|")[1:5]
        assert re.findall(r"[\d,.]*\d", shown) == [cell.strip() for cell in cells]


def test_the_readme_names_every_mode() -> None:
    for mode in mmc.MODES.values():
        assert f"**{mode.name} · Conversation**" in README


@pytest.mark.parametrize("document", ["README.md", "CONTRIBUTING.md"])
def test_every_command_shown_is_a_target_of_the_makefile(document: str) -> None:
    makefile = (ROOT / "Makefile").read_text("utf-8")
    targets = set(re.findall(r"(?m)^([a-z][\w-]*):", makefile))
    text = (ROOT / document).read_text("utf-8")
    commands = [
        c for b in re.findall(r"```sh\n(.*?)```", text, re.S) for c in b.split("\n")
    ]
    assert any(commands)
    for command in filter(None, commands):
        words = [word for word in command.split() if "=" not in word]
        assert words[0] == "make" and set(words[1:]) <= targets, command


def test_the_versions_agree() -> None:
    front = re.search(r"(?m)^version: (.+)$", SOURCE)
    project = tomllib.loads((ROOT / "pyproject.toml").read_text("utf-8"))["project"]
    changes = (ROOT / "CHANGELOG.md").read_text("utf-8")
    newest = re.search(r"(?m)^## \[([\d.]+)\] - \d{4}-\d\d-\d\d$", changes)
    assert front and newest
    assert front[1] == project["version"] == newest[1]


def test_what_development_needs_is_named_and_pinned() -> None:
    project = tomllib.loads((ROOT / "pyproject.toml").read_text("utf-8"))
    named = {name.split("[")[0] for name in project["dependency-groups"]["dev"]}
    pins = (ROOT / "constraints.txt").read_text("utf-8").split()
    # The Makefile installs these two by name, before the group.
    assert {pin.split("==")[0] for pin in pins} == named | {"pip", "torch"}


def test_the_readme_names_the_versions_it_needs() -> None:
    needed = re.search(r"(?m)^required_open_webui_version: (\d+\.\d+)", SOURCE)
    tested = re.search(
        r"(?m)^open-webui==(.+)$", (ROOT / "constraints.txt").read_text("utf-8")
    )
    assert needed and f"Open WebUI {needed[1]} or later" in README
    assert tested and f"tested with {tested[1]}" in README


@pytest.mark.parametrize("document", DOCUMENTS)
def test_what_is_linked_exists(document: str) -> None:
    text = (ROOT / document).read_text("utf-8")
    for target in re.findall(r"\]\((?!https?:)([^)#]+)\)", text):
        assert (ROOT / target).is_file(), target


def test_the_readme_links_to_its_own_headings() -> None:
    titles = re.findall(r"(?m)^#+ (.+)$", README)
    anchors = {title.lower().replace(" ", "-") for title in titles}
    assert set(re.findall(r"\]\(#([^)]+)\)", README)) <= anchors


def test_the_pictures_are_small_enough_to_load_at_once() -> None:
    tour = ROOT / "docs" / "tour"
    pictures = {path.stem: path.stat().st_size for path in tour.iterdir()}
    assert 0 < pictures.pop("council") <= 3_000_000  # the one that moves
    assert len(pictures) == 10
    assert max(pictures.values()) <= 250_000


def test_the_tour_shows_every_picture() -> None:
    shown = re.findall(r"\]\((tour/[^)]+)\)", (ROOT / "docs" / "tour.md").read_text())
    assert set(shown) == {
        str(path.relative_to(ROOT / "docs")) for path in (ROOT / "docs/tour").iterdir()
    }
