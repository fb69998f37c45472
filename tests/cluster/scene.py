"""What the tests of the cluster ask, and how they look at what came of it."""

from collections.abc import AsyncIterator
from contextlib import asynccontextmanager

from tests.cluster.cluster import Cluster, SplitPage
from tests.conftest import FUNCTION_ID
from tests.integration.talk import ROUND_ROBIN, Talk
from tests.stack.behaviours import prose
from tests.stack.host import Json
from tests.stack.page import Page, Reply, assert_same_text

MODES = tuple(
    f"{FUNCTION_ID}.{mode}" for mode in ("round_robin", "manager", "council", "debate")
)
QUESTION = "Should we plant oaks or birches?"
TOKENS = 300


def tokens(pace: int) -> str:
    """The model that says `TOKENS` tokens at this pace."""
    return f"tokens-{TOKENS}-{pace}"


def seat_three(talk: Talk, pace: int, rounds: int = 1) -> None:
    """Three participants who say `TOKENS` tokens a turn, at so many a second."""
    model = tokens(pace)
    talk.add_model(model)
    team = [f"{name} | {model}" for name in ("Ann", "Ben", "Cy")]
    talk.seat(*team, rounds=rounds, manager_model="manager")


def turns_in(text: str) -> int:
    """How many whole turns of `TOKENS` tokens a text has."""
    return text.count(prose(TOKENS).strip())


def stored_everywhere(cluster: Cluster, talk: Talk, reply: Reply) -> list[Json]:
    """The message as each replica gives it."""
    chat_id = reply.chat.id or ""
    return [one.stored(talk.account, chat_id, reply.id) for one in cluster.replicas]


def assert_stored_everywhere(cluster: Cluster, talk: Talk, reply: Reply) -> None:
    """Every replica gives what the page shows."""
    for stored in stored_everywhere(cluster, talk, reply):
        assert_same_text(reply, stored)


@asynccontextmanager
async def split_page(
    cluster: Cluster, talk: Talk, socket: int, requests: int
) -> AsyncIterator[Page]:
    """A page of the talk's account over two replicas; what runs at its end is ended."""
    at = cluster.replicas
    async with SplitPage(at[socket], at[requests], talk.account) as page:
        try:
            yield page
        finally:
            await page.stop_all()


async def start(page: Page, mode: str = ROUND_ROBIN, text: str = QUESTION) -> Reply:
    """Ask, and do not wait."""
    return await page.send(mode, text, background_tasks={})
