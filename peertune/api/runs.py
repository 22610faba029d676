"""Runs as values: what their directories hold, and what the commands that look at runs make of it."""

import shutil
from collections.abc import Mapping, Sequence
from dataclasses import fields
from math import inf
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple

from peertune.errors import PeertuneError, RunError
from peertune.files import check_absent, written_folder
from peertune.report import costs, tables
from peertune.report.environments import Difference, differences
from peertune.report.findings.diagnosis import diagnose
from peertune.report.findings.finding import Finding
from peertune.report.pairing import Row
from peertune.report.runs import RunData, find_runs, settings, varying
from peertune.report.spending import judged
from peertune.report.verdict import Verdict, ordered, verdicts
from peertune.rounds.record import SCORES_OF_CLIENTS

if TYPE_CHECKING:  # what only reads records spares itself torch
    from peertune.types import State, Tensors


class Exported(NamedTuple):
    """Where an adapter was written to."""

    folder: Path
    precision: str | None  # of the weights of a merged model
    address: str | None  # on the hub
    lost: float = 0.0  # of the norm of its products, where a lower rank was asked for


class Run(RunData):
    """A run as its directory has it: `folder`, `name`, `recipe`, `facts`, `environment` and `records`.

    It is read once; `Run.open(run.folder)` reads what a run that goes on has written since. Peers' parts of one run,
    in one folder, are one run.
    """

    @classmethod
    def open(cls, folder: str | Path) -> "Run":
        """Read the run in this directory. Raises RunError where it holds none, or several."""
        found = find_runs([Path(folder)])
        if len(found) > 1:
            raise RunError(f"{folder}: holds {len(found)} runs; give the folder of one, or take Runs.open")
        return _run(found[0])

    @property
    def summary(self) -> dict[str, Any]:
        """The run in one row, as the command `run --json` tells it; see `peertune.report.tables.summarise`."""
        return tables.summarise(self.records)

    @property
    def adapters(self) -> "Tensors":
        """The clients' adapters in the newest checkpoint, a stack: name → `[K, …]`, such as `<module path>.A`.

        Raises RunError where there is no checkpoint yet.
        """
        return newest(self.folder).adapters

    @property
    def findings(self) -> list[Finding]:
        """What went wrong in plain words, or that nothing did, as the command `diagnose` tells it."""
        return diagnose(self.recipe, self.facts, self.records)

    def save(self, folder: str | Path) -> "Run":
        """Copy the run directory, and return the run there. Raises RunError where something is there already."""
        to = Path(folder)
        check_absent(to)
        with written_folder(to) as beside:
            shutil.copytree(self.folder, beside, dirs_exist_ok=True, ignore=shutil.ignore_patterns(".*"))
        return Run.open(to)

    def export(
        self,
        to: str | Path,
        client: int | None = None,
        *,
        last: bool = False,
        merge: bool = False,
        push: str | None = None,
        private: bool = False,
        rank: int | None = None,
    ) -> "Exported":
        """Write one adapter of the newest checkpoint as a folder that PEFT loads, as `peertune export` does.

        Args:
            to: The folder to write, with a README.md.
            client: A client's number; None: the average of all.
            last: Of a run that kept each client's best adapter, write its last one; any other is refused.
            merge: Write the whole model, the adapter added to its base.
            push: OWNER/NAME on the Hugging Face hub, to put it there as well.
            private: For its owner alone to see.
            rank: Write the nearest adapter of this rank.

        Raises:
            RunError: For a client that isn't there, a folder that is, and where the hub refuses.

        """
        from peertune.report.card import card
        from peertune.runs import exports, hub

        place = Path(to)
        if push is not None:
            hub.check_push(push)
        state = newest(self.folder)
        with exports.written(self.folder, state, client, place, last=last, rank=rank) as (folder, lost):
            made, own = exports.rounds_behind(folder, state), exports.own_rank(self.folder, folder, rank)
            precision = hub.merge(self.folder, folder) if merge else None
            readme = card(self, push or place.name, client, made, precision, own)
            (folder / "README.md").write_text(readme, encoding="utf-8")
            address = None if push is None else hub.push(folder, push, private=private)
        return Exported(place, precision, address, lost)

    def to_dataframe(self) -> Any:
        """Return a pandas.DataFrame with a row for each client and round.

        Columns: `round`, `client`, `loss`, `grad_norm`, `bytes_sent`, `neighbours` (how many it heard), where rows are
        private no loss (where clients are, no `grad_norm` either) and `epsilon`, what was spent, and of rounds that
        were evaluated `score`, by the recipe's metric, the scores by its other metrics, under their names, and what
        else there is of `SCORES_OF_CLIENTS`; elsewhere NaN. Raises PeertuneError where pandas is not installed.
        """
        return _frame([row for record in self.records for row in _rows(record)])


