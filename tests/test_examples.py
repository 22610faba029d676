"""The examples run as they are, with less to do."""

import json
import os
import re
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import yaml
from conftest import Call
from federation import free_ports
from processes import Command, Forks, finish, forks, wait_until
from ranks import assert_same_adapters

from peertune.recipe import load_recipe
from peertune.sweeps.grid import rounds_done as rounds

EXAMPLES = Path(__file__).parents[1] / "examples"
CLUSTER = EXAMPLES / "cluster"
BIN = f"{Path(sys.executable).parent}{os.pathsep}{os.environ['PATH']}"


def let_start(made: Forks, run: Path) -> int:
    """Keep the other hospitals where they are until this one is back, however long its process takes to start.

    Returns how many rounds it has recorded before.
    """
    before = rounds(run)

    def back() -> bool:
        now = json.loads((run / "status.json").read_text())
        return bool(now["written_at"] > begun and now["doing"] != "starting")

    begun = time.time()
    others = [pid for pid, words in made.running.items() if "peer" in words and "hospital-3" not in words]
    assert len(others) == 7
    for pid in others:
        os.kill(pid, signal.SIGSTOP)
    try:
        wait_until(back)
    finally:
        for pid in others:
            os.kill(pid, signal.SIGCONT)
    return before


def test_eight_hospitals_one_of_which_is_killed(tmp_path: Path) -> None:
    folder, whole = tmp_path / "play", 16
    script = shutil.copytree(EXAMPLES / "eight-hospitals", tmp_path / "example" / "eight-hospitals") / "play.sh"
    said = []
    with (
        forks() as made,
        (tmp_path / "errors").open("w") as errors,
        subprocess.Popen(
            [script, folder, "training.local_steps=1", "network.patience_s=5"],
            env=os.environ
            | {"PATH": f"{made.folder}{os.pathsep}{BIN}", "ROUNDS": str(whole), "PORT": str(free_ports(8)[0])},
            cwd=tmp_path,
            stdout=subprocess.PIPE,
            stderr=errors,
            text=True,
        ) as play,
    ):
        assert play.stdout is not None
        for line in play.stdout:
            said.append(line)
            if "hospital-3 starts again" in line:
                lost = let_start(made, folder / "runs" / "hospital-3")
    out = "".join(said)
    logs = "\n".join(f"{log.name}: {log.read_text()}" for log in sorted(folder.glob("*.log")))
    assert play.returncode == 0, f"{out}\n{(tmp_path / 'errors').read_text()}\n{logs}"
    found = {file.parent.name: file.read_text() for file in folder.glob("runs/*/rounds.jsonl")}
    assert sorted(found) == [f"hospital-{k}" for k in range(1, 9)]
    records = {name: [json.loads(line) for line in text.splitlines()] for name, text in found.items()}
    for k, name in enumerate(sorted(found)):
        assert records[name][-1]["round"] == whole - 1
        assert (folder / "runs" / name / "adapters" / f"client-{k:03d}" / "adapter_model.safetensors").is_file()

    assert re.search(r"killed after \d+ rounds", out)
    assert any(2 in edge for record in records["hospital-3"][lost:] for edge in record["edges"])  # it met others again
    others = [record for name, of in records.items() if name != "hospital-3" for record in of]
    assert any(2 in edge for record in others for edge in record["failed_edges"])  # who went on without it

    assert (folder / "report.html").stat().st_size > 1e6
    scores = re.search(r"the adapters' scores, hospital 1 to 8:((?: [01]\.\d+){8})$", out, re.MULTILINE)
    assert scores is not None, out
    for key in (folder / "ca" / "key.pem", folder / "hospital-1" / "key.pem"):
        assert key.stat().st_mode & 0o077 == 0


@pytest.mark.parametrize("file", sorted(EXAMPLES.glob("*/recipe.yaml")), ids=lambda file: file.parent.name)
def test_a_recipe_is_short_and_opens_with_what_it_is_for(file: Path) -> None:
    lines = file.read_text().splitlines()
    assert len(lines) <= 40
    assert lines[0].startswith("# ")
    load_recipe(file)


LITTLE = [
    "model.dtype=float64",
    "clients=4",
    "training={local_steps: 1, per_device_train_batch_size: 2}",
    "evaluate={every: 100, rows: 4}",
    "rounds=24",
    "checkpoint.every=5",
]


