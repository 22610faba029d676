"""All clients in one process, their adapters in one stack."""

from collections.abc import Iterator, Mapping, Sequence
from functools import partial

from peertune.rounds.asynchronous import run_asynchronous
from peertune.rounds.job import Heard, Job, Refuse
from peertune.rounds.mixing import exchanged
from peertune.rounds.record import RoundRecord
from peertune.rounds.round import next_rounds, run_rounds
from peertune.types import Stack, Tensors


def simulate(job: Job) -> Iterator[RoundRecord]:
    """Run the rounds that are left of a job and yield a record after each; `record.state` is the state it left.

    The caller logs, draws and keeps checkpoints. Resuming is simulating a job whose `state` is an earlier record's: the
    rest of the run comes out the same to the bit. There is one state, which the next round changes in place: `clone()`
    what is to be kept. `job.state` stays as it is. Clients that are down by `job.faults` keep what they have.
    """
    return run_rounds(job, partial(_exchange, job)) if job.pushing is None else run_asynchronous(job, _carry)


def simulate_together(jobs: Mapping[str, Job]) -> Iterator[tuple[str, RoundRecord | Exception]]:
    """Run a round of those of these jobs that are the furthest behind, and yield each one's record, by its name.

    Their clients train in common passes over the base that they share. Each job goes on from its state, **in place**:
    the caller's next call is for jobs with the states of these records. Of one that can't go on it is told why.
    """
    behind = min(job.state.round for job in jobs.values())
    now = {name: job for name, job in jobs.items() if job.state.round == behind}
    yield from zip(now, next_rounds([(job, partial(_exchange, job)) for job in now.values()]), strict=True)


def _exchange(job: Job, clients: Sequence[int], payload: Sequence[Stack], t: int, refuse: Refuse) -> Heard:
    """Let everybody hear everybody; the round's mixing matrix says who takes what."""
    return exchanged(job, clients, clients, payload, t, refuse)


def _carry(payload: Tensors, to: Mapping[int, Sequence[int]]) -> tuple[Sequence[int], Tensors]:
    """Leave what clients send where all of them are."""
    return [*to], payload
