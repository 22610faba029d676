"""The mixers that treat A and B as a pair, against slow and obvious twins."""

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from playing import received
from torch import Tensor

from peertune.adapters.stacked import attach, init_adapters
from peertune.method import Mixer
from peertune.methods import mixers
from peertune.methods.mixers import corrected, gossip, products
from peertune.types import Tensors, take

some = settings(max_examples=15, derandomize=True)
seeds = st.integers(0, 2**31)


def random_pairs(seed: int, n: int, r: int, d_in: int, d_out: int) -> Tensors:
    generator = torch.Generator().manual_seed(seed)
    return {
        "site.A": torch.randn(n, r, d_in, generator=generator, dtype=torch.float64),
        "site.B": torch.randn(n, d_out, r, generator=generator, dtype=torch.float64),
    }


def random_weights(seed: int, n: int) -> Tensor:
    """Rows that sum to 1, with no zeros."""
    generator = torch.Generator().manual_seed(seed)
    return torch.rand(n, n, generator=generator, dtype=torch.float64).add(0.1).softmax(1)


def product(pairs: Tensors) -> Tensor:
    return pairs["site.B"] @ pairs["site.A"]


def truncated(matrix: Tensor, r: int) -> Tensor:
    U, S, Vh = torch.linalg.svd(matrix, full_matrices=False)
    best: Tensor = U[..., :r] * S[..., None, :r] @ Vh[..., :r, :]
    return best


# products


@some
@given(seeds, st.integers(2, 5), st.integers(1, 3), st.integers(3, 12), st.integers(3, 12))
def test_products_are_the_truncated_svd_of_the_averaged_product(
    seed: int, n: int, r: int, d_in: int, d_out: int
) -> None:
    pairs, weights = random_pairs(seed, n, r, d_in, d_out), random_weights(seed, n)
    expected = truncated(torch.einsum("ij,jxy->ixy", weights, product(pairs)), r)
    torch.testing.assert_close(product(received(products(), pairs, pairs, weights)), expected, rtol=1e-9, atol=1e-9)


@st.composite
def deficient(draw: st.DrawFn) -> tuple[Tensors, Tensor]:
    """Pairs in float32 of which some are zero, equal, nearly equal, dependent or of another scale, and weights."""
    n, r = draw(st.integers(2, 6)), draw(st.integers(1, 4))
    d_in, d_out, seed = draw(st.integers(r, 60)), draw(st.integers(r, 60)), draw(seeds)
    pairs = single(random_pairs(seed, n, r, d_in, d_out))
    A, B = pairs["site.A"], pairs["site.B"]
    for j in range(n):
        what = draw(
            st.sampled_from(["", "A = 0", "B = 0", "equal", "near", "opposite", "dependent", "low rank", "scale"])
        )
        match what:
            case "A = 0":
                A[j] = 0
            case "B = 0":
                B[j] = 0
            case "equal":
                A[j], B[j] = A[0], B[0]
            case "near":
                A[j], B[j] = A[0] * (1 + 1e-6 * A[j]), B[0] + 1e-4 * B[j]
            case "opposite":
                A[j], B[j] = A[0], -B[0]
            case "dependent":
                A[j] = A[0].flip(0) + A[-1]
            case "low rank":
                B[j, :, 1:] = 0
            case "scale":
                A[j], B[j] = A[j] * 1e-5, B[j] * 1e5
    return pairs, random_weights(seed, n)


