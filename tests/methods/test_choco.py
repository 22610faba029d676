"""CHOCO: public copies, and what goes over an edge."""

from collections.abc import Sequence

import numpy as np
import pytest
import torch
from playing import BOTH, begun, played

from peertune import build, load_recipe
from peertune.assembly.registry import check_choices
from peertune.errors import RecipeError, WireError
from peertune.method import Algorithm, standing
from peertune.methods.catalogue import ALGORITHMS
from peertune.methods.choco import choco
from peertune.methods.modifiers import mix_moments
from peertune.planning.trial import _sent_bytes
from peertune.recipe import Recipe
from peertune.rounds.bounds import Refusal
from peertune.rounds.job import Heard, Refuse
from peertune.rounds.mixing import exchanged
from peertune.rounds.round import run_rounds
from peertune.types import Stack, State, Tensors, only, payload_bytes, stacked, take

RING = torch.tensor([[2, 1, 0, 1], [1, 2, 1, 0], [0, 1, 2, 1], [1, 0, 1, 2]], dtype=torch.float64) / 4
NEAR = {k: sorted([(k - 1) % 4, (k + 1) % 4]) for k in range(4)}
SMALL = (
    "clients=4",
    "rounds=4",
    "algorithm={name: dec_lora}",
    "graph={name: ring}",
    "training={learning_rate: 5e-3, local_steps: 1, per_device_train_batch_size: 4}",
    "evaluate={every: 9, rows: 20}",
)


def recipe(*more: str) -> Recipe:
    return load_recipe("digits-demo", [*SMALL, *more])


def drawn(seed: int = 0, alike: bool = False) -> Tensors:
    generator = torch.Generator().manual_seed(seed)
    shapes = {"q.A": (3, 37), "q.B": (29, 3), "b.head": (11,)}
    drawn = {name: torch.randn(4, *shape, generator=generator, dtype=torch.float64) for name, shape in shapes.items()}
    return {name: x[:1].expand_as(x).clone() if alike else x for name, x in drawn.items()}


def test_a_round_is_the_papers_formula_written_out() -> None:
    method = choco(ALGORITHMS["dec_lora"](), share=0.2, step=0.4)
    state = begun(method, drawn())
    x, copy = (state.adapters["q.A"].flatten(1).numpy().copy() for _ in range(2))
    for t in range(4):
        moved = drawn(t + 1)["q.A"]
        state.adapters["q.A"] += moved
        x += moved.flatten(1).numpy()
        for i in range(4):
            largest = np.argsort(-np.abs(x[i] - copy[i]))[: round(0.2 * 111)]
            copy[i, largest] = x[i, largest]
        x += 0.4 * (RING.numpy() @ copy - copy)
        state = played(method, state, RING)
        np.testing.assert_allclose(state.adapters["q.A"].flatten(1).numpy(), x, rtol=1e-12, atol=1e-12)
        np.testing.assert_allclose(state.memory["choco.q.A.copy"].flatten(1).numpy(), copy, rtol=1e-12, atol=1e-12)


@pytest.mark.thorough
def test_clients_agree_as_nearly_as_one_likes_and_keep_their_mean() -> None:
    method = choco(ALGORITHMS["dec_lora"](), share=0.1, step=0.3)
    state = begun(method, drawn())
    mean = state.adapters["q.A"].mean(0)
    for _ in range(400):
        state = played(method, state, RING)
    assert state.adapters["q.A"].std(0).max() < 1e-6
    torch.testing.assert_close(state.adapters["q.A"].mean(0), mean, rtol=0, atol=1e-12)


def over_edges(method: Algorithm, before: State, sent: Tensors) -> dict[tuple[int, int], tuple[Tensors, Tensors]]:
    """Return for each edge, sender first, what goes over it, and what the receiver makes of that."""
    edgewise, found = method.message.edgewise, {}
    assert edgewise is not None
    for j, near in NEAR.items():
        own, payload = before.take(torch.tensor([j])), take(sent, torch.tensor([j]))
        for i in near:
            packed = edgewise.pack(payload, own.known, i)
            found[j, i] = packed, edgewise.unpack(packed, before.take(torch.tensor([i])).known, j)
    return found


@pytest.mark.parametrize("with_moments", [False, True])
def test_what_is_heard_is_the_copy_to_the_bit_and_a_failed_edge_gets_it_whole_once(with_moments: bool) -> None:
    method = choco(ALGORITHMS["dec_lora"](), 0.1, near=lambda: NEAR)
    method = mix_moments(method) if with_moments else method
    edgewise, state = method.message.edgewise, begun(method, drawn(alike=True))
    assert edgewise is not None
    cut = torch.tensor([[3, 0, 0, 1], [0, 3, 1, 0], [0, 1, 2, 1], [1, 0, 1, 2]], dtype=torch.float64) / 4
    for t, failed in enumerate([False, True, True, False, False]):
        for name, x in drawn(t + 1).items():
            state.adapters[name] += x
        at = standing(range(4), state.rounds)
        sent, _ = method.message.send(state.adapters, state.known, at, BOTH)
        whole, packed = payload_bytes(sent), edgewise.packed_bytes(sent, state.known)
        for (j, i), (went, made) in over_edges(method, state, sent).items():
            afresh = {i, j} == {0, 1} and t in (2, 3)
            assert payload_bytes(went) == (whole if afresh else packed)
            assert made.keys() == sent.keys()
            assert all(torch.equal(x, sent[name][j : j + 1]) for name, x in made.items())
        heard = at._replace(heard=torch.arange(4))
        counted = edgewise.bytes_sent(sent, state.known, cut if failed else RING, heard)
        few = [packed, packed, 2 * packed, 2 * packed] if failed else [2 * packed] * 4
        assert counted == ([packed + whole, packed + whole, 2 * packed, 2 * packed] if t == 3 else few)
        state = played(method, state, cut if failed else RING)


