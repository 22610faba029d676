"""Peers' run directories, each with its own part of a run, put together and alone."""

import json
import logging
import re
from collections.abc import Sequence
from dataclasses import fields
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import yaml

from peertune.report.figures import of_a_run
from peertune.report.findings.diagnosis import diagnose
from peertune.report.html import page
from peertune.report.runs import RunData, find_runs
from peertune.report.tables import compare
from peertune.rounds.record import SCORES_OF_CLIENTS, RoundRecord

LISTS = ("loss", "grad_norm", "bytes_sent", "neighbours", "neighbourhood_cross_term")
TRAINING = {"learning_rate": 0.01, "max_grad_norm": 1.0, "reset_optimizer": "never"}
ONLY_TOGETHER = {"consensus", "contraction", "ranks", "time", "waiting"}  # figures of what no peer knows
UNKNOWN = dict.fromkeys(("average", "ensemble", "route"))  # and what of an evaluation no peer knows


def own_scores(evaluation: dict[str, Any], client: int) -> dict[str, Any]:
    """What a peer knows of an evaluation, and by each metric: of the counts the first peer has all."""
    return {
        **evaluation,
        **UNKNOWN,
        **{name: evaluation[name][client : client + 1] for name in SCORES_OF_CLIENTS},
        "confusion": (np.array(evaluation["confusion"], dtype=int) * (client == 0)).tolist(),
        "also": [own_scores(metric, client) for metric in evaluation["also"]],
    }


def own_part(record: dict[str, Any], client: int) -> dict[str, Any]:
    """What a peer writes of a round."""
    evaluation = record["evaluation"]
    return {
        **record,
        "clients": [client],
        **{key: [record[key][client]] for key in LISTS},
        "edges": [edge for edge in record["edges"] if client in edge],
        "failed_edges": [edge for edge in record["failed_edges"] if client in edge],
        "diagnostics": {},
        "time_s": None,
        "spans": [],
        "evaluation": evaluation and own_scores(evaluation, client),
    }


def write(
    folder: Path, run: RunData, client: int, missed: Sequence[int] = (), federation: str = "hospitals", **changed: Any
) -> Path:
    """Write one peer's part of a run."""
    folder.mkdir(parents=True)
    partition = run.facts["partition"] | {"rows": [run.facts["partition"]["rows"][client]]}
    peer = {"client": client, "name": f"hospital-{client + 1}", "federation": federation}
    facts = run.facts | {"partition": partition, "peer": peer}
    records = [own_part(record, client) for record in run.records if record["round"] not in missed]
    (folder / "resolved.yaml").write_text(yaml.safe_dump(run.recipe | {"training": TRAINING} | changed))
    (folder / "facts.json").write_text(json.dumps(facts))
    (folder / "environment.json").write_text(json.dumps(run.environment))
    (folder / "rounds.jsonl").write_text("".join(json.dumps(record) + "\n" for record in records))
    return folder


def write_all(folder: Path, run: RunData, missed: Sequence[int] = (), **changed: Any) -> Path:
    """Write the parts of all peers, of whom client 2 missed some rounds."""
    for client in range(run.recipe["clients"]):
        write(folder / f"h{client}", run, client, missed if client == 2 else (), **changed)
    return folder


def test_put_together_they_say_what_a_simulation_says_but_for_what_nobody_knows(make_run: Any, tmp_path: Path) -> None:
    run = make_run(clients=8, also=("macro_f1",))
    run.records[3]["failed_edges"] = [[0, 5], [2, 7]]
    (found,) = find_runs([write_all(tmp_path / "runs", run)])
    assert (found.name, found.folder) == ("hospitals", tmp_path / "runs")
    assert [peer["name"] for peer in found.facts["peers"]] == [f"hospital-{k}" for k in range(1, 9)]
    assert {*found.records[0]} == {field.name for field in fields(RoundRecord)} - {"state"}
    assert found.facts["partition"] == run.facts["partition"]
    assert found.facts["validation"] == run.facts["validation"]
    for mine, record in zip(found.records, run.records, strict=True):
        evaluation = record["evaluation"] and record["evaluation"] | UNKNOWN
        if evaluation:
            evaluation["also"] = [metric | UNKNOWN for metric in evaluation["also"]]
        of_peers = {
            "failed_writes": 0,
            "skipped": 0,
            "epsilon": [],
            "not_mixed": [],
            "taken": [],
            "suspects": [],
            "vacant_edges": [],
        }
        assert mine == of_peers | record | {
            "diagnostics": {},
            "time_s": None,
            "spans": [],
            "sites_sent": [],
            "evaluation": evaluation,
            "seconds": pytest.approx(record["seconds"]),
        }


