"""A model that fails is named in its place, and the conversation goes on."""

import pytest

from tests.integration.talk import (
    Talk,
    ask,
    assert_stored,
    headings,
    in_rounds,
    last_status,
    question_of,
    results,
)
from tests.stack.scripts import Body, Fail, Script, Text, ToolCall

QUESTION = "Should we plant oaks or birches?"
NAMES = ["🔵 Ann", "🔴 Rex", "🟢 Ben"]


def seat_between(talk: Talk, model: str) -> None:
    """A model between two that work."""
    talk.seat("Ann | alice", f"Rex | {model}", "Ben | bob")


def notice(text: str) -> str:
    """The line in which a failure is reported."""
    lines = [line for line in text.splitlines() if line.startswith("> ⚠️ ")]
    assert len(lines) == 1
    return lines[0]


@pytest.mark.parametrize(
    ("model", "reason", "asked"),
    [
        ("fails-500", "The scripted server failed.", 2),
        ("fails-401", "The scripted key is not valid.", 1),
        ("fails-429", "Too many scripted requests.", 1),
        ("empty", "it gave an empty answer, asked twice", 2),
    ],
)
async def test_who_cannot_answer_is_named_with_the_reason_and_the_next_one_speaks(
    talk: Talk, model: str, reason: str, asked: int
) -> None:
    talk.admin_sets(busy_patience=0)
    seat_between(talk, model)
    reply = await talk.ask(QUESTION)
    assert reply.error is None
    assert headings(reply) == NAMES
    assert notice(reply.text).startswith("> ⚠️ **Rex** could not answer: ")
    assert reason in notice(reply.text)
    assert reply.text.index(reason) < reply.text.index("### 🟢 Ben")
    assert talk.order() == ["alice", *[model] * asked, "bob"]
    seen = question_of(talk.sent("bob"))
    assert '<message from="Rex">\n(could not answer)\n</message>' in seen
    assert last_status(reply).startswith("Finished after 1 round · 3 turns")


@pytest.mark.parametrize(
    ("model", "reason"),
    [("fails-midway", "The scripted model broke midway."), ("drops-midway", "")],
)
async def test_what_was_said_before_a_failure_stays_and_is_seen(
    talk: Talk, model: str, reason: str
) -> None:
    seat_between(talk, model)
    reply = await talk.ask(QUESTION)
    assert reply.error is None
    assert headings(reply) == NAMES
    said = "This much was said before the end"
    assert notice(reply.text).startswith("> ⚠️ **Rex** broke off: ")
    assert reason in notice(reply.text)
    places = [reply.text.index(t) for t in (said, "> ⚠️", "### 🟢 Ben", "Bob here.")]
    assert places == sorted(places)
    assert talk.order() == ["alice", model, "bob"]
    assert f'<message from="Rex">\n{said}\n</message>' in question_of(talk.sent("bob"))


async def test_a_failure_is_no_part_of_what_is_said_later(talk: Talk) -> None:
    seat_between(talk, "fails-midway")
    async with talk.page() as page:
        reply = await ask(page, QUESTION)
        await ask(page, "And maples?", chat=reply.chat)
    later = str(talk.models.turns("bob")[1].messages)
    assert "This much was said before the end" in later
    assert "⚠️" not in later and "broke off:" not in later
    own = [m for m in talk.sent("fails-midway", 1) if m["role"] == "assistant"]
    assert [m["content"] for m in own] == ["This much was said before the end"]


async def test_a_silent_model_is_given_up_after_the_first_token_timeout(
    talk: Talk,
) -> None:
    talk.admin_sets(first_token_timeout=0.5)
    seat_between(talk, "silent")
    reply = await talk.ask(QUESTION, timeout=15)
    assert headings(reply) == NAMES
    assert "it said nothing for 0.5 s" in notice(reply.text)
    assert set(talk.models.aborted) == {"silent"}
    assert talk.order()[-1] == "bob"


async def test_headers_are_no_answer(talk: Talk) -> None:
    talk.admin_sets(first_token_timeout=0.5)
    seat_between(talk, "silent-open")
    reply = await talk.ask(QUESTION, timeout=15)
    assert "it said nothing for 0.5 s" in notice(reply.text)
    assert talk.order()[-1] == "bob"


