"""Tools: whoever may call one, whatever goes wrong, each call gets one result."""

import asyncio
import json

import pytest

from tests.integration.talk import (
    MANAGER,
    ROUND_ROBIN,
    Talk,
    ask,
    finish,
    items,
    kinds,
    results,
    system_of,
    tool_names,
)
from tests.stack.host import Json
from tests.stack.page import Call, Reply
from tests.stack.prompts import offered_tools, text_of
from tests.stack.scripts import Body, Script, Text, ToolCall
from tests.versions import APPROVES, KEEPS_BOTH


def tool_messages(messages: list[Json]) -> list[str]:
    """What tools gave, as a model was sent it."""
    return [str(m["content"]) for m in messages if m["role"] == "tool"]


def assert_calls_match(messages: list[Json]) -> None:
    """Every tool message answers a call of the assistant message before it."""
    open_calls: list[str] = []
    for message in messages:
        if message["role"] == "tool":
            assert message["tool_call_id"] == open_calls.pop(0)
        else:
            assert not open_calls
            open_calls = [call["id"] for call in message.get("tool_calls") or ()]
    assert not open_calls


async def use(talk: Talk, model: str, question: str, tools: str) -> Reply:
    """One participant's turn with tools; what a card says is what the model read."""
    talk.seat(f"Tim | {model}", "Ben | bob")
    reply = await talk.ask(question, tool_ids=[tools])
    last = talk.models.turns(model)[-1].messages
    assert_calls_match(last)
    assert sorted(tool_messages(last)) == sorted(results(reply))
    assert "tool_calls" not in str(talk.sent("bob"))
    assert "Bob here." in reply.text
    return reply


async def test_the_chats_tools_are_every_participants(talk: Talk, garden: str) -> None:
    reply = await use(talk, "toolie", 'Use look_up. ARGS: {"topic": "oaks"}', garden)
    assert results(reply) == ["The almanac on oaks: 3 lines."]
    first, second = talk.models.turns("toolie")
    assert "look_up" in tool_names(first) and "look_up" in tool_names(second)
    assert "look_up" in tool_names(talk.models.turns("bob")[0])
    assert "You have tools" in system_of(first.messages)
    (call,) = items(reply, "function_call")
    assert call["name"] == "look_up" and call["status"] == "completed"
    assert json.loads(call["arguments"]) == {"topic": "oaks"}
    assert kinds(reply)[:4] == ["message", "message"] + [
        "function_call",
        "function_call_output",
    ]
    said = "Let me look that up.\n\nToolie here."
    assert said in talk.sent("bob")[-1]["content"]


async def test_arguments_are_shown_while_they_stream(talk: Talk, garden: str) -> None:
    talk.seat("Tim | toolie")
    question = 'Use look_up. ARGS: {"topic": "oaks and birches in a wet meadow"}'
    async with talk.page() as page:
        with talk.models.hold("toolie", after=8):
            reply = await page.send(
                ROUND_ROBIN, question, tool_ids=[garden], background_tasks={}
            )
            await reply.wait_for(
                lambda r: any("{" in i["arguments"] for i in items(r, "function_call"))
            )
            (card,) = items(reply, "function_call")
            assert card["status"] == "in_progress"
            assert not items(reply, "function_call_output")
            assert card["arguments"] in question
        await finish(page, reply)
    assert results(reply) == [
        "The almanac on oaks and birches in a wet meadow: 3 lines."
    ]


async def test_a_participants_own_model_brings_its_own_tools(
    talk: Talk, garden: str
) -> None:
    with talk.workspace_model("gardener", "toolie", meta={"toolIds": [garden]}):
        talk.seat("Tim | gardener", "Ben | bob")
        reply = await talk.ask('Use look_up. ARGS: {"topic": "oaks"}')
    assert results(reply) == ["The almanac on oaks: 3 lines."]
    assert not tool_names(talk.models.turns("bob")[0])


