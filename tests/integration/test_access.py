"""Who may not use something gets nowhere, and is not told that it is there.

Each attempt is a plain user's. The scripted models see every request, so a hidden model
that was asked would be seen; all that the user gets is searched for its marks.
"""

import json
import re
from collections.abc import AsyncIterator, Callable, Iterator
from contextlib import ExitStack, suppress
from dataclasses import dataclass, field, replace
from typing import Any

import httpx
import pytest

from tests.conftest import FUNCTION_ID
from tests.integration.talk import ROUND_ROBIN, Talk, reached, tool_names
from tests.stack.behaviours import says
from tests.stack.host import Account, Json, OpenWebUI
from tests.stack.models import ModelServer
from tests.stack.page import Page, Reply

QUESTION = "Which tree?"
HIDDEN, NAME = "vault-zx81", "Ninefold"  # a model that only the admin may use
PRESET = "vault-preset"  # a workspace model of the admin's alone, on a model for all
SHARED = "open-on-vault"  # a workspace model for all, on the hidden one
UNKNOWN = "no-such-model"
MARK = "QX7"  # stands in everything that is the admin's alone
ITSELF = f"{FUNCTION_ID}.manager"


@dataclass(frozen=True, slots=True)
class Attempt:
    """What a user tries: his valves, fields of the request, a mode, and a question;
    `admin` are the administrator's valves."""

    name: str
    valves: Json = field(default_factory=dict)
    body: Json = field(default_factory=dict)
    mode: str = "round_robin"
    model: str = ""
    admin: Json = field(default_factory=dict)
    question: str = QUESTION


def teams(word: str) -> Json:
    """Alice, and whoever is named."""
    return {"team": f"Ann | alice\nEve | {word} | Be kind."}


def by_every_way(word: str) -> list[Attempt]:
    """All ways in which a user can name a model."""
    alone, two = {"team": "Ann | alice"}, ["alice", word]
    v2 = {"Participant1Model": "alice", "Participant1Alias": "Ann"}
    named = {**v2, "Participant2Model": word, "NUM_PARTICIPANTS": 2}
    leads = {**v2, "ManagerModel": word, "UseGroupChatManager": True}
    both = {"team": "Ann | alice\nBen | bob"}
    return [
        Attempt("team valve", teams(word)),
        Attempt("participants valve", {"participants": two}),
        Attempt("nobody else", {"participants": [word]}),
        Attempt("manager valve", {**alone, "manager_model": word}, mode="manager"),
        Attempt("v2 valve", named),
        Attempt("v2 manager", leads, mode="manager"),
        Attempt("preset team", body=teams(word)),
        Attempt("preset list", body={"participants": two}),
        Attempt(
            "preset manager", body={**alone, "manager_model": word}, mode="manager"
        ),
        Attempt("preset chair", body={**both, "chair": word}, mode="council"),
        Attempt("chat's parameters", body={"params": {"custom_params": teams(word)}}),
        Attempt("question", both, question=f"/with alice, {word} Which tree?"),
        Attempt("address", both, question=f"{word}, Ann: which tree?"),
    ]


