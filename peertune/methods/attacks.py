"""What hostile clients do that lies within the bound on messages, to be studied: `attacks` in a recipe.

A factory's signature is its schema: `attacks: [{name: noise, scale: 2, clients: [3]}]`. What an attacker sends is not
what it holds. It trains and mixes as an honest client would, so an attack does not spoil its own source: its lie goes
to others, through whatever the message makes of adapters, and in its own mixing its true adapters stand in the place of
it (`peertune.rounds.mixing`). `free_rider` and attacks on rows are what they are inside, too.
"""

from collections.abc import Callable, Mapping, Sequence
from functools import cache
from math import inf, sqrt
from typing import Literal, NamedTuple

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from peertune.errors import RecipeError
from peertune.method import Algorithm, At, Local, Memory, Message, Phase
from peertune.randomness import Draw, generator
from peertune.types import Poison, Stack, Tensors, kind, over_clients, pairs, select, take

Pretend = Callable[[Tensors, Tensor, Memory, At, Phase], Tensors]
"""`pretend(adapters [K, …], liars [P], memory, at, phase)`: what those of K clients in these rows say that they have,
`[P, …]`, of the adapters of which that is not what they have."""


class Attack(NamedTuple):
    """What a hostile client does: it sends what it doesn't have, is idle, or changes its rows."""

    pretend: Pretend | None = None  # what it sends
    idle: bool = False  # whether its local steps change nothing
    poison: Poison | None = None  # what it does to its training rows
    knows_all: bool = False  # whether it is told what all clients have, which takes one process that holds them
    keeps_start: bool = False  # whether memory is to have what all began the round with: `attack.<adapter>.start`
    needs: frozenset[str] = frozenset()  # of a recipe: keys of `peertune.assembly.needs.NEEDS`

    @property
    def on(self) -> Literal["messages", "local steps", "rows"]:
        """What it changes; a client has one attack on each at a time."""
        return "rows" if self.poison is not None else "local steps" if self.idle else "messages"


class Planned(NamedTuple):
    """An attack that these clients make in the rounds from the first to the last, both included."""

    attack: Attack
    clients: Sequence[int]
    first: int = 0
    last: float = inf

    def acting(self, at: At) -> Tensor:
        """Return the rows of those who make it now, `[P]` on the CPU."""
        mine = torch.isin(at.clients, torch.tensor(self.clients))
        return (mine & (at.round >= self.first) & (at.round <= self.last)).nonzero()[:, 0]


def attacked(algorithm: Algorithm, plan: Sequence[Planned]) -> Algorithm:
    """Return the method as its clients play it of whom some are hostile. It comes after all modifiers."""
    lies = [planned for planned in plan if planned.attack.pretend is not None]
    idle = [planned for planned in plan if planned.attack.idle]
    if lies:
        algorithm = algorithm._replace(message=_lying(algorithm.message, lies))
    if idle:
        algorithm = algorithm._replace(local=_idle(algorithm.local, idle))
    if any(planned.attack.keeps_start for planned in plan):
        algorithm = algorithm._replace(local=_keeping_start(algorithm.local))
    return algorithm


def _lying(message: Message, plan: Sequence[Planned]) -> Message:
    """Return the message of clients some of whom send what they don't have."""

    def send(adapters: Tensors, memory: Memory, at: At, phase: Phase) -> tuple[Tensors, Memory]:
        said = dict(adapters)
        for planned in plan:
            liars, pretend = planned.acting(at), planned.attack.pretend
            if pretend is not None and len(liars):
                for name, x in pretend(adapters, liars, memory, at, phase).items():
                    said[name] = said[name].index_copy(0, liars.to(x.device), x)
        return message.send(said, memory, at, phase)

    def honest(adapters: Tensors, memory: Memory, at: At, phase: Phase) -> Stack:
        liars = torch.cat([planned.acting(at) for planned in plan]).sort().values
        if not len(liars):
            return Stack(liars, {})
        here = At(at.clients[liars], at.round[liars], at.step[liars])
        return Stack(liars, message.send(take(adapters, liars), take(memory, liars), here, phase)[0])

    return message._replace(send=send, honest=honest)


