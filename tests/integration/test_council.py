"""Councils and debates: who sees what, what is shown, and that nobody waits."""

import asyncio
import json
import re
from collections.abc import Callable, Iterator, Sequence
from functools import partial
from itertools import takewhile
from typing import Any

import httpx
import openai
import pytest

from tests.conftest import FUNCTION_ID
from tests.integration.members import busy, member, ranking, stage_of
from tests.integration.search_engine import SearchEngine
from tests.integration.talk import (
    ROUND_ROBIN,
    Talk,
    ask,
    assert_stored,
    finish,
    headings,
    in_rounds,
    last_status,
    on_card,
    reached,
    results,
    text_of_item,
    title_of,
)
from tests.stack.host import Account, Json, OpenWebUI
from tests.stack.models import ModelServer, Seen
from tests.stack.page import Call, Page, Reply
from tests.stack.prompts import fresh_results, last_user_text
from tests.stack.scripts import (
    Behaviour,
    Body,
    Disconnect,
    Fail,
    Gate,
    Headers,
    Pause,
    Raw,
    Reasoning,
    Script,
    Silence,
    Status,
    Text,
    ToolCall,
)
from tests.stack.structured_output import Output
from tests.versions import CARDS, PASSES_RETRY_AFTER, RELOADS, REPLACES

COUNCIL = f"{FUNCTION_ID}.council"
DEBATE = f"{FUNCTION_ID}.debate"
QUESTION = "Which tree lasts?"
NAMES = ("Ann", "Ben", "Cy", "Dee", "Eve", "Fay", "Gus", "Hal")
WORDS = ("oak", "elm", "fir", "ash", "yew", "lime", "pine", "bay")
WORD = dict(zip(NAMES, WORDS, strict=True))
PREFERS = "elm oak=fir ash yew lime pine bay"
COLOURS = "🔵🔴🟢🟠🟣🟡🟤🔷"
RULE = "---"
BY_SEAT = " (by seat: of two answers none is ranked)"


def model(name: str) -> str:
    """The model in a member's seat; its id tells nothing."""
    return f"seat-{NAMES.index(name)}"


@pytest.fixture(scope="module", autouse=True)
def seats(host: OpenWebUI, model_server: ModelServer) -> None:
    """A model for each seat, which tests then give a behaviour."""
    for name in NAMES:
        model_server.add(model(name), member(WORD[name]))
        local = f"{model(name)}:local"
        model_server.add(local, member(WORD[name], PREFERS), surface="ollama")
    host.models(refresh=True)
    for name in NAMES:
        host.grant_read(model(name), "public")
        host.grant_read(f"{model(name)}:local", "public")


@pytest.fixture(autouse=True)
def drafts_stay_open(talk: Talk) -> None:
    """Most tests look at what stands where; some set it back."""
    talk.standing = {"fold_drafts": False, "all_at_once": True}
    talk.admin_sets()


def gather(talk: Talk, count: int = 4, /, **behaviours: Behaviour) -> None:
    """Seat so many members; who is not given a behaviour is a plain one."""
    for name in NAMES[:count]:
        plain = odd(name)
        talk.models.add(model(name), behaviours.get(name, plain))
    talk.seat(*(f"{name} | {model(name)}" for name in NAMES[:count]))


def odd(name: str, **instead: Any) -> Behaviour:
    """A plain member but for these stages."""
    votes = "Ann" if name == "Ben" else "Ben"
    return member(WORD[name], PREFERS, votes=votes, **instead)


def slow(name: str, seconds: float, *more: Any) -> Behaviour:
    """A member that answers late."""
    said = Text(f"The {WORD[name]} it is. ")
    return odd(name, answer=[Headers(), Pause(seconds), said, *more])


async def start(page: Page, mode: str = COUNCIL, text: str = QUESTION) -> Reply:
    """Ask, and do not wait."""
    return await page.send(mode, text, background_tasks={})


def of_stage(talk: Talk, stage: str, *models: str) -> list[Seen]:
    """The requests of one stage."""
    return [seen for seen in talk.models.turns(*models) if stage_of(seen.chat) == stage]


def sections(output: Output) -> list[tuple[str, str]]:
    """Each heading with the text under it, as it stands in the items."""
    found: list[tuple[str, str]] = []
    for item in output:
        if item["type"] != "message":
            continue
        text = text_of_item(item).strip().removeprefix(RULE).strip()
        if text.startswith("### "):
            heading, _, text = text.partition("\n")
            found.append((heading[4:], ""))
        if found and text.strip():
            heading, before = found[-1]
            found[-1] = (heading, f"{before}\n{text.strip()}".strip())
    return found


def has(text: str, reply: Reply) -> bool:
    """Whether the page shows this."""
    return text in reply.text


def section(reply: Reply, heading: str) -> str:
    """The text under one heading."""
    return dict(sections(reply.output))[heading]


def seat_of(name: str) -> str:
    """A member's heading."""
    return f"{COLOURS[NAMES.index(name)]} {name}"


def lines(reply: Reply, start: str) -> list[str]:
    """The lines that begin so."""
    return [line for line in reply.text.splitlines() if line.startswith(start)]


def outcome(reply: Reply) -> str:
    """The one outcome line."""
    (line,) = lines(reply, "> 🏁 ")
    return line.removeprefix("> 🏁 ")


def table(reply: Reply) -> list[str]:
    """The rows of the ranking, or of the votes."""
    shown = [line for line in lines(reply, "| ")[1:] if "| |" not in line]
    return list(takewhile(lambda line: line.count("|") == 4, shown))


ALL_ROWS = [
    "| Ben | 6.1 | Ann, Cy, Dee |",
    "| Ann | 5.0 | Ben |",
    "| Cy | 5.0 | Ben |",
    "| Dee | 3.9 | – |",
]

# -- a whole council -------------------------------------------------------------------


async def test_a_council_answers_ranks_and_concludes(talk: Talk) -> None:
    gather(talk)
    reply = await talk.ask(QUESTION, COUNCIL)
    assert headings(reply) == [
        *map(seat_of, NAMES[:4]),
        "🏆 Ranking",
        f"{seat_of('Ben')} · conclusion",
    ]
    for name in NAMES[:4]:
        said = f"The {WORD[name]} it is: Which tree lasts."
        assert section(reply, seat_of(name)) == said
    assert table(reply) == ALL_ROWS
    assert lines(reply, "The members") == ["The members agree."]
    assert outcome(reply) == "4 of 4 answered · chaired by Ben"
    concluded = section(reply, f"{seat_of('Ben')} · conclusion")
    assert concluded.startswith("In the end it is the elm: Which tree lasts.")
    assert reply.text.index("> 🏁") < reply.text.index("· conclusion")
    assert last_status(reply).startswith("Chaired by Ben · 5 turns · ")
    assert not lines(reply, "> ⏳")
    stages = [stage_of(seen.chat) for seen in talk.models.turns()]
    assert stages == ["answer"] * 4 + ["review"] * 4 + ["conclusion"]


async def test_reviewers_see_no_name_and_never_their_own_answer(talk: Talk) -> None:
    gather(talk)
    await talk.ask(QUESTION, COUNCIL)
    for name in NAMES[:4]:
        (seen,) = of_stage(talk, "review", model(name))
        (asked,) = [m["content"] for m in seen.messages if m["role"] == "user"]
        assert f"The {WORD[name]} it is" not in asked
        assert not [other for other in NAMES if other in asked]
        assert [m["role"] for m in seen.messages] == ["system", "user"]
        assert "answer at the same time, each on its own." in seen.text
        assert "was said before" not in seen.text
        for other in set(NAMES[:4]) - {name}:
            assert f"The {WORD[other]} it is" in asked
        assert re.findall(r'<message from="(.)">', asked) == ["A", "B", "C"]


