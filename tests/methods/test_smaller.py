"""Messages that take fewer bytes."""

from collections.abc import Callable, Sequence

import pytest
import torch
from playing import BOTH, at_step, begun, played
from torch import Tensor

from peertune import build, load_recipe, simulate
from peertune.assembly.registry import check_choices
from peertune.errors import RecipeError
from peertune.method import At, Message, standing
from peertune.methods.catalogue import ALGORITHMS
from peertune.methods.smaller import half, int4, int8, shared_mask
from peertune.recipe import Recipe
from peertune.rounds.job import Heard, Refuse
from peertune.rounds.mixing import exchanged
from peertune.rounds.round import run_rounds
from peertune.types import Stack, Tensors, only, stacked

SMALL = (
    "clients=4",
    "rounds=2",
    "algorithm={name: dec_lora}",
    "graph={name: complete, activation: 1}",
    "training={learning_rate: 5e-3, local_steps: 2, per_device_train_batch_size: 4}",
    "evaluate={every: 3, rows: 20}",
)
MASKED = "modifiers=[{name: shared_mask}]"
ROUNDED = pytest.mark.parametrize(("make", "most"), [(int8, 127), (int4, 7)])


def recipe(*more: str) -> Recipe:
    return load_recipe("digits-demo", [*SMALL, *more])


def drawn(clients: int = 3, dtype: torch.dtype = torch.float32) -> Tensors:
    generator = torch.Generator().manual_seed(0)
    shapes = {"q.A": (3, 37), "q.B": (29, 3), "v.A": (3, 5), "b.head": (11,)}
    return {name: torch.randn(clients, *shape, generator=generator, dtype=dtype) for name, shape in shapes.items()}


def through(message: Message, adapters: Tensors, round: int = 0) -> Tensors:
    """Return what others read of these adapters."""
    clients = len(next(iter(adapters.values())))
    sent, _ = message.send(adapters, {}, at_step(clients, round), BOTH)
    assert message.read is not None
    return message.read(adapters, sent, round)


def steps(x: Tensor, block: int, most: int) -> Tensor:
    """Return the least step for each block with which all of its entries fit, the slow and obvious way."""
    found = torch.empty_like(x.flatten(1))
    for row, flat in zip(found, x.flatten(1), strict=True):
        for start in range(0, len(flat), block):
            part = flat[start : start + block]
            fitting = (m * 2.0**e for e in range(-40, 9) for m in (1, 1.25, 1.5, 1.75))
            row[start : start + block] = next(step for step in fitting if step >= part.abs().max() / most)
    return found.view_as(x)


@ROUNDED
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_an_entry_is_read_as_a_multiple_of_its_blocks_step_next_to_it(
    make: Callable[..., Message], most: int, dtype: torch.dtype
) -> None:
    adapters = drawn(dtype=dtype)
    adapters["q.A"][:, 0] *= 1e-6
    adapters["v.A"][1] = 0
    read = through(make(Message(), block=8), adapters)
    assert read.keys() == adapters.keys()
    for name, x in adapters.items():
        step = steps(x, 8, most)
        assert read[name].dtype == dtype
        assert ((read[name] - x).abs() < step).all()
        assert torch.equal(read[name] / step, (read[name] / step).round())
    assert torch.equal(read["v.A"][1], adapters["v.A"][1])


@ROUNDED
def test_what_is_read_is_in_the_mean_what_was_sent(make: Callable[..., Message], most: int) -> None:
    adapters, rounds = drawn(), 100
    message = make(Message(), block=16)
    read = [through(message, adapters, t) for t in range(rounds)]
    for name, x in adapters.items():
        noise = steps(x, 16, most) / 2 / rounds**0.5
        off = (torch.stack([each[name] for each in read]).mean(0) - x) / noise
        assert off.abs().max() < 5
        assert off.mean().abs() < 5 / off.numel() ** 0.5


def test_clients_that_agree_are_read_alike_and_those_that_nearly_do_nearly_alike() -> None:
    x = drawn(1)["q.A"]
    adapters = {"q.A": torch.cat([x, x, x + 1e-3, x + 0.3])}
    read = through(int4(Message()), adapters)["q.A"]
    assert torch.equal(read[0], read[1])
    errors = [float(((read[k] - read[0]) - (adapters["q.A"][k] - x[0])).norm()) for k in (2, 3)]
    assert errors[0] < 0.25 * errors[1]


