"""The graphs: which edges they have, from seeds and files, and what is refused."""

from collections.abc import Callable
from inspect import Parameter, signature
from pathlib import Path
from types import ModuleType
from typing import Any

import numpy as np
import pytest
from graph_making import VALID, activations, every_graph, make, quickly, rounds, rows, seeds, sizes
from hypothesis import given
from hypothesis import strategies as st
from scipy.sparse import csr_array
from scipy.sparse.csgraph import connected_components

from peertune.errors import GraphError
from peertune.randomness import Draw, uniforms
from peertune.topology import GRAPHS, Graph, graphs, pairs, rho, rho_draws, weights_at


def test_every_graph_is_tested() -> None:
    assert set(VALID) == set(GRAPHS)


@pytest.mark.parametrize("name", GRAPHS)
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


@pytest.mark.thorough
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
def test_a_graph_repeats_after_its_period_and_not_before(name: str, folder: Path) -> None:
    graph = make(name, 4, folder)
    if graph.period is None:
        assert len({str(graph.edges_at(t)) for t in range(20)}) > 10
    else:
        assert len({str(graph.edges_at(t)) for t in range(3 * graph.period)}) == graph.period
        np.testing.assert_array_equal(graph.edges_at(5), graph.edges_at(5 + graph.period))


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


@pytest.mark.parametrize("clients", [3, 4, 10, 31])
def test_rho_of_a_ring_is_that_of_the_closed_form(clients: int) -> None:
    expected = max((1 / 3 + 2 / 3 * np.cos(2 * np.pi * k / clients)) ** 2 for k in range(1, clients))
    graph = GRAPHS["ring"](clients=clients)
    assert rho(graph) == pytest.approx(expected, abs=1e-12)
    assert rho_draws(graph) == 0


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
        ("epidemic", {"clients": 4, "fan_out": 4}, "graph epidemic: fan_out is 4; choose 1 to 3"),
        ("epidemic", {"clients": 4, "fan_out": 0}, "graph epidemic: fan_out is 0; choose 1 to 3"),
        ("epidemic", {"clients": 1, "fan_out": 1}, "graph epidemic: clients is 1; choose 2 or more"),
        (
            "epidemic",
            {"clients": 1_000_000, "fan_out": 11},
            "graph epidemic: 1,000,000 clients send 11,000,000 messages, and 10,000,000 is the most; choose a smaller "
            "fan_out",
        ),
        (
            "epidemic",
            {"clients": 4, "fan_out": 2, "weights": "metropolis"},
            "graph epidemic: weights: unknown name 'metropolis', choose from push_sum, row",
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


def test_what_is_the_most_is_allowed_itself(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    path = tmp_path / "trace.csv"
    path.write_text("1,0,1\n")
    cases: list[tuple[ModuleType, str, int, Callable[[], Graph]]] = [
        (pairs, "MOST_EDGES", 15, lambda: GRAPHS["complete"](clients=6)),
        (pairs, "MOST_EDGES", 8, lambda: GRAPHS["complete"](clients=6, activation=0.5)),
        (pairs, "MOST_PAIRED", 6, lambda: GRAPHS["matching"](clients=6, probability=0.5)),
        (graphs, "MOST_EDGES", 12, lambda: GRAPHS["epidemic"](clients=6, fan_out=2)),
        (graphs, "MOST_EDGES", 8, lambda: GRAPHS["bipartite"](clients=6, left=2)),
        (graphs, "MOST_ROUNDS", 2, lambda: GRAPHS["trace"](clients=2, path=path)),
    ]
    for module, limit, at, made in cases:
        with monkeypatch.context() as patch:
            patch.setattr(module, limit, at)
            made()
            patch.setattr(module, limit, at - 1)
            with pytest.raises(GraphError):
                made()


def test_a_trace_whose_rounds_would_fill_the_memory_is_refused(tmp_path: Path) -> None:
    path = tmp_path / "trace.csv"
    path.write_text("0,0,1\n9000000000,0,1\n")
    with pytest.raises(GraphError, match=r"round 9,000,000,000 is too far; number the rounds from 0"):
        GRAPHS["trace"](clients=2, path=path)
