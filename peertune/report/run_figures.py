"""The figures of one run; each is a function of the run that returns None where there is nothing to show."""

from collections.abc import Sequence
from itertools import groupby, pairwise
from math import isfinite, log10
from statistics import fmean
from typing import Any

import numpy as np
import plotly.graph_objects as go
from plotly.colors import sample_colorscale

from peertune.report import drawing
from peertune.report.drawing import (
    GREY,
    MOST_POINTS,
    PALETTE,
    SCALE,
    Array,
    Cost,
    by_client,
    chart,
    evaluated,
    faint,
    line,
    metric,
    plain,
    scores_by_client,
    thin,
    ticks,
)
from peertune.report.runs import RunData

FACTORS = {"A": PALETTE[0], "B": PALETTE[1]}
THREAD = "rgba(128,128,128,0.5)"  # of lines behind others
ENSEMBLES = {"ensemble of all": "ensemble", "with those heard": "heard_ensemble", "surest client": "route"}
"""Name of a line → what of an evaluation it shows."""
CONSTANT = "best constant answer"
MOST_LINES = 50  # clients that get a line or a number of their own; beyond, a band
MOST_STEPS = 60  # of the graph's slider, and columns of the heat map
MOST_DRAWN = 3_000  # drawn of all edges ever active
MOST_ACTIVE = 18_000  # drawn of the active edges, over all steps of the slider
MOST_PHASES = 200  # shaded
MOST_LABELS = 30  # in the partition; beyond, the rarer ones stand together
MOST_NAMED = 12  # labels in a legend
RADIUS = 500  # of the graph's circle; as whole numbers, places are short in a file


def score(run: RunData) -> go.Figure | None:
    """Draw the clients' scores and the averaged adapter's by round."""
    rounds, clients, values = scores_by_client(run)
    if not len(rounds):
        return None
    averages = {record["round"]: record["evaluation"]["average"] for record in evaluated(run)}
    average = [averages[at] for at in rounds.tolist()]
    drawn = _spread(rounds, clients, values, drawing.colour(run))
    if None not in average:
        drawn.append(line(rounds, average, "averaged adapter", drawing.colour(run), "round %{x}: %{y:.3f}", 2))
    own = [record["evaluation"]["own"] for record in evaluated(run)]
    if any(own) and None not in average:  # elsewhere these are what is drawn
        drawn.append(line(rounds, [fmean(x) for x in own], "on own rows", GREY, "round %{x}: %{y:.3f}", 2))
    for number, (name, key) in enumerate(ENSEMBLES.items()):
        drawn += _means(run, key, name, PALETTE[number], number + 3)
    drawn += _means(run, "constant", CONSTANT, GREY, 1) + _means(run, "own_constant", f"{CONSTANT}, own rows", GREY, 3)
    return chart(*drawn, x="round", y=metric([run]), xaxis=ticks(rounds[-1]))


def certainty(run: RunData) -> go.Figure | None:
    """Draw how far the clients' probabilities are from what they should be, in the mean over clients."""
    names = {"nll": "negative log-likelihood", "ece": "calibration error"}
    drawn = [x for number, key in enumerate(names) for x in _means(run, key, names[key], drawing.colour(run), number)]
    if not drawn:
        return None
    return chart(*drawn, x="round", y="mean over clients", xaxis=ticks(drawn[0].x[-1]), yaxis_rangemode="tozero")


def _means(run: RunData, key: str, name: str, colour: str, number: int) -> list[go.Scatter]:
    """Draw the mean over clients of a value of evaluations by round; nothing where no round has it."""
    found = [(record["round"], record["evaluation"][key]) for record in evaluated(run)]
    means = {t: fmean(x) if isinstance(x, list) else x for t, x in found if x not in (None, [])}
    return [line([*means], [*means.values()], name, colour, "round %{x}: %{y:.3f}", number)] if means else []


def _level(ends: Any, value: float, name: str, hover: str) -> go.Scatter:
    """Draw what a value would be in all rounds from the first to the last, its `ends`."""
    line = {"color": GREY, "dash": "dash"}
    return go.Scatter(x=ends, y=[value, value], name=name, mode="lines", line=line, hoverinfo=hover)


