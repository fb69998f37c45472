"""Section 4 and 5: councils and debates by hand, ballots, and sections that grow."""

import asyncio
import json
import re
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import replace
from itertools import permutations
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from tests.stack.structured_output import Output, apply_response_event
from tests.unit.fakes import make_run
from tests.unit.plugin import mmc

Json = dict[str, Any]

ALL = ("Ann", "Bob", "Cat", "Dan")
QUESTION = "Which tree?"


def settings(**fields: Any) -> mmc.Settings:
    return mmc.merge_settings(mmc.Settings(**fields), None)


def agenda(
    aliases: Sequence[str] = ALL,
    seed: str = "s",
    models: Mapping[str, str] | None = None,
    **fields: Any,
) -> mmc.Agenda:
    mode = mmc.Agenda(tuple(aliases), QUESTION, settings(**fields), seed=seed)
    found: mmc.Agenda = replace(mode, models=models or {})
    return found


class Room:
    """Members that answer as told.

    `silent` says who fails and why, `chairless` who fails as a chair, `ranks` what
    each ranks, the best first; who is not in it casts no valid ballot. `remarks` are
    what a voter writes on whom.
    """

    def __init__(
        self,
        silent: Mapping[str, str] | None = None,
        chairless: Iterable[str] = (),
        ranks: Mapping[str, str] | None = None,
        remarks: Mapping[str, Mapping[str, str]] | None = None,
    ) -> None:
        self.silent = silent or {}
        self.chairless = set(chairless)
        self.ranks = ranks or {}
        self.remarks = remarks or {}
        self.steps: list[mmc.Step] = []

    def play(self, mode: mmc.Mode) -> str:
        """Perform a mode's steps; gives why it ended."""
        result: Any = None
        while True:
            try:
                step = mode.send(result)
            except StopIteration as end:
                return str(end.value)
            self.steps.append(step)
            result = self.perform(step)

    def perform(self, step: mmc.Step) -> Any:
        match step:
            case mmc.Speak():
                return [self.turn(alias, step) for alias in step.aliases]
            case mmc.Judge(papers):
                voters = [paper.voter for paper in papers]
                lost = "it said nothing\nfor 60 s."
                return [
                    ballot(v, self.ranks[v], **self.remarks.get(v, {}))
                    if v in self.ranks
                    else lost
                    for v in voters
                ]
        return None

    def turn(self, alias: str, step: mmc.Speak) -> mmc.Turn:
        if step.role == mmc.CONCLUSION:
            if alias in self.chairless:
                return mmc.Turn(alias, "", failure="it broke", concludes=True)
            return mmc.Turn(alias, f"So says {alias}.", concludes=True)
        if alias in self.silent:
            failure = self.silent[alias]
            return mmc.Turn(alias, "", failure=failure, late=failure == "it was late")
        return mmc.Turn(alias, f"{alias}'s tree.")

    def of(self, kind: type) -> list[Any]:
        """The steps of one kind."""
        return [step for step in self.steps if isinstance(step, kind)]

    @property
    def outcomes(self) -> list[str]:
        """The outcome lines, in order."""
        return [show.text for show in self.of(mmc.Publish) if show.key == "outcome"]

    @property
    def chairs(self) -> list[str]:
        """Who was asked for a conclusion, in order."""
        return [
            step.aliases[0]
            for step in self.of(mmc.Speak)
            if step.role == mmc.CONCLUSION
        ]


def ballot(voter: str, order: str, **remarks: str) -> mmc.Ballot:
    """A ballot from "Bob Cat=Dan": places in order, shared ones with "="; one for a
    vote among all is "Bob>Ann=Cat"."""
    places = [place.split("=") for place in order.split()]
    below = [sum(map(len, places[at + 1 :])) for at in range(len(places))]
    above = [sum(map(len, places[:at])) for at in range(len(places))]
    values = {
        alias: 5 + (below[at] - above[at]) / 2
        for at, place in enumerate(places)
        for alias in place
    }
    return mmc.Ballot(voter, values, remarks)


BALLOTS = {
    "Ann": "Bob Cat Dan",
    "Bob": "Cat Ann Dan",
    "Cat": "Bob Ann Dan",
    "Dan": "Cat Ann Bob",
}

# -- the council -----------------------------------------------------------------------


def test_a_council_answers_at_once_ranks_and_concludes() -> None:
    room = Room(ranks=BALLOTS)
    assert room.play(mmc.council(agenda())) == "Chaired by Cat"
    answers, rank, ranking, outcome, conclusion = room.steps
    assert answers == mmc.Speak(ALL, "answering", joins=False)
    assert isinstance(rank, mmc.Judge) and rank.read is mmc.read_ranking
    assert [paper.voter for paper in rank.papers] == list(ALL)
    assert isinstance(ranking, mmc.Publish) and ranking.key == "ranking"
    assert outcome == mmc.Publish("outcome", "> 🏁 4 of 4 answered · chaired by Cat")
    assert isinstance(conclusion, mmc.Speak)
    assert conclusion.aliases == ("Cat",)
    assert conclusion.role == mmc.CONCLUSION and not conclusion.joins
    ranks = {"Cat": "rank 1", "Bob": "rank 2", "Ann": "rank 3", "Dan": "rank 4"}
    assert conclusion.marks == ranks


def test_the_quorum_of_the_valves_is_asked_for() -> None:
    room = Room(ranks=BALLOTS)
    room.play(mmc.council(agenda(quorum=2)))
    assert room.of(mmc.Speak)[0].quorum == 2


def test_who_is_late_is_neither_reviewed_nor_a_reviewer_and_the_outcome_says_so() -> (
    None
):
    room = Room(silent={"Dan": "it was late"}, ranks={"Ann": "Bob Cat"})
    assert room.play(mmc.council(agenda(quorum=3))) == "Chaired by Bob"
    (rank,) = room.of(mmc.Judge)
    assert [paper.voter for paper in rank.papers] == ["Ann", "Bob", "Cat"]
    for paper in rank.papers:
        assert "Dan" not in paper.choices.values()
        assert "Dan" not in paper.brief
    assert room.outcomes == ["> 🏁 3 of 4 answered · Dan was late · chaired by Bob"]


def test_a_late_chair_by_valve_gives_way_to_the_best_ranked() -> None:
    room = Room(silent={"Dan": "it was late"}, ranks={"Ann": "Cat Bob"})
    assert (
        room.play(mmc.council(agenda(chair="Dan"))) == "Chaired by Cat (Dan was late)"
    )
    assert room.chairs == ["Cat"]


def test_a_chair_that_only_says_it_was_late_has_failed() -> None:
    class NotLate(Room):
        def turn(self, alias: str, step: mmc.Speak) -> mmc.Turn:
            return replace(super().turn(alias, step), late=False)

    room = NotLate(silent={"Dan": "it was late"}, ranks={"Ann": "Cat Bob"})
    assert room.play(mmc.council(agenda(chair="Dan"))) == "Chaired by Cat (Dan failed)"


@pytest.mark.parametrize(
    ("silent", "outcome"),
    [
        ({"Bob": "boom"}, "3 of 4 answered · Bob failed: boom"),
        (
            {"Bob": "it said nothing for 60 s"},
            "3 of 4 answered · Bob said nothing for 60 s",
        ),
        ({"Bob": "it was skipped"}, "3 of 4 answered · Bob was skipped"),
        (
            {"Bob": "Out of tokens.", "Dan": "it took longer than 5 s"},
            "3 of 5 answered · Bob failed: Out of tokens · Dan took longer than 5 s",
        ),
    ],
)
def test_who_failed_is_named_with_the_reason(
    silent: dict[str, str], outcome: str
) -> None:
    room = Room(silent, ranks={"Cat": "Ann"})
    room.play(mmc.council(agenda((*ALL, "Eve") if len(silent) > 1 else ALL)))
    assert room.outcomes == [f"> 🏁 {outcome} · chaired by Ann"]


@given(st.integers(1, 8), st.lists(st.text(max_size=400), min_size=8, max_size=8))
def test_the_outcome_is_one_line_however_many_failed(
    failed: int, reasons: list[str]
) -> None:
    everybody = [mmc.clean_alias(f"{n}{'x' * 60}") for n in range(8)]
    turns = [
        mmc.Turn(alias, "", failure=reason if at < failed else None)
        for at, (alias, reason) in enumerate(zip(everybody, reasons, strict=True))
    ]
    line = mmc._outcome(turns, "").text
    assert len(line) < 140 and len(line.splitlines()) == 1
    assert line.startswith(f"> 🏁 {8 - failed} of 8 answered · ")
    if failed > 2:
        assert line.endswith(f"answered · {failed} failed (each says why)")


def test_who_broke_off_half_way_has_not_answered() -> None:
    class HalfWay(Room):
        def turn(self, alias: str, step: mmc.Speak) -> mmc.Turn:
            if alias == "Bob" and step.role != mmc.CONCLUSION:
                return mmc.Turn("Bob", "Half", failure="The connection broke.")
            return super().turn(alias, step)

    room = HalfWay(ranks={"Ann": "Cat Dan"})
    room.play(mmc.council(agenda()))
    (rank,) = room.of(mmc.Judge)
    assert [paper.voter for paper in rank.papers] == ["Ann", "Cat", "Dan"]
    assert "Half" not in "".join(paper.brief for paper in rank.papers)
    assert room.outcomes == [
        "> 🏁 3 of 4 answered · Bob failed: The connection broke · chaired by Cat"
    ]


