"""Local training that bounds what anybody can learn of one row of a client's, or of all of them, by cuts and noise.

At record level it is DP-SGD (Abadi et al., arXiv 1607.00133) by client, of LoRA factors: a step takes each of the
client's rows with one chance (Poisson sampling), cuts each row's own gradient to a norm, adds Gaussian noise to the
sum, and divides by how many rows a step takes on average, never by how many it took. All that follows, moments, mixing
and messages, is made of what is noised, and costs nothing more.

At client level (McMahan et al., arXiv 1710.06963, without a server) local steps are plain. After the last of a round
what they changed is cut as a whole, noise is added, and the adapter becomes its start plus that. It bounds what tells
the client from one whose rows change nothing. Moments aren't noised: they follow from rows and from what was let out
before, and whatever they do to later changes is cut and noised there. So they must never be sent.

The accounting is `peertune.privacy.accountant`'s, the noise `peertune.privacy.draws`'. A client whose budget has no
room for another round of local steps trains nothing from there on, and goes on mixing.
"""

from collections.abc import Mapping, Sequence
from typing import Literal, NamedTuple

import torch
from torch import Tensor

from peertune.errors import RecipeError
from peertune.method import Algorithm, At, Gradient, Local, Memory, Phase, Schedule
from peertune.privacy.accountant import epsilon
from peertune.privacy.draws import digest, keyed, normals
from peertune.types import MOMENTS, Tensors, norms, over_clients, take

STEPS = "privacy.steps"
"""What each client's memory holds of its budget: how often it has added noise, `[K]`; at client level once a round."""


class Own(NamedTuple):
    """What a client's noise follows from, and nobody else knows."""

    secret: bytes
    told: bytes  # a digest of its rows and of all by which a step comes to something else


class Allowance(NamedTuple):
    """What a client's noised steps are; at client level a whole round is one, of rate 1."""

    rate: float  # the chance of each of its rows to be in a step
    noise_multiplier: float  # the noise's standard deviation, in `max_grad_norm`
    rows_per_step: float  # on average: what the sum is divided by; 1 at client level
    most_steps: int | None  # within its budget; None: it has none

    def of(self, steps: int) -> int:
        """Return how many of so many steps its budget has room for."""
        return steps if self.most_steps is None else min(steps, self.most_steps)

    def has_room(self, steps: int) -> bool:
        """Return whether its budget has room for so many steps in all."""
        return self.of(steps) == steps


class Private(NamedTuple):
    """What private local steps are held to."""

    unit: Literal["record", "client"]  # of what little can be learnt
    max_grad_norm: float  # what a row's own gradient is cut to, or a client's change in a round
    delta: float
    per_round: int  # noised steps of a round
    allowances: Mapping[int, Allowance]  # of each client here
    # Of each client a digest of its secret, its rows and all else that its steps follow from beside their state.
    marks: Mapping[int, bytes] = {}  # which nobody writes to


def spent(private: Private, clients: Sequence[int], steps: Sequence[int]) -> list[float]:
    """Return the epsilon that these clients have spent with so many steps, `[K]` both."""
    own = (private.allowances[client] for client in clients)
    return [
        epsilon(one.noise_multiplier, one.rate, count, private.delta) for one, count in zip(own, steps, strict=True)
    ]


def privately(algorithm: Algorithm, private: Private, own: Mapping[int, Own]) -> Algorithm:
    """Return the method with private local steps, of clients of whom each has what it alone knows.

    Memory: `privacy.steps`. Its schedule trains nothing at clients whose allowance has no room for a whole round.
    """
    level = _by_row if private.unit == "record" else _by_client
    local = level(algorithm.local, private, own)
    return algorithm._replace(schedule=_within_budget(algorithm.schedule, private), local=local)


