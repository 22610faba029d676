"""What is to go: for one release it does what it did, and says once what to use instead.

A line in one of these tables deprecates: `"training.lr": Going("0.3.0", "training.learning_rate")`. The release after,
the line goes, and what it names is refused as anything unknown is.
"""

import logging
from functools import cache
from typing import NamedTuple

log = logging.getLogger(__name__)


class Going(NamedTuple):
    """Since which version something is deprecated, and what stands in its place."""

    since: str
    instead: str  # of a key its dotted name, of a choice or a Python name the other name


KEYS: dict[str, Going] = {}
"""Keys of the recipe, dotted: their values are taken as those of the key that is named instead, in the same block."""
CHOICES: dict[tuple[str, str], Going] = {}
"""Names that a block of the recipe chooses by, such as `("algorithm", "old_lora")`."""
NAMES: dict[str, Going] = {}
"""Names of the package `peertune`."""


def said(what: str, going: Going) -> str:
    """Say in one line what goes, since when, and what to use."""
    return f"{what}: is deprecated since {going.since} and goes in the release after; use {going.instead}"


@cache
def tell(what: str, going: Going) -> None:
    """Say it in the log, once: of a recipe or of an option of the command line."""
    log.warning("%s", said(what, going))
