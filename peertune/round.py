"""One round: local steps, exchange, mix. Every engine runs this and nothing else; only `exchange` differs."""

import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, replace

import torch
from torch import Tensor

from peertune import metrics
from peertune.adapters.stacked import StackedModel
from peertune.topology import Graph
from peertune.training import Optim
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
    train: Callable[[State, Phase], Tensor],
    exchange: Exchange,
) -> tuple[State, RoundRecord]:
    """Run one round for the K clients of `state`, **in place**, and say what it did.

    `train(state, phase)` → loss [K] does the local steps in place. Mixing goes from site to site, so that beside the
    stack only one site's new factors are held.
    """
    started = time.perf_counter()
    phase = algorithm.phase(state.round)
    loss = train(state, phase)
    trained = time.perf_counter()
    payload = select(state.adapters, phase.send)
    heard, weights = exchange(payload, state.round)
    exchanged = time.perf_counter()
    before = metrics.client_mean(payload)
    measured = time.perf_counter()
    for own in _by_site(state.adapters):
        mixed = algorithm.mix(own, {name: heard[name] for name in own if name in heard}, weights, phase)
        for name, x in own.items():
            if mixed[name] is not x:
                x.copy_(mixed[name])
    done = time.perf_counter()
    neighbours = metrics.neighbours(weights) if payload else [0] * len(loss)
    diagnostics = metrics.diagnostics(before, state.adapters)
    record = RoundRecord(
        round=state.round,
        train=sorted(phase.train),
        send=sorted(phase.send),
        clients=list(range(len(loss))),
        loss=loss.tolist(),
        bytes_sent=metrics.bytes_sent(payload, neighbours),
        neighbours=neighbours,
        failed_edges=[],
        diagnostics=diagnostics,
        seconds={
            "train": trained - started,
            "exchange": exchanged - trained,
            "mix": done - measured,
            "metrics": time.perf_counter() - done + measured - exchanged,
        },
    )
    return replace(state, round=state.round + 1), record


def _by_site(adapters: Tensors) -> list[Tensors]:
    """Return the tensors that a mixer must see together: A and B of a site, each part of a head."""
    sites: dict[str, Tensors] = {}
    for name, x in adapters.items():
        sites.setdefault(name.rpartition(".")[0], {})[name] = x
    return list(sites.values())
