from collections.abc import Sequence

import numpy as np
import pytest
import torch
from playing import BOTH, Quadratic, at_step, begun, every_kind, played
from torch import Tensor

from peertune import build, load_recipe, simulate
from peertune.assembly.build import agreed
from peertune.assembly.needs import NEEDS, check_needs
from peertune.assembly.registry import build_algorithm, build_graph, check_choices
from peertune.errors import RecipeError
from peertune.method import Algorithm, At, Local, Memory, Message, Mixer, Phase
from peertune.methods.catalogue import ALGORITHMS
from peertune.methods.mixers import gossip
from peertune.methods.modifiers import DERIVED_FOR_SGD, MODIFIERS, dfed_admm, fedspeed, mix_moments
from peertune.methods.schedules import by_round
from peertune.methods.smaller import half
from peertune.recipe import Recipe
from peertune.rounds.job import Heard, Refuse
from peertune.rounds.mixing import exchanged
from peertune.rounds.round import run_rounds
from peertune.rounds.training import adamw
from peertune.types import Stack, Tensors, only, stacked

HALF = "modifiers=[{name: half}]"
SMALL = (
    "clients=4",
    "rounds=3",
    "graph={name: complete, activation: 0.6}",
    "training={learning_rate: 5e-3, local_steps: 2, per_device_train_batch_size: 4}",
    "evaluate={every: 3, rows: 20}",
)


def recipe(*more: str) -> Recipe:
    return load_recipe("digits-demo", [*SMALL, *more])


def test_half_sends_half_the_bytes_and_comes_near_to_what_whole_adapters_do() -> None:
    plain, halved = (
        list(simulate(build(recipe("algorithm.name=dec_lora", *more)).job))
        for more in ([], ["modifiers=[{name: half}]"])
    )
    for ours, theirs in zip(halved, plain, strict=True):
        assert [2 * sent for sent in ours.bytes_sent] == theirs.bytes_sent
        assert sum(ours.bytes_sent) > 0
        assert ours.diagnostics["mean_drift"] < 1e-6
    assert halved[-1].state is not None
    assert plain[-1].state is not None
    for name, x in halved[-1].state.adapters.items():
        other = plain[-1].state.adapters[name]
        assert x.dtype == other.dtype
        assert not torch.equal(x, other)
        assert (x - other).norm() < 0.05 * other.norm()


def test_half_halves_adapters_and_nothing_beside_them() -> None:
    method = ALGORITHMS["tad_lora"](switch_every="adaptive", window_rounds=4, clients=3)
    state = begun(method, {"q.A": torch.ones(3, 2, 4) / 3, "q.B": torch.ones(3, 4, 2)})
    message = half(method.message)
    sent, _ = message.send(state.adapters, state.memory, at_step(3), BOTH)
    assert {name: x.dtype for name, x in sent.items()} == {
        "q.A": torch.bfloat16,
        "q.B": torch.bfloat16,
        "adaptive.probe": torch.float64,
        "adaptive.reports": torch.float64,
        "adaptive.known": torch.bool,
    }
    assert message.read is not None
    read = message.read(state.adapters, sent, 0)
    assert {name: x.dtype for name, x in read.items() if name in state.adapters} == dict.fromkeys(
        state.adapters, torch.float32
    )
    assert torch.equal(read["q.A"], state.adapters["q.A"].bfloat16().float())


def test_what_half_changes_reads_what_came_by_what_the_receiver_has() -> None:
    def read(like: Tensors, heard: Tensors, round: int) -> Tensors:
        return {name: like[name] + x for name, x in heard.items()}

    message = half(Message(read=read))
    assert message.read is not None
    own = {"q.A": torch.full((1, 2), 0.25, dtype=torch.float64)}
    came = message.read(own, {"q.A": torch.ones(1, 2, dtype=torch.bfloat16)}, 0)["q.A"]
    assert (came.dtype, came.tolist()) == (torch.float64, [[1.25, 1.25]])


