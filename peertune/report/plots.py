"""Pictures; the home of matplotlib."""

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
    try:
        figure.savefig(file, bbox_inches="tight", pad_inches=0.2)
    except OSError as error:
        raise RunError(f"{file}: can't be written ({error.strerror or error}); choose a folder that is there") from None
    except ValueError:
        raise RunError(f"{file}: pictures are written as .png, .svg or .pdf; end the name in one of them") from None
