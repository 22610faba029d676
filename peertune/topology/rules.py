"""What an edge weighs.

Edges are int64 arrays `[E, 2]`: pairs i < j, or where they are directed (sender, receiver).
"""

import logging
from collections.abc import Callable
from typing import Any, Literal

import numpy as np
from numpy.typing import ArrayLike, NDArray
from scipy.linalg import eigvalsh_tridiagonal
from scipy.sparse import csgraph, csr_array

from peertune.randomness import Draw, generator
from peertune.topology.pairs import Edges

log = logging.getLogger(__name__)

Rule = Literal["metropolis", "laplacian", "uniform", "rows"]
OneWay = Literal["row", "push_sum"]

DENSE_CLIENTS = 1_000  # up to here a dense [n, n] eigenvalue problem is a matter of a second
LANCZOS_WORK = 2_000_000_000  # clients times steps in search of an eigenvalue: a minute or so


def metropolis(clients: int, edges: Edges) -> NDArray[np.float64]:
    """Weigh each edge by `1 / (1 + max(d_i, d_j))`, d the number of neighbours (Metropolis-Hastings)."""
    degree = degrees(clients, edges)
    return by_degree(degree[edges[:, 0]], degree[edges[:, 1]])


def by_degree(one: ArrayLike, other: ArrayLike) -> NDArray[np.float64]:
    """Return the Metropolis weights of edges by the numbers of neighbours at both ends."""
    return np.asarray(1 / (1 + np.maximum(one, other)))


def flows(rows: NDArray[np.float64], edges: Edges, degree: NDArray[np.int64]) -> NDArray[np.float64]:
    """Return for each edge `min(n_i / (1 + d_i), n_j / (1 + d_j))`, n the clients' numbers of rows.

    Each end divides it by its own number: `n_i W_ij = n_j W_ji`, Metropolis-Hastings for the share `n_i / Σ n`. With
    equal numbers these are Metropolis weights.
    """
    given = rows / (1 + degree)
    return np.asarray(np.minimum(given[edges[:, 0]], given[edges[:, 1]]))


def laplacian(clients: int, edges: Edges) -> NDArray[np.float64]:
    """Weigh all edges alike, by `2 / (3 λ_max(L))`: `W = I - 2L / (3 λ_max(L))` of Dec-LoRA (arXiv 2501.15361)."""
    if len(edges) == 0:
        return np.zeros(0)
    L = csgraph.laplacian(adjacency(clients, edges))
    largest = np.linalg.eigvalsh(L.toarray())[-1] if clients <= DENSE_CLIENTS else largest_eigenvalue(L)
    return np.full(len(edges), 2 / (3 * largest))


def uniform(clients: int, edges: Edges) -> NDArray[np.float64]:
    """Weigh all edges of a regular graph by `1 / (d + 1)`, so that a client counts as much as each neighbour.

    `Graph` sees to it that the graph is regular.
    """
    return np.full(len(edges), 1 / (1 + degrees(clients, edges).max()))


BY_ACTIVE = ("metropolis", "rows")
"""Rules that look at a round's active edges, a client's and those of whom it meets."""
WEIGHTS: dict[str, Callable[[int, Edges], NDArray[np.float64]]] = {
    "metropolis": metropolis,
    "laplacian": laplacian,
    "uniform": uniform,
}
"""Rules: (clients, edges `[E, 2]`) → a weight `[E]` for each edge; the diagonal of W takes what remains of 1.

`metropolis` looks at a round's active edges. The others look at its possible edges, known to all peers
before the round, and the weight of an edge that isn't active stays on the diagonal. `rows` stands apart, since it looks
at numbers of rows as well: see `flows`.
"""


def row(clients: int, edges: Edges) -> NDArray[np.float64]:
    """Weigh what a receiver hears by `1 / (1 + d)`, d from how many it hears: it averages equally, its own included.

    Source: Epidemic Learning (arXiv 2310.01972).
    """
    receivers = edges[:, 1]
    return np.asarray(1 / (1 + np.bincount(receivers, minlength=clients)[receivers]))


def push_sum(clients: int, edges: Edges) -> NDArray[np.float64]:
    """Weigh what a sender sends by `1 / (1 + d)`, d to how many: it splits its mass equally, its own part included.

    See `peertune.methods.push_sum`.
    """
    senders = edges[:, 0]
    return np.asarray(1 / (1 + np.bincount(senders, minlength=clients)[senders]))


ONE_WAY: dict[str, Callable[[int, Edges], NDArray[np.float64]]] = {"row": row, "push_sum": push_sum}
"""Rules for directed edges: (clients, a round's active edges `[E, 2]`) → a weight `[E]` for each.

What is left of 1 stands on the diagonal: of a receiver's row, so that rows sum to 1, or with `push_sum` of a sender's
column, so that columns do.
"""


def degrees(clients: int, edges: Edges) -> NDArray[np.int64]:
    """Count each client's neighbours, `[n]`."""
    return np.bincount(edges.ravel(), minlength=clients)


def adjacency(clients: int, edges: Edges, directed: bool = False) -> csr_array:
    """Return `[n, n]`, 1 in the rows of both ends of an edge, or of its receiver where it is directed."""
    ends = edges[:, ::-1] if directed else np.concatenate([edges, edges[:, ::-1]])
    return csr_array((np.ones(len(ends)), (ends[:, 0], ends[:, 1])), shape=(clients, clients))


def largest_eigenvalue(symmetric: Any, relative_to: float = 0.0, tolerance: float = 1e-8) -> float:
    """Return λ_max of a sparse array or LinearOperator `[n, n]`, to about `tolerance · |λ_max - relative_to|`.

    Lanczos without restarts: long rings crowd their eigenvalues so much that ARPACK, which separates them, never ends.
    λ_max alone needs no such care, and not even orthogonality, whose loss only repeats eigenvalues that were found.

    It ends after `5 n + 64` steps, and beyond 20,000 clients after `LANCZOS_WORK / n`. What is then returned lies below
    λ_max, and a warning says so: in k steps no eigenvalue shows that is nearer to the next than about (π / k)² of the
    spectrum's width, as those of graphs with paths of many thousand clients are.
    """
    n, previous, value = symmetric.shape[0], 0.0, -np.inf
    vector = generator(0, Draw.EIGENVECTOR).standard_normal(n)  # fixed: the same number each time and on each peer
    vector /= np.linalg.norm(vector)
    diagonal: list[float] = []
    beside: list[float] = []
    for step in range(1, min(5 * n + 64, max(1024, LANCZOS_WORK // n)) + 1):
        image = symmetric @ vector - (beside[-1] * previous if beside else 0.0)
        diagonal.append(float(vector @ image))
        image -= diagonal[-1] * vector
        length = float(np.linalg.norm(image))
        exhausted = length < 1e-12
        if exhausted or (step >= 64 and step & (step - 1) == 0):
            before, value = value, _largest_of_tridiagonal(diagonal, beside)
            if exhausted or abs(value - before) <= tolerance * abs(value - relative_to):
                return value
        beside.append(length)
        previous, vector = vector, image / length
    log.warning("an eigenvalue of %d clients did not settle in %d steps: what follows is a bound from below", n, step)
    return _largest_of_tridiagonal(diagonal, beside[:-1])


def _largest_of_tridiagonal(diagonal: list[float], beside: list[float]) -> float:
    last = len(diagonal) - 1
    return float(eigvalsh_tridiagonal(diagonal, beside, select="i", select_range=(last, last))[0])
