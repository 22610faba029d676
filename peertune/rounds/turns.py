"""The local steps of a round: of one run's clients, or of several runs' in common passes over the one base.

Runs whose clients train together have one base, one set of encoded rows and adapters of one shape. What differs by run,
its rows, its dropout keys and its learning rate, goes by client. So each run's clients come to the same as by
themselves, up to the order in which floats are added.
"""

import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import replace
from types import FunctionType
from typing import Any, NamedTuple

import torch
from torch import Tensor

from peertune.adapters.stacked import StackedModel
from peertune.data.batches import TrainingSteps, steps_together
from peertune.memory import give_back_free
from peertune.method import At, Local, Memory, Phase
from peertune.rounds.training import Optim, Rates, reset_moments, train_local
from peertune.types import Batch, State, Tensors

Steps = Callable[[Sequence[int], Sequence[int]], Iterator[list[Batch]]]
"""`steps(clients [K], rounds [K])` yields the micro-batches of each local step of these clients in these rounds of
theirs; `TrainingSteps` where runs train together."""


class Turn(NamedTuple):
    """What a run's clients are to train in a round."""

    model: StackedModel
    optim: Optim
    local: Local
    steps: Steps
    state: State  # of the K clients, changed in place
    at: At
    phases: Sequence[Phase]  # [K]
    before: Sequence[Phase]  # [K], of the round before
    clients_per_pass: int  # of one run's, at most


class Came(NamedTuple):
    """What a run's local steps came to."""

    loss: Tensor  # [K]
    grad_norm: Tensor  # [K]
    seconds: float = 0.0  # of common steps its clients' share


_Alike = tuple[int, Phase, Phase | None, int | None]
"""Clients that train together: they follow one `Local`, are in one phase, come from one, and are in one round if the
`Local` asks for it."""


def train(turns: Sequence[Turn]) -> list[Came | Exception]:
    """Do the local steps of these runs' clients in place, a few at a time of those that are alike.

    Returns for each run what they came to, or why it can't go on. That costs the other runs nothing: where common steps
    fail, such as by what diverges in one run, each run is trained by itself from where it stood.
    """
    found: list[Came | Exception] = [
        Came(*torch.zeros(2, turn.state.clients, dtype=torch.float64, device=_device(turn))) for turn in turns
    ]
    memories: list[Memory] = [{} for _ in turns]
    for members in _alike(turns).values():
        most = turns[0].clients_per_pass * len({number for number, _ in members})
        for start in range(0, len(members), most):
            chunk: dict[int, list[int]] = {}
            for number, row in members[start : start + most]:
                chunk.setdefault(number, []).append(row)
            _train_chunk(turns, chunk, found, memories)
            give_back_free()
    for turn, memory in zip(turns, memories, strict=True):
        turn.state.remember(memory)
    return found


def _alike(turns: Sequence[Turn]) -> dict[_Alike, list[tuple[int, int]]]:
    """Return the clients that train together: the number of each one's run, and its row there."""
    locals_: list[Local] = []
    alike: dict[_Alike, list[tuple[int, int]]] = {}
    for number, turn in enumerate(turns):
        own = next((place for place, other in enumerate(locals_) if _same(other, turn.local)), len(locals_))
        locals_ += [turn.local] if own == len(locals_) else []
        for row, t in enumerate(turn.at.round.tolist()):
            key = own, turn.phases[row], turn.before[row] if t else None, t if turn.local.one_step else None
            alike.setdefault(key, []).append((number, row))
    return alike


def _same(one: Any, other: Any) -> bool:
    """Return whether two values are the same, or two functions do the same: one code, over values that are the same.

    Each run has its own functions, that its recipe's factories made. Those that have kept a seed differ by it.
    """
    if one is other:
        return True
    try:
        if isinstance(one, FunctionType) and isinstance(other, FunctionType):
            return one.__code__ is other.__code__ and _same(*map(_kept, (one, other)))
        if type(one) is type(other) and isinstance(one, tuple):
            return len(one) == len(other) and all(map(_same, one, other))
        return type(one) is type(other) and bool(one == other)
    except (TypeError, ValueError, RuntimeError):  # such as two arrays, which have no one answer
        return False


def _kept(function: FunctionType) -> tuple[Any, ...]:
    """Return what a function has kept from where it was made."""
    cells = tuple(cell.cell_contents for cell in function.__closure__ or ())
    return function.__defaults__, function.__kwdefaults__, cells


