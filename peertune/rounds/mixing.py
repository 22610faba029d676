"""What becomes of what was heard: what is refused or left out, and mixing.

Where what is read is not exactly what a sender has, such as adapters in half precision, a client mixes differences,
`x_i + (m_i - Q(x_i))`: m_i is what the mixer makes of Q(x_i), its own adapter as others read it, and of what it heard.
For gossip this is `x_i + Σ_j W_ij (Q(x_j) - Q(x_i))`: with symmetric W the clients' mean stays what it was, up to
rounding, and a client that hears nobody keeps its adapter. Rounded others beside an exact own would move the mean.

What mixing comes to is held against the bound, too, at each site (`_take_over`).
"""

from collections.abc import Iterator, Sequence
from dataclasses import replace
from functools import partial
from itertools import chain, groupby
from typing import NamedTuple

import numpy as np
import torch
from torch import Tensor

from peertune.method import At, Memory, Phase, Weights, plain_weights
from peertune.methods.shares import as_weights, entries, giving_back, of_slice, without_site
from peertune.rounds import bounds, deadline, metrics
from peertune.rounds.bounds import Bound, Refusal
from peertune.rounds.job import Heard, Job, Refuse
from peertune.rounds.record import summed
from peertune.rounds.slices import Slice, everyones, filled, rank, slices
from peertune.topology import drop_edges, messages_sent, planned_weights
from peertune.types import Stack, State, Tensors, in_order, stacked, take


def exchanged(
    job: Job, clients: Sequence[int], among: Sequence[int], sent: Sequence[Stack], round: int, refuse: Refuse
) -> Heard:
    """Return what an exchange brought the K `clients`: what was `sent` by those `among` whom all are whom they hear.

    An edge that one end refuses is dropped from the mixing matrix like one that is
    planned to fail, at both ends.
    """
    graph = job.graph
    sent = [stack for stack in sent if len(stack.rows)] if job.ranks else sent
    senders = [among[int(rows[0])] if job.ranks else -1 for rows, _ in sent]
    stacks = [Stack(one.rows, job.read(one.tensors, round, by)) for one, by in zip(sent, senders, strict=True)]
    matrix, failed = planned_weights(graph, job.faults, round)
    ours, theirs = (np.asarray(numbers, dtype=np.int64) for numbers in (clients, among))
    rows = matrix if len(ours) == graph.clients else matrix[ours]
    taken = rows.tocoo()
    receivers, senders = taken.row, np.searchsorted(theirs, taken.col)
    others = (ours[receivers] != taken.col) & (taken.data != 0)
    places = (torch.from_numpy(x[others]).long().to(job.device) for x in (receivers, senders))
    found = refuse(stacks, *places) if stacks else []
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
    messages = messages_sent(graph, job.faults, round)[ours].tolist() if graph.directed else None
    return Heard(stacks, as_weights(rows, job.device), among, failed, sent=messages)


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
    return partial(bounds.refused, job.bound, state.stacks)


def mixable(
    job: Job, state: State, clients: Sequence[int], t: int, came: Heard
) -> tuple[Tensor, list[tuple[int, int]]]:
    """Return the weights of what is mixed, and the pairs (receiver, sender) that counted and are left out.

    Their weight returns to the receiver's own adapter, at this end only.
    """
    weights = came.weights
    if job.bound is None or not came.stacks:
        return weights, []
    receivers, places, _ = entries(weights)
    ours, theirs = (torch.tensor(numbers, device=weights.device) for numbers in (clients, came.clients))
    others = ours[receivers] != theirs[places]
    found = bounds.apart(job.bound, state.stacks, came.stacks, receivers[others], places[others])
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


