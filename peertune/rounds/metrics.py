"""How far the clients disagree, what their disagreement does to the products, and what a round costs on the wire.

Pure functions. Sums are accumulated in float64, one tensor at a time, with memory that grows as K and never as K².
Where the clients are dealt among the processes of a `group`, each of which calls with its own, all get what is true of
all clients together. With numbers of `rows [K]` each client counts in all means by its own, else all count alike.

Where ranks differ, adapters are cut at them into rank slices (`peertune.rounds.slices`). Each slice's means are over
the clients that have it, and squared errors add up over slices.
"""

from collections.abc import Iterator, Mapping, Sequence
from math import hypot, sqrt
from typing import NamedTuple

import torch
from torch import Tensor

from peertune.methods.shares import entries
from peertune.rounds.slices import of_rank, rank, slices
from peertune.types import ALONE, Group, Stack, Tensors, kind, over_clients, pairs, payload_bytes, select, stacked, take


def consensus_error(tensors: Tensors, group: Group = ALONE) -> float:
    """Root mean squared distance of the clients from their mean, `Δ_X = sqrt(mean_i ‖X_i - X̄‖²_F)`.

    X_i is all of client i's `tensors [K, …]` together; pass one kind of them to get that kind's consensus error.
    """
    every = _Everyone(stacked(tensors), group)
    errors, _ = _disagreement(every, _mean(every), products=False)
    return sqrt(sum(error**2 for error in errors.values()))


def cross_term(adapters: Tensors, group: Group = ALONE) -> float:
    """What averaging the factors separately leaves out of the averaged product, in norm over all sites.

    `C = mean_i(B_i A_i) - B̄ Ā = mean_i((B_i - B̄)(A_i - Ā))` at each site, and the result is `sqrt(Σ_sites ‖C‖²_F)`.
    At each site `‖C‖_F ≤ Δ_A Δ_B`. TAD-LoRA (arXiv 2602.00451) and ADF-LoRA (arXiv 2511.18291) bound their error by it.
    """
    every = _Everyone(stacked(adapters), group)
    return _disagreement(every, _mean(every))[1]


def product_norm(adapters: Tensors) -> float:
    """What the clients' products have in common, in norm over all sites: `sqrt(Σ_sites ‖mean_i(B_i A_i)‖²_F)`.

    The scale by which a `cross_term` is small or large. Zero at the start, where B is 0.
    """
    return sqrt(sum(_product_square(B.double() / len(B), A.double(), len(A)) for A, B in _pairs(adapters)))


def relative_disagreement(adapters: Tensors, measured: Mapping[str, float]) -> dict[str, float]:
    """Return what clients disagree about over what they hold, as `cross`, `A` and `B`; 0 where they hold nothing.

    Of adapters `[K, …]` and what `diagnostics` measured of them: the cross term over `product_norm`, and the consensus
    error of A and of B over the root of the clients' mean square.
    """
    errors = {"cross": measured["cross_term"]} | {of: measured[f"consensus_error_{of}"] for of in ("A", "B")}
    held = {"cross": product_norm(adapters)} | {of: _root_mean_square(select(adapters, {of})) for of in ("A", "B")}
    return {of: errors[of] / held[of] if held[of] else 0.0 for of in errors}


def _root_mean_square(tensors: Tensors) -> float:
    return sqrt(sum(float(x.double().square().sum()) / len(x) for x in tensors.values()))


class _Site(NamedTuple):
    """A site, or a rank slice of one."""

    tensors: Tensors  # [P, …] of those who have it, by names that no other has
    rows: Tensor | None  # [P], by how many rows each counts; None: all alike
    clients: int  # of all processes
    total: float  # of what they count by


class _Everyone:
    """All clients' tensors, as means go over them; `cuts` are the ranks that there are, where these differ."""

    def __init__(
        self, stacks: Sequence[Stack], group: Group = ALONE, rows: Tensor | None = None, cuts: Sequence[int] = ()
    ) -> None:
        self.stacks, self.group, self.rows, self.cuts = stacks, group, rows, cuts
        self._counts: dict[int | None, tuple[int, float]] = {}  # by where a slice ends

    def sites(self) -> Iterator[_Site]:
        """Yield each slice of each site."""
        for part in slices(self.stacks, self.cuts):
            own = part.cut(self.stacks)
            rows = self.rows if self.rows is None or not self.cuts else self.rows[own.rows.to(self.rows.device)]
            tensors = {f"{part.lo}.{name}": x for name, x in own.tensors.items()} if part.lo else own.tensors
            clients, total = self._count(part.hi, len(own.rows), rows)
            if clients:
                yield _Site(tensors, rows, clients, total)

    def _count(self, end: int | None, here: int, rows: Tensor | None) -> tuple[int, float]:
        """Return how many clients have what ends there, `here` and in other processes, and what they count by."""
        if end not in self._counts:
            clients = int(self.group.add(torch.tensor(here)))
            self._counts[end] = clients, clients if rows is None else float(self.group.add(rows.sum()))
        return self._counts[end]


