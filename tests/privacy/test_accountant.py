"""What private steps cost, held against closed forms and against the accountants of two libraries."""

import logging
import math
import sys
from itertools import pairwise

import numpy as np
import pytest
from dp_accounting import GaussianDpEvent, PoissonSampledDpEvent
from dp_accounting.pld.privacy_loss_distribution import from_gaussian_mechanism
from dp_accounting.rdp import rdp_privacy_accountant
from scipy.special import ndtr

from peertune.errors import RecipeError
from peertune.privacy.accountant import LEAST_NOISE, MOST, TOLERANCE, epsilon, noise_multiplier, steps_within

TRAP = (0.6, 0.02, 500, 1e-5)
"""Noise, rate, steps and delta, by which Gaussian differential privacy's central limit says too little."""
SAMPLED = [
    TRAP,
    (1.1, 256 / 60_000, 14_062, 1e-5),
    (0.8, 0.002, 5_000, 1e-6),
    (2.0, 0.1, 2_000, 1e-5),
    (0.9, 0.3, 10, 1e-7),
    (6.0, 0.5, 300, 1e-4),
]
GAUSSIAN = [(1.0, 1.0, 1, 1e-5), (5.0, 1.0, 30, 1e-7), (40.0, 1.0, 1_000, 1e-3)]
ORDERS = [*(x / 8 for x in range(12, 32)), *range(4, 64), 128, 256]

sampled = pytest.mark.parametrize(("noise", "rate", "steps", "delta"), SAMPLED)
every = pytest.mark.parametrize(("noise", "rate", "steps", "delta"), SAMPLED + GAUSSIAN)


@pytest.fixture(scope="module", autouse=True)
def quiet() -> None:
    """Opacus sets up logging for the process as it is imported; the other tests are to have it as it was."""
    handlers = logging.root.handlers[:]
    import opacus  # noqa: F401

    logging.root.handlers[:] = handlers


def gaussian_delta(epsilon: float, mu: float) -> float:
    """The analytic Gaussian mechanism's delta, sensitivity / noise = mu (Balle & Wang 2018, theorem 5)."""
    return float(ndtr(mu / 2 - epsilon / mu) - math.exp(epsilon) * ndtr(-mu / 2 - epsilon / mu))


def rdp(noise: float, rate: float, steps: int, delta: float) -> tuple[float, float]:
    """Epsilon by Rényi divergences, as dp-accounting and as Opacus have them."""
    from opacus.accountants.analysis.rdp import compute_rdp, get_privacy_spent

    one = rdp_privacy_accountant.RdpAccountant(ORDERS)
    one.compose(PoissonSampledDpEvent(rate, GaussianDpEvent(noise)), steps)
    other = compute_rdp(q=rate, noise_multiplier=noise, steps=steps, orders=ORDERS)
    return one.get_epsilon(delta), float(get_privacy_spent(orders=ORDERS, rdp=other, delta=delta)[0])


@every
def test_the_bound_is_below_renyis_on_which_both_libraries_agree(
    noise: float, rate: float, steps: int, delta: float
) -> None:
    one, other = rdp(noise, rate, steps, delta)
    assert one == pytest.approx(other, rel=0.01)
    assert epsilon(noise, rate, steps, delta) < min(one, other)


@sampled
def test_the_bound_is_that_of_opacus_within_the_error_which_that_states(
    noise: float, rate: float, steps: int, delta: float
) -> None:
    from opacus.accountants import PRVAccountant

    accountant = PRVAccountant()
    accountant.history = [(noise, rate, steps)]
    error = 0.01
    above = accountant.get_epsilon(delta, eps_error=error)  # the upper end of where epsilon is
    assert above - 2.1 * error <= epsilon(noise, rate, steps, delta) <= 1.01 * above


