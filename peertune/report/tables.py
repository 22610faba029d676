"""Runs as tables: what `rounds.jsonl` comes to in one row, several seeds to a mean, and rows as text."""

import logging
from collections.abc import Collection, Mapping, Sequence
from statistics import fmean, pstdev, stdev
from typing import Any

from peertune.data.scores import LOWER_IS_BETTER
from peertune.errors import RunError, unknown
from peertune.report.environments import differences, known
from peertune.report.pairing import OWN, SCORES, Row, pair
from peertune.report.runs import RunData, different, settings, varying
from peertune.report.spending import spent
from peertune.rounds.patience import ended_early

log = logging.getLogger(__name__)

MEASURES = {
    "mean": "mean",
    "constant": "constant",
    "best": "best",
    "own": "own",
    "own_constant": "own constant",
    "own_trained": "own trained",
    "own_heard": "own heard",
    "min": "min",
    "max": "max",
    "spread": "spread",
    "worst_tenth": "worst tenth",
    "average": "average",
    "best_average": "best average",
    "ensemble": "ensemble",
    "heard_ensemble": "heard ensemble",
    "route": "route",
    "nll": "NLL",
    "ece": "ECE",
    "backdoor": "backdoor",
    "epsilon": "ε",
    "consensus_error_A": "Δ_A",
    "consensus_error_B": "Δ_B",
    "cross_term": "cross",
    "megabytes_sent": "MB",
    "virtual_seconds": "virtual s",
    "seconds": "s",
}
"""What runs are compared by: key of a summary → heading."""
COLUMNS = {"run": "run", "metric": "metric", **MEASURES}
"""The same with the run's name and the metric's in front."""
_ON_THE_SCALE = (*SCORES, "constant", "own_constant", "min", "max", "spread", "worst_tenth")
"""Measures that are scores, or differences of some: what each of a run's metrics has."""
LEGEND = """\
mean, min, max: the clients' own models at the end; constant: the best answer that is the same for all rows, on the
same rows; spread: the models' standard deviation; worst tenth: the mean of the worst tenth of them; best: the best
mean of all rounds; own, own constant: on rows that each client held out for itself; own trained, own heard: there,
of the adapter before mixing and of the mean of what others sent; average: the averaged adapter at the end, best
average: at its best; ensemble: the mean of all clients' probabilities; heard ensemble: of a client's and those it
heard; route: each row by the surest client; NLL, ECE: mean negative log-likelihood and calibration error of the
clients' own models; backdoor: the share of rows of other classes that they call its target once its trigger is in;
ε: the most that a client has spent of its privacy budget, at its recipe's δ;
Δ_A, Δ_B: consensus error of the factors; cross: the cross term; MB: sent by a client in the whole run; virtual s:
until the last client had ended, in the recipe's time; s: seconds"""
_INTERVAL = "algorithm.switch_every"
_AUTOMATIC = ("device", "model.dtype")
"""Keys in which runs of one recipe may differ, by machine."""
_UNCOMPARED = (*_AUTOMATIC, "task.path", "task.revision", "model.revision")
"""Keys in which runs may differ without being runs of different things."""


_MEANS = (*OWN, "own_constant", "heard_ensemble", "nll", "ece", "backdoor")
"""Lists of an evaluation of which a summary has the mean over clients."""
_LISTS = ("clients", "best_rounds", "judged", *_MEANS)
SUMMARISED = ("clients", "bytes_sent", "epsilon", *(f"evaluation.{name}" for name in _LISTS))
"""Which lists of a record are looked at to summarise a run."""


