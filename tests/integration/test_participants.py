"""Who takes part, and who is told why not."""

import re
from datetime import UTC, datetime

import pytest

from tests.conftest import FUNCTION_ID
from tests.integration.talk import (
    MANAGER,
    ROUND_ROBIN,
    Talk,
    ask,
    headings,
    in_rounds,
    last_status,
    question_of,
    shown_error,
    system_of,
)
from tests.stack.host import Json, OpenWebUI
from tests.stack.page import error_text
from tests.versions import PREFERS_THE_CHATS

QUESTION = "Should we plant oaks or birches?"


async def test_nothing_configured_seats_three_and_says_how_to_choose(
    talk: Talk, host: OpenWebUI
) -> None:
    talk.account = host.add_user("Fresh Fritz")
    reply = await talk.ask(QUESTION)
    seated = ["alice", "bob", "carol"]
    assert talk.order() == seated * 2
    assert headings(reply) == in_rounds(2, "🔵 alice", "🔴 bob", "🟢 carol")
    first = reply.statuses[0]["description"]
    assert all(name in first for name in seated) and "Valves" in first
    assert last_status(reply).startswith("Finished after 2 rounds · 6 turns · ")


async def test_neither_arenas_nor_the_pipe_nor_what_is_based_on_it_come_by_default(
    talk: Talk, host: OpenWebUI
) -> None:
    talk.account = host.admin
    talk.seat()
    only = {
        "openai.api_configs": {"0": {"model_ids": ["alice", "text-embedding-3"]}},
        "ollama.enable": False,
        "evaluation.arena.enable": True,
    }
    with (
        talk.workspace_model("aa-panel", ROUND_ROBIN),
        talk.host_configured(only) as listed,
    ):
        await talk.ask(QUESTION)
    assert {"aa-panel", ROUND_ROBIN, "arena-model", "text-embedding-3"} <= listed
    assert set(talk.order()) == {"alice"}


async def test_the_multiselect_seats_its_models_in_order(talk: Talk) -> None:
    talk.seat(participants=["carol", "alice"])
    reply = await talk.ask(QUESTION)
    assert talk.order() == ["carol", "alice"]
    assert headings(reply) == ["🔵 carol", "🔴 alice"]
    assert "Valves" not in str(reply.statuses)


async def test_the_team_text_seats_one_model_several_times(talk: Talk) -> None:
    talk.seat("Ann | alice | You doubt.", "Ben | alice | You trust.", "Cy|bob|")
    reply = await talk.ask(QUESTION)
    assert talk.order() == ["alice", "alice", "bob"]
    assert headings(reply) == ["🔵 Ann", "🔴 Ben", "🟢 Cy"]
    assert "Valves" not in str(reply.statuses)
    ann, ben = talk.sent("alice", 0), talk.sent("alice", 1)
    assert "You doubt." in system_of(ann) and "You trust." not in system_of(ann)
    assert "You trust." in system_of(ben) and "You doubt." not in system_of(ben)
    assert '<message from="Ann">' in ben[-1]["content"]


async def test_the_team_text_wins_over_the_multiselect(talk: Talk) -> None:
    talk.seat("Ann | alice", participants=["bob", "carol"])
    await talk.ask(QUESTION)
    assert talk.order() == ["alice"]


async def test_a_broken_line_is_named_and_the_others_go_on(talk: Talk) -> None:
    talk.seat("Ann | alice", "Ben", "", "Cy | no-such-model | Kind", "Di | bob")
    reply = await talk.ask(QUESTION)
    assert talk.order() == ["alice", "bob"]
    assert "Team line 2" in reply.text and "Team line 4" in reply.text
    assert "no-such-model" in reply.text
    assert headings(reply) == ["🔵 Ann", "🔴 Di"]


async def test_a_model_the_user_may_not_use_is_refused_by_name(
    talk: Talk, host: OpenWebUI
) -> None:
    talk.seat(participants=["alice", "dave", "bob"])
    host.set_readers("dave")
    try:
        reply = await talk.ask(QUESTION)
        assert talk.order() == ["alice", "bob"]
        assert '"dave"' in reply.text and "that you may use" in reply.text
        host.grant_read("dave", talk.account)
        reply = await talk.ask("And now?")
        assert talk.order()[2:] == ["alice", "dave", "bob"]
        assert "that you may use" not in reply.text
    finally:
        host.grant_read("dave", "public")


