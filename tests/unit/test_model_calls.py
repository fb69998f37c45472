"""Section 7: the limits of a reply, and the one door to every model."""

import asyncio
from dataclasses import replace
from typing import Any

import pytest

from tests.unit.fakes import (
    ScriptedHost,
    TellingEvent,
    call,
    make_run,
    on_card,
    text,
    usage,
)
from tests.unit.plugin import mmc

Json = dict[str, Any]
WHOLE = [{"choices": [{"message": {"content": "Oaks."}}]}]


async def turns_of_the_loop() -> None:
    """Let everything go on that does not wait for anything."""
    for _ in range(10):
        await asyncio.sleep(0)


# -- the gate of a connection ----------------------------------------------------------


class Queue:
    """Callers at a gate, in the order in which they are let in."""

    def __init__(self, places: int = 1) -> None:
        self.gate = mmc.ConnectionGate(places)
        self.entered: list[str] = []

    async def join(self, name: str, stage: int, model: str) -> "asyncio.Task[None]":
        """A caller that waits, or is let in."""

        async def enter() -> None:
            await self.gate.enter(stage, model)
            self.entered.append(name)

        task = asyncio.create_task(enter())
        await turns_of_the_loop()
        return task

    async def leave(self) -> None:
        """Whoever is in goes."""
        self.gate.leave()
        await turns_of_the_loop()


async def test_who_is_late_waits_until_no_later_stage_comes() -> None:
    queue = Queue()
    for name, stage, model in (
        ("first", 1, "oak"),
        ("late", 1, "elm"),
        ("late too", 1, "fir"),
        ("ballot", 2, "fir"),
        ("other ballot", 2, "elm"),
    ):
        await queue.join(name, stage, model)
    for _ in range(3):
        await queue.leave()
    assert queue.entered == ["first", "ballot", "other ballot"]
    await queue.join("chair", 3, "oak")
    assert queue.entered[-1] == "chair"
    await queue.leave()
    queue.gate.open_to_all()
    await turns_of_the_loop()
    await queue.leave()
    assert queue.entered[-2:] == ["late", "late too"]


async def test_all_are_let_in_who_have_a_place() -> None:
    queue = Queue(places=3)
    for number in range(5):
        await queue.join(f"{number}", 1, "oak")
    assert len(queue.entered) == 3
    await queue.join("ballot", 2, "oak")
    await queue.leave()
    await queue.leave()
    assert queue.entered[3:] == ["ballot"]  # the last place is kept
    await queue.leave()
    assert queue.entered[3:] == ["ballot", "3"]


async def test_a_stop_while_one_answers_and_one_is_queued_ends_both() -> None:
    gate = mmc.ConnectionGate(1)

    async def call() -> None:
        await gate.enter(0, "oak")
        try:
            await asyncio.Event().wait()
        finally:
            gate.leave()

    tasks = [asyncio.create_task(call()) for _ in range(2)]
    await turns_of_the_loop()
    for task in tasks:
        task.cancel()
    ended = await asyncio.gather(*tasks, return_exceptions=True)
    assert [type(each) for each in ended] == [asyncio.CancelledError] * 2


async def test_who_asks_the_model_that_is_loaded_goes_before_who_came_first() -> None:
    queue = Queue()
    for name, model in (("first", "oak"), ("second", "elm"), ("third", "oak")):
        await queue.join(name, 1, model)
    for _ in range(2):
        await queue.leave()
    assert queue.entered == ["first", "third", "second"]


async def test_who_is_cancelled_while_waiting_is_never_let_in() -> None:
    queue = Queue()
    await queue.join("first", 1, "oak")
    second = await queue.join("second", 1, "oak")
    await queue.join("third", 1, "oak")
    second.cancel()
    await turns_of_the_loop()
    await queue.leave()
    assert queue.entered == ["first", "third"]


