"""Runs as they lie on disk, for all that looks at them: only what their directories hold, no data set and no model.

A peer's directory holds its own part of a run. Where those of several peers of one federation and recipe are read
together, they are put together and look like a simulation's, but for what no peer can know: how far they disagree, and
how good the average of them is.
"""

import json
import logging
from collections import Counter
from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass, replace
from itertools import accumulate
from pathlib import Path
from statistics import fmean
from typing import Any

import yaml

from peertune.errors import RunError
from peertune.recipe import NO_SETTINGS, NO_SETTINGS_OF_A_SIMULATION, block_defaults, flat
from peertune.rounds.record import put_together, summed
from peertune.runs import directory, records

log = logging.getLogger(__name__)

_OWN = ("checkpoint", "device", "model", "network", "report_to", "task.path", "task.revision")
_OWN_PASSES = ("training.tokens_per_pass", "training.clients_per_pass")
"""Blocks and keys that the peers of one run may each choose for themselves, without becoming another run. That they
train on one base and one graph they have seen to themselves."""


@dataclass(frozen=True)
class RunData:
    """A run directory, read."""

    folder: Path
    name: str  # short, and unique among the runs that were read together
    recipe: dict[str, Any]  # resolved.yaml
    facts: dict[str, Any]  # facts.json; of peers with `peers`: client, name and federation of each
    environment: dict[str, Any]  # environment.json; of peers that differ, by the peer's name
    records: list[dict[str, Any]]  # lines of rounds.jsonl, those that are damaged left out


def find_runs(folders: Sequence[Path]) -> list[RunData]:
    """Read the runs in these folders, each a run or one that holds runs at any depth, sorted within each.

    Peers' parts of one run are put together, in the place of the first. One of several that can't be read is left out
    with a warning. Raises RunError for a folder without runs, and where none can be read.
    """
    found: dict[Path, None] = {}  # in order, each once
    for folder in folders:
        inside = [folder] if (folder / "resolved.yaml").is_file() else _inside(folder)
        if not inside:
            raise RunError(f"{folder}: holds no run; give the folder of a run, or one that holds some")
        found |= dict.fromkeys(inside)
    read: list[RunData] = []
    for folder, name in zip(found, _names(list(found)), strict=True):
        try:
            read.append(_read(folder, name))
        except RunError as error:
            if len(found) == 1:
                raise
            log.warning("%s (left out)", error)
    if not read:
        raise RunError(f"{folders[0]}: none of its runs can be read; restore one")
    return _put_together(read)


def _inside(folder: Path) -> list[Path]:
    """Return the runs below a folder; those that are being written have names that begin with a dot."""
    files = sorted(folder.rglob("resolved.yaml"))
    return [
        file.parent for file in files if not any(part.startswith(".") for part in file.relative_to(folder).parts[:-1])
    ]


def _names(folders: Sequence[Path]) -> list[str]:
    """Return the last parts of the paths, as many as it takes to tell them apart."""
    parts = [folder.resolve().parts for folder in folders]
    for count in range(1, max(map(len, parts)) + 1):
        names = ["/".join(path[-count:]) for path in parts]
        if len(set(names)) == len(names):
            return names
    return [str(folder) for folder in folders]


def _read(folder: Path, name: str) -> RunData:
    try:
        recipe = yaml.safe_load((folder / "resolved.yaml").read_text(encoding="utf-8"))
        facts, environment = (json.loads((folder / f"{part}.json").read_text()) for part in ("facts", "environment"))
        if not all(isinstance(values, dict) for values in (recipe, facts, environment)):
            raise ValueError("no mapping")
    except (OSError, ValueError, yaml.YAMLError):
        raise RunError(
            f"{folder}: its resolved.yaml, facts.json or environment.json is missing or damaged; restore it"
        ) from None
    directory.check_format(folder, facts)
    peer = facts.get("peer")
    if isinstance(peer, dict) and peer.keys() >= {"client", "name", "federation"}:
        facts["peers"] = [peer]
    return RunData(
        folder,
        name,
        recipe,
        facts,
        environment | _computed_with(recipe),
        _with_constants(recipe, facts, records.read(folder)),
    )


def _computed_with(recipe: Mapping[str, Any]) -> dict[str, Any]:
    """Return the run's device and dtype: an earlier version's `environment.json` has what would have been picked."""
    told = flat(recipe)
    return {key: told[of] for key, of in (("device", "device"), ("dtype", "model.dtype")) if told.get(of) is not None}


