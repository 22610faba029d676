"""The local steps of a round: of one run's clients, or of several runs' in common passes over the one base.

Runs whose clients train together have one base, one set of encoded rows and adapters of one shape. A run whose clients
have several ranks has a turn for each of them. What differs by run,
its rows, its dropout keys and its learning rate, goes by client. So each run's clients come to the same as by
themselves, up to the order in which floats are added.

A run may ask for its state within a round. Then all of its clients stop after the same step, and go on from there: what
that changes is no bit. What their steps came to until then is `State.within`, by client: `loss` and `grad_norm`, summed
over the steps, the `seconds` that they took, and as `start/<name>` what the round began with, where a method keeps it.
Where rows are private, `salt [K, 2]` is a digest of the state with which the round began.
"""

import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import replace
from itertools import islice
from types import FunctionType
from typing import Any, NamedTuple, Protocol

import torch
from torch import Tensor

from peertune.adapters.stacked import StackedModel
from peertune.data.batches import TrainingSteps, steps_together
from peertune.memory import give_back_free
from peertune.method import At, Local, Memory, Phase
from peertune.methods.private import STEPS
from peertune.privacy.draws import digest
from peertune.rounds.training import Optim, Rates, Trained, reset_moments, train_local
from peertune.types import Batch, State, Tensors, select, take


class Steps(Protocol):
    """A round's local steps; `TrainingSteps` where runs train together."""

    def __call__(
        self, clients: Sequence[int], rounds: Sequence[int], first: int = 0, salts: Sequence[bytes] = (), /
    ) -> Iterator[list[Batch]]:
        """Yield the micro-batches of each step, from `first` on, of the `clients [K]` in these `rounds [K]`.

        Where rows are private, `salts [K]` are digests of where each client began its round.
        """
        ...


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
    pauses: Sequence[int] = ()  # after so many steps of the round, ascending, `keep` is told the state within it
    keep: Callable[[State], object] = bool
    reached: Tensor | None = None  # [K, S], of a round that has a deadline: `peertune.rounds.deadline`
    salted: bool = False  # whether its rows are private, and drawn by where the round begins


class Came(NamedTuple):
    """What a run's local steps came to."""

    loss: Tensor  # [K]
    grad_norm: Tensor  # [K]
    seconds: float = 0.0  # of common steps its clients' share


_START = "start/"
_SALT = "salt"

_Alike = tuple[int, Phase, Phase | None, int | None, bool, tuple[torch.Size, ...], int | None]
"""Clients that train together: they follow one `Local`, are in one phase, come from one, and are in one round if the
`Local` asks for it. All have a deadline, or none has. Their adapters have one shape; their rows are of one place."""


def train(turns: Sequence[Turn]) -> list[Came | Exception]:
    """Do the local steps of these runs' clients in place, a few at a time of those that are alike.

    Those runs go first that have made the fewest steps of their round, until all go together.
    Returns for each run what they came to, or why it can't go on. That costs the other runs nothing: where common steps
    fail, such as by what diverges in one run, each run is trained by itself from where it stood.
    """
    found: dict[int, Came | Exception] = {}
    made = {number: turn.state.step for number, turn in enumerate(turns)}
    for turn in turns:
        if not turn.state.step:
            for name in ("loss", "grad_norm", "seconds"):
                sums = torch.zeros(turn.state.clients, dtype=torch.float64, device=_device(turn))
                turn.state.within[name] = sums
            if turn.salted:
                each = [torch.frombuffer(bytearray(salt), dtype=torch.int64) for salt in salts(turn.state)]
                turn.state.within[_SALT] = torch.stack(each).to(_device(turn))
    while left := made.keys() - found.keys():
        first = min(made[number] for number in left)
        now = {number: turns[number] for number in sorted(left) if made[number] == first}
        stops = [stop for number in left for stop in (made[number], *turns[number].pauses) if stop > first]
        stop = min(stops, default=None)
        found |= _train_steps(now, first, stop)
        for number, turn in now.items():
            state = turn.state
            if number in found:
                continue
            if stop is None:
                within = state.within
                found[number] = Came(within["loss"], within["grad_norm"], max(within["seconds"].tolist(), default=0.0))
                within.clear()
            else:
                made[number] = stop
                if stop in turn.pauses:
                    turn.keep(replace(state, step=stop))
    return [found[number] for number in made]


def salts(state: State) -> list[bytes]:
    """Return a digest, 16 bytes, of all that each client of one cohort trains from, `[K]`."""
    whole = {name: x for name, x in (state.adapters | state.known).items() if name != STEPS}
    return [digest(take(whole, slice(row, row + 1))) for row in range(state.clients)]