def loss(run: RunData) -> go.Figure | None:
    """Draw the clients' train losses by round."""
    rounds, clients, values = by_client(run, lambda record: record["loss"] or None)
    if not len(rounds):
        return None
    drawn = _spread(rounds, clients, values, drawing.colour(run))
    return chart(*drawn, x="round", y="train loss", xaxis=ticks(rounds[-1]), yaxis_rangemode="tozero")


def _spread(rounds: Array, clients: Array, values: Array, colour: str) -> list[go.Scatter]:
    """Draw the mean over clients and all of them around it: as lines, or as a band where they are too many."""
    name = "mean of clients" if len(clients) > 1 else f"client {clients[0]}"
    mean = line(rounds, np.nanmean(values, axis=1), name, colour, "round %{x}: %{y:.3f}", line_width=3.5)
    if len(clients) == 1:
        return [mean]
    if len(clients) > MOST_LINES:
        low, high = np.nanquantile(values, [0.1, 0.9], axis=1)
        return [drawing.band(rounds, low, high, colour, name="middle 80 % of clients"), mean]
    around = drawing.band(rounds, np.nanmin(values, axis=1), np.nanmax(values, axis=1), colour, name="all clients")
    gap = np.full((1, len(clients)), np.nan, dtype=np.float32)
    lines = go.Scatter(  # one trace for all, broken between clients
        x=np.tile(np.append(rounds, rounds[-1]), len(clients)),
        y=np.concatenate([values, gap]).T.ravel(),
        customdata=np.repeat(clients, len(rounds) + 1),
        name="each client",
        mode="lines",
        line={"width": 1, "color": THREAD},
        hovertemplate="client %{customdata}<br>round %{x}: %{y:.3f}<extra></extra>",
    )
    return [around, lines, mean]


def consensus(run: RunData) -> go.Figure | None:
    """Draw the consensus errors of A and B and the cross term by round, over the phases."""
    records = [run.records[at] for at in thin(len(run.records), MOST_POINTS)]
    rounds = [record["round"] for record in records]
    lines = {"consensus_error_A": ("Δ_A", FACTORS["A"]), "consensus_error_B": ("Δ_B", FACTORS["B"])}
    lines["cross_term"] = ("cross term", PALETTE[2])
    table = np.array([[record["diagnostics"].get(key, np.nan) for record in records] for key in lines])
    table[~np.isfinite(table)] = np.nan
    if not np.nanmax(table, initial=0) > 0:
        return None
    table[~(table > 1e-6 * np.nanmax(table))] = np.nan  # what is smaller by so much is rounding
    low, high = np.nanmin(table), np.nanmax(table)
    drawn = [
        line(rounds, values, name, colour, "round %{x}: %{y:.3g}", number)
        for number, (values, (name, colour)) in enumerate(zip(table, lines.values(), strict=True))
    ]
    axis = {"type": "log", "range": [log10(low) - 0.1, log10(high) + 0.1], "dtick": 1 if high > 10 * low else "D1"}
    return chart(*drawn, x="round", y="size (log scale)", shapes=_phases(run), xaxis=ticks(rounds[-1]), yaxis=axis)


def high_ranks(run: RunData) -> go.Figure | None:
    """Draw by evaluated round what clients know beyond the lowest rank, and how far those of the highest disagree."""
    records = [record for record in run.records if "energy_beyond" in record["diagnostics"]]
    if not records:
        return None
    rounds, hover = [record["round"] for record in records], "round %{x}: %{y:.3g}"
    lines = {"energy_beyond": "energy beyond the lowest rank", "highest_apart": "disagreement at the highest rank"}
    drawn = [
        line(rounds, [record["diagnostics"][key] for record in records], name, PALETTE[number], hover, number)
        for number, (key, name) in enumerate(lines.items())
    ]
    return chart(*drawn, x="evaluated round", y="share", xaxis=ticks(rounds[-1]), yaxis_rangemode="tozero")


