"""Adapters of a lower rank that come as near as can be."""

from math import sqrt

import torch

from peertune.errors import ModelError
from peertune.types import Tensors, pairs


def truncated(adapter: Tensors, r: int) -> tuple[Tensors, float]:
    """Return the adapter of rank r that is nearest to this one, and how far it is.

    `adapter` has tensors without a client axis, `<site>.A [q, d_in]` and `<site>.B [d_out, q]`. Each site's product is
    cut to its r largest singular values, whose roots go to both factors. What has no rank stays. How far it is: the
    norm of what is lost of the products, over their norm, all sites together; 0 where these are zero.

    Raises ModelError where a site's rank is below r already.
    """
    found, lost, whole = dict(adapter), 0.0, 0.0
    for a, b in pairs(adapter):
        A, B = adapter[a].double(), adapter[b].double()
        if len(A) < r:
            raise ModelError(f"--rank: {r} is above the adapter's rank, {len(A)}; give at most that")
        (right, upper_A), (left, upper_B) = torch.linalg.qr(A.mT), torch.linalg.qr(B)
        U, S, Vh = torch.linalg.svd(upper_B @ upper_A.mT)
        root = S[:r].sqrt()
        found[a] = ((root[:, None] * Vh[:r]) @ right.mT).to(adapter[a].dtype)
        found[b] = (left @ (U[:, :r] * root)).to(adapter[b].dtype)
        lost += float(S[r:].square().sum())
        whole += float(S.square().sum())
    return found, sqrt(lost / whole) if whole else 0.0
