"""Recipes: what a run is made of, checked before anything is loaded.

A recipe is a YAML file of blocks. Those that choose by name (`task`, `partition`, `graph`, `algorithm`, `modifiers`)
take the arguments of the factory of that name: its signature is their schema, held against it by `arguments`.
"""

from peertune.recipe.choices import arguments
from peertune.recipe.loading import check_recipe, load_recipe, recipe_names, recipe_text
from peertune.recipe.schema import (
    NO_SETTINGS,
    NO_SETTINGS_OF_A_SIMULATION,
    Choice,
    Privacy,
    Recipe,
    Time,
    Tracker,
    block_defaults,
    flat,
)
from peertune.recipe.text import as_yaml

__all__ = [
    "NO_SETTINGS",
    "NO_SETTINGS_OF_A_SIMULATION",
    "Choice",
    "Privacy",
    "Recipe",
    "Time",
    "Tracker",
    "arguments",
    "as_yaml",
    "block_defaults",
    "check_recipe",
    "flat",
    "load_recipe",
    "recipe_names",
    "recipe_text",
]
