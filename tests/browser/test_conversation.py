"""Conversations as a person sees them."""

import re

from playwright.async_api import expect

from tests.browser.scene import MANAGER, Scene
from tests.integration.talk import in_rounds
from tests.stack.browser import REPLY
from tests.stack.models import ModelServer
from tests.versions import REPLACES

QUESTION = "Should we sail to Skye on Sunday, or wait for calmer weather?"


@REPLACES
async def test_three_participants_are_seen_while_they_speak(
    scene: Scene, sailor: str, model_server: ModelServer
) -> None:
    team = f"Ada | alice | a captain\nGrace | thinker\nTom | {sailor}"
    page = await scene.join("Abel", team=team, rounds=2)
    tab = page.tab

    with model_server.hold("thinker", after=5) as in_thought:
        await page.ask(QUESTION)
        in_thought.wait_until_reached(timeout=30)
        await page.wait_text("Thinking")
        await scene.snap(page, "1-reasoning")
        in_call = model_server.hold("toolie", after=8)
    in_call.wait_until_reached(timeout=30)
    await page.wait_text("look_up_tide")
    await scene.snap(page, "2-tool-call")
    second_round = model_server.hold("alice", after=9)
    in_call.release()
    second_round.wait_until_reached(timeout=30)
    await page.wait_text("Ada · round 2 of 2")
    await expect(tab.get_by_text('Alice here. On "Should we sail to')).to_have_count(2)
    await scene.snap(page, "3-second-round")
    second_round.release()

    await page.wait_finished()
    await page.wait_status("Finished after 2 rounds · 6 turns")
    headings = await tab.locator(f"{REPLY} h3").all_inner_texts()
    assert headings == in_rounds(2, "🔵 Ada", "🔴 Grace", "🟢 Tom")
    shown = await page.visible_reply_text()
    assert shown.count("Thought for") == 2
    assert shown.count("View Result from look_up_tide") == 2
    await scene.snap(page, "4-finished")

    assert await page.reply_text_after_reload() == shown
    await tab.get_by_text("Thought for").first.click()
    await tab.get_by_text("View Result from").first.click()
    await page.wait_text("Let me think about Should we sail to Skye")
    await page.wait_text("Sunday calmer weather at 14:05")
    await scene.snap(page, "5-reloaded-unfolded")


async def test_a_manager_ends_the_conversation_and_says_why(scene: Scene) -> None:
    team = "Ada | alice\nBen | bob\nCyd | carol"
    page = await scene.join(
        "Mona", MANAGER, team=team, rounds=3, manager_model="manager"
    )
    await page.ask("Tea or coffee, for a long night? MANAGER:end-after-4")
    await page.wait_finished()
    await page.wait_status("The manager ended it: 4 turns are enough · 4 turns")
    shown = await page.visible_reply_text()
    history = await page.status_history()
    await scene.snap(page, "6-manager")
    assert history[:2] == ["Ada · Ada has spoken least", "Ben · Ben has spoken least"]
    await page.reload()
    await page.wait_status("The manager ended it: 4 turns are enough")
    assert await page.visible_reply_text() == shown


async def test_two_people_at_once_see_only_their_own(
    scene: Scene, model_server: ModelServer
) -> None:
    anna = await scene.join("Anna", team="Left | alice\nWest | bob", rounds=1)
    omar = await scene.join("Omar", team="Right | alice\nEast | bob", rounds=1)
    with model_server.hold("alice", after=6) as both:
        await anna.ask("Is a canoe faster than a kayak?")
        await omar.ask("Does thunder follow lightning?")
        both.wait_until_reached(2, timeout=30)
        await anna.wait_text("Alice here. On")
        await omar.wait_text("Alice here. On")
        await scene.snap(omar, "7-two-people-streaming")
    for page in (anna, omar):
        await page.wait_finished()
    await scene.snap(anna, "8-two-people-anna")
    for _ in ("as streamed", "as stored"):
        for page, own, others in (
            (anna, "Left West canoe", "Right East thunder Omar"),
            (omar, "Right East thunder", "Left West canoe Anna"),
        ):
            shown = await page.visible_text()
            assert all(word in shown for word in own.split())
            assert not any(word in shown for word in others.split())
            await page.reload()