def _phases(run: RunData) -> list[dict[str, Any]]:
    """Return a shape behind each phase of a run whose factors train in turn."""
    trained = groupby(run.records, lambda record: "".join(kind for kind in FACTORS if kind in record["train"]))
    phases = [(kinds, [record["round"] for record in records]) for kinds, records in trained]
    if not 1 < len(phases) <= MOST_PHASES:
        return []
    shapes: dict[tuple[str, int], dict[str, Any]] = {}
    for kind in FACTORS:
        spans = [(rounds[0] - 0.5, rounds[-1] + 0.5) for kinds, rounds in phases if kinds == kind]
        for number, (start, end) in enumerate(spans):
            shapes[kind, number] = {
                "type": "rect",
                "layer": "below",
                "yref": "paper",
                "x0": start,
                "x1": end,
                "y0": 0,
                "y1": 1,
                "line": {"width": 0},
                "fillcolor": faint(FACTORS[kind]),
                "name": f"{kind} trains",
                "showlegend": number == 0,
            }
    return list(shapes.values())


def clients(run: RunData) -> go.Figure | None:
    """Draw the clients' scores as a heat map, client × evaluated round."""
    rounds, clients, values = scores_by_client(run, MOST_STEPS)
    if not len(rounds) or len(clients) < 2:
        return None
    heat = go.Heatmap(
        x=[str(at) for at in rounds.tolist()],  # as names: the last round is rarely as far off as the others
        y=clients,
        z=values.T,
        colorscale=SCALE,
        colorbar=_bar(run),
        hovertemplate="client %{y}, round %{x}: %{z:.3f}<extra></extra>",
    )
    axes = {"xaxis": {"type": "category", "showgrid": False}, "yaxis": {"showgrid": False} | ticks(len(clients))}
    return chart(heat, x="evaluated round", y="client", height=400 if len(clients) <= MOST_LINES else 520, **axes)


def _bar(run: RunData) -> dict[str, Any]:
    return {"thickness": 12, "title": {"text": plain(metric([run])), "side": "right"}}


def partition(run: RunData) -> go.Figure | None:
    """Draw how many rows of each label each client holds, as stacked bars."""
    held = run.facts.get("partition", {})
    rows = np.array(held.get("rows", []), dtype=np.int32)
    if not rows.size:
        return None
    owners = np.array([peer["client"] for peer in run.facts.get("peers", [])] or range(len(rows)), dtype=np.int32)
    labels = [plain(label) for label in held["labels"]]
    if len(labels) > MOST_LABELS:
        common = np.sort(np.argsort(-rows.sum(0), kind="stable")[: MOST_LABELS - 1])
        rare = np.setdiff1d(np.arange(len(labels)), common)
        labels = [*(labels[at] for at in common), f"{len(rare)} other labels"]
        rows = np.column_stack([rows[:, common], rows[:, rare].sum(1)])
    scale = [*PALETTE]
    if len(labels) > len(PALETTE):
        scale = [*sample_colorscale(SCALE, np.linspace(0, 1, min(len(labels), MOST_LABELS - 1)).tolist()), GREY]
    bars = [
        go.Bar(
            x=owners,
            y=rows[:, at],
            name=label,
            marker={"color": scale[at], "line": {"width": 0}},
            hovertemplate="client %{x}: %{y} rows of %{fullData.name}<extra></extra>",
        )
        for at, label in enumerate(labels)
    ]
    look: dict[str, Any] = {
        "barmode": "stack",
        "bargap": 0.15 if len(rows) <= MOST_LINES else 0,
        "xaxis": ticks(owners.max()) if len(owners) > 1 else {"tickvals": owners},
    }
    return chart(*bars, x="client", y="rows", showlegend=len(labels) <= MOST_NAMED, **look)


def by_cost(run: RunData, cost: Cost) -> go.Figure | None:
    """Draw the scores against what was spent by then."""
    records, until = evaluated(run), cost.by_round(run)
    if not records or not max(until.values(), default=0) > 0:
        return None
    rounds = [record["round"] for record in records]
    x, given = [until[t] for t in rounds], {"customdata": rounds}
    hover = f"%{{y:.3f}} after %{{x:.3g}} {cost.unit} (round %{{customdata}})"
    drawn = [
        line(x, [value(record) for record in records], name, drawing.colour(run), hover, number, **given)
        for name, value, number in (
            ("mean of clients", drawing.mean_score, 0),
            ("averaged adapter", drawing.average, 2),
        )
        if None not in map(value, records)
    ]
    return chart(*drawn, x=cost.title, y=metric([run]), xaxis_rangemode="tozero")


