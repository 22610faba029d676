"""What local steps follow, and what becomes of the adapters after the last of them."""

from math import sqrt
from typing import Literal

import torch
from torch import Tensor

from peertune.errors import RecipeError
from peertune.method import At, Gradient, Local, Memory, Phase
from peertune.types import MOMENTS, Tensors, kind, over_clients, pairs


def by_steps() -> Local:
    """Step A in even local steps and B in odd ones, counted from the run's start; a head in each of them."""

    def gradients(
        gradient: Gradient, adapters: Tensors, start: Tensors, memory: Memory, at: At, phase: Phase
    ) -> tuple[Tensors, Memory]:
        idle = "A" if int(at.step[0]) % 2 else "B"
        return {name: x for name, x in gradient(adapters).items() if kind(name) != idle}, {}

    return Local(gradients, one_step=True)


def in_links(links: int, link_rounds: int) -> Local:
    """Train B in blocks of its ranks, one after the other for `link_rounds` rounds each, the last one to the end.

    Of rank r the blocks are `[l r / links, (l + 1) r / links)`. Gradients are taken where all other blocks are what the
    round began with, and so they are after it. A block's steps begin with fresh moments.

    Raises:
        RecipeError: a client has fewer ranks than there are links.
    """

    def init(adapters: Tensors, at: At) -> Memory:
        lowest = min((x.shape[-1] for name, x in adapters.items() if kind(name) == "B"), default=links)
        if lowest < links:
            raise RecipeError(f"algorithm.links: {links} links of rank {lowest}; give at most {lowest}, or more ranks")
        return {}

    def block(at: At, r: int, x: Tensor) -> Tensor:
        """Return which ranks train now, `[K, 1, r]`."""
        link = (at.round // link_rounds).clamp(max=links - 1)[:, None]
        ranks = torch.arange(r)
        return ((link * r // links <= ranks) & (ranks < (link + 1) * r // links))[:, None].to(x.device)

    def only_block(start: Tensors, adapters: Tensors, at: At) -> Tensors:
        return {
            name: torch.where(block(at, x.shape[-1], x), adapters[name], x)
            for name, x in start.items()
            if kind(name) == "B"
        }

    def gradients(
        gradient: Gradient, adapters: Tensors, start: Tensors, memory: Memory, at: At, phase: Phase
    ) -> tuple[Tensors, Memory]:
        found = gradient(adapters | only_block(start, adapters, at))
        return {name: x * block(at, x.shape[-1], x) if kind(name) == "B" else x for name, x in found.items()}, {}

    def end(start: Tensors, adapters: Tensors, memory: Memory, at: At, phase: Phase) -> tuple[Tensors, Memory]:
        ends = ((at.round + 1) % link_rounds == 0) & ((at.round + 1) // link_rounds < links)
        of_b = {name: x for name, x in memory.items() if name.startswith(MOMENTS) and "B" in name.split(".")[-2:]}
        fresh = {
            name: torch.where(over_clients(ends.to(x.device), x), torch.zeros_like(x), x) for name, x in of_b.items()
        }
        return only_block(start, adapters, at), fresh

    return Local(gradients, end, keeps_start=True, init=init)


def turned_back(strength: float | Literal["hard"]) -> Local:
    """Turn each client's trained pair, after its last local step, towards the pair with which its round began.

    `A ← R A`, `B ← B Rᵀ` leaves `B A` as it is. With A' and B' of the round's start, odd rounds take `M = A' Aᵀ` and
    even ones `M = B'ᵀ B`; the rotation nearest to M (`U Vᵀ` of `M = U S Vᵀ`, det +1) brings A nearest to A', or B to
    B'. R is the rotation nearest to `(1 - strength) I + strength · that`. With "hard" it is `U Vᵀ` itself, which may be
    a reflection. Round 0 turns nothing, and a pair that did not move stays bit for bit. Directions in which M vanishes
    say nothing about a rotation, and are turned as little as can be.

    **What bounds it.** R is orthogonal whatever M is, so each factor's norm and the product stay. Only which rotation
    it is follows from the round's start, and so from what was heard.
    """

    def end(start: Tensors, adapters: Tensors, memory: Memory, at: At, phase: Phase) -> tuple[Tensors, Memory]:
        moved: Tensors = {}
        for a, b in pairs(start):
            A, B, first_A, first_B = adapters[a], adapters[b], start[a], start[b]
            # The r x r algebra is cheap, so it runs in float64: the factors' own rounding then is the only one.
            by_A, by_B = first_A.double() @ A.double().mT, first_B.double().mT @ B.double()  # [K, r, r]
            odd = (at.round % 2 == 1).to(A.device)[:, None, None]
            R = _nearest(torch.where(odd, by_A, by_B), strength).to(A.dtype)
            still = ((first_A == A).flatten(1).all(1) & (first_B == B).flatten(1).all(1))[:, None, None]
            still |= (at.round == 0).to(A.device)[:, None, None]
            moved |= {a: torch.where(still, A, R @ A), b: torch.where(still, B, B @ R.mT)}
        return moved, {}

    return Local(end=end, keeps_start=True)


def _nearest(M: Tensor, strength: float | Literal["hard"]) -> Tensor:
    """Return R `[K, r, r]` for the inner products M `[K, r, r]`."""
    M = M / torch.linalg.matrix_norm(M, keepdim=True).clamp(min=torch.finfo(M.dtype).tiny)
    if strength == "hard":
        return _orthogonal(M, reflections=True)
    identity = torch.eye(M.shape[-1], dtype=M.dtype, device=M.device)
    return _orthogonal(torch.lerp(identity, _orthogonal(M), strength))


def _orthogonal(M: Tensor, reflections: bool = False) -> Tensor:
    """Return the rotation R that maximises `tr(Rᵀ M)` for M `[…, r, r]` of entries about 1, the least one of several.

    With `reflections` these count as well. A small multiple of the identity added to M decides in the directions where
    M vanishes. √eps lies far above M's rounding and far below the singular values that matter.
    """
    identity = torch.eye(M.shape[-1], dtype=M.dtype, device=M.device)
    U, _, Vh = torch.linalg.svd(M + sqrt(torch.finfo(M.dtype).eps) * identity)
    if not reflections:
        U[..., -1] *= torch.linalg.det(U @ Vh).sign()[..., None]  # it turns back in its weakest direction
    R: Tensor = U @ Vh
    return R