SLURM = {
    # Two machines with a task on each: what SLURM's commands do as far as a job sees it.
    "srun": """
        while [[ $1 == --* ]]; do shift; done
        for task in 0 1; do
            SLURM_PROCID=$task SLURM_LOCALID=0 "$@" &
            pids+=($!)
        done
        echo "${pids[@]}" >tasks
        for pid in "${pids[@]}"; do
            wait "$pid" || { code=$?; [ "$code" -le "${most:-0}" ] || most=$code; }
        done
        exit "${most:-0}"
    """,
    "scontrol": """
        case $1 in
            show) printf '127.0.0.1\\nelsewhere.invalid\\n' ;;
            requeue) echo "$2" >requeued ;;
        esac
    """,
    "squeue": "echo RUNNING",
}


def slurm(folder: Path, run: Path, path: str = BIN, **commands: str) -> subprocess.Popen[str]:
    """Start the batch script as SLURM would, in this folder, with stand-ins for SLURM's commands."""
    for name, script in (SLURM | commands).items():
        (folder / name).write_text(f"#!/usr/bin/env bash\n{script}\n")
        (folder / name).chmod(0o755)
    (port,) = free_ports(1)
    job = {
        "SLURM_JOB_ID": f"{port - 16_000}",  # from which the script makes that port
        "SLURM_JOB_NAME": "first",
        "SLURM_JOB_NODELIST": "node-[0-1]",
        "SLURM_NTASKS": "2",
        "SLURM_NTASKS_PER_NODE": "1",
        "SLURM_CPUS_PER_TASK": "1",
        "PATH": f"{folder}{os.pathsep}{path}",
    }
    return started(["bash", f"{CLUSTER}/slurm.sbatch", "digits-demo", *LITTLE, "--out", f"{run}"], folder, job)


def started(command: list[str], folder: Path, environment: dict[str, str]) -> subprocess.Popen[str]:
    return subprocess.Popen(
        command,
        cwd=folder,
        env=os.environ | environment,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
    )


@pytest.mark.parametrize(
    ("code", "state", "requeued"),
    [(130, "RUNNING", True), (130, "COMPLETING", False), (137, "RUNNING", False), (0, "RUNNING", False)],
    ids=["stopped", "cancelled", "killed", "finished"],
)
def test_a_slurm_job_is_requeued_where_its_processes_were_stopped(
    tmp_path: Path, code: int, state: str, requeued: bool
) -> None:
    job = slurm(tmp_path, tmp_path / "run", srun=f"exit {code}", squeue=f"echo {state}")
    assert finish(job) == (code, "", "")
    assert (tmp_path / "requeued").exists() == requeued


def documents(name: str) -> dict[str, Any]:
    """Return what a manifest asks for, by kind."""
    return {document["kind"]: document["spec"] for document in yaml.safe_load_all((CLUSTER / name).read_text())}


@pytest.fixture
def forked() -> Iterator[str]:
    """A PATH on which `peertune` and `python -m peertune` start without their imports."""
    with forks() as made:
        yield f"{made.folder}{os.pathsep}{BIN}"


def test_a_run_that_slurm_stops_goes_on_in_pods_to_the_same_adapters(
    peertune: Call, tmp_path: Path, forked: str
) -> None:
    """Each goes on with a run of its own in the same way, by the name that is the same in both here."""
    assert peertune("run", "digits-demo", *LITTLE, "--out", "alone")[0] == 0
    run = tmp_path / "runs" / "first"
    job = slurm(tmp_path, run, forked)
    wait_until(lambda: rounds(run) >= 3, job)
    for task in (tmp_path / "tasks").read_text().split():  # SLURM signals the tasks, and not the script
        os.kill(int(task), signal.SIGTERM)
    code, _, err = finish(job)
    assert code == 130, err
    assert (tmp_path / "requeued").exists()
    assert 3 <= rounds(run) < 24

    pod = documents("pytorchjob.yaml")["PyTorchJob"]["pytorchReplicaSpecs"]["Worker"]["template"]["spec"]
    (container,) = pod["containers"]
    args = [word.replace("/runs", f"{tmp_path}/runs") for word in container["args"]]
    assert args[2].startswith("rounds=")
    (port,) = free_ports(1)
    place = {
        **{one["name"]: one["value"] for one in container["env"]},
        "WORLD_SIZE": "2",  # this and the next two, and RANK: by the operator
        "MASTER_ADDR": "127.0.0.1",
        "MASTER_PORT": f"{port}",
        "HOME": f"{tmp_path}",
        "OMP_NUM_THREADS": "1",
        "PATH": forked,
    }
    words = [*container["command"], *args[:2], *LITTLE, *args[3:]]
    pods = [started(words, tmp_path, place | {"RANK": f"{rank}"}) for rank in range(2)]
    ends = [finish(pod) for pod in pods]
    assert [code for code, _, _ in ends] == [0, 0], ends
    assert_same_adapters(run, tmp_path / "alone")


