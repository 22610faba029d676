"""How heard adapters combine.

What a receiver gets depends on its own row of the weights and on what has weight in it, never on who else is in the
call. A simulator passes everybody and all of W; a peer passes itself, its closed neighbourhood and its one row. Both
get the same numbers up to rounding. These mixers remember nothing.

`gossip` averages each tensor by itself, one matrix product for all receivers. `products` and `corrected` treat A and B
of a site as a pair; they batch the receivers that heard the same number m of adapters (G of them at a time). A receiver
that heard only itself keeps its pair bit for bit. Heads are always averaged.

Where clients differ in rank, `gossip` and `corrected` mix slices of factors, and `products` whole ones, see `Mixer`.
"""

from collections.abc import Callable, Collection, Iterable, Iterator, Sequence
from functools import partial
from math import sqrt
from typing import Literal

import torch
from torch import Tensor
from torch.nn.functional import pad

from peertune.method import At, Mixer, Phase
from peertune.types import Tensors, kind, pairs

STEP = 0.3
"""By how much products move towards those of clients of another rank, where nothing else is asked for."""

STEEPEST = 5.0
"""How many times the cross term a correction may be, at most."""

_PAIR = frozenset({"A", "B"})
_ROW_NORM = 1 / sqrt(3)  # of A at the start: d_in entries of variance 1 / (3 d_in), Kaiming-uniform with a = sqrt(5)
_CHUNK_FLOATS = 2**24  # heard factors gathered at once; bounds the memory of dense graphs

_Group = tuple[Tensor, Tensor, Tensor]
# receivers [G], the m > 1 adapters that each of them heard [G, m], their weights [G, m, 1], or [G, m, r] by direction
_Combine = Callable[[Tensor, Tensor, Tensor, Tensor, Sequence[_Group]], Iterator[tuple[Tensor, Tensor, Tensor]]]
# own A [R, r, d_in], own B [R, d_out, r], heard A [H, r, d_in], heard B [H, d_out, r], groups → receivers [G], A, B


def gossip() -> Mixer:
    """Average factor by factor: `X_i ← Σ_j W_ij X_j` for each sent kind X.

    Keeps the mean over all clients where W is doubly stochastic. Sparse weights stay sparse. Source: Dec-LoRA
    (arXiv 2501.15361) and the DLoRA of DeCAF (arXiv 2505.21382).
    """
    return _forgetful(lambda own, heard, weights, at, phase: _average(own, heard, weights, phase.send))


def products(unequal: Literal["common_rank", "truncate"] = "common_rank", step: float = STEP) -> Mixer:
    """Average the products and go back to rank r: `B_i A_i ← SVD_r(Σ_j W_ij B_j A_j)`.

    With the heard factors side by side, `A = [A_1; …; A_m]` and `B = [w_1 B_1, …, w_m B_m]`, the averaged product is
    `B A`. What is decomposed is no larger than m r: the inner products of A's rows and of B's columns give the
    eigenvectors of `(B A)ᵀ (B A)`, and one step of power iteration with a QR makes them the leading right singular
    vectors V (`_leading`); `U S = B A V`. All of it is in float64, so that for adapters in float32 the rounding of the
    result is the only one that shows. The sign of each singular pair makes the largest entry of its u positive, so the
    order in which adapters were heard does not matter.

    The split is `B = U S / c`, `A = c Vᵀ` with c = 1/√3, the norm of A's rows at the start. A split by square roots
    would leave a direction with singular value zero dead for ever: neither of its factors gets a gradient. Here A's
    rows keep their norm whatever S is, so B always gets one. Where the averaged product's rank q is below r, as at the
    start when B = 0, the r - q last columns of B are zero, and the r - q last rows of A are c times an orthonormal
    basis of what the receiver's own A (of rank r) spans beyond the kept directions, the basis nearest to its last rows.
    A singular value below ε · max(d_out, m r) times the largest counts as zero; ε is that of the adapters' type.

    Where ranks differ, a client knows nothing of directions beyond its own. In "truncate", the average above, it says
    zero of them all the same, so they shrink from round to round until they are gone. "common_rank" mixes differences
    of products X = B A at the rank that both ends have:
    `X_i ← SVD_r(X_i + Σ_j W_ij g_ij (T_ij(X_j) - T_ij(X_i)))`. T_ij truncates to the lower of the two ranks, and r is
    the receiver's. g_ij is 1 between equal ranks, and `step` between others. With symmetric W the mean of all X stays,
    but for what SVD_r takes away. That is little where a step is small: .3 brings clients near the mean, 1 does not
    (docs/results.md). A receiver that heard only its own rank gets the average above, up to rounding.

    **What bounds it.** A's rows are c times orthonormal ones, and the product is a projection of the averaged one, so
    no larger than the largest that is averaged. Where what was heard is nearly singular, the small directions are
    noise, as large as rounding. Nothing is divided by them.

    Acts only in rounds that send both A and B. Source: DeCAF (arXiv 2505.21382); "truncate" is what FlexLoRA (arXiv
    2402.11505) does with a server. Not stated in the paper of DeCAF, as far as we know it: the split, the signs, and
    what becomes of directions without weight. "common_rank" is ours.
    """

    def mix(own: Tensors, heard: Tensors, weights: Tensor, at: At, phase: Phase) -> Tensors:
        if at.ranks is None or unequal == "truncate":
            return _by_pairs(own, heard, weights, phase, groups(weights), _truncate)
        combine = partial(_truncate_by_direction, at.ranks)
        return _by_pairs(own, heard, weights, phase, _at_common_ranks(weights, at, step), combine)

    return _forgetful(mix)._replace(keeps_basis=False, by_entry=False, ranks="whole")


