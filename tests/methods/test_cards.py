"""docs/methods.md is what the docstrings say."""

import re
import shlex
from pathlib import Path

import cards

from peertune import ALGORITHMS, MODIFIERS
from peertune.assembly.registry import check_choices
from peertune.recipe import load_recipe

PAGE = Path(__file__).parents[2] / "docs" / "methods.md"


def test_the_page_of_methods_is_what_their_docstrings_say() -> None:
    assert PAGE.read_text() == cards.page(), "python tests/cards.py > docs/methods.md writes it anew"


def test_every_card_names_a_run_that_can_be() -> None:
    tried = [shlex.split(line) for line in re.findall("- Try: `(.*)`", PAGE.read_text())]
    assert len(tried) == len(ALGORITHMS) + len(MODIFIERS)
    for peertune, run, recipe, *words in tried:
        assert (peertune, run) == ("peertune", "run")
        check_choices(load_recipe(recipe, words))