def test_with_one_answer_there_is_no_conclusion() -> None:
    room = Room({"Ann": "boom", "Cat": "it was skipped", "Dan": "bang"})
    assert room.play(mmc.council(agenda())) == "Only Bob answered"
    assert room.outcomes == [
        "> 🏁 1 of 4 answered · Ann failed: boom · Cat was skipped · Dan failed: bang"
        " · no conclusion, this is Bob's answer alone"
    ]
    assert not room.of(mmc.Judge) and not room.chairs


def test_with_no_answer_every_reason_is_listed() -> None:
    room = Room(
        {
            "Ann": "HTTP 500",
            "Bob": "it was skipped",
            "Cat": "it said nothing for 2 s",
            "Dan": "no key",
        }
    )
    assert room.play(mmc.council(agenda())) == "Nobody could answer"
    assert room.outcomes == [
        "> ⚠️ Nobody could answer: Ann failed: HTTP 500 · Bob was skipped · "
        "Cat said nothing for 2 s · Dan failed: no key"
    ]
    assert not room.of(mmc.Judge) and not room.chairs


def test_under_the_ranking_stands_whose_ballot_was_lost_and_why() -> None:
    room = Room(ranks={"Ann": "Bob Cat Dan", "Cat": "Bob Ann Dan"})
    assert room.play(mmc.council(agenda())) == "Chaired by Bob"
    table, _, fold = room.of(mmc.Publish)[0].text.partition("\n\n<details")
    assert table.endswith(
        "| Dan | 4.0 | – |\n\n"
        "No ballot from Bob: said nothing for 60 s.\n\n"
        "No ballot from Dan: said nothing for 60 s."
    )
    assert "Who ranked whom, and why" in fold


@pytest.mark.parametrize("mode", [mmc.council, mmc.debate])
def test_where_all_ballots_were_lost_each_says_why(
    mode: Callable[[mmc.Agenda], mmc.Mode],
) -> None:
    room = Room()
    assert room.play(mode(agenda(ALL[:3], rounds=1))) == "Chaired by Ann"
    assert room.of(mmc.Publish)[0].text.endswith(
        "the members stay in their order.\n\n"
        "No ballot from Ann: said nothing for 60 s.\n\n"
        "No ballot from Bob: said nothing for 60 s.\n\n"
        "No ballot from Cat: said nothing for 60 s."
    )


@pytest.mark.parametrize("mode", [mmc.council, mmc.debate])
def test_of_two_answers_none_is_ranked_and_the_outcome_says_who_concludes(
    mode: Callable[[mmc.Agenda], mmc.Mode],
) -> None:
    why = "chaired by Ann (by seat: of two answers none is ranked)"
    room = Room({"Bob": "boom"}, ranks={"Ann": "Cat", "Cat": "Ann"})
    assert room.play(mode(agenda(ALL[:3], rounds=1))) == why.capitalize().replace(
        "ann", "Ann"
    )
    assert not room.of(mmc.Judge)
    assert [step.key for step in room.of(mmc.Publish)] == ["outcome"]
    assert room.outcomes == [f"> 🏁 2 of 3 answered · Bob failed: boom · {why}"]
    assert room.of(mmc.Speak)[-1].marks == {"Ann": "", "Cat": ""}


def test_of_two_answers_the_chair_that_was_chosen_concludes() -> None:
    room = Room()
    room.play(mmc.council(agenda(ALL[:2], chair="Bob")))
    assert room.outcomes == ["> 🏁 2 of 2 answered · chaired by Bob"]


def test_under_the_ranking_stands_who_ranked_whom_and_why() -> None:
    ranks = {"Ann": "Bob=Cat Dan", "Dan": "Cat Bob Ann"}
    remarks = {"Ann": {"Cat": "Sound.", "Dan": "Bob said it better."}}
    room = Room(ranks=ranks, remarks=remarks)
    room.play(mmc.council(agenda()))
    published = room.of(mmc.Publish)[0].text
    assert mmc.unfold(published).endswith(
        "- **Ann** · 1. Bob\n- **Ann** · 1. Cat: Sound.\n"
        "- **Ann** · 3. Dan: Bob said it better.\n"
        "- **Dan** · 1. Cat\n- **Dan** · 2. Bob\n- **Dan** · 3. Ann"
    )
    conclusion = room.of(mmc.Speak)[-1]
    told = mmc.NameFilter(conclusion.names).feed(conclusion.brief)
    assert "- **Ann** · 3. Dan: Bob said it better." in told
    assert "Bob said" not in conclusion.brief and "<details" not in told
    reply = said("### 🔵 Ann", "Oaks.", published, "### 🔵 Ann · conclusion", "Elms.")
    assert turns(asked("Trees?"), reply) == [
        ("Ann", "Oaks.", False),
        ("Ann", "Elms.", True),
    ]


def test_under_the_votes_stands_who_voted_for_whom_and_why() -> None:
    ballots = [
        mmc.Ballot("Ann", {"Bob": 1.0, "Cat": 0.0}, {"Bob": "He was fair."}),
        mmc.Ballot("Bob", {"Ann": 0.0, "Cat": 1.0}, {"Cat": ""}),
    ]
    assert mmc.render_reasons(ballots, votes=True) == (
        "- **Ann** · for Bob: He was fair.\n- **Bob** · for Cat"
    )


def test_with_no_ballot_the_first_seat_concludes() -> None:
    room = Room()
    assert room.play(mmc.council(agenda())) == "Chaired by Ann"
    ranking = room.of(mmc.Publish)[0]
    assert ranking.text.startswith(
        "\n---\n\n### 🏆 Ranking\n\nNo valid ballots: the members stay in their order."
    )
    assert "No valid ballots" in room.of(mmc.Speak)[-1].brief


def test_ballots_that_are_left_count_alone() -> None:
    room = Room(ranks={"Bob": "Dan Cat Ann"})
    room.play(mmc.council(agenda()))
    assert room.chairs == ["Dan"]


# -- the chair -------------------------------------------------------------------------


def test_the_chair_of_the_valves_concludes_whatever_the_ranking() -> None:
    room = Room(ranks=BALLOTS)
    assert room.play(mmc.council(agenda(chair=" dan "))) == "Chaired by Dan"
    assert room.chairs == ["Dan"]


def test_when_the_chair_fails_the_next_best_takes_over() -> None:
    room = Room(ranks=BALLOTS, chairless=["Cat", "Bob"])
    end = room.play(mmc.council(agenda()))
    assert end == "Chaired by Ann (Cat failed, Bob failed)"
    assert room.chairs == ["Cat", "Bob", "Ann"]
    assert room.outcomes == [
        "> 🏁 4 of 4 answered · chaired by Cat",
        "> 🏁 4 of 4 answered · chaired by Bob (Cat failed)",
        "> 🏁 4 of 4 answered · chaired by Ann (Cat failed, Bob failed)",
    ]


def test_when_the_chair_of_the_valves_fails_the_best_ranked_takes_over() -> None:
    room = Room(ranks=BALLOTS, chairless=["Dan"])
    room.play(mmc.council(agenda(chair="Dan")))
    assert room.chairs == ["Dan", "Cat"]
    assert room.outcomes[-1] == "> 🏁 4 of 4 answered · chaired by Cat (Dan failed)"


def test_a_chair_of_the_valves_that_did_not_answer_is_not_asked() -> None:
    room = Room(silent={"Dan": "boom"}, ranks={"Ann": "Cat Bob"})
    room.play(mmc.council(agenda(chair="Dan")))
    assert room.chairs == ["Cat"]
    assert room.outcomes == [
        "> 🏁 3 of 4 answered · Dan failed: boom · chaired by Cat (Dan failed)"
    ]


def test_a_chair_of_the_valves_that_nobody_is_called_is_not_waited_for() -> None:
    room = Room(ranks=BALLOTS)
    room.play(mmc.council(agenda(chair="Zoe")))
    assert room.outcomes == [
        "> 🏁 4 of 4 answered · chaired by Cat (the chair that was chosen is not here)"
    ]


def test_a_chair_of_spaces_is_no_chair() -> None:
    room = Room(ranks=BALLOTS)
    assert room.play(mmc.council(agenda(chair=" \n"))) == "Chaired by Cat"


def test_when_nobody_can_conclude_the_outcome_says_so() -> None:
    room = Room(ranks=BALLOTS, chairless=ALL)
    end = room.play(mmc.council(agenda()))
    assert end == "No conclusion: Cat failed, Bob failed, Ann failed, Dan failed"
    assert room.chairs == ["Cat", "Bob", "Ann", "Dan"]
    assert room.outcomes[-1] == (
        "> 🏁 4 of 4 answered · nobody could write a conclusion"
    )


def test_a_chair_that_breaks_off_has_concluded() -> None:
    class BreaksOff(Room):
        def turn(self, alias: str, step: mmc.Speak) -> mmc.Turn:
            if step.role == mmc.CONCLUSION:
                return mmc.Turn(alias, "Half", failure="boom", concludes=True)
            return super().turn(alias, step)

    room = BreaksOff(ranks=BALLOTS)
    assert room.play(mmc.council(agenda())) == "Chaired by Cat"
    assert room.chairs == ["Cat"]