def corrected(ridge: float) -> Mixer:
    """Average factor by factor, and correct the averaged B so that its product comes nearer to the averaged product.

    With `Ā = Σ_j W_ij A_j` and `B̄ = Σ_j W_ij B_j`, receiver i takes Ā and `B̄ + D`, where D minimises
    `‖Σ_j W_ij B_j A_j - (B̄ + D) Ā‖² + ridge · ‖D‖²` in Frobenius norms, in closed form:
    `D (Ā Āᵀ + ridge · I) = C Āᵀ`, with the cross term `C = Σ_j W_ij B_j A_j - B̄ Ā`. No product is formed: its cost is
    `m r² (d_in + d_out)`. With a small ridge this projects the averaged product's rows onto what Ā's rows span. The
    algebra is in float64. Acts on pairs only in rounds that send both A and B.

    **What bounds it.** In a direction in which Ā has the singular value S, D is `S / (S² + ridge)` of C at most. Where
    Ā is nearly singular, as when others send what cancels a receiver's A, that may be as much as `1 / (2 √ridge)`. So
    it is held at STEEPEST, which is what a ridge of .01 comes to: `‖D‖ <= STEEPEST · ‖C‖`, whatever was heard and
    whatever the ridge. A direction that Ā lacks gets no correction.
    """

    def correct(
        own_A: Tensor, own_B: Tensor, heard_A: Tensor, heard_B: Tensor, groups: Sequence[_Group]
    ) -> Iterator[tuple[Tensor, Tensor, Tensor]]:
        for receivers, senders, share in groups:
            parts = share[..., None].double()
            A, B = heard_A[senders].double(), parts * heard_B[senders].double()  # [G, m, r, d_in], [G, m, d_out, r]
            mean_A, mean_B = (parts * A).sum(1), B.sum(1)
            inner = mean_A @ mean_A.mT
            rest = (B @ (A @ mean_A.mT[:, None])).sum(1) - mean_B @ inner  # C Āᵀ, [G, d_out, r]
            squares, Q = torch.linalg.eigh(inner)  # S² [G, r]
            gain = _gain(squares, ridge)[:, None]
            yield receivers, mean_A.to(own_A.dtype), (mean_B + rest @ Q * gain @ Q.mT).to(own_B.dtype)

    mix = _forgetful(
        lambda own, heard, weights, at, phase: _by_pairs(own, heard, weights, phase, groups(weights), correct)
    )
    return mix._replace(by_entry=False)


def _gain(squares: Tensor, ridge: float) -> Tensor:
    """Return `1 / (S² + ridge)` of squares S² `[G, r]`, rising, and `STEEPEST / S` where that is less.

    A square that is rounding counts as rounding, so that what stands in its direction, which is rounding as well, is
    not made large.
    """
    precision = torch.finfo(squares.dtype)
    lowest = squares.shape[1] * precision.eps * squares[:, -1:] + precision.tiny
    return torch.minimum(1 / (squares.clamp(min=0) + ridge), STEEPEST / squares.maximum(lowest).sqrt())


def _forgetful(mix: Callable[[Tensors, Tensors, Tensor, At, Phase], Tensors]) -> Mixer:
    """Make a mixer that remembers nothing."""
    return Mixer(lambda own, heard, weights, memory, at, phase: (mix(own, heard, weights, at, phase), {}))


def averaged(heard: Tensor, weights: Tensor) -> Tensor:
    """Return `Σ_j W_ij x_j`, `[R, …]`, of x `[H, …]` and weights `[R, H]`, in x's type."""
    rows = heard.flatten(1)
    return (weights.to(rows.device, rows.dtype) @ rows).view(-1, *heard.shape[1:])


def _average(own: Tensors, heard: Tensors, weights: Tensor, kinds: Collection[str]) -> Tensors:
    mixed = dict(own)
    for name in own:
        if kind(name) in kinds:
            mixed[name] = averaged(heard[name], weights)
    return mixed


