"""What private steps cost: epsilon of T steps of a sampled Gaussian, and the noise or the steps that a budget allows.

Each step draws every row by itself with probability `rate`, and sums the drawn rows' gradients, each cut to norm C. To
each number of the sum it adds Gaussian noise of standard deviation `noise_multiplier` · C (Abadi et al. 2016,
https://arxiv.org/abs/1607.00133). Two sets of rows are neighbours where one has one row more than the other.

There is one bound here, whatever the arguments: privacy loss distributions, composed by FFT (Koskela et al. 2020,
https://arxiv.org/abs/1906.03049), as Google's dp-accounting has them. A step's losses are put on a grid by "connect the
dots" (Doroshenko et al. 2022, https://arxiv.org/abs/2207.04380), which can only overstate epsilon. How wide the grid is
follows from noise and rate alone (`_grid`), and all grids are nested. So epsilon never rises with noise or delta, and
never falls with rate or steps.
"""

import math
from bisect import bisect_right
from functools import cache, lru_cache
from typing import TYPE_CHECKING

import numpy as np
from scipy.optimize import brentq

from peertune.errors import RecipeError

if TYPE_CHECKING:
    from dp_accounting.pld.privacy_loss_distribution import PrivacyLossDistribution

LEAST_NOISE, MOST_NOISE = 0.05, 1e6
"""Noise multipliers to choose from. With less than the least, a row that a single step draws gives away 200 or more."""
MOST = 500.0
"""An epsilon above this, which protects nothing, is told as infinite: far above it numbers overflow."""
LEAST_DELTA = 1e-12
"""Of smaller ones the composition can't tell: it leaves out tails of 1e-15."""
TOLERANCE = 1e-3
"""By what share of it a noise multiplier may be larger than need be."""


def epsilon(noise_multiplier: float, rate: float, steps: int, delta: float) -> float:
    """Return an upper bound on the epsilon of `steps` steps at this `delta`, whichever row is added or removed.

    Where it is .001 or more, a finer grid states at most 1 % less. It is 0 without steps, infinite above MOST and so
    without noise.

    Args:
        noise_multiplier: the noise's standard deviation, in clipping norms.
        rate: the probability with which a step draws a row. At 1 all are drawn, and the steps are plain Gaussian ones.
        steps: how many, T.
        delta: the probability for which epsilon says nothing.

    Raises:
        RecipeError: `delta` is below LEAST_DELTA or not below 1, the noise is negative, or dp-accounting is missing.
    """
    _check_delta(delta)
    _check_noise(noise_multiplier)
    return _epsilon(noise_multiplier, rate, steps, delta)


def noise_multiplier(epsilon: float, rate: float, steps: int, delta: float) -> float:
    """Return the smallest noise multiplier with which `steps` steps cost `epsilon` or less.

    It is too large by at most TOLERANCE, and never too small: what `epsilon` says of it is within the budget. 0 without
    steps, else at least LEAST_NOISE.

    Raises:
        RecipeError: no noise up to MOST_NOISE is enough, `epsilon` or `delta` can't be, or dp-accounting is missing.
    """
    _check_delta(delta)
    _check_budget(epsilon)
    if not steps:
        return 0.0

    def excess(log_noise: float) -> float:
        """By what factor the steps cost too much, as a logarithm that stays finite."""
        return math.log(min(max(_epsilon(math.exp(log_noise), rate, steps, delta) / epsilon, 1e-3), 1e3))

    high = 1.0
    while _epsilon(high, rate, steps, delta) > epsilon:
        if high > MOST_NOISE:
            many = "a single step" if steps == 1 else f"{steps} steps"
            raise RecipeError(f"privacy.epsilon: {epsilon:g} is too small for {many}, whatever the noise; give more")
        high *= 2
    low = high / 2
    while _epsilon(low, rate, steps, delta) <= epsilon:
        if low <= LEAST_NOISE:
            return LEAST_NOISE
        low, high = max(low / 2, LEAST_NOISE), low
    noise = math.exp(brentq(excess, math.log(low), math.log(high), xtol=TOLERANCE / 3))
    while _epsilon(noise, rate, steps, delta) > epsilon:  # once at most: the root is that near
        noise *= 1 + TOLERANCE / 2
    return noise


def steps_within(epsilon: float, noise_multiplier: float, rate: float, delta: float, most: int) -> int:
    """Return how many steps cost `epsilon` or less: the largest number up to `most`, 0 where one is too many.

    Raises:
        RecipeError: `epsilon`, `delta` or the noise can't be, or dp-accounting is missing.
    """
    _check_delta(delta)
    _check_budget(epsilon)
    _check_noise(noise_multiplier)
    if _epsilon(noise_multiplier, rate, most, delta) <= epsilon:
        return most
    return bisect_right(range(1, most), epsilon, key=lambda steps: _epsilon(noise_multiplier, rate, steps, delta))


@cache
def _epsilon(noise_multiplier: float, rate: float, steps: int, delta: float) -> float:
    if not steps or not rate or noise_multiplier == math.inf:
        return 0.0
    if noise_multiplier < LEAST_NOISE:
        return math.inf
    one = _one_step(noise_multiplier, rate, math.log(delta) - 20)
    with np.errstate(over="ignore"):  # far above MOST
        bound = float(one.self_compose(steps).get_epsilon_for_delta(delta))
    return bound if bound <= MOST else math.inf


@lru_cache(maxsize=1)  # for one number of steps after the other
def _one_step(noise_multiplier: float, rate: float, log_tail: float) -> "PrivacyLossDistribution":
    """Return how one step's losses are distributed; what is rarer than `log_tail` says is taken to be without end."""
    try:
        from dp_accounting.pld.privacy_loss_distribution import from_gaussian_mechanism
    except ImportError:
        raise RecipeError("privacy: needs dp-accounting; pip install 'peertune[private]'") from None
    return from_gaussian_mechanism(
        noise_multiplier,
        log_mass_truncation_bound=log_tail,
        value_discretization_interval=_grid(noise_multiplier, rate),
        sampling_prob=rate,
    )


def _grid(noise_multiplier: float, rate: float) -> float:
    """Return how wide the grid of losses is: a power of two, 1/64 or up to a quarter of the losses' standard deviation.

    A grid of width h adds up to h² / 6 to the variance of a step's loss, which is about rate² · (exp(1 / noise²) - 1).
    """
    deviation = rate * math.sqrt(math.expm1(min(noise_multiplier**-2, 100)))
    return 2.0 ** min(-6, math.floor(math.log2(deviation / 4)))


def _check_budget(epsilon: float) -> None:
    if not 0 < epsilon < math.inf:
        raise RecipeError(f"privacy.epsilon: {epsilon:g} is no budget, give a number above 0")


def _check_delta(delta: float) -> None:
    if not LEAST_DELTA <= delta < 1:
        raise RecipeError(
            f"privacy.delta: {delta:g} can't be, give a number from {LEAST_DELTA:g} to below 1, such as 1e-5"
        )


def _check_noise(noise_multiplier: float) -> None:
    if not noise_multiplier >= 0:
        raise RecipeError(f"privacy.noise_multiplier: {noise_multiplier:g} can't be, give 0 or more")
