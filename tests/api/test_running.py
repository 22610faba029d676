import csv
import gc
import io
import json
import logging
import re
import shutil
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from conftest import Call
from safetensors.torch import load_file, save_file

import peertune as pt
from peertune import PeertuneError, Run, Runs, Stopped
from peertune.cli.running import print_summary
from peertune.models.load import MODELS
from peertune.recipe import load_recipe

pytestmark = pytest.mark.thorough
TINY = [
    "clients=3",
    "partition={name: iid}",
    "graph={name: complete}",
    "training={local_steps: 1, per_device_train_batch_size: 2}",
    "evaluate={every: 2, rows: 4}",
    "rounds=3",
    "task.metric=[accuracy, macro_f1]",
]


@pytest.fixture(scope="module")
def made(tmp_path_factory: pytest.TempPathFactory) -> Run:
    """A run that was made from Python."""
    return pt.run("digits-demo", TINY, out=tmp_path_factory.mktemp("made") / "run")


def left(folder: Path) -> dict[str, Any]:
    """All that a run leaves, but for the time that it took, and the order in which PEFT writes names of layers."""
    found: dict[str, Any] = {}
    for file in sorted(file for file in folder.rglob("*") if file.is_file() and file.name != ".lock"):
        name = str(file.relative_to(folder))
        if file.name == "adapter_config.json":
            config = json.loads(file.read_text())
            found[name] = config | {"target_modules": sorted(config["target_modules"])}
        elif file.name == "rounds.jsonl":
            found[name] = [json.loads(line) | {"seconds": None} for line in file.read_text().splitlines()]
        else:
            found[name] = file.read_bytes()
    return found


def test_a_run_from_python_leaves_what_the_command_leaves(peertune: Call, made: Run) -> None:
    code, out, _ = peertune("run", "digits-demo", *TINY, "--out", "run", "--json")
    assert code == 0
    assert left(made.folder) == left(Path("run"))
    said = json.loads(out)
    told = {key: value for key, value in made.summary.items() if key != "seconds"}
    assert told == {key: said[key] for key in told}


def test_of_adapters_that_score_alike_on_own_rows_none_is_said_to_be_better(capsys: pytest.CaptureFixture[str]) -> None:
    alone = pt.run("digits-demo", [*TINY, "algorithm.name=local", "evaluate={on: own, rows: null, mixing: true}"])
    print_summary(alone.folder, as_json=False)
    best = (
        "the one after mixing, and alike its own adapter as trained, and alike the average of what its neighbours sent"
    )
    assert f"; best: {best}\n" in capsys.readouterr().out


def test_a_run_is_stopped_by_who_watches_it_and_resumed_to_the_same_bits(tmp_path: Path, made: Run) -> None:
    with pytest.raises(Stopped, match=r"stopped after 2 rounds; go on with peertune\.resume\(") as caught:
        pt.run("digits-demo", TINY, out=tmp_path / "run", each=lambda record: record.round == 1)
    assert (caught.value.folder, caught.value.rounds) == (tmp_path / "run", 2)
    assert len(Run.open(tmp_path / "run").records) == 2
    seen: list[int] = []
    assert len(pt.resume(tmp_path / "run", each=lambda record: seen.append(record.round)).records) == 3
    assert seen == [2]
    ours, theirs = left(tmp_path / "run"), left(made.folder)
    assert {name: ours[name] for name in theirs} == theirs  # beside which there is the checkpoint where it stopped