def _by_pairs(
    own: Tensors, heard: Tensors, weights: Tensor, phase: Phase, groups: Iterable[_Group], combine: _Combine
) -> Tensors:
    """Average the other sent kinds, and `combine` A with B site by site."""
    mixed = _average(own, heard, weights, phase.send - _PAIR)
    if not phase.send >= _PAIR:
        return mixed
    groups = list(groups)
    for a, b in pairs(own):
        floats = heard[a].shape[1:].numel() + heard[b].shape[1:].numel()
        new_A, new_B = own[a].clone(), own[b].clone()
        for receivers, A, B in combine(own[a], own[b], heard[a], heard[b], chunks(groups, floats, own[a].device)):
            new_A[receivers], new_B[receivers] = A, B
        mixed |= {a: new_A, b: new_B}
    return mixed


def groups(weights: Tensor, own: Tensor | None = None) -> Iterator[_Group]:
    """Yield a group for each number m > 1 of adapters that somebody heard.

    Where the receivers' `own [R]` places among the heard are given, these are left out, whatever their weight, though
    m counts them.
    """
    entries = weights.to_sparse().coalesce()  # sorted by receiver
    receiver, sender = entries.indices()
    held = entries.values() != 0  # a sparse matrix may store zeros
    if own is not None:
        held &= sender != own[receiver]
    receiver, sender, share = receiver[held], sender[held], entries.values()[held]
    counts = torch.bincount(receiver, minlength=weights.shape[0])
    for m in sorted(set(counts.tolist())):
        if m + (own is not None) > 1:
            group = counts[receiver] == m
            receivers, senders, shares = (x[group].view(-1, m) for x in (receiver, sender, share))
            yield receivers[:, 0], senders, shares[..., None]


def _at_common_ranks(weights: Tensor, at: At, step: float) -> Iterator[_Group]:
    """Yield groups by whose weights differences at common ranks are added to the receivers' own products.

    The weights are by singular direction, `[G, m, most]`. Of others they are `W_ij g_ij` below the lower of the two
    ranks, else 0; the receiver's own comes first, with what this leaves of 1.
    """
    assert at.heard is not None
    assert at.ranks is not None
    own, ranks = (x.to(weights.device) for x in (torch.searchsorted(at.heard, at.clients), at.ranks))
    direction = torch.arange(int(at.ranks.max()), device=weights.device)
    for receivers, others, weight in groups(weights, own):
        mine = own[receivers, None]  # [G, 1]
        common = torch.minimum(ranks[others], ranks[mine])[..., None]
        differ = (ranks[others] != ranks[mine])[..., None]
        share = torch.where(differ, step * weight.double(), weight.double()) * (direction < common)
        yield receivers, torch.cat([mine, others], 1), torch.cat([1 - share.sum(1, keepdim=True), share], 1)