@pytest.mark.thorough
@settings(some, max_examples=200)
@given(deficient())
def test_products_of_deficient_adapters_are_as_near_as_rank_r_can_be(case: tuple[Tensors, Tensor]) -> None:
    pairs, weights = case
    mixed = received(products(), pairs, pairs, weights)
    A, B = double(mixed).values()
    r = A.shape[1]
    exact = torch.einsum("ij,jxy->ixy", weights, product(double(pairs)))
    cut = 1e-7 * max(B.shape[1], len(weights) * r)  # what is below counts as zero
    for got, want in zip(B @ A, exact, strict=True):
        S = torch.linalg.svdvals(want)
        assert torch.linalg.matrix_norm(got - want, 2) <= max(S[r] if r < len(S) else 0, 2 * cut * S[0]) + 1e-6 * S[0]
    unit = torch.linalg.vector_norm(pairs["site.A"], dim=-1).amin(-1) > 0  # own A has rank r, so it can fill in
    eye = torch.eye(r, dtype=torch.float64).expand(len(A), -1, -1)
    torch.testing.assert_close(3 * (A @ A.mT)[unit], eye[unit], rtol=0, atol=1e-5)


def single(pairs: Tensors) -> Tensors:
    return {name: x.float() for name, x in pairs.items()}


def double(pairs: Tensors) -> Tensors:
    return {name: x.double() for name, x in pairs.items()}


@some
@given(seeds, st.sampled_from([(2, 3, 20, 40), (11, 8, 384, 200), (5, 4, 12, 30)]))
def test_products_of_float32_adapters_show_no_rounding_but_the_last(
    seed: int, shape: tuple[int, int, int, int]
) -> None:
    pairs, weights = single(random_pairs(seed, *shape)), random_weights(seed, shape[0])
    expected = truncated(torch.einsum("ij,jxy->ixy", weights, product(double(pairs))), shape[1])
    error = product(double(received(products(), pairs, pairs, weights))) - expected
    assert (error.norm(dim=(1, 2)) < 3e-7 * expected.norm(dim=(1, 2))).all()


@pytest.mark.parametrize("rank", [0, 3, 8])
def test_products_of_equal_adapters_of_real_size_stay_what_they_are(rank: int) -> None:
    pairs = take(single(random_pairs(rank, 1, 8, 1024, 768)), torch.zeros(11, dtype=torch.long))
    pairs["site.A"][..., rank:, :] = 0
    mixed = received(products(), pairs, pairs, torch.full((11, 11), 1 / 11))
    torch.testing.assert_close(product(mixed), product(pairs), rtol=0, atol=1e-4)


@some
@given(seeds, st.integers(0, 3))
def test_products_in_shared_coordinates_are_those_that_each_receiver_gets_alone(seed: int, rank: int) -> None:
    pairs, weights = random_pairs(seed, 4, 3, 40, 50), random_weights(seed, 4)
    pairs["site.B"][..., rank:] = 0
    everyone, alone = (list(mixers.groups(rows)) for rows in (weights, weights[:1]))
    assert mixers._coordinates(pairs["site.A"], everyone)[1] is not None
    assert mixers._coordinates(pairs["site.A"], alone)[1] is None
    together = received(products(), pairs, pairs, weights)
    for i in range(4):
        own = take(pairs, slice(i, i + 1))
        for name, x in received(products(), own, pairs, weights[i : i + 1]).items():
            torch.testing.assert_close(x, together[name][i : i + 1], rtol=1e-9, atol=1e-9)


@some
@given(seeds)
def test_rows_of_a_are_orthogonal_and_as_long_as_at_the_start(seed: int) -> None:
    pairs = random_pairs(seed, 3, 2, 5, 4)
    A = received(products(), pairs, pairs, random_weights(seed, 3))["site.A"]
    torch.testing.assert_close(A @ A.mT, torch.eye(2, dtype=torch.float64).expand(3, 2, 2) / 3)


def test_rows_of_a_start_as_long_as_products_leave_them() -> None:
    model = attach(torch.nn.Sequential(torch.nn.Linear(4096, 64)), ["0"], r=64, lora_alpha=64)
    start = init_adapters(model, 2, seed=0)
    rows = {"site.A": start["0.A"].double(), "site.B": random_pairs(0, 2, 64, 4096, 64)["site.B"]}
    mixed = received(products(), rows, rows, random_weights(0, 2))["site.A"]
    torch.testing.assert_close(rows["site.A"].norm(dim=2).mean(), mixed.norm(dim=2).mean(), rtol=1e-2, atol=0)