async def test_who_is_cancelled_at_the_moment_of_admission_frees_the_place() -> None:
    queue = Queue()
    await queue.join("first", 1, "oak")
    second = await queue.join("second", 1, "oak")
    await queue.join("third", 1, "oak")
    queue.gate.leave()
    second.cancel()  # its place is there, and it has not gone on yet
    await turns_of_the_loop()
    assert queue.entered == ["first", "third"]


async def test_a_place_is_not_given_to_who_was_cancelled_just_before() -> None:
    queue = Queue()
    await queue.join("first", 1, "oak")
    second = await queue.join("second", 1, "oak")
    await queue.join("third", 1, "oak")
    second.cancel()  # it does not know yet
    queue.gate.leave()
    await turns_of_the_loop()
    assert queue.entered == ["first", "third"]


# -- the clock of a turn ---------------------------------------------------------------


async def test_a_turn_may_not_take_longer_than_its_time() -> None:
    with pytest.raises(mmc.ModelFailure, match="it took longer than 0.01 s"):
        async with mmc.Deadline(0.01).running():
            await asyncio.Event().wait()


async def test_the_clock_stands_still_until_the_last_of_several_goes_on() -> None:
    clock = mmc.Deadline(0.02)
    first, second = clock.paused(), clock.paused()
    with pytest.raises(mmc.ModelFailure):
        async with clock.running():
            first.__enter__()
            second.__enter__()
            first.__exit__(None, None, None)
            await asyncio.sleep(0.04)
            second.__exit__(None, None, None)
            went_on = True
            await asyncio.Event().wait()
    assert went_on


async def test_a_pause_that_ends_after_the_time_was_over_moves_nothing() -> None:
    clock = mmc.Deadline(0.01)
    with pytest.raises(mmc.ModelFailure):
        async with clock.running():
            try:
                await asyncio.Event().wait()
            finally:
                with clock.paused():
                    pass


# -- asked, and asked again ------------------------------------------------------------


class Door:
    """The door to one model that answers what a script says."""

    def __init__(self, *replies: Any, **fields: Any) -> None:
        self.run, self.host = make_run(replies, **fields)
        self.models = self.run.models

    def call(self, speaker: str = "Ann") -> mmc.ModelCall:
        voice = self.run.cast.participants["Ann"].voice
        return mmc.ModelCall(speaker, voice, lambda _: [], mmc.Deadline(5.0))

    async def text(self) -> str:
        text: str = await self.models.text(self.call())
        return text

    @property
    def streamed(self) -> list[bool]:
        return [payload["stream"] for payload in self.host.payloads]


UNKNOWN = "Unrecognized argument: stream_options"


@pytest.mark.parametrize(
    "rejected", [mmc.ModelFailure(UNKNOWN, 400), {"error": {"message": UNKNOWN}}]
)
async def test_stream_options_that_are_rejected_are_not_sent_again(
    rejected: Exception | Json,
) -> None:
    door = Door([rejected], text("Oaks."), text("Elms."))
    assert [await door.text(), await door.text()] == ["Oaks.", "Elms."]
    assert door.streamed == [True, True, True]
    sent = ["stream_options" in payload for payload in door.host.payloads]
    assert sent == [True, False, False]


async def test_no_more_is_read_of_an_answer_than_is_enough() -> None:
    thought = {"choices": [{"delta": {"reasoning_content": "Who knows?"}}]}
    prose = text("Well, ", "let me think ")
    door = Door([thought, *prose, asyncio.Event(), *text("about it.")])
    call = replace(door.call(), enough=8)
    assert await door.models.text(call) == "Well, let me think"


@pytest.mark.parametrize("status", [400, 401, 403, 404, 408, 413])
async def test_a_request_that_is_at_fault_is_made_once(status: int) -> None:
    door = Door([mmc.ModelFailure("no", status)])
    with pytest.raises(mmc.ModelFailure, match="no"):
        await door.text()
    assert door.streamed == [True]


