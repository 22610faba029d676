"""Rank slices: what clients whose ranks differ have in common.

Who has a higher rank has further rows of A and columns of B. Cut at all the ranks that there are, a site falls into
slices, each of which some clients have, and for these it is a site like any other: `[P, hi - lo, d_in]` and
`[P, d_out, hi - lo]`. So what is defined for a site, averages and consensus errors, is defined for clients of several
ranks. Where all have one rank, a site is its only slice, and nothing is cut or copied.
"""

from collections.abc import Collection, Iterator, Sequence
from typing import NamedTuple

import torch
from torch import Tensor

from peertune.types import ALONE, Group, Stack, Tensors, by_site, in_order, kind, select

AXES = {"A": 1, "B": -1}
"""Factor → the axis of its ranks in a stack."""


class Slice(NamedTuple):
    """A rank slice of a site, whole or not."""

    names: Sequence[str]  # of the site's tensors
    lo: int
    hi: int | None  # None: whole, however large
    left: int = 1  # how many sites there are from this one on

    def of(self, name: str, x: Tensor) -> Tensor:
        """Return this part of a tensor `[P, …]` of the site, in the same memory; nothing of what ends before it."""
        if self.hi is None or kind(name) not in AXES:
            return x
        ranks = slice(self.lo, self.hi)
        return x[:, ranks] if kind(name) == "A" else x[..., ranks]

    def cut(self, stacks: Sequence[Stack]) -> Stack:
        """Return this part of some clients' adapters, of those who have it, in the same memory where one stack has it.

        What the stacks lack, such as kinds that were not sent, is left out; of a slice that nobody has here `P` is 0.
        """
        names = [name for name in self.names if stacks and name in stacks[0].tensors]
        held = [stack for stack in stacks if names and (self.hi is None or rank(stack.tensors, names) >= self.hi)]
        if not held:
            return Stack(
                torch.zeros(0, dtype=torch.int64), {name: self._none(stacks[0].tensors, name) for name in names}
            )
        rows = in_order((stack.rows, stack.rows) for stack in held)
        return Stack(
            rows, {name: in_order((own, self.of(name, tensors[name])) for own, tensors in held) for name in names}
        )

    def _none(self, tensors: Tensors, name: str) -> Tensor:
        """Return this part of a tensor of no client."""
        assert self.hi is not None, "what is whole, all have"
        return of_rank({name: tensors[name]}, self.hi - self.lo)[name][:0]


def rank(tensors: Tensors, names: Collection[str]) -> int:
    """Return the rank of a site, by its factors among these names; of a head, which has none, one above all."""
    found = (tensors[name].shape[AXES[kind(name)]] for name in names if kind(name) in AXES)
    return next(found, 2**62)


def slices(stacks: Sequence[Stack], cuts: Sequence[int] = ()) -> Iterator[Slice]:
    """Yield the slices of each site of some clients' adapters, cut at these ranks; whole ones where there are none.

    Those beyond the ranks of these clients are among them: clients of other processes have them.
    """
    groups = by_site(stacks[0].tensors) if stacks else []
    for left, site in zip(range(len(groups), 0, -1), groups, strict=True):
        names, ranks = list(site), {rank(stack.tensors, site) for stack in stacks}
        if not cuts or max(ranks) == 2**62:
            yield Slice(names, 0, None, left)
            continue
        ends = sorted({*cuts, *ranks})
        for lo, hi in zip([0, *ends], ends, strict=False):
            yield Slice(names, lo, hi, left)


def chosen(stacks: Sequence[Stack], kinds: Collection[str]) -> list[Stack]:
    """Keep the tensors of these kinds; nothing where there are none."""
    found = [Stack(rows, select(tensors, kinds)) for rows, tensors in stacks]
    return [stack for stack in found if stack.tensors]


def filled(stacks: Sequence[Stack], names: Sequence[str], r: int) -> Tensors:
    """Return a site of all clients of these stacks `[H, …]`, with zeros up to rank r."""
    clients, found = sum(len(stack.rows) for stack in stacks), dict[str, Tensor]()
    for name in names:
        for rows, tensors in stacks:
            x = tensors[name]
            if name not in found:
                found[name] = x.new_zeros(_shape(name, x, clients, r))
            Slice([name], 0, rank(tensors, [name])).of(name, found[name])[rows.to(x.device)] = x
    return found


def of_rank(adapters: Tensors, r: int) -> Tensors:
    """Return one client's adapter `[1, …]` as such a client of another rank has it, of zeros."""
    return {name: x.new_zeros(_shape(name, x, 1, r)) for name, x in adapters.items()}


def _shape(name: str, x: Tensor, clients: int, r: int) -> list[int]:
    """Return the shape that a tensor of so many clients of rank r has, where `x` is of others."""
    shape = [clients, *x.shape[1:]]
    if kind(name) in AXES:
        shape[AXES[kind(name)]] = r
    return shape


def everyones(stacks: Sequence[Stack], names: Collection[str]) -> Tensors:
    """Return tensors that have the same shape in all stacks, of all clients, `[H, …]`."""
    return {name: in_order((rows, tensors[name]) for rows, tensors in stacks) for name in names}


def average(stacks: Sequence[Stack], group: Group = ALONE, cuts: Sequence[int] = ()) -> Tensors:
    """Return the mean of the clients' adapters, factor by factor, `[…]`.

    Where ranks differ, as `cuts` say, each rank slice is averaged over those who have it, so the mean has the highest
    rank: among clients who agree on what they have in common, it is what those of the highest rank have.
    """
    if not cuts and len(stacks) == 1:
        return {name: group.mean(x) for name, x in stacks[0].tensors.items()}
    found: dict[str, list[Tensor]] = {}
    for part in slices(stacks, cuts or sorted({rank(tensors, tensors) for _, tensors in stacks})):
        own = part.cut(stacks)
        if group.add(torch.tensor(len(own.rows))):
            for name, x in own.tensors.items():
                found.setdefault(name, []).append(group.mean(x))
    return {name: torch.cat(xs, -1 if kind(name) == "B" else 0) if len(xs) > 1 else xs[0] for name, xs in found.items()}
