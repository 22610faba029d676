"""The command `run`."""

import logging
import os
import shlex
import sys
from contextlib import nullcontext
from itertools import chain, count
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, NoReturn

import typer

from peertune.cli.common import (
    AsJson,
    Overrides,
    Plugins,
    asked_to_stop,
    environment,
    importing,
    interruptible,
    leads,
    messages,
    print_json,
    progress,
    told_first,
    versions,
)
from peertune.cli.estimating import print_estimate
from peertune.errors import Exit, RunError

log = logging.getLogger(__name__)

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator

    from peertune.assembly.build import Run
    from peertune.recipe import Recipe
    from peertune.rounds.record import RoundRecord
    from peertune.rounds.round import Job
    from peertune.runs.keeping import Keeper
    from peertune.types import Group, State


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
            import peertune.assembly.build  # noqa: F401  # which `_built` takes
            from peertune.assembly import plugins
            from peertune.engines.distributed import joined, run_cluster
            from peertune.engines.simulator import simulate
            from peertune.runs import directory

        with joined(rendezvous_s) as group:
            if out is not None and _again(out, group):
                resume = out
            if resume is not None:
                folder, run = resume, _resumed(resume, recipe, overrides or [], group)
            else:
                assert recipe is not None
                folder, run = _begun(out, recipe, overrides or [], group)
            with directory.locked(folder) if group.rank == 0 else nullcontext():
                if resume is not None and group.rank == 0:
                    _lengthen(run.resolved, folder)
                there = [*(["--workers", str(group.size)] if group.size > 1 else []), *plugins.options()]
                engine = simulate if group.size == 1 else run_cluster
                go_on = " ".join(["peertune run --resume", str(folder), *there])
                train(run, folder, engine, go_on, keeper(run, folder))
    if leads():
        print_summary(folder, as_json)


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


def _again(out: Path, group: "Group") -> bool:
    """Return whether torchrun has started the processes again, after the run had begun.

    Machines count their own restarts. A launch without a name, `none`, is known by its count alone.
    """
    from peertune.runs import directory

    launch = os.environ.get("TORCHELASTIC_RUN_ID", "none")
    counted = any(group.gather(int(os.environ.get("TORCHELASTIC_RESTART_COUNT", "0"))))
    return bool(group.gather((counted or launch != "none") and directory.launched(out, launch))[0])


def _resumed(folder: Path, recipe: str | None, overrides: list[str], group: "Group") -> "Run":
    """Make the run of this directory again."""
    from peertune.recipe import load_recipe
    from peertune.runs import directory

    if group.rank == 0:
        directory.resolved(folder)
    directory.check_shared(folder, group)
    if recipe is not None and "=" in recipe:  # no recipe, its first override
        overrides, recipe = [recipe, *overrides], None
    run = _built(load_recipe(recipe or directory.resolved(folder), overrides), group)
    check_same(run.resolved, folder, longer=True)
    return run


def _begun(out: Path | None, recipe: str, overrides: list[str], group: "Group") -> "tuple[Path, Run]":
    """Make a new run and its directory."""
    from peertune.recipe import load_recipe
    from peertune.runs import directory

    folder = Path(group.gather(str(out or _free(Path("runs") / Path(recipe).stem)))[0])
    if group.rank == 0:
        directory.check_free(folder)  # before the minutes that loading may take
    directory.check_shared(folder.parent, group)
    run = _built(load_recipe(recipe, overrides), group)
    if group.rank == 0:
        begin(run, folder, "run", recipe, overrides)
    return folder, run


def _built(recipe: "Recipe", group: "Group") -> "Run":
    """Make the part of this process in a run, once it is sure that all processes make parts of the same."""
    from peertune.assembly.build import agreed, build
    from peertune.assembly.registry import from_outside
    from peertune.engines.distributed import check_alike, check_devices, share

    if group.size == 1:
        return build(recipe)
    check_alike(group, versions() | recipe.model_dump(mode="json"))
    check_devices(recipe.device, group)
    run = build(recipe, share(recipe.clients, group), group=group)
    check_alike(group, run.resolved.model_dump(mode="json") | agreed(run) | {"plugins": from_outside(recipe)})
    return run


def begin(run: "Run", folder: Path, command: str, recipe: str, overrides: list[str], **facts: object) -> None:
    """Make the run directory."""
    from peertune.assembly import plugins
    from peertune.recipe import as_yaml, recipe_text
    from peertune.runs import directory

    asked = " ".join(shlex.join([recipe, *overrides, *plugins.options()]).split())  # on one line, whatever was typed
    directory.create(
        folder,
        recipe=f"# asked for: peertune {command} {asked}\n{recipe_text(recipe)}",
        resolved=as_yaml(run.resolved.model_dump(mode="json")),
        environment=environment(),
        facts=run.facts | facts,
        lora=run.lora,
        head=run.head,
        labels=run.labels,
        taken=run.job.model.taken,
    )


def keeper(run: "Run", folder: Path) -> "Keeper":
    """Return what keeps the records and checkpoints of a run."""
    from peertune.runs.keeping import Keeper

    checkpoint = run.resolved.checkpoint
    return Keeper(folder, run.job.clients, checkpoint.every, checkpoint.keep, run.job.group)


