"""The command `peertune`. Heavy imports stand inside the commands, so that `--help` answers at once."""

import json
import logging
import shlex
import signal
import sys
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from io import TextIOWrapper
from pathlib import Path
from threading import Event
from typing import TYPE_CHECKING, Annotated, Any

import typer

from peertune.errors import PeertuneError, RunError

if TYPE_CHECKING:
    from peertune.assembly import Run
    from peertune.recipe import Recipe
    from peertune.types import RoundRecord

app = typer.Typer(
    help="Fine-tune a foundation model across parties that keep their data, with no server.",
    no_args_is_help=True,
    add_completion=False,
    pretty_exceptions_enable=False,
    rich_markup_mode=None,
    context_settings={"help_option_names": ["-h", "--help"]},
    epilog="Start with: peertune run digits-demo",
)

RecipeName = Annotated[str, typer.Argument(metavar="RECIPE", help="A recipe's path, or the name of a shipped one.")]
Overrides = Annotated[
    list[str] | None,
    typer.Argument(metavar="[KEY=VALUE]...", help="Keys of the recipe to set, such as graph.activation=0.02 seed=1."),
]
AsJson = Annotated[bool, typer.Option("--json", help="Print JSON on standard output, for machines.")]


def main() -> None:
    """Run the command line; a user's mistake ends in one line and exit code 2."""
    if isinstance(sys.stdout, TextIOWrapper):
        sys.stdout.reconfigure(errors="replace")  # a terminal without a Δ shows a ?
    try:
        app()
    except MemoryError:
        print("peertune: out of memory; lower training.tokens_per_pass or training.clients_per_pass", file=sys.stderr)
        sys.exit(2)
    except (PeertuneError, OSError) as error:
        print("peertune:", " ".join(str(error).splitlines()), file=sys.stderr)
        sys.exit(2)


@app.command()
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
    as_json: AsJson = False,
) -> None:
    """Run a recipe: train all clients, keep checkpoints, write their adapters.

    Ctrl-C leaves a run that --resume continues to the same bits, with the recipe that it began with.

    Examples:

      peertune run digits-demo

      peertune run digits-demo algorithm.name=dec_lora graph.activation=0.05 --out runs/sparse

      peertune run --resume runs/sparse
    """
    if resume is not None and out is not None:
        raise RunError("--resume and --out: give one of them; a resumed run stays in its directory")
    if recipe is None and resume is None:
        raise RunError("run: give a RECIPE, or --resume DIR; `peertune recipes` lists the shipped ones")
    with _interruptible(), _messages():
        from peertune import tracking
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
            run = build(load_recipe(recipe, overrides or []))
            asked = " ".join(shlex.join([recipe, *(overrides or [])]).split())  # on one line, whatever was typed
            tracking.create(
                folder,
                recipe=f"# asked for: peertune run {asked}\n{recipe_text(recipe)}",
                resolved=_as_yaml(run.resolved),
                environment=_environment(),
                lora=run.lora,
                head=run.head,
                labels=run.labels,
            )
        _train(run, folder)
    _print_summary(folder, as_json)


@app.command()
def compare(
    runs: Annotated[list[Path], typer.Argument(metavar="RUN...", help="Run directories.")],
    as_json: AsJson = False,
    as_markdown: Annotated[bool, typer.Option("--markdown", help="Print a Markdown table.")] = False,
) -> None:
    """Put runs side by side: clients' scores, consensus error, cross term, traffic and time.

    Example:

      peertune compare runs/demo/local runs/demo/dec_lora runs/demo/tad_lora
    """
    from peertune import tracking
    from peertune.report.tables import COLUMNS, LEGEND, cells, markdown, summarise, text

    alike = len({folder.name for folder in runs}) < len(runs)
    rows = [
        {"run": str(folder) if alike else folder.resolve().name, **summarise(tracking.records(folder))}
        for folder in runs
    ]
    # Runs of several metrics share columns only by name.
    several = len({row.get("metric") for row in rows}) > 1
    columns = {"run": "run", "metric": "metric", **COLUMNS} if several else COLUMNS
    if as_json:
        _print_json(rows)
    elif as_markdown:
        print(markdown(cells(rows, columns)))
    else:
        print(text(cells(rows, columns)))
        scores = "" if several else f"{rows[0].get('metric', 'score')} "
        print(f"\n{scores}{LEGEND}")


