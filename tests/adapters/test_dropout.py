"""Keyed dropout: masks that look random, and depend on the row, the layer and the element alone."""

from collections.abc import Iterator

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from numpy.typing import NDArray
from torch import Tensor

from peertune.adapters.dropout import KeyedDropout, keyed_dropout
from peertune.adapters.rows import Rows, bound_rows
from peertune.data.batches import pack_rows
from peertune.errors import ModelError
from peertune.randomness import Draw, words
from peertune.types import Packing


def make_keys(rows: int, step: int = 0, client: int = 0) -> Tensor:
    """Keys as training makes them."""
    return torch.from_numpy(words(0, Draw.DROPOUT, client, step, torch.arange(rows).numpy()).view("int64"))


def make_rows(keys: Tensor, packing: Packing | None = None) -> Rows:
    """The rows of these keys, all of one client."""
    return Rows({}, torch.zeros_like(keys), keys, True, {}, packing)


def kept(shape: tuple[int, ...], p: float, *, keys: Tensor | None = None, stream: int = 0) -> Tensor:
    """What survives, as 0 and 1."""
    rows = make_rows(make_keys(shape[0]) if keys is None else keys)
    return (keyed_dropout(torch.ones(shape, dtype=torch.float64), p, rows, stream) > 0).double()


def assert_uncorrelated(a: Tensor, b: Tensor) -> None:
    """Fail where two samples of 0 and 1 go together by more than 5 standard errors."""
    a, b = a.flatten() - a.mean(), b.flatten() - b.mean()
    correlation = float((a * b).mean() / (a.square().mean() * b.square().mean()).sqrt())
    assert abs(correlation) < 5 * len(a) ** -0.5


@pytest.fixture(autouse=True)
def _no_global_draws() -> Iterator[None]:
    before = torch.get_rng_state()
    yield
    assert torch.equal(before, torch.get_rng_state()), "drew from PyTorch's global generator"


@pytest.mark.parametrize("p", [0.01, 0.1, 0.25, 0.5, 0.9, 0.99])
def test_the_share_of_zeroed_elements_is_p(p: float) -> None:
    zeroed = 1 - kept((64, 50, 96), p)
    assert abs(float(zeroed.mean()) - p) < 2**-32 + 5 * (p * (1 - p) / zeroed.numel()) ** 0.5


@pytest.mark.parametrize("axis", [0, 1, 2])
def test_the_share_is_as_even_over_rows_tokens_and_features_as_a_binomials(axis: int) -> None:
    p, zeroed = 0.2, 1 - kept((80, 80, 80), 0.2)
    shares = zeroed.transpose(0, axis).flatten(1).mean(1)
    expected = p * (1 - p) / 80**2
    assert float((shares - p).abs().max()) < 5 * expected**0.5
    assert 0.5 < float(shares.var()) / expected < 1.6


@pytest.mark.parametrize("p", [0.1, 0.5])
def test_survivors_are_scaled_so_that_the_mean_stays(p: float) -> None:
    x = torch.linspace(1.0, 2.0, 500_000, dtype=torch.float64).view(100, 50, 100)
    dropped = keyed_dropout(x, p, make_rows(make_keys(100)), 3)
    torch.testing.assert_close(dropped[dropped > 0], (x / (1 - p))[dropped > 0])
    assert float(dropped.mean()) == pytest.approx(float(x.mean()), rel=0.01)


def test_bfloat16_is_scaled_without_a_bias() -> None:
    x = torch.linspace(1.0, 2.0, 500_000).view(100, 50, 100).bfloat16()
    dropped = keyed_dropout(x, 0.1, make_rows(make_keys(100)), 3).double()
    scale = dropped[dropped > 0].sum() / x[dropped > 0].double().sum()
    assert float(scale) == pytest.approx(1 / 0.9, rel=2e-4)  # one rounded factor would be off by 1.6e-3


@pytest.mark.parametrize("p", [0.1, 0.5])
@pytest.mark.parametrize("gap", [1, 2, 3, 8])
def test_masks_near_each_other_are_uncorrelated(p: float, gap: int) -> None:
    mask = kept((64, 64, 64), p)
    assert_uncorrelated(mask[gap:], mask[:-gap])  # rows
    assert_uncorrelated(mask[:, gap:], mask[:, :-gap])  # tokens
    assert_uncorrelated(mask[..., gap:], mask[..., :-gap])  # features
    assert_uncorrelated(mask[:, gap:, gap:], mask[:, :-gap, :-gap])
    assert_uncorrelated(mask[:, gap:, :-gap], mask[:, :-gap, gap:])


@pytest.mark.parametrize("p", [0.1, 0.5])
def test_even_and_odd_features_are_uncorrelated(p: float) -> None:
    mask = kept((64, 64, 64), p)
    assert_uncorrelated(mask[..., 0::2], mask[..., 1::2])


