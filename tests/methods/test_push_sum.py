"""Push-sum: what is kept, where clients come to, and what becomes of messages that are lost."""

from collections.abc import Sequence
from random import Random
from typing import Any

import numpy as np
import pytest
import torch
from playing import begun, played
from torch import Tensor

from peertune.assembly.registry import build_algorithm, build_graph, pushing
from peertune.errors import RecipeError
from peertune.method import Algorithm, Phase, standing
from peertune.methods.catalogue import ALGORITHMS
from peertune.methods.mixers import gossip
from peertune.methods.schedules import both, by_round
from peertune.recipe import load_recipe
from peertune.rounds.bounds import Bound
from peertune.topology import GRAPHS, Fault, Graph, active_edges, planned_weights, rho, weights_at
from peertune.types import State, Tensors

CLIENTS, ROUNDS = 6, 100
MIXED = Algorithm(by_round(lambda t: Phase(frozenset(), frozenset({"A", "B", "head"}))), gossip())


def adapters(clients: int = CLIENTS) -> Tensors:
    generator = torch.Generator().manual_seed(0)
    shapes = {"q.A": (2, 5), "q.B": (4, 2), "top.head": (3,)}
    return {n: torch.randn(clients, *s, generator=generator, dtype=torch.float64) for n, s in shapes.items()}


def epidemic(fan_out: int = 2, clients: int = CLIENTS, **settings: Any) -> Graph:
    return GRAPHS["epidemic"](clients=clients, fan_out=fan_out, weights="push_sum", **settings)


def weights(graph: Graph, t: int, faults: Sequence[Fault] = ()) -> Tensor:
    return torch.from_numpy(planned_weights(graph, faults, t)[0].toarray())


def all_mass(state: State, kind: str) -> dict[str, Tensor]:
    """All there is of a kind, scalars and adapters, held or under way."""
    own, late = state.memory[f"push.{kind}.weight"], state.memory.get(f"push.{kind}.late")
    found = {"scalars": own.sum() + (0 if late is None else late.sum())}
    for name, x in state.adapters.items():
        if name.endswith(f".{kind}"):
            found[name] = torch.einsum("k,k...->...", own, x)
            if late is not None:
                found[name] += torch.einsum("kd,kd...->...", late, state.memory[f"push.{name}.late"])
    return found


def by_hand(graph: Graph, t: int) -> np.ndarray:
    """The columns by which a round's senders split their mass."""
    P = np.zeros((graph.clients,) * 2)
    for sender in range(graph.clients):
        near = [sender, *(j for i, j in active_edges(graph, t).tolist() if i == sender)]
        P[near, sender] = 1 / len(near)
    return P


def test_a_sender_splits_its_mass_in_equal_parts_and_keeps_that_of_who_is_down() -> None:
    graph = epidemic(3, activation=0.8)
    down = [Fault(0, 9, down=2), Fault(0, 9, edge=(4, 5))]
    for t in range(5):
        plain = by_hand(graph, t)
        np.testing.assert_allclose(weights_at(graph, t).toarray(), plain, atol=1e-15)
        planned, failed = planned_weights(graph, down, t)
        for i, j in failed:
            assert 2 in (i, j) or {i, j} == {4, 5}
            plain[i, i] += plain[j, i] if 2 in (i, j) else 0
            plain[j, i] = 0
        np.testing.assert_allclose(planned.toarray(), plain, atol=1e-15)