def test_a_base_whose_weights_changed_is_refused_by_all_that_goes_on_with_the_run(
    peertune: Call, tmp_path: Path
) -> None:
    base = shutil.copytree(MODELS["digits-vit"], tmp_path / "base")
    tests = ["task.validation_split=0.2", "task.test=validation"]
    made = pt.run("digits-demo", [*TINY, *tests, f"model.name={base}"], out=tmp_path / "run")
    was, before = made.environment["weights"]["body"], left(made.folder)
    file = base / "model.safetensors"
    whole = file.read_bytes()
    tensors = load_file(file)
    tensors["layers.0.attention.k_proj.weight"][3, 5] += 0.25
    save_file(tensors, file, {"format": "pt"})
    going_on = (
        ["run", "--resume", "run", "rounds=4"],
        ["score", "run"],
        ["export", "run", "--client", "0", "--merge", "--to", "model"],
    )
    for words in going_on:
        code, out, err = peertune(*words)
        assert (code, out, err.count("\n")) == (2, "", 1), words
        assert re.fullmatch(
            rf"peertune: model\.name: the weights of {base} are no longer those that the run began with "
            rf"\(digest of the body [0-9a-f]{{16}}, then {was}\); put those back, or start a new run\n",
            err,
        ), err
    assert left(made.folder) == before
    assert not (tmp_path / "model").exists()
    file.write_bytes(whole)
    for words in going_on:
        code, _, err = peertune(*words)
        assert code == 0, err


