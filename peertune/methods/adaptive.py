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

from collections.abc import Sequence
from functools import lru_cache

import numpy as np
import torch
from torch import Tensor

from peertune import randomness
from peertune.errors import RecipeError
from peertune.methods.schedules import alternating, switching_interval
from peertune.types import Agreement, Phase, Tensors

PROBES = 16
"""Signs that a client mixes: as many measurements of the same graph."""
REPORTERS = 64
"""Clients that report in a window, or all if there are fewer."""
LARGEST = 1 + 1e-6
"""What no mean of signs is above, but for rounding."""
SLOWEST = 1 - 1e-6
"""The largest rho that is told from 1."""


def adaptive(window_rounds: int, first: int, clients: int, seed: int) -> Agreement:
    """Return the agreement of `clients` in windows of `window_rounds`, the first with phases of about `first` rounds.

    Signals, for each client: `probe [K, P]`; `reports [K, 2, R, P]` on the last window and on this one, NaN where none
    has come; `fallback [K]`, the number of phases where reports are too few; `client [K]`, its number.

    Raises:
        RecipeError: a window is too short to measure and to tell, below 4 rounds.
    """
    if window_rounds < 4:
        raise RecipeError(f"window_rounds: {window_rounds} rounds are too few, give at least 4")
    probing = window_rounds // 2
    plan = [phase.train for phase in map(alternating(1, send="both"), range(2))]  # B, A
    send = alternating(1, send="both")(0).send

    def probes(window: int, of: np.ndarray) -> Tensor:
        signs = randomness.uniforms(seed, "probe", window, of[:, None], np.arange(PROBES)) < 0.5
        return torch.from_numpy(np.where(signs, 1.0, -1.0))

    def number(interval: float) -> int:
        return 2 * max(1, round(window_rounds / interval / 2))

    def agreed(reports: Tensor, window: int, fallback: Tensor) -> Tensor:
        """Return each client's number of phases `[K]` by its `reports [K, R, P]` on a window."""
        known = ~reports[:, :, 0].isnan()
        before = probes(window, drawn_reporters(clients, seed, window)).to(reports.device).expand_as(reports)
        left, first = (_spread(x, known) for x in (reports, before))
        phases = fallback.clone()
        for client in range(len(reports)):
            if 2 * int(known[client].sum()) >= max(4, reports.shape[1]) and first[client] > 0:
                rho = float(left[client] / first[client]) ** (1 / probing)
                phases[client] = number(switching_interval(min(rho, SLOWEST)))
        return phases

    def init(which: Sequence[int], round: int) -> Tensors:
        numbers = np.asarray(which)
        nothing = torch.full((len(which), 2, min(clients, REPORTERS), PROBES), torch.nan, dtype=torch.float64)
        return {
            "adaptive.probe": probes(round // window_rounds, numbers),
            "adaptive.reports": nothing,
            "adaptive.fallback": torch.full((len(which),), number(first)),
            "adaptive.client": torch.from_numpy(numbers),
        }

    def phases(signals: Tensors, round: int) -> list[Phase]:
        window, place = divmod(round, window_rounds)
        counts = agreed(signals["adaptive.reports"][:, 0], window - 1, signals["adaptive.fallback"])
        return [Phase(round, plan[_trains_a(place, count // 2, window_rounds)], send) for count in counts.tolist()]

    def step(own: Tensors, heard: Tensors, weights: Tensor, round: int) -> Tensors:
        window, place = divmod(round, window_rounds)
        probe, reports = own["adaptive.probe"], _union(own, heard, weights)
        if place < probing:
            probe = weights.to(probe.dtype) @ heard["adaptive.probe"]
        if place == probing - 1:
            reporters = torch.from_numpy(drawn_reporters(clients, seed, window)).to(probe.device)
            places = reporters == own["adaptive.client"][:, None]
            reports[:, 1][places] = probe[places.any(1)]
        fallback = own["adaptive.fallback"]
        if place == window_rounds - 1:
            fallback = agreed(reports[:, 1], window, fallback)
            reports = torch.stack([reports[:, 1], torch.full_like(reports[:, 1], torch.nan)], dim=1)
            probe = probes(window + 1, own["adaptive.client"].cpu().numpy()).to(probe.device)
        return own | {"adaptive.probe": probe, "adaptive.reports": reports, "adaptive.fallback": fallback}

    def sound(heard: Tensors) -> Tensor:
        """Means of signs lie between -1 and 1; a report may be NaN, a probe may not."""
        probe, reports = heard["adaptive.probe"].abs(), heard["adaptive.reports"].abs()
        return (probe <= LARGEST).all(1) & ~(reports > LARGEST).flatten(1).any(1)

    return Agreement(init, phases, step, sound)


@lru_cache(maxsize=4)
def drawn_reporters(clients: int, seed: int, window: int) -> np.ndarray:
    """Return who reports in a window, `[min(clients, REPORTERS)]`, sorted, each client as likely as any other.

    By Floyd's algorithm (Bentley, CACM 30(9), 1987), in the time of those who are drawn, of however many clients.
    """
    count, drawn = min(clients, REPORTERS), set[int]()
    words = randomness.words(seed, "reporter", window, np.arange(count)).tolist()
    for last, word in zip(range(clients - count, clients), words, strict=True):
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


def _union(own: Tensors, heard: Tensors, weights: Tensor) -> Tensor:
    """Return what each receiver knows after hearing the others: a report is the same wherever it is known."""
    reports = own["adaptive.reports"].clone()
    receivers, places = weights.to_sparse().coalesce().indices()
    for i, near in enumerate(places.split(torch.bincount(receivers, minlength=len(reports)).tolist())):
        told = heard["adaptive.reports"][near]
        known = told.nan_to_num(nan=-torch.inf).amax(0)
        reports[i] = reports[i].where(~reports[i].isnan(), known.where(known > -torch.inf, torch.nan))
    return reports