def test_where_kinds_travel_in_turn_each_has_a_copy_and_a_number_of_its_own() -> None:
    method = choco(ALGORITHMS["rolora"](), 0.1, near=lambda: NEAR)
    state = begun(method, drawn(alike=True))
    cut = torch.tensor([[3, 0, 0, 1], [0, 3, 1, 0], [0, 1, 2, 1], [1, 0, 1, 2]], dtype=torch.float64) / 4
    for t in range(6):
        for name, x in drawn(t + 1).items():
            state.adapters[name] += x
        sent, _ = method.message.send(state.adapters, state.known, standing(range(4), state.rounds), method.phase(t))
        for (j, i), (went, made) in over_edges(method, state, sent).items():
            afresh = {i, j} == {0, 1} and t in (3, 4)  # round 2 sent B and the head, round 3 A and the head
            assert (f"choco.{'A' if t % 2 else 'B'}.places" not in went) == (afresh and t == 4)
            assert ("choco.head.places" not in went) == (afresh and t == 3)
            assert made.keys() == sent.keys()
            assert all(torch.equal(x, sent[name][j : j + 1]) for name, x in made.items())
        state = played(method, state, cut if t == 2 else RING)


def test_more_changes_than_there_can_be_are_refused_in_one_line() -> None:
    method = choco(ALGORITHMS["dec_lora"](), 0.1, near=lambda: NEAR)
    state = begun(method, drawn(alike=True))
    sent, _ = method.message.send(state.adapters, state.known, standing(range(4), state.rounds), BOTH)
    assert method.message.edgewise is not None
    own, other = (state.take(torch.tensor([k])).known for k in (0, 1))
    packed = method.message.edgewise.pack(take(sent, torch.tensor([0])), own, 1)
    packed["choco.A.places"] = torch.full_like(packed["choco.A.places"], 255)
    with pytest.raises(WireError, match=r"^choco: 111 entries of A changed where 11 can at most$"):
        method.message.edgewise.unpack(packed, other, 0)
    with pytest.raises(WireError, match=r"^choco: changes A of round -1 where that of round 7 is held$"):
        method.message.edgewise.unpack(packed, other | {"choco.A.last": other["choco.A.last"] + 8}, 0)


def test_a_run_counts_changes_and_whole_copies_where_an_edge_failed() -> None:
    job = build(recipe("modifiers=[{name: choco}]")).job
    sizes: list[tuple[int, int]] = []

    def exchange(clients: Sequence[int], sent: Sequence[Stack], round: int, refuse: Refuse) -> Heard:
        payload = only(sent)
        assert job.algorithm.message.edgewise is not None
        packed = job.algorithm.message.edgewise.packed_bytes(payload, job.state.known)
        sizes.append((payload_bytes(payload), packed))
        failed = [Refusal(0, 1, "as planned"), Refusal(2, 1, "as planned")] if round == 1 else []
        return exchanged(job, clients, clients, stacked(payload), round, lambda *_: failed)

    records = list(run_rounds(job, exchange))
    (whole, packed), *_ = sizes
    assert _sent_bytes(job)["A B head"] == packed, "which a plan of the run says, too"
    assert whole > 7 * packed
    assert records[1].failed_edges == [(0, 1), (1, 2)]
    sent = [record.bytes_sent for record in records]
    assert sent[0] == sent[3] == [2 * packed] * 4
    assert sent[1] == [packed, 0, packed, 2 * packed]
    assert sent[2] == [whole + packed, 2 * whole, whole + packed, 2 * packed]
    assert all(record.diagnostics["mean_drift"] < 1e-6 for record in records)


@pytest.mark.parametrize(
    ("settings", "line"),
    [
        (["modifiers=[{name: choco, share: 1.0}]"], "^modifiers: choco: share is 1.0, give a number between 0 and 1$"),
        (["modifiers=[{name: choco, step: 0.0}]"], "^modifiers: choco: step is 0.0, give a number above 0, at most 1$"),
        (["graph.activation=0.5"], "with choco needs static graph; give a graph whose edges stay, graph.activation=1"),
        (["graph={name: exponential}"], "needs static graph"),
        (["faults=[{edge: [0, 1], rounds: [0, 1]}]"], "needs static graph; .* and no faults"),
        (["graph={name: epidemic, fan_out: 2}"], "needs edges both ways"),
        (["algorithm={name: decaf}"], "needs kept basis"),
        (["algorithm={name: lora_fair}"], "needs mixing by entry"),
        (
            ["modifiers=[{name: choco}, {name: int4}]"],
            "^modifiers: int4: less is sent already; give one of choco, half",
        ),
        (["modifiers=[{name: half}, {name: choco}]"], "^modifiers: choco: less is sent already"),
        (
            ["modifiers=[{name: choco}, {name: shared_mask}]"],
            "shared_mask: stands after choco; leave one of the two out",
        ),
        (
            ["modifiers=[{name: shared_mask}, {name: choco}]"],
            "choco: stands after shared_mask; leave one of the two out",
        ),
    ],
)
def test_what_it_does_not_go_with_is_refused_by_name(settings: list[str], line: str) -> None:
    with pytest.raises(RecipeError, match=line):
        check_choices(recipe("modifiers=[{name: choco}]", *settings))
