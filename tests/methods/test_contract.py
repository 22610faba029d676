"""What every method promises, checked over every row of ALGORITHMS."""

from dataclasses import dataclass
from random import Random

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from peertune.methods.catalogue import ALGORITHMS
from peertune.types import Algorithm, Tensors, kind, select, take

pytestmark = pytest.mark.filterwarnings("ignore:Sparse CSR tensor support is in beta")

METHODS: dict[str, Algorithm] = {
    name: make(switch_every=2) if name == "tad_lora" else make() for name, make in ALGORITHMS.items()
}
LINEAR = ["adf_lora", "dec_lora", "ffa_lora", "local", "rolora", "tad_lora"]  # plain averages of each tensor

every_method = pytest.mark.parametrize("method", METHODS.values(), ids=METHODS.keys())
some = settings(max_examples=8, deadline=None, derandomize=True)


@dataclass(frozen=True)
class Case:
    """A round of some clients on some graph."""

    adapters: Tensors
    weights: Tensor  # [n, n], symmetric, doubly stochastic
    round: int


def metropolis(n: int, edges: list[tuple[int, int]]) -> Tensor:
    """Metropolis-Hastings weights of a graph, the slow and obvious way."""
    linked = torch.zeros(n, n, dtype=torch.float64)
    for i, j in edges:
        linked[i, j] = linked[j, i] = 1
    degree = linked.sum(1)
    weights = linked / (1 + torch.maximum(degree[:, None], degree))
    return weights + torch.diag(1 - weights.sum(1))


@st.composite
def cases(draw: st.DrawFn) -> Case:
    n, r = draw(st.integers(1, 5)), draw(st.integers(1, 3))
    pairs = [(i, j) for i in range(n) for j in range(i)]
    edges = [pair for pair in pairs if draw(st.booleans())]
    generator = torch.Generator().manual_seed(draw(st.integers(0, 2**31)))
    shapes = {
        "layers.0.query.A": (n, r, 5),
        "layers.0.query.B": (n, 4, r),
        "layers.1.value.A": (n, r, 3),
        "layers.1.value.B": (n, 9, r),
        "classifier.weight.head": (n, 2, 4),
        "classifier.bias.head": (n, 2),
    }
    adapters = {name: torch.randn(shape, generator=generator, dtype=torch.float64) for name, shape in shapes.items()}
    return Case(adapters, metropolis(n, edges), draw(st.integers(0, 5)))


def mix(method: Algorithm, case: Case) -> Tensors:
    phase = method.phase(case.round)
    return method.mix(case.adapters, select(case.adapters, phase.send), case.weights, phase)


def assert_close(left: Tensors, right: Tensors, tolerance: float = 1e-9) -> None:
    assert left.keys() == right.keys()
    for name in left:
        torch.testing.assert_close(left[name], right[name], rtol=tolerance, atol=tolerance)


@every_method
@some
@given(cases())
def test_a_receiver_with_its_closed_neighbourhood_gets_what_the_full_matrix_gives_it(
    method: Algorithm, case: Case
) -> None:
    together = mix(method, case)
    phase = method.phase(case.round)
    for i in range(len(case.weights)):
        near = case.weights[i].nonzero()[:, 0].flip(0)
        alone = method.mix(
            take(case.adapters, slice(i, i + 1)),
            take(select(case.adapters, phase.send), near),
            case.weights[i : i + 1, near],
            phase,
        )
        assert_close(alone, take(together, slice(i, i + 1)))


@every_method
@some
@given(cases(), st.randoms(use_true_random=False))
def test_relabelling_the_clients_commutes_with_mixing(method: Algorithm, case: Case, random: Random) -> None:
    order = list(range(len(case.weights)))
    random.shuffle(order)
    new = torch.tensor(order)
    relabelled = Case(take(case.adapters, new), case.weights[new][:, new], case.round)
    assert_close(mix(method, relabelled), take(mix(method, case), new))


@every_method
@some
@given(cases())
def test_the_identity_matrix_changes_no_product(method: Algorithm, case: Case) -> None:
    alone = Case(case.adapters, torch.eye(len(case.weights), dtype=torch.float64), case.round)
    mixed = mix(method, alone)
    for name in [name for name in mixed if kind(name) == "A"]:
        b = f"{name[:-1]}B"
        torch.testing.assert_close(mixed[b] @ mixed[name], case.adapters[b] @ case.adapters[name])


@every_method
@some
@given(cases())
def test_kinds_that_are_not_sent_come_back_as_they_are(method: Algorithm, case: Case) -> None:
    mixed = mix(method, case)
    assert list(mixed) == list(case.adapters)
    for name, tensor in mixed.items():
        if kind(name) not in method.phase(case.round).send:
            assert tensor is case.adapters[name]


@every_method
@pytest.mark.parametrize("layout", ["coo", "csr", "coo with stored zeros"])
@some
@given(cases())
def test_dense_and_sparse_weights_agree(method: Algorithm, layout: str, case: Case) -> None:
    if layout == "csr":
        sparse = case.weights.to_sparse_csr()
    elif layout == "coo":
        sparse = case.weights.to_sparse()
    else:
        everywhere = torch.ones_like(case.weights).nonzero().T
        sparse = torch.sparse_coo_tensor(
            everywhere, case.weights.flatten(), case.weights.shape, check_invariants=True, is_coalesced=True
        )
    assert_close(mix(method, Case(case.adapters, sparse, case.round)), mix(method, case))


@pytest.mark.parametrize("name", LINEAR)
@some
@given(cases())
def test_plain_averages_keep_the_mean_over_clients(name: str, case: Case) -> None:
    mixed = mix(METHODS[name], case)
    before = {name: tensor.mean(0) for name, tensor in case.adapters.items()}
    assert_close({name: tensor.mean(0) for name, tensor in mixed.items()}, before, 1e-12)


@every_method
@some
@given(cases())
def test_mixing_changes_none_of_its_inputs(method: Algorithm, case: Case) -> None:
    adapters = {name: tensor.clone() for name, tensor in case.adapters.items()}
    weights = case.weights.clone()
    mix(method, case)
    assert_close(case.adapters, adapters, 0)
    assert torch.equal(case.weights, weights)


@every_method
@some
@given(cases())
def test_float32_adapters_stay_float32_under_float64_weights(method: Algorithm, case: Case) -> None:
    single = Case({name: tensor.float() for name, tensor in case.adapters.items()}, case.weights, case.round)
    mixed = mix(method, single)
    assert {tensor.dtype for tensor in mixed.values()} == {torch.float32}
    assert all(mixed[name].shape == tensor.shape for name, tensor in case.adapters.items())


@every_method
def test_phases_name_known_kinds_and_the_round(method: Algorithm) -> None:
    for t in range(20):
        phase = method.phase(t)
        assert phase.round == t
        assert phase.train | phase.send <= {"A", "B", "head"}
        assert phase.train


@every_method
def test_b_trains_first(method: Algorithm) -> None:
    assert "B" in method.phase(0).train