def test_clients_come_to_the_mean_by_the_ratio_of_two_sums_that_are_kept() -> None:
    graph, start = epidemic(activation=0.9), adapters()
    method, x, w = pushing(MIXED, graph, []), start["q.A"].flatten(1).numpy(), np.ones(CLIENTS)
    state, before = begun(method, start), {k: all_mass(begun(method, start), k) for k in ("A", "B", "head")}
    apart = []
    for t in range(60):
        state = played(method, state, weights(graph, t))
        x, w = by_hand(graph, t) @ x, by_hand(graph, t) @ w
        np.testing.assert_allclose(state.adapters["q.A"].flatten(1).numpy(), x / w[:, None], atol=1e-12)
        np.testing.assert_allclose(state.memory["push.A.weight"].numpy(), w, atol=1e-12)
        for k, kept in before.items():
            assert all_mass(state, k).keys() == kept.keys()
            for name, total in all_mass(state, k).items():
                torch.testing.assert_close(total, kept[name], rtol=0, atol=1e-12)
        apart.append(abs(w - 1).max())
    assert max(apart) > 0.5, "the scalars are put to use"
    for name, held in state.adapters.items():
        torch.testing.assert_close(held, start[name].mean(0).expand_as(held), rtol=0, atol=1e-9)


def test_a_scalar_for_each_kind_gives_the_mean_of_kinds_that_are_not_always_sent_and_one_for_all_does_not() -> None:
    graph, start = epidemic(), adapters()
    phases = by_round(lambda t: Phase(frozenset(), frozenset({"A", "head"} if t % 2 else {"head"})))
    method = pushing(Algorithm(phases, gossip()), graph, [])
    state, z, w = begun(method, start), start["q.A"].flatten(1).numpy(), np.ones(CLIENTS)
    for t in range(120):
        state = played(method, state, weights(graph, t))
        mass = by_hand(graph, t) * w
        w = mass.sum(1)
        z = mass / w[:, None] @ z if t % 2 else z
    mean = start["q.A"].mean(0)
    torch.testing.assert_close(state.adapters["q.A"], mean.expand(CLIENTS, 2, 5), rtol=0, atol=1e-9)
    assert abs(z - z.mean(0)).max() < 1e-9, "with one scalar for all they agree, too"
    assert abs(z.mean(0) - mean.flatten().numpy()).max() > 0.01, "but on something else"
    assert torch.equal(state.adapters["q.B"], start["q.B"]), "what is not sent stays"
    assert bool((state.memory["push.B.weight"] == 1).all())


@pytest.mark.thorough
@pytest.mark.parametrize("sparse", [False, True])
def test_totals_hold_and_all_come_to_one_mean_where_a_third_of_the_messages_is_lost(sparse: bool) -> None:
    graph, random = epidemic(), Random(3)
    pairs = [(i, j) for j in range(CLIENTS) for i in range(j)]
    faults = [Fault(t, t, edge=pair) for t in range(ROUNDS) for pair in pairs if random.random() < 0.3]
    method, start, lost = pushing(MIXED, graph, faults), adapters(), 0
    state = begun(method, start)
    before = {k: all_mass(state, k) for k in ("A", "B", "head")}
    # running totals, by hand: what each sender has given each other, and what of it was read
    x, w = start["q.A"].flatten(1).numpy().copy(), np.ones(CLIENTS)
    given, read = np.zeros((2, CLIENTS, CLIENTS, 11))
    for t in range(ROUNDS):
        P, failed = by_hand(graph, t), planned_weights(graph, faults, t)[1]
        lost += len(failed)
        P_came = weights(graph, t, faults)
        state = played(method, state, P_came.to_sparse() if sparse else P_came)
        for sender in range(CLIENTS):
            given[:, sender] += (
                np.outer(P[:, sender], [*x[sender], w[sender]]) * (np.arange(CLIENTS) != sender)[:, None]
            )
        own = np.diag(P)[:, None] * np.column_stack([x, w])
        for i, j in active_edges(graph, t).tolist():
            if (i, j) not in failed:
                own[j] += given[j, i] - read[j, i]
                read[j, i] = given[j, i]
        x, w = own[:, :-1], own[:, -1]
        np.testing.assert_allclose(state.adapters["q.A"].flatten(1).numpy(), x / w[:, None], atol=1e-11)
        for k, kept in before.items():
            for name, total in all_mass(state, k).items():
                torch.testing.assert_close(total, kept[name], rtol=0, atol=1e-11)
    assert 0.25 < lost / (ROUNDS * 2 * CLIENTS) < 0.35
    assert float(state.memory["push.A.late"].sum()) > 0.1, "something is under way"
    for name, held in state.adapters.items():
        torch.testing.assert_close(held, start[name].mean(0).expand_as(held), rtol=0, atol=1e-9)


