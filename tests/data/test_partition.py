from collections.abc import Callable
from math import nan
from typing import Any

import numpy as np
import pytest
from hypothesis import assume, given, settings
from hypothesis import strategies as st
from numpy.typing import NDArray

from peertune.data.partition import PARTITIONS, Partition, counts
from peertune.errors import DataError
from peertune.types import Split

# The lists of the TAD-LoRA paper, for 10 clients.
BINARY = 3 * [[0.9, 0.1]] + 3 * [[0.1, 0.9]] + 4 * [[0.5, 0.5]]
THREE_WAY = 4 * [[0.9, 0.05, 0.05]] + 3 * [[0.05, 0.9, 0.05]] + 3 * [[0.05, 0.05, 0.9]]

# What makes each row of PARTITIONS for so many clients and classes.
ARGUMENTS: dict[str, Callable[[int, int], dict[str, Any]]] = {
    "column": lambda clients, classes: {"by": "author"},
    "dirichlet": lambda clients, classes: {"alpha": 1.0},
    "disjoint_labels": lambda clients, classes: {},
    "iid": lambda clients, classes: {},
    "label_mixture": lambda clients, classes: {"proportions": mixture(clients, classes)},
    "quantity_skew": lambda clients, classes: {"alpha": 0.5},
    "shards": lambda clients, classes: {"per_client": 2},
    "writers": lambda clients, classes: {},
}
BY_COLUMN = {"column", "writers"}
BY_CLASS = sorted(set(ARGUMENTS) - BY_COLUMN - {"iid", "quantity_skew"})


def mixture(clients: int, classes: int) -> list[list[float]]:
    """Half of each client's rows of one class, the rest even."""
    return [
        [0.5 / classes + 0.5 * (number == client % classes) for number in range(classes)] for client in range(clients)
    ]


def made(*sizes: int) -> Split:
    """A split with so many rows of each class, shuffled, by 40 authors."""
    rng = np.random.default_rng(len(sizes))
    labels = rng.permutation(np.repeat(np.arange(len(sizes)), sizes))
    authors = [f"author {row % 40}" for row in range(len(labels))]
    return Split({"author": authors, "writer": authors}, labels)


def make(name: str, clients: int, classes: int) -> Partition:
    return PARTITIONS[name](**ARGUMENTS[name](clients, classes))


def same(one: list[NDArray[np.int64]], other: list[NDArray[np.int64]]) -> bool:
    return all(np.array_equal(a, b) for a, b in zip(one, other, strict=True))


def skew(split: Split, parts: list[NDArray[np.int64]], classes: int) -> float:
    """How far the clients' shares of the classes are from those of all rows, on average."""
    table = counts(split, parts, classes)
    shares = table / table.sum(axis=1, keepdims=True)
    return float(np.abs(shares - table.sum(axis=0) / table.sum()).mean())


def test_every_partition_is_tried() -> None:
    assert sorted(ARGUMENTS) == sorted(PARTITIONS) == list(PARTITIONS)


@pytest.mark.parametrize("name", PARTITIONS)
@settings(max_examples=25)
@given(
    clients=st.integers(1, 12),
    sizes=st.lists(st.integers(12, 80), min_size=2, max_size=6),
    seed=st.integers(-(2**40), 2**70),
)
def test_clients_hold_rows_of_their_own(name: str, clients: int, sizes: list[int], seed: int) -> None:
    split = made(*sizes)
    assume(name not in BY_COLUMN or len(set(split.columns["author"])) >= clients)
    parts = make(name, clients, len(sizes))(split, clients, seed)
    assert len(parts) == clients
    assert all(part.dtype == np.int64 and len(part) for part in parts)
    assert all((np.diff(part) > 0).all() for part in parts)
    held = np.concatenate(parts)
    assert len(np.unique(held)) == len(held)
    assert held.min() >= 0
    assert held.max() < len(split)
    if name != "label_mixture":
        assert len(held) == len(split)
    assert same(parts, make(name, clients, len(sizes))(split, clients, seed))