def test_what_rounding_alone_adds_to_a_product_is_no_direction_of_it() -> None:
    pairs = single(random_pairs(0, 2, 2, 40, 30))
    pairs["site.B"][..., 1] = 0
    pairs["site.B"][1] = 0.7 * pairs["site.B"][0]  # the same direction but for rounding: the mean has rank 1
    mixed = received(products(), pairs, pairs, random_weights(0, 2))
    assert (mixed["site.B"][..., 0] != 0).any()
    assert (mixed["site.B"][..., 1] == 0).all()


@some
@given(seeds, st.integers(0, 3))
def test_every_direction_of_b_gets_a_gradient_after_products(seed: int, rank: int) -> None:
    r = 3
    pairs, weights = random_pairs(seed, 3, r, 8, 6), random_weights(seed, 3)
    generator = torch.Generator().manual_seed(seed)
    pairs["site.A"][1:] = pairs["site.A"][0]  # one A, so that the averaged product has the rank of B's columns
    pairs["site.B"][..., torch.randperm(r, generator=generator)[rank:]] = 0
    data = torch.randn(8, 20, generator=generator, dtype=torch.float64)
    target = torch.randn(6, 20, generator=generator, dtype=torch.float64)

    def columns_with_gradient(A: Tensor, B: Tensor) -> int:
        B = B.clone().requires_grad_()
        (gradient,) = torch.autograd.grad((B @ A @ data - target).square().sum(), B)
        return int((gradient.norm(dim=-2) > 1e-6).sum())

    mixed = take(received(products(), pairs, pairs, weights), slice(0, 1))
    assert columns_with_gradient(mixed["site.A"], mixed["site.B"]) == r

    U, S, Vh = torch.linalg.svd(torch.einsum("j,jxy->xy", weights[0], product(pairs)))
    root = S[:r].where(S[:r] > 1e-9, 0).sqrt()
    assert columns_with_gradient(root[:, None] * Vh[:r], U[:, :r] * root) == rank  # the split by square roots


@some
@given(seeds, st.integers(0, 2))
def test_free_directions_come_from_the_receivers_own_a(seed: int, rank: int) -> None:
    pairs = random_pairs(seed, 2, 3, 8, 6)
    pairs["site.A"][1] = pairs["site.A"][0]
    pairs["site.B"][..., rank:] = 0
    mixed = received(products(), pairs, pairs, random_weights(seed, 2))
    A, own = mixed["site.A"], pairs["site.A"]
    torch.testing.assert_close(A @ torch.linalg.pinv(own) @ own, A, rtol=1e-9, atol=1e-9)
    torch.testing.assert_close(A @ A.mT, torch.eye(3, dtype=torch.float64).expand(2, 3, 3) / 3)
    assert torch.equal(mixed["site.B"][..., rank:], torch.zeros(2, 6, 3 - rank, dtype=torch.float64))


@some
@given(seeds, st.integers(0, 2))
def test_mixing_again_leaves_free_directions_where_they_are(seed: int, rank: int) -> None:
    pairs = take(random_pairs(seed, 1, 3, 8, 6), torch.tensor([0, 0]))
    pairs["site.B"][..., rank:] = 0
    half = torch.full((2, 2), 0.5, dtype=torch.float64)
    once = received(products(), pairs, pairs, half)
    twice = received(products(), once, once, half)
    for name in once:
        torch.testing.assert_close(twice[name], once[name], rtol=1e-9, atol=1e-9)


