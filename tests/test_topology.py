import tracemalloc
from collections.abc import Callable
from dataclasses import replace
from inspect import Parameter, signature
from pathlib import Path
from types import ModuleType
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from scipy.sparse import csr_array, diags_array
from scipy.sparse.csgraph import connected_components

from peertune.assembly.registry import describe_graph
from peertune.errors import GraphError
from peertune.methods.schedules import switching_interval
from peertune.randomness import Draw, uniforms
from peertune.topology import (
    GRAPHS,
    WEIGHTS,
    Fault,
    Graph,
    GraphSummary,
    active_edges,
    clients_down,
    delay_s,
    digest,
    drop_edges,
    graph_near,
    graphs,
    may_meet,
    mixing_weights,
    neighbourhoods,
    one_period,
    pairs,
    partners_at,
    planned_weights,
    rho,
    rho_draws,
    row_at,
    spectrum,
    summary,
    weights,
    weights_at,
)
from peertune.topology.weights import listed

PROBABILITIES = [0.5, 0.2, 0.1, 0.05, 0.02, 0.01]

# For each row of GRAPHS: (size from 1 to 6) → valid arguments.
VALID: dict[str, Callable[[int], dict[str, Any]]] = {
    "bipartite": lambda size: {"clients": 2 * size, "left": size},
    "complete": lambda size: {"clients": size},
    "edges": lambda size: {"clients": size + 1},
    "erdos_renyi": lambda size: {"clients": 2 * size, "probability": 0.6},
    "exponential": lambda size: {"clients": 2 ** min(size - 1, 4)},
    "hypercube": lambda size: {"clients": 2 ** min(size - 1, 4)},
    "matching": lambda size: {"clients": 2 * size - 1, "probability": 0.7},
    "path": lambda size: {"clients": size + 1},
    "random_regular": lambda size: {"clients": 2 * size + 2, "degree": 3},
    "ring": lambda size: {"clients": size + 2},
    "star": lambda size: {"clients": size + 1},
    "torus": lambda size: {"clients": 3 * size + 3, "rows": 3},
    "trace": lambda size: {"clients": size + 1},
}
REGULAR = ["bipartite", "complete", "exponential", "hypercube", "random_regular", "ring", "torus"]


def make(name: str, size: int, folder: Path, **settings: Any) -> Graph:
    arguments = VALID[name](size)
    if name in ("edges", "trace"):
        arguments["path"] = folder / f"{name}-{size}.csv"
        form = "{0},{1}\n" if name == "edges" else "{0},{0},{1}\n"
        arguments["path"].write_text("".join(form.format(i, i + 1) for i in range(size)))
    return GRAPHS[name](**arguments, **settings)


def rows(edges: Any) -> set[tuple[int, int]]:
    return {(i, j) for i, j in edges.tolist()}


def assert_mixes_fairly(weights: csr_array) -> None:
    W = weights.toarray()
    np.testing.assert_array_equal(W, W.T)
    np.testing.assert_allclose(W.sum(axis=1), 1, atol=1e-12)
    assert W.min() >= -1e-15


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("graphs")


every_graph = pytest.mark.parametrize("name", sorted(GRAPHS))
sizes = st.integers(1, 6)
activations = st.floats(0.01, 1)
seeds = st.integers(0, 2**64)
rounds = st.integers(0, 10**6)
quickly = settings(max_examples=20, deadline=None, derandomize=True)
any_settings = given(
    size=sizes, activation=activations, seed=seeds, t=rounds, weights=st.sampled_from(["metropolis", "laplacian"])
)


def test_every_graph_is_tested() -> None:
    assert set(VALID) == set(GRAPHS)


@every_graph
def test_a_factory_takes_the_common_settings_first_and_all_by_keyword(name: str) -> None:
    parameters = signature(GRAPHS[name]).parameters
    assert list(parameters)[:4] == ["clients", "seed", "activation", "weights"]
    assert all(parameter.kind is Parameter.KEYWORD_ONLY for parameter in parameters.values())


