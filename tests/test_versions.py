"""What a release reads, the next reads: runs that older versions left, and peers of which one is older.

`data/formats/N` holds runs of three rounds as the last version before format N + 1 left them: a simulation of three
clients, and both peers of a federation of two. `data/builds/protocol-N.zip` is the package as it was when protocol N
began (`git archive`, without the weights of the built-in base).
"""

import json
import os
import shutil
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from federation import found
from processes import AT_MOST_S, finish, finish_well, start
from safetensors.torch import load_file
from seeing import COLOURS, save_images, save_vit

from peertune import build, load_recipe
from peertune.assembly.build import agreed
from peertune.assembly.registry import choice_defaults
from peertune.recipe import block_defaults
from peertune.report.runs import find_runs
from peertune.runs import checkpoints, records
from peertune.runs.directory import FORMAT
from peertune.wire.node import PROTOCOL

Call = Callable[..., tuple[int, str, str]]
KEPT, BUILDS = (Path(__file__).parent / "data" / kept for kept in ("formats", "builds"))
FORMATS = sorted(int(folder.name) for folder in KEPT.iterdir())

each_format = pytest.mark.parametrize("number", FORMATS)


@pytest.fixture
def old(number: int, tmp_path: Path) -> Path:
    """The runs of a format, copied."""
    return shutil.copytree(KEPT / str(number), tmp_path / "old")


def last_round_undone(run: Path) -> bytes:
    """Remove the checkpoint after the last round and all exports; return the records."""
    shutil.rmtree(run / "checkpoints" / "round-000003")
    shutil.rmtree(run / "adapters")
    return (run / "rounds.jsonl").read_bytes()


def assert_done_again(run: Path, before: bytes) -> None:
    lines = (run / "rounds.jsonl").read_bytes().splitlines()
    assert lines[:2] == before.splitlines()[:2]
    assert [record["round"] for record in records.read(run)] == [0, 1, 2]
    assert json.loads((run / "checkpoints" / "round-000003" / "meta.json").read_text())["format"] == FORMAT
    assert (run / "adapters").is_dir()


@each_format
def test_runs_of_every_format_are_compared_reported_and_diagnosed(number: int, old: Path, peertune: Call) -> None:
    code, out, err = peertune("compare", old, "--json")
    assert (code, err) == (0, "")
    assert sorted(len(row["runs"]) for row in json.loads(out)) == [1, 1]
    code, out, err = peertune("report", old, "--out", "report.html")
    assert (code, err) == (0, "")
    assert out.startswith("the report on 2 runs is in")
    code, out, err = peertune("diagnose", old, "--json")
    assert (code, err) == (0, "")
    assert all(json.loads(out).values())
    simulation = next(run for run in find_runs([old]) if "peers" not in run.facts)
    assert [record["failed_edges"] for record in simulation.records] == [[], [[0, 1]], []]


@each_format
@pytest.mark.parametrize(("run", "client"), [("simulation", "1"), ("simulation", "average"), ("peers/1", "1")])
def test_runs_of_every_format_are_exported(number: int, old: Path, run: str, client: str, peertune: Call) -> None:
    code, _, err = peertune("export", old / run, "--client", client, "--to", "adapter")
    assert (code, err) == (0, "")
    there = "average" if client == "average" else f"client-{int(client):03d}"
    name = "adapter_model.safetensors"
    kept, exported = load_file(old / run / "adapters" / there / name), load_file(Path("adapter", name))
    assert all(exported[key].equal(x) for key, x in kept.items())
    assert exported.keys() == kept.keys()


@each_format
def test_a_simulation_of_every_format_is_resumed(number: int, old: Path, peertune: Call) -> None:
    before = last_round_undone(old / "simulation")
    code, _, err = peertune("run", "--resume", old / "simulation")
    assert code == 0, err
    assert_done_again(old / "simulation", before)


def test_reports_that_stand_as_nan_in_format_1_are_told_apart_by_what_is_known() -> None:
    state = checkpoints.load(KEPT / "1" / "simulation")
    assert state is not None
    assert state.rounds.tolist() == [3, 3, 3]
    known, reports = state.memory["adaptive.known"], state.memory["adaptive.reports"]
    assert known[:, 1].all()  # the second of two rounds of reporting is behind them
    assert not known[:, 0].any()
    assert reports[:, 1].abs().sum() > 0
    assert not reports[:, 0].any()


@each_format
def test_peers_of_every_format_are_resumed_and_meet_again(number: int, old: Path, tmp_path: Path) -> None:
    made = found(tmp_path, 2)
    runs = [old / "peers" / str(client) for client in range(2)]
    before = [last_round_undone(run) for run in runs]
    finish_well(
        [
            start(tmp_path, "peer", "start", "--resume", str(run), "--roster", str(made.roster), "--dir", str(folder))
            for run, folder in zip(runs, map(made.peer, range(2)), strict=True)
        ]
    )
    for run, others in zip(runs, before, strict=True):
        assert_done_again(run, others)
        assert records.read(run)[2]["edges"] == [[0, 1]]


