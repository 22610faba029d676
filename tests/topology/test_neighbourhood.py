"""What one client must know of a graph, and its own rows of the mixing matrix."""

from pathlib import Path

import numpy as np
import pytest
from graph_making import (
    BOTH_WAYS,
    FACTS,
    REGULAR,
    activations,
    any_settings,
    every_graph,
    make,
    quickly,
    rounds,
    rows,
    seeds,
    seen_by,
    sizes,
)
from hypothesis import given

from peertune.errors import GraphError
from peertune.randomness import Draw, uniforms
from peertune.topology import (
    GRAPHS,
    Fault,
    active_edges,
    digest,
    graph_near,
    may_meet,
    neighbourhoods,
    partners_at,
    planned_weights,
    rho,
    row_at,
    summary,
    weights_at,
)
from peertune.topology.weights import listed


@every_graph
@quickly
@given(size=sizes, activation=activations, seed=seeds, t=rounds)
def test_a_peer_decides_its_edge_alone_as_all_peers_do(
    name: str, folder: Path, size: int, activation: float, seed: int, t: int
) -> None:
    graph = make(name, size, folder, activation=activation, seed=seed)
    active = rows(active_edges(graph, t))
    for i, j in graph.edges_at(t).tolist():
        assert ((i, j) in active) == bool(uniforms(seed, Draw.EDGE, t, i, j) < activation)


@pytest.mark.thorough
@every_graph
@quickly
@any_settings
def test_a_peers_own_row_is_that_of_the_whole_matrix_to_the_bit(
    name: str, folder: Path, size: int, activation: float, seed: int, t: int, weights: str
) -> None:
    graph = make(name, size, folder, activation=activation, seed=seed, weights=weights)
    whole = weights_at(graph, t).toarray()
    for client in range(graph.clients):
        row = row_at(graph, client, t)
        assert list(row) == sorted({client, *row})
        assert {other: whole[client, other] for other in row} == row
        assert whole[client].sum() == pytest.approx(sum(row.values()))
        assert partners_at(graph, client, t) == [other for other in row if other != client]
        assert set(row) <= {client, *may_meet(graph, client)}


@pytest.mark.thorough
@pytest.mark.parametrize("activation", [0.003, 0.1, 0.8])
def test_a_row_is_the_same_where_pairs_are_too_many_to_hold(activation: float, few_pairs: None) -> None:
    graph = GRAPHS["complete"](clients=90, activation=activation, seed=7)
    assert not listed(graph)
    for t in range(5):
        whole = weights_at(graph, t).toarray()
        for client in range(0, 90, 7):
            row = row_at(graph, client, t)
            assert {other: whole[client, other] for other in np.flatnonzero(whole[client])} == row
            assert partners_at(graph, client, t) == [other for other in row if other != client]


@pytest.mark.parametrize("name", ["ring", "star", "exponential", "matching", "complete"])
def test_a_row_that_loses_edges_is_that_of_the_matrix_that_lost_them(name: str, folder: Path) -> None:
    graph = make(name, 5, folder, activation=0.7)
    for t in range(6):
        faults = [Fault(0, 9, edge=(0, 1)), Fault(2, 4, down=2)]
        matrix, failed = planned_weights(graph, faults, t)
        for client in range(graph.clients):
            row = row_at(graph, client, t)
            lost = [i + j - client for i, j in failed if client in (i, j)]
            row[client] += sum(row.pop(other) for other in lost)
            expected = matrix[[client]].toarray()[0]
            found = np.zeros(graph.clients)
            found[list(row)] = list(row.values())
            np.testing.assert_allclose(found, expected, rtol=0, atol=1e-15)


def test_who_may_ever_meet_is_known_from_all_rounds(tmp_path: Path) -> None:
    path = tmp_path / "contacts.txt"
    path.write_text("0,0,1\n1,0,2\n3,1,2\n2,2,3\n")
    graph = GRAPHS["trace"](clients=4, path=path)
    assert [may_meet(graph, client) for client in range(4)] == [[1, 2], [0, 2], [0, 1, 3], [2]]
    assert may_meet(GRAPHS["matching"](clients=3, probability=0.1), 1) == [0, 2]


SPARSE = [name for name in BOTH_WAYS if name not in ("complete", "matching")]