@every_graph
def test_a_graph_says_what_it_was_made_of(name: str, folder: Path) -> None:
    plain = make(name, 4, folder)
    assert (plain.seed, plain.activation, plain.weights) == (0, 1.0, "metropolis")
    assert plain.name == (f"{name} ({folder / f'{name}-4.csv'})" if name in ("edges", "trace") else name)
    made = make(name, 4, folder, seed=7, activation=0.5, weights="laplacian")
    assert (made.seed, made.activation, made.weights) == (7, 0.5, "laplacian")
    assert made.every_pair == (name == "complete")
    assert made.exchangeable == (name in ("complete", "matching"))
    cube = (2, 2, 2)
    assert made.sides == {"ring": (6,), "torus": (3, 5), "hypercube": cube, "exponential": cube}.get(name, ())
    assert not plain.edges_at(0).flags.writeable, "every round hands out the same array"


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
@given(size=sizes, activation=activations, seed=seeds)
def test_the_edges_of_all_rounds_connect_the_clients(
    name: str, folder: Path, size: int, activation: float, seed: int
) -> None:
    graph = make(name, size, folder, activation=activation, seed=seed)
    together = np.concatenate([graph.edges_at(t) for t in range(graph.period or 200)])
    joined = csr_array((np.ones(len(together)), tuple(together.T)), shape=(graph.clients,) * 2)
    assert connected_components(joined, directed=False)[0] == 1


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


@every_graph
@quickly
@given(size=sizes, activation=activations, seed=seeds, t=rounds, data=st.data())
def test_dropping_edges_keeps_mixing_fair(
    name: str, folder: Path, size: int, activation: float, seed: int, t: int, data: st.DataObject
) -> None:
    graph = make(name, size, folder, activation=activation, seed=seed)
    before, active = weights_at(graph, t), active_edges(graph, t)
    failed = active[np.array([data.draw(st.booleans()) for _ in active], dtype=bool)]
    after = drop_edges(before, failed)
    assert_mixes_fairly(after)
    kept = np.array(sorted(rows(active) - rows(failed)), dtype=np.int64).reshape(-1, 2)
    assert not after.toarray()[failed[:, 0], failed[:, 1]].any()
    np.testing.assert_array_equal(after.toarray()[kept[:, 0], kept[:, 1]], before.toarray()[kept[:, 0], kept[:, 1]])


@every_graph
def test_a_graph_repeats_after_its_period_and_not_before(name: str, folder: Path) -> None:
    graph = make(name, 4, folder)
    if graph.period is None:
        assert len({str(graph.edges_at(t)) for t in range(20)}) > 10
    else:
        assert len({str(graph.edges_at(t)) for t in range(3 * graph.period)}) == graph.period
        np.testing.assert_array_equal(graph.edges_at(5), graph.edges_at(5 + graph.period))


@every_graph
def test_seeds_and_rounds_change_which_edges_are_active(name: str, folder: Path) -> None:
    graph = make(name, 4, folder, activation=0.5, seed=1)
    again, other = make(name, 4, folder, activation=0.5, seed=1), replace(graph, seed=2)
    drawn = [[rows(active_edges(one, t)) for t in range(40)] for one in (graph, again, other)]
    assert drawn[0] == drawn[1]
    assert drawn[0] != drawn[2]
    assert len({frozenset(edges) for edges in drawn[0]}) > 3


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


def test_a_planned_edge_fails_whichever_end_comes_first() -> None:
    graph = GRAPHS["complete"](clients=4)
    (one, failed), (other, same) = (planned_weights(graph, [Fault(1, 2, edge=edge)], 2) for edge in ((1, 3), (3, 1)))
    assert failed == same == [(1, 3)]
    assert one[1, 3] == other[1, 3] == 0
    np.testing.assert_array_equal(one.toarray(), other.toarray())
    assert [planned_weights(graph, [Fault(1, 2, edge=(3, 1))], t)[1] for t in (0, 1, 2, 3)] == [
        [],
        [(1, 3)],
        [(1, 3)],
        [],
    ]


