"""Runs that several processes share, stopped, killed and refused: real processes, started as users start them."""

import json
import os
import random
import re
import shutil
import signal
import socket
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import pytest
import torch
from federation import free_ports
from processes import AT_MOST_S, Command, Forks, Process, finish, forks, start, wait_until
from ranks import assert_same_adapters
from safetensors.torch import load_file

from peertune.sweeps.grid import rounds_done as rounds

RECIPE = [
    "digits-demo",
    "model.dtype=float64",
    "clients=5",
    "partition={name: iid}",
    "graph={name: complete, activation: 0.5}",
    "algorithm={name: adf_lora, switch_every: 2}",
    "training={local_steps: 1, per_device_train_batch_size: 2, reset_optimizer: phase}",
    "evaluate={every: 7, rows: 4}",
    "lora.lora_dropout=0.1",
    "rounds=36",
    "checkpoint={every: 3, keep: 2}",
]


def records(run: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in (run / "rounds.jsonl").read_text().splitlines()]


def assert_same(ours: Path, theirs: Path) -> None:
    """Hold the adapters and records of two runs against each other."""
    assert [record["round"] for record in records(ours)] == [record["round"] for record in records(theirs)]
    for own, record in zip(records(ours), records(theirs), strict=True):
        assert own["loss"] == pytest.approx(record["loss"], abs=1e-12)
        assert own["diagnostics"] == pytest.approx(record["diagnostics"], abs=1e-9)
        assert own["evaluation"] == record["evaluation"]
        for key in ("train", "clients", "edges", "failed_edges", "bytes_sent", "out_of_phase", "time_s", "spans"):
            assert own[key] == record[key], key
    assert_same_adapters(ours, theirs)


@pytest.fixture
def made() -> Iterator[Forks]:
    """What forks the processes that others start."""
    with forks() as forking:
        yield forking


def in_one_process(folder: Path, *words: str) -> Path:
    code, _, err = finish(start(folder, "run", *RECIPE, *words, "--out", "one"))
    assert code == 0, err
    return folder / "one"