@app.command()
def recipes(
    name: Annotated[str | None, typer.Argument(help="Print this recipe.")] = None,
    as_json: AsJson = False,
) -> None:
    """List the shipped recipes, or print one.

    Example:

      peertune recipes digits-demo > mine.yaml
    """
    from peertune.recipe import load_recipe, recipe_names, recipe_text

    if name is not None:
        if as_json:
            _print_json(load_recipe(name).model_dump())
        else:
            print(recipe_text(name), end="")
        return
    titles = {shipped: recipe_text(shipped).splitlines()[0].removeprefix("# ") for shipped in recipe_names()}
    if as_json:
        _print_json(titles)
        return
    width = max(map(len, titles))
    for shipped, title in titles.items():
        print(f"{shipped:{width}}  {title}")


@app.command()
def graph(
    recipe: RecipeName,
    overrides: Overrides = None,
    png: Annotated[Path | None, typer.Option(help="Draw the graph into this file.")] = None,
    as_json: AsJson = False,
) -> None:
    """Describe a recipe's graph: rho, spectral gap, T*, neighbours per round.

    Example:

      peertune graph digits-demo graph.name=ring --png ring.png
    """
    with _messages():
        from peertune.algorithms.schedules import switching_interval
        from peertune.parts import build_graph
        from peertune.recipe import load_recipe
        from peertune.topology import summary

        made = build_graph(load_recipe(recipe, overrides or []))
        facts = summary(made)
    try:
        interval: int | None = switching_interval(facts.rho)
    except PeertuneError:  # no pair met in any draw
        interval = None
    if png is not None:
        from peertune.report.plots import draw_graph

        title = f"{made.name}, {facts.clients} clients, activation {made.activation:g}"
        draw_graph(made, f"{title}: rho {facts.rho:.3f}, T* {interval}", png)
    if as_json:
        _print_json({**vars(facts), "switching_interval": interval})
        return
    how = "exact" if facts.draws == 0 else f"estimated from {facts.draws:,} draws"
    print(
        f"graph                            {made.name}, {facts.clients} clients, "
        f"{round(facts.edges, 2):,.10g} possible edges a round"
    )
    print(f"activation, weights              {made.activation:g}, {made.weights}")
    print(f"rho                              {facts.rho:.4f} ({how})")
    print(f"spectral gap, 1 - rho            {facts.spectral_gap:.4f}")
    print(f"T*, rounds between switches      {interval}")
    print(f"mean neighbours per round        {facts.mean_neighbours:.3f}")
    print(f"client-rounds without neighbour  {facts.isolated_share:.1%}")
    if png is not None:
        print(f"picture                          {png}")


@app.command()
def data(recipe: RecipeName, overrides: Overrides = None, as_json: AsJson = False) -> None:
    """Show a recipe's partition: how many rows of each label every client holds.

    Example:

      peertune data digits-demo partition.alpha=1
    """
    with _messages():
        from peertune.data.partition import counts
        from peertune.parts import build_partition, build_task
        from peertune.recipe import load_recipe
        from peertune.report.tables import text

        loaded = load_recipe(recipe, overrides or [])
        task = build_task(loaded)
        parts = build_partition(loaded, task)
    labels = task.classes or ("rows",)
    per_label = counts(task.train, parts, len(labels)).tolist() if task.classes else [[len(part)] for part in parts]
    held = sum(map(sum, per_label))
    if as_json:
        clients = [
            {"client": client, "labels": dict(zip(labels, row, strict=True)), "rows": sum(row)}
            for client, row in enumerate(per_label)
        ]
        _print_json({"clients": clients, "rows": len(task.train), "held": held, "validation": len(task.validation)})
        return
    print(f"{task.name}: training rows of each label\n")
    head = ["client", *labels, "all"]
    lines = [head, *([str(value) for value in (client, *row, sum(row))] for client, row in enumerate(per_label))]
    if len(text(lines).splitlines()[0]) > 120:  # long names: number the columns
        lines[0] = ["client", *map(str, range(len(labels))), "all"]
        print("\n".join(f"{number}: {label}" for number, label in enumerate(labels)) + "\n")
    print(text(lines))
    print(f"\n{held:,} of {len(task.train):,} training rows are held; {len(task.validation):,} rows validate")


@app.command()
def export(
    run: Annotated[Path, typer.Argument(metavar="RUN", help="A run directory, finished or not.")],
    client: Annotated[str, typer.Option(help="A client's number, or: average.")],
    to: Annotated[Path, typer.Option(help="The folder to write.")],
) -> None:
    """Write one client's adapter, or the average, as a folder that PEFT loads.

    Example:

      peertune export runs/digits-demo --client average --to adapter
    """
    if client != "average" and not client.isdecimal():
        raise RunError(f"--client: {client!r} is no client; give a number, or average")
    with _messages():
        from peertune import tracking

        state = tracking.load_checkpoint(run)
        if state is None:
            raise RunError(f"{run}: holds no checkpoint; give the folder of a run that has got to its first one")
        tracking.export(run, state, None if client == "average" else int(client), to)
    print(f"{'the average' if client == 'average' else f'client {client}'} of {run} is in {to}")


