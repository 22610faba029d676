"""Who may talk to whom, who does in a round, and how much each client takes from whom.

`GRAPHS` makes a `Graph`: the edges that are possible in each round. `active_edges` decides which of them are active,
each by a draw of its own. `weights_at` turns them into the round's mixing matrix `W [n, n]`, symmetric and doubly
stochastic but for a directed graph; a peer needs its own row alone, `row_at`, which follows from its `Neighbourhood`.
`rho` says how fast mixing shrinks disagreement. `Fault` is what is planned to go wrong.
"""

from peertune.topology.faults import (
    Fault,
    clients_down,
    delay_s,
    failed_edges,
    lost_messages,
    messages_sent,
    planned_weights,
    whose_adapters,
)
from peertune.topology.graphs import GRAPHS
from peertune.topology.neighbourhood import graph_near, may_meet, neighbourhoods, partners_at, row_at
from peertune.topology.rules import WEIGHTS
from peertune.topology.spectrum import one_period, rho, rho_draws, slowest, summary
from peertune.topology.weights import (
    Graph,
    GraphSummary,
    Neighbourhood,
    active_edges,
    digest,
    drop_edges,
    mixing_weights,
    need_both_ways,
    weights_at,
    with_rows,
)

__all__ = [
    "GRAPHS",
    "WEIGHTS",
    "Fault",
    "Graph",
    "GraphSummary",
    "Neighbourhood",
    "active_edges",
    "clients_down",
    "delay_s",
    "digest",
    "drop_edges",
    "failed_edges",
    "graph_near",
    "lost_messages",
    "may_meet",
    "messages_sent",
    "mixing_weights",
    "need_both_ways",
    "neighbourhoods",
    "one_period",
    "partners_at",
    "planned_weights",
    "rho",
    "rho_draws",
    "row_at",
    "slowest",
    "summary",
    "weights_at",
    "whose_adapters",
    "with_rows",
]
