"""Graphs whose edges go one way: who sends to whom, what a receiver makes of it, and how that mixes."""

from dataclasses import replace
from itertools import permutations

import numpy as np
import pytest
from graph_making import activations, quickly, rounds, rows, seeds, sizes
from hypothesis import given
from hypothesis import strategies as st
from numpy.typing import NDArray

from peertune.assembly.registry import build_parts, describe_graph
from peertune.errors import GraphError, RecipeError
from peertune.randomness import Draw, uniforms, words
from peertune.recipe import load_recipe
from peertune.topology import (
    GRAPHS,
    Fault,
    Graph,
    active_edges,
    clients_down,
    drop_edges,
    lost_messages,
    messages_sent,
    neighbourhoods,
    partners_at,
    planned_weights,
    rho,
    row_at,
    spectrum,
    summary,
    weights_at,
    whose_adapters,
)
from peertune.topology.weights import as_edges


def epidemic(clients: int, fan_out: int, **settings: object) -> Graph:
    return GRAPHS["epidemic"](clients=clients, fan_out=fan_out, **settings)


def one_way(clients: int, *rounds: list[tuple[int, int]]) -> Graph:
    """A directed graph of these edges (sender, receiver), round after round."""
    edges = [as_edges(clients, pairs, directed=True) for pairs in rounds]
    return Graph(clients, lambda t: edges[t % len(edges)], len(edges), 1.0, 0, "row", directed=True)


def both_ways(graph: Graph) -> Graph:
    """The directed graph that has each edge of another one in both directions."""
    return one_way(graph.clients, [pair for i, j in graph.edges_at(0).tolist() for pair in ((i, j), (j, i))])


@quickly
@given(size=sizes, data=st.data(), seed=seeds, t=rounds)
def test_each_client_draws_its_own_receivers_each_as_many(size: int, data: st.DataObject, seed: int, t: int) -> None:
    clients = size + 1
    fan_out = data.draw(st.integers(1, size))
    edges = epidemic(clients, fan_out, seed=seed).edges_at(t)
    assert edges.tolist() == sorted(edges.tolist())
    for client in range(clients):  # alone, by Floyd's algorithm
        others, drawn = [other for other in range(clients) if other != client], list[int]()
        for place, last in enumerate(range(len(others) - fan_out, len(others))):
            one = int(words(seed, Draw.EPIDEMIC, t, client, place)) % (last + 1)
            drawn.append(last if one in drawn else one)
        assert edges[edges[:, 0] == client, 1].tolist() == sorted(others[place] for place in drawn)


def test_any_receivers_are_as_likely_as_any_others() -> None:
    graph, counts = epidemic(4, 2), np.zeros((4, 4))
    pairs = dict.fromkeys(permutations(range(4), 3), 0)  # client 0's two receivers among them
    for t in range(2000):
        edges = graph.edges_at(t)
        np.add.at(counts, tuple(edges.T), 1 / 2000)
        pairs[0, *edges[:2, 1].tolist()] += 1
    np.testing.assert_allclose(counts, 2 / 3 * (1 - np.eye(4)), atol=0.05)
    assert [pairs[0, 1, 2], pairs[0, 1, 3], pairs[0, 2, 3]] == pytest.approx([667] * 3, abs=80)


