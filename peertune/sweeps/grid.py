"""Grids of runs: what belongs to one, and running it, in processes of a run each or of several (`sweeps.stacks`).

A sweep has no state but its runs' directories: what is finished is skipped, what is not is resumed, so a sweep that was
killed goes on with the same command, and parts of it can run on several machines that share a folder or merge theirs.
"""

import itertools
import logging
import re
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import closing
from dataclasses import dataclass, field
from hashlib import sha256
from pathlib import Path

import yaml

from peertune.assembly import plugins
from peertune.assembly.registry import check_choices
from peertune.errors import RecipeError
from peertune.files import reported
from peertune.recipe import Recipe, flat, load_recipe
from peertune.rounds.patience import ended_early
from peertune.runs import records
from peertune.sweeps.launch import Command, Launcher, Queued
from peertune.sweeps.stacks import described, stacks

log = logging.getLogger(__name__)

LONGEST_NAME = 160
"""Characters of a run directory's name, beyond which it is cut and marked by a digest; file systems take 255 bytes."""


@dataclass(frozen=True)
class SweepRun:
    """One run of a sweep."""

    name: str  # of its directory: the settings in which it differs from the others
    overrides: tuple[str, ...]
    recipe: Recipe


def sweep_runs(recipe: str | Path, words: Sequence[str]) -> list[SweepRun]:
    """Return all combinations of `key=a,b,c` words, the last key changing fastest.

    A word with one value holds for all runs. Commas inside brackets and quotes separate nothing, so that a value may
    be a block such as `algorithm={name: adf_lora, switch_every: 3}`. Raises RecipeError for an empty grid, a value that
    stands twice and whatever is wrong with a combination.
    """
    axes: list[tuple[str, list[str]]] = []
    for word in words:
        key, equals, text = word.partition("=")
        values = split_values(text)
        if not equals or not key or not all(values):
            raise RecipeError(f"sweep: {word!r} gives no values; write key=a,b,c, such as seed=0,1,2")
        if key in dict(axes):
            raise RecipeError(f"sweep: {key} stands twice; give its values in one place")
        axes.append((key, values))
    combinations = itertools.product(*([f"{key}={value}" for value in values] for key, values in axes))
    several = [number for number, (_, values) in enumerate(axes) if len(values) > 1]
    found = []
    for chosen in combinations:
        loaded = load_recipe(recipe, chosen)
        check_choices(loaded)
        found.append(SweepRun(_name([chosen[i] for i in several or range(len(axes))]), chosen, loaded))
    for place, run in enumerate(found):
        if any(run.recipe == other.recipe for other in found[:place]):
            raise RecipeError(f"sweep: {run.name} stands twice; give each value once")
    return found


def split_values(text: str) -> list[str]:
    """Split at the commas that stand outside of brackets and quotes."""
    parts, depth, quote = [""], 0, ""
    for character in text:
        if character == "," and not depth and not quote:
            parts.append("")
            continue
        if quote:
            quote = "" if character == quote else quote
        elif character in "'\"":
            quote = character
        else:
            depth += (character in "[{(") - (character in ")}]")
        parts[-1] += character
    return [part.strip() for part in parts]


def _name(settings: Sequence[str]) -> str:
    """Return a folder's name for these settings, of letters that every shell and file system takes."""
    plain = ",".join(re.sub(r"[^\w.+=-]+", "-", setting).strip("-") for setting in settings)
    if len(plain) <= LONGEST_NAME and "/" not in "".join(settings):  # two paths may come to one name
        return plain
    return f"{plain[:LONGEST_NAME]}-{sha256(','.join(settings).encode()).hexdigest()[:8]}"


def shard(whole: Sequence[SweepRun], part: str) -> list[SweepRun]:
    """Return part `i/k` of a sweep, i from 1 to k; the parts are disjoint, together the whole. Raises RecipeError."""
    match = re.fullmatch(r"(\d+)/(\d+)", part)
    number, of = map(int, match.groups()) if match else (0, 0)
    if not 1 <= number <= of:
        raise RecipeError(f"--shard: {part!r} is no part; write i/k with i from 1 to k, such as 2/4")
    return list(whole[number - 1 :: of])