async def test_the_chair_reads_no_names_and_the_page_shows_no_letters(
    talk: Talk,
) -> None:
    def concludes(body: Body) -> Script:
        if stage_of(body) != "conclusion":
            return odd("Ben")(body)
        asked = last_user_text(body)
        letters = {
            word: re.findall(rf'<message from="(.)">\nThe {word}', asked)[0]
            for word in WORDS[:4]
        }
        pieces = f"[{letters['oak']}] is right, [{letters['elm']}, {letters['ash']}"
        return Script([Text(piece) for piece in (*pieces, "] are not.")])

    gather(talk, Ben=concludes)
    reply = await talk.ask(QUESTION, COUNCIL)
    (seen,) = of_stage(talk, "conclusion")
    asked = last_user_text(seen.chat)
    assert not [name for name in NAMES if name in asked]
    assert len(re.findall(r'<message from="[A-D]">\nThe \w+ it is', asked)) == 4
    assert re.search(
        r"\| \[[A-D]\] \| 6\.1 \| \[[A-D]\], \[[A-D]\], \[[A-D]\] \|", asked
    )
    assert len(re.findall(r"(?m)^- .+ · 1\. \[[A-D]\]: It says elm\.$", asked)) == 3
    concluded = section(reply, f"{seat_of('Ben')} · conclusion")
    assert concluded.splitlines()[0] == "Ann is right, Ben, Dee are not."


@REPLACES
async def test_four_sections_stream_at_once_in_the_order_of_the_seats(
    talk: Talk,
) -> None:
    def halves(name: str) -> Behaviour:
        first, second = Text(f"One {WORD[name]} "), Text(f"two {WORD[name]}.")
        return odd(name, answer=[first, Gate(f"half-{name}"), second])

    gather(talk, **{name: halves(name) for name in NAMES[:4]})
    holds = {name: talk.models.hold(f"half-{name}") for name in NAMES[:4]}
    try:
        async with talk.page() as page:
            reply = await start(page)
            await reply.wait_for(
                lambda r: all(f"One {WORD[n]}" in r.text for n in NAMES[:4])
            )
            assert talk.models.in_flight == 4
            for name in ("Dee", "Ben", "Ann", "Cy"):
                holds.pop(name).release()
                said = f"two {WORD[name]}."
                await reply.wait_for(partial(has, said))
                found = dict(sections(reply.output))
                assert list(found)[:4] == [seat_of(n) for n in NAMES[:4]]
                for each in NAMES[:4]:
                    said = found[seat_of(each)]
                    assert said.startswith(f"One {WORD[each]}")
                    assert ("two" in said) is (each not in holds)
            await finish(page, reply)
    finally:
        for hold in holds.values():
            hold.release()
    for name in NAMES[:4]:
        assert section(reply, seat_of(name)) == f"One {WORD[name]} two {WORD[name]}."


async def test_reasoning_and_tools_stay_in_their_members_section(
    talk: Talk, garden: str
) -> None:
    def digs(body: Body) -> Script:
        if stage_of(body) != "answer" or fresh_results(body):
            return odd("Ben")(body)
        call = ToolCall("look_up", '{"topic": "elms"}')
        return Script([Text("Let me look. "), Gate("meet"), call])

    thinks = [Reasoning("Hm, a fir."), Gate("meet"), Text("The fir it is.")]
    gather(talk, 3, Ben=digs, Cy=odd("Cy", answer=thinks))
    with talk.models.hold("meet") as hold:
        async with talk.page() as page:
            reply = await page.send(
                COUNCIL, QUESTION, tool_ids=[garden], background_tasks={}
            )
            await reached(lambda: hold.wait_until_reached(2))
            hold.release()
            await finish(page, reply)
    found = [(item["speaker"], item["type"]) for item in reply.output]
    spoken = [one for one in found if one[0]]
    assert spoken[: spoken.index(("Cy", "message"))] == [
        *[("Ann", "message")] * 2,
        *[("Ben", "message")] * 2,
        ("Ben", "function_call"),
        ("Ben", "function_call_output"),
        ("Ben", "message"),
    ]
    assert ("Cy", "reasoning") in found
    assert results(reply) == ["The almanac on elms: 3 lines."]
    assert outcome(reply) == "3 of 3 answered · chaired by Ben"
    assert "Hm, a fir." not in str([seen.text for seen in talk.models.turns()])


@RELOADS
async def test_a_page_that_is_reloaded_in_the_middle_sees_the_rest(talk: Talk) -> None:
    held = [Text("The fir "), Gate("held"), Text("it is.")]
    gather(talk, 3, Cy=odd("Cy", answer=held))
    with talk.models.hold("held") as hold:
        async with talk.page() as page, talk.page() as reloaded:
            reply = await start(page)
            await reply.wait_for(lambda r: "The fir" in r.text and "The elm" in r.text)
            assert reply.chat.id
            await reloaded.open(reply.chat.id)
            again = reloaded.reply(reply.id)
            assert sections(again.output) == sections(reply.output)
            hold.release()
            await finish(page, reply)
            await again.wait_for(lambda r: r.done and r.text == reply.text, timeout=10)


async def test_a_chat_without_streaming_shows_and_stores_the_same(talk: Talk) -> None:
    gather(talk, 3)
    talk.admin_sets(show_figures="never")
    streamed = await talk.ask(QUESTION, COUNCIL)
    at_once = await talk.ask(QUESTION, COUNCIL, stream=False)
    assert sections(at_once.output) == sections(streamed.output)
    assert not lines(at_once, "> ⏳")


async def test_continue_holds_another_council_under_the_first(talk: Talk) -> None:
    gather(talk, 2)
    async with talk.page() as page:
        reply = await ask(page, QUESTION, COUNCIL)
        before, first = reply.text, headings(reply)
        await page.continue_(reply, background_tasks={})
        await finish(page, reply)
    assert reply.text.startswith(before)
    assert headings(reply) == first * 2
    assert not lines(reply, "> ⏳")
    assert len(lines(reply, "> 🏁")) == 2
    ids = [item["id"] for item in reply.output]
    assert len(set(ids)) == len(ids)


async def first_character(talk: Talk) -> float:
    """Seconds from the fastest member's first token to its first character shown."""
    async with talk.page() as page:
        on_card(page, lambda call: "Skip it")
        reply = await start(page)
        await reply.wait_for(lambda r: "The oak" in r.text)
        (asked,) = talk.models.turns(model("Ann"))
        late = asyncio.get_running_loop().time() - asked.at - 0.2
        assert reply.first_text_at and reply.first_text_at < asked.at + 0.3
        await finish(page, reply)
    assert outcome(reply) == "3 of 4 answered · Dee was skipped · chaired by Ben"
    assert talk.models.aborted == [model("Dee")]
    return late


async def test_the_first_character_is_the_fastest_members(talk: Talk) -> None:
    delays = {"Ann": 0.2, "Ben": 0.5, "Cy": 1.0, "Dee": 20.0}
    gather(talk, **{name: slow(name, delay) for name, delay in delays.items()})
    talk.admin_sets(skip_after=1.5)
    late = await first_character(talk)
    if late > 0.1:  # the machine was busy with something else
        talk.models.clear()
        late = await first_character(talk)
    assert late <= 0.1


# -- degraded councils -----------------------------------------------------------------

THREE_ROWS = ["| Ben | 5.6 | Ann, Dee |", "| Ann | 5.0 | Ben |", "| Dee | 4.4 | – |"]


@pytest.mark.parametrize(
    ("steps", "reason"),
    [
        (
            [Status(500, {"error": {"message": "The shed burns."}})],
            "Cy failed: The shed burns. (HTTP 500)",
        ),
        ([Text("The fir it "), Fail("It broke.")], "Cy failed: It broke"),
        ([Headers(), Silence()], "Cy said nothing for 0.5 s"),
        ([Text("The fir it "), Silence()], "Cy said nothing for 0.6 s"),
        ([], "Cy gave an empty answer, asked twice"),
    ],
)
async def test_who_fails_is_named_in_the_outcome_and_not_ranked(
    talk: Talk, steps: Sequence[Any], reason: str
) -> None:
    talk.admin_sets(first_token_timeout=0.5, silence_timeout=0.6)
    gather(talk, Cy=odd("Cy", answer=steps))
    reply = await talk.ask(QUESTION, COUNCIL)
    assert outcome(reply) == f"3 of 4 answered · {reason} · chaired by Ben"
    assert table(reply) == THREE_ROWS
    assert not of_stage(talk, "review", model("Cy"))
    spoke = any(isinstance(step, Text) for step in steps)
    assert ("The fir it" in section(reply, seat_of("Cy"))) is spoke
    what = "broke off" if spoke else "could not answer"
    assert f"> ⚠️ **Cy** {what}: " in section(reply, seat_of("Cy"))
    assert "The fir it" not in "".join(seen.text for seen in of_stage(talk, "review"))
    await talk.freed(*[model("Cy")] * any(isinstance(s, Silence) for s in steps))