@app.command()
def env(as_json: AsJson = False) -> None:
    """Print versions and devices, for a bug report."""
    with _messages():
        facts = _environment()
    if as_json:
        _print_json(facts)
        return
    for name, value in facts.items():
        print(f"{name:16}  {value}")


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
def _stop_between_rounds() -> Iterator[Event]:
    """Set an event at the first Ctrl-C or termination signal, so that the round can be finished; stop at the second."""
    asked = Event()

    def ask(*_: object) -> None:
        if asked.is_set():
            raise KeyboardInterrupt
        asked.set()
        print("peertune: stopping after this round; once more to go back to the last checkpoint", file=sys.stderr)

    before = {number: signal.signal(number, ask) for number in (signal.SIGINT, signal.SIGTERM)}
    try:
        yield asked
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)


@contextmanager
def _messages() -> Iterator[None]:
    """Show what the program is doing on a terminal; elsewhere only warnings."""
    logger = logging.getLogger("peertune")
    handler = logging.StreamHandler()
    handler.setFormatter(logging.Formatter("peertune: %(message)s"))
    logger.addHandler(handler)
    logger.setLevel(logging.INFO if sys.stderr.isatty() else logging.WARNING)
    logger.info("starting")
    try:
        yield
    finally:
        logger.removeHandler(handler)


def _train(run: "Run", folder: Path) -> None:
    """Simulate what is left of a run, keep its records and checkpoints, and write the adapters at the end."""
    from dataclasses import replace

    from rich.console import Console
    from rich.progress import (
        BarColumn,
        MofNCompleteColumn,
        Progress,
        TextColumn,
        TimeElapsedColumn,
        TimeRemainingColumn,
    )

    from peertune import tracking
    from peertune.engines.simulator import simulate

    job, checkpoint = run.job, run.resolved.checkpoint
    state = tracking.load_checkpoint(folder, like=job.state)
    if state is not None:
        state = state.to(job.device)
        job = replace(job, state=state)
    tracking.rewind(folder, job.state.round)
    state, kept = job.state, job.state.round
    columns = (
        TextColumn("round"),
        MofNCompleteColumn(),
        BarColumn(bar_width=30),
        TextColumn("{task.description}"),
        TimeElapsedColumn(),
        TextColumn("left"),
        TimeRemainingColumn(),
    )
    try:
        with (
            _stop_between_rounds() as stop,
            Progress(*columns, console=Console(stderr=True), disable=not sys.stderr.isatty()) as progress,
        ):
            bar = progress.add_task("", total=job.rounds, completed=state.round)
            described = ""
            for record in simulate(job):
                assert record.state is not None
                tracking.append(folder, record)
                state = record.state
                stopping = stop.is_set() and state.round < job.rounds
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


def _environment() -> dict[str, Any]:
    import platform
    from importlib.metadata import version

    import torch

    from peertune.models import pick_device, pick_dtype

    device = pick_device("auto")
    packages = ("peertune", "torch", "transformers", "peft", "datasets", "safetensors", "numpy")
    return {
        **{package: version(package) for package in packages},
        "python": platform.python_version(),
        "platform": platform.platform(),
        "processor": _processor(),
        "threads": torch.get_num_threads(),
        "device": str(device),
        "gpus": [torch.cuda.get_device_name(number) for number in range(torch.cuda.device_count())],
        "dtype": str(pick_dtype("auto", device)).removeprefix("torch."),
    }


def _processor() -> str:
    import platform

    try:
        lines = Path("/proc/cpuinfo").read_text().splitlines()
    except OSError:
        return platform.processor()
    return next((line.partition(":")[2].strip() for line in lines if line.startswith("model name")), platform.machine())


def _print_summary(folder: Path, as_json: bool) -> None:
    from peertune import tracking
    from peertune.report.tables import COLUMNS, cells, summarise, text

    row = {"run": folder.name, **summarise(tracking.records(folder))}
    if as_json:
        _print_json({**row, "folder": str(folder)})
        return
    print(text(cells([row], COLUMNS)))
    print(f"records and adapters are in {folder}")


def _print_json(value: Mapping[str, Any] | Sequence[Any]) -> None:
    print(json.dumps(value, indent=2))