def _train_chunk(
    turns: Sequence[Turn], chunk: Mapping[int, list[int]], found: list[Came | Exception], memories: list[Memory]
) -> None:
    """Train some rows of these runs, by the runs' numbers."""
    chunk = {number: rows for number, rows in chunk.items() if isinstance(found[number], Came)}
    begun, clients = time.perf_counter(), sum(map(len, chunk.values()))
    try:
        if len(chunk) > 1:
            parts = _train_several([(turns[number], rows) for number, rows in chunk.items()])
        else:
            parts = [_train_one(turns[number], rows) for number, rows in chunk.items()]
    except Exception as error:
        if len(chunk) == 1:
            (number,) = chunk
            found[number] = error
            return
        for number, rows in chunk.items():
            _train_chunk(turns, {number: rows}, found, memories)
        return
    taken = time.perf_counter() - begun
    for (number, rows), (came, changed) in zip(chunk.items(), parts, strict=True):
        turn, own, memory = turns[number], found[number], memories[number]
        assert isinstance(own, Came), "a run that failed trains no more"
        places = _places(rows, own.loss.device)
        own.loss[places], own.grad_norm[places] = came.loss, came.grad_norm
        found[number] = own._replace(seconds=own.seconds + taken * len(rows) / clients)
        known = turn.state.known
        for name, x in changed.items():  # one copy for all chunks: a method's own tensors stay as they are
            if name not in memory:
                memory[name] = known[name].clone()
            memory[name][places] = x


def _places(rows: list[int], device: torch.device) -> slice | Tensor:
    """Return rows as a slice, in the same memory, where they are neighbours."""
    neighbouring = len(rows) == rows[-1] - rows[0] + 1
    return slice(rows[0], rows[-1] + 1) if neighbouring else torch.tensor(rows, device=device)


_Part = tuple[Came, Memory]


def _train_one(turn: Turn, rows: list[int]) -> _Part:
    """Train some rows of one run; what it comes to, and what has changed of their memory."""
    places = _places(rows, _device(turn))
    part = turn.state.take(places)
    at = _at(turn, rows)
    steps = turn.steps(at.clients.tolist(), at.round.tolist())
    came, memory = _train_part(turn, rows[0], part, steps, at, turn.optim, _frozen(turn, len(rows)))
    if isinstance(places, Tensor):
        turn.state.put(places, replace(part, memory={}))
    return came, memory


def _train_several(chunk: Sequence[tuple[Turn, list[int]]]) -> list[_Part]:
    """Train some rows of several runs together. Where it fails, all states are as they were."""
    turns = [turn for turn, _ in chunk]
    together = State.of([turn.state.take(torch.tensor(rows, device=_device(turn))) for turn, rows in chunk])
    each = [_at(turn, rows) for turn, rows in chunk]
    at = At(*(torch.cat([one[field] for one in each]) for field in range(3)))  # type: ignore[misc]  # none is `heard`
    drawn = []
    for (turn, _), one in zip(chunk, each, strict=True):
        assert isinstance(turn.steps, TrainingSteps), "runs that train together draw rows that can be put together"
        drawn.append((turn.steps, one.clients.tolist(), one.round.tolist()))
    sizes = [len(rows) for _, rows in chunk]
    optim = replace(turns[0].optim, rates=_rates([turn.optim for turn in turns], sizes, _device(turns[0])))
    kept = [_frozen(turn, len(rows)) for turn, rows in chunk]
    frozen = {name: torch.cat([one[name] for one in kept]) for name in kept[0]}
    came, memory = _train_part(turns[0], chunk[0][1][0], together, steps_together(drawn), at, optim, frozen)
    parts: list[_Part] = []
    start = 0
    for (turn, rows), size in zip(chunk, sizes, strict=True):
        own = slice(start, start + size)
        turn.state.put(torch.tensor(rows, device=_device(turn)), replace(together.take(own), memory={}))
        parts.append((Came(came.loss[own], came.grad_norm[own]), {name: x[own] for name, x in memory.items()}))
        start += size
    return parts


def _train_part(
    turn: Turn, row: int, part: State, steps: Iterator[list[Batch]], at: At, optim: Optim, frozen: Tensors
) -> _Part:
    """Train clients that are alike, of whom this row of the turn is one."""
    t, phase = int(turn.at.round[row]), turn.phases[row]
    reset_moments(part.moments, optim.reset, phase, turn.before[row] if t else None)
    trained = train_local(turn.model, part, steps, phase, optim, at, turn.local, frozen)
    return Came(trained.loss, trained.grad_norm), trained.memory


def _at(turn: Turn, rows: list[int]) -> At:
    return At(*(x[rows] for x in turn.at[:3]))


def _device(turn: Turn) -> torch.device:
    return next(iter(turn.state.adapters.values())).device


def _frozen(turn: Turn, clients: int) -> Tensors:
    """Return what of the base is this run's own, for each of so many clients."""
    return {name: x.expand(clients, *x.shape[1:]) for name, x in turn.model.frozen.items()}


def _rates(optims: Sequence[Optim], sizes: Sequence[int], device: torch.device) -> Callable[[int], Rates]:
    """Return the learning rates of so many clients of each: one for all, or `[K]` where they differ."""

    def rates(step: int) -> Rates:
        each = [optim.rates(step) for optim in optims]
        if all(one == each[0] for one in each):
            return each[0]
        counts = torch.tensor(sizes)
        return {
            kind: torch.tensor([one[kind] for one in each], dtype=torch.float64).repeat_interleave(counts).to(device)
            for kind in each[0]
        }

    return rates
