"""Whether a peer has company: neighbours that can be reached, and that take it."""

import logging
import time
from collections.abc import Iterator, Mapping, Sequence
from typing import Literal

from peertune.rounds.job import Job
from peertune.rounds.turns import Steps
from peertune.topology import may_meet
from peertune.types import Batch
from peertune.wire.swap import Swapper

log = logging.getLogger(__name__)


class Company:
    """What becomes of a peer that reaches nobody, or is refused, as the recipe's network says."""

    def __init__(
        self,
        job: Job,
        swapper: Swapper,
        when_alone: Literal["train", "wait"] = "train",
        when_refused: Literal["stop", "train"] = "stop",
    ) -> None:
        self._swapper, self._near = swapper, neighbours(job)
        self._when_alone, self._when_refused = when_alone, when_refused
        self._alone_since = time.monotonic()

    def met(self) -> None:
        """Note that an edge has counted."""
        self._alone_since = time.monotonic()

    def shut_out(self) -> bool:
        """Return whether the neighbours have refused this peer for as long as a round waits, and that is to end it."""
        if self._when_refused == "train" or time.monotonic() - self._alone_since < self._swapper.patience_s:
            return False
        self._alone_since = time.monotonic()
        if refusals := self._swapper.refusals(self._near):
            log.warning("stops, as network.when_refused says: %s", in_words(refusals))
        return bool(refusals)

    def is_there(self) -> bool:
        """Return whether training may go on: where it is to wait, once a neighbour can be reached; not if shut out.

        Nobody is asked while one is known to be there, or where all have said that they are done.
        """
        swapper, said = self._swapper, False
        if self._when_alone == "train":
            return True
        while self._near and not (self._is_over() or swapper.stopped_waiting or swapper.in_touch(self._near)):
            if swapper.ask_rounds(self._near):
                break
            if not said:
                log.warning("nobody can be reached: waiting, as network.when_alone says")
                said = True
            if self.shut_out():
                return False
            swapper.pause(1.0)
        return True

    def _is_over(self) -> bool:
        """Return whether all who were here have said that they are done."""
        swapper = self._swapper
        return all(map(swapper.over, self._near)) and any(swapper.known(client).done for client in self._near)


def neighbours(job: Job) -> list[int]:
    """Return all that this peer may ever swap with."""
    (me,) = job.clients
    return may_meet(job.graph, me)


def in_words(refusals: Mapping[str, str]) -> str:
    """Say by whom a peer is refused, and why."""
    return "refused by " + "; ".join(f"{name}: {why}" for name, why in refusals.items())


def steps_told(job: Job, swapper: Swapper) -> Steps:
    """Return the job's steps, of which neighbours that ask are told how many are done."""

    def steps(
        clients: Sequence[int], rounds: Sequence[int], first: int = 0, salts: Sequence[bytes] = ()
    ) -> Iterator[list[Batch]]:
        swapper.stepped(first)
        for done, batches in enumerate(job.steps(clients, rounds, first, salts), start=first + 1):
            yield batches
            swapper.stepped(done)

    return steps
