"""What a graph is, which of its edges are active in a round, and the round's mixing matrix.

Edges are int64 arrays `[E, 2]` with i < j, sorted, each once; of a directed graph they are (sender, receiver). Clients
count from 0, rounds (`t`) from 0.
"""

from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, replace
from functools import cached_property, lru_cache
from hashlib import sha256
from typing import Any

import numpy as np
from numpy.typing import NDArray
from scipy.sparse import csgraph, csr_array, diags_array

from peertune.errors import GraphError, unknown
from peertune.randomness import Draw, happens
from peertune.topology.pairs import MOST_EDGES, Edges, drawn_pairs, need_few, need_paired, pair_count
from peertune.topology.rules import BY_ACTIVE, ONE_WAY, WEIGHTS, adjacency, degrees, flows, metropolis

MOST_ROWS = 10**15  # of a client: sums of fewer are exact
_COUNTED = "a number of rows in graph.row_counts"
LISTED_PAIRS = 2**20  # up to here all pairs are held, and the draws of many rounds made in one go


@dataclass(frozen=True)
class GraphSummary:
    """What a graph does in the long run."""

    clients: int
    edges: float  # possible in a round, mean over rounds
    mean_neighbours: float  # a client's active edges in a round
    isolated_share: float  # of all client-rounds, those without a neighbour
    rho: float
    spectral_gap: float  # 1 - rho
    draws: int  # rounds drawn to estimate rho, or as many rows (`rho_draws`); 0 if it is exact


@dataclass(frozen=True, eq=False)
class Neighbourhood:
    """What one client must know of a graph: whom it may meet, and from what its rows of the mixing matrix follow.

    It grows with the edges of the client and of its neighbours, not with the number of clients. Who has the whole graph
    makes it (`neighbourhoods`).
    """

    client: int
    name: str  # of the graph
    digest: str  # of all its edges (`digest`)
    edges: tuple[Edges, ...]  # of each round of a period: its own, and for Metropolis weights its neighbours' as well
    weights: tuple[NDArray[np.float64], ...]  # of these edges; none for Metropolis weights, which follow from them
    summary: GraphSummary  # of the whole graph

    @cached_property
    def others(self) -> tuple[int, ...]:
        """All whom the client may ever meet, sorted."""
        return others(self.edges, self.client)