def finite(job: Job, heard: Heard) -> Heard:
    """Return what was heard with zeros in the place of infinities and NaN, where there is a bound, which refuses them.

    They have no weight, and yet would count: zero times NaN is NaN.
    """
    numbers = [x for _, tensors in heard.stacks for x in tensors.values() if x.is_floating_point()]
    if (
        job.bound is None
        or not numbers
        or bool(torch.stack([x.sum(dtype=torch.float64) for x in numbers]).isfinite().all())
    ):
        return heard
    return heard._replace(
        stacks=[Stack(rows, {n: _finite(x) for n, x in tensors.items()}) for rows, tensors in heard.stacks]
    )


def _finite(x: Tensor) -> Tensor:
    return x.nan_to_num(0.0, 0.0, 0.0) if x.is_floating_point() else x


class _Meeting(NamedTuple):
    """Adapters of one site, or of a rank slice of one, that are mixed with others of their shape."""

    part: Slice
    own: Stack  # of the P receivers
    came: Tensors  # [M, …], of those who have it too
    share: Tensor  # [P, M]
    places: Tensor  # [P], of the receivers among the M
    at: At  # of the receivers
    known: Memory  # what they remember


def mix(
    job: Job, state: State, mixed: Heard, at: At, phase: Phase, honest: Sequence[Stack] = ()
) -> list[tuple[int, float, float]]:
    """Mix what was heard into the adapters, **in place**; of each who was heard the sites that it sends.

    `honest` has by their rows what some receivers would have sent, who sent something else than they have. Each of them
    mixes as if that had been heard of it. Returns what a mixer with weights of its own took of whom: see
    `RoundRecord.taken`.
    """
    liars, taken = list[tuple[Tensor, State]](), list[tuple[int, float, float]]()
    for rows, sent in honest:
        for place, row in enumerate(rows.tolist()):
            one = torch.tensor([row])
            part, own = state.take(one), take(sent, slice(place, place + 1))
            seen, here = _as_if_sent(job, mixed, row, own, at), _at(at, one)
            taken += _taken(seen, _mix(job, part, seen, here, phase), here)
            liars.append((one, part))
    used = _mix(job, state, mixed, at, phase)  # last, since what was heard may lie in the memory of the state
    for one, part in liars:
        state.put(one, part)
    return summed([*taken, *_taken(mixed, used, at, [int(one) for one, _ in liars])])


def _as_if_sent(job: Job, mixed: Heard, row: int, sent: Tensors, at: At) -> Heard:
    """Return what one receiver heard, with what it has `sent`, `[1, …]`, in the place of what came of itself."""
    client = int(at.clients[row])
    own, place = job.read(sent, int(at.round[row]), client), places_among(mixed.clients, [client])
    stacks = [
        Stack(rows, {name: x.index_copy(0, there.to(x.device), own[name]) for name, x in tensors.items()})
        if len(there := (rows == place).nonzero()[:, 0])
        else Stack(rows, tensors)
        for rows, tensors in mixed.stacks
    ]
    weights = mixed.weights.index_select(0, torch.tensor([row], device=mixed.weights.device))
    return mixed._replace(stacks=stacks, weights=weights)


def _mix(job: Job, state: State, mixed: Heard, at: At, phase: Phase) -> Weights:
    """Mix what was heard into the adapters, **in place**, and return the weights by which that was done.

    It goes from site to site, so that beside the stack only one site's new factors are held. Where ranks differ, a
    mixer is given rank slices, or whole sites of the receivers of one rank: see `Mixer.ranks`.
    """
    mixer, exact = job.algorithm.mixer, job.algorithm.message.exact
    used = _weighed(job, state, mixed, at, phase)
    meetings = (_slices if mixer.ranks == "slices" else _by_receiver) if job.ranks else _sites
    for _, of_site in groupby(meetings(job, state, mixed, used, at), lambda meeting: meeting.part.left):
        found = []
        for part, own, came, share, places, here, known in of_site:
            as_read = own.tensors if exact else own.tensors | _read(own.tensors, came, places)
            new, changed = mixer.receive(as_read, came, share, known, here, phase)
            new = {name: x for name, x in new.items() if x is not as_read[name]}
            if not exact:
                new = {name: own.tensors[name] + x.sub(as_read[name]) for name, x in new.items()}
            found.append((part, Stack(own.rows, new)))
            if changed:
                state.remember(changed)
        _take_over(job, state, found, at)
    return used