def test_a_peer_of_the_oldest_version_of_this_protocol_meets_one_of_this_version(tmp_path: Path) -> None:
    made = found(tmp_path, 2)
    shutil.unpack_archive(BUILDS / f"protocol-{PROTOCOL}.zip", tmp_path / "old")
    save_vit(tmp_path / "vit")
    save_images(tmp_path / "images", dict.fromkeys(COLOURS, 4))
    (tmp_path / "recipe.yaml").write_text(
        f"model: {{name: {tmp_path}/vit, dtype: float32}}\n"
        "lora: {r: 2, target_modules: [q_proj, v_proj]}\n"
        f"task: {{name: images, path: {tmp_path}/images}}\n"
        "clients: 2\n"
        "algorithm: {name: tad_lora, switch_every: 2}\n"
        "training: {local_steps: 1, per_device_train_batch_size: 2}\n"
        "rounds: 3\n"
        f"network: {{patience_s: {AT_MOST_S}}}\n"
    )

    def words(client: int) -> list[str]:
        who = ["--roster", str(made.roster), "--dir", str(made.peer(client))]
        return ["peer", "start", "--recipe", "recipe.yaml", *who, "--out", f"runs/{client}"]

    code = "import peertune, sys; print(peertune.__file__, flush=True); from peertune.cli import main; main()"
    older = subprocess.Popen(
        [sys.executable, "-c", code, *words(0)],
        cwd=tmp_path,
        env=os.environ | {"PYTHONPATH": str(tmp_path / "old")},
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
    )
    newer = start(tmp_path, *words(1))
    try:
        for process in (newer, older):
            code_, out, err = finish(process)
            assert code_ == 0, err
        assert out.startswith(str(tmp_path / "old"))
    finally:
        older.kill()
        newer.kill()
    for client in range(2):
        assert [record["edges"] for record in records.read(tmp_path / "runs" / f"{client}")] == [[[0, 1]]] * 3


@pytest.mark.parametrize("format", [FORMAT + 1, -1, "two", True, None])
def test_what_is_of_a_later_format_is_refused_in_one_line_by_its_number(
    format: Any, tmp_path: Path, peertune: Call
) -> None:
    run = shutil.copytree(KEPT / "0" / "simulation", tmp_path / "new")
    meta = run / "checkpoints" / "round-000003" / "meta.json"
    whole = meta.read_text()
    meta.write_text(json.dumps(json.loads(whole) | {"format": format}))
    said = f"is of format {format!r}, and this version reads 0 to {FORMAT}; use a newer peertune\n"
    export = ["export", run, "--client", "0", "--to", "adapter"]
    assert peertune(*export) == (2, "", f"peertune: {meta.parent}: {said}")
    meta.write_text(whole)
    facts = run / "facts.json"
    facts.write_text(json.dumps(json.loads(facts.read_text()) | {"format": format}))
    every = [["run", "--resume", run], ["peer", "doctor", "--resume", run], export, ["compare", run], ["report", run]]
    for words in [*every, ["diagnose", run]] if format == FORMAT + 1 else [["compare", run]]:
        assert peertune(*words) == (2, "", f"peertune: {run}: {said}")
    assert not (run / "report.html").exists()
    assert not Path("adapter").exists()


def test_a_name_that_stood_for_something_else_does_not_agree_with_what_it_was() -> None:
    small = ["clients=2", "rounds=1", "algorithm={name: fedrot_lora, strength: 0.4}"]
    told = agreed(build(load_recipe("digits-demo", small), [0]))["algorithm"]
    assert json.loads(told) == {"name": "fedrot_lora", "strength": 0.4, "meaning": 2}
    assert "meaning" not in agreed(build(load_recipe("digits-demo", small[:2]), [0]))["algorithm"]


def test_defaults_that_peers_must_agree_on_stay() -> None:
    """A version that has a setting leaves its default out of what peers compare, as one that lacks it does."""
    metropolis = {"activation": 1.0, "weights": "metropolis"}
    kept: dict[tuple[str, str], dict[str, Any]] = {
        ("algorithm", "adf_lora"): {"switch_every": 5},
        ("algorithm", "fedrot_lora"): {"strength": 0.5},
        ("algorithm", "lora_fair"): {"ridge": 0.01},
        ("modifiers", "dfed_admm"): {"proximal": 0.1},
        ("modifiers", "fedspeed"): {"proximal": 0.1, "ascent": 0.1},
        ("algorithm", "tad_lora"): {"switch_every": "auto", "window_rounds": 40},
        ("graph", "bipartite"): {**metropolis, "left": None},
        ("graph", "torus"): {**metropolis, "rows": None},
        **{
            ("graph", name): metropolis
            for name in (
                *("complete", "edges", "erdos_renyi", "exponential", "hypercube", "matching"),
                *("path", "random_regular", "ring", "star", "trace"),
            )
        },
    }
    for (where, name), defaults in kept.items():
        assert choice_defaults(where, name).items() >= defaults.items(), f"{where} {name}: raise wire.node.PROTOCOL"
    lora = {"lora.r": 8, "lora.lora_alpha": 16, "lora.target_modules": ["query", "value"]}
    assert {key: block_defaults()[key] for key in lora} == lora, "raise wire.node.PROTOCOL"
