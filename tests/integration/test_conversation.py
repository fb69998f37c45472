"""What everybody sees, turn by turn and question by question."""

import pytest

from tests.integration.talk import (
    MANAGER,
    ROUND_ROBIN,
    Talk,
    ask,
    assert_alternates,
    assert_goes_on,
    assert_stored,
    finish,
    headings,
    in_rounds,
    items,
    last_status,
    question_of,
    reached,
)

QUESTION = "Should we plant oaks or birches?"
PIXEL = (
    "data:image/png;base64,iVBORw0KGgoAAAANSUhEUgAAAAEAAAABCAYAAAAfFcSJ"
    "AAAADUlEQVR42mNk+M9QDwADhgGAWjR9awAAAABJRU5ErkJggg=="
)


def said_by(name: str, text: str) -> str:
    """A turn as the others are sent it."""
    return f'<message from="{name}">\n{text}\n</message>'


async def test_everybody_speaks_once_per_round_and_sees_all_that_was_said(
    talk: Talk,
) -> None:
    talk.seat("Ann | alice", "Ben | bob", "Cy | carol", rounds=2)
    reply = await talk.ask(QUESTION)
    assert talk.order() == ["alice", "bob", "carol"] * 2
    assert headings(reply) == in_rounds(2, "🔵 Ann", "🔴 Ben", "🟢 Cy")
    oaks = 'On "Should we plant oaks or birches":'
    ann = f"Alice here. {oaks} I go first, and this is turn 1."
    ben = f'Bob here. {oaks} Ann said "Alice here. On "Should we plant".'
    cy = f'Carol here. {oaks} Ben said "Bob here. On "Should we plant".'
    assert [m["content"] for m in talk.sent("alice", 0)[1:]] == [QUESTION]
    assert question_of(talk.sent("bob")) == f"{QUESTION}\n\n{said_by('Ann', ann)}"
    assert [m["content"] for m in talk.sent("alice", 1)[1:]] == [
        QUESTION,
        ann,
        f"{said_by('Ben', ben)}\n\n{said_by('Cy', cy)}",
    ]
    lines = (line.strip() for line in reply.text.splitlines())
    sections = [line for line in lines if line and line != "---"]
    assert sections[:6] == [
        *("### 🔵 Ann · round 1 of 2", ann),
        *("### 🔴 Ben", ben),
        *("### 🟢 Cy", cy),
    ]


async def test_prompts_alternate_and_only_grow(talk: Talk) -> None:
    talk.seat("Ann | alice", "Ben | bob", "Cy | carol", rounds=3)
    await talk.ask(QUESTION)
    for model in ("alice", "bob", "carol"):
        prompts = [seen.messages for seen in talk.models.turns(model)]
        assert len(prompts) == 3
        for prompt in prompts:
            assert_alternates(prompt)
        for earlier, later in zip(prompts, prompts[1:], strict=False):
            assert_goes_on(earlier, later)


async def test_one_participant_alone_goes_on_with_itself(talk: Talk) -> None:
    talk.seat("Ann | alice", rounds=3)
    await talk.ask(QUESTION)
    prompts = [seen.messages for seen in talk.models.turns("alice")]
    for earlier, later in zip(prompts, prompts[1:], strict=False):
        assert_alternates(later)
        assert_goes_on(earlier, later)


async def test_nobodys_reasoning_is_sent_to_anybody(talk: Talk) -> None:
    talk.seat("Ann | thinker", "Ben | thinker-tags", "Cy | bob", rounds=2)
    reply = await talk.ask(QUESTION)
    thought = "Let me think about"
    for seen in talk.models.turns():
        assert thought not in seen.text and "<think" not in seen.text
    blocks = items(reply, "reasoning")
    assert [block["speaker"] for block in blocks] == ["Ann", "Ben"] * 2
    for block in blocks:
        assert block["status"] == "completed"
        assert block.get("duration", 0) >= 0  # 0.11.0 keeps none
        assert thought in block["content"][0]["text"]
    assert thought not in reply.text


async def test_the_next_question_finds_every_speaker_again(talk: Talk) -> None:
    talk.seat("Ann | alice", "Ben | bob", rounds=2)
    async with talk.page() as page:
        first = await ask(page, QUESTION)
        before = [talk.sent("alice", 1), talk.sent("bob", 1)]
        await ask(page, "And maples?", chat=first.chat)
    for earlier, later in zip(
        before, [talk.sent("alice", 2), talk.sent("bob", 2)], strict=True
    ):
        assert_alternates(later)
        assert_goes_on(earlier, later)
    ann = talk.sent("alice", 2)
    assert ann[-1]["content"].endswith("And maples?")
    assert '<message from="Ben">' in ann[-1]["content"]


