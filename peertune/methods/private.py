"""Local steps that bound what anybody can learn of one row of a client's (record level), by clipping and noise.

DP-SGD (Abadi et al., arXiv 1607.00133) by client, of LoRA factors: a step takes each of the client's rows with one
chance (Poisson sampling), cuts each row's own gradient to a norm, adds Gaussian noise to the sum, and divides by how
many rows a step takes on average, never by how many it took. All that follows, moments, mixing and messages, is made of
what is noised, and costs nothing more.

The accounting is `peertune.privacy.accountant`'s, the noise `peertune.privacy.draws`'. A client whose budget has no
room for another round of local steps trains nothing from there on, and goes on mixing.
"""

from collections.abc import Mapping, Sequence
from typing import NamedTuple

import torch

from peertune.method import Algorithm, At, Gradient, Memory, Phase
from peertune.privacy.accountant import epsilon
from peertune.privacy.draws import digest, keyed, normals
from peertune.types import Tensors, take

STEPS = "privacy.steps"
"""What each client's memory holds of its budget: how many noised steps it has made, `[K]`."""


class Own(NamedTuple):
    """What a client's noise follows from, and nobody else knows."""

    secret: bytes
    told: bytes  # a digest of its rows and of all by which a step comes to something else


class Allowance(NamedTuple):
    """What a client's steps are."""

    rate: float  # the chance of each of its rows to be in a step
    noise_multiplier: float  # the noise's standard deviation, in `max_grad_norm`
    rows_per_step: float  # on average: what the sum is divided by
    most_steps: int | None  # within its budget; None: it has none


class Private(NamedTuple):
    """What private local steps are held to."""

    max_grad_norm: float  # what a row's own gradient is cut to
    delta: float
    allowances: Mapping[int, Allowance]  # of each client here


def spent(private: Private, clients: Sequence[int], steps: Sequence[int]) -> list[float]:
    """Return the epsilon that these clients have spent with so many steps, `[K]` both."""
    own = (private.allowances[client] for client in clients)
    return [
        epsilon(one.noise_multiplier, one.rate, count, private.delta) for one, count in zip(own, steps, strict=True)
    ]


def by_row(algorithm: Algorithm, private: Private, own: Mapping[int, Own], local_steps: int) -> Algorithm:
    """Return the method with private local steps, of clients of whom each has what it alone knows.

    `gradient(…)` is then noised wherever a method's `Local` takes it, so what that makes of it is private as well.
    Memory: `privacy.steps`. Its schedule trains nothing at clients whose allowance has no room for a whole round.
    """
    schedule, local = algorithm.schedule, algorithm.local

    def init(adapters: Tensors, at: At) -> Memory:
        return schedule.init(adapters, at) | {STEPS: torch.zeros(len(at.clients), dtype=torch.int64)}

    def phases(memory: Memory, at: At) -> list[Phase]:
        rounds = (memory[STEPS] // local_steps).tolist()  # those that are whole: no step within one changes it
        most = [private.allowances[client].most_steps for client in at.clients.tolist()]
        return [
            phase if room is None or (made + 1) * local_steps <= room else phase._replace(train=frozenset())
            for phase, made, room in zip(schedule.phases(memory, at), rounds, most, strict=True)
        ]

    def gradients(
        gradient: Gradient, adapters: Tensors, start: Tensors, memory: Memory, at: At, phase: Phase
    ) -> tuple[Tensors, Memory]:
        noised = Noised(gradient, private, own, at)
        followed, changed = local.gradients(noised, adapters, start, memory, at, phase)
        return followed, changed | {STEPS: memory[STEPS] + 1}

    return algorithm._replace(
        schedule=schedule._replace(phases=phases, init=init), local=local._replace(gradients=gradients)
    )


class Noised:
    """The gradient of one local step with each row's own cut, and noise added; it can be taken once."""

    def __init__(self, gradient: Gradient, private: Private, own: Mapping[int, Own], at: At) -> None:
        self._gradient, self._private, self._own, self._at, self._taken = gradient, private, own, at, False

    def __call__(self, adapters: Tensors) -> Tensors:
        """Return the noised mean gradients `[K, …]` of the kinds that train."""
        assert not self._taken, "a second gradient of the same rows would cost more than is counted"
        self._taken = True
        found = self.clipped(adapters, self._private.max_grad_norm)
        for place, (client, step) in enumerate(zip(self._at.clients.tolist(), self._at.step.tolist(), strict=True)):
            allowed, own = self._private.allowances[client], self._own[client]
            here = digest(take(adapters, slice(place, place + 1)))
            key = keyed(own.secret, "noise", own.told, step, ",".join(found), here)
            scale = allowed.noise_multiplier * self._private.max_grad_norm
            for name, x in found.items():
                drawn = torch.from_numpy(normals(keyed(key, name), x[place].numel())).view(x.shape[1:])
                x[place] = ((x[place].double() + scale * drawn.to(x.device)) / allowed.rows_per_step).to(x.dtype)
        return found

    def clipped(self, adapters: Tensors, max_norm: float) -> Tensors:
        """Return the sums of the rows' gradients, cut and not noised."""
        return self._gradient.clipped(adapters, max_norm)
