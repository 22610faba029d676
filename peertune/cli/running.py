"""The command `run`."""

import os
import sys
from itertools import chain, count
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, NoReturn

import typer

from peertune.cli.common import (
    AsJson,
    Overrides,
    Plugins,
    asked_to_stop,
    importing,
    interruptible,
    leads,
    messages,
    print_json,
    progress,
)
from peertune.cli.estimating import print_estimate
from peertune.errors import Exit, RunError, Stopped

if TYPE_CHECKING:
    from collections.abc import Callable

    from peertune.api.training import Training
    from peertune.rounds.record import RoundRecord
    from peertune.types import State


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
    workers: Annotated[
        int | None, typer.Option(min=1, help="Share the clients among so many processes on this machine.")
    ] = None,
    rendezvous_s: Annotated[
        float, typer.Option(min=1, help="With torchrun: seconds to wait for the other processes.")
    ] = 600,
    dry_run: Annotated[
        bool,
        typer.Option(
            "--dry-run", help="Plan the memory, try a few steps, say what the run would take, and write nothing."
        ),
    ] = False,
    plugin: Plugins = None,
    as_json: AsJson = False,
) -> None:
    """Run a recipe: train all clients, keep checkpoints, write their adapters.

    Ctrl-C leaves a run that --resume continues to the same bits, with the recipe that it began with. More rounds may be
    given.

    Examples:

      peertune run digits-demo

      peertune run digits-demo algorithm.name=dec_lora graph.activation=0.05 --out runs/sparse

      peertune run --resume runs/sparse

      peertune run --resume runs/sparse rounds=200

      peertune run digits-demo rounds=1000 --dry-run

      peertune run digits-demo rounds=10 --workers 2 --out runs/two
    """
    if resume is not None and out is not None:
        raise RunError("--resume and --out: give one of them; a resumed run stays in its directory")
    if recipe is None and resume is None:
        raise RunError("run: give a RECIPE, or --resume DIR; `peertune recipes` lists the shipped ones")
    if dry_run:
        if recipe is None or any(option is not None for option in (resume, out, workers)):
            raise RunError("run: --dry-run goes with a RECIPE and overrides alone")
        with interruptible(), messages():
            print_estimate(recipe, overrides or [], as_json)
        return
    if workers is not None:
        _launch(workers, [*([recipe] if recipe else []), *(overrides or [])], out, resume, as_json)
    if resume is None and out is None and int(os.environ.get("TORCHELASTIC_MAX_RESTARTS", "0")):
        raise RunError("run: give an --out, which torchrun's next start goes on with")
    with interruptible(), messages():
        with importing():
            from peertune.api.training import training
            from peertune.assembly import plugins

        given = list(overrides or [])
        if resume is not None and recipe is not None and "=" in recipe:  # no recipe, its first override
            given, recipe = [recipe, *given], None
        folder = resume or out or _free(Path("runs") / Path(str(recipe)).stem)
        with training(recipe, given, folder, again=resume is not None, rendezvous_s=rendezvous_s) as work:
            size = work.job.group.size
            there = [*(["--workers", str(size)] if size > 1 else []), *plugins.options()]
            train(work, " ".join(["peertune run --resume", str(work.folder), *there]))
    if leads():
        print_summary(work.folder, as_json)


def _launch(workers: int, words: list[str], out: Path | None, resume: Path | None, as_json: bool) -> NoReturn:
    """Start the same in so many processes, and end as they do."""
    from peertune.assembly import plugins
    from peertune.engines.distributed import launch

    if "RANK" in os.environ:
        raise RunError("--workers: torchrun started this process and its like already; leave it out")
    options = {"--out": out, "--resume": resume}
    given = [word for name, value in options.items() if value is not None for word in (name, str(value))]
    given += plugins.options()
    sys.exit(launch(workers, ["run", *words, *given, *(["--json"] if as_json else [])]))


def train(work: "Training", resume: str, stop_waiting: "Callable[[], None]" = lambda: None) -> "State":
    """Do what is left of a run, show how far it is, and return the state.

    When asked to stop, have the engine `stop_waiting`, finish the round, and say how to `resume`.
    """
    described = ""
    answer = "stopping after this round; once more to go back to the last checkpoint"
    try:
        with (
            asked_to_stop(answer, stop_waiting) as stop,
            progress("rounds", work.job.rounds, work.job.state.round) as show,
        ):

            def each(record: "RoundRecord") -> bool:
                nonlocal described
                assert record.state is not None
                described = _describe(record, described)
                show(record.state.round, described)
                return bool(stop)

            return work.finish(each)
    except Stopped as stopped:
        if leads():
            print(f"peertune: stopped after {stopped.rounds} rounds; go on with: {resume}", file=sys.stderr)
        sys.exit(Exit.STOPPED)


def _describe(record: "RoundRecord", before: str) -> str:
    """Say how the run stands; the score stays until the next evaluation."""
    loss = f"loss {sum(record.loss) / len(record.loss):.3f}" if record.loss else "loss withheld"
    if record.evaluation is None:
        return loss + before[before.find("  ") :] if "  " in before else loss
    clients = record.evaluation.clients
    return f"{loss}  {record.evaluation.metric} {sum(clients) / len(clients):.3f}"


def _free(folder: Path) -> Path:
    """Return the folder, or where it is taken, the first of folder-2, folder-3, … that is free."""
    others = (folder.with_name(f"{folder.name}-{number}") for number in count(2))
    return next(place for place in chain([folder], others) if not place.exists())


_OF_OWN = {
    "own_trained": "its own adapter as trained",
    "own": "the one after mixing",
    "own_heard": "the average of what its neighbours sent",
}
"""What a client judges on rows of its own → in words, in the order of the round."""


def print_summary(folder: Path, as_json: bool, **more: object) -> None:
    """Print one row for the run; as JSON with what `more` there is to say."""
    from peertune.recipe import load_recipe
    from peertune.report.tables import COLUMNS, SUMMARISED, aligned, cells, summarise
    from peertune.rounds.patience import ended_early
    from peertune.runs import directory, records

    read = records.read(folder, SUMMARISED)
    row = {"run": folder.name, **summarise(read)}
    evaluate = load_recipe(directory.resolved(folder)).evaluate
    if early := ended_early(read, evaluate.model_dump()):
        row["ended_early"] = {"round": early.round, "best_round": early.best}
    if as_json:
        print_json({**row, **more, "folder": str(folder)})
        return
    rows = [row, *({"run": "", **metric} for metric in row.get("also", ()))]
    print(aligned(cells(rows, {key: heading for key, heading in COLUMNS.items() if key in row})))
    if kept := row.get("best_rounds"):
        print(f"each client's adapter is its best by validation, from after {min(kept) + 1} to {max(kept) + 1} rounds")
    if early:
        print(
            f"ended early, after {early.round + 1} rounds: no evaluation since that after {early.best + 1} had a "
            f"better mean (evaluate.patience={evaluate.patience})"
        )
    if "best_of_own" in row:
        told = ", ".join(f"{words} {row[key]:.3f}" for key, words in _OF_OWN.items())
        top = row["best_of_own"]
        alike = "".join(f", and alike {_OF_OWN[key]}" for key in _OF_OWN if key != top and row[key] == row[top])
        print(f"on held-out rows of its own: {told}; best: {_OF_OWN[top]}{alike}")
    print(f"records and adapters are in {folder}")
