"""Scores: how good predictions are. `METRICS` names them."""

import re
from collections.abc import Callable, Sequence
from functools import partial
from typing import TYPE_CHECKING, Any

import numpy as np
from numpy.typing import NDArray

from peertune.errors import DataError, unknown

if TYPE_CHECKING:  # it knows torch, which reports do without
    from peertune.types import Task

Metric = str | dict[str, str | int]
"""A metric in a recipe: a name, or `{name: f1, of: fraud}` with the class that it is of."""


def accuracy(predictions: NDArray[Any], labels: NDArray[Any]) -> float:
    """Return the share of right answers; both `[N]` class numbers."""
    return float(np.mean(predictions == labels))


def f1(predictions: NDArray[Any], labels: NDArray[Any], of: int = 1) -> float:
    """Return the harmonic mean of precision and recall of one class, 0 where it is never right; both `[N]` numbers."""
    hits = np.sum((predictions == of) & (labels == of))
    return float(2 * hits / max(np.sum(predictions == of) + np.sum(labels == of), 1))


def macro_f1(predictions: NDArray[Any], labels: NDArray[Any]) -> float:
    """Return the mean F1 of the classes that are among the `[N]` predictions or labels, as scikit-learn has it."""
    return float(np.mean([f1(predictions, labels, of) for of in np.union1d(predictions, labels)]))


def balanced_accuracy(predictions: NDArray[Any], labels: NDArray[Any]) -> float:
    """Return the mean over the classes of the `[N]` labels of the share of their rows that is right."""
    right = predictions == labels
    return float(np.mean([right[labels == of].mean() for of in np.unique(labels)]))


def matthews_correlation(predictions: NDArray[Any], labels: NDArray[Any]) -> float:
    """Return Matthews' correlation of two `[N]` class numbers, any number of classes; 0 where either is constant."""
    from sklearn.metrics import matthews_corrcoef

    if np.ptp(predictions) == 0 or np.ptp(labels) == 0:
        return 0.0
    return float(matthews_corrcoef(labels, predictions))


def pearson(predictions: NDArray[Any], labels: NDArray[Any]) -> float:
    """Return the linear correlation of two `[N]`; 0 where either is constant or not finite."""
    pair = np.stack([predictions, labels]).astype(np.float64)  # [2, N]
    # A constant is told by its range: rounding can leave it with a variance just above 0, and any correlation at all.
    if not np.isfinite(pair).all() or (pair.min(axis=1) == pair.max(axis=1)).any():
        return 0.0
    return float(np.asarray(np.corrcoef(pair))[0, 1])


def spearman(predictions: NDArray[Any], labels: NDArray[Any]) -> float:
    """Return the correlation of the ranks of two `[N]`, ties sharing theirs; 0 as for `pearson`."""
    from scipy.stats import rankdata

    return pearson(rankdata(predictions), rankdata(labels))


def log_loss(probabilities: NDArray[Any], labels: NDArray[Any]) -> float:
    """Return the mean negative log-likelihood, in nats, of `[N]` labels under `[N, C]` probabilities."""
    own = probabilities[np.arange(len(labels)), labels]
    return float(-np.log(np.maximum(own, np.finfo(np.float64).tiny)).mean())


def calibration_error(probabilities: NDArray[Any], labels: NDArray[Any], bins: int = 15) -> float:
    """Return the expected calibration error of `[N, C]` probabilities of `[N]` labels.

    Rows fall into equal bins by the probability of their likeliest class; it is the mean over rows of how far, in their
    bin, the mean of that probability is from the share of right answers (Guo et al., arXiv 1706.04599).
    """
    sure, right = probabilities.max(1), probabilities.argmax(1) == labels
    place = np.minimum((sure * bins).astype(np.int64), bins - 1)
    gaps = np.bincount(place, sure, bins) - np.bincount(place, right, bins)
    return float(np.abs(gaps).sum() / len(labels))


def perplexity(losses: NDArray[Any], labels: NDArray[Any]) -> float:
    """Return the exponential of the mean loss of a token: both `[N]`, the sum over a row and how many tokens it has."""
    return float(np.exp(losses.sum() / labels.sum()))


def token_accuracy(hits: NDArray[Any], labels: NDArray[Any]) -> float:
    """Return the share of tokens predicted: both `[N]`, how many in a row, and of how many."""
    return float(hits.sum() / labels.sum())


_NUMBER = re.compile(r"(?:(?<!\w)-)?(?:\d{1,3}(?:,\d{3})+(?!\d)|\d+)(?:\.\d+)?")


def same_text(generated: str, reference: str) -> bool:
    """Whether two texts are the same but for space at their ends."""
    return generated.strip() == reference.strip()


def same_number(generated: str, reference: str) -> bool:
    """Whether the last numbers of two texts are equal; commas that set off thousands count for nothing."""
    last = [_NUMBER.findall(text)[-1:] for text in (generated, reference)]
    return all(last) and float(last[0][0].replace(",", "")) == float(last[1][0].replace(",", ""))


METRICS: dict[str, Callable[[NDArray[Any], NDArray[Any]], float]] = {
    "accuracy": accuracy,
    "balanced_accuracy": balanced_accuracy,
    "f1": f1,
    "macro_f1": macro_f1,
    "matthews_correlation": matthews_correlation,
    "pearson": pearson,
    "spearman": spearman,
    "perplexity": perplexity,
    "token_accuracy": token_accuracy,
    "exact_match": accuracy,  # of judgements, 1 for right, which should all be 1
    "last_number": accuracy,
}
OF_CLASS = {"f1"}
OF_VALUES = {"pearson", "spearman"}
OF_LANGUAGE = {"perplexity", "token_accuracy", "exact_match", "last_number"}
LOWER_IS_BETTER = {"perplexity"}
JUDGES: dict[str, Callable[[str, str], bool]] = {"exact_match": same_text, "last_number": same_number}
"""Metrics that generate: `(generated, reference) → whether it is right`."""


def read_metric(where: str, metric: Metric) -> tuple[str, str | None]:
    """Return the name of a recipe's metric, and the class that it is of, where the recipe says it."""
    if isinstance(metric, str):
        return metric, None
    if metric.keys() != {"name", "of"}:
        raise DataError(f"{where}: metric is {metric}; give a name, or name and of, as in {{name: f1, of: CLASS}}")
    name, of = str(metric["name"]), str(metric["of"])
    if name in METRICS and name not in OF_CLASS:
        raise DataError(f"{where}: metric {name} is of no one class; leave out of, or choose f1")
    return name, of


def class_of(where: str, metric: str, of: str | None, classes: Sequence[str]) -> str | None:
    """Return the class that a metric is of: the one that is asked for, or 1 of 0 and 1, as in scikit-learn.

    None for a metric that is of no one class. Raises DataError where classes have names and none is asked for.
    """
    if metric not in OF_CLASS:
        return None
    if of is None and tuple(classes) != ("0", "1"):
        raise DataError(
            f"{where}: metric {metric} is of one class; say of which of {', '.join(classes[:10])}, as in "
            f"task.metric={{name: {metric}, of: {classes[-1]}}}, or choose macro_f1"
        )
    if of is not None and of not in classes:
        raise DataError(unknown(f"{where}: metric {metric}: of", of, classes))
    return of or "1"


def scorer(task: "Task") -> Callable[[NDArray[Any], NDArray[Any]], float]:
    """Return what a task is scored by, from predictions and labels `[N]`."""
    if task.of is None:
        return METRICS[task.metric]
    return partial(f1, of=task.classes.index(task.of))
