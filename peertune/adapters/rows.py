"""What the sites need to know of the rows that pass through the base: set for one forward pass, read by every site."""

from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from contextvars import ContextVar
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn

from peertune.errors import ModelError
from peertune.types import Packing, Tensors


@dataclass
class LastLayer:
    """The token of each row that is read of the last layer, and what its hooks tell each other (see `reading.py`)."""

    position: Tensor  # [b] int64, of the token in its row
    read: Packing | None = None  # where they lie in what enters the layer, [N, m] of [N, S]; None: it is not pruned
    whole: Tensor | None = None  # what enters, [N, S, d]
    attention: nn.Module | None = None  # what attends in it


@dataclass(frozen=True)
class Rows:
    """The rows of one forward pass: `b` of them, or N blocks into which they are packed."""

    adapters: Tensors  # the stack, [K, …]
    clients: Tensor  # [b] int64, the adapter of each row
    keys: Tensor  # [b] int64, what each row's dropout masks are drawn from
    training: bool  # whether the adapters' own dropout is on
    streams: Mapping[nn.Module, int]  # the number that each of the base's modules draws dropout under
    packing: Packing | None = None
    shared: Tensor | None = None  # [b] int64, what masks are drawn from that all rows of a client's step share
    places: Tensor | None = None  # [T] int64, row · s + position of the tokens after which a language model predicts
    each: int | None = None  # how many rows each client has, where they lie client by client, as many of each
    columns: dict[tuple[torch.Size, int, torch.dtype], Tensor] = field(default_factory=dict, repr=False)  # made before
    made: dict[Any, Any] = field(default_factory=dict, repr=False)  # by layers together, what was made for all of them
    last: LastLayer | None = None  # what is read of the last layer; None: all of it
    watch: list[Any] | None = None  # where a module that attends is noted, if somebody wants to know

    def packed(self, x: Tensor, slots: int = 1) -> Packing | None:
        """Return how `x` is packed, with its slots along the axis `slots`, or None where it has one entry for each row.

        In the last layer `x` may hold the tokens alone that are read.

        Raises ModelError for anything else: a layer that regroups rows has no row's client or key.
        """
        for packing in (None if self.last is None else self.last.read, self.packing):
            if packing is not None and (len(x), *x.shape[slots:-1][:1]) == packing.rows.shape:
                return packing
        if len(x) == len(self.clients):
            return None
        raise ModelError(
            f"model: a layer got {len(x)} rows where the batch has {len(self.clients)}; layers that regroup rows "
            "(windows, flattened tokens) can't be told whose they are: use other target_modules, or model.dropout=false"
        )

    def clients_of(self, x: Tensor) -> Tensor:
        """Return whose each vector of `x [b, …, d]` or `[N, S, d]` is, `[vectors]`; an empty slot is client -1's."""
        packing = self.packed(x)
        if packing is None:
            return self.clients.repeat_interleave(x[0, ..., 0].numel())
        return torch.where(packing.rows < 0, -1, self.clients[packing.rows]).flatten()

    def of_each(self, x: Tensor) -> int | None:
        """Return how many vectors of `x` each client has, where they lie client by client, as many of each; or None."""
        stack = len(next(iter(self.adapters.values())))
        if self.each is None or stack == 1 or len(self.clients) != stack * self.each or self.packed(x) is not None:
            return None
        return x[..., 0].numel() // stack

    def own_columns(self, x: Tensor, r: int) -> Tensor | None:
        """Return for each vector of `x` 1 in its own client's r columns and 0 in the others', `[vectors, K r]`.

        None where the stack is of one client, and all columns are everybody's own. Sites of one shape share it.
        """
        self.packed(x)
        stack = len(next(iter(self.adapters.values())))
        if stack == 1:
            return None
        key = x.shape[:-1], r, x.dtype
        if key not in self.columns:
            columns = torch.arange(stack, device=x.device).repeat_interleave(r)
            self.columns[key] = (self.clients_of(x)[:, None] == columns).to(x.dtype)
        return self.columns[key]


_current: ContextVar[Rows | None] = ContextVar("rows", default=None)


def current_rows() -> Rows | None:
    """Return the rows that pass through the base now, or None outside `bound_rows`."""
    return _current.get()


@contextmanager
def bound_rows(rows: Rows | None) -> Iterator[None]:
    """Bind the rows, or none, to all sites for the length of a `with` block."""
    token = _current.set(rows)
    try:
        yield
    finally:
        _current.reset(token)