def test_a_plan_says_who_is_down_and_who_is_slow_in_which_round() -> None:
    faults = [Fault(1, 2, down=3), Fault(2, 3, slow=1, delay_s=0.5), Fault(2, 2, slow=1, delay_s=0.25)]
    faults.append(Fault(1, 1, edge=(0, 1)))
    assert [clients_down(faults, t) for t in range(4)] == [set(), {3}, {3}, set()]
    one_end = [planned_weights(GRAPHS["ring"](clients=5), faults, t)[1] for t in range(4)]
    assert one_end == [[], [(0, 1), (2, 3), (3, 4)], [(2, 3), (3, 4)], []]
    assert [delay_s(faults, 1, t) for t in range(5)] == [0, 0, 0.75, 0.5, 0]
    assert [delay_s(faults, client, 2) for client in (0, 2, 3)] == [0, 0, 0]


def test_who_may_ever_meet_is_known_from_all_rounds(tmp_path: Path) -> None:
    path = tmp_path / "contacts.txt"
    path.write_text("0,0,1\n1,0,2\n3,1,2\n2,2,3\n")
    graph = GRAPHS["trace"](clients=4, path=path)
    assert [may_meet(graph, client) for client in range(4)] == [[1, 2], [0, 2], [0, 1, 3], [2]]
    assert may_meet(GRAPHS["matching"](clients=3, probability=0.1), 1) == [0, 2]


# --- What one client must know ------------------------------------------------------------------------------------

FACTS = GraphSummary(9, 9.0, 2.0, 0.0, 0.75, 0.25, 0)
SPARSE = sorted(GRAPHS.keys() - {"complete", "matching"})


def seen_by(graph: Graph, client: int) -> Graph:
    """The graph as the client knows it that is told its neighbourhood alone."""
    (known,) = neighbourhoods(graph, [client], replace(FACTS, clients=graph.clients))
    assert (known.client, known.name, known.digest) == (client, graph.name, digest(graph))
    return graph_near(known, seed=graph.seed, activation=graph.activation, weights=graph.weights)


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


# --- Many clients -------------------------------------------------------------------------------------------------


@pytest.fixture
def few_pairs(monkeypatch: pytest.MonkeyPatch) -> None:
    """Draw in blocks, and blocks of a few pairs, as with many clients."""
    monkeypatch.setattr(weights, "LISTED_PAIRS", 20)
    monkeypatch.setattr(pairs, "BLOCK", 16)


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


@pytest.mark.thorough
def test_rho_from_rows_alone_agrees_with_that_of_whole_rounds(monkeypatch: pytest.MonkeyPatch) -> None:
    graph = GRAPHS["complete"](clients=200, activation=0.02)
    whole = 1 - rho(graph, 200)
    monkeypatch.setattr(spectrum, "MOST_PAIRED", 100)
    assert 1 - rho(graph, 1_000) == pytest.approx(whole, rel=0.03)
    assert rho_draws(replace(graph, clients=10**6, activation=2e-5)) == 47


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
    monkeypatch.setattr(weights, "LANCZOS_WORK", 0)  # 1,024 steps
    found = rho(GRAPHS["path"](clients=5_000))
    exact = (1 / 3 + 2 / 3 * np.cos(np.pi / 5_000)) ** 2
    assert 1 - exact < 1 - found < 1e-5
    assert caplog.messages == [
        "an eigenvalue of 5000 clients did not settle in 1024 steps: what follows is a bound from below"
    ]


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
        dropped = drop_edges(weights_at(always, t), np.array(sorted(inactive), dtype=np.int64).reshape(-1, 2))
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
    W = weights_at(GRAPHS["ring"](clients=5), 0)
    once = drop_edges(W, np.array([[0, 1]]))
    np.testing.assert_array_equal(drop_edges(W, np.array([[1, 0], [0, 1], [0, 2]])).toarray(), once.toarray())
    np.testing.assert_array_equal(drop_edges(W, np.zeros((0, 2), dtype=np.int64)).toarray(), W.toarray())
    assert once[0, 0] == pytest.approx(2 / 3)


