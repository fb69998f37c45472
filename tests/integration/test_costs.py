"""What a run costs the host, counted inside it."""

from functools import partial

import pytest

from tests.integration.talk import MANAGER, ROUND_ROBIN, Talk, reached
from tests.stack.host import Counts, difference
from tests.versions import SMALL_EVENTS

TEAM = [f"P{number} | {model}" for number, model in enumerate(["toolie", "alice"] * 2)]
TEAM.append("P4 | carol")


async def cost(
    talk: Talk, question: str, model: str, tools: list[str]
) -> tuple[Counts, int]:
    """What one question costs, from a quiet host to a quiet host; its status lines."""
    before = await reached(talk.host.settled_counts)
    reply = await talk.ask(question, model, tool_ids=tools)
    counts: Counts = await reached(talk.host.settled_counts) - before
    return counts, len(reply.statuses)


@pytest.mark.parametrize(("model", "a_turn"), [(ROUND_ROBIN, 0), (MANAGER, 1)])
async def test_look_ups_do_not_grow_with_rounds_and_tool_calls(
    talk: Talk, garden: str, model: str, a_turn: int
) -> None:
    question = 'Use look_up. ARGS: {"topic": "oaks"}'
    costs = []
    for rounds in (1, 4):
        talk.models.clear()
        talk.seat(*TEAM, rounds=rounds, manager_model="manager")
        costs.append(await cost(talk, question, model, [garden]))
        spoken = [seen for seen in talk.models.turns() if seen.model != "manager"]
        assert len(spoken) >= 5 * rounds + 2
    (one, lines), (four, more_lines) = costs
    assert more_lines - lines == 15 * a_turn
    assert one.lookups["Models.get_models_by_ids"] == 1
    grown = difference(four.lookups, one.lookups)
    # At each write of a status line or a checkpoint the host looks where the chat is.
    writes = grown.pop("Chats.get_current_message_id")
    assert not grown and writes <= 15 * (1 + a_turn)


async def test_writes_do_not_grow_with_tokens(talk: Talk) -> None:
    costs = []
    # turns of a quarter of a second each: faster ones share a write
    for model in ("tokens-50-200", "tokens-400-1600"):
        talk.add_model(model)
        talk.seat(f"Ann | {model}", f"Ben | {model}")
        costs.append(await cost(talk, "Talk.", ROUND_ROBIN, []))
    (few, _), (many, _) = costs
    one_checkpoint = 2  # statements, of which the last turn may have none
    assert abs(many.writes - few.writes) <= one_checkpoint


@SMALL_EVENTS
async def test_a_long_answer_reaches_the_page_in_few_small_events(talk: Talk) -> None:
    talk.add_model("tokens-2000-0")
    talk.seat("Ann | tokens-2000-0", "Ben | tokens-2000-0")
    reply = await talk.ask("Talk.")
    assert len(reply.text) > 15_000
    assert reply.size < 4 * len(reply.text)
    assert len(reply.events) < 1_000


async def test_memory_in_use_is_what_is_kept(talk: Talk) -> None:
    taken = partial(talk.host.counts, memory=True)
    before = (await reached(taken)).memory
    talk.seat("Ann | alice", "Ben | bob")
    for _ in range(3):
        await talk.ask("Talk.")
    kept = (await reached(taken)).memory - before
    assert before > 10_000_000
    assert abs(kept) < before / 10
    assert (await reached(talk.host.counts)).memory == 0
