"""Weights by rows: what they keep, what a peer needs of them, and how they mix."""

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from graph_making import activations, every_graph, make, quickly, rounds, seeds, seen_by, sizes
from hypothesis import given, settings
from hypothesis import strategies as st
from numpy.typing import NDArray
from playing import begun, played

from peertune.assembly.registry import beyond_defaults, build_graph, resolved_choices
from peertune.errors import PeertuneError
from peertune.method import Algorithm
from peertune.methods.catalogue import ALGORITHMS
from peertune.methods.modifiers import MODIFIERS
from peertune.recipe import load_recipe
from peertune.topology import (
    GRAPHS,
    Fault,
    Graph,
    active_edges,
    one_period,
    planned_weights,
    rho,
    row_at,
    spectrum,
    weights_at,
    with_rows,
)


def counted(name: str, counts: Sequence[int], **more: Any) -> Graph:
    return with_rows(GRAPHS[name](clients=len(counts), weights="rows", **more), list(counts))


@every_graph
@settings(quickly, max_examples=5)
@given(size=sizes, activation=activations, seed=seeds, t=rounds, data=st.data())
def test_a_round_keeps_the_mean_over_all_rows_and_each_client_needs_its_own_row_only(
    name: str, folder: Path, size: int, activation: float, seed: int, t: int, data: st.DataObject
) -> None:
    plain = make(name, size, folder, activation=activation, seed=seed, weights="rows")
    counts = [data.draw(st.integers(1, 1000)) for _ in range(plain.clients)]
    graph = with_rows(plain, counts)
    W, n = weights_at(graph, t).toarray(), np.array(counts)
    degree = np.bincount(active_edges(graph, t).ravel(), minlength=graph.clients)
    expected = np.zeros_like(W)
    for i, j in active_edges(graph, t).tolist():  # each proposes 1 / (1 + d), and accepts as Metropolis and Hastings do
        expected[i, j] = 1 / (1 + degree[i]) * min(1, n[j] / (1 + degree[j]) / (n[i] / (1 + degree[i])))
        expected[j, i] = 1 / (1 + degree[j]) * min(1, n[i] / (1 + degree[i]) / (n[j] / (1 + degree[j])))
    np.testing.assert_allclose(W, expected + np.diag(1 - expected.sum(1)), atol=1e-14)
    np.testing.assert_allclose(n @ W, n, rtol=1e-12)
    assert W.min() >= 0
    for client in range(graph.clients):
        assert row_at(graph, client, t) == {other: W[client, other] for other in np.flatnonzero(W[client])}
        if name not in ("complete", "matching"):
            seen = with_rows(seen_by(graph, client), counts)
            assert row_at(seen, client, t) == row_at(graph, client, t)


def test_equal_numbers_are_metropolis_weights() -> None:
    plain = GRAPHS["complete"](clients=5, activation=0.5, seed=3)
    for t in range(5):
        W = weights_at(counted("complete", [7] * 5, activation=0.5, seed=3), t)
        np.testing.assert_allclose(W.toarray(), weights_at(plain, t).toarray(), rtol=1e-15)


def test_rows_are_drawn_where_pairs_are_too_many_to_hold(few_pairs: None) -> None:
    graph = counted("complete", range(1, 31), activation=0.1, seed=7)
    for t in range(4):
        W = weights_at(graph, t).toarray()
        np.testing.assert_allclose(np.arange(1, 31) @ W, np.arange(1, 31), rtol=1e-12)
        for client in range(0, 30, 7):
            assert row_at(graph, client, t) == {other: W[client, other] for other in np.flatnonzero(W[client])}


def test_what_an_edge_that_fails_weighed_returns_to_both_ends_each_its_own() -> None:
    graph = counted("path", [1, 9, 4])
    W = weights_at(graph, 0).toarray()
    after, failed = planned_weights(graph, [Fault(0, 0, edge=(1, 2))], 0)
    assert failed == [(1, 2)]
    assert W[1, 2] != W[2, 1]
    W += np.array([[0, 0, 0], [0, W[1, 2], -W[1, 2]], [0, -W[2, 1], W[2, 1]]])
    np.testing.assert_allclose(after.toarray(), W)
    np.testing.assert_allclose([1, 9, 4] @ after, [1, 9, 4])


