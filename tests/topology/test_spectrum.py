"""Rho, the spectral gap and what else a summary says, against formulas and whole rounds."""

from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from graph_making import PROBABILITIES, seen_by
from scipy.sparse import diags_array

from peertune.assembly.registry import describe_graph
from peertune.methods.schedules import switching_interval
from peertune.topology import (
    GRAPHS,
    WEIGHTS,
    GraphSummary,
    one_period,
    rho,
    rho_draws,
    rules,
    spectrum,
    summary,
    weights_at,
)


def test_rho_of_known_and_of_drawn_rounds_follows_from_one_row_where_clients_move_round_a_grid() -> None:
    n, third, p = 1_200, 1 / 3, 0.3
    wave = 2 - 2 * np.cos(2 * np.pi * np.arange(1, n) / n)  # the Laplacian's eigenvalues
    always = (1 - third * wave) ** 2
    drawn = 1 - 2 * third * p * wave + third**2 * (p**2 * wave**2 + 2 * p * (1 - p) * wave)
    assert 1 - rho(GRAPHS["ring"](clients=n)) == pytest.approx(1 - always.max(), rel=1e-8)
    found = rho(GRAPHS["ring"](clients=n, activation=p, weights="uniform"), 300)
    assert 1 - found == pytest.approx(1 - drawn.max(), rel=0.01)
    for high, wide in ((30, 40), (40, 30)):
        rows, columns = np.divmod(np.arange(1, n), wide)
        grid = 1 - (4 - 2 * np.cos(2 * np.pi * rows / high) - 2 * np.cos(2 * np.pi * columns / wide)) / 5
        assert rho(GRAPHS["torus"](clients=n, rows=high)) == pytest.approx((grid**2).max(), abs=1e-12)
    assert rho(GRAPHS["hypercube"](clients=2_048)) == pytest.approx((1 - 2 / 12) ** 2)