def _with_constants(
    recipe: Mapping[str, Any], facts: Mapping[str, Any], read: list[dict[str, Any]]
) -> list[dict[str, Any]]:
    """Return records with the constant answer's accuracy, which those of earlier versions don't say."""
    labels = evaluated_labels(recipe, facts)
    for evaluation in (record["evaluation"] for record in read if record["evaluation"] and any(labels)):
        if evaluation["metric"] == "accuracy" and evaluation["constant"] is None and not evaluation["own_constant"]:
            evaluation["constant"] = max(labels) / sum(labels)
    return read


# ---- peers, each with its own part of a run


def _put_together(runs: Sequence[RunData]) -> list[RunData]:
    """Put the peers' parts of each run together, and name the runs."""
    found: list[RunData] = []
    for parts in _of_one_run(runs):
        folder = parts[0].folder
        beside = [run for run in runs if run.folder.parent == folder.parent]
        if len(parts) > 1 and len(beside) == len(parts) and all(part in beside for part in parts):
            folder = folder.parent
        found.append(_joined(parts, folder) if len(parts) > 1 else parts[0])
    if len(found) == 1 < len(runs):
        return [replace(found[0], name=found[0].facts["peers"][0]["federation"])]
    return [replace(run, name=name) for run, name in zip(found, _names([run.folder for run in found]), strict=True)]


def _of_one_run(runs: Sequence[RunData]) -> list[list[RunData]]:
    """Return the parts of each run by client. Where a client has several alike, those beside each other are one run."""
    alike: dict[str, list[RunData]] = {}
    for run in runs:
        alike.setdefault(_what_is_common(run), []).append(run)
    found: list[list[RunData]] = []
    for parts in alike.values():
        groups = [parts]
        if _twice(parts):
            folders = dict.fromkeys(part.folder.parent for part in parts)
            groups = [[part for part in parts if part.folder.parent == folder] for folder in folders]
        for group in groups:
            if _twice(group):
                log.warning("%s and others are several runs of one client; they are not put together", group[0].name)
                found += [[part] for part in group]
            else:
                found.append(sorted(group, key=lambda part: [peer["client"] for peer in part.facts.get("peers", [])]))
    places = {run.folder: place for place, run in enumerate(runs)}
    return sorted(found, key=lambda group: min(places[part.folder] for part in group))


def _twice(parts: Sequence[RunData]) -> bool:
    clients = [part.facts["peers"][0]["client"] for part in parts if part.facts.get("peers")]
    return len(set(clients)) < len(clients)


def _what_is_common(run: RunData) -> str:
    """Return what the parts of a run have in common; of what is no peer's, its place."""
    if not run.facts.get("peers"):
        return str(run.folder)
    common = {
        key: value
        for key, value in settings(run).items()
        if key not in (*_OWN, *_OWN_PASSES) and key.partition(".")[0] not in _OWN
    }
    labels = run.facts.get("partition", {}).get("labels")
    return json.dumps([run.facts["peers"][0]["federation"], labels, common], sort_keys=True)


def _joined(parts: Sequence[RunData], folder: Path) -> RunData:
    """Put the parts of a run together."""
    first, peers = parts[0], [part.facts["peers"][0] for part in parts]
    rounds = sorted({record["round"] for part in parts for record in part.records})
    by_round = [{record["round"]: record for record in part.records} for part in parts]
    environments = [part.environment for part in parts]
    facts = {key: value for key, value in first.facts.items() if key != "peer"} | {"peers": peers}
    if "partition" in facts:
        rows = [row for part in parts for row in part.facts["partition"]["rows"]]
        facts["partition"] = facts["partition"] | {"rows": rows}
    if "privacy" in facts:
        clients = [one for part in parts for one in part.facts["privacy"]["clients"]]
        facts["privacy"] = facts["privacy"] | {"clients": clients}
    for split in ("validation", "evaluated"):
        own = [part.facts[split] for part in parts if split in part.facts]
        each = split == "evaluated" and first.recipe.get("evaluate", {}).get("on") == "own"
        if each or any(other != own[0] for other in own):  # each has its own
            labels = [sum(counts) for counts in zip(*(held["labels"] for held in own), strict=True)]
            facts[split] = {"rows": sum(held["rows"] for held in own), "labels": labels}
    return RunData(
        folder,
        first.name,
        first.recipe,
        facts,
        first.environment
        if all(other == environments[0] for other in environments)
        else {peer["name"]: environment for peer, environment in zip(peers, environments, strict=True)},
        [_round([own[t] for own in by_round if t in own], first.facts.get("hostile", ())) for t in rounds],
    )


