"""Sections 4 and 7: prompts stay inside what an admin and a model allow."""

import json
from dataclasses import replace
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from tests.unit.fakes import ScriptedHost, call, make_run, text, tool
from tests.unit.plugin import mmc

Json = dict[str, Any]
ALIASES = ("Ann", "Bob", "Cat")
LEFT_OUT = "left out here)"
IMAGE = {
    "type": "image_url",
    "image_url": {"url": "data:image/png;base64," + "A" * 9**6},
}


def turn(alias: str, said: str, *before: Json) -> mmc.Turn:
    return mmc.Turn(alias, said, (*before, {"role": "assistant", "content": said}))


def rounds(number: int, words: int = 100) -> list[mmc.Entry]:
    """So many rounds of three, each turn with its number and some 130 tokens."""
    return [
        turn(alias, f"Turn {at * 3 + seat}: " + "oak " * words)
        for at in range(number)
        for seat, alias in enumerate(ALIASES)
    ]


def words_of(entries: list[mmc.Entry]) -> list[str]:
    """What an entry begins with."""
    texts = [e.text if isinstance(e, mmc.Turn) else str(e.content) for e in entries]
    return [said.split(": ")[0] for said in texts]


# -- how many tokens -------------------------------------------------------------------


@pytest.mark.parametrize(
    ("said", "at_least"),  # as the tokenizers of today's models count them
    [
        ("The quick brown fox jumps over the lazy dog. " * 20, 200),
        ("for (let i = 0; i < n; i++) { total += values[i]; }\n" * 20, 400),
        ("今天天气很好，我们去公园散步吧。" * 20, 320),
        ("ꦲꦤꦕꦫꦏ" * 20, 130),
        ("Съешь же ещё этих мягких французских булок. " * 20, 340),
        ("🌳🌲🌴" * 20, 100),
    ],
)
def test_a_text_is_counted_as_rather_too_many_tokens(said: str, at_least: int) -> None:
    assert at_least <= mmc.tokens_of(said) <= 3 * at_least


def test_an_image_counts_by_what_it_costs_and_not_by_its_size() -> None:
    assert 1000 < mmc.tokens_of([IMAGE, IMAGE]) < 4000


@given(st.text(), st.text())
def test_more_text_never_counts_less(one: str, other: str) -> None:
    assert mmc.tokens_of(one + other) >= mmc.tokens_of(one)


# -- what is left out ------------------------------------------------------------------


def test_what_fits_stays_as_it_is() -> None:
    entries = [mmc.Question("Which tree?"), *rounds(3)]
    assert mmc.shorten(entries, 10_000, ALIASES) == entries


def test_older_turns_go_from_the_middle_and_a_line_says_how_many() -> None:
    entries = [mmc.Question("Which tree?"), *rounds(20)]
    shorter = mmc.shorten(entries, 3000, ALIASES)
    gone = len(entries) - len(shorter) + 1
    assert words_of(shorter) == [
        "Which tree?",
        f"({gone} earlier turns were {LEFT_OUT}",
        *(f"Turn {at}" for at in range(gone, 60)),
    ]
    assert 1800 < sum(map(mmc.tokens_of, shorter)) <= 3000


def test_the_last_round_the_question_and_last_turns_stay_however_little_room() -> None:
    early = turn("Dan", "Turn of Dan: " + "elm " * 100)
    found = mmc.Question("Found on the web for this question: " + "ash " * 100)
    entries = [*rounds(2), mmc.Question("Which?"), found, early, *rounds(4)]
    shorter = mmc.shorten(entries, 1, (*ALIASES, "Dan"))
    assert words_of(shorter) == [
        f"(6 earlier turns were {LEFT_OUT}",
        "Which?",
        "Found on the web for this question",
        "Turn of Dan",
        f"(8 earlier turns were {LEFT_OUT}",
        *(f"Turn {at}" for at in range(8, 12)),
    ]


def test_older_questions_outlive_older_turns() -> None:
    asked = [mmc.Question("First?"), *rounds(5), mmc.Question("Second?"), *rounds(5)]
    entries = [*asked, mmc.Question("Third?"), *rounds(1)]
    shorter = words_of(mmc.shorten(entries, 2500, ALIASES))
    assert shorter[0] == "First?" and "Second?" in shorter and "Third?" in shorter
    assert LEFT_OUT in shorter[1]
    assert "First?" not in words_of(mmc.shorten(entries, 500, ALIASES))


