"""Each finding on a real run that was made to show it, on real runs that must not, and on records that were made up."""

import json
import re
from collections.abc import Callable, Mapping
from dataclasses import asdict, replace
from functools import cache
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from peertune.assembly import build
from peertune.engines.simulator import simulate
from peertune.parts import build_graph
from peertune.recipe import load_recipe
from peertune.report.findings import Finding, diagnose
from peertune.report.runs import RunData

SMALL = (
    "clients=6",
    "rounds=15",
    "training={learning_rate: 5e-3, local_steps: 2, per_device_train_batch_size: 8}",
    "graph.activation=0.3",
    "partition={name: dirichlet, alpha: 1.0}",
    "evaluate={every: 5, rows: 60}",
)
SWITCHES = (
    "clients=5",
    "rounds=36",
    "algorithm={name: adf_lora, switch_every: 3}",
    "training={learning_rate: 3e-2, local_steps: 4, per_device_train_batch_size: 8}",
    "partition={name: iid}",
)

Lived = tuple[dict[str, Any], dict[str, Any], list[dict[str, Any]]]


@cache
def lived(*overrides: str, links: float | None = None) -> Lived:
    """A real run: its recipe, facts and records as files hold them. `links` is what activation really is."""
    run = build(load_recipe("digits-demo", [*SMALL, *overrides]))
    job = run.job
    if links is not None:
        job = replace(job, graph=build_graph(load_recipe("digits-demo", [*SMALL, f"graph.activation={links}"])))
    lines = [asdict(replace(record, state=None)) for record in simulate(job)]
    recipe, facts, records = json.loads(json.dumps([run.resolved.model_dump(mode="json"), run.facts, lines]))
    return recipe, facts, records


def found(lived: Lived) -> dict[str, Finding]:
    return {finding.name: finding for finding in diagnose(*lived)}


@pytest.mark.parametrize(
    "overrides",
    [
        ("rounds=30", "training.local_steps=3"),
        ("rounds=30", "algorithm={name: adf_lora, switch_every: 4}"),
        ("algorithm.name=dec_lora",),
        ("algorithm.name=ffa_lora",),
        ("algorithm.name=decaf",),
        ("algorithm.name=fedrot_lora",),
        ("algorithm.name=rolora", "graph.activation=1"),  # all idle factors are the same
        ("algorithm={name: tad_lora, switch_every: adaptive, window_rounds: 12}",),
        ("graph={name: ring}",),
        ("partition={name: iid}",),
    ],
)
def test_in_a_run_in_which_nothing_is_wrong_nothing_is_found(overrides: tuple[str, ...]) -> None:
    (finding,) = diagnose(*lived(*overrides))
    assert (finding.name, finding.severity, finding.advice) == ("healthy", "good", "")
    assert "accuracy" in finding.text


def test_a_loss_that_jumps_at_switches_oscillates() -> None:
    finding = found(lived(*SWITCHES, "training.reset_optimizer=phase"))["oscillation"]
    assert finding.severity == "problem"
    assert "training.reset_optimizer=never" in finding.advice
    assert "At 10 switches" in finding.text


def test_the_same_rate_with_moments_that_go_on_does_not_oscillate() -> None:
    assert "oscillation" not in found(lived(*SWITCHES))


@pytest.mark.parametrize("graph", ["{name: ring}", "{name: complete, activation: 0.2}"])
def test_idle_factors_that_stay_at_home_do_not_match(graph: str) -> None:
    finding = found(lived("algorithm.name=rolora", f"graph={graph}"))["phase_mismatch"]
    assert finding.severity == "problem"
    assert "In 14 of 15 rounds" in finding.text  # in the first, all hold the common start of the idle one
    assert "algorithm.name=tad_lora" in finding.advice


def trace(folder: Path, edges: Callable[[int], list[tuple[int, int]]], rounds: int) -> str:
    file = folder / "contacts.txt"
    file.write_text("".join(f"{t},{i},{j}\n" for t in range(rounds) for i, j in edges(t)))
    return f"graph={{name: trace, path: {file}}}"


def test_groups_that_never_met_are_named(tmp_path: Path) -> None:
    bridge = 40  # long after the run
    graph = trace(tmp_path, lambda t: [(2, 3), (5, 4)] if t == bridge else [(0, 1), (1, 2), (3, 4)], bridge + 1)
    finding = found(lived(graph))["no_contraction"]
    assert "clients 0, 1, 2 and clients 3, 4 never reached each other" in finding.text
    assert "client 5 never met anyone" in finding.text
    assert finding.severity == "problem"


