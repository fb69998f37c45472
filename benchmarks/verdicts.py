"""Row 15: how often the best answer is found, by simulated judges of known answers.

Every member's answer has a quality, and every judge sees it through noise and through
what judges are known for: the answer that stands first, the long one and the one of its
own model look better, some judges are stricter, scores are whole and end at ten, and
some ballots are nothing. The ballots are written as a model writes them, and read and
added up by the plugin's own code.
"""

from __future__ import annotations

import json
import math
import random
from collections.abc import Callable, Mapping, Sequence
from concurrent.futures import ProcessPoolExecutor
from dataclasses import dataclass, replace
from multiprocessing import get_context
from statistics import fmean, stdev

from benchmarks.table import Measured
from tests.unit.plugin import mmc

TRIALS = 4000


@dataclass(frozen=True, slots=True)
class Setting:
    """A table of judges; one is the spread of the answers' quality."""

    members: int = 4
    noise: float = 1.0
    position: float = 0.5  # how much better what stands first looks than the last
    length: float = 0.3  # how much better an answer looks that is longer by one spread
    kinship: float = 0.5  # how much better an answer of one's own model looks
    strictness: float = 1.0  # the spread of the judges' own levels, in qualities
    step: float = 1.5  # points of ten for one quality
    middle: float = 7.0  # points of a usual answer
    invalid: float = 0.05
    shuffled: bool = True
    spoiler: bool = False  # the first seat gives everybody else nothing
    parrot: bool = False  # the first seat finds what it reads first by far the best


STANDARD = Setting()
HIGH, SPOILED = "scores near ten", "one gives noughts"
PARROT = "one repeats the order it reads"
SETTINGS: dict[str, Setting] = {
    "standard": STANDARD,
    "clear judges": replace(STANDARD, noise=0.5),
    "poor judges": replace(STANDARD, noise=2.0),
    "strong position bias": replace(STANDARD, position=1.5),
    "length matters much": replace(STANDARD, length=1.0),
    "own model preferred": replace(STANDARD, kinship=1.5),
    "levels far apart": replace(STANDARD, strictness=2.0),
    "levels all alike": replace(STANDARD, strictness=0.0),
    HIGH: replace(STANDARD, middle=9.0),
    "three in ten lost": replace(STANDARD, invalid=0.3),
    SPOILED: replace(STANDARD, spoiler=True),
    PARROT: replace(STANDARD, parrot=True),
}


@dataclass(frozen=True, slots=True)
class Round:
    """One question: the members, the best one of them, and the ballots."""

    members: list[str]
    best: str
    ballots: list[mmc.Ballot]
    ranks: list[dict[str, float]]
    """What the mean rank of before was taken of: the places of each ballot."""
    scores: list[tuple[str, dict[str, float]]]
    """The scores of each ballot, with its voter."""


def play(setting: Setting, chance: random.Random) -> Round:
    """One question, answered and judged."""
    members = [f"m{seat}" for seat in range(setting.members)]
    quality = {alias: chance.gauss() for alias in members}
    length = {alias: chance.gauss() for alias in members}
    seed = str(chance.random())
    played = Round(members, max(members, key=quality.__getitem__), [], [], [])
    for voter in members:
        letters = mmc.letters_for(voter, members, seed)
        if not setting.shuffled:
            letters = dict(zip(letters, sorted(letters.values()), strict=True))
        level = chance.gauss(0, setting.strictness)
        seen: dict[str, float] = {}
        for place, alias in enumerate(letters.values()):
            ahead = 0.5 - place / max(len(letters) - 1, 1)
            kin = {voter, alias} == {"m0", "m1"}
            seen[alias] = (
                quality[alias]
                + chance.gauss(0, setting.noise)
                + setting.position * ahead
                + setting.length * length[alias]
                + setting.kinship * kin
            )
        if chance.random() < setting.invalid:
            continue
        scores = {
            alias: min(max(round(setting.middle + level + setting.step * x), 0), 10)
            for alias, x in seen.items()
        }
        if setting.spoiler and voter == "m0":
            scores, seen = dict.fromkeys(scores, 0), dict.fromkeys(seen, 0.0)
        if setting.parrot and voter == "m0":
            seen = {alias: -float(place) for place, alias in enumerate(seen)}
            scores = {alias: max(10 + 3 * int(x), 0) for alias, x in seen.items()}
        judge(played, mmc.BallotPaper(voter, "", letters), scores, seen)
    return played


