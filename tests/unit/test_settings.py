"""Section 1: valves, their merging, and prompts as templates."""

import inspect
import re
from typing import Any

import pytest
from pydantic import BaseModel, ValidationError
from starlette.requests import Request

from tests.unit.fakes import ScriptedHost
from tests.unit.plugin import mmc

PANELS: dict[str, type[BaseModel]] = {
    "admin": mmc.Pipe.Valves,
    "user": mmc.Pipe.UserValves,
}
FIELDS = [
    (panel, name)
    for panel, kind in PANELS.items()
    for name in kind.model_json_schema()["properties"]
]
V2_STORED: dict[str, Any] = {
    "NUM_PARTICIPANTS": 2,
    "ROUNDS_PER_CONVERSATION": 4,
    "Participant1Model": "oak",
    "Participant1Alias": "Ann",
    "Participant1SystemMessage": "You like trees.\nVery much | so.",
    "Participant2Model": "elm",
    "Participant2Alias": "Bob",
    "Participant2SystemMessage": "",
    "Participant3Model": "fir",
    "Participant3Alias": "Cat",
    "Participant3SystemMessage": "Third.",
    "Participant4Model": "",
    "Participant4Alias": "",
    "Participant4SystemMessage": "",
    "Participant5Model": "",
    "Participant5Alias": "",
    "Participant5SystemMessage": "",
    "AllParticipantsApendedMessage": "Be brief.",
    "UseGroupChatManager": True,
    "ManagerModel": "ash",
    "ManagerSystemMessage": "You lead.",
    "ManagerSelectionPrompt": "{history} {last_speaker} {participant_list}?",
    "Temperature": 0.3,
    "Top_k": 20,
    "Top_p": 0.9,
}
CARDS = {
    name: mmc.ModelCard(name, name.title()) for name in ("oak", "elm", "fir", "ash")
}


def schema_of(panel: str, name: str) -> dict[str, Any]:
    properties: dict[str, dict[str, Any]] = PANELS[panel].model_json_schema()[
        "properties"
    ]
    return properties[name]


def merged(
    admin: dict[str, Any] | None = None, user: dict[str, Any] | None = None
) -> mmc.Settings:
    own = None if user is None else mmc.Pipe.UserValves.model_validate(user)
    return mmc.merge_settings(mmc.Pipe.Valves.model_validate(admin or {}), own)


# -- the panels ------------------------------------------------------------------------


@pytest.mark.parametrize(("panel", "name"), FIELDS)
def test_every_field_has_a_title_and_a_description_of_whole_sentences(
    panel: str, name: str
) -> None:
    schema = schema_of(panel, name)
    assert schema["title"] and schema["title"][0].isupper()
    assert schema["description"].endswith(".")
    assert len(schema["description"]) <= 200


def test_both_panels_work_without_anything_set() -> None:
    assert mmc.Pipe.Valves().rounds == 2
    assert mmc.Pipe.UserValves().participants == []


def test_the_panels_stay_small() -> None:
    assert len([name for panel, name in FIELDS if panel == "user"]) <= 7
    assert len([name for panel, name in FIELDS if panel == "admin"]) <= 28


def test_what_the_panel_does_not_show_is_still_read_where_it_is_stored() -> None:
    stored = {"top_p": 0.5, "top_k": "7", "busy_patience": 1, "flush_interval": 20}
    settings = mmc.Pipe.Valves.model_validate(stored)
    assert (settings.top_p, settings.top_k) == (0.5, 7)
    assert (settings.busy_patience, settings.flush_interval) == (1, 20)
    assert not {name for _, name in FIELDS} & stored.keys()


def test_the_users_fields_are_the_admins_fields_with_the_same_words() -> None:
    admin, user = mmc.Pipe.Valves.model_fields, mmc.Pipe.UserValves.model_fields
    for name, field in user.items():
        assert name in admin
        assert admin[name].description == field.description
        assert admin[name].default == field.default