async def test_a_connection_that_dies_half_way_loses_one_member(talk: Talk) -> None:
    dying = [Text("The fir it "), Pause(0.2), Disconnect()]
    gather(talk, Cy=odd("Cy", answer=dying))
    reply = await talk.ask(QUESTION, COUNCIL)
    assert outcome(reply).startswith("3 of 4 answered · Cy failed: ")
    assert outcome(reply).endswith(" · chaired by Ben")
    assert section(reply, seat_of("Cy")).startswith("The fir it\n> ⚠️ **Cy** broke off")
    assert table(reply) == THREE_ROWS


@pytest.mark.parametrize("stays", [True, False])
async def test_when_the_chair_fails_the_next_best_takes_over(
    talk: Talk, stays: bool
) -> None:
    broken = [Status(500, {"error": {"message": "No chair."}})]
    gather(talk, Ben=odd("Ben", conclusion=broken))
    talk.admin_sets(chair="" if stays else "Ben")
    reply = await talk.ask(QUESTION, COUNCIL)
    assert outcome(reply) == "4 of 4 answered · chaired by Ann (Ben failed)"
    assert headings(reply)[-2:] == ["🏆 Ranking", f"{seat_of('Ann')} · conclusion"]
    assert table(reply) == ALL_ROWS
    assert last_status(reply).startswith("Chaired by Ann (Ben failed) · ")
    assert not lines(reply, "> ⚠️")


@REPLACES
async def test_a_chair_that_only_reasons_and_fails_is_replaced_too(talk: Talk) -> None:
    thinks = [Reasoning("Let me see."), Fail("It broke.")]
    gather(talk, 3, Ben=odd("Ben", conclusion=thinks))
    reply = await talk.ask(QUESTION, COUNCIL)
    assert outcome(reply) == "3 of 3 answered · chaired by Ann (Ben failed)"
    assert headings(reply)[-2:] == [
        f"{seat_of('Ben')} · conclusion",
        f"{seat_of('Ann')} · conclusion",
    ]
    assert section(reply, f"{seat_of('Ben')} · conclusion") == (
        "> ⚠️ **Ben** could not answer: It broke."
    )


@REPLACES
async def test_when_no_chair_can_conclude_the_answers_stay(talk: Talk) -> None:
    broken = [Status(500, {"error": {"message": "No chair."}})]
    gather(talk, 2, **{n: odd(n, conclusion=broken) for n in ("Ann", "Ben")})
    reply = await talk.ask(QUESTION, COUNCIL)
    assert outcome(reply) == "2 of 2 answered · nobody could write a conclusion"
    assert headings(reply) == [seat_of("Ann"), seat_of("Ben")]
    assert not of_stage(talk, "review")
    assert last_status(reply).startswith("No conclusion: Ann failed, Ben failed · ")


async def test_the_chair_of_the_valves_concludes(talk: Talk) -> None:
    gather(talk, 3)
    talk.admin_sets(chair="cy")
    reply = await talk.ask(QUESTION, COUNCIL)
    assert outcome(reply) == "3 of 3 answered · chaired by Cy"
    assert headings(reply)[-1] == f"{seat_of('Cy')} · conclusion"


async def test_one_answer_left_is_that_members_alone(talk: Talk) -> None:
    broken = [Status(500, {"error": {"message": "Gone."}})]
    gather(talk, 3, Ann=odd("Ann", answer=broken), Cy=odd("Cy", answer=[]))
    reply = await talk.ask(QUESTION, COUNCIL)
    assert outcome(reply) == (
        "1 of 3 answered · Ann failed: Gone. (HTTP 500) · Cy gave an empty answer, "
        "asked twice · no conclusion, this is Ben's answer alone"
    )
    assert headings(reply) == [seat_of(name) for name in NAMES[:3]]
    assert not of_stage(talk, "review") and not of_stage(talk, "conclusion")
    assert last_status(reply).startswith("Only Ben answered · ")


async def test_with_no_answer_every_reason_is_listed(talk: Talk) -> None:
    talk.admin_sets(first_token_timeout=0.5)
    broken = [Status(500, {"error": {"message": "Gone."}})]
    gather(
        talk,
        3,
        Ann=odd("Ann", answer=broken),
        Ben=odd("Ben", answer=[]),
        Cy=odd("Cy", answer=[Silence()]),
    )
    reply = await talk.ask(QUESTION, COUNCIL)
    assert "> ⚠️ Nobody could answer: " + " · ".join(
        (
            "Ann failed: Gone. (HTTP 500)",
            "Ben gave an empty answer, asked twice",
            "Cy said nothing for 0.5 s",
        )
    ) in lines(reply, "> ⚠️ Nobody")
    assert last_status(reply).startswith("Nobody could answer · ")
    assert not of_stage(talk, "review")


async def test_broken_ballots_are_repaired_once_then_left_out(talk: Talk) -> None:
    def mends(body: Body) -> Script:
        asked_again = "Your ranking must name each of" in last_user_text(body)
        if stage_of(body) == "review" and not asked_again:
            return Script([Text("I would rather not.")])
        if asked_again:
            first = next(m for m in body["messages"] if "Rank these" in m["content"])
            found = ranking({"messages": [first]}, PREFERS)
            return Script([Text(f"```json\n{found}\n```")])
        return odd("Ann")(body)

    never = [Text("All are fine.")]
    gather(talk, 3, Ann=mends, Cy=odd("Cy", review=never))
    reply = await talk.ask(QUESTION, COUNCIL)
    assert len(of_stage(talk, "review", model("Cy"))) == 1
    assert len(talk.models.turns(model("Cy"))) == 3
    assert table(reply) == [
        "| Ben | 5.7 | Ann |",
        "| Ann | 4.8 | Ben |",
        "| Cy | 4.8 | Ben |",
    ]


async def test_with_no_valid_ballot_the_first_seat_concludes(talk: Talk) -> None:
    never = [Text("All are fine.")]
    gather(talk, 3, **{name: odd(name, review=never) for name in NAMES[:3]})
    reply = await talk.ask(QUESTION, COUNCIL)
    text = section(reply, "🏆 Ranking")
    assert text.startswith("No valid ballots: the members stay in their order.")
    assert outcome(reply) == "3 of 3 answered · chaired by Ann"


# -- the quorum ------------------------------------------------------------------------


@REPLACES
async def test_a_quorum_does_not_wait_and_late_answers_are_shown_and_marked(
    talk: Talk,
) -> None:
    late = [Text("The elm, "), Gate("late"), Text("late as it is.")]
    gather(talk, 3, Ben=odd("Ben", answer=late))
    talk.admin_sets(quorum=2)
    with talk.models.hold("late") as hold:
        async with talk.page() as page:
            reply = await start(page)
            await reply.wait_for(lambda r: "In the end it is the oak" in r.text)
            assert section(reply, seat_of("Ben")) == "The elm,"
            await reply.wait_for(lambda r: "waiting for Ben" in str(r.statuses))
            hold.release()
            await finish(page, reply)
    said, mark = section(reply, seat_of("Ben")).splitlines()
    assert said == "The elm, late as it is."
    assert mark == "> ⏳ not counted: the others had gone on"
    assert outcome(reply) == f"2 of 3 answered · Ben was late · chaired by Ann{BY_SEAT}"
    assert "elm" not in "".join(seen.text for seen in of_stage(talk, "review"))
    assert not of_stage(talk, "review", model("Ben"))
    assert list(dict(sections(reply.output)))[1] == seat_of("Ben")


@REPLACES
async def test_at_the_deadline_those_who_have_answered_go_on(talk: Talk) -> None:
    gather(talk, 3)
    talk.admin_sets(answer_deadline=0.5)
    async with talk.page() as page:
        with talk.models.hold(model("Ben")):
            reply = await start(page)
            await reply.wait_for(partial(has, "In the end it is the oak"))
        await finish(page, reply)
    assert outcome(reply) == f"2 of 3 answered · Ben was late · chaired by Ann{BY_SEAT}"
    assert "> ⏳ not counted" in section(reply, seat_of("Ben"))


# -- the next question -----------------------------------------------------------------


