"""What guesses prove: how large epsilon must be, if so many of them were right.

Whoever tests by what a private mechanism gave away whether a row was in finds it with a chance of at most
`e^epsilon · alpha + delta`, alpha being the chance of a false alarm; and the other way round (Kairouz, Oh and
Viswanath, arXiv 1311.0776). So tests that went better than that prove a larger epsilon, up to chance.
"""

from collections.abc import Mapping
from math import log
from typing import NamedTuple

import numpy as np
from numpy.typing import NDArray
from scipy.stats import beta

CONFIDENCE = 0.999
"""How sure the bound is."""

THRESHOLDS = 100
"""So many are tried at most for each test, as many trials between each two of them."""

Floats = NDArray[np.float64]
Bools = NDArray[np.bool_]


class Guesses(NamedTuple):
    """What a test came to that says of each trial whether the row was in, and what it proves."""

    test: str
    threshold: float  # of the score, from which on the row is said to have been in
    found: int  # of those in which it was
    members: int  # trials in which it was
    alarms: int  # false ones
    others: int  # trials in which it was not
    least_epsilon: float


def most_chance(count: int, trials: int, confidence: float) -> float:
    """Return what a chance is at most, given that `count` of so many trials had it (Clopper and Pearson, one-sided)."""
    return 1.0 if count >= trials else float(beta.ppf(confidence, count + 1, trials - count))


def least_epsilon(
    found: int, members: int, alarms: int, others: int, delta: float, confidence: float = CONFIDENCE
) -> float:
    """Return what epsilon is at least, at this `delta`, given how many were found and how many alarms were false.

    Both chances, of an alarm and of a miss, are at most what they are taken to be, with half of the doubt for each.
    """
    each = 1 - (1 - confidence) / 2
    alarm, miss = most_chance(alarms, others, each), most_chance(members - found, members, each)
    proved = ((1 - delta - miss) / alarm, (1 - delta - alarm) / miss)
    return max(0.0, *(log(max(ratio, 1.0)) for ratio in proved))


def trained(features: Floats, members: Bools) -> Floats:
    """Return a score of each trial, `[S]`, that the first half of the trials teaches, from features `[S, F]`.

    It is the linear discriminant of features that are scaled to a deviation of 1, with as much added to their
    covariance. The second half has no part in it.
    """
    half = len(members) // 2
    taught, spread = members[:half], features[:half].std(0)
    x = (features - features[:half].mean(0)) / np.where(spread > 0, spread, 1)
    inside = np.concatenate([x[:half][own] - x[:half][own].mean(0) for own in (taught, ~taught)])
    covariance = inside.T @ inside / half + np.eye(x.shape[1])
    way = x[:half][taught].mean(0) - x[:half][~taught].mean(0)
    return np.asarray(x @ np.linalg.solve(covariance, way))


def judge(scores: Mapping[str, Floats], members: Bools, delta: float) -> list[Guesses]:
    """Return what each test proves, the one that counts first. A higher score says that the row was in.

    The first half of the trials chooses each test's threshold, and which of the tests counts; the second half alone is
    counted. So the first test's bound holds with `CONFIDENCE`, however many tests and thresholds were tried.

    Args:
        scores: test → its score of each trial, `[S]`.
        members: whether the row was in, `[S]`.
        delta: at which epsilon is meant.

    """
    half = len(members) // 2
    chosen = []
    for test, score in scores.items():
        tried = np.unique(np.quantile(score[:half], np.linspace(0, 1, min(half, THRESHOLDS)), method="nearest"))
        ways = [_counted(test, score[:half], members[:half], one, delta) for one in tried]
        best = max(ways, key=lambda one: one.least_epsilon + 1e-9 * (one.found / one.members - one.alarms / one.others))
        second = _counted(test, score[half:], members[half:], best.threshold, delta)
        chosen.append((best.least_epsilon, best.found / best.members - best.alarms / best.others, second))
    return [second for *_, second in sorted(chosen, key=lambda one: one[:2], reverse=True)]


def _counted(test: str, scores: Floats, members: Bools, threshold: float, delta: float) -> Guesses:
    said = scores >= threshold
    found, alarms = int((said & members).sum()), int((said & ~members).sum())
    count, others = int(members.sum()), int((~members).sum())
    least = least_epsilon(found, count, alarms, others, delta)
    return Guesses(test, float(threshold), found, count, alarms, others, least)
