"""Figures of runs, each defined once for the page (`html`) and for files (`write_figures`).

`OF_A_RUN` and `OF_RUNS` map names to figures: what it is called, how to read it, and the function that draws it.
"""

import re
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import plotly.graph_objects as go

from peertune.errors import RunError
from peertune.report import comparisons, gantt, judging, run_figures
from peertune.report.drawing import TRAFFIC, average, mean_loss, mean_score, metric, theme, virtual_time
from peertune.report.runs import RunData


class Figure(NamedTuple):
    """A figure that was drawn; title and reading are plain text, not HTML."""

    name: str  # of its file
    title: str
    reading: str  # how to read it
    figure: go.Figure  # where it has frames they are rounds, and the last with any edge is the one it shows


def of_a_run(run: RunData) -> list[Figure]:
    """Draw all figures of one run that make sense for it."""
    return _drawn(OF_A_RUN, run, metric([run]))


def of_runs(runs: Sequence[RunData]) -> list[Figure]:
    """Draw all figures that compare runs and make sense for these."""
    return _drawn(OF_RUNS, runs, metric(runs))


def _drawn(table: Mapping[str, "_Kind"], subject: Any, name: str) -> list[Figure]:
    def sentence(text: str) -> str:
        told = text.replace("METRIC", name)
        return told[:1].upper() + told[1:]

    drawn = ((key, kind, kind.draw(subject)) for key, kind in table.items())
    return [
        Figure(key, sentence(k.title), sentence(k.reading), figure) for key, k, figure in drawn if figure is not None
    ]


def write_figures(runs: Sequence[RunData], folder: Path, formats: Sequence[str] = ("png", "svg")) -> list[Path]:
    """Write each figure into the folder as files for a paper, without their titles; return their paths.

    Several runs' comparisons stand in the folder itself, each run's own figures in a folder of its name; those of a
    single run stand in the folder itself.

    Raises:
        RunError: kaleido or a browser is missing or fails, or the folder can't be written.
    """
    try:
        import kaleido
        from kaleido.errors import BrowserClosedError, BrowserFailedError, ChromeNotFoundError
    except ImportError:
        raise RunError("figures: kaleido is missing, which draws them; pip install 'peertune[figures]'") from None
    specs = []
    try:
        for beneath, drawn in _figures_by_folder(runs).items():
            (folder / beneath).mkdir(parents=True, exist_ok=True)
            for name, _, _, figure in drawn:
                figure.update_layout(template=theme(dark=False, paper="white"))
                options = {"width": 720, "height": figure.layout.height, "scale": 3}
                specs += [
                    {"fig": figure, "path": folder / beneath / f"{name}.{suffix}", "opts": options | {"format": suffix}}
                    for suffix in formats
                ]
        # Its own browser, without the network: mathjax would come from there.
        kaleido.write_fig_from_object_sync(specs, kopts={"mathjax": False})
    except ChromeNotFoundError:
        raise RunError(
            "figures: no browser to draw them; install Chrome or Chromium, or name it in BROWSER_PATH"
        ) from None
    except (BrowserClosedError, BrowserFailedError, TimeoutError) as error:
        raise RunError(f"figures: the browser failed ({type(error).__name__}); try another in BROWSER_PATH") from None
    except OSError as error:
        raise RunError(f"{folder}: can't be written ({error.strerror}); give a folder you can write to") from None
    return [spec["path"] for spec in specs]


def _figures_by_folder(runs: Sequence[RunData]) -> dict[str, list[Figure]]:
    """Return the folder beneath the one asked for → what goes there; a run's name is no path to elsewhere."""
    if len(runs) == 1:
        return {"": of_a_run(runs[0])}
    found = {"": of_runs(runs)}
    for number, run in enumerate(runs):
        plain = re.sub(r"[^\w.=-]+", "-", run.name).strip("-.")
        found[plain if plain and plain not in found else f"{plain}-{number}".strip("-")] = of_a_run(run)
    return found


class _Kind(NamedTuple):
    title: str  # METRIC stands for the metric's name, here and below
    reading: str
    draw: Callable[[Any], go.Figure | None]


