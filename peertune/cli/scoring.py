"""The command `score`."""

from pathlib import Path
from statistics import fmean, pstdev
from typing import TYPE_CHECKING, Annotated, Any

import typer

from peertune.cli.common import AsJson, Overrides, Plugins, importing, messages, print_json

if TYPE_CHECKING:
    from peertune.rounds.record import Evaluation

ONE_BY_ONE = 20
"""Clients up to which each one's score is printed."""


def score(
    run: Annotated[Path, typer.Argument(metavar="RUN", help="The directory of a run that has ended.")],
    overrides: Overrides = None,
    last: Annotated[
        bool, typer.Option("--last", help="Of a run that kept each client's best adapter, score the last ones.")
    ] = False,
    plugin: Plugins = None,
    as_json: AsJson = False,
) -> None:
    """Score a run's adapters on the task's test rows, which no round has seen.

    The scores are those of the rounds. Beside each stands what the best constant answer has on the same rows. Of a run
    with evaluate.load_best a client's adapter is its best one; the average is of the last ones.

    Examples:

      peertune score runs/digits-demo
    """
    with messages():
        with importing():
            from peertune.api.scoring import score as scored
        of = scored(run, overrides or [], last=last)
        found, clients, rounds = of.evaluation, of.clients, of.best_rounds
    told = {"rows": found.rows, "clients": clients, **_told(found)} | ({"best_rounds": rounds} if rounds else {})
    also = [_told(metric) for metric in found.also]
    if as_json:
        named = {"run": run.name, "folder": str(run), "round": of.round}
        print_json(named | told | ({"also": also} if also else {}))
    else:
        best_of = f", clients' best adapters from after {min(rounds) + 1} to {max(rounds) + 1}" if rounds else ""
        where = f"{found.rows:,} test rows, after {of.round} rounds{best_of}"
        print("\n".join(f"{metric['metric']} on {where}\n\n{_lines(metric, clients)}" for metric in (told, *also)))


def _told(found: "Evaluation") -> dict[str, Any]:
    scores = found.clients
    return {
        "metric": found.metric,
        "scores": scores,
        "mean": fmean(scores),
        "spread": pstdev(scores),
        "min": min(scores),
        "max": max(scores),
        "average": found.average,
        "constant": found.constant,
    }


def _lines(told: dict[str, Any], clients: list[int]) -> str:
    many = f", {told['min']:.3f} to {told['max']:.3f} over {len(clients)} clients" if len(clients) > 1 else ""
    lines = [f"clients' own models  {told['mean']:.3f} ± {told['spread']:.3f}{many}"]
    if told["average"] is not None:
        lines.append(f"averaged adapter     {told['average']:.3f}")
    lines.append(f"constant answer      {told['constant']:.3f}")
    if 1 < len(clients) <= ONE_BY_ONE:
        scored = zip(clients, told["scores"], strict=True)
        lines += ["", *(f"client {client:<12}  {own:.3f}" for client, own in scored)]
    return "\n".join([*lines, ""])
