"""What may be mixed: how far what was heard may lie beyond what its receiver has.

A linear layer that carries a stack computes `W0 x + s B A x`. So what mixing would do to a receiver i that hears j is
bounded site by site, each number against the receiver's own:

- the norm of each factor that was heard, `‖A_j‖` and `‖B_j‖`, and of each part of a trained head;
- the products that a mix of the two is made of, `s ‖B_i A_j‖`, `s ‖B_j A_i‖` and `s ‖B_j A_j‖`: the product of any mean
  of the two pairs is a mean of these and of the receiver's own.

A product's norm alone does not see `B = 0` beside a huge A, nor a change of coordinates `(B M, M⁻¹ A)`; the factors'
norms alone do not see how large a product is beside the layer. What is below a floor counts as the floor: a
product has SHARE of the frozen layer's `‖W0‖`, A its norm at the start, `sqrt(r / 3)`, B the norm that gives a product
as large as the floor with such an A, and a head what the base has. (All norms are Frobenius's.)

Products are never formed: `‖B A‖² = tr(BᵀB AAᵀ)`, of r × r matrices. Sums are in float64, and something passes only if
`value <= bound` is true, so NaN and what overflows don't.

What mixing came to is judged once more, as if it were heard (`rounds.mixing`). A mix of several holds products of one's
B with another's A, which are not looked at pair by pair.

Where ranks differ, two pairs meet in the rows of A and the columns of B that both have: `B_i A_j` is of these.

Pure functions of adapters of R receivers, of H who were heard, each by stacks, and E pairs of them.
"""

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from itertools import product
from math import sqrt
from typing import NamedTuple

import torch
from torch import Tensor

from peertune.rounds.slices import everyones
from peertune.types import Stack, Tensors, by_site, kind

FAR = 100.0
"""How many times the receiver's own something may be, at most."""
NEAR = 30.0
"""How many times it may be if the others who were heard don't have as much."""
SHARE = 1.0
"""What share of the frozen layer's norm a product may be in any case, before one of these factors."""
VOICES = 3
"""Of how many, the receiver among them, the median says what the others have: of fewer, one that lies could be it."""

Stacks = Sequence[Stack]

_CHUNK_FLOATS = 2**22  # Gram matrices gathered at once


class Refusal(NamedTuple):
    """Something that isn't mixed."""

    receiver: int  # its place among the receivers
    sender: int  # its place among those who were heard
    why: str


@dataclass(frozen=True)
class Bound:
    """What the numbers are held against; made with the job."""

    layers: Mapping[str, tuple[float, float]]  # ‖W0‖ and s by site, or by a head's part without its kind
    sound: Callable[[Tensors], Tensor] | None = None  # whose signals are within their range, `[H, …]` → `[H]`


class _Measure(NamedTuple):
    what: str
    value: Tensor  # [E], of what was heard
    own: Tensor  # [E], of the receiver
    floor: float


def refused(bound: Bound, own: Stacks, heard: Stacks, receivers: Tensor, senders: Tensor) -> list[Refusal]:
    """Return which of the pairs `receivers [E]`, `senders [E]` are too far apart, by the receiver's own state.

    `own` holds all of the receivers' adapters, `heard` what was sent: some kinds, and signals.
    """
    found = []
    if bound.sound is not None:
        sounds = [Stack(rows, {"sound": bound.sound(tensors)}) for rows, tensors in heard]
        unsound = ~everyones(sounds, ["sound"])["sound"][senders]
        why = "what travels beside the adapters is out of its range"
        found = [Refusal(i, j, why) for i, j in _pairs(receivers, senders, unsound)]
        receivers, senders = receivers[~unsound], senders[~unsound]
    edges = _suspects(bound, own, heard, receivers, senders, FAR).nonzero()[:, 0]
    if len(edges):
        receivers, senders = receivers[edges], senders[edges]
        worst = _Worst(len(edges), receivers.device)
        for measure in _measures(bound, own, heard, receivers, senders):
            worst.add(measure, FAR, measure.own.clamp(min=measure.floor))
        found += worst.refusals(receivers, senders)
    return found


def apart(bound: Bound, own: Stacks, heard: Stacks, receivers: Tensor, senders: Tensor) -> list[Refusal]:
    """Return which of the pairs are farther apart than both the receiver's own and what the others have allow.

    What the others have is the median of what a receiver and all that it heard hold, where these are three or more.
    `receivers [E]` and `senders [E]` are all pairs that would be mixed.
    """
    voices = torch.bincount(receivers) + 1
    suspects = _suspects(bound, own, heard, receivers, senders, NEAR) & (voices >= VOICES)[receivers]
    if not suspects.any():
        return []
    rows, edges = torch.unique(receivers[suspects]), torch.isin(receivers, receivers[suspects]).nonzero()[:, 0]
    receivers, senders = receivers[edges], senders[edges]
    place = torch.searchsorted(rows, receivers)
    worst = _Worst(len(edges), receivers.device)
    for measure in _measures(bound, own, heard, receivers, senders):
        least = measure.own.clamp(min=measure.floor)
        if not bool((measure.value <= NEAR * least).all()):
            worst.add(measure, NEAR, least.maximum(_medians(measure, place)[place]))
    return worst.refusals(receivers, senders)