def test_the_cut_stays_where_it_is_for_some_turns() -> None:
    entries = [mmc.Question("Which tree?"), *rounds(30)]
    lines = [
        words_of(mmc.shorten(entries[:end], 4000, ALIASES))[1]
        for end in range(40, len(entries))
    ]
    assert LEFT_OUT in lines[0]
    # a third of the room is six turns
    assert len(set(lines)) <= len(lines) / 5


@given(
    st.lists(
        st.builds(turn, st.sampled_from("ABC"), st.text(max_size=500))
        | st.builds(mmc.Question, st.text(max_size=500)),
        max_size=30,
    ),
    st.integers(0, 4000),
)
def test_nothing_is_reordered_and_each_gap_has_one_line(
    entries: list[mmc.Entry], room: int
) -> None:
    shorter = mmc.shorten(entries, room, "ABC")
    rest = iter(entries)
    own = [each for each in shorter if any(each is entry for entry in entries)]
    assert all(any(each is entry for entry in rest) for each in own)
    lines = words_of([each for each in shorter if each not in own])
    left = sum(int(line.split()[0][1:]) for line in lines)
    assert len(entries) - left == len(own)
    assert entries[-1:] == shorter[-1:]


def test_a_call_of_a_tool_goes_with_its_result() -> None:
    call = {"id": "c1", "type": "function", "function": {"name": "f", "arguments": ""}}
    used: list[Json] = [
        {"role": "assistant", "content": "", "tool_calls": [call]},
        {"role": "tool", "tool_call_id": "c1", "content": "tall " * 200},
    ]
    entries: list[mmc.Entry] = [mmc.Question("Which?")]
    entries += [turn(alias, "Oak. " * 40, *used) for alias in ALIASES * 5]
    ann = mmc.Participant("Ann", "🔵", "Be kind.", mmc.Voice("oak-1"))
    for room in range(500, 8000, 250):
        sent = mmc.messages_for(ann, mmc.shorten(entries, room, ALIASES))
        roles = [m["role"] for m in sent if m["role"] == "tool" or "tool_calls" in m]
        assert roles == ["assistant", "tool"] * (len(roles) // 2) != []


# -- what is too long by itself --------------------------------------------------------


def test_texts_that_are_too_long_lose_their_middle_and_say_so() -> None:
    long = "Begin. " + "x" * 90_000 + " End."
    messages: list[Json] = [
        {"role": "system", "content": "Be kind. " * 300},
        {"role": "user", "content": [{"type": "text", "text": long}, IMAGE]},
        {"role": "assistant", "content": "Oaks."},
        {"role": "tool", "tool_call_id": "c1", "content": long},
    ]
    before = json.dumps(messages)
    shorter = mmc.squeeze(messages, 6000)
    assert mmc.tokens_of(shorter) <= 6000
    assert shorter[0] == messages[0] and shorter[2] == messages[2]
    cut = shorter[1]["content"][0]["text"]
    assert cut.startswith("Begin. x") and cut.endswith("x End.")
    assert "\n(8" in cut and "characters were left out here)\n" in cut
    assert shorter[1]["content"][1] == IMAGE and shorter[3]["content"] == cut
    assert json.dumps(messages) == before
    assert mmc.squeeze(messages, 10**6) == messages


def test_where_many_were_heard_each_of_them_loses_its_middle() -> None:
    said = [turn(alias, f"I am {alias}. {'x' * 9000} So {alias}.") for alias in ALIASES]
    entries: list[mmc.Entry] = [mmc.Question("Which tree?"), *said]
    dan = mmc.Participant("Dan", "🔵", "", mmc.Voice("oak-1"))
    (heard,) = mmc.squeeze(mmc.messages_for(dan, entries, "Your turn."), 3000)
    assert mmc.tokens_of(heard) <= 3000
    assert heard["content"].count("characters were left out here") == 3
    for alias in ALIASES:
        assert f'<message from="{alias}">\nI am {alias}. x' in heard["content"]
        assert f"x So {alias}.\n</message>" in heard["content"]
    assert heard["content"].endswith("\n\nYour turn.")


def test_what_cannot_be_cut_is_sent_as_short_as_it_can_be() -> None:
    messages = [
        {"role": "system", "content": "x" * 9000},
        {"role": "user", "content": "y" * 900},
    ]
    system, asked = mmc.squeeze(messages, 10)
    assert len(system["content"]) == 9000 and len(asked["content"]) < 900


# -- errors that name a limit ----------------------------------------------------------


WORDINGS: list[tuple[str, int | None]] = [
    # OpenAI and whoever copies it
    (
        "This model's maximum context length is 8192 tokens. However, your messages "
        "resulted in 9000 tokens. Please reduce the length of the messages.",
        8192,
    ),
    (
        "This model's maximum context length is 4,096 tokens. However, you requested "
        "5000 tokens (4000 in the messages, 1000 in the completion).",
        4096,
    ),
    ("Input tokens exceed the configured limit of 272000 tokens, not 300000.", 272000),
    ("Your input exceeds the context window of this model. Please adjust it.", 0),
    (
        "Request too large for model `llama` in organization `org_x` on tokens per "
        "minute (TPM): Limit 6000, Requested 9000",
        6000,
    ),
    # Anthropic, Bedrock
    ("prompt is too long: 210000 tokens > 200000 maximum", 200000),
    ("input length and `max_tokens` exceed context limit: 99 + 2000 > 1500", 1500),
    ("Input is too long for requested model.", 0),
    # vLLM, TGI, llama.cpp, Ollama, LM Studio
    ("The decoder prompt (length 5000) is longer than the maximum model length of "
     "4096. Make sure that `max_model_len` is no smaller", 4096),
    ("`inputs` tokens + `max_new_tokens` must be <= 4096. Given: 9000 `inputs`", 4096),
    ("request (9000 tokens) exceeds the available context size (8192 tokens)", 8192),
    ("input length exceeds maximum context length", 0),
    ("prompt too long; exceeded max context length by 1234 tokens", 0),
    ("Trying to keep the first 5000 tokens when context the overflows. However, the "
     "model is loaded with context length of only 4096 tokens", 4096),
    # Gemini, Mistral, Cohere, xAI, a web server
    ("The input token count (1200000) exceeds the maximum number of tokens allowed "
     "(1048576).", 1048576),
    ("Prompt contains 40000 tokens and 0 draft tokens, too large for model with 32768 "
     "maximum context length", 32768),
    ("too many tokens: the prompt cannot exceed 4081 - received 5000.", 4081),
    ("This model's maximum prompt length is 131072 but the request contains 140000 "
     "tokens.", 131072),
    ("<html><title>413 Request Entity Too Large</title></html>", 0),
    # something else
    ("Rate limit reached for gpt-4o on tokens per min (TPM): Limit 30000, Used 29000, "
     "Requested 2000. Please try again in 5s.", None),
    ("This request would exceed your rate limit of 50,000 input tokens a minute", None),
    ("max_tokens is too large: 100000. It supports at most 16384 completion tokens",
     None),
    ("Unrecognized argument: stream_options", None),
    ("The model is overloaded.", None),
]  # fmt: skip


@pytest.mark.parametrize(("said", "limit"), WORDINGS)
def test_a_provider_names_its_limit(said: str, limit: int | None) -> None:
    assert mmc.read_limit(mmc.error_text(said)) == limit


# -- the door --------------------------------------------------------------------------

REFUSED = mmc.ModelFailure("maximum context length is 2000 tokens, not 9000", 400)


def long_run(*replies: Any, **fields: Any) -> tuple[mmc.Run, ScriptedHost]:
    """A run of three that has gone on for twenty rounds, some 9,000 tokens."""
    run, host = make_run(replies, aliases=ALIASES, **fields)
    run.entries.extend(rounds(20))
    return run, host


async def speak(run: mmc.Run, *aliases: str) -> list[mmc.Turn]:
    """The turns of these, who are heard by nobody."""
    async with run.tasks:
        return [
            turn
            for alias in aliases
            for turn in await run._speak(mmc.Speak((alias,), joins=False), 1)
        ]


def sizes(host: ScriptedHost) -> list[int]:
    return [mmc.tokens_of(payload["messages"]) for payload in host.payloads]


async def test_a_ceiling_holds_for_everybody_with_the_same_cut() -> None:
    run, host = long_run(*[text("Oaks.")] * 3, max_prompt=3000)
    assert [turn.text for turn in await speak(run, *ALIASES)] == ["Oaks."] * 3
    assert max(sizes(host)) <= 3000
    lines = [str(p["messages"]).split(LEFT_OUT)[0][-30:] for p in host.payloads]
    assert len(set(lines)) == 1 and "earlier turns were" in lines[0]


async def test_a_refused_prompt_is_sent_again_shorter_and_the_limit_is_kept() -> None:
    run, host = long_run([REFUSED], text("Oaks."), text("Elms."))
    turns = await speak(run, "Ann", "Bob")
    assert [turn.text for turn in turns] == ["Oaks.", "Elms."]
    assert all(turn.failure is None for turn in turns)
    first, again, other = sizes(host)
    assert first > 6000 and max(again, other) <= 1500


async def test_a_prompt_that_is_refused_again_is_not_sent_a_third_time() -> None:
    run, host = long_run([REFUSED], [REFUSED], text("Oaks."))
    ann, bob = await speak(run, "Ann", "Bob")
    assert ann.failure == str(REFUSED) and bob.text == "Oaks."
    first, again, other = sizes(host)
    assert first > again > other  # it has learned from the second refusal, too


async def test_a_limit_without_a_number_halves_what_was_sent() -> None:
    refused = mmc.ModelFailure("Input is too long for requested model.", 400)
    _, host = found = long_run([refused], text("Oaks."))
    await speak(found[0], "Ann")
    first, again = sizes(host)
    assert first / 3 < again <= first / 2


async def test_what_breaks_off_in_the_middle_is_not_sent_again() -> None:
    run, host = long_run([*text("Oaks"), REFUSED])
    assert (await speak(run, "Ann"))[0].failure and len(host.payloads) == 1


async def test_an_ollama_models_own_window_is_known_beforehand() -> None:
    run, host = long_run(text("Oaks."), text("Elms."))
    small = mmc.Voice("elm-1", connection="ollama 0", window=2048)
    ann = mmc.Participant("Ann", "🔵", "You are Ann.", small)
    cast = replace(run.cast, participants={**run.cast.participants, "Ann": ann})
    run = replace(run, cast=cast)
    await speak(run, "Ann", "Bob")
    own, other = sizes(host)
    assert own <= 1536 and other > 6000


async def test_ballots_and_the_manager_keep_to_the_ceiling() -> None:
    paper = mmc.BallotPaper("Ann", "Choose. " + "ash " * 200, {"A": "Bob"})
    run, host = long_run(
        *(text("?"), text('{"ranking": ["A"]}'), text("?"), text("Bob")),
        max_prompt=3000,
    )
    async with run.tasks:
        (ballot,) = await run._judge(mmc.Judge((paper,), mmc.read_ranking), 1)
    assert isinstance(ballot, mmc.Ballot)
    step = mmc.AskManager(ALIASES, "Cat", ALIASES)
    assert await run._ask_manager(step, 2) == ("Bob", "")
    assert max(sizes(host)) <= 3000
    for payload in host.payloads:
        assert "earlier turns were left out here" in str(payload["messages"])
    for payload in host.payloads[1::2]:  # a wrong answer, and what is wrong with it
        wrong, why = payload["messages"][-2:]
        assert wrong == {"role": "assistant", "content": "?"}
        assert why["role"] == "user" and why["content"].startswith("Your ")


async def test_a_long_tool_result_is_cut_where_the_ceiling_is_low() -> None:
    async def look() -> str:
        return "tall " * 20_000

    tools = {"look": tool(look)}
    replies = [[call("look")], text("Oaks.")]
    run, host = make_run(replies, tools=tools, max_prompt=3000)
    (ann,) = await speak(run, "Ann")
    assert ann.text == "Oaks." and ann.failure is None
    result = host.payloads[1]["messages"][-1]
    assert result["role"] == "tool" and "characters were left out" in result["content"]
    assert max(sizes(host)) <= 3000