@dataclass(frozen=True)
class Graph:
    """The edges that are possible in each round, and how often a possible edge is active.

    Raises GraphError if a setting is out of range, if the clients aren't connected by the edges of all rounds together,
    or if the weights don't suit the edges; of a graph of which one client's neighbourhood alone is `known`, for a
    setting alone, since the others were looked at by who had all of it.
    """

    clients: int
    edges_at: Callable[[int], Edges]  # round → the edges [E, 2] possible in it
    period: int | None  # rounds after which edges_at repeats; None where edges are drawn afresh in each round
    activation: float  # in (0, 1]: the chance of a possible edge to be active in a round
    seed: int
    weights: str = "metropolis"  # a key of WEIGHTS, or `rows`; where edges are directed, a key of ONE_WAY
    name: str = "custom"  # what messages call it
    exchangeable: bool = False  # whether renumbering the clients leaves the law of its edges as it is
    every_pair: bool = False  # whether any two clients may meet in any round: no list of them is needed to draw some
    sides: tuple[int, ...] = ()  # of a grid in which client numbers run, the last side fastest, if moving all clients
    # round it by the same steps leaves each round's possible edges as they are; empty elsewhere
    directed: bool = False  # whether what goes over an edge goes one way, and edges are (sender, receiver)
    row_counts: tuple[int, ...] = ()  # how many rows each client has, with weights `rows` (`with_rows`)
    known: Neighbourhood | None = None  # where this is all that is known of it: edges_at has no others

    def __post_init__(self) -> None:
        where = f"graph {self.name}"
        need_clients(self.name, self.clients, 1)
        if not 0 < self.activation <= 1:
            raise GraphError(f"{where}: activation is {self.activation}; choose a number above 0, at most 1")
        rules = [*ONE_WAY] if self.directed else [*WEIGHTS, "rows"]
        if self.weights not in rules:
            raise GraphError(unknown(f"{where}: weights", self.weights, rules))
        if self.known is not None:
            return
        if self.every_pair:
            lower = f"choose an activation below {MOST_EDGES / max(1, pair_count(self.clients)):.2g}"
            sparse = "or a sparse graph such as random_regular"
            need_few(f"{where}: {self.clients:,} clients", self.clients, self.activation, f"{lower}, {sparse}")
            if self.weights not in BY_ACTIVE:
                need_few(
                    f"{where}: weights {self.weights} need all possible edges, and {self.clients:,} clients",
                    self.clients,
                    1.0,
                    f"choose metropolis, {sparse}",
                )
            return
        if self.period is None:
            if self.weights == "uniform":
                raise GraphError(f"{where}: weights uniform need the same edges every round; choose metropolis")
            return
        rounds = [self.edges_at(t) for t in range(self.period)]
        if lost := unreachable(self.clients, np.concatenate(rounds), self.directed):
            some = ", ".join(map(str, lost[:10])) + (f" and {len(lost) - 10} more" if len(lost) > 10 else "")
            noun = "client" if len(lost) == 1 else "clients"
            ways = " and be reached from it" if self.directed else ""
            raise GraphError(f"{where}: {noun} {some} can never reach client 0{ways}; add edges between them")
        if self.weights == "uniform":
            for edges in rounds:
                degree = degrees(self.clients, edges)
                if degree.min() < degree.max():
                    raise GraphError(
                        f"{where}: weights uniform need the same number of neighbours for every client, but they have "
                        f"{degree.min()} to {degree.max()}; choose metropolis or laplacian"
                    )

    @cached_property
    def rows(self) -> NDArray[np.float64] | None:
        """How many rows each client has, `[n]`, with weights `rows`; None with others, where all count alike."""
        if self.weights != "rows":
            return None
        if not self.row_counts:
            raise GraphError(
                f"graph {self.name}: weights rows need {_COUNTED}; give one for each of {self.clients} clients"
            )
        return np.array(self.row_counts, dtype=np.float64)


def with_rows(graph: Graph, row_counts: list[int] | None = None) -> Graph:
    """Return the graph with these numbers of rows, by which weights `rows` mix: `Σ n_i x_i` is kept.

    Raises GraphError where the graph has such weights and no number above 0 for each client, and for numbers beside
    other weights.
    """
    where = f"graph {graph.name}"
    if graph.weights != "rows":
        if row_counts is not None:
            raise GraphError(f"{where}: row_counts are for weights rows, and these are {graph.weights}; leave them out")
        return graph
    if row_counts is None or len(row_counts) != graph.clients:
        given = "none are given" if row_counts is None else f"row_counts has {len(row_counts)}"
        raise GraphError(f"{where}: weights rows need {_COUNTED} for each of {graph.clients} clients, and {given}")
    if wrong := [client for client, count in enumerate(row_counts) if not 0 < count <= MOST_ROWS]:
        raise GraphError(
            f"{where}: row_counts[{wrong[0]}] is {row_counts[wrong[0]]}; give whole numbers from 1 to {MOST_ROWS:,}"
        )
    return replace(graph, row_counts=tuple(row_counts), exchangeable=False, sides=())


def active_edges(graph: Graph, t: int) -> Edges:
    """Return the edges `[E', 2]` active in round t: a pure function of (seed, round, edge).

    Each edge has its own draw, `uniforms(seed, Draw.EDGE, t, i, j) < activation`, so a peer can decide about its own
    edges without drawing anyone else's. Raises GraphError where any two of more than 100,000 clients may meet.
    """
    need_whole(graph)
    if not listed(graph):
        need_paired(graph.name, graph.clients)
        return drawn_pairs(graph.clients, graph.activation, graph.seed, Draw.EDGE, t)
    edges = graph.edges_at(t)
    return edges[happens(graph.activation, graph.seed, Draw.EDGE, t, edges[:, 0], edges[:, 1])]


@lru_cache(maxsize=16)
def digest(graph: Graph) -> str:
    """Return what tells one list of possible edges from another: SHA-256 over those of a period, its first 16 digits.

    "drawn" where nothing is listed, and all follows from the graph's settings.
    """
    if graph.known is not None:
        return graph.known.digest
    if graph.every_pair or graph.period is None:
        return "drawn"
    made = sha256()
    for t in range(graph.period):
        edges = np.ascontiguousarray(graph.edges_at(t), dtype="<i8")
        made.update(f"{len(edges)} ".encode())
        made.update(edges.data)
    return made.hexdigest()[:16]


