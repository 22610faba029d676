"""What a run has cost by the end of each record: rounds, traffic and virtual time."""

from collections.abc import Mapping, Sequence
from itertools import accumulate
from typing import Any, NamedTuple

Record = Mapping[str, Any]


class Spent(NamedTuple):
    """What a run has cost by the end of a record."""

    rounds: int
    megabytes_sent: float  # by a client, in the mean over all that the run has
    virtual_seconds: float | None  # until the last client had ended all its rounds so far; None: nothing has a time


def judged(record: Record) -> Sequence[int]:
    """Return the clients that a record's evaluation is of, in its order; none where there is no evaluation.

    They are those of the record, but for hostile ones. An asynchronous run's are all clients, whoever ended a training
    in the record.
    """
    if record["evaluation"] and (told := record["evaluation"].get("judged")):
        return list(told)
    scores = record["evaluation"]["clients"] if record["evaluation"] else []
    return record["clients"] if len(scores) == len(record["clients"]) else range(len(scores))


def spent(records: Sequence[Record]) -> list[Spent]:
    """Return what was spent by the end of each record."""
    clients = {client for record in records for client in (*record["clients"], *judged(record))}
    sent = accumulate(sum(record["bytes_sent"]) for record in records)
    # Rounds have no common end: where a slow client is down, the others may end the next one before it ends the last.
    seconds: list[float | None] = [None] * len(records)
    if timed(records):
        seconds = [*accumulate((record["time_s"] for record in records), max)]
    return [
        Spent(record["round"] + 1, total / max(1, len(clients)) / 1e6, until)
        for record, total, until in zip(records, sent, seconds, strict=True)
    ]


def timed(records: Sequence[Record]) -> bool:
    """Whether all records have a virtual time; peers' and older ones don't, nor those of a recipe without one."""
    return all(record.get("time_s") is not None for record in records)