# --- The graphs themselves ----------------------------------------------------------------------------------------


def test_small_graphs_have_the_edges_of_their_names(tmp_path: Path) -> None:
    def edges(name: str, **settings: Any) -> set[tuple[int, int]]:
        return rows(GRAPHS[name](**settings).edges_at(0))

    assert edges("complete", clients=3) == {(0, 1), (0, 2), (1, 2)}
    assert edges("ring", clients=4) == {(0, 1), (1, 2), (2, 3), (0, 3)}
    assert edges("path", clients=3) == {(0, 1), (1, 2)}
    assert edges("star", clients=4) == {(0, 1), (0, 2), (0, 3)}
    assert edges("bipartite", clients=4) == {(0, 2), (0, 3), (1, 2), (1, 3)}
    assert edges("bipartite", clients=4, left=1) == {(0, 1), (0, 2), (0, 3)}
    assert edges("hypercube", clients=4) == {(0, 1), (2, 3), (0, 2), (1, 3)}
    assert edges("torus", clients=6) == {(0, 1), (1, 2), (0, 2), (3, 4), (4, 5), (3, 5), (0, 3), (1, 4), (2, 5)}
    assert [GRAPHS["torus"](clients=clients).sides for clients in (4, 9, 12)] == [(2, 2), (3, 3), (3, 4)]
    assert np.bincount(GRAPHS["torus"](clients=12).edges_at(0).ravel()).tolist() == [4] * 12
    assert np.bincount(GRAPHS["random_regular"](clients=10, degree=4).edges_at(0).ravel()).tolist() == [4] * 10


def test_random_graphs_depend_on_the_seed() -> None:
    for name, setting in (("erdos_renyi", {"probability": 0.5}), ("random_regular", {"degree": 3})):
        drawn = [str(GRAPHS[name](clients=10, seed=seed, **setting).edges_at(0)) for seed in (0, 0, 1)]
        assert drawn[0] == drawn[1] != drawn[2]


def test_a_random_graph_is_the_first_of_its_draws_that_connects_the_clients() -> None:
    every, seed, attempts = pairs.all_pairs(7), 1, []
    graph = GRAPHS["erdos_renyi"](clients=7, seed=seed, probability=0.3)
    for attempt in range(100):
        drawn = every[uniforms(seed, Draw.ERDOS_RENYI, attempt, every[:, 0], every[:, 1]) < 0.3]
        attempts.append(rows(drawn))
        joined = csr_array((np.ones(len(drawn)), tuple(drawn.T)), shape=(7, 7))
        if connected_components(joined, directed=False)[0] == 1:
            break
    assert len(attempts) > 1
    assert rows(graph.edges_at(0)) == attempts[-1]


def test_one_client_needs_no_edges() -> None:
    for name, more in (("complete", {}), ("erdos_renyi", {"probability": 0.5}), ("matching", {"probability": 0.5})):
        graph = GRAPHS[name](clients=1, **more)
        assert graph.edges_at(0).shape == (0, 2)
        assert weights_at(graph, 0).toarray() == [[1.0]]
    assert rho(GRAPHS["complete"](clients=1)) == 0


@pytest.mark.parametrize("clients", [2, 4, 8, 16, 32])
def test_one_period_of_the_exponential_graph_averages_exactly(clients: int) -> None:
    graph = GRAPHS["exponential"](clients=clients)
    product = np.eye(clients)
    for t in range(int(np.log2(clients))):
        product = weights_at(graph, t + 7) @ product
    np.testing.assert_array_equal(product, np.full((clients, clients), 1 / clients))


