"""A talk for every test."""

from collections.abc import Iterator

import pytest

from tests.conftest import FUNCTION_ID
from tests.integration.talk import Talk
from tests.stack.host import Account, OpenWebUI
from tests.stack.models import ModelServer


@pytest.fixture
def talk(host: OpenWebUI, model_server: ModelServer, user: Account) -> Iterator[Talk]:
    """A plain user's talk; nothing is set yet, and nothing stays set."""
    host.set_user_valves(user, FUNCTION_ID, {})
    model_server.wait_for(lambda server: server.in_flight == 0)
    model_server.clear()
    yield Talk(host, model_server, user)
    host.set_valves(FUNCTION_ID, {})


GARDEN = '''
import asyncio
import base64

from fastapi.responses import HTMLResponse

meeting = asyncio.Barrier(2)
inside = []


class Tools:
    async def look_up(self, topic: str, limit: int = 3) -> str:
        """
        Look a topic up in the almanac.
        :param topic: What to look up.
        :param limit: How many lines.
        """
        return f"The almanac on {topic}: {limit} lines."

    async def breaks(self) -> str:
        """Always fails."""
        raise ValueError("The shed is locked.")

    async def never_ends(self, __event_emitter__=None) -> str:
        """Waits for ever."""
        status = {"description": "started", "done": False}
        await __event_emitter__({"type": "status", "data": status})
        await asyncio.Event().wait()

    async def meet(self) -> str:
        """Waits until it is called a second time."""
        await meeting.wait()
        return "we met"

    async def crowd(self) -> str:
        """Says how many calls of it run at the same time."""
        inside.append(1)
        seen = len(inside)
        await asyncio.sleep(0.2)
        inside.pop()
        return f"{seen} at once"

    async def tell(self, __event_emitter__=None) -> str:
        """Says what it is doing."""
        status = {"description": "The gardener digs.", "done": True}
        await __event_emitter__({"type": "status", "data": status})
        return "dug"

    async def draw_page(self) -> HTMLResponse:
        """Shows a page."""
        headers = {"Content-Disposition": "inline"}
        return HTMLResponse("<h1>The plan</h1>", headers=headers)

    async def draw_image(self) -> str:
        """Shows an image."""
        return "data:image/png;base64,PIXEL"

    async def attach(self, __event_emitter__=None) -> str:
        """Attaches a file to the answer."""
        files = [{"type": "file", "name": "plan.txt", "url": "/plan.txt"}]
        await __event_emitter__({"type": "files", "data": {"files": files}})
        return "attached"

    async def cite(self, __event_emitter__=None) -> str:
        """Cites a book."""
        source = {
            "source": {"name": "The Almanac", "url": "https://example.com/almanac"},
            "document": ["Oaks live long."],
            "metadata": [{"source": "https://example.com/almanac"}],
        }
        await __event_emitter__({"type": "source", "data": source})
        return "Oaks live long."

    async def who_asks(self, __user__=None, __messages__=None) -> str:
        """Names the user."""
        return f"{__user__['name']}, {len(__messages__ or [])} messages"
'''
PIXEL = (
    "iVBORw0KGgoAAAANSUhEUgAAAAEAAAABCAYAAAAfFcSJAAAADUlEQVR42mNk+M9QDwADhgGAWjR9"
    "awAAAABJRU5ErkJggg=="
)


@pytest.fixture(scope="session")
def garden(host: OpenWebUI) -> str:
    """A workspace tool with functions of every kind."""
    host.create_tool("garden", GARDEN.replace("PIXEL", PIXEL))
    return "garden"
