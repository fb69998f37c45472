"""A page, the database, a chat or a model is lost in mid-run: what was said stays."""

import asyncio
import time

import pytest

from tests.conftest import FUNCTION_ID
from tests.integration.members import member
from tests.integration.talk import (
    ROUND_ROBIN,
    Talk,
    assert_stored,
    finish,
    headings,
    in_rounds,
    locked,
    reached,
)
from tests.stack.host import OpenWebUI
from tests.stack.page import Page, Reply
from tests.stack.prompts import stage_of
from tests.stack.scripts import Behaviour, Body, Gate, Script, Text
from tests.versions import RELOADS, SMALL_EVENTS

QUESTION = "Which tree?"
BEFORE = "First of all, "


def pauses(word: str) -> Behaviour:
    """Make a member that stands still in the middle of its answer or conclusion."""
    speaks = member(word)

    def behave(body: Body) -> Script:
        stage, script = stage_of(body), speaks(body)
        gate = stage if stage == "conclusion" else f"{stage} {word}"
        if stage not in ("answer", "conclusion"):
            return script
        return Script([Text(BEFORE), Gate(gate), *script.steps])

    return behave


async def opened(page: Page, reply: Reply) -> Reply:
    """The same reply in another page."""
    await page.open(reply.chat.id or "")
    return page.reply(reply.id)


@RELOADS
@pytest.mark.parametrize(
    ("mode", "late"), [("round_robin", "answer elm"), ("council", "conclusion")]
)
async def test_every_page_shows_the_same_text_whenever_it_came(
    talk: Talk, mode: str, late: str
) -> None:
    for word in ("oak", "elm"):
        talk.add_model(f"pauses-{word}", pauses(word))
    talk.seat("Ann | pauses-oak", "Ben | pauses-elm")
    hold = talk.models.hold
    async with talk.page() as one, talk.page() as back, talk.page() as gone:
        with hold("answer oak") as first_gate, hold(late) as second_gate:
            undisturbed = await one.send(
                f"{FUNCTION_ID}.{mode}", QUESTION, background_tasks={}
            )
            await reached(first_gate.wait_until_reached)
            await undisturbed.wait_for(lambda r: BEFORE in r.text)
            comes_back = await opened(back, undisturbed)
            stays_away = await opened(gone, undisturbed)
            await back.lose_socket()
            await gone.lose_socket()
            first_gate.release()
            await reached(second_gate.wait_until_reached)
            await undisturbed.wait_for(
                lambda r: r.text.rstrip().endswith("First of all,")
            )
            await back.regain_socket()
            async with talk.page() as another:
                second_tab = await opened(another, undisturbed)
                assert second_tab.text == undisturbed.text
                assert "The oak it is" in second_tab.text
                second_gate.release()
                for page, reply in ((one, undisturbed), (back, comes_back)):
                    await finish(page, reply)
                await finish(another, second_tab)
        await gone.regain_socket()
        await assert_stored(gone, stays_away)
    texts = {r.text for r in (comes_back, stays_away, second_tab, undisturbed)}
    assert len(texts) == 1


def longest_gap(reply: Reply) -> float:
    """The longest time, in seconds, between two events that brought text."""
    texts = [e for e in reply.events if "output_index" in (e.data or ())]
    times = [event.at for event in texts]
    return max(later - at for at, later in zip(times, times[1:], strict=False))


@SMALL_EVENTS
async def test_a_locked_database_holds_nothing_up_and_all_is_stored_in_the_end(
    talk: Talk, host: OpenWebUI
) -> None:
    talk.add_model("tokens-60-20")
    talk.seat("Ann | tokens-60-20", "Ben | tokens-60-20", "Cy | alice")
    async with talk.page() as page:
        reply = await page.send(ROUND_ROBIN, QUESTION, background_tasks={})
        await reply.wait_for(lambda r: r.text)
        with locked(host.data_dir):
            await asyncio.sleep(8)  # the fault itself
            assert headings(reply) == ["🔵 Ann", "🔴 Ben", "🟢 Cy"]
            assert "Alice here." in reply.text
        await finish(page, reply)
    assert longest_gap(reply) < 1.5
    assert "went down" not in reply.text


async def test_a_chat_that_is_deleted_ends_its_run(talk: Talk, host: OpenWebUI) -> None:
    talk.seat("Ann | alice", "Ben | bob")
    async with talk.page() as page:
        with talk.models.hold("bob", after=3) as hold:
            reply = await page.send(ROUND_ROBIN, QUESTION, background_tasks={})
            await reached(hold.wait_until_reached)
            path = f"/api/v1/chats/{reply.chat.id}"
            host.request("DELETE", path, account=talk.account)
            await talk.freed("bob")
        await reply.wait_idle(5)
    chats = host.request("GET", "/api/v1/chats/", account=talk.account)
    assert reply.chat.id not in [chat["id"] for chat in chats]
    assert "a conversation failed" not in host.log_tail(200)


@pytest.mark.parametrize("loss", ["removed", "revoked"])
async def test_a_model_that_goes_in_mid_run_costs_its_seat(
    talk: Talk, host: OpenWebUI, loss: str
) -> None:
    talk.seat("Ann | alice", "Ben | goes", "Cy | carol", rounds=2)
    host.create_model({"id": "goes", "base_model_id": "bob"})
    host.grant_read("goes", "public")
    async with talk.page() as page:
        with talk.models.hold("carol", after=3) as hold:
            reply = await page.send(ROUND_ROBIN, QUESTION, background_tasks={})
            await reached(hold.wait_until_reached)
            if loss == "removed":
                host.delete_model("goes")
            else:
                host.set_readers("goes")
        begun = time.monotonic()
        await finish(page, reply)
        assert time.monotonic() - begun < 5
    if loss == "revoked":
        host.delete_model("goes")
    assert headings(reply) == in_rounds(2, "🔵 Ann", "🔴 Ben", "🟢 Cy")
    assert reply.text.count("### 🔴 Ben\nBob here.") == 1
    assert reply.text.count("**Ben** could not answer: ") == 1
    assert talk.order() == ["alice", "bob", "carol", "alice", "carol"]
