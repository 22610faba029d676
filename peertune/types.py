"""The values that the parts of peertune hand each other.

Shape letters, the same everywhere: `K` clients in this stack, `n` clients in the graph, `r` rank, `d_in`, `d_out`,
`b` rows of a batch, `s` tokens. A tensor's name ends in its **kind**: `A`, `B` or `head` (`encoder.layer.0.query.A`).
"""

from collections.abc import Callable, Collection, Mapping
from dataclasses import dataclass, field
from typing import Any, NamedTuple

import torch
from torch import Tensor

Tensors = dict[str, Tensor]
"""Name → tensor `[K, …]`. The leading axis is always clients."""


@dataclass(frozen=True)
class Phase:
    """What one round does."""

    round: int  # counted from 0, the same number for all clients
    train: frozenset[str]  # kinds that get gradients
    send: frozenset[str]  # kinds on the wire; the others stay bit for bit


class Algorithm(NamedTuple):
    """A method: a schedule and a mixer.

    `phase(round)` says what a round trains and sends. `mix(own [R, …], heard [H, …], weights [R, H], phase)` returns
    the new adapters `[R, …]` of the R receivers; `weights` is dense or sparse, and row i holds what receiver i takes
    of each heard adapter, its own among them. `settings` are the arguments that made the method, with everything
    automatic resolved.
    """

    phase: Callable[[int], Phase]
    mix: Callable[[Tensors, Tensors, Tensor, Phase], Tensors]
    settings: Mapping[str, Any]


@dataclass(frozen=True)
class State:
    """All that a run carries from one round to the next. An engine steps it in place, so that it is held once."""

    adapters: Tensors  # `<module path>.A [K, r, d_in]`, `.B [K, d_out, r]`, and `<parameter path>.head [K, …]`
    moments: Tensors  # the optimiser's, each `[K, …]`
    round: int  # the next round to run

    def clone(self) -> "State":
        """Return the same state in memory of its own."""
        adapters, moments = (
            {name: x.clone(memory_format=torch.contiguous_format) for name, x in part.items()}
            for part in (self.adapters, self.moments)
        )
        return State(adapters, moments, self.round)

    def take(self, clients: slice) -> "State":
        """Return these clients' part of the state, in the same memory."""
        return State(take(self.adapters, clients), take(self.moments, clients), self.round)

    def to(self, device: torch.device) -> "State":
        """Return the same state on another device."""
        adapters, moments = ({name: x.to(device) for name, x in part.items()} for part in (self.adapters, self.moments))
        return State(adapters, moments, self.round)


@dataclass(frozen=True)
class Packing:
    """How the tokens of `b` padded rows lie in N < b blocks of S slots, several whole rows to a block; T tokens in all.

    Layers that look at one token at a time, and attention that keeps to a row, then compute next to no padding.
    """

    slots: Tensor  # [T] int64, where each token goes: block · S + slot
    tokens: Tensor  # [T] int64, where it comes from: row · s + position
    rows: Tensor  # [N, S] int64, the row in each slot, -1 in an empty one
    positions: Tensor  # [N, S] int64, the token's position in its row, 0 in an empty slot
    width: int  # s

    def to(self, device: torch.device) -> "Packing":
        """Return the same packing on another device."""
        slots, tokens, rows, positions = (
            value.to(device, non_blocking=True) for value in (self.slots, self.tokens, self.rows, self.positions)
        )
        return Packing(slots, tokens, rows, positions, self.width)


@dataclass(frozen=True)
class Batch:
    """Rows of several clients that go through the base together; `b` rows, padded to the longest."""

    inputs: Mapping[str, Tensor]  # the model's keyword arguments, each [b, …]
    labels: Tensor  # [b], class numbers (int64) or targets of a regression (float)
    clients: Tensor  # [b] int64, which adapter of the stack each row belongs to
    weights: Tensor  # [b] float64, the row's share in its client's mean loss
    keys: Tensor  # [b] int64, what each row's dropout masks are drawn from
    packing: Packing | None = None  # how the base's layers may pack the rows; None where they don't

    def to(self, device: torch.device) -> "Batch":
        """Return the same batch on another device."""
        labels, clients, weights, keys = (
            value.to(device, non_blocking=True) for value in (self.labels, self.clients, self.weights, self.keys)
        )
        inputs = {name: value.to(device, non_blocking=True) for name, value in self.inputs.items()}
        packing = None if self.packing is None else self.packing.to(device)
        return Batch(inputs, labels, clients, weights, keys, packing)


@dataclass(frozen=True)
class Evaluation:
    """How good the clients' own models are, and the model of the averaged adapter."""

    metric: str
    clients: list[float]  # [K], each client's own model
    average: float  # the adapter averaged over the clients, factor by factor
    rows: int  # rows of the validation set that were used


@dataclass(frozen=True)
class RoundRecord:
    """What one round did; a line of `rounds.jsonl`."""

    round: int
    train: list[str]  # kinds trained, sorted
    send: list[str]  # kinds sent, sorted
    clients: list[int]
    loss: list[float]  # [K], mean over the round's local steps
    bytes_sent: list[int]  # [K]
    neighbours: list[int]  # [K], how many others each client heard
    failed_edges: list[tuple[int, int]]
    diagnostics: dict[str, float]  # after mixing: consensus errors, cross term, mean drift
    seconds: dict[str, float]  # by stage
    evaluation: Evaluation | None = None
    state: State | None = field(default=None, repr=False, compare=False)  # after the round; never written as JSON


def kind(name: str) -> str:
    """Return what a tensor is: the last part of its name."""
    return name.rpartition(".")[2]


def select(tensors: Tensors, kinds: Collection[str]) -> Tensors:
    """Keep the tensors of these kinds."""
    return {name: tensor for name, tensor in tensors.items() if kind(name) in kinds}


def take(tensors: Tensors, clients: Tensor | slice) -> Tensors:
    """Keep these clients, in this order: `[K, …]` → `[len(clients), …]`."""
    return {name: tensor[clients] for name, tensor in tensors.items()}