@pytest.mark.parametrize("drafts", [False, True])
async def test_a_second_question_sees_earlier_conclusions_and_drafts_if_set(
    talk: Talk, drafts: bool
) -> None:
    gather(talk, 3)
    talk.admin_sets(remember_drafts=drafts)
    async with talk.page() as page:
        first = await ask(page, QUESTION, COUNCIL)
        await ask(page, "And which grows fast?", COUNCIL, chat=first.chat)
    for name in NAMES[:3]:
        later = of_stage(talk, "answer", model(name))[1]
        assert QUESTION in later.text
        assert "In the end it is the elm" in later.text
        for word in WORDS[:3]:
            assert (f"The {word} it is: Which tree" in later.text) is drafts
        for ours in ("🏆", "🏁", "⏱️", "First place", "· conclusion"):
            assert ours not in later.text


async def test_a_second_question_of_a_temporary_chat_sees_the_conclusion_only(
    talk: Talk,
) -> None:
    gather(talk, 2)
    async with talk.page() as page:
        first = await page.ask(COUNCIL, QUESTION, temporary=True)
        await first.wait_idle()
        talk.models.clear()
        second = await page.ask(COUNCIL, "And which grows fast?", chat=first.chat)
        await second.wait_idle()
    for seen in of_stage(talk, "answer"):
        assert "In the end it is the" in seen.text
        assert "it is: Which tree" not in seen.text and "🏁" not in seen.text


async def test_a_council_reads_a_conversation_and_the_other_way_round(
    talk: Talk,
) -> None:
    gather(talk, 2)
    async with talk.page() as page:
        first = await ask(page, QUESTION, ROUND_ROBIN)
        second = await ask(page, "And which grows fast?", COUNCIL, chat=first.chat)
        await ask(page, "And which burns well?", ROUND_ROBIN, chat=second.chat)
    seen = talk.models.turns(model("Ann"))
    council, last = seen[1], seen[-1]
    assert '<message from="Ben">\nThe elm it is' in council.text
    assert "In the end it is the" in last.text and "🏆" not in last.text


# -- skipping --------------------------------------------------------------------------


def skips_ben(call: Call) -> str:
    """Somebody who waits for everybody else."""
    return "Skip it" if title_of(call) == "Skip Ben?" else "Wait"


@CARDS
async def test_a_card_closes_by_itself_when_the_member_speaks(talk: Talk) -> None:
    gather(talk, 3)
    talk.admin_sets(skip_after=1)
    async with talk.page() as page:
        with talk.models.hold(model("Ben")) as silent:

            async def lets_it_speak(call: Call) -> str:
                silent.release()
                await call.closed.wait()
                return "Wait"

            on_card(page, lets_it_speak)
            reply = await start(page)
            await finish(page, reply)
        (call,) = page.calls
    assert title_of(call) == "Skip Ben?"
    assert "Ben has said nothing for 1 s. " in str(call.data)
    assert call.closed.is_set()
    assert outcome(reply) == "3 of 3 answered · chaired by Ben"
    assert talk.models.aborted == []


async def test_who_waits_is_asked_again(talk: Talk) -> None:
    gather(talk, 3)
    talk.admin_sets(skip_after=0.5)
    async with talk.page() as page:
        with talk.models.hold(model("Ben")) as silent:

            def waits(call: Call) -> str:
                if len(page.calls) == 2:
                    silent.release()
                return "Wait"

            on_card(page, waits)
            reply = await start(page)
            await finish(page, reply)
        times = [call.at for call in page.calls]
    assert len(times) == 2 and times[1] - times[0] >= 0.45
    assert outcome(reply) == "3 of 3 answered · chaired by Ben"


async def test_skipping_frees_the_connection_and_only_that_one(talk: Talk) -> None:
    gather(talk, 3, Ben=odd("Ben", answer=[Headers(), Silence()]))
    talk.admin_sets(skip_after=0.5)
    async with talk.page() as page:
        on_card(page, skips_ben)
        reply = await start(page)
        await finish(page, reply)
    what = f"Ben was skipped · chaired by Ann{BY_SEAT}"
    assert outcome(reply) == f"2 of 3 answered · {what}"
    notice = "> ⚠️ **Ben** could not answer: it was skipped"
    assert section(reply, seat_of("Ben")) == notice
    await talk.freed(model("Ben"))


@REPLACES
async def test_a_council_goes_on_with_what_is_there(talk: Talk) -> None:
    silent = {name: odd(name, answer=[Headers(), Silence()]) for name in ("Cy", "Dee")}
    gather(talk, 5, **silent)
    talk.admin_sets(skip_after=0.5)

    def has_enough(call: Call) -> str:
        enough = "Go on with what is there"
        return enough if enough in str(call.data) else "Wait"

    async with talk.page() as page:
        on_card(page, has_enough)
        reply = await start(page)
        await finish(page, reply)
    skipped = "Cy was skipped · Dee was skipped"
    assert outcome(reply) == f"3 of 5 answered · {skipped} · chaired by Ben"


async def test_who_falls_silent_in_the_middle_may_be_skipped_too(talk: Talk) -> None:
    gather(talk, 3, Ben=odd("Ben", answer=[Text("The elm "), Silence()]))
    talk.admin_sets(skip_after=0.5)
    async with talk.page() as page:
        on_card(page, skips_ben)
        reply = await start(page)
        await finish(page, reply)
    said, notice = section(reply, seat_of("Ben")).splitlines()
    assert (said, notice) == ("The elm", "> ⚠️ **Ben** broke off: it was skipped")
    await talk.freed(model("Ben"))


async def test_members_are_skipped_in_round_robin_too(talk: Talk) -> None:
    gather(talk, 3, Ben=odd("Ben", answer=[Silence()]))
    talk.admin_sets(skip_after=0.5)
    async with talk.page() as page:
        on_card(page, skips_ben)
        reply = await start(page, ROUND_ROBIN)
        await finish(page, reply)
    assert "**Ben** could not answer: it was skipped" in reply.text
    assert headings(reply) == [seat_of(name) for name in NAMES[:3]]
    await talk.freed(model("Ben"))


async def test_who_speaks_by_now_is_not_offered_to_be_skipped(talk: Talk) -> None:
    words = [step for _ in range(8) for step in (Text("elm "), Pause(0.1))]
    gather(
        talk,
        3,
        Ann=odd("Ann", answer=[Headers(), Silence()]),
        Ben=odd("Ben", answer=[Text("An "), Gate("silent"), *words]),
    )
    talk.admin_sets(skip_after=0.5, first_token_timeout=5)
    async with talk.page() as page:
        with talk.models.hold("silent") as silent:

            async def takes_its_time(call: Call) -> str:
                await asyncio.sleep(0.6)
                silent.release()
                await reply.wait_for(partial(has, "An elm"))
                return "Skip it" if title_of(call) == "Skip Ann?" else "Wait"

            on_card(page, takes_its_time)
            reply = await start(page)
            await finish(page, reply)
        titles = [title_of(call) for call in page.calls]
    assert titles in (["Skip Ann?"], ["Skip Ben?", "Skip Ann?"])


async def test_without_the_offer_nobody_is_asked(talk: Talk) -> None:
    gather(talk, 2, Ben=slow("Ben", 0.5))
    talk.admin_sets(skip_after=0)
    async with talk.page() as page:
        await ask(page, QUESTION, COUNCIL)
        assert page.calls == []


# -- Stop ------------------------------------------------------------------------------


async def stop(talk: Talk, page: Page, reply: Reply, *held: str) -> None:
    """Press Stop; everything is freed and what is shown is what is stored."""
    await page.stop(reply)
    await finish(page, reply)
    await reached(lambda: talk.models.wait_for(lambda m: m.in_flight == 0))
    assert sorted(talk.models.aborted) == sorted(map(model, held))
    assert last_status(reply).startswith("Stopped · ")
    assert not lines(reply, "> ⏳")
    stored = await assert_stored(page, reply)
    assert sections(stored["output"]) == sections(reply.output)


