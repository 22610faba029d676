"""Rules for mixing among clients of whom some may lie, within what is mixed at all: each changes a mixer.

A receiver i holds what it heard of j against what it sent itself, as others read both. It goes by **distances**, over
all sites together: of A, of B, of the head, and of the products B A, `sqrt(Σ_sites ‖B_j A_j - B_i A_i‖²)`. Factors that
are averaged must be near as factors and as products: (B M, M⁻¹ A) is the same product, and its factors ruin an average.
How far is told by the **cross term**, `‖(B_j - B_i) (A_j - A_i)‖`, by which the product of two clients' mean factors
misses the mean of their products. Methods that mix products look at products and heads. Each kind has another size,
and B is 0 at first, so a kind is only compared with itself, and the strictest counts. Products are never formed: their
difference is `[B_j - B_i, B_i] [A_j; A_j - A_i]`, whose norm follows from inner products of factors.

`clipped`, `cs_plus`, `gt_pd`, `balance` and `krum` change weights: what a rule takes from a sender returns to the
receiver. So they serve every mixer. Clipping is a weight, too: `W_ij clip(x_j - x_i)` is `W_ij min(1, τ / d_ij)` of the
difference. `trimmed_mean` and `median` go entry by entry and know no weights. Their settings say how many neighbours of
a client may lie; no rule helps a client most of whose neighbours do.
"""

from collections.abc import Callable, Mapping
from functools import partial
from math import inf

import torch
from torch import Tensor

from peertune.errors import RecipeError
from peertune.method import At, Memory, Mixer, Phase
from peertune.methods.mixers import chunks, groups
from peertune.methods.shares import entries, keeping, of_entries
from peertune.randomness import Draw, uniforms
from peertune.types import Tensors, kind, pairs

PRODUCTS, CROSS = "BA", "cross"
"""What distances of products and cross terms are called, beside those of the kinds A, B and head."""

SAME = 1e-4
"""How far apart two are that count as the same, as a share of both sizes: rounding must not decide who is farthest."""

_CHUNK_FLOATS = 2**22  # gathered at once, so that memory does not grow with the number of edges
_NEEDS = frozenset({"exchange", "one rank", "whole messages"})

Distances = Mapping[str, Tensor]
"""What is compared → `[E]` float64, a distance or a norm for each of E pairs."""


def distances(adapters: Tensors, i: Tensor, j: Tensor, *, factors: bool = True) -> Distances:
    """Return how far apart adapters `[H, …]` are, those at `i [E]` from those at `j [E]`.

    Of products there is a distance where both factors are there, and of cross terms. Without `factors` products stand
    for A and B. What is within `SAME` of both sizes is 0.
    """
    return _beside(adapters, sizes(adapters, factors=factors), i, j, factors)


def sizes(adapters: Tensors, *, factors: bool = True) -> Distances:
    """Return the norms `[H]` of what `distances` compares; cross terms are compared with products."""
    first = next(iter(adapters.values()))
    found = _measured(adapters, torch.arange(len(first), device=first.device), None, factors=factors)
    return found | ({CROSS: found[PRODUCTS]} if factors and PRODUCTS in found else {})


def _beside(adapters: Tensors, each: Distances, i: Tensor, j: Tensor, factors: bool) -> Distances:
    """Return the `distances` of adapters of these `sizes`."""
    found = _measured(adapters, i, j, factors=factors)
    return {what: torch.where(d <= SAME * (each[what][i] + each[what][j]), 0.0, d) for what, d in found.items()}


