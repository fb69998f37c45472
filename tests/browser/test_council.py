"""Councils and debates as a person sees them."""

import re
from collections.abc import Iterator, Sequence
from contextlib import contextmanager

import pytest
from playwright.async_api import expect

from tests.browser.scene import COUNCIL, DEBATE, Scene
from tests.conftest import FUNCTION_ID
from tests.integration.members import member
from tests.integration.talk import in_rounds
from tests.stack.browser import DIALOG, REPLY, OpenPage
from tests.stack.host import OpenWebUI
from tests.stack.models import Hold, ModelServer
from tests.stack.scripts import Fail, Gate, Status, Step, Text

QUESTION = "Which tree should we plant in the school yard?"
TEAM = "Oda | oak\nElla | elm\nBeth | birch\nPia | pine"
ANSWERS = {
    "oak": "Plant an oak: it feeds more insects than any other tree, and it will still "
    "stand there when the grandchildren of these pupils go to school.",
    "elm": "Plant an elm: it likes towns, gives light shade, and the new kinds of it "
    "live through the disease that once killed so many of them.",
    "birch": "Plant a birch: in five years it is a tree already, its roots are gentle "
    "to the walls, and its bark is what children want to touch.",
    "pine": "Plant a pine: it is green in winter, when the yard is used most, and it "
    "asks for nothing but sand.",
}
PREFERENCES = {
    "oak": "birch elm pine",
    "elm": "oak birch pine",
    "birch": "oak elm pine",
    "pine": "elm oak birch",
}
CONCLUSION = (
    "Plant an oak. Three of us could live with it, and one holds the minority view: ",
    "a tree that is green in winter. I stay with the oak, for the birds.",
)
OPEN = {"fold_drafts": False, "all_at_once": True}
FAILS = [Status(500, {"error": {"message": "The scripted chair is out of memory."}})]


@pytest.fixture(scope="module")
def listed(host: OpenWebUI, model_server: ModelServer) -> None:
    """Four more models that everybody may use."""
    for word in ANSWERS:
        model_server.add(word, member(word))
    host.models(refresh=True)
    for word in ANSWERS:
        host.grant_read(word, "public")


@pytest.fixture(autouse=True)
def drafts_stay_open(host: OpenWebUI) -> Iterator[None]:
    """Most tests look at what stands where; two set it back."""
    host.set_valves(FUNCTION_ID, OPEN)
    yield
    host.set_valves(FUNCTION_ID, {})


@pytest.fixture
def council(listed: None, model_server: ModelServer) -> "Council":
    """The four, at their best."""
    return Council(model_server)


class Council:
    """Four members on a scripted server."""

    def __init__(self, server: ModelServer):
        self.server = server
        for word in ANSWERS:
            self.seat(word)

    def seat(self, word: str, **instead: Sequence[Step]) -> None:
        """Let a member go by these steps in some stages."""
        steps: dict[str, Sequence[Step]] = {
            "answer": [Text(ANSWERS[word])],
            "conclusion": [Text(CONCLUSION[0]), Gate("ending"), Text(CONCLUSION[1])],
            **instead,
        }
        votes = "Ella" if word == "oak" else "Oda"
        made = member(word, prefers=PREFERENCES[word], votes=votes, **steps)
        self.server.add(word, made)

    @contextmanager
    def held_while_answering(self, *words: str, after: int) -> Iterator[list[Hold]]:
        """These stop after so many words of their answers."""
        holds = [self.server.hold(word, after) for word in words]
        try:
            yield holds
        finally:
            for hold in holds:
                hold.release()


async def headings(page: OpenPage) -> list[str]:
    """The headings of the last answer."""
    return await page.tab.locator(REPLY).last.locator("h3").all_inner_texts()


async def section(page: OpenPage, heading: str) -> str:
    """What stands under the first heading that reads so, up to the next one."""
    text = await page.visible_reply_text()
    names = "|".join(map(re.escape, await headings(page)))
    return re.split(rf"(?m)^(?:{names})$", text.split(heading, 1)[1])[0]


async def table(page: OpenPage) -> list[list[str]]:
    """The rows of the last answer's table."""
    rows = await page.tab.locator(REPLY).last.locator("tbody tr").all()
    return [
        [text.strip() for text in await row.locator("td").all_inner_texts()]
        for row in rows
    ]


