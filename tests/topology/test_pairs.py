"""Pairs of clients that are too many to hold."""

import tracemalloc

import numpy as np
import pytest
from graph_making import quickly, rounds, seeds
from hypothesis import given
from hypothesis import strategies as st

from peertune.randomness import Draw, uniforms
from peertune.topology import GRAPHS, active_edges, pairs, rho, row_at, weights_at
from peertune.topology.weights import listed


@quickly
@given(clients=st.integers(1, 60), chance=st.floats(0.001, 1), block=st.integers(1, 500), seed=seeds, t=rounds)
def test_pairs_drawn_in_blocks_are_those_drawn_all_at_once(
    clients: int, chance: float, block: int, seed: int, t: int
) -> None:
    every = pairs.all_pairs(clients)
    expected = every[uniforms(seed, Draw.EDGE, t, every[:, 0], every[:, 1]) < chance]
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(pairs, "BLOCK", block)
        np.testing.assert_array_equal(pairs.drawn_pairs(clients, chance, seed, Draw.EDGE, t), expected)
        for client in {0, clients // 2, clients - 1}:
            own = expected[(expected == client).any(axis=1)]
            np.testing.assert_array_equal(pairs.drawn_partners(clients, client, chance, seed, Draw.EDGE, t), own)


@pytest.mark.parametrize("activation", [0.02, 0.5, 1.0])
def test_rounds_and_rho_are_the_same_where_pairs_are_too_many_to_hold(
    activation: float, request: pytest.FixtureRequest
) -> None:
    graphs = [GRAPHS["complete"](clients=40, activation=activation, seed=9) for _ in range(2)]
    before = [(active_edges(graphs[0], t), weights_at(graphs[0], t).toarray()) for t in range(4)], rho(graphs[0], 50)
    request.getfixturevalue("few_pairs")
    assert listed(graphs[1]) == (activation == 1)  # then they are its edges
    for t, (edges, W) in enumerate(before[0]):
        np.testing.assert_array_equal(active_edges(graphs[1], t), edges)
        np.testing.assert_array_equal(weights_at(graphs[1], t).toarray(), W)
    assert rho(graphs[1], 50) == before[1]


@pytest.mark.thorough
@pytest.mark.parametrize(
    ("name", "settings"),
    [
        ("complete", {"activation": 0.0005}),
        ("erdos_renyi", {"probability": 0.002}),
        ("matching", {"probability": 0.0005}),
    ],
)
def test_ten_thousand_clients_whose_pairs_are_drawn_take_memory_for_edges_alone(
    name: str, settings: dict[str, float]
) -> None:
    tracemalloc.start()
    graph = GRAPHS[name](clients=10_000, **settings)
    edges = active_edges(graph, 0)
    row_at(graph, 17, 0)
    rho(graph)
    _, peak = tracemalloc.get_traced_memory()
    tracemalloc.stop()
    assert len(edges) > 4_000
    assert peak < 100e6  # all pairs alone are 800 MB
