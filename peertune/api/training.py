"""Training what a recipe makes, with a run directory that holds it: what commands, calls and peers share."""

import logging
import os
import shlex
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager, nullcontext
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any

import torch

from peertune.api.environment import environment, versions
from peertune.assembly import plugins
from peertune.assembly.build import Built, agreed, build, build_optim
from peertune.assembly.registry import completed, from_outside
from peertune.engines.distributed import check_alike, check_devices, joined, run_cluster, share
from peertune.engines.simulator import simulate
from peertune.errors import PeertuneError, RunError, Stopped
from peertune.files import write_file
from peertune.models.weights import check_weights
from peertune.recipe import Recipe, as_yaml, load_recipe, recipe_text
from peertune.rounds.job import Job, Pausing
from peertune.rounds.patience import Seen, ran_out, seen
from peertune.rounds.record import RoundRecord
from peertune.runs import checkpoints, directory, exports, records
from peertune.runs.keeping import Keeper
from peertune.runs.trackers import reporting
from peertune.types import Group, State

log = logging.getLogger(__name__)

Source = str | Path | Mapping[str, Any]
"""A recipe as `load_recipe` takes it: the name of a shipped one, a path, or nested values."""
Each = Callable[[RoundRecord], object]
"""Is told each record; where it returns what counts as true, the run stops after that round."""
Report = Callable[[RoundRecord], object]
"""Logs a record in the trackers."""
Engine = Callable[[Job], Iterator[RoundRecord]]


def unwatched(record: RoundRecord) -> None:
    """Let a run go on without a word."""


class Training:
    """A run in its directory, from its newest checkpoint on."""

    def __init__(self, built: Built, folder: Path, engine: Engine, keeper: Keeper | None = None) -> None:
        """Load the newest checkpoint, and forget the records after it. Raises RunError where that can't be done."""
        job, steps = built.job, built.resolved.checkpoint.steps
        state = checkpoints.load(folder, job.state, job.clients, job.group, within=True) or job.state
        self.built, self.folder, self._engine = built, folder, engine
        self._keeper = keeper or keeper_of(built, folder)
        self._keeper.begin(state)
        pausing = None if steps is None else Pausing(steps, partial(self._keeper.checkpoint, last=False))
        self.job = replace(job, state=state.to(job.device), pausing=pausing)
        if state.step and job.group.rank == 0:
            log.info(
                "%s: goes on within round %d, after %d of its %d local steps",
                *(folder, state.round, state.step, job.local_steps),
            )
        self._evaluations: list[Seen] = []
        if job.group.rank == 0:
            records.rewind(folder, state.round)
            if state.round < job.rounds and (
                changed := directory.note_environment(folder, state.round, _environment(built))
            ):
                told = ", ".join(f"{key} {value}" for key, value in changed.items())
                log.info("%s: goes on with %s, and began with others; the last digits may differ", folder, told)

    def finish(self, each: Each = unwatched) -> State:
        """Do what is left, keep records and checkpoints, write the adapters at the end, and return the state.

        Raises Stopped where `each` asks for it, once its round is kept, and on KeyboardInterrupt.
        """
        try:
            with self.reporting() as report:
                rounds = self._engine(self.job)
                while not self.over and (record := next(rounds, None)) is not None:
                    if self.keep(record, report, each):
                        raise KeyboardInterrupt
                return self.end()
        except KeyboardInterrupt as stop:
            if isinstance(stop.__context__, PeertuneError):  # which the signal overtook
                raise stop.__context__ from None
            raise Stopped(self.folder, self._keeper.round) from None

    @contextmanager
    def reporting(self) -> Iterator[Report]:
        """Yield what logs a record in the recipe's trackers; it also counts what the recipe's patience goes by."""
        job, evaluate = self.job, self.built.resolved.evaluate
        done: Sequence[Mapping[str, Any]] = ()
        if evaluate.patience is not None and job.group.rank == 0:
            done = records.read(self.folder, ("evaluation.clients",))
        (told, *_) = job.group.gather([one for record in done for one in seen(record, evaluate.every)])
        self._evaluations = [Seen(*one) for one in told]
        with reporting(self.folder, self.built.resolved) if job.group.rank == 0 else nullcontext(unwatched) as report:
            yield report

    @property
    def over(self) -> bool:
        """Whether no round is left, or the recipe's patience has run out."""
        job, patience = self.job, self.built.resolved.evaluate.patience
        return job.state.round >= job.rounds or ran_out(self._evaluations, patience) is not None

    def keep(self, record: RoundRecord, report: Report, each: Each) -> bool:
        """Keep what a round came to, in records and checkpoints; return whether `each` asks to stop after it."""
        job, keeper = self.job, self._keeper
        assert record.state is not None
        if job.group.rank == 0:
            keeper.record(record)
            report(record)
        self.job = replace(job, state=record.state)
        found = None if record.evaluation is None else vars(record.evaluation)
        self._evaluations += seen({"round": record.round, "evaluation": found}, self.built.resolved.evaluate.every)
        asked = bool(job.group.add(torch.tensor(int(bool(each(record))))))
        stopping = asked and record.state.round < job.rounds
        keeper.checkpoint(record.state, last=stopping or record.state.round >= job.rounds)
        return stopping

    def end(self) -> State:
        """Write the adapters, and return the state."""
        job, state = self.job, self.job.state
        if state.round < job.rounds:  # the engine ended before the last round
            self._keeper.checkpoint(state, last=True)
        exports.write_all(self.folder, state, job.clients, job.group)
        return state

    def halt(self) -> None:
        """Keep the state as it is, to go on from."""
        if self._keeper.round != self.job.state.round:
            self._keeper.checkpoint(self.job.state, last=True)