async def test_an_admin_may_use_what_nobody_else_may(
    talk: Talk, host: OpenWebUI
) -> None:
    talk.account = host.admin
    talk.seat(participants=["dave"])
    host.set_readers("dave")
    try:
        reply = await talk.ask(QUESTION)
    finally:
        host.grant_read("dave", "public")
    assert talk.order() == ["dave"] * 3
    assert headings(reply) == ["🔵 Optimist", "🔴 Sceptic", "🟢 Engineer"]
    assert "> 💬 Optimist, Sceptic and Engineer are all dave" in reply.text


async def test_the_pipe_itself_is_refused_also_through_workspace_models(
    talk: Talk,
) -> None:
    with (
        talk.workspace_model("panel", ROUND_ROBIN, name="The Panel"),
        talk.workspace_model("panel-two", "panel", name="Second Panel"),
    ):
        talk.seat("Me | " + MANAGER, "One | panel", "Two | panel-two", "Ann | alice")
        reply = await talk.ask(QUESTION)
    assert talk.order() == ["alice"]
    assert reply.text.count("is this conversation itself") == 3
    assert "The Panel" in reply.text and "Second Panel" in reply.text


async def test_nobody_left_is_an_error_that_says_what_to_do(talk: Talk) -> None:
    talk.seat("Me | " + ROUND_ROBIN, "Ann | no-such-model")
    async with talk.page() as page:
        reply = await page.send(ROUND_ROBIN, QUESTION, background_tasks={})
        await reply.wait_idle()
        stored = await page.stored(reply.chat.id or "", reply.id)
    assert talk.order() == []
    for error in (shown_error(reply), error_text(stored["error"]["content"])):
        assert error.startswith("Nobody can take part in this conversation.")
        assert "no-such-model" in error and "in the valves" in error


async def test_the_manager_model_is_checked_like_a_participant(talk: Talk) -> None:
    talk.seat("Ann | alice", "Ben | bob", manager_model=MANAGER)
    reply = await talk.ask(QUESTION, MANAGER)
    assert "Manager: " in reply.text and "is this conversation itself" in reply.text
    assert talk.order()[0] == "alice"


V2: Json = {
    "NUM_PARTICIPANTS": 2,
    "ROUNDS_PER_CONVERSATION": 2,
    "Participant1Model": "alice",
    "Participant1Alias": "Ann",
    "Participant1SystemMessage": "You doubt.\nAlways.",
    "Participant2Model": "bob",
    "Participant2Alias": "",
    "Participant2SystemMessage": "You trust.",
    "Participant3Model": "carol",
    "Participant3Alias": "Not counted",
    "Participant3SystemMessage": "",
    "AllParticipantsApendedMessage": "Respond only as your specified participant.",
    "UseGroupChatManager": False,
    "ManagerModel": "manager",
    "ManagerSystemMessage": "You are a group manager.",
    "ManagerSelectionPrompt": "History:\n{history}\nLast: {last_speaker}\n"
    "Choose from: {participant_list}",
    "Temperature": 0.25,
    "Top_k": 7,
    "Top_p": 0.75,
}


async def test_stored_valves_of_v2_seat_the_same_cast(
    talk: Talk, host: OpenWebUI
) -> None:
    host.set_user_valves(talk.account, FUNCTION_ID, V2)
    reply = await talk.ask(QUESTION)
    assert talk.order() == ["alice", "bob", "alice", "bob"]
    assert headings(reply) == in_rounds(2, "🔵 Ann", "🔴 Participant 2")
    system = system_of(talk.sent("alice"))
    assert "You doubt.\nAlways." in system
    assert "Respond only as your specified participant." in system
    body = talk.models.turns("alice")[0].body
    assert (body["temperature"], body["top_k"], body["top_p"]) == (0.25, 7, 0.75)


async def test_the_manager_model_of_v2_leads_with_our_prompt(
    talk: Talk, host: OpenWebUI
) -> None:
    host.set_user_valves(talk.account, FUNCTION_ID, V2)
    await talk.ask(QUESTION, MANAGER)
    assert talk.order() == ["manager", "alice", "manager", "bob"] * 2
    (asked,) = talk.sent("manager")
    assert asked["role"] == "user" and "You lead a conversation" in asked["content"]
    assert '["Ann", "Participant 2"]' in asked["content"]


