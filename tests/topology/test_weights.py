"""Mixing matrices: fair over possible edges, whichever are active or fail."""

from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
from graph_making import (
    REGULAR,
    activations,
    any_settings,
    assert_mixes_fairly,
    every_graph,
    make,
    quickly,
    rounds,
    rows,
    seeds,
    sizes,
)
from hypothesis import given
from hypothesis import strategies as st

from peertune.topology import (
    GRAPHS,
    active_edges,
    drop_edges,
    mixing_weights,
    rho,
    rho_draws,
    row_at,
    spectrum,
    weights,
    weights_at,
)


@every_graph
@quickly
@any_settings
def test_every_round_mixes_fairly_over_possible_edges_only(
    name: str, folder: Path, size: int, activation: float, seed: int, t: int, weights: str
) -> None:
    graph = make(name, size, folder, activation=activation, seed=seed, weights=weights)
    possible, active = graph.edges_at(t), active_edges(graph, t)
    W = weights_at(graph, t)
    assert possible.dtype == np.int64
    assert possible.shape[1:] == (2,)
    assert (possible[:, 0] < possible[:, 1]).all()
    assert [tuple(edge) for edge in possible.tolist()] == sorted(rows(possible))
    assert rows(active) <= rows(possible)
    assert_mixes_fairly(W)
    off_diagonal = W.toarray() - np.diag(W.diagonal())
    assert rows(np.argwhere(np.triu(off_diagonal))) == rows(active)


@pytest.mark.parametrize("name", REGULAR)
@quickly
@given(size=st.integers(2, 6), activation=activations, seed=seeds, t=rounds)
def test_uniform_weights_mix_fairly_on_regular_graphs(
    name: str, folder: Path, size: int, activation: float, seed: int, t: int
) -> None:
    graph = make(name, size, folder, activation=activation, seed=seed, weights="uniform")
    degree = np.bincount(graph.edges_at(t).ravel(), minlength=graph.clients)[0]
    W = weights_at(graph, t)
    assert_mixes_fairly(W)
    i, j = active_edges(graph, t).T
    np.testing.assert_allclose(W.toarray()[i, j], 1 / (degree + 1))


@every_graph
@quickly
@given(size=sizes, activation=activations, seed=seeds, t=rounds, data=st.data())
def test_dropping_edges_keeps_mixing_fair(
    name: str, folder: Path, size: int, activation: float, seed: int, t: int, data: st.DataObject
) -> None:
    graph = make(name, size, folder, activation=activation, seed=seed)
    before, active = weights_at(graph, t), active_edges(graph, t)
    failed = active[np.array([data.draw(st.booleans()) for _ in active], dtype=bool)]
    after = drop_edges(graph, before, failed)
    assert_mixes_fairly(after)
    kept = np.array(sorted(rows(active) - rows(failed)), dtype=np.int64).reshape(-1, 2)
    assert not after.toarray()[failed[:, 0], failed[:, 1]].any()
    np.testing.assert_array_equal(after.toarray()[kept[:, 0], kept[:, 1]], before.toarray()[kept[:, 0], kept[:, 1]])


@every_graph
def test_seeds_and_rounds_change_which_edges_are_active(name: str, folder: Path) -> None:
    graph = make(name, 4, folder, activation=0.5, seed=1)
    again, other = make(name, 4, folder, activation=0.5, seed=1), replace(graph, seed=2)
    drawn = [[rows(active_edges(one, t)) for t in range(40)] for one in (graph, again, other)]
    assert drawn[0] == drawn[1]
    assert drawn[0] != drawn[2]
    assert len({frozenset(edges) for edges in drawn[0]}) > 3


@pytest.mark.thorough
def test_rho_from_rows_alone_agrees_with_that_of_whole_rounds(monkeypatch: pytest.MonkeyPatch) -> None:
    graph = GRAPHS["complete"](clients=200, activation=0.02)
    whole = 1 - rho(graph, 200)
    monkeypatch.setattr(spectrum, "MOST_PAIRED", 100)
    assert 1 - rho(graph, 1_000) == pytest.approx(whole, rel=0.03)
    assert rho_draws(replace(graph, clients=10**6, activation=2e-5)) == 47


