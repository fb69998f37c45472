"""A manager picks who speaks next."""

from tests.conftest import FUNCTION_ID
from tests.integration.talk import MANAGER, Talk, headings, last_status, question_of
from tests.stack.prompts import last_user_text
from tests.stack.scripts import Body, Script, Text
from tests.versions import REPLACES

TEAM = ("Ann | alice", "Ben | bob", "Cy | carol")


def asked(talk: Talk) -> list[str]:
    """What the manager was asked, once per request."""
    return [str(question_of(seen.messages)) for seen in talk.models.turns("manager")]


async def test_a_manager_picks_each_speaker_and_ends_it(talk: Talk) -> None:
    talk.seat(*TEAM, rounds=3, manager_model="manager")
    reply = await talk.ask("Oaks or birches? MANAGER:end-after-4", MANAGER)
    assert talk.order() == [
        *("manager", "alice", "manager", "bob", "manager", "carol"),
        *("manager", "alice", "manager"),
    ]
    assert headings(reply) == ["🔵 Ann", "🔴 Ben", "🟢 Cy", "🔵 Ann"]
    described = [status["description"] for status in reply.statuses]
    assert described[0] == "Ann · Ann has spoken least"
    assert last_status(reply).startswith(
        "The manager ended it: 4 turns are enough · 4 turns · "
    )
    assert reply.usage and "Manager" in reply.usage["participants"]


async def test_who_just_spoke_is_no_candidate(talk: Talk) -> None:
    talk.seat(*TEAM, manager_model="manager")
    await talk.ask("Oaks or birches?", MANAGER)
    first, second, third = asked(talk)
    assert '["Ann", "Ben", "Cy"]' in first
    assert '["Ben", "Cy"]' in second and "last speaker was Ann" in second
    assert '["Cy", "Ann"]' in third and "last speaker was Ben" in third


async def test_the_most_turns_are_rounds_times_participants(talk: Talk) -> None:
    talk.seat(*TEAM, rounds=2, manager_model="manager")
    reply = await talk.ask("Oaks or birches?", MANAGER)
    assert len(headings(reply)) == 6
    assert last_status(reply).startswith("Finished after 2 rounds · 6 turns")


async def test_a_talk_of_two_can_be_ended_too(talk: Talk) -> None:
    talk.seat(*TEAM[:2], rounds=3, manager_model="manager")
    reply = await talk.ask("Oaks or birches? MANAGER:end-after-3", MANAGER)
    assert talk.order() == [
        *("manager", "alice", "manager", "bob", "manager", "alice", "manager")
    ]
    assert last_status(reply).startswith("The manager ended it: 3 turns are enough")


async def test_a_wrong_answer_is_sent_back_once_with_what_was_wrong(
    talk: Talk,
) -> None:
    talk.seat(*TEAM, manager_model="manager")
    reply = await talk.ask("Oaks or birches? MANAGER:wrong", MANAGER)
    assert talk.order()[:3] == ["manager", "manager", "alice"]
    asked, wrong, why = talk.sent("manager", 1)
    assert [asked] == talk.sent("manager", 0)
    assert "Zaphod" in wrong["content"] and wrong["role"] == "assistant"
    assert '["Ann", "Ben", "Cy"]' in why["content"]
    assert headings(reply) == ["🔵 Ann", "🔴 Ben", "🟢 Cy"]


async def test_garbage_twice_means_the_next_in_order(talk: Talk) -> None:
    talk.seat(*TEAM, manager_model="manager")
    reply = await talk.ask("Oaks or birches? MANAGER:garbage", MANAGER)
    assert talk.order() == ["manager", "manager", "alice"] + [
        *("manager", "manager", "bob"),
        *("manager", "manager", "carol"),
    ]
    assert "next in order" in reply.statuses[0]["description"]


async def test_bare_names_are_understood(talk: Talk) -> None:
    talk.seat(*TEAM, manager_model="manager")
    await talk.ask("Oaks or birches? MANAGER:bare", MANAGER)
    assert talk.order() == ["manager", "alice", "manager", "bob", "manager", "carol"]


async def test_names_are_matched_whole(talk: Talk) -> None:
    def picks_anna(body: Body) -> Script:
        known = "Anna" in last_user_text(body).split("Choose one of")[-1]
        return Script([Text("Anna, please." if known else "Ann is next.")])

    talk.add_model("picks-anna", picks_anna)
    talk.seat("Ann | alice", "Anna | bob", "Cy | carol", manager_model="picks-anna")
    reply = await talk.ask("Oaks or birches?", MANAGER)
    assert headings(reply) == ["🔴 Anna", "🔵 Ann", "🔴 Anna"]


@REPLACES
async def test_a_failing_manager_means_the_next_in_order(talk: Talk) -> None:
    talk.seat(*TEAM, manager_model="fails-500")
    reply = await talk.ask("Oaks or birches?", MANAGER)
    assert headings(reply) == ["🔵 Ann", "🔴 Ben", "🟢 Cy"]
    assert "next in order" in reply.statuses[0]["description"]
    assert "> ⚠️ The manager failed: " in reply.text.split("### ")[0]
    assert reply.text.count("The manager failed: The scripted") == 1


async def test_without_a_manager_model_the_first_participants_model_leads(
    talk: Talk,
) -> None:
    talk.seat("Ann | manager", "Ben | bob", "Cy | carol")
    await talk.ask("Oaks or birches? MANAGER:end-after-2", MANAGER)
    assert talk.order()[0] == "manager"
    assert "You lead a conversation" in talk.sent("manager")[0]["content"]


async def test_a_second_question_tells_the_manager_the_whole_conversation(
    talk: Talk,
) -> None:
    talk.seat(*TEAM, manager_model="manager")
    async with talk.page() as page:
        reply = await page.ask(MANAGER, "Oaks or birches?", background_tasks={})
        await reply.wait_idle()
        second = await page.ask(
            MANAGER, "And maples?", chat=reply.chat, background_tasks={}
        )
        await second.wait_idle()
    later = asked(talk)[3]
    for part in ("Oaks or birches?", '<message from="Ann">', "And maples?"):
        assert part in later
    assert later.index('<message from="Cy">') < later.index("And maples?")


def test_both_modes_are_in_the_picker(talk: Talk) -> None:
    names = {model["id"]: model["name"] for model in talk.host.models(talk.account)}
    assert names[f"{FUNCTION_ID}.round_robin"] == "Round Robin · Conversation"
    assert names[f"{FUNCTION_ID}.manager"] == "Manager · Conversation"
