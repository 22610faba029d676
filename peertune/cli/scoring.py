"""The command `score`."""

import logging
from pathlib import Path
from statistics import fmean, pstdev
from typing import TYPE_CHECKING, Annotated, Any

import typer

from peertune.cli.common import AsJson, Overrides, Plugins, importing, messages, print_json
from peertune.errors import RunError

if TYPE_CHECKING:
    from peertune.rounds.record import Evaluation

log = logging.getLogger(__name__)

ELSEWHERE = ("task.test", "task.path", "device", "training.tokens_per_pass")
"""Keys that may be others than the run's: which rows test, where they lie, and what computes."""
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
            from peertune.assembly.scoring import score_test
        from peertune.recipe import load_recipe
        from peertune.rounds import best
        from peertune.rounds.patience import ended_early
        from peertune.runs import checkpoints, directory, records

        for word in overrides or []:
            if word.partition("=")[0] not in ELSEWHERE:
                raise RunError(f"{word}: a run is scored as it was run; what may be given is {', '.join(ELSEWHERE)}")
        recipe = load_recipe(directory.resolved(run), overrides or [])
        state = checkpoints.load(run)
        own = directory.peer(run)
        early = ended_early(records.read(run, ("evaluation.clients",)), recipe.evaluate.model_dump())
        if state is None or (state.round < recipe.rounds and early is None):
            made = 0 if state is None else state.round
            go_on = "peertune run" if own is None else "peertune peer start"
            raise RunError(
                f"{run}: has made {made} of its {recipe.rounds} rounds, and a test is for the end; "
                f"go on with {go_on} --resume {run}"
            )
        clients = list(range(state.clients)) if own is None else [int(own["client"])]
        adapters, rounds = (state.adapters, []) if last else best.kept(state)
        average = None if own is not None else {name: x.mean(0, keepdim=True) for name, x in state.adapters.items()}
        found = score_test(recipe, adapters, clients, average)
    told = {"rows": found.rows, "clients": clients, **_told(found)} | ({"best_rounds": rounds} if rounds else {})
    also = [_told(metric) for metric in found.also]
    if as_json:
        named = {"run": run.name, "folder": str(run), "round": state.round}
        print_json(named | told | ({"also": also} if also else {}))
    else:
        best_of = f", clients' best adapters from after {min(rounds) + 1} to {max(rounds) + 1}" if rounds else ""
        where = f"{found.rows:,} test rows, after {state.round} rounds{best_of}"
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