@quickly
@given(size=sizes, activation=activations, seed=seeds, t=rounds)
def test_a_receiver_averages_equally_what_it_heard_and_its_own(size: int, activation: float, seed: int, t: int) -> None:
    graph = epidemic(size + 1, (size + 1) // 2, seed=seed, activation=activation)
    sent = [(i, j) for i, j in graph.edges_at(t).tolist() if uniforms(seed, Draw.EDGE, t, i, j) < activation]
    assert rows(active_edges(graph, t)) == set(sent)
    expected = np.zeros((size + 1, size + 1))
    for client in range(size + 1):
        heard = [client, *(i for i, j in sent if j == client)]
        expected[client, heard] = 1 / len(heard)
    np.testing.assert_allclose(weights_at(graph, t).toarray(), expected, atol=1e-15)


def test_the_weight_of_a_message_that_is_lost_returns_to_its_receiver_and_the_other_way_stays() -> None:
    graph = one_way(3, [(0, 1), (1, 0), (1, 2), (2, 0)])
    W = weights_at(graph, 0)
    third, half = 1 / 3, 1 / 2
    np.testing.assert_allclose(W.toarray(), [[third] * 3, [half, half, 0], [0, half, half]])
    after = drop_edges(graph, W, [(1, 0), (0, 2)])  # the second is no edge
    np.testing.assert_allclose(after.toarray(), [[2 * third, 0, third], [half, half, 0], [0, half, half]])


def test_a_plan_drops_messages_both_ways_and_who_is_down_neither_sends_nor_is_sent_to() -> None:
    graph = epidemic(5, 4)  # all to all
    faults = [Fault(1, 2, edge=(1, 3)), Fault(2, 2, down=4)]
    plain = weights_at(graph, 2)
    assert planned_weights(graph, faults, 0)[1] == []
    assert planned_weights(graph, faults, 1)[1] == [(1, 3), (3, 1)]
    after, failed = planned_weights(graph, faults, 2)
    assert failed == [(0, 4), (1, 3), (1, 4), (2, 4), (3, 1), (3, 4), (4, 0), (4, 1), (4, 2), (4, 3)]
    assert clients_down(faults, 2) == {4}
    np.testing.assert_allclose(after.toarray(), drop_edges(graph, plain, failed).toarray())
    np.testing.assert_allclose(after.sum(axis=1), 1)
    assert [messages_sent(graph, faults, t).tolist() for t in (1, 2)] == [[4] * 5, [3, 3, 3, 3, 0]]
    assert messages_sent(epidemic(6, 2), [], 0).tolist() == [2] * 6
    assert lost_messages(graph, faults, 1) == [], "who averages what it heard goes without it"
    np.testing.assert_array_equal(whose_adapters(graph, faults, 2).toarray(), after.toarray())
    pushing = epidemic(5, 4, weights="push_sum")
    assert [lost_messages(pushing, faults, t) for t in (0, 1)] == [[], [(1, 3, 0.2), (3, 1, 0.2)]]
    needed = whose_adapters(pushing, faults, 2).toarray() > 0
    assert needed.tolist() == [[i == j or 4 not in (i, j) for j in range(5)] for i in range(5)]


def direct(graph: Graph, rounds: int) -> NDArray[np.float64]:
    """The eigenvalues of the mean of Wᵀ(I - J)W."""
    apart = np.eye(graph.clients) - 1 / graph.clients
    found = (weights_at(graph, t).toarray() for t in range(rounds))
    return np.linalg.eigvalsh(sum(W.T @ apart @ W for W in found) / rounds)


@pytest.mark.parametrize("name", ["ring", "complete", "hypercube"])
def test_rho_of_a_graph_in_both_directions_is_that_of_the_graph(name: str) -> None:
    graph = GRAPHS[name](clients=8)
    np.testing.assert_allclose(weights_at(both_ways(graph), 0).toarray(), weights_at(graph, 0).toarray(), atol=1e-15)
    assert rho(both_ways(graph)) == pytest.approx(rho(graph), abs=1e-12)
    assert summary(both_ways(graph)).mean_neighbours == summary(graph).mean_neighbours


def test_rho_is_the_largest_eigenvalue_that_its_formula_has(monkeypatch: pytest.MonkeyPatch) -> None:
    lopsided = one_way(5, [(0, 1), (1, 2), (2, 3), (3, 4), (4, 0), (0, 2), (0, 3)], [(1, 0), (4, 2), (2, 4)])
    found = rho(lopsided)
    assert found == pytest.approx(direct(lopsided, 2)[-1], abs=1e-12)
    assert 0.2 < found < 0.99
    drawn = replace(epidemic(7, 2, activation=0.7), exchangeable=False)
    assert rho(drawn, 50) == pytest.approx(direct(drawn, 50)[-1], abs=1e-12)
    alike = epidemic(7, 2, activation=0.7)
    assert rho(alike, 50) == pytest.approx(direct(drawn, 50).sum() / 6, abs=1e-12)
    monkeypatch.setattr(spectrum, "DENSE_CLIENTS", 4)
    again = one_way(5, *(lopsided.edges_at(t).tolist() for t in range(2)))  # not the one that is remembered
    assert rho(again) == pytest.approx(found, rel=1e-6)


def test_a_summary_counts_who_is_heard(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(spectrum, "DRAWING_NS", 1e8)
    graph = epidemic(6, 2, activation=0.5)
    facts = summary(graph)
    assert (facts.edges, facts.mean_neighbours) == (12, 1.0)
    assert facts.isolated_share == pytest.approx((1 - 0.5 * 2 / 5) ** 5, abs=0.02)
    assert facts.draws > 300
    assert describe_graph(graph)["directed"] is True
    assert "directed" not in describe_graph(GRAPHS["ring"](clients=3))


def test_one_way_roads_must_lead_from_all_to_all() -> None:
    with pytest.raises(GraphError, match=r"client 2 can never reach client 0 and be reached from it; add edges"):
        one_way(3, [(0, 1), (1, 0), (0, 2)])
    one_way(3, [(0, 1), (1, 2)], [(2, 0)])


def test_peers_refuse_a_directed_graph_by_its_name() -> None:
    message = (
        "graph epidemic: its edges go one way, and peers swap; choose a graph whose edges go both ways, let them push "
        "with time.mode=asynchronous, or simulate it with peertune run"
    )
    recipe = load_recipe("digits-demo", ["graph={name: epidemic, fan_out: 2}", "algorithm.switch_every=1"])
    assert build_parts(recipe).graph.directed
    with pytest.raises(GraphError, match=message):
        build_parts(recipe, [3])
    graph = epidemic(4, 1)
    with pytest.raises(GraphError, match=message):
        next(neighbourhoods(graph, [0], summary(GRAPHS["ring"](clients=4))))
    for asked in (row_at, partners_at):
        with pytest.raises(GraphError, match=message):
            asked(graph, 0, 0)


@pytest.mark.parametrize("name", ["fedspeed", "dfed_admm"])
def test_what_needs_edges_both_ways_refuses_a_directed_graph(name: str) -> None:
    settings = ["graph={name: epidemic, fan_out: 2}", "algorithm={name: dec_lora}", f"modifiers=[{{name: {name}}}]"]
    with pytest.raises(
        RecipeError, match=f"dec_lora with {name} needs edges both ways; choose another graph than epidemic"
    ):
        build_parts(load_recipe("digits-demo", settings))
