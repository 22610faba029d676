from dataclasses import replace

from peertune.assembly.build import build
from peertune.engines.simulator import simulate
from peertune.planning.trial import cost_key, estimate, trial
from peertune.recipe import Recipe, load_recipe

SMALL = (
    "clients=5",
    "partition={name: iid}",
    "graph={name: complete, activation: 0.4}",
    "training={local_steps: 2, per_device_train_batch_size: 3}",
    "rounds=5",
    "evaluate={every: 2, rows: 10}",
)


def small(*overrides: str) -> Recipe:
    return load_recipe("digits-demo", [*SMALL, *overrides])


def test_traffic_is_that_of_the_run() -> None:
    measured = trial(small())
    for method in ("local", "dec_lora", "ffa_lora", "rolora", "tad_lora", "decaf"):
        recipe = small(f"algorithm={{name: {method}}}")
        sent = sum(sum(record.bytes_sent) for record in simulate(build(recipe).job))
        assert estimate(recipe, measured).sent_bytes == sent


def test_a_message_that_goes_one_way_is_sent_once() -> None:
    recipe = small("graph={name: epidemic, fan_out: 2, weights: push_sum}", "algorithm={name: dec_lora}")
    sent = sum(sum(record.bytes_sent) for record in simulate(build(recipe).job))
    assert estimate(recipe, trial(recipe)).sent_bytes == sent


def test_what_travels_beside_the_adapters_counts() -> None:
    recipe = small("algorithm={name: tad_lora, switch_every: adaptive, window_rounds: 4}")
    sent = sum(sum(record.bytes_sent) for record in simulate(build(recipe).job))
    assert estimate(recipe, trial(recipe)).sent_bytes == sent


def test_time_and_memory_grow_with_what_makes_them() -> None:
    measured = trial(small())
    one, more = estimate(small(), measured), estimate(small("rounds=50"), measured)
    assert measured.start_s < one.seconds < more.seconds
    assert one.memory_bytes == more.memory_bytes > 50e6
    many = estimate(small("clients=30"), measured)
    assert many.memory_bytes - one.memory_bytes == (30 - 16) * measured.client_bytes


def test_ensembles_with_those_heard_take_a_pass_for_each_adapter_or_each_edge() -> None:
    measured = replace(trial(small()), start_s=0, step_s=0, evaluation_s=1)
    for method, heard in {"dec_lora": 5, "ffa_lora": 5 + 20, "local": 5}.items():
        recipe = small(f"algorithm={{name: {method}}}", "graph.activation=1.0", "evaluate.ensemble=true", "rounds=3")
        assert estimate(recipe, measured).seconds == 2 * (5 + 1 + heard)


def test_runs_that_cost_the_same_have_one_key() -> None:
    key = cost_key(small())
    for same in (
        "seed=3",
        "graph.activation=0.1",
        "rounds=9",
        "training.learning_rate=0.1",
        "algorithm.switch_every=3",
    ):
        assert cost_key(small(same)) == key, same
    for other in ("lora.r=2", "clients=6", "training.per_device_train_batch_size=4", "model.dropout=false"):
        assert cost_key(small(other)) != key, other
