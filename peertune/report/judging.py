"""What evaluations tell beside the first metric's scores: the other metrics, and which class was taken for which."""

from statistics import fmean
from typing import Any

import numpy as np
import plotly.graph_objects as go

from peertune.report.drawing import PALETTE, SCALE, Array, chart, evaluated, line, plain, ticks
from peertune.report.runs import RunData

MOST_WRITTEN = 12  # classes whose shares stand in the figure


def others(run: RunData) -> go.Figure | None:
    """Draw the mean over clients by each of the task's other metrics by round, and the best constant answer's."""
    drawn: list[go.Scatter] = []
    rounds = [record["round"] for record in evaluated(run)]
    for number, metric in enumerate(zip(*(record["evaluation"]["also"] for record in evaluated(run)), strict=False)):
        name, colour = str(metric[-1]["metric"]).replace("_", " "), PALETTE[number % len(PALETTE)]
        means = [fmean(evaluation["clients"]) for evaluation in metric]
        drawn.append(line(rounds, means, name, colour, "round %{x}: %{y:.3f}"))
        levels = [(t, level) for t, each in zip(rounds, metric, strict=True) if (level := _level(each)) is not None]
        if levels:
            hover = "round %{x}: %{y:.3f}"
            at, scored = zip(*levels, strict=True)
            drawn.append(line(at, scored, f"{name}, constant answer", colour, hover, 1))
    return chart(*drawn, x="round", y="mean over clients", xaxis=ticks(rounds[-1])) if drawn else None


def _level(evaluation: dict[str, Any]) -> float | None:
    own, level = evaluation["own_constant"], evaluation["constant"]
    return fmean(own) if level is None and own else level


def confusion(run: RunData) -> go.Figure | None:
    """Draw which class was taken for which at the last evaluation, as shares of each class's rows."""
    counts = taken(run)
    if counts is None:
        return None
    shares = counts / np.maximum(counts.sum(1, keepdims=True), 1)
    names = [plain(name) for name in class_names(run, len(counts))]
    if len({*names}) < len(names):  # cut to what a figure can hold
        names = [f"{number}: {name}" for number, name in enumerate(names)]
    heat = go.Heatmap(
        x=names,
        y=names,
        z=shares.round(4),
        customdata=counts,
        zmin=0,
        zmax=1,
        colorscale=SCALE,
        colorbar={"thickness": 12, "title": {"text": "share of the class", "side": "right"}},
        texttemplate="%{z:.2f}" if len(names) <= MOST_WRITTEN else None,
        hovertemplate="%{y} taken for %{x}: %{customdata} times, %{z:.1%}<extra></extra>",
    )
    axis = {"type": "category", "showgrid": False}
    height = 400 if len(names) <= MOST_WRITTEN else 640
    return chart(heat, x="predicted", y="class", height=height, xaxis=axis, yaxis=axis | {"autorange": "reversed"})


def taken(run: RunData) -> Array | None:
    """Return the counts `[C, C]` of the last evaluation, by class and prediction; None where there are none."""
    found = [record["evaluation"]["confusion"] for record in evaluated(run)[-1:]]
    return np.array(found[0]) if found and found[0] else None


def class_names(run: RunData, classes: int) -> list[str]:
    """Return the names of a run's classes by number."""
    names = run.facts.get("partition", {}).get("labels", [])
    return [str(name) for name in names] if len(names) == classes else [str(number) for number in range(classes)]


def by_class(run: RunData) -> list[dict[str, Any]]:
    """Return what the clients' own models made of each class at the last evaluation, all clients' answers together.

    A class has its name, as `class`, how many `answers` were given to its rows, `precision`, `recall` and `f1` of
    these, and for what it was `mistaken` most often (None for never). Empty where answers are not counted.
    """
    counts = taken(run)
    if counts is None:
        return []
    names, right, wrong = class_names(run, len(counts)), counts.diagonal(), counts - np.diag(counts.diagonal())
    there, said = counts.sum(1), counts.sum(0)
    return [
        {
            "class": name,
            "answers": int(there[k]),
            "precision": float(right[k] / said[k]) if said[k] else 0.0,
            "recall": float(right[k] / there[k]) if there[k] else 0.0,
            "f1": float(2 * right[k] / (said[k] + there[k])) if said[k] + there[k] else 0.0,
            "mistaken": names[int(wrong[k].argmax())] if wrong[k].any() else None,
        }
        for k, name in enumerate(names)
    ]