class Runs(tuple[Run, ...]):
    """Several runs, in order: of a sweep, or any that are to be compared."""

    __slots__ = ()

    @classmethod
    def open(cls, *folders: str | Path) -> "Runs":
        """Read the runs in these folders, each a run or one that holds runs at any depth, sorted within each.

        One of several that can't be read is left out with a warning. Raises RunError for a folder without runs, and
        where none can be read.
        """
        return cls(map(_run, find_runs([Path(folder) for folder in folders])))

    def compare(
        self,
        by: Sequence[str] | None = None,
        paired_with: str | None = None,
        *,
        to: float | None = None,
        budget_bytes: float | None = None,
        within_s: float | None = None,
    ) -> list[dict[str, Any]]:
        """Put runs that differ in their seed alone together, the best first; rows of `peertune.report.tables.compare`.

        Args:
            by: Keys of the recipe that make a row, such as `algorithm.name`; where not given, those in which the runs
                differ.
            paired_with: The value whose runs others are held against, seed by seed, such as `dec_lora`.
            to: A score; each row then has `to`, what it took to reach it (`peertune.report.costs.reach`).
            budget_bytes: What a client may send, in the mean over clients; each row then has `within`, the best until
                then (`peertune.report.costs.limit`).
            within_s: The same of virtual seconds; given both, both hold.

        Raises:
            RunError: As `peertune.report.tables.compare`; for a limit that isn't above 0, and for one of time where
                a run has no virtual times.

        """
        rows = self._grouped(by, paired_with)
        rows = rows if to is None else costs.reach(rows, self, to)
        if budget_bytes is not None or within_s is not None:
            megabytes = inf if budget_bytes is None else budget_bytes / 1e6
            rows = costs.limit(rows, self, megabytes, inf if within_s is None else within_s)
        return tables.told(rows)

    def verdicts(self, by: Sequence[str] | None = None) -> list[Verdict]:
        """Say which setting is best, and whether its lead is more than the seeds' noise; `str` makes lines of them."""
        return verdicts(self._grouped(by))

    def differences(self, by: Sequence[str] | None = None) -> list[Difference]:
        """Say where the runs differ in what numbers depend on beside settings, seeds and rows, such as base and CPU.

        `str` makes lines of them, which `compare` logs. What the settings `by` tell apart is no difference.
        """
        return differences(self, tables.default_keys(self) if by is None else by)

    def report(self, file: str | Path, figures: str | Path | None = None) -> list[Path]:
        """Write one HTML file, and each figure as PNG and SVG into a folder `figures`; return what was written."""
        from peertune.files import write_file
        from peertune.report.figures import write_figures
        from peertune.report.html import page

        text = page(self, {run.name: run.findings for run in self})
        write_file(Path(file), text.encode())
        return [Path(file), *(write_figures(self, Path(figures)) if figures is not None else [])]

    def to_dataframe(self) -> Any:
        """Return a pandas.DataFrame with a row for each run.

        Columns: `run`, its name, the settings in which they differ, the seed, and the keys of `Run.summary`, those of
        other metrics as `macro_f1.mean`. Raises PeertuneError where pandas is not installed.
        """
        keys = list(dict.fromkeys([*varying(self), "seed"]))
        told = [(run, settings(run)) for run in self]
        return _frame(
            [{"run": run.name} | {key: own.get(key) for key in keys} | _flat(run.summary) for run, own in told]
        )

    def _grouped(self, by: Sequence[str] | None, paired_with: str | None = None) -> list[Row]:
        return ordered(tables.grouped(self, by, paired_with))


def newest(run: Path) -> "State":
    """Return the state in the newest checkpoint of a run. Raises RunError where there is none yet."""
    from peertune.runs import checkpoints

    state = checkpoints.load(run)
    if state is None:
        raise RunError(f"{run}: holds no checkpoint; give the folder of a run that has got to its first one")
    return state


def _run(data: RunData) -> Run:
    return Run(**{field.name: getattr(data, field.name) for field in fields(data)})


def _flat(summary: Mapping[str, Any]) -> dict[str, Any]:
    """Return a summary with the keys of the other metrics beside its own."""
    found = {key: value for key, value in summary.items() if key != "also"}
    also = summary.get("also", ())
    return found | {f"{each['metric']}.{key}": value for each in also for key, value in each.items() if key != "metric"}


def _rows(record: Mapping[str, Any]) -> list[dict[str, Any]]:
    """Return what a record says of each client that ended the round, or was judged."""
    told = ("loss", "grad_norm", "bytes_sent", "neighbours", "epsilon")
    found = {name: record[name] for name in told if record[name]}
    scores = {}
    if evaluation := record["evaluation"]:
        scores = {name: evaluation[name] for name in SCORES_OF_CLIENTS if evaluation[name]}
        scores = {"score" if name == "clients" else name: values for name, values in scores.items()}
        scores |= {metric["metric"]: metric["clients"] for metric in evaluation["also"]}
    rows: dict[int, dict[str, Any]] = {}
    for whose, lists in ((record["clients"], found), (judged(record), scores)):
        for place, client in enumerate(whose):
            row = rows.setdefault(client, {"round": record["round"], "client": client})
            row |= {name: values[place] for name, values in lists.items()}
    return list(rows.values())


def _frame(rows: Sequence[Mapping[str, Any]]) -> Any:
    try:
        import pandas
    except ImportError:
        raise PeertuneError("to_dataframe: pandas is not installed; pip install 'peertune[pandas]'") from None
    return pandas.DataFrame(rows)