def summarise(records: Sequence[Mapping[str, Any]]) -> dict[str, Any]:
    """Return one row for a run's records, as read from `rounds.jsonl`.

    `mean`, `min`, `max`, `spread` (standard deviation) and `worst_tenth` (the mean of the worst tenth, rounded up) are
    over the clients' own models at the last evaluation, `own` is their mean on rows that each held out for itself, and
    `average` is the averaged adapter's score there. `constant` and `own_constant` are what the best answer that is the
    same for all rows scores on those rows. `best` is the best mean of all evaluations, in the round `best_round` (from
    0), and `best_average` the averaged adapter's best. All these are by the first metric; `also` has the same of each
    other one. Consensus errors and the cross term are those of the last round, traffic is a client's mean over the run,
    seconds are the whole run's, and so are `virtual_seconds`, where the recipe has times. `best_rounds`, where each
    client's best adapter is kept, says of which round each is, and `best_of_own` which of `OWN` is best, where all were
    judged.
    """
    evaluated = [(record["round"], record["evaluation"]) for record in records if record["evaluation"]]
    row: dict[str, Any] = {"rounds": len(records)}
    if evaluated:
        row |= _scores(evaluated)
        others = zip(*(evaluation.get("also", ()) for _, evaluation in evaluated), strict=False)
        rounds = [t for t, _ in evaluated]
        if also := [_scores(list(zip(rounds, evaluations, strict=True))) for evaluations in others]:
            row["also"] = also
    if records:
        last = records[-1]["diagnostics"]
        row |= {key: last[key] for key in ("consensus_error_A", "consensus_error_B", "cross_term") if key in last}
        end = spent(records)[-1]
        row |= {"epsilon": max(budget)} if (budget := _spent_privacy(records)) else {}
        row["megabytes_sent"] = end.megabytes_sent
        row |= {} if end.virtual_seconds is None else {"virtual_seconds": end.virtual_seconds}
        row["seconds"] = sum(sum(record["seconds"].values()) for record in records)
    return row


def _spent_privacy(records: Sequence[Mapping[str, Any]]) -> Sequence[float]:
    """Return what the clients have spent of their budgets; [] where nothing is private, or it isn't told at the end."""
    return records[-1].get("epsilon") or []