@pytest.mark.parametrize("name", PARTITIONS)
def test_another_seed_gives_another_partition(name: str) -> None:
    split, partition = made(60, 70, 80), make(name, 5, 3)
    # A column leaves nothing to chance.
    assert same(partition(split, 5, 0), partition(split, 5, 1)) == (name in BY_COLUMN)


@settings(max_examples=60)
@given(data=st.data(), clients=st.integers(1, 8), classes=st.integers(2, 5), seed=st.integers(0, 99))
def test_a_label_mixture_is_met_to_the_row_in_the_largest_equal_shards(
    data: st.DataObject, clients: int, classes: int, seed: int
) -> None:
    sizes = data.draw(st.lists(st.integers(10, 60), min_size=classes, max_size=classes))
    weights = st.lists(st.integers(0, 9), min_size=classes, max_size=classes).filter(any)
    proportions = [
        [w / sum(row) for w in row] for row in data.draw(st.lists(weights, min_size=clients, max_size=clients))
    ]
    split = made(*sizes)
    table = counts(split, PARTITIONS["label_mixture"](proportions)(split, clients, seed), classes)
    size = int(table[0].sum())
    assert (table.sum(axis=1) == size).all()
    assert (table.sum(axis=0) <= sizes).all()
    assert (np.abs(table - size * np.array(proportions)) < 1).all()
    # No size is left out that would fit even if every count were rounded up.
    larger = size + 1
    surely = np.ceil(larger * np.array(proportions) - 1e-9).sum(axis=0)
    assert (surely > sizes).any() or larger * clients > sum(sizes)


def test_the_binary_mixture_of_the_paper_leaves_out_few_rows_of_sst2() -> None:
    sizes = (26_530, 33_470)  # SST-2's training rows here: half of what is dealt is negative
    split = made(*sizes)
    table = counts(split, PARTITIONS["label_mixture"](BINARY)(split, 10, 0), 2)
    assert (table.sum(axis=1) == 5_306).all()  # 26,530 / 5, where equal parts would be 6,000
    assert table.sum(axis=0).tolist() == [26_530, 26_530]
    assert np.abs(table - 5_306 * np.array(BINARY)).max() < 1


def test_the_three_way_mixture_of_the_paper_shrinks_the_shards_of_mnli() -> None:
    sizes = (9_272, 9_135, 9_160)  # MNLI's training rows here
    split = made(*sizes)
    table = counts(split, PARTITIONS["label_mixture"](THREE_WAY)(split, 10, 0), 3)
    size = int(table[0].sum())
    assert size == 2_377  # 9,272 / 3.9, where equal parts would be 2,756
    assert (table.sum(axis=1) == size).all()
    assert (table.sum(axis=0) <= sizes).all()
    assert np.abs(table - size * np.array(THREE_WAY)).max() < 1


def test_a_small_alpha_skews_labels_more_than_a_large_one() -> None:
    split = made(500, 500, 500)
    skews = [
        np.mean([skew(split, PARTITIONS["dirichlet"](alpha)(split, 5, seed), 3) for seed in range(5)])
        for alpha in (0.1, 1.0, 100.0)
    ]
    assert skews[0] > 1.5 * skews[1] > 4 * skews[2]


def test_a_small_alpha_skews_sizes_more_than_a_large_one() -> None:
    split = made(500, 500)
    spread = [np.std([len(p) for p in PARTITIONS["quantity_skew"](alpha)(split, 8, 0)]) for alpha in (0.1, 1000.0)]
    assert spread[0] > 5 * spread[1]


def test_iid_sizes_differ_by_one_row_at_most() -> None:
    assert sorted(len(part) for part in PARTITIONS["iid"]()(made(11, 12), 5, 0)) == [4, 4, 5, 5, 5]


