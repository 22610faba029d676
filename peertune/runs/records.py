"""The records of a run, `rounds.jsonl`: a line a round, and its long lists in a file beside it."""

import json
import logging
import re
from collections.abc import Container, Iterator, Mapping
from dataclasses import MISSING, asdict, fields, replace
from pathlib import Path
from typing import Any

import numpy as np
from safetensors import SafetensorError, safe_open
from safetensors.numpy import save

from peertune.errors import RunError
from peertune.files import append_line, reported, write_file
from peertune.rounds.record import Evaluation, RoundRecord
from peertune.runs.directory import peer

log = logging.getLogger(__name__)

LONGEST_LIST = 1_000
"""Values up to which a list of a record stands in its line of `rounds.jsonl`; longer ones go to a file beside it."""
_NUMBERS = (
    "clients",
    "evaluation.judged",
    "edges",
    "failed_edges",
    "vacant_edges",
    "not_mixed",
    "taken",
    "out_of_phase",
    "suspects",
    "spans",
    "sites_sent",
)
"""Lists of clients' numbers, of which the line keeps the length; of measured values it keeps the mean."""


def append(folder: Path, record: RoundRecord) -> None:
    """Add a record to `rounds.jsonl`; its long lists go to a file of their own, which is written first.

    Raises RunError where it can't be written; then the file is as before.
    """
    values = asdict(replace(record, state=None))
    del values["state"]
    long = {name: np.asarray(x) for name, x in _lists(values) if len(x) > LONGEST_LIST}
    if long:
        file = _long_lists(folder, record.round)
        with reported(file):
            file.parent.mkdir(exist_ok=True)
        write_file(file, save(long))
        for name, x in long.items():
            _put(values, name, len(x) if name in _NUMBERS else float(x.mean()))
        values["long"] = sorted(long)
    append_line(folder / "rounds.jsonl", json.dumps(values))


def _long_lists(folder: Path, round: int) -> Path:
    return folder / "rounds" / f"round-{round:06d}.safetensors"


def _lists(values: Mapping[str, Any], prefix: str = "") -> Iterator[tuple[str, list[Any]]]:
    """Yield a record's lists by name: `loss`, `evaluation.clients`, `evaluation.also.0.clients` of another metric."""
    for key, value in values.items():
        if key == "also":
            value = dict(enumerate(value))
        if isinstance(value, Mapping):
            yield from _lists(value, f"{prefix}{key}.")
        elif isinstance(value, list):
            yield f"{prefix}{key}", value


def _put(values: dict[str, Any], name: str, value: Any) -> None:
    """Put something in the place of one of these lists."""
    *blocks, last = name.split(".")
    found: Any = values
    for block in blocks:
        found = found[int(block) if isinstance(found, list) else block]
    found[last] = value


def _looked_at(name: str, lists: Container[str] | None) -> bool:
    return lists is None or re.sub(r"\balso\.\d+\.", "", name) in lists


def read(folder: Path, lists: Container[str] | None = None) -> list[dict[str, Any]]:
    """Read `rounds.jsonl`, a record for each round in order, with its long lists in their places.

    Given `lists`, only long lists of these names are read, such as `evaluation.clients`, which stands for those of the
    other metrics, too; the others stay what the line has, a mean or a length.

    A line that is damaged, or whose long lists are, is left out with a warning; a last line that was cut off is no
    record. Raises RunError where the file isn't there.
    """
    found = []
    for record, _ in _lines(folder):
        try:
            if "long" in record:
                with safe_open(_long_lists(folder, record["round"]), framework="np") as held:
                    for name in record.pop("long"):
                        if _looked_at(name, lists):
                            _put(record, name, held.get_tensor(name).tolist())
            found.append(record)
        except (OSError, ValueError, TypeError, KeyError, SafetensorError):
            log.warning("%s/rounds: round %s is missing or damaged and left out; restore it", folder, record["round"])
    return found


def _lines(folder: Path) -> Iterator[tuple[dict[str, Any], str]]:
    """Yield each record as its line has it, and the line."""
    try:
        lines = (folder / "rounds.jsonl").read_text(errors="replace").splitlines()
    except OSError:
        raise RunError(f"{folder}: no readable rounds.jsonl; give the folder of a run") from None
    next_round = 0
    for number, line in enumerate(lines, start=1):
        try:
            record = _whole(json.loads(line), RoundRecord)
            if record["evaluation"] is not None:
                evaluation = record["evaluation"] = _whole(record["evaluation"], Evaluation)
                evaluation["also"] = [_whole(metric, Evaluation) for metric in evaluation["also"]]
            if record["round"] < next_round:
                raise ValueError("a round stands twice")
        except (ValueError, TypeError, KeyError, AttributeError):
            if number < len(lines):
                log.warning("%s/rounds.jsonl: line %d is damaged and left out; restore the file", folder, number)
            continue
        next_round = record["round"] + 1
        yield record, line


def _whole(values: dict[str, Any], of: type[RoundRecord] | type[Evaluation]) -> dict[str, Any]:
    """Return what a line says, with the defaults of the fields that it lacks, as versions that lack them write it.

    What no field of this version is for is kept. Raises KeyError where a field is missing that has no default.
    """
    found = dict(values)
    for field in fields(of):
        if field.name not in found and field.name != "state":
            made = field.default if field.default_factory is MISSING else field.default_factory()
            if made is MISSING:
                raise KeyError(field.name)
            found[field.name] = made
    return found


def rewind(folder: Path, round: int) -> None:
    """Forget the records from `round` on: they will be made again. Raises RunError where one before it is missing.

    A peer may have missed rounds: its records have gaps.
    """
    kept = [(record["round"], line) for record, line in _lines(folder) if record["round"] < round]
    whole = next((t for t, (number, _) in enumerate(kept) if number != t), len(kept))
    if whole < round and peer(folder) is None:
        raise RunError(
            f"{folder}/rounds.jsonl: has no record of round {whole}, which the checkpoint round-{round:06d} follows; "
            "restore the file, or remove the checkpoint to go on from an older one"
        )
    write_file(folder / "rounds.jsonl", "".join(f"{line}\n" for _, line in kept).encode())