def _measured(adapters: Tensors, i: Tensor, j: Tensor | None, *, factors: bool) -> dict[str, Tensor]:
    """Return norms by what is compared, `[E]`: of adapters at i, or of how they differ from those at j."""
    squares: dict[str, Tensor] = {}
    for name, x in adapters.items():
        for part in _chunks(len(i), x[:1].numel()) if factors or kind(name) not in ("A", "B") else ():
            one = x[i[part]] if j is None else x[j[part]] - x[i[part]]
            _add(squares, kind(name), len(i), part, torch.linalg.vector_norm(one.flatten(1), dim=1).double().square())
    for a, b in pairs(adapters):
        for part in _chunks(len(i), 2 * (adapters[a][:1].numel() + adapters[b][:1].numel())):
            A, B = adapters[a][i[part]], adapters[b][i[part]]  # [E, r, d_in], [E, d_out, r]
            found = {PRODUCTS: (A, B)}
            if j is not None:
                to_A, to_B = adapters[a][j[part]], adapters[b][j[part]]
                by_A, by_B = to_A - A, to_B - B
                found = {PRODUCTS: (torch.cat([to_A, by_A], 1), torch.cat([by_B, B], 2))}
                found |= {CROSS: (by_A, by_B)} if factors else {}
            for what, pair in found.items():
                _add(squares, what, len(i), part, _squared_norms(*pair))
    return {what: x.sqrt() for what, x in squares.items()}


def _squared_norms(A: Tensor, B: Tensor) -> Tensor:
    """Return `‖B A‖²`, `[E]`, of A `[E, r, d_in]` and B `[E, d_out, r]`."""
    return ((B.mT @ B).double() * (A @ A.mT).double()).sum((1, 2)).clamp(min=0)


