"""The ranks of the clients' adapters, where a recipe has a table of them."""

from collections.abc import Mapping

from peertune.errors import RecipeError
from peertune.randomness import Draw, generator
from peertune.recipe import Recipe


def ranks_of(recipe: Recipe) -> list[int]:
    """Return each client's rank, `[n]`, by `lora.ranks`; [] where the recipe has none.

    A list has them by client. A mapping says how many clients have each rank, and which these are follows from the
    seed: it is the same in all processes and at all peers. Raises RecipeError for ranks of another number of clients,
    and beside settings that all clients have alike.
    """
    asked = recipe.lora.ranks
    if asked is None:
        if recipe.lora.scaling != "common":
            raise RecipeError("lora.scaling: is of ranks that differ; give lora.ranks, or leave it out")
        return []
    if isinstance(asked, Mapping):
        table = [rank for rank, count in sorted(asked.items()) for _ in range(count)]
        ranks = [int(rank) for rank in generator(recipe.seed, Draw.RANKS).permutation(table)]
    else:
        ranks = list(asked)
    if len(ranks) != recipe.clients:
        raise RecipeError(f"lora.ranks: {len(ranks)} ranks for {recipe.clients} clients; give one for each")
    if recipe.lora.rank_pattern is not None:
        raise RecipeError("lora.rank_pattern: is of ranks that all clients have alike; give it or lora.ranks")
    if recipe.lora.init is not None or recipe.lora.init_lora_weights in ("pissa", "olora"):
        key = "init" if recipe.lora.init is not None else "init_lora_weights"
        raise RecipeError(
            f"lora.{key}: is a start of one rank, which clients with lora.ranks have no part of; leave it out"
        )
    return ranks


def differ(recipe: Recipe) -> bool:
    """Return whether clients have several ranks."""
    return len({*ranks_of(recipe)}) > 1