async def test_earlier_calls_and_results_are_sent_again_as_such(
    talk: Talk, garden: str
) -> None:
    talk.seat("Tim | toolie", "Ben | bob", rounds=2)
    async with talk.page() as page:
        question = 'Use look_up. ARGS: {"topic": "oaks"}'
        first = await ask(page, question, tool_ids=[garden])
        before = talk.models.turns("toolie")[-1].messages
        await ask(page, "And maples?", chat=first.chat, tool_ids=[garden])
    later = talk.models.turns("toolie")[-1].messages
    for earlier, kept in zip(before, later, strict=False):
        assert json.dumps(kept) == json.dumps(earlier)
    assert_calls_match(later)
    assert tool_messages(later)[0] == "The almanac on oaks: 3 lines."


async def test_the_calls_of_one_reply_run_at_the_same_time(
    talk: Talk, garden: str
) -> None:
    talk.admin_sets(tool_timeout=10)
    reply = await use(talk, "toolie-two", "Use meet.", garden)
    assert results(reply) == ["we met", "we met"]


async def test_at_most_four_calls_of_one_reply_run_at_once(
    talk: Talk, garden: str
) -> None:
    def crowds(body: Body) -> Script:
        if any(message["role"] == "tool" for message in body["messages"]):
            return Script([Text("They were all there.")])
        return Script([ToolCall("crowd", index=at) for at in range(6)])

    talk.add_model("toolie-crowd", crowds)
    reply = await use(talk, "toolie-crowd", "Use crowd.", garden)
    assert len(results(reply)) == 6 and max(results(reply)) == "4 at once"


async def test_after_the_most_tool_rounds_no_tools_are_offered(
    talk: Talk, garden: str
) -> None:
    talk.admin_sets(max_tool_rounds=2)
    reply = await use(talk, "toolie-loop", 'Use look_up. ARGS: {"topic": "a"}', garden)
    offered = [bool(tool_names(seen)) for seen in talk.models.turns("toolie-loop")]
    assert offered == [True, True, False]
    assert len(results(reply)) == 2
    assert "No tools are left, so this is the answer." in reply.text


@pytest.mark.parametrize(
    ("model", "question", "reason"),
    [
        ("toolie-unknown", "Use anything.", 'no tool "no_such_tool"'),
        ("toolie-broken", "Use look_up.", "must be one JSON object"),
        ("toolie", 'Use look_up. ARGS: {"topic": 5}', "must be of type string"),
        ("toolie", 'Use look_up. ARGS: {"topic": "a", "limit": "x"}', "type integer"),
        ("toolie", "Use look_up. ARGS: {}", "needs topic"),
        ("toolie", "Use look_up. ARGS: [1]", "must be one JSON object"),
        ("toolie", "Use breaks.", "The shed is locked."),
        ("toolie", "Use never_ends.", "took longer than 0.5 s"),
    ],
)
async def test_a_call_that_fails_has_one_result_that_says_so(
    talk: Talk, garden: str, model: str, question: str, reason: str
) -> None:
    talk.admin_sets(tool_timeout=0.5)
    reply = await use(talk, model, question, garden)
    (result,) = results(reply)
    assert result.startswith("Error: ") and reason in result
    assert "The tool says" in reply.text and "⚠️" not in reply.text


async def test_arguments_a_tool_does_not_know_are_left_out(
    talk: Talk, garden: str
) -> None:
    question = 'Use look_up. ARGS: {"topic": "oaks", "colour": "red"}'
    reply = await use(talk, "toolie", question, garden)
    assert results(reply) == ["The almanac on oaks: 3 lines."]


@pytest.mark.parametrize("model", ["toolie-index0", "toolie-noindex", "toolie-mixed"])
async def test_calls_are_told_apart_however_they_are_numbered(
    talk: Talk, garden: str, model: str
) -> None:
    question = 'Use look_up. ARGS: {"topic": "oaks"}'
    reply = await use(talk, model, question, garden)
    assert results(reply) == ["The almanac on oaks: 3 lines."] * 2


async def test_objects_glued_into_one_call_are_calls_of_their_own(
    talk: Talk, garden: str
) -> None:
    def glues(body: Body) -> Script:
        if any(message["role"] == "tool" for message in body["messages"]):
            return Script([Text("Both are here.")])
        return Script([ToolCall("look_up", '{"topic": "a"}{"topic": "b"}')])

    talk.add_model("toolie-glued", glues)
    reply = await use(talk, "toolie-glued", "Use look_up.", garden)
    assert results(reply) == [
        "The almanac on a: 3 lines.",
        "The almanac on b: 3 lines.",
    ]


