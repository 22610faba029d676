"""Partitions: which client holds which rows.

A partition maps `(split, clients, seed)` to one array of row numbers for each client: int64, sorted, without a row in
common, and never empty. `PARTITIONS` names the factories; a factory's signature is its schema in a recipe. The same
seed gives the same partition, whatever else a run draws.

Those that go by class refuse the labels of a regression, and rows without any.
"""

import logging
from collections.abc import Callable, Sequence
from datetime import date

import numpy as np
from numpy.typing import NDArray

from peertune.data.tables import MissingCells, missing
from peertune.errors import DataError, unknown
from peertune.randomness import Draw, generator
from peertune.types import Split

log = logging.getLogger(__name__)

RowNumbers = NDArray[np.int64]
Partition = Callable[[Split, int, int], list[RowNumbers]]

_REDRAWS = 100


def iid() -> Partition:
    """Deal all rows at random; the clients' sizes differ by one row at most."""

    def split_rows(split: Split, clients: int, seed: int) -> list[RowNumbers]:
        _check_size("iid", split, clients)
        return _sorted(np.array_split(generator(seed, Draw.PARTITION).permutation(len(split)), clients))

    return split_rows


def label_mixture(proportions: list[list[float]]) -> Partition:
    """Give each client its own mixture of the classes, and all clients equally many rows.

    `proportions [clients, classes]` holds each client's share of each class. The shards are as large as the rows of the
    scarcest class allow, all alike: the other rows go to nobody. Counts are those of the largest remainder, so each is
    less than one row off its share. TAD-LoRA (arXiv 2602.00451) skews labels by such lists; its rule for the size of
    the shards is not known to us.
    """

    def split_rows(split: Split, clients: int, seed: int) -> list[RowNumbers]:
        _check_size("label_mixture", split, clients)
        by_class = _by_class("label_mixture", split)
        shares = _check_mixture(proportions, clients, len(by_class))
        available = np.array([len(rows) for rows in by_class])
        # Rounding makes the fit jump about a little with the size, so no formula is exact: go down from a bound on it.
        # Each client's count is less than a row below its share, which is what the bound allows for.
        asked = shares.sum(axis=0)
        fits = (available[asked > 0] + clients) / asked[asked > 0]
        size = min(len(split) // clients, int(fits.min()))
        while size > 0 and (_round(size, shares).sum(axis=0) > available).any():
            size -= 1
        if size == 0:
            scarce = ", ".join(str(number) for number in np.flatnonzero(_round(1, shares).sum(axis=0) > available))
            raise DataError(
                f"partition label_mixture: too few rows of class {scarce} for one row a client, ask for less"
            )
        return _deal(by_class, _round(size, shares), seed)

    return split_rows


def dirichlet(alpha: float = 0.5) -> Partition:
    """Split each class over the clients by shares drawn from a Dirichlet(alpha): the smaller alpha, the more skewed.

    The form in common use (Yurochkin et al., arXiv 1905.12022, section 4), where clients differ in size too; Hsu et al.
    (arXiv 1909.06335) draw each client's mixture of classes instead. Where a client would be left empty, all is drawn
    again, 100 times at most.
    """
    _check_alpha("dirichlet", alpha)

    def split_rows(split: Split, clients: int, seed: int) -> list[RowNumbers]:
        _check_size("dirichlet", split, clients)
        by_class = _by_class("dirichlet", split)
        for attempt in range(_REDRAWS):
            shares = generator(seed, Draw.PARTITION, attempt).dirichlet(np.full(clients, alpha), len(by_class))
            dealt = np.stack([_round(len(rows), share) for rows, share in zip(by_class, shares, strict=True)], axis=1)
            if dealt.sum(axis=1).all():
                return _deal(by_class, dealt, seed)
        raise DataError(
            f"partition dirichlet: a client is left without rows in each of {_REDRAWS} draws, "
            f"choose an alpha above {alpha:g} or fewer clients than {clients}"
        )

    return split_rows


def shards(per_client: int = 2) -> Partition:
    """Sort the rows by class, cut them into equal shards and deal each client `per_client` of them.

    Most clients then hold few classes (McMahan et al., arXiv 1602.05629, section 3).
    """
    if per_client < 1:
        raise DataError(f"partition shards: per_client is {per_client}, give at least 1")

    def split_rows(split: Split, clients: int, seed: int) -> list[RowNumbers]:
        _check_size("shards", split, clients)
        by_class = _by_class("shards", split)
        if len(split) < clients * per_client:
            raise DataError(
                f"partition shards: {clients * per_client} shards can't be cut from {len(split)} rows, "
                f"choose per_client up to {len(split) // clients}"
            )
        rng = generator(seed, Draw.PARTITION)
        pieces = np.array_split(np.concatenate([rng.permutation(rows) for rows in by_class]), clients * per_client)
        dealt = rng.permutation(len(pieces)).reshape(clients, per_client)
        return _sorted([np.concatenate([pieces[piece] for piece in hand]) for hand in dealt])

    return split_rows


def quantity_skew(alpha: float = 1.0) -> Partition:
    """Deal all rows at random in amounts drawn from a symmetric Dirichlet(alpha); each client gets at least one row."""
    _check_alpha("quantity_skew", alpha)

    def split_rows(split: Split, clients: int, seed: int) -> list[RowNumbers]:
        _check_size("quantity_skew", split, clients)
        rng = generator(seed, Draw.PARTITION)
        sizes = 1 + _round(len(split) - clients, rng.dirichlet(np.full(clients, alpha)))
        return _sorted(np.split(rng.permutation(len(split)), np.cumsum(sizes)[:-1]))

    return split_rows


def disjoint_labels() -> Partition:
    """Give the clients classes of their own: the shuffled classes are dealt out in turn, like cards.

    With at most as many clients as classes, no two clients have a class in common. With more clients, each holds a
    single class, and those that hold the same one split its rows evenly at random.
    """

    def split_rows(split: Split, clients: int, seed: int) -> list[RowNumbers]:
        _check_size("disjoint_labels", split, clients)
        by_class = [rows for rows in _by_class("disjoint_labels", split) if len(rows)]
        rng = generator(seed, Draw.PARTITION)
        order = rng.permutation(len(by_class))
        groups = min(clients, len(by_class))
        parts: list[RowNumbers] = [np.empty(0, np.int64)] * clients
        for group in range(groups):
            rows = rng.permutation(np.concatenate([by_class[number] for number in order[group::groups]]))
            holders = range(group, clients, groups)
            if len(rows) < len(holders):
                raise DataError(
                    f"partition disjoint_labels: {len(holders)} clients would share a class of {len(rows)} rows, "
                    f"choose fewer clients than {clients}"
                )
            for client, part in zip(holders, np.array_split(rows, len(holders)), strict=True):
                parts[client] = part
        return _sorted(parts)

    return split_rows


def column(by: str, leave_out: list[str | int] | None = None, *, missing_cells: MissingCells = "refuse") -> Partition:
    """Keep together the rows that have the same value in a column, such as an author or a topic.

    Values are the same that are written alike. They go to the clients from the most frequent to the rarest, each to the
    client with the fewest rows so far; the values in `leave_out` go to nobody. Nothing is random here: the seed changes
    nothing. By `missing_cells` rows without a value are refused, go to nobody (`drop`), or belong together (`empty`).
    """
    return _by_value("column", by, leave_out or [], missing_cells)


def writers(leave_out: list[str | int] | None = None) -> Partition:
    """Keep together the rows that one hand wrote, as the task `digits` has them: `column` by `writer`.

    A natural shift of features with even labels. Rows of the writers in `leave_out` go to nobody.
    """
    return _by_value("writers", "writer", leave_out or [], "refuse")


def _by_value(name: str, by: str, leave_out: Sequence[str | int], missing_cells: MissingCells) -> Partition:
    def split_rows(split: Split, clients: int, seed: int) -> list[RowNumbers]:
        _check_size(name, split, clients)
        if by not in split.columns:
            raise DataError(unknown(f"partition {name}: by", by, split.columns))
        groups: dict[str, list[int]] = {}
        for row, value in enumerate(split.columns[by]):
            if not isinstance(value, str | int | float | date | np.integer | None):
                raise DataError(
                    f"partition {name}: {by} holds {type(value).__name__}s, choose a column of texts or numbers"
                )
            groups.setdefault("" if missing(value) else str(value), []).append(row)
        lacking = groups.get("", [])
        if lacking and missing_cells == "refuse":
            raise DataError(
                f"partition {name}: no {by} in {len(lacking):,} of {len(split):,} rows ({split.called(lacking[0])} "
                "first); missing_cells=drop gives these rows to nobody, missing_cells=empty keeps them together"
            )
        if lacking and missing_cells == "drop":
            del groups[""]
            log.warning(
                f"partition {name}: no {by} in {len(lacking):,} of {len(split):,} rows, "
                "which go to nobody (missing_cells)"
            )
        for value in map(str, leave_out):
            if groups.pop(value, None) is None:
                raise DataError(unknown(f"partition {name}: leave_out", value, groups))
        if len(groups) < clients:
            raise DataError(
                f"partition {name}: {by} has {len(groups)} different values for {clients} clients, "
                f"choose {len(groups)} clients or fewer"
            )
        parts: list[list[int]] = [[] for _ in range(clients)]
        for rows in sorted(groups.values(), key=len, reverse=True):
            min(parts, key=len).extend(rows)
        return _sorted(parts)

    return split_rows


def fold(part: str, rows: int) -> RowNumbers:
    """Return those of a split's `rows` that are in part `k/n`, sorted; the n parts differ by one row at most.

    No seed changes them, and no client: a row is in the same fold in every run. Raises DataError for too few rows.
    """
    number, of = map(int, part.split("/"))
    if of > rows:
        raise DataError(f"fold {part}: {rows:,} rows make no {of:,} folds; give {rows:,} or fewer")
    return np.sort(generator(0, Draw.FOLD).permutation(rows)[number - 1 :: of])


def part(where: str, share: float | str, rows: int) -> RowNumbers:
    """Return those of a split's `rows` that are a share of them, or a fold `k/n`, sorted; as of `fold` no seed's.

    Raises DataError for what is neither, and where a share leaves no row on one side.
    """
    if isinstance(share, str):
        number, _, of = share.partition("/")
        if not (number.isdecimal() and of.isdecimal() and 1 <= int(number) <= int(of) >= 2):
            raise DataError(
                f"{where}: {share!r} is no fold; give k/n, k from 1 to n, such as 2/5, or a share such as .1"
            )
        return fold(share, rows)
    count = round(share * rows)
    if not 0 < share < 1 or not 0 < count < rows:
        raise DataError(
            f"{where}: {share:g} of {rows:,} rows is {count:,}; give a share with rows on both sides, or a fold k/n"
        )
    return np.sort(generator(0, Draw.FOLD).permutation(rows)[:count])


PARTITIONS: dict[str, Callable[..., Partition]] = {
    "column": column,
    "dirichlet": dirichlet,
    "disjoint_labels": disjoint_labels,
    "iid": iid,
    "label_mixture": label_mixture,
    "quantity_skew": quantity_skew,
    "shards": shards,
    "writers": writers,
}


def counts(split: Split, parts: Sequence[RowNumbers], classes: int) -> RowNumbers:
    """Count each client's rows of each class: `[clients, classes]`; DataError for rows without classes."""
    _check_classes("counts", split)
    return np.stack([np.bincount(split.labels[rows], minlength=classes) for rows in parts])


def _check_size(partition: str, split: Split, clients: int) -> None:
    if not 1 <= clients <= len(split):
        raise DataError(f"partition {partition}: {clients} clients for {len(split)} rows, give 1 to {len(split)}")


def _check_classes(partition: str, split: Split) -> None:
    if split.labels.dtype.kind != "i":
        raise DataError(
            f"partition {partition}: it goes by class and the rows have none, choose iid, quantity_skew or column"
        )


def _check_alpha(partition: str, alpha: float) -> None:
    if not 0 < alpha <= 1e6:  # beyond, all shares are alike, and at last overflow
        raise DataError(f"partition {partition}: alpha is {alpha:g}, give a number above 0, at most a million")


def _check_mixture(proportions: list[list[float]], clients: int, classes: int) -> NDArray[np.float64]:
    """Return the shares `[clients, classes]`, each row with a sum of exactly 1 up to rounding."""
    where = "partition label_mixture: proportions"
    if len(proportions) != clients:
        raise DataError(f"{where} has {len(proportions)} rows for {clients} clients, give one a client")
    for client, row in enumerate(proportions):
        if len(row) != classes:
            raise DataError(f"{where}: row {client} has {len(row)} shares for {classes} classes, give one a class")
        if not (min(row) >= 0 and abs(sum(row) - 1) <= 1e-6):
            raise DataError(f"{where}: row {client} is {row}, give shares of at least 0 with a sum of 1")
    shares = np.array(proportions, np.float64)
    shares /= shares.sum(axis=1, keepdims=True)
    return shares


def _by_class(partition: str, split: Split) -> list[RowNumbers]:
    """Return the row numbers of each class, from class 0 to the highest there is."""
    _check_classes(partition, split)
    return [np.flatnonzero(split.labels == number) for number in range(int(split.labels.max()) + 1)]


def _round(total: int, shares: NDArray[np.float64]) -> RowNumbers:
    """Split `total` by shares `[…, C]` that sum to 1 into whole numbers; the largest remainders are rounded up."""
    quotas = total * shares
    whole = np.floor(quotas).astype(np.int64)
    left = total - whole.sum(axis=-1, keepdims=True)
    ranks = np.argsort(np.argsort(whole - quotas, axis=-1, kind="stable"), axis=-1)
    whole += ranks < left
    return whole


def _deal(by_class: list[RowNumbers], amounts: RowNumbers, seed: int) -> list[RowNumbers]:
    """Deal each class's rows at random by `amounts [clients, classes]`; what is not asked for goes to nobody."""
    rng = generator(seed, Draw.PARTITION)
    hands = [
        np.split(rng.permutation(rows), np.cumsum(taken))[:-1] for rows, taken in zip(by_class, amounts.T, strict=True)
    ]
    return _sorted([np.concatenate(hand) for hand in zip(*hands, strict=True)])


def _sorted(parts: Sequence[Sequence[int] | RowNumbers]) -> list[RowNumbers]:
    return [np.sort(np.asarray(part, np.int64)) for part in parts]