def largest(bound: Bound, own: Stacks, heard: Stacks, receivers: Tensor, senders: Tensor) -> dict[str, float]:
    """Return how many times a receiver's own, or the floor, the pairs come to: by kind, and for `products`."""
    found: dict[str, float] = {}
    for measure in _measures(bound, own, heard, receivers, senders) if len(receivers) else ():
        what = "products" if ": " in measure.what else kind(measure.what)
        times = float((measure.value / measure.own.clamp(min=measure.floor)).max())
        found[what] = max(found.get(what, 0.0), times)
    return found


class _Worst:
    """By how much each of E pairs goes beyond a bound, and in what."""

    def __init__(self, pairs: int, device: torch.device) -> None:
        self.ratio = torch.zeros(pairs, dtype=torch.float64, device=device)
        self.beyond = torch.zeros(pairs, dtype=torch.bool, device=device)
        self.value, self.most = self.ratio.clone(), self.ratio.clone()
        self.at = torch.zeros(pairs, dtype=torch.int64, device=device)
        self.names: list[str] = []

    def add(self, measure: _Measure, times: float, than: Tensor) -> None:
        """Hold a measure against so many times what is allowed for, `[E]`."""
        most = times * than
        self.beyond |= ~((measure.value <= most) & measure.value.isfinite())
        ratio = (measure.value / most).nan_to_num(nan=torch.inf, posinf=torch.inf)
        more = ratio > self.ratio
        for kept, new in ((self.ratio, ratio), (self.value, measure.value), (self.most, most)):
            kept[more] = new[more]
        self.at[more] = len(self.names)
        self.names.append(measure.what)

    def refusals(self, receivers: Tensor, senders: Tensor) -> list[Refusal]:
        """Return the pairs that go beyond it."""
        places = self.beyond.nonzero()[:, 0]
        parts = (receivers, senders, self.at, self.value, self.most)
        return [
            Refusal(i, j, f"{self.names[at]} is {value:.3g}, and {most:.3g} is the most that is mixed here")
            for i, j, at, value, most in zip(*(x[places].tolist() for x in parts), strict=True)
        ]


def _pairs(receivers: Tensor, senders: Tensor, chosen: Tensor) -> list[tuple[int, int]]:
    return list(zip(receivers[chosen].tolist(), senders[chosen].tolist(), strict=True))


def _suspects(bound: Bound, own: Stacks, heard: Stacks, receivers: Tensor, senders: Tensor, times: float) -> Tensor:
    """Return which pairs `[E]` may go beyond so many times what the receiver has; the others don't.

    It takes the norms of factors only: `‖B_i A_j‖ ≤ ‖B_i‖ ‖A_j‖`. These are summed in the factors' own precision, in a
    tenth of the time, so a pair that comes within 1 % of a limit is a suspect, as is what overflows. Where the largest
    norm that was heard is below the least that any receiver allows, no pair is looked at.
    """
    suspects, times = torch.zeros_like(receivers, dtype=torch.bool), 0.99 * times
    if not len(suspects):  # where nobody is heard: a process whose clients are all down
        return suspects
    for site in _sites(bound, own, heard):
        mine = {of: _norms(x, None) for of, x in site.own.items()}
        came = {of: mine[of] if _same(x, site.own[of]) else _norms(x, None) for of, x in site.heard.items()}
        product = times * site.floors["BA"] / site.scaling
        for of, norm in came.items():
            most = times * mine[of].clamp(min=site.floors[of])
            if (other := {"A": "B", "B": "A"}.get(of)) in mine:
                most = most.minimum(product / mine[other])
            if not bool(norm.max() <= most.min()):
                suspects |= ~(norm[senders] <= most[receivers])
        if came.keys() >= _PAIR and not bool((small := came["A"] * came["B"] <= product).all()):
            suspects |= ~small[senders]
    return suspects


def _measures(bound: Bound, own: Stacks, heard: Stacks, receivers: Tensor, senders: Tensor) -> Iterator[_Measure]:
    """Yield all that is bounded, of each pair."""
    rows, i = receivers.unique(return_inverse=True)
    columns, j = senders.unique(return_inverse=True)
    for site in _sites(bound, own, heard):
        for of, x in site.heard.items():
            mine = _norms(_of(site.own[of], rows))[i]
            yield _Measure(f"{site.name}.{of}", _norms(_of(x, columns))[j], mine, site.floors[of])
        if not site.own.keys() >= _PAIR:
            continue
        here = {of: [(at, _gram(x, of)) for at, x in _of(factor, rows)] for of, factor in site.own.items()}
        there = {of: [(at, _gram(x, of)) for at, x in _of(factor, columns)] for of, factor in site.heard.items()}
        all_rows = torch.arange(len(rows), device=rows.device)
        product = site.scaling * _product(here["B"], here["A"], all_rows, all_rows)[i]
        for left, right, at, to in ((here, there, i, j), (there, here, j, i), (there, there, j, j)):
            if "B" in left and "A" in right:
                names = ["i" if side is here else "j" for side in (left, right)]
                value = site.scaling * _product(left["B"], right["A"], at, to)
                yield _Measure(f"{site.name}: B_{names[0]} A_{names[1]}", value, product, site.floors["BA"])