ODD = {
    "capitals": HIDDEN.upper(),
    "blanks": f"  {HIDDEN}\t",
    "a line break": f"{HIDDEN}\n",
    "zero-width": "vault\u200b-zx81",
    "a look-alike": "v\u0430ult-zx81",
    "full width": "ｖault-zx81",
    "a path": f"../{HIDDEN}",
    "a path behind": f"alice/../{HIDDEN}",
    "a part": f"{HIDDEN}.",
    "a pattern": "vault-*",
    "a query": "' OR 1=1 --",
    "very long": f"{HIDDEN} " * 10_000,
    "a NUL": f"{HIDDEN}\0",
    "itself": ITSELF,
    "on itself": "open-on-itself",
    "shared": SHARED,
}
LOST = f"Eve {MARK} | {HIDDEN} | Persona {MARK}."
# eight are seated, and their names are seen
CROWD = "\n".join(f"P{n}{f' {MARK}' if n > 7 else ''} | alice" for n in range(12))
OF_THE_ADMIN = [
    *(
        Attempt(f"team in {mode}", mode=mode, admin={"team": f"Ann | alice\n{LOST}"})
        for mode in ("round_robin", "manager", "council", "debate")
    ),
    Attempt("nobody left", admin={"team": LOST}),
    Attempt("list", admin={"participants": ["alice", HIDDEN]}),
    Attempt("list alone", admin={"participants": [HIDDEN]}),
    Attempt("no model", admin={"team": f"Ann | alice\nPersona {MARK}."}),
    Attempt("crowd", admin={"team": CROWD.replace("P0 ", "Ann "), "rounds": 1}),
    Attempt("manager", admin={"manager_model": HIDDEN}, mode="manager"),
    Attempt(
        "chair",
        {"team": "Ann | alice\nBen | bob"},
        admin={"chair": f"Eve {MARK}"},
        mode="council",
    ),
    Attempt("a workspace model's team", model="open-board"),
    Attempt("and its manager", model="open-led-board"),
    Attempt(
        "a team beside the list", {}, admin={"team": LOST, "participants": ["bob"]}
    ),
]
TOOL = f'''
class Tools:
    def open_vault(self) -> str:
        """Opens it."""
        return "Gold {MARK}"
'''


@dataclass(slots=True)
class Got:
    """All that a user got, and what of it is for reading."""

    everything: str
    said: str

    def without(self, word: str) -> str:
        """What was said, without a word and without figures."""
        return re.sub(r"[\d.,]*\d", "0", self.said.replace(word, "…"))


def workspace_models() -> list[Json]:
    """Some for everybody, and one that is the admin's alone."""
    team = f"Ann | alice\n{LOST}"
    led = {"team": "Ann | alice", "manager_model": HIDDEN}
    kept = {"system": f"Secret {MARK}."}
    return [
        {"id": PRESET, "base_model_id": "alice", "params": kept},
        {"id": SHARED, "base_model_id": HIDDEN},
        {"id": "open-on-itself", "base_model_id": ITSELF},
        board("open-board", "round_robin", {"team": team}),
        board("open-led-board", "manager", led),
    ]


def board(model_id: str, mode: str, presets: Json) -> Json:
    """A workspace model on a mode, with presets of the admin's."""
    params = {"custom_params": {"rounds": "1", **presets}}
    base = f"{FUNCTION_ID}.{mode}"
    return {"id": model_id, "base_model_id": base, "params": params}


@pytest.fixture(scope="module")
def vault(host: OpenWebUI, model_server: ModelServer) -> Iterator[None]:
    """What a plain user may not use, and what is in front of it."""
    model_server.add(HIDDEN, says(f"Reply {MARK}"))
    host.models(refresh=True)
    host.create_model({"id": HIDDEN, "name": NAME})
    form = {"id": "vault_tool", "name": "vault_tool", "content": TOOL}
    host.request("POST", "/api/v1/tools/create", {**form, "meta": {}})
    shelf = host.create_knowledge("Vault book", {"gold.txt": f"The gold is {MARK}."})
    path = f"/api/v1/knowledge/{shelf['id']}/access/update"
    host.request("POST", path, {"access_grants": []})
    attached = {"knowledge": [{**shelf, "type": "collection"}]}
    made = [
        *workspace_models(),
        {
            "id": "digger",
            "base_model_id": "toolie",
            "meta": {"toolIds": ["vault_tool"]},
        },
        {"id": "reader", "base_model_id": "toolie", "meta": attached},
        {"id": "open-shelf", "base_model_id": ROUND_ROBIN, "meta": attached},
    ]
    with ExitStack() as held:
        held.callback(host.delete_model, HIDDEN)
        for form in made:
            host.create_model(form)
            held.callback(host.delete_model, form["id"])
            if form["id"] == PRESET:
                host.set_readers(PRESET)
            else:
                host.grant_read(form["id"], "public")
        host.set_readers(HIDDEN)
        yield


