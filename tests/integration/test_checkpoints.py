"""What is stored while a conversation goes on: where, how often, and never too late."""

import sqlite3
from collections.abc import Iterator
from contextlib import closing, contextmanager
from functools import partial
from pathlib import Path

import pytest

from tests.integration.talk import (
    ROUND_ROBIN,
    Talk,
    ask,
    assert_stored,
    finish,
    reached,
    stored_row,
)
from tests.stack.host import Account, OpenWebUI
from tests.stack.page import Page, Reply
from tests.stack.structured_output import get_output_text
from tests.versions import SHARES

QUESTION = "Which tree?"
SAVED = "This is what was saved"
TURNS = 8  # more in four rounds than in two, of four
OF_HOST = 2  # writes of the host's own at any time: who was last seen when


async def writes(talk: Talk, rounds: int, model: str, temporary: bool = False) -> int:
    """How often a conversation of four writes to the database."""
    talk.seat(*(f"{name} | {model}" for name in ("Ann", "Ben", "Cy", "Di")))
    before = await reached(talk.host.settled_counts)
    async with talk.page() as page:
        extra = {"rounds": rounds}
        reply = await page.ask(
            ROUND_ROBIN, QUESTION, background_tasks={}, extra=extra, temporary=temporary
        )
        await reply.wait_idle()
    after = await reached(talk.host.settled_counts)
    return int((after - before).writes)


async def test_a_turn_is_one_write_whatever_is_said(talk: Talk) -> None:
    grown = []
    for model in ("tokens-20-0", "tokens-600-0"):
        talk.add_model(model)
        two, four = [await writes(talk, rounds, model) for rounds in (2, 4)]
        grown.append(four - two)
    assert all(TURNS <= more <= 2.5 * TURNS for more in grown), grown


async def test_a_temporary_chat_is_not_stored(talk: Talk) -> None:
    few = await writes(talk, 1, "alice", temporary=True)
    assert await writes(talk, 4, "alice", temporary=True) <= few + OF_HOST


async def test_what_an_api_client_asks_is_not_stored(talk: Talk) -> None:
    talk.seat("Ann | alice", "Ben | bob")
    written = []
    question = {"role": "user", "content": QUESTION}
    request = partial(talk.host.request, "POST", "/api/chat/completions")
    for rounds in (1, 4):
        body = {"model": ROUND_ROBIN, "messages": [question], "rounds": rounds}
        before = await reached(talk.host.settled_counts)
        await reached(partial(request, body, account=talk.account))
        after = await reached(talk.host.settled_counts)
        written.append((after - before).writes)
    assert abs(written[0] - written[1]) <= OF_HOST
    assert len(talk.models.turns()) == 10


async def share(host: OpenWebUI, reply: Reply, guest: Account) -> None:
    """Let a guest write in the administrator's chat."""
    chat_id = reply.chat.id
    host.request("POST", f"/api/v1/chats/{chat_id}/share", {"share_mode": "continue"})
    who = {"principal_type": "user", "principal_id": guest.id}
    grants = [who | {"permission": kind} for kind in ("read", "write")]
    form = {"access_grants": grants, "share_mode": "continue"}
    host.request("POST", f"/api/v1/chats/shared/{chat_id}/access/update", form)


@SHARES
async def test_a_guest_in_a_chat_leaves_it_alone_until_the_end(
    talk: Talk, host: OpenWebUI, admin: Account
) -> None:
    talk.seat("Ann | alice", "Ben | bob", "Cy | carol")
    talk.seat("Ann | alice", "Ben | bob", account=admin)
    async with talk.page(admin) as theirs:
        first = await ask(theirs, QUESTION)
    await share(host, first, talk.account)
    async with talk.page() as page:
        chat = await page.open(first.chat.id or "")
        with talk.models.hold("carol", after=3) as hold:
            reply = await page.send(ROUND_ROBIN, "Why?", chat=chat, background_tasks={})
            await reached(hold.wait_until_reached)
            await reached(host.settled_counts)
            assert "Bob here." in reply.text
            assert not stored_row(host.data_dir, reply).get("output")
        await finish(page, reply)
    assert "Carol here." in str(stored_row(host.data_dir, reply)["output"])


@pytest.mark.parametrize("model", ["alice", "toolie"])
async def test_nothing_is_saved_after_the_end(
    talk: Talk, garden: str, model: str
) -> None:
    talk.seat(f"Ann | {model}", f"Ben | {model}")
    replies = []
    async with talk.page() as page:
        for _ in range(12):
            replies.append(await ask(page, QUESTION, tool_ids=[garden]))
        await reached(talk.host.settled_counts)
        for reply in replies:
            await assert_ended(talk, page, reply)


async def assert_ended(talk: Talk, page: Page, reply: Reply) -> None:
    """What is stored is what was shown at the end, and no checkpoint."""
    assert SAVED not in reply.text
    stored = await assert_stored(page, reply)
    assert stored["output"] == stored_row(talk.host.data_dir, reply)["output"]


LONG_AGO = 1  # when a chat was last changed whose changes the database refuses


@contextmanager
def no_save_of_the_host(data_dir: Path) -> Iterator[sqlite3.Connection]:
    """Saves fail that change when the chat was changed: those of the host, not ours."""
    with closing(sqlite3.connect(data_dir / "webui.db", timeout=30)) as database:
        database.execute(
            "CREATE TRIGGER refuse BEFORE UPDATE OF updated_at ON chat "
            f"WHEN OLD.updated_at = {LONG_AGO} BEGIN SELECT RAISE(ABORT, 'no'); END"
        )
        database.commit()
        try:
            yield database
        finally:
            database.execute("DROP TRIGGER refuse")
            database.commit()


async def test_all_is_stored_where_the_save_of_the_host_fails(talk: Talk) -> None:
    talk.seat("Ann | alice", "Ben | bob")
    with no_save_of_the_host(talk.host.data_dir) as database:
        async with talk.page() as page:
            with talk.models.hold("bob", after=1) as hold:
                reply = await page.send(ROUND_ROBIN, QUESTION, background_tasks={})
                await reached(hold.wait_until_reached)
                change = f"UPDATE chat SET updated_at = {LONG_AGO} WHERE id = ?"
                database.execute(change, [reply.chat.id])
                database.commit()
            await finish(page, reply)
        changed = database.execute("SELECT updated_at FROM chat ORDER BY 1").fetchone()
    stored = stored_row(talk.host.data_dir, reply)
    assert changed == (LONG_AGO,) and stored["done"]
    assert get_output_text(stored["output"]) == reply.text
    assert SAVED not in reply.text and "Bob here." in reply.text