def test_a_round_that_a_peer_missed_does_without_it(make_run: Any, tmp_path: Path) -> None:
    run = make_run(clients=4, every=2)
    (found,) = find_runs([write_all(tmp_path / "runs", run, missed=range(5, 9))])
    assert [record["round"] for record in found.records] == list(range(24))
    for mine, record in zip(found.records, run.records, strict=True):
        there = [0, 1, 3] if 5 <= record["round"] < 9 else [0, 1, 2, 3]
        assert mine["clients"] == there
        assert mine["loss"] == [record["loss"][client] for client in there]
        if mine["evaluation"]:
            assert mine["evaluation"]["clients"] == [record["evaluation"]["clients"][client] for client in there]
    assert "20</td><td>4</td>" in page([found], {})  # rounds done and missed
    (row,) = compare([found])
    assert row["measures"]["mean"]["mean"] == pytest.approx(np.mean(run.records[-1]["evaluation"]["clients"]))
    assert row["measures"]["average"]["mean"] is None


def test_scores_are_of_peers_that_are_not_hostile_and_one_by_itself_has_its_own(make_run: Any, tmp_path: Path) -> None:
    run = make_run(clients=4, every=2)
    run.facts["hostile"] = [2]
    (found,) = find_runs([write_all(tmp_path / "runs", run)])
    for mine, record in zip(found.records, run.records, strict=True):
        assert mine["loss"] == record["loss"]
        if mine["evaluation"]:
            assert mine["evaluation"]["judged"] == [0, 1, 3]
            assert mine["evaluation"]["clients"] == [record["evaluation"]["clients"][client] for client in (0, 1, 3)]
    final = run.records[-1]["evaluation"]["clients"]
    assert compare([found])[0]["measures"]["mean"]["mean"] == pytest.approx(np.mean([final[k] for k in (0, 1, 3)]))
    rows = re.findall(r"hospital-\d</t[dh]>.*?</tr>", page([found], {}), re.DOTALL)
    assert ["<td>-</td>" in row for row in rows] == [False, False, True, False]
    (alone,) = find_runs([tmp_path / "runs" / "h2"])
    assert alone.records[-1]["evaluation"]["clients"] == [final[2]]


def test_a_peer_whose_phase_is_another_than_most_is_out_of_phase(make_run: Any, tmp_path: Path) -> None:
    run = make_run(clients=3)
    write_all(tmp_path / "runs", run)
    file = tmp_path / "runs" / "h1" / "rounds.jsonl"
    lines = [json.loads(line) for line in file.read_text().splitlines()]
    lines[0]["train"] = ["A", "head"]
    file.write_text("".join(json.dumps(line) + "\n" for line in lines))
    (found,) = find_runs([tmp_path / "runs"])
    assert (found.records[0]["train"], found.records[0]["out_of_phase"]) == (["B", "head"], [1])
    assert found.records[1]["out_of_phase"] == []


def test_every_figure_but_those_of_disagreement_is_drawn_of_peers_together(make_run: Any, tmp_path: Path) -> None:
    run = make_run(clients=5, every=2)
    (found,) = find_runs([write_all(tmp_path / "runs", run, missed=range(5, 9))])
    figures = {figure.name: figure.figure for figure in of_a_run(found)}
    assert figures.keys() == {figure.name for figure in of_a_run(run)} - ONLY_TOGETHER
    assert all(figure.data for figure in figures.values())


def test_one_peer_is_drawn_as_the_client_that_it_is(make_run: Any, tmp_path: Path) -> None:
    run = make_run(clients=6, activation=0.9)
    (found,) = find_runs([write(tmp_path / "mine", run, 3)])
    assert found.name == "mine"
    figures = {figure.name: figure.figure for figure in of_a_run(found)}
    assert figures.keys() == {"score", "others", "certainty", "loss", "confusion", "graph", "partition", "traffic"}
    assert all(list(bar.x) == [3] for bar in figures["partition"].data)
    assert figures["score"].data[0].name == "client 3"
    nodes = figures["graph"].data[2]
    assert len(nodes.x) == 6
    assert [colour == nodes.marker.color[3] for colour in nodes.marker.color] == [k == 3 for k in range(6)]
    text = page([found], {})
    assert "hospital-4, client 3" in text
    assert "<h2>Peers</h2>" not in text