def test_what_is_drawn_is_another_in_each_round_for_each_adapter_and_by_each_seed() -> None:
    x = drawn(1)["q.A"]
    adapters = {"q.A": x, "v.A": x}
    first = through(int4(Message()), adapters)
    others = [
        first["v.A"],
        through(int4(Message()), adapters, 1)["q.A"],
        through(int4(Message(), seed=1), adapters)["q.A"],
    ]
    assert not any(torch.equal(first["q.A"], other) for other in others)
    assert torch.equal(first["q.A"], through(int4(Message()), adapters)["q.A"])


@pytest.mark.parametrize(("name", "least", "apart"), [("int8", 3.9, 0.03), ("int4", 7.3, 0.3)])
def test_a_run_sends_so_many_times_fewer_bytes_and_comes_near_to_what_whole_adapters_do(
    name: str, least: float, apart: float
) -> None:
    plain, rounded = (list(simulate(build(recipe(*more)).job)) for more in ([], [f"modifiers=[{{name: {name}}}]"]))
    for ours, theirs in zip(rounded, plain, strict=True):
        assert all(whole > least * sent > 0 for sent, whole in zip(ours.bytes_sent, theirs.bytes_sent, strict=True))
        assert ours.diagnostics["mean_drift"] < 1e-6
    assert plain[-1].state is not None
    assert rounded[-1].state is not None
    for key, x in rounded[-1].state.adapters.items():
        other = plain[-1].state.adapters[key]
        assert not torch.equal(x, other)
        assert (x - other).norm() < apart * other.norm()


def test_what_travels_beside_adapters_stays_whole() -> None:
    method = ALGORITHMS["tad_lora"](switch_every="adaptive", window_rounds=4, clients=3)
    state = begun(method, {"q.A": torch.ones(3, 2, 4) / 3, "q.B": torch.ones(3, 4, 2)})
    sent, _ = int8(method.message).send(state.adapters, state.memory, at_step(3), BOTH)
    assert {name: (x.dtype, x.shape[1:].numel()) for name, x in sent.items() if "adaptive" not in name} == {
        "int8.A": (torch.uint8, 9),
        "int8.B": (torch.uint8, 9),
    }
    for name in ("adaptive.probe", "adaptive.reports", "adaptive.known"):
        assert sent[name] is state.memory[name]


def test_a_message_below_is_read_as_it_was_sent() -> None:
    def send(adapters: Tensors, memory: Tensors, at: At, phase: object) -> tuple[Tensors, Tensors]:
        return {name: 2 * x for name, x in adapters.items()}, {"me.met": at.clients}

    def read(like: Tensors, heard: Tensors, round: int) -> Tensors:
        return {name: x / 2 for name, x in heard.items()}

    message, adapters = int8(Message(send, read)), drawn()
    _, memory = message.send(adapters, {}, at_step(3), BOTH)
    assert memory.keys() == {"me.met"}
    for name, x in through(message, adapters).items():
        torch.testing.assert_close(x, adapters[name], rtol=0, atol=0.07)


def test_clients_that_are_in_different_rounds_round_as_each_would_alone() -> None:
    adapters, message = drawn(2), int4(Message())
    apart, _ = message.send(adapters, {}, standing([0, 1], torch.tensor([5, 3])), BOTH)
    for row, t in enumerate((5, 3)):
        alone = {name: x[row : row + 1] for name, x in adapters.items()}
        sent, _ = message.send(alone, {}, standing([row], torch.tensor([t])), BOTH)
        assert all(torch.equal(x[row : row + 1], sent[name]) for name, x in apart.items())


@ROUNDED
def test_clients_come_to_agree_to_a_quarter_of_a_step(make: Callable[..., Message], most: int) -> None:
    plain = ALGORITHMS["dec_lora"]()
    method = plain._replace(message=make(plain.message, block=32))
    state = begun(method, drawn(4, torch.float64))
    mean = state.adapters["q.A"].mean(0)
    for _ in range(30):
        state = played(method, state, RING)
    torch.testing.assert_close(state.adapters["q.A"].mean(0), mean, rtol=0, atol=1e-12)
    assert state.adapters["q.A"].std(0).mean() < steps(mean[None], 32, most).mean() / 4


