"""A long conversation on models that take little at a time, on the real server."""

import re
from itertools import pairwise

from tests.integration.talk import Talk, ask, headings
from tests.stack.behaviours import NATURAL
from tests.stack.prompts import whole_text
from tests.stack.scripts import Behaviour, Body, Script, Status, Text

MOST = 8000  # tokens
LEFT_OUT = re.compile(r"\(\d+ earlier turns? w\w+ left out here\)")
SAID = "Oaks live for a thousand years, and birches hardly for a hundred. " * 24


def forgetful(name: str) -> Behaviour:
    """A model that takes no prompt above its limit; four characters are a token."""

    def behave(body: Body) -> Script:
        tokens = len(whole_text(body)) // 4
        if tokens > MOST:
            message = f"This model's maximum context length is {MOST} tokens. However, "
            message += f"your messages resulted in {tokens} tokens."
            error = {"message": message, "code": "context_length_exceeded"}
            return Script([Status(400, {"error": error})])
        return Script([Text(f"{name} here. {SAID}")], style=NATURAL)

    return behave


async def test_sixty_turns_run_on_models_of_eight_thousand_tokens(talk: Talk) -> None:
    models = ("small-oak", "small-elm", "small-fir")
    for model in models:
        talk.add_model(model, forgetful(model))
    talk.seat("A | small-oak", "B | small-elm", "C | small-fir", rounds=10)
    async with talk.page() as page:
        first = await ask(page, "Which tree lives longer?")
        second = await ask(page, "And which one grows faster?", chat=first.chat)
    for reply in (first, second):
        assert len(headings(reply)) == 30
        assert "⚠️" not in reply.text and reply.error is None
    sent = talk.models.turns()
    texts = [whole_text(seen.chat) for seen in sent]
    refused = [
        seen.model
        for seen, text in zip(sent, texts, strict=True)
        if len(text) // 4 > MOST
    ]
    # each learns its limit once a conversation: at its end nothing is kept of it
    assert sorted(refused) == sorted(models * 2) and len(sent) == 66
    for text in texts[-3:]:
        assert "And which one grows faster?" in text and "Which tree lives" in text
    cuts = [LEFT_OUT.findall(text) for text in texts[-27:]]
    moves = [cut for cut, next_cut in pairwise(cuts) if cut != next_cut]
    assert all(cuts) and len(moves) <= 9  # it stays where it is for some turns
