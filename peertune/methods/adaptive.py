"""Phases whose length the clients find out, and agree on, by themselves.

TAD-LoRA takes the length of a phase from the graph's rho, which someone must know beforehand. Here nobody knows the
graph. Rounds are cut into windows of H rounds. In each,

1. **probe** (first half): every client holds P random signs and mixes them with the same weights as its adapter. Their
   disagreement shrinks as that of an idle factor does.
2. **report** (second half): at most 64 clients, drawn anew for each window, tell what their probes have become. Reports
   are copied, never changed, and pass on with every exchange: they flood the network.
3. **agree** (from the next window's first round): whoever holds the reports computes, by one formula, how much the
   reporters' disagreement has shrunk, `rho^(H/2)`, from this T*, and from this the number of phases that the window
   has: the even number nearest to H / T*, so that B and A train equally long.

**Why all switch in the same round.** A phase is a function of the number of the round and of the last window's
reports. Clients that hold the same reports therefore agree, in every round of the window and whatever happened before:
a window begins with B, and nothing but its reports counts. All hold the same reports at the window's start if, in the
H / 2 rounds before it, a path forward in time leads from each reporter to each client. That is all the protocol needs,
and by the coordinated attack theorem (Gray 1978) none can do without such a condition. A client that was cut off for
longer goes on with the reports that it has, or with its last number of phases if they are fewer than half. Reports go
on flooding, so the exchange that brings the missing ones puts it back into phase with the others from the next round
on; one that joins late is in phase after its first exchange with one that knows. Windows should thus be long enough: a
flood takes a small multiple of 1 / (1 - rho) rounds.

What a window sees is one course of the graph. It shrinks disagreement more than rho, a mean over all courses, lets
expect, and the more so the fewer the clients: with ten, T comes out near T*; below five it comes out too short.

What a client does and sends does not grow with the number of clients beyond 64. Our own; the papers leave the choice
of T by task and system as an open question (ADF-LoRA, arXiv 2511.18291).
"""

from functools import lru_cache
from typing import NamedTuple

import numpy as np
import torch
from numpy.typing import ArrayLike
from torch import Tensor

from peertune.errors import RecipeError
from peertune.method import At, Memory, Message, Mixer, Phase, Schedule, Weights
from peertune.methods.mixers import gossip
from peertune.methods.schedules import switching_interval
from peertune.randomness import Draw, uniforms, words
from peertune.types import Tensors, select

PROBES = 16
"""Signs that a client mixes: as many measurements of the same graph."""
REPORTERS = 64
"""Clients that report in a window, or all if there are fewer."""
LARGEST = 1 + 1e-6
"""What no mean of signs is above, but for rounding."""
SLOWEST = 1 - 1e-6
"""The largest rho that is told from 1."""

_BOTH = frozenset({"A", "B", "head"})
_IN_TURN = (frozenset({"B", "head"}), frozenset({"A", "head"}))
_TOLD = ("adaptive.probe", "adaptive.reports", "adaptive.known")


def adaptive(window_rounds: int, first: int, clients: int, seed: int) -> tuple[Schedule, Message, Mixer]:
    """Return the schedule of `clients` in windows of `window_rounds`, and the message and the mixer that serve it.

    The first window has phases of about `first` rounds. Adapters are sent as they are and mixed by gossip.

    Raises:
        RecipeError: a window is too short to measure and to tell, below 4 rounds.
    """
    if window_rounds < 4:
        raise RecipeError(f"window_rounds: {window_rounds} rounds are too few, give at least 4")
    windows = _Windows(window_rounds, first, clients, seed)
    message = Message(windows.send, sound=_sound)
    return Schedule(windows.phases, windows.init), message, gossip()._replace(weigh=windows.weigh)


