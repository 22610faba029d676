"""One HTML file about a run or several, which needs nothing beside itself and no network.

Text from runs is escaped, and what is embedded as JSON holds no `<`. Should something slip through all the same, the
page's content security policy lets no script run but its own two, known by their hashes, and loads nothing from
elsewhere.
"""

import json
from base64 import b64encode
from collections.abc import Mapping, Sequence
from dataclasses import replace
from hashlib import sha256
from html import escape
from importlib.resources import files
from pathlib import Path, PurePosixPath, PureWindowsPath
from string import Template
from typing import Any

import yaml
from plotly.io import to_json
from plotly.offline import get_plotlyjs

from peertune.errors import RunError
from peertune.report.drawing import metric, theme
from peertune.report.environments import differences
from peertune.report.figures import Figure, of_a_run, of_runs
from peertune.report.findings.finding import Finding
from peertune.report.judging import by_class
from peertune.report.pairing import Row
from peertune.report.runs import RunData, settings
from peertune.report.spending import judged
from peertune.report.tables import (
    MEASURES,
    by_metric,
    cells,
    compared,
    grouped,
    measured,
    summarise,
)
from peertune.report.verdict import ordered, verdicts
from peertune.rounds.patience import ended_early

MARKS = {"problem": "✕ Problem", "notice": "! Notice", "good": "✓ Good"}
"""Severity → how it is marked, the gravest first; never by colour alone."""


_SCORES = ("mean", "constant", "min", "spread", "worst_tenth", "best", "own", "own_constant", "average", "best_average")
_SHOWN = (
    *_SCORES,
    "consensus_error_A",
    "consensus_error_B",
    "cross_term",
    "megabytes_sent",
    "virtual_seconds",
    "seconds",
)
"""Columns of the table that compares runs, of those that any of them has."""
_FAIRNESS = "spread: the models' standard deviation; worst tenth: the mean of the worst tenth of them"


MOST_UNFOLDED = 20
"""Classes up to which their table is open."""


def page(runs: Sequence[RunData], findings: Mapping[str, Sequence[Finding]]) -> str:
    """Return the page of a run, or of several and what compares them; `findings` are by the run's name.

    Where files lie on this machine is no part of it.
    """
    runs = [replace(run, folder=Path(run.folder.name), recipe=_without_places(run.recipe)) for run in runs]
    sections = [_run(run, findings.get(run.name, ())) for run in runs]
    if len(runs) == 1:
        title, body = runs[0].name, f"<h1>{escape(runs[0].name)}</h1>{sections[0]}"
    else:
        title, body = f"{len(runs)} runs", _comparison(runs, findings) + _choice(runs, sections)
    script = _file("page.js")
    plotly = get_plotlyjs()
    return Template(_file("page.html")).substitute(
        title=f"{escape(title)} · peertune",
        body=body,
        themes=_json({"dark": theme(dark=True), "light": theme(dark=False)}),
        plotly=plotly,
        script=script,
        hashes=" ".join(_hash(text) for text in (plotly, script)),
    )


def _without_places(value: Any) -> Any:
    """Return a recipe, or a part of one, with the last part alone of each path that begins somewhere on a machine."""
    if isinstance(value, Mapping):
        return {key: _without_places(each) for key, each in value.items()}
    if isinstance(value, list):
        return [_without_places(each) for each in value]
    if isinstance(value, str):
        for path in (PurePosixPath(value), PureWindowsPath(value)):
            if path.is_absolute() or value.startswith(("~", "./", "../", ".\\", "..\\")):
                return f"…/{path.name}"
    return value


def _file(name: str) -> str:
    return files("peertune.report").joinpath(name).read_text(encoding="utf-8")


def _hash(script: str) -> str:
    return f"'sha256-{b64encode(sha256(script.encode()).digest()).decode()}'"


def _json(value: Any) -> str:
    """Write JSON that no HTML parser finds a tag or a comment in."""
    return json.dumps(value).replace("<", "\\u003c")


def _comparison(runs: Sequence[RunData], findings: Mapping[str, Sequence[Finding]]) -> str:
    problems = [
        (run.name, finding) for run in runs for finding in findings.get(run.name, ()) if finding.severity == "problem"
    ]
    try:
        together = _table(runs) + _grid(of_runs(runs), "all runs")
    except RunError as error:  # each can be looked at all the same
        together = f'<p class="soft">{escape(str(error))}</p>'
    return f"<h1>{len(runs)} runs</h1>{_listed('Problems', problems)}<h2>Side by side</h2>{together}"


def _choice(runs: Sequence[RunData], sections: Sequence[str]) -> str:
    options = "".join(f'<option value="run-{number}">{escape(run.name)}</option>' for number, run in enumerate(runs))
    parts = "".join(
        f'<section class="run" id="run-{number}" aria-label="{escape(run.name)}"{" hidden" if number else ""}>'
        f"{section}</section>"
        for number, (run, section) in enumerate(zip(runs, sections, strict=True))
    )
    return f'<h2>Run by run</h2><p class="choice"><label>Run <select id="choice">{options}</select></label></p>{parts}'