def test_rounded_messages_keep_the_mean_over_all_rows() -> None:
    counts = torch.tensor([1.0, 9.0, 4.0, 2.0], dtype=torch.float64)
    plain = ALGORITHMS["dec_lora"]()
    method = plain._replace(message=MODIFIERS["half"](plain.message))
    x = torch.randn(4, 2, 3, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    W = torch.from_numpy(weights_at(counted("ring", [1, 9, 4, 2]), 0).toarray())
    after = played(method, begun(method, {"q.A": x}), W).adapters["q.A"]
    assert float((after - torch.einsum("ij,jkl->ikl", W, x)).abs().max()) > 1e-4, "rounded"
    torch.testing.assert_close(*(torch.einsum("i,ijk->jk", counts, at) for at in (after, x)), rtol=0, atol=1e-12)


def left(n: NDArray[np.float64], maps: Sequence[NDArray[np.float64]]) -> float:
    """What these maps leave of the worst weighted disagreement, in the mean of its square."""
    share = n / n.sum()
    apart = np.eye(len(n)) - share  # x minus the mean over rows
    norm = np.diag(share)
    moment = sum((apart @ W).T @ norm @ apart @ W for W in maps) / len(maps)
    scale = np.diag(share**-0.5)
    return float(np.linalg.eigvalsh(scale @ (apart.T @ moment @ apart) @ scale)[-1])


def test_rho_is_of_the_disagreement_that_counts_rows(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setattr(spectrum, "DRAWING_NS", 1e8)
    counts = [1, 20, 3, 40, 5, 6]
    n = np.array(counts, dtype=float)
    ring = counted("ring", counts)
    assert rho(ring) == pytest.approx(left(n, [weights_at(ring, 0).toarray()]), abs=1e-12)
    assert rho(ring) > rho(GRAPHS["ring"](clients=6)) + 0.1
    drawn = counted("complete", counts, activation=0.3)
    maps = [weights_at(drawn, t).toarray() for t in range(60)]
    assert rho(drawn, 60) == pytest.approx(left(n, maps), abs=1e-12)
    path = tmp_path / "trace.csv"
    path.write_text("0,0,1\n0,2,3\n1,1,2\n1,4,5\n2,3,4\n2,0,5\n")
    trace = counted("trace", counts, path=path)
    period = np.linalg.multi_dot([weights_at(trace, t).toarray() for t in (2, 1, 0)])
    radius = np.sort(np.abs(np.linalg.eigvals(period)))[-2]
    assert rho(trace) == pytest.approx(radius ** (2 / 3), abs=1e-10)
    assert one_period(trace) == pytest.approx(left(n, [period]) ** (1 / 3), abs=1e-10)
    sometimes = counted("trace", counts, path=path, activation=0.6)
    assert rho(trace) < rho(sometimes) < one_period(sometimes)  # type: ignore[operator]
    monkeypatch.setattr(spectrum, "DENSE_CLIENTS", 4)
    again = counted("ring", counts)  # not the one that is remembered
    assert rho(again) == pytest.approx(rho(ring), rel=1e-6)


@pytest.mark.parametrize(
    ("more", "message"),
    [
        (
            "weights: rows",
            r"weights rows need a number of rows in graph\.row_counts for each of 4 clients, and none are",
        ),
        ("weights: rows, row_counts: [1, 2]", "for each of 4 clients, and row_counts has 2"),
        ("weights: rows, row_counts: [1, 2, 0, 4]", r"graph ring: row_counts\[2\] is 0; give whole numbers from 1 to"),
        (
            "weights: rows, row_counts: [1, -2, 3, 4]",
            r"graph ring: row_counts\[1\] is -2; give whole numbers from 1 to",
        ),
        ("row_counts: [1, 2, 3, 4]", "row_counts are for weights rows, and these are metropolis; leave them out"),
        ("weights: rows, row_counts: [1, 2, 3, 4.5]", r"graph\.row_counts: input should be a valid integer, not 4\.5"),
        ("weights: rows, row_count: [1]", r"graph\.row_count"),
    ],
)
def test_numbers_that_are_not_one_for_each_client_are_refused(more: str, message: str) -> None:
    with pytest.raises(PeertuneError, match=message):
        build_graph(load_recipe("digits-demo", ["clients=4", f"graph={{name: ring, {more}}}"]))


def test_numbers_stand_in_a_recipe_where_they_are_given_and_nowhere_else() -> None:
    method: Algorithm = ALGORITHMS["dec_lora"]()
    plain = load_recipe(
        "digits-demo", ["clients=4", "graph={name: ring, row_counts: null}", "algorithm={name: dec_lora}"]
    )
    rows = load_recipe("digits-demo", ["clients=4", "graph={name: ring, weights: rows, row_counts: [1, 2, 3, 4]}"])
    assert build_graph(rows).row_counts == (1, 2, 3, 4)
    assert "row_counts" not in resolved_choices(plain, method)["graph"].settings
    assert beyond_defaults("graph", plain.graph) == {"name": "ring"}
    assert beyond_defaults("graph", rows.graph) == {"name": "ring", "weights": "rows", "row_counts": [1, 2, 3, 4]}