def test_moments_are_mixed_beside_what_a_mixer_remembers() -> None:
    def receive(
        own: Tensors, heard: Tensors, weights: Tensor, memory: Memory, at: At, phase: Phase
    ) -> tuple[Tensors, Memory]:
        return own, {"me.met": memory["me.met"] + 1}

    method = mix_moments(ALGORITHMS["dec_lora"]()._replace(mixer=Mixer(receive)))
    own = {"q.A": torch.zeros(2, 3)}
    heard = own | {"moments.q.A.m": torch.tensor([[1.0], [3.0]])}
    weights = torch.tensor([[0.5, 0.5], [0.0, 1.0]])
    mixed, memory = method.mixer.receive(own, heard, weights, {"me.met": torch.ones(2)}, at_step(2), BOTH)
    assert mixed is own
    assert {name: x.tolist() for name, x in memory.items()} == {"me.met": [2, 2], "moments.q.A.m": [[2.0], [3.0]]}


def test_a_rounded_message_moves_no_mean_where_values_mixed_as_they_are_read_would() -> None:
    adapters = {"q.A": torch.randn(5, 3, 40, generator=torch.Generator().manual_seed(0), dtype=torch.float64)}
    weights = torch.full((5, 5), 0.2, dtype=torch.float64)
    drift = []
    for exact in (False, True):
        message = half(Message())._replace(exact=exact)
        method = Algorithm(ALGORITHMS["dec_lora"]().schedule, gossip(), message=message)
        mixed = played(method, begun(method, adapters), weights).adapters["q.A"]
        drift.append(float((mixed.mean(0) - adapters["q.A"].mean(0)).norm()))
    assert drift[0] < 1e-14
    assert drift[1] > 1e-4


def test_modifiers_apply_in_their_order_and_their_settings_are_written_out(monkeypatch: pytest.MonkeyPatch) -> None:
    def told(mixer: Mixer, word: str, times: int = 1) -> Mixer:
        return mixer._replace(needs=mixer.needs | {f"{len(mixer.needs)} {word} {times}"})

    monkeypatch.setitem(MODIFIERS, "told", told)
    monkeypatch.setitem(MODIFIERS, "also", told)
    for need in ("0 a 1", "1 b 2"):
        monkeypatch.setitem(NEEDS, need, NEEDS["both factors"])
    asked = recipe(
        "algorithm.name=dec_lora", "modifiers=[{name: told, word: a}, {name: half}, {name: also, word: b, times: 2}]"
    )
    run = build(asked)
    assert run.job.algorithm.mixer.needs == {"0 a 1", "1 b 2"}
    assert [part.model_dump() for part in run.resolved.modifiers] == [
        {"name": "told", "word": "a", "times": 1},
        {"name": "half"},
        {"name": "also", "word": "b", "times": 2},
    ]
    for wrong, line in (
        ("{name: told}", r"^modifiers\[1\]\.word: is missing, told needs it$"),
        ("{name: halve}", r"^modifiers\[1\]\.name: unknown name 'halve', did you mean half\?$"),
        ("{name: half, message: 1}", r"^modifiers\[1\]\.message: unknown key .*half takes no settings"),
    ):
        with pytest.raises(RecipeError, match=line):
            check_choices(recipe(f"modifiers=[{{name: half}}, {wrong}]"))


@pytest.mark.parametrize(
    ("need", "met", "unmet", "line"),
    [
        (
            "both factors",
            "algorithm.name=dec_lora",
            "algorithm.name=rolora",
            "an algorithm that sends A and B in every round",
        ),
        ("exchange", "algorithm.name=dec_lora", "algorithm.name=local", "choose an algorithm that sends something"),
        ("kept basis", "algorithm.name=dec_lora", "algorithm.name=decaf", "as all but decaf do"),
        ("moments", "training.optim=adamw", "training.optim=sgd", "training.reset_optimizer=never"),
        ("moments", "training.optim=adamw", "training.reset_optimizer=round", "training.reset_optimizer=never"),
        ("head", "head=trained", "head=frozen", "give head=trained"),
        ("sgd", "training.optim=sgd", "training.optim=adamw", "give training.optim=sgd"),
        (
            "static graph",
            "graph={name: ring}",
            "graph={name: ring, activation: 0.5}",
            "=1 and no faults",
        ),
        (
            "static graph",
            "graph={name: ring}",
            "graph={name: matching, probability: 0.5}",
            "=1 and no faults",
        ),
    ],
)
def test_what_a_method_needs_is_held_against_the_recipe_in_one_line(need: str, met: str, unmet: str, line: str) -> None:
    for setting, fits in ((met, True), (unmet, False)):
        asked = recipe(setting)
        graph = build_graph(asked)
        algorithm = build_algorithm(asked, graph)
        needing = algorithm._replace(local=algorithm.local._replace(needs=frozenset({need})))
        if fits:
            check_needs(asked, graph, needing)
            continue
        with pytest.raises(RecipeError, match=rf"^algorithm: {asked.algorithm.name} needs {need}; .*{line}$"):
            check_needs(asked, graph, needing)