def keeper_of(built: Built, folder: Path) -> Keeper:
    """Return what keeps the records and checkpoints of a run."""
    job, checkpoint = built.job, built.resolved.checkpoint
    every, keep, steps = checkpoint.every, checkpoint.keep, checkpoint.steps
    return Keeper(folder, job.clients, every, keep, job.group, steps=steps, local_steps=job.local_steps)


@contextmanager
def training(
    recipe: Source | None,
    overrides: Sequence[str],
    folder: Path,
    *,
    again: bool = False,
    rendezvous_s: float = 600,
) -> Iterator[Training]:
    """Make a run and its directory, or `again` the one that the directory holds, and keep others from working on it.

    In the processes that torchrun started, as its environment says, each has its share of the clients. Started again by
    torchrun, they go on with the run of before. `rendezvous_s`: seconds to wait for each other.

    Raises PeertuneError for a recipe that can't be run, a directory in the way, and one that holds another run.
    """
    with joined(rendezvous_s) as group:
        again = again or _launched_again(folder, group)
        if again:
            built = _made_again(folder, recipe, overrides, group)
        else:
            assert recipe is not None
            folder = Path(group.gather(str(folder))[0])
            built = _made(folder, recipe, overrides, group)
        with directory.locked(folder) if group.rank == 0 else nullcontext():
            if again and group.rank == 0:
                _lengthen(built.resolved, folder)
            yield Training(built, folder, simulate if group.size == 1 else run_cluster)


def _launched_again(folder: Path, group: Group) -> bool:
    """Return whether torchrun has started the processes again, after the run had begun.

    Machines count their own restarts. A launch without a name, `none`, is known by its count alone.
    """
    launch = os.environ.get("TORCHELASTIC_RUN_ID", "none")
    counted = any(group.gather(int(os.environ.get("TORCHELASTIC_RESTART_COUNT", "0"))))
    return bool(group.gather((counted or launch != "none") and directory.launched(folder, launch))[0])


def _made_again(folder: Path, recipe: Source | None, overrides: Sequence[str], group: Group) -> Built:
    """Make the run of this directory again."""
    if group.rank == 0:
        directory.resolved(folder)
    directory.check_shared(folder, group)
    built = _built(load_recipe(directory.resolved(folder) if recipe is None else recipe, overrides), group)
    check_same(built, folder, longer=True)
    return built


def _made(folder: Path, recipe: Source, overrides: Sequence[str], group: Group) -> Built:
    """Make a new run and its directory."""
    if group.rank == 0:
        directory.check_free(folder)  # before the minutes that loading may take
    directory.check_shared(folder.parent, group)
    built = _built(load_recipe(recipe, overrides), group)
    if group.rank == 0:
        begin(built, folder, "run", recipe, overrides)
    return built