@pytest.mark.parametrize(("panel", "name"), FIELDS)
def test_the_page_finds_a_plain_type_for_every_field(panel: str, name: str) -> None:
    kind = schema_of(panel, name).get("type")
    assert kind in ("string", "number", "integer", "boolean", "array")


@pytest.mark.parametrize("panel", PANELS)
def test_a_number_is_a_number_for_the_page_even_when_it_may_be_unset(
    panel: str,
) -> None:
    assert schema_of(panel, "temperature")["type"] == "number"


@pytest.mark.parametrize("panel", PANELS)
def test_models_are_chosen_from_those_that_may_be_used(panel: str) -> None:
    schemas = PANELS[panel].model_json_schema()["properties"]
    lists = {n for n, schema in schemas.items() if schema["type"] == "array"}
    inputs = {n: s["input"] for n, s in schemas.items() if "input" in s}
    assert lists == {"participants"}
    assert lists == {n for n, i in inputs.items() if i["type"] == "multiselect"}
    for method in {getattr(PANELS[panel], i["options"]) for i in inputs.values()}:
        assert not inspect.iscoroutinefunction(method)
        assert "__user__" in inspect.signature(method).parameters


def test_the_choice_of_built_in_tools_is_a_list_of_words() -> None:
    assert schema_of("admin", "builtin_tools")["enum"] == ["features", "all", "none"]


@pytest.mark.parametrize(
    "name", ["rounds", "temperature", "first_token_timeout", "max_participants"]
)
def test_a_number_typed_into_a_text_box_is_read_as_a_number(name: str) -> None:
    settings = mmc.Pipe.Valves.model_validate({name: "3"})
    assert getattr(settings, name) == 3


def test_a_word_where_a_number_belongs_is_refused_when_it_is_saved() -> None:
    with pytest.raises(ValidationError):
        mmc.Pipe.Valves.model_validate({"rounds": "many"})


# -- whose field wins ------------------------------------------------------------------


@pytest.mark.parametrize("blank", [None, "", []])
@pytest.mark.parametrize("panel", PANELS)
def test_a_blank_is_a_field_that_is_not_set(panel: str, blank: Any) -> None:
    names = PANELS[panel].model_fields
    stored = PANELS[panel].model_validate(dict.fromkeys(names, blank))
    assert stored == PANELS[panel]()
    assert stored.model_dump(exclude_unset=True) == {}


def test_without_anything_of_the_user_the_settings_are_the_admins() -> None:
    admin = {"rounds": 3, "team": "Ann | oak", "temperature": 0.5}
    users: list[dict[str, Any] | None] = [None, {}]
    for user in users:
        settings = merged(admin, user)
        assert (settings.rounds, settings.team) == (3, "Ann | oak")
        assert settings.temperature == 0.5


@pytest.mark.parametrize(
    ("name", "theirs", "own"),
    [
        ("participants", ["oak"], ["elm", "fir"]),
        ("team", "Ann | oak", "Bob | elm"),
        ("rounds", 2, 5),
        ("manager_model", "oak", "elm"),
        ("instructions", "Be kind.", "Be brief."),
        ("temperature", 0.9, 0.0),
        ("top_p", 0.9, 0.0),
        ("top_k", 40, 0),
    ],
)
def test_a_users_field_wins_over_the_admins_and_leaves_the_others(
    name: str, theirs: Any, own: Any
) -> None:
    admin = {name: theirs, "rules_prompt": "The admin's."}
    settings = merged(admin, {name: own})
    assert getattr(settings, name) == own
    assert settings.rules_prompt == "The admin's."


def test_who_ticks_only_a_list_does_not_get_the_admins_team() -> None:
    settings = merged({"team": "Ann | oak"}, {"participants": ["elm"]})
    assert (settings.team, settings.participants) == ("", ["elm"])


def test_who_writes_a_team_gets_it_whatever_is_ticked() -> None:
    user = {"team": "Ann | oak", "participants": ["elm"]}
    seats, problems = mmc.choose_seats(merged({}, user), CARDS)
    assert [seat.alias for seat in seats] == ["Ann"]
    assert problems == []


