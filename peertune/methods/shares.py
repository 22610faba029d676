"""What receivers take of those whom they heard: rows of a mixing matrix, as tensors."""

import torch
from scipy.sparse import csr_array
from torch import Tensor

DENSE_UP_TO = 64
"""Adapters heard up to which a dense mixing matrix is faster than a sparse one."""


def as_weights(matrix: csr_array, device: torch.device) -> Tensor:
    """Return rows of a mixing matrix `[R, H]` as mixers take them: dense where few are heard, sparse elsewhere."""
    if matrix.shape[1] <= DENSE_UP_TO:
        return torch.from_numpy(matrix.toarray()).to(device)
    places = torch.stack([torch.from_numpy(x).long() for x in matrix.tocoo().coords])
    weights = torch.sparse_coo_tensor(places, torch.from_numpy(matrix.data), matrix.shape, check_invariants=False)
    return weights.coalesce().to(device)


def entries(weights: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """Return receiver, place among the heard and weight of each non-zero entry, by receiver."""
    entries = weights.to_sparse().coalesce()
    held = entries.values() != 0  # a sparse matrix may store zeros
    receivers, places = entries.indices()[:, held]
    return receivers, places, entries.values()[held]


def of_entries(weights: Tensor, receivers: Tensor, places: Tensor, values: Tensor) -> Tensor:
    """Return weights of these entries, shaped as `weights` and sparse where they are; those of one place add up."""
    at = torch.stack([receivers, places])
    found = torch.sparse_coo_tensor(at, values, weights.shape, check_invariants=False).coalesce()
    return found if weights.is_sparse else found.to_dense()


def giving_back(weights: Tensor, own: Tensor, fails: Tensor) -> Tensor:
    """Return weights `[K, H]` where what `fails`, a mask of their `entries`, returns to the receiver's own.

    `own [K]` is the place of each receiver among the heard.
    """
    receivers, places, values = entries(weights)
    return of_entries(weights, receivers, torch.where(fails, own[receivers], places), values)


def keeping(weights: Tensor, own: Tensor, shares: Tensor) -> Tensor:
    """Return weights `[K, H]` of which each of their `entries` keeps a share; the rest is the receiver's own.

    `own [K]` is the place of each receiver among the heard. Where all shares are 1 not one bit changes.
    """
    receivers, places, values = entries(weights)
    rows, columns = torch.cat([receivers, receivers]), torch.cat([places, own[receivers]])
    return of_entries(weights, rows, columns, torch.cat([values * shares, values * (1 - shares)]))


def without_site(weights: Tensor, own: Tensor, sent: Tensor, left: int) -> Tensor:
    """Return the weights `[K, H]` of a site that has this many `left` after it, its own among them.

    An edge fails for it of which one end, of those who have `sent [H]` so many of the last sites, has not reached it.
    """
    receivers, places, _ = entries(weights)
    missing = sent < left
    return giving_back(weights, own, missing[own[receivers]] | missing[places])


def of_slice(weights: Tensor, own: Tensor, receivers: Tensor, senders: Tensor, *, to_own: bool = True) -> Tensor:
    """Return the weights `[P, M]` among those who have a rank slice, of the weights `[K, H]` of all.

    `own [K]` is each receiver's place among the heard; `receivers [P]` and `senders [M]`, ascending, are rows and
    columns of those who have it. What a receiver takes of the others returns to its own, or goes `to` all others whom
    it hears in proportion: then rows still sum to what they did, and the mean of the clients moves.
    """
    receivers, senders, own = (x.to(weights.device) for x in (receivers, senders, own))
    i, j, values = entries(weights)
    has = torch.isin(j, senders)
    if to_own:
        whole = giving_back(weights, own, ~has)
    else:
        kept = values * has
        before, after = (x.new_zeros(len(weights)).index_add(0, i, x) for x in (values, kept))
        whole = of_entries(weights, i[has], j[has], (kept * (before / after)[i])[has])
    return whole.index_select(0, receivers).index_select(1, senders)