def test_a_receiver_by_itself_finds_what_was_lost_to_it() -> None:
    graph, faults = (
        epidemic(CLIENTS - 1),
        [Fault(0, 0, edge=(0, CLIENTS - 1))],
    )  # all to all, but the first and the last
    method = pushing(MIXED, graph, faults)
    state = begun(method, adapters())
    together = played(method, state, weights(graph, 0, faults))
    sent, _ = method.message.send(state.adapters, state.memory, standing(range(CLIENTS), state.rounds), MIXED.phase(0))
    alone = state.take(slice(0, 1))
    at = standing([0], alone.rounds)._replace(heard=torch.arange(CLIENTS))
    row = weights(graph, 0, faults)[:1]
    _, changed = method.mixer.weigh(alone.adapters, sent, row, alone.memory, at, MIXED.phase(0))
    assert changed["push.A.late"].tolist() == [[pytest.approx(1 / CLIENTS)]]
    for name, x in changed.items():
        torch.testing.assert_close(x, together.memory[name][:1])
    torch.testing.assert_close(changed["push.q.B.late"][0, 0], state.adapters["q.B"][-1])


def test_what_is_under_way_takes_memory_only_for_messages_that_are_planned_to_be_lost() -> None:
    graph = epidemic()
    assert set(begun(pushing(MIXED, graph, []), adapters()).memory) == {f"push.{k}.weight" for k in ("A", "B", "head")}
    memory = begun(pushing(MIXED, graph, [Fault(0, 1, edge=(4, 1)), Fault(3, 3, edge=(1, 2))]), adapters()).memory
    assert memory["push.senders"].tolist() == [[-1, -1], [2, 4], [1, -1], [-1, -1], [1, -1], [-1, -1]]
    assert memory["push.q.B.late"].shape == (CLIENTS, 2, 4, 2)
    assert memory["push.q.B.late"].untyped_storage().nbytes() == 8 * 4 * 2, "zeros, until a run has a state of its own"


def test_a_mass_that_no_client_can_have_is_not_sound() -> None:
    sound = pushing(MIXED, epidemic(), []).message.sound
    assert sound is not None
    heard = {"q.A": torch.ones(5, 1), "push.A.weight": torch.tensor([1.0, 6.0, 6.1, 0.0, torch.nan])}
    assert sound(heard).tolist() == [True, True, False, False, False]


def test_rho_of_push_sum_is_what_a_round_leaves_of_fresh_probes() -> None:
    graph, generator = epidemic(1, clients=8), np.random.default_rng(0)
    w, left = np.ones(8), []
    for t in range(16 + 300):
        mass = by_hand(graph, t) * w
        w = mass.sum(1)
        probes = generator.standard_normal((8, 300))
        probes -= probes.mean(0)
        after = mass / w[:, None] @ probes
        left.append(np.square(after - after.mean(0)).sum() / np.square(probes).sum())
    assert rho(graph, 300) == pytest.approx(np.mean(left[16:]), rel=0.02)
    assert rho(graph, 300) > 1.05 * rho(GRAPHS["epidemic"](clients=8, fan_out=1), 300)


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        (
            ["modifiers=[{name: half}]"],
            "needs plain messages; leave out all modifiers of what is sent",
        ),
        (["modifiers=[{name: mix_moments}]"], "needs plain messages"),
        (["modifiers=[{name: int4}]"], "needs plain messages"),
        (["modifiers=[{name: shared_mask}]"], "needs plain messages"),
        (["algorithm.switch_every=adaptive"], "needs plain messages"),
    ],
)
def test_what_push_sum_does_not_go_with_is_refused(settings: list[str], message: str) -> None:
    recipe = load_recipe("digits-demo", ["graph={name: epidemic, fan_out: 2, weights: push_sum}", *settings])
    with pytest.raises(RecipeError, match=f"graph: weights push_sum {message}"):
        build_algorithm(recipe, build_graph(recipe), of=lambda graph: 0.5)


