"""Many conversations at once on one worker: each is whole, and none sees another.

`make soak` does the same with a hundred, beside a hundred native chats.
"""

from collections.abc import Iterator

import pytest

from tests.integration.crowd import LEAD, MARK, Plan, ask_all, of_crowd
from tests.integration.talk import reached
from tests.stack.host import Account, OpenWebUI
from tests.stack.models import ModelServer

PLAN = Plan(count=20, words=40, pace=20)
NATIVE = Plan(count=20, words=40, pace=20, native=True)


@pytest.fixture(scope="module")
def speakers(host: OpenWebUI, model_server: ModelServer) -> None:
    """The models of both plans, for everybody."""
    models = dict.fromkeys((*PLAN.models, *NATIVE.models))
    for model in models:
        model_server.add(model, of_crowd(model))
    host.models(refresh=True)
    for model in models:
        host.grant_read(model, "public")


@pytest.fixture(scope="module")
def users(host: OpenWebUI) -> Iterator[list[Account]]:
    """Four people."""
    yield [host.add_user(f"Load {name}") for name in ("One", "Two", "Three", "Four")]


@pytest.mark.usefixtures("speakers")
async def test_twenty_conversations_at_once_are_whole_and_apart(
    host: OpenWebUI, model_server: ModelServer, users: list[Account]
) -> None:
    native = await ask_all(host, users, NATIVE)
    assert native.problems == []
    model_server.clear()
    before = await reached(host.settled_counts)
    ours = await ask_all(host, users, PLAN)
    assert ours.problems == []
    assert ours.most >= 10
    prompts = [set(MARK.findall(seen.text)) for seen in model_server.turns()]
    assert len(prompts) >= 20 * 4
    assert all(len(marks) == 1 for marks in prompts)
    assert {seen.model for seen in model_server.turns()} == {PLAN.member, LEAD}
    await reached(lambda: model_server.wait_for(lambda m: m.in_flight == 0))
    after = await reached(host.settled_counts)
    assert after.tasks <= before.tasks + 2
