"""Councils and debates as a person sees them."""

import re
from collections.abc import Iterator, Sequence
from contextlib import contextmanager

import pytest
from playwright.sync_api import expect

from tests.browser.scene import COUNCIL, DEBATE, Scene
from tests.conftest import FUNCTION_ID
from tests.stack.browser import REPLY, OpenPage
from tests.stack.host import OpenWebUI
from tests.stack.members import member
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
FAILS = [Status(500, {"error": {"message": "The scripted chair is out of memory."}})]


@pytest.fixture(scope="module")
def listed(host: OpenWebUI, model_server: ModelServer) -> None:
    """Four more models that everybody may use."""
    for word in ANSWERS:
        model_server.add(word, member(word))
    host.models(refresh=True)
    for word in ANSWERS:
        host.grant_read(word, "public")


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
        made = member(word, prefers=PREFERENCES[word], votes="Oda", **steps)
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


def headings(page: OpenPage) -> list[str]:
    """The headings of the last answer."""
    return page.tab.locator(REPLY).last.locator("h3").all_inner_texts()


def section(page: OpenPage, heading: str) -> str:
    """What stands under the first heading that reads so, up to the next one."""
    text = page.visible_reply_text()
    names = "|".join(map(re.escape, headings(page)))
    return re.split(rf"(?m)^(?:{names})$", text.split(heading, 1)[1])[0]


def table(page: OpenPage) -> list[list[str]]:
    """The rows of the last answer's table."""
    rows = page.tab.locator(REPLY).last.locator("tbody tr").all()
    return [
        [text.strip() for text in row.locator("td").all_inner_texts()] for row in rows
    ]


def test_four_members_are_seen_writing_at_once(scene: Scene, council: Council) -> None:
    page = scene.join("Fay", COUNCIL, team=TEAM)
    with council.held_while_answering(*ANSWERS, after=9) as holds:
        page.ask(QUESTION)
        for hold in holds:
            hold.wait_until_reached(timeout=30)
        for answer in ANSWERS.values():
            page.wait_text(" ".join(answer.split()[:9]))
        page.wait_text("0 of 4 answered")
        assert headings(page) == ["🔵 Oda", "🔴 Ella", "🟢 Beth", "🟠 Pia"]
        for answer in ANSWERS.values():
            assert answer not in page.visible_reply_text()
        scene.snap(page, "20-four-at-once")
    page.wait_finished()
    assert headings(page) == [
        *("🔵 Oda", "🔴 Ella", "🟢 Beth", "🟠 Pia"),
        *("🏆 Ranking", "🔵 Oda · conclusion"),
    ]
    shown = page.visible_reply_text()
    assert "".join(CONCLUSION) in shown
    assert "4 of 4 answered · chaired by Oda" in shown
    assert "waiting for" not in shown and "0 of 4" not in shown
    assert table(page) == [
        ["Oda", "1.3", "3", "2"],
        ["Ella", "1.7", "3", "1"],
        ["Beth", "2.0", "3", "1"],
        ["Pia", "3.0", "3", "0"],
    ]
    page.wait_status("Chaired by Oda · 5 turns")
    scene.snap(page, "21-council-finished")
    page.reload()
    page.wait_finished()
    scene.snap(page, "22-council-reloaded")
    assert page.visible_reply_text() == shown
    page.ask("And where in the yard?")
    page.wait_finished()
    assert headings(page)[-1] == "🔵 Oda · conclusion"
    scene.snap(page, "23-council-second-question")


