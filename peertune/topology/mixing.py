"""How well a graph mixes."""

from collections.abc import Iterator
from functools import lru_cache
from math import ceil
from typing import Any

import numpy as np
from numpy.typing import NDArray
from scipy.sparse import csr_array
from scipy.sparse.linalg import aslinearoperator

from peertune.topology.near import row_at
from peertune.topology.pairs import MOST_PAIRED, pair_count
from peertune.topology.weights import (
    DENSE_CLIENTS,
    Graph,
    GraphSummary,
    degrees,
    largest_eigenvalue,
    listed,
    stacked_weights,
    weights_at,
)

MOST_DRAWS = 100_000  # rounds drawn to estimate rho, where that is quick (always at n = 10)
LEAST_DRAWS = 16
LEAST_MEETINGS = 1_000  # in all rounds drawn, up to 16: 3 % of the estimate of 1 - rho where clients seldom meet
DRAWING_NS = 1e9  # the time that estimating rho may take, roughly; more clients get fewer draws
CHUNK = 1_000_000  # edges and clients held at once while drawing many rounds


@lru_cache(maxsize=16)  # it takes a second, and a method asks for it as well as a description of the graph
def rho(graph: Graph, draws: int | None = None) -> float:
    """Return `λ_max(E[WᵀW] - J)` in [0, 1], the factor by which a round of mixing shrinks the squared disagreement.

    Exact, as the mean over a period, where every round is known before (`rho_draws` is 0); otherwise estimated from the
    first `draws` rounds, `rho_draws(graph)` of them by default.

    Where all clients are alike (`Graph.exchangeable`), `E[WᵀW] = a I + b J`, so rho is `(E tr WᵀW - 1) / (n - 1)` and
    the estimate is unbiased. Above 1,000 clients, where moving them round a grid changes nothing (`Graph.sides`), the
    eigenvalues of `E[WᵀW]` are the Fourier transform of its first row, in a moment for a million clients. Elsewhere
    rho is the largest eigenvalue of a sample's mean: too high, and the more so the sparser the graph and the fewer the
    draws; `largest_eigenvalue` says what is lost on sparse graphs of great length.

    Of a graph of which a neighbourhood alone is known, it is what was found by who has all of it.
    """
    if graph.known is not None:
        return graph.known.summary.rho
    default = rho_draws(graph)
    exact = graph.period if default == 0 else None
    n, rounds = graph.clients, exact or draws or default
    if graph.exchangeable and n > 1:
        value = (_mean_trace(graph, rounds) - 1) / (n - 1)
    elif n <= DENSE_CLIENTS:
        moment = _second_moment(graph, rounds)
        dense = moment if isinstance(moment, np.ndarray) else moment.toarray()
        value = np.linalg.eigvalsh(dense - 1 / n)[-1]
    elif graph.sides:
        eigenvalues = np.fft.fftn(_first_row(graph, rounds, exact is not None).reshape(graph.sides)).real
        value = eigenvalues.ravel()[1:].max()  # the first is J's, 1
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
    """Return how many rounds `rho` draws by default: 0 where it is exact, or up to 100,000, a second or so of work.

    At least 16, or where clients are alike, as many as have the rows of 16 rounds of 1,000 clients. Where any two of
    more than 100,000 may meet, only one client's row is drawn of each round, at least 16 of them as well.
    """
    if graph.activation == 1 and graph.period is not None:
        return 0
    n = graph.clients
    if _by_rows(graph):
        # A row takes n draws for its client and for each that it meets, about 10 ns each.
        return max(int(10 * DRAWING_NS / (10 * n * (1 + graph.activation * n))), LEAST_DRAWS)
    pairs = pair_count(n)
    possible = len(graph.edges_at(0)) if graph.period is not None and not graph.every_pair else pairs
    # Drawing an edge costs about 20 ns; a client with d active edges adds (d + 1)² products to WᵀW, about 5 ns each.
    neighbours = 2 * graph.activation * (pairs if graph.every_pair else len(graph.edges_at(0))) / n
    draw_ns = 20 * possible + 5 * n * (1 + neighbours) ** 2
    if graph.period is None:
        draw_ns += 40_000  # such edges are made one by one
    least = LEAST_DRAWS
    if graph.exchangeable:
        meetings = max(n * neighbours / 2, 1)
        least = min(LEAST_DRAWS, max(LEAST_DRAWS * DENSE_CLIENTS // n, ceil(LEAST_MEETINGS / meetings), 1))
    return min(max(int(DRAWING_NS / draw_ns), least), MOST_DRAWS)


def summary(graph: Graph) -> GraphSummary:
    """Measure a graph. Neighbours are exact for a graph with a period; see `rho` for the rest. Raises GraphError."""
    if graph.known is not None:
        return graph.known.summary
    draws, value = rho_draws(graph), rho(graph)
    if graph.every_pair:
        counts = np.full((1, graph.clients), graph.clients - 1)
    else:
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


def _by_rows(graph: Graph) -> bool:
    """Whether a whole round has too many pairs to be drawn."""
    return graph.every_pair and graph.clients > MOST_PAIRED


def _mean_trace(graph: Graph, rounds: int) -> float:
    """Return the mean of tr WᵀW, the sum of the squares of W's entries, over the first rounds."""
    n = graph.clients
    if _by_rows(graph):  # all clients' rows have one law
        rows = [row_at(graph, t % n, t).values() for t in range(rounds)]
        return n * sum(x**2 for row in rows for x in row) / rounds
    return sum(float(np.square(stacked.data).sum()) for stacked in _in_chunks(graph, rounds)) / rounds


def _first_row(graph: Graph, rounds: int, exact: bool) -> NDArray[np.float64]:
    """Return the first row of E[WᵀW], `[n]`, of a graph whose clients are the points of a grid, all alike.

    Of a sample's mean all rows give it, each moved so that its client comes first.
    """
    if exact:
        known = (weights_at(graph, t) for t in range(rounds))
        moment = sum(W[[0]] @ W for W in known).tocoo() / rounds  # W is symmetric
    else:
        moment = _second_moment(graph, rounds).tocoo()
    rows, columns = moment.coords
    place, stride = np.zeros(moment.nnz, dtype=np.int64), 1
    for side in reversed(graph.sides):
        place += (columns // stride - rows // stride) % side * stride
        stride *= side
    first: NDArray[np.float64] = np.bincount(place, moment.data, graph.clients) / moment.shape[0]
    return first


def _second_moment(graph: Graph, rounds: int) -> Any:
    """Return the mean of WᵀW over the first rounds, `[n, n]`, dense or sparse."""
    n, total = graph.clients, 0
    for stacked in _in_chunks(graph, rounds):
        full = n <= DENSE_CLIENTS and stacked.nnz > 0.1 * stacked.shape[0] * n
        stacked = stacked.toarray() if full else stacked
        total = total + stacked.T @ stacked
    return total / rounds


def _in_chunks(graph: Graph, rounds: int) -> Iterator[csr_array]:
    """Yield the mixing matrices of the first rounds, as many below each other as can be held."""
    held = graph.activation * pair_count(graph.clients) if not listed(graph) else len(graph.edges_at(0))
    step = max(1, int(CHUNK // (graph.clients + held)))
    for start in range(0, rounds, step):
        yield stacked_weights(graph, range(start, min(start + step, rounds)))
