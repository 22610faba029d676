"""What becomes of what was heard: what is refused or left out, and mixing.

Where what is read is not exactly what a sender has, such as adapters in half precision, a client mixes differences,
`x_i + (m_i - Q(x_i))`: m_i is what the mixer makes of Q(x_i), its own adapter as others read it, and of what it heard.
For gossip this is `x_i + Σ_j W_ij (Q(x_j) - Q(x_i))`: with symmetric W the clients' mean stays what it was, up to
rounding, and a client that hears nobody keeps its adapter. Rounded others beside an exact own would move the mean.
"""

from collections.abc import Sequence
from functools import partial
from itertools import chain

import numpy as np
import torch
from torch import Tensor

from peertune.method import At, Phase
from peertune.rounds import bounds, deadline, metrics
from peertune.rounds.bounds import Refusal
from peertune.rounds.job import Heard, Job, Refuse
from peertune.rounds.shares import as_weights, entries, giving_back, without_site
from peertune.topology import drop_edges, messages_sent, planned_weights
from peertune.types import State, Tensors, by_site


def exchanged(
    job: Job, clients: Sequence[int], among: Sequence[int], tensors: Tensors, round: int, refuse: Refuse
) -> Heard:
    """Return what an exchange brought the K `clients`: `tensors [H, …]` of those `among` whom all are whom they hear.

    The tensors are what was sent. An edge that one end refuses is dropped from the mixing matrix like one that is
    planned to fail, at both ends.
    """
    tensors, graph = job.read(tensors, round), job.graph
    matrix, failed = planned_weights(graph, job.faults, round)
    ours, theirs = (np.asarray(numbers, dtype=np.int64) for numbers in (clients, among))
    rows = matrix if len(ours) == graph.clients else matrix[ours]
    taken = rows.tocoo()
    receivers, senders = taken.row, np.searchsorted(theirs, taken.col)
    others = (ours[receivers] != taken.col) & (taken.data != 0)
    places = (torch.from_numpy(x[others]).long().to(job.device) for x in (receivers, senders))
    found = refuse(tensors, *places) if tensors else []
    tell(job, round, found, clients, among, "the edge is dropped")
    pairs = {metrics.as_edge(among[sender], clients[receiver], graph.directed) for receiver, sender, _ in found}
    told = chain(*job.group.gather(sorted(pairs)))
    if lost := sorted({(i, j) for i, j in told}):
        matrix, failed = drop_edges(graph, matrix, lost), sorted({*failed, *lost})
        rows = matrix[ours]
    if len(theirs) < graph.clients:
        rows = rows[:, theirs]
    if job.group.size > 1:
        failed = [edge for edge in failed if not set(edge).isdisjoint(job.clients)]
    sent = messages_sent(graph, job.faults, round)[ours].tolist() if graph.directed else None
    return Heard(tensors, as_weights(rows, job.device), among, failed, sent=sent)


def tell(
    job: Job, round: int, refusals: Sequence[Refusal], clients: Sequence[int], among: Sequence[int], so: str
) -> None:
    """Say what was refused of whom."""
    for receiver, sender, why in refusals:
        to = job.lines.name(clients[receiver])
        job.lines.say(among[sender], f"round {round}: what it sent {to} isn't mixed: {why}; {so}")


def refusing(job: Job, state: State) -> Refuse:
    """Return what refuses to mix, by the state that the receivers have."""
    if job.bound is None:
        return lambda heard, receivers, senders: []
    return partial(bounds.refused, job.bound, state.adapters)


def mixable(
    job: Job, state: State, clients: Sequence[int], t: int, came: Heard
) -> tuple[Tensor, list[tuple[int, int]]]:
    """Return the weights of what is mixed, and the pairs (receiver, sender) that counted and are left out.

    Their weight returns to the receiver's own adapter, at this end only.
    """
    weights = came.weights
    if job.bound is None or not came.tensors:
        return weights, []
    receivers, places, _ = entries(weights)
    ours, theirs = (torch.tensor(numbers, device=weights.device) for numbers in (clients, came.clients))
    others = ours[receivers] != theirs[places]
    found = bounds.apart(job.bound, state.adapters, came.tensors, receivers[others], places[others])
    if not found:
        return weights, []
    tell(job, t, found, clients, came.clients, "the edge counts, and this end mixes nothing of it")
    rows, columns = (torch.tensor(x, device=weights.device) for x in zip(*(pair[:2] for pair in found), strict=True))
    fails = torch.isin(receivers * len(theirs) + places, rows * len(theirs) + columns)
    pairs = sorted((clients[receiver], came.clients[sender]) for receiver, sender, _ in found)
    return giving_back(weights, places_among(came.clients, clients).to(weights.device), fails), pairs


def places_among(among: Sequence[int], clients: Sequence[int]) -> Tensor:
    """Return where these clients are among some, who are sorted."""
    return torch.searchsorted(torch.tensor(among, dtype=torch.int64), torch.tensor(clients, dtype=torch.int64))


def arrived(job: Job, heard: Heard, clients: Sequence[int], t: int) -> Heard:
    """Return what was heard in round t as a deadline leaves it: with the sites that each sends, if there is one.

    An edge of which one end has reached no site is one over which nothing came.
    """
    reached = job.reached(heard.clients, [t] * len(heard.clients))
    if reached is None or job.clock is None:
        return heard
    sites = deadline.sent(job.clock, reached, job.sites).to(job.device)
    own = places_among(heard.clients, clients).to(job.device)
    weights = without_site(heard.weights, own, sites, 1)
    before, after = (metrics.edges(x, clients, heard.clients, job.graph.directed) for x in (heard.weights, weights))
    return heard._replace(weights=weights, failed=sorted({*heard.failed, *before} - {*after}), sites=sites)


def mix(job: Job, state: State, mixed: Heard, at: At, phase: Phase) -> None:
    """Mix what was heard into the adapters, **in place**; of each who was heard the sites that it sends.

    It goes from site to site, so that beside the stack only one site's new factors are held.
    """
    mixer, message, heard = job.algorithm.mixer, job.algorithm.message, mixed.tensors
    used, changed = mixer.weigh(state.adapters, heard, mixed.weights, state.known, at, phase)
    state.remember(changed)
    places = places_among(mixed.clients, at.clients.tolist()).to(job.device)
    beside = {name: x for name, x in heard.items() if name not in state.adapters}
    known = state.known
    groups = by_site(state.adapters)
    for left, own in zip(range(len(groups), 0, -1), groups, strict=True):
        came = {name: heard[name] for name in own if name in heard}
        if not came:
            continue
        names = tuple(f"{name}." for name in own)  # after their owner's, those of what travels beside these adapters
        told = came | {name: x for name, x in beside.items() if name.partition(".")[2].startswith(names)}
        as_read = own if message.exact else own | {name: x[places] for name, x in came.items()}
        share = used if isinstance(used, Tensor) else used[next(iter(own)).rpartition(".")[0]]
        if mixed.sites is not None:
            share = without_site(share, places, mixed.sites, left)
        new, changed = mixer.receive(as_read, told, share, known, at, phase)
        state.remember(changed)
        known |= changed
        for name, x in own.items():
            if new[name] is as_read[name]:
                continue
            if message.exact:
                x.copy_(new[name])
            else:
                x.add_(new[name].sub(as_read[name]))