@REPLACES
async def test_stop_while_all_answer(talk: Talk) -> None:
    held = [Text("Half a "), Gate("held"), Text("tree.")]
    gather(
        talk,
        Ann=odd("Ann", answer=held),
        Ben=odd("Ben", answer=[Gate("held")]),
        Cy=odd("Cy", answer=held),
    )
    with talk.models.hold("held") as hold:
        async with talk.page() as page:
            reply = await start(page)
            await reached(lambda: hold.wait_until_reached(3))
            await reply.wait_for(
                lambda r: r.text.count("Half a") == 2 and "The ash it" in r.text
            )
            await stop(talk, page, reply, "Ann", "Ben", "Cy")
    found = dict(sections(reply.output))
    assert [found[seat_of(name)] for name in NAMES[:3]] == ["Half a", "", "Half a"]
    assert found[seat_of("Dee")].startswith("The ash it is")
    assert "stopped" not in reply.text.casefold()
    assert not of_stage(talk, "review")


async def test_stop_while_all_review(talk: Talk) -> None:
    held = [Gate("held"), Text("never")]
    gather(talk, 3, **{name: odd(name, review=held) for name in ("Ann", "Ben")})
    with talk.models.hold("held") as hold:
        async with talk.page() as page:
            reply = await start(page)
            await reached(lambda: hold.wait_until_reached(2))
            await stop(talk, page, reply, "Ann", "Ben")
    assert headings(reply) == [seat_of(name) for name in NAMES[:3]]
    assert not of_stage(talk, "conclusion")


@pytest.mark.parametrize("said", [pytest.param("", marks=REPLACES), "In the "])
async def test_stop_while_the_chair_concludes(talk: Talk, said: str) -> None:
    held = [*([Text(said)] if said else []), Gate("held"), Text("end.")]
    gather(talk, 3, Ben=odd("Ben", conclusion=held))
    with talk.models.hold("held") as hold:
        async with talk.page() as page:
            reply = await start(page)
            await reached(hold.wait_until_reached)
            await reply.wait_for(lambda r: "> 🏁" in r.text and said.strip() in r.text)
            await stop(talk, page, reply, "Ben")
    concluding = f"{seat_of('Ben')} · conclusion"
    assert (concluding in headings(reply)) is bool(said)
    if said:
        assert section(reply, concluding).splitlines()[0] == "In the"
    assert "⚠️" not in reply.text
    assert table(reply) and outcome(reply)


async def test_stop_while_somebody_is_late(talk: Talk) -> None:
    late = [Text("The elm "), Gate("held")]
    gather(talk, 3, Ben=odd("Ben", answer=late))
    talk.admin_sets(quorum=2)
    with talk.models.hold("held"):
        async with talk.page() as page:
            reply = await start(page)
            await reply.wait_for(lambda r: "waiting for Ben" in str(r.statuses))
            await page.stop(reply)
            await finish(page, reply)
    await talk.freed(model("Ben"))
    assert section(reply, seat_of("Ben")) == "The elm"
    assert "In the end" in reply.text


# -- progress, figures, limits ---------------------------------------------------------


def progress(reply: Reply) -> list[tuple[float, str]]:
    """When the line of progress of the answers changed, and what it then said."""
    ours: set[str] = set()
    found = []
    for event in reply.events:
        item: Json = (
            event.data.get("item") or {} if event.type[:8] == "response" else {}
        )
        if item and text_of_item(item).startswith("> ⏳ 0 of"):
            ours.add(item["id"])
        if item.get("id") in ours or (event.data or {}).get("item_id") in ours:
            found.append((event.at, text_of_item(item)))
    return found


@REPLACES
async def test_progress_is_replaced_in_place_each_second_and_with_each_answer(
    talk: Talk,
) -> None:
    gather(talk, Cy=slow("Cy", 1.5), Dee=slow("Dee", 3.4))
    reply = await talk.ask(QUESTION, COUNCIL)
    shown = progress(reply)
    texts = [text for _, text in shown]
    assert re.match(r"> ⏳ 0 of 4 answered · 0\.\d s\n> 🔵 Ann · waiting\n", texts[0])
    assert texts[-1] == ""
    answering = [text for text in texts if " answered " in text]
    assert 4 <= len(answering) <= 9
    for text in answering:
        assert re.fullmatch(
            r"> ⏳ [0-3] of 4 answered · \d\.\d s"
            r"(\n> (🔵 Ann|🔴 Ben|🟢 Cy|🟠 Dee) · waiting)*",
            text,
        )
    assert any("🟢 Cy · waiting\n> 🟠 Dee · waiting" in text for text in answering)
    assert not lines(reply, "> ⏳")


@REPLACES
async def test_waiting_writes_nothing_to_the_database(talk: Talk) -> None:
    gather(talk, 3)
    async with talk.page() as page:
        with talk.models.hold(model("Cy")):
            reply = await start(page)
            await reply.wait_for(partial(has, "2 of 3 answered"))
            before = await reached(talk.host.settled_counts)
            shown = len(progress(reply))
            await reply.wait_for(lambda r: len(progress(r)) >= shown + 2)
            writes = (await reached(talk.host.counts) - before).writes
        await finish(page, reply)
    assert writes < 2  # the host's own timers write now and then


async def test_figures_are_in_the_usage_and_in_one_closing_line(talk: Talk) -> None:
    paced = [Pause(0.5), Text("fir "), Pause(0.5), Text("two three four.")]
    gather(talk, 3, Cy=odd("Cy", answer=paced))
    reply = await talk.ask(QUESTION, COUNCIL)
    assert reply.usage
    parts = reply.usage["participants"]
    assert set(parts) == set(NAMES[:3])
    assert {name: part["calls"] for name, part in parts.items()} == {
        "Ann": 2,
        "Ben": 3,
        "Cy": 2,
    }
    assert 0.45 < parts["Cy"]["first_token_seconds"] < 1.0
    assert 3 < parts["Cy"]["tokens_per_second"] < 9
    for key in ("input_tokens", "output_tokens"):
        assert reply.usage[key] == sum(part[key] for part in parts.values())
    (line,) = lines(reply, "<summary>⏱️ ")
    total = reply.usage["total_tokens"]
    assert line == f"<summary>⏱️ 7 model calls · {total:,} tokens</summary>"
    cy = parts["Cy"]
    assert lines(reply, "| Cy |")[-1] == (
        f"| Cy | {cy['first_token_seconds']:.1f} s | {cy['tokens_per_second']:.0f} | "
        f"{cy['input_tokens']:,} | {cy['output_tokens']:,} |"
    )


async def test_what_providers_charge_is_in_the_figures(talk: Talk) -> None:
    def charged(cost: float) -> Raw:
        chunk = {"choices": [], "usage": {"cost": cost}}
        return Raw(f"data: {json.dumps(chunk)}\n\n".encode())

    ben = odd("Ben", answer=[Text("elm."), charged(0.0125)])
    cy = odd("Cy", answer=[Text("fir."), charged(0.5)])
    gather(talk, 3, Ben=ben, Cy=cy)
    reply = await talk.ask(QUESTION, COUNCIL)
    assert reply.usage and reply.usage["cost"] == 0.5125
    (line,) = lines(reply, "<summary>⏱️ ")
    assert line.endswith(" tokens · cost 0.5125</summary>")
    shown = [lines(reply, f"| {name} |")[-1].split(" | ")[-1] for name in NAMES[:3]]
    assert shown == ["– |", "0.0125 |", "0.5000 |"]


@pytest.mark.parametrize(
    ("shown", "mode", "there"),
    [
        ("never", COUNCIL, False),
        ("always", ROUND_ROBIN, True),
        ("council and debate", ROUND_ROBIN, False),
        ("council and debate", DEBATE, True),
    ],
)
async def test_the_line_of_figures_is_shown_where_it_is_wanted(
    talk: Talk, shown: str, mode: str, there: bool
) -> None:
    gather(talk, 2)
    talk.admin_sets(show_figures=shown)
    reply = await talk.ask(QUESTION, mode)
    assert len(lines(reply, "<summary>⏱️")) == there
    assert reply.usage and "calls" in reply.usage["participants"]["Ann"]


@pytest.mark.parametrize("at_once", [None, 2])
async def test_members_of_one_ollama_server_answer_one_at_a_time_by_default(
    talk: Talk, at_once: int | None
) -> None:
    for name in NAMES[:4]:
        steps = [Pause(0.2), Text(f"The {WORD[name]} it is.")]
        made = odd(name, answer=steps)
        talk.models.add(f"{model(name)}:local", made, surface="ollama")
    if at_once:
        talk.admin_sets(calls_per_ollama=at_once)
    talk.seat(*(f"{name} | {model(name)}:local" for name in NAMES[:4]))
    reply = await talk.ask(QUESTION, COUNCIL)
    assert outcome(reply) == "4 of 4 answered · chaired by Ben"
    assert table(reply) == ALL_ROWS
    assert talk.models.max_in_flight == (at_once or 1)


