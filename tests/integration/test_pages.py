"""Pages that leave, come back, or watch; files, and tools that live in the page."""

from tests.conftest import FUNCTION_ID
from tests.integration.talk import (
    ROUND_ROBIN,
    Talk,
    ask,
    assert_stored,
    finish,
    headings,
    last_status,
    reached,
    results,
    tool_names,
)
from tests.stack.host import Json
from tests.stack.page import Call, Page
from tests.stack.structured_output import get_output_text
from tests.stack.waiting import wait_until_async

QUESTION = "Should we plant oaks or birches?"


async def test_a_run_goes_on_when_its_page_leaves(talk: Talk) -> None:
    talk.seat("Ann | alice", "Ben | bob", "Cy | carol")
    with talk.models.hold("bob", after=3) as hold:
        async with Page(talk.host, talk.account) as page:
            reply = await page.send(ROUND_ROBIN, QUESTION, background_tasks={})
            await reached(hold.wait_until_reached)
    chat_id = reply.chat.id or ""

    def stored() -> Json:
        return talk.host.stored(talk.account, chat_id, reply.id)

    await wait_until_async(lambda: stored().get("done"), 20, "the answer is stored")
    text = get_output_text(stored()["output"])
    assert "Bob here." in text and "Carol here." in text
    assert talk.models.aborted == []


async def test_a_page_that_comes_back_sees_the_text_so_far_and_the_rest(
    talk: Talk,
) -> None:
    talk.seat("Ann | alice", "Ben | bob", "Cy | carol")
    async with talk.page() as first, talk.page() as second:
        with talk.models.hold("bob", after=3) as hold:
            reply = await first.send(ROUND_ROBIN, QUESTION, background_tasks={})
            await reached(hold.wait_until_reached)
            await reply.wait_for(lambda r: "Bob here. On" in r.text)
            chat = await second.open(reply.chat.id or "")
            again = second.reply(chat.current_id or "")
            assert headings(again)[:1] == ["🔵 Ann"] and "Alice here." in again.text
        await finish(first, reply)
        await again.wait_done()
        await assert_stored(second, again)
    assert again.text == reply.text
    assert headings(again) == ["🔵 Ann", "🔴 Ben", "🟢 Cy"]


async def test_a_page_that_comes_back_can_stop_the_run(talk: Talk) -> None:
    talk.seat("Ann | alice", "Ben | bob")
    async with talk.page() as first, talk.page() as second:
        with talk.models.hold("bob", after=3) as hold:
            reply = await first.send(ROUND_ROBIN, QUESTION, background_tasks={})
            await reached(hold.wait_until_reached)
            chat = await second.open(reply.chat.id or "")
            await second.stop(second.reply(chat.current_id or ""))
            await talk.freed("bob")
        await finish(first, reply)
    assert last_status(reply).startswith("Stopped")


async def test_an_attached_files_text_reaches_everybody(talk: Talk) -> None:
    talk.seat("Ann | alice", "Ben | bob")
    text = b"The oaks of this garden were planted in 1907."
    upload = {"file": ("oaks.txt", text, "text/plain")}
    options = {"process": "true", "process_in_background": "false"}
    stored = talk.host.request(
        "POST", "/api/v1/files/", files=upload, params=options, account=talk.account
    )
    file = {"type": "file", "id": stored["id"], "name": "oaks.txt", "file": stored}
    reply = await talk.ask("When were the oaks planted?", files=[file])
    assert talk.order() == ["alice", "bob"]
    for seen in talk.models.turns():
        assert seen.text.count("planted in 1907") == 1
    assert any("oaks.txt" in str(source) for source in reply.sources)


async def test_a_tool_server_of_the_page_is_asked_in_the_page(talk: Talk) -> None:
    talk.account = talk.host.admin
    talk.seat("Tim | toolie", "Ben | bob")
    spec = {
        "name": "read_clock",
        "description": "Reads the clock of this page.",
        "parameters": {
            "type": "object",
            "properties": {"zone": {"type": "string"}},
            "required": ["zone"],
        },
    }
    server = {"url": "http://page.example", "info": {}, "openapi": {}, "specs": [spec]}
    asked: list[Json] = []

    def run_tool(call: Call) -> Json:
        asked.append(call.data)
        return {"time": "noon in " + call.data["params"]["zone"]}

    with talk.host.configured({"direct.integrations.enable": True}):
        async with talk.page() as page:
            page.on_call("execute:tool", run_tool)
            reply = await ask(
                page,
                'Use read_clock. ARGS: {"zone": "Rome"}',
                extra={"tool_servers": [server]},
            )
    assert [call["name"] for call in asked] == ["read_clock"]
    assert asked[0]["server"]["url"] == "http://page.example"
    (result,) = results(reply)
    assert "noon in Rome" in result
    assert tool_names(talk.models.turns("bob")[0]) == ["read_clock"]


async def test_a_model_may_be_used_through_a_group(talk: Talk) -> None:
    host = talk.host
    group = host.request(
        "POST", "/api/v1/groups/create", {"name": "Foresters", "description": ""}
    )
    members = {"user_ids": [talk.account.id]}
    host.request("POST", f"/api/v1/groups/id/{group['id']}/users/add", members)
    grants = [
        {"principal_type": "group", "principal_id": group["id"], "permission": "read"}
    ]
    form = {"id": "erin", "name": "erin", "access_grants": grants}
    host.request("POST", "/api/v1/models/model/access/update", form)
    host.models()
    path = f"/api/v1/functions/id/{FUNCTION_ID}/valves/user/spec"
    stranger = host.add_user("Sam Stranger")
    talk.seat(participants=["erin", "bob"])
    try:
        reply = await talk.ask(QUESTION)
        mine, theirs = (
            str(host.request("GET", path, account=account))
            for account in (talk.account, stranger)
        )
    finally:
        host.request("DELETE", f"/api/v1/groups/id/{group['id']}/delete")
        host.grant_read("erin", "public")
    assert talk.order() == ["erin", "bob"] and "⚠️" not in reply.text
    assert "'erin'" in mine and "'erin'" not in theirs


async def test_the_hosts_default_parameters_are_the_least_important(
    talk: Talk,
) -> None:
    defaults = {"models.default_params": {"temperature": 0.33, "top_p": 0.44}}
    params = {"temperature": 0.1}
    with (
        talk.workspace_model("cool", "alice", params=params),
        talk.host.configured(defaults),
    ):
        talk.seat("Ann | cool", "Ben | bob", top_p=0.5)
        await talk.ask(QUESTION)
    ann, ben = (seen.body for seen in talk.models.turns())
    assert (ann["temperature"], ben["temperature"]) == (0.1, 0.33)
    assert (ann["top_p"], ben["top_p"]) == (0.5, 0.5)


async def test_a_chat_set_to_legacy_tools_works(talk: Talk, garden: str) -> None:
    talk.seat("Ann | alice", "Ben | bob")
    reply = await talk.ask(
        QUESTION, tool_ids=[garden], params={"function_calling": "legacy"}
    )
    assert reply.error is None and headings(reply) == ["🔵 Ann", "🔴 Ben"]
    assert "⚠️" not in reply.text


async def test_rounds_below_one_are_one(talk: Talk) -> None:
    talk.seat("Ann | alice", "Ben | bob", rounds=-3)
    await talk.ask(QUESTION)
    assert talk.order() == ["alice", "bob"]