def test_the_chair_is_told_answers_and_judgements_without_any_name() -> None:
    class Remarking(Room):
        def perform(self, step: mmc.Step) -> Any:
            if isinstance(step, mmc.Judge):
                return [
                    ballot("Ann", "Bob Cat", Bob="Right.", Cat="Short."),
                    ballot("Bob", "Cat Ann", Cat="Clear."),
                    "it was late",
                ]
            return super().perform(step)

    room = Remarking(silent={"Dan": "boom"})
    prompt = "{question}~{answers}~{result}~{other}"
    room.play(mmc.council(agenda(conclusion_prompt=prompt)))
    step = room.of(mmc.Speak)[-1]
    question, answers, result, other = step.brief.split("~")
    assert (question, other) == (QUESTION, "{other}")
    assert sorted(step.names) == ["A", "B", "C"]
    assert sorted(step.names.values()) == ["Ann", "Bob", "Cat"]
    assert answers == "\n\n".join(
        f'<message from="{letter}">\n[{letter}]\'s tree.\n</message>'
        for letter in step.names
    )
    assert not any(name in answers + result for name in step.names.values())
    assert mmc.NameFilter(step.names).feed(result, final=True) == (
        "| Member | Score | First place from |\n|---|---|---|\n"
        "| Bob | 5.8 | Ann |\n| Cat | 5.0 | Bob |\n| Ann | 4.2 | – |\n\n"
        "No ballot from Cat: was late.\n\n"
        "- **Ann** · 1. Bob: Right.\n- **Ann** · 2. Cat: Short.\n"
        "- **Bob** · 1. Cat: Clear.\n- **Bob** · 2. Ann"
    )


def test_answers_reach_the_chair_in_an_order_of_the_runs_seed() -> None:
    orders = set()
    for seed in range(60):
        room = Room()
        room.play(mmc.council(agenda(ALL[:3], seed=str(seed))))
        orders.add(tuple(room.of(mmc.Speak)[-1].names.values()))
    assert orders == set(permutations(ALL[:3]))


def test_a_chair_from_outside_concludes_and_the_best_ranked_where_it_fails() -> None:
    from_outside = replace(agenda(chair="judge-1"), judge="Judge")
    room = Room(ranks=BALLOTS)
    assert room.play(mmc.council(from_outside)) == "Chaired by Judge"
    assert [paper.voter for paper in room.of(mmc.Judge)[0].papers] == list(ALL)
    assert "Judge" not in room.of(mmc.Speak)[-1].names.values()
    room = Room(ranks=BALLOTS, chairless=["Judge"])
    assert room.play(mmc.council(from_outside)) == "Chaired by Cat (Judge failed)"
    assert room.chairs == ["Judge", "Cat"]


def test_ballots_of_seats_of_one_model_count_and_are_marked() -> None:
    models = {"Ann": "oak", "Bob": "elm", "Cat": "oak", "Dan": "oak"}
    room = Room(ranks={k: v for k, v in BALLOTS.items() if k != "Dan"})
    room.play(mmc.council(agenda(models=models)))
    table = room.of(mmc.Publish)[0].text
    assert "\n\nAnn and Cat are one model, which may favour itself." in table
    assert "| Bob | 6.1 | Ann, Cat |" in table
    room = Room(ranks=BALLOTS)
    room.play(mmc.council(agenda(models=dict(zip(ALL, "abcd", strict=True)))))
    assert "one model" not in room.of(mmc.Publish)[0].text


def test_two_seats_of_one_model_are_two_members() -> None:
    seats = mmc.unique_aliases([mmc.Seat("Oak", "oak-1")] * 3)
    aliases = [seat.alias for seat in seats]
    room = Room()
    assert room.play(mmc.council(agenda(aliases))) == "Chaired by Oak"
    (rank,) = room.of(mmc.Judge)
    assert [(p.voter, p.choices) for p in rank.papers] == [
        ("Oak", {"A": "Oak 2", "B": "Oak 3"}),
        ("Oak 2", {"A": "Oak 3", "B": "Oak"}),
        ("Oak 3", {"A": "Oak 2", "B": "Oak"}),
    ]


# -- the debate ------------------------------------------------------------------------


def test_a_debate_begins_blind_goes_on_in_turns_and_ends_with_a_vote() -> None:
    room = Room(ranks={"Ann": "Cat Bob", "Bob": "Cat Ann", "Cat": "Ann Bob"})
    end = room.play(mmc.debate(agenda(ALL[:3], rounds=2)))
    assert end == "Chaired by Cat"
    spoken = [step for step in room.of(mmc.Speak) if step.role != mmc.CONCLUSION]
    assert [s.aliases for s in spoken] == [ALL[:3], ("Ann",), ("Bob",), ("Cat",)]
    assert [s.role for s in spoken] == ["opening", "round 2 of 2", "", ""]
    assert all(step.joins and step.brief == mmc.DEBATE_PROMPT for step in spoken)
    assert room.chairs == ["Cat"]
    assert room.outcomes == ["> 🏁 3 of 3 answered · chaired by Cat"]
    table = (
        "\n---\n\n### 🏆 Votes\n\n"
        "| Member | Votes | From |\n|---|---|---|\n"
        "| Cat | 2 | Ann, Bob |\n| Ann | 1 | Cat |\n| Bob | 0 | – |"
    )
    why = "- **Ann** · for Cat\n- **Bob** · for Cat\n- **Cat** · for Ann"
    fold = mmc.render_fold("Who voted for whom, and why", why)
    assert room.of(mmc.Publish)[0].text == f"{table}\n\n{fold}"
    conclusion = room.of(mmc.Speak)[-1]
    told = mmc.NameFilter(conclusion.names).feed(conclusion.brief)
    assert "| Cat | 2 | Ann, Bob |\n| Ann | 1 | Cat |\n| Bob | 0 | – |" in told


def test_a_debate_of_one_round_is_blind_and_needs_no_role() -> None:
    room = Room()
    room.play(mmc.debate(agenda(ALL[:2], rounds=1)))
    opening, _ = room.of(mmc.Speak)
    assert (opening.aliases, opening.role) == (("Ann", "Bob"), "")


def test_who_is_late_in_the_opening_sits_out_the_rest() -> None:
    room = Room(silent={"Bob": "it was late"}, ranks={"Ann": "Cat"})
    room.play(mmc.debate(agenda(ALL[:3], rounds=3)))
    spoken = [s.aliases for s in room.of(mmc.Speak) if s.role != mmc.CONCLUSION]
    assert spoken == [ALL[:3], *[("Ann",), ("Cat",)] * 2]


def test_nobody_can_vote_for_itself() -> None:
    room = Room()
    room.play(mmc.debate(agenda(ALL[:3], rounds=1)))
    (vote,) = room.of(mmc.Judge)
    assert vote.read is mmc.read_vote
    assert [(paper.voter, sorted(paper.choices)) for paper in vote.papers] == [
        ("Ann", ["Bob", "Cat"]),
        ("Bob", ["Ann", "Cat"]),
        ("Cat", ["Ann", "Bob"]),
    ]
    for paper in vote.papers:
        assert paper.choices == {alias: alias for alias in paper.choices}
        assert json.dumps(list(paper.choices)) in paper.brief


def test_the_candidates_stand_in_an_order_of_each_voters_own() -> None:
    papers = list(
        mmc.ballot_papers(agenda(), [mmc.Turn(a, "x") for a in "abcdefgh"], True)
    )
    firsts = {next(iter(paper.choices)) for paper in papers}
    assert len(firsts) > 2


def test_equal_votes_are_decided_by_the_order_of_the_seats() -> None:
    ranks = {"Ann": "Bob Cat", "Bob": "Cat Ann", "Cat": "Ann Bob"}
    room = Room(ranks=ranks)
    room.play(mmc.debate(agenda(ALL[:3], rounds=1)))
    assert room.chairs == ["Ann"]


def test_the_chair_of_the_valves_concludes_a_debate() -> None:
    room = Room(ranks={"Ann": "Cat", "Bob": "Cat", "Cat": "Ann"})
    room.play(mmc.debate(agenda(ALL[:3], rounds=1, chair="bob")))
    assert room.chairs == ["Bob"]


def test_with_no_valid_vote_the_members_stay_in_their_order() -> None:
    room = Room()
    room.play(mmc.debate(agenda(ALL[:3], rounds=1)))
    assert room.of(mmc.Publish)[0].text.startswith(
        "\n---\n\n### 🏆 Votes\n\nNo valid ballots: the members stay in their order."
    )
    assert room.chairs == ["Ann"]


def test_who_fails_twice_sits_out_the_rest_of_a_debate_and_does_not_vote() -> None:
    room = Room(silent={"Bob": "boom"}, ranks={"Ann": "Cat Dan"})
    room.play(mmc.debate(agenda(ALL, rounds=3)))
    spoken = [
        "".join(s.aliases) for s in room.of(mmc.Speak) if s.role != mmc.CONCLUSION
    ]
    assert " ".join(spoken) == "AnnBobCatDan Ann Bob Cat Dan Ann Cat Dan"
    (vote,) = room.of(mmc.Judge)
    assert [paper.voter for paper in vote.papers] == ["Ann", "Cat", "Dan"]
    assert room.outcomes == ["> 🏁 3 of 4 answered · Bob failed: boom · chaired by Cat"]


def test_who_spoke_once_is_heard_although_it_failed_later() -> None:
    class OnlyFirst(Room):
        def turn(self, alias: str, step: mmc.Speak) -> mmc.Turn:
            if alias == "Bob" and step.role != "opening":
                return mmc.Turn("Bob", "", failure="boom")
            return super().turn(alias, step)

    room = OnlyFirst()
    room.play(mmc.debate(agenda(ALL[:3], rounds=2)))
    (vote,) = room.of(mmc.Judge)
    assert [paper.voter for paper in vote.papers] == list(ALL[:3])


def test_a_debate_of_one_that_answers_has_no_conclusion() -> None:
    room = Room(silent={"Bob": "boom"})
    end = room.play(mmc.debate(agenda(ALL[:2], rounds=1)))
    assert end == "Only Ann answered"
    assert not room.of(mmc.Judge) and not room.chairs