def conflict(folder: Path, recipe: Recipe) -> str | None:
    """Return in which setting a run directory holds another run than this, in words; None where it doesn't."""
    try:
        held = flat(yaml.safe_load((folder / "resolved.yaml").read_text(encoding="utf-8")))
    except (OSError, ValueError, AttributeError, yaml.YAMLError):
        return f"{folder}: is in the way and is no run; give another --out" if folder.exists() else None
    for key, value in flat(recipe.model_dump(mode="json")).items():
        automatic = value is None or value == "auto"  # the run has what it came to
        if key in held and held[key] != value and not automatic:
            return f"{folder}: holds a run with {key}={held[key]}, not {value}; give another --out"
    return None


def rounds_done(folder: Path) -> int:
    """Return how many rounds a run has finished, from the length of its records."""
    try:
        return (folder / "rounds.jsonl").read_bytes().count(b"\n")
    except OSError:
        return 0


def _early(folder: Path, recipe: Recipe) -> bool:
    read = records.read(folder, ("evaluation.clients",))
    return ended_early(read, recipe.evaluate.model_dump()) is not None


def finished(folder: Path, recipe: Recipe) -> bool:
    """Return whether this run has all its rounds, or ended early, and has written its adapters."""
    whole = (folder / "adapters").is_dir() and (
        rounds_done(folder) >= recipe.rounds or (recipe.evaluate.patience is not None and _early(folder, recipe))
    )
    return whole and conflict(folder, recipe) is None


@dataclass
class SweepProgress:
    """Where a sweep stands; what `run_sweep` yields, changed in place."""

    done: list[str] = field(default_factory=list)
    stacks: list[list[str]] = field(default_factory=list)  # names of runs that train as one stack
    failed: dict[str, str] = field(default_factory=dict)  # name → why, one line
    jobs: Mapping[str, Queued] = field(default_factory=dict)  # what is in a cluster's queue, by name
    rounds: int = 0  # finished in all runs together


def run_sweep(
    recipe: str | Path,
    words: Sequence[str],
    whole: Sequence[SweepRun],
    folder: Path,
    launcher: Launcher,
    stopping: Callable[[], int],
) -> Iterator[SweepProgress]:
    """Run what is left of a sweep as the launcher does, and yield how it stands every now and then.

    `whole` are the runs of the grid of these `words`, or a part of them. `stopping()` counts how often the user has
    asked to stop. A run that fails stops no other. Raises RunError where the folder can't be made.
    """
    with reported(folder):
        folder.mkdir(parents=True, exist_ok=True)
    recipes = {run.name: run.recipe for run in whole}
    progress = SweepProgress(done=[name for name, asked in recipes.items() if finished(folder / name, asked)])
    settled = sum(recipes[name].rounds for name in progress.done)
    left = [run for run in whole if run.name not in progress.done]
    rounds = {run.name: rounds_done(folder / run.name) for run in left}
    progress.rounds = settled
    yield progress
    for run in left:
        if other := conflict(folder / run.name, run.recipe):
            progress.failed[run.name] = other
    free = [run for run in left if run.name not in progress.failed]
    parts = stacks(free, launcher.stacks, launcher.on_cpu) if launcher.stacks else [[run] for run in free]
    progress.stacks = [[run.name for run in part] for part in parts if len(part) > 1]
    if told := described(parts):
        log.info(told)
    tasks = {part[0].name: _command(recipe, words, part, folder) for part in parts}
    if not tasks:
        return
    with closing(launcher.launch(tasks, stopping)) as looks:
        for look in looks:
            for name in look.ended:
                if finished(folder / name, recipes[name]):
                    progress.done.append(name)
                else:
                    progress.failed[name] = look.ended[name]
            progress.jobs = look.jobs
            rounds |= {run.name: max(rounds[run.name], rounds_done(folder / run.name)) for run in free}
            progress.rounds = settled + sum(rounds.values())
            yield progress
    told_of = {*progress.done, *progress.failed}  # a stack that was stopped says nothing of those that were finished
    progress.done += [run.name for run in free if run.name not in told_of and finished(folder / run.name, run.recipe)]
    yield progress


def _command(recipe: str | Path, words: Sequence[str], part: Sequence[SweepRun], folder: Path) -> Command:
    """Return the process of a run, or of several as one stack."""
    options = (*plugins.options(),)
    if len(part) > 1:
        return Command((str(recipe), *words), folder, options, tuple(run.name for run in part))
    return Command((str(recipe), *part[0].overrides), folder / part[0].name, options)