def listed(graph: Graph) -> bool:
    """Whether a round's possible edges are held to draw from; otherwise they are all pairs, and too many for that."""
    if not graph.every_pair or graph.weights not in BY_ACTIVE or graph.activation == 1:
        return True
    return pair_count(graph.clients) <= LISTED_PAIRS


def mixing_weights(clients: int, edges: Edges) -> csr_array:
    """Return the Metropolis-Hastings matrix `W [n, n]` float64 of these edges: `W_ii = 1 - Σ_j W_ij`."""
    return matrix(clients, 1, edges, metropolis(clients, edges))


def drop_edges(graph: Graph, weights: csr_array, failed: Edges | Sequence[tuple[int, int]]) -> csr_array:
    """Return the graph's `W [n, n]` without the `failed` edges, whose weight goes back to the diagonal.

    It does so at both ends, each its own, which keeps W symmetric and doubly stochastic, so that failures never move
    the clients' mean; of a directed edge at the receiver, with `push_sum` at the sender. Pairs may come in any order,
    but for those of a directed graph; those that are no edges of W change nothing.
    """
    clients = weights.shape[0]
    mask = adjacency(clients, as_edges(clients, failed, graph.directed), graph.directed)
    lost = csr_array(weights.multiply(mask))
    return csr_array(weights - lost + diags_array(lost.sum(axis=0 if graph.weights == "push_sum" else 1)))


def weights_at(graph: Graph, t: int) -> csr_array:
    """Return the mixing matrix `W_t [n, n]` float64 of round t: non-negative, and its rows sum to 1.

    It is symmetric, and so doubly stochastic, but for that of a directed graph, and with weights `rows`, where
    `n_i W_ij = n_j W_ji`. With `push_sum` its columns sum to 1.
    """
    return stacked_weights(graph, range(t, t + 1))


def stacked_weights(graph: Graph, rounds: range) -> csr_array:
    """Return the mixing matrices of several rounds one below the other, `[R·n, n]`."""
    # Rounds share no edge, so together they are one graph of R·n clients: client i in the k-th round is number k·n + i.
    need_whole(graph)
    n = graph.clients
    if not listed(graph):
        apart = np.concatenate([active_edges(graph, t) + n * at for at, t in enumerate(rounds)])
        return matrix(n, len(rounds), apart, by_active(n * len(rounds), apart, graph.rows), graph.rows)
    if graph.period == 1:  # the same in all
        one = graph.edges_at(0)
        edges, at = np.tile(one, (len(rounds), 1)), np.repeat(np.arange(len(rounds)), len(one))
    else:
        possible = [graph.edges_at(t) for t in rounds]
        edges = np.concatenate(possible)
        at = np.repeat(np.arange(len(rounds)), [len(one) for one in possible])
    active = happens(graph.activation, graph.seed, Draw.EDGE, rounds.start + at, edges[:, 0], edges[:, 1])
    apart = (edges + n * at[:, None])[active]
    if graph.directed:
        return one_way(graph, len(rounds), apart)
    if graph.weights in BY_ACTIVE:
        return matrix(n, len(rounds), apart, by_active(n * len(rounds), apart, graph.rows), graph.rows)
    weights = np.concatenate([possible_weights(graph, first_like(graph, t)) for t in rounds])
    return matrix(n, len(rounds), apart, weights[active])


def first_like(graph: Graph, t: int) -> int:
    """Return the first round that has the same possible edges as round t."""
    return t if graph.period is None else t % graph.period


@lru_cache(maxsize=64)
def possible_weights(graph: Graph, t: int) -> NDArray[np.float64]:
    """Return the weights of the possible edges of a round, `[E]`, by a rule that looks at these alone."""
    if graph.known is not None:
        return graph.known.weights[t]
    # Remembered, since the Laplacian's eigenvalue costs far more than the rest of a round's weights.
    return WEIGHTS[graph.weights](graph.clients, graph.edges_at(t))