TOLD_OF_A_TEAM = [  # the admin's, the user's, the host's presets; what is quoted
    ({"team": "Eve | vault", "manager_model": "vault"}, {}, {}, []),
    ({"participants": ["vault"]}, {"rounds": 3}, {}, []),
    ({"participants": ["vault"]}, {"team": "Eve | vault"}, {}, ["team"]),
    ({"team": "Eve | vault"}, {"participants": ["vault"]}, {}, ["participants"]),
    ({"manager_model": "vault"}, {"team": "Ann | vault"}, {}, ["team"]),
    ({}, {"manager_model": "vault"}, {}, ["manager_model"]),
    ({}, {"Participant1Model": "vault"}, {}, ["team"]),
    ({}, {"ManagerModel": "vault"}, {}, ["manager_model"]),
    ({}, {"team": "Ann | oak"}, {"custom_params": {"team": "Eve | vault"}}, []),
]


@pytest.mark.parametrize(("admin", "user", "preset", "quoted"), TOLD_OF_A_TEAM)
def test_only_what_the_user_has_chosen_is_quoted_to_him(
    admin: dict[str, Any],
    user: dict[str, Any],
    preset: dict[str, Any],
    quoted: list[str],
) -> None:
    host = ScriptedHost(Request({"type": "http"}), None, {})
    body = preset.get("custom_params")
    settings = mmc.merge_settings(mmc.Settings(**admin), mmc.UserSettings(**user), body)
    readable = host.readable(settings, {}, preset)
    chooses = {"team", "participants", "manager_model"}
    shown = [name for name in sorted(chooses & readable) if getattr(settings, name)]
    assert shown == quoted
    problems = mmc._tell_problems(settings, ["vault: no."], "vault: no", readable)
    whose = {"team" if settings.team else "participants", "manager_model"}
    assert " ".join(problems).count("vault") == len(whose & readable)


def test_an_admin_is_told_all_of_his_team() -> None:
    admin = type("Admin", (), {"role": "admin"})()
    host = ScriptedHost(Request({"type": "http"}), admin, {})
    settings = merged({"team": "Eve | vault"}, {})
    readable = host.readable(settings, {"custom_params": {"team": "x"}})
    problems = mmc._tell_problems(settings, ["vault: no."], "vault: no", readable)
    assert problems[0] == "vault: no." and "Manager: vault: no." in problems[1]


def test_a_users_team_wins_over_the_admins_list() -> None:
    seats, _ = mmc.choose_seats(
        merged({"participants": ["elm"]}, {"team": "Ann | oak"}), CARDS
    )
    assert [seat.model_id for seat in seats] == ["oak"]


@pytest.mark.parametrize(
    ("asked", "ceiling", "given"), [(99, 10, 10), (3, 10, 3), (0, 10, 1), (5, 0, 1)]
)
def test_rounds_stay_between_one_and_the_ceiling(
    asked: int, ceiling: int, given: int
) -> None:
    assert merged({"max_rounds": ceiling}, {"rounds": asked}).rounds == given


@pytest.mark.parametrize(("asked", "given"), [(99, 8), (3, 3), (0, 1), (-1, 1)])
def test_there_are_never_more_than_eight_participants(asked: int, given: int) -> None:
    assert merged({"max_participants": asked}).max_participants == given


def test_tool_limits_that_make_no_sense_become_the_least_that_does() -> None:
    settings = merged({"max_tool_rounds": -5, "tool_timeout": 0})
    assert (settings.max_tool_rounds, settings.tool_timeout) == (0, 0.1)


def test_a_user_cannot_raise_the_admins_ceilings() -> None:
    settings = merged({"max_rounds": 3}, {"max_rounds": 50, "rounds": 50})
    assert (settings.max_rounds, settings.rounds) == (3, 3)


def test_merging_leaves_the_admins_valves_as_they_were() -> None:
    admin = mmc.Pipe.Valves(rounds=50, max_rounds=4)
    mmc.merge_settings(admin, mmc.Pipe.UserValves(team="Ann | oak"))
    assert (admin.rounds, admin.team) == (50, "")


