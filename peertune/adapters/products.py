"""The products of frozen layers and of the clients' factors at them, together for the layers that read one input.

An attention's query, key and value read the same vectors. One function of PyTorch's autograd makes the products of all
of them, and in the backward pass adds up in one place what each contributes to the gradient of their input: fewer calls
in small bases, fewer passes over memory in large ones.
"""

from collections.abc import Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from transformers.pytorch_utils import Conv1D

PLAIN = (nn.Linear, Conv1D)
"""Layers whose weight may be multiplied with; others keep it in a form of their own."""


class Part(NamedTuple):
    """A layer, and the clients' factors at it where it carries such."""

    layer: nn.Module
    scaling: float = 0.0
    A: Tensor | None = None  # [K, r, d_in]
    B: Tensor | None = None  # [K, d_out, r]
    dropped: Tensor | None = None  # what A reads, where that isn't what the layer reads

    @property
    def r(self) -> int:
        """The factors' rank; 0 without factors."""
        return 0 if self.A is None else self.A.shape[1]


def products(x: Tensor, own: Tensor | None, parts: Sequence[Part], each: int | None = None) -> tuple[Tensor, ...]:
    """Return what each layer makes of `x [b, …, d_in]`, with its clients' factors: `[b, …, d_out]` each.

    Where vectors lie client by client, `each` of each, they meet their own client's factors alone, in one batched
    product. Elsewhere every vector meets all K clients' factors in two plain products, and only its own client's r
    columns are kept, those in which `own [vectors, K r]` is 1 (None: all are its own). For the few clients that share a
    pass this is faster than gathering factors, and their gradients add up inside a product. Factors are cast to the
    base's precision here, so that gradients arrive in the adapter's own.
    """
    if all(type(part.layer) in PLAIN for part in parts):
        if not torch.is_grad_enabled():
            return tuple(_without_gradient(x, own, part, each) for part in parts)
        given = [x for part in parts for x in part[2:]]
        found: tuple[Tensor, ...] = _Products.apply(x, own, each, [part[:2] for part in parts], *given)  # type: ignore[no-untyped-call]
        return found
    return tuple(_by_autograd(x, own, part, each) for part in parts)


def _by_autograd(x: Tensor, own: Tensor | None, part: Part, each: int | None) -> Tensor:
    flat = x.flatten(0, -2)
    y: Tensor = part.layer(flat)
    if part.A is not None and part.B is not None:
        a, b = _flat(part.A, part.B, x.dtype, each)
        z = _times(flat if part.dropped is None else part.dropped.flatten(0, -2), a.mT)
        y = y + part.scaling * _times(z if own is None else z * own, b)  # the layer may keep what it returned
    return y.view(*x.shape[:-1], -1)


def _without_gradient(x: Tensor, own: Tensor | None, part: Part, each: int | None) -> Tensor:
    """Add the update of one client to the weight, where that costs less than to add it to what comes out.

    In half precision it would round the weight, so there it is not done.
    """
    layer, vectors = part.layer, x[..., 0].numel()
    exact = x.dtype in (torch.float32, torch.float64)
    if (
        own is None
        and each is None
        and exact
        and vectors > x.shape[-1]
        and part.A is not None
        and part.B is not None
        and part.dropped is None
    ):
        weight = torch.addmm(_weight(layer), part.B[0].to(x.dtype), part.A[0].to(x.dtype), alpha=part.scaling)
        return nn.functional.linear(x, weight, layer.bias)  # type: ignore[arg-type]
    return _by_autograd(x, own, part, each)


def _flat(A: Tensor, B: Tensor, dtype: torch.dtype, each: int | None) -> tuple[Tensor, Tensor]:
    """Return the factors as `[K r, d_in]` and `[K r, d_out]`; where each vector meets its own client's, by client."""
    a, b = A.to(dtype), B.to(dtype).mT
    return (a.flatten(0, 1), b.flatten(0, 1)) if each is None else (a, b)