def environments(run: RunData) -> list[dict[str, Any]]:
    """Return what a run's numbers were computed on: for each peer, and each time that it was resumed elsewhere."""
    each = [run.environment.get(peer["name"]) for peer in run.facts.get("peers", [])]
    parts = [part for part in each if isinstance(part, dict)]
    if len(parts) < len(run.environment):
        parts = [run.environment]
    return [found for part in parts for found in accumulate([part, *part.get("resumed", [])], dict.__or__)]


_OF_CLIENTS = ("clients", "loss", "grad_norm", "epsilon", "bytes_sent", "neighbours", "not_mixed", "suspects")
"""Lists of a record that go by client."""


def _round(records: Sequence[Mapping[str, Any]], hostile: Collection[int] = ()) -> dict[str, Any]:
    """Put one round's records of several clients together; seconds are their mean, as they run side by side.

    Hostile ones have no say in what is judged, where there are others.
    """

    def chained(key: str) -> list[Any]:
        return [value for record in records for value in record[key]]

    def union(key: str) -> list[list[int]]:
        return [list(edge) for edge in sorted({tuple(edge) for edge in chained(key)})]

    train, _ = Counter(tuple(record["train"]) for record in records).most_common(1)[0]
    honest = [record for record in records if not {*record["clients"]} <= {*hostile}] or records
    evaluated = [record["evaluation"] for record in honest]
    evaluation = None
    if None not in evaluated:
        own = all(one["own"] == one["clients"] for one in evaluated)  # each on rows that it holds out
        rows = {"rows": (sum if own else min)(one["rows"] for one in evaluated)}
        evaluation = put_together(evaluated) | rows
        if len(honest) < len(records):
            evaluation["judged"] = [client for record in honest for client in record["clients"]]
        evaluation["also"] = [metric | rows for metric in evaluation["also"]]
    stages = dict.fromkeys(stage for record in records for stage in record["seconds"])
    return {
        "round": records[0]["round"],
        "train": list(train),
        "send": records[0]["send"],
        **{key: chained(key) for key in _OF_CLIENTS},
        "taken": summed(chained("taken")),
        **{key: union(key) for key in ("edges", "vacant_edges", "failed_edges")},
        "out_of_phase": [who for record in records if tuple(record["train"]) != train for who in record["clients"]],
        "neighbourhood_cross_term": None
        if any(record["neighbourhood_cross_term"] is None for record in records)
        else chained("neighbourhood_cross_term"),
        "diagnostics": {},
        "seconds": {stage: fmean(record["seconds"].get(stage, 0.0) for record in records) for stage in stages},
        "evaluation": evaluation,
        **{key: sum(record[key] for record in records) for key in ("failed_writes", "skipped")},
        "time_s": None,  # peers take the time that they take
        "spans": [],
        "sites_sent": [],
    }


def settings(run: RunData) -> dict[str, Any]:
    """Return the recipe by dotted key: `graph.activation`, `algorithm.name`, `seed`.

    A key that the run's version lacked has its default.
    """
    return {**block_defaults(), **flat(run.recipe)}


def evaluated_labels(recipe: Mapping[str, Any], facts: Mapping[str, Any]) -> list[int]:
    """Return how many of the rows that are evaluated have each class; [] of values, and where a run does not say it.

    A run without `evaluated` among its facts says it only where it evaluates all of its validation rows.
    """
    validation, few = facts.get("validation", {}), recipe.get("evaluate", {}).get("rows")
    all_of_them = {} if few is not None and few < validation.get("rows", 0) else validation
    return list(facts.get("evaluated", all_of_them).get("labels", []))


def varying(runs: Sequence[RunData]) -> list[str]:
    """Return the settings in which the runs differ, sorted; neither the seed nor what can't change a number is one."""
    none = {"seed", *NO_SETTINGS}
    if not any(run.facts.get("peers") for run in runs):
        none |= set(NO_SETTINGS_OF_A_SIMULATION)
    return [key for key in different(runs) if key not in none]


def different(runs: Sequence[RunData]) -> list[str]:
    """Return all keys in which the runs differ, sorted."""
    found = [settings(run) for run in runs]
    keys = sorted({key for values in found for key in values})
    return [key for key in keys if any(values.get(key) != found[0].get(key) for values in found)]
