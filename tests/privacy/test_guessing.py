from math import exp, log

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from scipy.special import ndtr
from scipy.stats import binom

from peertune.privacy.accountant import epsilon
from peertune.privacy.guessing import CONFIDENCE, judge, least_epsilon, most_chance, trained


@given(st.integers(0, 60), st.integers(1, 60))
def test_a_chance_is_at_most_what_would_seldom_have_come_out_so_low(count: int, trials: int) -> None:
    most = most_chance(count, trials, 0.99)
    if count >= trials:
        assert most == 1
    else:
        assert binom(trials, most).cdf(count) == pytest.approx(0.01)


@pytest.mark.parametrize(("delta", "each"), [(0.0, 1e-3 / 2), (0.01, 1e-3 / 2)])
def test_a_perfect_test_proves_as_much_as_its_trials_allow(delta: float, each: float) -> None:
    alarm = miss = 1 - each ** (1 / 100)  # none of a hundred
    assert least_epsilon(100, 100, 0, 100, delta) == pytest.approx(log((1 - delta - miss) / alarm))


def test_a_test_that_guesses_proves_nothing_whatever_it_says() -> None:
    assert least_epsilon(50, 100, 50, 100, 0.0) == 0
    assert least_epsilon(0, 100, 0, 100, 0.0) == 0
    assert least_epsilon(100, 100, 100, 100, 0.0) == 0
    assert least_epsilon(0, 0, 0, 0, 0.0) == 0


def test_of_a_gaussian_mechanism_the_bound_is_seldom_above_the_truth_and_not_far_below() -> None:
    """One step with all rows: the scores of those without the row are normal, and with it they are one higher."""
    noise, delta, draw = 1.0, 1e-3, np.random.default_rng(0)
    truth, found = epsilon(noise, 1.0, 1, delta), []
    for _ in range(50):
        members = draw.random(4_000) < 0.5
        scores = {"matched": noise * draw.normal(size=4_000) + members, "noise": draw.normal(size=4_000)}
        first, second = judge(scores, members, delta)
        assert (first.test, second.test) == ("matched", "noise")
        found.append(first.least_epsilon)
    assert max(found) <= truth  # in each of 50, where one in a thousand may be above
    likely = max(log((1 - ndtr(x - 1) - delta) / (1 - ndtr(x))) for x in np.linspace(0, 2, 50))
    assert likely / 3 < np.mean(found) < truth
    assert exp(np.mean(found)) > 1.5
    assert CONFIDENCE == 0.999


def test_the_second_half_has_no_part_in_what_is_chosen() -> None:
    draw = np.random.default_rng(1)
    members = draw.random(200) < 0.5
    score = draw.normal(size=200) + 2 * members
    other = score.copy()
    other[100:] = draw.permutation(score[100:])
    one, two = judge({"a": score}, members, 0.0)[0], judge({"a": other}, members, 0.0)[0]
    assert one.threshold == two.threshold
    assert one.found != two.found
    features = np.stack([score, draw.normal(size=200)], 1)
    changed = features.copy()
    changed[100:] = 0
    assert np.array_equal(trained(features, members)[:100], trained(changed, members)[:100])


def test_a_score_that_is_taught_is_worth_more_than_each_of_its_features() -> None:
    draw = np.random.default_rng(2)
    members = draw.random(2_000) < 0.5
    features = draw.normal(size=(2_000, 12)) + 0.5 * members[:, None]
    features[:, 3] = 7.0  # says nothing, and has no deviation
    score = trained(features, members)[1_000:]
    apart = (score[members[1_000:]].mean() - score[~members[1_000:]].mean()) / score[members[1_000:]].std()
    assert apart == pytest.approx(0.5 * 11**0.5, abs=0.2)