async def test_waiting_for_a_place_is_no_part_of_a_members_turn(talk: Talk) -> None:
    for name in NAMES[:3]:
        steps = [Pause(0.5), Text(f"The {WORD[name]} it is.")]
        made = odd(name, answer=steps)
        talk.models.add(f"{model(name)}:local", made, surface="ollama")
    talk.admin_sets(turn_timeout=1.2)
    talk.seat(*(f"{name} | {model(name)}:local" for name in NAMES[:3]))
    reply = await talk.ask(QUESTION, COUNCIL)
    assert outcome(reply) == "3 of 3 answered · chaired by Ben"


@pytest.mark.parametrize("at_once", [None, 2])
async def test_so_many_members_of_a_connection_answer_at_once(
    talk: Talk, at_once: int | None
) -> None:
    gather(talk, **{name: slow(name, 0.5) for name in NAMES[:4]})
    if at_once:
        talk.admin_sets(calls_per_connection=at_once)
    reply = await talk.ask(QUESTION, COUNCIL)
    assert outcome(reply) == "4 of 4 answered · chaired by Ben"
    assert talk.models.max_in_flight == (at_once or 4)


@pytest.mark.parametrize(
    ("retry_after", "pause"),
    [pytest.param(1.4, 1.4, marks=PASSES_RETRY_AFTER), (0.1, 1), (None, 1)],
)
async def test_a_busy_model_is_waited_for(
    talk: Talk, retry_after: float | None, pause: float
) -> None:
    gather(talk, 3, Ben=busy(1, odd("Ben"), retry_after))
    reply = await talk.ask(QUESTION, COUNCIL)
    assert outcome(reply) == "3 of 3 answered · chaired by Ben"
    asked = [seen.at for seen in of_stage(talk, "answer", model("Ben"))]
    earlier, later = asked
    assert pause * 0.95 <= later - earlier < pause + 0.6
    assert "⚠️" not in reply.text and "⏳" not in reply.text
    line = "🔴 Ben · busy, asking again: Too many scripted requests. (HTTP 429)"
    seen = [event for event in reply.events if line in str(event.data)]
    assert seen or pause < 1.1


async def test_a_busy_voter_is_waited_for_too(talk: Talk) -> None:
    ben, busy_ben = odd("Ben"), busy(1, odd("Ben"), 0.5)

    def reviews_late(body: Body) -> Script:
        return (busy_ben if stage_of(body) == "review" else ben)(body)

    gather(talk, 3, Ben=reviews_late)
    reply = await talk.ask(QUESTION, COUNCIL)
    assert table(reply)[0] == "| Ben | 5.6 | Ann, Cy |"
    assert "| Ann | 4.7 | Ben |" in table(reply)


async def test_who_stays_busy_fails_after_the_patience(talk: Talk) -> None:
    gather(talk, 3, Ben=busy(99, odd("Ben"), 0.5))
    talk.admin_sets(busy_patience=1.2)
    reply = await talk.ask(QUESTION, COUNCIL)
    assert outcome(reply) == (
        "2 of 3 answered · Ben failed: Too many scripted requests. (HTTP 429) "
        f"· chaired by Ann{BY_SEAT}"
    )
    assert len(of_stage(talk, "answer", model("Ben"))) == 2


# -- API clients -----------------------------------------------------------------------


@pytest.fixture(scope="module")
def council_key(host: OpenWebUI, user: Account) -> str:
    """A plain user's key."""
    return host.create_api_key(user)


@pytest.fixture
def client(talk: Talk, council_key: str) -> Iterator[openai.OpenAI]:
    """The openai client, pointed at the host."""
    with openai.OpenAI(
        base_url=f"{talk.host.url}/api",
        api_key=council_key,
        max_retries=0,
        http_client=httpx.Client(trust_env=False, timeout=60),
    ) as made:
        yield made


ASKED: Any = [{"role": "user", "content": QUESTION}]


def stream(client: openai.OpenAI) -> str:
    """The text of a streamed council."""
    chunks = client.chat.completions.create(model=COUNCIL, messages=ASKED, stream=True)
    return "".join(
        choice.delta.content or "" for chunk in chunks for choice in chunk.choices
    )


def test_an_api_client_streams_the_sections_in_order(
    talk: Talk, client: openai.OpenAI
) -> None:
    gather(talk, 3, Ann=slow("Ann", 1.5), Ben=slow("Ben", 0.7))
    text = stream(client)
    whole = client.chat.completions.create(model=COUNCIL, messages=ASKED)
    assert re.findall(r"(?m)^### (.+)$", text) == [
        *map(seat_of, NAMES[:3]),
        "🏆 Ranking",
        f"{seat_of('Ben')} · conclusion",
    ]
    places = [text.index(f"The {word} it is") for word in WORDS[:3]]
    assert places == sorted(places)
    assert "> 🏁 3 of 3 answered · chaired by Ben" in text
    assert "⏳" not in text and "⏱️" not in text
    assert text.split() == (whole.choices[0].message.content or "").split()
    assert text.startswith("### ")


def test_an_api_client_is_told_who_concluded_in_the_end(
    talk: Talk, client: openai.OpenAI
) -> None:
    thinks = [Reasoning("Let me see."), Pause(0.3), Fail("It broke.")]
    gather(talk, 3, Ben=odd("Ben", conclusion=thinks))
    text = stream(client)
    assert "In the end it is the oak" in text
    assert "chaired by Ann (Ben failed)" in text


# -- many at once ----------------------------------------------------------------------


@pytest.mark.timeout(120)
async def test_twenty_councils_of_eight_do_not_meet(talk: Talk) -> None:
    def marked(name: str) -> Behaviour:
        plain = member(WORD[name], PREFERS)

        def behave(body: Body) -> Script:
            if stage_of(body) == "review":
                return plain(body)
            mark = re.findall(r"MARK\d+X", last_user_text(body))[0]
            said = " ".join(f"{WORD[name]}-{mark}-{n}" for n in range(20))
            return Script([Text(said)])

        return behave

    gather(talk, 8, **{name: marked(name) for name in NAMES})

    async def one(number: int) -> None:
        mark = f"MARK{number}X"
        async with talk.page() as page:
            async with accepted:  # SQLite takes only so many new chats at a time
                reply = await start(page, text=f"Which tree, {mark}?")
            await finish(page, reply)
        assert outcome(reply) == "8 of 8 answered · chaired by Ben"
        shown = str(reply.message) + str([event.data for event in reply.events])
        assert set(re.findall(r"MARK\d+X", shown)) == {mark}
        found = dict(sections(reply.output))
        whole = {w: " ".join(f"{w}-{mark}-{n}" for n in range(20)) for w in WORDS}
        for name in NAMES:
            assert found[seat_of(name)] == whole[WORD[name]]
        assert found[f"{seat_of('Ben')} · conclusion"].startswith(whole["elm"])

    accepted = asyncio.Lock()
    began = asyncio.get_running_loop().time()
    with talk.models.hold(model("Hal"), after=10) as hold:
        async with asyncio.TaskGroup() as group:
            for number in range(20):
                group.create_task(one(number))
            await reached(lambda: hold.wait_until_reached(20, timeout=40))
            hold.release()
    assert asyncio.get_running_loop().time() - began <= 60
    requests = talk.models.turns()
    assert len(requests) == 20 * (8 + 8 + 1)
    for seen in requests:
        assert len(set(re.findall(r"MARK\d+X", seen.text))) == 1


# -- the debate ------------------------------------------------------------------------