def test_clients_that_meet_too_rarely_to_agree_are_found_though_all_are_joined(tmp_path: Path) -> None:
    once = {3: [(0, 1)], 5: [(2, 3)], 7: [(4, 5)], 9: [(1, 2)], 13: [(3, 4)], 199: [(0, 5)]}
    finding = found(lived(trace(tmp_path, lambda t: once.get(t, []), 200)))["no_contraction"]
    assert finding.title == "Clients meet too rarely to agree"
    assert "graph.activation" in finding.advice


def test_links_that_fail_make_mixing_worse_than_rho() -> None:
    findings = found(lived("rounds=20", links=0.04))
    assert findings["worse_than_rho"].severity == "problem"
    assert "worse_than_rho" not in found(lived("rounds=20", "graph.activation=0.04"))


@pytest.mark.parametrize(
    ("overrides", "advice"),
    [
        (("graph.activation=1", "algorithm={name: adf_lora, switch_every: 40}"), "algorithm.switch_every=3."),
        (("graph.activation=0.1", "algorithm={name: adf_lora, switch_every: 1}"), "algorithm.switch_every="),
        (("algorithm.name=rolora",), "algorithm.name=tad_lora"),
    ],
)
def test_phases_far_from_what_the_graph_asks_for_are_noticed(overrides: tuple[str, ...], advice: str) -> None:
    finding = found(lived(*overrides))["interval"]
    assert finding.severity == "notice"
    assert advice in finding.advice


def test_clients_whose_reports_do_not_arrive_are_out_of_phase(tmp_path: Path) -> None:
    four = [(i, j) for i in range(4) for j in range(i)]
    graph = trace(tmp_path, lambda t: [(3, 4), (4, 5)] if t == 199 else four, 200)
    adaptive = "algorithm={name: tad_lora, switch_every: adaptive, window_rounds: 16}"
    finding = found(lived(graph, adaptive, "rounds=48", "training.local_steps=1"))["out_of_phase"]
    assert "clients 4, 5" in finding.text
    assert "algorithm.window_rounds" in finding.advice


def test_clients_that_answer_with_one_class_are_named_with_their_rows() -> None:
    alone = ("clients=5", "partition={name: disjoint_labels}", "algorithm.name=local", "rounds=12")
    findings = found(lived(*alone))
    assert "algorithm.name" in findings["one_class"].advice
    assert "100% 5 for client 0" in findings["one_class"].text
    _, facts, records = lived(*alone)
    last, labels = records[-1]["evaluation"], facts["evaluated"]["labels"]
    assert (facts["evaluated"]["rows"], sum(labels), facts["validation"]["rows"]) == (last["rows"], 60, 180)
    stuck = [score for score, share in zip(last["clients"], last["top_share"], strict=True) if share == 1]
    assert stuck
    assert set(stuck) <= {count / 60 for count in labels}  # each has one class's rows right, and no other
    assert f"at most {max(labels) / 60:.0%} of the rows evaluated" in findings["one_class"].text
    assert findings["no_exchange"].severity == "notice"
    assert findings.keys() == {"one_class", "no_exchange"}  # disagreement is not what is wrong


@pytest.mark.parametrize(
    "training",
    [
        "{learning_rate: 0.5, local_steps: 2, per_device_train_batch_size: 8}",
        "{optim: sgd, learning_rate: 30, max_grad_norm: 0, local_steps: 2, per_device_train_batch_size: 8}",
    ],
)
def test_a_learning_rate_that_is_too_high_is_found(training: str) -> None:
    finding = found(lived(f"training={training}"))["learning_rate"]
    assert finding.severity == "problem"
    assert "training.learning_rate" in finding.advice


def test_two_rounds_are_too_few_to_judge() -> None:
    recipe, facts, records = lived("training.learning_rate=0.5", "algorithm.name=rolora")
    assert [finding.name for finding in diagnose(recipe, facts, records[:2])] == ["interval", "too_short"]


def test_problems_come_before_notices() -> None:
    severities = [finding.severity for finding in diagnose(*lived("algorithm.name=rolora"))]
    assert severities == sorted(severities, key=["problem", "notice", "good"].index)
    assert len(set(severities)) == 2


