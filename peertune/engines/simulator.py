"""All clients in one process, their adapters in one stack."""

from collections.abc import Iterator, Sequence
from functools import partial

from peertune.round import Heard, Job, as_weights, run_rounds
from peertune.topology import planned_weights
from peertune.types import RoundRecord, Tensors


def simulate(job: Job) -> Iterator[RoundRecord]:
    """Run the rounds that are left of a job and yield a record after each; `record.state` is the state it left.

    The caller logs, draws and keeps checkpoints. Resuming is simulating a job whose `state` is an earlier record's: the
    rest of the run comes out the same to the bit. There is one state, which the next round changes in place: `clone()`
    what is to be kept. `job.state` stays as it is. Clients that are down by `job.faults` keep what they have.
    """
    return run_rounds(job, partial(_exchange, job))


def _exchange(job: Job, clients: Sequence[int], payload: Tensors, t: int) -> Heard:
    """Let everybody hear everybody; the round's mixing matrix says who takes what."""
    matrix, failed = planned_weights(job.graph, job.faults, t)
    if len(clients) < job.graph.clients:
        matrix = matrix[clients][:, clients]
    return Heard(payload, as_weights(matrix, job.device), clients, failed)