def judge(
    played: Round,
    paper: mmc.BallotPaper,
    scores: Mapping[str, float],
    seen: Mapping[str, float],
) -> None:
    """One ballot, written by a model and read by the plugin."""
    letter = {alias: letter for letter, alias in paper.choices.items()}
    places = sorted(set(seen.values()), reverse=True)
    written = {
        "scores": {letter[alias]: score for alias, score in scores.items()},
        "ranking": [[letter[a] for a in seen if seen[a] == place] for place in places],
    }
    ballot = mmc.read_ranking(json.dumps(written), paper)
    assert isinstance(ballot, mmc.Ballot)
    played.ballots.append(ballot)
    below = {a: sum(seen[a] < other for other in seen.values()) for a in seen}
    tied = {a: sum(seen[a] == other for other in seen.values()) for a in seen}
    played.ranks.append({a: below[a] + (tied[a] + 1) / 2 for a in seen})
    played.scores.append((paper.voter, dict(scores)))


# --- ways to find the best one ------------------------------------------------------


def ours(played: Round) -> str:
    """What the plugin does."""
    best: str = mmc.tally(played.members, played.ballots)[0].alias
    return best


def of_means(played: Round, values: Sequence[Mapping[str, float]]) -> str:
    """The highest mean; the first seat where several have it."""
    means = {}
    for alias in played.members:
        found = [each[alias] for each in values if alias in each]
        means[alias] = round(fmean(found), 6) if found else -math.inf
    return max(played.members, key=means.__getitem__)


def mean_rank(played: Round) -> str:
    """What the plugin did before: the mean of the ranks, scaled to the ballot."""
    return of_means(
        played,
        [
            {a: -(rank - 1) / max(len(ranks) - 1, 1) for a, rank in ranks.items()}
            for ranks in played.ranks
        ],
    )


def majority(played: Round) -> str:
    """Whom most put first."""
    firsts = [
        {a: float(ranks.get(a) == min(ranks.values())) for a in played.members}
        for ranks in played.ranks
    ]
    return of_means(played, firsts)


def mean_score(played: Round) -> str:
    """The mean of the scores as they are."""
    return of_means(played, [scores for _, scores in played.scores])


def places_only(played: Round) -> str:
    """Ours without scores."""
    ballots = [
        mmc.Ballot(voter, {alias: -rank for alias, rank in ranks.items()})
        for (voter, _), ranks in zip(played.scores, played.ranks, strict=True)
    ]
    best: str = mmc.tally(played.members, ballots)[0].alias
    return best


def scores_only(played: Round) -> str:
    """Ours without places."""
    ballots = [mmc.Ballot(voter, scores) for voter, scores in played.scores]
    best: str = mmc.tally(played.members, ballots)[0].alias
    return best


def levels_kept(played: Round) -> str:
    """Ours without taking the judges' own levels out."""
    return of_means(played, [ballot.values for ballot in played.ballots])


def unlimited(played: Round) -> str:
    """Ours where a judge may move a score as far as it likes."""
    best: str = mmc.tally(played.members, played.ballots, math.inf)[0].alias
    return best


def kin_dropped(played: Round) -> str:
    """Ours without the ballots of the two seats of one model."""
    ballots = [b for b in played.ballots if b.voter not in ("m0", "m1")]
    best: str = mmc.tally(played.members, ballots)[0].alias
    return best


Way = Callable[[Round], str]
WAYS: dict[str, Way] = {
    "ours": ours,
    "mean rank": mean_rank,
    "majority": majority,
    "mean score": mean_score,
}
WITHOUT: dict[str, Way] = {
    "worth_scores": places_only,
    "worth_places": scores_only,
    "worth_levels": levels_kept,
    "worth_kin": kin_dropped,
}
"""What is switched off once, and what then is left."""


