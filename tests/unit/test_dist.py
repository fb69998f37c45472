"""`make dist`: what is handed out, and its translations."""

import json
import re
import subprocess
import sys

from release.dist import FILE, LANGUAGES, ROOT, english, front_matter, translations
from tests.unit.plugin import mmc

BRACES = re.compile(r"\{\w+\}|`")


def test_every_label_of_the_panels_is_there_in_every_language() -> None:
    known = translations()
    missing = [
        f"{language}: {text}"
        for text in english().values()
        for language in LANGUAGES
        if not known.get(text, {}).get(language, "").strip()
    ]
    assert missing == [], "add these to release/texts.toml"


def test_nothing_is_translated_that_no_panel_shows() -> None:
    assert translations().keys() - set(english().values()) == set()


def test_a_translation_names_the_same_placeholders() -> None:
    for text, versions in translations().items():
        for version in versions.values():
            assert BRACES.findall(version) == BRACES.findall(text), version


def test_both_panels_are_among_the_labels() -> None:
    labels = english()
    for panel, valves in (
        ("valves", mmc.Pipe.Valves),
        ("user_valves", mmc.Pipe.UserValves),
    ):
        shown = valves.model_json_schema()["properties"]
        assert {f"{panel}.{name}.title" for name in shown} <= labels.keys()
    assert labels["valves.show_figures.enum.never"] == "never"


def test_dist_holds_the_file_and_the_same_as_an_export_of_open_webui() -> None:
    subprocess.run([sys.executable, "-m", "release.dist"], cwd=ROOT, check=True)
    dist = ROOT / "dist"
    assert (dist / FILE.name).read_text("utf-8") == FILE.read_text("utf-8")
    (function,) = json.loads((dist / f"{FILE.stem}.json").read_text("utf-8"))
    assert function["content"] == FILE.read_text("utf-8")
    assert function["name"] == front_matter("title")
    german = function["meta"]["i18n"]["de"]
    assert german["valves.rounds.title"] == "Runden"
    assert german["user_valves.rounds.title"] == "Runden"
    assert german["valves.show_figures.enum.never"] == "nie"
