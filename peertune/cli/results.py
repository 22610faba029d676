"""The commands that look at what runs left: `compare`, `report`, `diagnose` and `export`."""

import re
from collections.abc import Mapping, Sequence
from math import inf, isfinite, nan
from pathlib import Path
from typing import Annotated, Any

import typer

from peertune.cli.common import AsJson, messages, print_json
from peertune.errors import RunError, unknown

Runs = Annotated[list[Path], typer.Argument(metavar="DIR...", help="Run directories, or folders that hold some.")]


def compare(
    runs: Runs,
    by: Annotated[
        str | None, typer.Option(help="Keys of the recipe that make a row, such as algorithm.name,graph.activation.")
    ] = None,
    measure: Annotated[
        str | None, typer.Option("--metric", help="Columns: of mean, best, min, max, average, best_average and others.")
    ] = None,
    paired_with: Annotated[
        str | None, typer.Option(help="Show differences from this value's runs, seed by seed, such as dec_lora.")
    ] = None,
    to: Annotated[
        str | None, typer.Option(metavar="SCORE", help="Show what it took until the clients' mean score was so good.")
    ] = None,
    budget: Annotated[
        str | None, typer.Option(metavar="SIZE", help="Show the best until a client had sent so much, such as 100MB.")
    ] = None,
    within: Annotated[
        str | None, typer.Option(metavar="TIME", help="Show the best within so much virtual time, such as 90s or 2h.")
    ] = None,
    as_json: AsJson = False,
    as_csv: Annotated[bool, typer.Option("--csv", help="Print comma-separated values, all measures.")] = False,
    as_markdown: Annotated[bool, typer.Option("--markdown", help="Print Markdown tables.")] = False,
    as_latex: Annotated[bool, typer.Option("--latex", help="Print LaTeX tabulars for booktabs.")] = False,
) -> None:
    """Put runs side by side: mean and standard deviation over seeds of scores, disagreement, traffic and time.

    Rows are the settings in which the runs differ, seeds apart; --by chooses others. mean and best are of the clients'
    own models, average and best_average of the averaged adapter. Paired differences come with 95 % intervals.

    --to says after how many rounds, megabytes sent by a client and virtual seconds an evaluation was first so good.
    --budget and --within say how good the best one was until then; given together, both hold.

    Examples:

      peertune compare runs/demo

      peertune compare runs/methods --by algorithm.name --paired-with dec_lora --markdown

      peertune compare runs/methods --to 0.8

      peertune compare runs/methods --budget 100MB --paired-with dec_lora
    """
    if sum([as_json, as_csv, as_markdown, as_latex]) > 1:
        raise RunError("compare: give one of --json, --csv, --markdown and --latex")
    score, limits = None if to is None else _score(to), {}
    if budget is not None:
        limits["megabytes_sent"] = _quantity("--budget", budget, _SIZES, "a size", "100MB") / 1e6
    if within is not None:
        limits["virtual_seconds"] = _quantity("--within", within, _TIMES, "a time", "2h")
    with messages():
        from peertune.report import costs, tables
        from peertune.report.runs import find_runs
        from peertune.report.verdict import ordered, verdicts

        asked = [name.strip() for name in measure.split(",")] if measure else []
        if wrong := next((name for name in asked if name not in tables.MEASURES), None):
            raise RunError(unknown("--metric", wrong, tables.MEASURES))
        keys = [key.strip() for key in by.split(",")] if by else None
        found = find_runs(runs)
        rows = ordered(tables.grouped(found, keys, paired_with))
        rows = rows if score is None else costs.reach(rows, found, score)
        rows = costs.limit(rows, found, **limits) if limits else rows
        measures = asked or tables.measured(rows)
    if as_json:
        print_json(tables.told(rows))
        return
    if as_csv:
        _print_csv(rows)
        return
    draw = tables.markdown if as_markdown else tables.latex if as_latex else tables.aligned
    others = tables.by_metric(rows)
    print((f"{rows[0]['metric']}\n\n" if others else "") + draw(tables.compared(rows, measures)))
    for name, alike in others:
        there = [key for key in measures if key in tables.measured(alike)]
        print(f"\n{name}\n\n{draw(tables.compared(alike, there))}")
    for name, alike in [("", rows), *others] if paired_with is not None else []:
        if lines := tables.paired(alike, measures):
            what = f"{name or rows[0]['metric']}, difference" if others else "difference"
            print(f"\n{what} from {paired_with}, seed by seed, with its 95 % interval\n\n{draw(lines)}")
    for title, lines in costs.tabled(rows, paired_with):
        print(f"\n{title}\n\n{draw(lines)}")
    if draw is tables.aligned:
        if judged := verdicts(rows):
            print("\n" + "\n".join(map(str, judged)))
        scores = {row["metric"] for row in rows} - {None}
        print(f"\n{''.join(f'{score} ' for score in scores) if len(scores) == 1 and not others else ''}{tables.LEGEND}")


_SIZES = {"kB": 1e3, "MB": 1e6, "GB": 1e9}
"""Unit → bytes."""
_TIMES = {"s": 1.0, "min": 60.0, "h": 3600.0}
"""Unit → seconds."""


def _score(text: str) -> float:
    try:
        score = float(text)
    except ValueError:
        score = nan
    if not isfinite(score):
        raise RunError(f"--to: {text!r} is no score; give a number such as 0.8")
    return score


