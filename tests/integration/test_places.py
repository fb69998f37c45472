"""Where else people meet it: in a channel, over a note, by a shared link."""

from collections.abc import Iterator

import pytest

from tests.integration.talk import ROUND_ROBIN, Talk, headings, reached
from tests.stack.host import Json
from tests.stack.waiting import wait_until


@pytest.fixture
def channels(talk: Talk) -> Iterator[str]:
    """A channel of the administrator's."""
    talk.account = talk.host.admin
    with talk.host.configured({"channels.enable": True}):
        made = talk.host.request("POST", "/api/v1/channels/create", {"name": "garden"})
        yield f"/api/v1/channels/{made['id']}"
        talk.host.request("DELETE", f"/api/v1/channels/{made['id']}/delete")


async def test_who_is_mentioned_in_a_channel_answers_with_all_its_voices(
    talk: Talk, channels: str
) -> None:
    talk.seat("Ann | alice", "Ben | bob")
    content = f"<@M:{ROUND_ROBIN}|Round Robin> Shall we plant oaks?"
    asked = talk.host.request("POST", f"{channels}/messages/post", {"content": content})

    def answer() -> str:
        thread = talk.host.request("GET", f"{channels}/messages/{asked['id']}/thread")
        said = [each["content"] for each in thread if each["meta"]]
        return str(said[0]) if said else ""

    await reached(lambda: wait_until(lambda: "🔴 Ben" in answer(), 30, "Ben answers"))
    await talk.freed()
    assert answer().index("🔵 Ann") < answer().index("🔴 Ben")
    assert "Shall we plant oaks?" in talk.models.turns("bob")[0].text


async def test_a_note_beside_the_question_reaches_everybody(talk: Talk) -> None:
    talk.seat("Ann | alice", "Ben | bob")
    data = {"content": {"md": "The oaks were planted in 1907.", "html": "", "json": {}}}
    note: Json = {"title": "Oaks", "data": data}
    stored = talk.host.request(
        "POST", "/api/v1/notes/create", note, account=talk.account
    )
    file = {"type": "note", "id": stored["id"], "name": "Oaks"}
    await talk.ask("When were the oaks planted?", files=[file])
    for seen in talk.models.turns():
        assert seen.text.count("planted in 1907") == 1


async def test_who_opens_a_shared_chat_sees_what_was_said_and_by_whom(
    talk: Talk,
) -> None:
    talk.seat("Ann | alice", "Ben | bob")
    reply = await talk.ask("Shall we plant oaks?")
    path = f"/api/v1/chats/{reply.chat.id}/share"
    shared = talk.host.request("POST", path, {}, account=talk.account)
    read = talk.host.request("GET", f"/api/v1/chats/share/{shared['share_id']}")
    message = read["chat"]["history"]["messages"][reply.id]
    stored = talk.host.stored(talk.account, reply.chat.id or "", reply.id)
    assert message["output"] == stored["output"]
    assert headings(reply) == ["🔵 Ann", "🔴 Ben"]
