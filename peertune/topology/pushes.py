"""Messages that are pushed: whom a client sends to after a training, and what a receiver takes of what has come.

Edges are drawn by the sender's own version, the number of its training, since clients have no round in common.
"""

from collections.abc import Mapping, Sequence
from typing import NamedTuple

import numpy as np
from scipy.sparse import csr_array

from peertune.topology.faults import Fault, failed_edges
from peertune.topology.neighbourhood import partners_at
from peertune.topology.pairs import Edges
from peertune.topology.weights import Graph, active_edges


class To(NamedTuple):
    """To whom a client sends, both sorted."""

    receivers: list[int]
    lost: list[int]  # those of them whom it doesn't reach, as planned


def sends_to(graph: Graph, faults: Sequence[Fault], version: int) -> list[To]:
    """Return for each client to whom it sends after its own training `version`."""
    active = active_edges(graph, version)
    failed = np.array(failed_edges(faults, active, version), dtype=np.int64).reshape(-1, 2)
    ways = (_by_sender(edges, graph) for edges in (active, failed))
    return [To(*both) for both in zip(*ways, strict=True)]


def one_sends_to(graph: Graph, faults: Sequence[Fault], client: int, version: int) -> To:
    """Return what `sends_to` says of one client; where edges go both ways, by the draws of its own alone."""
    if graph.directed:
        return sends_to(graph, faults, version)[client]
    near = partners_at(graph, client, version)
    edges = np.array([sorted((client, other)) for other in near], dtype=np.int64).reshape(-1, 2)
    return To(near, sorted(i + j - client for i, j in failed_edges(faults, edges, version)))


def share(own_degree: int, heard: int, degree: int, staleness: int, exponent: float, *, directed: bool) -> float:
    """Return how much a receiver takes of one of the messages that it has `heard`.

    `W_ij = (1 + s)^-a / (1 + max(d_i, d_j))`, Metropolis' weight times one that falls with staleness s. d_i is the
    receiver's degree, or `heard` where that is more; d_j the sender's. On a directed graph d is `heard` alone.
    """
    fresh = float((1 + staleness) ** -exponent)
    return fresh / (1 + (heard if directed else max(own_degree, heard, degree)))


def rows(
    receivers: Sequence[int], among: Sequence[int], takes: Mapping[tuple[int, int], float], *, directed: bool
) -> csr_array:
    """Return the rows `[K, H]` of the mixing matrix with these shares of others; the rest of 1 is a receiver's own.

    `takes` has them by place among the `receivers` and `among` those who were heard, who are sorted; a receiver's own
    place is its first. The rest is taken off in the order in which it is for a round, so that both have the same bits.
    """
    row, column = np.array([*takes], dtype=np.int64).reshape(-1, 2).T
    taken = np.array([*takes.values()])
    senders, ours = np.array(among), np.array(receivers)
    above = (senders[column] > ours[row]) | directed  # of directed edges all are taken off in one go
    own = 1 - np.bincount(row[above], taken[above], len(ours)) - np.bincount(row[~above], taken[~above], len(ours))
    entries = np.concatenate([taken, own])
    at = np.concatenate([row, np.arange(len(ours))]), np.concatenate([column, np.searchsorted(senders, ours)])
    return csr_array((entries, at), shape=(len(ours), len(among)))


def _by_sender(edges: Edges, graph: Graph) -> list[list[int]]:
    """Return for each client the other ends of these edges, sorted."""
    ways = edges if graph.directed else np.concatenate([edges, edges[:, ::-1]])
    ways = ways[np.lexsort((ways[:, 1], ways[:, 0]))]
    starts = np.searchsorted(ways[:, 0], np.arange(1, graph.clients))
    return [each.tolist() for each in np.split(ways[:, 1], starts)]