def contraction(run: RunData) -> go.Figure | None:
    """Draw what a round's mixing left of the squared disagreement, against rho."""
    drawn: list[go.Scatter] = []
    for kind, colour in FACTORS.items():
        for idle in (True, False):
            found = [
                (record["round"], record["diagnostics"][f"contraction_{kind}"])
                for record in run.records
                if isfinite(record["diagnostics"].get(f"contraction_{kind}", np.nan))
                and (kind not in record["train"]) == idle
            ]
            if not found:
                continue
            rounds, values = np.array(found).T
            name = f"{kind} {'idle' if idle else 'trained'}, mean {values.mean():.3f}"
            at = thin(len(found), MOST_POINTS)
            mark = {"color": colour, "size": 8 if idle else 6, "symbol": "circle" if idle else "circle-open"}
            drawn.append(
                line(rounds[at], values[at], name, colour, "round %{x}: %{y:.3f}", mode="markers", marker=mark)
            )
    if not drawn:
        return None
    rho = run.facts.get("graph", {}).get("rho")
    if rho is not None:
        ends = [run.records[0]["round"], run.records[-1]["round"]]
        drawn.append(_level(ends, rho, f"rho = {rho:.3f}", "name"))
    axes: dict[str, Any] = {"xaxis": ticks(run.records[-1]["round"]), "yaxis": {"rangemode": "tozero"}}
    return chart(*drawn, x="round", y="left of the squared error", showlegend=True, **axes)


def graph(run: RunData) -> go.Figure | None:
    """Draw the edges of a round over all edges ever active, with a frame for each of at most 60 rounds.

    Those of a directed graph are arrows.
    """
    edges = {record["round"]: np.array(record["edges"], dtype=int).reshape(-1, 2) for record in run.records}
    seen = np.unique(np.concatenate([*edges.values(), np.empty((0, 2), dtype=int)]), axis=0)
    if not len(seen):
        return None
    highest = max(int(seen.max()), *(client for record in run.records for client in record["clients"]))
    count, directed = max(int(run.recipe.get("clients", 0)), 1 + highest), _directed(run)
    steps = [run.records[at]["round"] for at in thin(len(run.records), MOST_STEPS)]
    shown = next((step for step in reversed(steps) if len(edges[step])), steps[-1])
    angles = 2 * np.pi * np.arange(count) / count
    places = RADIUS * np.column_stack([np.sin(angles), np.cos(angles)])
    colours = _node_colours(run, steps, count)
    most = MOST_ACTIVE // len(steps)
    crowded = max(map(len, edges.values())) > 200
    behind = {"mode": "lines", "hoverinfo": "skip", "line": {"width": 0.5 if crowded else 1, "color": THREAD}}
    active = {"mode": "lines", "hoverinfo": "skip", "line": {"width": 1 if crowded else 2.5, "color": PALETTE[1]}}
    hidden = {"showgrid": False, "zeroline": False, "showticklabels": False, "range": [-1.2 * RADIUS, 1.2 * RADIUS]}
    figure = chart(
        go.Scatter(_edge_lines(places, seen, MOST_DRAWN) | behind, name="active in some round"),
        go.Scatter(active | _edge_lines(places, edges[shown], most, directed), name=f"active in round {shown}"),
        *_nodes(run, places, colours, shown),
        x="",
        y="",
        height=540,
        meta=str(shown),
        margin_b=100,
        xaxis=hidden | {"scaleanchor": "y", "title": {"text": _graph_facts(run, len(seen))}},
        yaxis=hidden,
    )
    frames = []
    for step in steps:
        now = _edge_lines(places, edges[step], most, directed) | {"name": f"active in round {step}"}
        frames.append({"name": str(step), "traces": [1, 2], "data": [now, {"marker": {"color": colours[step]}}]})
    figure.frames = frames
    return figure