def chunks(groups: Iterable[_Group], floats: int, device: torch.device) -> list[_Group]:
    """Cut groups so that m · G pairs of this many floats fit in a chunk."""
    return [
        (receivers.to(device), senders.to(device), share.to(device))
        for group in groups
        for receivers, senders, share in zip(
            *(x.split(max(1, _CHUNK_FLOATS // (group[1].shape[1] * floats))) for x in group), strict=True
        )
    ]


def _truncate(
    own_A: Tensor, own_B: Tensor, heard_A: Tensor, heard_B: Tensor, groups: Sequence[_Group]
) -> Iterator[tuple[Tensor, Tensor, Tensor]]:
    dtype, (_, d_out, r) = own_A.dtype, own_B.shape
    # All is laid out in rows: a thin matrix from the left is several times faster than its transpose from the right.
    rows_A, basis_A = _coordinates(heard_A.double(), groups)
    rows_B, basis_B = _coordinates(heard_B.mT.contiguous().double(), groups)
    for receivers, senders, share in groups:
        A = rows_A[senders].flatten(1, 2)  # [G, m r, d_in]
        B = rows_B[senders].mul_(share[..., None]).flatten(1, 2)  # [G, m r, d_out]
        m_r, d_in = A.shape[1:]
        if m_r > d_in:  # then the product itself is smaller than what it is made of
            A, B = torch.eye(d_in, dtype=A.dtype, device=A.device).expand(len(A), -1, -1), A.mT @ B
        Vh = _leading(A, B, r)
        US = Vh @ A.mT @ B  # [G, r, d_out]
        Vh = Vh if basis_A is None else Vh @ basis_A
        US = US if basis_B is None else US @ basis_B
        sign = US.gather(-1, US.abs().argmax(-1, keepdim=True)).sign()  # [G, r, 1]
        Vh, US = Vh * sign, US * sign
        S = torch.linalg.vector_norm(US, dim=-1).cummin(-1).values  # in the noise they need not fall by themselves
        kept = torch.finfo(dtype).eps * max(d_out, m_r) * S[:, :1] < S
        lacking = (~kept.all(-1)).nonzero()[:, 0]
        Vh[lacking] = _complete(Vh[lacking], kept[lacking], own_A[receivers[lacking]].double())
        yield receivers, (_ROW_NORM * Vh).to(dtype), (torch.where(kept[..., None], US, 0) / _ROW_NORM).to(dtype).mT


def _truncate_by_direction(
    ranks: Tensor, own_A: Tensor, own_B: Tensor, heard_A: Tensor, heard_B: Tensor, groups: Sequence[_Group]
) -> Iterator[tuple[Tensor, Tensor, Tensor]]:
    """Combine as `_truncate` does, with weights by singular direction, of clients of these `ranks [H]`."""
    most = int(ranks.max())
    A, B = heard_A[:, :most].double(), heard_B[..., :most].double()
    cuts = torch.zeros(len(A), dtype=torch.bool, device=A.device)
    for _, senders, _ in groups:  # what nobody here mixes need not be numbers that can be decomposed
        cuts[senders] = True
    cut = (cuts & (ranks >= own_B.shape[-1]).to(A.device)).nonzero()[
        :, 0
    ]  # of lower ranks all directions have one weight
    new_A, new_B = _by_direction(A[cut], B[cut])
    return _truncate(own_A, own_B, A.index_copy(0, cut, new_A), B.index_copy(0, cut, new_B), groups)


def _by_direction(A: Tensor, B: Tensor) -> tuple[Tensor, Tensor]:
    """Return pairs of the same products, A's rows their right singular vectors, and B's columns the left ones times S.

    The first r rows and columns are then the product's truncation to rank r. The shapes are those of A `[H, m, d_in]`
    and B `[H, d_out, m]`; what lies beyond d_in or d_out directions is zero.
    """
    (V, upper_A), (U, upper_B) = torch.linalg.qr(A.mT), torch.linalg.qr(B)
    left, S, right = torch.linalg.svd(upper_B @ upper_A.mT, full_matrices=False)
    lacking = A.shape[1] - S.shape[1]
    return pad(right @ V.mT, (0, 0, 0, lacking)), pad(U @ (left * S[:, None]), (0, lacking))


def _coordinates(rows: Tensor, groups: Sequence[_Group]) -> tuple[Tensor, Tensor | None]:
    """Return what `rows [H, r, d]` are in an orthonormal basis `[H r, d]` of their span, where that saves work.

    It does where few adapters are heard by many: a QR of them all, `d (H r)²` multiplications, then is cheaper than
    what it saves each receiver of m of them, `(d - H r) (m r)²`.
    """
    H, r, d = rows.shape
    if H**2 * d >= (d - H * r) * sum(senders.numel() * senders.shape[1] for _, senders, _ in groups):
        return rows, None
    Q, R = torch.linalg.qr(rows.flatten(0, 1).mT)
    return R.mT.reshape(H, r, -1), Q.mT


def _leading(A: Tensor, B: Tensor, r: int) -> Tensor:
    """Return the r leading right singular vectors of `M = Bᵀ A`, as rows `[G, r, d_in]`.

    A is `[G, k, d_in]` and B `[G, k, d_out]`, in float64. With the Cholesky factor C of `A Aᵀ` there is a Q with
    orthonormal columns such that `A = C Qᵀ`, so `MᵀM = Q (Cᵀ B Bᵀ C) Qᵀ`, and the eigenvectors y of the matrix in
    brackets `[k, k]` give `v = Q y`. Q is not needed: `MᵀM v = Aᵀ B Bᵀ C y` has v's direction. This step of power
    iteration shrinks the errors of y that lie in weaker directions, and the QR, strongest first, takes out those in
    stronger ones. So V is orthonormal to rounding although squares have lost the singular values below 1e-8.

    Where adapters are equal, zero or dependent, `A Aᵀ` is singular up to rounding, which Cholesky does not bear; its
    diagonal is raised a little, each entry by its own measure. Rounding is below (d_in + k²) ε at worst, and some
    k ε in fact. Only y feels it.
    """
    k, d_in = A.shape[1:]
    precision = torch.finfo(A.dtype)
    inner_A, inner_B = A @ A.mT, B @ B.mT
    inner_A.diagonal(dim1=1, dim2=2).mul_(1 + (d_in + 10 * k) * precision.eps).add_(precision.tiny)
    C = torch.linalg.cholesky(inner_A)
    y = torch.linalg.eigh(C.mT @ inner_B @ C).eigenvectors.mT[:, -r:].flip(1)  # eigenvalues rise
    Vh: Tensor = torch.linalg.qr((y @ C.mT @ inner_B @ A).mT).Q.mT
    return Vh


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
