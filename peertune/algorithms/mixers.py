"""How heard adapters combine.

A mixer is a pure function `mix(own [R, …], heard [H, …], weights [R, H], phase) → Tensors [R, …]`. Row i of
`weights`, dense or sparse, holds how much receiver i takes of each heard adapter, its own among them. `heard` needs to
hold only the kinds in `phase.send`; all other kinds come back as the very tensors of `own`. A receiver's result depends
on its own row and on what has weight in it, never on who else is in the batch: a simulator passes everybody and all of
W, a peer passes itself, its closed neighbourhood and its one row, and both get the same numbers up to rounding.

`gossip` averages each tensor by itself, one matrix product for all receivers. `products` and `rotated` treat A and B of
a site as a pair; they batch the receivers that heard the same number m of adapters (G of them at a time). A receiver
that heard only itself keeps its pair bit for bit. Heads are always averaged.
"""

from collections.abc import Callable, Collection, Iterator
from math import sqrt

import torch
from torch import Tensor

from peertune.types import Phase, Tensors, kind

Mixer = Callable[[Tensors, Tensors, Tensor, Phase], Tensors]
"""`(own [R, …], heard [H, …], weights [R, H], phase) → Tensors [R, …]`."""

_PAIR = frozenset({"A", "B"})
_ROW_NORM = 1 / sqrt(3)  # of A at the start: d_in entries of variance 1 / (3 d_in), Kaiming-uniform with a = sqrt(5)
_CHUNK_FLOATS = 2**26  # heard factors gathered at once; bounds the memory of dense graphs

_Combine = Callable[[Tensor, Tensor, Tensor, Tensor, Tensor], tuple[Tensor, Tensor]]
# own A [G, r, d_in], own B [G, d_out, r], heard A [G, m, r, d_in], heard B [G, m, d_out, r], share [G, m] → A, B [G, …]


def gossip(own: Tensors, heard: Tensors, weights: Tensor, phase: Phase) -> Tensors:
    """Average factor by factor: `X_i ← Σ_j W_ij X_j` for each sent kind X.

    Keeps the mean over all clients where W is doubly stochastic. Sparse weights stay sparse. Source: Dec-LoRA
    (arXiv 2501.15361) and the DLoRA of DeCAF (arXiv 2505.21382).
    """
    return _average(own, heard, weights, phase.send)


def products(own: Tensors, heard: Tensors, weights: Tensor, phase: Phase) -> Tensors:
    """Average the products and go back to rank r: `B_i A_i ← SVD_r(Σ_j W_ij B_j A_j)`.

    No product is ever formed: with thin QRs `[w_1 B_1, …, w_m B_m] = Q_B R_B` and `[A_1; …; A_m]ᵀ = Q_A R_A`, the SVD
    of the small core `R_B R_Aᵀ` gives `U S Vᵀ`. The sign of each singular pair makes the largest entry of its u
    positive, so the order in which adapters were heard does not matter.

    The split is `B = U S / c`, `A = c Vᵀ` with c = 1/√3, the norm of A's rows at the start. A split by square roots
    would leave a direction with singular value zero dead for ever: neither of its factors gets a gradient. Here A's
    rows keep their norm whatever S is, so B always gets one. Where the averaged product's rank q is below r, as at the
    start when B = 0, the r - q last columns of B are zero, and the r - q last rows of A are c times an orthonormal
    basis of what the receiver's own A (of rank r) spans beyond the kept directions, the basis nearest to its last rows.

    Acts only in rounds that send both A and B. Source: DeCAF (arXiv 2505.21382). Not stated in the paper, as far as we
    know it: the split, the signs, and what becomes of directions without weight.
    """
    return _by_pairs(own, heard, weights, phase, _truncate)


def rotated(strength: float) -> Mixer:
    """Make a mixer that turns each heard pair towards the receiver's own, then averages factor by factor.

    Receiver i turns the pair it heard from j by a rotation Q, `B_j ← B_j Q`, `A_j ← Qᵀ A_j`, which leaves `B_j A_j` as
    it is. In even rounds `M = A_j A_iᵀ`, in odd rounds `M = B_jᵀ B_i`; R is the rotation nearest to M (`U Vᵀ` of
    `M = U S Vᵀ`, det +1), which brings A_j nearest to A_i, or B_j to B_i, and Q is the rotation nearest to
    `(1 - strength) I + strength R`. The receiver's own pair has R = I and stays. Directions in which M vanishes say
    nothing about a rotation and are turned as little as can be: where B = 0, M = 0 and R = I.

    Acts on pairs only in rounds that send both A and B. Source: FedRot-LoRA (arXiv 2602.23638). The paper aligns every
    client to the server's reference; aligning what is heard to the receiver's own pair, and A in the even rounds, is
    our decentralised reading. Its rule for vanishing directions is not known to us.
    """

    def mix(own: Tensors, heard: Tensors, weights: Tensor, phase: Phase) -> Tensors:
        def turn(own_A: Tensor, own_B: Tensor, A: Tensor, B: Tensor, share: Tensor) -> tuple[Tensor, Tensor]:
            # The r x r algebra is cheap, so it runs in float64: the factors' own rounding then is the only one.
            M = B.double().mT @ own_B.double()[:, None] if phase.round % 2 else A.double() @ own_A.double()[:, None].mT
            M = M / torch.linalg.matrix_norm(M, keepdim=True).clamp(min=torch.finfo(M.dtype).tiny)
            identity = torch.eye(M.shape[-1], dtype=M.dtype, device=M.device)
            Q = share[..., None, None] * _rotation(torch.lerp(identity, _rotation(M), strength)).to(A.dtype)
            return torch.einsum("gmqr,gmqi->gri", Q, A), torch.einsum("gmqr,gmoq->gor", Q, B)

        return _by_pairs(own, heard, weights, phase, turn)

    return mix