@quickly
@given(clients=st.integers(1, 9), probability=st.floats(0.05, 1), seed=seeds, t=rounds)
def test_a_matching_pairs_each_client_at_most_once(clients: int, probability: float, seed: int, t: int) -> None:
    graph = GRAPHS["matching"](clients=clients, seed=seed, probability=probability)
    ends = graph.edges_at(t).ravel()
    assert len(set(ends.tolist())) == len(ends)
    if probability == 1:
        assert len(ends) == clients // 2 * 2
    i, j = graph.edges_at(t).T
    assert (weights_at(graph, t).toarray()[i, j] == 0.5).all()


def test_no_available_pair_is_left_free_by_a_matching() -> None:
    graph = GRAPHS["matching"](clients=9, seed=5, probability=0.2)
    for t in range(200):
        busy = set(graph.edges_at(t).ravel().tolist())
        for i in range(9):
            for j in range(i + 1, 9):
                assert uniforms(5, Draw.MATCHING, t, i, j) >= 0.2 or {i, j} & busy


def test_a_matching_goes_through_the_available_pairs_in_the_order_of_their_draws() -> None:
    graph = GRAPHS["matching"](clients=7, seed=5, probability=0.6)
    for t in range(20):
        draws = sorted((float(uniforms(5, Draw.MATCHING, t, i, j)), i, j) for i, j in pairs.all_pairs(7).tolist())
        meet: list[tuple[int, int]] = []
        for draw, i, j in draws:
            if draw < 0.6 and not {i, j} & {end for pair in meet for end in pair}:
                meet.append((i, j))
        assert rows(graph.edges_at(t)) == set(meet)


def test_edges_come_from_a_file(tmp_path: Path) -> None:
    path = tmp_path / "links.csv"
    lines = "1,0\n\n 2 3  # over the road\n0, 1\n1\t2\n"
    for first in ("# who lives near whom\n", "\ufeff", "\n# as exported\nsource,target\n", '\ufeff"From" "To"\n'):
        path.write_text(first + lines, encoding="utf-8")
        graph = GRAPHS["edges"](clients=4, path=str(path))
        assert graph.edges_at(9).tolist() == [[0, 1], [1, 2], [2, 3]]


def test_a_trace_begins_again_after_its_last_round(tmp_path: Path) -> None:
    path = tmp_path / "contacts.txt"
    for first in ("", "\ufeffTime,i,j\n"):
        path.write_text(first + "3 1 2\n0,1,0\n0,0,1\n1,0,2\n", encoding="utf-8")
        graph = GRAPHS["trace"](clients=3, path=path)
        assert graph.period == 4
    assert [graph.edges_at(t).tolist() for t in range(5)] == [[[0, 1]], [[0, 2]], [], [[1, 2]], [[0, 1]]]


# --- How well they mix --------------------------------------------------------------------------------------------


@pytest.mark.parametrize("clients", [3, 4, 10, 31])
def test_rho_of_a_ring_is_that_of_the_closed_form(clients: int) -> None:
    expected = max((1 / 3 + 2 / 3 * np.cos(2 * np.pi * k / clients)) ** 2 for k in range(1, clients))
    graph = GRAPHS["ring"](clients=clients)
    assert rho(graph) == pytest.approx(expected, abs=1e-12)
    assert rho_draws(graph) == 0


def test_rho_of_a_ring_of_ten_is_the_known_figure() -> None:
    assert rho(GRAPHS["ring"](clients=10)) == pytest.approx(0.762, abs=5e-4)


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
    assert rho(graph) == pytest.approx(1 - gap, rel=0.025)


