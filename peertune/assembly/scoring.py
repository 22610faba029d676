"""What the adapters of a run that has ended are worth on rows that it never saw: those of the task's test split."""

from collections.abc import Mapping, Sequence
from dataclasses import replace

from peertune.assembly.encoding import encode_test
from peertune.assembly.evaluation import build_evaluation
from peertune.assembly.loading import begun_with, load
from peertune.assembly.registry import build_task
from peertune.errors import RecipeError
from peertune.models.weights import check_weights
from peertune.recipe import Recipe
from peertune.rounds.record import Evaluation
from peertune.types import Stack, Tensors, stacked


def score_test(
    recipe: Recipe,
    adapters: Sequence[Stack],
    clients: Sequence[int],
    average: Tensors | None = None,
    *,
    weights: Mapping[str, str] | None = None,
) -> Evaluation:
    """Score the adapters of these clients, and their `average [1, …]`, as a round does on the validation rows.

    `weights` are the digests of the base that the adapters were trained over, where they are known. Raises RecipeError
    for a task without test rows, and for adapters that are not the recipe's, and ModelError for another base.
    """
    task = build_task(recipe)
    if task.test is None:
        raise RecipeError(
            f"task {task.name}: has no test rows; name a split that neither trains nor validates, as in task.test=test"
        )
    task = replace(task, validation=task.test)
    every = recipe.evaluate.model_copy(update={"on": "common", "rows": None, "fold": None})
    recipe = recipe.model_copy(update={"evaluate": every})
    loaded = load(recipe, task)
    check_weights(recipe.model.name, loaded.base.weights, weights or {})
    need = {f"{name}.{factor}" for name in loaded.model.sites for factor in "AB"}
    if lacking := need - adapters[0].tensors.keys():
        raise RecipeError(f"lora.target_modules: the run has no {min(lacking)}; give the run's own recipe")
    if recipe.lora.init is not None:  # the head that the clients began with, and that is the base's where it is frozen
        begun_with(recipe, task, loaded, adapters[0].tensors)
    encoded = encode_test(recipe, task, loaded.base)
    evaluate, device = build_evaluation(recipe, task, loaded, encoded, peer=True), loaded.base.model.device

    def evaluated(some: Sequence[Stack], whose: Sequence[int]) -> Evaluation:
        return evaluate([Stack(rows, {n: x.to(device) for n, x in tensors.items()}) for rows, tensors in some], whose)

    found = evaluated(adapters, clients)
    if average is None:
        return found
    by_metric = (found, *found.also)
    last = evaluated(
        stacked(average), clients[:1]
    )  # of the run's end, which need not be the mean of each client's best
    first, *also = (
        replace(one, average=whole.clients[0]) for one, whole in zip(by_metric, (last, *last.also), strict=True)
    )
    return replace(first, also=also)
