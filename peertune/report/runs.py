"""Runs as they lie on disk, for all that looks at them: only what their directories hold, no data set and no model."""

import json
import logging
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import yaml

from peertune import tracking
from peertune.errors import RunError
from peertune.recipe import flat

log = logging.getLogger(__name__)


@dataclass(frozen=True)
class RunData:
    """A run directory, read."""

    folder: Path
    name: str  # short, and unique among the runs that were read together
    recipe: dict[str, Any]  # resolved.yaml
    facts: dict[str, Any]  # facts.json
    environment: dict[str, Any]  # environment.json
    records: list[dict[str, Any]]  # lines of rounds.jsonl, those that are damaged left out


def find_runs(folders: Sequence[Path]) -> list[RunData]:
    """Read the runs in these folders, each a run or one that holds runs at any depth, sorted within each.

    One of several that can't be read is left out with a warning. Raises RunError for a folder without runs, and where
    none can be read.
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
    return read


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
    return RunData(folder, name, recipe, facts, environment, tracking.records(folder))


def settings(run: RunData) -> dict[str, Any]:
    """Return the recipe by dotted key: `graph.activation`, `algorithm.name`, `seed`."""
    return flat(run.recipe)


def varying(runs: Sequence[RunData]) -> list[str]:
    """Return the keys in which the runs differ, sorted; the seed is none of them."""
    found = [settings(run) for run in runs]
    keys = sorted({key for values in found for key in values} - {"seed"})
    return [key for key in keys if any(values.get(key) != found[0].get(key) for values in found)]