def _taken(mixed: Heard, used: Weights, at: At, without: Sequence[int] = ()) -> list[tuple[int, float, float]]:
    """Return each sender, the weight that all receivers but itself had for it, and what they took of it.

    Receivers in some rows may be left out.
    """
    if used is mixed.weights or not isinstance(used, Tensor):
        return []
    own, sums = places_among(mixed.clients, at.clients.tolist()), []
    for weights in (mixed.weights, used):
        receivers, places, values = (x.cpu() for x in entries(weights))
        others = (places != own[receivers]) & ~torch.isin(receivers, torch.tensor(without, dtype=torch.int64))
        sums.append(values.new_zeros(len(mixed.clients)).index_add(0, places[others], values[others]).tolist())
    return [(client, had, took) for client, had, took in zip(mixed.clients, *sums, strict=True) if had > 0]


def _take_over(job: Job, state: State, found: Sequence[tuple[Slice, Stack]], at: At) -> None:
    """Write what mixing came to at a site, whole or by slices, **in place**.

    Where this goes as far beyond what a client had as nothing that is heard may, the client keeps what it had of the
    site. What was heard of two may be within the bound and their mix not: one sends A, the other B.
    """
    for own, cohort in state.parts:
        (part, (_, after)), *others = found
        if others or part.hi is not None or len(state.parts) > 1:
            after = _put_together(cohort.adapters, own, found)
        before = {name: cohort.adapters[name] for name in found[0][0].names}
        kept = [] if job.bound is None or not after else _outgrown(job.bound, before, after)
        for place, _, why in kept:
            client, t = (int(x[own[place]]) for x in (at.clients, at.round))
            said = f"round {t}: what mixing came to isn't taken, of those whom it heard together"
            job.lines.say(client, f"{said}: {why}; it keeps what it had of this site")
        places = torch.tensor([place for place, _, _ in kept], dtype=torch.int64, device=job.device)
        for name, x in after.items():
            before[name].copy_(x.index_copy(0, places, before[name][places]) if kept else x)


def _outgrown(bound: Bound, before: Tensors, after: Tensors) -> list[Refusal]:
    """Return what of a site went too far, by client: what came of mixing is judged as if it were heard."""
    everybody = torch.arange(len(next(iter(after.values()))), device=next(iter(after.values())).device)
    return bounds.refused(replace(bound, sound=None), stacked(before), stacked(after), everybody, everybody)


def _put_together(adapters: Tensors, own: Tensor, found: Sequence[tuple[Slice, Stack]]) -> Tensors:
    """Return what a cohort has of a site now, of what mixing came to for some clients, by slices or not."""
    after: Tensors = {}
    for part, (rows, new) in found:
        there = torch.isin(own, rows).nonzero()[:, 0]
        for name, x in new.items() if len(there) else ():
            whole = after.setdefault(name, adapters[name].clone())
            part.of(name, whole)[there] = x[torch.searchsorted(rows, own[there])]
    return after


def _read(own: Tensors, came: Tensors, places: Tensor) -> Tensors:
    """Return what others read of receivers, who stand at these places among those who were heard."""
    return {n: Slice([n], 0, rank(own, [n])).of(n, came[n][places]) for n in own if n in came}


def _weighed(job: Job, state: State, mixed: Heard, at: At, phase: Phase) -> Weights:
    """Return the weights to mix with, by the mixer's word."""
    weigh = job.algorithm.mixer.weigh
    if weigh is plain_weights:
        return mixed.weights
    if not job.ranks:
        used, changed = weigh(state.adapters, mixed.tensors, mixed.weights, state.known, at, phase)
        state.remember(changed)
        return used
    if not mixed.stacks:
        return mixed.weights
    # Of clients of several ranks there are no factors of one shape: it goes by what travels beside them.
    told = everyones(mixed.stacks, mixed.stacks[0].tensors.keys() - state.parts[0][1].adapters.keys())
    found = []
    for rows, part in state.parts:
        weights = mixed.weights.index_select(0, rows.to(mixed.weights.device))
        used, changed = weigh({}, told, weights, part.known, _at(at, rows), phase)
        assert isinstance(used, Tensor), "weights that differ from site to site are of clients of one rank"
        part.remember(changed)
        found.append((rows, used))
    return in_order(found)