@pytest.fixture(scope="module")
def alone(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The run in one process."""
    return in_one_process(tmp_path_factory.mktemp("alone"))


NOBODY_WAITS = (
    "time={mode: asynchronous, step_s: {name: lognormal, median_s: 1, sigma: 0.7}, latency_s: 1.3}",
    "faults=[{edge: [0, 3], rounds: [4, 25]}]",
)


@pytest.mark.parametrize("words", [(), NOBODY_WAITS], ids=["rounds", "asynchronous"])
def test_a_shared_run_that_is_stopped_goes_on_in_any_number_of_processes_to_the_same_adapters(
    words: Sequence[str], alone: Path, tmp_path: Path, made: Forks
) -> None:
    run = tmp_path / "run"
    process = made.start(tmp_path, "run", *RECIPE, *words, "--workers", "3", "--out", "run")
    for sent, after, go_on in (("SIGINT", 7, ["--workers", "2"]), ("SIGTERM", 22, [])):
        wait_until(lambda after=after: rounds(run) >= after, process)  # type: ignore[misc]
        process.send_signal(signal.Signals[sent])
        code, out, err = finish(process)
        assert (code, out) == (130, ""), err
        said = re.fullmatch(
            r"peertune: stopped after (\d+) rounds; go on with: peertune run --resume run --workers \d\n", err
        )
        assert said is not None, err
        assert int(said[1]) == rounds(run) < 36
        last = max((run / "checkpoints").iterdir())
        meta = json.loads((last / "meta.json").read_text())
        assert meta["round"] == rounds(run)
        assert sorted(client for shard in meta["shards"] for client in shard["clients"]) == list(range(5))
        assert sorted(path.name for path in last.iterdir()) == ["meta.json", *(one["file"] for one in meta["shards"])]
        process = made.start(tmp_path, "run", "--resume", "run", *go_on)
    code, _, err = finish(process)
    assert code == 0, err
    assert_same(run, in_one_process(tmp_path, *words) if words else alone)


def by_agent(folder: Path, module: str, *words: str, **more: str) -> Command:
    """Start the main function of a module: torchrun's, or `elastic`'s."""
    return Command(folder, words, os.environ | {"OMP_NUM_THREADS": "1"} | more, f"from {module} import main; main()")


def listens(port: int) -> bool:
    with socket.socket() as client:
        return client.connect_ex(("127.0.0.1", port)) == 0


def children(process: Process) -> list[int]:
    return [int(pid) for pid in Path(f"/proc/{process.pid}/task/{process.pid}/children").read_text().split()]


def test_a_rank_that_is_killed_before_all_have_met_is_started_again_by_torchrun(
    alone: Path, tmp_path: Path, made: Forks
) -> None:
    run = tmp_path / "run"
    words = ["--standalone", "--nproc-per-node=2", "--max-restarts=1", "-m", "peertune", "run", *RECIPE, "--out", "run"]
    process = by_agent(tmp_path, "torch.distributed.run", *words, PYTHON_EXEC=str(made.folder / "python"))
    try:
        wait_until(lambda: len(children(process)) == 2, process)
        os.kill(random.Random(11).choice(children(process)), signal.SIGKILL)
        assert process.wait(AT_MOST_S) == 0, process.communicate()
    finally:
        process.terminate()
    assert_same(run, alone)


def test_a_run_of_which_a_rank_is_killed_four_times_ends_the_same(alone: Path, tmp_path: Path) -> None:
    """By torchrun's agent, which starts all ranks again, the first time before they have met."""
    chance, run = random.Random(5), tmp_path / "run"
    process = by_agent(tmp_path, "elastic", "2", "4", "run", *RECIPE, "--out", "run")
    try:
        for restart, after in enumerate([0, *sorted(chance.sample(range(1, 30), 3))]):
            ranks = [tmp_path / f"{restart}-{rank}.pid" for rank in range(2)]
            wait_until(lambda ranks=ranks: all(rank.exists() for rank in ranks), process)  # type: ignore[misc]
            wait_until(lambda after=after: rounds(run) >= after, process)  # type: ignore[misc]
            os.kill(int(chance.choice(ranks).read_text()), signal.SIGKILL)
        assert process.wait(AT_MOST_S) == 0, process.communicate()
    finally:
        process.terminate()
    assert {file.name for file in tmp_path.glob("4-*.pid")} == {"4-0.pid", "4-1.pid"}
    assert_same(run, alone)


def test_a_rank_that_is_killed_ends_the_others_with_one_line(tmp_path: Path, made: Forks) -> None:
    process = made.start(tmp_path, "run", *RECIPE, "rounds=5000", "--workers", "2", "--out", "run")
    wait_until(lambda: rounds(tmp_path / "run") >= 2, process)
    os.kill(random.Random(0).choice(children(process)[1:]), signal.SIGKILL)
    code, out, err = finish(process)
    assert code > 0
    assert out == ""
    assert err == "peertune: another process of the run is gone; see what it said, and go on with --resume\n"
    assert not (tmp_path / "run" / "adapters").exists()


def by_hand(folder: Path, rank: int, ranks: int, port: int, words: Sequence[str], **more: str) -> Command:
    place = {"RANK": rank, "LOCAL_RANK": rank, "WORLD_SIZE": ranks, "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": port}
    return start(folder, *words, **{key: str(value) for key, value in place.items()}, **more)


@pytest.mark.parametrize(
    ("words", "complaint"),
    [
        (["seed=1"], r"rank 1 \(.*\): seed is 1, and 0 at rank 0; give all processes the same"),
        (["newer"], r"rank 1 \(.*\): peft is 99\.1, and \d.* at rank 0; give all processes the same"),
        (["elsewhere"], r"\.: rank 1 doesn't see it; give an --out on a disk that all machines share"),
        (["clients=1"], "clients: 1, for 2 processes; start 1 at most"),
        (
            ["training.learning_rate=1e300", "network.bound=false"],
            r".*training: a loss or an adapter is no longer finite after round \d; .*",
        ),
        (
            [*NOBODY_WAITS, "training.learning_rate=1e300", "network.bound=false"],
            r".*training: a loss or an adapter is no longer finite after round \d; .*",
        ),
        ([*NOBODY_WAITS, "checkpoint.steps=2"], r"checkpoint\.steps: clients that wait for nobody have no step .*"),
    ],
)
def test_what_processes_cannot_share_is_one_line_at_rank_0(tmp_path: Path, words: list[str], complaint: str) -> None:
    (port,) = free_ports(1)
    folders = [tmp_path, tmp_path]
    both = [[*RECIPE], [*RECIPE]]
    more: list[dict[str, str]] = [{}, {}]
    match words:
        case ["seed=1"]:
            both[1] += words
        case ["newer"]:
            installed = tmp_path / "installed" / "peft-99.1.dist-info"
            installed.mkdir(parents=True)
            (installed / "METADATA").write_text("Metadata-Version: 2.1\nName: peft\nVersion: 99.1\n")
            more[1] = {"PYTHONPATH": str(installed.parent)}
        case ["elsewhere"]:
            folders[1] = tmp_path / "elsewhere"
            folders[1].mkdir()
        case _:
            both = [[*RECIPE, *words]] * 2
    processes = [
        by_hand(folders[rank], rank, 2, port, ["run", *both[rank], "--out", "run"], **more[rank]) for rank in range(2)
    ]
    (code, out, err), (other, *said) = map(finish, processes)
    assert (code, out, other, *said) == (2, "", 2, "", "")
    assert re.fullmatch(f"peertune: {complaint}\n", err), err


@pytest.mark.parametrize(("rank", "why"), [(0, ""), (1, r" \(.*Connection refused\)")])
def test_processes_that_do_not_meet_say_what_to_look_at(tmp_path: Path, rank: int, why: str) -> None:
    (port,) = free_ports(1)
    process = by_hand(tmp_path, rank, 2, port, ["run", *RECIPE, "--rendezvous-s", "2"])
    code, out, err = finish(process)
    assert (code, out) == (2, "")
    assert re.fullmatch(
        rf"peertune: (\S+ \S+ ERROR )?rank {rank}: 2 processes did not meet at 127\.0\.0\.1:{port} within 2 s{why}; "
        r"see that all were started, and that .* reaches that address\n",
        err,
    ), err
    assert list(tmp_path.iterdir()) == []


def test_a_process_that_waits_for_the_others_can_be_stopped(tmp_path: Path) -> None:
    (port,) = free_ports(1)
    process = by_hand(tmp_path, 0, 2, port, ["run", *RECIPE])
    wait_until(lambda: listens(port), process)
    process.send_signal(signal.SIGTERM)
    assert finish(process) == (130, "", "peertune: stopped before the first round; nothing was kept\n")
    assert list(tmp_path.iterdir()) == []


def test_a_place_to_meet_that_cannot_be_is_named(tmp_path: Path) -> None:
    said = []
    with socket.create_server(("0.0.0.0", 0)) as taken:
        for port in (taken.getsockname()[1], 70000):
            code, out, err = finish(by_hand(tmp_path, 0, 2, port, ["run", *RECIPE]))
            assert (code, out) == (2, "")
            assert err.startswith(f"peertune: rank 0: 2 processes did not meet at 127.0.0.1:{port} (")
            said.append(err.partition("(")[2])
    assert "address already in use" in said[0]
    assert said[1].startswith("MASTER_ADDR and MASTER_PORT must be rank 0's host and a port there); ")


def test_a_shared_run_goes_on_to_the_same_bits_where_the_number_of_processes_stays(tmp_path: Path) -> None:
    def share(*words: str) -> None:
        (port,) = free_ports(1)
        for process in [by_hand(tmp_path, rank, 2, port, ["run", *words]) for rank in (1, 0)]:
            code, _, err = finish(process)
            assert code == 0, err

    share(*RECIPE, "rounds=9", "--out", "run")
    before = load_file(tmp_path / "run" / "adapters" / "client-003" / "adapter_model.safetensors")
    shutil.rmtree(tmp_path / "run" / "checkpoints" / "round-000009")
    shutil.rmtree(tmp_path / "run" / "adapters")
    share("--resume", "run")
    after = load_file(tmp_path / "run" / "adapters" / "client-003" / "adapter_model.safetensors")
    assert all(torch.equal(x, after[name]) for name, x in before.items())
