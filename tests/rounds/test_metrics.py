"""Disagreement and traffic, against dense formulas."""

from collections.abc import Callable

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from peertune.rounds.metrics import (
    before_mixing,
    bytes_sent,
    client_mean,
    consensus_error,
    cross_term,
    diagnostics,
    edges,
    high_ranks,
    mean_drift,
    neighbour_counts,
    neighbourhood_cross_terms,
    relative_disagreement,
)
from peertune.types import Stack, Tensors, payload_bytes, select, stacked

pytestmark = pytest.mark.filterwarnings("ignore:Sparse CSR tensor support is in beta")

some = settings(max_examples=25, derandomize=True)


def random_adapters(seed: int, n: int, dtype: torch.dtype = torch.float64) -> Tensors:
    generator = torch.Generator().manual_seed(seed)
    shapes = {"q.A": (2, 5), "q.B": (4, 2), "v.A": (2, 3), "v.B": (6, 2), "out.bias.head": (3,)}
    return {name: torch.randn(n, *shape, generator=generator, dtype=dtype) for name, shape in shapes.items()}


adapters = st.builds(random_adapters, st.integers(0, 2**31), st.integers(1, 6))


@some
@given(adapters)
def test_the_consensus_error_is_the_rms_distance_from_the_mean(stack: Tensors) -> None:
    flat = torch.cat([tensor.flatten(1) for tensor in stack.values()], dim=1)
    expected = (flat - flat.mean(0)).norm(dim=1).square().mean().sqrt()
    assert consensus_error(stack) == pytest.approx(float(expected), abs=1e-12)


@some
@given(adapters)
def test_the_cross_term_is_the_mean_of_products_less_the_product_of_means(stack: Tensors) -> None:
    squares = 0.0
    for site in ("q", "v"):
        A, B = stack[f"{site}.A"], stack[f"{site}.B"]
        squares += float(((B @ A).mean(0) - B.mean(0) @ A.mean(0)).norm() ** 2)
    assert cross_term(stack) == pytest.approx(squares**0.5, abs=1e-12)


@some
@given(adapters)
def test_at_a_site_the_cross_term_is_at_most_the_product_of_consensus_errors(stack: Tensors) -> None:
    for site in ("q", "v"):
        pair = {name: stack[f"{site}.{name}"] for name in "AB"}
        bound = consensus_error(select(pair, {"A"})) * consensus_error(select(pair, {"B"}))
        assert cross_term(pair) <= bound * (1 + 1e-12) + 1e-15


def test_clients_that_agree_have_no_errors() -> None:
    stack = {name: tensor.expand(4, *tensor.shape[1:]) for name, tensor in random_adapters(0, 1).items()}
    assert consensus_error(stack) == pytest.approx(0, abs=1e-15)
    assert cross_term(stack) == pytest.approx(0, abs=1e-15)


def test_clients_that_share_a_have_no_cross_term() -> None:
    stack = random_adapters(0, 4)
    for name in ("q.A", "v.A"):
        stack[name] = stack[name][:1].expand_as(stack[name])
    assert cross_term(stack) == pytest.approx(0, abs=1e-15)


def test_the_mean_drift_is_the_distance_between_the_means() -> None:
    before = random_adapters(0, 4)
    after = client_mean({name: tensor + 2 for name, tensor in before.items()})
    for kinds, elements in (({"A"}, 2 * 5 + 2 * 3), ({"A", "head"}, 2 * 5 + 2 * 3 + 3), ((), 0)):
        assert mean_drift(client_mean(select(before, kinds)), after) == pytest.approx(2 * elements**0.5)


def test_permuting_clients_does_not_drift() -> None:
    before = random_adapters(0, 4)
    after = {name: tensor.flip(0) for name, tensor in before.items()}
    assert mean_drift(client_mean(before), client_mean(after)) == pytest.approx(0, abs=1e-15)


def test_float32_is_summed_in_float64() -> None:
    offset = 2.0**12
    small = torch.tensor([[-(2.0**-11)], [2.0**-11]])
    assert consensus_error({"A": offset + small}) == pytest.approx(2.0**-11, rel=1e-12)
    before, after = (client_mean({"A": offset + x}) for x in (small, 2 * small.abs()))
    assert mean_drift(before, after) == pytest.approx(2.0**-10)


