"""The commands that describe what a run would be made of: `recipes`, `graph`, `data`, `env`."""

from pathlib import Path
from typing import Annotated

import typer

from peertune.cli.common import AsJson, Overrides, Plugins, RecipeName, messages, print_json


def recipes(
    name: Annotated[str | None, typer.Argument(help="Print this recipe.")] = None,
    as_json: AsJson = False,
) -> None:
    """List the shipped recipes, or print one.

    Example:

      peertune recipes digits-demo > mine.yaml
    """
    from peertune.recipe import load_recipe, recipe_names, recipe_text

    if name is not None:
        if as_json:
            print_json(load_recipe(name).model_dump())
        else:
            print(recipe_text(name), end="")
        return
    titles = {shipped: recipe_text(shipped).splitlines()[0].removeprefix("# ") for shipped in recipe_names()}
    if as_json:
        print_json(titles)
        return
    width = max(map(len, titles))
    for shipped, title in titles.items():
        print(f"{shipped:{width}}  {title}")


def graph(
    recipe: RecipeName,
    overrides: Overrides = None,
    png: Annotated[Path | None, typer.Option(help="Draw the graph into this file.")] = None,
    plugin: Plugins = None,
    as_json: AsJson = False,
) -> None:
    """Describe a recipe's graph: rho, spectral gap, T*, neighbours per round.

    Example:

      peertune graph digits-demo graph.name=ring --png ring.png
    """
    with messages():
        from peertune.assembly.registry import build_graph, describe_graph
        from peertune.recipe import load_recipe

        made = build_graph(load_recipe(recipe, overrides or []))
        facts = describe_graph(made)
    if png is not None:
        from peertune.report.plots import draw_graph

        title = f"{made.name}, {made.clients} clients, activation {made.activation:g}"
        draw_graph(made, f"{title}: rho {facts['rho']:.3f}, T* {facts['switching_interval']}", png)
    if as_json:
        print_json(facts)
        return
    how = "exact" if facts["draws"] == 0 else f"estimated from {facts['draws']:,} draws"
    if made.weights == "push_sum":
        how = f"measured on probes in {facts['draws']:,} rounds"
    print(
        f"graph                            {made.name}, {made.clients} clients, "
        f"{round(facts['edges'], 2):,.10g} possible edges a round{', one way' * made.directed}"
    )
    print(f"activation, weights              {made.activation:g}, {made.weights}")
    print(f"rho                              {facts['rho']:.4f} ({how}{', weighted by rows' * bool(made.row_counts)})")
    if facts["one_period"] is not None:
        print(f"the same of the first period     {facts['one_period']:.4f} (at most, of its {facts['period']} rounds)")
    print(f"spectral gap, 1 - rho            {facts['spectral_gap']:.4f}")
    print(f"T*, rounds between switches      {facts['switching_interval']}")
    print(f"mean neighbours per round        {facts['mean_neighbours']:.3f}")
    print(f"client-rounds without neighbour  {facts['isolated_share']:.1%}")
    if png is not None:
        print(f"picture                          {png}")


def data(recipe: RecipeName, overrides: Overrides = None, plugin: Plugins = None, as_json: AsJson = False) -> None:
    """Show a recipe's partition: how many rows of each label every client holds.

    Example:

      peertune data digits-demo partition.alpha=1
    """
    with messages():
        from peertune.assembly.registry import describe_data
        from peertune.recipe import load_recipe
        from peertune.report.tables import aligned

        loaded = load_recipe(recipe, overrides or [])
        facts = describe_data(loaded)
    if as_json:
        print_json(facts)
        return
    print(f"{loaded.task.name}: training rows of each label\n")
    clients = facts["clients"]
    labels = list(clients[0]["labels"])
    rows = [[client["client"], *client["labels"].values(), client["rows"]] for client in clients]
    lines = [["client", *labels, "all"], *(list(map(str, row)) for row in rows)]
    if len(aligned(lines).splitlines()[0]) > 120:  # long names: number the columns
        lines[0] = ["client", *map(str, range(len(labels))), "all"]
        print("\n".join(f"{number}: {label}" for number, label in enumerate(labels)) + "\n")
    print(aligned(lines))
    beside = f"{facts['held_out']:,} more are held out; " if facts["held_out"] else ""
    held = f"{facts['held']:,} of {facts['rows']:,} training rows are held"
    tests = f"; {facts['test']:,} are kept for the test" if facts["test"] else ""
    print(f"\n{held}; {beside}{facts['validation']:,} rows validate{tests}")


def env(as_json: AsJson = False) -> None:
    """Print versions and devices, for a bug report."""
    with messages():
        from peertune.api.environment import environment

        facts = environment()
    if as_json:
        print_json(facts)
        return
    for name, value in facts.items():
        print(f"{name:16}  {value}")
