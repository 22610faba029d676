"""How unlike the clients' data are: in labels, in amounts, and in what a base makes of them.

The first two follow from `counts [K, C]`, how many rows of each class each client holds. The third is how well a linear
probe tells from a row's features whose row it is. The home of scikit-learn, but for the digits that came from it.
"""

from collections.abc import Callable
from typing import NamedTuple

import numpy as np
from numpy.typing import NDArray
from scipy.special import rel_entr

from peertune.errors import DataError
from peertune.randomness import Draw, generator

FOLDS = 5
"""A probe is fitted on four fifths of the rows and asked about the last, in turn: a client needs as many rows."""
_DEALS = 100
_STEPS = 10_000  # of the optimiser, far above what it takes on features of one scale


def divergences(counts: NDArray[np.int64], pool: NDArray[np.int64]) -> NDArray[np.float64]:
    """Return the Jensen-Shannon divergence of each client's labels from those of the `pool [C]`, `[K]`.

    `KL(p ‖ m) / 2 + KL(q ‖ m) / 2` with `m = (p + q) / 2` (Lin, IEEE Trans. Inf. Theory 37(1), 1991), in bits: 0 where
    shares are the same, 1 where no class is common to both. It is the square of SciPy's `jensenshannon` with base 2. A
    class that nobody holds changes nothing. Raises DataError for a client without rows.
    """
    sizes = counts.sum(axis=1)
    if not sizes.all():
        raise DataError(f"label skew: client {int(sizes.argmin())} has no rows; give each client one")
    p, q = counts / sizes[:, None], pool / pool.sum()
    m = (p + q) / 2
    nats = (rel_entr(p, m) + rel_entr(q, m)).sum(axis=1) / 2
    bits: NDArray[np.float64] = np.clip(nats / np.log(2), 0.0, 1.0)  # rounding leaves less than 0 of equal shares
    return bits


def divergence_by_chance(counts: NDArray[np.int64], seed: int) -> float:
    """Return the mean divergence from the labels of all that clients of these sizes would have of rows dealt at random.

    Few rows are never quite like all: about `(C - 1) / (8 n ln 2)` for n of them. It is the mean of 100 seeded deals.
    """
    pool = counts.sum(axis=0)
    dealt = [
        generator(seed, Draw.DEALT, client).multivariate_hypergeometric(pool, size, _DEALS)
        for client, size in enumerate(counts.sum(axis=1).tolist())
    ]
    return float(np.mean([divergences(own, pool).mean() for own in dealt]))


def effective_clients(sizes: NDArray[np.int64]) -> float:
    """Return `(Σ n_k)² / Σ n_k²`, the inverse of Herfindahl's index of clients with `sizes [K]`.

    It is K where all hold equally many rows, and goes to 1 where one holds nearly all. Kish's effective sample size is
    the same formula of weights.
    """
    shares = sizes / sizes.sum()
    return float(1 / (shares @ shares))


class Told(NamedTuple):
    """How well the clients are told apart by what a base makes of their rows; shares of rows, 0 to 1."""

    share: float  # of rows that the probe gives to the client whose they are, each held out once
    spread: float  # the standard deviation of this share over the folds
    chance: float  # what naming the largest client for each row has
    by_label: float | None  # what naming whoever has most rows of the row's class has; None without classes
    clients: list[float]  # of each client's rows, those that the probe gives to it


def tell_apart(
    features: NDArray[np.floating],
    owners: NDArray[np.int64],
    labels: NDArray[np.int64] | None = None,
    each: Callable[[int], object] = lambda done: None,
) -> Told:
    """Fit a linear probe that says of `features [N, d]` whose row it is, of two `owners [N]` or more.

    It is scikit-learn's logistic regression on features of unit variance, cross-validated over five folds in which
    each owner has the same share. No seed changes them. Where classes are dealt unevenly, a probe can tell clients by
    what it sees of the class. So `by_label` is what the true `labels [N]` tell, in the same folds, without features:
    what the probe has above it is no matter of labels. Returns `clients` by the owners' numbers, ascending. `each` is
    told how many folds are done.

    Raises DataError for a single owner, and for one with fewer than five rows.
    """
    from sklearn.linear_model import LogisticRegression
    from sklearn.model_selection import StratifiedKFold
    from sklearn.pipeline import make_pipeline
    from sklearn.preprocessing import StandardScaler

    names, places, sizes = np.unique(owners, return_inverse=True, return_counts=True)
    if len(names) < 2 or sizes.min() < FOLDS:
        raise DataError(
            f"probe: {len(names)} clients, the smallest with {sizes.min()} rows; give two or more with {FOLDS}"
        )
    features = features.astype(np.float64)  # in less the optimiser may find no step
    said, by_label = np.empty_like(places), np.empty_like(places)
    folds = list(StratifiedKFold(FOLDS, shuffle=True, random_state=0).split(features, places))
    for number, (fitted, asked) in enumerate(folds, start=1):
        probe = make_pipeline(StandardScaler(), LogisticRegression(max_iter=_STEPS))
        said[asked] = probe.fit(features[fitted], places[fitted]).predict(features[asked])
        if labels is not None:
            held = np.zeros((len(names), labels.max() + 1))
            np.add.at(held, (places[fitted], labels[fitted]), 1)
            by_label[asked] = held.argmax(axis=0)[labels[asked]]
        each(number)
    right = said == places
    return Told(
        float(right.mean()),
        float(np.std([right[asked].mean() for _, asked in folds])),
        float(sizes.max() / len(owners)),
        None if labels is None else float((by_label == places).mean()),
        [float(right[places == place].mean()) for place in range(len(names))],
    )