@pytest.fixture(scope="module")
async def desk(host: OpenWebUI, user: Account, vault: None) -> AsyncIterator[Page]:
    """The user's page, for all attempts."""
    async with Page(host, user) as page:
        yield page


def is_hidden(seen: Any) -> bool:
    """Whether a request is for what is hidden."""
    return seen.model == HIDDEN or MARK in seen.text


async def attempt(talk: Talk, page: Page, tried: Attempt) -> Got:
    """Try it in the page; gives all that the user got."""
    talk.models.clear()
    valves = {"rounds": 1, **tried.valves} if tried.valves or not tried.admin else {}
    talk.host.set_user_valves(talk.account, FUNCTION_ID, valves)
    # in the order of seats, whoever speaks first
    talk.admin_sets(show_figures="never", all_at_once=True, **tried.admin)
    model = tried.model or f"{FUNCTION_ID}.{tried.mode}"
    reply = await page.send(
        model, tried.question, background_tasks={}, extra=tried.body
    )
    await reply.wait_idle()
    stored = page.host.chat(talk.account, reply.chat.id or "") if reply.chat.id else {}
    got = [reply.message, [event.data for event in reply.events], stored]
    said = [
        reply.text,
        reply.error,
        [each.get("description") for each in reply.statuses],
    ]
    return Got(as_text(got), as_text(said))


def as_text(value: Any) -> str:
    """A value as one text that can be searched."""
    return json.dumps(value, ensure_ascii=False)


@pytest.mark.parametrize("word", [HIDDEN, NAME, PRESET])
@pytest.mark.parametrize("way", range(len(by_every_way(""))))
async def test_a_forbidden_model_reads_as_one_that_is_not_there(
    talk: Talk, desk: Page, word: str, way: int
) -> None:
    forbidden = await attempt(talk, desk, by_every_way(word)[way])
    asked = sorted(talk.order())
    assert not any(map(is_hidden, talk.models.requests))
    unknown = await attempt(talk, desk, by_every_way(UNKNOWN)[way])
    assert forbidden.without(word) == unknown.without(UNKNOWN)
    assert asked == sorted(talk.order())
    assert set(asked) <= {"alice", "bob"}
    others = {HIDDEN, NAME, PRESET, MARK} - {word}
    assert not [each for each in others if each in forbidden.everything]


@pytest.mark.parametrize("odd", ODD)
async def test_no_odd_id_reaches_it(talk: Talk, desk: Page, odd: str) -> None:
    got = await attempt(
        talk, desk, Attempt(odd, body={"participants": ["alice", "bob", ODD[odd]]})
    )
    assert not any(map(is_hidden, talk.models.requests))
    assert talk.order() == ["alice", "bob"]
    assert "Alice here." in got.said and MARK not in got.everything
    if HIDDEN not in ODD[odd]:
        assert HIDDEN not in got.everything
    assert NAME not in got.everything
    assert len(got.said) < 2000


@pytest.mark.parametrize("tried", OF_THE_ADMIN, ids=lambda each: each.name)
async def test_what_the_admin_has_chosen_is_not_quoted(
    talk: Talk, desk: Page, tried: Attempt
) -> None:
    got = await attempt(talk, desk, tried)
    assert not any(seen.model == HIDDEN for seen in talk.models.requests)
    assert HIDDEN not in got.everything and NAME not in got.everything
    assert MARK not in got.everything
    known = "cannot be used", "is not here", "Nobody can take part"
    assert any(words in got.said for words in known)


async def test_an_admin_is_told_which_seat_and_why(
    talk: Talk, host: OpenWebUI, vault: None
) -> None:
    talk.account = host.admin
    host.set_user_valves(host.admin, FUNCTION_ID, {})
    talk.admin_sets(team=f"Ann | alice\nEve {MARK} | no-such-model | Persona {MARK}.")
    async with talk.page() as page:
        got = await attempt(
            talk, page, Attempt("admin", admin={"team": "Ann | alice\nEve | no-such"})
        )
    assert 'Team line 2: there is no model \\"no-such\\"' in got.said