async def test_a_stalled_model_is_given_up_after_the_silence_timeout(
    talk: Talk,
) -> None:
    talk.admin_sets(silence_timeout=0.5)
    seat_between(talk, "stalls")
    reply = await talk.ask(QUESTION)
    assert "This much was said before the end" in reply.text
    assert "**Rex** broke off: it said nothing for 0.5 s" in notice(reply.text)
    assert talk.order() == ["alice", "stalls", "bob"]
    assert talk.models.aborted == ["stalls"]


async def test_a_turn_that_takes_too_long_is_ended(talk: Talk) -> None:
    talk.admin_sets(turn_timeout=0.5)
    talk.add_model("tokens-1000-20")
    seat_between(talk, "tokens-1000-20")
    reply = await talk.ask(QUESTION)
    assert "it took longer than 0.5 s" in notice(reply.text)
    assert headings(reply) == NAMES
    assert talk.models.aborted == ["tokens-1000-20"]


async def test_an_empty_answer_is_asked_for_once_more(talk: Talk) -> None:
    seat_between(talk, "empty-once")
    reply = await talk.ask("Is an empty answer an answer?")
    assert "Late here." in reply.text and "⚠️" not in reply.text
    assert headings(reply) == NAMES
    assert talk.order() == ["alice", "empty-once", "empty-once", "bob"]
    first, second = (talk.sent("empty-once", turn) for turn in (0, 1))
    assert first == second


async def test_a_stream_that_fails_at_once_is_tried_without_streaming(
    talk: Talk,
) -> None:
    seat_between(talk, "stream-refuser")
    reply = await talk.ask(QUESTION)
    assert "Refuser here." in reply.text and "⚠️" not in reply.text
    streamed = [seen.body["stream"] for seen in talk.models.turns("stream-refuser")]
    assert streamed == [True, False]


@pytest.mark.parametrize(
    ("model", "said"),
    [
        ("json-although-stream", "Whole here."),
        ("crlf", "Carriage here."),
        ("always-usage", "Counted here."),
        ("thinker-cut", "Thinker here."),
    ],
)
async def test_odd_streams_are_read_like_any(talk: Talk, model: str, said: str) -> None:
    seat_between(talk, model)
    reply = await talk.ask(QUESTION)
    assert said in reply.text and "⚠️" not in reply.text
    assert talk.order() == ["alice", model, "bob"]
    assert f'<message from="Rex">\n{said}' in question_of(talk.sent("bob"))


async def test_where_nobody_counts_tokens_none_are_claimed(talk: Talk) -> None:
    talk.seat("Rex | no-usage")
    reply = await talk.ask(QUESTION)
    assert not reply.usage
    assert "tokens" not in last_status(reply)


async def test_nobody_could_answer(talk: Talk) -> None:
    talk.seat("Ann | fails-500", "Ben | empty", "Cy | fails-401", rounds=5)
    async with talk.page() as page:
        reply = await ask(page, QUESTION)
        stored = await assert_stored(page, reply)
    assert headings(reply) == in_rounds(5, "🔵 Ann", "🔴 Ben", "🟢 Cy")[:6]
    assert reply.text.count("could not answer") == 6
    assert last_status(reply).startswith("Nobody could answer · 6 turns · ")
    assert stored["done"] is True and not stored.get("error")


async def test_who_fails_twice_sits_out_the_rest(talk: Talk) -> None:
    talk.seat("Ann | alice", "Ben | fails-500", rounds=4)
    reply = await talk.ask(QUESTION)
    names = in_rounds(4, "🔵 Ann", "🔴 Ben")
    assert headings(reply) == [*names[:4], names[4], names[6]]


async def test_a_call_that_breaks_off_is_answered_and_not_run(talk: Talk) -> None:
    def breaks_in_call(body: Body) -> Script:
        call = ToolCall("nothing", '{"a": 1}')
        return Script([Text("One moment. "), call, Fail("Broke after the call.")])

    talk.add_model("breaks-in-call", breaks_in_call)
    seat_between(talk, "breaks-in-call")
    reply = await talk.ask(QUESTION)
    assert len(results(reply)) == 1 and results(reply)[0].startswith("Error")
    assert "Broke after the call." in notice(reply.text)
    assert "tool_calls" not in str(talk.sent("bob"))
    assert headings(reply) == NAMES
