"""Pictures; the home of matplotlib."""

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import networkx as nx
import numpy as np

from peertune.errors import RunError
from peertune.topology import Graph, active_edges


def draw_graph(graph: Graph, title: str, file: Path) -> None:
    """Draw the graph: every possible edge in grey, and in colour those active in the first round that has any.

    The file's suffix chooses the format.
    """
    from matplotlib.figure import Figure

    possible: Any = nx.DiGraph() if graph.directed else nx.Graph()
    possible.add_nodes_from(range(graph.clients))
    possible.add_edges_from(np.concatenate([graph.edges_at(t) for t in range(graph.period or 1)]).tolist())
    places = nx.circular_layout(possible)
    figure = Figure(figsize=(6, 6), dpi=150, layout="constrained")
    axes = figure.add_subplot()
    size = max(20.0, min(400.0, 6000 / graph.clients))
    shown = next((t for t in range(1000) if len(active_edges(graph, t))), 0)
    active = active_edges(graph, shown).tolist()
    nx.draw_networkx_edges(possible, places, ax=axes, edge_color="#c8c8c8", width=0.8)
    nx.draw_networkx_edges(possible, places, active, ax=axes, edge_color="#0b6e99", width=2.2)
    nx.draw_networkx_nodes(possible, places, ax=axes, node_size=size, node_color="#f2a541", edgecolors="#333333")
    if graph.clients <= 50:
        nx.draw_networkx_labels(possible, places, ax=axes, font_size=8)
    axes.set_title(title, fontsize=11, loc="left")
    colours = f"grey: possible edges   blue: active in round {shown}"
    axes.text(0, -0.02, colours, transform=axes.transAxes, fontsize=8, va="top")
    axes.set_aspect("equal")
    axes.axis("off")
    _save(figure, file)


def draw_data(facts: Mapping[str, Any], title: str, file: Path) -> None:
    """Draw what `describe_data` says: of each client, and of all, the shares of labels, the rows, and how unlike it is.

    `feature_shift`, where it is there, is drawn beside the labels' divergence. The file's suffix chooses the format.
    """
    from matplotlib import colormaps
    from matplotlib.figure import Figure

    clients, shift = facts["clients"], facts.get("feature_shift")
    labels, counts = list(clients[0]["labels"]), np.array([[*client["labels"].values()] for client in clients])
    bars = np.vstack([counts, counts.sum(axis=0)])  # the last is of all
    shares, places = bars / bars.sum(axis=1, keepdims=True), np.array([*range(len(clients)), len(clients) + 0.5])
    measures = {"divergence of labels": [client["divergence"] for client in clients]}
    measures["rows told apart"] = [None] * len(clients) if shift is None else shift["clients"]
    measures = {name: values for name, values in measures.items() if any(value is not None for value in values)}
    panels = 2 + len(measures)
    height = float(np.clip(0.25 * len(clients) + 1.5, 3, 12))
    figure = Figure(figsize=(5 + 2.5 * (panels - 1), height), dpi=150, layout="constrained")
    first, rows, *others = figure.subplots(1, panels, sharey=True, width_ratios=[2, *[1] * (panels - 1)])
    thick = {"height": 0.8 if len(clients) <= _MOST_NAMED else 1.0}
    scale = colormaps["cividis"](np.linspace(0, 1, len(labels)))
    left = np.zeros(len(bars))
    for label, share, colour in zip(labels, shares.T, scale, strict=True):
        first.barh(places, share, left=left, color=colour, label=label, **thick)
        left += share
    if 1 < len(labels) <= _MOST_NAMED:
        figure.legend(loc="outside lower left", ncols=min(len(labels), 10), fontsize=8)
    rows.barh(places[:-1], counts.sum(axis=1), color=_BLUE, **thick)
    for axes, (name, values) in zip(others, measures.items(), strict=True):
        axes.barh(places[:-1], [np.nan if value is None else value for value in values], color=_BLUE, **thick)
        axes.set(xlabel=name, xlim=(0, 1))
    if shift is not None:
        others[-1].axvline(shift["chance"], color="#333333", linestyle="--", linewidth=1)
        others[-1].set_xlabel("rows told apart\n(dashed: chance)")
    first.set(xlabel="share of each label", xlim=(0, 1), ylabel="client")
    rows.set(xlabel="rows")
    shown = range(0, len(clients), -(-len(clients) // _MOST_NAMED))
    first.set_yticks([*shown, places[-1]], [*map(str, shown), "all"])
    first.margins(y=0.02)
    first.invert_yaxis()
    first.set_title(title, fontsize=11, loc="left")
    _save(figure, file)


_MOST_NAMED = 30  # clients, or labels
_BLUE = "#0b6e99"


def need_picture(file: Path) -> None:
    """Raise RunError for a file that no picture can be written to: before what it is to show is computed."""
    from matplotlib.figure import Figure

    if file.suffix[1:].lower() not in Figure().canvas.get_supported_filetypes():
        raise RunError(f"{file}: pictures are written as .png, .svg or .pdf; end the name in one of them")
    if not file.parent.is_dir():
        raise RunError(f"{file}: can't be written (no such folder); choose a folder that is there")


def _save(figure: Any, file: Path) -> None:
    need_picture(file)
    try:
        figure.savefig(file, bbox_inches="tight", pad_inches=0.2)
    except OSError as error:
        raise RunError(f"{file}: can't be written ({error.strerror or error}); choose a folder that is there") from None
