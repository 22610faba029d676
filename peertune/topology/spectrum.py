"""How well a graph mixes."""

from collections.abc import Callable, Iterator, Mapping
from functools import lru_cache, partial
from math import ceil, prod
from typing import Any

import numpy as np
from numpy.typing import NDArray
from scipy.sparse import csr_array, diags_array, vstack
from scipy.sparse.linalg import LinearOperator, aslinearoperator, eigs

from peertune.randomness import Draw, generator
from peertune.topology.neighbourhood import row_at
from peertune.topology.pairs import MOST_PAIRED, Edges, pair_count
from peertune.topology.rules import DENSE_CLIENTS, degrees, largest_eigenvalue
from peertune.topology.weights import Graph, GraphSummary, listed, stacked_weights, weights_at

MOST_DRAWS = 100_000  # rounds drawn to estimate rho, where that is quick (always at n = 10)
LEAST_DRAWS = 16
COUNTED_DRAWS = 1_000  # rounds whose neighbours are counted, where each draws its own edges
LEAST_MEETINGS = 1_000  # in all rounds drawn, up to 16: 3 % of the estimate of 1 - rho where clients seldom meet
DRAWING_NS = 1e9  # the time that estimating rho may take, roughly; more clients get fewer draws
IN_ORDER_WORK = 10_000_000_000  # entries that a period's product takes, up to which rho looks at the order of rounds
ARNOLDI_STEPS = 40  # applications of a map in search of its largest eigenvalue, roughly
SETTLING = 16  # rounds of pushing after which masses have come to their usual spread
CHUNK = 1_000_000  # edges and clients held at once while drawing many rounds