def _quantity(option: str, text: str, units: Mapping[str, float], what: str, example: str) -> float:
    """Read a number with its unit, such as 100MB, as so many of the units' unit."""
    found = re.fullmatch(rf"(\d+\.?\d*|\.\d+) *({'|'.join(units)})", text.strip())
    if found is None or not 0 < (amount := float(found[1]) * units[found[2]]) < inf:
        *most, last = units
        hint = f"give a number above 0 with {', '.join(most)} or {last}, such as {example}"
        raise RunError(f"{option}: {text!r} is not {what}; {hint}")
    return amount


def _print_csv(rows: Sequence[Mapping[str, Any]]) -> None:
    import csv
    import sys

    from peertune.recipe import flat

    lines = [
        {"runs": len(row["runs"]), "metric": row["metric"]}
        | row["by"]
        | flat(row["measures"])
        | flat({metric["metric"]: metric["measures"] for metric in row["also"]})
        | flat({"paired": row.get("paired") or {}})
        | flat({metric["metric"]: {"paired": metric.get("paired") or {}} for metric in row["also"]})
        | flat({kind: _in_cells(row[kind]) for kind in ("to", "within") if kind in row})
        | flat({metric["metric"]: {"within": _in_cells(metric.get("within", {}))} for metric in row["also"]})
        for row in rows
    ]
    writer = csv.DictWriter(sys.stdout, list(dict.fromkeys(key for line in lines for key in line)), lineterminator="\n")
    writer.writeheader()
    writer.writerows(lines)


def _in_cells(found: Mapping[str, Any]) -> dict[str, Any]:
    """Return what was found about costs without what is by run."""
    return {key: {} if value is None else value for key, value in found.items() if key != "each"}


def report(
    runs: Runs,
    out: Annotated[
        Path | None, typer.Option(help="The file to write; where not given, report.html in the first folder.")
    ] = None,
    figures: Annotated[
        Path | None, typer.Option(help="Write each figure as PNG and SVG into this folder, too; needs a Chromium.")
    ] = None,
    show: Annotated[bool, typer.Option("--open", help="Open the report in the browser.")] = False,
    as_json: AsJson = False,
) -> None:
    """Write one HTML file about a run or several: curves, disagreement, graph, partition, comparison, findings.

    The file holds all that it shows: no network is needed to view it.

    Examples:

      peertune report runs/digits-demo --open

      peertune report runs/methods --out methods.html --figures figures
    """
    with messages():
        from peertune.api.runs import Runs
        from peertune.report.judging import by_class

        found = Runs.open(*runs)
        file = out or runs[0] / "report.html"
        written = found.report(file, figures)
    if as_json:
        classes = {run.name: by_class(run) for run in found}
        print_json({"runs": [*classes], "written": [str(path) for path in written], "classes": classes})
    else:
        print(f"the report on {len(found)} run{'s' * (len(found) > 1)} is in {file}")
        if figures is not None:
            print(f"{len(written) - 1} pictures are in {figures}")
    if show:
        typer.launch(str(file))


def diagnose(
    runs: Runs,
    as_json: AsJson = False,
) -> None:
    """Say in plain words what went wrong in a run, or that nothing did, with the numbers behind it.

    Examples:

      peertune diagnose runs/digits-demo
    """
    with messages():
        from dataclasses import asdict

        from peertune.api.runs import Runs

        found = {run.name: run.findings for run in Runs.open(*runs)}
    if as_json:
        print_json({name: [asdict(finding) for finding in findings] for name, findings in found.items()})
        return
    for number, (name, findings) in enumerate(found.items()):
        print(("\n" if number else "") + name)
        for finding in findings:
            print(f"  {finding.severity}: {finding.title}. {finding.text} {finding.advice}".rstrip())


def export(
    run: Annotated[Path, typer.Argument(metavar="RUN", help="A run directory, finished or not.")],
    client: Annotated[str, typer.Option(help="A client's number, or: average.")],
    to: Annotated[Path, typer.Option(help="The folder to write.")],
    merge: Annotated[
        bool, typer.Option("--merge", help="Write the whole model, the adapter added to its base, not the adapter.")
    ] = False,
    push: Annotated[
        str | None, typer.Option(metavar="OWNER/NAME", help="Put it on the Hugging Face hub as well, under this name.")
    ] = None,
    last: Annotated[
        bool, typer.Option("--last", help="Of a run that kept each client's best adapter, write its last one.")
    ] = False,
    private: Annotated[bool, typer.Option("--private", help="With --push: for you alone to see.")] = False,
    rank: Annotated[
        int | None, typer.Option(min=1, help="Write the nearest adapter of this rank, and say how near it is.")
    ] = None,
) -> None:
    """Write one client's adapter, or the average, as a folder that PEFT loads, or merged into its base.

    A README.md in the folder says how it was trained, how good it is and how to load it. Of a run with
    evaluate.load_best a client's adapter is its best one.

    Examples:

      peertune export runs/digits-demo --client average --to adapter

      peertune export runs/digits-demo --client average --merge --to model

      peertune export runs/digits-demo --client average --to adapter --push me/digits --private
    """
    if client != "average" and not client.isdecimal():
        raise RunError(f"--client: {client!r} is no client; give a number, or average")
    if private and push is None:
        raise RunError("--private: goes with --push")
    number = None if client == "average" else int(client)
    with messages():
        from peertune.api.runs import Run
        from peertune.runs import directory

        found = Run.open(directory.resolved(run).parent)
        done = found.export(to, number, last=last, merge=merge, push=push, private=private, rank=rank)
    what = "the average" if number is None else f"client {number}"
    print(f"{what} of {run}{f', merged into its base in {done.precision},' if merge else ''} is in {to}")
    if rank is not None:
        print(f"with rank {rank} it lacks {done.lost:.1%} of the norm of its products")
    if done.address is not None:
        print(f"and at {done.address}")