@pytest.mark.thorough
def test_an_estimated_rho_agrees_with_the_formula_where_there_is_one() -> None:
    # Two clients either average (rho 0) or don't meet (rho 1).
    assert rho(GRAPHS["complete"](clients=2, activation=0.3)) == pytest.approx(0.7, abs=0.02)
    # W of a matching is a projection, so E[WᵀW] = E[W]; each pair meets in one of n - 1 rounds.
    assert 1 - rho(GRAPHS["matching"](clients=6, probability=1.0)) == pytest.approx(6 / (2 * 5), abs=0.02)


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
        ("matching", 10, {"probability": 0.5}, 24_353),
        ("matching", 400, {"probability": 0.5}, 608),
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
        found = weights.largest_eigenvalue(diags_array(values + shift))
        assert found == pytest.approx(1 + shift, abs=1e-6)
        assert found <= 1 + shift + 1e-12
    assert weights.largest_eigenvalue(diags_array(np.array([2.0, 5.0, 3.0]))) == pytest.approx(5, abs=1e-12)
    assert weights.largest_eigenvalue(diags_array(np.full(9, -2.0))) == pytest.approx(-2, abs=1e-12)
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
def test_a_summary_says_what_a_graph_does() -> None:
    found = summary(GRAPHS["star"](clients=5, activation=0.5, seed=4))
    assert (found.clients, found.edges, found.mean_neighbours) == (5, 4.0, 0.8)
    assert found.isolated_share == pytest.approx((4 * 0.5 + 0.5**4) / 5)
    assert found.spectral_gap == pytest.approx(1 - found.rho)
    assert summary(GRAPHS["exponential"](clients=8)).mean_neighbours == 1
    assert summary(GRAPHS["matching"](clients=10, probability=1.0)).isolated_share == 0


