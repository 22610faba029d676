"""Sweeps: the grid as values, and real sweeps of real processes that are killed and go on."""

import json
import os
import shlex
import shutil
import signal
import subprocess
import sys
from pathlib import Path

import processes
import pytest
from sweeping import SMALL, assert_same, finish, records, start

from peertune.errors import PeertuneError, RecipeError
from peertune.sweeps import grid
from peertune.sweeps.launch import local
from peertune.sweeps.stacks import stacks


def names(*words: str) -> list[str]:
    return [run.name for run in grid.sweep_runs("digits-demo", words)]


def test_a_grid_is_every_combination_and_its_last_key_changes_fastest() -> None:
    assert names("algorithm.name=dec_lora,tad_lora", "rounds=2", "seed=0,1") == [
        "algorithm.name=dec_lora,seed=0",
        "algorithm.name=dec_lora,seed=1",
        "algorithm.name=tad_lora,seed=0",
        "algorithm.name=tad_lora,seed=1",
    ]
    last = grid.sweep_runs("digits-demo", ["algorithm.name=dec_lora,tad_lora", "rounds=2", "seed=0,1"])[-1]
    assert (last.recipe.algorithm.name, last.recipe.rounds, last.recipe.seed) == ("tad_lora", 2, 1)
    assert names("rounds=2") == ["rounds=2"]


def test_commas_inside_brackets_and_quotes_separate_nothing() -> None:
    word = "algorithm={name: dec_lora},{name: adf_lora, switch_every: 3}"
    first, second = grid.sweep_runs("digits-demo", [word])
    assert (first.recipe.algorithm.name, second.recipe.algorithm.settings) == ("dec_lora", {"switch_every": 3})
    assert (first.name, second.name) == ("algorithm=-name-dec_lora", "algorithm=-name-adf_lora-switch_every-3")
    (one,) = grid.sweep_runs("digits-demo", ["lora.target_modules=[q_proj, v_proj]"])
    assert one.recipe.lora.target_modules == ["q_proj", "v_proj"]
    (quoted,) = grid.sweep_runs("digits-demo", ["model.name='a,b'"])
    assert quoted.recipe.model.name == "a,b"


def test_paths_that_would_come_to_one_name_stay_apart() -> None:
    assert len(set(names("model.name=a/b,a-b"))) == 2


def test_names_stay_short_and_apart() -> None:
    paths = ",".join(f"/data/{'very' * 60}/{letter}" for letter in "ab")
    first, second = names(f"model.name={paths}")
    assert first != second
    assert max(len(first), len(second)) < 200
    assert "/" not in first + second


@pytest.mark.parametrize("of", [1, 2, 3, 5, 9])
def test_shards_are_disjoint_and_together_the_whole(of: int) -> None:
    whole = grid.sweep_runs("digits-demo", ["seed=0,1,2,3,4,5,6"])
    parts = [grid.shard(whole, f"{number}/{of}") for number in range(1, of + 1)]
    assert sorted(run.name for part in parts for run in part) == sorted(run.name for run in whole)


@pytest.mark.parametrize(
    ("words", "complaint"),
    [
        (["sed=0,1"], "digits-demo: sed: unknown key 'sed', did you mean seed?"),
        (["graph.activation=0.1,high"], "graph.activation"),
        (["seed="], "sweep: 'seed=' gives no values; write key=a,b,c, such as seed=0,1,2"),
        (["seed=0,,1"], "gives no values"),
        (["seed"], "gives no values"),
        (["seed=0,0"], "sweep: seed=0 stands twice; give each value once"),
        (["training.learning_rate=1e-3,0.001"], "sweep: training.learning_rate=0.001 stands twice"),
        (["algorithm.switch_every=0,1"], "switch_every: 0 rounds is too short, give at least 1"),
        (["seed=0,1", "seed=2"], "sweep: seed stands twice; give its values in one place"),
        (["algorithm.name=dec_lora,tadlora"], "algorithm.name: unknown name 'tadlora', did you mean tad_lora?"),
        (["algorithm={name: dec_lora, switch_every: 3}"], "unknown key 'switch_every'"),
        (["graph.name=ring,hypercube"], "graph hypercube: clients is 10, not a power of two"),
    ],
)
def test_a_grid_that_can_not_be_is_refused_as_a_whole(words: list[str], complaint: str) -> None:
    with pytest.raises(PeertuneError) as caught:
        grid.sweep_runs("digits-demo", words)
    assert complaint in str(caught.value)