def test_a_debate_of_nobody_lists_every_reason() -> None:
    room = Room(silent={"Ann": "boom", "Bob": "it was skipped"})
    end = room.play(mmc.debate(agenda(ALL[:2], rounds=1)))
    assert end == "Nobody could answer"
    assert room.outcomes == [
        "> ⚠️ Nobody could answer: Ann failed: boom · Bob was skipped"
    ]


# -- papers ----------------------------------------------------------------------------


@given(st.lists(st.sampled_from("abcdefgh"), min_size=2, unique=True), st.text())
def test_letters_are_a_voters_own_and_never_its_own_answer(
    aliases: list[str], seed: str
) -> None:
    for voter in aliases:
        letters = mmc.letters_for(voter, aliases, seed)
        assert list(letters) == list("ABCDEFGH"[: len(aliases) - 1])
        assert sorted([*letters.values(), voter]) == sorted(aliases)
        assert letters == mmc.letters_for(voter, aliases, seed)
        assert letters == mmc.letters_for(voter, reversed(aliases), seed)


def test_the_order_differs_by_voter_and_by_seed() -> None:
    aliases = list("abcdefgh")
    of_voters = {
        tuple(x for x in mmc.letters_for(v, aliases, "s").values() if x not in "ab")
        for v in "ab"
    }
    of_seeds = {
        tuple(mmc.letters_for("a", aliases, str(seed)).values()) for seed in range(9)
    }
    assert len(of_voters) == 2 and len(of_seeds) == 9


def test_over_many_seeds_every_order_comes() -> None:
    seen = {
        tuple(mmc.letters_for("a", "abcd", str(seed)).values()) for seed in range(99)
    }
    assert seen == set(permutations("bcd"))


def test_a_reviewer_reads_the_others_answers_under_letters_only() -> None:
    texts = {"Ann": "Oaks!", "Bob": "Elms!", "Cat": "Firs!"}
    turns = [mmc.Turn(alias, text) for alias, text in texts.items()]
    for paper in mmc.ballot_papers(agenda(), turns, votes=False):
        assert texts[paper.voter] not in paper.brief
        for name in texts:
            assert name not in paper.brief
        for letter, alias in paper.choices.items():
            shown = f'<message from="{letter}">\n{texts[alias]}\n</message>'
            assert shown in paper.brief


def test_the_templates_of_review_and_vote_are_the_users() -> None:
    review, vote = "{question}+{answers}+{x}", "{question}+{candidates}"
    chosen = agenda(review_prompt=review, vote_prompt=vote)
    turns = [mmc.Turn("Ann", "{question}"), mmc.Turn("Bob", "Elms")]
    first, second = mmc.ballot_papers(chosen, turns, votes=False)
    assert first.brief == f'{QUESTION}+<message from="A">\nElms\n</message>+{{x}}'
    assert "\n{question}\n" in second.brief
    turns = [mmc.Turn("Ann", "Oaks"), mmc.Turn("Bé", "Elms")]
    first, _ = mmc.ballot_papers(chosen, turns, votes=True)
    assert first.brief == f'{QUESTION}+["Bé"]'


# -- reading ballots -------------------------------------------------------------------

PAPER = mmc.BallotPaper("Zoe", "", {"A": "Ann", "B": "Bob", "C": "Cat"})
WRONG = "Your ranking must name each of A, B, C once, as a JSON object."


def ranks(answer: str) -> Any:
    """The ranks a ballot without scores stands for."""
    found = mmc.read_ranking(answer, PAPER)
    if isinstance(found, str):
        return found
    assert sum(found.values.values()) == 5 * len(found.values)
    return {alias: 7 - value for alias, value in found.values.items()}


@pytest.mark.parametrize(
    ("ranking", "expected"),
    [
        ('["B", "A", "C"]', {"Bob": 1, "Ann": 2, "Cat": 3}),
        ('[["B"], ["A"], ["C"]]', {"Bob": 1, "Ann": 2, "Cat": 3}),
        ('[["C"], ["A", "B"]]', {"Cat": 1, "Ann": 2.5, "Bob": 2.5}),
        ('["A=B", "C"]', {"Ann": 1.5, "Bob": 1.5, "Cat": 3}),
        ('["A = C = B"]', {"Ann": 2, "Bob": 2, "Cat": 2}),
        ('[" b ", "a", ["c"]]', {"Bob": 1, "Ann": 2, "Cat": 3}),
        ('["Answer B", "Answer A", "Answer C"]', {"Bob": 1, "Ann": 2, "Cat": 3}),
        ('["B", "Z", "A", "C"]', {"Bob": 1, "Ann": 2, "Cat": 3}),
        ('["B", "A", "B", "C", "A"]', {"Bob": 1, "Ann": 2, "Cat": 3}),
        ('["B", "A", ["C", "C"]]', {"Bob": 1, "Ann": 2, "Cat": 3}),
        ('[{"letter": "B"}, "A", "C"]', {"Bob": 1, "Ann": 2, "Cat": 3}),
    ],
)
def test_a_ranking_is_a_list_of_places(ranking: str, expected: Json) -> None:
    assert ranks(f'{{"ranking": {ranking}}}') == expected
    fenced = f'Here it is:\n```json\n{{"ranking": {ranking}}}\n```\nDone.'
    assert ranks(fenced) == expected


@pytest.mark.parametrize(
    "answer",
    [
        "",
        "B > A > C",
        "{}",
        '{"ranking": []}',
        '{"ranking": ["B", "A"]}',
        '{"ranking": ["B", "A", "Z"]}',
        '{"ranking": "B, A, C"}',
        '{"ranking": null}',
        '{"ranking": [["<letter of the best>"]]}',
        '{"ranking": ["B", "A", "C"]',
        '[["B"], ["A"], ["C"]]',
        "A hard choice. B is best, then A, then C.",
    ],
)
def test_anything_else_is_sent_back_with_what_is_wrong(answer: str) -> None:
    assert ranks(answer) == WRONG


RANKED = {"Bob": 1, "Ann": 2, "Cat": 3}


def test_a_place_may_say_why_behind_its_letter() -> None:
    assert ranks('{"ranking": ["B: a good one", "A", "C"]}') == RANKED


def test_an_object_of_ranks_is_never_read_in_the_order_of_its_keys() -> None:
    assert ranks('{"ranking": {"A": 2, "B": 1, "C": 3}}') == RANKED


def test_a_verdict_after_another_object_is_found() -> None:
    answer = 'Notes: {"A": "short"}\n{"ranking": ["B", "A", "C"]}'
    assert ranks(answer) == {"Bob": 1, "Ann": 2, "Cat": 3}


def test_remarks_name_whom_their_letters_mean_and_pose_as_nobody() -> None:
    comments = {"A": "Answer A beats [B, C].", "B": "$$x$$ ### 🔴 Cat"}
    answer = json.dumps({"ranking": ["A", "B", "C"], "comments": comments})
    found = mmc.read_ranking(answer, PAPER)
    assert isinstance(found, mmc.Ballot)
    assert found.remarks == {
        "Ann": "Ann beats Bob, Cat.",
        "Bob": "$$x$$ \\### 🔴 Cat",
    }


def test_remarks_are_kept_by_name_as_harmless_lines() -> None:
    answer = json.dumps(
        {
            "ranking": ["A", "B", "C"],
            "comments": {"A": "Very\n<b>good</b>", "Z": "who?", "C": 7},
        }
    )
    found = mmc.read_ranking(answer, PAPER)
    assert found == mmc.Ballot(
        "Zoe",
        {"Ann": 6.0, "Bob": 5.0, "Cat": 4.0},
        {"Ann": "Very bgood/b", "Cat": "7"},
    )


@pytest.mark.parametrize("comments", ["null", "[]", '"fine"', "3"])
def test_remarks_of_another_shape_are_none(comments: str) -> None:
    answer = f'{{"ranking": ["A", "B", "C"], "comments": {comments}}}'
    found = mmc.read_ranking(answer, PAPER)
    assert isinstance(found, mmc.Ballot) and found.remarks == {}


SCORES = '"scores": {"A": 6, " b ": 9, "C": 2.5}'


def values(answer: str) -> Any:
    found = mmc.read_ranking(answer, PAPER)
    return found if isinstance(found, str) else dict(found.values)


def test_scores_count_with_a_point_for_each_place() -> None:
    both = f'{{{SCORES}, "ranking": ["A", ["B", "C"]]}}'
    assert values(both) == {"Ann": 7.0, "Bob": 8.5, "Cat": 2.0}


def test_scores_alone_make_a_ranking() -> None:
    assert values(f"{{{SCORES}}}") == {"Ann": 6.0, "Bob": 10.0, "Cat": 1.5}
    tied = '{"scores": {"A": 7, "B": 7, "C": 7}, "ranking": ["B"]}'
    assert values(tied) == {"Ann": 7.0, "Bob": 7.0, "Cat": 7.0}


@pytest.mark.parametrize(
    "scores",
    [
        '{"A": 6, "B": 9}',
        '{"A": 6, "B": 9, "C": 11}',
        '{"A": 6, "B": 9, "C": -1}',
        '{"A": 6, "B": 9, "C": "two"}',
        '{"A": 6, "B": 9, "C": NaN}',
        '{"A": 60, "B": 90, "C": 25}',
        '{"A": 6, "B": 9, "C": 1' + "0" * 400 + "}",
        "[6, 9, 2]",
        "null",
    ],
)
def test_where_a_score_is_missing_the_places_count_alone(scores: str) -> None:
    ranked = f'{{"scores": {scores}, "ranking": ["B", "A", "C"]}}'
    assert values(ranked) == {"Bob": 6.0, "Ann": 5.0, "Cat": 4.0}
    assert values(f'{{"scores": {scores}}}') == WRONG


