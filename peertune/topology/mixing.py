"""How well a graph mixes."""

from dataclasses import dataclass
from functools import lru_cache
from typing import Any

import numpy as np
from scipy.sparse.linalg import aslinearoperator

from peertune.topology.weights import DENSE_CLIENTS, Graph, degrees, largest_eigenvalue, stacked_weights

MOST_DRAWS = 100_000  # rounds drawn to estimate rho, where that is quick (always at n = 10)
LEAST_DRAWS = 16
DRAWING_NS = 1e9  # the time that estimating rho may take, roughly; more clients get fewer draws
CHUNK = 1_000_000  # edges and clients held at once while drawing many rounds


@dataclass(frozen=True)
class GraphSummary:
    """What a graph does in the long run."""

    clients: int
    edges: float  # possible in a round, mean over rounds
    mean_neighbours: float  # a client's active edges in a round
    isolated_share: float  # of all client-rounds, those without a neighbour
    rho: float
    spectral_gap: float  # 1 - rho
    draws: int  # rounds drawn to estimate rho; 0 if it is exact


@lru_cache(maxsize=16)  # it takes a second, and a method asks for it as well as a description of the graph
def rho(graph: Graph, draws: int | None = None) -> float:
    """Return `λ_max(E[WᵀW] - J)` in [0, 1], the factor by which a round of mixing shrinks the squared disagreement.

    Exact, as the mean over a period, where every round is known before (`rho_draws` is 0); otherwise estimated from the
    first `draws` rounds, `rho_draws(graph)` of them by default.

    Where all clients are alike (`Graph.exchangeable`), `E[WᵀW] = a I + b J`, so rho is `(E tr WᵀW - 1) / (n - 1)` and
    the estimate is unbiased. Elsewhere it is the largest eigenvalue of a sample's mean: too high, and the more so
    the sparser the graph and the fewer the draws.
    """
    default = rho_draws(graph)
    exact = graph.period if default == 0 else None
    n, rounds = graph.clients, exact or draws or default
    if graph.exchangeable and n > 1:
        value = (_second_moment(graph, rounds).trace() - 1) / (n - 1)
    elif n <= DENSE_CLIENTS:
        moment = _second_moment(graph, rounds)
        dense = moment if isinstance(moment, np.ndarray) else moment.toarray()
        value = np.linalg.eigvalsh(dense - 1 / n)[-1]
    else:
        if exact:
            # The W of a known round may be dense (complete graph): it is applied twice, as forming WᵀW would cost n³.
            stacked = aslinearoperator(stacked_weights(graph, range(rounds)))
            moment = stacked.T @ stacked * (1 / rounds)
        else:
            moment = aslinearoperator(_second_moment(graph, rounds))
        ones = aslinearoperator(np.full((n, 1), n**-0.5))
        value = largest_eigenvalue(moment - ones @ ones.T, relative_to=1.0, tolerance=1e-4)
    return float(np.clip(value, 0.0, 1.0))


def rho_draws(graph: Graph) -> int:
    """Return how many rounds `rho` draws by default: 0 where it is exact, or 16 to 100,000, a second or so of work."""
    if graph.activation == 1 and graph.period is not None:
        return 0
    n = graph.clients
    pairs = n * (n - 1) / 2
    possible = len(graph.edges_at(0)) if graph.period is not None else pairs
    # Drawing an edge costs about 20 ns; a client with d active edges adds (d + 1)² products to WᵀW, about 5 ns each.
    neighbours = 2 * graph.activation * len(graph.edges_at(0)) / n
    draw_ns = 20 * possible + 5 * n * (1 + neighbours) ** 2
    if graph.period is None:
        draw_ns += 40_000  # such edges are made one by one
    return min(max(int(DRAWING_NS / draw_ns), LEAST_DRAWS), MOST_DRAWS)


def summary(graph: Graph) -> GraphSummary:
    """Measure a graph. Neighbours are exact for a graph with a period; see `rho` for the rest. Raises GraphError."""
    draws, value = rho_draws(graph), rho(graph)
    counts = np.stack([degrees(graph.clients, graph.edges_at(t)) for t in range(graph.period or draws)])
    return GraphSummary(
        clients=graph.clients,
        edges=float(counts.sum(axis=1).mean() / 2),
        mean_neighbours=float(graph.activation * counts.mean()),
        isolated_share=float(np.mean((1 - graph.activation) ** counts)),
        rho=value,
        spectral_gap=1 - value,
        draws=draws,
    )


def _second_moment(graph: Graph, rounds: int) -> Any:
    """Return the mean of WᵀW over the first rounds, `[n, n]`, dense or sparse."""
    n, total = graph.clients, 0
    step = max(1, CHUNK // (n + len(graph.edges_at(0))))
    for start in range(0, rounds, step):
        stacked = stacked_weights(graph, range(start, min(start + step, rounds)))
        full = n <= DENSE_CLIENTS and stacked.nnz > 0.1 * stacked.shape[0] * n
        stacked = stacked.toarray() if full else stacked
        total = total + stacked.T @ stacked
    return total / rounds
