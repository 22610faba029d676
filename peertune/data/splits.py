"""Which rows of a source train, which validate, and which are kept for the end, to test."""

from collections.abc import Collection, Sequence
from dataclasses import replace
from typing import Any, NamedTuple

import numpy as np

from peertune.data.partition import part
from peertune.errors import DataError
from peertune.types import Split


class Splits(NamedTuple):
    """The splits of a source, by what they are for."""

    train: str
    validation: tuple[str, ...]  # under any of these names
    share: float | str | None = None  # `validation_split`: what of `train` validates in the place of a split
    test: str | None = None

    def check(self, where: str) -> None:
        """Raise DataError where one split has two uses, or both a split and a share of rows validate."""
        named, told = self.validation[0], f"train and validation are both {self.train}"
        if self.train in self.validation:
            raise DataError(f"{where}: {told}; hold some rows out, in a split of their own, or by validation_split=0.1")
        if self.share is not None and named != "validation":
            raise DataError(f"{where}: validation={named} and validation_split say both what validates; give one")
        if self.test == self.train or (self.test in self.validation and self.share is None):
            use = "train" if self.test == self.train else "validate"
            raise DataError(f"{where}: test is {self.test}, whose rows {use}; give test a split of its own")

    def wanted(self, where: str, there: Collection[str]) -> list[tuple[str, ...]]:
        """Return what is to be read of the splits that are `there`: each under any of some names.

        Raises DataError where rows of `train` are to validate, and there is a split for it, or where none validates.
        """
        left_open = self.share is None and self.validation[0] == "validation"
        if left_open and self.train in there and not any(name in there for name in self.validation):
            raise DataError(
                f"{where}: there is no split validation to validate on, but {', '.join(sorted(there))}; name another, "
                f"or have rows of {self.train} validate by validation_split=0.1"
            )
        test = self.validation if self.test in self.validation else (self.test,) if self.test is not None else None
        idle = None if self.share is None else next((name for name in self.validation if name in there), None)
        if idle is not None and test != self.validation:
            raise DataError(
                f"{where}: validation_split takes rows of {self.train}, and there is {idle} to validate on; "
                f"leave validation_split out, or give test={idle}"
            )
        validation = [self.validation] if self.share is None else []
        return [(self.train,), *validation, *([test] if test is not None else [])]

    def origin(self, use: str) -> str:
        """Return in which of the splits that are read the rows are that `train`, are for `validation`, or `test`."""
        if use == "test":
            return self.validation[0] if self.test in self.validation else str(self.test)
        return self.train if use == "train" or self.share is not None else self.validation[0]

    def dealt(self, where: str, read: Sequence[Split]) -> dict[str, Any]:
        """Return the splits of a task, by its fields, of those that were read, in the order of `wanted`.

        No seed changes which rows validate. Raises DataError where `train` has too few.
        """
        train, *others = read
        if self.share is None:
            validation, *others = others
        else:
            rows = part(f"{where}: validation_split", self.share, len(train))
            validation = replace(train.take(rows, train.columns), left_out=0)
            train = train.take(np.setdiff1d(np.arange(len(train)), rows), train.columns)
        return {"train": train, "validation": validation, "test": others[0] if others else None}
