"""Recipes loaded from files or by name, with overrides, and checked before anything else is loaded."""

from collections.abc import Mapping, Sequence
from copy import deepcopy
from importlib.resources import files
from pathlib import Path
from typing import Any

from pydantic import ValidationError

from peertune.deprecation import CHOICES, KEYS, tell
from peertune.errors import RecipeError, unknown
from peertune.recipe.hints import explain
from peertune.recipe.schema import Evaluate, Lora, Recipe, Training
from peertune.recipe.text import NOT_YAML, read_yaml


def recipe_names() -> list[str]:
    """Return the names of the shipped recipes, sorted."""
    return sorted(
        file.name.removesuffix(".yaml") for file in files("peertune.recipes").iterdir() if file.name.endswith(".yaml")
    )


def recipe_text(recipe: str | Path) -> str:
    """Return the text of a recipe, by path or by the name of a shipped one. Raises RecipeError where there is none."""
    path = Path(recipe)
    if str(recipe) in recipe_names():
        return files("peertune.recipes").joinpath(f"{recipe}.yaml").read_text(encoding="utf-8")
    try:
        if path.suffix not in (".yaml", ".yml") and not path.exists():
            raise RecipeError(unknown("recipe", recipe, recipe_names()))
        return path.read_text(encoding="utf-8")
    except (OSError, UnicodeDecodeError) as error:
        reason = getattr(error, "strerror", None) or "not a text file"
        raise RecipeError(
            f"{recipe}: can't be read ({reason}); give a recipe's path or a name that `peertune recipes` lists"
        ) from None


def load_recipe(recipe: str | Path | Mapping[str, Any], overrides: Sequence[str] = ()) -> Recipe:
    """Load a recipe by path or shipped name, or take it as nested values, and apply overrides.

    An override is such as `graph.activation=0.02`; its value is YAML. Raises RecipeError, in one line, for a file that
    isn't there or isn't YAML, for unknown keys (with the nearest match), wrong types and values out of range. Parts
    chosen by name are checked by `build`.
    """
    if isinstance(recipe, Mapping):
        values, where = dict(recipe), "recipe"
    else:
        values, where = _parse(recipe_text(recipe), str(recipe)), str(recipe)
    values = _renamed(values, where)  # a copy; before overrides, which have their effect under either name
    for override in overrides:
        _override(values, override)
    return check_recipe(values, where)


def check_recipe(values: Mapping[str, Any], where: str) -> Recipe:
    """Make a recipe of plain values; errors name the key and begin with `where`."""
    values = _renamed(values, where)
    try:
        recipe = Recipe.model_validate(values)
    except ValidationError as error:
        raise RecipeError(f"{where}: {explain(error, values)}") from None
    if (idle := _without_effect(recipe)) is not None:
        raise RecipeError(f"{where}: {idle}")
    return recipe


def _renamed(values: Mapping[str, Any], where: str) -> dict[str, Any]:
    """Return the values with what is deprecated under the names that stand in its place."""
    found = deepcopy(dict(values))
    for key, going in KEYS.items():
        block, last, new = _block(found, key), key.rpartition(".")[2], going.instead.rpartition(".")[2]
        if last not in block:
            continue
        if new in block:
            raise RecipeError(f"{where}: {key}: is the older name of {going.instead}, which is there too; leave it out")
        tell(f"{where}: {key}", going)
        block[new] = block.pop(last)
    for (key, name), going in CHOICES.items():
        chosen = found.get(key)
        for choice in chosen if isinstance(chosen, list) else [chosen]:
            if isinstance(choice, dict) and choice.get("name") == name:
                tell(f"{where}: {key}.name: {name}", going)
                choice["name"] = going.instead
    return found


def _block(values: dict[str, Any], key: str) -> dict[str, Any]:
    """Return the block that a dotted key stands in; {} where it isn't there."""
    for name in key.split(".")[:-1]:
        inner = values.get(name)
        values = inner if isinstance(inner, dict) else {}
    return values


