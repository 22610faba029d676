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


def products(x: Tensor, own: Tensor | None, parts: Sequence[Part]) -> tuple[Tensor, ...]:
    """Return what each layer makes of `x [b, …, d_in]`, with its clients' factors: `[b, …, d_out]` each.

    Every vector meets all K clients' factors in two plain products, and only its own client's r columns are kept, those
    in which `own [vectors, K r]` is 1 (None: all are its own). For the few clients that share a pass this is faster
    than gathering factors, and their gradients add up inside a product. Factors are cast to the base's precision here,
    so that gradients arrive in the adapter's own.
    """
    if all(type(part.layer) in PLAIN for part in parts):
        if not torch.is_grad_enabled():
            return tuple(_without_gradient(x, own, part) for part in parts)
        given = [x for part in parts for x in part[2:]]
        found: tuple[Tensor, ...] = _Products.apply(x, own, [part[:2] for part in parts], *given)  # type: ignore[no-untyped-call]
        return found
    return tuple(_by_autograd(x, own, part) for part in parts)


def _by_autograd(x: Tensor, own: Tensor | None, part: Part) -> Tensor:
    flat = x.flatten(0, -2)
    y: Tensor = part.layer(flat)
    if part.A is not None and part.B is not None:
        a, b = _flat(part.A, part.B, x.dtype)
        z = (flat if part.dropped is None else part.dropped.flatten(0, -2)) @ a.T
        y = y.addmm(z if own is None else z * own, b, alpha=part.scaling)  # the layer may keep what it returned
    return y.view(*x.shape[:-1], -1)


def _without_gradient(x: Tensor, own: Tensor | None, part: Part) -> Tensor:
    """Add the update of one client to the weight, where that costs less than to add it to what comes out.

    In half precision it would round the weight, so there it is not done.
    """
    layer, vectors = part.layer, x[..., 0].numel()
    exact = x.dtype in (torch.float32, torch.float64)
    if (
        own is None
        and exact
        and vectors > x.shape[-1]
        and part.A is not None
        and part.B is not None
        and part.dropped is None
    ):
        weight = torch.addmm(_weight(layer), part.B[0].to(x.dtype), part.A[0].to(x.dtype), alpha=part.scaling)
        return nn.functional.linear(x, weight, layer.bias)  # type: ignore[arg-type]
    return _by_autograd(x, own, part)


def _flat(A: Tensor, B: Tensor, dtype: torch.dtype) -> tuple[Tensor, Tensor]:
    """Return the factors as `[K r, d_in]` and `[K r, d_out]`."""
    return A.to(dtype).flatten(0, 1), B.to(dtype).mT.flatten(0, 1)


def _weight(layer: Any) -> Tensor:
    """Return a layer's weight, `[d_out, d_in]`."""
    weight: Tensor = layer.weight.T if type(layer) is Conv1D else layer.weight
    return weight


class _Products(torch.autograd.Function):
    """What `products` returns: of `x`, `own`, each part's layer and scaling, and each part's A, B and `dropped`."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, own: Tensor | None, layers: Any, *given: Tensor | None) -> tuple[Tensor, ...]:
        flat, ys, kept = x.flatten(0, -2), [], []
        for place, (layer, scaling) in enumerate(layers):
            A, B, dropped = given[3 * place : 3 * place + 3]
            y, z = layer(flat), None
            if A is not None and B is not None:
                a, b = _flat(A, B, x.dtype)
                z = (flat if dropped is None else dropped.flatten(0, -2)) @ a.T
                y.addmm_(z if own is None else z.mul_(own), b, alpha=scaling)
            ys.append(y.view(*x.shape[:-1], -1))
            kept += [A, B, x if dropped is None else dropped, z]
        ctx.save_for_backward(own, *kept)
        ctx.layers = layers
        ctx.own_source = [dropped is None for dropped in given[2::3]]
        return tuple(ys)

    @staticmethod
    def backward(ctx: Any, *slopes: Tensor) -> Any:
        own, *kept = ctx.saved_tensors
        dx, found = None, list[Tensor | None]()
        for place, ((layer, scaling), slope) in enumerate(zip(ctx.layers, slopes, strict=True)):
            A, B, source, z = kept[4 * place : 4 * place + 4]
            of_A, of_B, of_dropped = ctx.needs_input_grad[3 + 3 * place : 6 + 3 * place]
            g, shape = slope.flatten(0, -2), source.shape
            if ctx.needs_input_grad[0]:
                dx = g @ _weight(layer) if dx is None else dx.addmm_(g, _weight(layer))
            if A is None:
                found += [None, None, None]
                continue
            a, b = _flat(A, B, g.dtype)
            dz = torch.mm(g, b.T).mul_(scaling)
            dz = dz if own is None else dz.mul_(own)
            dB = (z.T @ g).mul_(scaling).view(len(B), -1, g.shape[-1]).mT.to(B.dtype) if of_B else None
            dA = (dz.T @ source.flatten(0, -2)).view_as(A).to(A.dtype) if of_A else None
            if ctx.own_source[place] and dx is not None:
                dx.addmm_(dz, a)
            found += [dA, dB, (dz @ a).view(shape) if of_dropped else None]
        return (None if dx is None else dx.view(shape), None, None, *found)
