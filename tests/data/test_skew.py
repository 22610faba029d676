"""How unlike clients are, against closed forms, SciPy's distance, and features that are shifted or not."""

from collections.abc import Iterator
from math import log2

import numpy as np
import pytest
from numpy.typing import NDArray
from scipy.spatial.distance import jensenshannon

from peertune.data.partition import PARTITIONS, counts
from peertune.data.skew import divergence_by_chance, divergences, effective_clients, tell_apart
from peertune.errors import DataError
from peertune.types import Split

Counts = NDArray[np.int64]


def of(table: Counts) -> NDArray[np.float64]:
    return divergences(table, table.sum(axis=0))


def tables() -> Iterator[Counts]:
    """Rows of each class by client, some classes at nobody, each client with a row."""
    for seed in range(60):
        draw = np.random.default_rng(seed)
        clients, classes = draw.integers(1, 7), draw.integers(1, 6)
        table = draw.integers(0, 30, (clients, classes)) * draw.integers(0, 2, (clients, classes))
        table[np.arange(clients), draw.integers(0, classes, clients)] += 1
        yield table


def test_the_divergence_is_the_square_of_scipys_distance() -> None:
    for table in tables():
        pool = table.sum(axis=0)
        with np.errstate(invalid="ignore"):  # of equal shares SciPy may take the root of what rounding leaves
            distances = [jensenshannon(row / row.sum(), pool / pool.sum(), base=2) for row in table]
        assert of(table) == pytest.approx(np.nan_to_num(distances) ** 2, abs=1e-12)


def test_neither_names_of_classes_nor_sizes_nor_missing_classes_change_it() -> None:
    for seed, table in enumerate(tables()):
        found, pool = of(table), table.sum(axis=0)
        assert ((found >= 0) & (found <= 1)).all()
        assert of(table[:, np.random.default_rng(seed).permutation(len(pool))]) == pytest.approx(found)
        assert of(np.insert(table, 0, 0, axis=1)) == pytest.approx(found)
        assert divergences(table * np.arange(1, len(table) + 1)[:, None], pool) == pytest.approx(found)


@pytest.mark.parametrize("clients", [2, 3, 10])
def test_clients_without_a_class_in_common_have_the_closed_form(clients: int) -> None:
    own, other = (1 + 1 / clients) / 2, 1 / (2 * clients)  # of the mean of a client's shares and all clients'
    expected = -log2(own) / 2 + (log2(1 / clients / own) / clients + (1 - 1 / clients) * log2(1 / clients / other)) / 2
    assert of(np.eye(clients, dtype=np.int64) * 7) == pytest.approx([expected] * clients)


def test_shares_like_those_of_all_diverge_by_nothing_and_few_rows_by_what_chance_does() -> None:
    assert of(np.array([[3, 6, 9], [1, 2, 3], [10, 20, 30]])) == pytest.approx([0, 0, 0], abs=1e-15)
    labels = np.repeat(np.arange(4), 500)
    dealt = PARTITIONS["iid"]()(Split({}, labels), 20, 0)
    table = counts(Split({}, labels), dealt, 4)
    chance = divergence_by_chance(table, 0)
    assert of(table).mean() == pytest.approx(chance, rel=0.3)
    assert chance == pytest.approx(3 / (8 * 100 * np.log(2)), rel=0.1)  # (C - 1) / (8 n ln 2)
    assert divergence_by_chance(table, 0) == chance


def test_a_client_without_rows_is_refused() -> None:
    with pytest.raises(DataError, match=r"label skew: client 1 has no rows; give each client one"):
        of(np.array([[1, 2], [0, 0]]))


def test_effective_clients_are_all_where_they_are_even_and_one_where_one_holds_nearly_all() -> None:
    assert effective_clients(np.array([7] * 12)) == pytest.approx(12)
    assert effective_clients(np.array([5])) == 1
    assert effective_clients(np.array([1_000_000, 1, 1])) == pytest.approx(1, abs=1e-5)
    assert effective_clients(np.array([3, 1])) == pytest.approx(16 / 10)


def rows(shift: float, sizes: tuple[int, ...] = (60, 60, 60)) -> NDArray[np.float64]:
    """Noise of eight features, in which each owner's rows lie this far off in a direction of its own."""
    owners = np.repeat(np.arange(len(sizes)), sizes)
    return np.random.default_rng(0).normal(size=(len(owners), 8)) + shift * np.eye(8)[owners]


def test_a_shift_of_features_is_told_and_noise_is_not() -> None:
    owners = np.repeat([2, 5, 9], [60, 60, 60])
    told, noise = tell_apart(rows(8.0), owners), tell_apart(rows(0.0), owners)
    assert told.share > 0.99
    assert min(told.clients) > 0.95
    assert told.chance == noise.chance == pytest.approx(1 / 3)
    assert noise.share < 0.45  # 180 rows: three standard deviations are .11
    assert (told.by_label, len(told.clients)) == (None, 3)
    uneven = tell_apart(rows(0.0, sizes=(120, 40, 20)), np.repeat([0, 1, 2], [120, 40, 20]))
    assert uneven.chance == pytest.approx(2 / 3)


def test_names_of_owners_and_scales_of_features_change_nothing() -> None:
    owners, done = np.repeat([0, 1, 2], 60), list[int]()
    told = tell_apart(rows(1.0), owners, each=done.append)
    assert done == [1, 2, 3, 4, 5]
    other = tell_apart(rows(1.0) * 10.0 ** np.arange(-4, 4) + 5, owners + 40)
    assert other == told


def test_what_labels_alone_tell_stands_beside_what_features_tell() -> None:
    """Features that show the class and nothing else tell clients of one class each, without any shift."""
    owners = np.repeat([0, 1, 2], 60)
    told = tell_apart(rows(8.0), owners, labels=np.repeat([1, 0, 1], 60))
    assert told.by_label == pytest.approx(2 / 3, abs=0.02)
    alike = tell_apart(rows(0.0), owners, labels=np.tile([0, 1], 90))
    assert alike.by_label is not None
    assert alike.by_label <= 0.4


@pytest.mark.parametrize(
    ("owners", "said"), [([0] * 12, "1 clients, the smallest with 12"), ([0] * 12 + [1] * 4, "2 clients, the smallest")]
)
def test_a_single_owner_or_one_of_too_few_rows_is_refused(owners: list[int], said: str) -> None:
    with pytest.raises(DataError, match=f"probe: {said}"):
        tell_apart(np.zeros((len(owners), 2)), np.array(owners))