# --- Mistakes -----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("name", "arguments", "message"),
    [
        ("complete", {"clients": 0}, "graph complete: clients is 0; choose 1 or more"),
        ("ring", {"clients": 2}, "graph ring: clients is 2; choose 3 or more"),
        ("path", {"clients": 1}, "graph path: clients is 1; choose 2 or more"),
        ("star", {"clients": 1}, "graph star: clients is 1; choose 2 or more"),
        (
            "complete",
            {"clients": 3, "activation": 0},
            "graph complete: activation is 0; choose a number above 0, at most 1",
        ),
        (
            "ring",
            {"clients": 3, "activation": 1.5},
            "graph ring: activation is 1.5; choose a number above 0, at most 1",
        ),
        (
            "ring",
            {"clients": 3, "activation": float("nan")},
            "graph ring: activation is nan; choose a number above 0, at most 1",
        ),
        (
            "ring",
            {"clients": 3, "weights": "metropolys"},
            "graph ring: weights: unknown name 'metropolys', did you mean metropolis?",
        ),
        (
            "star",
            {"clients": 4, "weights": "uniform"},
            "graph star: weights uniform need the same number of neighbours for every client, but they have 1 to 3; "
            "choose metropolis or laplacian",
        ),
        (
            "matching",
            {"clients": 4, "probability": 0.5, "weights": "uniform"},
            "graph matching: weights uniform need the same edges every round; choose metropolis",
        ),
        (
            "torus",
            {"clients": 7},
            "graph torus: 7 is prime, so it fills no grid; change clients or choose ring",
        ),
        (
            "torus",
            {"clients": 12, "rows": 5},
            "graph torus: 12 clients don't fill 5 rows of 2 or more; choose a divisor above 1",
        ),
        (
            "bipartite",
            {"clients": 4, "left": 4},
            "graph bipartite: left is 4; choose 1 to 3, so that both sides have clients",
        ),
        (
            "hypercube",
            {"clients": 10},
            "graph hypercube: clients is 10, not a power of two; choose 2, 4, 8, 16 and so on",
        ),
        (
            "exponential",
            {"clients": 6},
            "graph exponential: clients is 6, not a power of two; choose 2, 4, 8, 16 and so on",
        ),
        (
            "erdos_renyi",
            {"clients": 6, "probability": 1.2},
            "graph erdos_renyi: probability is 1.2; choose a number above 0, at most 1",
        ),
        (
            "erdos_renyi",
            {"clients": 50, "probability": 0.01},
            "graph erdos_renyi: none of 100 draws is connected; raise probability above 0.01",
        ),
        (
            "matching",
            {"clients": 6, "probability": 0},
            "graph matching: probability is 0; choose a number above 0, at most 1",
        ),
        (
            "random_regular",
            {"clients": 5, "degree": 3},
            "graph random_regular: clients x degree is 5 x 3, odd; change one by 1",
        ),
        (
            "complete",
            {"clients": 10_000},
            "graph complete: 10,000 clients have about 49,995,000 edges, and 10,000,000 is the most; "
            "choose an activation below 0.2, or a sparse graph such as random_regular",
        ),
        (
            "complete",
            {"clients": 10_000, "activation": 0.01, "weights": "laplacian"},
            "graph complete: weights laplacian need all possible edges, and 10,000 clients have about 49,995,000 "
            "edges, and 10,000,000 is the most; choose metropolis, or a sparse graph such as random_regular",
        ),
        (
            "bipartite",
            {"clients": 20_000},
            "graph bipartite: 10,000 and 10,000 clients have 100,000,000 edges, and 10,000,000 is the most; "
            "choose fewer clients, a smaller left, or random_regular",
        ),
        (
            "erdos_renyi",
            {"clients": 10_000, "probability": 0.5},
            "graph erdos_renyi: 10,000 clients at probability 0.5 have about 24,997,500 edges, and 10,000,000 is the "
            "most; choose a lower probability, or random_regular",
        ),
        (
            "erdos_renyi",
            {"clients": 1_000_000, "probability": 2e-5},
            "graph erdos_renyi: 1,000,000 clients make 499,999,500,000 pairs to draw; "
            "choose at most 100,000 clients, or a sparse graph such as random_regular",
        ),
        (
            "erdos_renyi",
            {"clients": 10_000, "probability": 0.0002},
            "graph erdos_renyi: about 1,353 of 10,000 clients would have no edge; raise probability above 0.00092",
        ),
        (
            "matching",
            {"clients": 200_000, "probability": 1e-5},
            "graph matching: 200,000 clients make 19,999,900,000 pairs to draw; "
            "choose at most 100,000 clients, or a sparse graph such as random_regular",
        ),
        ("random_regular", {"clients": 4, "degree": 4}, "graph random_regular: degree is 4; choose 1 to 3"),
        ("random_regular", {"clients": 4, "degree": 0}, "graph random_regular: degree is 0; choose 1 to 3"),
        (
            "bipartite",
            {"clients": 4, "left": 0},
            "graph bipartite: left is 0; choose 1 to 3, so that both sides have clients",
        ),
        (
            "torus",
            {"clients": 5, "rows": 5},
            "graph torus: 5 clients don't fill 5 rows of 2 or more; choose a divisor above 1",
        ),
        (
            "torus",
            {"clients": 6, "rows": 1},
            "graph torus: 6 clients don't fill 1 rows of 2 or more; choose a divisor above 1",
        ),
        (
            "random_regular",
            {"clients": 4, "degree": 1},
            "graph random_regular: none of 100 draws is connected; raise degree above 1",
        ),
    ],
)
def test_a_wrong_setting_is_named_with_what_would_be_right(name: str, arguments: dict[str, Any], message: str) -> None:
    with pytest.raises(GraphError) as error:
        GRAPHS[name](**arguments)
    assert str(error.value) == message