async def test_a_debate_has_the_rounds_of_the_question_a_vote_and_a_conclusion(
    talk: Talk,
) -> None:
    gather(talk, 3)
    talk.seat(*(f"{name} | {model(name)}" for name in NAMES[:3]), rounds=3)
    reply = await talk.ask("Which tree lasts? /rounds 1", DEBATE)
    assert headings(reply) == [
        *map(seat_of, NAMES[:3]),
        "🏆 Votes",
        f"{seat_of('Ben')} · conclusion",
    ]
    assert table(reply) == [
        "| Ben | 2 | Ann, Cy |",
        "| Ann | 1 | Ben |",
        "| Cy | 0 | – |",
    ]
    assert outcome(reply) == "3 of 3 answered · chaired by Ben"
    described = [status["description"] for status in reply.statuses[:-1]]
    assert described == [
        "Ann, Ben, Cy · opening",
        "Members judge each other",
        "Ben · concluding",
    ]
    for seen in talk.models.turns():
        assert "/rounds" not in seen.text and QUESTION in seen.text
    (concluding,) = of_stage(talk, "conclusion")
    asked = last_user_text(concluding.chat)
    assert re.search(r"\| \[[A-C]\] \| 2 \| \[[A-C]\], \[[A-C]\] \|", asked)
    assert not [name for name in NAMES if name in asked]
    heard = re.findall(r'<message from="(.)">\nThe (\w+) it is', concluding.text)
    assert sorted(letter for letter, _ in heard) == ["A", "B", "C"]
    assert sorted(word for _, word in heard) == ["elm", "fir", "oak"]


async def test_everybody_votes_but_not_for_itself(talk: Talk) -> None:
    gather(talk, 3)
    await talk.ask(QUESTION, DEBATE)
    for name in NAMES[:3]:
        (seen,) = of_stage(talk, "vote", model(name))
        asked = last_user_text(seen.chat)
        candidates = asked.split("Choose one of: ")[1].split("\n")[0]
        assert f'"{name}"' not in candidates
        assert candidates.count('"') == 4


async def test_each_turn_of_a_debate_is_told_to_answer_the_strongest_point(
    talk: Talk,
) -> None:
    gather(talk, 2)
    talk.seat(*(f"{name} | {model(name)}" for name in NAMES[:2]), rounds=2)
    await talk.ask(QUESTION, DEBATE)
    turns = of_stage(talk, "answer")
    assert len(turns) == 4
    for seen in turns:
        assert seen.text.count("This is a debate.") == 1
        assert (
            last_user_text(seen.chat).rstrip().endswith("that others disagree is none.")
        )
    for seen in turns[:2]:
        assert "<message from" not in last_user_text(seen.chat)
    assert '<message from="Ben">\nThe elm it is' in turns[2].text


async def test_all_take_a_position_in_a_debate_at_the_same_time(talk: Talk) -> None:
    held = {
        n: odd(n, answer=[Gate("held"), Text(f"The {WORD[n]}.")]) for n in NAMES[:3]
    }
    gather(talk, 3, **held)
    with talk.models.hold("held") as hold:
        async with talk.page() as page:
            reply = await start(page, DEBATE)
            await reached(lambda: hold.wait_until_reached(3))
            hold.release()
            await finish(page, reply)
    assert outcome(reply).startswith("3 of 3 answered")


# -- nobody of these decides -----------------------------------------------------------


def judges(name: str, order: Callable[[list[str]], Sequence[str]]) -> Behaviour:
    """A member that ranks by the order in which it reads the answers."""

    def behave(body: Body) -> Script:
        if stage_of(body) != "review":
            return odd(name)(body)
        letters = re.findall(r'<message from="(.)">', last_user_text(body))
        ranked = list(order(letters))
        scores = {letter: 10 - 3 * at for at, letter in enumerate(ranked)}
        return Script([Text(json.dumps({"scores": scores, "ranking": ranked}))])

    return behave


async def test_a_judge_that_always_puts_the_first_first_does_not_decide(
    talk: Talk,
) -> None:
    others = {name: member(WORD[name], PREFERS, scores=(9, 6, 3)) for name in NAMES[:3]}
    gather(talk, **others, Dee=judges("Dee", lambda letters: letters))
    reply = await talk.ask(QUESTION, COUNCIL)
    assert outcome(reply) == "4 of 4 answered · chaired by Ben"


async def test_a_member_that_votes_for_itself_under_every_letter_does_not_win(
    talk: Talk,
) -> None:
    """It gives all the others nothing, as if its own answer stood nowhere."""

    def nobody_else(body: Body) -> Script:
        if stage_of(body) == "vote":
            return Script([Text(json.dumps({"vote": "Dee"}))])
        if stage_of(body) != "review":
            return odd("Dee")(body)
        letters = re.findall(r'<message from="(.)">', last_user_text(body))
        own = dict.fromkeys(letters, "my own answer, the ash")
        verdict = {"scores": dict.fromkeys(letters, 0), "comments": own}
        return Script([Text(json.dumps({**verdict, "ranking": [letters]}))])

    others = {
        name: member(WORD[name], PREFERS, votes="Ben", scores=(8, 7, 6))
        for name in NAMES[:3]
    }
    gather(talk, **others, Dee=nobody_else)
    reply = await talk.ask(QUESTION, COUNCIL)
    assert outcome(reply) == "4 of 4 answered · chaired by Ben"
    assert table(reply)[-1].startswith("| Dee | ")
    debated = await talk.ask(QUESTION, DEBATE)
    assert outcome(debated) == "4 of 4 answered · chaired by Ben"
    assert "No ballot from Dee: could not be read." in debated.text


async def test_a_right_minority_is_read_by_the_chair_beside_the_better_style(
    talk: Talk,
) -> None:
    """Three are wrong with one voice and well styled; the chair gets the one that is
    right word for word, under a letter like theirs, and may side with it."""
    styled = "**Without any doubt**, it is the fir:\n\n- tall\n- old\n- loved by all."
    right = "The yew it is: some are 4,000 years old."

    def chair(body: Body) -> Script:
        if stage_of(body) != "conclusion":
            return odd("Hal")(body)
        found = re.findall(r'<message from="(.)">\nThe yew', last_user_text(body))
        return Script([Text(f"The yew, as [{found[0]}] says, against the others.")])

    wrong = {name: odd(name, answer=[Text(styled)]) for name in NAMES[:3]}
    gather(talk, **wrong, Dee=odd("Dee", answer=[Text(right)]))
    talk.models.add(model("Hal"), chair)
    talk.admin_sets(chair=model("Hal"))
    reply = await talk.ask(QUESTION, COUNCIL)
    assert outcome(reply).startswith("4 of 4 answered · chaired by ")
    assert not of_stage(talk, "review", model("Hal"))
    (seen,) = of_stage(talk, "conclusion")
    assert right in last_user_text(seen.chat) and styled in last_user_text(seen.chat)
    concluded = section(reply, headings(reply)[-1]).splitlines()[0]
    assert concluded == "The yew, as Dee says, against the others."


# -- a chair from outside --------------------------------------------------------------


async def test_a_chair_from_outside_concludes_and_is_no_contestant(talk: Talk) -> None:
    gather(talk, 3)
    talk.models.add(model("Hal"), odd("Hal"))
    talk.admin_sets(chair=model("Hal"))
    reply = await talk.ask(QUESTION, COUNCIL)
    assert [seen.model for seen in of_stage(talk, "conclusion")] == [model("Hal")]
    assert talk.models.turns(model("Hal")) == of_stage(talk, "conclusion")
    assert len(table(reply)) == 3
    assert re.fullmatch(r"🟠 .+ · conclusion", headings(reply)[-1])


@pytest.mark.parametrize("chair", ["no-such-model", "secret", f"{FUNCTION_ID}.council"])
async def test_a_chair_that_may_not_be_used_is_as_one_that_is_not_there(
    talk: Talk, chair: str
) -> None:
    talk.models.add("secret", member("ivy"))
    talk.host.models(refresh=True)
    gather(talk, 2)
    talk.admin_sets(chair=chair)
    reply = await talk.ask(QUESTION, COUNCIL)
    assert outcome(reply) == (
        "2 of 2 answered · chaired by Ann (by seat: of two answers none is ranked, "
        "the chair that was chosen is not here)"
    )
    assert not talk.models.turns("secret")


@REPLACES
async def test_a_chair_from_outside_that_fails_gives_way(talk: Talk) -> None:
    gather(talk, 2)
    broken = [Status(500, {"error": {"message": "No chair."}})]
    talk.models.add(model("Hal"), odd("Hal", conclusion=broken))
    talk.admin_sets(chair=model("Hal"))
    reply = await talk.ask(QUESTION, COUNCIL)
    assert re.search(r"chaired by Ann \(.+ failed\)$", outcome(reply))