def test_a_run_that_goes_on_elsewhere_says_so_and_one_that_is_at_its_end_has_nothing_to_say(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    folder = tmp_path / "run"
    with pytest.raises(Stopped):
        pt.run("digits-demo", TINY, out=folder, each=lambda _: True)
    threads = torch.get_num_threads()
    torch.set_num_threads(threads + 1)
    try:
        with caplog.at_level(logging.INFO):
            run = pt.resume(folder)
    finally:
        torch.set_num_threads(threads)
    assert run.environment["resumed"] == [{"round": 1, "threads": threads + 1}]
    line = f"{folder}: goes on with threads {threads + 1}, and began with others; the last digits may differ"
    assert caplog.messages.count(line) == 1
    before = left(folder)
    pt.resume(folder)
    assert left(folder) == before


def test_a_run_of_before_weights_were_told_goes_on_over_any(tmp_path: Path) -> None:
    with pytest.raises(Stopped):
        pt.run("digits-demo", TINY, out=tmp_path / "run", each=lambda _: True)
    file = tmp_path / "run" / "environment.json"
    told = json.loads(file.read_text())
    assert told.pop("weights").keys() == {"body"}
    file.write_text(json.dumps(told))
    assert len(pt.resume(tmp_path / "run").records) == 3


def test_a_run_of_nested_values_without_a_place_goes_with_its_value_unless_it_is_saved(tmp_path: Path) -> None:
    values = load_recipe("digits-demo", TINY).model_dump(mode="json")
    run = pt.run(values, ["rounds=1"])
    folder = run.folder
    saved = run.save(tmp_path / "kept")
    assert left(saved.folder) == left(folder)
    with pytest.raises(PeertuneError, match="kept: is there already"):
        run.save(tmp_path / "kept")
    del run
    gc.collect()
    assert not folder.parent.exists()
    asked = (saved.folder / "recipe.yaml").read_text().splitlines()[0]
    assert asked == "# asked for: peertune run recipe.yaml rounds=1"
    again = load_recipe(saved.folder / "recipe.yaml", ["rounds=1"])
    assert again.model_dump(mode="json") == values | {"rounds": 1}


def test_a_run_without_a_place_that_fails_leaves_nothing(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("tempfile.tempdir", str(tmp_path))
    with pytest.raises(PeertuneError, match="unknown name 'rign'"):
        pt.run("digits-demo", ["graph.name=rign"])
    assert list(tmp_path.iterdir()) == []


def test_of_several_processes_each_must_be_told_the_same_place(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("RANK", "0")
    with pytest.raises(PeertuneError, match="run: of several processes each needs the same out"):
        pt.run("digits-demo")


def test_a_run_has_its_records_its_summary_its_findings_and_its_adapters(made: Run) -> None:
    assert [record["round"] for record in made.records] == [0, 1, 2]
    assert made.summary["mean"] == pytest.approx(sum(made.records[-1]["evaluation"]["clients"]) / 3)
    assert {finding.name for finding in made.findings} == {"too_short"}
    assert {x.shape[0] for x in made.adapters.values()} == {3}
    assert made.recipe["clients"] == 3
    assert made.environment["peertune"] == pt.__version__
    assert made.facts["partition"]["labels"] == ["5", "6", "7", "8", "9"]


def test_a_run_is_a_table_with_a_row_for_each_client_and_round(made: Run) -> None:
    table = made.to_dataframe()
    assert list(table["round"]) == [0, 0, 0, 1, 1, 1, 2, 2, 2]
    assert list(table["client"]) == [0, 1, 2] * 3
    assert list(table["loss"]) == [loss for record in made.records for loss in record["loss"]]
    evaluation = made.records[1]["evaluation"]
    assert list(table[table["round"] == 1]["score"]) == evaluation["clients"]
    assert list(table[table["round"] == 1]["macro_f1"]) == evaluation["also"][0]["clients"]
    assert table[table["round"] == 0]["score"].isna().all()


def test_several_runs_are_a_table_with_a_row_for_each_and_are_compared_as_the_command_does(
    peertune: Call, made: Run, tmp_path: Path
) -> None:
    other = made.save(tmp_path / "other")
    resolved = (other.folder / "resolved.yaml").read_text()
    (other.folder / "resolved.yaml").write_text(resolved.replace("seed: 0", "seed: 1"))
    runs = Runs.open(made.folder, other.folder)
    table = runs.to_dataframe()
    assert list(table["run"]) == [run.name for run in runs]
    assert list(table["seed"]) == [0, 1]
    assert list(table["mean"]) == [run.summary["mean"] for run in runs]
    assert list(table["macro_f1.mean"]) == [run.summary["also"][0]["mean"] for run in runs]
    _, out, _ = peertune("compare", made.folder, other.folder, "--json")
    assert runs.compare() == json.loads(out)
    _, out, _ = peertune("compare", made.folder, other.folder, "--csv")
    (row,) = csv.DictReader(io.StringIO(out))
    assert float(row["macro_f1.mean.mean"]) == runs.compare()[0]["also"][0]["measures"]["mean"]["mean"]
    made.save(tmp_path / "beside")
    with pytest.raises(PeertuneError, match="holds 2 runs; give the folder of one, or take Runs"):
        Run.open(tmp_path)


def test_a_sweep_whose_folder_can_not_be_made_is_refused_in_a_line(tmp_path: Path) -> None:
    (tmp_path / "file").touch()
    with pytest.raises(PeertuneError, match=r"file/runs: can't be written \(Not a directory\); give one"):
        pt.sweep("digits-demo", ["seed=0"], out=tmp_path / "file" / "runs")


def test_a_table_without_pandas_is_refused_with_what_installs_it(made: Run, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "pandas", None)
    for value in (made, Runs((made,))):
        with pytest.raises(PeertuneError) as caught:
            value.to_dataframe()
        assert str(caught.value) == "to_dataframe: pandas is not installed; pip install 'peertune[pandas]'"


def test_a_run_of_clients_that_wait_for_nobody_is_resumed_and_told_with_those_who_have_ended_nothing(
    tmp_path: Path, peertune: Call
) -> None:
    overrides = [*TINY[:-2], "rounds=4", "time={mode: asynchronous, step_s: [1, 1.5, 30], latency_s: 2}"]
    whole = pt.run("digits-demo", overrides, out=tmp_path / "whole")
    with pytest.raises(Stopped):
        pt.run("digits-demo", overrides, out=tmp_path / "stopped", each=lambda record: record.round == 1)
    resumed = pt.resume(tmp_path / "stopped")
    assert left(resumed.folder)["rounds.jsonl"] == left(whole.folder)["rounds.jsonl"]
    for client in range(3):
        file = Path("adapters") / f"client-{client:03d}" / "adapter_model.safetensors"
        assert (whole.folder / file).read_bytes() == (resumed.folder / file).read_bytes()
    assert {client for record in whole.records for client in record["clients"]} == {0, 1}
    last = whole.to_dataframe().query("round == 3").set_index("client")
    assert last["score"].notna().all()
    assert last["loss"].notna().tolist() == [True, True, False]
    assert peertune("report", str(whole.folder))[0] == 0