def _directed(run: RunData) -> bool:
    return bool(run.facts.get("graph", {}).get("directed"))


def _edge_lines(places: Array, pairs: Array, most: int, directed: bool = False) -> dict[str, Any]:
    """Return a line for each of these edges, of at most so many, with a gap after it; or an arrow to its second end."""
    ends = places.round().astype(int)[pairs[thin(len(pairs), most)]]  # [edges, 2 ends, x and y]
    lines = {name: [at for pair in ends[..., axis].tolist() for at in (*pair, None)] for axis, name in enumerate("xy")}
    if not directed:
        return lines
    marker = {
        "symbol": "arrow",
        "angleref": "previous",
        "standoff": 8,
        "size": [0, 12, 0] * len(ends),
        "line": {"width": 0},
    }
    return lines | {"mode": "lines+markers", "marker": marker}


def _nodes(run: RunData, places: Array, colours: dict[int, list[Any]], shown: int) -> tuple[go.Scatter, go.Scatter]:
    """Draw the clients in their colours of a round, and beside them their numbers where they are few."""
    count, few = len(places), len(places) <= MOST_LINES
    marker: dict[str, Any] = {"size": 16 if few else 6, "color": colours[shown], "line": {"width": 1 if few else 0}}
    scored = isinstance(colours[shown][0], float)
    if scored:
        limits = {"cmin": min(map(min, colours.values())), "cmax": max(map(max, colours.values()))}
        below = {"orientation": "h", "yref": "container", "y": 0, "yanchor": "bottom"}
        marker |= {"colorscale": SCALE, "showscale": True, "colorbar": _bar(run) | below} | limits
    nodes = go.Scatter(
        x=places[:, 0].round(1),
        y=places[:, 1].round(1),
        customdata=list(range(count)),
        mode="markers",
        marker=marker,
        hovertemplate="client %{customdata}" + (": %{marker.color:.3f}" if scored else "") + "<extra></extra>",
        showlegend=False,
    )
    names = go.Scatter(
        x=1.11 * places[:, 0] if few else [],
        y=1.11 * places[:, 1] if few else [],
        text=[str(client) for client in range(count)],
        mode="text",
        hoverinfo="skip",
        showlegend=False,
    )
    return nodes, names


def _graph_facts(run: RunData, seen: int) -> str:
    facts = run.facts.get("graph", {})
    names = {"rho": "rho", "spectral_gap": "spectral gap", "switching_interval": "T*"}
    told = ", ".join(f"{name} {facts[key]:.3g}" for key, name in names.items() if facts.get(key) is not None)
    return told if seen <= MOST_DRAWN else f"{told}<br>{MOST_DRAWN:,} of {seen:,} edges drawn, and a part of a round's"


def _node_colours(run: RunData, steps: Sequence[int], count: int) -> dict[int, list[Any]]:
    """Return round → each client's newest score, or the colour of its commonest label in a run without evaluations.

    Where only some peers' parts of a run were read, theirs stand out from the others.
    """
    rounds, clients, values = scores_by_client(run, len(run.records))
    own = {client for record in run.records for client in record["clients"]}
    if len(own) < count and "peers" in run.facts:
        colours = [PALETTE[0] if client in own else GREY for client in range(count)]
        return dict.fromkeys(steps, colours)
    if not len(rounds):
        rows = np.array(run.facts.get("partition", {}).get("rows", []))
        labels = rows.argmax(1) if len(rows) == count else np.zeros(count, dtype=int)
        colours = [PALETTE[label % len(PALETTE)] for label in labels.tolist()]
        return dict.fromkeys(steps, colours)
    found = {}
    values = values.copy()
    for before, now in pairwise(values):
        now[np.isnan(now)] = before[np.isnan(now)]  # a client that missed the round is as good as it was
    for step in steps:
        newest = values[max(0, int(np.searchsorted(rounds, step, side="right")) - 1)]
        scores = np.full(count, np.nanmin(values), dtype=float)
        scores[clients] = np.where(np.isfinite(newest), newest, np.nanmin(values))
        found[step] = scores.round(3).tolist()
    return found