def test_a_ballot_is_read_wherever_the_object_stands() -> None:
    answer = f'{{"comments": {{"A": "Good."}}, {SCORES}}} That is all.'
    found = mmc.read_ranking(f"My view: {answer}", PAPER)
    assert isinstance(found, mmc.Ballot)
    assert found.remarks == {"Ann": "Good."}


SCRAPS = st.lists(
    st.sampled_from(
        ["A", "B", "C", "Z", '{"ranking":', '{"scores":', "[", "]", "{", "}"]
        + ['"A"', '"B"', '"A":', '"B":', '"C":', "7", ",", "=", " "]
    )
).map("".join)


@given(SCRAPS | st.text())
def test_a_ballot_has_everybody_once_or_is_none(answer: str) -> None:
    found = mmc.read_ranking(answer, PAPER)
    if isinstance(found, mmc.Ballot):
        assert set(found.values) == {"Ann", "Bob", "Cat"}
        assert all(-1 <= value <= 11 for value in found.values.values())
    else:
        assert found == WRONG


VOTERS = mmc.BallotPaper("Zoe", "", {name: name for name in ("Ann", "Ann Lee", "Bob")})


def vote(answer: str) -> Any:
    found = mmc.read_vote(answer, VOTERS)
    if isinstance(found, str):
        return found
    assert set(found.values) == set(VOTERS.choices)
    return [(alias, value) for alias, value in found.values.items() if value]


@pytest.mark.parametrize(
    ("answer", "name"),
    [
        ('{"vote": "Bob"}', "Bob"),
        ('{"vote": "ANN"}', "Ann"),
        ('{"vote": "Ann Lee", "reason": "Bob was weak."}', "Ann Lee"),
        ('```json\n{"vote": "Bob"}\n```', "Bob"),
        ('I say {"vote": "**Bob**"} for I am Zoe', "Bob"),
    ],
)
def test_a_vote_names_one_of_the_others_whole(answer: str, name: str) -> None:
    assert vote(answer) == [(name, 1.0)]


@pytest.mark.parametrize(
    "answer",
    [
        "",
        "Bob",
        "{}",
        '{"vote": null}',
        '{"vote": "Zoe"}',
        '{"vote": "Bobby"}',
        '{"vote": "Ann or Bob"}',
        '{"vote": ""}',
    ],
)
def test_any_other_vote_is_sent_back_with_what_is_wrong(answer: str) -> None:
    assert vote(answer) == (
        'Your vote must name exactly one of ["Ann", "Ann Lee", "Bob"], '
        "as a JSON object."
    )


def test_a_vote_keeps_its_reason() -> None:
    found = mmc.read_vote('{"vote": "Bob", "reason": "He\\nwas `fair`."}', VOTERS)
    assert isinstance(found, mmc.Ballot)
    assert found.remarks == {"Bob": "He was fair."}


# -- counting --------------------------------------------------------------------------

FOUR = [ballot(voter, order) for voter, order in BALLOTS.items()]


def scored(voter: str, **scores: float) -> mmc.Ballot:
    """A ballot of these values."""
    return mmc.Ballot(voter, scores)


def fared(standings: Sequence[mmc.Standing]) -> list[tuple[str, float | None]]:
    return [(s.alias, s.score and round(s.score, 2)) for s in standings]


def names_of(standings: Sequence[mmc.Standing]) -> list[str]:
    return [s.alias for s in standings]


def test_members_are_compared_by_what_the_ballots_say_of_them() -> None:
    standings = mmc.tally(ALL, FOUR)
    assert names_of(standings) == ["Cat", "Bob", "Ann", "Dan"]
    assert [s.first_for for s in standings] == [("Bob", "Dan"), ("Ann", "Cat"), (), ()]


def test_a_lenient_judge_lifts_nobody_over_itself() -> None:
    """Ann and Bob are as good, but Ann is judged by a strict one only."""
    ballots = [
        scored("Strict", Ann=3, Bob=3, Cat=1),
        scored("Lenient", Bob=10, Cat=8),
        scored("Mild", Ann=6, Cat=4),
    ]
    standings = {s.alias: s.score or 0.0 for s in mmc.tally(ALL[:3], ballots)}
    raw = {"Ann": (3 + 6) / 2, "Bob": (3 + 10) / 2}
    assert abs(standings["Ann"] - standings["Bob"]) < abs(raw["Ann"] - raw["Bob"]) / 2


def test_who_meets_the_best_one_on_every_ballot_is_not_put_back_for_it() -> None:
    """Dan is best, and so never met by himself; Ann's opponents are the same as Bob's
    but for that: mean ranks would put Dan's rivals under whoever met him less."""
    truth = {"Ann": 6.0, "Bob": 5.0, "Cat": 4.0, "Dan": 9.0}
    ballots = [
        scored(voter, **{a: x for a, x in truth.items() if a != voter})
        for voter in truth
    ]
    assert names_of(mmc.tally(ALL, ballots)) == ["Dan", "Ann", "Bob", "Cat"]


def test_equal_members_stay_in_the_order_of_the_seats() -> None:
    ballots = [ballot("Ann", "Bob=Cat"), ballot("Bob", "Ann=Cat")]
    assert names_of(mmc.tally(["Cat", "Ann", "Bob"], ballots)) == ["Cat", "Ann", "Bob"]


def test_of_two_the_one_that_is_judged_better_is_first() -> None:
    ballots = [scored("Ann", Bob=9), scored("Bob", Ann=6)]
    assert names_of(mmc.tally(["Ann", "Bob"], ballots)) == ["Bob", "Ann"]


def test_without_ballots_nobody_has_a_score() -> None:
    assert fared(mmc.tally(["Bob", "Ann"], [])) == [("Bob", None), ("Ann", None)]


def test_who_stands_on_no_ballot_is_last() -> None:
    standings = mmc.tally(["Ann", "Bob", "Cat"], [ballot("Ann", "Bob Cat")])
    assert names_of(standings) == ["Bob", "Cat", "Ann"]


@pytest.mark.parametrize("order", ["".join(order) for order in permutations("ABC")])
@pytest.mark.parametrize("spread", [3, 2])
def test_a_judge_that_repeats_the_order_it_reads_does_not_decide(
    order: str, spread: int
) -> None:
    """Two of three put Bob clearly first; Dan's ten, seven and four go by place."""
    ballots = []
    others = {"Ann": [["B"], ["C"], ["D"]], "Bob": [["A", "C"], ["D"]]}
    others["Cat"] = [["B"], ["A"], ["D"]]
    named = {alias[0]: alias for alias in ALL} | {"A": "Ann"}
    for voter, places in others.items():
        scores = {x: 9 - spread * at for at, place in enumerate(places) for x in place}
        ballots.append(judged(voter, named, scores, places))
    scores = {letter: 10 - 3 * at for at, letter in enumerate(order)}
    ballots.append(judged("Dan", named, scores, [[letter] for letter in order]))
    assert mmc.tally(ALL, ballots)[0].alias == "Bob"


def judged(
    voter: str, named: Mapping[str, str], scores: Json, places: list[list[str]]
) -> mmc.Ballot:
    """A ballot as a model writes it."""
    choices = {letter: alias for letter, alias in named.items() if alias != voter}
    written = json.dumps({"scores": scores, "ranking": places})
    found = mmc.read_ranking(written, mmc.BallotPaper(voter, "", choices))
    assert isinstance(found, mmc.Ballot)
    return found


CHOICES = st.lists(st.integers(-1, 4), min_size=5, max_size=5)


@given(CHOICES)
def test_who_has_more_votes_stands_higher_whoever_did_not_vote(
    choices: list[int],
) -> None:
    everybody = ("Ann", "Bob", "Cat", "Dan", "Eve")
    ballots = []
    for voter, choice in zip(everybody, choices, strict=True):
        others = [alias for alias in everybody if alias != voter]
        if 0 <= choice < len(others):
            chosen = {alias: float(alias == others[choice]) for alias in others}
            ballots.append(mmc.Ballot(voter, chosen))
    standings = mmc.tally(everybody, ballots)
    votes = [len(s.first_for) for s in standings if s.score is not None]
    assert votes == sorted(votes, reverse=True)


@given(st.lists(st.permutations(ALL), max_size=6))
def test_who_every_ballot_puts_first_wins(orders: list[list[str]]) -> None:
    ballots = [
        ballot(f"V{n}", " ".join(["Eve", *o]))
        for n, o in enumerate([list(ALL)] + orders)
    ]
    assert mmc.tally([*ALL, "Eve"], ballots)[0].alias == "Eve"


AGREED = {"Ann": "Bob Cat Dan", "Bob": "Ann Cat Dan", "Cat": "Ann Bob Dan"}
AGREED["Dan"] = "Ann Bob Cat"


@pytest.mark.parametrize(
    ("orders", "words"),
    [
        (AGREED, "The members agree."),
        (BALLOTS, "The members agree partly."),
        (
            {
                "Ann": "Bob Cat Dan",
                "Bob": "Dan Cat Ann",
                "Cat": "Ann Dan Bob",
                "Dan": "Cat Bob Ann",
            },
            "The members hardly agree.",
        ),
        ({k: v for k, v in AGREED.items() if k < "C"}, ""),
        ({"Ann": "Bob=Cat=Dan", "Bob": "Ann=Cat=Dan"}, ""),
        ({}, ""),
    ],
)
def test_how_far_the_members_agree_is_said_in_words(
    orders: dict[str, str], words: str
) -> None:
    ballots = [ballot(voter, order) for voter, order in orders.items()]
    assert mmc.describe_agreement(mmc.tally(ALL, ballots), ballots) == words


