"""One round: local steps, exchange, mix. Every engine runs this and nothing else; only `exchange` differs."""

import time
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, replace

import torch
from torch import Tensor

from peertune import metrics
from peertune.adapters.stacked import StackedModel
from peertune.topology import Graph
from peertune.training import Optim, Trained
from peertune.types import Algorithm, Batch, Evaluation, Phase, RoundRecord, State, Tensors, select

Exchange = Callable[[Tensors, int], tuple[Tensors, Tensor]]
"""`exchange(payload [K, …], round)` → (heard [H, …], weights [K, H])."""


@dataclass(frozen=True)
class Job:
    """All that an engine needs to run a recipe; made by `build`."""

    model: StackedModel
    graph: Graph
    algorithm: Algorithm
    optim: Optim
    steps: Callable[[Sequence[int], int], Iterator[list[Batch]]]  # (clients, round) → micro-batches of each local step
    evaluate: Callable[[Tensors], Evaluation]
    state: State  # where the run starts
    rounds: int
    local_steps: int
    evaluate_every: int
    clients_per_pass: int

    @property
    def device(self) -> torch.device:
        """Where the base and the stack are."""
        return next(iter(self.state.adapters.values())).device


def run_round(
    state: State,
    algorithm: Algorithm,
    train: Callable[[State, list[Phase]], Trained],
    exchange: Exchange,
    thorough: bool = True,
) -> tuple[State, RoundRecord]:
    """Run one round for the K clients of `state`, **in place**, and say what it did.

    `train(state, phases)`, a phase for each client, does the local steps in place. Mixing goes from site to site, so
    that beside the stack only one site's new factors are held. The neighbourhoods' cross terms are measured in
    `thorough` rounds only: on a dense graph of many clients they cost more than mixing.
    """
    started = time.perf_counter()
    phases = algorithm.phases(state.signals, state.round, state.clients)
    phase, _ = Counter(phases).most_common(1)[0]
    loss, grad_norm = train(state, phases)
    trained = time.perf_counter()
    payload = select(state.adapters, phase.send)
    heard, weights = exchange(payload | state.signals, state.round)
    exchanged = time.perf_counter()
    before = metrics.before_mixing(payload)
    cross_terms = None
    if thorough:
        cross_terms = metrics.neighbourhood_cross_terms({name: heard[name] for name in payload}, weights)
    measured = time.perf_counter()
    for own in _by_site(state.adapters):
        mixed = algorithm.mix(own, {name: heard[name] for name in own if name in heard}, weights, phase)
        for name, x in own.items():
            if mixed[name] is not x:
                x.copy_(mixed[name])
    signals = state.signals
    if algorithm.agreement is not None:
        signals = algorithm.agreement.step(signals, {name: heard[name] for name in signals}, weights, state.round)
    done = time.perf_counter()
    neighbours = metrics.neighbours(weights) if payload else [0] * len(loss)
    diagnostics = metrics.diagnostics(before, state.adapters)
    record = RoundRecord(
        round=state.round,
        train=sorted(phase.train),
        send=sorted(phase.send),
        clients=list(range(len(loss))),
        loss=loss.tolist(),
        grad_norm=grad_norm.tolist(),
        bytes_sent=metrics.bytes_sent(payload | state.signals, neighbours),
        neighbours=neighbours,
        edges=metrics.edges(weights) if payload else [],
        failed_edges=[],
        out_of_phase=[client for client, own in enumerate(phases) if own != phase],
        neighbourhood_cross_term=cross_terms,
        diagnostics=diagnostics,
        seconds={
            "train": trained - started,
            "exchange": exchanged - trained,
            "mix": done - measured,
            "metrics": time.perf_counter() - done + measured - exchanged,
        },
    )
    return replace(state, round=state.round + 1, signals=signals), record


def _by_site(adapters: Tensors) -> list[Tensors]:
    """Return the tensors that a mixer must see together: A and B of a site, each part of a head."""
    sites: dict[str, Tensors] = {}
    for name, x in adapters.items():
        sites.setdefault(name.rpartition(".")[0], {})[name] = x
    return list(sites.values())
