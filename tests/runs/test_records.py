import json
import logging
from dataclasses import MISSING, asdict, fields, replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from run_directories import CLIENTS, everything, no_room, record

from peertune.errors import RunError
from peertune.rounds.record import Evaluation, RoundRecord
from peertune.runs import records


def test_records_come_back_as_they_were(run: Path) -> None:
    evaluated = record(1, Evaluation("accuracy", [0.5, 0.25, 1.0], 0.75, 4, [0.5, 0.5, 1.0]))
    records.append(run, record(0))
    records.append(run, evaluated)
    first, second = records.read(run)
    assert first["loss"] == [0.1, 1 / 3, 2e-9]
    assert first["failed_edges"] == [[0, 2]]
    assert first["evaluation"] is None
    assert "state" not in first
    assert second["evaluation"] == {
        "metric": "accuracy",
        "clients": [0.5, 0.25, 1.0],
        "average": 0.75,
        "rows": 4,
        "top_share": [0.5, 0.5, 1.0],
        **{key: [] for key in ("own", "nll", "ece", "heard_ensemble", "own_constant", "confusion", "also")},
        **{key: [] for key in ("backdoor", "best_rounds", "judged", "own_trained", "own_heard")},
        **dict.fromkeys(("ensemble", "route", "constant")),
    }


def crowded(round: int) -> RoundRecord:
    """Return a record of 1,500 clients."""
    draw = np.random.default_rng(round)
    clients = list(range(1500))
    values: list[list[float]] = draw.random((6, 1500)).tolist()
    by_f1 = Evaluation("f1 of v1.2", values[5], 0.5, 4, [])
    return replace(
        record(round, replace(Evaluation("accuracy", values[0], 0.75, 4, values[1]), also=[by_f1])),
        clients=clients,
        loss=values[2],
        grad_norm=values[3],
        bytes_sent=[8] * 1500,
        neighbours=draw.integers(9, size=1500).tolist(),
        edges=[(i, i + 1) for i in range(1499)],
        out_of_phase=[4, 1203],
        neighbourhood_cross_term=values[4],
    )


def test_long_lists_of_a_record_lie_beside_its_line_and_come_back_as_they_were(run: Path) -> None:
    for t in range(3):
        records.append(run, crowded(t))
    whole = [json.loads(json.dumps({**asdict(replace(crowded(t), state=None))})) for t in range(3)]
    assert records.read(run) == [{name: x for name, x in one.items() if name != "state"} for one in whole]
    lines = (run / "rounds.jsonl").read_text().splitlines()
    assert max(map(len, lines)) < 1500
    said = json.loads(lines[2])
    assert (said["clients"], said["edges"], said["out_of_phase"]) == (1500, 1499, [4, 1203])
    assert said["loss"] == pytest.approx(np.mean(crowded(2).loss))
    assert said["evaluation"]["clients"] == pytest.approx(np.mean(whole[2]["evaluation"]["clients"]))
    part = records.read(run, ["evaluation.clients"])[1]
    assert (part["loss"], part["evaluation"]["clients"]) == (
        pytest.approx(np.mean(crowded(1).loss)),
        whole[1]["evaluation"]["clients"],
    )
    assert part["evaluation"]["also"][0]["clients"] == whole[1]["evaluation"]["also"][0]["clients"]
    records.rewind(run, 2)
    assert (run / "rounds.jsonl").read_text().splitlines() == lines[:2]
    records.append(run, crowded(2))
    assert (run / "rounds.jsonl").read_text().splitlines() == lines


@pytest.mark.parametrize("damage", [None, b"", b"\xff" * 20, b"\x02\0\0\0\0\0\0\0{}"])
def test_a_round_whose_long_lists_are_damaged_is_left_out_with_a_warning(
    run: Path, damage: bytes | None, caplog: pytest.LogCaptureFixture
) -> None:
    for t in range(3):
        records.append(run, crowded(t))
    file = run / "rounds" / "round-000001.safetensors"
    file.unlink()
    if damage is not None:
        file.write_bytes(damage)
    assert [found["round"] for found in records.read(run)] == [0, 2]
    assert caplog.messages == [f"{run}/rounds: round 1 is missing or damaged and left out; restore it"]


def test_a_disk_that_fills_up_at_long_lists_leaves_no_line(run: Path) -> None:
    records.append(run, crowded(0))
    before = everything(run)
    with no_room(1000), pytest.raises(RunError, match=r"round-000001\.safetensors: can't be written"):
        records.append(run, crowded(1))
    assert everything(run) == before


@pytest.mark.parametrize("cut", [1, 40, -2])
def test_a_last_line_that_was_cut_off_is_no_record(run: Path, cut: int) -> None:
    records.append(run, record(0))
    with (run / "rounds.jsonl").open("a") as file:
        file.write(json.dumps({"round": 1, "loss": [0.5] * 20})[:cut])
    assert [found["round"] for found in records.read(run)] == [0]
    records.rewind(run, 1)
    records.append(run, record(1))
    assert [found["round"] for found in records.read(run)] == [0, 1]