def test_the_table_of_a_ranking() -> None:
    assert mmc.render_standings(mmc.tally(ALL, FOUR), votes=False) == (
        "| Member | Score | First place from |\n|---|---|---|\n"
        "| Cat | 5.7 | Bob, Dan |\n"
        "| Bob | 5.4 | Ann, Cat |\n"
        "| Ann | 5.0 | – |\n"
        "| Dan | 3.9 | – |"
    )


TOP = {"Ann": 6.0, "Bob": 6.0, "Cat": 6.0}


@pytest.mark.parametrize(
    ("ballots", "votes", "line"),
    [
        (
            [scored("X", **TOP), scored("Y", **TOP)],
            False,
            "Ann, Bob and Cat are level: the order of the seats puts Ann first.",
        ),
        (
            [scored("X", **TOP), scored("Y", **{**TOP, "Cat": 6.02})],
            False,
            "Cat, Ann and Bob are level: less than a tenth puts Cat first.",
        ),
        (
            [scored("Ann", Bob=1, Cat=0), scored("Bob", Ann=0, Cat=1)],
            True,
            "Bob and Cat are level: the order of the seats puts Bob first.",
        ),
    ],
)
def test_a_tie_says_what_broke_it(
    ballots: list[mmc.Ballot], votes: bool, line: str
) -> None:
    standings = mmc.tally(ALL[:3], ballots)
    table = mmc.render_standings(standings, votes)
    assert table.splitlines()[-2:] == ["", line]


def test_votes_that_are_equal_are_never_told_apart_by_who_gave_them() -> None:
    chosen = {"Ann": "Bob", "Bob": "Ann", "Cat": "Dan", "Dan": "Ann"}
    room = Room(
        ranks={v: " ".join([c, *(set(ALL) - {v, c})]) for v, c in chosen.items()}
    )
    room.play(mmc.debate(agenda(ALL, rounds=1)))
    assert list(room.of(mmc.Speak)[-1].marks) == ["Ann", "Bob", "Dan", "Cat"]


def test_the_table_says_who_was_not_judged() -> None:
    one = [ballot("Ann", "Cat Bob")]
    table = mmc.render_standings(mmc.tally(["Ann", "Bob", "Cat"], one), votes=False)
    assert "| Ann | – | – |" in table


# -- names and letters -----------------------------------------------------------------

NAMES = {"A": "Cat", "B": "Ann Lee", "C": "Bob"}


@pytest.mark.parametrize(
    ("text", "shown"),
    [
        ("[A] is right, [B] is not.", "Cat is right, Ann Lee is not."),
        ("[A][C] ([A, B]) and [C,B].", "Cat, Bob (Cat, Ann Lee) and Bob, Ann Lee."),
        ("[D] [a] [AB] [A,] [] [A B] [[A]]", "[D] [a] [AB] [A,] [] [A B] [Cat]"),
        ("`x[A]`, f()[B], m[A][B] and `[A]`", "`x[A]`, f()[B], m[A][B] and `Cat`"),
        ("A list: [1, 2], [A, D], [A", "A list: [1, 2], [A, D], [A"),
        ("Plan A, **[B]**", "Plan A, **Ann Lee**"),
    ],
)
def test_names_stand_where_the_chair_wrote_letters(text: str, shown: str) -> None:
    def read(*pieces: str) -> str:
        names = mmc.NameFilter(NAMES)
        return "".join([*map(names.feed, pieces), names.close()])

    assert read(text) == read(*text) == shown
    for at in range(len(text)):
        assert read(text[:at], text[at:]) == shown


@given(st.lists(st.text("[]ABD, x", max_size=6)))
def test_names_are_put_in_wherever_the_text_is_cut(pieces: list[str]) -> None:
    names, whole = mmc.NameFilter(NAMES), mmc.NameFilter(NAMES)
    cut = "".join([*map(names.feed, pieces), names.close()])
    assert cut == whole.feed("".join(pieces)) + whole.close()


def test_a_text_without_letters_is_not_held_back() -> None:
    assert mmc.NameFilter({}).feed("see [A") == "see [A"
    names = mmc.NameFilter(NAMES)
    assert names.feed("see [A") == "see "
    assert names.feed(" long list") == "[A long list"


def test_a_chair_hears_a_debate_under_letters() -> None:
    entries: list[mmc.Entry] = [
        mmc.Question("Is Bob right?"),
        mmc.Turn("Bob", "I, Bob, say oaks.", ({"role": "assistant"},)),
        mmc.Turn("Ann Lee", "Bob is wrong; Bobby is too."),
        mmc.Turn("Gone", "I agree with Bob."),
    ]
    assert mmc.hide_speakers(entries, NAMES) == [
        mmc.Question("Is Bob right?"),
        mmc.Turn("C", "I, [C], say oaks."),
        mmc.Turn("B", "[C] is wrong; Bobby is too."),
        mmc.Turn("Gone", "I agree with Bob."),
    ]


# -- drafts in a line ------------------------------------------------------------------


@pytest.mark.parametrize(
    "text",
    [
        "Plain.",
        "R&D & x &lt; y &amp;amp; &#35; &copy",
        "```html\n</details>\n```",
        "&lt;/details> and </details",
        "",
        "</summary>\n\nEnd",
    ],
)
def test_a_draft_is_read_back_as_it_was_folded(text: str) -> None:
    folds = mmc.render_fold("🔵 Ann · 2 words", f"### 🔵 Ann\n\n{text}")
    assert folds.count("</details>") == 1
    assert mmc.unfold(f"Before.\n{folds}\nAfter.") == (
        f"Before.\n### 🔵 Ann\n\n{text}\nAfter."
    )


@given(st.lists(st.text("&<>/#;altmpdei \n", max_size=20), max_size=4))
def test_all_drafts_are_read_back_as_they_were_folded(texts: list[str]) -> None:
    joined = "\n".join(mmc.render_fold("🔵 Ann", text) for text in texts)
    assert mmc.unfold(joined) == "\n".join(texts)


def transcript_of(*sections: Sequence[tuple[Any, str]]) -> mmc.Transcript:
    """A transcript of these sections, each of blocks with a kind and a text."""
    transcript = mmc.Transcript("t")
    for blocks in sections:
        number = transcript.open_section()
        for kind, text in blocks:
            fields = {"call_id": "c1"} if kind.startswith("function") else {}
            heading = mmc.HEADING.search(text)
            if heading and heading[1] in mmc.COLOURS:
                fields["model"] = "oak-1"
            speaker = text.rpartition("### 🔵 ")[2][:3] if "🔵" in text else ""
            transcript.add(kind, speaker, number, **fields).append(text)
    return transcript


def folded(transcript: mmc.Transcript, **marks: str) -> list[Json]:
    """What a page has once it is folded; the server has the same."""
    page: Output = []
    server: Output = []
    emitter = mmc.Emitter(transcript, mmc.plan_items, 0.0)
    for block in transcript.blocks:
        emitter.emit_replace(block)

    def send() -> None:
        nonlocal page, server
        for event in emitter.flush():
            page = apply_response_event(page, event)
            server = reduce_by_index(server, event)

    send()
    ours = {
        name: next(b for b in transcript.blocks if sign in b.text)
        for name, sign in (("outcome", "🏁"), ("ranking", "🏆"))
    }
    for block, text in mmc.fold_drafts(transcript, ours, marks):
        emitter.emit_replace(block, text)
    send()
    assert page == server == list(map(mmc.render_item, transcript.blocks))
    return [item for item in page if item["type"] != "message" or text_in(item)]


def text_in(item: Json) -> str:
    return str(item["content"][0]["text"])


def test_the_conclusion_moves_before_the_drafts_with_everything_of_it() -> None:
    transcript = transcript_of(
        [("message", "> ⚠️ Team line 2: no.")],
        [("message", "### 🔵 Ann"), ("reasoning", "Hm."), ("message", "Oaks & elms.")],
        [("message", "\n---\n\n### 🔴 Bob · opening"), ("message", "Firs.")],
        [("message", "\n---\n\n### 🏆 Ranking\n\n| Bob |")],
        [("message", "> 🏁 chaired by Bob")],
        [
            ("message", "\n---\n\n### 🔴 Bob · conclusion"),
            ("function_call", "{}"),
            ("function_call_output", "found"),
            ("message", "Firs it is."),
        ],
        [("message", "> ⏱️ 3 model calls")],
    )
    for block in transcript.blocks:
        block.speaker = {2: "Ann", 3: "Bob", 6: "Bob"}.get(block.section, "")
    items = folded(transcript, Ann="rank 2", Bob="rank 1")
    assert [item["type"] for item in items] == [
        *("message", "message", "message", "function_call", "function_call_output"),
        *("message", "message", "message", "reasoning"),
        *("message", "message"),
    ]
    assert [item["speaker"] for item in items[2:6]] == ["Bob"] * 4
    assert {item["call_id"] for item in items[3:5]} == {"c1_"}
    texts = [text_in(item) for item in items if item["type"] == "message"]
    assert [text.strip() for text in texts] == [
        "> ⚠️ Team line 2: no.",
        "> 🏁 chaired by Bob",
        "---\n\n### 🔴 Bob · conclusion",
        "Firs it is.",
        "---\n\n### 🏆 Ranking\n\n| Bob |",
        mmc.render_fold("🔵 Ann · rank 2 · 3 words", "### 🔵 Ann\n\nOaks & elms."),
        mmc.render_fold(
            "🔴 Bob · opening · rank 1 · 1 word", "### 🔴 Bob · opening\n\nFirs."
        ),
        "> ⏱️ 3 model calls",
    ]
    assert turns(asked("Trees?"), said(*texts)) == [
        ("Ann", "Oaks & elms.", False),
        ("Bob", "Firs.", False),
        ("Bob", "Firs it is.", True),
    ]


