"""The command `sweep`."""

import sys
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from peertune.cli.common import AsJson, RecipeName, asked_to_stop, duration, interruptible, print_json, progress_bar
from peertune.errors import RunError

if TYPE_CHECKING:
    from peertune.sweep import Member


def sweep(
    recipe: RecipeName,
    grid: Annotated[
        list[str],
        typer.Argument(
            metavar="KEY=A,B,C...", help="Keys of the recipe and the values to combine; one value: for all."
        ),
    ],
    out: Annotated[Path, typer.Option(help="The folder of the sweep; a run directory in it for each combination.")],
    jobs: Annotated[int, typer.Option(min=1, help="Runs at a time; they share the cores.")] = 1,
    part: Annotated[
        str | None,
        typer.Option("--shard", metavar="I/K", help="Run only part I of K, on as many machines as you like."),
    ] = None,
    dry_run: Annotated[
        bool, typer.Option("--dry-run", help="List the runs and what they would take, and write nothing.")
    ] = False,
    as_json: AsJson = False,
) -> None:
    """Run a recipe with all combinations of settings, each in a directory of its own.

    What is finished is skipped and what is not goes on, so the same command continues a sweep that was stopped.

    Examples:

      peertune sweep digits-demo algorithm.name=dec_lora,tad_lora seed=0,1,2 --out runs/methods

      peertune sweep digits-demo graph.activation=0.02,0.1 seed=0,1,2 --out runs/graphs --dry-run

      peertune sweep digits-demo seed=0,1,2,3 --out runs/seeds --shard 1/2
    """
    from peertune import sweep as sweeps

    with interruptible():
        whole = sweeps.members(recipe, grid)
        mine = whole if part is None else sweeps.shard(whole, part)
        if dry_run:
            _print_estimates(recipe, mine, out, as_json)
            return
    try:
        out.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise RunError(f"{out}: can't be written ({error.strerror}); give another --out") from None
    stand, stopped = sweeps.Progress(), False
    with (
        asked_to_stop("stopping after these rounds; once more to go back to the last checkpoints") as stop,
        progress_bar("rounds") as progress,
    ):
        bar = progress.add_task("", total=sum(member.recipe.rounds for member in mine))
        try:
            for stand in sweeps.run_members(recipe, mine, out, jobs, lambda: len(stop)):
                failed = f", {len(stand.failed)} failed" if stand.failed else ""
                description = f"{len(stand.done)} of {len(mine)} runs{failed}"
                progress.update(bar, completed=stand.rounds, description=description)
        except KeyboardInterrupt:
            stopped = True
    if as_json:
        status = dict.fromkeys(stand.done, "finished") | dict.fromkeys(stand.failed, "failed")
        print_json(
            [
                {
                    "run": member.name,
                    "folder": str(out / member.name),
                    "status": status.get(member.name, "unfinished"),
                    "error": stand.failed.get(member.name),
                }
                for member in mine
            ]
        )
    else:
        print(f"{len(stand.done)} of {len(mine)} runs are finished in {out}")
    for name, why in stand.failed.items():
        print(f"peertune: {name}: {why}", file=sys.stderr)
    if (stopped or stop) and len(stand.done) < len(mine):
        print("peertune: stopped; go on with the same command", file=sys.stderr)
        sys.exit(130)
    if stand.failed:
        sys.exit(2)


def _print_estimates(recipe: str, whole: "Sequence[Member]", out: Path, as_json: bool) -> None:
    """Try one run of each kind in a process of its own, and say what all would take."""
    import json
    import subprocess

    from peertune.estimate import Trial, cost_key, estimate
    from peertune.report.tables import text
    from peertune.sweep import COMMAND, finished, why_it_failed

    trials: dict[str, Trial] = {}
    rows: list[dict[str, Any]] = []
    with progress_bar("runs") as progress:
        for member in progress.track(whole, description="trying"):
            key = cost_key(member.recipe)
            if key not in trials:
                words = ["run", recipe, *member.overrides, "--dry-run", "--json"]
                tried = subprocess.run([*COMMAND, *words], capture_output=True)
                if tried.returncode:
                    raise RunError(f"{member.name}: {why_it_failed(tried.stderr, tried.returncode)}")
                answer = json.loads(tried.stdout)
                if answer["trial"] is None:
                    device = answer["plan"]["device"]
                    raise RunError(f"{member.name}: {device} isn't there to try it on; use device=cpu or device=auto")
                trials[key] = Trial(**answer["trial"])
            found = estimate(member.recipe, trials[key])
            rows.append(
                {
                    "run": member.name,
                    "finished": finished(out / member.name, member.recipe),
                    "seconds": found.seconds,
                    "memory_bytes": found.memory_bytes,
                    "sent_bytes": found.sent_bytes,
                }
            )
    if as_json:
        print_json(rows)
        return
    lines = [["run", "time", "MiB", "MB sent", ""]]
    for row in rows:
        there = "finished" if row["finished"] else ""
        size, sent = f"{row['memory_bytes'] / 2**20:,.0f}", f"{row['sent_bytes'] / 1e6:,.3f}"
        lines.append([row["run"], duration(row["seconds"]), size, sent, there])
    print(text(lines))
    left = [row for row in rows if not row["finished"]]
    print(
        f"\n{len(left)} of {len(rows)} runs are left: {duration(sum(row['seconds'] for row in left))} one after the "
        f"other, {max((row['memory_bytes'] for row in left), default=0) / 2**20:,.0f} MiB each at most"
    )
