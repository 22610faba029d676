"""What is planned to go wrong: edges that fail, clients that are down, clients that are slow.

The simulator and real peers follow the same plan, so that what a fault does to a method can be studied in either, and
so that the two can be held against each other when things fail.
"""

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray
from scipy.sparse import csr_array

from peertune.topology.pairs import Edges
from peertune.topology.rules import adjacency
from peertune.topology.weights import Graph, active_edges, drop_edges, weights_at


@dataclass(frozen=True)
class Fault:
    """One thing that goes wrong in the rounds from `first` to `last`, both included."""

    first: int
    last: int
    edge: tuple[int, int] | None = None  # these two can't exchange
    down: int | None = None  # this client neither trains nor exchanges, and goes on with what it had before
    slow: int | None = None  # this client takes `delay_s` longer for a round, which changes no result
    delay_s: float = 0.0

    def at(self, t: int) -> bool:
        """Whether it goes wrong in round t."""
        return self.first <= t <= self.last


def clients_down(faults: Sequence[Fault], t: int) -> set[int]:
    """Return the clients that are down in round t."""
    return {fault.down for fault in faults if fault.down is not None and fault.at(t)}


def failed_edges(faults: Sequence[Fault], active: Edges, t: int) -> list[tuple[int, int]]:
    """Return those of the round's `active [E, 2]` edges that fail: dropped, or with an end that is down.

    A plan drops edges both ways.
    """
    down = clients_down(faults, t)
    dropped = {frozenset(fault.edge) for fault in faults if fault.edge is not None and fault.at(t)}
    return [(i, j) for i, j in active.tolist() if i in down or j in down or frozenset((i, j)) in dropped]


def planned_weights(graph: Graph, faults: Sequence[Fault], t: int) -> tuple[csr_array, list[tuple[int, int]]]:
    """Return the mixing matrix `W [n, n]` of round t without the edges that are planned to fail, and those edges.

    With `push_sum` the share of a message that is lost on the way is nobody's in this round, see `lost_messages`; that
    for a client that is down stays with its sender.
    """
    matrix = weights_at(graph, t)
    if not faults:
        return matrix, []
    failed = failed_edges(faults, active_edges(graph, t), t)
    if gone := _on_the_way(graph, faults, failed, t):
        matrix = csr_array(matrix - matrix.multiply(adjacency(graph.clients, np.array(gone), directed=True)))
    return drop_edges(graph, matrix, failed), failed


def lost_messages(graph: Graph, faults: Sequence[Fault], t: int) -> list[tuple[int, int, float]]:
    """Return sender, receiver and share of the messages that are lost on the way in round t; [] but for `push_sum`."""
    gone = _on_the_way(graph, faults, failed_edges(faults, active_edges(graph, t), t), t)
    shares = weights_at(graph, t) if gone else csr_array((graph.clients,) * 2)
    return [(i, j, float(shares[j, i])) for i, j in gone]


def whose_adapters(graph: Graph, faults: Sequence[Fault], t: int) -> csr_array:
    """Return a matrix `[n, n]` whose entries say whose adapters a client's state after round t depends on.

    It is the mixing matrix, and with `push_sum` with those whose messages are lost: in a simulation the receiver keeps
    what is under way to it.
    """
    plan = [fault for fault in faults if fault.edge is None] if graph.weights == "push_sum" else faults
    return planned_weights(graph, plan, t)[0]


def _on_the_way(
    graph: Graph, faults: Sequence[Fault], failed: Sequence[tuple[int, int]], t: int
) -> list[tuple[int, int]]:
    """Return those of the `failed` edges over which a mass is under way after the round."""
    down = clients_down(faults, t)
    return [edge for edge in failed if down.isdisjoint(edge)] if graph.weights == "push_sum" else []


def messages_sent(graph: Graph, faults: Sequence[Fault], t: int) -> NDArray[np.int64]:
    """Return to how many others each client of a directed graph sends in round t, `[n]`: to all but those down.

    What is lost on the way was sent: its sender doesn't know.
    """
    active, down = active_edges(graph, t), clients_down(faults, t)
    up = ~np.isin(active, sorted(down)).any(axis=1)
    return np.bincount(active[up, 0], minlength=graph.clients)


def delay_s(faults: Sequence[Fault], client: int, t: int) -> float:
    """Return by how many seconds round t takes the client longer."""
    return sum(fault.delay_s for fault in faults if fault.slow == client and fault.at(t))