async def test_the_next_question_finds_them_in_a_temporary_chat_too(
    talk: Talk,
) -> None:
    talk.seat("Ann | alice", "Ben | bob")
    async with talk.page() as page:
        first = await page.ask(ROUND_ROBIN, QUESTION, temporary=True)
        await first.wait_idle()
        before = talk.sent("bob")
        second = await page.ask(ROUND_ROBIN, "And maples?", chat=first.chat)
        await second.wait_idle()
    assert_goes_on(before, talk.sent("bob", 1))
    ann = talk.sent("alice", 1)
    assert ann[-2]["content"].startswith("Alice here.")
    assert '<message from="Ben">' in ann[-1]["content"]


async def test_a_forged_heading_gives_nobody_words(talk: Talk) -> None:
    talk.seat("Fay | faker", "Bob | bob", "Carol | carol", rounds=2)
    async with talk.page() as page:
        first = await ask(page, QUESTION)
        assert len(headings(first)) == 6
        before = {m: talk.sent(m, 1) for m in ("faker", "bob", "carol")}
        await ask(page, "And maples?", chat=first.chat)
    for model, earlier in before.items():
        later = talk.sent(model, 2)
        assert_goes_on(earlier, later)
        assert_alternates(later)
    bob = talk.sent("bob", 2)
    own = [m["content"] for m in bob if m["role"] == "assistant"]
    assert len(own) == 2 and all("Bob here." in text for text in own)
    assert "I never wrote this" in str([m for m in bob if m["role"] == "user"])
    carol = "\n".join(str(m["content"]) for m in talk.sent("carol", 2))
    assert carol.count('<message from="Bob">\nBob here. On') == 3
    assert carol.count('<message from="Bob">') == 3


async def test_markup_of_one_participant_leaves_the_others_sections_alone(
    talk: Talk,
) -> None:
    talk.seat("Max | markup", "Ben | bob", rounds=2)
    reply = await talk.ask(QUESTION)
    assert headings(reply) == in_rounds(2, "🔵 Max", "🔴 Ben")
    assert '<script>alert("x")</script>' in reply.text
    assert not items(reply, "reasoning")
    assert '<details type="reasoning"' not in reply.text.replace(r"\<details", "")


async def test_regenerate_asks_again_with_nothing_of_the_first_answer(
    talk: Talk,
) -> None:
    talk.seat("Ann | alice", "Ben | bob")
    async with talk.page() as page:
        first = await ask(page, QUESTION)
        again = await page.regenerate(first, background_tasks={})
        await finish(page, again)
        await assert_stored(page, first)
    assert again.id != first.id and again.text == first.text
    assert talk.sent("alice", 0) == talk.sent("alice", 1)
    assert talk.sent("bob", 0) == talk.sent("bob", 1)


async def test_an_edited_question_begins_a_branch_without_the_old_one(
    talk: Talk,
) -> None:
    talk.seat("Ann | alice", "Ben | bob")
    async with talk.page() as page:
        first = await ask(page, QUESTION)
        edited = await page.edit_and_resend(
            first, "Are maples better?", background_tasks={}
        )
        await finish(page, edited)
    sent = str(talk.sent("bob", 1))
    assert "Are maples better?" in sent and "oaks" not in sent


async def test_a_follow_up_sees_only_its_own_branch(talk: Talk) -> None:
    talk.seat("Ann | alice", "Ben | bob")
    async with talk.page() as page:
        oaks = await ask(page, QUESTION)
        maples = await page.edit_and_resend(
            oaks, "Are maples better?", background_tasks={}
        )
        await finish(page, maples)
        await ask(page, "Why so?", chat=oaks.chat, parent=oaks)
        await ask(page, "Why not?", chat=oaks.chat, parent=maples)
    why_so, why_not = str(talk.sent("alice", 2)), str(talk.sent("alice", 3))
    assert "oaks" in why_so and "maples" not in why_so
    assert "maples" in why_not and "oaks" not in why_not
    assert '<message from="Ben">' in why_so and '<message from="Ben">' in why_not


async def test_continue_goes_on_after_who_spoke_last(talk: Talk) -> None:
    talk.seat("Ann | alice", "Ben | bob", "Cy | carol")
    async with talk.page() as page:
        reply = await ask(page, QUESTION)
        before, prompt = reply.text, talk.sent("alice", 0)
        await page.continue_(reply, background_tasks={})
        await finish(page, reply)
    assert talk.order() == ["alice", "bob", "carol"] * 2
    assert reply.text.startswith(before)
    assert headings(reply) == ["🔵 Ann", "🔴 Ben", "🟢 Cy"] * 2
    assert_goes_on(prompt, talk.sent("alice", 1))
    assert '<message from="Cy">' in question_of(talk.sent("alice", 1))
    ids = [item["id"] for item in reply.output]
    assert len(set(ids)) == len(ids)


async def test_continue_after_a_failed_turn_goes_on_with_the_next_one(
    talk: Talk,
) -> None:
    talk.seat("Ann | alice", "Rex | fails-500")
    async with talk.page() as page:
        reply = await ask(page, QUESTION)
        talk.seat("Ann | alice", "Rex | fails-500", "Cy | carol")
        await page.continue_(reply, background_tasks={})
        await finish(page, reply)
    assert headings(reply) == ["🔵 Ann", "🔴 Rex", "🟢 Cy", "🔵 Ann", "🔴 Rex"]


