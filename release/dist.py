"""`make dist`: what is handed out, in `dist/`: the file, and the same as a function's
JSON (*Import JSON* in the admin's panel) with its panels in other languages."""

import json
import shutil
import tomllib
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from pydantic import BaseModel

import multi_model_conversation as mmc

ROOT = Path(__file__).parent.parent
FILE = ROOT / "multi_model_conversation.py"
LANGUAGES = ("de", "fr", "es", "zh")
"""Open WebUI looks for a page's locale (`de-DE`), and then for its language (`de`)."""


def front_matter(field: str) -> str:
    """A field of the file's first docstring."""
    lines = (mmc.__doc__ or "").splitlines()
    return next(line.split(": ", 1)[1] for line in lines if line.startswith(field))


def panel_texts(valves: type[BaseModel], panel: str) -> Iterator[tuple[str, str]]:
    """What a panel shows: the key that Open WebUI looks for, and the English text."""
    for name, shown in valves.model_json_schema()["properties"].items():
        yield f"{panel}.{name}.title", shown["title"]
        yield f"{panel}.{name}.description", shown["description"]
        for choice in shown.get("enum", ()):
            yield f"{panel}.{name}.enum.{choice}", choice


def english() -> dict[str, str]:
    """Every text that can be translated, by Open WebUI's key."""
    return {
        "name": front_matter("title"),
        "description": front_matter("description"),
        **dict(panel_texts(mmc.Pipe.Valves, "valves")),
        **dict(panel_texts(mmc.Pipe.UserValves, "user_valves")),
    }


def translations() -> dict[str, dict[str, str]]:
    """English text -> language -> text."""
    return tomllib.loads((ROOT / "release" / "texts.toml").read_text("utf-8"))


def function() -> dict[str, Any]:
    """The function as Open WebUI exports one. Raises `KeyError` with a text that is not
    translated."""
    texts, known = english(), translations()
    i18n = {
        language: {key: known[text][language] for key, text in texts.items()}
        for language in LANGUAGES
    }
    return {
        "id": FILE.stem,
        "name": texts["name"],
        "type": "pipe",
        "content": FILE.read_text("utf-8"),
        "meta": {"description": texts["description"], "i18n": i18n},
    }


def main() -> None:
    """Write `dist/`."""
    place = ROOT / "dist"
    place.mkdir(exist_ok=True)
    shutil.copy(FILE, place)
    exported = json.dumps([function()], ensure_ascii=False, indent=1)
    (place / f"{FILE.stem}.json").write_text(exported, "utf-8")
    print(*(f"dist/{path.name}" for path in sorted(place.iterdir())), sep="\n")


if __name__ == "__main__":
    main()