def test_diagnostics_name_each_kind_there_is() -> None:
    before, after = random_adapters(0, 3), random_adapters(1, 3)
    sent = before_mixing(stacked(select(before, {"B"})))
    found = diagnostics(sent, stacked(after))
    assert found == {
        "consensus_error_A": consensus_error(select(after, {"A"})),
        "consensus_error_B": consensus_error(select(after, {"B"})),
        "consensus_error_head": consensus_error(select(after, {"head"})),
        "cross_term": cross_term(after),
        "mean_drift": mean_drift(sent.mean, client_mean(after)),
        "contraction_B": (consensus_error(select(after, {"B"})) / consensus_error(select(before, {"B"}))) ** 2,
    }
    frozen = select(after, {"A", "B"})
    assert "consensus_error_head" not in diagnostics(before_mixing(stacked(frozen)), stacked(frozen))
    assert diagnostics(before_mixing(stacked({})), stacked(after))["mean_drift"] == 0


def test_clients_that_agree_before_mixing_have_no_contraction() -> None:
    stack = {name: tensor.expand(4, *tensor.shape[1:]) for name, tensor in random_adapters(0, 1).items()}
    assert not [
        name for name in diagnostics(before_mixing(stacked(stack)), stacked(stack)) if name.startswith("contraction")
    ]


@pytest.mark.parametrize(("apart", "measured"), [(1e-3, True), (1e-5, True), (2e-6, True), (5e-7, False)])
def test_clients_agree_up_to_the_rounding_of_float32(apart: float, measured: bool) -> None:
    stack = {"q.A": 7.0 * torch.tensor([[1 + apart], [1 - apart]], dtype=torch.float64)}
    assert ("contraction_A" in diagnostics(before_mixing(stacked(stack)), stacked(stack))) == measured


@some
@given(adapters, st.integers(0, 2**31))
def test_a_neighbourhoods_cross_term_is_what_its_own_average_leaves_out(stack: Tensors, seed: int) -> None:
    clients = len(stack["q.A"])
    generator = torch.Generator().manual_seed(seed)
    weights = torch.rand(clients, clients, generator=generator, dtype=torch.float64)
    weights *= torch.rand(clients, clients, generator=generator) < 0.6
    weights += torch.eye(clients)
    weights /= weights.sum(1, keepdim=True)
    for layout in (weights, weights.to_sparse()):
        found = neighbourhood_cross_terms(stack, layout)
        for i, row in enumerate(weights):
            squares = 0.0
            for site in ("q", "v"):
                A, B = stack[f"{site}.A"], stack[f"{site}.B"]
                w = row[:, None, None]
                squares += float(((w * (B @ A)).sum(0) - (w * B).sum(0) @ (w * A).sum(0)).norm() ** 2)
            assert found[i] == pytest.approx(squares**0.5, abs=1e-7)


@pytest.mark.parametrize("d", [3, 200])
def test_the_two_ways_to_a_products_norm_agree(d: int) -> None:
    generator = torch.Generator().manual_seed(d)
    A, B = (torch.randn(6, *shape, generator=generator, dtype=torch.float64) for shape in ((2, d), (d, 2)))
    C = ((B - B.mean(0)) @ (A - A.mean(0))).mean(0)
    assert cross_term({"q.A": A, "q.B": B}) == pytest.approx(float(C.norm()), rel=1e-9)


def test_the_neighbourhood_of_everybody_has_the_cross_term_of_all() -> None:
    stack = random_adapters(0, 5)
    weights = torch.full((5, 5), 0.2, dtype=torch.float64)
    assert neighbourhood_cross_terms(stack, weights) == pytest.approx([cross_term(stack)] * 5)
    assert neighbourhood_cross_terms(stack, torch.eye(5)) == [0] * 5
    assert neighbourhood_cross_terms(select(stack, {"B"}), weights) == [0] * 5


@pytest.mark.parametrize("layout", [Tensor.clone, Tensor.to_sparse], ids=["dense", "coo"])
def test_edges_are_the_pairs_with_weight(layout: Callable[[Tensor], Tensor]) -> None:
    weights = torch.tensor([[0.5, 0.0, 0.5], [0.0, 0.9, 0.1], [0.5, 0.1, 0.4]])
    assert edges(layout(weights), [0, 1, 2], [0, 1, 2]) == [(0, 2), (1, 2)]
    assert edges(layout(weights[:1]), [4], [4, 5, 1]) == [(1, 4)]