async def test_a_stream_that_fails_is_asked_for_whole() -> None:
    door = Door([mmc.ModelFailure("boom", 500)], WHOLE)
    assert await door.text() == "Oaks."
    assert door.streamed == [True, False]


async def test_a_model_that_fails_whole_too_is_not_asked_a_third_time() -> None:
    door = Door([mmc.ModelFailure("boom", 500)], [mmc.ModelFailure("bang", 500)])
    with pytest.raises(mmc.ModelFailure, match="bang"):
        await door.text()
    assert door.streamed == [True, False]


async def test_a_model_that_fails_and_then_says_nothing_is_asked_twice() -> None:
    door = Door([mmc.ModelFailure("boom", 500)], [])
    with pytest.raises(mmc.ModelFailure, match="empty answer, asked twice"):
        await door.text()
    assert door.streamed == [True, False]


async def test_a_model_that_says_nothing_is_asked_once_more_in_the_same_way() -> None:
    door = Door([], text("Oaks."))
    assert await door.text() == "Oaks."
    assert door.streamed == [True, True]


@pytest.mark.parametrize("begun", [text("Oaks"), [call("look")]])
async def test_who_is_busy_in_the_middle_is_not_asked_again(begun: list[Json]) -> None:
    door = Door([*begun, mmc.ModelFailure("busy", 429)])
    with pytest.raises(mmc.ModelFailure, match="busy"):
        await door.text()
    assert door.streamed == [True]


async def test_who_is_busy_for_longer_than_the_patience_is_not_asked_again() -> None:
    door = Door([mmc.ModelFailure("busy", 429, 40)], busy_patience=30)
    with pytest.raises(mmc.ModelFailure, match="busy"):
        await door.text()
    assert door.streamed == [True]


@pytest.mark.parametrize("header", ["nan", "inf", "-1", "soon", ""])
async def test_a_pause_that_is_no_number_is_none(header: str) -> None:
    assert mmc.read_seconds(header) == 0


# -- what is counted -------------------------------------------------------------------


async def test_usage_that_grows_with_every_chunk_counts_once() -> None:
    door = Door([*text("Oaks."), usage(10, 1), usage(10, 2)])
    await door.text()
    assert door.run.ledger.usage["total_tokens"] == 12
    assert door.run.ledger.calls == 1


async def test_the_usage_of_a_failed_call_counts() -> None:
    door = Door([*text("Oa"), usage(10, 1), mmc.ModelFailure("cut")])
    with pytest.raises(mmc.ModelFailure):
        await door.text()
    assert door.run.ledger.usage["total_tokens"] == 11


async def test_the_usage_of_a_cancelled_call_counts() -> None:
    hangs = TellingEvent()
    door = Door([*text("Oa"), usage(10, 1), hangs])
    task = asyncio.create_task(door.text())
    await hangs.awaited.wait()
    await mmc.end_tasks(task)
    assert task.cancelled()
    assert door.run.ledger.usage["total_tokens"] == 11
    assert door.run.ledger.report()["participants"]["Ann"]["calls"] == 1


async def test_a_stopped_chat_gets_the_usage_last() -> None:
    hangs = TellingEvent()
    door = Door([*text("Oa"), usage(10, 1), hangs])
    mode = mmc.round_robin(mmc.Agenda(("Ann",), "", mmc.Settings(rounds=1)))
    events: list[Json] = []

    async def read() -> None:
        async for event in mmc.stream_items(door.run, mode):
            events.append(event)

    reader = asyncio.create_task(read())
    await hangs.awaited.wait()
    await mmc.end_tasks(reader)
    assert events[-1]["type"] == "response.completed"
    assert events[-1]["response"]["usage"]["total_tokens"] == 11


# -- how a reply ends ------------------------------------------------------------------