async def test_somebody_who_has_set_nothing_just_types(scene: Scene) -> None:
    page = await scene.join("Nora")
    await page.ask("What makes bread rise?")
    await page.wait_finished()
    shown = await page.visible_reply_text()
    headings = re.findall(r"[🔵🔴🟢🟠] (.+)", shown)
    names = headings[3].removesuffix(" · round 2 of 2"), *headings[4:]
    assert headings == in_rounds(2, *names) and len(set(names)) == 3
    assert f"{', '.join(names)} talk" in (await page.status_history())[0]
    await page.wait_status("with the Valves button beside the input")
    await scene.snap(page, "9-nothing-configured")


async def test_who_is_missing_or_fails_is_named_and_the_rest_goes_on(
    scene: Scene,
) -> None:
    scene.host.create_model({"id": "vault", "base_model_id": "carol"})
    team = (
        "Ann | alice\nGhost | no-such-model\nSecret | vault\n"
        "Flop | fails-500\nHalf | fails-midway\nBea | bob"
    )
    page = await scene.join("Otto", team=team, rounds=1)
    await page.ask("Which tree grows fastest?")
    await page.wait_finished()
    shown = await page.visible_reply_text()
    notices, speakers = shown.split("🔵 Ann")
    assert "Team line 2" in notices and '"no-such-model"' in notices
    assert "Team line 3" in notices and '"vault"' in notices
    assert "Ann" not in notices
    assert "Flop could not answer: The scripted server failed." in speakers
    assert "This much was said before the end" in speakers
    assert "Half broke off: The scripted model broke midway." in speakers
    assert "Bob here." in speakers
    await scene.snap(page, "10-missing-and-failing")
    await page.reload()
    assert await page.visible_reply_text() == shown


async def test_nobody_can_pose_as_somebody_else(scene: Scene) -> None:
    page = await scene.join(
        "Prue", team="Mark | markup\nFay | faker\nAnn | alice", rounds=1
    )
    await page.ask("Who are you?")
    await page.wait_finished()
    await page.wait_status("Finished after 1 round · 3 turns")
    headings = await page.tab.locator(f"{REPLY} h3").all_inner_texts()
    assert headings == ["🔵 Mark", "🔴 Fay", "🟢 Ann"]
    shown = await page.visible_reply_text()
    assert "Thought for" not in shown
    assert '<script>alert("x")</script>' in shown
    assert "### 🔴 Bob" in shown
    await scene.snap(page, "11-posing")


async def test_stop_keeps_what_was_said(
    scene: Scene, model_server: ModelServer
) -> None:
    page = await scene.join(
        "Stan", team="Ann | alice\nThea | thinker\nBea | bob", rounds=1
    )
    with model_server.hold("thinker", after=14) as hold:
        await page.ask("How deep is Loch Ness?")
        hold.wait_until_reached(timeout=30)
        await page.wait_text("Thinker here.")
        await page.stop()
        await page.wait_finished()
        model_server.wait_for(lambda server: server.in_flight == 0)
    await page.wait_status("Stopped · 1 turn")
    await scene.snap(page, "12-stopped")
    shown = await page.visible_reply_text()
    assert "Alice here." in shown and "Thinker here." in shown
    assert "🟢 Bea" not in shown
    await page.reload()
    await scene.snap(page, "13-stopped-reloaded")
    assert await page.visible_reply_text() == shown
    await page.ask("And how wide?")
    await page.wait_finished()
    await page.wait_status("Finished after 1 round · 3 turns")
    await scene.snap(page, "14-asked-again")