def _run(run: RunData, findings: Sequence[Finding]) -> str:
    found = [(None, finding) for finding in sorted(findings, key=lambda finding: list(MARKS).index(finding.severity))]
    recipe = yaml.safe_dump(run.recipe, sort_keys=False, allow_unicode=True)
    environment = json.dumps(run.environment, indent=2, ensure_ascii=False)
    none_yet = "" if run.records else '<p class="soft">No round is finished yet.</p>'
    return (
        f"{_facts(run)}{none_yet}{_scores(run)}{_listed('Findings', found)}{_peers(run)}{_classes(run)}"
        f"<h2>Figures</h2><p class='soft'>The first round is round 0.</p>{_grid(of_a_run(run), run.name)}"
        f"<h2>How it was made</h2><p class='soft'>{escape(str(run.folder))}</p>"
        f"<details><summary>Recipe, as resolved</summary><pre>{escape(recipe)}</pre></details>"
        f"<details><summary>Environment</summary><pre>{escape(environment)}</pre></details>"
    )


def _facts(run: RunData) -> str:
    """Return the run in a few words and numbers."""
    values, row = settings(run), summarise(run.records)
    graph, peers = run.facts.get("graph", {}), run.facts.get("peers", [])
    measured = _words(row.get("metric", ""))
    spread = f" ({row['min']:.3f} – {row['max']:.3f})" if measured and len(peers) != 1 else ""
    facts = {
        "method": values.get("algorithm.name"),
        "base": values.get("model.name"),
        "task": values.get("task.name"),
        "clients": values.get("clients"),
        "federation": peers[0]["federation"] if peers else None,
        "peer": f"{peers[0]['name']}, client {peers[0]['client']}" if len(peers) == 1 else None,
        "peers": f"{len(peers)} of {values.get('clients')} put together" if len(peers) > 1 else None,
        "graph": f"{values.get('graph.name')}, p = {values.get('graph.activation', graph.get('activation'))}",
        "rho": _rounded(graph.get("rho")),
        "T*": graph.get("switching_interval"),
        "rounds": f"{len(run.records)} of {values.get('rounds')}"
        + (", ended early" if ended_early(run.records, run.recipe.get("evaluate", {})) else ""),
        f"final {measured}": f"{row['mean']:.3f}{spread}" if measured else None,
        "averaged adapter": _rounded(row.get("average")),
        "sent by a client": f"{row['megabytes_sent']:.3g} MB" if run.records else None,
        "time": f"{row['seconds']:.0f} s" if run.records else None,
        "virtual time": f"{row['virtual_seconds']:.4g} s" if "virtual_seconds" in row else None,
    }
    told = {key: escape(str(value)) for key, value in facts.items() if value is not None}
    pairs = "".join(f"<div><dt>{escape(key)}</dt><dd>{value}</dd></div>" for key, value in told.items())
    return f'<dl class="facts">{pairs}</dl>'


def _scores(run: RunData) -> str:
    """Return a row for each metric: the clients' own models, the averaged adapter, and constant answers beside them."""
    row = summarise(run.records)
    if "metric" not in row:
        return ""
    rows = [{**one, "metric": _words(one["metric"])} for one in (row, *row.get("also", ()))]
    columns = {key: MEASURES[key] for key in (*_SCORES, "max") if key in row}
    lines = cells(rows, {"metric": "metric", **columns})
    return f"<h2>Scores</h2>{_rows(lines, 'Scores')}" + (
        '<p class="soft">At the last evaluation. constant: the best answer that is the same for all rows, on the same '
        f"rows; {_FAIRNESS}; best: the best mean of all rounds; own: on held-out rows of their own</p>"
    )


def _words(metric: object) -> str:
    return str(metric).replace("_", " ")


def _classes(run: RunData) -> str:
    """Return a row for each class, folded away where they are many."""
    found = by_class(run)
    if not found:
        return ""
    columns = {"class": "class", "answers": "answers", "precision": "precision", "recall": "recall", "f1": "F1"}
    table = _rows(cells(found, columns | {"mistaken": "most often mistaken for"}), "Classes")
    if len(found) > MOST_UNFOLDED:
        table = f"<details><summary>{len(found)} classes</summary>{table}</details>"
    return f"<h2>Classes</h2>{table}" + (
        '<p class="soft">At the last evaluation, the answers of all clients\' own models together. answers: how many '
        "were given to rows of the class; precision: of the answers that named it, how many were right; recall: of its "
        "rows, how many were named; F1: the harmonic mean of both</p>"
    )


def _rounded(value: float | None) -> str | None:
    return None if value is None else f"{value:.3f}"


def _listed(heading: str, findings: Sequence[tuple[str | None, Finding]]) -> str:
    items = "".join(_finding(run, finding) for run, finding in findings)
    return f'<h2>{heading}</h2><ul class="findings">{items}</ul>' if items else ""