def test_bytes_are_one_clients_payload_for_each_of_its_neighbours() -> None:
    payload = select(random_adapters(0, 3, torch.float32), {"B", "head"})
    assert payload_bytes(payload) == 4 * (4 * 2 + 6 * 2 + 3)
    assert payload_bytes({}) == 0
    assert bytes_sent(stacked(payload), [0, 1, 2]) == [0, 92, 184]


@pytest.mark.parametrize("layout", [Tensor.clone, Tensor.to_sparse, Tensor.to_sparse_csr], ids=["dense", "coo", "csr"])
def test_neighbours_are_the_others_with_weight(layout: Callable[[Tensor], Tensor]) -> None:
    weights = torch.tensor([[0.5, 0.0, 0.5, 0.0], [0.0, 1.0, 0.0, 0.0], [0.25, 0.25, 0.25, 0.25]])
    assert neighbour_counts(layout(weights)) == [1, 0, 3]


def test_a_stored_zero_is_no_neighbour() -> None:
    entries = torch.tensor([[0, 0, 1, 1], [0, 1, 0, 1]])
    dropped = torch.sparse_coo_tensor(entries, torch.tensor([1.0, 0.0, 0.0, 1.0]), (2, 2), check_invariants=True)
    assert neighbour_counts(dropped) == [0, 0]


@some
@given(adapters)
def test_disagreement_is_told_over_what_clients_hold(found: Tensors) -> None:
    seen = relative_disagreement(found, diagnostics(before_mixing(stacked(found)), stacked(found)))
    clients = len(found["q.A"])
    for of in ("A", "B"):
        rows = torch.cat([x.flatten(1) for name, x in found.items() if name.endswith(of)], dim=1)
        apart = (rows - rows.mean(0)).square().sum(1).mean().sqrt()
        assert seen[of] == pytest.approx(float(apart / rows.square().sum(1).mean().sqrt()), abs=1e-12)
    means, left_out = [], []
    for site in "qv":
        A, B = found[f"{site}.A"], found[f"{site}.B"]
        means.append(torch.stack([B[k] @ A[k] for k in range(clients)]).mean(0).flatten())
        left_out.append(means[-1] - (B.mean(0) @ A.mean(0)).flatten())
    assert seen["cross"] == pytest.approx(float(torch.cat(left_out).norm() / torch.cat(means).norm()), abs=1e-6)


def test_where_clients_hold_nothing_they_disagree_about_nothing() -> None:
    found = {"q.A": torch.randn(3, 2, 5), "q.B": torch.zeros(3, 4, 2)}
    seen = relative_disagreement(found, diagnostics(before_mixing(stacked(found)), stacked(found)))
    assert (seen["cross"], seen["B"]) == (0, 0)
    assert seen["A"] > 0


@pytest.mark.parametrize("d", [6, 40])  # smaller, and larger, than all ranks together
def test_what_high_ranks_know_is_that_of_the_products_themselves(d: int) -> None:
    draw, stacks, products = torch.Generator().manual_seed(d), [], dict[str, list[torch.Tensor]]()
    for rows, r in (([0, 3], 2), ([1, 2, 4], 5)):
        tensors = {f"{site}.A": torch.randn(len(rows), r, d, generator=draw) for site in "qv"}
        tensors |= {f"{site}.B": torch.randn(len(rows), d + 1, r, generator=draw) for site in "qv"}
        stacks.append(Stack(torch.tensor(rows), tensors))
        for site in "qv":
            products.setdefault(site, []).extend(tensors[f"{site}.B"].double() @ tensors[f"{site}.A"].double())
    beyond = whole = apart = mean = 0.0
    for each in products.values():
        squares = torch.linalg.svdvals(torch.stack(each).mean(0)).square()
        beyond, whole = beyond + float(squares[2:].sum()), whole + float(squares.sum())
        high = torch.stack(each[2:])
        apart += float((high - high.mean(0)).square().sum((1, 2)).mean())
        mean += float(high.mean(0).square().sum())
    assert high_ranks(stacks, [2, 5]) == pytest.approx(
        {"energy_beyond": beyond / whole, "highest_apart": (apart / mean) ** 0.5}
    )
    zero = [Stack(rows, {name: 0 * x for name, x in tensors.items()}) for rows, tensors in stacks]
    assert high_ranks(zero, [2, 5]) == {"energy_beyond": 0, "highest_apart": 0}