@pytest.mark.parametrize("bytes_", [255, 127, 0])
@ROUNDED
def test_whatever_the_bytes_are_what_is_read_is_finite(make: Callable[..., Message], most: int, bytes_: int) -> None:
    adapters, message = drawn(), make(Message())
    sent, _ = message.send(adapters, {}, at_step(3), BOTH)
    assert message.read is not None
    read = message.read(adapters, {name: torch.full_like(x, bytes_) for name, x in sent.items()}, 0)
    assert {name: (x.shape, x.dtype) for name, x in read.items()} == {
        name: (x.shape, x.dtype) for name, x in adapters.items()
    }
    assert all(x.isfinite().all() for x in read.values())


@pytest.mark.parametrize("name", ["int8", "int4"])
@pytest.mark.parametrize("spoilt", ["far", "infinite", "nan"])
def test_a_sender_of_too_large_steps_or_of_what_is_not_finite_is_mixed_by_nobody(
    name: str, spoilt: str, caplog: pytest.LogCaptureFixture
) -> None:
    job = build(recipe(f"modifiers=[{{name: {name}}}]", "rounds=1")).job

    def exchange(clients: Sequence[int], sent: Sequence[Stack], round: int, refuse: Refuse) -> Heard:
        payload = only(sent)
        lied = {of: x.clone() for of, x in payload.items()}
        if spoilt == "far":
            lied[f"{name}.A"][1] = 255
        else:
            own = {of: x.clone() for of, x in job.state.adapters.items()}
            next(iter(own.values()))[1, 0, 0] = float(spoilt[:3])
            lied, _ = job.algorithm.message.send(own, {}, standing(clients, job.state.rounds), BOTH)
        return exchanged(job, clients, clients, stacked(lied), round, refuse)

    record = next(iter(run_rounds(job, exchange)))
    assert record.failed_edges == [(0, 1), (1, 2), (1, 3)]
    assert all("isn't mixed" in line and "\n" not in line for line in caplog.messages)


@pytest.mark.parametrize(
    ("settings", "line"),
    [
        ("[{name: int8, block: 0}]", "^modifiers: int8: block is 0, give a number of entries above 0$"),
        (
            "[{name: half}, {name: int8}]",
            "^modifiers: int8: less is sent already; give one of choco, half, int8 and int4$",
        ),
        (
            "[{name: int8}, {name: half}]",
            "^modifiers: half: less is sent already",
        ),
        ("[{name: int8}, {name: int4}]", "^modifiers: int4: less is sent already"),
        ("[{name: shared_mask}, {name: int4}]", "^modifiers: int4: stands after shared_mask; give it before that$"),
        ("[{name: shared_mask, share: 0.0}]", "^modifiers: shared_mask: share is 0.0, give a number between 0 and 1$"),
        ("[{name: shared_mask, share: 1.0}]", "share is 1.0, give a number between 0 and 1$"),
    ],
)
def test_messages_that_make_no_sense_are_refused(settings: str, line: str) -> None:
    with pytest.raises(RecipeError, match=line):
        check_choices(recipe(f"modifiers={settings}"))


@pytest.mark.parametrize(
    ("settings", "line"),
    [
        (
            ["algorithm={name: decaf}", "modifiers=[{name: int4}]"],
            "decaf with int4 needs kept basis; choose an algorithm",
        ),
        (["algorithm={name: lora_fair}", MASKED], "needs mixing by entry; .* as all but decaf and lora_fair do$"),
        (["algorithm={name: decaf}", MASKED], "needs mixing by entry"),
        (["evaluate={every: 3, on: both, ensemble: true}", MASKED], "needs unjudged messages; leave out evaluate.ens"),
        (["evaluate={every: 3, on: both, mixing: true}", MASKED], "needs unjudged messages"),
        (["algorithm={name: local}", MASKED], "needs exchange"),
    ],
)
def test_what_smaller_messages_do_not_go_with_is_refused_by_name(settings: list[str], line: str) -> None:
    with pytest.raises(RecipeError, match=line):
        check_choices(recipe(*settings))


