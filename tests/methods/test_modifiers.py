import pytest
import torch
from playing import BOTH, at_step, begun, played

from peertune import build, load_recipe, simulate
from peertune.assembly.build import agreed
from peertune.assembly.needs import NEEDS, check_needs
from peertune.assembly.registry import build_algorithm, build_graph, check_choices
from peertune.errors import RecipeError
from peertune.method import Algorithm, Message, Mixer
from peertune.methods.catalogue import ALGORITHMS
from peertune.methods.mixers import gossip
from peertune.methods.modifiers import MODIFIERS, half
from peertune.recipe import Recipe

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
    read = message.read(state.adapters, sent)
    assert {name: x.dtype for name, x in read.items() if name in state.adapters} == dict.fromkeys(
        state.adapters, torch.float32
    )
    assert torch.equal(read["q.A"], state.adapters["q.A"].bfloat16().float())


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
    for need in ("0 a 1", "1 b 2"):
        monkeypatch.setitem(NEEDS, need, NEEDS["both factors"])
    asked = recipe(
        "algorithm.name=dec_lora", "modifiers=[{name: told, word: a}, {name: half}, {name: told, word: b, times: 2}]"
    )
    run = build(asked)
    assert run.job.algorithm.mixer.needs == {"0 a 1", "1 b 2"}
    assert [part.model_dump() for part in run.resolved.modifiers] == [
        {"name": "told", "word": "a", "times": 1},
        {"name": "half"},
        {"name": "told", "word": "b", "times": 2},
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