def _finding(run: str | None, finding: Finding) -> str:
    title = f"{run}: {finding.title}" if run else finding.title
    advice = f'<p class="soft">{escape(finding.advice)}</p>' if finding.advice else ""
    return (
        f'<li class="{finding.severity}"><b class="mark">{MARKS[finding.severity]}</b> '
        f"<b>{escape(title)}</b><p>{escape(finding.text)}</p>{advice}</li>"
    )


def _peers(run: RunData) -> str:
    """Return a row for each peer of several: which rounds it took part in, and what came of its edges."""
    peers = run.facts.get("peers", [])
    if len(peers) < 2:
        return ""
    lines = [["peer", "client", "rounds", "missed", "edges", "failed", "MB", metric([run])]]
    last = run.records[-1]["round"] + 1 if run.records else 0
    for peer in peers:
        client = peer["client"]
        own = [(record, record["clients"].index(client)) for record in run.records if client in record["clients"]]
        edges, failed = (sum(client in edge for r, _ in own for edge in r[key]) for key in ("edges", "failed_edges"))
        sent = sum(record["bytes_sent"][place] for record, place in own) / 1e6
        told = [dict(zip(judged(r), r["evaluation"]["clients"], strict=True)) for r, _ in own if r["evaluation"]]
        scores = [each[client] for each in told if client in each]
        counts = [client, len(own), last - len(own), edges, failed]
        lines.append([peer["name"], *map(str, counts), f"{sent:.3f}", f"{scores[-1]:.3f}" if scores else "-"])
    return f"<h2>Peers</h2>{_rows(lines, 'Peers')}" + (
        '<p class="soft">missed: rounds in which it was down, and after which it went on from where the others were; '
        "failed: edges over which nothing came, of all that the graph gave it</p>"
    )


def _table(runs: Sequence[RunData]) -> str:
    """Return a row for each setting, as `peertune compare` tells it."""
    rows = ordered(grouped(runs))

    def shown(some: Sequence[Row], label: str) -> str:
        there = measured(some, asked=())
        return _rows(compared(some, [key for key in _SHOWN if key in there]), label)

    others = "".join(f"<h3>{escape(_words(name))}</h3>{shown(alike, name)}" for name, alike in by_metric(rows))
    lines = [*verdicts(rows), *differences(runs, rows[0]["by"])]
    verdict = "".join(f"<li>{escape(str(line))}</li>" for line in lines)
    told = f"<ul>{verdict}</ul>" if verdict else ""
    first = f"<h3>{escape(_words(rows[0]['metric']))}</h3>" if others else ""
    return f"{told}{first}{shown(rows, 'All settings')}{others}" + (
        '<p class="soft">Mean ± standard deviation over seeds. mean, min: the clients\' own models at the end; '
        f"constant: the best answer that is the same for all rows, on the same rows; {_FAIRNESS}; "
        "best: the best mean of all rounds; own: on held-out rows of their own; average: the averaged adapter, best "
        "average: at its best; Δ_A, Δ_B: how far the clients' factors are from their mean at the end; cross: what "
        "averaging factors leaves out of the product; MB: sent by a client in the whole run; virtual s: until the last "
        "client had ended, in the recipe's time; s: seconds</p>"
    )


def _rows(lines: Sequence[Sequence[str]], label: str) -> str:
    """Return lines of cells as a table, the headings first."""
    head, *rows = lines
    heads = "".join(f'<th scope="col">{escape(cell)}</th>' for cell in head)
    body = "".join(
        f'<tr><th scope="row">{escape(row[0])}</th>{"".join(f"<td>{escape(cell)}</td>" for cell in row[1:])}</tr>'
        for row in rows
    )
    return (
        f'<div class="wide" tabindex="0" role="region" aria-label="{escape(label)}"><table>'
        f"<thead><tr>{heads}</tr></thead><tbody>{body}</tbody></table></div>"
    )


def _grid(figures: Sequence[Figure], owner: str) -> str:
    if not figures:
        return '<p class="soft">Nothing to draw yet.</p>'
    return f'<div class="figures">{"".join(_figure(figure, owner) for figure in figures)}</div>'


def _figure(drawn: Figure, owner: str) -> str:
    alt = f"{drawn.title}, {owner}. {drawn.reading}"
    data = to_json(drawn.figure, validate=False).replace("<", "\\u003c")
    return (
        f'<figure data-name="{drawn.name}"><h3>{escape(drawn.title)}</h3>'
        f'<div class="plot" role="img" aria-label="{escape(alt)}" style="height: {drawn.figure.layout.height}px"></div>'
        f"{_slider(drawn.figure)}<figcaption>{escape(drawn.reading)}</figcaption>"
        f'<script type="application/json" class="data">{data}</script></figure>'
    )


def _slider(figure: Any) -> str:
    """Return a control for a figure with frames: a native one, which keys move and screen readers tell."""
    steps = [frame.name for frame in figure.frames]
    if len(steps) < 2:
        return ""
    shown = figure.layout.meta
    return (
        f'<label class="steps">Round <input type="range" min="0" max="{len(steps) - 1}" value="{steps.index(shown)}" '
        f'autocomplete="off" aria-valuetext="round {shown}"><output>round {shown}</output></label>'
    )