@pytest.mark.parametrize("p", [0.1, 0.5])
def test_layers_steps_and_clients_are_uncorrelated(p: float) -> None:
    shape = (64, 32, 64)
    mask = kept(shape, p)
    for stream in (1, 2, 50):
        assert_uncorrelated(mask, kept(shape, p, stream=stream))
    assert_uncorrelated(mask, kept(shape, p, keys=make_keys(64, step=1)))
    assert_uncorrelated(mask, kept(shape, p, keys=make_keys(64, client=1)))


@pytest.mark.parametrize("p", [0.1, 0.5])
def test_no_two_features_and_no_two_tokens_share_their_masks(p: float) -> None:
    mask = kept((64, 64, 64), p)
    for samples in (mask.flatten(0, 1).T, mask.transpose(0, 1).flatten(1)):  # features, tokens: [64, 4096]
        correlations = torch.corrcoef(samples)
        correlations.fill_diagonal_(0.0)
        assert float(correlations.abs().max()) < 6 * samples.shape[1] ** -0.5
        assert float(correlations.std()) < 1.2 * samples.shape[1] ** -0.5


@pytest.mark.thorough
def test_the_many_features_of_a_wide_layer_are_pairwise_uncorrelated() -> None:
    mask = kept((128, 64, 1536), 0.5).flatten(0, 1).float()  # 1.2 million pairs of features
    correlations = torch.corrcoef(mask.T)
    correlations.fill_diagonal_(0.0)
    assert float(correlations.abs().max()) < 6.5 * len(mask) ** -0.5
    assert float(correlations.std()) == pytest.approx(len(mask) ** -0.5, rel=0.02)
    shares = mask.mean(1)  # of each token: a binomial's, so that features do not go together in larger groups either
    assert float(shares.var()) == pytest.approx(0.25 / mask.shape[1], rel=0.1)


def test_pairs_of_rows_agree_as_often_as_chance_has_it() -> None:
    mask = kept((400, 16, 32), 0.3).flatten(1)
    correlations = torch.corrcoef(mask)
    correlations.fill_diagonal_(0.0)
    assert float(correlations.abs().max()) < 6 * mask.shape[1] ** -0.5


some = settings(max_examples=40, derandomize=True)


@some
@given(st.lists(st.integers(1, 7), min_size=1, max_size=3), st.lists(st.integers(0, 4), min_size=3, max_size=3))
def test_an_element_keeps_its_fate_however_far_its_row_is_padded(sizes: list[int], further: list[int]) -> None:
    wide = [size + more for size, more in zip(sizes, further, strict=False)]
    small, large = kept((3, *sizes), 0.5), kept((3, *wide), 0.5)
    assert torch.equal(large[(slice(None), *(slice(size) for size in sizes))], small)


@some
@given(st.permutations(range(6)), st.integers(1, 6))
def test_a_row_keeps_its_mask_in_any_order_and_company(order: list[int], size: int) -> None:
    keys = make_keys(6)
    whole = kept((6, 4, 5), 0.5, keys=keys)
    chosen = order[:size]
    assert torch.equal(kept((size, 4, 5), 0.5, keys=keys[chosen]), whole[chosen])


lengths_of_rows = st.lists(st.integers(1, 30), min_size=4, max_size=12).map(np.array)


def plan(lengths: NDArray[np.int64]) -> Packing:
    """How the rows are packed; at least two of at most 30 tokens share a block."""
    packing = pack_rows(np.append(lengths, [1, 1]))
    assert packing is not None
    return packing


@some
@given(lengths_of_rows, st.lists(st.integers(1, 4), max_size=2), st.integers(1, 9))
def test_packed_activations_keep_the_masks_of_padded_ones(
    lengths: NDArray[np.int64], middle: list[int], features: int
) -> None:
    packing = plan(lengths)
    keys = make_keys(len(lengths) + 2)
    padded = kept((len(keys), packing.width, *middle, features), 0.5, keys=keys, stream=4)
    ones = torch.ones(*packing.rows.shape, *middle, features)
    packed = keyed_dropout(ones, 0.5, make_rows(keys, packing), 4)
    real = packing.rows >= 0
    assert torch.equal((packed > 0)[real], (padded > 0)[packing.rows[real], packing.positions[real]])