def _without_effect(recipe: Recipe) -> str | None:
    """Return what is wrong where a setting is asked for that another one leaves without effect."""
    optim = recipe.training.optim
    for other, keys in {"adamw": ("adam_beta1", "adam_beta2", "adam_epsilon"), "sgd": ("momentum",)}.items():
        for key in keys:
            if other != optim and getattr(recipe.training, key) != Training.model_fields[key].default:
                return (
                    f"training.{key}: is a setting of {other}, and training.optim is {optim}; "
                    f"leave it out, or use training.optim={other}"
                )
    span = recipe.training.lr_scheduler_span
    steps = recipe.training.local_steps * (recipe.rounds if span == "run" else 1)
    if recipe.training.warmup(steps) >= steps:
        of = "rounds · training.local_steps" if span == "run" else "training.local_steps"
        return (
            f"training.warmup_steps: {recipe.training.warmup_steps} steps of warm-up leave none of the {span}'s "
            f"{steps} ({of}) at the full rate; give at most {steps - 1}"
        )
    kwargs, shape = recipe.training.lr_scheduler_kwargs, recipe.training.lr_scheduler_type
    given = [key for key in ("min_lr", "min_lr_rate") if getattr(kwargs, key) is not None]
    if shape != "cosine_with_min_lr" and given:
        return (
            f"training.lr_scheduler_kwargs.{given[0]}: is of cosine_with_min_lr, and training.lr_scheduler_type is "
            f"{shape}; leave it out, or use training.lr_scheduler_type=cosine_with_min_lr"
        )
    if shape == "cosine_with_min_lr" and len(given) != 1:
        return "training.lr_scheduler_kwargs: cosine_with_min_lr falls to min_lr or min_lr_rate; give one of the two"
    if (kwargs.min_lr or 0) > recipe.training.learning_rate:
        return (
            f"training.lr_scheduler_kwargs.min_lr: {kwargs.min_lr:g} is above training.learning_rate, which is "
            f"{recipe.training.learning_rate:g}; a rate falls, give less"
        )
    if (idle := _without_effect_on_adapters(recipe.lora)) is not None:
        return idle
    if span == "round" and (recipe.training.lr_scheduler_type == "constant" and not recipe.training.warmup_steps):
        return "training.lr_scheduler_span: a rate that is constant has none; give lr_scheduler_type, or leave it out"
    for key in ("rows", "fold"):
        if recipe.evaluate.on == "own" and getattr(recipe.evaluate, key) is not None:
            return (
                f"evaluate.{key}: is of the validation set, and evaluate.on=own takes none of it; leave it out, "
                "or give both"
            )
    if recipe.evaluate.on == "own" and recipe.evaluate.ensemble:
        return "evaluate.ensemble: is of rows that all have, and evaluate.on=own has none; leave it out, or give both"
    if recipe.evaluate.on == "common" and recipe.evaluate.mixing:
        return "evaluate.mixing: is of rows that clients hold out, and evaluate.on=common has none; give own or both"
    if recipe.evaluate.on == "common" and recipe.evaluate.held_out != Evaluate.model_fields["held_out"].default:
        return "evaluate.held_out: with evaluate.on=common nobody holds out rows; give own or both, or leave it out"
    if (aside := recipe.evaluate.set_aside) is not None:
        held = recipe.evaluate.held_out
        if not isinstance(held, str) or held.split("/")[1] != aside.split("/")[1] or held == aside:
            return (
                f"evaluate.set_aside: {aside} goes with another fold of as many that clients hold out, "
                f"and evaluate.held_out is {held}; give such a one, or leave set_aside out"
            )
    if recipe.evaluate.top_p < 1 and not recipe.evaluate.temperature:
        return "evaluate.top_p: at evaluate.temperature 0 nothing is sampled; give a temperature, or leave top_p out"
    return None


def _without_effect_on_adapters(lora: Lora) -> str | None:
    if lora.init is not None and lora.init_lora_weights is not True:
        return f"lora.init_lora_weights: {lora.init_lora_weights} is one start, and lora.init another; leave one out"
    if lora.layers_to_transform is not None and isinstance(lora.target_modules, str):
        return (
            "lora.layers_to_transform: goes with a list of lora.target_modules, which is the expression "
            f"{lora.target_modules!r}; give a list, or put the numbers in the expression"
        )
    return None


def _parse(text: str, where: str) -> dict[str, Any]:
    try:
        values = read_yaml(text)
    except NOT_YAML as error:
        mark = getattr(error, "problem_mark", None)
        line = f" line {mark.line + 1}:" if mark else ""
        reason = getattr(error, "problem", None) or " ".join(str(error).split())
        raise RecipeError(f"{where}:{line} not YAML ({reason})") from None
    if not isinstance(values, dict):
        raise RecipeError(f"{where}: a recipe is a mapping of blocks, such as `model:` and `task:`")
    return values


def _override(values: dict[str, Any], override: str) -> None:
    key, equals, text = override.partition("=")
    if not equals or not key:
        raise RecipeError(f"override {override!r}: write key=value, such as graph.activation=0.02")
    if (going := KEYS.get(key)) is not None:
        tell(key, going)
        key = going.instead
    *blocks, last = key.split(".")
    for block in blocks:
        inner = values.setdefault(block, {})
        if not isinstance(inner, dict):
            raise RecipeError(f"override {override!r}: {block} is no block, it has the value {inner!r}")
        values = inner
    try:
        values[last] = read_yaml(text)
    except NOT_YAML:
        raise RecipeError(f"override {override!r}: the value is not YAML; quote it") from None