@lru_cache(maxsize=16)  # it takes a second, and a method asks for it as well as a description of the graph
def rho(graph: Graph, draws: int | None = None) -> float:
    """Return in [0, 1] the factor by which a round of mixing shrinks the squared disagreement.

    It is `λ_max(E[WᵀW] - J)` where all rounds have one law. Where they follow each other in a period of P rounds it is
    the long run's: the spectral radius of `E[(W_P … W_1) ⊗ (W_P … W_1)]` on the disagreement, to the power 1 / P. A
    period may leave more of the worst disagreement than the long run says, `one_period`; a round may leave all of it.

    Of a directed graph it is `λ_max(E[Wᵀ(I - J)W])` on vectors of mean 0, the same for doubly stochastic W. Where its
    rounds have a period, that is the mean over one, as if they came in random order. With `push_sum` it is measured on
    probes: what a round leaves, in the mean over rounds and over values drawn afresh in each, of their disagreement.

    With weights `rows` disagreement is `Σ_i n_i ‖x_i - x̄‖²`, around the mean that they keep. With u the roots of
    `n_i / Σ n` and D the diagonal matrix of these, `S = D W D⁻¹`, which is symmetric, stands in the place of W, and
    `u uᵀ` in that of J.

    Exact where every round is known before (`rho_draws` is 0); otherwise estimated from the first `draws` rounds,
    `rho_draws(graph)` of them by default. Of a period with an activation below 1 and more than 1,000 clients it is the
    first formula's, with the mean over a period: as if its rounds came in random order.

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
    if _in_order(graph):
        value = _long_run(graph, rounds)
    elif (graph.exchangeable or graph.weights == "push_sum") and n > 1:
        value = (_mean_trace(graph, rounds) - 1) / (n - 1)
    elif n <= DENSE_CLIENTS:
        moment = _second_moment(graph, rounds)
        dense = moment if isinstance(moment, np.ndarray) else moment.toarray()
        averaged, alike = _averaged(graph, rounds), not graph.directed and graph.rows is None
        value = np.linalg.eigvalsh(dense - (1 / n if alike else averaged.T @ averaged))[-1]
    elif graph.sides and not graph.directed:
        value = _by_frequency(graph, _first_row(graph, rounds, exact is not None)).max()
    else:
        if exact and not graph.directed:
            # The W of a known round may be dense (complete graph): it is applied twice, as forming WᵀW would cost n³.
            W = aslinearoperator(_stacked(graph, range(1)))
            moment = W.T @ W
        else:
            moment = aslinearoperator(_second_moment(graph, rounds))
        averaged = aslinearoperator(_averaged(graph, rounds).T)
        value = largest_eigenvalue(moment - averaged @ averaged.T, relative_to=1.0, tolerance=1e-4)
    return float(np.clip(value, 0.0, 1.0))


def one_period(graph: Graph) -> float | None:
    """Return what a round leaves of the worst squared disagreement, in the mean over the first period of P rounds.

    It is `λ_max(E[ΦᵀΦ] - J)` to the power 1 / P, with `Φ = W_P … W_1`; at least `rho`. None where all rounds have one
    law, above 1,000 clients, and where a neighbourhood alone is known.
    """
    n = graph.clients
    if graph.known is not None or not _in_order(graph) or graph.period is None or n > DENSE_CLIENTS:
        return None
    if graph.activation == 1:
        value = np.linalg.norm(_after_a_period(graph, np.eye(n)), 2) ** 2
    else:
        moment = _apart(graph, np.eye(n))
        for stacked in reversed(_draws_by_round(graph, rho_draws(graph))):
            moment = _mean_square(stacked, moment)
        value = np.linalg.eigvalsh(moment)[-1]
    return float(np.clip(value, 0.0, 1.0) ** (1 / graph.period))


SLOWEST_ROUNDS = 100
"""Rounds whose mixing matrices `slowest` takes the mean of."""


def slowest(graph: Graph) -> NDArray[np.float64]:
    """Return the disagreement that mixing forgets most slowly, `[n]`, of norm 1: its largest entry is positive.

    It is the eigenvector of the mean mixing matrix's second largest eigenvalue, over the first rounds; the matrices are
    symmetric.
    """
    mean = np.mean([weights_at(graph, t).toarray() for t in range(SLOWEST_ROUNDS)], axis=0)
    found = np.linalg.eigh(mean - 2 / graph.clients)[1][:, -1]  # what all agree on has the least eigenvalue there
    return np.asarray(found * np.sign(found[np.abs(found).argmax()]))


def rho_draws(graph: Graph) -> int:
    """Return how many rounds `rho` draws by default: 0 where it is exact, or up to 100,000, a second or so of work.

    At least 16, or where clients are alike, as many as have the rows of 16 rounds of 1,000 clients. Where any two of
    more than 100,000 may meet, only one client's row is drawn of each round, at least 16 of them as well.
    """
    if graph.activation == 1 and graph.period is not None and graph.weights != "push_sum":
        return 0
    n = graph.clients
    if _by_rows(graph):
        # A row takes n draws for its client and for each that it meets, about 10 ns each.
        return max(int(10 * DRAWING_NS / (10 * n * (1 + graph.activation * n))), LEAST_DRAWS)
    pairs, ends = pair_count(n), 1 if graph.directed else 2
    possible = len(graph.edges_at(0)) if graph.period is not None and not graph.every_pair else pairs
    # Drawing an edge costs about 20 ns; a client with d active edges adds (d + 1)² products to WᵀW, about 5 ns each.
    neighbours = ends * graph.activation * (pairs if graph.every_pair else len(graph.edges_at(0))) / n
    draw_ns = 20 * possible + 5 * n * (1 + neighbours) ** 2
    if _in_order(graph):  # each draw is applied to matrices, 10 ns an entry
        draw_ns += 10 * n**2 * (n**2 if n**2 <= DENSE_CLIENTS else ARNOLDI_STEPS)
    if graph.period is None:
        draw_ns += 160_000 if graph.directed else 250_000 + 300 * possible  # such edges are made one by one
    if graph.weights == "push_sum":
        draw_ns += 600_000  # and so are masses
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
        rounds = graph.period or min(draws, COUNTED_DRAWS)
        counts = np.stack([_heard(graph, graph.edges_at(t)) for t in range(rounds)])
    return GraphSummary(
        clients=graph.clients,
        edges=float(counts.sum(axis=1).mean() / (1 if graph.directed else 2)),
        mean_neighbours=float(graph.activation * counts.mean()),
        isolated_share=float(np.mean((1 - graph.activation) ** counts)),
        rho=value,
        spectral_gap=1 - value,
        draws=draws,
    )


def _heard(graph: Graph, edges: Edges) -> NDArray[np.int64]:
    """Count those whom each client may hear over these edges, `[n]`."""
    return degrees(graph.clients, edges[:, 1:] if graph.directed else edges)


def _in_order(graph: Graph) -> bool:
    """Whether rho looks at the order of rounds: they follow each other in a period, and it takes no minutes."""
    if graph.period in (None, 1) or graph.directed:
        return False
    n, period = graph.clients, graph.period or 1
    if n > DENSE_CLIENTS:
        return graph.activation == 1 and (bool(graph.sides) or period * n * ARNOLDI_STEPS <= IN_ORDER_WORK)
    return period * n**2 <= IN_ORDER_WORK


def _long_run(graph: Graph, rounds: int) -> float:
    """Return the spectral radius, on the disagreement, of a period's `E[Φ ⊗ Φ]`, to the power of one over its length.

    Of known rounds it is the square of that of Φ itself.
    """
    n, period = graph.clients, graph.period or 1
    if graph.activation == 1 and n > DENSE_CLIENTS and graph.sides:  # all rounds have the same eigenvectors
        each = (_by_frequency(graph, _dense(row_at(graph, 0, t), n)) for t in range(period))
        radius = float(np.abs(prod(each)).max()) ** 2
    elif graph.activation == 1:
        radius = _spectral_radius(partial(_after_a_period, graph), n) ** 2
    else:
        drawn = _draws_by_round(graph, rounds)

        def mean_square(x: NDArray[np.float64]) -> NDArray[np.float64]:
            moments = x.T.reshape(-1, n, n)
            moments = _apart(graph, _apart(graph, moments, 1), 2)
            for stacked in drawn:
                moments = np.stack([_mean_square(stacked, moment) for moment in moments])
            return moments.reshape(x.T.shape).T

        radius = _spectral_radius(mean_square, n * n)
    return float(radius ** (1 / period))


def _spectral_radius(apply: Callable[[NDArray[np.float64]], NDArray[np.float64]], size: int) -> float:
    """Return the largest absolute eigenvalue of a linear map, which takes vectors `[size]` or columns `[size, k]`."""
    if size <= DENSE_CLIENTS:
        return float(np.abs(np.linalg.eigvals(apply(np.eye(size)))).max())
    start = apply(generator(0, Draw.EIGENVECTOR).standard_normal(size))
    if np.linalg.norm(start) < 1e-12:
        return 0.0
    operator = LinearOperator((size, size), matvec=apply, dtype=np.float64)
    found = eigs(operator, k=1, v0=start, ncv=ARNOLDI_STEPS, tol=1e-4, return_eigenvectors=False)
    return float(np.abs(found).max())


def _after_a_period(graph: Graph, x: NDArray[np.float64]) -> NDArray[np.float64]:
    """Return what a period of known rounds leaves of the disagreement of `x`, `[n]` or `[n, k]`."""
    n = graph.clients
    for stacked in _in_chunks(graph, graph.period or 1):
        for start in range(0, stacked.shape[0], n):
            x = stacked[start : start + n] @ _apart(graph, x)
    return x


def _draws_by_round(graph: Graph, rounds: int) -> list[csr_array]:
    """Return for each round of a period its matrices in as many periods as `rounds` fill, below each other."""
    n, period = graph.clients, graph.period or 1
    periods = max(1, rounds // period)
    drawn = csr_array(vstack(list(_in_chunks(graph, periods * period)), "csr"))
    rows = np.arange(periods * period * n).reshape(periods, period, n)
    return [csr_array(drawn[rows[:, t].ravel()]) for t in range(period)]


def _mean_square(stacked: csr_array, x: NDArray[np.float64]) -> NDArray[np.float64]:
    """Return the mean of `W x Wᵀ` over the matrices `[R·n, n]` below each other; these are symmetric."""
    n = len(x)
    once = (stacked @ x).reshape(-1, n, n)  # each W x
    beside = once.transpose(0, 2, 1).reshape(-1, n)  # each (W x)ᵀ, below each other
    mean: NDArray[np.float64] = (stacked.T @ beside).T / len(once)
    return mean


def _by_frequency(graph: Graph, row: NDArray[np.float64]) -> NDArray[np.float64]:
    """Return the eigenvalues of a matrix that moving all clients round the grid leaves as it is, but for J's own, 1."""
    eigenvalues: NDArray[np.float64] = np.fft.fftn(row.reshape(graph.sides)).real.ravel()[1:]
    return eigenvalues