async def test_the_admins_valves_are_defaults_for_everybody(talk: Talk) -> None:
    talk.admin_sets(team="Ann | alice\nBen | bob", rounds=1, instructions="Be brief.")
    await talk.ask(QUESTION)
    assert talk.order() == ["alice", "bob"]
    assert "Be brief." in system_of(talk.sent("bob"))


async def test_a_users_list_wins_over_the_admins_team(talk: Talk) -> None:
    talk.admin_sets(team="Ann | alice\nBen | bob")
    talk.seat(participants=["carol", "dave"])
    await talk.ask(QUESTION)
    assert talk.order() == ["carol", "dave"]


async def test_the_admins_ceilings_hold_for_what_a_user_sets(talk: Talk) -> None:
    talk.admin_sets(max_participants=2, max_rounds=2)
    talk.seat("Ann | alice", "Ben | bob", "Cy | carol", rounds=50)
    reply = await talk.ask(QUESTION)
    assert talk.order() == ["alice", "bob"] * 2
    assert "Cy: at most 2 may take part" in reply.text


async def test_at_most_eight_are_seated_whatever_the_admin_sets(talk: Talk) -> None:
    talk.admin_sets(max_participants=99)
    talk.seat(*(f"P{n} | alice" for n in range(10)))
    reply = await talk.ask(QUESTION)
    assert len(talk.order()) == 8 == len(headings(reply))
    assert reply.text.count("at most 8 may take part") == 2


async def test_equal_names_get_numbers(talk: Talk) -> None:
    talk.seat("Ann | alice", "ann | bob", "Ann | carol")
    reply = await talk.ask(QUESTION)
    assert headings(reply) == ["🔵 Ann", "🔴 ann 2", "🟢 Ann 3"]


def options(spec: Json, name: str) -> set[str]:
    """The values a field of the valves offers."""
    return {
        option["value"] if isinstance(option, dict) else option
        for option in spec["properties"][name]["input"]["options"]
    }


def test_the_valves_offer_only_models_the_user_may_use(
    talk: Talk, host: OpenWebUI
) -> None:
    path = f"/api/v1/functions/id/{FUNCTION_ID}/valves/user/spec"
    host.set_readers("dave")
    try:
        with talk.workspace_model("panel", ROUND_ROBIN):
            for_user = host.request("GET", path, account=talk.account)
            for_admin = host.request("GET", path)
    finally:
        host.grant_read("dave", "public")
    for field in ("participants", "manager_model"):
        offered = options(for_user, field)
        assert {"alice", "bob", "llama-local:latest"} <= offered
        assert "dave" not in offered and "dave" in options(for_admin, field)
        own = {i for i in offered if FUNCTION_ID in i or i == "panel"}
        assert not own and not own & options(for_admin, field)
    usable = {model["id"] for model in host.models(talk.account)}
    assert options(for_user, "participants") <= usable | {"dave"}


def test_the_users_panel_has_at_most_eight_described_fields(
    talk: Talk, host: OpenWebUI
) -> None:
    for kind in ("user/spec", "spec"):
        spec = host.request("GET", f"/api/v1/functions/id/{FUNCTION_ID}/valves/{kind}")
        assert all(
            field.get("title") and field.get("description")
            for field in spec["properties"].values()
        )
        if kind == "user/spec":
            assert len(spec["properties"]) <= 8


async def test_system_prompts_have_the_hosts_variables_filled_in(talk: Talk) -> None:
    system = "You talk to {{USER_NAME}} on {{CURRENT_DATE}}. Keep {{THIS}} and {that}."
    before = datetime.now(UTC).strftime("%Y-%m-%d")
    with talk.workspace_model("polite", "alice", params={"system": system}):
        talk.seat("Ann | polite | Persona", "Ben | bob")
        await talk.ask(QUESTION)
    sent = system_of(talk.sent("alice"))
    found = re.search(r"You talk to Uma User on (\S+)\. Keep \{\{THIS}} and", sent)
    assert found and found[1] >= before
    assert sent.count("You talk to") == 1
    assert "You talk to" not in system_of(talk.sent("bob"))