def test_a_round_that_sends_nothing_sends_no_factor_without_the_other() -> None:
    now_and_then = by_round(lambda t: Phase(frozenset("AB"), frozenset("AB" if t % 2 else "")))
    needing = Algorithm(now_and_then, gossip()._replace(needs=frozenset({"both factors"})))
    asked = recipe()
    check_needs(asked, build_graph(asked), needing)


def test_an_unknown_need_is_refused_and_not_passed_over() -> None:
    asked = recipe("modifiers=[{name: half}]")
    algorithm = build_algorithm(asked, build_graph(asked))
    needing = algorithm._replace(mixer=algorithm.mixer._replace(needs=frozenset({"luck"})))
    with pytest.raises(RecipeError, match=r"^algorithm: tad_lora with half needs 'luck', which nobody knows; choose"):
        check_needs(asked, build_graph(asked), needing)


def test_peers_agree_on_modifiers_and_on_what_travels_only_where_these_are_not_as_usual() -> None:
    plain, halved, adaptive = (
        agreed(build(recipe(*more)))
        for more in ([], ["modifiers=[{name: half}]"], ["algorithm={name: tad_lora, switch_every: adaptive}"])
    )
    assert not {"modifiers", "message"} & plain.keys()
    assert halved.keys() - plain.keys() == {"modifiers", "message"}
    assert halved["modifiers"] == '[{"name": "half"}]'
    assert adaptive.keys() - plain.keys() == {"message"}
    assert adaptive["message"] != halved["message"]


def rounds_of(local: Local, centres: Tensors, curvature: Tensor, weights: Tensor, rounds: int, steps: int) -> Tensors:
    """Return the adapters after rounds of gradient descent at rate .1 and plain averaging."""
    K = len(curvature)
    adapters = {name: torch.zeros_like(x) for name, x in centres.items()}
    gradient, memory = Quadratic(centres, curvature), local.init(adapters, at_step(K))
    for t in range(rounds):
        at, start = at_step(K, t), {name: x.clone() for name, x in adapters.items()}
        for _ in range(steps):
            grads, changed = local.gradients(gradient, adapters, start, memory, at, BOTH)
            memory = memory | changed
            adapters = {name: x - 0.1 * grads[name] for name, x in adapters.items()}
        moved, changed = local.end(start, adapters, memory, at, BOTH)
        adapters, memory = adapters | moved, memory | changed
        adapters = {name: (weights @ x.flatten(1)).view_as(x) for name, x in adapters.items()}
    return adapters


RING = torch.tensor([[2, 1, 0, 1], [1, 2, 1, 0], [0, 1, 2, 1], [1, 0, 1, 2]], dtype=torch.float64) / 4


def problem() -> tuple[Tensors, Tensor]:
    generator = torch.Generator().manual_seed(0)
    shapes = {"q.A": (4, 2, 3), "q.B": (4, 3, 2)}
    centres = {name: torch.randn(shape, generator=generator, dtype=torch.float64) for name, shape in shapes.items()}
    return centres, torch.tensor([0.2, 0.5, 1.0, 2.0], dtype=torch.float64)


