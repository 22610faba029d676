"""The commands that train: `run` and `sweep`."""

import shlex
import signal
import sys
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from peertune.cli.common import AsJson, Overrides, RecipeName, environment, messages, print_json
from peertune.errors import RunError

if TYPE_CHECKING:
    from rich.progress import Progress

    from peertune.assembly import Run
    from peertune.recipe import Recipe
    from peertune.sweep import Member
    from peertune.types import RoundRecord


def run(
    recipe: Annotated[
        str | None,
        typer.Argument(
            metavar="RECIPE", help="A recipe's path, or the name of a shipped one; not needed with --resume."
        ),
    ] = None,
    overrides: Overrides = None,
    out: Annotated[
        Path | None, typer.Option(help="The run directory; where not given, runs/RECIPE, or runs/RECIPE-2 and so on.")
    ] = None,
    resume: Annotated[Path | None, typer.Option(help="Go on with the run in this directory.")] = None,
    dry_run: Annotated[
        bool, typer.Option("--dry-run", help="Try a few steps, say what the run would take, and write nothing.")
    ] = False,
    as_json: AsJson = False,
) -> None:
    """Run a recipe: train all clients, keep checkpoints, write their adapters.

    Ctrl-C leaves a run that --resume continues to the same bits, with the recipe that it began with.

    Examples:

      peertune run digits-demo

      peertune run digits-demo algorithm.name=dec_lora graph.activation=0.05 --out runs/sparse

      peertune run --resume runs/sparse

      peertune run digits-demo rounds=1000 --dry-run
    """
    if resume is not None and out is not None:
        raise RunError("--resume and --out: give one of them; a resumed run stays in its directory")
    if recipe is None and resume is None:
        raise RunError("run: give a RECIPE, or --resume DIR; `peertune recipes` lists the shipped ones")
    if dry_run:
        if recipe is None or resume is not None or out is not None:
            raise RunError("run: --dry-run goes with a RECIPE and overrides alone")
        with _interruptible(), messages():
            _print_estimate(recipe, overrides or [], as_json)
        return
    with _interruptible(), messages():
        from peertune import report_to, tracking
        from peertune.assembly import build
        from peertune.recipe import load_recipe, recipe_text

        if resume is not None:
            folder = resume
            own = folder / "resolved.yaml"
            if not own.is_file():
                raise RunError(f"{folder}: is no run, it holds no resolved.yaml; give the folder of one")
            if recipe is not None and "=" in recipe:  # no recipe, its first override
                overrides, recipe = [recipe, *(overrides or [])], None
            run = build(load_recipe(recipe or own, overrides or []))
            _check_same(run.resolved, folder)
        else:
            assert recipe is not None
            folder = out or _free(Path("runs") / Path(recipe).stem)
            tracking.check_free(folder)  # before the minutes that loading may take
            loaded = load_recipe(recipe, overrides or [])
            report_to.check(loaded.report_to)
            run = build(loaded)
            asked = " ".join(shlex.join([recipe, *(overrides or [])]).split())  # on one line, whatever was typed
            tracking.create(
                folder,
                recipe=f"# asked for: peertune run {asked}\n{recipe_text(recipe)}",
                resolved=_as_yaml(run.resolved),
                environment=environment(),
                facts=run.facts,
                lora=run.lora,
                head=run.head,
                labels=run.labels,
            )
        with tracking.locked(folder):
            _train(run, folder)
    _print_summary(folder, as_json)


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

    with _interruptible():
        whole = sweeps.members(recipe, grid)
        mine = whole if part is None else sweeps.shard(whole, part)
        if dry_run:
            _print_estimates(recipe, mine, out, as_json)
            return
        sweeps.prepare(out, recipe, whole)
    stand, stopped = sweeps.Progress(), False
    with (
        _asked_to_stop("stopping after these rounds; once more to go back to the last checkpoints") as stop,
        _progress("rounds") as progress,
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
    if stopped or stop:
        print("peertune: stopped; go on with the same command", file=sys.stderr)
        sys.exit(130)
    if stand.failed:
        sys.exit(2)


def _print_estimate(recipe: str, overrides: list[str], as_json: bool) -> None:
    from dataclasses import asdict

    from peertune.estimate import estimate, trial
    from peertune.recipe import load_recipe

    loaded = load_recipe(recipe, overrides)
    measured = trial(loaded)
    found = estimate(loaded, measured)
    if as_json:
        print_json({**asdict(found), "trial": asdict(measured)})
        return
    print(f"time    {_duration(found.seconds)}, of it {_duration(measured.start_s)} to start")
    print(f"memory  {found.memory_bytes / 2**20:,.0f} MiB")
    print(f"sent    {found.sent_bytes / 1e6:,.3f} MB by all clients together")


def _print_estimates(recipe: str, whole: "Sequence[Member]", out: Path, as_json: bool) -> None:
    """Try one run of each kind in a process of its own, and say what all would take."""
    import json
    import subprocess

    from peertune.estimate import Trial, cost_key, estimate
    from peertune.report.tables import text
    from peertune.sweep import finished

    trials: dict[str, Trial] = {}
    rows: list[dict[str, Any]] = []
    with _progress("runs") as progress:
        for member in progress.track(whole, description="trying"):
            key = cost_key(member.recipe)
            if key not in trials:
                words = ["run", recipe, *member.overrides, "--dry-run", "--json"]
                tried = subprocess.run([sys.executable, "-m", "peertune", *words], capture_output=True, text=True)
                if tried.returncode:
                    raise RunError(f"{member.name}: {tried.stderr.strip().splitlines()[-1].removeprefix('peertune: ')}")
                trials[key] = Trial(**json.loads(tried.stdout)["trial"])
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
        lines.append([row["run"], _duration(row["seconds"]), size, sent, there])
    print(text(lines))
    left = [row for row in rows if not row["finished"]]
    print(
        f"\n{len(left)} of {len(rows)} runs are left: {_duration(sum(row['seconds'] for row in left))} one after the "
        f"other, {max((row['memory_bytes'] for row in left), default=0) / 2**20:,.0f} MiB each at most"
    )


def _duration(seconds: float) -> str:
    if seconds < 120:
        return f"{seconds:.0f} s"
    minutes = round(seconds / 60)
    return f"{minutes} min" if minutes < 120 else f"{minutes // 60} h {minutes % 60:02} min"


@contextmanager
def _interruptible() -> Iterator[None]:
    """Let a termination signal stop a run as Ctrl-C does, with exit code 130."""

    def interrupt(*_: object) -> None:
        raise KeyboardInterrupt

    before = signal.signal(signal.SIGTERM, interrupt)
    try:
        yield
    except KeyboardInterrupt:
        print("peertune: stopped before the first round; nothing was kept", file=sys.stderr)
        sys.exit(130)
    finally:
        signal.signal(signal.SIGTERM, before)


@contextmanager
def _asked_to_stop(answer: str) -> Iterator[list[int]]:
    """Collect termination signals, Ctrl-C among them: say `answer` at the first, stop at once at the second."""
    asked: list[int] = []

    def ask(number: int, *_: object) -> None:
        asked.append(number)
        if len(asked) > 1:
            raise KeyboardInterrupt
        print(f"peertune: {answer}", file=sys.stderr)

    before = {number: signal.signal(number, ask) for number in (signal.SIGINT, signal.SIGTERM)}
    try:
        yield asked
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)


