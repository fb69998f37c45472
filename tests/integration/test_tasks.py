"""Titles, tags and follow-ups of a conversation."""

from tests.conftest import FUNCTION_ID
from tests.integration.talk import ROUND_ROBIN, Talk, assert_stored, headings

QUESTION = "Should we plant oaks or birches?"
ALL = {
    "title_generation": True,
    "tags_generation": True,
    "follow_up_generation": True,
}


async def test_title_tags_and_follow_ups_come_back_right(talk: Talk) -> None:
    talk.seat("Ann | alice", "Ben | bob", "Cy | carol")
    async with talk.page() as page:
        reply = await page.ask(ROUND_ROBIN, QUESTION, background_tasks=ALL)
        await reply.wait_idle()
        stored = await assert_stored(page, reply)
        tags = talk.host.request(
            "GET", f"/api/v1/chats/{reply.chat.id}/tags", account=talk.account
        )
        chat = talk.host.chat(talk.account, reply.chat.id or "")
    assert reply.chat.title == "Plant Oaks Birches" == chat["title"]
    assert {tag["name"] for tag in tags} == {"Plant", "Oaks", "Birches"}
    follow_ups = reply.message["followUps"]
    assert len(follow_ups) == 5 and "plant oaks birches" in follow_ups[0]
    assert stored["followUps"] == follow_ups
    assert headings(reply) == ["🔵 Ann", "🔴 Ben", "🟢 Cy"]


async def test_each_task_is_one_plain_completion_of_the_first_participant(
    talk: Talk,
) -> None:
    talk.seat("Ann | bob", "Ben | alice")
    async with talk.page() as page:
        reply = await page.ask(ROUND_ROBIN, QUESTION, background_tasks=ALL)
        await reply.wait_idle()
    tasks = [seen for seen in talk.models.requests if seen.task]
    assert sorted(str(seen.task) for seen in tasks) == ["follow_ups", "tags", "title"]
    for seen in tasks:
        assert seen.model == "bob"
        assert not seen.body.get("stream") and "tools" not in seen.body
        assert "You take part in a conversation" not in seen.text
    assert talk.order() == ["bob", "alice"]


async def test_tasks_of_a_user_come_from_models_that_user_may_use(talk: Talk) -> None:
    talk.admin_sets(team="Ann | dave\nBen | bob", rounds=1)
    talk.host.set_readers("dave")
    try:
        async with talk.page() as page:
            reply = await page.ask(ROUND_ROBIN, QUESTION, background_tasks=ALL)
            await reply.wait_idle()
    finally:
        talk.host.grant_read("dave", "public")
    assert {seen.model for seen in talk.models.requests if seen.task} == {"bob"}
    assert reply.chat.title == "Plant Oaks Birches"


async def test_a_task_model_of_the_host_is_asked_instead(talk: Talk) -> None:
    talk.seat("Ann | alice", "Ben | bob")
    with talk.host.configured({"task.model.external": "carol"}):
        async with talk.page() as page:
            reply = await page.ask(ROUND_ROBIN, QUESTION, background_tasks=ALL)
            await reply.wait_idle()
    assert {seen.model for seen in talk.models.requests if seen.task} == {"carol"}


async def test_a_first_participant_that_fails_leaves_the_answer_alone(
    talk: Talk,
) -> None:
    talk.seat("Ann | fails-500", "Ben | bob")
    async with talk.page() as page:
        reply = await page.ask(ROUND_ROBIN, QUESTION, background_tasks=ALL)
        await reply.wait_idle()
        await assert_stored(page, reply)
    assert reply.error is None and "Bob here." in reply.text
    assert FUNCTION_ID not in (reply.chat.title or "")