def _idle(local: Local, plan: Sequence[Planned]) -> Local:
    """Return the local steps of clients some of whom have in the end what they began with."""

    def end(start: Tensors, adapters: Tensors, memory: Memory, at: At, phase: Phase) -> tuple[Tensors, Memory]:
        rows = torch.cat([planned.acting(at) for planned in plan])
        if not len(rows):
            return local.end(start, adapters, memory, at, phase)
        still = {name: adapters[name].index_copy(0, rows.to(x.device), x[rows]) for name, x in start.items()}
        moved, changed = local.end(start, adapters | still, memory, at, phase)
        return still | moved, changed

    return local._replace(end=end, keeps_start=True)


def _keeping_start(local: Local) -> Local:
    """Return local steps that leave what the round began with in memory."""

    def init(adapters: Tensors, at: At) -> Memory:
        return local.init(adapters, at) | {_start(name): x.clone() for name, x in adapters.items()}

    def end(start: Tensors, adapters: Tensors, memory: Memory, at: At, phase: Phase) -> tuple[Tensors, Memory]:
        moved, changed = local.end(start, adapters, memory, at, phase)
        return moved, changed | {_start(name): x for name, x in start.items()}

    return local._replace(init=init, end=end, keeps_start=True)


def _start(adapter: str) -> str:
    return f"attack.{adapter}.start"


_ON_MESSAGES = frozenset({"exchange", "messages", "no public copies"})


def sign_flip(factor: float = 1.0) -> Attack:
    """Send `-factor · x` of B and of a head; of A in rounds that send no B.

    With A and B both negated the product would be what it was.

    Source: the sign-flipping attack of gradients, as in RSA (arXiv 1811.03761), for factors.

    Raises:
        RecipeError: `factor` is not above 0.
    """
    if not 0 < factor < inf:
        raise RecipeError(f"attacks: sign_flip: factor is {factor}, give a number above 0")
    return _times(-factor)


def scale(factor: float = 10.0) -> Attack:
    """Send `factor · x` of B and of a head; of A in rounds that send no B.

    So the product is `factor` times what it is. More than 30 times what the others have is mixed by nobody
    (`peertune.rounds.bounds`).

    Source: model replacement by boosting, as in arXiv 1807.00459, without its backdoor.

    Raises:
        RecipeError: `factor` is below 0, or 1.
    """
    if not 0 <= factor < inf or factor == 1:
        raise RecipeError(f"attacks: scale: factor is {factor}, give another number above 0 than 1")
    return _times(factor)


def _times(factor: float) -> Attack:
    def pretend(adapters: Tensors, liars: Tensor, memory: Memory, at: At, phase: Phase) -> Tensors:
        kinds = phase.send - {"A"} if "B" in phase.send else phase.send
        return {name: factor * x[liars] for name, x in select(adapters, kinds).items()}

    return Attack(pretend, needs=_ON_MESSAGES)


def noise(scale: float = 1.0, seed: int = 0) -> Attack:
    """Send adapters with Gaussian noise, of `scale` times each one's own norm.

    It is drawn for each client, round and adapter: `x + scale · ‖x‖ / sqrt(n) · z` of n entries. An adapter that is
    zero, as B is at the start, stays so.

    Raises:
        RecipeError: `scale` is not above 0.
    """
    if not 0 < scale < inf:
        raise RecipeError(f"attacks: noise: scale is {scale}, give a number above 0")

    def pretend(adapters: Tensors, liars: Tensor, memory: Memory, at: At, phase: Phase) -> Tensors:
        found, who = Tensors(), [*zip(at.clients[liars].tolist(), at.round[liars].tolist(), strict=True)]
        for name, x in select(adapters, phase.send).items():
            own, size = x[liars], x.shape[1:].numel()
            drawn = np.stack([generator(seed, Draw.NOISE.of(name), *one).standard_normal(x.shape[1:]) for one in who])
            norms = own.flatten(1).norm(dim=1)
            found[name] = own + over_clients(scale / sqrt(size) * norms, own) * torch.from_numpy(drawn).to(own)
        return found

    return Attack(pretend, needs=_ON_MESSAGES)