def _average(own: Tensors, heard: Tensors, weights: Tensor, kinds: Collection[str]) -> Tensors:
    mixed = dict(own)
    for name, tensor in own.items():
        if kind(name) in kinds:
            rows = heard[name].reshape(weights.shape[1], -1)
            mixed[name] = (weights.to(rows.device, rows.dtype) @ rows).reshape(tensor.shape)
    return mixed


def _by_pairs(own: Tensors, heard: Tensors, weights: Tensor, phase: Phase, combine: _Combine) -> Tensors:
    """Average the other sent kinds, and `combine` A with B site by site."""
    mixed = _average(own, heard, weights, phase.send - _PAIR)
    if not phase.send >= _PAIR:
        return mixed
    sites = [(name, f"{name[:-1]}B") for name in own if kind(name) == "A"]
    mixed |= {name: own[name].clone() for site in sites for name in site}
    floats = max((own[a].shape[1:].numel() + own[b].shape[1:].numel() for a, b in sites), default=1)
    for receivers, senders, share in _groups(weights, floats):
        for a, b in sites:
            like = own[a]
            mixed[a][receivers], mixed[b][receivers] = combine(
                own[a][receivers], own[b][receivers], heard[a][senders], heard[b][senders], share.to(like)
            )
    return mixed


def _groups(weights: Tensor, floats: int) -> Iterator[tuple[Tensor, Tensor, Tensor]]:
    """Yield receivers [G], the m > 1 adapters that each of them heard [G, m], and their weights [G, m].

    `floats` is the size of one adapter's pair; G is cut so that m · G pairs fit in a chunk.
    """
    entries = weights.to_sparse().coalesce()  # sorted by receiver
    held = entries.values() != 0  # a sparse matrix may store zeros
    (receiver, sender), share = entries.indices()[:, held], entries.values()[held]
    counts = torch.bincount(receiver, minlength=weights.shape[0])
    for m in sorted(set(counts.tolist())):
        if m > 1:
            group = counts[receiver] == m
            receivers, senders, shares = (x[group].view(-1, m) for x in (receiver, sender, share))
            size = max(1, _CHUNK_FLOATS // (m * floats))
            for start in range(0, len(receivers), size):
                cut = slice(start, start + size)
                yield receivers[cut, 0], senders[cut], shares[cut]


def _truncate(own_A: Tensor, own_B: Tensor, A: Tensor, B: Tensor, share: Tensor) -> tuple[Tensor, Tensor]:
    r = own_A.shape[-2]
    left = (share[..., None, None] * B).movedim(1, 2).flatten(2)  # [G, d_out, m r]
    Q_B, R_B = torch.linalg.qr(left)
    Q_A, R_A = torch.linalg.qr(A.flatten(1, 2).mT)  # of [G, d_in, m r]
    u, s, vh = torch.linalg.svd(R_B @ R_A.mT, full_matrices=False)
    U, S, Vh = Q_B @ u[..., :r], s[..., :r], vh[..., :r, :] @ Q_A.mT
    sign = U.gather(-2, U.abs().argmax(-2, keepdim=True)).sign()  # [G, 1, r]
    U, Vh = U * sign, Vh * sign.mT
    noise = S[:, :1] * torch.finfo(S.dtype).eps * max(left.shape[1:])
    kept = noise < S
    lacking = (~kept.all(-1)).nonzero()[:, 0]
    Vh[lacking] = _complete(Vh[lacking], kept[lacking], own_A[lacking])
    return _ROW_NORM * Vh, U * (torch.where(kept, S, 0) / _ROW_NORM)[:, None, :]


def _complete(Vh: Tensor, kept: Tensor, A: Tensor) -> Tensor:
    """Replace the rows of `Vh [G, r, d_in]` that are not `kept [G, r]` by directions of `A [G, r, d_in]`.

    The free directions are the leading ones of `A - A V Vᵀ`, V the kept rows. Singular values of this residual tie once
    A's rows are orthonormal, so the SVD fixes what they span and not each of them. The rotation or reflection that
    brings them nearest to A's rows at the free places does: it is unique, and does not depend on which basis came out.
    """
    kept = kept[..., None]  # [G, r, 1], true first, as singular values fall
    known = torch.where(kept, Vh, 0)
    free = torch.linalg.svd(A - A @ known.mT @ known, full_matrices=False).Vh
    place = (torch.arange(A.shape[1], device=A.device)[:, None] - kept.sum(1, keepdim=True)).clamp(min=0)
    frame = torch.where(kept, Vh, free.gather(1, place.expand_as(free)))
    identity = torch.eye(A.shape[1], dtype=A.dtype, device=A.device)
    U, _, Wh = torch.linalg.svd(torch.where(kept | kept.mT, identity, A @ frame.mT))  # [G, r, r], in two blocks
    complete: Tensor = U @ Wh @ frame
    return complete


def _rotation(M: Tensor) -> Tensor:
    """Return the rotation R that maximises `tr(Rᵀ M)` for M `[…, r, r]` of entries about 1, the least one of several.

    A small multiple of the identity added to M decides in the directions where M vanishes. √eps lies far above M's
    rounding and far below the singular values that matter.
    """
    identity = torch.eye(M.shape[-1], dtype=M.dtype, device=M.device)
    U, _, Vh = torch.linalg.svd(M + sqrt(torch.finfo(M.dtype).eps) * identity)
    U[..., -1] *= torch.linalg.det(U @ Vh).sign()[..., None]  # a reflection turns back in its weakest direction
    R: Tensor = U @ Vh
    return R