def _dense(row: Mapping[int, float], n: int) -> NDArray[np.float64]:
    values = np.zeros(n)
    values[list(row)] = list(row.values())
    return values


def _by_rows(graph: Graph) -> bool:
    """Whether a whole round has too many pairs to be drawn."""
    return graph.every_pair and graph.clients > MOST_PAIRED


def _mean_trace(graph: Graph, rounds: int) -> float:
    """Return the mean of tr WᵀW, the sum of the squares of W's entries, over the first rounds.

    Of a directed graph it is that of tr Wᵀ(I - J)W + 1, the same for doubly stochastic W.
    """
    n = graph.clients
    if _by_rows(graph):  # all clients' rows have one law
        rows = [row_at(graph, t % n, t).values() for t in range(rounds)]
        return n * sum(x**2 for row in rows for x in row) / rounds
    total = 0.0
    for stacked in _pushed(graph, rounds) if graph.weights == "push_sum" else _in_chunks(graph, rounds):
        total += float(np.square(stacked.data).sum())
        if graph.directed:
            given = _column_sums(stacked, n)
            total += len(given) - float(np.square(given).sum()) / n
    return total / rounds


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


def _pushed(graph: Graph, rounds: int) -> Iterator[csr_array]:
    """Yield of each of so many rounds of pushing `R [n, n]`, by which a client averages, after those of settling."""
    n, mass, t = graph.clients, np.ones(graph.clients), 0
    for stacked in _in_chunks(graph, SETTLING + rounds):
        for start in range(0, stacked.shape[0], n):
            given = csr_array(stacked[start : start + n] @ diags_array(mass))
            mass = given.sum(axis=1)
            t += 1
            if t > SETTLING:
                yield csr_array(diags_array(1 / mass) @ given)