def test_the_manifests_ask_for_the_same_pods() -> None:
    replicas = documents("pytorchjob.yaml")["PyTorchJob"]["pytorchReplicaSpecs"]
    indexed, service = (documents("job.yaml")[kind] for kind in ("Job", "Service"))
    assert [replica["replicas"] for replica in replicas.values()] == [1, indexed["completions"] - 1]
    assert indexed["parallelism"] == indexed["completions"]
    theirs, ours = (one["template"]["spec"] for one in (replicas["Worker"], indexed))
    assert ours.pop("restartPolicy") == replicas["Worker"]["restartPolicy"] == replicas["Master"]["restartPolicy"]
    assert ours.pop("subdomain") == service["selector"]["batch.kubernetes.io/job-name"]
    (theirs_runs,), (ours_runs,) = theirs.pop("containers"), ours.pop("containers")
    assert theirs == ours
    environment = ours_runs.pop("env")
    own = [one for one in environment if one not in theirs_runs["env"]]
    assert [one["name"] for one in own] == ["RANK", "WORLD_SIZE", "MASTER_ADDR", "MASTER_PORT"]
    assert own[1]["value"] == f"{indexed['completions']}"
    assert theirs_runs.pop("env") == [one for one in environment if one not in own]
    assert (theirs_runs.pop("name"), ours_runs.pop("name")) == ("pytorch", "peertune")
    assert theirs_runs == ours_runs
    claim = documents("claim.yaml")["PersistentVolumeClaim"]
    assert claim["accessModes"] == ["ReadWriteMany"]


@pytest.mark.parametrize(
    "held_out", [[], ["task={name: digits, held_out_writers: [12, 13]}"]], ids=["fifth", "writers"]
)
def test_a_second_evaluator_finds_the_scores_of_a_run_and_sees_one_that_was_changed(
    peertune: Call, tmp_path: Path, held_out: list[str]
) -> None:
    settings = ["clients=2", "rounds=4", "training.per_device_train_batch_size=4", *held_out]
    assert peertune("run", "digits-demo", *settings, "--out", "run")[0] == 0
    assert evaluated_again(tmp_path, "run")[0] == 0
    if held_out:  # what is seen of a change does not depend on how rows are held out
        return
    records = tmp_path / "run" / "rounds.jsonl"
    *before, last = map(json.loads, records.read_text().splitlines())
    last["evaluation"]["clients"][1] += 1 / 180
    records.write_text("\n".join(map(json.dumps, [*before, last])))
    code, out, _ = evaluated_again(tmp_path, "run")
    assert code == 1
    assert [line.split()[0] for line in out.splitlines() if "DIFFERS" in line] == ["client-001"]
    assert "2 of 3 scores are the recorded ones" in out
    code, _, err = evaluated_again(tmp_path, "nowhere")
    assert (code, err.count("\n")) == (1, 1)


def evaluated_again(folder: Path, run: str) -> tuple[int, str, str]:
    script, base = EXAMPLES / "reevaluate.py", EXAMPLES.parent / "peertune" / "models" / "digits-vit"
    assert not re.search(r"^\s*(import|from) peertune", script.read_text(), re.MULTILINE)
    code = f"import runpy; runpy.run_path({str(script)!r}, run_name='__main__')"
    return finish(Command(folder, [run, str(base)], os.environ | {"OMP_NUM_THREADS": "1"}, code))