def test_a_search_for_an_eigenvalue_that_would_take_too_long_ends_and_says_so(
    monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    monkeypatch.setattr(rules, "LANCZOS_WORK", 0)  # 1,024 steps
    found = rho(GRAPHS["path"](clients=5_000))
    exact = (1 / 3 + 2 / 3 * np.cos(np.pi / 5_000)) ** 2
    assert 1 - exact < 1 - found < 1e-5
    assert caplog.messages == [
        "an eigenvalue of 5000 clients did not settle in 1024 steps: what follows is a bound from below"
    ]


def test_rho_of_a_ring_of_ten_is_the_known_figure() -> None:
    assert rho(GRAPHS["ring"](clients=10)) == pytest.approx(0.762, abs=5e-4)


def test_rho_of_complete_graphs_made_alike_is_estimated_once() -> None:
    first, second, other = (GRAPHS["complete"](clients=4, activation=0.5, seed=seed) for seed in (3, 3, 4))
    rho.cache_clear()
    assert rho(first, 99) == rho(second, 99) != rho(other, 99)
    assert (rho.cache_info().misses, rho.cache_info().hits) == (2, 1)


def test_rho_of_the_complete_graph_is_zero() -> None:
    assert rho(GRAPHS["complete"](clients=10)) == pytest.approx(0, abs=1e-12)


def test_rho_of_a_period_is_that_of_its_rounds_in_their_order(tmp_path: Path) -> None:
    path = tmp_path / "contacts.txt"
    first, left, shown = [], [], []
    for start in range(3):  # the same contacts, begun elsewhere: the long run can't tell
        path.write_text("\n".join(f"{t},{(t + start) % 3},{(t + start) % 3 + 1}" for t in range(3)))
        graph = GRAPHS["trace"](clients=4, path=path)
        first.append(one_period(graph))
        left.append(rho(graph))
        shown.append(describe_graph(graph)["switching_interval"])
        assert rho_draws(graph) == 0
    assert left == pytest.approx([0.25 ** (1 / 3)] * 3)  # .63
    assert first == pytest.approx([0.742954, 0.793701, 0.793701], abs=1e-6)
    assert shown == [5, 5, 5]
    assert [switching_interval(value) for value in first if value] == [6, 7, 7]


def test_a_period_of_rounds_that_average_all_leaves_nothing() -> None:
    for clients in (8, 2_048):
        graph = GRAPHS["exponential"](clients=clients)
        assert rho(graph) == pytest.approx(0, abs=1e-12)
    assert one_period(GRAPHS["exponential"](clients=8)) == pytest.approx(0, abs=1e-12)
    assert one_period(GRAPHS["ring"](clients=8)) is None
    assert one_period(GRAPHS["matching"](clients=4, probability=0.5)) is None
    assert one_period(GRAPHS["exponential"](clients=2_048)) is None
    assert one_period(seen_by(GRAPHS["exponential"](clients=8), 3)) is None


def test_a_period_of_drawn_rounds_shrinks_the_second_moment_of_the_disagreement(tmp_path: Path) -> None:
    path = tmp_path / "contacts.txt"
    path.write_text("0,0,1\n1,1,2\n2,2,3\n")
    certain, graph = (GRAPHS["trace"](clients=4, path=path, activation=p) for p in (1.0, 0.5))
    both, apart = np.eye(16), np.kron(*[np.eye(4) - 1 / 4] * 2)
    once = np.eye(4)
    for t in range(3):  # each contact is kept or not, with the same probability
        W = weights_at(certain, t).toarray()
        both = (np.kron(W, W) / 2 + np.eye(16) / 2) @ both
    assert rho(graph, 30_000) == pytest.approx(np.abs(np.linalg.eigvals(both @ apart)).max() ** (1 / 3), abs=2e-3)
    for t in reversed(range(3)):
        W = weights_at(certain, t).toarray()
        once = W @ once @ W / 2 + once / 2
    assert one_period(graph) == pytest.approx(np.linalg.eigvalsh(once - 1 / 4)[-1] ** (1 / 3), abs=2e-3)


@pytest.mark.parametrize(("clients", "activation", "dense"), [(16, 0.5, 100), (64, 1.0, 50)])
def test_rho_of_a_period_is_the_same_where_it_is_searched_for(
    clients: int, activation: float, dense: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    ring = GRAPHS["ring"](clients=clients, activation=activation)
    thirds = np.array_split(ring.edges_at(0), 3)
    graph = replace(ring, period=3, edges_at=lambda t: thirds[t % 3], sides=())
    directly = rho(graph, 90)
    rho.cache_clear()
    monkeypatch.setattr(spectrum, "DENSE_CLIENTS", dense)
    assert 1 - rho(graph, 90) == pytest.approx(1 - directly, rel=1e-3)


@pytest.mark.thorough
@pytest.mark.parametrize(
    ("probability", "value", "root", "isolated"),
    list(
        zip(
            PROBABILITIES,
            [0.155, 0.434, 0.646, 0.799, 0.913, 0.955],
            [1.09, 1.33, 1.68, 2.23, 3.40, 4.73],
            [0.002, 0.13, 0.39, 0.63, 0.84, 0.91],
            strict=True,
        )
    ),
)
def test_ten_clients_that_meet_at_random_mix_as_expected(
    probability: float, value: float, root: float, isolated: float
) -> None:
    # The figures are largest eigenvalues of a mean of 8,000 draws, which lie a little above the truth.
    graph = GRAPHS["complete"](clients=10, activation=probability)
    found = summary(graph)
    assert found.draws == rho_draws(graph) == 100_000
    assert found.rho == pytest.approx(value, rel=0.02)
    assert round(3 * found.spectral_gap**-0.5) == round(3 * root)  # T*
    assert found.isolated_share == pytest.approx(isolated, abs=0.01)


@pytest.mark.thorough
@pytest.mark.parametrize(
    ("probability", "gap"), list(zip(PROBABILITIES, [0.465, 0.363, 0.259, 0.171, 0.081, 0.043], strict=True))
)
def test_ten_clients_that_meet_in_random_pairs_mix_as_expected(probability: float, gap: float) -> None:
    graph = GRAPHS["matching"](clients=10, probability=probability)
    # Its figures have the same bias, which is larger here.
    assert rho(graph, draws=2_000) == pytest.approx(1 - gap, rel=0.025)


@pytest.mark.thorough
def test_an_estimated_rho_agrees_with_the_formula_where_there_is_one() -> None:
    # Two clients either average (rho 0) or don't meet (rho 1).
    assert rho(GRAPHS["complete"](clients=2, activation=0.3)) == pytest.approx(0.7, abs=0.02)
    # W of a matching is a projection, so E[WᵀW] = E[W]; each pair meets in one of n - 1 rounds.
    assert 1 - rho(GRAPHS["matching"](clients=6, probability=1.0), draws=2_000) == pytest.approx(6 / (2 * 5), abs=0.02)


@pytest.mark.parametrize("weights", sorted(WEIGHTS))
@pytest.mark.parametrize("activation", [0.4, 1.0])
def test_rho_is_the_largest_eigenvalue_of_the_mean_of_the_rounds_themselves(weights: str, activation: float) -> None:
    graph = GRAPHS["torus"](clients=8, activation=activation, weights=weights)
    draws = 30 if activation < 1 else 1
    squares = [(W.T @ W).toarray() for W in (weights_at(graph, t) for t in range(draws))]
    assert rho(graph, draws) == pytest.approx(np.linalg.eigvalsh(np.mean(squares, axis=0) - 1 / 8)[-1])


@pytest.mark.parametrize("name", ["path", "complete", "erdos_renyi"])
@pytest.mark.parametrize("activation", [0.1, 1.0])
def test_large_graphs_get_the_same_rho_without_a_dense_matrix(
    name: str, activation: float, monkeypatch: pytest.MonkeyPatch
) -> None:
    settings = {"probability": 0.05} if name == "erdos_renyi" else {}
    graph = GRAPHS[name](clients=150, activation=activation, **settings)
    dense = rho(graph, draws=50)
    rho.cache_clear()
    monkeypatch.setattr(spectrum, "DENSE_CLIENTS", 100)
    assert 1 - rho(graph, draws=50) == pytest.approx(1 - dense, rel=1e-4)


def test_a_long_ring_gets_its_laplacian_weights_and_rho_in_closed_form() -> None:
    n = 1_200
    third = 2 / (3 * 4)  # λ_max(L) = 4 for an even ring
    expected = (1 - 2 * third * (1 - np.cos(2 * np.pi / n))) ** 2
    assert 1 - rho(GRAPHS["ring"](clients=n, weights="laplacian")) == pytest.approx(1 - expected, rel=1e-3)


@pytest.mark.thorough
@pytest.mark.parametrize("clients", [10, 100, 600])
def test_a_sparse_complete_graph_has_no_bias_from_few_draws(clients: int) -> None:
    # At such a p nearly all meetings are of two alone, who average: 1 - rho = n p / 2, less a term of order (n p)².
    graph = GRAPHS["complete"](clients=clients, activation=0.05 / clients)
    found = [1 - rho(graph, draws=max(200, 200_000 // clients))]
    assert found[0] == pytest.approx(0.025, rel=0.1)


def test_fewer_rounds_are_drawn_for_more_clients() -> None:
    draws = [rho_draws(GRAPHS["complete"](clients=clients, activation=0.5)) for clients in (10, 100, 1000)]
    assert draws[0] == 100_000 > draws[1] > draws[2] >= 16


@pytest.mark.parametrize(
    ("name", "clients", "settings", "draws"),
    [
        ("ring", 10, {}, 0),
        ("ring", 10, {"activation": 0.5}, 100_000),
        ("ring", 1_000, {"activation": 0.5}, 25_000),
        ("ring", 100_000, {"activation": 0.5}, 250),
        ("complete", 100, {"activation": 0.5}, 727),
        ("complete", 1_000, {"activation": 0.5}, 16),
        ("complete", 4_000, {"activation": 0.5}, 4),  # the rows of 16 rounds of 1,000 clients
        ("complete", 16_000, {"activation": 1e-7}, 16),  # of whom hardly any meet
        ("complete", 100_000, {"activation": 1e-5}, 1),
        ("complete", 200_000, {"activation": 1e-6}, 4_166),  # of single rows, as below
        ("complete", 1_000_000, {"activation": 2e-5}, 47),
        ("matching", 10, {"probability": 0.5}, 3_779),
        ("matching", 400, {"probability": 0.5}, 38),
        ("exponential", 32, {"activation": 0.5}, 2_437),  # in the order of a period
        ("exponential", 256, {"activation": 0.5}, 38),
        ("exponential", 1_024, {"activation": 0.5}, 45_955),  # as if in random order
    ],
)
def test_as_many_rounds_are_drawn_as_take_a_second_or_so(
    name: str, clients: int, settings: dict[str, Any], draws: int
) -> None:
    assert rho_draws(GRAPHS[name](clients=clients, **settings)) == draws


def test_the_order_of_rounds_counts_where_it_can_be_followed(monkeypatch: pytest.MonkeyPatch) -> None:
    def looks(clients: int, period: int, work: int, **settings: Any) -> bool:
        monkeypatch.setattr(spectrum, "IN_ORDER_WORK", work)
        return spectrum._in_order(replace(GRAPHS["ring"](clients=clients), period=period, **settings))

    assert not looks(20, 1, 10**9)
    assert [looks(20, 3, work) for work in (1_199, 1_200)] == [False, True]
    assert [looks(20, 3, work, activation=0.5) for work in (1_199, 1_200)] == [False, True]
    assert [looks(1_000, 2, work) for work in (1_999_999, 2_000_000)] == [False, True]
    assert looks(1_001, 2, 0), "all rounds of a grid have the same eigenvectors"
    assert [looks(1_001, 2, work, sides=()) for work in (80_079, 80_080)] == [False, True]
    assert not looks(1_001, 2, 10**9, activation=0.5)


def test_the_largest_eigenvalue_is_found_at_either_end_of_the_spectrum(caplog: pytest.LogCaptureFixture) -> None:
    values = np.linspace(0, 1, 1_500)
    for shift in (0.0, -3.0):
        found = rules.largest_eigenvalue(diags_array(values + shift))
        assert found == pytest.approx(1 + shift, abs=1e-6)
        assert found <= 1 + shift + 1e-12
    assert rules.largest_eigenvalue(diags_array(np.array([2.0, 5.0, 3.0]))) == pytest.approx(5, abs=1e-12)
    assert rules.largest_eigenvalue(diags_array(np.full(9, -2.0))) == pytest.approx(-2, abs=1e-12)
    assert not caplog.records, "it settled"


def test_a_summary_of_known_rounds_is_exact(tmp_path: Path) -> None:
    found = summary(GRAPHS["complete"](clients=6))
    assert replace(found, rho=0.0, spectral_gap=1.0) == GraphSummary(6, 15.0, 5.0, 0.0, 0.0, 1.0, 0)
    path = tmp_path / "contacts.txt"
    path.write_text("0,0,1\n1,1,2\n1,0,1\n")
    found = summary(GRAPHS["trace"](clients=3, path=path))
    assert (found.edges, found.mean_neighbours, found.draws) == (1.5, 1.0, 0)
    assert found.isolated_share == pytest.approx(1 / 6)
    assert found.spectral_gap == 1 - found.rho


@pytest.mark.thorough
def test_a_summary_says_what_a_graph_does(monkeypatch: pytest.MonkeyPatch) -> None:
    found = summary(GRAPHS["star"](clients=5, activation=0.5, seed=4))
    assert (found.clients, found.edges, found.mean_neighbours) == (5, 4.0, 0.8)
    assert found.isolated_share == pytest.approx((4 * 0.5 + 0.5**4) / 5)
    assert found.spectral_gap == pytest.approx(1 - found.rho)
    assert summary(GRAPHS["exponential"](clients=8)).mean_neighbours == 1
    monkeypatch.setattr(spectrum, "DRAWING_NS", 1e7)  # a matching's rounds are drawn one by one
    assert summary(GRAPHS["matching"](clients=10, probability=1.0)).isolated_share == 0