@pytest.mark.parametrize("make", [half, int8, int4, shared_mask])
def test_clients_that_send_other_shapes_are_refused(make: Callable[[Message], Message]) -> None:
    with pytest.raises(RecipeError, match=f"^modifiers: {make.__name__}: needs clients that send the same shapes"):
        make(Message(layout=lambda own, client, phase: own))


@pytest.mark.parametrize("make", [int4, lambda message: shared_mask(int8(message))])
def test_a_process_whose_clients_are_all_down_has_a_message_of_the_shapes_of_all(
    make: Callable[[Message], Message],
) -> None:
    message, adapters = make(Message()), drawn()
    nobody, _ = message.send({name: x[:0] for name, x in adapters.items()}, {}, at_step(0, 3), BOTH)
    sent, _ = message.send(adapters, {}, at_step(3, 3), BOTH)
    assert {name: (0, *x.shape[1:]) for name, x in sent.items()} == {name: x.shape for name, x in nobody.items()}
    assert message.read is not None
    assert all(len(x) == 0 for x in message.read(adapters, nobody, 3).values())


RING = torch.tensor([[2, 1, 0, 1], [1, 2, 1, 0], [0, 1, 2, 1], [1, 0, 1, 2]], dtype=torch.float64) / 4


@pytest.mark.parametrize("share", [0.25, 0.6])
def test_a_mask_mixes_the_entries_that_are_sent_and_leaves_the_others_as_they_are(share: float) -> None:
    method = ALGORITHMS["dec_lora"]()
    method = method._replace(message=shared_mask(method.message, share))
    before = begun(method, drawn(4, torch.float64), round=3)
    after = played(method, before, RING).adapters
    for name, x in before.adapters.items():
        mixed, moved = torch.einsum("ij,j...->i...", RING, x), after[name] != x
        torch.testing.assert_close(after[name][moved], mixed[moved], rtol=1e-12, atol=1e-12)
        assert torch.equal(moved, moved[:1].expand_as(moved)), "the same at all clients"
        assert int(moved[0].sum()) == max(1, round(share * x[0].numel()))


def test_each_entry_has_its_turn_and_a_seed_an_adapter_and_a_round_each_their_own() -> None:
    adapters = {name: torch.ones(1, 10, 20) for name in ("q.A", "v.A")}
    message, rounds = shared_mask(Message(), 0.25), 200
    times = torch.stack([through(message, adapters, t)["q.A"] for t in range(rounds)]).sum(0)
    assert ((times - rounds / 4).abs() < 5 * (rounds * 3 / 16) ** 0.5).all()
    first = through(message, adapters)
    others = [
        first["v.A"],
        through(message, adapters, 1)["q.A"],
        through(shared_mask(Message(), seed=1), adapters)["q.A"],
    ]
    assert not any(torch.equal(first["q.A"], other) for other in others)


def test_what_is_masked_is_rounded_before_it_travels() -> None:
    adapters = drawn()
    message = shared_mask(int4(Message(), block=8), 0.5)
    sent, _ = message.send(adapters, {}, at_step(3), BOTH)
    counts = {"A": [56, 8], "B": [44], "head": [6]}  # of 111 and 15, 87, and 11 entries
    sizes = {f"int4.{of}": sum(-(-n // 8) for n in many) + -(-sum(many) // 2) for of, many in counts.items()}
    assert {name: x.shape[1] for name, x in sent.items()} == sizes
    read = through(message, adapters)
    for name, x in adapters.items():
        there = read[name] != 0
        assert 0.3 < there.float().mean() < 0.6
        assert ((read[name] - x).abs() <= x.abs().amax() / 3.5)[there].all()


def test_a_run_with_a_mask_sends_its_share_of_the_bytes_and_measures_no_cross_term_of_parts() -> None:
    plain, masked = (list(simulate(build(recipe("evaluate.every=1", *more)).job)) for more in ([], [MASKED]))
    for ours, theirs in zip(masked, plain, strict=True):
        sent, whole = sum(ours.bytes_sent), sum(theirs.bytes_sent)
        assert sent == pytest.approx(whole / 4, rel=0.01)
        assert ours.diagnostics["mean_drift"] < 1e-6
        assert (ours.neighbourhood_cross_term, theirs.neighbourhood_cross_term is None) == (None, False)