@pytest.mark.parametrize(
    ("name", "text", "message"),
    [
        ("edges", "0,1\n1 2\n# 0,3\n", "clients 3, 4 can never reach client 0; add edges between them"),
        ("edges", "0,1\n1 2\n0,3", "client 4 can never reach client 0; add edges between them"),
        ("trace", "", "clients 1, 2, 3, 4 can never reach client 0; add edges between them"),
        ("edges", "0,1\ni,j", "line 2: 'i,j' isn't of the form i,j, whole numbers from 0"),
        ("edges", "i,j,w\n0,1,2", "line 1: 'i,j,w' isn't of the form i,j, whole numbers from 0"),
        ("trace", "i,j,round\n0,1,2", "line 1: its columns are i, j, round; put them in the order round,i,j"),
        ("edges", "0,1\n0,1,2", "line 2: '0,1,2' isn't of the form i,j, whole numbers from 0"),
        ("trace", "0,1\n", "line 1: '0,1' isn't of the form round,i,j, whole numbers from 0"),
        ("trace", "-1,0,1\n", "line 1: '-1,0,1' isn't of the form round,i,j, whole numbers from 0"),
        ("edges", "\n0,5", "line 2: there is no client 5; 5 clients have numbers 0 to 4"),
        ("trace", "7,1,1", "line 1: client 1 is paired with itself; an edge joins two clients"),
    ],
)
def test_a_wrong_file_is_named_with_its_line(name: str, text: str, message: str, tmp_path: Path) -> None:
    path = tmp_path / "file.csv"
    path.write_text(text)
    with pytest.raises(GraphError) as error:
        GRAPHS[name](clients=5, path=path)
    assert str(error.value) == f"graph {name} ({path}): {message}"


@pytest.mark.parametrize(("name", "form"), [("edges", "i,j"), ("trace", "round,i,j")])
def test_a_missing_file_is_named(name: str, form: str, tmp_path: Path) -> None:
    path = tmp_path / "nowhere.csv"
    with pytest.raises(GraphError) as error:
        GRAPHS[name](clients=5, path=path)
    message = f"graph {name} ({path}): can't be read, No such file or directory; give a file of lines {form}"
    assert str(error.value) == message


def test_many_clients_out_of_reach_are_not_all_listed(tmp_path: Path) -> None:
    path = tmp_path / "few.csv"
    path.write_text("0 1")
    with pytest.raises(GraphError, match=r"clients 2, 3, 4, 5, 6, 7, 8, 9, 10, 11 and 8 more can never reach client 0"):
        GRAPHS["edges"](clients=20, path=path)


def test_a_round_of_too_many_pairs_is_refused_but_not_a_peers_own_row() -> None:
    graph = GRAPHS["complete"](clients=150_000, activation=1e-5)
    with pytest.raises(GraphError, match=r"graph complete: 150,000 clients make 11,249,925,000 pairs to draw"):
        weights_at(graph, 0)
    assert sum(row_at(graph, 7, 0).values()) == pytest.approx(1)
    with pytest.raises(GraphError, match=r"150,000 clients have about 11,249,925,000 edges, and 10,000,000"):
        graph.edges_at(0)


def test_what_is_the_most_is_allowed_itself(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    path = tmp_path / "trace.csv"
    path.write_text("1,0,1\n")
    cases: list[tuple[ModuleType, str, int, Callable[[], Graph]]] = [
        (pairs, "MOST_EDGES", 15, lambda: GRAPHS["complete"](clients=6)),
        (pairs, "MOST_EDGES", 8, lambda: GRAPHS["complete"](clients=6, activation=0.5)),
        (pairs, "MOST_PAIRED", 6, lambda: GRAPHS["matching"](clients=6, probability=0.5)),
        (graphs, "MOST_EDGES", 8, lambda: GRAPHS["bipartite"](clients=6, left=2)),
        (graphs, "MOST_ROUNDS", 2, lambda: GRAPHS["trace"](clients=2, path=path)),
    ]
    for module, limit, at, make in cases:
        with monkeypatch.context() as patch:
            patch.setattr(module, limit, at)
            make()
            patch.setattr(module, limit, at - 1)
            with pytest.raises(GraphError):
                make()


def test_a_trace_whose_rounds_would_fill_the_memory_is_refused(tmp_path: Path) -> None:
    path = tmp_path / "trace.csv"
    path.write_text("0,0,1\n9000000000,0,1\n")
    with pytest.raises(GraphError, match=r"round 9,000,000,000 is too far; number the rounds from 0"):
        GRAPHS["trace"](clients=2, path=path)