def stacked(*words: str, processes: int = 1) -> list[list[str]]:
    """Which runs are one stack, by the value that differs."""
    found = stacks(grid.sweep_runs("digits-demo", words), processes, on_cpu=True)
    return [[run.name.partition("=")[2] for run in part] for part in found]


def test_runs_that_differ_in_what_goes_by_run_are_one_stack_and_others_none(tmp_path: Path) -> None:
    assert stacked("seed=0,1,2") == [["0", "1", "2"]]
    assert stacked("training.learning_rate=1e-3,2e-3") == [["1e-3", "2e-3"]]
    assert len(stacked("algorithm.name=dec_lora,local", "graph.activation=0.1,1", "rounds=2,3")) == 1
    for key in (
        "lora.r=2,4",
        "lora.rank_pattern={q_proj: 2},{v_proj: 2}",
        "lora.alpha_pattern=null,{q_proj: 2}",
        "lora.use_rslora=false,true",
        "training.local_steps=1,2",
        "head=frozen,trained",
        "clients=4,5",
        "model.dropout=false,true",
    ):
        assert len(stacked(key)) == 2
    assert len(stacked("seed=0,1", "report_to=tensorboard")) == 2
    assert len(stacked("seed=0,1", "model.name=of/the-hub")) == 2
    assert stacked("seed=0,1,2", "head=frozen,trained") == [
        [f"{seed},head={head}" for seed in "012"] for head in ("frozen", "trained")
    ]


def test_runs_on_a_cpu_are_stacks_if_asked_for() -> None:
    runs = grid.sweep_runs("digits-demo", ["seed=0,1", "device=cpu"])
    assert [len(stacks(runs, 1, on_cpu)) for on_cpu in (False, True)] == [2, 1]
    where = [local(3, stack) for stack in (None, True, False)]
    assert [(one.stacks, one.on_cpu) for one in where] == [(3, False), (3, True), (0, False)]


def test_a_stack_is_as_many_as_processes_would_be_idle_without() -> None:
    assert stacked("seed=0,1,2,3,4", processes=2) == [["0", "1", "2"], ["3", "4"]]
    assert len(stacked("seed=0,1,2", "head=frozen,trained", processes=2)) == 2
    assert len(stacked("seed=0,1,2", "head=frozen,trained", processes=3)) == 4
    assert stacked("seed=0,1", processes=9) == [["0"], ["1"]]


@pytest.mark.parametrize("part", ["0/2", "3/2", "1", "a/b", "1/0", "-1/2"])
def test_a_part_that_is_none_is_refused(part: str) -> None:
    with pytest.raises(RecipeError, match="is no part; write i/k with i from 1 to k"):
        grid.shard([], part)


def test_what_settings_come_to_is_no_conflict_and_other_settings_are(whole: Path) -> None:
    run = whole / "algorithm.name=local,seed=1"
    same, other, automatic = (
        grid.sweep_runs(
            "digits-demo", [*SMALL, "algorithm.name=local", "seed=1", "rounds=20", "checkpoint.every=5", *more]
        )
        for more in ((), ("lora.r=2",), ("training.tokens_per_pass=auto",))
    )
    assert grid.conflict(run, same[0].recipe) is None
    assert grid.conflict(run, automatic[0].recipe) is None
    assert grid.conflict(run.parent / "nothing", other[0].recipe) is None
    assert grid.conflict(run, other[0].recipe) == f"{run}: holds a run with lora.r=4, not 2; give another --out"
    assert grid.conflict(whole, same[0].recipe) == f"{whole}: is in the way and is no run; give another --out"