async def folds(page: OpenPage) -> list[str]:
    """The lines of the last answer's drafts that are folded."""
    lines = page.tab.locator(REPLY).last.locator("button[aria-expanded=false]")
    return [text.strip() for text in await lines.all_inner_texts()]


MOVES = """() => {
  const last = {}, moved = window.moved = [];
  const look = () => {
    const answer = [...document.querySelectorAll("#response-content-container")].pop();
    for (const h of answer?.querySelectorAll("h3") ?? []) {
      const y = h.getBoundingClientRect().y - answer.getBoundingClientRect().y;
      const name = h.textContent.trim();
      if (Math.abs(y - (last[name] ?? y)) > 0.5) moved.push([name, y - last[name]]);
      last[name] = y;
    }
    requestAnimationFrame(look);
  };
  look();
}"""
"""Notes, at each frame, which heading of the last answer has moved in it."""


async def test_nothing_moves_while_four_write_at_once(
    scene: Scene, council: Council, host: OpenWebUI
) -> None:
    host.set_valves(FUNCTION_ID, {})
    page = await scene.join("Fay", COUNCIL, team=TEAM)
    await page.tab.evaluate(MOVES)
    with council.server.hold("ending") as ending:
        with council.held_while_answering(*ANSWERS, after=9) as holds:
            await page.ask(QUESTION)
            for hold in holds:
                hold.wait_until_reached(timeout=30)
            await page.wait_text("0 of 4 answered")
            (first,) = await headings(page)
            for name in {"🔵 Oda", "🔴 Ella", "🟢 Beth", "🟠 Pia"} - {first}:
                await page.wait_text(f"{name} · writing, 9 words")
            for answer in ANSWERS.values():
                assert answer not in await page.visible_reply_text()
            await scene.snap(page, "20-four-at-once")
        ending.wait_until_reached(timeout=30)
        await page.wait_text("one holds the minority view")
        assert len(await headings(page)) == 6
        assert (await headings(page))[0] == first
        assert await page.tab.evaluate("moved") == []
    await page.wait_finished()
    assert await headings(page) == ["🔵 Oda · conclusion", "🏆 Ranking"]
    assert sorted(line for line in await folds(page) if "words" in line) == [
        "🔴 Ella · rank 2 · 26 words",
        "🔵 Oda · rank 1 · 26 words",
        "🟠 Pia · rank 4 · 21 words",
        "🟢 Beth · rank 3 · 27 words",
    ]
    shown = await page.visible_reply_text()
    assert "".join(CONCLUSION) in shown
    assert "4 of 4 answered · chaired by Oda" in shown
    assert "waiting for" not in shown and "0 of 4" not in shown
    assert await table(page) == [
        ["Oda", "5.7", "Ella, Beth"],
        ["Ella", "5.4", "Pia"],
        ["Beth", "5.0", "Oda"],
        ["Pia", "3.9", "–"],
    ]
    await page.wait_status("Chaired by Oda · 5 turns")
    await scene.snap(page, "21-council-finished")
    await page.reload()
    await page.wait_finished()
    await scene.snap(page, "22-council-reloaded")
    assert await page.visible_reply_text() == shown
    assert shown.index("chaired by Oda") < shown.index("".join(CONCLUSION))
    assert ANSWERS["elm"] not in shown
    await page.tab.get_by_text("🔴 Ella · rank 2").click()
    await page.wait_text(ANSWERS["elm"])
    assert "🔴 Ella" in await headings(page)
    await page.ask("And where in the yard?")
    await page.wait_finished()
    assert (await headings(page))[0] == "🔵 Oda · conclusion"
    await scene.snap(page, "23-council-second-question")