# -- what "Multi Model Conversations v2" stored ----------------------------------------


def test_stored_v2_valves_are_understood() -> None:
    settings = merged({}, V2_STORED)
    assert settings.rounds == 4
    assert settings.instructions == "Be brief."
    assert settings.manager_model == "ash"
    assert settings.manager_prompt == mmc.MANAGER_PROMPT  # the admin's alone
    assert settings.temperature == 0.3
    assert (settings.top_k, settings.top_p) == (20, 0.9)
    seats, problems = mmc.choose_seats(settings, CARDS)
    assert problems == []
    assert seats == [
        mmc.Seat("Ann", "oak", "You like trees.\nVery much | so."),
        mmc.Seat("Bob", "elm", ""),
    ]


class Preparing(ScriptedHost):
    """A host that knows the models of `CARDS`, which bring nothing of their own."""

    async def model_cards(self, own_id: str) -> dict[str, mmc.ModelCard]:
        return CARDS

    async def model_params(self, ids: Any) -> tuple[dict[str, Any], dict[str, Any]]:
        return {}, {}

    async def voice(self, card: mmc.ModelCard, *_: Any) -> mmc.Voice | str:
        return mmc.Voice(card.id)


@pytest.mark.parametrize(
    ("stored", "model", "first"),
    [
        (V2_STORED, "talk", mmc.AskManager),
        (V2_STORED, "talk.round_robin", mmc.Speak),
        (V2_STORED | {"UseGroupChatManager": False}, "talk", mmc.Speak),
        (None, "talk", mmc.Speak),
    ],
)
async def test_v2s_switch_chooses_the_mode_where_the_model_names_none(
    stored: dict[str, Any] | None, model: str, first: type
) -> None:
    request = Request({"type": "http", "headers": [], "state": {}})
    host = Preparing(request, None, {"chat_id": "chat", "message_id": "message"})
    user = None if stored is None else mmc.Pipe.UserValves.model_validate(stored)
    asked = [{"role": "user", "content": "Which tree?"}]
    body = {"model": model, "messages": asked}
    _, mode = await mmc._prepare(host, mmc.Pipe.Valves(), user, body)
    assert isinstance(next(mode), first)


def test_stored_v2_valves_survive_a_save_of_the_new_panel() -> None:
    stored = mmc.Pipe.UserValves.model_validate(V2_STORED | {"rounds": 3})
    again = stored.model_dump(exclude_unset=True)
    assert again.items() >= {k: v for k, v in V2_STORED.items() if v != ""}.items()
    assert merged({}, again).rounds == 3


def test_the_page_does_not_show_v2s_fields() -> None:
    shown = mmc.Pipe.UserValves.model_json_schema()["properties"]
    assert not set(V2_STORED) & set(shown)


def test_our_own_fields_win_over_stored_v2_ones() -> None:
    own = V2_STORED | {"rounds": 7, "team": "Zoe | fir", "temperature": 0.0}
    settings = merged({}, own)
    assert (settings.rounds, settings.team) == (7, "Zoe | fir")
    assert settings.temperature == 0.0


def test_ticked_participants_win_over_stored_v2_ones() -> None:
    settings = merged({}, V2_STORED | {"participants": ["ash"]})
    assert (settings.team, settings.participants) == ("", ["ash"])


def test_a_v2_temperature_of_nought_is_a_temperature() -> None:
    assert merged({}, {"Temperature": 0.0}).temperature == 0.0


def test_v2_participants_without_an_alias_have_one_and_empty_places_are_left_out() -> (
    None
):
    stored = {"Participant1Model": "", "Participant2Model": "elm"}
    seats, problems = mmc.choose_seats(merged({}, stored), CARDS)
    assert problems == []
    assert [seat.model_id for seat in seats] == ["elm"]
    assert seats[0].alias


