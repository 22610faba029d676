"""What the sites need to know of the rows that pass through the base: set for one forward pass, read by every site."""

from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from contextvars import ContextVar
from dataclasses import dataclass

from torch import Tensor, nn

from peertune.types import Tensors


@dataclass(frozen=True)
class Rows:
    """The rows of one forward pass."""

    adapters: Tensors  # the stack, [K, …]
    clients: Tensor  # [b] int64, the adapter of each row
    keys: Tensor  # [b] int64, what each row's dropout masks are drawn from
    training: bool  # whether the adapters' own dropout is on
    streams: Mapping[nn.Module, int]  # the number that each of the base's modules draws dropout under


_current: ContextVar[Rows | None] = ContextVar("rows", default=None)


def current_rows() -> Rows | None:
    """Return the rows that pass through the base now, or None outside `bound`."""
    return _current.get()


@contextmanager
def bound(rows: Rows) -> Iterator[None]:
    """Bind the rows to all sites for the length of a `with` block."""
    token = _current.set(rows)
    try:
        yield
    finally:
        _current.reset(token)
