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

    With `steps` one more is kept, after each so many of the run's local steps, of which a round has `local_steps`.

    What can't be written is counted, and warned of once, until it can be again. A record waits to be written before the
    next one; a checkpoint is left out, and tried again after the next round. The last state must be written, whatever
    it takes: `checkpoint` raises RunError where it can't be. Several processes write together: what one of them can't
    write, none keeps.
    """

    def __init__(
        self,
        folder: Path,
        clients: Sequence[int],
        every: int,
        keep: int,
        group: Group = ALONE,
        *,
        steps: int | None = None,
        local_steps: int = 1,
    ) -> None:
        self.round = self._made = 0  # in what is kept: whole rounds, and all local steps
        self._due = every  # the round of the next checkpoint
        self.failed = 0  # writes
        self._folder, self._clients, self._group = folder, clients, group
        self._every, self._keep, self._steps, self._local_steps = every, keep, steps, local_steps
        self._waiting: deque[RoundRecord] = deque()
        self._failing = False

    def begin(self, state: State) -> None:
        """Go on from this state, which is kept."""
        self.round, self._made = state.round, self._steps_made(state)
        self._due = state.round - state.round % self._every + self._every

    def _steps_made(self, state: State) -> int:
        return state.round * self._local_steps + state.step

    def record(self, record: RoundRecord) -> None:
        """Add a record to those of the run."""
        self._waiting.append(replace(record, failed_writes=self.failed, state=None))
        try:
            self._write_records()
        except RunError as error:
            self._failed(error)

    def checkpoint(self, state: State, *, last: bool) -> None:
        """Keep a checkpoint of the state, after a round or within it, where one is due, and of the `last` always."""
        whole = state.step == 0 and (last or state.round >= self._due)
        passed = self._steps and self._steps_made(state) // self._steps > self._made // self._steps
        if not (whole or last or passed):
            return
        try:
            in_all(self._group, self._write_records)  # first: a run can't resume without the records of before
            if whole:
                checkpoints.save(self._folder, state, self._keep, self._clients, self._group)
            else:
                checkpoints.save_within(self._folder, state, self._clients, self._group)
        except RunError as error:
            if last:
                raise
            self._failed(error)
            return
        if whole:
            self.begin(state)
        self.round, self._made = state.round, self._steps_made(state)
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
