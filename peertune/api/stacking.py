"""Several runs of a sweep trained as one stack in this process, each in a directory of its own.

A run's directory comes out as by itself, up to rounding. A run that fails leaves the stack, and the others go on.
"""

import logging
from collections.abc import Callable, Iterator, Mapping
from contextlib import ExitStack
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import NamedTuple

from peertune.api.training import Report, Training, begin, check_same, training, unwatched
from peertune.assembly.build import Built, build_stack
from peertune.engines.simulator import simulate, simulate_together
from peertune.errors import tried
from peertune.memory import available_bytes
from peertune.recipe import Recipe
from peertune.rounds.record import RoundRecord
from peertune.runs import directory
from peertune.types import payload_bytes

log = logging.getLogger(__name__)

SHARE = 8
"""A stack's state takes at most one part in so many of the memory: its clients are copied when they train together."""


class Asked(NamedTuple):
    """A run that is asked for, as `peertune run` is."""

    source: str  # the recipe's name or path
    overrides: tuple[str, ...]
    recipe: Recipe  # what these come to
    folder: Path  # its run directory, begun or not


def run_together(
    runs: Mapping[str, Asked], each: Callable[[RoundRecord], object] = unwatched, asked: Callable[[], object] = bool
) -> dict[str, Exception]:
    """Begin these runs, or go on with them, and finish them; return which failed, and why.

    Their recipes are alike enough for a stack (`peertune.sweeps.stacks`). Where they can't be one all the same, such as
    one that was begun with other settings, they run one after the other. `each` is told the record of every round.
    Where `asked()` says true, all that is at work is kept after its round, and KeyboardInterrupt is raised.
    """
    made = tried(partial(build_stack, {name: one.recipe for name, one in runs.items()}))
    built = dict.fromkeys(runs, made) if isinstance(made, Exception) else made
    fine = {name: one for name, one in built.items() if isinstance(one, Built) and _as_begun(one, runs[name].folder)}
    failed: dict[str, Exception] = {}
    for part in _that_fit(fine):
        failed |= _run_stack({name: runs[name] for name in part}, fine, each, asked)
    for name in runs.keys() - fine.keys():
        came = tried(partial(_run_alone, runs[name], each, asked))
        failed |= {name: came} if isinstance(came, Exception) else {}
    return failed


def _as_begun(built: Built, folder: Path) -> bool:
    """Return whether a run is to begin, or was begun with the same settings."""
    return not folder.is_dir() or not isinstance(tried(partial(check_same, built, folder)), Exception)


def _that_fit(built: Mapping[str, Built]) -> Iterator[list[str]]:
    """Yield which runs are one stack, one stack after the other, so that each fits into memory."""
    names = list(built)
    if not names:
        return
    job = built[names[0]].job
    size = sum(map(payload_bytes, (job.state.adapters, job.state.moments, job.state.memory))) * len(job.clients)
    room = available_bytes(job.device)
    most = len(names) if room is None else max(1, room // SHARE // max(1, size))
    for start in range(0, len(names), most):
        yield names[start : start + most]


def _run_alone(asked: Asked, each: Callable[[RoundRecord], object], stopping: Callable[[], object]) -> None:
    """Run one by itself, or go on with it, as `peertune run` would."""
    again = asked.folder.is_dir()
    with training(None if again else asked.source, () if again else asked.overrides, asked.folder, again=again) as work:
        work.finish(lambda record: each(record) or stopping())


def _run_stack(
    runs: Mapping[str, Asked],
    built: Mapping[str, Built],
    each: Callable[[RoundRecord], object],
    asked: Callable[[], object],
) -> dict[str, Exception]:
    """Run these as one stack, and return which failed, and why."""
    failed: dict[str, Exception] = {}
    with ExitStack() as stack:
        at_work: dict[str, tuple[Training, Report]] = {}
        for name, one in runs.items():
            began = tried(partial(_begun, one, built[name], stack))
            if isinstance(began, Exception):
                failed[name] = began
            else:
                at_work[name] = began
        while at_work := {name: one for name, one in at_work.items() if name not in failed and not one[0].over}:
            if asked():
                for work, _ in at_work.values():
                    work.halt()
                raise KeyboardInterrupt
            for name, record in simulate_together({name: work.job for name, (work, _) in at_work.items()}):
                came = record if isinstance(record, Exception) else tried(partial(_keep, *at_work[name], record, each))
                if isinstance(came, Exception):
                    failed[name] = came
    return failed


def _keep(work: Training, report: Report, record: RoundRecord, each: Callable[[RoundRecord], object]) -> None:
    """Keep what a round came to, and the adapters after the last."""
    work.keep(record, report, each)
    if work.over:
        work.end()


def _begun(asked: Asked, built: Built, stack: ExitStack) -> tuple[Training, Report]:
    """Make a run's directory, unless it is there, and see that nobody else works on it while the stack is open."""
    if not asked.folder.is_dir():
        begin(built, asked.folder, "run", asked.source, asked.overrides)
    stack.enter_context(directory.locked(asked.folder))
    work = Training(built, asked.folder, simulate)
    work.job = replace(work.job, state=work.job.state.clone())
    report = stack.enter_context(work.reporting())
    if work.over:  # all that it lacks is its adapters
        work.end()
    return work, report
