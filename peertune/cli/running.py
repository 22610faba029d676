"""The command `run`."""

import shlex
import sys
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from peertune.cli.common import (
    AsJson,
    Overrides,
    asked_to_stop,
    duration,
    environment,
    interruptible,
    messages,
    print_json,
    progress_bar,
)
from peertune.errors import RunError

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator

    from peertune.assembly import Run
    from peertune.recipe import Recipe
    from peertune.round import Job
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
        with interruptible(), messages():
            _print_estimate(recipe, overrides or [], as_json)
        return
    with interruptible(), messages():
        from peertune import report_to, tracking
        from peertune.assembly import build
        from peertune.engines.simulator import simulate
        from peertune.recipe import load_recipe

        if resume is not None:
            folder = resume
            own = tracking.resolved(folder)
            if recipe is not None and "=" in recipe:  # no recipe, its first override
                overrides, recipe = [recipe, *(overrides or [])], None
            run = build(load_recipe(recipe or own, overrides or []))
            check_same(run.resolved, folder)
        else:
            assert recipe is not None
            folder = out or _free(Path("runs") / Path(recipe).stem)
            tracking.check_free(folder)  # before the minutes that loading may take
            loaded = load_recipe(recipe, overrides or [])
            report_to.check(loaded.report_to)
            run = build(loaded)
            begin(run, folder, "run", recipe, overrides or [])
        with tracking.locked(folder):
            train(run, folder, simulate, f"peertune run --resume {folder}")
    print_summary(folder, as_json)


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
    print(f"time    {duration(found.seconds)}, of it {duration(measured.start_s)} to start")
    print(f"memory  {found.memory_bytes / 2**20:,.0f} MiB")
    print(f"sent    {found.sent_bytes / 1e6:,.3f} MB by all clients together")


def begin(run: "Run", folder: Path, command: str, recipe: str, overrides: list[str], **facts: object) -> None:
    """Make the run directory."""
    from peertune import tracking
    from peertune.recipe import recipe_text

    asked = " ".join(shlex.join([recipe, *overrides]).split())  # on one line, whatever was typed
    tracking.create(
        folder,
        recipe=f"# asked for: peertune {command} {asked}\n{recipe_text(recipe)}",
        resolved=_as_yaml(run.resolved),
        environment=environment(),
        facts=run.facts | facts,
        lora=run.lora,
        head=run.head,
        labels=run.labels,
    )


def train(
    run: "Run",
    folder: Path,
    engine: "Callable[[Job], Iterator[RoundRecord]]",
    resume: str,
    hurry: "Callable[[], None]" = lambda: None,
) -> None:
    """Do what is left of a run, keep its records and checkpoints, and write the adapters at the end.

    When asked to stop, `hurry` the engine, finish the round, and say how to `resume`.
    """
    from dataclasses import replace

    from peertune import tracking
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
            asked_to_stop("stopping after this round; once more to go back to the last checkpoint", hurry) as stop,
            progress_bar("round") as progress,
            reporting(folder, run.resolved) as report,
        ):
            bar = progress.add_task("", total=job.rounds, completed=state.round)
            described = ""
            for record in engine(job):
                assert record.state is not None
                tracking.append(folder, record)
                report(record)
                state = record.state
                stopping = len(stop) > 0 and state.round < job.rounds
                if state.round >= min(kept - kept % checkpoint.every + checkpoint.every, job.rounds) or stopping:
                    tracking.save_checkpoint(folder, state, checkpoint.keep)
                    kept = state.round
                described = _describe(record, described)
                progress.update(bar, completed=state.round, description=described)
                if stopping:
                    raise KeyboardInterrupt
        tracking.export_all(folder, state)
    except KeyboardInterrupt:
        print(f"peertune: stopped after {kept} rounds; go on with: {resume}", file=sys.stderr)
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


def check_same(resolved: "Recipe", folder: Path) -> None:
    """Refuse to resume a run with another recipe than its own."""
    from peertune.recipe import load_recipe

    before = load_recipe(folder / "resolved.yaml").model_dump(mode="json")
    for block, value in resolved.model_dump(mode="json").items():
        if value != before[block]:
            raise RunError(
                f"{folder}: was run with {block}: {before[block]}, not {value}; resume without a recipe, or start anew"
            )


def _as_yaml(recipe: "Recipe") -> str:
    import yaml

    return yaml.safe_dump(recipe.model_dump(mode="json"), sort_keys=False)


def print_summary(folder: Path, as_json: bool) -> None:
    """Print one row for the run."""
    from peertune import tracking
    from peertune.report.tables import COLUMNS, cells, summarise, text

    row = {"run": folder.name, **summarise(tracking.records(folder))}
    if as_json:
        print_json({**row, "folder": str(folder)})
        return
    print(text(cells([row], COLUMNS)))
    print(f"records and adapters are in {folder}")