@pytest.mark.thorough
@pytest.mark.parametrize("name", SPARSE)
@quickly
@any_settings
def test_a_clients_neighbourhood_is_enough_for_its_own_rows(
    name: str, folder: Path, size: int, activation: float, seed: int, t: int, weights: str
) -> None:
    graph = make(name, size, folder, activation=activation, seed=seed, weights=weights)
    for client in range(graph.clients):
        seen = seen_by(graph, client)
        assert row_at(seen, client, t) == row_at(graph, client, t)
        assert partners_at(seen, client, t) == partners_at(graph, client, t)
        assert may_meet(seen, client) == may_meet(graph, client)
        assert (seen.clients, seen.period, seen.name) == (graph.clients, graph.period, graph.name)
        assert digest(seen) == digest(graph)


@pytest.mark.parametrize("name", sorted(set(REGULAR) & set(SPARSE)))
def test_uniform_weights_are_known_of_a_neighbourhood_as_well(name: str, folder: Path) -> None:
    graph = make(name, 4, folder, activation=0.5, weights="uniform")
    for t in range(8):
        assert [row_at(seen_by(graph, k), k, t) for k in range(8)] == [row_at(graph, k, t) for k in range(8)]


@pytest.mark.parametrize("name", ["ring", "random_regular", "exponential", "torus"])
def test_a_neighbourhood_does_not_grow_with_the_clients(name: str) -> None:
    settings = {"degree": 4} if name == "random_regular" else {}
    for clients in (64, 4096):
        graph = GRAPHS[name](clients=clients, **settings)
        (known,) = neighbourhoods(graph, [7], FACTS)
        if name == "exponential":  # one edge in each of log2 n rounds
            assert [len(edges) for edges in known.edges] == [1] * (clients.bit_length() - 1)
        else:
            most = {"ring": 4, "random_regular": 16, "torus": 16}[name]
            assert most - 4 <= sum(map(len, known.edges)) <= most


def test_of_a_neighbourhood_nothing_follows_but_the_clients_own() -> None:
    whole = GRAPHS["ring"](clients=9)
    seen = seen_by(whole, 4)
    assert (summary(seen), rho(seen)) == (FACTS, FACTS.rho), "found by who has all of it"
    for ask in (
        lambda: weights_at(seen, 0),
        lambda: active_edges(seen, 0),
        lambda: neighbourhoods(seen, [4], FACTS),
        lambda: row_at(seen, 5, 0),
        lambda: partners_at(seen, 5, 0),
        lambda: may_meet(seen, 5),
    ):
        with pytest.raises(GraphError, match="graph ring: only what is near client 4 is known of it"):
            ask()
    for name, more in (("complete", {}), ("matching", {"probability": 0.5})):
        with pytest.raises(
            GraphError, match=f"graph {name}: any two clients may meet, so each must know of all; choose"
        ):
            neighbourhoods(GRAPHS[name](clients=9, **more), [4], FACTS)
    (known,) = neighbourhoods(whole, [4], FACTS)
    with pytest.raises(GraphError, match="graph ring: activation is 2"):
        graph_near(known, seed=0, activation=2.0, weights="metropolis")
    with pytest.raises(GraphError, match="graph ring: its neighbourhood is not one with weights uniform"):
        graph_near(known, seed=0, activation=1.0, weights="uniform")


def test_a_digest_tells_graphs_apart_by_all_their_edges(tmp_path: Path) -> None:
    path = tmp_path / "g.txt"
    path.write_text("0,1\n1,2\n2,3\n")
    digests = [digest(GRAPHS["edges"](clients=4, path=path))]
    path.write_text("0,1\n1,2\n2,3\n1,3\n")
    digests += [digest(GRAPHS["edges"](clients=4, path=path)), digest(GRAPHS["ring"](clients=4))]
    digests += [digest(GRAPHS["exponential"](clients=n)) for n in (4, 8)]
    digests += [digest(GRAPHS["random_regular"](clients=8, degree=3, seed=seed)) for seed in (0, 1)]
    assert len(set(digests)) == len(digests)
    assert digest(GRAPHS["path"](clients=4)) == digests[0], "the same edges, whatever the name"
    assert digest(GRAPHS["complete"](clients=4)) == digest(GRAPHS["matching"](clients=4, probability=0.1)) == "drawn"


def test_a_round_of_too_many_pairs_is_refused_but_not_a_peers_own_row() -> None:
    graph = GRAPHS["complete"](clients=150_000, activation=1e-5)
    with pytest.raises(GraphError, match=r"graph complete: 150,000 clients make 11,249,925,000 pairs to draw"):
        weights_at(graph, 0)
    assert sum(row_at(graph, 7, 0).values()) == pytest.approx(1)
    with pytest.raises(GraphError, match=r"150,000 clients have about 11,249,925,000 edges, and 10,000,000"):
        graph.edges_at(0)
