"""`score`: what the command of this name does, as a call."""

from collections.abc import Sequence
from pathlib import Path
from typing import NamedTuple

from peertune.assembly.scoring import score_test
from peertune.errors import RunError
from peertune.recipe import load_recipe
from peertune.rounds import best
from peertune.rounds.patience import ended_early
from peertune.rounds.record import Evaluation
from peertune.rounds.slices import average
from peertune.runs import checkpoints, directory, records
from peertune.types import among

ELSEWHERE = ("task.test", "task.path", "device", "training.tokens_per_pass")
"""Keys that may be others than the run's: which rows test, where they lie, and what computes."""


class Scored(NamedTuple):
    """What adapters scored on the test rows."""

    evaluation: Evaluation  # in the order of `clients`; at a party without an average
    clients: list[int]
    round: int  # how many rounds the run made
    best_rounds: list[int]  # after which each client's adapter was its best; empty where the last ones are scored


def score(folder: str | Path, overrides: Sequence[str] = (), *, last: bool = False) -> Scored:
    """Score a run's adapters on the task's test rows, which no round has seen.

    Args:
        folder: the directory of a run that has ended.
        overrides: of `ELSEWHERE` alone, such as `task.test=test`.
        last: of a run that kept each client's best adapter, score the last ones.

    Raises:
        RunError: the run has not ended, another key is given, or it kept no best adapters and `last` is asked for.
        RecipeError: the task has no test rows.
        ModelError: the base's weights are others than those that the run began with.
    """
    run = Path(folder)
    for word in overrides:
        if word.partition("=")[0] not in ELSEWHERE:
            raise RunError(f"{word}: a run is scored as it was run; what may be given is {', '.join(ELSEWHERE)}")
    recipe = load_recipe(directory.resolved(run), list(overrides))
    state, own = checkpoints.load(run), directory.peer(run)
    early = ended_early(records.read(run, ("evaluation.clients",)), recipe.evaluate.model_dump())
    if state is None or (state.round < recipe.rounds and early is None):
        made = 0 if state is None else state.round
        go_on = "peertune run" if own is None else "peertune peer start"
        raise RunError(
            f"{run}: has made {made} of its {recipe.rounds} rounds, and a test is for the end; "
            f"go on with {go_on} --resume {run}"
        )
    clients = list(range(state.clients)) if own is None else [int(own["client"])]
    adapters, rounds = best.kept(state, last=last)
    mean = None
    if own is None:
        enemies = directory.hostile(run)
        rounds = [number for client, number in zip(clients, rounds, strict=False) if client not in enemies]
        honest, _ = among(state.stacks, clients, enemies)
        mean = {name: x[None] for name, x in average(honest).items()}
        adapters, clients = among(adapters, clients, enemies)
    scored = score_test(recipe, adapters, clients, mean, weights=directory.weights(run))
    return Scored(scored, clients, state.round, rounds)
