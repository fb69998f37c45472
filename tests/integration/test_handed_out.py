"""What `make dist` and `docs/teams` hand out, imported as people import it."""

import httpx
import pytest

from release.dist import LANGUAGES, function
from tests.integration.talk import Talk, headings
from tests.stack.demo import presets
from tests.stack.host import Json

TEAMS = [model for model in presets() if model["base_model_id"]]


def test_the_functions_json_is_imported_with_its_translations(talk: Talk) -> None:
    copy = {**function(), "id": "from_json"}
    path = f"/api/v1/functions/id/{copy['id']}"
    talk.host.request("POST", "/api/v1/functions/create", copy)
    try:
        listed = talk.host.request("GET", "/api/v1/functions/", account=talk.account)
        (found,) = [each for each in listed if each["id"] == copy["id"]]
        assert found["meta"]["i18n"].keys() == set(LANGUAGES)
        shown: Json = talk.host.request("GET", f"{path}/valves/spec")["properties"]
        german = found["meta"]["i18n"]["de"]
        assert {f"valves.{name}.title" for name in shown} <= german.keys()
        assert not found["is_active"], "an import installs, and the admin switches on"
    finally:
        talk.host.request("DELETE", f"{path}/delete")


def test_the_four_models_get_a_description_and_an_icon(talk: Talk) -> None:
    modes = [model for model in presets() if not model["base_model_id"]]
    before = {model["id"]: model["name"] for model in talk.host.models()}
    talk.host.import_models(modes)
    try:
        after = {model["id"]: model for model in talk.host.models()}
        for mode in modes:
            assert before[mode["id"]] == after[mode["id"]]["name"]
            meta = after[mode["id"]]["info"]["meta"]
            assert meta["description"] == mode["meta"]["description"]
            assert meta["i18n"].keys() == set(LANGUAGES)
            assert_icon(talk, mode["id"])
    finally:
        for mode in modes:
            talk.host.delete_model(mode["id"])
            talk.host.grant_read(mode["id"], "public")


@pytest.mark.parametrize("team", TEAMS, ids=[team["id"] for team in TEAMS])
async def test_a_team_talks_with_whatever_models_there_are(
    talk: Talk, team: Json
) -> None:
    talk.host.import_models([team])
    try:
        talk.host.grant_read(team["id"], "public")
        assert_icon(talk, team["id"])
        reply = await talk.ask("Shall we keep bees?", team["id"])
        seats = team["params"]["custom_params"]["team"].split("; ")
        names = [seat.split(" | ")[0] for seat in seats]
        spoke = [name for name in names if any(name in h for h in headings(reply))]
        assert spoke == names
        assert "cannot" not in reply.text and "Team line" not in reply.text
    finally:
        talk.host.delete_model(team["id"])


def assert_icon(talk: Talk, model_id: str) -> None:
    """The host serves this model's own picture, and not its default."""
    answer = httpx.get(
        f"{talk.host.url}/api/v1/models/model/profile/image?id={model_id}",
        headers={"Authorization": f"Bearer {talk.account.token}"},
        trust_env=False,
    )
    assert answer.headers["content-type"] == "image/png"