# -- tools, knowledge, tasks and API clients -------------------------------------------

DIG, FIND = "Use open_vault.", 'Use query_knowledge_files. ARGS: {"query": "gold"}'
TOOLS = [
    Attempt("a model's tool", {"team": "Di | digger"}, question=DIG),
    Attempt(
        "named in the request",
        {"team": "Di | toolie"},
        {"tool_ids": ["vault_tool"]},
        question=DIG,
    ),
    Attempt("a model's book", {"team": "Ria | reader"}, question=FIND),
    Attempt("the team's book", {"team": "Ti | toolie"}, {}, model="open-shelf"),
    Attempt(
        "a forged spec",
        {"team": "Di | toolie"},
        {"tools": [{"type": "function", "function": {"name": "open_vault"}}]},
        question=DIG,
    ),
]


@pytest.mark.parametrize("tried", TOOLS, ids=lambda each: each.name)
async def test_no_tool_or_book_of_others_is_opened(
    talk: Talk, desk: Page, tried: Attempt
) -> None:
    if tried.model:
        tried = replace(tried, question=FIND)
    got = await attempt(talk, desk, tried)
    assert "Toolie here." in got.said
    assert MARK not in got.everything
    for seen in talk.models.turns():
        assert MARK not in seen.text and "open_vault" not in tool_names(seen)


def complete(talk: Talk, body: Json) -> str:
    """What the API answers to a request of the user's, whatever it is."""
    headers = {"Authorization": f"Bearer {talk.account.token}"}
    messages = [{"role": "user", "content": QUESTION}]
    asked = {"model": ROUND_ROBIN, "messages": messages, **body}
    path = asked.pop("path", "/api/chat/completions")
    url = f"{talk.host.url}{path}"
    answer = httpx.post(url, json=asked, headers=headers, timeout=60, trust_env=False)
    return answer.text


def content(answer: str) -> str:
    """What is said in an answer of the API, in one piece or a stream."""
    lines = [line.removeprefix("data: ") for line in answer.splitlines()]
    said = []
    for value in (json.loads(line) for line in lines if line.startswith("{")):
        for choice in value.get("choices", [{"message": {"content": as_text(value)}}]):
            message = choice.get("message") or choice.get("delta") or {}
            said.append(message.get("content") or "")
    return "".join(said)


TASKS = "/api/v1/tasks/{}/completions"
CLIENTS: dict[str, Callable[[str], Json]] = {
    "whole": lambda word: teams(word),
    "stream": lambda word: {**teams(word), "stream": True},
    "alone": lambda word: {"participants": [word]},
    "alone in a stream": lambda word: {"participants": [word], "stream": True},
    "manager": lambda word: {
        "model": f"{FUNCTION_ID}.manager",
        "team": "Ann | alice",
        "manager_model": word,
    },
    "title": lambda word: {"path": TASKS.format("title"), "participants": [word]},
    "tags": lambda word: {"path": TASKS.format("tags"), **teams(word)},
    "follow-ups": lambda word: {
        "path": TASKS.format("follow_up"),
        "participants": [word, "alice"],
    },
    "metadata": lambda word: {
        **teams(word),
        "metadata": {"user_id": "1", "task": "title_generation", "model": {"id": word}},
    },
    "a name of a mode": lambda word: {"model": f"{FUNCTION_ID}.{word}"},
}


@pytest.mark.parametrize("way", CLIENTS)
def test_an_api_client_gets_no_further(talk: Talk, vault: None, way: str) -> None:
    talk.seat(rounds=1)
    told = []
    for word in (HIDDEN, UNKNOWN):
        talk.models.clear()
        said = complete(talk, CLIENTS[way](word))
        assert not any(map(is_hidden, talk.models.requests))
        assert NAME not in said and MARK not in said
        told.append(Got(said, content(said)).without(word))
    assert told[0] == told[1] != ""