def test_a_slow_member_holds_nobody_up_and_is_skipped_with_a_click(
    scene: Scene, council: Council, host: OpenWebUI
) -> None:
    host.set_valves(FUNCTION_ID, {"skip_after": 2})
    try:
        page = scene.join("Skye", COUNCIL, team=TEAM)
        with council.server.hold("birch") as slow:
            page.ask(QUESTION)
            slow.wait_until_reached(timeout=30)
            page.wait_text(ANSWERS["oak"])
            page.wait_text("3 of 4 answered")
            page.wait_text("waiting for Beth")
            page.tab.get_by_text("Skip Beth?").wait_for()
            scene.snap(page, "24-skip-dialog")
            page.tab.get_by_role("button", name="Confirm").click()
            page.wait_text("Beth could not answer: it was skipped")
            council.server.wait_for(lambda server: "birch" in server.aborted)
            page.wait_text("3 of 4 answered · Beth was skipped · chaired by")
        page.wait_finished()
        expect(page.tab.get_by_text("Skip Beth?")).to_have_count(0)
        scene.snap(page, "25-skipped")
    finally:
        host.set_valves(FUNCTION_ID, {})


def test_the_dialog_goes_away_when_the_member_speaks(
    scene: Scene, council: Council, host: OpenWebUI
) -> None:
    host.set_valves(FUNCTION_ID, {"skip_after": 1})
    try:
        page = scene.join("Tess", COUNCIL, team=TEAM)
        with council.server.hold("pine", after=6):
            page.ask(QUESTION)
            page.tab.get_by_text("Skip Pia?").wait_for()
        page.tab.get_by_text("Skip Pia?").wait_for(state="detached")
        page.wait_finished()
        page.wait_text("4 of 4 answered")
        assert ANSWERS["pine"] in page.visible_reply_text()
    finally:
        host.set_valves(FUNCTION_ID, {})


def test_a_slow_judge_is_skipped_with_a_click(
    scene: Scene, council: Council, host: OpenWebUI
) -> None:
    council.seat("elm", review=[Gate("review"), Text("{}")])
    host.set_valves(FUNCTION_ID, {"skip_after": 1})
    try:
        page = scene.join("Judy", COUNCIL, team=TEAM)
        with council.server.hold("review") as slow:
            page.ask(QUESTION)
            slow.wait_until_reached(timeout=30)
            page.tab.get_by_text("Skip Ella?").wait_for(timeout=10_000)
            scene.snap(page, "26-skip-a-judge")
            page.tab.get_by_role("button", name="Confirm").click()
            page.wait_text("4 of 4 answered · chaired by")
        page.wait_finished()
        assert {row[2] for row in table(page)} == {"2", "3"}
    finally:
        host.set_valves(FUNCTION_ID, {})


def test_the_next_best_takes_over_from_a_chair_that_fails(
    scene: Scene, council: Council
) -> None:
    council.seat("oak", conclusion=FAILS)
    page = scene.join("Chad", COUNCIL, team=TEAM)
    page.ask(QUESTION)
    page.wait_finished()
    shown = page.visible_reply_text()
    assert "4 of 4 answered · chaired by Ella (Oda failed)" in shown
    assert headings(page)[4:] == ["🏆 Ranking", "🔴 Ella · conclusion"]
    page.wait_status("Chaired by Ella (Oda failed)")
    scene.snap(page, "27-chair-failed")
    assert page.reply_text_after_reload() == shown


def test_what_a_member_said_before_it_died_stays(
    scene: Scene, council: Council
) -> None:
    said = "Plant an elm, because it likes towns and"
    council.seat("elm", answer=[Text(said), Fail("The scripted server shut down.")])
    page = scene.join("Dora", COUNCIL, team=TEAM)
    page.ask(QUESTION)
    page.wait_finished()
    shown = page.visible_reply_text()
    assert said in section(page, "🔴 Ella")
    notice = "Ella broke off: The scripted server shut down."
    assert notice in section(page, "🔴 Ella")
    outcome = "3 of 4 answered · Ella failed: The scripted server shut down · chaired"
    assert outcome in shown
    scene.snap(page, "28-died-half-way")
    assert page.reply_text_after_reload() == shown


