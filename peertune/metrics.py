"""How far the clients disagree, what their disagreement does to the products, and what a round costs on the wire.

Pure functions. Sums are accumulated in float64, one tensor at a time, with memory that grows as K and never as K².
"""

from math import sqrt

import torch
from torch import Tensor

from peertune.types import Tensors, kind, select


def consensus_error(tensors: Tensors) -> float:
    """Root mean squared distance of the clients from their mean, `Δ_X = sqrt(mean_i ‖X_i - X̄‖²_F)`.

    X_i is all of client i's `tensors [K, …]` together; pass one kind of them to get that kind's consensus error.
    """
    return sqrt(sum(float(_spread(x).square().sum()) / len(x) for x in tensors.values()))


def cross_term(adapters: Tensors) -> float:
    """What averaging the factors separately leaves out of the averaged product, in norm over all sites.

    `C = mean_i(B_i A_i) - B̄ Ā = mean_i((B_i - B̄)(A_i - Ā))` at each site, and the result is `sqrt(Σ_sites ‖C‖²_F)`.
    At each site `‖C‖_F ≤ Δ_A Δ_B`. TAD-LoRA (arXiv 2602.00451) and ADF-LoRA (arXiv 2511.18291) bound their error by it.
    """
    total = 0.0
    for name, tensor in adapters.items():
        if kind(name) == "A":
            A, B = _spread(tensor), _spread(adapters[f"{name[:-1]}B"])
            # The sum over clients is part of one product, [d_out, K r] @ [K r, d_in].
            C = B.movedim(0, 1).flatten(1) @ A.flatten(0, 1) / len(A)
            total += float(C.square().sum())
    return sqrt(total)


def client_mean(tensors: Tensors) -> Tensors:
    """Return the mean over the clients of `tensors [K, …]`, each `[…]` in float64."""
    return {name: x.mean(0, dtype=torch.float64) for name, x in tensors.items()}


def mean_drift(before: Tensors, after: Tensors) -> float:
    """Norm of the change of the clients' mean, `‖X̄_after - X̄_before‖_F` over all tensors `[…]` of both together.

    Zero, up to rounding, for averages with a doubly stochastic matrix.
    """
    return sqrt(sum(float((after[name] - x).square().sum()) for name, x in before.items()))


def diagnostics(before: Tensors, after: Tensors) -> dict[str, float]:
    """Describe one mixing step: the `client_mean` of what was sent just before it, and the adapters `[K, …]` after it.

    Returns `consensus_error_A`, `consensus_error_B`, `consensus_error_head` where there is a head, and `cross_term`,
    all after mixing; and `mean_drift`, of the sent kinds, by mixing.
    """
    kinds = sorted({"A", "B"} | {kind(name) for name in after})
    errors = {f"consensus_error_{k}": consensus_error(select(after, {k})) for k in kinds}
    drift = mean_drift(before, client_mean({name: after[name] for name in before}))
    return errors | {"cross_term": cross_term(after), "mean_drift": drift}


def payload_bytes(payload: Tensors) -> int:
    """Bytes of the tensors that one client of `payload [K, …]` sends to one neighbour, without any framing."""
    return sum(x.shape[1:].numel() * x.element_size() for x in payload.values())


def bytes_sent(payload: Tensors, neighbours: list[int]) -> list[int]:
    """Bytes that each client sends in a round, to all of its `neighbours [K]` together."""
    size = payload_bytes(payload)
    return [size * count for count in neighbours]


def neighbours(weights: Tensor) -> list[int]:
    """How many others each receiver takes something from: the non-zero entries of its row of `weights [R, H]` less one.

    `weights` is dense or sparse. A row always holds the receiver itself.
    """
    entries = weights.to_sparse().coalesce()
    held = entries.indices()[0, entries.values() != 0]  # a sparse matrix may store zeros
    return [count - 1 for count in torch.bincount(held, minlength=weights.shape[0]).tolist()]


def _spread(x: Tensor) -> Tensor:
    return x.double() - x.mean(0, dtype=torch.float64)
