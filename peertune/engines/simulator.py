"""All clients in one process, their adapters in one stack."""

from collections.abc import Iterator, Sequence
from dataclasses import replace
from functools import partial

import torch

from peertune.round import Heard, Job, run_round
from peertune.topology import active_edges, clients_down, drop_edges, failed_edges, weights_at
from peertune.types import RoundRecord, Tensors

DENSE_UP_TO = 64
"""Clients up to which a dense mixing matrix is faster than a sparse one."""


def simulate(job: Job) -> Iterator[RoundRecord]:
    """Run the rounds that are left of a job and yield a record after each; `record.state` is the state it left.

    The caller logs, draws and keeps checkpoints. Resuming is simulating a job whose `state` is an earlier record's: the
    rest of the run comes out the same to the bit. There is one state, which the next round changes in place: `clone()`
    what is to be kept. `job.state` stays as it is. Clients that are down by `job.faults` keep what they have.
    """
    state = job.state.clone()
    while state.round < job.rounds:
        down = clients_down(job.faults, state.round)
        if not down:
            state, record = run_round(job, state, job.clients, partial(_exchange, job, job.clients))
            yield record
            continue
        up = [client for client in job.clients if client not in down]
        rows = torch.tensor(up, device=job.device)
        part, record = run_round(job, state.take(rows), up, partial(_exchange, job, up))
        state.put(rows, part)
        state = replace(state, round=part.round)
        yield replace(record, state=state)


def _exchange(job: Job, clients: Sequence[int], payload: Tensors, t: int) -> Heard:
    """Let everybody hear everybody; the round's mixing matrix says who takes what."""
    matrix, failed = weights_at(job.graph, t), []
    if job.faults:
        failed = failed_edges(job.faults, active_edges(job.graph, t), t)
        matrix = drop_edges(matrix, failed)[clients][:, clients]
    if len(clients) <= DENSE_UP_TO:
        weights = torch.from_numpy(matrix.toarray())
    else:
        places = torch.stack([torch.from_numpy(x).long() for x in matrix.tocoo().coords])
        weights = torch.sparse_coo_tensor(places, torch.from_numpy(matrix.data), matrix.shape, check_invariants=False)
        weights = weights.coalesce()
    return Heard(payload, weights.to(job.device), clients, failed)