async def test_a_slow_member_holds_nobody_up_and_is_skipped_with_a_click(
    scene: Scene, council: Council, host: OpenWebUI
) -> None:
    host.set_valves(FUNCTION_ID, {**OPEN, "skip_after": 1})
    try:
        page = await scene.join("Skye", COUNCIL, team=TEAM)
        with council.server.hold("birch") as slow:
            await page.ask(QUESTION)
            slow.wait_until_reached(timeout=30)
            await page.wait_text(ANSWERS["oak"])
            await page.wait_text("3 of 4 answered")
            await page.wait_text("Beth · waiting")
            await page.tab.get_by_text("Skip Beth?").wait_for()
            await expect(page.tab.locator(DIALOG)).to_have_count(0)  # it covers nothing
            await scene.snap(page, "24-skip-card")
            await page.tab.get_by_role("button", name="Skip it").click()
            await page.wait_text("Beth could not answer: it was skipped")
            council.server.wait_for(lambda server: "birch" in server.aborted)
            await page.wait_text("3 of 4 answered · Beth was skipped · chaired by")
        await page.wait_finished()
        await expect(page.tab.get_by_text("Skip Beth?")).to_have_count(0)
        await scene.snap(page, "25-skipped")
    finally:
        host.set_valves(FUNCTION_ID, {})


async def test_the_card_goes_away_when_the_member_speaks(
    scene: Scene, council: Council, host: OpenWebUI
) -> None:
    host.set_valves(FUNCTION_ID, {**OPEN, "skip_after": 1})
    try:
        page = await scene.join("Tess", COUNCIL, team=TEAM)
        with council.server.hold("pine", after=6):
            await page.ask(QUESTION)
            await page.tab.get_by_text("Skip Pia?").wait_for()
        await page.tab.get_by_text("Skip Pia?").wait_for(state="detached")
        await page.wait_finished()
        await page.wait_text("4 of 4 answered")
        assert ANSWERS["pine"] in await page.visible_reply_text()
    finally:
        host.set_valves(FUNCTION_ID, {})


async def test_a_slow_judge_is_skipped_with_a_click(
    scene: Scene, council: Council, host: OpenWebUI
) -> None:
    council.seat("elm", review=[Gate("review"), Text("{}")])
    host.set_valves(FUNCTION_ID, {**OPEN, "skip_after": 1})
    try:
        page = await scene.join("Judy", COUNCIL, team=TEAM)
        with council.server.hold("review") as slow:
            await page.ask(QUESTION)
            slow.wait_until_reached(timeout=30)
            await page.tab.get_by_text("Skip Ella?").wait_for(timeout=10_000)
            await scene.snap(page, "26-skip-a-judge")
            await page.tab.get_by_role("button", name="Skip it").click()
            await page.wait_text("4 of 4 answered · chaired by")
        await page.wait_finished()
        await page.wait_text("No ballot from Ella: was skipped.")
    finally:
        host.set_valves(FUNCTION_ID, {})


async def test_the_next_best_takes_over_from_a_chair_that_fails(
    scene: Scene, council: Council
) -> None:
    council.seat("oak", conclusion=FAILS)
    page = await scene.join("Chad", COUNCIL, team=TEAM)
    await page.ask(QUESTION)
    await page.wait_finished()
    shown = await page.visible_reply_text()
    assert "4 of 4 answered · chaired by Ella (Oda failed)" in shown
    assert (await headings(page))[4:] == ["🏆 Ranking", "🔴 Ella · conclusion"]
    await page.wait_status("Chaired by Ella (Oda failed)")
    await scene.snap(page, "27-chair-failed")
    assert await page.reply_text_after_reload() == shown


async def test_what_a_member_said_before_it_died_stays(
    scene: Scene, council: Council
) -> None:
    said = "Plant an elm, because it likes towns and"
    council.seat("elm", answer=[Text(said), Fail("The scripted server shut down.")])
    page = await scene.join("Dora", COUNCIL, team=TEAM)
    await page.ask(QUESTION)
    await page.wait_finished()
    shown = await page.visible_reply_text()
    assert said in await section(page, "🔴 Ella")
    notice = "Ella broke off: The scripted server shut down."
    assert notice in await section(page, "🔴 Ella")
    outcome = "3 of 4 answered · Ella failed: The scripted server shut down · chaired"
    assert outcome in shown
    await scene.snap(page, "28-died-half-way")
    assert await page.reply_text_after_reload() == shown