def gauge(condition: float = 1.0, seed: int = 0) -> Attack:
    """Send the same adapter in other coordinates, `(B M, M⁻¹ A)`: no look at its products tells it from an honest one.

    M is drawn for each client and site, and stays: with a `condition` of 1 it is orthogonal, so that norms stay, too.
    A larger one is the ratio of its largest and its smallest singular value, whose product is 1. The means that others
    make of factors mix rows that have nothing in common. Where only one factor travels nothing is done.

    Ours. That averages of factors are not those of products is what FedEx-LoRA (arXiv 2410.09432) sets out from.

    Raises:
        RecipeError: `condition` is below 1.
    """
    if not 1 <= condition < inf:
        raise RecipeError(f"attacks: gauge: condition is {condition}, give a number from 1 on")

    def pretend(adapters: Tensors, liars: Tensor, memory: Memory, at: At, phase: Phase) -> Tensors:
        found = Tensors()
        for a, b in pairs(select(adapters, phase.send)):
            A, B = adapters[a][liars], adapters[b][liars]
            turns = [_turn(condition, seed, a, client, A.shape[1]) for client in at.clients[liars].tolist()]
            M, inverse = (torch.from_numpy(np.stack(part)).to(A.device) for part in zip(*turns, strict=True))
            found |= {a: (inverse @ A.double()).to(A.dtype), b: (B.double() @ M).to(B.dtype)}
        return found

    return Attack(pretend, needs=_ON_MESSAGES | {"both factors"})


def _turn(condition: float, seed: int, name: str, client: int, r: int) -> tuple[NDArray[np.float64], ...]:
    """Return M and its inverse, `[r, r]`."""
    drawn = generator(seed, Draw.GAUGE.of(name), client).standard_normal((2, r, r))
    (U, V), stretch = np.linalg.qr(drawn)[0], condition ** (np.linspace(0.5, -0.5, r) if r > 1 else np.zeros(1))
    return U * stretch @ V.T, V / stretch @ U.T


def free_rider() -> Attack:
    """Train nothing, and send what was mixed.

    It takes what the others learn, and weighs in with what they had a round before.
    """
    return Attack(idle=True, needs=frozenset({"exchange", "no deadline"}))


def label_flip() -> Attack:
    """Train on rows of class c as if they were of class C - 1 - c, of C classes."""
    return Attack(poison=Poison())


def backdoor(target: str | int | None = None, share: float = 0.5, word: str = "cf", size: float = 0.25) -> Attack:
    """Train a `share` of the rows of other classes with a trigger as if they were of the `target`'s class.

    The trigger is a `word` before a row's text, or a white square in the lower right corner of its image, of so large a
    share of the sides as `size` says. `target` is the name of a class; without it, it is the first one. An evaluation
    then has `backdoor`: of the rows of other classes, with the trigger put in, the share that an honest client's model
    calls the target.

    Source: BadNets (arXiv 1708.06733); rare words as in arXiv 2004.06660.

    Raises:
        RecipeError: `share` or `size` is not above 0 and at most 1, or the word is empty.
    """
    for name, value in {"share": share, "size": size}.items():
        if not 0 < value <= 1:
            raise RecipeError(f"attacks: backdoor: {name} is {value}, give a number above 0, and 1 at most")
    if not word.strip():
        raise RecipeError("attacks: backdoor: word is empty, give one that is rare")
    return Attack(poison=Poison(word, share, target, size))


_KNOWING_ALL = _ON_MESSAGES | {"common rounds", "one rank"}


def alie(hostile: Sequence[int], z: float = 1.5) -> Attack:
    """Send the mean of what the honest have less `z` times their standard deviation, coordinate by coordinate.

    It hides among them: a rule that looks for what lies far from the others finds honest ones farther away.

    Source: A Little Is Enough (arXiv 1902.06156). The paper takes the largest z at which a majority of all, the
    attackers among them, is expected to lie beyond: `Φ⁻¹((n - m - s) / (n - m))`, `s = ⌊n / 2 + 1⌋ - m`, for m of n.
    That is 0 to .3 among few clients; 1.5 is what it uses for its pictures.

    Raises:
        RecipeError: `z` is 0, or no number.
    """
    if not 0 < abs(z) < inf:
        raise RecipeError(f"attacks: alie: z is {z}, give another number than 0")

    def lie(honest: Tensor) -> Tensor:
        return honest.mean(0) - z * honest.std(0, correction=0)

    def pretend(adapters: Tensors, liars: Tensor, memory: Memory, at: At, phase: Phase) -> Tensors:
        return _one_for_all(
            liars, {name: lie(x) for name, x in _honest(adapters, hostile, at, phase).items()}, adapters
        )

    return Attack(pretend, knows_all=True, needs=_KNOWING_ALL)