def test_edges_are_active_as_often_as_asked() -> None:
    graph = GRAPHS["complete"](clients=10, activation=0.3)
    share = np.mean([len(active_edges(graph, t)) / 45 for t in range(1000)])
    assert share == pytest.approx(0.3, abs=0.01)


def test_metropolis_weights_of_a_path_are_those_of_the_formula() -> None:
    W = mixing_weights(4, np.array([[0, 1], [1, 2]]))
    expected: list[list[float]] = [[2 / 3, 1 / 3, 0, 0], [1 / 3, 1 / 3, 1 / 3, 0], [0, 1 / 3, 2 / 3, 0], [0, 0, 0, 1]]
    np.testing.assert_allclose(W.toarray(), expected, atol=1e-15)
    assert W.dtype == np.float64


def test_laplacian_weights_of_a_star_are_those_of_the_formula() -> None:
    graph = GRAPHS["star"](clients=5, weights="laplacian")
    L = np.diag([4.0, 1, 1, 1, 1])
    L[0, 1:] = L[1:, 0] = -1
    np.testing.assert_allclose(weights_at(graph, 3).toarray(), np.eye(5) - 2 * L / (3 * 5), atol=1e-15)


@pytest.mark.parametrize("weights", ["laplacian", "uniform"])
@pytest.mark.parametrize("name", REGULAR)
def test_rules_on_possible_edges_give_an_inactive_edge_back_to_both_ends(name: str, weights: str, folder: Path) -> None:
    graph = make(name, 4, folder, activation=0.4, seed=3, weights=weights)
    always = replace(graph, activation=1.0)
    for t in range(8):
        inactive = rows(graph.edges_at(t)) - rows(active_edges(graph, t))
        dropped = drop_edges(always, weights_at(always, t), np.array(sorted(inactive), dtype=np.int64).reshape(-1, 2))
        np.testing.assert_allclose(weights_at(graph, t).toarray(), dropped.toarray(), atol=1e-15)


def test_laplacian_weights_of_a_trace_are_those_of_each_rounds_own_edges(tmp_path: Path) -> None:
    path = tmp_path / "contacts.txt"
    path.write_text("0,0,1\n1,0,1\n1,1,2\n1,1,3\n2,2,3\n2,0,1\n3,0,1\n3,1,2\n")
    graph = GRAPHS["trace"](clients=4, path=path, weights="laplacian")
    largest = [2.0, 4.0, 2.0, 3.0]  # λ_max(L) of an edge, a star of four, two edges apart and a path of three
    for t in range(8):
        expected = np.eye(4)
        for i, j in graph.edges_at(t).tolist():
            ends = np.zeros(4)
            ends[i], ends[j] = 1, -1
            expected -= 2 / (3 * largest[t % 4]) * np.outer(ends, ends)
        np.testing.assert_allclose(weights_at(graph, t).toarray(), expected, atol=1e-15)
        for client in range(4):
            row = row_at(graph, client, t)
            assert row == pytest.approx({other: x for other, x in enumerate(expected[client]) if x})
    stacked = weights.stacked_weights(graph, range(2, 7)).toarray().reshape(5, 4, 4)
    np.testing.assert_array_equal(stacked, [weights_at(graph, t).toarray() for t in range(2, 7)])


def test_dropping_takes_edges_in_any_form_and_ignores_those_that_are_not_there() -> None:
    graph = GRAPHS["ring"](clients=5)
    W = weights_at(graph, 0)
    once = drop_edges(graph, W, np.array([[0, 1]]))
    np.testing.assert_array_equal(drop_edges(graph, W, np.array([[1, 0], [0, 1], [0, 2]])).toarray(), once.toarray())
    np.testing.assert_array_equal(drop_edges(graph, W, np.zeros((0, 2), dtype=np.int64)).toarray(), W.toarray())
    assert once[0, 0] == pytest.approx(2 / 3)
