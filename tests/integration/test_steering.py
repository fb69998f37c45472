"""A seat for the person, /vote and follow-ups, over the socket."""

import pytest

from tests.integration.talk import (
    ROUND_ROBIN,
    Talk,
    ask,
    assert_stored,
    finish,
    headings,
    on_card,
    title_of,
)
from tests.integration.test_council import COUNCIL, gather, model, of_stage
from tests.integration.test_council import seats as seats  # a model for each seat
from tests.stack.page import Call
from tests.versions import CARDS, REPLACES, TELLS_TASKS

QUESTION = "Which tree lasts?"


@CARDS
async def test_what_the_person_adds_is_read_now_and_in_the_next_question(
    talk: Talk,
) -> None:
    gather(talk, 2)
    says = ["Mind the **budget**.", "Go on"]

    def answer(call: Call) -> str:
        assert title_of(call) == "Your turn"
        return says.pop(0)

    async with talk.page() as page:
        on_card(page, answer)
        first = await ask(page, f"/join {QUESTION}")
        assert says == [] and len(page.calls) == 2
        await ask(page, "And in the shade?", chat=first.chat)
    name = talk.account.name
    ann, ben = "🔵 Ann", "🔴 Ben"
    assert headings(first) == [ann, ben, f"👤 {name}", f"{ann} · round 2 of 2", ben]
    for seen in talk.models.turns(model("Ann"))[1:]:
        assert QUESTION in seen.text and "Mind the **budget**." in seen.text
        assert "/join" not in seen.text and name not in seen.text


@REPLACES
async def test_a_vote_asks_for_no_new_answers(talk: Talk) -> None:
    gather(talk, 3)
    async with talk.page() as page:
        first = await ask(page, QUESTION, COUNCIL)
        answered = len(of_stage(talk, "answer"))
        second = await ask(page, "/vote Who is right?", COUNCIL, chat=first.chat)
    assert len(of_stage(talk, "answer")) == answered
    ballots = of_stage(talk, "vote")
    assert len(ballots) == 3
    for seen in ballots:
        assert "The oak it is" in seen.text and "/vote" not in seen.text
    assert headings(second) == ["🔴 Ben · conclusion", "🏆 Votes"]


@pytest.mark.parametrize("temporary", [False, pytest.param(True, marks=TELLS_TASKS)])
async def test_follow_ups_of_ours_stand_behind_the_hosts(
    talk: Talk, temporary: bool
) -> None:
    talk.seat("Ann | alice", "Ben | fails-500", "Cy | carol")
    tasks = {"follow_up_generation": True}
    async with talk.page() as page:
        reply = await page.send(
            ROUND_ROBIN, QUESTION, background_tasks=tasks, temporary=temporary
        )
        if temporary:
            await reply.wait_done()
            await reply.wait_idle()
        else:
            await finish(page, reply)
            await assert_stored(page, reply)
        chips = reply.message["followUps"]
        assert chips[2:] == [
            "Ben: please answer, too.",
            "Ann: answer what Cy said.",
            "/vote Who is right?",
        ]
        assert all(chip.endswith("?") for chip in chips[:2])
        if not temporary:
            again = await ask(page, chips[3], chat=reply.chat)
            assert headings(again) == ["🔵 Ann"]