def test_shards_hold_few_classes() -> None:
    split = made(*10 * [40])
    table = counts(split, PARTITIONS["shards"](2)(split, 20, 0), 10)
    assert (table.sum(axis=1) == 20).all()
    assert ((table > 0).sum(axis=1) <= 2).all()
    assert (table == 20).sum() < 10, "neighbouring shards are dealt to whom they fall, not side by side"


@pytest.mark.parametrize("name", sorted(set(PARTITIONS) - BY_COLUMN))
def test_which_rows_of_a_class_a_client_gets_is_drawn(name: str) -> None:
    rows = max(make(name, 4, 1)(Split({}, np.zeros(80, np.int64)), 4, 0), key=len)
    assert (np.diff(rows) > 1).sum() >= 3, "not a run of rows as the source has them"


def test_labels_are_disjoint_up_to_as_many_clients_as_classes() -> None:
    split = made(20, 30, 40, 50, 60)
    table = counts(split, PARTITIONS["disjoint_labels"]()(split, 3, 0), 5)
    assert ((table > 0).sum(axis=0) == 1).all()
    assert sorted((table > 0).sum(axis=1)) == [1, 2, 2]


def test_clients_that_share_a_class_split_its_rows_evenly() -> None:
    split = made(20, 30)
    table = counts(split, PARTITIONS["disjoint_labels"]()(split, 5, 0), 2)
    assert ((table > 0).sum(axis=1) == 1).all()
    assert all(np.ptp(column[column > 0]) <= 1 for column in table.T)
    assert table.sum(axis=0).tolist() == [20, 30]


def test_rows_of_one_author_stay_together_and_sizes_even_out() -> None:
    authors = ["a"] * 6 + ["b"] * 3 + ["c"] * 2 + ["d"] * 2
    split = Split({"author": authors}, np.zeros(13, np.int64))
    parts = PARTITIONS["column"]("author")(split, 2, 0)
    assert [sorted({authors[row] for row in part}) for part in parts] == [["a"], ["b", "c", "d"]]


@pytest.mark.parametrize("nothing", [[None, nan, "", " "], [nan] * 4, [None] * 4])
def test_rows_without_a_value_are_refused_left_out_or_kept_together(
    nothing: list[Any], caplog: pytest.LogCaptureFixture
) -> None:
    split = Split({"author": [*nothing, "a", "b", "a"]}, np.zeros(7))
    with pytest.raises(DataError, match=r"^partition column: no author in 4 of 7 rows \(row 0 first\); missing_cells="):
        PARTITIONS["column"]("author")(split, 2, 0)
    left = PARTITIONS["column"]("author", missing_cells="drop")(split, 2, 0)
    assert [part.tolist() for part in left] == [[4, 6], [5]]
    assert "no author in 4 of 7 rows, which go to nobody (missing_cells)" in caplog.text
    kept = PARTITIONS["column"]("author", missing_cells="empty")(split, 3, 0)
    assert [part.tolist() for part in kept] == [[0, 1, 2, 3], [4, 6], [5]]


def test_values_that_are_written_alike_belong_together() -> None:
    parts = PARTITIONS["column"]("author")(Split({"author": [1, "1", 2, True]}, np.zeros(4)), 3, 0)
    assert [part.tolist() for part in parts] == [[0, 1], [2], [3]]


def test_values_that_are_left_out_go_to_nobody() -> None:
    split = Split({"author": list("abcabca")}, np.zeros(7))
    parts = PARTITIONS["column"]("author", leave_out=["b"])(split, 2, 0)
    assert [part.tolist() for part in parts] == [[0, 3, 6], [2, 5]]
    hands = Split({"writer": np.array([0, 1, 2, 1, 0])}, np.zeros(5))
    assert [part.tolist() for part in PARTITIONS["writers"](leave_out=[0])(hands, 2, 0)] == [[1, 3], [2]]