async def complete(door: Door, section: mmc.Section) -> mmc.ModelFailure:
    """The failure of a reply that is shown in a section."""
    with pytest.raises(mmc.ModelFailure) as caught:
        await door.models.complete(door.call(), section.begin_reply)
    return caught.value


def section_of(run: mmc.Run) -> mmc.Section:
    return mmc.Section(run.screen, run.cast.participants["Ann"], mmc.Deadline(5.0))


async def test_a_plain_reply_that_breaks_off_has_its_text() -> None:
    door = Door([*text("Oaks", " are "), mmc.ModelFailure("cut")])
    begun: list[mmc.Reply] = []

    def begin() -> mmc.Reply:
        begun.append(mmc.Reply())
        return begun[-1]

    with pytest.raises(mmc.ModelFailure):
        await door.models.complete(door.call(), begin)
    assert [reply.text for reply in begun] == ["Oaks are"]


async def test_a_shown_reply_that_breaks_off_leaves_nothing_open() -> None:
    thought: Json = {"choices": [{"delta": {"reasoning_content": "Hm."}}]}
    made = call("look", '{"at": "oa')
    door = Door([thought, *text("Oaks."), made, mmc.ModelFailure("cut")])
    section = section_of(door.run)
    failure = await complete(door, section)
    assert failure.midway
    section.fail(str(failure))
    *items, notice = list(map(mmc.render_item, door.run.screen.transcript.blocks))
    assert [item["type"] for item in items] == [
        "message",
        "reasoning",
        "message",
        "function_call",
        "function_call_output",
    ]
    assert "duration" in items[1]
    assert items[3]["call_id"] == items[4]["call_id"]
    assert items[3]["status"] == items[4]["status"] == "failed"
    assert items[4]["output"][0]["text"] == "Error: cut"
    assert "broke off: cut" in notice["content"][0]["text"]
    assert section.turn().messages == ({"role": "assistant", "content": "Oaks."},)


async def test_what_was_held_back_is_shown_and_not_asked_for_again() -> None:
    door = Door([*text("###"), mmc.ModelFailure("cut")])
    section = section_of(door.run)
    assert (await complete(door, section)).midway
    section.fail("cut")
    assert section.turn().text == "####"
    assert door.streamed == [True]


async def test_a_turn_that_fails_before_its_first_reply_says_why() -> None:
    run, _ = make_run()
    section = section_of(run)
    section.role = mmc.CONCLUSION
    section.fail("the wire was cut")
    assert section.turn().failure == "the wire was cut"
    assert run.screen.transcript.blocks == []  # a chair says nothing before it speaks
    section = section_of(run)
    section.fail("the wire was cut")
    assert section.turn() == mmc.Turn("Ann", "", (), "the wire was cut")
    heading, line = map(str, (block.text for block in run.screen.transcript.blocks))
    assert heading == "### 🔵 Ann"
    assert line == "> ⚠️ **Ann** could not answer: the wire was cut"


# -- the offer to skip -----------------------------------------------------------------


class Person:
    """Somebody at the page who gives these answers, and then none."""

    def __init__(self, *answers: Json) -> None:
        self.answers = list(answers)
        self.asked: list[Json] = []
        self.closed = asyncio.Event()

    async def __call__(self, event: Json) -> Json:
        assert event["type"] == "request:user_input"
        (question,) = event["data"]["questions"]
        self.asked.append(question)
        if self.answers:
            return self.answers.pop(0)
        try:
            await asyncio.Event().wait()
        finally:
            self.closed.set()
        return {}


AWAY: Json = {"status": "cancelled", "answers": {}}  # a page that shows another chat


def watched(person: Person, *replies: Any) -> tuple[mmc.ModelCalls, mmc.ModelCall]:
    """The door to a model, with a person who is asked about it at once."""
    door = Door(*replies, skip_after=0.01)
    host = ScriptedHost(
        door.host.request, None, door.host.metadata, None, person, list(replies)
    )
    run = door.run
    models = mmc.ModelCalls(host, run.settings, run.ledger, run.screen.emitter)
    return models, door.call()