async def test_a_tool_knows_the_user_and_the_conversation(
    talk: Talk, garden: str
) -> None:
    reply = await use(talk, "toolie", "Use who_asks.", garden)
    assert results(reply) == ["Uma User, 2 messages"]


@KEEPS_BOTH
async def test_what_tools_show_reaches_the_page(talk: Talk, garden: str) -> None:
    def uses_all(body: Body) -> Script:
        if any(message["role"] == "tool" for message in body["messages"]):
            return Script([Text("All done.")])
        names = ("tell", "draw_page", "draw_image", "attach", "cite")
        return Script([ToolCall(name, index=at) for at, name in enumerate(names)])

    talk.add_model("toolie-all", uses_all)
    talk.seat("Tim | toolie-all", "Ben | bob")
    async with talk.page() as page:
        reply = await ask(page, "Use all of them.", tool_ids=[garden])
        stored = await page.stored(reply.chat.id or "", reply.id)
    tell, drawn_page, drawn_image, attach, cite = results(reply)
    assert (tell, attach, cite) == ("dug", "attached", "Oaks live long.")
    assert "The gardener digs." in [s["description"] for s in reply.statuses]
    assert "Embedded UI result is active" in drawn_page
    outputs = items(reply, "function_call_output")
    assert [one.get("embeds") for one in outputs if one.get("embeds")] == [
        ["<h1>The plan</h1>"]
    ]
    assert "data:image" not in drawn_image
    (image,) = (one["files"][0] for one in outputs if one.get("files"))
    assert image["type"] == "image" and image["url"]
    assert [file["name"] for file in reply.files] == ["plan.txt"]
    assert [s["source"]["name"] for s in reply.sources] == ["The Almanac"]
    assert stored["files"] == reply.files and stored["sources"] == reply.sources
    parts = talk.models.turns("toolie-all")[-1].messages[-1]["content"]
    assert parts[1]["image_url"]["url"].startswith("data:image/png;base64,")


# -- approval --------------------------------------------------------------------------

ASKS = {"chat.tool_permissions.enable": True}


@APPROVES
@pytest.mark.parametrize(
    ("answer", "expected"),
    [
        (True, "The almanac on oaks: 3 lines."),
        (False, "Error: the user did not approve this tool call."),
        ({"error": "no page"}, "Error: the user did not approve this tool call."),
    ],
)
async def test_a_call_runs_only_if_the_user_says_yes(
    talk: Talk, garden: str, answer: object, expected: str
) -> None:
    talk.seat("Tim | toolie", "Ben | bob")
    with talk.host.configured(ASKS):
        async with talk.page() as page:
            page.on_call("confirmation", lambda call: answer)
            reply = await ask(
                page,
                'Use look_up. ARGS: {"topic": "oaks"}',
                tool_ids=[garden],
                params={"tool_approval_mode": "ask"},
            )
    (call,) = page.calls
    asked = call.data["tool_call"]
    assert asked["name"] == "look_up" and asked["arguments"] == {"topic": "oaks"}
    assert asked["id"]
    assert results(reply) == [expected]
    assert tool_messages(talk.models.turns("toolie")[-1].messages) == [expected]


@APPROVES
async def test_stop_takes_an_unanswered_question_back(talk: Talk, garden: str) -> None:
    async def never(call: Call) -> None:
        await asyncio.Event().wait()

    talk.seat("Tim | toolie", "Ben | bob")
    with talk.host.configured(ASKS):
        async with talk.page() as page:
            page.on_call("confirmation", never)
            reply = await page.send(
                ROUND_ROBIN,
                'Use look_up. ARGS: {"topic": "oaks"}',
                tool_ids=[garden],
                params={"tool_approval_mode": "ask"},
                background_tasks={},
            )
            await reply.wait_for(lambda _: page.calls)
            await page.stop(reply)
            await finish(page, reply)
            async with asyncio.timeout(10):
                await page.calls[0].closed.wait()
    (result,) = results(reply)
    assert result.startswith("Error: ")
    assert talk.order() == ["toolie"]