class _Windows(NamedTuple):
    """The agreement of `clients` in windows of `rounds`.

    Memory: `adaptive.probe [K, P]`; `adaptive.reports [K, 2, R, P]` on the last window and on this one, of which those
    in `adaptive.known [K, 2, R]` have come; `adaptive.fallback [K]`, the number of phases where reports are too few.
    """

    rounds: int
    first: int
    clients: int
    seed: int

    def init(self, adapters: Tensors, at: At) -> Memory:
        K, reporters = len(at.clients), min(self.clients, REPORTERS)
        return {
            "adaptive.probe": self._probes(at.round.numpy()[:, None] // self.rounds, at.clients),
            "adaptive.reports": torch.zeros(K, 2, reporters, PROBES, dtype=torch.float64),
            "adaptive.known": torch.zeros(K, 2, reporters, dtype=torch.bool),
            "adaptive.fallback": torch.full((K,), self._number(self.first)),
        }

    def phases(self, memory: Memory, at: At) -> list[Phase]:
        window, place = at.round // self.rounds, at.round % self.rounds
        reports, known = (memory[f"adaptive.{what}"][:, 0] for what in ("reports", "known"))
        counts = self._agreed(reports, known, window - 1, memory["adaptive.fallback"])
        return [
            Phase(_IN_TURN[_trains_a(here, count // 2, self.rounds)], send=_BOTH)
            for here, count in zip(place.tolist(), counts.tolist(), strict=True)
        ]

    def send(self, adapters: Tensors, memory: Memory, at: At, phase: Phase) -> tuple[Tensors, Memory]:
        return select(adapters, phase.send) | {name: memory[name] for name in _TOLD}, {}

    def weigh(
        self, own: Tensors, heard: Tensors, weights: Tensor, memory: Memory, at: At, phase: Phase
    ) -> tuple[Weights, Memory]:
        window, place, probing = at.round // self.rounds, at.round % self.rounds, self.rounds // 2
        probe, fallback = memory["adaptive.probe"].clone(), memory["adaptive.fallback"].clone()
        reports, known = _union(memory, heard, weights)
        if len(rows := (place < probing).nonzero()[:, 0]):
            probe[rows] = (weights.to(probe.dtype) @ heard["adaptive.probe"])[rows]
        for row in (place == probing - 1).nonzero()[:, 0].tolist():
            drawn = drawn_reporters(self.clients, self.seed, int(window[row])) == int(at.clients[row])
            for seat in drawn.nonzero()[0]:
                reports[row, 1, seat], known[row, 1, seat] = probe[row], True
        if len(rows := (place == self.rounds - 1).nonzero()[:, 0]):
            fallback[rows] = self._agreed(reports[rows, 1], known[rows, 1], window[rows], fallback[rows])
            for told in (reports, known):
                told[rows, 0], told[rows, 1] = told[rows, 1], torch.zeros_like(told[rows, 1])
            probe[rows] = self._probes(window[rows, None] + 1, at.clients[rows]).to(probe.device)
        changed = {"probe": probe, "reports": reports, "known": known, "fallback": fallback}
        return weights, {f"adaptive.{name}": x for name, x in changed.items()}

    def _probes(self, window: ArrayLike, of: ArrayLike) -> Tensor:
        """Return the signs `[len(of), P]` that these clients begin a window with."""
        signs = uniforms(self.seed, Draw.PROBE, window, np.asarray(of)[:, None], np.arange(PROBES)) < 0.5
        return torch.from_numpy(np.where(signs, 1.0, -1.0))

    def _number(self, interval: float) -> int:
        """Return how many phases of about so many rounds a window has."""
        return 2 * max(1, round(self.rounds / interval / 2))

    def _agreed(self, reports: Tensor, known: Tensor, window: Tensor, fallback: Tensor) -> Tensor:
        """Return each client's number of phases `[K]` by its `reports [K, R, P]` on a `window [K]`."""
        phases = fallback.clone()
        for w in window.unique().tolist():
            rows = (window == w).nonzero()[:, 0]
            before = self._probes(w, drawn_reporters(self.clients, self.seed, w)).to(reports.device)
            left, at_first = (
                _spread(x, known[rows]).tolist() for x in (reports[rows], before.expand_as(reports[rows]))
            )
            enough = (2 * known[rows].sum(1) >= max(4, reports.shape[1])).tolist()
            for place, row in enumerate(rows.tolist()):
                if enough[place] and at_first[place] > 0:
                    rho = (left[place] / at_first[place]) ** (1 / (self.rounds // 2))
                    phases[row] = self._number(switching_interval(min(rho, SLOWEST)))
        return phases


def _sound(heard: Tensors) -> Tensor:
    """Means of signs lie between -1 and 1."""
    probe, reports = ((heard[name].abs() <= LARGEST).flatten(1).all(1) for name in _TOLD[:2])
    return probe & reports


@lru_cache(maxsize=4)
def drawn_reporters(clients: int, seed: int, window: int) -> np.ndarray:
    """Return who reports in a window, `[min(clients, REPORTERS)]`, sorted, each client as likely as any other.

    By Floyd's algorithm (Bentley, CACM 30(9), 1987), in the time of those who are drawn, of however many clients.
    """
    count, drawn = min(clients, REPORTERS), set[int]()
    at_random = words(seed, Draw.REPORTER, window, np.arange(count)).tolist()
    for last, word in zip(range(clients - count, clients), at_random, strict=True):
        client = word % (last + 1)
        drawn.add(last if client in drawn else client)
    return np.array(sorted(drawn))


def _trains_a(place: int, cycles: int, rounds: int) -> bool:
    """Return whether A trains at this place of a window that has so many cycles of B, then A, over its rounds.

    Where a cycle has an odd number of rounds, B and A have the longer half in turn.
    """
    cycle = place * cycles // rounds
    start, end = (-(-number * rounds // cycles) for number in (cycle, cycle + 1))
    return place - start >= (end - start + (cycle % 2 == 0)) // 2


def _spread(values: Tensor, known: Tensor) -> Tensor:
    """Return the squared disagreement `[K]` of the known rows of `values [K, R, P]`, `known [K, R]`."""
    values = values.where(known[..., None], 0)
    mean = values.sum(1, keepdim=True) / known.sum(1).clamp(min=1)[:, None, None]
    return ((values - mean) * known[..., None]).square().sum((1, 2))


def _union(memory: Memory, heard: Tensors, weights: Tensor) -> tuple[Tensor, Tensor]:
    """Return the reports that each receiver knows after hearing the others, and which these are.

    A report is the same wherever it is known.
    """
    reports, known = memory["adaptive.reports"].clone(), memory["adaptive.known"].clone()
    entries = weights.to_sparse().coalesce()
    receivers, places = entries.indices()[:, entries.values() != 0]  # a sparse matrix may store zeros
    for i, near in enumerate(places.split(torch.bincount(receivers, minlength=len(reports)).tolist())):
        told = heard["adaptive.known"][near]  # [m, 2, R]
        came = heard["adaptive.reports"][near].masked_fill(~told[..., None], -torch.inf).amax(0)
        new = told.any(0) & ~known[i]
        reports[i] = torch.where(new[..., None], came, reports[i])
        known[i] |= new
    return reports, known
