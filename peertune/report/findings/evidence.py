"""What is known of a run, laid out for the checks that look for what went wrong in it."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from statistics import fmean
from typing import Any

import numpy as np
from numpy.typing import NDArray

from peertune.report.runs import evaluated_labels

Floats = NDArray[np.float64]


@dataclass(frozen=True)
class Facts:
    """What the checks look at: a resolved recipe, `facts.json` and the lines of `rounds.jsonl`."""

    recipe: Mapping[str, Any]
    facts: Mapping[str, Any]
    records: Sequence[Mapping[str, Any]]

    @property
    def method(self) -> str:
        """The algorithm's name."""
        return str(self.recipe["algorithm"]["name"])

    @property
    def rho(self) -> float:
        """The graph's."""
        return float(self.facts["graph"]["rho"])

    @property
    def clients(self) -> int:
        """How many there are."""
        return int(self.recipe["clients"])

    @property
    def private(self) -> bool:
        """Whether rows are private, so that neither their loss nor their classes are told."""
        return self.recipe.get("privacy") is not None

    @cached_property
    def numbers(self) -> list[int]:
        """The K clients whose records these are: all, or peers of whom the directories were read."""
        return sorted({client for record in self.records for client in record["clients"]})

    @cached_property
    def held(self) -> dict[int, Sequence[int]]:
        """How many rows of each class each client holds, where that is known; of private rows how many in all."""
        owners = [peer["client"] for peer in self.facts.get("peers", [])] or range(self.clients)
        return dict(zip(owners, self.facts["partition"]["rows"], strict=False))

    @cached_property
    def exchanges(self) -> bool:
        """Whether anything is ever sent."""
        return self.clients > 1 and any(record["send"] for record in self.records)

    @cached_property
    def loss(self) -> Floats:
        """Each client's loss `[R, K]`, NaN where it wasn't there or isn't told."""
        return self.table("loss")

    @cached_property
    def mean_loss(self) -> Floats:
        """The clients' mean `[R]`, NaN where it isn't told."""
        return np.array([np.mean(record["loss"] or np.nan) for record in self.records])

    @cached_property
    def trained(self) -> list[str]:
        """The factors that each round trains: "A", "B" or "AB"."""
        return ["".join(kind for kind in "AB" if kind in record["train"]) for record in self.records]

    @cached_property
    def contraction(self) -> Floats:
        """Share of the squared disagreement about A and B that a round's mixing left, where it could be measured."""
        rounds = [[r["diagnostics"].get(f"contraction_{kind}") for kind in "AB"] for r in self.records]
        measured = [[value for value in values if value is not None] for values in rounds]
        return np.array([np.mean(values) for values in measured if values])

    @cached_property
    def alone(self) -> NDArray[np.bool_]:
        """Whether a client heard nobody in a round, `[R, K]`."""
        return np.equal(self.table("neighbours"), 0)

    @cached_property
    def commonest(self) -> float | None:
        """The share of the commonest class in the rows evaluated, None if unknown."""
        labels = evaluated_labels(self.recipe, self.facts)
        return max(labels) / sum(labels) if any(labels) else None

    @cached_property
    def constant(self) -> float | None:
        """What the best answer that is the same for all rows scores on the rows last evaluated, None if unknown."""
        final = self.evaluated[-1]["evaluation"] if self.evaluated else {}
        own = final.get("own_constant")
        level: float | None = final.get("constant")
        return fmean(own) if level is None and own else level

    @property
    def ended(self) -> int:
        """How many rounds were reached, those that peers missed among them."""
        return int(self.records[-1]["round"]) + 1 if self.records else 0

    @property
    def evaluated(self) -> list[Mapping[str, Any]]:
        """The records with an evaluation, in order."""
        return [record for record in self.records if record["evaluation"]]

    def table(self, key: str) -> Floats:
        """Lay a list over the clients out as `[R, K]`, NaN for clients that weren't there, and where there is none."""
        values = np.full((len(self.records), len(self.numbers)), np.nan)
        for row, record in zip(values, self.records, strict=True):
            row[np.searchsorted(self.numbers, record["clients"])] = record[key] or np.nan
        return values