async def test_stop_ends_every_stage_and_keeps_what_is_there(
    scene: Scene, council: Council
) -> None:
    council.seat("elm", review=[Gate("review"), Text("{}")])
    page = await scene.join("Stef", COUNCIL, team=TEAM)
    with council.held_while_answering("birch", "pine", after=7) as holds:
        await page.ask(QUESTION)
        for hold in holds:
            hold.wait_until_reached(timeout=30)
        await page.wait_text(ANSWERS["elm"])
        await page.wait_text("Plant a pine")
        await stop(page, council)
    await scene.snap(page, "29-stopped-answering")
    assert ANSWERS["oak"] in await section(page, "🔵 Oda")
    assert "broke off" not in await page.visible_reply_text()
    await seen_again(page)

    with council.server.hold("review") as reviewing:
        await page.ask("And if we stop at the review?")
        reviewing.wait_until_reached(timeout=30)
        await page.wait_status("Members judge each other")
        await stop(page, council)
    await scene.snap(page, "30-stopped-reviewing")
    assert await headings(page) == ["🔵 Oda", "🔴 Ella", "🟢 Beth", "🟠 Pia"]
    assert ANSWERS["pine"] in await section(page, "🟠 Pia")
    await seen_again(page)

    council.seat("elm")
    with council.server.hold("ending") as concluding:
        await page.ask("And if we stop at the conclusion?")
        concluding.wait_until_reached(timeout=30)
        await page.wait_text("one holds the minority view")
        await stop(page, council)
    await scene.snap(page, "31-stopped-concluding")
    assert "4 of 4 answered · chaired by Oda" in await page.visible_reply_text()
    assert "broke off" not in await section(page, "🔵 Oda · conclusion")
    await seen_again(page)


async def stop(page: OpenPage, council: Council) -> None:
    """Press Stop, and see that nothing goes on."""
    await page.stop()
    await page.wait_finished()
    council.server.wait_for(lambda server: server.in_flight == 0)
    await page.wait_status("Stopped · ")
    assert "⏳" not in await page.visible_reply_text()


async def seen_again(page: OpenPage) -> None:
    """What is shown is what is stored."""
    shown = await page.visible_reply_text()
    assert await page.reply_text_after_reload() == shown


async def test_a_page_that_is_loaded_again_in_the_middle_goes_on(
    scene: Scene, council: Council
) -> None:
    page = await scene.join("Rhea", COUNCIL, team=TEAM)
    with council.held_while_answering(*ANSWERS, after=9) as holds:
        await page.ask(QUESTION)
        for hold in holds:
            hold.wait_until_reached(timeout=30)
        await page.wait_text("Plant a pine")
        await page.reload()
        for answer in ANSWERS.values():
            await page.wait_text(" ".join(answer.split()[:7]))
        await scene.snap(page, "32-reloaded-in-the-middle")
        concluding = council.server.hold("ending")
    concluding.wait_until_reached(timeout=30)
    await page.wait_text("one holds the minority view")
    await page.reload()
    await page.wait_text("one holds the minority view")
    await scene.snap(page, "33-reloaded-in-the-conclusion")
    concluding.release()
    await page.wait_text(CONCLUSION[1])
    await page.wait_finished()
    shown = await page.visible_reply_text()
    for said in (*ANSWERS.values(), "".join(CONCLUSION)):
        assert shown.count(said) == 1
    await seen_again(page)


async def test_a_debate_is_decided_by_votes(scene: Scene, council: Council) -> None:
    page = await scene.join("Vera", DEBATE, team=TEAM.rpartition("\n")[0])
    await page.ask(f"{QUESTION} /rounds 2")
    await page.wait_finished()
    assert await headings(page) == [
        *(f"{name} · opening" for name in ("🔵 Oda", "🔴 Ella", "🟢 Beth")),
        *in_rounds(2, "🔵 Oda", "🔴 Ella", "🟢 Beth")[3:],
        *("🏆 Votes", "🔵 Oda · conclusion"),
    ]
    assert await table(page) == [
        ["Oda", "2", "Ella, Beth"],
        ["Ella", "1", "Oda"],
        ["Beth", "0", "–"],
    ]
    assert "3 of 3 answered · chaired by Oda" in await page.visible_reply_text()
    await scene.snap(page, "34-debate")
    await seen_again(page)
