"""Grids of runs: what belongs to one, and running it, each run in a process of its own.

A sweep has no state but its runs' directories: what is finished is skipped, what is not is resumed, so a sweep that was
killed goes on with the same command, and parts of it can run on several machines that share a folder or merge theirs.
"""

import itertools
import os
import re
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from hashlib import sha256
from pathlib import Path
from typing import IO

import yaml

from peertune.errors import RecipeError
from peertune.parts import check_parts
from peertune.recipe import Recipe, flat, load_recipe

LONGEST_NAME = 160
"""Characters of a run directory's name, beyond which it is cut and marked by a digest; file systems take 255 bytes."""
COMMAND = (sys.executable, "-P", "-m", "peertune")
"""The command line as a process; -P: modules of the folder that one is in don't count."""
POLL_S = 0.2
"""How often running processes are looked at."""


@dataclass(frozen=True)
class Member:
    """One run of a sweep."""

    name: str  # of its directory: the settings in which it differs from the others
    overrides: tuple[str, ...]
    recipe: Recipe


def members(recipe: str | Path, words: Sequence[str]) -> list[Member]:
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
        check_parts(loaded)
        found.append(Member(_name([chosen[i] for i in several or range(len(axes))]), chosen, loaded))
    for place, member in enumerate(found):
        if any(member.recipe == other.recipe for other in found[:place]):
            raise RecipeError(f"sweep: {member.name} stands twice; give each value once")
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


def shard(whole: Sequence[Member], part: str) -> list[Member]:
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


def finished(folder: Path, recipe: Recipe) -> bool:
    """Return whether this run has all its rounds and has written its adapters."""
    whole = rounds_done(folder) >= recipe.rounds and (folder / "adapters").is_dir()
    return whole and conflict(folder, recipe) is None


@dataclass
class Progress:
    """Where a sweep stands; what `run_members` yields, changed in place."""

    done: list[str] = field(default_factory=list)
    failed: dict[str, str] = field(default_factory=dict)  # name → why, one line
    rounds: int = 0  # finished in all runs together


def run_members(
    recipe: str | Path, whole: Sequence[Member], folder: Path, jobs: int, stopping: Callable[[], int]
) -> Iterator[Progress]:
    """Run what is left of a sweep, `jobs` processes at a time, and yield how it stands every now and then.

    `stopping()` counts how often the user has asked to stop: at the first time no run begins any more and those
    at work finish their round and keep it; at the second they stop at once. A run that fails stops no other.
    """
    done = {member.name: finished(folder / member.name, member.recipe) for member in whole}
    queue = [member for member in whole if not done[member.name]]
    before = {member.name: rounds_done(folder / member.name) for member in queue}
    settled = sum(member.recipe.rounds for member in whole if done[member.name])
    progress = Progress(done=[name for name, is_done in done.items() if is_done], rounds=settled)
    yield progress
    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
    threads = {} if jobs == 1 else {"OMP_NUM_THREADS": str(max(1, cores // jobs))}
    environment = threads | os.environ
    at_work: dict[str, tuple[subprocess.Popen[bytes], IO[bytes]]] = {}
    told = 0
    try:
        while at_work or (queue and not stopping()):
            while queue and len(at_work) < jobs and not stopping():
                member = queue.pop(0)
                place = folder / member.name
                if other := conflict(place, member.recipe):
                    progress.failed[member.name] = other
                    continue
                words = ["--resume", place] if place.is_dir() else [recipe, *member.overrides, "--out", place]
                messages: IO[bytes] = tempfile.TemporaryFile()  # noqa: SIM115  # closed when the process has ended
                command = [*COMMAND, "run", *map(str, words)]
                process = subprocess.Popen(
                    command, env=environment, stdout=subprocess.DEVNULL, stderr=messages, start_new_session=True
                )
                at_work[member.name] = process, messages
            if stopping() > told:
                told += 1
                for process, _ in at_work.values():
                    process.terminate()
            for name, (process, messages) in list(at_work.items()):
                before[name] = max(before[name], rounds_done(folder / name))
                if process.poll() is None:
                    continue
                del at_work[name]
                if process.returncode == 0:
                    progress.done.append(name)
                elif not told:
                    messages.seek(0)
                    progress.failed[name] = why_it_failed(messages.read(), process.returncode)
                messages.close()
            progress.rounds = settled + sum(before.values())
            yield progress
            if at_work:
                _wait([process for process, _ in at_work.values()], stopping, told)
    finally:
        for process, messages in at_work.values():
            process.terminate()
            process.wait()
            messages.close()


def _wait(processes: Sequence[subprocess.Popen[bytes]], stopping: Callable[[], int], told: int) -> None:
    """Return when a process has ended, the user asks once more to stop, or it is time to draw progress."""
    until = time.monotonic() + POLL_S
    while time.monotonic() < until and stopping() == told and all(process.poll() is None for process in processes):
        time.sleep(0.01)


def why_it_failed(messages: bytes, code: int) -> str:
    """Return the last line that a process said, or its exit code where it said nothing."""
    lines = [line for line in messages.decode(errors="replace").splitlines() if line.strip()]
    return lines[-1].removeprefix("peertune: ") if lines else f"ended with exit code {code}"
