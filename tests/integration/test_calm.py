"""A calm council: one section grows at a time, in the order of the first words."""

import pytest

from tests.integration.talk import Talk, finish, headings
from tests.integration.test_council import (
    COUNCIL,
    QUESTION,
    gather,
    has,
    odd,
    outcome,
    seats,
    section,
    start,
)
from tests.stack.scripts import Gate, Headers, Status, Text
from tests.versions import REPLACES

__all__ = ["seats"]  # the models of the seats, a fixture for this module too


@pytest.fixture(autouse=True)
def drafts_stay_open(talk: Talk) -> None:
    """What stands where is looked at."""
    talk.standing = {"fold_drafts": False}
    talk.admin_sets()


@REPLACES
async def test_who_speaks_first_stands_first_and_the_others_have_a_line(
    talk: Talk,
) -> None:
    elm = [Text("The elm, "), Gate("ben"), Text("for its shade.")]
    silent = [Headers(), Gate("ann"), Text("The oak.")]
    fir = [Gate("cy"), Text("The fir is green in winter.")]
    gather(
        talk,
        3,
        Ann=odd("Ann", answer=silent),
        Ben=odd("Ben", answer=elm),
        Cy=odd("Cy", answer=fir),
    )
    with talk.models.hold("ann") as ann, talk.models.hold("ben") as ben:
        async with talk.page() as page:
            with talk.models.hold("cy"):
                reply = await start(page)
                await reply.wait_for(lambda r: has("The elm,", r))
            await reply.wait_for(lambda r: has("> 🟢 Cy · done, 6 words", r))
            assert headings(reply) == ["🔴 Ben"]
            assert has("> 🔵 Ann · waiting", reply) and "> 🔴 Ben" not in reply.text
            assert "The fir" not in reply.text
            ben.release()
            await reply.wait_for(lambda r: has("The fir is green in winter.", r))
            assert section(reply, "🔴 Ben") == "The elm, for its shade."
            ann.release()
            await finish(page, reply)
    assert headings(reply)[:3] == ["🔴 Ben", "🟢 Cy", "🔵 Ann"]
    assert "⏳" not in reply.text


@REPLACES
async def test_stop_shows_and_stores_all_that_was_said_behind_the_first(
    talk: Talk,
) -> None:
    elm = [Text("The elm, "), Gate("ben")]
    fir = [Gate("cy"), Text("The fir "), Gate("fir")]
    silent = [Headers(), Gate("ann")]
    gather(
        talk,
        3,
        Ann=odd("Ann", answer=silent),
        Ben=odd("Ben", answer=elm),
        Cy=odd("Cy", answer=fir),
    )
    holds = [talk.models.hold(name) for name in ("ann", "ben", "fir")]
    async with talk.page() as page:
        with talk.models.hold("cy"):
            reply = await start(page)
            await reply.wait_for(lambda r: has("The elm,", r))
        await reply.wait_for(lambda r: has("🟢 Cy · writing, 2 words", r))
        await page.stop(reply)
        await finish(page, reply)
    for hold in holds:
        hold.release()
    assert sorted(headings(reply)[:2]) == ["🔴 Ben", "🟢 Cy"]
    assert section(reply, "🔵 Ann") == ""
    assert section(reply, "🟢 Cy").startswith("The fir")
    assert "writing" not in reply.text and "⚠️" not in reply.text


@REPLACES
async def test_what_a_late_member_still_says_moves_nothing_before_the_end(
    talk: Talk,
) -> None:
    late = [Text("The elm, "), Gate("late"), Text("late as it is.")]
    gather(
        talk,
        3,
        Ann=odd("Ann", answer=[Gate("first"), Text("The oak.")]),
        Ben=odd("Ben", answer=late),
        Cy=odd("Cy", answer=[Gate("first"), Text("The fir.")]),
    )
    talk.admin_sets(quorum=2)
    with talk.models.hold("late") as hold:
        async with talk.page() as page:
            with talk.models.hold("first"):
                reply = await start(page)
                await reply.wait_for(lambda r: has("The elm,", r))
            await reply.wait_for(lambda r: "waiting for Ben" in str(r.statuses))
            assert has("In the end it is", reply)
            assert section(reply, "🔴 Ben") == "The elm,"
            hold.release()
            await finish(page, reply)
    said, mark = section(reply, "🔴 Ben").splitlines()
    assert said == "The elm, late as it is."
    assert mark == "> ⏳ not counted: the others had gone on"
    assert "Ben was late" in outcome(reply)


async def test_who_fails_before_a_word_has_a_heading_and_a_line(talk: Talk) -> None:
    gone = [Status(404, {"error": {"message": "Gone."}})]
    gather(talk, 3, Ben=odd("Ben", answer=gone))
    reply = await talk.ask(QUESTION, COUNCIL)
    line = "> ⚠️ **Ben** could not answer: Gone. (HTTP 404)"
    assert section(reply, "🔴 Ben").splitlines()[0] == line
    assert len(headings(reply)) == 4