def test_a_peer_alone_can_be_judged_and_is_not_said_to_be_alone(make_run: Any, tmp_path: Path) -> None:
    run = make_run(clients=4, rounds=30, activation=0.9)
    for client in range(4):
        (found,) = find_runs([write(tmp_path / f"{client}", run, client)])
        names = {finding.name for finding in diagnose(found.recipe, found.facts, found.records)}
        assert not names & {"no_exchange", "no_contraction", "lost_edges"}


def test_a_client_that_answers_with_one_class_is_named_with_its_own_rows(make_run: Any, tmp_path: Path) -> None:
    run = make_run(clients=4, rounds=30, activation=0.9)
    run.records[-1]["evaluation"]["top_share"][3] = 1.0
    run.facts["partition"]["rows"][3] = [0, 0, 50]
    write_all(tmp_path / "runs", run)
    for folder in (tmp_path / "runs", tmp_path / "runs" / "h3"):
        (found,) = find_runs([folder])
        findings = {finding.name: finding for finding in diagnose(found.recipe, found.facts, found.records)}
        assert findings["one_class"].text.startswith("Client 3 of")
        assert "100% perhaps for client 3" in findings["one_class"].text


def test_swaps_that_fail_are_noticed_with_those_at_whose_edges_they_do(make_run: Any, tmp_path: Path) -> None:
    run = make_run(clients=6, rounds=30, activation=0.5)
    for record in run.records:
        record["failed_edges"] = [edge for edge in record["edges"] if 4 in edge]
        record["edges"] = [edge for edge in record["edges"] if 4 not in edge]
    write_all(tmp_path / "runs", run)
    for folder in (tmp_path / "runs", tmp_path / "runs" / "h1"):
        (found,) = find_runs([folder])
        findings = {finding.name: finding for finding in diagnose(found.recipe, found.facts, found.records)}
        assert findings["lost_edges"].severity == "notice"
        assert "most often with client 4." in findings["lost_edges"].text
    (found,) = find_runs([tmp_path / "runs"])
    findings = {finding.name: finding for finding in diagnose(found.recipe, found.facts, found.records)}
    assert "client 4 never met anyone" in findings["no_contraction"].text


def test_what_each_machine_may_choose_does_not_keep_peers_apart(make_run: Any, tmp_path: Path) -> None:
    run = make_run(clients=3)
    own: list[dict[str, Any]] = [
        {"device": "cuda", "network": {"patience_s": 60.0}},
        {"model": {"name": "/data/base"}},
        {},
    ]
    for client, changed in enumerate(own):
        write(tmp_path / f"h{client}", run, client, **changed)
    (found,) = find_runs([tmp_path / f"h{client}" for client in (2, 0, 1)])
    assert found.records[0]["clients"] == [0, 1, 2]


def test_only_parts_of_one_run_are_put_together(make_run: Any, tmp_path: Path) -> None:
    run = make_run(clients=2)
    write_all(tmp_path / "a", run)
    write_all(tmp_path / "b", run)  # the same once more
    write_all(tmp_path / "c", run, training=TRAINING | {"learning_rate": 0.1})
    write_all(tmp_path / "d", run, federation="banks")
    found = find_runs([tmp_path])
    assert [(one.name, len(one.facts["peers"])) for one in found] == [("a", 2), ("b", 2), ("c", 2), ("d", 2)]


def test_several_runs_of_a_client_beside_each_other_stay_apart(
    make_run: Any, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    run = make_run(clients=2)
    for name, client in (("x", 0), ("y", 0), ("z", 1)):
        write(tmp_path / name, run, client)
    with caplog.at_level(logging.WARNING):
        assert [one.name for one in find_runs([tmp_path])] == ["x", "y", "z"]
    assert "several runs of one client" in caplog.text


def test_peers_with_validation_rows_of_their_own_have_them_added_up(make_run: Any, tmp_path: Path) -> None:
    run = make_run(clients=2)
    write_all(tmp_path / "runs", run)
    file = tmp_path / "runs" / "h1" / "facts.json"
    file.write_text(json.dumps(json.loads(file.read_text()) | {"validation": {"rows": 30, "labels": [10, 0, 20]}}))
    (found,) = find_runs([tmp_path / "runs"])
    assert found.facts["validation"] == {"rows": 210, "labels": [100, 60, 50]}