@pytest.mark.parametrize("ending", ["\n", "\r\n", "\r", "\u2028", "\x0b", "\x85"])
def test_a_v2_persona_of_several_lines_stays_one_participants(ending: str) -> None:
    stored = {
        "Participant1Model": "oak",
        "Participant1Alias": "Ann",
        "Participant1SystemMessage": f"First.{ending}Second.",
    }
    seats, problems = mmc.choose_seats(merged({}, stored), CARDS)
    assert problems == []
    assert [seat.alias for seat in seats] == ["Ann"]
    assert re.fullmatch(r"First\.\s+Second\.", seats[0].persona)


def test_a_user_of_v2_stays_under_the_new_ceilings() -> None:
    settings = merged({"max_rounds": 2, "max_participants": 1}, V2_STORED)
    seats, problems = mmc.choose_seats(settings, CARDS)
    assert settings.rounds == 2
    assert [seat.alias for seat in seats] == ["Ann"]
    assert problems == ["Bob: at most 1 may take part."]


# -- templates -------------------------------------------------------------------------


def test_a_template_is_filled_in_one_pass() -> None:
    values = {"history": "says {last_speaker}", "last_speaker": "{history}"}
    filled = mmc.fill_template("{history} / {last_speaker} / {history}", values)
    assert filled == "says {last_speaker} / {history} / says {last_speaker}"


def test_braces_that_are_no_known_name_stay_as_they_are() -> None:
    template = '{"next": "{name}", "x": {}} {unknown} {{name}} {name'
    filled = mmc.fill_template(template, {"name": "Ann"})
    assert filled == '{"next": "Ann", "x": {}} {unknown} {Ann} {name'


@pytest.mark.parametrize("value", [r"\1 \g<0> \n", "$1", "%s {0}"])
def test_a_value_is_put_in_as_it_is(value: str) -> None:
    assert mmc.fill_template("<{name}>", {"name": value}) == f"<{value}>"


def test_the_default_prompts_name_exactly_what_their_descriptions_promise() -> None:
    for name in ("rules_prompt", "manager_prompt"):
        field = mmc.Settings.model_fields[name]
        promised = set(re.findall(r"\{(\w+)\}", field.description or ""))
        used = set(re.findall(r"\{(\w+)\}", field.default))
        assert used == promised


# -- presets ---------------------------------------------------------------------------


def test_what_a_request_presets_wins_over_the_user_and_the_admin() -> None:
    admin = mmc.Settings(team="Ann | oak", rounds=4, chair="Ann")
    user = mmc.UserSettings(team="Bob | elm", rounds=3, instructions="Be brief.")
    body = {"team": "Cat | fir", "rounds": 1, "messages": [], "temperature": 0.1}
    merged = mmc.merge_settings(admin, user, body)
    assert (merged.team, merged.rounds) == ("Cat | fir", 1)
    assert (merged.instructions, merged.chair) == ("Be brief.", "Ann")
    assert merged.temperature is None


def test_preset_participants_do_not_want_the_team_below_them() -> None:
    user = mmc.UserSettings(team="Bob | elm")
    merged = mmc.merge_settings(mmc.Settings(), user, {"participants": ["fir"]})
    assert (merged.participants, merged.team) == (["fir"], "")


def test_an_empty_list_of_participants_leaves_the_admins_team() -> None:
    settings = merged({"team": "Ann | oak"}, {"participants": []})
    assert settings.team == "Ann | oak"


def test_rounds_named_in_the_question_win_under_the_ceiling() -> None:
    admin, body = mmc.Settings(max_rounds=3), {"rounds": 2}
    assert mmc.merge_settings(admin, None, body, {"rounds": 1}).rounds == 1
    assert mmc.merge_settings(admin, None, body, {"rounds": 0}).rounds == 1
    assert mmc.merge_settings(admin, None, body, {"rounds": 99}).rounds == 3


@pytest.mark.parametrize("number", ["abc", None, [], "-", float("inf")])
def test_a_v2_number_of_participants_that_cannot_be_read_takes_all(number: Any) -> None:
    settings = merged({}, V2_STORED | {"NUM_PARTICIPANTS": number})
    assert len(settings.team.splitlines()) == 3


