"""The command `sweep`."""

import sys
from collections import Counter
from collections.abc import Sequence
from dataclasses import asdict
from enum import StrEnum
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, NoReturn

import typer

from peertune.cli.common import (
    AsJson,
    Plugins,
    RecipeName,
    asked_to_stop,
    duration,
    interruptible,
    messages,
    print_json,
    progress,
)
from peertune.errors import Exit, PeertuneError, RunError

if TYPE_CHECKING:
    from peertune.rounds.record import RoundRecord
    from peertune.sweeps.grid import SweepProgress, SweepRun
    from peertune.sweeps.launch import Launcher


STOPPING = "stopping after these rounds; once more to go back to the last checkpoints"


class Where(StrEnum):
    """Where the runs of a sweep have their processes."""

    LOCAL = "local"
    SLURM = "slurm"


def sweep(
    recipe: RecipeName,
    grid: Annotated[
        list[str],
        typer.Argument(
            metavar="KEY=A,B,C...", help="Keys of the recipe and the values to combine; one value: for all."
        ),
    ],
    out: Annotated[
        Path,
        typer.Option(
            help="The folder of the sweep; a run directory in it for each combination. For SLURM on a disk that all "
            "nodes share."
        ),
    ],
    jobs: Annotated[
        int | None,
        typer.Option(
            min=1, help="Runs at a time; here they share the cores.", show_default="1; with SLURM what it gives"
        ),
    ] = None,
    part: Annotated[
        str | None,
        typer.Option("--shard", metavar="I/K", help="Run only part I of K, on as many machines as you like."),
    ] = None,
    launcher: Annotated[
        Where, typer.Option(help="Processes on this machine, or one array job in SLURM's queue.")
    ] = Where.LOCAL,
    slurm: Annotated[
        list[str] | None,
        typer.Option(
            metavar="KEY=VALUE", help="A setting of the job, such as partition=gpu or timeout_min=240; may be repeated."
        ),
    ] = None,
    detach: Annotated[bool, typer.Option("--detach", help="With SLURM: submit, and don't wait for the runs.")] = False,
    dry_run: Annotated[
        bool, typer.Option("--dry-run", help="List the runs and what they would take, and write nothing.")
    ] = False,
    stack: Annotated[
        bool | None,
        typer.Option("--stack/--no-stack", help="Train runs of a small base as one stack; by itself on a GPU alone."),
    ] = None,
    stacked: Annotated[
        list[str] | None, typer.Option(hidden=True, help="Run this and all others so named here, as one stack.")
    ] = None,
    plugin: Plugins = None,
    as_json: AsJson = False,
) -> None:
    """Run a recipe with all combinations of settings, each in a directory of its own.

    On a GPU, or with --stack, runs of a small base that differ in seed, rates, graph and the like train as one stack,
    in one process; each comes to the same as by itself, up to rounding.

    What is finished is skipped and what is not goes on, so the same command continues a sweep that was stopped. What
    is in SLURM's queue is followed, not submitted again; Ctrl-C leaves it there.

    Examples:

      peertune sweep digits-demo algorithm.name=dec_lora,tad_lora seed=0,1,2 --out runs/methods

      peertune sweep digits-demo graph.activation=0.02,0.1 seed=0,1,2 --out runs/graphs --dry-run

      peertune sweep digits-demo seed=0,1,2,3 --out runs/seeds --shard 1/2

      peertune sweep digits-demo seed=0,1,2 --out runs/queued --launcher slurm --slurm gpus_per_node=1
    """
    queued = launcher is Where.SLURM
    if not queued and (slurm or detach):
        raise RunError(f"{'--slurm' if slurm else '--detach'}: goes with --launcher slurm")
    with messages():
        from peertune.sweeps.launch import local, warm_up

        if not queued and not stacked:
            warm_up(jobs or 1)  # beside the imports of this process

        from peertune.sweeps import grid as sweeps
        from peertune.sweeps.slurm import slurm as queue

        with interruptible():
            whole = sweeps.sweep_runs(recipe, grid)
            if stacked:
                _run_stack(recipe, [run for run in whole if run.name in stacked], out)
            mine = whole if part is None else sweeps.shard(whole, part)
            start = queue(out / "slurm", jobs or len(mine), slurm or []) if queued else local(jobs or 1, stack)
            if dry_run:
                _print_estimates(recipe, mine, out, as_json, start)
                return
        stand, stopped = sweeps.SweepProgress(), False
        with (
            asked_to_stop("leaving the runs in the queue" if queued else STOPPING) as stop,
            progress("rounds", sum(run.recipe.rounds for run in mine)) as show,
        ):
            try:
                for stand in sweeps.run_sweep(recipe, grid, mine, out, start, lambda: detach + len(stop)):
                    show(stand.rounds, _describe(stand, len(mine)))
            except KeyboardInterrupt:
                stopped = True
    _print_outcome(mine, stand, out, as_json)
    if (stopped or stop) and len(stand.done) < len(mine):
        if not stand.jobs:
            print("peertune: stopped; go on with the same command", file=sys.stderr)
        sys.exit(Exit.STOPPED)
    if stand.failed:
        sys.exit(Exit.INPUT)