# Records that were made up.

MakeRun = Callable[..., RunData]


def settled(run: RunData, level: float = 1.0, fall: float = 0.0) -> list[dict[str, Any]]:
    """The run's records with a loss that hardly moves."""
    draw = np.random.default_rng(0)
    for t, record in enumerate(run.records):
        record["loss"] = (level - fall * t + draw.normal(0, 0.01, len(record["loss"]))).tolist()
    return run.records


def complete(recipe: Mapping[str, Any]) -> dict[str, Any]:
    training = {"learning_rate": 0.01, "max_grad_norm": 1.0, "reset_optimizer": "never"}
    return {**recipe, "training": training}


def names(run: RunData) -> set[str]:
    return {finding.name for finding in diagnose(complete(run.recipe), run.facts, run.records)}


def test_one_client_that_spikes_is_no_sign_but_a_third_of_them_is(make_run: MakeRun) -> None:
    run = make_run(clients=6, rounds=40)
    settled(run, level=0.3)
    for t in (12, 20, 29):
        run.records[t]["loss"][t % 6] = 4.0
    assert "learning_rate" not in names(run)
    for t in (12, 20, 29):
        run.records[t]["loss"][:2] = [4.0, 4.0]
    assert "learning_rate" in names(run)


def test_a_loss_that_rises_for_good_is_found_and_one_that_falls_from_above_guessing_is_not(make_run: MakeRun) -> None:
    run = make_run(rounds=40)
    settled(run, level=6.0, fall=0.1)
    assert "learning_rate" not in names(run)
    settled(run, level=0.3, fall=-0.01)
    assert "learning_rate" in names(run)


def test_a_jump_is_found_at_its_size_and_not_below(make_run: MakeRun) -> None:
    for jump, there in ((0.1, False), (0.5, True), (-0.5, False)):
        run = make_run(rounds=40, switch_every=4)
        for t, record in enumerate(settled(run)):
            record["loss"] = [loss + jump * (t % 4 == 0) for loss in record["loss"]]
        assert ("oscillation" in names(run)) == there


@settings(max_examples=80, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(
    rounds=st.integers(0, 30),
    clients=st.integers(1, 8),
    every=st.integers(0, 7),
    method=st.sampled_from(["tad_lora", "rolora", "dec_lora", "decaf", "local"]),
    switch_every=st.sampled_from([None, 1, 2, 7, "adaptive"]),
    metric=st.sampled_from(["accuracy", "pearson"]),
    interval=st.sampled_from([None, 1, 30]),
    seed=st.integers(0, 2**16),
)
def test_no_check_fails_on_a_well_formed_run(
    make_run: MakeRun, method: str, switch_every: Any, interval: int | None, seed: int, **drawn: Any
) -> None:
    run = make_run(method=method, seed=seed, switch_every=5 if switch_every == "adaptive" else switch_every, **drawn)
    draw = np.random.default_rng(seed)
    run.recipe["algorithm"]["switch_every"] = switch_every
    run.facts["graph"]["switching_interval"] = interval
    for record in run.records:
        here = np.flatnonzero(draw.random(len(record["clients"])) < 0.9).tolist() or [0]
        for key in ("clients", "loss", "grad_norm", "neighbours"):  # peers of a network may miss a round
            record[key] = [record[key][client] for client in here]
        record["loss"] = [loss * 10 ** draw.uniform(-6, 6) for loss in record["loss"]]
        record["out_of_phase"] = here[: draw.integers(3)]
        record["failed_edges"] = record["edges"][: draw.integers(3)]
        if method == "rolora":
            record["send"] = record["train"]
        if draw.random() < 0.3:
            record["diagnostics"] = {k: 0.0 for k in record["diagnostics"] if not k.startswith("contraction")}
        if record["evaluation"] and record["evaluation"]["top_share"]:
            record["evaluation"]["top_share"][0] = 1.0
    findings = diagnose(complete(run.recipe), run.facts, run.records)
    assert findings
    assert ("good" in {finding.severity for finding in findings}) == (findings[0].name == "healthy")
    for finding in findings:
        assert finding.title
        assert not {"nan", "inf"} & set(re.split(r"[^a-z]+", finding.text))
        assert finding.text.endswith(".")


def test_there_is_something_to_say_of_a_run_that_has_not_begun(make_run: MakeRun) -> None:
    assert names(make_run(rounds=0)) == {"too_short"}
