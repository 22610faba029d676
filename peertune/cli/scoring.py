"""The command `score`."""

import logging
from pathlib import Path
from statistics import fmean, pstdev
from typing import TYPE_CHECKING, Annotated, Any

import typer

from peertune.cli.common import AsJson, Overrides, Plugins, importing, messages, print_json
from peertune.errors import RunError

if TYPE_CHECKING:
    from peertune.assembly.scoring import Tested

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

    The score is that of the rounds. Beside it stands what the best constant answer has on the same rows. Of a run with
    evaluate.load_best a client's adapter is its best one; the average is of the last ones.

    Examples:

      peertune score runs/digits-demo
    """
    with messages():
        with importing():
            from peertune.assembly.scoring import score_test
        from peertune.recipe import load_recipe
        from peertune.rounds import best
        from peertune.runs import checkpoints, directory

        for word in overrides or []:
            if word.partition("=")[0] not in ELSEWHERE:
                raise RunError(f"{word}: a run is scored as it was run; what may be given is {', '.join(ELSEWHERE)}")
        recipe = load_recipe(directory.resolved(run), overrides or [])
        state = checkpoints.load(run)
        own = directory.peer(run)
        if state is None or state.round < recipe.rounds:
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
    told = _told(clients, found) | ({"best_rounds": rounds} if rounds else {})
    if as_json:
        print_json({"run": run.name, "folder": str(run), "round": state.round, **told})
    else:
        _print(told, state.round)


def _told(clients: list[int], found: "Tested") -> dict[str, Any]:
    scores = found.evaluation.clients
    return {
        "rows": found.evaluation.rows,
        "metric": found.evaluation.metric,
        "clients": clients,
        "scores": scores,
        "mean": fmean(scores),
        "spread": pstdev(scores),
        "min": min(scores),
        "max": max(scores),
        "average": found.evaluation.average,
        "constant": found.constant,
    }


def _print(told: dict[str, Any], rounds: int) -> None:
    print(f"{told['metric']} on {told['rows']:,} test rows, after {rounds} rounds\n")
    many = f", {told['min']:.3f} to {told['max']:.3f} over {len(told['clients'])} clients"
    print(f"clients' own models  {told['mean']:.3f} ± {told['spread']:.3f}{many if len(told['clients']) > 1 else ''}")
    if told["average"] is not None:
        print(f"averaged adapter     {told['average']:.3f}")
    print(f"constant answer      {'-' if told['constant'] is None else format(told['constant'], '.3f')}")
    if 1 < len(told["clients"]) <= ONE_BY_ONE:
        print()
        for client, own in zip(told["clients"], told["scores"], strict=True):
            print(f"client {client:<12}  {own:.3f}")
