"""What a run writes while it goes on. A disk that is full, or fails for a while, does not end it."""

import logging
from collections import deque
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path

from peertune.errors import RunError
from peertune.rounds.record import RoundRecord
from peertune.runs import checkpoints, records
from peertune.runs.directory import in_all
from peertune.types import ALONE, Group, State

log = logging.getLogger(__name__)


class Keeper:
    """Writes the records of a run, and a checkpoint of `clients` after each `every` rounds, of which it `keep`s some.

    What can't be written is counted, and warned of once, until it can be again. A record waits to be written before the
    next one; a checkpoint is left out, and tried again after the next round. The last state must be written, whatever
    it takes: `checkpoint` raises RunError where it can't be. Several processes write together: what one of them can't
    write, none keeps.
    """

    def __init__(self, folder: Path, clients: Sequence[int], every: int, keep: int, group: Group = ALONE) -> None:
        self.round = 0  # of the newest checkpoint
        self.failed = 0  # writes
        self._folder, self._clients, self._group = folder, clients, group
        self._every, self._keep = every, keep
        self._waiting: deque[RoundRecord] = deque()
        self._failing = False

    def record(self, record: RoundRecord) -> None:
        """Add a record to those of the run."""
        self._waiting.append(replace(record, failed_writes=self.failed, state=None))
        try:
            self._write_records()
        except RunError as error:
            self._failed(error)

    def checkpoint(self, state: State, *, last: bool) -> None:
        """Keep a checkpoint of the state where one is due, and in any case of the `last`."""
        if not last and state.round < self.round - self.round % self._every + self._every:
            return
        try:
            in_all(self._group, self._write_records)  # first: a run can't resume without the records of before
            checkpoints.save(self._folder, state, self._keep, self._clients, self._group)
        except RunError as error:
            if last:
                raise
            self._failed(error)
            return
        self.round = state.round
        if self._failing and self._group.rank == 0:
            log.warning("%s can be written again: %d rounds are kept", self._folder, self.round)
        self._failing = False

    def _write_records(self) -> None:
        while self._waiting:
            records.append(self._folder, self._waiting[0])
            self._waiting.popleft()

    def _failed(self, error: RunError) -> None:
        self.failed += 1
        if not self._failing and self._group.rank == 0:
            log.warning("%s; the run goes on, and tries again: rounds in the newest checkpoint: %d", error, self.round)
        self._failing = True