def _scores(evaluated: Sequence[tuple[int, Mapping[str, Any]]]) -> dict[str, Any]:
    """Return what evaluations by one metric, each with its round, come to."""
    final = evaluated[-1][1]
    scores, lower = final["clients"], final["metric"] in LOWER_IS_BETTER
    choose = min if lower else max
    best_round, best = choose(((t, fmean(each["clients"])) for t, each in evaluated), key=lambda pair: pair[1])
    found = {
        "metric": final["metric"],
        "mean": fmean(scores),
        "min": min(scores),
        "max": max(scores),
        "spread": pstdev(scores),
        "worst_tenth": fmean(sorted(scores, reverse=lower)[: -(-len(scores) // 10)]),
        "best": best,
        "best_round": best_round,
    }
    found |= {key: fmean(final[key]) for key in _MEANS if final.get(key)}
    if all(key in found for key in OWN):
        found["best_of_own"] = choose(OWN, key=found.__getitem__)  # of equals what it has
    found |= {"best_rounds": final["best_rounds"]} if final.get("best_rounds") else {}
    found |= {key: final[key] for key in ("constant", "ensemble", "route") if final.get(key) is not None}
    if "own_constant" in found and "constant" not in found:  # the clients were judged on rows of their own alone
        found["constant"] = found["own_constant"]
    averages = [evaluation["average"] for _, evaluation in evaluated]
    if None not in averages:  # a peer knows its own adapter alone
        found |= {"average": averages[-1], "best_average": choose(averages)}
    return found


def compare(
    runs: Sequence[RunData], by: Sequence[str] | None = None, paired_with: str | None = None
) -> list[dict[str, Any]]:
    """Put runs that differ in their seed alone together: a row for each combination of the settings `by`.

    A row has `by` (key → value), `seeds`, `runs`, `metric`, and `measures`: for each of `MEASURES` its `mean` over the
    seeds and `std` (of a sample; None for one seed); and `also`, where the task has other metrics: for each its
    `metric` and those `measures` that are scores. `environment` has what the runs differ in beside settings, seeds and
    rows (`peertune.report.environments`): key → the value of each of the row's runs. With `paired_with`, the value of
    one of the keys, such as a method's name, a row has `paired`: for each of `SCORES` the mean `difference` from the
    row which has that value and agrees in all keys of other blocks, seed by seed, and its 95 % interval `low` to `high`
    by Student's t (None for one seed). Rows without such a partner have None. Each of `also` has its own.

    Raises RunError for runs of different tasks, for a key that no run has, and where runs of one seed differ in a
    setting that is not in `by`.
    """
    return told(grouped(runs, by, paired_with))


def told(rows: Sequence[Row]) -> list[dict[str, Any]]:
    """Return rows of `grouped` as `compare` does."""
    shown = [{key: value for key, value in row.items() if not key.startswith("_")} for row in rows]
    return [{**row, "also": told(row["also"])} if "also" in row else row for row in shown]


def grouped(
    runs: Sequence[RunData], by: Sequence[str] | None = None, paired_with: str | None = None
) -> list[dict[str, Any]]:
    """Return the rows of `compare`; they, and what they have of each other metric, with summaries as `_summaries`.

    A row that is paired has the other row as `_partner`.
    """
    found = {run.name: settings(run) for run in runs}
    keys = list(by) if by is not None else default_keys(runs)
    there = {key for values in found.values() for key in values}
    if wrong := next((key for key in keys if key not in there), None):
        raise RunError(unknown("--by", wrong, there).replace("unknown name", "unknown key"))
    _check_comparable(runs, keys)
    for run in runs:
        done = len(run.records)
        if run.records and run.facts.get("peers"):  # which may have missed some
            done = run.records[-1]["round"] + 1
        if done < run.recipe.get("rounds", 0) and not ended_early(run.records, run.recipe.get("evaluate", {})):
            log.warning("%s is not finished: it has %d of %d rounds", run.name, done, run.recipe["rounds"])
    apart = differences(runs, keys)
    for difference in apart:
        log.warning("%s", difference)
    groups: dict[tuple[Any, ...], list[RunData]] = {}
    for run in runs:
        groups.setdefault(tuple(_hashable(found[run.name].get(key)) for key in keys), []).append(run)
    rows = []
    for members in groups.values():
        _check_members(members, keys)
        members.sort(key=lambda run: int(found[run.name]["seed"]))
        summaries = [summarise(run.records) for run in members]
        rows.append(
            {
                "by": {key: found[members[0].name].get(key) for key in keys},
                "seeds": [found[run.name]["seed"] for run in members],
                "runs": [run.name for run in members],
                "environment": {key: [known(run, key) for run in members] for each in apart for key in each.keys},
                "metric": summaries[0].get("metric"),
                "measures": _spreads(summaries, MEASURES),
                "also": [
                    {"metric": each[0]["metric"], "measures": _spreads(each, _ON_THE_SCALE), "_summaries": each}
                    for each in zip(*(summary.get("also", ()) for summary in summaries), strict=False)
                ],
                "_summaries": summaries,
            }
        )
    if paired_with is not None:
        pair(rows, keys, paired_with)
    return rows


def _differences(runs: Sequence[RunData]) -> list[str]:
    return [key for key in varying(runs) if key not in _UNCOMPARED]


def default_keys(runs: Sequence[RunData]) -> list[str]:
    """Return what makes a row where nothing is asked for: the settings in which the runs differ, but for the task's.

    The interval is none of them where it follows from the others: T* may differ from seed to seed.
    """
    keys = [key for key in _differences(runs) if not key.startswith("task.")] or ["algorithm.name"]
    rest = [key for key in keys if key != _INTERVAL] or ["algorithm.name"]
    told = [tuple(_hashable(settings(run).get(key)) for key in (*rest, "seed")) for run in runs]
    return rest if len(set(told)) == len(told) else keys


def _hashable(value: Any) -> Any:
    return repr(value) if isinstance(value, list | dict) else value


def _check_comparable(runs: Sequence[RunData], by: Sequence[str]) -> None:
    for key in _differences(runs):
        if key.startswith("task.") and key not in by:
            first = runs[0]
            other = next(run for run in runs if settings(run).get(key) != settings(first).get(key))
            names = " and ".join(f"{run.name} has {key}={settings(run).get(key)}" for run in (first, other))
            raise RunError(f"these runs can't be compared: {names}; give runs of one task, or --by with {key} in it")


def _check_members(members: Sequence[RunData], by: Sequence[str]) -> None:
    """Refuse runs of one seed in one row, and say where a row holds more than seeds of the same."""
    seeds = [run.recipe["seed"] for run in members]
    for place, seed in enumerate(seeds):
        if seed in seeds[:place]:
            twins = [members[seeds.index(seed)], members[place]]
            differ = different(twins)
            hint = f"they differ in {', '.join(differ)}: put that into --by" if differ else "give each run once"
            raise RunError(f"{twins[0].name} and {twins[1].name} have the same seed, {seed}; {hint}")
    pooled = [key for key in varying(members) if key not in (*by, *_AUTOMATIC, _INTERVAL)]
    if pooled:
        names = f"{members[0].name} and {len(members) - 1} more"
        log.warning("%s make one row, though they differ in %s; put that into --by", names, ", ".join(pooled))


def _spreads(summaries: Sequence[Row], keys: Collection[str]) -> dict[str, dict[str, float | None]]:
    return {key: over_seeds([summary.get(key) for summary in summaries]) for key in MEASURES if key in keys}


def over_seeds(values: Sequence[float | None]) -> dict[str, float | None]:
    """Return the `mean` and the sample's `std` of values; None where any of them is missing, or where there is one."""
    there = [value for value in values if value is not None]
    if not there or len(there) < len(values):
        return {"mean": None, "std": None}
    return {"mean": fmean(there), "std": stdev(there) if len(there) > 1 else None}


def by_metric(rows: Sequence[Row]) -> list[tuple[str, list[Row]]]:
    """Return the other metrics of rows of `grouped` or `compare`, each with the rows as it judges them."""
    names = dict.fromkeys(metric["metric"] for row in rows for metric in row["also"])
    return [
        (name, [{**row, **metric} for row in rows for metric in row["also"] if metric["metric"] == name])
        for name in names
    ]


def measured(rows: Sequence[Row], asked: Collection[str] = ("spread", "worst_tenth")) -> list[str]:
    """Return the measures that any row has, or all where none has any, but for those that are to be `asked` for."""
    found = [key for key in MEASURES if any(row["measures"].get(key, {}).get("mean") is not None for row in rows)]
    there = [key for key in found if key not in asked]
    return there or list(MEASURES)


def compared(rows: Sequence[Row], measures: Sequence[str]) -> list[list[str]]:
    """Lay what `compare` found out as lines of cells, the headings first."""
    keys = list(rows[0]["by"])
    seeds = max(len(row["seeds"]) for row in rows)
    head = [*headings(keys), *(["seeds"] if seeds > 1 else []), *(MEASURES[key] for key in measures)]
    lines = [head]
    for row in rows:
        count = [str(len(row["seeds"]))] if seeds > 1 else []
        lines.append(setting_cells(row) + count + [with_spread(key, **row["measures"][key]) for key in measures])
    return lines


def paired(rows: Sequence[Row], measures: Sequence[str]) -> list[list[str]]:
    """Lay the paired differences out as lines of cells, the headings first; empty where no row has a partner."""
    keys = list(rows[0]["by"])
    chosen = [key for key in measures if key in SCORES]
    if not chosen:
        return []
    lines = [[*headings(keys), "seeds", *(MEASURES[key] for key in chosen)]]
    for row in rows:
        if row.get("paired") is None:
            continue
        found = row["paired"]
        counts = str(max(found[key]["seeds"] for key in chosen))
        lines.append([*setting_cells(row), counts, *(with_interval(found[key]) for key in chosen)])
    return lines if len(lines) > 1 else []


def setting_cells(row: Row) -> list[str]:
    """Write the settings that make a row, a cell for each."""
    return ["-" if value is None else str(value) for value in row["by"].values()]


def headings(keys: Sequence[str]) -> list[str]:
    """Shorten dotted keys to what tells them apart: `algorithm.name` to `algorithm`, others to their last part."""
    short = [key.removesuffix(".name") if key.endswith(".name") else key.rpartition(".")[2] for key in keys]
    return [name if short.count(name) == 1 else key for name, key in zip(short, keys, strict=True)]


def with_spread(key: str, mean: float | None, std: float | None) -> str:
    """Write a measure's mean and deviation over seeds, in two digits."""
    if mean is None or std is None:
        return _cell(key, mean)
    form = pooled_form(key, mean)
    return f"{mean:{form}} ± {std:{form}}"


def with_interval(found: Row, form: str = ".3f") -> str:
    """Write a paired difference and its interval, where it has one."""
    if found["difference"] is None:
        return "-"
    interval = "" if found["low"] is None else f" [{found['low']:+{form}}, {found['high']:+{form}}]"
    return f"{found['difference']:+{form}}{interval}"


def _cell(key: str, value: Any) -> str:
    if value is None:
        return "-"
    return f"{value:{_form(key, value)}}" if isinstance(value, float) else str(value)


def pooled_form(key: str, value: float) -> str:
    """Two digits: seeds scatter by more than a third one tells, and another processor may print another one."""
    if key == "seconds":
        return ".0f"
    if key == "virtual_seconds" and abs(value) >= 10:
        return ".1f" if abs(value) < 100 else ".0f"
    small = 0 < abs(value) < 0.1 and key not in _ON_THE_SCALE
    return "#.2g" if small else ".2f"


def _form(key: str, value: float) -> str:
    return ".0f" if key == "seconds" else ".3g" if 0 < value < 0.01 else ".3f"


def cells(rows: Sequence[Row], columns: Mapping[str, str]) -> list[list[str]]:
    """Lay summaries out as lines of cells, the headings first; `columns` maps keys to headings."""
    return [list(columns.values()), *([_cell(key, row.get(key)) for key in columns] for row in rows)]


def aligned(lines: Sequence[Sequence[str]]) -> str:
    """Align lines of cells, the first column to the left. Nothing is cut, however narrow the terminal."""
    widths = [max(map(len, column)) for column in zip(*lines, strict=True)]
    aligned = ([cell.rjust(width) for cell, width in zip(line, widths, strict=True)] for line in lines)
    return "\n".join(
        " ".join([line[0].ljust(widths[0]), *rest]) for line, (_, *rest) in zip(lines, aligned, strict=True)
    )


def markdown(lines: Sequence[Sequence[str]]) -> str:
    """Write lines of cells as a Markdown table, the first line its head."""
    head, *body = ([cell.replace("|", r"\|") for cell in line] for line in lines)
    rule = ["---", *["---:"] * (len(head) - 1)]
    return "\n".join(f"| {' | '.join(line)} |" for line in (head, rule, *body))


def latex(lines: Sequence[Sequence[str]]) -> str:
    """Write lines of cells as a LaTeX tabular with booktabs' rules, the first line its head."""
    signs = {"±": r"$\pm$", "Δ": r"$\Delta$", "\\": r"\textbackslash{}", "^": r"\^{}", "~": r"\~{}"}
    table = str.maketrans(signs | {sign: rf"\{sign}" for sign in "_%&#${}"})
    head, *body = (" & ".join(cell.translate(table) for cell in line) + r" \\" for line in lines)
    columns = "l" + "r" * (len(lines[0]) - 1)
    rows = [rf"\begin{{tabular}}{{{columns}}}", r"\toprule", head, r"\midrule", *body, r"\bottomrule", r"\end{tabular}"]
    return "\n".join(rows)