def _run_stack(recipe: str, runs: "Sequence[SweepRun]", out: Path) -> NoReturn:
    """Run these in this process as one stack, and end as `sweep` does."""
    from peertune.api.stacking import Asked, run_together
    from peertune.sweeps.grid import rounds_done

    asked = {run.name: Asked(recipe, run.overrides, run.recipe, out / run.name) for run in runs}
    done = sum(rounds_done(one.folder) for one in asked.values())
    with asked_to_stop(STOPPING) as stop, progress("rounds", sum(run.recipe.rounds for run in runs), done) as show:

        def each(record: "RoundRecord") -> None:
            nonlocal done
            done += 1
            show(done, f"{len(runs)} runs as one stack")

        try:
            failed = run_together(asked, each, lambda: bool(stop))
        except KeyboardInterrupt:
            sys.exit(Exit.STOPPED)
    for name, error in failed.items():
        reason = str(error) if isinstance(error, PeertuneError) else f"{type(error).__name__}: {error}"
        print(f"peertune: {name}: {' '.join(reason.split())}", file=sys.stderr)
    sys.exit(Exit.INPUT if failed else Exit.DONE)


def _print_outcome(mine: "Sequence[SweepRun]", stand: "SweepProgress", out: Path, as_json: bool) -> None:
    """Say which runs are finished, which failed and why, and which are still in a queue."""
    if as_json:
        status = dict.fromkeys(stand.done, "finished") | dict.fromkeys(stand.failed, "failed")
        status |= {name: job.state.lower() for name, job in stand.jobs.items()}
        print_json(
            [
                {
                    "run": run.name,
                    "folder": str(out / run.name),
                    "status": status.get(run.name, "unfinished"),
                    "job": stand.jobs[run.name].id if run.name in stand.jobs else None,
                    "stack": _place(run.name, stand.stacks),
                    "error": stand.failed.get(run.name),
                }
                for run in mine
            ]
        )
    else:
        print(f"{len(stand.done)} of {len(mine)} runs are finished in {out}")
    for name, why in stand.failed.items():
        print(f"peertune: {name}: {why}", file=sys.stderr)
    if stand.jobs:
        arrays = " ".join(sorted({job.id.partition("_")[0] for job in stand.jobs.values()}))
        what_next = f"the same command follows them, `scancel {arrays}` cancels them"
        print(f"peertune: {_in_queue(stand)} in the queue; {what_next}", file=sys.stderr)


def _place(name: str, stacks: "Sequence[Sequence[str]]") -> int | None:
    """Return in which of these stacks a run trains; None where it has a process of its own, or had nothing left."""
    return next((place for place, stack in enumerate(stacks) if name in stack), None)


def _describe(stand: "SweepProgress", runs: int) -> str:
    """Say how many runs are where."""
    failed = f"{len(stand.failed)} failed" if stand.failed else ""
    return ", ".join(part for part in (f"{len(stand.done)} of {runs} runs", _in_queue(stand), failed) if part)


def _in_queue(stand: "SweepProgress") -> str:
    """Say in which states of the queue how many runs are, such as `2 running, 1 pending`."""
    states = Counter(job.state.lower() for job in stand.jobs.values())
    return ", ".join(f"{count} {state}" for state, count in states.most_common())


def _print_estimates(recipe: str, whole: "Sequence[SweepRun]", out: Path, as_json: bool, start: "Launcher") -> None:
    """Try one run of each kind in a process of its own, and say of each, as soon as that is known, what it takes."""
    import json

    width = max(len(run.name) for run in whole)
    if not as_json:
        print(_LINE.format("run", "time", "MiB", "MB sent", "", width=width).rstrip())

    from peertune.assembly import plugins
    from peertune.planning.trial import Trial, cost_key, estimate
    from peertune.sweeps.grid import finished
    from peertune.sweeps.launch import last_words, tried
    from peertune.sweeps.stacks import described, stacks

    free = [run for run in whole if not finished(out / run.name, run.recipe)]
    parts = stacks(free, start.stacks, start.on_cpu) if start.stacks else []
    together = [[run.name for run in part] for part in parts if len(part) > 1]
    trials: dict[str, Trial] = {}
    rows: list[dict[str, Any]] = []
    with progress("runs", len(whole)) as show:
        for number, run in enumerate(whole):
            show(number, f"trying {run.name}")
            key = cost_key(run.recipe)
            if key not in trials:
                words = ["run", recipe, *run.overrides, "--dry-run", "--json", *plugins.options()]
                code, answered, said = tried(words)
                if code:
                    raise RunError(f"{run.name}: {last_words(said, f'ended with exit code {code}')}")
                answer = json.loads(answered)
                if answer["trial"] is None:
                    device = answer["plan"]["device"]
                    raise RunError(f"{run.name}: {device} isn't there to try it on; use device=cpu or device=auto")
                trials[key] = Trial(**answer["trial"])
            found = estimate(run.recipe, trials[key])
            row = {"run": run.name, "finished": finished(out / run.name, run.recipe), **asdict(found)}
            row["stack"] = _place(run.name, together)
            rows.append(row)
            if not as_json:
                size, sent = f"{found.memory_bytes / 2**20:,.0f}", f"{found.sent_bytes / 1e6:,.3f}"
                there = "finished" if row["finished"] else ""
                cells = (run.name, duration(found.seconds), size, sent, there)
                print(_LINE.format(*cells, width=width).rstrip())
    if as_json:
        print_json(rows)
        return
    left = [row for row in rows if not row["finished"]]
    print(
        f"\n{len(left)} of {len(rows)} runs are left: {duration(sum(row['seconds'] for row in left))} one after the "
        f"other, {max((row['memory_bytes'] for row in left), default=0) / 2**20:,.0f} MiB each at most"
    )
    if told := described(parts):
        print(f"{told}, which takes less")


_LINE = "{:<{width}} {:>11} {:>9} {:>12} {}"
"""A line of estimates. Its widths are fixed, so that each shows before the next is known."""
