"""A scene for every test, and a model that has a tool."""

import os
from collections.abc import AsyncIterator
from pathlib import Path

import pytest

from tests.browser.scene import Scene
from tests.stack.browser import Browser
from tests.stack.host import OpenWebUI

TOOL = '''"""
title: Tides
description: Looks up the tide
"""


class Tools:
    def look_up_tide(self, place: str) -> str:
        """
        Look up the next high tide.

        :param place: A harbour.
        """
        return "high tide in " + place + " at 14:05"
'''


@pytest.fixture
async def scene(
    browser: Browser, host: OpenWebUI, tmp_path: Path
) -> AsyncIterator[Scene]:
    """Pictures go to `MMC_SCREENSHOTS`, else to the test's own directory.

    At the end no script of any page may have failed.
    """
    scene = Scene(host, browser, Path(os.environ.get("MMC_SCREENSHOTS", tmp_path)))
    yield scene
    for page in scene.pages:
        await page.close()
    assert [error for page in scene.pages for error in page.errors] == []


@pytest.fixture(scope="session")
def sailor(host: OpenWebUI) -> str:
    """A workspace model on the scripted `toolie`, with a tool of its own."""
    host.create_tool("tides", TOOL, "Tides")
    host.create_model(
        {"id": "sailor", "base_model_id": "toolie", "meta": {"toolIds": ["tides"]}}
    )
    host.grant_read("sailor", "public")
    return "sailor"
