"""All clients in one process, their adapters in one stack."""

import ctypes
import sys
import time
from collections.abc import Iterator
from dataclasses import replace

import torch
from torch import Tensor

from peertune.round import Job, run_round
from peertune.topology import weights_at
from peertune.training import Trained, reset_moments, train_local
from peertune.types import Phase, RoundRecord, State, Tensors

DENSE_UP_TO = 64
"""Clients up to which a dense mixing matrix is faster than a sparse one."""


def _give_back_memory() -> None:
    """Have glibc return what it holds free: micro-batches of many sizes fragment it, by a gigabyte in 200 steps."""
    trim = getattr(ctypes.CDLL(None), "malloc_trim", None) if sys.platform == "linux" else None
    if trim is not None:
        trim(0)


def simulate(job: Job) -> Iterator[RoundRecord]:
    """Run the rounds that are left of a job and yield a record after each; `record.state` is the state it left.

    The caller logs, draws and keeps checkpoints. Resuming is simulating a job whose `state` is an earlier record's: the
    rest of the run comes out the same to the bit. There is one state, which the next round changes in place: `clone()`
    what is to be kept. `job.state` stays as it is.
    """
    clients = job.graph.clients

    def train(state: State, phases: list[Phase]) -> Trained:
        before = job.algorithm.phases(state.signals, state.round - 1, clients) if state.round else [None] * clients
        alike: dict[tuple[Phase, Phase | None], list[int]] = {}
        for client, pair in enumerate(zip(phases, before, strict=True)):
            alike.setdefault(pair, []).append(client)
        result = Trained(*torch.zeros(2, clients, dtype=torch.float64, device=job.device))
        for (phase, last), members in alike.items():
            for start in range(0, len(members), job.clients_per_pass):
                chunk = members[start : start + job.clients_per_pass]
                neighbouring = len(chunk) == chunk[-1] - chunk[0] + 1
                places = slice(chunk[0], chunk[-1] + 1) if neighbouring else torch.tensor(chunk, device=job.device)
                part = state.take(places)
                reset_moments(part.moments, job.optim.reset, phase, last)
                steps = job.steps(chunk, phase.round)
                trained = train_local(job.model, part, steps, phase, job.optim, phase.round * job.local_steps)
                if isinstance(places, Tensor):
                    state.put(places, part)
                result.loss[places], result.grad_norm[places] = trained
                _give_back_memory()
        return result

    def exchange(payload: Tensors, round: int) -> tuple[Tensors, Tensor]:
        matrix = weights_at(job.graph, round)
        if clients <= DENSE_UP_TO:
            return payload, torch.from_numpy(matrix.toarray()).to(job.device)
        places = torch.stack([torch.from_numpy(x).long() for x in matrix.tocoo().coords])
        values = torch.from_numpy(matrix.data)
        sparse = torch.sparse_coo_tensor(places, values, matrix.shape, check_invariants=False)
        return payload, sparse.coalesce().to(job.device)

    state = job.state.clone()
    while state.round < job.rounds:
        due = (state.round + 1) % job.evaluate_every == 0 or state.round + 1 == job.rounds
        state, record = run_round(state, job.algorithm, train, exchange, thorough=due)
        if due:
            start = time.perf_counter()
            evaluation = job.evaluate(state.adapters)
            seconds = record.seconds | {"evaluate": time.perf_counter() - start}
            record = replace(record, evaluation=evaluation, seconds=seconds)
        yield replace(record, state=state)
