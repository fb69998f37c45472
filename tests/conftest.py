"""The stack the tests share: one of each for the whole session."""

from collections.abc import AsyncIterator, Iterator
from pathlib import Path

import pytest

from tests.stack.browser import Browser
from tests.stack.host import Account, OpenWebUI
from tests.stack.models import ModelServer

FUNCTION_ID = "multi_model_conversation"
FUNCTION_NAME = "Multi-Model Conversation"
FUNCTION = Path(__file__).parent.parent / f"{FUNCTION_ID}.py"


@pytest.fixture(scope="session")
def model_server() -> Iterator[ModelServer]:
    """The scripted models."""
    with ModelServer() as server:
        yield server


@pytest.fixture(scope="session")
def host(
    model_server: ModelServer, tmp_path_factory: pytest.TempPathFactory
) -> Iterator[OpenWebUI]:
    """Open WebUI with the function installed, and every model open to everybody."""
    data_dir = tmp_path_factory.mktemp("open-webui")
    with OpenWebUI.start(
        data_dir, model_server.openai_url, ollama_url=model_server.url
    ) as server:
        server.sign_up_admin()
        if FUNCTION.exists():
            source = FUNCTION.read_text("utf-8")
            server.install_function(FUNCTION_ID, FUNCTION_NAME, source)
        server.open_models_to_all()
        yield server


@pytest.fixture(scope="session")
def admin(host: OpenWebUI) -> Account:
    """The administrator."""
    return host.admin


@pytest.fixture(scope="session")
def user(host: OpenWebUI) -> Account:
    """Somebody who is not an administrator."""
    return host.add_user("Uma User")


@pytest.fixture(scope="session")
async def browser() -> AsyncIterator[Browser]:
    """The machine's Chromium; skips without one, or fails where `CI` is set."""
    async with Browser() as chromium:
        yield chromium