def test_presets_stay_under_the_ceilings() -> None:
    admin = mmc.Settings(max_rounds=2)
    assert mmc.merge_settings(admin, None, {"rounds": 50}).rounds == 2


TWO = "Ann | oak | You hope; always.\nBob | elm"


@pytest.mark.parametrize(
    "typed",
    [
        ["Ann | oak | You hope; always.", "Bob | elm"],
        '["Ann | oak | You hope; always.", "Bob | elm"]',
        TWO,
        TWO.replace("\n", "\\n"),
        TWO.replace("\n", " ; "),
        TWO.replace("\n", ";") + "; ",
    ],
)
def test_a_preset_team_is_read_however_it_fits_into_one_line(typed: Any) -> None:
    merged = mmc.merge_settings(mmc.Settings(), None, {"team": typed})
    seats, problems = mmc.choose_seats(merged, CARDS)
    assert problems == []
    assert [seat.alias for seat in seats] == ["Ann", "Bob"]
    assert seats[0].persona == "You hope; always."


def test_a_persona_of_a_preset_keeps_its_line_breaks() -> None:
    for typed in (["Ann | oak | One.\nTwo."], "Ann | oak | One.\\nTwo."):
        merged = mmc.merge_settings(mmc.Settings(), None, {"team": typed})
        (seat,), _ = mmc.choose_seats(merged, CARDS)
        assert seat.persona == "One.\nTwo."


@pytest.mark.parametrize(
    "typed",
    [["oak", "elm"], '["oak", "elm"]', "oak,elm", "oak, elm,", "oak; elm", "oak\\nelm"],
)
def test_preset_participants_are_read_however_they_are_parted(typed: Any) -> None:
    merged = mmc.merge_settings(mmc.Settings(), None, {"participants": typed})
    assert merged.participants == ["oak", "elm"]
    merged = mmc.merge_settings(mmc.Settings(), None, {"team": "oak; elm"})
    assert merged.team == "oak\nelm"


@pytest.mark.parametrize(
    "unreadable",
    [{"a": 1}, 5, [1], [["Ann", "oak"]], '["Ann | oak", "Bob | elm"', "['a']"],
)
@pytest.mark.parametrize("name", ["team", "participants"])
def test_seats_that_cannot_be_read_are_answered_with_a_form_that_can(
    name: str, unreadable: Any
) -> None:
    with pytest.raises(mmc.ConversationError) as told:
        mmc.merge_settings(mmc.Settings(), None, {name: unreadable})
    shown = re.findall("`(.+?)`", str(told.value))
    assert shown[0] == name and len(shown) > 1
    for form in shown[1:]:
        merged = mmc.merge_settings(mmc.Settings(), None, {name: form})
        assert (
            len(merged.team.split("\n") if name == "team" else merged.participants) == 2
        )


@pytest.mark.parametrize(
    ("typed", "read"),
    [("three", 3), (" Three ", 3), ("4", 4), ("2,0", 2), (5, 5), ("zero", 1)],
)
def test_rounds_are_read_as_people_write_them(typed: Any, read: int) -> None:
    assert mmc.Pipe.UserValves(rounds=typed).rounds == read
    assert mmc.merge_settings(mmc.Settings(), None, {"rounds": typed}).rounds == read


def test_numbers_with_a_comma_are_read_and_thousands_are_not_mistaken() -> None:
    typed = {"temperature": "0,7", "skip_after": "one", "instructions": "three"}
    read = mmc.Pipe.Valves.model_validate(typed)
    assert (read.temperature, read.skip_after) == (0.7, 1)
    assert read.instructions == "three"
    with pytest.raises(ValidationError):
        mmc.Pipe.Valves.model_validate({"max_tokens": "1,000"})


def test_a_preset_that_cannot_be_read_is_named() -> None:
    with pytest.raises(mmc.ConversationError, match="cannot be read: rounds"):
        mmc.merge_settings(mmc.Settings(), None, {"rounds": "many"})