_PAIR = {"A", "B"}


_Factor = Sequence[tuple[Tensor, Tensor]]
"""A kind of a site, by stack: rows `[P]`, and `[P, …]`."""


class _Site(NamedTuple):
    name: str
    scaling: float
    own: Mapping[str, _Factor]  # by kind: both factors, or the part of a head
    heard: Mapping[str, _Factor]  # by kind, of those that were sent
    floors: dict[str, float]  # by kind, and of the scaled product BA


def _sites(bound: Bound, own: Stacks, heard: Stacks) -> Iterator[_Site]:
    """Yield each site, or part of a head, of which something was sent."""
    for tensors in by_site(own[0].tensors):
        mine, came = (
            {kind(name): [(rows, x[name]) for rows, x in stacks] for name in tensors if name in stacks[0].tensors}
            for stacks in (own, heard)
        )
        if not came:
            continue
        name = next(iter(tensors)).rpartition(".")[0]
        norm, scaling = bound.layers[name]
        floors = {"head": norm, "BA": SHARE * norm}
        if "A" in mine:
            start = sqrt(max(x.shape[1] for _, x in mine["A"]) / 3)
            floors |= {"A": start, "B": sqrt(3) * SHARE * norm / scaling}
        yield _Site(name, scaling, mine, came, floors)


def _same(one: _Factor, other: _Factor) -> bool:
    """Return whether two are the same tensors."""
    return len(one) == len(other) and all(x is y for (_, x), (_, y) in zip(one, other, strict=True))


def _norms(factor: _Factor, dtype: torch.dtype | None = torch.float64) -> Tensor:
    """Return the norms `[K]` of all clients in float64, summed in this type, or in the factor's own."""
    parts = [Stack(rows, {"": torch.linalg.vector_norm(x.flatten(1), dim=1, dtype=dtype)}) for rows, x in factor]
    return everyones(parts, [""])[""].double()


def _of(factor: _Factor, wanted: Tensor) -> list[tuple[Tensor, Tensor]]:
    """Return what these clients have, ascending, in the order in which they stand."""
    if len(factor) == 1:
        return [(torch.arange(len(wanted)), factor[0][1][wanted])]
    found = []
    for rows, x in factor:
        places = torch.isin(wanted.cpu(), rows).nonzero()[:, 0]
        found.append((places, x[torch.searchsorted(rows, wanted.cpu()[places])]))
    return found


def _gram(x: Tensor, of: str) -> Tensor:
    """Return `A Aᵀ` or `Bᵀ B`, `[K, r, r]` in float64."""
    x = x.double()
    return x @ x.mT if of == "A" else x.mT @ x


def _product(B: _Factor, A: _Factor, at: Tensor, to: Tensor) -> Tensor:
    """Return `‖B_at A_to‖` for each pair of places `[E]`, of the Gram matrices of these factors.

    Of two ranks it is the product of the columns and rows that both have.
    """
    found = torch.zeros(len(at), dtype=torch.float64, device=at.device)
    for (left, gram_B), (right, gram_A) in product(B, A):
        left, right, m = left.to(at.device), right.to(at.device), min(gram_B.shape[1], gram_A.shape[1])
        for some in (torch.isin(at, left) & torch.isin(to, right)).nonzero()[:, 0].split(max(1, _CHUNK_FLOATS // m**2)):
            i, j = torch.searchsorted(left, at[some]), torch.searchsorted(right, to[some])
            found[some] = (gram_B[i, :m, :m] * gram_A[j, :m, :m]).sum((1, 2))
    return found.clamp(min=0).sqrt()  # rounding may leave it below 0; NaN stays


def _medians(measure: _Measure, place: Tensor) -> Tensor:
    """Return by receiver the lower median of what it has and what it heard; pair e is of the one at `place[e]`."""
    rows = int(place.max()) + 1
    own = measure.value.new_zeros(rows).index_copy(0, place, measure.own)
    values = torch.cat([own, measure.value])
    places = torch.cat([torch.arange(rows, device=place.device), place])
    order = values.argsort()
    order = order[places[order].argsort(stable=True)]
    counts = torch.bincount(places)
    return values[order][counts.cumsum(0) - counts + (counts - 1) // 2]
