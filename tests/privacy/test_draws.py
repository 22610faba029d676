import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from scipy.stats import binom, kstest

from peertune.privacy.draws import digest, keyed, normals, of_client, sampled, uniform_numbers

SECRET = bytes(range(32))
Told = st.lists(st.text(max_size=4) | st.binary(max_size=4) | st.integers(), max_size=4)


@given(Told, Told)
def test_what_is_told_makes_the_key_and_no_two_tellings_share_one(one: list[str], other: list[str]) -> None:
    assert (keyed(SECRET, *one) == keyed(SECRET, *other)) == ([*map(_typed, one)] == [*map(_typed, other)])


def _typed(part: object) -> tuple[type, object]:
    return type(part), part


def test_another_secret_makes_other_keys_and_each_client_has_its_own() -> None:
    keys = {keyed(secret, "a") for secret in (SECRET, bytes(32), of_client(SECRET, 0), of_client(SECRET, 1))}
    assert len(keys) == 4
    assert of_client(SECRET, 1) == of_client(SECRET, 1)


def test_normal_numbers_are_normal_and_follow_from_the_key() -> None:
    drawn = normals(keyed(SECRET, "noise"), 100_001)
    assert len(drawn) == 100_001
    assert kstest(drawn, "norm").pvalue > 0.01
    assert abs(np.corrcoef(drawn[:-1], drawn[1:])[0, 1]) < 0.01
    assert np.array_equal(drawn, normals(keyed(SECRET, "noise"), 100_001))
    other = normals(keyed(SECRET, "noise", 1), 100_001)
    assert abs(np.corrcoef(drawn, other)[0, 1]) < 0.01
    assert len(normals(SECRET, 0)) == 0


def test_uniform_numbers_are_never_zero_so_that_a_logarithm_is_finite() -> None:
    drawn = uniform_numbers(SECRET, 100_000)
    assert 0 < drawn.min() < 1e-3
    assert 1 - 1e-3 < drawn.max() <= 1
    assert kstest(drawn, "uniform").pvalue > 0.01


@pytest.mark.parametrize("rate", [0.05, 0.5])
def test_each_row_is_drawn_by_itself(rate: float) -> None:
    draws = [sampled(keyed(SECRET, step), 40, rate) for step in range(2_000)]
    sizes = np.array([len(rows) for rows in draws])
    assert sizes.min() < 40 * rate < sizes.max()  # never a fixed number
    counts = np.bincount(np.concatenate(draws), minlength=40)
    assert binom(2_000, rate).ppf(1e-6) < counts.min()
    assert counts.max() < binom(2_000, rate).ppf(1 - 1e-6)
    assert abs(sizes.var() / (40 * rate * (1 - rate)) - 1) < 0.15  # binomial: rows don't hang together


def test_at_the_rate_one_all_rows_are_drawn() -> None:
    assert sampled(SECRET, 5, 1.0).tolist() == [0, 1, 2, 3, 4]


def test_a_digest_tells_names_shapes_types_and_single_bits_apart() -> None:
    x = torch.arange(6, dtype=torch.float32)
    flipped = torch.nextafter(x, torch.tensor(9.0))
    variants = [{"a": x}, {"b": x}, {"a": x.view(2, 3)}, {"a": x.double()}, {"a": flipped}, {"a": x, "b": x}, {}]
    assert len({digest(tensors) for tensors in variants}) == len(variants)
    assert digest({"a": x, "b": flipped}) == digest({"b": flipped, "a": x})
    assert digest({"a": x.view(2, 3).T}) == digest({"a": x.view(2, 3).T.contiguous()})