@some
@given(lengths_of_rows, st.integers(1, 4))
def test_packed_scores_keep_the_masks_of_padded_ones(lengths: NDArray[np.int64], heads: int) -> None:
    packing = plan(lengths)
    keys = make_keys(len(lengths) + 2)
    (blocks, slots), s = packing.rows.shape, packing.width
    padded = keyed_dropout(torch.ones(len(keys), heads, s, s), 0.5, make_rows(keys), 4, scores=True)
    packed = keyed_dropout(torch.ones(blocks, heads, slots, slots), 0.5, make_rows(keys, packing), 4, scores=True)
    block, query, key = (
        (packing.rows[:, :, None] == packing.rows[:, None]) & (packing.rows >= 0)[:, None]
    ).nonzero().T  # fmt: skip
    row, place = packing.rows[block, query], packing.positions
    expected = padded[row, :, place[block, query], place[block, key]]
    assert torch.equal(packed[block, :, query, key], expected)


def test_masks_within_a_block_are_uncorrelated() -> None:
    packing = plan(np.full(800, 12))
    rows, (blocks, slots) = make_rows(make_keys(802), packing), packing.rows.shape
    mask = (keyed_dropout(torch.ones(blocks, slots, 64), 0.3, rows, 0) > 0).double()
    scores = (keyed_dropout(torch.ones(blocks, 4, slots, slots), 0.3, rows, 0, scores=True) > 0).double()
    mask, scores = mask[:-1], scores[:-1]  # the last block has empty slots, which are all alike
    for gap in (1, 4, 12, 24):
        assert_uncorrelated(mask[:, gap:], mask[:, :-gap])
        assert_uncorrelated(mask[..., gap:], mask[..., :-gap])
        assert_uncorrelated(scores[:, :, gap:], scores[:, :, :-gap])
    assert_uncorrelated(scores[:, 1:], scores[:, :-1])
    for own in (scores[..., first : first + 12, first : first + 12] for first in (0, 12, 24, 36)):
        assert_uncorrelated(own[..., 1:], own[..., :-1])


def test_a_layer_that_turns_its_tokens_to_another_axis_is_refused_in_blocks() -> None:
    packing = plan(np.full(5, 10))
    rows = make_rows(make_keys(7), packing)
    with pytest.raises(ModelError, match="a layer got 2 rows where the batch has 7"):
        keyed_dropout(torch.ones(2, 1, 48, 5), 0.5, rows, 0)


@pytest.mark.parametrize("shape", [(5, 1), (5, 7), (5, 3, 7), (5, 2, 3, 9), (2, 2, 2, 2, 1)], ids=str)
def test_it_takes_any_number_of_axes_and_odd_sizes(shape: tuple[int, ...]) -> None:
    x = torch.randn(shape, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    dropped = keyed_dropout(x, 0.5, make_rows(make_keys(shape[0])), 1)
    torch.testing.assert_close(dropped, 2 * x * kept(shape, 0.5, stream=1), rtol=0, atol=0)


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16], ids=str)
def test_the_mask_does_not_depend_on_the_dtype(dtype: torch.dtype) -> None:
    dropped = keyed_dropout(torch.ones(4, 6, 8, dtype=dtype), 0.3, make_rows(make_keys(4)), 0)
    assert dropped.dtype == dtype
    assert torch.equal((dropped > 0).double(), kept((4, 6, 8), 0.3))


def test_nothing_is_zeroed_where_p_is_0() -> None:
    x = torch.randn(4, 5, 6, generator=torch.Generator().manual_seed(0))
    assert torch.equal(keyed_dropout(x, 0.0, make_rows(make_keys(4)), 0), x)


@pytest.mark.parametrize("p", [1 - 1e-6, 1.0])
def test_everything_is_zeroed_where_p_is_1_or_next_to_it(p: float) -> None:
    assert not keyed_dropout(torch.ones(4, 5, 6), p, make_rows(make_keys(4)), 0).any()


def test_rows_that_are_not_the_batchs_are_refused() -> None:
    with pytest.raises(ModelError, match=r"a layer got 6 rows where the batch has 3.*or model\.dropout=false"):
        keyed_dropout(torch.ones(6, 5), 0.5, make_rows(make_keys(3)), 0)


def test_the_gradient_is_the_scaled_mask() -> None:
    x = torch.randn(4, 5, 7, generator=torch.Generator().manual_seed(0)).double().requires_grad_()
    (grad,) = torch.autograd.grad(keyed_dropout(x, 0.2, make_rows(make_keys(4)), 0).sum(), x)
    torch.testing.assert_close(grad, kept((4, 5, 7), 0.2) / (1 - 0.2))


def test_the_module_drops_in_training_only_and_only_rows_that_are_bound() -> None:
    x, module = torch.ones(4, 6), KeyedDropout(0.5, stream=2)
    rows = make_rows(make_keys(4))
    assert torch.equal(module(x), x)
    with bound_rows(rows):
        assert torch.equal(module(x), keyed_dropout(x, 0.5, rows, 2))
        assert torch.equal(module.eval()(x), x)