def test_an_adapter_whose_factors_are_sent_now_together_and_now_apart_is_refused() -> None:
    from peertune.assembly.needs import check_needs

    recipe = load_recipe("digits-demo", ["graph={name: epidemic, fan_out: 2, weights: push_sum}"])
    graph = build_graph(recipe)
    now = by_round(lambda t: Phase(frozenset({"B"}), frozenset({"A", "B"} if t % 2 else {"A"})))
    with pytest.raises(
        RecipeError, match="graph: weights push_sum needs factors together or apart; choose an algorithm"
    ):
        check_needs(recipe, graph, Algorithm(now, gossip()))
    check_needs(recipe, graph, Algorithm(both(), gossip()))
    check_needs(recipe, graph, ALGORITHMS["rolora"]())


@pytest.mark.parametrize("claims", [float(CLIENTS), 1e-320])
def test_whoever_claims_all_mass_or_takes_it_makes_nobody_else_such_as_is_refused(claims: float) -> None:
    graph, liar = epidemic(activation=0.9), 2
    method = pushing(MIXED, graph, [])
    sound, state = method.message.sound, begun(method, adapters())
    assert sound is not None
    for t in range(60):
        for kind in ("A", "B", "head"):
            state.memory[f"push.{kind}.weight"][liar] = claims
            if claims < 1 and t == 30:  # what thousands of such rounds leave of the others
                state.memory[f"push.{kind}.weight"].fill_(1e-310)
        state = played(method, state, weights(graph, t))
        masses = {name: x for name, x in state.memory.items() if name.endswith(".weight")}
        assert sound(masses).all()
        assert all(x.isfinite().all() for x in state.adapters.values())


def test_what_is_under_way_is_finite_however_large_it_was() -> None:
    graph, start = epidemic(), {name: x.float() for name, x in adapters().items()}
    faults = [Fault(0, 9, edge=(0, other)) for other in range(1, CLIENTS)]
    method, largest = pushing(MIXED, graph, faults), torch.finfo(torch.float32).max
    state = begun(method, start)
    for t in range(6):
        for x in state.adapters.values():
            x[0] = largest * (-1) ** t
        state = played(method, state, weights(graph, t, faults))
    late = [x for name, x in state.memory.items() if name.endswith(".late")]
    assert late
    assert all(x.isfinite().all() for x in late)


@pytest.mark.parametrize("mass", [0.0, torch.nan])
@pytest.mark.parametrize("name", ["decaf", "lora_fair", "dec_lora"])
def test_whoever_says_that_it_has_no_mass_leaves_the_others_numbers(name: str, mass: float) -> None:
    liar, faults = 2, [Fault(9, 9, edge=(2, 3)), Fault(9, 9, edge=(2, 4))]  # what may be lost has its place
    method = pushing(ALGORITHMS[name](), epidemic(), faults)
    state, W = begun(method, adapters()), weights(epidemic(), 0)
    W[liar], W[:, liar] = 0, 0  # its edges are refused, and it hears itself
    W[liar, liar] = 1
    for kind in ("A", "B", "head"):
        state.memory[f"push.{kind}.weight"][liar] = mass
    bound = Bound({"q": (5.0, 2.0), "top": (5.0, 1.0)}, method.message.sound)
    after = played(method, state, W, bound=bound)
    for x in after.adapters.values():
        assert x[torch.arange(CLIENTS) != liar].isfinite().all()
