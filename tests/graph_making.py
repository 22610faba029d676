"""Graphs of every name and size, and what is drawn for the tests of them."""

from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from scipy.sparse import csr_array

from peertune.topology import GRAPHS, Graph, GraphSummary, digest, graph_near, neighbourhoods

PROBABILITIES = [0.5, 0.2, 0.1, 0.05, 0.02, 0.01]
# For each row of GRAPHS: (size from 1 to 6) → valid arguments.
VALID: dict[str, Callable[[int], dict[str, Any]]] = {
    "bipartite": lambda size: {"clients": 2 * size, "left": size},
    "complete": lambda size: {"clients": size},
    "edges": lambda size: {"clients": size + 1},
    "epidemic": lambda size: {"clients": size + 1, "fan_out": (size + 1) // 2},
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


BOTH_WAYS = sorted(GRAPHS.keys() - {"epidemic"})
every_graph = pytest.mark.parametrize("name", BOTH_WAYS)
sizes = st.integers(1, 6)
activations = st.floats(0.01, 1)
seeds = st.integers(0, 2**64)
rounds = st.integers(0, 10**6)
quickly = settings(max_examples=20, derandomize=True)
any_settings = given(
    size=sizes, activation=activations, seed=seeds, t=rounds, weights=st.sampled_from(["metropolis", "laplacian"])
)
FACTS = GraphSummary(9, 9.0, 2.0, 0.0, 0.75, 0.25, 0)


def seen_by(graph: Graph, client: int) -> Graph:
    """The graph as the client knows it that is told its neighbourhood alone."""
    (known,) = neighbourhoods(graph, [client], replace(FACTS, clients=graph.clients))
    assert (known.client, known.name, known.digest) == (client, graph.name, digest(graph))
    return graph_near(known, seed=graph.seed, activation=graph.activation, weights=graph.weights)
