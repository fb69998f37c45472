"""What an admin allows at a time, and how much may be said, on the real server."""

from collections.abc import AsyncIterator, Iterator
from contextlib import asynccontextmanager

import pytest

from tests.conftest import FUNCTION_ID
from tests.integration.members import member, stage_of
from tests.integration.talk import (
    MANAGER,
    ROUND_ROBIN,
    Talk,
    ask,
    finish,
    headings,
    last_status,
    reached,
    results,
)
from tests.stack.host import Account, OpenWebUI
from tests.stack.models import Hold
from tests.stack.page import Page, Reply
from tests.stack.scripts import Behaviour, Body, Script, Silence, Status, Text

QUESTION = "Should we plant oaks or birches?"
COUNCIL = f"{FUNCTION_ID}.council"
HOARD = '''
class Tools:
    def hoard(self) -> str:
        """Gives more than anybody reads."""
        return "x" * 300_000
'''


@pytest.fixture(scope="session")
def neighbour(host: OpenWebUI) -> Account:
    """One more plain user."""
    return host.add_user("Nina Neighbour")


@pytest.fixture(scope="session")
def hoard(host: OpenWebUI) -> Iterator[str]:
    """A tool that gives 300,000 characters."""
    host.create_tool("hoard", HOARD)
    yield "hoard"


@asynccontextmanager
async def one_underway(
    talk: Talk, neighbour: Account, **ceiling: int
) -> AsyncIterator[tuple[Hold, Reply, Page, Page]]:
    """A conversation that is held in its second turn, its page, and a neighbour's."""
    talk.admin_sets(**ceiling)
    talk.seat("Ann | alice", "Ben | bob")
    talk.seat("Cy | carol", account=neighbour)
    with talk.models.hold("bob", after=2) as hold:
        async with talk.page() as page, talk.page(neighbour) as other:
            first = await page.send(ROUND_ROBIN, QUESTION, background_tasks={})
            await reached(hold.wait_until_reached)
            yield hold, first, page, other


async def test_a_second_conversation_of_a_user_waits_for_the_first(
    talk: Talk, neighbour: Account
) -> None:
    async with one_underway(talk, neighbour, max_runs_per_user=1) as found:
        hold, first, page, other = found
        second = await ask(page, "And maples?")
        assert talk.order() == ["alice", "bob"]
        assert "> ⚠️ You have as many conversations going" in second.text
        assert last_status(second).startswith("Not begun · 0 turns")
        assert "Carol here." in (await ask(other, QUESTION)).text
        hold.release()
        await finish(page, first)
        assert headings(first) == ["🔵 Ann", "🔴 Ben"]
        assert "Bob here." in (await ask(page, "And maples?")).text


async def test_as_many_run_in_all_as_the_admin_allows(
    talk: Talk, neighbour: Account
) -> None:
    async with one_underway(talk, neighbour, max_runs=1) as (_, first, page, other):
        refused = await ask(other, QUESTION)
        assert "Wait a little, and ask again." in refused.text
        assert "carol" not in talk.order()
        await page.stop(first)
        await first.wait_idle()
        assert "Carol here." in (await ask(other, QUESTION)).text


async def test_two_users_share_the_calls_of_one_connection(
    talk: Talk, neighbour: Account
) -> None:
    talk.admin_sets(calls_in_all=1)
    talk.add_model("tokens-20-200")
    team = ["A | tokens-20-200", "B | alice", "C | bob"]
    talk.seat(*team)
    talk.seat(*team, account=neighbour)
    async with talk.page() as page, talk.page(neighbour) as other:
        mine = await page.send(COUNCIL, QUESTION, background_tasks={})
        theirs = await other.send(ROUND_ROBIN, QUESTION, background_tasks={})
        await finish(page, mine)
        await finish(other, theirs)
    assert talk.models.max_in_flight == 1
    assert headings(theirs) == ["🔵 A", "🔴 B", "🟢 C"]
    assert "⚠️" not in theirs.text and "3 of 3 answered" in mine.text


async def test_after_its_time_a_conversation_ends_between_two_turns(talk: Talk) -> None:
    talk.admin_sets(run_timeout=1)
    talk.seat("Ann | wait-1", "Ben | bob", rounds=5)
    reply = await talk.ask(QUESTION)
    assert last_status(reply).startswith("Ended after 1 s, the time of a conversation")
    assert talk.order() == ["wait-1"]
    assert "Waiter here." in reply.text and reply.error is None


async def test_a_reply_without_end_is_cut_off_and_freed(talk: Talk) -> None:
    words = " ".join(["x" * 49_999] * 11)
    talk.add_model("endless", lambda _: Script([Text(words), Silence()]))
    talk.seat("Ann | alice", "Eve | endless", "Ben | bob")
    reply = await talk.ask(QUESTION)
    assert "**Eve** broke off: it said over 500,000 characters" in reply.text
    assert headings(reply) == ["🔵 Ann", "🔴 Eve", "🟢 Ben"]
    assert talk.order() == ["alice", "endless", "bob"]
    await talk.freed("endless")


@pytest.mark.parametrize("legacy", [False, True])
async def test_a_tools_result_is_cut_to_what_a_prompt_holds(
    talk: Talk, hoard: str, legacy: bool
) -> None:
    params = {"function_calling": "legacy"} if legacy else {}
    with talk.workspace_model("hoarder", "toolie", params=params):
        talk.seat("Tim | hoarder", "Ben | bob")
        reply = await talk.ask("Use hoard.", tool_ids=[hoard])
    sent = str(talk.models.turns("toolie")[-1].messages)
    assert sent.count("x" * 100_000) < 3 and len(sent) < 250_000
    if not legacy:
        assert results(reply)[0].endswith("(cut: it has 300,000 characters)")
        assert "x" * 200_000 in sent


def broken(stage: str, usually: Behaviour) -> Behaviour:
    """Make a member that fails in one stage of a council, and all later ones."""

    def behave(body: Body) -> Script:
        if stage_of(body) in (stage, "conclusion"):
            return Script([Status(400, {"error": {"message": "No more."}})])
        return usually(body)

    return behave


async def test_a_model_that_failed_twice_is_no_longer_a_chair(talk: Talk) -> None:
    talk.add_model("broken-oak", broken("review", member("oak", "elm")))
    talk.add_model("whole-elm", member("elm", "oak"))
    talk.seat("Ann | broken-oak", "Ben | broken-oak", "Cy | whole-elm")
    reply = await talk.ask(QUESTION, COUNCIL)
    # two answers, two ballots that fail, and then it is not asked to conclude
    assert len(talk.models.turns("broken-oak")) == 4
    assert "chaired by Cy" in reply.text
    assert talk.order()[-1] == "whole-elm"


async def test_a_manager_that_failed_twice_is_no_longer_asked(talk: Talk) -> None:
    talk.seat("Ann | alice", "Ben | bob", manager_model="fails-401", rounds=3)
    reply = await talk.ask(QUESTION, MANAGER)
    assert len(talk.models.turns("fails-401")) == 2
    assert talk.order().count("alice") == talk.order().count("bob") == 3
    told = [line for line in reply.text.splitlines() if "⚠️" in line]
    assert len(told) == 1 and "The manager failed: " in told[0]


async def test_a_seat_of_a_model_that_failed_twice_is_not_asked(talk: Talk) -> None:
    talk.seat("Ann | fails-401", "Ben | bob", "Cy | fails-401", "Di | fails-401")
    reply: Reply = await talk.ask(QUESTION)
    assert talk.order() == ["fails-401", "bob", "fails-401"]
    assert "**Di** could not answer: it failed twice and is not asked again" in (
        reply.text
    )