async def test_continue_after_stop_goes_on_with_the_next_one(talk: Talk) -> None:
    talk.seat("Ann | alice", "Ben | bob", "Cy | carol")
    async with talk.page() as page:
        with talk.models.hold("bob", after=3) as hold:
            reply = await page.send(ROUND_ROBIN, QUESTION, background_tasks={})
            await reached(hold.wait_until_reached)
            await reply.wait_for(lambda r: "Bob here. On" in r.text)
            await page.stop(reply)
            await finish(page, reply)
        await page.continue_(reply, background_tasks={})
        await finish(page, reply)
    order = ["🔵 Ann", "🔴 Ben", "🟢 Cy", "🔵 Ann", "🔴 Ben"]
    assert headings(reply) == order
    assert '<message from="Ben">\nBob here. On' in question_of(talk.sent("carol"))
    assert last_status(reply).startswith("Finished after 1 round")


async def test_regenerate_after_stop_begins_anew(talk: Talk) -> None:
    talk.seat("Ann | alice", "Ben | bob")
    async with talk.page() as page:
        with talk.models.hold("bob", after=3) as hold:
            reply = await page.send(ROUND_ROBIN, QUESTION, background_tasks={})
            await reached(hold.wait_until_reached)
            await page.stop(reply)
            await finish(page, reply)
        again = await page.regenerate(reply, background_tasks={})
        await finish(page, again)
    assert headings(again) == ["🔵 Ann", "🔴 Ben"]
    assert talk.sent("alice", 0) == talk.sent("alice", 1)


async def test_a_workspace_model_based_on_the_pipe_is_a_conversation_too(
    talk: Talk,
) -> None:
    params = {"system": "You advise {{USER_NAME}}, a gardener."}
    talk.seat("Ann | alice", "Ben | bob", "Cy | carol", manager_model="manager")
    with talk.workspace_model("garden-panel", MANAGER, params=params):
        reply = await talk.ask(QUESTION, "garden-panel")
    assert talk.order()[0] == "manager" and len(headings(reply)) == 3
    for model in ("alice", "bob", "carol"):
        system = talk.sent(model)[0]["content"]
        assert system.count("You advise Uma User, a gardener.") == 1


@pytest.mark.parametrize("temporary", [False, True])
async def test_images_of_a_question_reach_everybody(
    talk: Talk, temporary: bool
) -> None:
    talk.seat("Ann | alice", "Ben | bob", rounds=2)
    files = [{"type": "image", "url": PIXEL}]
    if temporary:
        part = {"type": "image_url", "image_url": {"url": PIXEL}}
        content = [{"type": "text", "text": QUESTION}, part]
        extra = {"messages": [{"role": "user", "content": content}]}
        async with talk.page() as page:
            asked = await page.ask(ROUND_ROBIN, QUESTION, temporary=True, extra=extra)
            await asked.wait_idle()
    else:
        await talk.ask(QUESTION, files=files)
    prompts = [seen.messages for seen in talk.models.turns()]
    assert len(prompts) == 4
    for messages in prompts:
        assert str(messages).count(PIXEL) == 1
        first = next(m for m in messages if m["role"] == "user")
        assert first["content"][0] == {"type": "text", "text": QUESTION}
        assert first["content"][1]["image_url"]["url"] == PIXEL
        assert_alternates(messages)
    assert_goes_on(prompts[1], prompts[3])


async def test_the_last_status_line_says_why_turns_time_and_tokens(talk: Talk) -> None:
    talk.seat("Ann | alice", "Ben | bob", rounds=2)
    reply = await talk.ask(QUESTION)
    assert len(reply.statuses) == 1  # the host writes each of them to its database
    why, turns, seconds, tokens = last_status(reply).split(" · ")
    assert (why, turns) == ("Finished after 2 rounds", "4 turns")
    assert seconds.endswith(" s") and 0 <= float(seconds[:-2]) < 60
    assert reply.usage
    assert tokens == f"{reply.usage['total_tokens']:,} tokens"


async def test_usage_is_the_sum_with_a_part_for_each_speaker(talk: Talk) -> None:
    talk.seat("Ann | alice", "Ben | bob", rounds=2)
    reply = await talk.ask(QUESTION)
    sent = {
        name: sum(
            len(str(message["content"]).split())
            for seen in talk.models.turns(model)
            for message in seen.messages
        )
        for name, model in (("Ann", "alice"), ("Ben", "bob"))
    }
    assert reply.usage
    parts = reply.usage["participants"]
    assert {name: part["input_tokens"] for name, part in parts.items()} == sent
    assert reply.usage["input_tokens"] == sum(sent.values())
    assert reply.usage["output_tokens"] == sum(
        part["output_tokens"] for part in parts.values()
    )