def by_active(nodes: int, edges: Edges, rows: NDArray[np.float64] | None) -> NDArray[np.float64]:
    """Return the weights of edges among so many clients by a rule that looks at active ones; `rows` as in `matrix`."""
    if rows is None:
        return metropolis(nodes, edges)
    return flows(np.tile(rows, nodes // len(rows)), edges, degrees(nodes, edges))


def matrix(
    clients: int, rounds: int, edges: Edges, weights: NDArray[np.float64], rows: NDArray[np.float64] | None = None
) -> csr_array:
    """Return the mixing matrices of several rounds, `[R·n, n]`, of edges among R·n clients and their weights.

    With numbers of `rows [n]` each end divides an edge's weight by its own.
    """
    nodes, i, j = np.arange(rounds * clients), edges[:, 0], edges[:, 1]
    at_i, at_j = (weights, weights) if rows is None else (weights / rows[end % clients] for end in (i, j))
    diagonal = 1 - np.bincount(i, at_i, len(nodes)) - np.bincount(j, at_j, len(nodes))
    receivers, columns = np.concatenate([i, j, nodes]), np.concatenate([j, i, nodes]) % clients
    return csr_array((np.concatenate([at_i, at_j, diagonal]), (receivers, columns)), shape=(len(nodes), clients))


def one_way(graph: Graph, rounds: int, edges: Edges) -> csr_array:
    """Return the same of a directed graph: a weight stands in its receiver's row, and the diagonal has what is left."""
    nodes, senders, receivers = np.arange(rounds * graph.clients), edges[:, 0], edges[:, 1]
    weights = ONE_WAY[graph.weights](len(nodes), edges)
    diagonal = 1 - np.bincount(senders if graph.weights == "push_sum" else receivers, weights, len(nodes))
    rows, columns = np.concatenate([receivers, nodes]), np.concatenate([senders, nodes]) % graph.clients
    return csr_array((np.concatenate([weights, diagonal]), (rows, columns)), shape=(len(nodes), graph.clients))


def as_edges(clients: int, pairs: Any, directed: bool = False) -> Edges:
    """Bring pairs into the form of edges: `[E, 2]`, i < j unless they are directed, sorted, each once."""
    array = np.array(pairs if isinstance(pairs, np.ndarray) else list(pairs), dtype=np.int64).reshape(-1, 2)
    if not directed:
        array.sort(axis=1)
    keys = np.sort(array[:, 0] * clients + array[:, 1])  # np.unique takes a hundred times as long for millions
    edges = np.stack(np.divmod(keys[np.diff(keys, prepend=-1) > 0], clients), axis=1)
    edges.flags.writeable = False  # every round hands out the same array
    return edges


def others(rounds: Iterable[Edges], client: int) -> tuple[int, ...]:
    """Return the other ends of all edges in these rounds that have this client, sorted, each once."""
    ends = (edges[(edges == client).any(axis=1)].sum(axis=1) - client for edges in rounds)
    return tuple(sorted({other for found in ends for other in found.tolist()}))


def unreachable(clients: int, edges: Edges, directed: bool = False) -> list[int]:
    """Return the clients that these edges don't connect to client 0, where they are directed both ways."""
    once = csr_array((np.ones(len(edges)), (edges[:, 0], edges[:, 1])), shape=(clients, clients))
    _, component = csgraph.connected_components(once, directed=directed, connection="strong")
    return np.flatnonzero(component != component[0]).tolist()


def need_clients(name: str, clients: int, least: int) -> None:
    """Raise GraphError if the graph of this name has fewer clients than it needs."""
    if clients < least:
        raise GraphError(f"graph {name}: clients is {clients}; choose {least} or more")


def need_whole(graph: Graph) -> None:
    """Raise GraphError where only one client's neighbourhood of the graph is known."""
    if graph.known is not None:
        raise GraphError(f"graph {graph.name}: only what is near client {graph.known.client} is known of it")


def need_both_ways(graph: Graph) -> None:
    """Raise GraphError for a directed graph, on which peers can't go by rounds: then they swap."""
    if graph.directed:
        raise GraphError(
            f"graph {graph.name}: its edges go one way, and peers swap; choose a graph whose edges go both ways, let "
            "them push with time.mode=asynchronous, or simulate it with peertune run"
        )