async def test_a_silent_model_is_skipped_once_the_person_says_so() -> None:
    gone = {"error": "Client session disconnected."}
    person = Person(on_card("Wait"), AWAY, gone, on_card("Skip it"))
    models, silent = watched(person, [asyncio.Event()])
    with pytest.raises(mmc.ModelFailure, match="it was skipped"):
        await models.text(silent)
    assert [question["header"] for question in person.asked] == ["Skip Ann?"] * 4
    labels = [option["label"] for option in person.asked[0]["options"]]
    assert labels == ["Wait", "Skip it"] and not person.asked[0]["allow_other"]


async def test_all_who_are_silent_may_be_skipped_at_once() -> None:
    person = Person(on_card("Go on with what is there"))
    models, silent = watched(person, [asyncio.Event()], [asyncio.Event()])
    models.enough[0] = ""
    for _ in range(2):
        with pytest.raises(mmc.ModelFailure, match="it was skipped"):
            await models.text(silent)
    assert len(person.asked) == 1


@pytest.mark.parametrize("agreed", [True, False])
async def test_where_there_is_no_card_a_dialog_asks(agreed: bool) -> None:
    class Older(ScriptedHost):
        has_card = False

    async def answer(event: Json) -> bool:
        asked.append(event)
        return agreed

    asked: list[Json] = []
    host = Older(Door().host.request, None, {}, None, answer)
    said = await host.ask("Skip Ann?", "Skip it?", {"Wait": "", "Skip it": ""})
    assert said == ("Skip it" if agreed else "Wait")
    data = {"title": "Skip Ann?", "message": "Skip it?"}
    assert asked == [{"type": "confirmation", "data": data}]


async def test_the_offer_goes_away_when_the_model_speaks() -> None:
    speaks, ends = asyncio.Event(), asyncio.Event()
    person = Person()
    models, slow = watched(person, [speaks, *text("Oaks."), ends])
    asking = asyncio.create_task(models.text(slow))
    while not person.asked:
        await asyncio.sleep(0.01)
    speaks.set()
    await asyncio.wait_for(person.closed.wait(), 5)
    ends.set()
    assert await asking == "Oaks."


async def test_nothing_watches_a_model_where_nobody_can_be_asked() -> None:
    hangs = TellingEvent()
    door = Door([hangs], skip_after=0.01)
    before = len(asyncio.all_tasks())
    asking = asyncio.create_task(door.text())
    await hangs.awaited.wait()
    assert len(asyncio.all_tasks()) == before + 1
    await mmc.end_tasks(asking)


# -- who is late -----------------------------------------------------------------------


async def test_a_member_that_is_queued_is_not_late() -> None:
    run, _ = make_run(aliases=("Ann", "Bob", "Cat"), answer_deadline=1)
    done = {name: asyncio.Event() for name in ("Ann", "Bob", "Cat")}

    async def turn(name: str) -> mmc.Turn:
        await done[name].wait()
        return mmc.Turn(name, "Oaks.")

    sections = {}
    for name in done:
        section = mmc.Section(run.screen, run.cast.participants[name], mmc.Deadline(9))
        section.task = asyncio.create_task(turn(name))
        sections[name] = section
    waiting = asyncio.create_task(run._wait_in_view(sections, "answered", 1))
    long_ago = asyncio.get_running_loop().time() - 60
    for name in ("Ann", "Cat"):
        sections[name].clock.admitted_at = long_ago
    done["Ann"].set()
    await turns_of_the_loop()
    assert not waiting.done()  # Bob has not been asked yet
    sections["Bob"].clock.admitted_at = long_ago
    done["Cat"].set()
    await turns_of_the_loop()
    assert waiting.done()
    assert not sections["Bob"].task.done()
    await mmc.end_tasks(sections["Bob"].task)