def _disagreement(every: _Everyone, mean: Tensors, *, products: bool = True) -> tuple[dict[str, float], float]:
    """Return the consensus error of each kind around the clients' mean, and the cross term (or 0, without `products`).

    Both come out of one pass over the sites, with room for one site in float64.
    """
    crossed, totals, squares = dict[float, float](), dict[str, float](), dict[str, Tensor]()
    for site in every.sites():
        apart = {name: x.double() - mean[name] for name, x in site.tensors.items()}
        squares |= {name: _counted(x.square(), site.rows).sum() for name, x in apart.items()}
        totals |= dict.fromkeys(apart, site.total)
        for A, B in _pairs(apart) if products else ():
            square = _product_square(_counted(B, site.rows), A, site.clients, every.group)
            crossed[site.total] = crossed.get(site.total, 0.0) + square
    if not squares:
        return {}, 0.0
    errors = dict.fromkeys(sorted(set(map(kind, squares))), 0.0)
    sums = every.group.add(torch.stack(list(squares.values())))
    over = torch.tensor(list(totals.values()), dtype=sums.dtype, device=sums.device)
    for name, square in zip(squares, (sums / over).tolist(), strict=True):
        errors[kind(name)] += square
    return {k: sqrt(e) for k, e in errors.items()}, hypot(*(sqrt(c) / total for total, c in crossed.items()))


def _counted(x: Tensor, rows: Tensor | None) -> Tensor:
    """Return each client's part of `x [K, …]` as often as it has rows."""
    return x if rows is None else x.double() * over_clients(rows, x)


def neighbourhood_cross_terms(heard: Tensors, weights: Tensor, pushed: bool = False) -> list[float]:
    """Return the cross term that each receiver's own average leaves out, of what it hears.

    `C_i = Σ_j w_ij B_j A_j - (Σ_j w_ij B_j)(Σ_j w_ij A_j)` over row i of `weights [R, H]`, in norm over all sites. 0
    for a receiver that hears only itself, and where not both factors travel. Of what is `pushed`, whose rows don't sum
    to 1, a sender counts by the share that it gave.
    """
    pairs = _pairs(heard)
    receivers, places, shares = entries(weights)
    counts = torch.bincount(receivers, minlength=weights.shape[0]).tolist()
    known: dict[tuple[float, ...], float] = {}  # on a complete graph all hear the same
    found = []
    for near, w in zip(places.split(counts), shares.double().split(counts), strict=True):
        w = w / w.sum() if pushed else w
        key = (*near.tolist(), *w.tolist())
        if key not in known:
            known[key] = sqrt(sum(_weighted(A[near], B[near], w.view(-1, 1, 1)) for A, B in pairs if len(near) > 1))
        found.append(known[key])
    return found


def _weighted(A: Tensor, B: Tensor, w: Tensor) -> float:
    """Return the squared cross term of a weighted average of `A [m, r, d_in]` and `B [m, d_out, r]`."""
    a, b = A.double(), B.double()
    return _product_square(w * (b - (w * b).sum(0)), a - (w * a).sum(0), len(a))


def _pairs(adapters: Tensors) -> list[tuple[Tensor, Tensor]]:
    """Return A and B of each site that has both."""
    return [(adapters[a], adapters[b]) for a, b in pairs(adapters)]