def test_a_sweep_takes_no_other_run_for_its_own(whole: Path) -> None:
    before = {file: file.stat().st_mtime_ns for file in whole.rglob("*")}
    words = [word.replace("dec_lora,local", "dec_lora,decaf") for word in GRID]
    code, out, err = finish(start(whole.parent, *words, "training.local_steps=2", "--out", "all", "--shard", "1/4"))
    assert (code, out) == (2, "0 of 1 runs are finished in all\n")
    assert "holds a run with training.local_steps=1, not 2; give another --out" in err
    assert {file: file.stat().st_mtime_ns for file in whole.rglob("*")} == before


ROUNDED = 1e-3
"""What float32 rounds by comes to in 20 rounds."""
GRID = ["algorithm.name=dec_lora,local", "seed=0,1", "rounds=20", "checkpoint.every=5"]


@pytest.fixture(scope="module")
def whole(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("whole")
    code, out, err = finish(start(folder, *GRID, "--out", "all", "--jobs", "2"))
    assert (code, err) == (0, "")
    assert out == "4 of 4 runs are finished in all\n"
    return folder / "all"


def test_a_sweep_leaves_a_run_directory_for_each_combination(whole: Path) -> None:
    runs = sorted(path.name for path in whole.iterdir() if path.is_dir())
    assert runs == [f"algorithm.name={name},seed={seed}" for name in ("dec_lora", "local") for seed in (0, 1)]
    assert all(len(records(whole / run)) == 20 for run in runs)
    assert all((whole / run / "adapters" / "average").is_dir() for run in runs)


def test_a_sweep_that_is_finished_has_nothing_to_do(whole: Path) -> None:
    before = {file: file.stat().st_mtime_ns for file in whole.rglob("*")}
    code, out, err = finish(start(whole.parent, *GRID, "--out", "all", "--json"))
    assert (code, err) == (0, "")
    assert {run["status"] for run in json.loads(out)} == {"finished"}
    assert {file: file.stat().st_mtime_ns for file in whole.rglob("*")} == before


def test_a_sweep_that_is_stopped_goes_on_to_the_same(whole: Path, tmp_path: Path) -> None:
    words = [*GRID, "--out", "all", "--shard", "1/2", "--stack"]
    process = start(tmp_path, *words)
    lines = tmp_path / "all" / "algorithm.name=dec_lora,seed=0" / "rounds.jsonl"
    processes.wait_until(lambda: lines.exists() and lines.read_bytes().count(b"\n") >= 2, process)
    process.send_signal(signal.SIGINT)
    code, out, err = finish(process)
    assert code == 130
    assert out == "0 of 2 runs are finished in all\n"
    assert err.splitlines() == [
        "peertune: stopping after these rounds; once more to go back to the last checkpoints",
        "peertune: stopped; go on with the same command",
    ]
    assert 2 <= len(records(lines.parent)) < 20
    runs = [f"algorithm.name={name},seed=0" for name in ("dec_lora", "local")]
    assert {len(records(tmp_path / "all" / run)) for run in runs} == {len(records(lines.parent))}  # in one stack
    code, _, err = finish(start(tmp_path, *words, "--jobs", "2"))
    assert (code, err) == (0, "")
    for run in runs:
        assert_same(records(tmp_path / "all" / run), records(whole / run), ROUNDED)


def test_a_run_that_fails_stops_no_other_and_is_named(tmp_path: Path) -> None:
    code, out, err = finish(start(tmp_path, "rounds=1", "lora.r=2,999", "--out", "all"))
    assert code == 2
    assert out == "1 of 2 runs are finished in all\n"
    (line,) = err.splitlines()
    assert line.startswith("peertune: lora.r=999: lora.r: 999 is above the size of ")
    assert [path.name for path in (tmp_path / "all").iterdir()] == ["lora.r=2"]


@pytest.fixture(scope="module")
def full(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A sweep, by the command itself, whose disk is full and whose folder has a module of another's name."""
    folder = tmp_path_factory.mktemp("full")
    (folder / "torch.py").write_text("raise SystemExit('not this one')")
    words = ["sweep", "digits-demo", *SMALL, "rounds=1", "seed=0,1", "--out", "all", "--stack"]
    command = shlex.join([str(Path(sys.executable).with_name("peertune")), *words])
    limited = ["bash", "-c", f"ulimit -f 40; exec {command}"]  # blocks of 1 KiB
    environment = os.environ | {"PYTHONDONTWRITEBYTECODE": "1"}  # which Python would cut off as well, for all after it
    done = subprocess.run(limited, cwd=folder, env=environment, capture_output=True, text=True, check=False)
    assert (done.returncode, done.stdout) == (2, "0 of 2 runs are finished in all\n")
    (folder / "said").write_text(done.stderr)
    return folder


def test_a_full_disk_is_one_line_for_each_run_and_leaves_nothing_half_written(full: Path) -> None:
    said = (full / "said").read_text()
    assert "2 of 2 runs train as one stack: their clients share every pass" in said
    assert [line.partition(": can't be written (")[0] for line in processes.problems(said).splitlines()] == [
        f"peertune: seed={seed}: all/seed={seed}/checkpoints/round-000001" for seed in (0, 1)
    ]
    assert not list((full / "all").rglob(".round*"))


def test_runs_import_nothing_from_the_folder_that_one_is_in(full: Path) -> None:
    assert "not this one" not in (full / "said").read_text()
    assert all(len(records(full / "all" / f"seed={seed}")) == 1 for seed in (0, 1)), "they trained"


def test_a_run_that_was_killed_is_resumed_by_its_sweep(whole: Path, tmp_path: Path) -> None:
    copy = Path(shutil.copytree(whole, tmp_path / "all"))
    run = copy / "algorithm.name=local,seed=1"
    shutil.rmtree(run / "adapters")
    shutil.rmtree(run / "checkpoints" / "round-000020")
    code, _, err = finish(start(tmp_path, *GRID, "--out", "all", "--shard", "4/4"))
    assert (code, err) == (0, "")
    assert_same(records(run), records(whole / run.name), ROUNDED)
    assert (run / "adapters").is_dir()


def test_a_dry_run_lists_the_runs_and_writes_nothing(whole: Path, tmp_path: Path) -> None:
    recipe = ["sweep", "digits-demo", *SMALL]
    with processes.forks() as made:  # each measures in processes that it starts
        one = made.start(whole.parent, *recipe, *GRID, "--out", "all", "--dry-run", "--json")
        other = made.start(tmp_path, *recipe, "rounds=1", "seed=0,1", "--out", "none", "--dry-run", "--stack")
        (code, out, _), (stacked, said, _) = finish(one), finish(other)
    assert (code, stacked) == (0, 0)
    rows = json.loads(out)
    assert [row["run"] for row in rows] == [run.name for run in grid.sweep_runs("digits-demo", [*SMALL, *GRID])]
    assert all(row["finished"] and row["seconds"] > 0 and row["memory_bytes"] > 1e7 for row in rows)
    assert {row["stack"] for row in rows} == {None}
    sent = {row["run"]: sum(map(sum, ([r["bytes_sent"] for r in records(whole / row["run"])]))) for row in rows}
    assert {row["run"]: row["sent_bytes"] for row in rows} == sent
    assert "2 of 2 runs are left" in said
    assert "2 of 2 runs train as one stack" in said
    assert list(tmp_path.iterdir()) == []