def _at(at: At, rows: Tensor, heard: Tensor | None = None) -> At:
    """Return where some of the clients stand, who heard some of those who were heard, or all."""
    came = at.heard if heard is None or at.heard is None else at.heard[heard]
    return At(at.clients[rows], at.round[rows], at.step[rows], came)


def _sites(job: Job, state: State, mixed: Heard, used: Weights, at: At) -> Iterator[_Meeting]:
    """Yield site by site what all have, who are of one rank."""
    heard, places = mixed.tensors, places_among(mixed.clients, at.clients.tolist()).to(job.device)
    beside = {name: x for name, x in heard.items() if name not in state.adapters}
    for part in slices(state.stacks):
        own = Stack(at.clients, {name: state.adapters[name] for name in part.names})
        came = {name: heard[name] for name in part.names if name in heard}
        if not came:
            continue
        names = tuple(f"{name}." for name in own.tensors)  # after their owner's, those of what travels beside these
        told = came | {name: x for name, x in beside.items() if name.partition(".")[2].startswith(names)}
        share = used if isinstance(used, Tensor) else used[part.names[0].rpartition(".")[0]]
        if mixed.sites is not None:
            share = without_site(share, places, mixed.sites, part.left)
        yield _Meeting(part, own, told, share, places, at, state.known)


def _slices(job: Job, state: State, mixed: Heard, used: Weights, at: At) -> Iterator[_Meeting]:
    """Yield slice by slice what those have who have it."""
    assert isinstance(used, Tensor), "weights that differ from site to site are of clients of one rank"
    places, to_own = places_among(mixed.clients, at.clients.tolist()), job.algorithm.mixer.lacking == "own"
    shares: dict[tuple[bytes, bytes], Tensor] = {}
    for part in slices(state.stacks, job.cuts):
        own, came = part.cut(state.stacks), part.cut(mixed.stacks)
        if not len(own.rows) or not came.tensors:
            continue
        who = own.rows.numpy().tobytes(), came.rows.numpy().tobytes()
        if who not in shares:
            shares[who] = of_slice(used, places, own.rows, came.rows, to_own=to_own)
        among = torch.searchsorted(came.rows, places[own.rows]).to(job.device)
        yield _Meeting(part, own, came.tensors, shares[who], among, _at(at, own.rows, came.rows), {})


def _by_receiver(job: Job, state: State, mixed: Heard, used: Weights, at: At) -> Iterator[_Meeting]:
    """Yield by site what the receivers of each rank have, and what all heard, with zeros up to the highest rank."""
    assert isinstance(used, Tensor), "weights that differ from site to site are of clients of one rank"
    places = places_among(mixed.clients, at.clients.tolist())
    for part in slices(state.stacks):
        names = [name for name in part.names if mixed.stacks and name in mixed.stacks[0].tensors]
        if not names:
            continue
        heard = in_order((rows, torch.full_like(rows, rank(tensors, names))) for rows, tensors in mixed.stacks)
        ranks = {rank(cohort.adapters, names) for _, cohort in state.parts} | {*heard.tolist()}
        came = filled(mixed.stacks, names, max(ranks))
        for rows, cohort in state.parts:
            own = Stack(rows, {name: cohort.adapters[name] for name in part.names})
            share = used.index_select(0, rows.to(used.device))
            here = _at(at, rows)._replace(ranks=heard if len(ranks) > 1 else None)
            yield _Meeting(part, own, came, share, places[rows].to(job.device), here, {})