@pytest.mark.parametrize("ascent", [0.0, 0.3])
def test_fedspeed_is_the_authors_formula_written_out(ascent: float) -> None:
    centres, curvature = problem()
    local = fedspeed(Local(), 0.4, ascent) if ascent else dfed_admm(Local(), 0.4)
    found = rounds_of(local, centres, curvature, RING, rounds=3, steps=4)
    flat = torch.cat([x.flatten(1) for x in centres.values()], 1).numpy()
    x, h = np.zeros_like(flat), np.zeros_like(flat)
    for _ in range(3):
        sent = []
        for i, bend in enumerate(curvature.tolist()):
            begun, w = x[i].copy(), x[i].copy()
            for _ in range(4):
                g = bend * (w - flat[i])
                there = w + ascent * g / (np.linalg.norm(g) + 1e-7)
                w = w - 0.1 * (bend * (there - flat[i]) + 0.4 * (w - begun) + 0.4 * h[i])
            h[i] = h[i] + (w - begun)
            sent.append(w + h[i])
        x = RING.numpy() @ np.stack(sent)
    ours = torch.cat([tensor.flatten(1) for tensor in found.values()], 1).numpy()
    np.testing.assert_allclose(ours, x, rtol=1e-9, atol=1e-9)


def test_the_dual_finds_the_common_optimum_where_all_meet_and_sparse_graphs_leave_clients_apart() -> None:
    centres, curvature = problem()
    dual, plain, sparse = (
        rounds_of(local, centres, curvature, weights, rounds=400, steps=5)
        for local, weights in (
            (dfed_admm(Local(), 0.5), torch.full_like(RING, 0.25)),
            (Local(), torch.full_like(RING, 0.25)),
            (dfed_admm(Local(), 0.5), RING),
        )
    )
    for name, centre in centres.items():
        best = torch.einsum("k,k...->...", curvature, centre) / curvature.sum()
        assert (dual[name] - best).norm() < 1e-6
        assert (plain[name] - best).norm() > 0.05
        assert (sparse[name] - sparse[name].mean(0)).norm() > 0.05
        at_rest = Quadratic(centres, curvature)(sparse)[name]  # (I - W) x = W h, so the gradients add up to nothing
        assert at_rest.sum(0).norm() < 1e-6 < at_rest.norm()


def test_what_a_phase_does_not_send_gets_no_dual() -> None:
    centres, curvature = problem()
    local, phase = dfed_admm(Local(), 0.5), ALGORITHMS["fedsa_lora"]().phase(0)
    start = {name: torch.zeros_like(x) for name, x in centres.items()}
    memory = local.init(start, at_step(4))
    grads, _ = local.gradients(Quadratic(centres, curvature), centres, start, memory, at_step(4), phase)
    assert torch.equal(grads["q.B"], torch.zeros_like(centres["q.B"]))
    torch.testing.assert_close(grads["q.A"], 0.5 * centres["q.A"])
    moved, changed = local.end(start, centres, memory, at_step(4), phase)
    assert moved.keys() == {"q.A"}
    assert changed.keys() == {"dual.q.A.h"}


def test_moments_travel_and_are_averaged_and_count_as_bytes() -> None:
    settings = ["algorithm.name=dec_lora", "graph={name: complete, activation: 1}", "rounds=2"]
    plain, mixed = (
        list(simulate(build(recipe(*settings, *more)).job)) for more in ([], ["modifiers=[{name: mix_moments}]"])
    )
    assert [3 * sent for sent in plain[-1].bytes_sent] == mixed[-1].bytes_sent
    for record, alike in ((plain[-1], False), (mixed[-1], True)):
        assert record.state is not None
        for name, x in record.state.moments.items():
            if not name.startswith("steps."):
                assert torch.allclose(x, x[:1].expand_as(x), rtol=1e-4, atol=1e-12) is alike
    first, second = (run[-1].state for run in (plain, mixed))
    assert first is not None
    assert second is not None
    assert any(not torch.equal(x, second.adapters[name]) for name, x in first.adapters.items())