@pytest.mark.parametrize(("noise", "rate", "steps", "delta"), GAUSSIAN)
def test_steps_that_draw_every_row_are_one_analytic_gaussian_with_noise_less_by_the_root_of_their_number(
    noise: float, rate: float, steps: int, delta: float
) -> None:
    bound, mu = epsilon(noise, rate, steps, delta), math.sqrt(steps) / noise
    assert gaussian_delta(bound, mu) <= delta < gaussian_delta(bound / 1.01, mu)


@pytest.mark.parametrize("rate", [0.004, 0.1, 0.7])
@pytest.mark.parametrize("noise", [0.4, 1.0, 6.0])
def test_one_step_costs_what_the_closed_form_of_a_sampled_gaussian_says(noise: float, rate: float) -> None:
    delta = rate / 1_000

    def exact(epsilon: float) -> float:
        return rate * gaussian_delta(math.log1p(math.expm1(epsilon) / rate), 1 / noise)

    bound = epsilon(noise, rate, 1, delta)
    assert exact(bound) <= delta < exact(bound / 1.01)


def test_a_grid_eight_times_finer_says_at_most_a_hundredth_less() -> None:
    for noise, rate, steps, delta in [
        TRAP,
        *SAMPLED[3:],
        *GAUSSIAN,
        (1.29, 0.071, 3_000, 1e-6),
        (8.0, 0.5, 8_000, 1e-4),
    ]:
        step = min(1 / 64, rate * math.sqrt(math.expm1(noise**-2)) / 4) / 8
        finer = from_gaussian_mechanism(noise, value_discretization_interval=step, sampling_prob=rate)
        least = finer.self_compose(steps).get_epsilon_for_delta(delta)
        assert least * (1 - 1e-9) <= epsilon(noise, rate, steps, delta) <= 1.01 * least


def test_the_central_limit_says_too_little_where_steps_are_few_and_noise_is_small() -> None:
    from opacus.accountants.analysis.gdp import compute_eps_poisson

    noise, rate, steps, delta = TRAP
    limit = compute_eps_poisson(steps=steps, noise_multiplier=noise, sample_rate=rate, delta=delta)
    assert limit == pytest.approx(8.41, abs=0.01)
    assert 10.2 < epsilon(*TRAP) < 10.4
    assert min(rdp(*TRAP)) == pytest.approx(11.8, abs=0.1)


def test_epsilon_falls_with_noise_and_delta_and_rises_with_rate_and_steps() -> None:
    noises = np.geomspace(0.4, 40, 20).tolist()
    rates = np.geomspace(0.005, 1, 20).tolist()
    steps = np.unique(np.geomspace(1, 20_000, 15).astype(int)).tolist()
    deltas = np.geomspace(1e-11, 1e-2, 10).tolist()
    falling = [
        [epsilon(noise, 0.05, 100, 1e-5) for noise in noises],
        [epsilon(2.0, rate, 100, 1e-5) for rate in reversed(rates)],
        [epsilon(1.5, 0.01, number, 1e-5) for number in reversed(steps)],
        [epsilon(0.8, 0.02, 300, delta) for delta in deltas],
    ]
    for costs in falling:
        assert all(more > less > 0 for more, less in pairwise(costs))


@pytest.mark.parametrize(("rate", "steps"), [(0.003, 5_000), (0.02, 1), (0.2, 600), (1.0, 40)])
@pytest.mark.parametrize("budget", [0.2, 2.0, 9.0])
def test_the_noise_for_a_budget_stays_within_it_and_hardly_less_would_not(
    budget: float, rate: float, steps: int
) -> None:
    noise = noise_multiplier(budget, rate, steps, 1e-5)
    assert epsilon(noise, rate, steps, 1e-5) <= budget < epsilon(noise / (1 + TOLERANCE), rate, steps, 1e-5)


