"""Scores: how good predictions are. `METRICS` names them."""

import re
from collections import Counter
from collections.abc import Callable, Sequence
from typing import Any

import numpy as np
from numpy.typing import NDArray


def accuracy(predictions: NDArray[Any], labels: NDArray[Any]) -> float:
    """Return the share of right answers; both `[N]` class numbers."""
    return float(np.mean(predictions == labels))


def f1(predictions: NDArray[Any], labels: NDArray[Any], of: int = 1) -> float:
    """Return the harmonic mean of precision and recall of one class, 0 where it is never right; both `[N]` numbers."""
    hits = np.sum((predictions == of) & (labels == of))
    return float(2 * hits / max(np.sum(predictions == of) + np.sum(labels == of), 1))


def macro_f1(predictions: NDArray[Any], labels: NDArray[Any]) -> float:
    """Return the mean F1 of the classes that are among the `[N]` predictions or labels, as scikit-learn has it."""
    counts = confusion(predictions, labels)
    there = counts.sum(0) + counts.sum(1)  # [C]
    return float(np.mean(2 * counts.diagonal()[there > 0] / there[there > 0]))


def balanced_accuracy(predictions: NDArray[Any], labels: NDArray[Any]) -> float:
    """Return the mean over the classes of the `[N]` labels of the share of their rows that is right."""
    counts = confusion(predictions, labels)
    there = counts.sum(1)  # [C]
    return float(np.mean(counts.diagonal()[there > 0] / there[there > 0]))


def matthews_correlation(predictions: NDArray[Any], labels: NDArray[Any]) -> float:
    """Return Matthews' correlation of two `[N]` class numbers, any number of classes; 0 where either is constant.

    For classes k it is `(N h - Σ_k p_k t_k) / sqrt((N² - Σ_k p_k²) (N² - Σ_k t_k²))` with h right answers, p_k
    predictions and t_k labels of k (Gorodkin, Computational Biology and Chemistry 28, 2004), as scikit-learn has it.
    """
    counts = confusion(predictions, labels).astype(np.float64)
    said, true, rows = counts.sum(0), counts.sum(1), counts.sum()
    spread = (rows**2 - said @ said) * (rows**2 - true @ true)
    return float((rows * counts.trace() - said @ true) / np.sqrt(spread)) if spread else 0.0


def confusion(predictions: NDArray[Any], labels: NDArray[Any], classes: int = 0) -> NDArray[np.int64]:
    """Count the rows `[C, C]` by label and by prediction, of two `[N]` class numbers.

    C is `classes`, or as many as it takes.
    """
    C = max(classes, int(max(predictions.max(), labels.max())) + 1)
    return np.bincount(labels * C + predictions, minlength=C * C).reshape(C, C)


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


def whole_text(text: str) -> str:
    """Return a text without the space at its ends."""
    return text.strip()


def last_number(text: str) -> float | None:
    """Return the last number of a text, None where it has none; commas that set off thousands count for nothing."""
    found = _NUMBER.findall(text)
    return float(found[-1].replace(",", "")) if found else None


def same(metric: str, generated: str, reference: str) -> bool:
    """Whether two texts have the same answer, and any."""
    answer = ANSWERS[metric](generated)
    return answer is not None and answer == ANSWERS[metric](reference)


def constant(metric: str, truths: Sequence[Any] | NDArray[Any], of: int | None = None) -> float:
    """Return what the best answer that is the same for all rows scores.

    `truths` are what should be predicted: class numbers or values `[N]`, all rows' tokens `[T]`, or texts; `of` is the
    class that an F1 is of. The answer is that class, or else the commonest class, token, text or number. For perplexity
    it is the tokens' own distribution; correlations of an answer that is always the same are 0.
    """
    if metric in OF_VALUES:
        return 0.0
    answers = list(map(ANSWERS[metric], truths)) if metric in ANSWERS else np.asarray(truths).tolist()
    counts = Counter(answer for answer in answers if answer is not None)
    if metric == "perplexity":
        shares = np.array([*counts.values()]) / len(answers)
        return float(np.exp(-shares @ np.log(shares)))
    if metric not in OF_CLASSES:
        return max(counts.values(), default=0) / len(answers)
    labels = np.asarray(truths)
    if of is not None:
        return f1(np.full_like(labels, of), labels, of)
    return METRICS[metric](np.full_like(labels, counts.most_common(1)[0][0]), labels)


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
OF_ONE_CLASS = {"f1"}
OF_CLASSES = {"accuracy", "balanced_accuracy", "f1", "macro_f1", "matthews_correlation"}
OF_VALUES = {"pearson", "spearman"}
OF_TOKENS = {"perplexity", "token_accuracy"}
ANSWERS: dict[str, Callable[[str], Any]] = {"exact_match": whole_text, "last_number": last_number}
"""Metrics that generate → what of a text is held against the reference's; None is never right."""
LOWER_IS_BETTER = {"perplexity"}