# -- folding ---------------------------------------------------------------------------


def shown_order(reply: Reply) -> list[str]:
    """What stands in the message, in order: marks of ours, headings, folded lines."""
    pattern = r"(?m)^(?:> (🏁)|### (.+)|<summary>(⏱️|.+(?=</summary>)))"
    return ["".join(found) for found in re.findall(pattern, reply.text)]


@REPLACES
async def test_the_conclusion_stands_first_and_each_draft_in_a_line(
    talk: Talk, garden: str
) -> None:
    def digs(body: Body) -> Script:
        if stage_of(body) == "review" or fresh_results(body):
            return odd("Ben")(body)
        call = ToolCall("look_up", '{"topic": "elms"}')
        return Script([Reasoning("Hm."), Text("Let me look. "), call])

    failing = [Status(500, {"error": {"message": "Gone."}})]
    gather(talk, Ben=digs, Dee=odd("Dee", answer=failing))
    talk.admin_sets(fold_drafts=True)
    async with talk.page() as page:
        reply = await ask(page, QUESTION, COUNCIL, tool_ids=[garden])
    assert shown_order(reply) == [
        "🏁",
        f"{seat_of('Ben')} · conclusion",
        "🏆 Ranking",
        "Who ranked whom, and why",
        "🔵 Ann · rank 2 · 7 words",
        "🔵 Ann",
        "🔴 Ben · rank 1 · 10 words",
        "🔴 Ben",
        "🟢 Cy · rank 3 · 7 words",
        "🟢 Cy",
        "🟠 Dee · no answer",
        "🟠 Dee",
        "⏱️",
    ]
    assert results(reply) == ["The almanac on elms: 3 lines."] * 2
    assert "> ⚠️ **Dee** could not answer" in reply.text
    assert reply.text.count("Let me look.") == 2


@REPLACES
@pytest.mark.parametrize("mode", [COUNCIL, DEBATE])
async def test_a_second_question_after_a_folded_reply_knows_every_speaker(
    talk: Talk, mode: str
) -> None:
    odd_text = "A &lt;b&gt; R&D &amp; x < y\n\n```html\n</details>\n```\n\nDone."
    gather(talk, 3, Cy=odd("Cy", answer=[Text(odd_text)]))
    talk.admin_sets(fold_drafts=True, remember_drafts=True)
    async with talk.page() as page:
        first = await ask(page, QUESTION, mode)
        assert first.text.index("· conclusion") < first.text.index("<details")
        talk.models.clear()
        await ask(page, "And which grows fast?", mode, chat=first.chat)
    heard = of_stage(talk, "answer", model("Ann"))[0].text
    assert '<message from="Ben">\nThe elm it is' in heard
    assert f'<message from="Cy">\n{odd_text}\n</message>' in heard
    ours_only = (
        "<details type",
        "<summary>",
        "rank 1",
        "🔴",
        " words<",
        "🏆",
        "It is so",
    )
    for ours in (*ours_only, "It says", "First token", "model calls"):
        assert ours not in heard
    said = [m["content"] for m in talk.sent(model("Ann")) if m["role"] == "assistant"]
    assert said[0].startswith("The oak it is: Which tree lasts")


@REPLACES
async def test_without_streaming_drafts_fold_too(talk: Talk) -> None:
    gather(talk, 2)
    talk.admin_sets(fold_drafts=True, show_figures="never")
    streamed = await talk.ask(QUESTION, COUNCIL)
    at_once = await talk.ask(QUESTION, COUNCIL, stream=False)
    assert shown_order(at_once) == shown_order(streamed)
    assert shown_order(streamed)[0] == "🏁"


async def test_nothing_folds_before_there_is_a_conclusion(talk: Talk) -> None:
    held = [Text("In the "), Gate("held"), Text("end.")]
    gather(talk, 3, Ben=odd("Ben", conclusion=held))
    talk.admin_sets(fold_drafts=True)
    with talk.models.hold("held") as hold:
        async with talk.page() as page:
            reply = await start(page)
            await reached(hold.wait_until_reached)
            await reply.wait_for(lambda r: "In the" in r.text)
            await stop(talk, page, reply, "Ben")
    assert "words</summary>" not in reply.text
    assert headings(reply)[0] == seat_of("Ann")


# -- costs -----------------------------------------------------------------------------


async def test_a_ceiling_on_tokens_ends_a_conversation_with_its_round(
    talk: Talk,
) -> None:
    gather(talk, 2)
    talk.seat(*(f"{name} | {model(name)}" for name in NAMES[:2]), rounds=5)
    talk.admin_sets(max_tokens=10)
    reply = await talk.ask(QUESTION, ROUND_ROBIN)
    assert headings(reply) == in_rounds(5, seat_of("Ann"), seat_of("Ben"))[:2]
    (line,) = lines(reply, "> ⚠️ ")
    assert re.fullmatch(r"> ⚠️ [\d,]+ tokens were used, and 10 are the ceiling\.", line)
    assert last_status(reply).startswith("Ended: the ceiling on tokens is reached · ")


@pytest.mark.parametrize(("chair", "who"), [("", "Ben"), ("Cy", "Cy")])
async def test_the_winner_or_the_chair_concludes_a_debate(
    talk: Talk, chair: str, who: str
) -> None:
    gather(talk, 3)
    talk.admin_sets(chair=chair)
    reply = await talk.ask(QUESTION, DEBATE)
    assert outcome(reply) == f"3 of 3 answered · chaired by {who}"
    assert headings(reply)[-1] == f"{seat_of(who)} · conclusion"


async def test_no_model_ever_sees_the_rounds_command(talk: Talk) -> None:
    gather(talk, 2)
    async with talk.page() as page:
        first = await ask(page, "Which tree lasts? /rounds 1", DEBATE)
        await ask(page, "And which burns?", DEBATE, chat=first.chat)
    assert not [seen for seen in talk.models.turns() if "/rounds" in seen.text]


# -- an earlier search -----------------------------------------------------------------

FINDS = {"Oaks live for a thousand years.": "https://example.com/oaks"}


async def search(talk: Talk, engine: SearchEngine, **asking: Any) -> Reply:
    """Ask a council with web search on."""
    with talk.host.configured(engine.settings):
        return await talk.ask(
            QUESTION, COUNCIL, features={"web_search": True}, **asking
        )


async def test_one_search_serves_the_whole_council(talk: Talk) -> None:
    gather(talk, 3)
    with SearchEngine(FINDS) as engine:
        reply = await search(talk, engine)
    assert engine.queries == [QUESTION]
    for seen in of_stage(talk, "answer"):
        asked = last_user_text(seen.chat)
        assert asked.startswith(f"{QUESTION}\n\nFound on the web for this question:")
        assert "Oaks live for a thousand years." in asked
    assert len(of_stage(talk, "answer")) == 3
    cited = [source["source"] for source in reply.sources]
    assert len(reply.sources) == 1, cited
    assert "https://example.com/oaks" in str(reply.sources)
    assert outcome(reply) == "3 of 3 answered · chaired by Ben"


async def test_nothing_is_searched_without_the_feature_or_in_round_robin(
    talk: Talk,
) -> None:
    gather(talk, 2)
    with SearchEngine(FINDS) as engine, talk.host.configured(engine.settings):
        await talk.ask(QUESTION, COUNCIL)
        await talk.ask(QUESTION, ROUND_ROBIN, features={"web_search": True})
        assert engine.queries == []


async def test_where_the_host_has_searched_nothing_is_searched_again(
    talk: Talk,
) -> None:
    gather(talk, 2)
    with SearchEngine(FINDS) as engine:
        await search(talk, engine, params={"function_calling": "legacy"})
        assert len(engine.queries) == 1
    assert "Found on the web" not in str([s.text for s in talk.models.turns()])
    assert "Oaks live for a thousand years." in of_stage(talk, "answer")[0].text


async def test_a_search_that_fails_is_no_reason_not_to_answer(talk: Talk) -> None:
    gather(talk, 2)
    with SearchEngine({}) as engine:
        reply = await search(talk, engine)
    assert outcome(reply) == f"2 of 2 answered · chaired by Ann{BY_SEAT}"
    assert reply.error is None
