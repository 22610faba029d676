import re
from collections.abc import Sequence
from typing import Any

import numpy as np
import pytest
from sklearn.metrics import balanced_accuracy_score, f1_score, matthews_corrcoef

from peertune.data.measures import read_metrics, with_classes
from peertune.data.scores import ANSWERS, METRICS, OF_CLASSES, OF_TOKENS, OF_VALUES, constant, f1
from peertune.errors import DataError
from peertune.types import Measure

OF_ALL = OF_CLASSES | OF_VALUES
CHOICES = "accuracy, balanced_accuracy, f1, macro_f1, matthews_correlation"


@pytest.mark.parametrize("classes", [2, 3, 7])
def test_scores_of_several_classes_are_scikit_learns(classes: int) -> None:
    draw = np.random.default_rng(classes)
    for rows in (1, 5, 200):
        labels, predictions = draw.integers(classes, size=(2, rows))
        theirs = {
            "matthews_correlation": matthews_corrcoef(labels, predictions),
            "macro_f1": f1_score(labels, predictions, average="macro"),
        }
        if set(predictions) <= set(labels):  # it warns of others
            theirs["balanced_accuracy"] = balanced_accuracy_score(labels, predictions)
        for name, score in theirs.items():
            assert METRICS[name](predictions, labels) == pytest.approx(score, abs=1e-12), name


@pytest.mark.parametrize("metric", sorted(OF_CLASSES))
def test_no_answer_that_is_the_same_for_all_rows_scores_more_than_the_constant(metric: str) -> None:
    labels = np.array([0] * 5 + [2] * 9 + [3] * 7)
    of = 3 if metric == "f1" else None
    each = [
        f1(np.full(21, answer), labels, of) if of else METRICS[metric](np.full(21, answer), labels)
        for answer in range(4)
    ]
    assert constant(metric, labels, of) == max(each)


def test_the_constant_of_tokens_texts_and_values() -> None:
    tokens = np.array([7, 7, 7, 1, 1, 9, 9, 9])
    assert constant("token_accuracy", tokens) == 3 / 8
    shares = np.array([3, 2, 3]) / 8
    assert constant("perplexity", tokens) == pytest.approx(np.prod(shares**-shares))
    texts = ["so 4", "it is 4.0 ", "none", "it is 4.0", "none ", "5", "none"]
    assert constant("exact_match", texts) == 3 / 7
    assert constant("last_number", texts) == 3 / 7
    assert constant("last_number", ["none", "neither"]) == 0
    assert constant("pearson", np.array([0.5, 2.0])) == constant("spearman", np.array([0.5, 2.0])) == 0


def test_several_metrics_are_read_in_their_order_each_with_its_class() -> None:
    read = read_metrics("task", ["macro_f1", {"name": "f1", "of": 0}, "f1"], OF_ALL)
    assert read == [Measure("macro_f1"), Measure("f1", "0"), Measure("f1")]
    assert list(map(str, with_classes("task", read, ("0", "1")))) == ["macro_f1", "f1 of 0", "f1 of 1"]
    assert read_metrics("task", "perplexity", OF_TOKENS) == [Measure("perplexity")]


@pytest.mark.parametrize(
    ("metrics", "fitting", "line"),
    [
        ([], OF_CLASSES, f"metric is an empty list; choose from {CHOICES}"),
        (["accuracy", "f1", "accuracy"], OF_ALL, "metric accuracy stands twice; give it once"),
        (["accuracy", "perplexity"], OF_CLASSES, f"metric perplexity does not fit; choose from {CHOICES}"),
        ("acuracy", OF_CLASSES, f"metric: unknown name 'acuracy', did you mean accuracy? Those that fit are {CHOICES}"),
        ("zzz", OF_CLASSES, f"metric: unknown name 'zzz', choose from {CHOICES}"),
        (
            ["accuracy", "pearson"],
            OF_ALL,
            "metric pearson is not of classes, as accuracy is: no pass predicts both; beside accuracy choose from "
            + CHOICES,
        ),
        (
            ["perplexity", "exact_match"],
            OF_TOKENS | ANSWERS.keys(),
            "metric exact_match is not of tokens, as perplexity is: no pass predicts both; beside perplexity choose "
            "from perplexity, token_accuracy",
        ),
        (
            ["exact_match", "token_accuracy"],
            OF_TOKENS | ANSWERS.keys(),
            "metric token_accuracy is not of texts that are generated, as exact_match is: no pass predicts both; "
            "beside exact_match choose from exact_match, last_number",
        ),
    ],
)
def test_metrics_that_can_not_be_had_are_refused(metrics: Any, fitting: Sequence[str], line: str) -> None:
    with pytest.raises(DataError, match=f"^task x: {re.escape(line)}$"):
        read_metrics("task x", metrics, fitting)


def test_a_class_that_is_the_default_is_not_named_twice() -> None:
    with pytest.raises(DataError, match=r"^task: metric f1 of 1 stands twice; give it once$"):
        with_classes("task", [Measure("f1"), Measure("f1", "1")], ("0", "1"))
