"""Sweeps from Python, as the command `sweep` makes them."""

from collections.abc import Sequence
from pathlib import Path

from peertune.api.runs import Runs
from peertune.errors import RunError
from peertune.sweeps.grid import run_sweep, shard, sweep_runs
from peertune.sweeps.launch import Launcher, local


def sweep(
    recipe: str | Path,
    grid: Sequence[str],
    *,
    out: str | Path,
    part: str | None = None,
    launcher: Launcher | None = None,
) -> Runs:
    """Run a recipe with all combinations of settings, each in a directory of its own.

    Runs have a process each, but on a GPU of this machine those of a small base that differ in seed, rates, graph and
    the like: they train as one stack in one.

    What is finished is skipped and what is not goes on, so the same call continues a sweep that was stopped. In a
    script it stands below `if __name__ == "__main__":`, since the processes import the script.

    Args:
        recipe: A shipped one's name, or a path.
        grid: Keys and the values to combine, such as `["algorithm.name=dec_lora,tad_lora", "seed=0,1,2"]`.
        out: The folder of the sweep, with a run directory for each combination.
        part: `i/k`, to run part i of k only.
        launcher: Where the processes are: `peertune.sweeps.launch.local(N)`, N at a time on this machine, 1 unless
            given, and with `stack=True` in stacks on a CPU, too; or
            `peertune.sweeps.slurm.slurm(FOLDER, N, ["partition=gpu"])`.

    Returns:
        The runs, in the order of the grid.

    Raises:
        RecipeError: For a grid that makes no runs, and for what is wrong with any of them.
        RunError: Where a run failed; the others are finished all the same.

    """
    whole, folder = sweep_runs(recipe, grid), Path(out)
    runs = whole if part is None else shard(whole, part)
    for stand in run_sweep(recipe, grid, runs, folder, launcher or local(1), lambda: 0):
        failed = dict(stand.failed)
    if failed:
        name, why = next(iter(failed.items()))
        raise RunError(f"{folder}: {len(failed)} of {len(runs)} runs failed; {name}: {why}")
    return Runs.open(*(folder / run.name for run in runs))