async def test_a_chats_system_prompt_reaches_everybody(talk: Talk) -> None:
    talk.seat("Ann | alice", "Ben | bob")
    await talk.ask(QUESTION, params={"system": "Answer in rhymes."})
    for model in ("alice", "bob"):
        sent = talk.sent(model)
        assert system_of(sent).count("Answer in rhymes.") == 1
        assert [m["role"] for m in sent].count("system") == 1


@PREFERS_THE_CHATS
@pytest.mark.parametrize("valve", [None, 0.9])
async def test_a_models_own_parameters_stay_unless_the_valve_is_set(
    talk: Talk, valve: float | None
) -> None:
    params = {"temperature": 0.1, "top_p": 0.2, "max_tokens": 77}
    with talk.workspace_model("cool", "alice", params=params):
        talk.seat("Ann | cool", "Ben | bob", temperature=valve)
        await talk.ask(QUESTION)
    body = talk.models.turns("alice")[0].body
    assert (body["top_p"], body["max_tokens"]) == (0.2, 77)
    assert body["temperature"] == (0.1 if valve is None else 0.9)
    assert talk.models.turns("bob")[0].body.get("temperature") == valve


async def test_a_model_without_tools_or_knowledge_is_told_it_has_none(
    talk: Talk,
) -> None:
    talk.seat("Ann | alice")
    await talk.ask(QUESTION)
    seen = talk.models.turns("alice")[0]
    assert "tools" not in seen.body
    assert "You have no tools" in system_of(seen.messages)
    assert "knowledge" not in system_of(seen.messages)


async def test_a_workspace_model_brings_a_team_of_its_own(talk: Talk) -> None:
    talk.seat("Dan | dave", rounds=2)
    team = {"team": "Ann | alice | You doubt.; Ben | bob", "rounds": "one"}
    preset = talk.workspace_model("board", ROUND_ROBIN, params={"custom_params": team})
    with preset as model:
        reply = await talk.ask("Should we plant oaks?", model)
    assert headings(reply) == ["🔵 Ann", "🔴 Ben"]
    assert talk.order() == ["alice", "bob"]
    assert "You doubt." in str(talk.sent("alice")[0]["content"])


async def test_a_team_that_cannot_be_read_is_answered_with_the_form(talk: Talk) -> None:
    preset = {"custom_params": {"team": '["Ann | alice", "Ben | bob"'}}
    with talk.workspace_model("board", MANAGER, params=preset) as model:
        async with talk.page() as page:
            reply = await page.send(model, QUESTION, background_tasks={})
            await reply.wait_idle()
    assert "The `team` of this model cannot be read: write `Ann |" in str(reply.error)
    assert talk.order() == []


async def test_who_is_named_in_the_question_is_seated_or_answers(talk: Talk) -> None:
    talk.seat("Ann | alice", "Ben | bob", max_rounds=1)
    async with talk.page() as page:
        first = await ask(page, f"/with carol, dav /rounds 500 {QUESTION}")
        assert talk.order() == ["carol", "dave"] * 10
        assert "> 💬 In this chat: carol and dave · Rounds: 10, the most " in first.text
        assert all("/with" not in seen.text for seen in talk.models.turns())
        talk.models.clear()
        second = await ask(page, "Dave: why?", MANAGER, chat=first.chat)
        assert talk.order() == ["dave"]
        assert "Only dave may answer" in second.text
        assert "/with" not in talk.models.turns()[0].text
        talk.models.clear()
        third = await ask(page, f"/with karol, bob {QUESTION}", chat=first.chat)
    assert talk.order() == ["carol", "dave"]
    assert 'there is no model "karol" that you may use (did you mean' in third.text
    assert "/with karol, bob" in question_of(talk.sent("carol"))


async def test_a_preset_team_seats_only_what_its_user_may_use(talk: Talk) -> None:
    team = {"team": "Ann | alice\nBen | no-such-model"}
    with talk.workspace_model(
        "board", ROUND_ROBIN, params={"custom_params": team}
    ) as model:
        reply = await talk.ask("Should we plant oaks?", model)
    assert "> ⚠️ 1 seat of this team cannot be used." in reply.text
    assert "no-such-model" not in reply.text
    assert headings(reply) == in_rounds(2, "🔵 Ann")