@some
@given(seeds, st.booleans())
def test_products_do_not_depend_on_the_order_of_neighbours(seed: int, start: bool) -> None:
    pairs, weights = random_pairs(seed, 4, 3, 8, 6), random_weights(seed, 4)
    if start:
        pairs["site.B"].zero_()
    order = torch.tensor([2, 0, 3, 1])
    mixed = received(products(), pairs, pairs, weights)
    reordered = received(products(), pairs, take(pairs, order), weights[:, order])
    for name in mixed:
        torch.testing.assert_close(reordered[name], mixed[name], rtol=1e-8, atol=1e-8)


@some
@given(seeds)
def test_products_do_not_depend_on_the_signs_of_heard_directions(seed: int) -> None:
    pairs, weights = random_pairs(seed, 3, 2, 7, 6), random_weights(seed, 3)
    flip = torch.tensor([1.0, -1.0], dtype=torch.float64)
    flipped = {"site.A": flip[:, None] * pairs["site.A"], "site.B": pairs["site.B"] * flip}
    mixed, same = (received(products(), pairs, heard, weights) for heard in (pairs, flipped))
    for name in mixed:
        torch.testing.assert_close(same[name], mixed[name], rtol=1e-8, atol=1e-8)


@pytest.mark.parametrize("mixer", [products(), corrected(0.1)], ids=["products", "corrected"])
def test_small_chunks_change_nothing(mixer: Mixer, monkeypatch: pytest.MonkeyPatch) -> None:
    pairs, weights = random_pairs(0, 7, 2, 6, 5), random_weights(0, 7)
    whole = received(mixer, pairs, pairs, weights)
    monkeypatch.setattr(mixers, "_CHUNK_FLOATS", 2 * 7 * (2 * 6 + 5 * 2))  # two receivers at a time
    for name, tensor in received(mixer, pairs, pairs, weights).items():
        torch.testing.assert_close(tensor, whole[name], rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize("mixer", [products(), corrected(0.1)], ids=["products", "corrected"])
def test_a_receiver_that_heard_only_itself_keeps_its_pair_bit_for_bit(mixer: Mixer) -> None:
    pairs = random_pairs(0, 3, 2, 6, 5)
    weights = torch.tensor([[0.5, 0.0, 0.5], [0.0, 1.0, 0.0], [0.5, 0.0, 0.5]], dtype=torch.float64)
    mixed = received(mixer, pairs, pairs, weights)
    for name in pairs:
        assert torch.equal(mixed[name][1], pairs[name][1])
        assert not torch.equal(mixed[name][0], pairs[name][0])


# corrected


@some
@given(seeds, st.integers(1, 5), st.integers(1, 3), st.sampled_from([1e-2, 0.1, 10.0]))
def test_the_correction_is_the_least_squares_solution_over_whole_products(
    seed: int, n: int, r: int, ridge: float
) -> None:
    pairs, weights = random_pairs(seed, n, r, 8, 6), random_weights(seed, n)
    mixed = received(corrected(ridge), pairs, pairs, weights)
    for i in range(n if n > 1 else 0):
        mean_A, mean_B = (torch.einsum("j,jab->ab", weights[i], pairs[f"site.{what}"]) for what in "AB")
        wanted = torch.einsum("j,jab->ab", weights[i], product(pairs))
        # The rows of D minimise |left - D mean_A|² + ridge |D|²: one least-squares problem with the penalty below it.
        below = torch.cat([mean_A.mT, ridge**0.5 * torch.eye(r, dtype=torch.float64)])
        left = torch.cat([(wanted - mean_B @ mean_A).mT, torch.zeros(r, 6, dtype=torch.float64)])
        D = torch.linalg.lstsq(below, left).solution.mT
        torch.testing.assert_close(mixed["site.A"][i], mean_A, rtol=1e-9, atol=1e-9)
        torch.testing.assert_close(mixed["site.B"][i], mean_B + D, rtol=1e-7, atol=1e-7)
        plain = received(gossip(), pairs, pairs, weights)
        assert (product(mixed)[i] - wanted).norm() <= (product(plain)[i] - wanted).norm() + 1e-9


def test_a_large_penalty_leaves_plain_averages_and_equal_pairs_need_no_correction() -> None:
    pairs, weights = random_pairs(0, 4, 2, 8, 6), random_weights(0, 4)
    averaged = received(gossip(), pairs, pairs, weights)
    equal = {name: x[:1].expand(4, -1, -1).clone() for name, x in pairs.items()}
    for name in pairs:
        torch.testing.assert_close(received(corrected(1e9), pairs, pairs, weights)[name], averaged[name])
        torch.testing.assert_close(received(corrected(1e-3), equal, equal, weights)[name], equal[name])


RIDGES = [5e-324, 1e-300, 1e-30, 1e-12, 1e-4, 1e-2, 1.0, 1e300]


@st.composite
def hostile(draw: st.DrawFn) -> Tensors:
    """Pairs that are within the bound of one another, of which the mean A is singular or nearly so."""
    r, seed = draw(st.integers(1, 4)), draw(seeds)
    pairs, n = random_pairs(seed, 4, r, 8, 6), 4
    A, B = pairs["site.A"], pairs["site.B"]
    B[1:] *= draw(st.sampled_from([1e-300, 1.0, 30.0, 100.0]))
    match draw(st.sampled_from(["cancels", "rows alike", "zero", "falls", "near"])):
        case "cancels":
            A[1:] = -A[:1] / (n - 1) * (1 + draw(st.sampled_from([0, 1e-16, 1e-8, 1e-3])) * A[1:])
        case "rows alike":
            A[:] = A[:, :1]
        case "zero":
            A[:, 0] = 0
        case "falls":
            left, _, right = torch.linalg.svd(A, full_matrices=False)
            A[:] = (left * 10.0 ** (-draw(st.integers(6, 300)) * torch.arange(r).double())) @ right
        case "near":
            A[:] = 1e-30 * A
    return pairs


@settings(some, max_examples=60)
@given(hostile(), st.sampled_from(RIDGES))
def test_a_correction_is_bounded_however_near_to_singular_the_mean_is_and_whatever_the_ridge(
    pairs: Tensors, ridge: float
) -> None:
    weights = torch.full((4, 4), 1 / 4, dtype=torch.float64)
    mixed, plain = (received(mixer, pairs, pairs, weights) for mixer in (corrected(ridge), gossip()))
    cross = (product(pairs).mean(0) - product(plain)[0]).norm()
    rounding = 1e-6 * sum(x.norm() for x in product(pairs)) + 1e-300
    D = mixed["site.B"] - plain["site.B"]
    assert torch.linalg.matrix_norm(D).max() <= mixers.STEEPEST * cross * (1 + 1e-9) + rounding
    far = torch.linalg.matrix_norm(product(mixed) - product(pairs).mean(0)).max()
    assert far <= cross * (1 + 1e-9) + rounding, "no farther than without a correction"


def test_a_ridge_from_a_hundredth_on_is_the_only_bound() -> None:
    squares = torch.linspace(0, 2, 50, dtype=torch.float64).square()[None]
    for ridge in (0.01, 0.1, 10.0):
        torch.testing.assert_close(mixers._gain(squares, ridge), 1 / (squares + ridge), rtol=1e-12, atol=0)


@settings(some, max_examples=60)
@given(hostile())
def test_products_of_what_is_nearly_singular_are_finite_and_no_larger_than_what_they_are_made_of(
    pairs: Tensors,
) -> None:
    weights = torch.full((4, 4), 1 / 4, dtype=torch.float64)
    mixed = received(products(), pairs, pairs, weights)
    assert all(x.isfinite().all() for x in mixed.values())
    largest = torch.linalg.matrix_norm(product(pairs)).max()
    assert torch.linalg.matrix_norm(product(mixed)).max() <= largest * (1 + 1e-6)
    torch.testing.assert_close(3 * mixed["site.A"].square().sum(-1), torch.ones(4, pairs["site.A"].shape[1]).double())
