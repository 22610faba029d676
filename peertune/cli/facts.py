"""The commands that describe what a run would be made of: `recipes`, `graph`, `data`, `env`."""

from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from peertune.cli.common import (
    AsJson,
    Overrides,
    Plugins,
    RecipeName,
    importing,
    messages,
    print_json,
    progress,
)

if TYPE_CHECKING:
    from peertune.recipe import Recipe
    from peertune.types import Task


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
        from peertune.report.plots import draw_graph, need_picture

        if png is not None:
            need_picture(png)
        made = build_graph(load_recipe(recipe, overrides or []))
        facts = describe_graph(made)
    if png is not None:
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


def data(
    recipe: RecipeName,
    overrides: Overrides = None,
    probe: Annotated[
        bool, typer.Option("--probe", help="Load the base, and measure how well its features tell the clients apart.")
    ] = False,
    png: Annotated[Path | None, typer.Option(help="Draw who holds what into this file.")] = None,
    plugin: Plugins = None,
    as_json: AsJson = False,
) -> None:
    """Show a recipe's partition: the rows of each label that every client holds, and how unlike the clients are.

    Label skew is the Jensen-Shannon divergence of a client's labels from those of all: 0 alike, 1 nothing in common.
    Quantity skew is the number of clients of one size that would be as even as these. Feature shift, with --probe, is
    the share of held-out rows of which a linear probe on the base's features tells whose they are.

    Examples:

      peertune data digits-demo partition.alpha=1

      peertune data digits-demo "partition={name: writers}" --probe --png writers.png
    """
    with messages():
        from peertune.assembly.registry import build_task, describe_data
        from peertune.recipe import load_recipe
        from peertune.report.plots import draw_data, need_picture

        if png is not None:
            need_picture(png)
        loaded = load_recipe(recipe, overrides or [])
        task = build_task(loaded)
        facts = describe_data(loaded, task)
        if probe:
            facts["feature_shift"] = _probed(loaded, task)
    if png is not None:
        draw_data(facts, f"{loaded.task.name}, {loaded.partition.name}", png)
    if as_json:
        print_json(facts)
        return
    print(f"{loaded.task.name}: training rows of each label\n")
    _print_clients(facts)
    beside = f"{facts['held_out']:,} more are held out; " if facts["held_out"] else ""
    held = f"{facts['held']:,} of {facts['rows']:,} training rows are held"
    tests = f"; {facts['test']:,} are kept for the test" if facts["test"] else ""
    print(f"\n{held}; {beside}{facts['validation']:,} rows validate{tests}\n")
    print("\n".join(_skew(facts, bool(task.classes))))
    if png is not None:
        print(f"picture        {png}")


def _probed(recipe: "Recipe", task: "Task") -> dict[str, Any]:
    with importing():
        from peertune.assembly.probing import describe_shift, probed_rows, read_features
        from peertune.data.skew import FOLDS
    probed = probed_rows(recipe, task)
    with progress("rows read", len(probed.rows)) as show:
        features = read_features(recipe, task, probed.rows, lambda done: show(done, ""))
    with progress("folds fitted", FOLDS) as show:
        show(0, f"{features.shape[1]} features")
        return describe_shift(probed, features, lambda done: show(done, ""))


def _print_clients(facts: dict[str, Any]) -> None:
    from peertune.report.tables import aligned

    clients, labels = facts["clients"], list(facts["clients"][0]["labels"])
    beside = {"divergence": [client["divergence"] for client in clients]}
    beside["told apart"] = facts.get("feature_shift", {}).get("clients", [None])
    shown = {name: values for name, values in beside.items() if any(value is not None for value in values)}
    rows = [[client["client"], *client["labels"].values(), client["rows"]] for client in clients]
    lines = [["client", *labels, "all", *shown]]
    for row, *values in zip(rows, *shown.values(), strict=True):
        lines.append([*map(str, row), *("–" if value is None else f"{value:.3f}" for value in values)])
    if len(aligned(lines).splitlines()[0]) > 120:  # long names: number the columns
        lines[0][1 : len(labels) + 1] = map(str, range(len(labels)))
        print("\n".join(f"{number}: {label}" for number, label in enumerate(labels)) + "\n")
    print(aligned(lines))


def _skew(facts: dict[str, Any], classes: bool) -> list[str]:
    """Return the lines that say how unlike the clients are."""
    labels, amounts, shift = facts["label_skew"], facts["quantity_skew"], facts.get("feature_shift")
    found = [f"label skew     left out: {'one client has all rows' if classes else 'the task has no classes'}"]
    if labels is not None:
        found[0] = (
            f"label skew     {labels['mean']:.3f} mean Jensen-Shannon divergence in bits, {labels['min']:.3f} to "
            f"{labels['max']:.3f}; {labels['by_chance']:.3f} of rows dealt at random"
        )
    found.append(
        f"quantity skew  {amounts['effective_clients']:.1f} effective clients of {len(facts['clients'])}, "
        f"{amounts['fewest']:,} to {amounts['most']:,} rows"
    )
    if shift is None:
        found.append("feature shift  not measured; --probe loads the base and measures it")
    else:
        by_label = "" if shift["by_label"] is None else f"{shift['by_label']:.3f} by the label alone, "
        found.append(
            f"feature shift  {shift['share']:.3f} ± {shift['spread']:.3f} of {shift['rows']:,} held-out rows told "
            f"whose they are; {by_label}{shift['chance']:.3f} by chance"
        )
        if out := shift["left_out"]:
            named = ", ".join(map(str, out[:10])) + (", …" if len(out) > 10 else "")
            found.append(f"               left out for too few rows: client {named}")
    return found


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
