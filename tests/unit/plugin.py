"""The plugin, loaded once as the host loads it: its text run in a registered module."""

import sys
from pathlib import Path
from types import ModuleType
from typing import TYPE_CHECKING

__all__ = ["PATH", "SOURCE", "load", "mmc"]

PATH = Path(__file__).parents[2] / "multi_model_conversation.py"
SOURCE = PATH.read_text("utf-8")


def load(name: str) -> ModuleType:
    """The plugin as a module of this name, which is registered only meanwhile."""
    module = ModuleType(name)
    sys.modules[name] = module
    try:
        exec(compile(SOURCE, str(PATH), "exec"), module.__dict__)
    finally:
        del sys.modules[name]
    return module


if TYPE_CHECKING:
    import multi_model_conversation as mmc
else:
    mmc = load("function_multi_model_conversation_0123456789abcdef0123456789abcdef")
    assert "open_webui" not in sys.modules
