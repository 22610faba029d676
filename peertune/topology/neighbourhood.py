"""What one client needs of a round: whom it meets, and its own row of the mixing matrix.

It follows from the client's own edges and those of its neighbours, so that a peer's work in a round does not grow with
the number of clients, unless any two of them may meet.
"""

from collections.abc import Iterator, Sequence
from functools import lru_cache

import numpy as np
from numpy.typing import ArrayLike, NDArray

from peertune.errors import GraphError
from peertune.randomness import Draw, happens
from peertune.topology.pairs import Edges, drawn_partners, pair_count
from peertune.topology.rules import BY_ACTIVE, by_degree, degrees
from peertune.topology.weights import (
    Graph,
    GraphSummary,
    Neighbourhood,
    active_edges,
    by_active,
    digest,
    first_like,
    matrix,
    need_both_ways,
    need_whole,
    others,
    possible_weights,
)


def neighbourhoods(graph: Graph, clients: Sequence[int], summary: GraphSummary) -> Iterator[Neighbourhood]:
    """Return, one after the other, what each of these clients must know of a whole graph to have its own rows of W.

    In the time of sorting the edges, and of looking up those of each client. Raises GraphError where any two clients
    may meet: no part is then smaller than the whole.
    """
    need_whole(graph)
    need_both_ways(graph)
    if graph.period is None or graph.every_pair:
        raise GraphError(
            f"graph {graph.name}: any two clients may meet, so each must know of all; "
            "choose a sparse graph, such as random_regular"
        )
    found = zip(*(_near_each(graph, clients, place) for place in range(graph.period)), strict=True)
    return (
        Neighbourhood(
            client,
            graph.name,
            digest(graph),
            tuple(edges for edges, _ in rounds),
            tuple(weights for _, weights in rounds if weights is not None),
            summary,
        )
        for client, rounds in zip(clients, found, strict=True)
    )


def graph_near(known: Neighbourhood, *, seed: int, activation: float, weights: str) -> Graph:
    """Return the graph as one knows it who is told a neighbourhood alone. Raises GraphError where they don't fit."""
    if bool(known.weights) != (weights not in BY_ACTIVE):
        raise GraphError(f"graph {known.name}: its neighbourhood is not one with weights {weights}")
    rounds = len(known.edges)
    return Graph(
        known.summary.clients,
        lambda t: known.edges[t % rounds],
        rounds,
        activation,
        seed,
        weights,
        known.name,
        known=known,
    )


def may_meet(graph: Graph, client: int) -> list[int]:
    """Return all others that a client may ever have an edge with, sorted."""
    if graph.known is not None:
        _need_near(graph, client)
        return list(graph.known.others)
    if graph.period is None or graph.every_pair:
        return [other for other in range(graph.clients) if other != client]
    return list(_may_meet(graph, client))


@lru_cache(maxsize=4)  # a peer asks each round, and a trace has many
def _may_meet(graph: Graph, client: int) -> tuple[int, ...]:
    return others((graph.edges_at(t) for t in range(graph.period or 1)), client)


def partners_at(graph: Graph, client: int, t: int) -> list[int]:
    """Return the others that a client has an active edge with in round t, sorted, by the draws of its own edges."""
    if _anyone(graph):
        return list(others([drawn_partners(graph.clients, client, graph.activation, graph.seed, Draw.EDGE, t)], client))
    edges, _ = _near(graph, client, first_like(graph, t))
    edges = edges[(edges == client).any(axis=1)]
    return list(others([edges[happens(graph.activation, graph.seed, Draw.EDGE, t, edges[:, 0], edges[:, 1])]], client))


def row_at(graph: Graph, client: int, t: int) -> dict[int, float]:
    """Return a client's row of `weights_at(graph, t)`: how much it takes from whom, itself included, by client.

    The same to the bit, in the time of the edges of the client and of those that it may meet in the round. Where any
    two may meet, it takes n draws for the client and n for each that it meets; and a graph without a period, such as
    `matching`, is drawn as a whole.
    """
    if not _anyone(graph):
        edges, weights = _near(graph, client, first_like(graph, t))
        active = happens(graph.activation, graph.seed, Draw.EDGE, t, edges[:, 0], edges[:, 1])
        edges, weights = edges[active], weights if weights is None else weights[active]
    else:
        edges, weights = _drawn_near(graph, client, t)
    # Clients are renumbered in their order, so that the sums of a row are those of the whole matrix.
    clients, ends = np.unique(np.append(edges, client), return_inverse=True)
    near = ends[:-1].reshape(-1, 2)
    counts = None if graph.rows is None else graph.rows[clients]
    near_weights = by_active(len(clients), near, counts) if weights is None else weights
    row = matrix(len(clients), 1, near, near_weights, counts)[[ends[-1]]]
    return dict(sorted(zip(clients[row.indices].tolist(), row.data.tolist(), strict=True)))


@lru_cache(maxsize=256)
def _near(graph: Graph, client: int, place: int) -> tuple[Edges, NDArray[np.float64] | None]:
    """Return the possible edges from which a client's row follows, and their weights where these follow from them.

    They are the client's own, and where weights follow from active edges those of its neighbours as well. The place is
    one within the graph's period.
    """
    _need_near(graph, client)
    (found,) = _near_each(graph, [client], place)
    return found


def _near_each(graph: Graph, clients: Sequence[int], place: int) -> Iterator[tuple[Edges, NDArray[np.float64] | None]]:
    """Yield for each of these clients what `_near` returns."""
    edges = graph.edges_at(place)
    order = np.argsort(edges.ravel(), kind="stable")  # the ends of edge e are 2e and 2e + 1
    ends = edges.ravel()[order]

    def having(some: ArrayLike) -> NDArray[np.int64]:
        """Return which edges have one of these clients."""
        bounds = zip(np.searchsorted(ends, some, "left"), np.searchsorted(ends, some, "right"), strict=True)
        return np.unique(np.concatenate([order[:0], *(order[left:right] for left, right in bounds)]) // 2)

    weights = None if graph.weights in BY_ACTIVE else possible_weights(graph, place)
    for client in clients:
        mine = having([client])
        if weights is None:
            yield edges[having(np.unique(edges[mine]))], None
        else:
            yield edges[mine], weights[mine]


def _need_near(graph: Graph, client: int) -> None:
    """Raise GraphError where the client's part of the graph isn't known, or its edges go one way."""
    need_both_ways(graph)
    if graph.known is not None and graph.known.client != client:
        need_whole(graph)


def _anyone(graph: Graph) -> bool:
    """Whether a client may meet anyone, and its row follows from draws alone: no possible edges need be looked up."""
    return graph.every_pair and graph.weights in BY_ACTIVE


def _drawn_near(graph: Graph, client: int, t: int) -> tuple[Edges, NDArray[np.float64]]:
    """Return a client's active edges and their weights by a rule that looks at active ones, where any two may meet."""
    n = graph.clients
    own = drawn_partners(n, client, graph.activation, graph.seed, Draw.EDGE, t)
    near = list(others([own], client))
    if (1 + len(near)) * n > pair_count(n):
        degree = degrees(n, active_edges(graph, t))[near]
    else:
        rows = (drawn_partners(n, one, graph.activation, graph.seed, Draw.EDGE, t) for one in near)
        degree = np.fromiter(map(len, rows), np.int64, len(near))
    if graph.rows is None:
        return own, by_degree(len(near), degree)
    return own, np.minimum(graph.rows[client] / (1 + len(near)), graph.rows[near] / (1 + degree))