def test_a_regression_can_be_dealt_without_classes() -> None:
    split = Split({"author": list("abcdef"), "writer": np.arange(6)}, np.linspace(0, 5, 6))
    for name in sorted(set(PARTITIONS) - set(BY_CLASS)):
        assert len(np.concatenate(make(name, 3, 2)(split, 3, 0))) == 6


@pytest.mark.parametrize("name", BY_CLASS)
def test_a_regression_has_no_classes_to_go_by(name: str) -> None:
    with pytest.raises(DataError, match=f"^partition {name}: it goes by class and the rows have none, choose"):
        make(name, 2, 2)(Split({}, np.linspace(0, 5, 6)), 2, 0)


@pytest.mark.parametrize("name", PARTITIONS)
def test_more_clients_than_rows_are_refused(name: str) -> None:
    with pytest.raises(DataError, match=f"^partition {name}: 9 clients for 8 rows, give 1 to 8$"):
        make(name, 9, 2)(made(4, 4), 9, 0)


@pytest.mark.parametrize(
    ("name", "arguments", "clients", "message"),
    [
        ("label_mixture", {"proportions": [[1, 0]]}, 2, "has 1 rows for 2 clients, give one a client"),
        ("label_mixture", {"proportions": [[1], [1]]}, 2, "row 0 has 1 shares for 2 classes, give one a class"),
        ("label_mixture", {"proportions": [[0.5, 0.5], [0.5, 0.4]]}, 2, "row 1 is .* with a sum of 1"),
        ("label_mixture", {"proportions": [[1.5, -0.5], [0.5, 0.5]]}, 2, "row 0 is .* of at least 0"),
        ("label_mixture", {"proportions": 6 * [[1, 0]]}, 6, "too few rows of class 0 for one row a client"),
        ("dirichlet", {"alpha": 1e-3}, 8, "without rows in each of 100 draws, choose an alpha above 0.001 or fewer"),
        ("shards", {"per_client": 3}, 4, "12 shards can't be cut from 9 rows, choose per_client up to 2"),
        ("disjoint_labels", {}, 9, "5 clients would share a class of 4 rows, choose fewer clients than 9"),
        ("column", {"by": "autor"}, 2, "unknown name 'autor', did you mean author?"),
        ("column", {"by": "author"}, 9, "author has 3 different values for 9 clients, choose 3 clients or fewer"),
        ("column", {"by": "tokens"}, 2, "tokens holds lists"),
        ("column", {"by": "author", "leave_out": ["d"]}, 2, "leave_out: unknown name 'd', choose from a, b, c"),
        ("column", {"by": "author", "leave_out": ["a"]}, 3, "has 2 different values for 3 clients, choose 2"),
        ("writers", {}, 2, "by: unknown name 'writer', choose from author, tokens"),
    ],
)
def test_a_partition_that_can_not_be_made_says_why(
    name: str, arguments: dict[str, Any], clients: int, message: str
) -> None:
    split = Split({"author": list("abcabcabc"), "tokens": [[1]] * 9}, np.array([0, 1, 0, 1, 0, 1, 0, 1, 1]))
    with pytest.raises(DataError, match=f"^partition {name}.*{message}"):
        PARTITIONS[name](**arguments)(split, clients, 1)


@pytest.mark.parametrize(
    ("name", "arguments"),
    [("dirichlet", {"alpha": 0}), ("quantity_skew", {"alpha": float("nan")}), ("shards", {"per_client": 0})],
)
def test_a_wrong_setting_is_refused_before_any_data_are_seen(name: str, arguments: dict[str, Any]) -> None:
    with pytest.raises(DataError, match=f"^partition {name}: .* is .*, give"):
        PARTITIONS[name](**arguments)


def test_counts_have_a_column_for_classes_that_nobody_holds() -> None:
    split = made(3, 3)
    assert counts(split, [np.arange(6)], 4).tolist() == [[3, 3, 0, 0]]