def _product_square(B: Tensor, A: Tensor, clients: int, group: Group = ALONE) -> float:
    """Return `‖Σ_i B_i A_i‖²_F` for `B [m, d_out, r]` and `A [m, r, d_in]` of the clients of all processes together.

    Where the factors of all are smaller than the sum `[d_out, d_in]`, each process gets them all, and otherwise sums.
    """
    left, right = B.transpose(1, 2).flatten(0, 1), A.flatten(0, 1)  # the sum is leftᵀ right, [d_out, m r] @ [m r, d_in]
    d_out, d_in = left.shape[1], right.shape[1]
    if group.size > 1:
        if clients * A.shape[1] * (d_out + d_in) >= d_out * d_in:
            return float(group.add(left.T @ right).square().sum())
        left, right = group.concat(torch.cat([left, right], dim=1)).split([d_out, d_in], dim=1)
    if len(right) < min(d_out, d_in):
        return max(0.0, float(((left @ left.T) * (right @ right.T)).sum()))  # tr(B Bᵀ A Aᵀ)
    return float((left.T @ right).square().sum())


ROUNDING = 1e-6
"""Disagreement, over the norm of the mean, up to which clients agree: sums in float32 are no nearer."""


class Before(NamedTuple):
    """What is kept of a payload `[K, …]` for comparison with what mixing makes of it."""

    mean: Tensors  # over the clients, each […] in float64
    errors: dict[str, float]  # consensus error of each kind sent


def before_mixing(
    payload: Sequence[Stack], group: Group = ALONE, rows: Tensor | None = None, cuts: Sequence[int] = ()
) -> Before:
    """Measure what is sent, just before it is mixed."""
    every = _Everyone(payload, group, rows, cuts)
    mean = _mean(every)
    return Before(mean, _disagreement(every, mean, products=False)[0])


def client_mean(tensors: Tensors) -> Tensors:
    """Return the mean over the clients of `tensors [K, …]`, each `[…]` in float64."""
    return _mean(_Everyone(stacked(tensors)))


def _mean(every: _Everyone) -> Tensors:
    """Return the mean over the clients of each tensor, `[…]` in float64; of slices, over those who have it."""
    return {
        name: every.group.add(_counted(x, site.rows).sum(0, dtype=torch.float64)) / site.total
        for site in every.sites()
        for name, x in site.tensors.items()
    }


def mean_drift(before: Tensors, after: Tensors) -> float:
    """Norm of the change of the clients' mean, `‖X̄_after - X̄_before‖_F` over all tensors `[…]` of both together.

    Zero, up to rounding, for averages with a doubly stochastic matrix, or with one for the clients' rows.
    """
    return sqrt(sum(float((after[name] - x).square().sum()) for name, x in before.items()))


def diagnostics(
    before: Before,
    after: Sequence[Stack],
    group: Group = ALONE,
    rows: Tensor | None = None,
    cuts: Sequence[int] = (),
) -> dict[str, float]:
    """Describe one mixing step: what `before_mixing` measured of what was sent, and the clients' adapters after it.

    Returns `consensus_error_A`, `consensus_error_B`, `consensus_error_head` where there is a head, and `cross_term`,
    all after mixing; `mean_drift`, of the sent kinds, by mixing; and for each sent kind in which clients disagreed
    `contraction_A` and so on, the squared consensus error after over that before: by gossip at most rho on average,
    where all rounds have one law.
    """
    every = _Everyone(after, group, rows, cuts)
    mean = _mean(every)
    found, crossed = _disagreement(every, mean)
    known = {"A": 0.0, "B": 0.0} | found
    errors = {f"consensus_error_{k}": error for k, error in known.items()}
    contraction = {
        f"contraction_{k}": (known[k] / error) ** 2
        for k, error in before.errors.items()
        if error > ROUNDING * sqrt(sum(float(x.square().sum()) for x in select(before.mean, {k}).values()))
    }
    drift = mean_drift(before.mean, mean)
    return errors | {"cross_term": crossed, "mean_drift": drift} | contraction