def _within_budget(schedule: Schedule, private: Private) -> Schedule:
    def init(adapters: Tensors, at: At) -> Memory:
        return schedule.init(adapters, at) | {STEPS: torch.zeros(len(at.clients), dtype=torch.int64)}

    def phases(memory: Memory, at: At) -> list[Phase]:
        rounds = (memory[STEPS] // private.per_round).tolist()  # those that are whole: no step within one changes it
        allowances = [private.allowances[client] for client in at.clients.tolist()]
        return [
            phase if allowed.has_room((made + 1) * private.per_round) else phase._replace(train=frozenset())
            for phase, made, allowed in zip(schedule.phases(memory, at), rounds, allowances, strict=True)
        ]

    return schedule._replace(phases=phases, init=init)


def _by_row(local: Local, private: Private, own: Mapping[int, Own]) -> Local:
    """Have `gradient(…)` be noised wherever a `Local` takes it, so that what that makes of it is private as well."""

    def gradients(
        gradient: Gradient, adapters: Tensors, start: Tensors, memory: Memory, at: At, phase: Phase
    ) -> tuple[Tensors, Memory]:
        noised = Noised(gradient, private, own, at)
        followed, changed = local.gradients(noised, adapters, start, memory, at, phase)
        return followed, changed | {STEPS: memory[STEPS] + 1}

    return local._replace(gradients=gradients)


def _by_client(local: Local, private: Private, own: Mapping[int, Own]) -> Local:
    """Cut what a round's local steps changed, after all that a `Local` does at their end, and add noise to it.

    A gradient that is not finite counts as none. A client whose adapters are not finite has changed nothing, and its
    moments start afresh. Noise follows from the round, what it began with and what it changed, so that no two different
    changes have one noise.
    """

    def gradients(
        gradient: Gradient, adapters: Tensors, start: Tensors, memory: Memory, at: At, phase: Phase
    ) -> tuple[Tensors, Memory]:
        followed, changed = local.gradients(gradient, adapters, start, memory, at, phase)
        if not followed:
            return followed, changed
        finite = _finite(followed)
        return {name: torch.where(over_clients(finite, x), x, 0) for name, x in followed.items()}, changed

    def end(start: Tensors, adapters: Tensors, memory: Memory, at: At, phase: Phase) -> tuple[Tensors, Memory]:
        if not start:  # a round that trains nothing
            return local.end(start, adapters, memory, at, phase)
        finite = _finite({name: adapters[name] for name in start})
        came = {name: torch.where(over_clients(finite, x), adapters[name], x) for name, x in start.items()}
        moved, changed = local.end(start, adapters | came, memory, at, phase)
        if others := moved.keys() - start.keys():
            raise RecipeError(
                f"privacy.unit: client can't bound a method whose local steps change what the round doesn't train, "
                f"{', '.join(sorted(others))}; choose another method, or give privacy.unit=record"
            )
        change = {name: moved.get(name, x).double() - start[name].double() for name, x in came.items()}
        keys = [
            keyed(own[client].secret, "noise of a round", own[client].told, t, *_states(start, change, place))
            for place, (client, t) in enumerate(zip(at.clients.tolist(), at.round.tolist(), strict=True))
        ]
        lengths = norms(change)
        scale = torch.where(lengths.isfinite(), (private.max_grad_norm / (lengths + 1e-6)).clamp(max=1.0), 0)
        for name, x in change.items():
            x.nan_to_num_(0, 0, 0).mul_(over_clients(scale, x))
            for place, client in enumerate(at.clients.tolist()):
                deviation = private.allowances[client].noise_multiplier * private.max_grad_norm
                x[place] += deviation * _drawn(keys[place], name, x[place])
        if not finite.all():
            moments = {name: x for name, x in (memory | changed).items() if name.startswith(MOMENTS)}
            changed |= {name: torch.where(over_clients(finite, x), x, 0) for name, x in moments.items()}
        noised = {name: (x.double() + change[name]).to(x.dtype) for name, x in start.items()}
        return noised, changed | {STEPS: memory[STEPS] + 1}

    return local._replace(gradients=gradients, end=end, keeps_start=True, takes_any=True)


def _finite(tensors: Tensors) -> Tensor:
    """Return of which clients all numbers are finite, `[K]`; there is a tensor at least."""
    return torch.stack([x.isfinite().flatten(1).all(1) for x in tensors.values()]).all(0)


def _states(start: Tensors, summed: Tensors, place: int) -> list[bytes]:
    """Return digests of where a client began, and of what noise is added to: no two different sums have one noise."""
    return [digest(take(tensors, slice(place, place + 1))) for tensors in (start, summed)]


def _drawn(key: bytes, name: str, x: Tensor) -> Tensor:
    """Return standard normal numbers of this shape, in float64."""
    return torch.from_numpy(normals(keyed(key, name), x.numel())).view(x.shape).to(x.device)


class Noised:
    """The gradient of one local step with each row's own cut, and noise added; it can be taken once."""

    def __init__(self, gradient: Gradient, private: Private, own: Mapping[int, Own], at: At) -> None:
        self._gradient, self._private, self._own, self._at, self._taken = gradient, private, own, at, False

    def __call__(self, adapters: Tensors) -> Tensors:
        """Return the noised mean gradients `[K, …]` of the kinds that train."""
        if self._taken:
            raise RecipeError("privacy: the method takes a second gradient of a step's rows, which is not counted")
        self._taken = True
        found = self._gradient.clipped(adapters, self._private.max_grad_norm)
        for place, (client, step) in enumerate(zip(self._at.clients.tolist(), self._at.step.tolist(), strict=True)):
            allowed, own = self._private.allowances[client], self._own[client]
            key = keyed(own.secret, "noise", own.told, step, *_states(adapters, found, place))
            scale = allowed.noise_multiplier * self._private.max_grad_norm
            for name, x in found.items():
                noised = x[place].double() + scale * _drawn(key, name, x[place])
                x[place] = (noised / allowed.rows_per_step).to(x.dtype)
        return found

    def clipped(self, adapters: Tensors, max_norm: float) -> Tensors:
        """Raise RecipeError: a method that takes sums without noise is not private."""
        raise RecipeError("privacy: the method takes sums of rows' gradients by itself, without noise; choose another")