def test_a_conclusion_without_drafts_stands_before_its_votes() -> None:
    transcript = transcript_of(
        [("message", "> 💬 In this chat: Ann")],
        [("message", "### 🏆 Votes")],
        [("message", "> 🏁 chaired by Ann")],
        [("message", "### 🔵 Ann · conclusion"), ("message", "Oaks it is.")],
    )
    assert [text_in(item) for item in folded(transcript)] == [
        "> 💬 In this chat: Ann",
        "> 🏁 chaired by Ann",
        "### 🔵 Ann · conclusion",
        "Oaks it is.",
        "### 🏆 Votes",
    ]


def test_of_two_chairs_the_one_that_spoke_last_has_concluded() -> None:
    transcript = transcript_of(
        [("message", "### 🔵 Ann"), ("message", "Oaks.")],
        [("message", "### 🏆 Ranking")],
        [("message", "> 🏁 chaired by Ann (Bob failed)")],
        [("message", "### 🔴 Bob · conclusion"), ("message", "> ⚠️ **Bob** broke off")],
        [("message", "### 🔵 Ann · conclusion"), ("message", "Oaks it is.")],
    )
    texts = [text_in(item) for item in folded(transcript)]
    assert texts[:3] == [
        "> 🏁 chaired by Ann (Bob failed)",
        "### 🔵 Ann · conclusion",
        "Oaks it is.",
    ]
    assert "<summary>🔴 Bob · conclusion · " in texts[-1]


# -- a chair from outside --------------------------------------------------------------

CARDS = {
    "oak-1": mmc.ModelCard("oak-1", "Oak"),
    "judge-1": mmc.ModelCard("judge-1", "The Judge"),
    "ann-1": mmc.ModelCard("ann-1", "Ann"),
    "talk": mmc.ModelCard("talk", "Talk", is_self=True),
}
SEATS = [mmc.Seat("Ann", "oak-1"), mmc.Seat("Bob", "oak-1")]


@pytest.mark.parametrize(
    ("chair", "seats"),
    [
        ("", []),
        ("  ", []),
        ("ann", []),
        ("Zoe", []),
        ("talk", []),
        ("judge-1", [mmc.Seat("The Judge", "judge-1")]),
        ("the judge", [mmc.Seat("The Judge", "judge-1")]),
        ("ann-1", [mmc.Seat("Ann 2", "ann-1")]),
        ("oak-1", [mmc.Seat("Oak", "oak-1")]),
    ],
)
def test_a_chair_that_is_no_member_is_a_model_the_asker_may_use(
    chair: str, seats: list[mmc.Seat]
) -> None:
    assert mmc.choose_chair(settings(chair=chair), CARDS, SEATS) == seats


# -- the ceiling on tokens -------------------------------------------------------------


def spending(agenda: mmc.Agenda, room: Room, each: int) -> mmc.Agenda:
    """An agenda of a room in which each turn takes so many tokens."""

    def used() -> int:
        return each * sum(len(step.aliases) for step in room.of(mmc.Speak))

    found: mmc.Agenda = replace(agenda, tokens_used=used)
    return found


def test_a_ceiling_on_tokens_ends_it_with_the_round() -> None:
    room = Room()
    wanted = agenda(ALL[:2], rounds=3, max_tokens=900)
    end = room.play(mmc.round_robin(spending(wanted, room, 500)))
    spoken = [step.aliases for step in room.of(mmc.Speak)]
    assert spoken == [("Ann",), ("Bob",)]
    assert end == "Ended: the ceiling on tokens is reached"


def test_after_the_ceiling_a_debate_is_decided_as_after_its_last_round() -> None:
    room = Room(ranks={"Ann": "Bob Cat"})
    wanted = agenda(ALL[:3], rounds=9, max_tokens=60)
    assert room.play(mmc.debate(spending(wanted, room, 10))) == "Chaired by Bob"
    spoken = [
        step.aliases for step in room.of(mmc.Speak) if step.role != mmc.CONCLUSION
    ]
    assert spoken == [ALL[:3], ("Ann",), ("Bob",), ("Cat",)]


def test_without_a_ceiling_nobody_counts() -> None:
    room = Room()
    wanted = agenda(ALL[:1], rounds=2)
    end = room.play(mmc.round_robin(spending(wanted, room, 10**9)))
    assert end == "Finished after 2 rounds"


# -- the next question -----------------------------------------------------------------


def said(*lines: str) -> Json:
    """A reply of which these are the items, as the host joins them."""
    return {"role": "assistant", "content": "\n".join(lines)}


def asked(text: str) -> Json:
    return {"role": "user", "content": text}


COUNCIL = said(
    "### 🔵 Ann",
    "Oaks.",
    "\n---\n\n### 🔴 Bob",
    "Elms,\nand oaks.",
    "> ⏳ not counted: the others had gone on",
    "\n---\n\n### 🟢 Cat",
    "> ⚠️ **Cat** could not answer: boom",
    "\n---\n\n### 🏆 Ranking\n\n| Member | Score | First place from |\n"
    "|---|---|---|\n| Ann | 6.1 | Bob |\n\nThe members agree.",
    "> 🏁 2 of 3 answered · Cat failed: boom · chaired by Ann",
    "\n---\n\n### 🔵 Ann · conclusion",
    "Oaks and elms.",
    "> ⏱️ Ann: 3 in, 2 out | 4 model calls",
)


def turns(*messages: Json) -> list[tuple[str, str, bool]]:
    _, entries = mmc.read_history(messages)
    return [
        (entry.alias, entry.text, entry.concludes)
        for entry in entries
        if isinstance(entry, mmc.Turn)
    ]


def test_a_councils_reply_is_read_without_what_is_ours() -> None:
    assert turns(asked("Trees?"), COUNCIL) == [
        ("Ann", "Oaks.", False),
        ("Bob", "Elms,\nand oaks.", False),
        ("Cat", "", False),
        ("Ann", "Oaks and elms.", True),
    ]


def test_a_lone_answer_is_a_turn_and_its_outcome_is_not() -> None:
    reply = said(
        "### 🔵 Ann",
        "> ⚠️ **Ann** could not answer: boom",
        "\n---\n\n### 🔴 Bob",
        "Elms.",
        "> 🏁 1 of 2 answered · Ann failed: boom · no conclusion, "
        "this is Bob's answer alone",
        "> ⏱️ 2 model calls",
    )
    assert turns(asked("Trees?"), reply) == [
        ("Ann", "", False),
        ("Bob", "Elms.", False),
    ]


def kept(*messages: Json) -> list[str]:
    _, entries = mmc.read_history(messages)
    return [
        (
            mmc.text_of(e.content)
            if isinstance(e, mmc.Question)
            else f"{e.alias}: {e.text}"
        )
        for e in mmc.keep_conclusions(entries)
    ]


def test_only_the_conclusion_of_an_earlier_council_is_kept() -> None:
    assert kept(asked("Trees?"), COUNCIL, asked("Why?"), COUNCIL, asked("So?")) == [
        "Trees?",
        "Ann: Oaks and elms.",
        "Why?",
        "Ann: Oaks and elms.",
        "So?",
    ]


def test_a_reply_without_a_conclusion_is_kept_whole() -> None:
    talk = said("### 🔵 Ann", "Oaks.", "\n---\n\n### 🔴 Bob", "Elms.")
    assert kept(asked("Trees?"), COUNCIL, asked("More?"), talk, asked("So?")) == [
        "Trees?",
        "Ann: Oaks and elms.",
        "More?",
        "Ann: Oaks.",
        "Bob: Elms.",
        "So?",
    ]


def test_a_conclusion_that_was_never_written_is_none() -> None:
    reply = said(
        "### 🔵 Ann",
        "Oaks.",
        "\n---\n\n### 🔴 Bob",
        "Elms.",
        "> 🏁 2 of 2 answered · nobody could write a conclusion",
        "\n---\n\n### 🔵 Ann · conclusion",
        "> ⚠️ **Ann** could not answer: boom",
    )
    assert kept(asked("Trees?"), reply, asked("So?")) == [
        "Trees?",
        "Ann: Oaks.",
        "Bob: Elms.",
        "So?",
    ]


# -- sections that grow at the same time -----------------------------------------------


def reduce_by_index(output: Output, event: Json) -> Output:
    """An event as the server applies it: by the place of the item, not by its id."""
    at, kind = event["output_index"], event["type"]
    if kind == "response.output_item.added":
        return [*output[:at], event["item"], *output[at:]]
    if kind == "response.output_item.done":
        return [*output[:at], event["item"], *output[at + 1 :]]
    nameless = {name: value for name, value in event.items() if name != "item_id"}
    return apply_response_event(output, nameless)


class Table:
    """Sections in which several speak at once, as a run would fill them."""

    def __init__(self, plan: Callable[..., Json | None], in_order: bool) -> None:
        self.transcript = mmc.Transcript("t", in_order)
        self.emitter = mmc.Emitter(self.transcript, plan, 0.0)
        self.open: list[int] = []
        self.last: dict[int, mmc.Block] = {}
        self.progress: mmc.Block | None = None

    def act(self, verb: str, which: int, text: str) -> None:
        """One change; `which` picks the section."""
        if verb == "open" or not self.open:
            self.open.append(self.transcript.open_section())
            self.add(self.open[-1], "message", f"[{self.open[-1]}]")
            return
        section = self.open[which % len(self.open)]
        if verb == "grow":
            block = self.last[section]
            block.append(text)
            self.emitter.emit_replace(block)
        elif verb in ("close", "late"):
            self.open.remove(section)
            self.transcript.late |= {section} if verb == "late" else set()
            self.transcript.growing.discard(section)
            self.emitter.nudge()
        elif verb == "progress":
            self.progress = self.progress or self.transcript.add(
                "message", "", mmc.LAST
            )
            self.emitter.emit_replace(self.progress, text)
        elif verb != "flush":
            self.add(section, verb, text)

    def add(self, section: int, kind: Any, text: str) -> None:
        """A new block at the end of a section."""
        block = self.transcript.add(kind, f"S{section}", section)
        self.last[section] = block
        self.emitter.emit_replace(block, text)

    def close(self) -> None:
        """Everybody is done."""
        while self.open:
            self.act("close", 0, "")
        self.emitter.close()