def _built(recipe: Recipe, group: Group) -> Built:
    """Make the part of this process in a run, once it is sure that all processes make parts of the same."""
    if group.size == 1:
        return build(recipe)
    check_alike(group, versions() | recipe.model_dump(mode="json"))
    check_devices(recipe.device, group)
    built = build(recipe, share(recipe.clients, group), group=group)
    check_alike(group, built.resolved.model_dump(mode="json") | agreed(built) | {"plugins": from_outside(recipe)})
    return built


def begin(built: Built, folder: Path, command: str, recipe: Source, overrides: Sequence[str], **facts: object) -> None:
    """Make the run directory. Nested values are kept as the recipe that they are."""
    values = isinstance(recipe, Mapping)
    words = shlex.join(["recipe.yaml" if values else str(recipe), *overrides, *plugins.options()])
    asked = " ".join(words.split())  # on one line, whatever was typed
    text = as_yaml(dict(recipe)) if isinstance(recipe, Mapping) else recipe_text(recipe)
    directory.create(
        folder,
        recipe=f"# asked for: peertune {command} {asked}\n{text}",
        resolved=as_yaml(built.resolved.model_dump(mode="json")),
        environment=_environment(built),
        facts=built.facts | facts,
        lora=built.lora,
        head=built.head,
        labels=built.labels,
        taken=built.job.model.taken,
    )


def _environment(built: Built) -> dict[str, Any]:
    """Return what the run's numbers depend on beside its recipe and its rows."""
    where = environment(built.resolved.device, built.resolved.model.dtype)
    return where | {"processes": built.job.group.size, "weights": dict(built.weights)}


def _lengthen(resolved: Recipe, folder: Path) -> None:
    """Write down that a run has more rounds than it had, or other patience; say what becomes of a rate that falls."""
    before = load_recipe(directory.resolved(folder))
    if (resolved.rounds, resolved.evaluate.patience) == (before.rounds, before.evaluate.patience):
        return
    if resolved.rounds > before.rounds:
        log.info("%s: goes on to %d rounds, where it had %d", folder, resolved.rounds, before.rounds)
    step = before.rounds * before.training.local_steps - 1
    was, now = (build_optim(recipe).rates(step)["A"] for recipe in (before, resolved))
    if was != now:
        log.warning(
            "training.lr_scheduler_type: %s over %d rounds had come to %.3g after these, and goes on at %.3g, as over "
            "%d; a run of so many from the start would be another",
            *(resolved.training.lr_scheduler_type, before.rounds, was, now, resolved.rounds),
        )
    write_file(folder / "resolved.yaml", as_yaml(resolved.model_dump(mode="json")).encode())


def check_same(built: Built, folder: Path, *, longer: bool = False) -> None:
    """Refuse to resume a run with another recipe than its own, but for more rounds or patience if it may be `longer`.

    Or over a base whose weights are others. Warn of other code.
    """
    resolved = built.resolved
    was, now = directory.plugins(folder), from_outside(resolved)
    for block in (block for block in now if now[block] != was.get(block)):
        log.warning("%s: the code of %s is another than the run began with: %s", folder, block, dict(now[block]))
    both = (load_recipe(folder / "resolved.yaml"), resolved)  # the first may be from a version with fewer settings
    before, after = (recipe.model_copy(update=completed(recipe)).model_dump(mode="json") for recipe in both)
    for block, value in after.items():
        if longer and block == "rounds" and value > before[block]:
            if resolved.privacy is not None and resolved.privacy.noise_multiplier is None:
                raise RunError(
                    f"{folder}: its noise was chosen for {before[block]} rounds within privacy.epsilon; leave rounds "
                    "as they are, or begin anew"
                )
            continue
        if longer and block == "evaluate":
            before[block] |= {"patience": value["patience"]}
        if value != before[block]:
            told = _differing(block, before[block], value)
            raise RunError(f"{folder}: was run with {told}; resume without a recipe, or start anew")
    check_weights(resolved.model.name, built.weights, directory.weights(folder))


def _differing(key: str, was: object, now: object) -> str:
    """Say what differs; of blocks the keys."""
    if not (isinstance(was, dict) and isinstance(now, dict)):
        return f"{key}: {was}, not {now}"
    keys = [name for name in was | now if was.get(name) != now.get(name)]
    return ", ".join(f"{key}.{name}: {was.get(name)}, not {now.get(name)}" for name in keys)