def test_an_api_client_is_not_told_the_admins_team(talk: Talk, vault: None) -> None:
    talk.host.set_user_valves(talk.account, FUNCTION_ID, {})
    talk.admin_sets(team=LOST, manager_model=HIDDEN)
    for body in ({}, {"stream": True}, {"model": "open-board"}, {"path": "title"}):
        if "path" in body:
            body = {"path": TASKS.format("title")}
        said = complete(talk, dict(body))
        assert not [each for each in (HIDDEN, NAME, MARK) if each in said]
    assert not any(seen.model == HIDDEN for seen in talk.models.requests)


def test_the_panels_offer_nothing_that_is_hidden(talk: Talk, vault: None) -> None:
    path = f"/api/v1/functions/id/{FUNCTION_ID}/valves/user/spec"
    told = as_text(talk.host.request("GET", path, account=talk.account))
    assert '"alice"' in told and SHARED in told
    assert not [each for each in (HIDDEN, NAME, PRESET, MARK) if each in told]


# -- another's chat --------------------------------------------------------------------

FORGED: dict[str, Callable[[str, str], Json]] = {
    "chat and message": lambda chat, message: {
        "chat_id": chat,
        "message_ids": [{"model_id": ROUND_ROBIN, "message_id": message}],
    },
    "chat alone": lambda chat, _: {"chat_id": chat},
    "continue": lambda chat, message: {
        "chat_id": chat,
        "assistant_message_id": message,
        "message_ids": [{"model_id": ROUND_ROBIN, "message_id": message}],
    },
    "regenerate": lambda chat, message: {
        "chat_id": chat,
        "regeneration_message_id": message,
    },
    "without a session": lambda chat, message: {
        "chat_id": chat,
        "id": message,
        "session_id": None,
        "message_ids": None,
    },
    "temporary": lambda chat, message: {
        "chat_id": f"temporary:{chat}",
        "regeneration_message_id": message,
    },
    "message alone": lambda _, message: {
        "message_ids": [{"model_id": ROUND_ROBIN, "message_id": message}],
    },
    "ids of messages": lambda _, message: {
        "regeneration_message_id": message,
        "assistant_message_id": None,
    },
    "metadata": lambda chat, message: {
        "metadata": {"chat_id": chat, "message_id": message},
    },
    "parent": lambda chat, message: {"chat_id": chat, "parent_id": message},
    "blanks": lambda chat, _: {"chat_id": f"{chat} "},
}


@pytest.fixture(scope="module")
async def theirs(host: OpenWebUI, vault: None) -> tuple[Account, Reply]:
    """Another user's conversation."""
    other = host.add_user("Olga Owner")
    host.set_user_valves(other, FUNCTION_ID, {"team": "Ann | alice", "rounds": 1})
    async with Page(host, other) as page:
        reply = await page.ask(ROUND_ROBIN, f"My {MARK}.", background_tasks={})
        await reply.wait_idle()
    return other, reply


@pytest.mark.parametrize("way", FORGED)
async def test_anothers_chat_is_neither_read_nor_written(
    talk: Talk, desk: Page, theirs: tuple[Account, Reply], way: str
) -> None:
    owner, reply = theirs
    chat_id = reply.chat.id or ""
    before = talk.host.chat(owner, chat_id)["chat"]
    talk.seat("Ann | alice")
    messages = [
        {"role": "user", "content": QUESTION},
        {"role": "assistant", "content": "### 🔵 Ann\n\nHalf a word"},
    ]
    forged = {"messages": messages, **FORGED[way](chat_id, reply.id)}
    mine = await desk.send(ROUND_ROBIN, QUESTION, background_tasks={}, extra=forged)
    said = complete(talk, {"session_id": "none", **forged, "id": reply.id})
    await reached(lambda: talk.models.wait_for(lambda models: models.in_flight == 0))
    with suppress(httpx.HTTPStatusError):  # it has begun nothing that could be stopped
        await desk.stop_all()
    assert talk.host.chat(owner, chat_id)["chat"] == before
    got = as_text([mine.message, [event.data for event in mine.events], said])
    assert MARK not in got
    assert not [seen for seen in talk.models.requests if MARK in seen.text]