def _progress(unit: str) -> "Progress":
    """Return a progress bar on a terminal; elsewhere one that shows nothing."""
    from rich.console import Console
    from rich.progress import (
        BarColumn,
        MofNCompleteColumn,
        Progress,
        TextColumn,
        TimeElapsedColumn,
        TimeRemainingColumn,
    )

    columns = (
        TextColumn(unit),
        MofNCompleteColumn(),
        BarColumn(bar_width=30),
        TextColumn("{task.description}"),
        TimeElapsedColumn(),
        TextColumn("left"),
        TimeRemainingColumn(),
    )
    return Progress(*columns, console=Console(stderr=True), disable=not sys.stderr.isatty())


def _train(run: "Run", folder: Path) -> None:
    """Simulate what is left of a run, keep its records and checkpoints, and write the adapters at the end."""
    from dataclasses import replace

    from peertune import tracking
    from peertune.engines.simulator import simulate
    from peertune.report_to import reporting

    job, checkpoint = run.job, run.resolved.checkpoint
    state = tracking.load_checkpoint(folder, like=job.state)
    if state is not None:
        state = state.to(job.device)
        job = replace(job, state=state)
    tracking.rewind(folder, job.state.round)
    state, kept = job.state, job.state.round
    try:
        with (
            _asked_to_stop("stopping after this round; once more to go back to the last checkpoint") as stop,
            _progress("round") as progress,
            reporting(folder, run.resolved) as report,
        ):
            bar = progress.add_task("", total=job.rounds, completed=state.round)
            described = ""
            for record in simulate(job):
                assert record.state is not None
                tracking.append(folder, record)
                report(record)
                state = record.state
                stopping = len(stop) > 0 and state.round < job.rounds
                if state.round % checkpoint.every == 0 or state.round == job.rounds or stopping:
                    tracking.save_checkpoint(folder, state, checkpoint.keep)
                    kept = state.round
                described = _describe(record, described)
                progress.update(bar, completed=state.round, description=described)
                if stopping:
                    raise KeyboardInterrupt
        tracking.export_all(folder, state)
    except KeyboardInterrupt:
        print(f"peertune: stopped after {kept} rounds; go on with: peertune run --resume {folder}", file=sys.stderr)
        sys.exit(130)


def _describe(record: "RoundRecord", before: str) -> str:
    """Say how the run stands; the score stays until the next evaluation."""
    loss = f"loss {sum(record.loss) / len(record.loss):.3f}"
    if record.evaluation is None:
        return loss + before[before.find("  ") :] if "  " in before else loss
    clients = record.evaluation.clients
    return f"{loss}  {record.evaluation.metric} {sum(clients) / len(clients):.3f}"


def _free(folder: Path) -> Path:
    """Return the folder, or where it is taken, the first of folder-2, folder-3, … that is free."""
    number, free = 1, folder
    while free.exists():
        number += 1
        free = folder.with_name(f"{folder.name}-{number}")
    return free


def _check_same(resolved: "Recipe", folder: Path) -> None:
    """Refuse to resume a run with another recipe than its own."""
    from peertune.recipe import load_recipe

    before = load_recipe(folder / "resolved.yaml").model_dump()
    for block, value in resolved.model_dump().items():
        if value != before[block]:
            raise RunError(
                f"{folder}: was run with {block}: {before[block]}, not {value}; resume without a recipe, or start anew"
            )


def _as_yaml(recipe: "Recipe") -> str:
    import yaml

    return yaml.safe_dump(recipe.model_dump(mode="json"), sort_keys=False)


def _print_summary(folder: Path, as_json: bool) -> None:
    from peertune import tracking
    from peertune.report.tables import COLUMNS, cells, summarise, text

    row = {"run": folder.name, **summarise(tracking.records(folder))}
    if as_json:
        print_json({**row, "folder": str(folder)})
        return
    print(text(cells([row], COLUMNS)))
    print(f"records and adapters are in {folder}")