def _column_sums(stacked: csr_array, n: int) -> NDArray[np.float64]:
    """Return how much all together take from each client, `[R, n]`, by the matrices `[R·n, n]` below each other."""
    entries, rounds = stacked.tocoo(), stacked.shape[0] // n
    sums = np.bincount(entries.row // n * n + entries.col, entries.data, rounds * n)
    return np.asarray(sums.reshape(rounds, n))


def _averaged(graph: Graph, rounds: int) -> NDArray[np.float64]:
    """Return G `[rounds, n]` with `GᵀG` the mean of WᵀJW over the first rounds; `[1, n]` where that is J."""
    n = graph.clients
    if not graph.directed:
        return _common(graph)[None]
    averaged = np.concatenate([_column_sums(stacked, n) for stacked in _in_chunks(graph, rounds)])
    return np.asarray(averaged / (n * rounds) ** 0.5)


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
        yield _stacked(graph, range(start, min(start + step, rounds)))


def _stacked(graph: Graph, rounds: range) -> csr_array:
    """Return what these rounds do to values in the norm that rho is of, `[R·n, n]`: S with weights `rows`, else W."""
    stacked = stacked_weights(graph, rounds)
    if graph.rows is None:
        return stacked
    roots = np.sqrt(graph.rows)
    return csr_array(diags_array(np.tile(roots, len(rounds))) @ stacked @ diags_array(1 / roots))


def _common(graph: Graph) -> NDArray[np.float64]:
    """Return the unit vector of values that all clients agree on, `[n]`, in the norm that rho is of."""
    if graph.rows is None:
        return np.full(graph.clients, graph.clients**-0.5)
    return np.asarray(np.sqrt(graph.rows / graph.rows.sum()))


def _apart(graph: Graph, x: NDArray[np.float64], axis: int = 0) -> NDArray[np.float64]:
    """Return the disagreement of values, whose axis of clients this is, in the norm that rho is of."""
    if graph.rows is None:
        return np.asarray(x - x.mean(axis=axis, keepdims=True))
    u = np.expand_dims(_common(graph), [other for other in range(x.ndim) if other != axis])
    return np.asarray(x - u * (u * x).sum(axis=axis, keepdims=True))
