"""Which kinds train and travel in round t.

These schedules are pure functions of the round, made by factories that close over their settings; no client counts for
itself, so a client that missed rounds still agrees with the others. Where factors alternate, B trains first: A has no
gradient while B = 0. The kind `head` trains in every round and travels in every round that sends anything, but for
`sharing_a`; where the head is frozen there are no such tensors.
"""

from collections.abc import Callable
from math import sqrt
from typing import Literal

from peertune.errors import RecipeError
from peertune.method import At, Memory, Phase, Schedule

_ALL = frozenset({"A", "B", "head"})


def by_round(phase: Callable[[int], Phase]) -> Schedule:
    """Make a schedule of what each round does."""

    def phases(memory: Memory, at: At) -> list[Phase]:
        rounds = at.round.tolist()
        known = {t: phase(t) for t in set(rounds)}
        return [known[t] for t in rounds]

    return Schedule(phases)


def both() -> Schedule:
    """Train and send A and B, in every round."""
    return by_round(lambda t: Phase(train=_ALL, send=_ALL))


def silent() -> Schedule:
    """Train A and B, send nothing."""
    return by_round(lambda t: Phase(train=_ALL, send=frozenset()))


def sharing_a() -> Schedule:
    """Train A and B, send A: B and the head stay a client's own."""
    return by_round(lambda t: Phase(train=_ALL, send=frozenset({"A"})))


def only_b() -> Schedule:
    """Train and send B; A stays as it is."""
    kinds = frozenset({"B", "head"})
    return by_round(lambda t: Phase(train=kinds, send=kinds))


def alternating(switch_every: int, send: Literal["trained", "both"]) -> Schedule:
    """Train B for `switch_every` rounds, then A for as many, and so on.

    `send="both"` sends A and B in every round, so the idle factor goes on being mixed; `send="trained"` sends only the
    factor that trains.

    Raises:
        RecipeError: `switch_every` is below 1.
    """
    if switch_every < 1:
        raise RecipeError(f"switch_every: {switch_every} rounds is too short, give at least 1")

    def phase(t: int) -> Phase:
        trained = frozenset({"A" if t // switch_every % 2 else "B", "head"})
        return Phase(train=trained, send=_ALL if send == "both" else trained)

    return by_round(phase)


def switching_interval(rho: float) -> int:
    """Rounds between switches for a graph that mixes with factor `rho`: `T* = max(1, round(3 / sqrt(1 - rho)))`.

    TAD-LoRA (arXiv 2602.00451) gives the law `T* ~ 1 / sqrt(1 - rho)` without its constant. Ours, 3, makes T* = 5 for
    10 clients whose pairs are active with probability 0.1, where ADF-LoRA (arXiv 2511.18291) found 5 best.

    Raises:
        RecipeError: `rho` is 1, up to rounding: such a graph never mixes.
    """
    if rho >= 1 - 1e-12:
        raise RecipeError(
            f"switch_every: at rho = {rho:g} clients hardly ever meet, give a number of rounds or a higher activation"
        )
    return max(1, round(3 / sqrt(1 - rho)))