@pytest.mark.parametrize(("noise", "rate", "budget"), [(0.9, 0.03, 4.0), (1.5, 0.01, 1.0), (6.0, 1.0, 3.0)])
def test_the_steps_within_a_budget_are_all_that_fit(noise: float, rate: float, budget: float) -> None:
    fit = steps_within(budget, noise, rate, 1e-6, 50_000)
    assert epsilon(noise, rate, fit, 1e-6) <= budget < epsilon(noise, rate, fit + 1, 1e-6)
    assert 0 < fit < 50_000
    for most in (0, 1, fit - 1, fit, fit + 1):
        assert steps_within(budget, noise, rate, 1e-6, most) == min(most, fit)
    assert steps_within(0.01, noise, rate, 1e-6, 50_000) == 0


def test_nothing_costs_nothing_and_no_noise_everything() -> None:
    assert epsilon(0.0, 0.1, 0, 1e-5) == epsilon(1.0, 0.0, 9, 1e-5) == epsilon(math.inf, 0.1, 9, 1e-5) == 0
    assert epsilon(0.0, 0.1, 1, 1e-5) == epsilon(LEAST_NOISE / 2, 0.1, 1, 1e-5) == math.inf
    assert noise_multiplier(1.0, 0.1, 0, 1e-5) == 0
    assert epsilon(1.0, 0.5, 3_000, 1e-5) == math.inf  # above MOST
    assert noise_multiplier(2 * MOST, 0.5, 1, 1e-5) == LEAST_NOISE


def test_what_can_not_be_is_refused_in_a_line_that_names_the_key() -> None:
    budget = "privacy.epsilon: {} is no budget, give a number above 0"
    delta = "privacy.delta: {} can't be, give a number from 1e-12 to below 1, such as 1e-5"
    for wrong, refused in [(0, "0"), (-1.5, "-1.5"), (math.inf, "inf"), (math.nan, "nan")]:
        with pytest.raises(RecipeError) as caught:
            noise_multiplier(wrong, 0.1, 10, 1e-5)
        assert str(caught.value) == budget.format(refused)
        with pytest.raises(RecipeError) as caught:
            steps_within(wrong, 1.0, 0.1, 1e-5, 10)
        assert str(caught.value) == budget.format(refused)
    for wrong, refused in [(0, "0"), (1, "1"), (-1e-5, "-1e-05"), (1e-13, "1e-13"), (math.nan, "nan")]:
        for call in (
            lambda wrong=wrong: epsilon(1.0, 0.1, 10, wrong),
            lambda wrong=wrong: noise_multiplier(1.0, 0.1, 10, wrong),
            lambda wrong=wrong: steps_within(1.0, 1.0, 0.1, wrong, 10),
        ):
            with pytest.raises(RecipeError) as caught:
                call()
            assert str(caught.value) == delta.format(refused)
    noise = r"^privacy\.noise_multiplier: -0\.1 can't be, give 0 or more$"
    with pytest.raises(RecipeError, match=noise):
        epsilon(-0.1, 0.1, 10, 1e-5)
    with pytest.raises(RecipeError, match=noise):
        steps_within(1.0, -0.1, 0.1, 1e-5, 10)


def test_a_budget_that_no_noise_is_enough_for_is_refused() -> None:
    with pytest.raises(RecipeError) as caught:
        noise_multiplier(1e-9, 0.5, 1, 1e-9)
    assert str(caught.value) == "privacy.epsilon: 1e-09 is too small for a single step, whatever the noise; give more"
    with pytest.raises(RecipeError, match=r"^privacy\.epsilon: 1e-09 is too small for 20 steps, whatever the noise; "):
        noise_multiplier(1e-9, 1.0, 20, 1e-9)


def test_without_the_library_it_is_said_what_installs_it(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "dp_accounting.pld.privacy_loss_distribution", None)
    with pytest.raises(RecipeError) as caught:
        epsilon(1.234567, 0.1, 10, 1e-5)
    assert str(caught.value) == "privacy: needs dp-accounting; pip install 'peertune[private]'"