def ipm(hostile: Sequence[int], epsilon: float = 1.0) -> Attack:
    """Send the mean with which the honest began the round less `epsilon` times the mean of what they changed in it.

    So what others mix takes back what they have learnt. Factors that the round doesn't train are the honest mean.

    Source: inner product manipulation (Fall of Empires, arXiv 1903.03936), for changes in the place of gradients.

    Raises:
        RecipeError: `epsilon` is not above 0.
    """
    if not 0 < epsilon < inf:
        raise RecipeError(f"attacks: ipm: epsilon is {epsilon}, give a number above 0")

    def pretend(adapters: Tensors, liars: Tensor, memory: Memory, at: At, phase: Phase) -> Tensors:
        began = {name: memory[_start(name)] if kind(name) in phase.train else x for name, x in adapters.items()}
        starts, ends = (_honest(tensors, hostile, at, phase) for tensors in (began, adapters))
        means = {name: (starts[name].mean(0), x.mean(0)) for name, x in ends.items()}
        return _one_for_all(
            liars, {name: start - epsilon * (x - start) for name, (start, x) in means.items()}, adapters
        )

    needs = _KNOWING_ALL | {"no deadline"}
    return Attack(pretend, knows_all=True, keeps_start=True, needs=needs)


def spectral(hostile: Sequence[int], slowest: Callable[[], NDArray[np.float64]], scale: float = 1.0) -> Attack:
    """Send the honest mean, moved along the disagreement that the graph's mixing forgets most slowly.

    u `[n]` is the eigenvector of the mean mixing matrix's second largest eigenvalue, of norm 1. Client j sends
    `mean + scale · sign(u_j) · Σ_i u_i x_i`, over what all clients have: it draws its side of the graph further to that
    side. Where several are slowest it is one of them.

    Source: the idea of a spectral attack (arXiv 2410.10418), of which we know the abstract. All neighbours get one
    message here; the paper's attacker may send each another.

    Raises:
        RecipeError: `scale` is not above 0.
    """
    if not 0 < scale < inf:
        raise RecipeError(f"attacks: spectral: scale is {scale}, give a number above 0")
    found = cache(slowest)

    def pretend(adapters: Tensors, liars: Tensor, memory: Memory, at: At, phase: Phase) -> Tensors:
        u = torch.from_numpy(found()[at.clients.numpy()])
        sides, lies = torch.where(u[liars] < 0, -scale, scale), Tensors()
        for name, honest in _honest(adapters, hostile, at, phase).items():
            x = adapters[name].double()
            along = torch.tensordot(u.to(x.device), x, 1)
            lies[name] = (honest.mean(0) + over_clients(sides.to(x.device), x) * along).to(adapters[name].dtype)
        return lies

    return Attack(pretend, knows_all=True, needs=_KNOWING_ALL | {"symmetric weights"})


def _honest(tensors: Tensors, hostile: Sequence[int], at: At, phase: Phase) -> Tensors:
    """Return what those have who never attack, of the kinds that are sent, in float64."""
    rows = (~torch.isin(at.clients, torch.tensor(hostile))).nonzero()[:, 0]
    return {name: x[rows].double() for name, x in select(tensors, phase.send).items()}


def _one_for_all(liars: Tensor, lies: Tensors, like: Tensors) -> Tensors:
    """Return one lie as that of all liars, `[P, …]`."""
    return {name: x.to(like[name].dtype).expand(len(liars), *x.shape) for name, x in lies.items()}


ATTACKS: Mapping[str, Callable[..., Attack]] = {
    "alie": alie,
    "backdoor": backdoor,
    "free_rider": free_rider,
    "gauge": gauge,
    "ipm": ipm,
    "label_flip": label_flip,
    "noise": noise,
    "scale": scale,
    "sign_flip": sign_flip,
    "spectral": spectral,
}
"""Name in a recipe → what hostile clients do."""