async def test_nobody_is_asked_where_the_admin_does_not_allow_asking(
    talk: Talk, garden: str
) -> None:
    talk.seat("Tim | toolie")
    async with talk.page() as page:
        reply = await ask(
            page,
            'Use look_up. ARGS: {"topic": "oaks"}',
            tool_ids=[garden],
            params={"tool_approval_mode": "ask"},
        )
    assert not page.calls
    assert results(reply) == ["The almanac on oaks: 3 lines."]


# -- legacy models ---------------------------------------------------------------------


async def test_a_legacy_model_uses_tools_by_prompt_as_the_host_does_it(
    talk: Talk, garden: str
) -> None:
    def picks(body: Body) -> Script:
        if "Available Tools" in text_of(body["messages"][0]):
            call = {"name": "look_up", "parameters": {"topic": "oaks"}}
            return Script([Text(json.dumps({"tool_calls": [call]}))])
        assert not offered_tools(body)
        return Script([Text("Lou here, with what I know.")])

    talk.add_model("picks", picks)
    params = {"function_calling": "legacy"}
    with talk.workspace_model("old", "picks", params=params):
        talk.seat("Lou | old", "Ben | bob")
        reply = await talk.ask("What of oaks?", tool_ids=[garden])
    assert "Lou here, with what I know." in reply.text
    picking, answering = talk.models.turns("picks")
    assert "look_up" in picking.text
    assert "The almanac on oaks: 3 lines." in answering.text
    assert not tool_names(answering)
    assert not items(reply, "function_call")
    assert "look_up" in tool_names(talk.models.turns("bob")[0])
    assert any("look_up" in str(source) for source in reply.sources)


# -- the host's own tools --------------------------------------------------------------


async def test_by_default_nobody_gets_the_hosts_own_tools(talk: Talk) -> None:
    talk.seat("Ann | alice", "Ben | bob")
    await talk.ask("Oaks or birches?")
    await talk.ask("Oaks or birches?", MANAGER)
    assert not any(tool_names(seen) for seen in talk.models.turns())


async def test_a_feature_switched_on_in_the_chat_brings_its_tools(talk: Talk) -> None:
    talk.seat("Ann | alice", "Ben | bob")
    await talk.ask("Oaks or birches?", features={"code_interpreter": True})
    for seen in talk.models.turns():
        assert tool_names(seen) == ["execute_code"]


async def test_a_model_that_cannot_use_a_feature_does_not_get_its_tools(
    talk: Talk,
) -> None:
    meta = {"capabilities": {"code_interpreter": False}}
    with talk.workspace_model("no-code", "alice", meta=meta):
        talk.seat("Ann | no-code", "Ben | bob")
        await talk.ask("Oaks or birches?", features={"code_interpreter": True})
    ann, ben = talk.models.turns()
    assert not tool_names(ann) and tool_names(ben) == ["execute_code"]


@pytest.mark.parametrize(("wanted", "most"), [("all", True), ("none", False)])
async def test_the_admin_may_give_all_of_the_hosts_tools_or_none(
    talk: Talk, wanted: str, most: bool
) -> None:
    talk.admin_sets(builtin_tools=wanted)
    talk.seat("Ann | alice")
    await talk.ask("Oaks or birches?", features={"code_interpreter": True})
    names = tool_names(talk.models.turns("alice")[0])
    assert ("get_current_timestamp" in names) is most
    assert "ask_user" not in names
    assert (len(names) > 5) is most


async def test_attached_knowledge_brings_its_tools_and_its_name(talk: Talk) -> None:
    text = "Oaks of this garden were planted in 1907."
    knowledge = talk.host.create_knowledge("Garden book", {"oaks.txt": text})
    attached = {**knowledge, "type": "collection"}
    with talk.workspace_model("reader", "toolie", meta={"knowledge": [attached]}):
        talk.seat("Ria | reader", "Ben | bob")
        reply = await talk.ask(
            'Use query_knowledge_files. ARGS: {"query": "When were oaks planted?"}'
        )
    assert "1907" in results(reply)[0]
    assert "Garden book" in system_of(talk.sent("toolie"))
    assert not tool_names(talk.models.turns("bob")[0])
    assert any("oaks.txt" in str(source) for source in reply.sources)