def begun_from(state: State) -> list[bytes]:
    """Return the salts of the clients of one cohort where they began the round, within which the state may be."""
    return _as_bytes(state.within[_SALT]) if _SALT in state.within else salts(state)


def _salts_of(turn: Turn, rows: list[int]) -> list[bytes]:
    """Return the salts of some rows of a turn; none where nothing is private."""
    return _as_bytes(turn.state.within[_SALT][rows]) if turn.salted else []


def _as_bytes(x: Tensor) -> list[bytes]:
    """Return each row of `x`."""
    return [row.numpy().tobytes() for row in x.cpu()]


def _train_steps(turns: Mapping[int, Turn], first: int, stop: int | None) -> dict[int, Exception]:
    """Do the local steps of these runs, by their numbers, from `first` until `stop` are made, or all.

    Returns why a run can't go on. At the end `loss` and `grad_norm` within its state are means.
    """
    failed: dict[int, Exception] = {}
    memories: dict[int, Memory] = {number: {} for number in turns}
    for members in _alike(turns).values():
        most = next(iter(turns.values())).clients_per_pass * len({number for number, _ in members})
        for start in range(0, len(members), most):
            chunk: dict[int, list[int]] = {}
            for number, row in members[start : start + most]:
                chunk.setdefault(number, []).append(row)
            _train_chunk(turns, chunk, first, stop, failed, memories)
            give_back_free()
    for number, memory in memories.items():
        turns[number].state.remember(memory)
    return failed


def _alike(turns: Mapping[int, Turn]) -> dict[_Alike, list[tuple[int, int]]]:
    """Return the clients that train together: the number of each one's run, and its row there."""
    locals_: list[Local] = []
    alike: dict[_Alike, list[tuple[int, int]]] = {}
    for number, turn in turns.items():
        own = next((place for place, other in enumerate(locals_) if _same(other, turn.local)), len(locals_))
        locals_ += [turn.local] if own == len(locals_) else []
        shapes = tuple(x.shape[1:] for x in turn.state.adapters.values())
        rows = id(turn.steps.encoded) if isinstance(turn.steps, TrainingSteps) else None  # which all of a pass are of
        for row, t in enumerate(turn.at.round.tolist()):
            at = t if turn.local.one_step else None
            key = own, turn.phases[row], turn.before[row] if t else None, at, turn.reached is not None, shapes, rows
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
    turns: Mapping[int, Turn],
    chunk: Mapping[int, list[int]],
    first: int,
    stop: int | None,
    failed: dict[int, Exception],
    memories: Mapping[int, Memory],
) -> None:
    """Train some rows of these runs, by the runs' numbers."""
    chunk = {number: rows for number, rows in chunk.items() if number not in failed}
    begun, clients = time.perf_counter(), sum(map(len, chunk.values()))
    try:
        if len(chunk) > 1:
            parts = _train_several([(turns[number], rows) for number, rows in chunk.items()], first, stop)
        else:
            parts = [_train_one(turns[number], rows, first, stop) for number, rows in chunk.items()]
    except Exception as error:
        if len(chunk) == 1:
            (number,) = chunk
            failed[number] = error
            return
        for number, rows in chunk.items():
            _train_chunk(turns, {number: rows}, first, stop, failed, memories)
        return
    taken = time.perf_counter() - begun
    for (number, rows), trained in zip(chunk.items(), parts, strict=True):
        turn, memory, within = turns[number], memories[number], turns[number].state.within
        places = _places(rows, _device(turn))
        within["seconds"] += taken * len(rows) / clients
        sums = (trained.loss, trained.grad_norm) if stop is None else (trained.losses, trained.grad_norms)
        within["loss"][places], within["grad_norm"][places] = sums
        if first == 0 and stop is not None:
            for name, x in trained.start.items():
                if _START + name not in within:
                    within[_START + name] = x.new_zeros((turn.state.clients, *x.shape[1:]))
                within[_START + name][places] = x
        known = turn.state.known
        for name, x in trained.memory.items():  # one copy for all chunks: a method's own tensors stay as they are
            if name not in memory:
                memory[name] = known[name].clone()
            memory[name][places] = x


def _places(rows: list[int], device: torch.device) -> slice | Tensor:
    """Return rows as a slice, in the same memory, where they are neighbours."""
    neighbouring = len(rows) == rows[-1] - rows[0] + 1
    return slice(rows[0], rows[-1] + 1) if neighbouring else torch.tensor(rows, device=device)