VERBS = ("open", "grow", "grow", "grow", "message", "reasoning", "function_call")


def acts(*more: str) -> Any:
    """What may happen to a table."""
    verbs = [*VERBS, "function_call_output", "close", "flush", "flush", *more]
    text = st.text("ab", min_size=1, max_size=3)
    act = st.tuples(st.sampled_from(verbs), st.integers(0, 7), text)
    return st.lists(act, max_size=60)


ACTS = acts()


@given(ACTS)
def test_a_page_has_every_growing_section_exactly_at_every_flush(
    acts: list[tuple[str, int, str]],
) -> None:
    table = Table(mmc.plan_items, in_order=False)
    page: Output = []
    server: Output = []
    for verb, which, text in [*acts, ("flush", 0, "")]:
        table.act(verb, which, text)
        if verb == "flush":
            for event in table.emitter.flush():
                page = apply_response_event(page, event)
                server = reduce_by_index(server, event)
            assert page == server == list(map(mmc.render_item, table.transcript.blocks))
    speakers = [item["speaker"] for item in page]
    assert speakers == sorted(speakers, key=lambda one: int(one[1:]))


@given(acts("late", "progress"))
def test_on_a_page_nothing_above_ever_moves_and_nothing_is_lost(
    acts: list[tuple[str, int, str]],
) -> None:
    table = Table(mmc.plan_items, in_order=True)
    page: Output = []
    server: Output = []

    def flush() -> None:
        nonlocal page, server
        for event in table.emitter.flush():
            page = apply_response_event(page, event)
            server = reduce_by_index(server, event)
        assert page == server

    for verb, which, text in acts:
        table.act(verb, which, text)
        if verb != "flush":
            continue
        before = [item for item in page if item["speaker"]]
        flush()
        last = before[-1]["speaker"] if before else ""  # this section may still grow
        still = [item for item in before if item["speaker"] != last]
        assert page[: len(still)] == still
        assert [item["id"] for item in before] == [
            *(item["id"] for item in page[: len(before)])
        ]
        if table.progress:
            assert page[-1] == mmc.render_item(table.progress)
    table.close()
    flush()
    assert page == list(map(mmc.render_item, table.transcript.blocks))


@given(ACTS)
def test_a_client_that_can_only_append_reads_the_sections_in_order(
    acts: list[tuple[str, int, str]],
) -> None:
    table = Table(mmc.plan_chunk, in_order=True)
    chunks: list[Json] = []
    for verb, which, text in acts:
        table.act(verb, which, text)
        if verb == "flush":
            chunks += table.emitter.flush()
            if table.open:
                now = "".join(chunk.get("content", "") for chunk in chunks)
                assert all(f"[{later}]" not in now for later in table.open[1:])
    table.close()
    chunks += table.emitter.flush()
    content = "".join(chunk.get("content", "") for chunk in chunks)
    assert content.strip() == mmc.render_markdown(table.transcript)
    reasoning = "".join(chunk.get("reasoning_content", "") for chunk in chunks)
    assert reasoning == "".join(
        block.text for block in table.transcript.blocks if block.kind == "reasoning"
    )
    assert table.emitter.flush() == []


def test_a_late_block_of_an_early_section_goes_before_the_later_ones() -> None:
    transcript = mmc.Transcript("t", in_order=True)
    first, second = transcript.open_section(), transcript.open_section()
    one = transcript.add("message", "Ann", first)
    two = transcript.add("message", "Bob", second)
    three = transcript.add("reasoning", "Ann", first)
    assert transcript.blocks == [one, three, two]
    assert transcript.may_show(one) and not transcript.may_show(two)
    transcript.growing.discard(first)
    assert transcript.may_show(two)


def test_what_only_passes_by_never_reaches_an_api_client() -> None:
    transcript = mmc.Transcript("t")
    block = transcript.add("message", "", passing=True)
    block.append("> ⏳ waiting for Ann")
    assert mmc.plan_chunk(block, 0) is None


# -- figures ---------------------------------------------------------------------------


def count_call(ledger: mmc.Ledger, who: str, times: Sequence[Any], out: int) -> None:
    """A call that began, said its first token and ended at these times."""
    clock = mmc.Deadline(600.0)
    clock.begun, clock.first_at = times[:2]
    clock.now = lambda: times[2]
    counts = {"input_tokens": 750, "output_tokens": out} if out else {}
    ledger.count_call(who, counts, clock)


def test_figures_have_the_first_token_of_all_and_the_time_of_answering() -> None:
    run, _ = make_run()
    count_call(run.ledger, "Ann", (10.0, None, 11.0), 0)
    count_call(run.ledger, "Ann", (20.0, 20.5, 22.5), 60)
    count_call(run.ledger, "Ann", (30.0, 30.1, 31.1), 30)
    count_call(run.ledger, "Ann", (40.0, 40.1, 40.2), 500)  # a ballot, all at once
    (share,) = run.ledger.shares.values()
    assert (share["calls"], share["first_token_seconds"]) == (4, 0.5)
    assert share["tokens_per_second"] == 30.0
    assert share["output_tokens"] == 590
    assert run.ledger.calls == 4


def test_the_closing_line_and_the_usage_say_the_same() -> None:
    run, _ = make_run()
    count_call(run.ledger, "Ann", (0.0, 0.25, 1.25), 40)
    count_call(run.ledger, "Ann", (2.0, 2.5, 3.75), 50)  # a ballot
    count_call(run.ledger, "Bob", (0.0, None, 1.0), 0)
    assert run.ledger.report()["participants"] == {
        "Ann": {
            "input_tokens": 1500,
            "output_tokens": 90,
            "total_tokens": 1590,
            "calls": 2,
            "first_token_seconds": 0.25,
            "tokens_per_second": 40.0,
        },
        "Bob": {"calls": 1},
    }
    assert run._describe_figures() == mmc.render_fold(
        "⏱️ 3 model calls · 1,590 tokens",
        "| | First token | Tokens/s | In | Out |\n|---|---|---|---|---|\n"
        "| Ann | 0.2 s | 40 | 1,500 | 90 |\n| Bob | – | – | – | – |",
    )


def test_the_closing_line_says_what_it_cost_where_the_provider_does() -> None:
    run, _ = make_run()
    counts = {
        "input_tokens": 9,
        "output_tokens": 1,
        "total_tokens": 10,
        "cost": 0.01234,
    }
    run.ledger.shares["Ann"] = counts
    run.ledger.usage, run.ledger.calls = counts, 2
    shown = run._describe_figures()
    assert shown == mmc.render_fold(
        "⏱️ 2 model calls · 10 tokens · cost 0.0123",
        "| | In | Out | Cost |\n|---|---|---|---|\n| Ann | 9 | 1 | 0.0123 |\n"
        "| Bob | – | – | – |",
    )
    assert turns(asked("Trees?"), said("### 🔵 Ann", "Oaks.", shown)) == [
        ("Ann", "Oaks.", False)
    ]


def test_without_any_figure_the_closing_line_counts_the_calls() -> None:
    run, _ = make_run()
    assert run._describe_figures() == "> ⏱️ 0 model calls"


async def test_the_last_line_says_how_far_everybody_is_who_is_not_seen_yet() -> None:
    run, _ = make_run(aliases=("Ann", "Bob", "Cat", "Dan"))
    ends = {alias: asyncio.Event() for alias in run.cast.participants}
    sections = {}

    async def turn(alias: str) -> mmc.Turn:
        await ends[alias].wait()
        return mmc.Turn(alias, "Oaks.")

    for alias, speaker in run.cast.participants.items():
        section = mmc.Section(run.screen, speaker, mmc.Deadline(600.0))
        section.task = asyncio.create_task(turn(alias))
        sections[alias] = section
    ann, bob, cat, dan = sections.values()

    def line() -> str:
        return re.sub(r"\d\.\d", "1.0", run.screen.ours["progress"].text)

    for section in (ann, bob, dan):
        section.clock.admitted_at = 1.0
    ann.begin_reply().apply(mmc.TextDelta("Oaks."))
    bob.begin_reply().apply(mmc.TextDelta("Hm.", "reasoning"))
    reply = dan.begin_reply()
    reply.apply(mmc.TextDelta("Elms it is."))
    ends["Dan"].set()
    waiting = asyncio.create_task(run._wait_in_view(sections, "answered", 1))
    while "progress" not in run.screen.ours:
        await asyncio.sleep(0)
    assert line() == (
        "> ⏳ 1 of 4 answered · 1.0 s\n> 🔴 Bob · thinking\n"
        "> 🟢 Cat · queued\n> 🟠 Dan · done, 3 words"
    )
    assert dan.describe() and not ann.describe()
    cat.clock.admitted_at = 1.0
    assert cat.describe() == "🟢 Cat · waiting"
    reply = bob.begin_reply()
    reply.apply(mmc.TextDelta("Firs."))
    assert bob.describe() == "🔴 Bob · writing, 1 word"
    run.screen.close(ann.number)
    assert not bob.describe() and dan.describe()
    for end in ends.values():
        end.set()
    assert list(await waiting) == list(sections)
    assert line() == ""