def train(
    run: "Run",
    folder: Path,
    engine: "Callable[[Job], Iterator[RoundRecord]]",
    resume: str,
    keeper: "Keeper",
    stop_waiting: "Callable[[], None]" = lambda: None,
) -> "State":
    """Do what is left of a run, keep its records and checkpoints, write the adapters at the end, and return the state.

    When asked to stop, have the engine `stop_waiting`, finish the round, and say how to `resume`.
    """
    from dataclasses import replace

    import torch

    from peertune.runs import checkpoints, exports, records
    from peertune.runs.trackers import reporting

    job = run.job
    leading = job.group.rank == 0
    state = checkpoints.load(folder, job.state, job.clients, job.group) or job.state
    state = state.to(job.device)
    job = replace(job, state=state)
    if leading:
        records.rewind(folder, state.round)
    keeper.round = state.round
    try:
        with (
            told_first(),
            asked_to_stop(
                "stopping after this round; once more to go back to the last checkpoint", stop_waiting
            ) as stop,
            progress("round", job.rounds, state.round) as show,
            reporting(folder, run.resolved) if leading else nullcontext() as report,
        ):
            described = ""
            for record in engine(job):
                assert record.state is not None
                if report is not None:
                    keeper.record(record)
                    report(record)
                state = record.state
                stopping = bool(job.group.add(torch.tensor(len(stop)))) and state.round < job.rounds
                keeper.checkpoint(state, last=stopping or state.round >= job.rounds)
                described = _describe(record, described)
                show(state.round, described)
                if stopping:
                    raise KeyboardInterrupt
            if state.round < job.rounds:  # the engine ended before the last round
                keeper.checkpoint(state, last=True)
        exports.write_all(folder, state, job.clients, job.group)
        return state
    except KeyboardInterrupt:
        if leading:
            print(f"peertune: stopped after {keeper.round} rounds; go on with: {resume}", file=sys.stderr)
        sys.exit(Exit.STOPPED)


def _describe(record: "RoundRecord", before: str) -> str:
    """Say how the run stands; the score stays until the next evaluation."""
    loss = f"loss {sum(record.loss) / len(record.loss):.3f}"
    if record.evaluation is None:
        return loss + before[before.find("  ") :] if "  " in before else loss
    clients = record.evaluation.clients
    return f"{loss}  {record.evaluation.metric} {sum(clients) / len(clients):.3f}"


def _free(folder: Path) -> Path:
    """Return the folder, or where it is taken, the first of folder-2, folder-3, … that is free."""
    others = (folder.with_name(f"{folder.name}-{number}") for number in count(2))
    return next(place for place in chain([folder], others) if not place.exists())


def _lengthen(resolved: "Recipe", folder: Path) -> None:
    """Write down that a run has more rounds than it had, and say what becomes of a rate that falls."""
    from peertune.assembly.build import build_optim
    from peertune.files import write_file
    from peertune.recipe import as_yaml, load_recipe
    from peertune.runs import directory

    before = load_recipe(directory.resolved(folder))
    if resolved.rounds == before.rounds:
        return
    log.info("%s: goes on to round %d, where it had %d", folder, resolved.rounds, before.rounds)
    step = before.rounds * before.training.local_steps - 1
    was, now = (build_optim(recipe).rates(step)["A"] for recipe in (before, resolved))
    if was != now:
        log.warning(
            "training.lr_scheduler_type: %s over %d rounds had come to %.3g after these, and goes on at %.3g, as over "
            "%d; a run of so many from the start would be another",
            *(resolved.training.lr_scheduler_type, before.rounds, was, now, resolved.rounds),
        )
    write_file(folder / "resolved.yaml", as_yaml(resolved.model_dump(mode="json")).encode())


def check_same(resolved: "Recipe", folder: Path, *, longer: bool = False) -> None:
    """Refuse to resume a run with another recipe than its own, but for more rounds if it may be `longer`.

    Warn of other code.
    """
    from peertune.assembly.registry import completed, from_outside
    from peertune.recipe import load_recipe
    from peertune.runs import directory

    was, now = directory.plugins(folder), from_outside(resolved)
    for block in (block for block in now if now[block] != was.get(block)):
        log.warning("%s: the code of %s is another than the run began with: %s", folder, block, dict(now[block]))
    both = (load_recipe(folder / "resolved.yaml"), resolved)  # the first may be from a version with fewer settings
    before, after = (recipe.model_copy(update=completed(recipe)).model_dump(mode="json") for recipe in both)
    for block, value in after.items():
        if longer and block == "rounds" and value > before[block]:
            continue
        if value != before[block]:
            raise RunError(
                f"{folder}: was run with {block}: {before[block]}, not {value}; resume without a recipe, or start anew"
            )


def print_summary(folder: Path, as_json: bool, **more: object) -> None:
    """Print one row for the run; as JSON with what `more` there is to say."""
    from peertune.report.tables import COLUMNS, SUMMARISED, aligned, cells, summarise
    from peertune.runs import records

    row = {"run": folder.name, **summarise(records.read(folder, SUMMARISED))}
    if as_json:
        print_json({**row, **more, "folder": str(folder)})
        return
    print(aligned(cells([row], {key: heading for key, heading in COLUMNS.items() if key in row})))
    print(f"records and adapters are in {folder}")