@dataclass(frozen=True, slots=True)
class Share:
    """A share of all trials in per cent, with the half of its 95 % interval."""

    percent: float
    within: float


def share_of(hits: Sequence[float]) -> Share:
    """Of ones and noughts, or of the differences of two such."""
    return Share(
        100 * fmean(hits), 196 * stdev(hits) / math.sqrt(len(hits)) if hits[1:] else 0
    )


def found_by(
    ways: Sequence[Way], setting: Setting, trials: int = TRIALS
) -> list[list[float]]:
    """For each way whether it found the best answer, question by question."""
    chance = random.Random(setting.members)
    rounds = [play(setting, chance) for _ in range(trials)]
    return [[float(way(each) == each.best) for each in rounds] for way in ways]


def gain(of: Sequence[float], over: Sequence[float]) -> Share:
    """By how much one finds it more often than another, on the same questions."""
    return share_of([a - b for a, b in zip(of, over, strict=True)])


Job = tuple[Sequence[Way], Setting, int]


def found_side_by_side(jobs: Sequence[Job]) -> list[list[list[float]]]:
    """What `found_by` gives for each of these, on all processors."""
    with ProcessPoolExecutor(mp_context=get_context("spawn")) as pool:
        return list(pool.map(found_by, *zip(*jobs, strict=True)))


def measure(trials: int = TRIALS) -> dict[str, Measured]:
    """Row 15."""
    ways = [ours, mean_rank, *WITHOUT.values()]
    in_order = replace(STANDARD, shuffled=False)
    jobs: list[Job] = [
        (ways, STANDARD, 2 * trials),
        ([ours], in_order, 2 * trials),
        ([ours, levels_kept], SETTINGS[SPOILED], trials),
        ([ours, scores_only], SETTINGS[HIGH], trials),
        ([ours, unlimited], SETTINGS[PARROT], trials),
        *(([ours, mean_rank], setting, trials) for setting in SETTINGS.values()),
    ]
    standard, (unshuffled,), *others = found_side_by_side(jobs)
    now, before, *without = standard
    spoiled, high, parrot, *gains = (gain(*pair).percent for pair in others)
    found = {
        "verdict_gain": gain(now, before).percent,
        "verdict_least": min(gains),
        "worth_shuffling": share_of(now).percent - share_of(unshuffled).percent,
        "worth_levels_spoiled": spoiled,
        "worth_places_high": high,
        "worth_limit": parrot,
    }
    for name, left in zip(WITHOUT, without, strict=True):
        found[name] = gain(now, left).percent
    return {name: Measured(percent) for name, percent in found.items()}


def curves(trials: int = TRIALS) -> dict[str, dict[str, list[list[float]]]]:
    """What is drawn: members and per cent for each way."""
    found: dict[str, list[list[float]]] = {name: [] for name in WAYS}
    ways, sizes = [*WAYS.values()], range(3, 9)
    jobs = [(ways, replace(STANDARD, members=n), trials) for n in sizes]
    for members, by_way in zip(sizes, found_side_by_side(jobs), strict=True):
        for name, hits in zip(WAYS, by_way, strict=True):
            found[name].append([members, share_of(hits).percent])
    return {"verdicts": found}


def table(trials: int = TRIALS) -> str:
    """All ways in all settings as Markdown, with 95 % intervals."""
    lines = [f"| setting | {' | '.join(WAYS)} | gain |", "|--" * (len(WAYS) + 2) + "|"]
    sizes = {f"{n} members": replace(STANDARD, members=n) for n in range(3, 9)}
    rows = {**SETTINGS, **sizes}
    for name, setting in rows.items():
        hits = found_by([*WAYS.values()], setting, trials)
        shares = [share_of(each) for each in hits] + [gain(*hits[:2])]
        cells = [f"{one.percent:.1f} ± {one.within:.1f}" for one in shares]
        lines.append(f"| {name} | {' | '.join(cells)} |")
    return "\n".join(lines)


if __name__ == "__main__":
    print(table())