def test_stop_ends_every_stage_and_keeps_what_is_there(
    scene: Scene, council: Council
) -> None:
    council.seat("elm", review=[Gate("review"), Text("{}")])
    page = scene.join("Stef", COUNCIL, team=TEAM)
    with council.held_while_answering("birch", "pine", after=7) as holds:
        page.ask(QUESTION)
        for hold in holds:
            hold.wait_until_reached(timeout=30)
        page.wait_text(ANSWERS["elm"])
        page.wait_text("Plant a pine")
        stop(page, council)
    scene.snap(page, "29-stopped-answering")
    page.wait_text("stopped before there was a conclusion")
    assert ANSWERS["oak"] in section(page, "🔵 Oda")
    assert "stopped" not in section(page, "🔵 Oda")
    assert "Beth broke off: it was stopped" in section(page, "🟢 Beth")
    assert "Pia broke off: it was stopped" in section(page, "🟠 Pia")
    seen_again(page)

    with council.server.hold("review") as reviewing:
        page.ask("And if we stop at the review?")
        reviewing.wait_until_reached(timeout=30)
        page.wait_status("Members judge each other")
        stop(page, council)
    scene.snap(page, "30-stopped-reviewing")
    page.wait_text("stopped before there was a conclusion")
    assert headings(page) == ["🔵 Oda", "🔴 Ella", "🟢 Beth", "🟠 Pia"]
    assert ANSWERS["pine"] in section(page, "🟠 Pia")
    seen_again(page)

    council.seat("elm")
    with council.server.hold("ending") as concluding:
        page.ask("And if we stop at the conclusion?")
        concluding.wait_until_reached(timeout=30)
        page.wait_text("one holds the minority view")
        stop(page, council)
    scene.snap(page, "31-stopped-concluding")
    assert "4 of 4 answered · chaired by Oda" in page.visible_reply_text()
    assert "Oda broke off: it was stopped" in section(page, "🔵 Oda · conclusion")
    seen_again(page)


def stop(page: OpenPage, council: Council) -> None:
    """Press Stop, and see that nothing goes on."""
    page.stop()
    page.wait_finished()
    council.server.wait_for(lambda server: server.in_flight == 0)
    page.wait_status("Stopped · ")
    assert "waiting for" not in page.visible_reply_text()


def seen_again(page: OpenPage) -> None:
    """What is shown is what is stored."""
    shown = page.visible_reply_text()
    assert page.reply_text_after_reload() == shown


def test_a_page_that_is_loaded_again_in_the_middle_goes_on(
    scene: Scene, council: Council
) -> None:
    page = scene.join("Rhea", COUNCIL, team=TEAM)
    with council.held_while_answering(*ANSWERS, after=9) as holds:
        page.ask(QUESTION)
        for hold in holds:
            hold.wait_until_reached(timeout=30)
        page.wait_text("Plant a pine")
        page.reload()
        for answer in ANSWERS.values():
            page.wait_text(" ".join(answer.split()[:7]))
        scene.snap(page, "32-reloaded-in-the-middle")
        concluding = council.server.hold("ending")
    concluding.wait_until_reached(timeout=30)
    page.wait_text("one holds the minority view")
    page.reload()
    page.wait_text("one holds the minority view")
    scene.snap(page, "33-reloaded-in-the-conclusion")
    concluding.release()
    page.wait_text(CONCLUSION[1])
    page.wait_finished()
    shown = page.visible_reply_text()
    for said in (*ANSWERS.values(), "".join(CONCLUSION)):
        assert shown.count(said) == 1
    seen_again(page)


def test_a_debate_is_decided_by_votes(scene: Scene, council: Council) -> None:
    page = scene.join("Vera", DEBATE, team=TEAM.rpartition("\n")[0])
    page.ask(f"{QUESTION} /rounds 2")
    page.wait_finished()
    assert headings(page) == [
        *(["🔵 Oda", "🔴 Ella", "🟢 Beth"] * 2),
        *("🏆 Votes", "🔵 Oda · conclusion"),
    ]
    assert table(page) == [
        ["Oda", "2", "Ella, Beth"],
        ["Ella", "1", "Oda"],
        ["Beth", "0", "–"],
    ]
    assert "3 of 3 answered · chaired by Oda" in page.visible_reply_text()
    scene.snap(page, "34-debate")
    seen_again(page)
