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
from peertune.training import reset_moments, train_local
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

    def train(state: State, phase: Phase) -> Tensor:
        before = job.algorithm.phase(phase.round - 1) if phase.round else None
        reset_moments(state.moments, job.optim.reset, phase, before)
        losses = []
        for start in range(0, clients, job.clients_per_pass):
            chunk = range(start, min(start + job.clients_per_pass, clients))
            steps = job.steps(chunk, phase.round)
            part = state.take(slice(chunk.start, chunk.stop))
            losses.append(train_local(job.model, part, steps, phase, job.optim, phase.round * job.local_steps))
            _give_back_memory()
        return torch.cat(losses)

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
        state, record = run_round(state, job.algorithm, train, exchange)
        if state.round % job.evaluate_every == 0 or state.round == job.rounds:
            start = time.perf_counter()
            evaluation = job.evaluate(state.adapters)
            seconds = record.seconds | {"evaluate": time.perf_counter() - start}
            record = replace(record, evaluation=evaluation, seconds=seconds)
        yield replace(record, state=state)