OF_A_RUN: Mapping[str, _Kind] = {
    "score": _Kind(
        "METRIC by round",
        "The thick line is the mean over the clients' own models, the band and thin lines are the clients; a wide band "
        "means that they are far from agreeing. The dotted line is the model of the averaged adapter. Ensembles of all "
        "clients, and of each with those it heard (mean over clients), have lines of their own where they are judged. "
        "The best constant answer is the same for all rows: who scores no more has learnt nothing of them.",
        run_figures.score,
    ),
    "others": _Kind(
        "Other metrics by round",
        "The same predictions by the task's other metrics, in the mean over the clients' own models. Dashed lines are "
        "the best answers that are the same for all rows.",
        judging.others,
    ),
    "certainty": _Kind(
        "Certainty by round",
        "Whether the clients' own models know how sure they may be: the negative log-likelihood of the right class, "
        "and how far the probability of the class that is chosen is from how often it is right. Lower is better.",
        run_figures.certainty,
    ),
    "loss": _Kind(
        "Train loss by round",
        "Each client's loss on its own rows, mean over the round's local steps; the thick line is the mean over "
        "clients.",
        run_figures.loss,
    ),
    "consensus": _Kind(
        "Disagreement by round",
        "How far the clients' factors are from their mean (Δ_A, Δ_B), and what averaging factors leaves out of the "
        "product (cross term, at most Δ_A · Δ_B). Lower is closer; the background says which factor trains. Mere "
        "rounding is left out.",
        run_figures.consensus,
    ),
    "ranks": _Kind(
        "What only high ranks know",
        "Of the clients' averaged product the share of the squared singular values beyond the lowest rank: it fades "
        "where high ranks are mixed with what low ranks can't hold. And how far the products of the clients of the "
        "highest rank are from their mean, as a share of its norm.",
        run_figures.high_ranks,
    ),
    "clients": _Kind(
        "METRIC of each client",
        "One row for each client, one column for each evaluated round; a row that stays dark is a client left behind.",
        run_figures.clients,
    ),
    "confusion": _Kind(
        "Which class was taken for which",
        "At the last evaluation, the answers of all clients' own models together: a row for each class, a column for "
        "each prediction, as shares of the class. Off the diagonal are mistakes; point at a field for its count.",
        judging.confusion,
    ),
    "graph": _Kind(
        "Who met whom",
        "Grey lines are all edges that were ever active, orange ones those of the round shown. A client's colour is "
        "its newest METRIC by then (before any evaluation its first; in a run without any, its commonest label); where "
        "not all peers' records are here, those that are stand out.",
        run_figures.graph,
    ),
    "partition": _Kind(
        "Who holds what",
        "Training rows of each client, stacked by label: unlike bars are unlike data. Point at a bar for its numbers.",
        run_figures.partition,
    ),
    "traffic": _Kind(
        "METRIC against traffic",
        "What the score has cost by then, in the mean over clients: further left is cheaper.",
        lambda run: run_figures.by_cost(run, TRAFFIC),
    ),
    "time": _Kind(
        "METRIC against virtual time",
        "By when the last client had ended the round, as steps and messages would take: further left is faster.",
        lambda run: run_figures.by_cost(run, virtual_time([run])),
    ),
    "waiting": _Kind(
        "Who waits for whom",
        "A row for each client, in virtual time: it trains, and then it waits until all that it mixes has come (in an "
        "asynchronous run for nothing). Point at a bar for whom it waited last. Seen are the first rounds; drag the "
        "axis to see others.",
        gantt.waiting,
    ),
    "contraction": _Kind(
        "Contraction against rho",
        "What a round's mixing left of the squared disagreement about a factor: 1 is nothing gained, 0 is full "
        "agreement. For gossip the points' mean should be at most rho, the dashed line; where different rounds follow "
        "each other in a period, only in the long run.",
        run_figures.contraction,
    ),
}
"""Name → figure of one run."""

OF_RUNS: Mapping[str, _Kind] = {
    "scores": _Kind(
        "METRIC by round",
        "Mean over clients and seeds; the band is ± one standard deviation over seeds.",
        lambda runs: comparisons.by_round(runs, mean_score, metric(runs)),
    ),
    "averages": _Kind(
        "METRIC of the averaged adapter by round",
        "Mean over seeds; the band is ± one standard deviation over seeds.",
        lambda runs: comparisons.by_round(runs, average, metric(runs)),
    ),
    "score-by-traffic": _Kind(
        "METRIC against traffic",
        "Mean over clients and seeds, against what a client has sent by then: further left is cheaper. Who sends "
        "nothing is the point at its end.",
        lambda runs: comparisons.by_cost(runs, TRAFFIC),
    ),
    "score-by-time": _Kind(
        "METRIC against virtual time",
        "Mean over clients and seeds, against when the last client had ended the round: further left is faster. Runs "
        "of a recipe without times are left out.",
        lambda runs: comparisons.by_cost(runs, virtual_time(runs)),
    ),
    "disagreement-A": _Kind(
        "Disagreement about A by round",
        "How far the clients' factors are from their mean after mixing, mean over seeds; the band is ± one standard "
        "deviation over seeds. Lower is closer; mere rounding is left out.",
        lambda runs: comparisons.disagreement(runs, "A"),
    ),
    "disagreement-B": _Kind(
        "Disagreement about B by round",
        "The same of the other factor. Methods that train the factors in turn agree about the one that rests.",
        lambda runs: comparisons.disagreement(runs, "B"),
    ),
    "losses": _Kind(
        "Train loss by round",
        "Mean over clients and seeds; the band is ± one standard deviation over seeds.",
        lambda runs: comparisons.by_round(runs, mean_loss, "train loss"),
    ),
    "score-by-activation": _Kind(
        "Final METRIC against activation",
        "Mean over clients and seeds at the last evaluation, bars ± one standard deviation over seeds; further left, "
        "clients meet more rarely.",
        lambda runs: comparisons.against(runs, "graph.activation", mean_score, "probability of an edge to be active"),
    ),
    "average-by-activation": _Kind(
        "Final METRIC of the averaged adapter against activation",
        "Mean over seeds at the last evaluation, bars ± one standard deviation over seeds.",
        lambda runs: comparisons.against(runs, "graph.activation", average, "probability of an edge to be active"),
    ),
    "score-by-interval": _Kind(
        "Final METRIC against the switching interval",
        "Mean over clients and seeds at the last evaluation, bars ± one standard deviation over seeds; methods that "
        "don't switch are left out.",
        lambda runs: comparisons.against(runs, "algorithm.switch_every", mean_score, "rounds between switches (T)"),
    ),
    "average-by-interval": _Kind(
        "Final METRIC of the averaged adapter against the switching interval",
        "Mean over seeds at the last evaluation, bars ± one standard deviation over seeds.",
        lambda runs: comparisons.against(runs, "algorithm.switch_every", average, "rounds between switches (T)"),
    ),
}
"""Name → figure that compares runs."""