@pytest.mark.parametrize(("moment", "value"), [("v", -1.0), ("m", float("nan")), ("m", 1e30), ("v", 0.0)])
def test_a_sender_whose_moments_can_not_be_is_not_mixed(moment: str, value: float) -> None:
    settings = ["algorithm.name=dec_lora", "modifiers=[{name: mix_moments}]", "graph={name: complete, activation: 1}"]
    job = build(recipe(*settings)).job

    def exchange(clients: Sequence[int], sent: Sequence[Stack], round: int, refuse: Refuse) -> Heard:
        payload = only(sent)
        lied = {name: x.clone() for name, x in payload.items()}
        for name, x in lied.items():
            if name.endswith(f".{moment}"):
                x[1].fill_(value)
        return exchanged(job, clients, clients, stacked(lied), round, refuse)

    record = next(iter(run_rounds(job, exchange)))
    assert record.failed_edges == [(0, 1), (1, 2), (1, 3)]


@pytest.mark.parametrize(
    ("settings", "line"),
    [
        (["algorithm.name=local", HALF], "^algorithm: local with half needs exchange; choose an algorithm that sends"),
        ([HALF.replace("half", "mix_moments"), "training.optim=sgd"], "needs moments; give training.optim=adamw and"),
        ([HALF.replace("half", "mix_moments"), "training.reset_optimizer=round"], "training.reset_optimizer=never$"),
        (
            ["algorithm.name=rolora", "training.reset_optimizer=phase", "modifiers=[{name: mix_moments}]"],
            "training.reset_optimizer=never$",
        ),
        (["algorithm.name=decaf", "modifiers=[{name: dfed_admm}]"], "needs kept basis; choose an algorithm whose"),
        (["modifiers=[{name: fedspeed, ascent: 0.0}]"], "ascent is 0.0, give a number above 0; dfed_admm goes without"),
        (["modifiers=[{name: dfed_admm, proximal: 0.0}]"], "dfed_admm: proximal is 0.0, give a number above 0$"),
        (["modifiers=[{name: dfed_admm, proximal: .inf}]"], "dfed_admm: proximal is inf, give a number above 0$"),
        (["modifiers=[{name: half}, {name: fedspeed}, {name: half}]"], r"^modifiers\[2\]: half stands twice; give it"),
    ],
)
def test_modifiers_that_make_no_sense_are_refused(settings: list[str], line: str) -> None:
    with pytest.raises(RecipeError, match=line):
        check_choices(recipe(*settings))


def test_two_duals_are_one_too_many() -> None:
    with pytest.raises(RecipeError, match=r"^modifiers: fedspeed and dfed_admm keep the same dual; choose one$"):
        build(recipe("modifiers=[{name: fedspeed}, {name: dfed_admm}]"))


def test_moments_of_adam_are_always_what_a_sender_may_say() -> None:
    draw = torch.Generator().manual_seed(0)
    adapters = {"q.A": torch.zeros(4, 2, 3)}
    state = begun(mix_moments(ALGORITHMS["dec_lora"]()), adapters)
    message, optimizer = mix_moments(ALGORITHMS["dec_lora"]()).message, adamw(0.0, 0.999)  # the widest there is
    moments = {name: x.clone() for name, x in optimizer.init(adapters).items()}
    assert message.sound is not None
    assert message.sound({f"moments.{name}": x for name, x in moments.items() if name.startswith("q.A")}).all()
    for step in range(40):
        grads = {"q.A": 10.0 ** (4 * torch.randn(4, 2, 3, generator=draw))}
        optimizer.update(state.adapters, grads, moments, every_kind(1e-3))
        heard = {f"moments.{name}": x for name, x in moments.items() if name.startswith("q.A")}
        assert message.sound(heard).all(), step


@pytest.mark.parametrize("name", DERIVED_FOR_SGD)
def test_what_is_derived_for_sgd_warns_of_adamw(name: str, caplog: pytest.LogCaptureFixture) -> None:
    for optim, warned in (("adamw", [f"modifiers: {name} is derived for SGD, and adamw learnt far less"]), ("sgd", [])):
        caplog.clear()
        build(load_recipe("digits-demo", ["clients=2", f"modifiers=[{{name: {name}}}]", f"training.optim={optim}"]))
        said = [record.getMessage() for record in caplog.records if record.levelname == "WARNING"]
        assert [line.partition(" with it")[0] for line in said] == warned
