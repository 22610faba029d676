"""The command `audit`: an attempt to break a recipe's privacy."""

import sys
from typing import Annotated

import typer

from peertune.cli.common import AsJson, Overrides, Plugins, RecipeName, importing, messages, print_json, progress
from peertune.errors import Exit


def audit(
    recipe: RecipeName,
    overrides: Overrides = None,
    client: Annotated[int, typer.Option(help="Whose rows are attacked.")] = 0,
    shadows: Annotated[int, typer.Option(help="Clients that train as it would, with and without one row more.")] = 400,
    seed: Annotated[int, typer.Option(help="Of the coins and draws.")] = 0,
    as_json: AsJson = False,
    plugin: Plugins = None,
) -> None:
    """Try to tell from what a client sends whether one row was among its own, and say what that proves.

    Hundreds of shadow clients train in one stack; a coin gives each one row more, or doesn't. A neighbour who knows all
    but the coin guesses from the messages. What it finds proves a lower bound on epsilon, beside the accountant's upper
    bound. Without privacy in the recipe it shows what there is to lose. Exit code 1 where the lower is above the upper.

    Example:

      peertune audit digits-demo rounds=4 "privacy={epsilon: 8, delta: 1e-5}"
    """
    with messages():
        with importing():
            from peertune.api.auditing import audit as attempt
            from peertune.privacy.guessing import CONFIDENCE
            from peertune.recipe import load_recipe

        rounds = load_recipe(recipe, overrides or []).rounds
        with progress("rounds", rounds) as show:
            found = attempt(
                recipe, overrides or [], client=client, shadows=shadows, seed=seed, done=lambda made: show(made, "")
            )
    if as_json:
        told = {**found._asdict(), "tests": [one._asdict() for one in found.tests]}
        print_json(told | {"confidence": CONFIDENCE, "broken": found.broken})
        sys.exit(Exit.FAULT if found.broken else Exit.DONE)
    first = found.tests[0]
    print(
        f"{found.shadows} shadow clients with the {found.rows:,} rows of client {client}, over {found.rounds} rounds; "
        f"half of them chose thresholds; of the other {first.members + first.others}, {first.members} had the canary"
    )
    print("test           found  false alarms  proves ε of at least")
    for one in found.tests:
        shares = one.found / max(1, one.members), one.alarms / max(1, one.others)
        print(f"{one.test:14} {shares[0]:5.1%}  {shares[1]:12.1%}  {one.least_epsilon:.2f}")
    most = "without an upper bound, since nothing is private"
    most = most if found.most_epsilon is None else f"at most {found.most_epsilon:.2f} by the accountant"
    sure = f"at least {found.least_epsilon:.2f} ({CONFIDENCE:.1%} sure)"
    print(f"ε of client {client}: {sure}, {most}, at δ {found.delta:g}")
    if found.broken:
        print("the lower bound is above the upper: noise, sampling or accounting is broken; please report it")
        sys.exit(Exit.FAULT)