def high_ranks(stacks: Sequence[Stack], cuts: Sequence[int], group: Group = ALONE) -> dict[str, float]:
    """Return what clients know beyond the lowest of their ranks, `cuts`, and how far those of the highest disagree.

    `energy_beyond`: of the clients' averaged product, the mean of B_i A_i, the squared singular values beyond the
    lowest rank as a share of all, over all sites. Slices of factors change with coordinates, this doesn't.
    `highest_apart`: the root mean squared distance of the products of those of the highest rank from their mean, over
    the mean's norm; 0 where it is mere rounding. Both are 0 where products are zero. raFLoRA (arXiv 2602.13486) calls
    it rank collapse where the first decays.
    """
    clients = int(group.add(torch.tensor(sum(len(rows) for rows, _ in stacks))))
    highest = [stack.tensors for stack in stacks if rank(stack.tensors, stack.tensors) == cuts[-1]]
    high = highest[0] if highest else take(of_rank(stacks[0].tensors, cuts[-1]), slice(0, 0))
    agree = max(1, int(group.add(torch.tensor(len(next(iter(high.values())))))))
    beyond = whole = apart = mean = 0.0
    for a, b in pairs(high):
        left = group.concat(torch.cat([x[b].double().mT.flatten(0, 1) for _, x in stacks])) / clients
        right = group.concat(torch.cat([x[a].double().flatten(0, 1) for _, x in stacks]))
        if len(left) > min(left.shape[1], right.shape[1]):
            squares = torch.linalg.svdvals(left.mT @ right).square()
        else:
            upper_left, upper_right = (torch.linalg.qr(x.mT, mode="r").R for x in (left, right))
            squares = torch.linalg.svdvals(upper_left @ upper_right.mT).square()
        beyond += float(squares[cuts[0] :].sum())
        whole += float(squares.sum())
        A, B = high[a].double(), high[b].double()
        middle = _product_square(B, A, agree, group) / agree**2
        mean += middle
        apart += max(0.0, float(group.add(((A @ A.mT) * (B.mT @ B)).sum())) / agree - middle)
    agreed = apart <= ROUNDING**2 * mean
    return {"energy_beyond": beyond / whole if whole else 0.0, "highest_apart": 0.0 if agreed else sqrt(apart / mean)}


def bytes_sent(payload: Sequence[Stack], neighbours: Sequence[int]) -> list[int]:
    """Bytes that each client sends in a round, to all of its `neighbours [K]` together."""
    sizes = {row: payload_bytes(tensors) for rows, tensors in payload for row in rows.tolist()}
    return [sizes.get(row, 0) * count for row, count in enumerate(neighbours)]


def neighbour_counts(weights: Tensor) -> list[int]:
    """How many others each receiver takes something from: the non-zero entries of its row of `weights [R, H]` less one.

    `weights` is dense or sparse. A row always holds the receiver itself.
    """
    receivers, _, _ = entries(weights)
    return [count - 1 for count in torch.bincount(receivers, minlength=weights.shape[0]).tolist()]


def edges(
    weights: Tensor, receivers: Sequence[int], heard: Sequence[int], directed: bool = False
) -> list[tuple[int, int]]:
    """Return the pairs i < j of clients that take something from each other by `weights [R, H]`, sorted.

    `receivers [R]` and `heard [H]` are the clients' numbers. Of a directed graph these are (sender, receiver).
    """
    rows, places, _ = entries(weights)
    pairs = ((heard[j], receivers[i]) for i, j in zip(rows.tolist(), places.tolist(), strict=True))
    return sorted({as_edge(*pair, directed) for pair in pairs if pair[0] != pair[1]})


def as_edge(sender: int, receiver: int, directed: bool = False) -> tuple[int, int]:
    """Return what an edge is called: i < j, or where the graph is directed (sender, receiver)."""
    return (sender, receiver) if directed else (min(sender, receiver), max(sender, receiver))


def heard_mean(own: Tensors, heard: Tensors, weights: Tensor, clients: Sequence[int], among: Sequence[int]) -> Tensors:
    """Return for each of the K clients the mean of what it takes of others, factor by factor: `[K, …]`, as `own`.

    `heard [H, …]` are of the clients `among`, `weights [K, H]`; whatever has a weight counts alike. Who takes nothing
    of others has its own, and so it is with kinds that were not sent.
    """
    receivers, places, _ = entries(weights)
    ours, theirs = (torch.tensor(numbers, device=weights.device) for numbers in (clients, among))
    others = ours[receivers] != theirs[places]
    receivers, places = receivers[others], places[others]
    counts = torch.bincount(receivers, minlength=len(ours))
    found = dict(own)
    for name in own.keys() & heard.keys():
        x = heard[name].flatten(1)
        share = (1 / counts[receivers]).to(x.dtype)
        takes = torch.sparse_coo_tensor(
            torch.stack([receivers, places]), share, (len(ours), len(x)), check_invariants=False
        )
        mean = torch.sparse.mm(takes, x).view_as(own[name])
        alone = (counts == 0).view(-1, *[1] * (mean.dim() - 1))
        found[name] = torch.where(alone, own[name], mean)
    return found
