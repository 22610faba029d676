"""Scores: how good predictions are. `METRICS` names them."""

import re
from collections.abc import Callable
from typing import Any

import numpy as np
from numpy.typing import NDArray


def accuracy(predictions: NDArray[Any], labels: NDArray[Any]) -> float:
    """Return the share of right answers; both `[N]` class numbers."""
    return float(np.mean(predictions == labels))


def f1(predictions: NDArray[Any], labels: NDArray[Any]) -> float:
    """Return the harmonic mean of precision and recall of class 1, 0 where it is never right; both `[N]` of 0 and 1."""
    hits = np.sum((predictions == 1) & (labels == 1))
    return float(2 * hits / max(np.sum(predictions == 1) + np.sum(labels == 1), 1))


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
    "f1": f1,
    "matthews_correlation": matthews_correlation,
    "pearson": pearson,
    "spearman": spearman,
    "perplexity": perplexity,
    "token_accuracy": token_accuracy,
    "exact_match": accuracy,  # of judgements, 1 for right, which should all be 1
    "last_number": accuracy,
}
OF_VALUES = {"pearson", "spearman"}
OF_LANGUAGE = {"perplexity", "token_accuracy", "exact_match", "last_number"}
LOWER_IS_BETTER = {"perplexity"}
JUDGES: dict[str, Callable[[str, str], bool]] = {"exact_match": same_text, "last_number": same_number}
"""Metrics that generate: `(generated, reference) → whether it is right`."""
