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
import yaml
from hypothesis import HealthCheck, example, given, settings
from hypothesis import strategies as st

from peertune.assembly.build import build
from peertune.assembly.registry import build_graph, check_choices
from peertune.engines.simulator import simulate
from peertune.recipe import check_recipe, load_recipe
from peertune.report.findings import advice
from peertune.report.findings.diagnosis import diagnose
from peertune.report.findings.evidence import Facts
from peertune.report.findings.finding import Finding
from peertune.report.findings.mixing import lost_edges
from peertune.report.findings.waiting import critical_path
from peertune.report.runs import RunData
from peertune.rounds.clock import NS, lockstep

SMALL = (
    "clients=6",
    "rounds=15",
    "training={learning_rate: 5e-3, local_steps: 2, per_device_train_batch_size: 4}",
    "graph.activation=0.3",
    "partition={name: dirichlet, alpha: 1.0}",
    "evaluate={every: 5, rows: 60}",
)
SWITCHES = (
    "clients=5",
    "rounds=36",
    "algorithm={name: adf_lora, switch_every: 3}",
    "training={learning_rate: 3e-2, local_steps: 4, per_device_train_batch_size: 4}",
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


DEMO = load_recipe("digits-demo").model_dump(mode="json")


def check_possible(recipe: Mapping[str, Any], facts: Mapping[str, Any], advice: str) -> None:
    """Hold advice against the recipe it is given for: what it names is there, and what it sets can be and is new."""
    changed: dict[str, Any] = json.loads(json.dumps(recipe))
    new = dict(re.findall(r"((?:[a-z]+\.)?[a-z_]+)=(\w+(?:\.\w+)*)", advice))
    for key, value in sorted(new.items()):  # the algorithm's name before its settings
        block, _, name = key.rpartition(".")
        within = changed[block] if block else changed
        if key == "algorithm.name":
            within.clear()
        before, within[name] = within.get(name), yaml.safe_load(value)
        assert within[name] != before
    check_choices(check_recipe(changed, advice))
    for block, key in re.findall(r"([a-z]+)\.([a-z_]+)", advice):
        assert key in recipe[block] or key in changed[block], advice
    for key, value in re.findall(r"raise ([\w.]+) from ([\d.]+\d|\d)", advice, re.IGNORECASE):
        block, _, name = key.partition(".")
        assert f"{recipe[block][name]:g}" == value
    if "raise graph.activation" in advice.lower():
        assert recipe["graph"]["activation"] < 1
    if "graph.path" in advice:
        assert recipe["graph"]["name"] in ("edges", "trace")
    if "denser graph" in advice:
        assert recipe["graph"]["name"] != "complete"
    if "another algorithm.name" in advice:
        assert (recipe["clients"] > 1, recipe["algorithm"]["name"]) == (True, "local")
    if "milder partition" in advice:
        assert recipe["partition"]["name"] != "iid"
        assert "peers" not in facts
    turn = changed["algorithm"].get("switch_every")
    if "switch_every" in advice and isinstance(turn, int):
        assert 2 * turn <= changed["rounds"]


def found(lived: Lived) -> dict[str, Finding]:
    findings = {finding.name: finding for finding in diagnose(*lived)}
    for finding in findings.values():
        check_possible(lived[0], lived[1], finding.advice)
    return findings


@pytest.mark.parametrize(
    "overrides",
    [
        ("rounds=20", "training.local_steps=3"),
        ("rounds=20", "algorithm={name: adf_lora, switch_every: 4}"),
        ("algorithm.name=dec_lora",),
        ("algorithm.name=ffa_lora",),
        ("algorithm.name=decaf",),
        ("algorithm.name=fedrot_lora",),
        ("algorithm.name=lora_fair",),
        ("algorithm.name=rolora", "graph.activation=1"),  # all idle factors are the same
        ("algorithm={name: tad_lora, switch_every: adaptive, window_rounds: 12}",),
        ("graph={name: ring}",),
        ("partition={name: iid}",),
    ],
)
def test_in_a_run_in_which_nothing_is_wrong_nothing_is_found(overrides: tuple[str, ...]) -> None:
    (finding,) = found(lived(*overrides)).values()
    assert (finding.name, finding.severity) in {("healthy", "good"), ("still_learning", "notice")}
    assert "accuracy" in finding.text
    assert "The best answer that is the same for all rows would score 0." in finding.text


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
    assert finding.advice.startswith(
        "Add edges to the file in graph.path, choose a denser graph.name"
    )  # all are active


def test_links_that_fail_make_mixing_worse_than_rho() -> None:
    findings = found(lived(links=0.04))
    assert findings["worse_than_rho"].severity == "problem"
    assert "worse_than_rho" not in found(lived("graph.activation=0.04"))


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


def test_a_short_run_whose_patience_ran_out_is_not_told_to_go_on(make_run: Any) -> None:
    run = make_run(rounds=6, every=2)
    for record in run.records[1::2]:
        record["evaluation"]["clients"] = [0.5] * len(record["clients"])
    recipe = run.recipe | {"rounds": 40, "evaluate": {"every": 2, "patience": 2}}
    found = {finding.name: finding for finding in diagnose(recipe, run.facts, run.records)}
    assert found["too_short"].advice == "Its evaluate.patience ran out: give it more, or none."


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
    whole = {**DEMO, **recipe, "training": {**DEMO["training"], **training}}
    return json.loads(json.dumps(whole))  # type: ignore[no-any-return]  # of its own


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


def scored(run: RunData, *scores: float, metric: str = "accuracy", level: float = 0.5) -> set[str]:
    """What is found where the last evaluations come to these, and the constant answer to a level."""
    due = [record for record in run.records if record["evaluation"]]
    for record, score in zip(due[-len(scores) :], scores, strict=True):
        record["evaluation"] |= {"metric": metric, "clients": [score] * len(record["clients"]), "constant": level}
    return names(run)


def test_a_run_that_ends_while_it_still_learns_is_not_said_to_be_well(make_run: MakeRun) -> None:
    run = make_run()
    settled(run)
    assert scored(run, 0.60, 0.67, 0.74) == {"still_learning"}
    assert scored(run, 0.72, 0.73, 0.74) == {"healthy"}
    assert scored(run, 0.75, 0.67, 0.74) == {"healthy"}
    assert scored(run, 9.0, 7.0, 6.0, metric="perplexity", level=20) == {"still_learning"}
    assert scored(run, 6.0, 7.0, 9.0, metric="perplexity", level=20) == {"healthy"}
    run.recipe["rounds"] = 100  # it has not ended
    assert scored(run, 0.60, 0.67, 0.74) == {"healthy"}


@pytest.mark.parametrize(("every", "told"), [(24, False), (20, True)])
def test_whether_a_run_still_learns_is_not_told_from_fewer_than_three_evaluations(
    make_run: MakeRun, every: int, told: bool
) -> None:
    run = make_run(every=every)
    settled(run)
    scored(run, *[0.74] * (3 if told else 2))
    (finding,) = diagnose(complete(run.recipe), run.facts, run.records)
    assert (finding.title == "Nothing is wrong") == told
    assert ("Whether they still learn can't be told from 2 evaluations." in finding.text) != told
    assert ("evaluate.every" in finding.advice) != told


def test_clients_that_score_no_more_than_one_answer_for_all_have_learnt_nothing(make_run: MakeRun) -> None:
    run = make_run()
    settled(run)
    for metric in ("accuracy", "macro_f1"):
        assert scored(run, 0.7, 0.7, 0.75, metric=metric, level=0.75) == {"nothing_learnt"}
        assert scored(run, 0.7, 0.7, 0.76, metric=metric, level=0.75) == {"healthy"}
    assert scored(run, 6.0, 7.0, 9.0, metric="perplexity", level=9) == {"nothing_learnt"}


def test_gradients_are_said_to_explode_at_thirty_times_their_start_and_not_before(make_run: MakeRun) -> None:
    run = make_run()
    settled(run)
    for growth, there in ((29.0, False), (31.0, True)):
        for record in run.records:
            record["grad_norm"] = [1.0] * 6
        run.records[15]["grad_norm"] = [growth] * 6
        assert ("learning_rate" in names(run)) == there


def test_mixing_is_worse_than_rho_where_it_is_by_more_than_chance(make_run: MakeRun) -> None:
    run = make_run(activation=0.5, rounds=20)
    settled(run)
    for spread, there in ((0.0, True), (0.6, False), (0.2, True)):  # about a mean of 0.76, where rho is 0.5
        for t, record in enumerate(run.records):
            record["diagnostics"] |= dict.fromkeys(("contraction_A", "contraction_B"), 0.76 + spread * (-1) ** t)
        assert ("worse_than_rho" in names(run)) == there
    for record in run.records:  # as bad as rho leaves room for
        record["diagnostics"] |= dict.fromkeys(("contraction_A", "contraction_B"), 0.74)
    assert "worse_than_rho" not in names(run)


def in_time(run: RunData, seconds: Callable[[int, int], int], ring: bool = True) -> RunData:
    """The run with times of its own: `seconds(client, round)` of training, and neighbours on a ring, or all."""
    count = run.recipe["clients"]
    now = dict.fromkeys(range(count), 0)
    for t, record in enumerate(run.records):
        trained = {k: began + seconds(k, t) * NS for k, began in now.items()}
        apart = (1, count - 1) if ring else range(1, count)
        ends = lockstep(now, trained, [(k, j, trained[j]) for k in now for j in ((k + d) % count for d in apart)])
        now = {k: end for k, (end, _) in ends.items()}
        record |= {"spans": [[*span] for _, span in ends.values()], "time_s": max(now.values()) / NS}
    return run


@pytest.mark.parametrize("ring", [True, False])
def test_a_client_on_whom_most_of_the_time_hangs_is_found_with_the_numbers(make_run: MakeRun, ring: bool) -> None:
    run = in_time(make_run(clients=6, rounds=20), lambda client, t: 40 if client == 3 else 10, ring)
    finding = {finding.name: finding for finding in diagnose(complete(run.recipe), run.facts, run.records)}[
        "stragglers"
    ]
    check_possible(complete(run.recipe), run.facts, finding.advice)
    assert (finding.severity, finding.title) == ("notice", "Clients wait for one that is slow")
    assert "Client 3 trains for 40 s in a round, the median of the others for 10 s." in finding.text
    assert "100% of the 800 s that the run took hung on its trainings" in finding.text
    # all but it train 10 of each 40 s; on the ring the farthest only learns of it in the third round
    assert ring or "Clients spent 62% of their virtual time waiting." in finding.text


def test_few_that_are_slow_are_found_together_and_half_of_all_are_not(make_run: MakeRun) -> None:
    two = in_time(make_run(clients=8, rounds=20), lambda k, t: 50 if k in (2, 5) and t % 2 == k % 2 else 10, ring=False)
    (finding,) = (x for x in diagnose(complete(two.recipe), two.facts, two.records) if x.name == "stragglers")
    assert "Clients 2, 5 train for 30 s in a round" in finding.text
    half = in_time(make_run(clients=8, rounds=20), lambda k, t: 50 if t % 4 == k % 4 else 10, ring=False)
    assert "stragglers" not in names(half)


@pytest.mark.parametrize(
    "seconds",
    [
        lambda client, t: 10,  # nobody waits
        lambda client, t: 40 if client == t % 6 else 10,  # each is slow once
        lambda client, t: 13 if client == 3 else 10,  # who is slower by little
    ],
)
def test_where_nobody_is_much_slower_than_others_no_straggler_is_found(make_run: MakeRun, seconds: Any) -> None:
    assert "stragglers" not in names(in_time(make_run(rounds=20), seconds, ring=False))


def test_stragglers_need_times_and_rounds_enough_and_somebody_who_waits(make_run: MakeRun) -> None:
    def slow(client: int, t: int) -> int:
        return 40 if client == 3 else 10

    assert "stragglers" not in names(in_time(make_run(rounds=9), slow))
    run = in_time(make_run(rounds=20), slow)
    assert "stragglers" in names(run)
    for record in run.records:  # nobody waits in an asynchronous run, and some end no training
        record["spans"] = [
            [k, began, end, end, -1] for k, began, end, *_ in record["spans"] if k != record["round"] % 6
        ]
    assert "stragglers" not in names(run)
    for record in run.records:
        del record["spans"]  # as older versions wrote it
    assert "stragglers" not in names(run)


def test_the_critical_path_goes_back_through_whoever_was_waited_for() -> None:
    rounds = [
        {0: (0, 0, 10, 30, 1), 1: (1, 0, 28, 28, -1), 2: (2, 0, 5, 5, -1)},
        {0: (0, 30, 40, 40, -1), 2: (2, 5, 15, 42, 0)},  # 1 is down
        {0: (0, 40, 45, 70, 1), 1: (1, 40, 68, 68, -1), 2: (2, 42, 50, 50, -1)},  # and joins in where the first ended
    ]
    # 70 = 28 of client 1, 10 of client 0, 28 of client 1, and 4 s of messages
    assert critical_path(rounds) == {1: 56, 0: 10}
    assert critical_path([]) == critical_path([{}]) == {}
    assert critical_path([rounds[0], {0: (0, 30, 29, 29, -1)}]) == {1: 28}, "the run ends where the last client does"


def facts(make_run: MakeRun, graph: Mapping[str, Any], **made: Any) -> Facts:
    run = make_run(**made)
    return Facts(complete(run.recipe | {"graph": graph}), run.facts, run.records)


def test_advice_is_what_the_recipe_leaves_room_for(make_run: MakeRun) -> None:
    full = facts(make_run, {"name": "complete", "activation": 1.0}, clients=1, method="local", switch_every=None)
    assert advice.meet_more(full) == advice.last_longer(full) == []
    assert advice.hear_others(full) == advice.either([]) == ""
    ring = facts(make_run, {"name": "ring", "activation": 0.25}, rounds=24, switch_every=6)
    assert advice.meet_more(ring) == ["raise graph.activation from 0.25", "choose a denser graph.name"]
    assert advice.either(advice.meet_more(ring)) == "Raise graph.activation from 0.25 or choose a denser graph.name."
    assert advice.last_longer(ring) == ["raise algorithm.switch_every from 6, so that jumps are rarer"]
    assert advice.take_turns(ring, 12) == "Set algorithm.switch_every=12."
    assert advice.take_turns(ring, 13) == (
        "Set algorithm.switch_every=13 and rounds=26 or more or raise graph.activation from 0.25, "
        "which makes T* shorter."
    )
    assert advice.last_longer(facts(make_run, {"name": "ring"}, rounds=24, switch_every=7)) == []
    edges = facts(make_run, {"name": "edges", "activation": 1.0, "path": "edges.txt"})
    assert advice.meet_more(edges) == ["add edges to the file in graph.path", "choose a denser graph.name"]
    assert advice.send_both(edges).endswith("algorithm.name=tad_lora")
    edges.facts["graph"]["switching_interval"] = None  # it never mixes
    assert advice.send_both(edges).endswith("algorithm.name=adf_lora")
    assert "network.patience_s" in advice.wait_longer(edges)
    edges.recipe["network"]["patience_s"] = 86_400.0
    assert advice.wait_longer(edges) == ""


@pytest.mark.parametrize(("mode", "title"), [("rounds", "Swaps fail"), ("asynchronous", "Messages don't get through")])
def test_edges_of_peers_over_which_nothing_comes_are_told_as_what_they_are(
    make_run: MakeRun, mode: str, title: str
) -> None:
    run = make_run(clients=4)
    recipe = run.recipe | {"graph": {"name": "ring", "activation": 1.0}, "time": {"mode": mode}}
    failing = [record | {"edges": [(0, 1)], "failed_edges": [(0, 3), (2, 3)]} for record in run.records]
    seen = Facts(complete(recipe), run.facts | {"peers": [0, 1, 2, 3]}, failing)
    said = lost_edges(seen)
    assert said is not None
    assert said.title == title
    assert "(67%)" in said.text
    assert "most often with clients 0, 2, 3" in said.text
    assert ("an edge fails at both ends" in said.text) == (mode == "rounds")
    assert ("network.patience_s" in said.advice) == (mode == "rounds")


@settings(max_examples=80, suppress_health_check=[HealthCheck.function_scoped_fixture, HealthCheck.too_slow])
@given(
    rounds=st.integers(0, 30),
    clients=st.integers(1, 8),
    every=st.integers(0, 7),
    method=st.sampled_from(["tad_lora", "rolora", "dec_lora", "decaf", "local"]),
    switch_every=st.sampled_from([None, 1, 2, 7, "adaptive"]),
    metric=st.sampled_from(["accuracy", "pearson"]),
    interval=st.sampled_from([None, 1, 30]),
    activation=st.sampled_from([0.3, 1.0]),
    graph=st.sampled_from(["complete", "path"]),
    partition=st.sampled_from(["iid", "shards"]),
    seed=st.integers(0, 2**16),
)
@example(  # rounds enough, and never evaluated
    rounds=10,
    clients=1,
    every=0,
    method="tad_lora",
    switch_every=None,
    metric="accuracy",
    interval=None,
    activation=0.3,
    graph="complete",
    partition="iid",
    seed=0,
)
def test_no_check_fails_on_a_well_formed_run(
    make_run: MakeRun,
    method: str,
    switch_every: Any,
    interval: int | None,
    seed: int,
    graph: str,
    partition: str,
    **drawn: Any,
) -> None:
    run = make_run(method=method, seed=seed, switch_every=5 if switch_every == "adaptive" else switch_every, **drawn)
    draw = np.random.default_rng(seed)
    turns = {"switch_every": switch_every, "window_rounds": 40} if switch_every == "adaptive" else {}
    turns = turns or ({} if switch_every is None else {"switch_every": switch_every})
    run.recipe["algorithm"] = {"name": method} | (turns if method == "tad_lora" else {})
    run.recipe["graph"] = {"name": graph if drawn["clients"] > 2 else "complete", "activation": drawn["activation"]}
    run.recipe["partition"] = {"name": partition}
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
        check_possible(complete(run.recipe), run.facts, finding.advice)
        assert finding.title
        assert not {"nan", "inf"} & set(re.split(r"[^a-z]+", finding.text))
        assert finding.text.endswith(".")


def test_there_is_something_to_say_of_a_run_that_has_not_begun(make_run: MakeRun) -> None:
    assert names(make_run(rounds=0)) == {"too_short"}


def with_ranks(run: RunData, energy: Callable[[int], float]) -> RunData:
    """The run, as if clients had ranks 4 and 16, and every second round was evaluated."""
    for record in run.records:
        record["diagnostics"].pop("energy_beyond", None)
        if record["round"] % 2:
            record["diagnostics"] |= {"energy_beyond": energy(record["round"]), "highest_apart": 0.1}
    return replace(run, facts=run.facts | {"ranks": {"clients": [4, 16] * 3, "scaling": "common"}})


def test_what_only_high_ranks_know_and_what_fades_is_found_with_the_numbers(make_run: MakeRun) -> None:
    run = with_ranks(make_run(rounds=40), lambda t: 0.1 * min(t, 9) * 0.93 ** max(0, t - 9) / 3)
    (finding,) = (x for x in diagnose(complete(run.recipe), run.facts, run.records) if x.name == "rank_collapse")
    check_possible(complete(run.recipe), run.facts, finding.advice)
    assert finding.title == "What only clients of rank 16 know fades"
    assert "30.0% lay beyond rank 4 after round 9" in finding.text
    assert "7.0% of it went in each round" in finding.text


@pytest.mark.parametrize(
    "energy",
    [
        lambda t: 0.3,  # it stays
        lambda t: 0.3 * 0.99**t,  # most of it is there at the end
        lambda t: 0.02 * t,  # it grows
        lambda t: 0.3 if t < 25 else 0.01,  # it went at once, and then no more
        lambda t: 0.0,
    ],
)
def test_where_high_ranks_keep_what_they_know_no_collapse_is_found(make_run: MakeRun, energy: Any) -> None:
    assert "rank_collapse" not in names(with_ranks(make_run(rounds=40), energy))
    assert "rank_collapse" not in names(make_run(rounds=40))


def doubted(run: RunData, took: float, *, others: float = 0.8, refused: int = 0) -> RunData:
    """The run, as if a rule took of client 2 this share of its weight, and another of the others'."""
    for record in run.records:
        record["taken"] = [(client, 2.0, 2.0 * (took if client == 2 else others)) for client in range(6)]
        record["not_mixed"] = [[0, 2]] if record["round"] < refused else []
    return run


def test_clients_that_others_keep_away_from_are_named_with_the_evidence(make_run: MakeRun) -> None:
    run = doubted(make_run(rounds=20), 0.1, refused=4)
    (finding,) = (x for x in diagnose(complete(run.recipe), run.facts, run.records) if x.name == "kept_away")
    assert finding.title == "Others keep away from client 2"
    assert (
        "client 2: 0.10 of its weight was taken, little in 20 rounds from 0 to 19 and 4 of its messages were too far "
        "off to be mixed, in 4 rounds from 0 to 3."
    ) in finding.text
    assert "Of the median client 0.80" in finding.text
    assert "no proof" in finding.text
    for fine in (doubted(make_run(rounds=20), 0.7, refused=2), make_run(rounds=20), doubted(make_run(rounds=5), 0.1)):
        assert "kept_away" not in names(fine)


def test_what_is_told_of_a_client_goes_by_the_rounds_in_which_it_was_seen(make_run: MakeRun) -> None:
    run = make_run(rounds=12)
    for record in run.records:
        low = record["round"] in (3, 7)  # of client 2 nothing in two rounds of twelve, which is no reason to name it
        record["taken"] = [(client, 2.0, 0.0 if client == 2 and low else 1.6) for client in range(6)]
        record["suspects"] = [(0, 2, 17, 1)] if record["round"] == 7 else []
    (finding,) = (x for x in diagnose(complete(run.recipe), run.facts, run.records) if x.name == "kept_away")
    told = "client 2: 0.67 of its weight was taken, little in 2 rounds from 3 to 7 and a peer fell back after it"
    assert f"{told} mixed it and kept it out in round 7." in finding.text


def test_where_a_rule_takes_nothing_of_anybody_nobody_is_named(make_run: MakeRun) -> None:
    """As `cs_plus` does where a client hears too few: to name all would say nothing of any."""
    assert "kept_away" not in names(doubted(make_run(rounds=20), 0.0, others=0.0))