def _chunks(pairs: int, floats: int) -> list[slice]:
    each = max(1, _CHUNK_FLOATS // max(1, floats))
    return [slice(start, start + each) for start in range(0, pairs, each)]


def _add(squares: dict[str, Tensor], what: str, pairs: int, part: slice, x: Tensor) -> None:
    squares.setdefault(what, x.new_zeros(pairs))[part] += x


class _Seen:
    """What K receivers hold against those whom they heard: E pairs of a receiver and another."""

    def __init__(self, sent: Tensors, own: Tensor, i: Tensor, j: Tensor, weights: Tensor, factors: bool) -> None:
        self.i, self.j = i, j  # [E], a row among the K, and a place among those who were heard
        self.own = own  # [K], the receivers' places among them
        self.weights = weights  # [E]
        self.sizes = sizes(sent, factors=factors)  # [H], of what all have sent
        self.distances = _beside(sent, self.sizes, own[i], j, factors)  # [E]

    def places(self, d: Tensor) -> Tensor:
        """Return of each pair how many of the receiver's others are farther off, `[E]`, or as far and earlier."""
        order = torch.argsort(d, descending=True, stable=True)
        order = order[torch.argsort(self.i[order], stable=True)]
        counts = torch.bincount(self.i, minlength=len(self.own))
        firsts = counts.cumsum(0) - counts
        place = torch.empty_like(self.i)
        place[order] = torch.arange(len(order), device=order.device) - firsts[self.i[order]]
        return place

    def sums(self, x: Tensor) -> Tensor:
        """Return sums over each receiver's pairs, `[K]`."""
        return x.new_zeros(len(self.own)).index_add(0, self.i, x)


_Judge = Callable[[_Seen, Memory, At], tuple[Tensor, Memory]]
"""Returns the share `[E]` of its weight that each pair keeps, and memory that changes."""


def clipped(mixer: Mixer, hostile: int = 1) -> Mixer:
    """ClippedGossip: what differs from a receiver counts up to a radius, `x_i + Σ_j W_ij clip(x_j - x_i, τ_i)`.

    The radius is the paper's for `hostile` neighbours that may lie, whom it takes to be the farthest:
    `τ_i² = Σ_near W_ij d_ij² / Σ_far W_ij`, far the farthest `hostile`, near the others. It assumes that they are
    fewer than the near ones. A client with `hostile` neighbours or fewer has none to go by. It takes the last radius
    that it had, and hears nobody before there was one; so on a graph where it never has more it learns alone. The mean
    of all adapters moves where a clip is one-sided. Memory: `clipped.<kind>.radius`, the last one, `[K]`.

    Source: ClippedGossip (arXiv 2202.01545), its radius for known liars. Ours: distances by kind and of products, and
    what becomes of few neighbours.

    Raises:
        RecipeError: `hostile` is below 1.
    """
    _at_least("clipped", "hostile", hostile)

    def init(adapters: Tensors, at: At) -> Memory:
        first = next(iter(adapters.values()))
        of = set(map(kind, adapters)) | {PRODUCTS, CROSS}
        of -= set() if mixer.keeps_basis else {"A", "B", CROSS}
        none = torch.zeros(len(at.clients), dtype=torch.float64, device=first.device)
        return {_radius(what): none.clone() for what in sorted(of)}

    def judge(seen: _Seen, memory: Memory, at: At) -> tuple[Tensor, Memory]:
        share, changed = torch.ones_like(seen.weights), Memory()
        for what, d in seen.distances.items():
            far = seen.places(d) < hostile
            near = seen.sums(torch.where(far, 0.0, seen.weights))
            spread = seen.sums(torch.where(far, 0.0, seen.weights * d.square()))
            told = near > 0
            beyond = seen.sums(torch.where(far, seen.weights, 0.0)).clamp(min=torch.finfo(torch.float64).tiny)
            radius = torch.where(told, (spread / beyond).sqrt(), memory[_radius(what)])
            changed[_radius(what)] = radius
            share = share.minimum(_clip(d, radius[seen.i]))
        return share, changed

    return _weighing(mixer, judge, init)


def cs_plus(mixer: Mixer, hostile: int = 1) -> Mixer:
    """CS+: clip what differs from a receiver at its distance from the `2 · hostile`-th farthest neighbour.

    So of neighbours of whom `hostile` lie at most as many honest ones are clipped to less than they are. It assumes
    that a receiver has `2 · hostile` neighbours or more, most of them honest; one that has fewer hears nobody in that
    round, and on a graph where that is always so it learns alone. The mean of all adapters moves where a clip is
    one-sided.

    Source: CS+ of F-RG (arXiv 2410.10418), with rows of W in the place of its step. That the radius is the
    `2 · hostile`-th largest distance is our reading of it. Ours: distances by kind and of products.

    Raises:
        RecipeError: `hostile` is below 1.
    """
    _at_least("cs_plus", "hostile", hostile)

    def judge(seen: _Seen, memory: Memory, at: At) -> tuple[Tensor, Memory]:
        share = torch.ones_like(seen.weights)
        for d in seen.distances.values():
            last = seen.places(d) == 2 * hostile - 1
            radius = seen.sums(torch.where(last, d, 0.0))
            share = share.minimum(_clip(d, radius[seen.i]))
        return torch.where(torch.bincount(seen.i, minlength=len(seen.own))[seen.i] < 2 * hostile, 0.0, share), {}

    return _weighing(mixer, judge)


def gt_pd(
    mixer: Mixer, radius: float = 1.0, trusted: float = 0.8, untrusted_edges: float = 0.0, seed: int = 0
) -> Mixer:
    """GT-PD's two layers: clip what differs from a receiver to a ball, and drop edges between those who are far apart.

    What differs counts up to a length of `radius · min(‖x_i‖, ‖x_j‖)`. The edge is dropped if
    `‖x_j - x_i‖ > trusted · (‖x_i‖ + ‖x_j‖)`, or kept in a share `untrusted_edges` of its rounds by a draw of (seed,
    round, edge). Both ends of an edge measure the same and draw the same. So between honest clients W stays symmetric
    and doubly stochastic, and their mean stays. It assumes that liars are far off in this measure, which goes from 0 to
    1: a sign that is turned is at 1, two independent adapters are at .7. It acts with one neighbour, too.

    Source: the two layers of GT-PD (arXiv 2604.00449), of which we know the abstract; its trust is of two channels,
    decisions and tracked gradients. Here there are no tracked gradients, and both measures are ours.

    Raises:
        RecipeError: a setting is out of its range.
    """
    if not 0 < radius < inf:
        raise RecipeError(f"modifiers: gt_pd: radius is {radius}; give a number above 0")
    for name, value in (("trusted", trusted), ("untrusted_edges", untrusted_edges)):
        if not 0 <= value <= 1:
            raise RecipeError(f"modifiers: gt_pd: {name} is {value}; give a number from 0 to 1")

    def judge(seen: _Seen, memory: Memory, at: At) -> tuple[Tensor, Memory]:
        share, trusts = torch.ones_like(seen.weights), torch.ones_like(seen.i, dtype=torch.bool)
        for what, d in seen.distances.items():
            one, other = seen.sizes[what][seen.own[seen.i]], seen.sizes[what][seen.j]
            share = share.minimum(_clip(d, radius * torch.minimum(one, other)))
            trusts &= d <= trusted * (one + other)
        assert at.heard is not None, "an exchange says who was heard"
        i, j = seen.i.cpu(), seen.j.cpu()
        ends = torch.stack([at.clients[i], at.heard[j]])
        drawn = uniforms(seed, Draw.TRUST, at.round[i].numpy(), ends.amin(0).numpy(), ends.amax(0).numpy())
        kept = trusts | (torch.from_numpy(drawn).to(share.device) < untrusted_edges)
        return torch.where(kept, share, 0.0), {}

    changed = _weighing(mixer, judge)
    return changed._replace(needs=changed.needs | {"edges both ways"})


def balance(mixer: Mixer, gamma: float = 0.5, kappa: float = 1.0, *, rounds: int) -> Mixer:
    """BALANCE: mix only those who are near in proportion to the receiver's own adapter, less far as rounds go on.

    j is mixed by i in round t of T if `‖x_j - x_i‖ ≤ gamma exp(-kappa t / T) ‖x_i‖`, x all of the adapter that is sent;
    for methods that mix products, the product and the head each. Others' weight returns to the receiver. It assumes
    that honest adapters come together as training goes on, by that much, and asks nothing of the number of neighbours:
    it acts with one. Norms of A, which begin alike, are most of ‖x_i‖, so it says little of B.

    Source: BALANCE (arXiv 2406.10416), whose receiver keeps a share alpha for itself; here that is W_ii and what
    returns.

    Raises:
        RecipeError: `gamma` is not above 0, or `kappa` below 0.
    """
    if not 0 < gamma < inf:
        raise RecipeError(f"modifiers: balance: gamma is {gamma}; give a number above 0")
    if not 0 <= kappa < inf:
        raise RecipeError(f"modifiers: balance: kappa is {kappa}; give 0 or more")

    def judge(seen: _Seen, memory: Memory, at: At) -> tuple[Tensor, Memory]:
        near = torch.ones_like(seen.weights)
        mine, apart = seen.sizes, seen.distances
        if mixer.keeps_basis:
            factors = apart.keys() - {PRODUCTS, CROSS}
            mine, apart = ({"x": _together([x[what] for what in factors])} for x in (mine, apart))
        reach = gamma * torch.exp(-kappa * at.round.double() / rounds).to(near.device)
        for what, d in apart.items():
            near = torch.where(d <= (reach * mine[what][seen.own])[seen.i], near, 0.0)
        return near, {}

    return _weighing(mixer, judge)


def krum(mixer: Mixer, hostile: int = 1) -> Mixer:
    """Krum: of all that a receiver has and heard, mix the one alone that is nearest to most of them.

    Of m adapters, the receiver's own among them, each has as its score the sum of squared distances to its
    `m - hostile - 2` nearest. The lowest takes the weight of all others; of equal ones the nearest to all does.
    Distances of a kind count as shares of the median among the m. It assumes `m ≥ 2 hostile + 3`; with fewer than
    `hostile + 3` it does nothing, so with one or two neighbours it never does. On uneven data a receiver hears one
    other only. The mean of all adapters moves. Each pair that a receiver heard is compared, so its cost grows with the
    square of the neighbours.

    Source: Krum (NeurIPS 2017, Blanchard and others), whose server takes one gradient; here a receiver keeps W_ii.

    Raises:
        RecipeError: `hostile` is below 1.
    """
    _at_least("krum", "hostile", hostile)

    def weigh(
        own: Tensors, heard: Tensors, weights: Tensor, memory: Memory, at: At, phase: Phase
    ) -> tuple[Tensor, Memory]:
        used, changed = _plain(mixer, own, heard, weights, memory, at, phase)
        sent = {name: x for name, x in heard.items() if name in own}
        places = _own_places(at).to(used.device)
        chosen = places.clone()
        for receivers, senders, _ in groups(used):
            m = senders.shape[1]
            if sent and m >= hostile + 3:
                chosen[receivers] = senders[
                    torch.arange(len(senders)), _krum(sent, senders, hostile, mixer.keeps_basis)
                ]
        i, j, values = entries(used)
        acts = (torch.bincount(i, minlength=len(used)) >= hostile + 3)[i] & (j != places[i])
        return of_entries(used, i, torch.where(acts, chosen[i], j), values), changed

    return mixer._replace(weigh=weigh, needs=mixer.needs | _NEEDS)


def _krum(sent: Tensors, senders: Tensor, hostile: int, factors: bool) -> Tensor:
    """Return which of the adapters that each of G receivers has and heard, `senders [G, m]`, has the lowest score."""
    G, m = senders.shape
    one, other = (x.to(senders.device) for x in torch.triu_indices(m, m, 1))
    found, back = torch.unique(
        torch.stack([senders[:, one], senders[:, other]], -1).flatten(0, 1), dim=0, return_inverse=True
    )
    scores = senders.new_zeros(G, m, m, dtype=torch.float64)
    for d in distances(sent, *found.T, factors=factors).values():
        each = d[back].view(G, -1)
        middle = each.median(1, keepdim=True).values
        share = torch.where(middle > 0, each / middle, 0.0).square()
        scores[:, one, other] += share
        scores[:, other, one] += share
    score = scores.sort(2).values[:, :, 1 : m - hostile - 1].sum(2)
    lowest = score <= score.amin(1, keepdim=True) * (1 + 1e-9)  # two that are nearest to each other are often the same
    return torch.where(lowest, scores.sum(2), inf).argmin(1)


def trimmed_mean(mixer: Mixer, hostile: int = 1) -> Mixer:
    """Mean, entry by entry, of all that a receiver has and heard, without the `hostile` largest and smallest.

    It goes by numbers alone: weights of the graph are not used. It assumes m > 2 hostile adapters, the receiver's own
    among them. Of fewer, as many are left out at either end as leave one or two: with two neighbours it is the median,
    with one the plain mean, so that it does nothing there. The mean of all adapters moves.

    Source: Yin and others (arXiv 1803.01498), entry by entry.

    Raises:
        RecipeError: `hostile` is below 1.
    """
    _at_least("trimmed_mean", "hostile", hostile)
    return _by_entry(mixer, partial(_trimmed, hostile))


def median(mixer: Mixer) -> Mixer:
    """Median, entry by entry, of all that a receiver has and heard; of an even number the mean of the middle two.

    It goes by numbers alone: weights of the graph are not used. It assumes that most of what a receiver has and hears
    is honest. With one neighbour it is the plain mean. The mean of all adapters moves.

    Source: Yin and others (arXiv 1803.01498), entry by entry.
    """
    return _by_entry(mixer, partial(_trimmed, None))


def _trimmed(hostile: int | None, x: Tensor) -> Tensor:
    """Return the mean of `x [G, m, …]` over its second axis, without so many at either end; of None all but 1 or 2."""
    most = (x.shape[1] - 1) // 2
    out = most if hostile is None else min(hostile, most)
    return x.sort(1).values[:, out : x.shape[1] - out].mean(1)


def _by_entry(mixer: Mixer, middle: Callable[[Tensor], Tensor]) -> Mixer:
    """Return a mixer that takes the `middle` of what each receiver has and heard, `[G, m, …]` → `[G, …]`."""

    def receive(
        own: Tensors, heard: Tensors, weights: Tensor, memory: Memory, at: At, phase: Phase
    ) -> tuple[Tensors, Memory]:
        mixed, together = dict(own), list(groups(weights))
        for name in own:
            if name not in heard:
                continue
            mixed[name] = own[name].clone()
            for receivers, senders, _ in chunks(together, own[name][:1].numel(), own[name].device):
                mixed[name][receivers] = middle(heard[name][senders])
        return mixed, {}

    return mixer._replace(receive=receive, needs=mixer.needs | {"exchange", "mixing by entry", "whole messages"})


def _weighing(mixer: Mixer, judge: _Judge, init: Callable[[Tensors, At], Memory] | None = None) -> Mixer:
    """Return a mixer each of whose weights is the share of what it was that a rule leaves it."""

    def begin(adapters: Tensors, at: At) -> Memory:
        return mixer.init(adapters, at) | (init(adapters, at) if init is not None else {})

    def weigh(
        own: Tensors, heard: Tensors, weights: Tensor, memory: Memory, at: At, phase: Phase
    ) -> tuple[Tensor, Memory]:
        used, changed = _plain(mixer, own, heard, weights, memory, at, phase)
        i, j, values = entries(used)
        places = _own_places(at).to(used.device)
        others = j != places[i]
        sent = {name: x for name, x in heard.items() if name in own}
        if not sent or not bool(others.any()):
            return used, changed
        seen = _Seen(sent, places, i[others], j[others], values[others], mixer.keeps_basis)
        kept, more = judge(seen, memory, at)
        shares = torch.ones_like(values)
        shares[others] = kept.to(shares.dtype)
        return keeping(used, places, shares), changed | more

    return mixer._replace(weigh=weigh, init=begin, needs=mixer.needs | _NEEDS)


def _plain(
    mixer: Mixer, own: Tensors, heard: Tensors, weights: Tensor, memory: Memory, at: At, phase: Phase
) -> tuple[Tensor, Memory]:
    used, changed = mixer.weigh(own, heard, weights, memory, at, phase)
    assert isinstance(used, Tensor), "of weights by site no rule that looks at whole adapters knows anything"
    return used, changed


def _own_places(at: At) -> Tensor:
    """Return the receivers' places among those who were heard, `[K]`."""
    assert at.heard is not None, "an exchange says who was heard"
    return torch.searchsorted(at.heard, at.clients)


def _radius(what: str) -> str:
    return f"clipped.{what}.radius"


def _clip(d: Tensor, radius: Tensor) -> Tensor:
    """Return by what a difference of length d is to be multiplied so that it is no longer than the radius."""
    return torch.where(d <= radius, 1.0, radius / d)


def _together(norms: list[Tensor]) -> Tensor:
    return torch.stack(norms).square().sum(0).sqrt()


def _at_least(rule: str, setting: str, value: int) -> None:
    if value < 1:
        raise RecipeError(f"modifiers: {rule}: {setting} is {value}; give 1 or more, or leave {rule} out")


RULES: Mapping[str, Callable[..., Mixer]] = {
    "balance": balance,
    "clipped": clipped,
    "cs_plus": cs_plus,
    "gt_pd": gt_pd,
    "krum": krum,
    "median": median,
    "trimmed_mean": trimmed_mean,
}
"""Name in a recipe → rule."""