@pytest.mark.parametrize(
    "damaged", ['{"round": 1, "lo', "", "5", "null", "{}", "[[1, 2]]", '{"round": 7}', '{"round": 1}', "\0\0\0"]
)
def test_a_damaged_line_is_left_out_with_a_warning_and_nothing_goes_on_from_it(
    run: Path, damaged: str, caplog: pytest.LogCaptureFixture
) -> None:
    for t in range(3):
        records.append(run, record(t))
    lines = (run / "rounds.jsonl").read_text().splitlines()
    (run / "rounds.jsonl").write_text("\n".join([lines[0], damaged, lines[2]]) + "\n")
    with caplog.at_level(logging.WARNING):
        found = records.read(run)
    assert [record["round"] for record in found] == [0, 2]
    (warning,) = caplog.messages
    assert warning.endswith("rounds.jsonl: line 2 is damaged and left out; restore the file")
    with pytest.raises(RunError, match=r"rounds\.jsonl: has no record of round 1, which the checkpoint round-000003"):
        records.rewind(run, 3)
    records.rewind(run, 1)
    assert [record["round"] for record in records.read(run)] == [0]


def test_a_line_of_a_version_with_fewer_fields_has_their_defaults_and_one_with_more_keeps_them(
    run: Path, caplog: pytest.LogCaptureFixture
) -> None:
    records.append(run, record(0, Evaluation("accuracy", [0.5] * CLIENTS, 0.5, 9, [0.4] * CLIENTS)))
    line = json.loads((run / "rounds.jsonl").read_text())
    fewer = {key: value for key, value in line.items() if key != "evaluation"} | {"round": 1}
    more = line | {"round": 2, "weather": ["fair"], "evaluation": line["evaluation"] | {"error": [0.1]}}
    (run / "rounds.jsonl").write_text("".join(json.dumps(values) + "\n" for values in (line, fewer, more)))
    assert records.read(run) == [line, fewer | {"evaluation": None}, more]
    before = (run / "rounds.jsonl").read_text()
    records.rewind(run, 3)
    assert (run / "rounds.jsonl").read_text() == before
    assert not caplog.messages


@pytest.mark.parametrize(
    ("of", "first"),
    [
        (
            RoundRecord,
            "round train send clients loss grad_norm bytes_sent neighbours edges failed_edges out_of_phase "
            "neighbourhood_cross_term diagnostics seconds",
        ),
        (Evaluation, "metric clients average rows top_share"),
    ],
)
def test_a_field_of_a_record_that_the_first_version_lacked_has_a_default(of: Any, first: str) -> None:
    needed = [field.name for field in fields(of) if field.default is field.default_factory is MISSING]
    assert needed == first.split()


def test_what_is_no_run_has_no_records(tmp_path: Path) -> None:
    (tmp_path / "file").touch()
    for folder in (tmp_path, tmp_path / "nowhere", tmp_path / "file", tmp_path / ("x" * 300)):
        with pytest.raises(RunError, match=r"no readable rounds\.jsonl; give the folder of a run"):
            records.read(folder)


@pytest.mark.parametrize("to", [0, 1, 3, 5])
def test_rewinding_forgets_the_rounds_that_will_be_made_again(run: Path, to: int) -> None:
    for t in range(5):
        records.append(run, record(t))
    before = (run / "rounds.jsonl").read_text().splitlines()
    records.rewind(run, to)
    assert (run / "rounds.jsonl").read_text().splitlines() == before[:to]
    assert sorted(file.name for file in run.iterdir() if file.name.startswith(".")) == []


def test_rewinding_to_a_round_whose_records_are_lost_is_refused(run: Path) -> None:
    records.append(run, record(0))
    with pytest.raises(
        RunError, match=r"rounds\.jsonl: has no record of round 1, which the checkpoint round-000003 follows; restore"
    ):
        records.rewind(run, 3)


def test_a_disk_that_fills_up_at_a_record_leaves_a_run_that_goes_on(run: Path) -> None:
    records.append(run, record(0))
    size = (run / "rounds.jsonl").stat().st_size
    with no_room(size + 20), pytest.raises(RunError, match=r"rounds\.jsonl: can't be written \(File too large\)"):
        records.append(run, record(1))
    assert [found["round"] for found in records.read(run)] == [0]
    before = everything(run)
    with no_room(10), pytest.raises(RunError, match=r"rounds\.jsonl: can't be written"):
        records.rewind(run, 1)
    assert everything(run) == before
    records.rewind(run, 1)
    records.append(run, record(1))
    assert [found["round"] for found in records.read(run)] == [0, 1]
