"""Sweeps in SLURM's queue: real runs by submitit, on its own local cluster and on one that a folder plays (`slurm`)."""

import json
import os
import re
import shlex
import signal
import sys
from collections.abc import Iterator
from pathlib import Path

import processes
import pytest
import submitit
from conftest import Call
from slurm import Cluster, starting
from sweeping import SMALL, finish, records, start
from typer.testing import CliRunner

from peertune.cli import app
from peertune.sweeps.launch import Command
from peertune.sweeps.slurm import SETTINGS, Element, slurm

GRID = ["algorithm.name=local", "seed=0,1", "rounds=40", "checkpoint.every=100"]
"""Its checkpoints are kept at the end and when a run is stopped: one that goes on was stopped in peace."""
QUEUE = ["--out", "all", "--launcher", "slurm"]


@pytest.fixture
def cluster(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Cluster]:
    processes.forking()  # what runs are forked from is not the cluster's, which kills all that is
    made = Cluster(tmp_path / "cluster")
    with processes.forks() as forks:
        for key, value in (made.environment() | {"FORKING": str(forks.folder / "python")}).items():
            monkeypatch.setenv(key, value)
        yield made
        made.end()


@pytest.fixture(scope="module")
def whole(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The same runs, each by itself."""
    folder = tmp_path_factory.mktemp("whole")
    for name in ("seed=0", "seed=1"):
        words = [name if word == "seed=0,1" else word for word in GRID]
        done = CliRunner().invoke(app, ["run", "digits-demo", *SMALL, *words, "--out", str(folder / name)])
        assert done.exit_code == 0, done.output
    return folder


def rounds(run: Path) -> int:
    lines = run / "rounds.jsonl"
    return lines.read_bytes().count(b"\n") if lines.exists() else 0


def test_elements_that_slurm_takes_go_on_where_they_were_and_end_in_the_same_bits(
    cluster: Cluster, whole: Path, tmp_path: Path
) -> None:
    follower = start(tmp_path, *GRID, *QUEUE, "--slurm", "cpus_per_task=1")
    runs = [tmp_path / "all" / f"seed={seed}" for seed in (0, 1)]
    # The time limit is near: submitit requeues. A time of grace: SLURM requeues.
    warnings = {"1000_0": (runs[0], signal.SIGUSR2), "1000_1": (runs[1], signal.SIGTERM)}

    def warned() -> bool:
        for job in [job for job, (run, _) in warnings.items() if rounds(run) >= 2]:
            cluster.warn(job, warnings.pop(job)[1])
        return not warnings

    processes.wait_until(warned, follower)
    log = tmp_path / "all" / "slurm" / "1000_1_0_log.err"
    processes.wait_until(lambda: b"peertune: stopped after" in log.read_bytes(), follower)
    cluster.take("1000_1", requeue=True)
    code, out, err = finish(follower)
    assert (code, out, err) == (0, "2 of 2 runs are finished in all\n", "")
    assert sorted(cluster.starts()) == ["1000_0", "1000_0", "1000_1", "1000_1"]
    for run in runs:
        assert records(run) == records(whole / run.name)
    assert len(cluster.scripts()) == 1


def test_what_is_in_the_queue_is_followed_and_not_submitted_again(cluster: Cluster, tmp_path: Path) -> None:
    cluster.hold()
    settings = ["partition=gpu", "gpus_per_node=1", "cpus_per_task=4", "timeout_min=240", "mem_gb=16", "setup=true"]
    words = [*GRID, *QUEUE, *(word for setting in settings for word in ("--slurm", setting))]
    code, out, err = finish(start(tmp_path, *words, "--detach", "--jobs", "1"))
    assert (code, out) == (0, "0 of 2 runs are finished in all\n")
    queued = "peertune: 2 pending in the queue; the same command follows them, `scancel 1000` cancels them"
    assert err.splitlines() == [queued]
    (script,) = cluster.scripts()
    lines = {
        "--array=0-1%1",
        "--partition=gpu",
        "--gpus-per-node=1",
        "--cpus-per-task=4",
        "--time=240",
        "--mem=16GB",
        "--job-name=peertune",
        "--signal=USR2@90",
    }
    assert lines <= set(re.findall("^#SBATCH (.*)$", script, re.MULTILINE))
    assert "\n# setup\ntrue\n" in script
    assert re.search(r"^srun .* --cpus-per-task=4 \S+ -P -u -m submitit", script, re.MULTILINE)
    code, out, _ = finish(start(tmp_path, *words, "--detach", "--json"))
    assert code == 0
    assert [(run["run"], run["status"], run["job"]) for run in json.loads(out)] == [
        ("seed=0", "pending", "1000_0"),
        ("seed=1", "pending", "1000_1"),
    ]
    before = cluster.asked()
    follower = start(tmp_path, *words)
    processes.wait_until(lambda: cluster.asked() == before + 2, follower)  # whether to submit, and how it stands
    follower.send_signal(signal.SIGINT)
    code, out, err = finish(follower)
    assert (code, out) == (130, "0 of 2 runs are finished in all\n")
    assert err.splitlines() == ["peertune: leaving the runs in the queue", queued]
    assert len(cluster.scripts()) == 1
    assert cluster.queue() == ["1000_0", "1000_1"]


def test_elements_that_fail_are_named_and_only_they_are_submitted_again(cluster: Cluster, tmp_path: Path) -> None:
    words = ["rounds=1", "lora.r=999,4", *QUEUE]
    cluster.hold()
    follower = start(tmp_path, *words)
    processes.wait_until(lambda: len(cluster.queue()) == 2, follower)
    cluster.take("1000_1")
    cluster.hold(False)
    code, out, err = finish(follower)
    assert (code, out) == (2, "0 of 2 runs are finished in all\n")
    cancelled, failed = sorted(err.splitlines())
    assert cancelled == "peertune: lora.r=4: job 1000_1 left the queue and said nothing; was it cancelled?"
    assert failed.startswith("peertune: lora.r=999: lora.r: 999 is above the size of ")
    code, out, err = finish(start(tmp_path, *words, "--shard", "2/2"))  # one run, and no array
    assert (code, out, err) == (0, "1 of 1 runs are finished in all\n", "")
    assert cluster.starts() == ["1000_0", "1001"]
    cluster.hold()
    code, out, _ = finish(start(tmp_path, *words, "--detach", "--json"))
    assert code == 0
    assert [(run["run"], run["status"], run["job"]) for run in json.loads(out)] == [
        ("lora.r=999", "pending", "1002"),
        ("lora.r=4", "finished", None),
    ]


def test_a_task_that_submitit_takes_off_its_own_cluster_goes_on(whole: Path, tmp_path: Path) -> None:
    words = ["digits-demo", *SMALL, *[word for word in GRID if word != "seed=0,1"], "seed=0"]
    task = Command(tuple(words), tmp_path / "seed=0")
    with processes.forks() as forks:
        executor = submitit.LocalExecutor(tmp_path / "jobs", python=shlex.join(starting(str(forks.folder / "python"))))
        job = executor.submit(Element(task, 60))
        processes.wait_until(lambda: rounds(task.folder) >= 2)
        assert isinstance(job, submitit.LocalJob)
        (child,) = Path(f"/proc/{job.job_id}/task/{job.job_id}/children").read_text().split()
        os.kill(int(child), signal.SIGUSR2)
        processes.wait_until(job.done)
    assert "Requeued job" in str(job.stdout())
    assert job.exception() is None
    assert records(task.folder) == records(whole / "seed=0")


REFUSALS = [
    (["--slurm", "partition=gpu"], "--slurm: goes with --launcher slurm"),
    (["--detach"], "--detach: goes with --launcher slurm"),
    ([*QUEUE, "--slurm", "partitoin=gpu"], "--slurm: unknown name 'partitoin', did you mean partition?"),
    ([*QUEUE, "--slurm", "nodes=2"], "--slurm: unknown name 'nodes', did you mean"),
    ([*QUEUE, "--slurm", "x=2"], f"--slurm: unknown name 'x', choose from {', '.join(sorted(SETTINGS))}"),
    ([*QUEUE, "--slurm", "partition"], "--slurm: 'partition' sets nothing; write key=value, such as partition=gpu"),
    ([*QUEUE, "--slurm", "timeout_min=4h"], "--slurm: timeout_min: '4h' is no number"),
    ([*QUEUE, "--slurm", "mem_gb=nan"], "--slurm: mem_gb: nan can't be, give more than 0"),
    (["--launcher", "slurm", "--out", "50%"], "--launcher slurm: 50%/slurm: SLURM reads % in a path as a mark"),
    ([*QUEUE, "--slurm", "qos=a", "--slurm", "qos=b"], "--slurm: qos stands twice; give it once"),
]


@pytest.mark.parametrize(("words", "complaint"), REFUSALS)
def test_settings_that_can_not_be_are_refused_in_one_line(
    peertune: Call, cluster: Cluster, words: list[str], complaint: str
) -> None:
    code, out, err = peertune("sweep", "digits-demo", "seed=0,1", "--out", "all", *words)
    assert (code, out) == (2, "")
    (line,) = err.splitlines()
    assert line.startswith(f"peertune: {complaint}")
    assert not Path("all").exists()


def test_every_setting_is_one_of_submitits(cluster: Cluster, tmp_path: Path) -> None:
    words = [f"{key}=1" for key in SETTINGS]
    slurm(tmp_path / "all" / "slurm", 2, words)


def test_what_a_cluster_lacks_is_one_line(
    peertune: Call, cluster: Cluster, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    def refusal() -> str:
        code, _, err = peertune("sweep", "digits-demo", "seed=0,1", *QUEUE)
        assert code == 2
        (line,) = err.splitlines()
        return line

    cluster.refuse(
        "sbatch: error: invalid partition\nsbatch: error: Batch job submission failed: Invalid partition name"
    )
    assert (
        refusal() == "peertune: --launcher slurm: sbatch refuses: Batch job submission failed: Invalid partition name"
    )
    assert [path.name for path in (tmp_path / "all" / "slurm").iterdir() if path.name != ".lock"] == []
    monkeypatch.setenv("PATH", str(tmp_path))
    assert refusal().startswith(
        "peertune: --launcher slurm: there is no sbatch on this machine; give the command where"
    )
    monkeypatch.setitem(sys.modules, "submitit", None)
    assert refusal() == "peertune: --launcher slurm: needs submitit; pip install 'peertune[slurm]'"
