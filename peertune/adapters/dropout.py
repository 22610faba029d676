"""Dropout whose masks are a pure function of the row, the layer and the element.

PyTorch's dropout draws from one global stream, so a row's mask depends on which other rows share its pass and on all
that was drawn before. Here an element survives or not by a hash of (the row's key, the layer's number, its index),
and the key is itself a hash of (seed, client, round, step, position in the client's batch). Sorting rows, cutting
them into micro-batches, chunking clients and resuming then change no mask. On a CPU it is also several times faster
than drawing.
"""

from functools import cache, lru_cache

import torch
from torch import Tensor, nn

from peertune.adapters.rows import Rows, current_rows


def keyed_dropout(x: Tensor, p: float, rows: Rows, stream: int, *, scores: bool = False) -> Tensor:
    """Zero each element of `x [b, …, d]` with probability `p` and scale the others by 1 / (1 − p), as met.

    Packed rows come as `x [N, S, …, d]`, or with `scores` as an attention's `[N, heads, S, S]`. `stream` numbers the
    layer. An element's fate depends on its row's key and on its place in the row, not on the sizes of the axes or on
    what shares its block, so a row keeps its mask however it is padded or packed. `p` is met to 2⁻³².

    Raises ModelError where `x` does not have the batch's rows: a layer that regroups them has no row's key.
    """
    threshold = round(p * 2**32)
    if threshold == 2**32:  # no word lies above it
        return x * 0
    packing = rows.packed(x, slots=2 if scores else 1)
    words = _mix(rows.keys.to(torch.int32) + _mixed_number(stream))
    columns = _odd_words(x.shape[-1], x.device)
    middle = x.shape[1:-1]
    if packing is not None:
        words, places = words[packing.rows], (packing.positions.to(torch.int32) + 1) * _SPREAD
        if scores:
            words = _mix(words[:, None] + _indices(x.shape[1], x.device)[:, None])
            words, middle = _mix(words + places[:, None]), middle[2:]
            if rows.packing is not None:  # the keys' places
                columns = (_mix((rows.packing.positions.to(torch.int32) + 1) * _SPREAD) | 1)[:, None, None]
        else:
            words, middle = _mix(words + places), middle[1:]
    for size in middle:
        words = _mix(words[..., None] + _indices(size, x.device))
    # The one full-size product of integers: by odd numbers it permutes the words, so each element's is uniform.
    keep = words[..., None] * columns >= threshold - 2**31
    return torch.where(keep, x, 0).mul_(2**32 / (2**32 - threshold))


_SPREAD = -0x61C88647  # the golden ratio's 32-bit fraction: its multiples differ in many bits before they are mixed


def _mix(x: Tensor) -> Tensor:
    """Scramble int32 words by the finaliser of MurmurHash3 (Appleby, public domain); products wrap."""
    x = (x ^ (x >> 16 & 0xFFFF)) * -0x7A143595
    x = (x ^ (x >> 13 & 0x7FFFF)) * -0x3D4D51CB
    return x ^ (x >> 16 & 0xFFFF)


@cache
def _mixed_number(number: int) -> int:
    return int(_mix(torch.tensor(number + 1, dtype=torch.int32) * _SPREAD))


@lru_cache(maxsize=256)
def _indices(size: int, device: torch.device) -> Tensor:
    return torch.arange(1, size + 1, dtype=torch.int32, device=device) * _SPREAD


@lru_cache(maxsize=256)
def _odd_words(size: int, device: torch.device) -> Tensor:
    return _mix(_indices(size, device)) | 1


def keyed_uniforms(keys: Tensor, number: int, size: int) -> Tensor:
    """Return `size` uniform numbers in (0, 1) for each of `keys [b]` and this number, `[b, size]` in float64."""
    words = _mix(keys.to(torch.int32) + _mixed_number(number))
    words = _mix(words[:, None] + _indices(size, keys.device))
    return (words.double() + (2**31 + 0.5)) * 2.0**-32


class KeyedDropout(nn.Module):
    """Stands in for an `nn.Dropout` of the base; does nothing outside training."""

    def __init__(self, p: float, stream: int) -> None:
        super().__init__()
        self.p = p
        self.stream = stream

    def forward(self, x: Tensor) -> Tensor:
        """`x [b, …]` or, packed, `[N, S, …]` → the same shape."""
        rows = current_rows()
        if not self.training or self.p == 0 or rows is None:
            return x
        return keyed_dropout(x, self.p, rows, self.stream)