def _times(x: Tensor, w: Tensor) -> Tensor:
    """Return `x [vectors, m]` times `w [m, n]`, or times `[K, m, n]`, each client's vectors with its own."""
    return x @ w if w.dim() == 2 else (x.view(len(w), -1, x.shape[-1]) @ w).flatten(0, 1)


def _add_times(y: Tensor, x: Tensor, w: Tensor, alpha: float = 1.0) -> None:
    """Add the same to `y [vectors, n]`, **in place**."""
    if w.dim() == 2:
        y.addmm_(x, w, alpha=alpha)
    else:
        y.view(len(w), -1, y.shape[-1]).baddbmm_(x.view(len(w), -1, x.shape[-1]), w, alpha=alpha)


def _over_vectors(x: Tensor, y: Tensor, clients: int, each: int | None) -> Tensor:
    """Return the sum over each client's vectors of their outer products, `[K, n, m]` of `[vectors, n]`, `[vectors, m]`.

    Without `each`, n is K r, and all but its own columns of a vector are 0.
    """
    if each is None:
        return (x.T @ y).view(clients, -1, y.shape[-1])
    return x.view(clients, each, -1).mT @ y.view(clients, each, -1)


def _weight(layer: Any) -> Tensor:
    """Return a layer's weight, `[d_out, d_in]`."""
    weight: Tensor = layer.weight.T if type(layer) is Conv1D else layer.weight
    return weight


class _Products(torch.autograd.Function):
    """What `products` returns: of `x`, `own`, each part's layer and scaling, and each part's A, B and `dropped`."""

    @staticmethod
    def forward(
        ctx: Any, x: Tensor, own: Tensor | None, each: int | None, layers: Any, *given: Tensor | None
    ) -> tuple[Tensor, ...]:
        flat, ys, kept = x.flatten(0, -2), [], []
        for place, (layer, scaling) in enumerate(layers):
            A, B, dropped = given[3 * place : 3 * place + 3]
            y, z = layer(flat), None
            if A is not None and B is not None:
                a, b = _flat(A, B, x.dtype, each)
                z = _times(flat if dropped is None else dropped.flatten(0, -2), a.mT)
                _add_times(y, z if own is None else z.mul_(own), b, alpha=scaling)
            ys.append(y.view(*x.shape[:-1], -1))
            kept += [A, B, x if dropped is None else dropped, z]
        ctx.save_for_backward(own, *kept)
        ctx.layers, ctx.each = layers, each
        ctx.own_source = [dropped is None for dropped in given[2::3]]
        return tuple(ys)

    @staticmethod
    def backward(ctx: Any, *slopes: Tensor) -> Any:
        own, *kept = ctx.saved_tensors
        dx, found = None, list[Tensor | None]()
        for place, ((layer, scaling), slope) in enumerate(zip(ctx.layers, slopes, strict=True)):
            A, B, source, z = kept[4 * place : 4 * place + 4]
            of_A, of_B, of_dropped = ctx.needs_input_grad[4 + 3 * place : 7 + 3 * place]
            g, shape = slope.flatten(0, -2), source.shape
            if ctx.needs_input_grad[0]:
                dx = g @ _weight(layer) if dx is None else dx.addmm_(g, _weight(layer))
            if A is None:
                found += [None, None, None]
                continue
            a, b = _flat(A, B, g.dtype, ctx.each)
            dz = _times(g, b.mT).mul_(scaling)
            dz = dz if own is None else dz.mul_(own)
            dB = _over_vectors(z, g, len(B), ctx.each).mul_(scaling).mT.to(B.dtype) if of_B else None
            dA = _over_vectors(dz, source.flatten(0, -2), len(A), ctx.each).to(A.dtype) if of_A else None
            if ctx.own_source[place] and dx is not None:
                _add_times(dx, dz, a)
            found += [dA, dB, _times(dz, a).view(shape) if of_dropped else None]
        return (None if dx is None else dx.view(shape), None, None, None, *found)