def _train_one(turn: Turn, rows: list[int], first: int, stop: int | None) -> Trained:
    """Train some rows of one run."""
    places = _places(rows, _device(turn))
    part = turn.state.take(places)
    at = _at(turn, rows, first)
    steps = turn.steps(at.clients.tolist(), at.round.tolist(), first, _salts_of(turn, rows))
    before = _so_far(turn, rows, first)
    frozen, reached = _frozen(turn, len(rows)), _reached([(turn, rows)])
    trained = _train_part(turn, rows[0], part, steps, at, turn.optim, frozen, before, reached, stop)
    if isinstance(places, Tensor):
        turn.state.put(places, replace(part, memory={}))
    return trained


def _train_several(chunk: Sequence[tuple[Turn, list[int]]], first: int, stop: int | None) -> list[Trained]:
    """Train some rows of several runs together. Where it fails, all states are as they were."""
    turns = [turn for turn, _ in chunk]
    together = State.of([turn.state.take(torch.tensor(rows, device=_device(turn))) for turn, rows in chunk])
    each = [_at(turn, rows, first) for turn, rows in chunk]
    at = At(*(torch.cat([one[field] for one in each]) for field in range(3)))  # type: ignore[misc]  # none is `heard`
    drawn = []
    for (turn, rows), one in zip(chunk, each, strict=True):
        assert isinstance(turn.steps, TrainingSteps), "runs that train together draw rows that can be put together"
        drawn.append((turn.steps, one.clients.tolist(), one.round.tolist(), _salts_of(turn, rows)))
    sizes = [len(rows) for _, rows in chunk]
    optim = replace(turns[0].optim, rates=_rates([turn.optim for turn in turns], sizes, _device(turns[0])))
    kept = [_frozen(turn, len(rows)) for turn, rows in chunk]
    frozen = {name: torch.cat([one[name] for one in kept]) for name in kept[0]}
    before = _joined([_so_far(turn, rows, first) for turn, rows in chunk])
    steps, row = steps_together(drawn, first), chunk[0][1][0]
    trained = _train_part(turns[0], row, together, steps, at, optim, frozen, before, _reached(chunk), stop)
    parts: list[Trained] = []
    start = 0
    for (turn, rows), size in zip(chunk, sizes, strict=True):
        own = slice(start, start + size)
        turn.state.put(torch.tensor(rows, device=_device(turn)), replace(together.take(own), memory={}))
        began, changed = (take(part, own) for part in (trained.start, trained.memory))
        parts.append(Trained(trained.steps, trained.losses[own], trained.grad_norms[own], began, changed))
        start += size
    return parts


def _train_part(
    turn: Turn,
    row: int,
    part: State,
    steps: Iterator[list[Batch]],
    at: At,
    optim: Optim,
    frozen: Tensors,
    before: Trained | None,
    reached: Tensor | None,
    stop: int | None,
) -> Trained:
    """Train clients that are alike, of whom this row of the turn is one, until `stop` steps are made, or all."""
    t, phase, first = int(turn.at.round[row]), turn.phases[row], 0 if before is None else before.steps
    if before is None:
        reset_moments(part.moments, optim.reset, phase, turn.before[row] if t else None)
    steps = islice(steps, None if stop is None else stop - first)
    ends = stop is None
    return train_local(turn.model, part, steps, phase, optim, at, turn.local, frozen, before, reached, ends=ends)


def _so_far(turn: Turn, rows: list[int], first: int) -> Trained | None:
    """Return what the `first` steps of these rows, which are alike, came to; None where there are none."""
    if not first:
        return None
    within, places = turn.state.within, _places(rows, _device(turn))
    trained = select(turn.state.adapters, turn.phases[rows[0]].train) if turn.local.keeps_start else {}
    start = {name: within[_START + name][places] for name in trained}
    return Trained(first, within["loss"][places], within["grad_norm"][places], start, {})


def _reached(chunk: Sequence[tuple[Turn, list[int]]]) -> Tensor | None:
    """Return what some rows' steps reach until the deadline, one run after the other; None where there is none."""
    found = [turn.reached[rows] for turn, rows in chunk if turn.reached is not None]
    return torch.cat(found) if found else None


def _joined(parts: Sequence[Trained | None]) -> Trained | None:
    """Return what some rows' steps came to, and others', one after the other."""
    found = [part for part in parts if part is not None]
    if not found:
        return None
    start = {name: torch.cat([part.start[name] for part in found]) for name in found[0].start}
    losses, grad_norms = (torch.cat(each) for each in zip(*((x.losses, x.grad_norms) for x in found), strict=True))
    return Trained(found[0].steps, losses, grad_norms, start, {})


def _at(turn: Turn, rows: list[int], first: int) -> At:
    at = At(*(x[rows] for x in turn.at[:3]))
    return at._replace(step=at.step + first)


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
