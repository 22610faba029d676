"""`peer status`, `peer doctor` and metrics, with peers as real processes."""

import json
import urllib.request
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
from federation import Federation, found, free_ports
from processes import Command, finish, finish_well, start, wait_until

Call = Callable[..., tuple[int, str, str]]
SMALL = [
    "clients=2",
    "rounds=2",
    "partition={name: iid}",
    "graph={name: complete, activation: 1.0}",
    "algorithm={name: dec_lora}",
    "training={local_steps: 1, per_device_train_batch_size: 2}",
    "evaluate={every: 2, rows: 4}",
    "lora.r=2",
    "model.dtype=float32",
    "network.patience_s=100",
]


@pytest.fixture
def two(tmp_path: Path) -> Federation:
    return found(tmp_path, 2)


def who(made: Federation, client: int) -> list[str]:
    return ["--roster", str(made.roster), "--dir", str(made.peer(client))]


def starting(made: Federation, client: int, *more: str) -> list[str]:
    out = ["--out", str(made.folder / "runs" / str(client))]
    return ["peer", "start", "--recipe", "digits-demo", *who(made, client), *out, *more, *SMALL]


def standing(run: Path) -> dict[str, Any]:
    file = run / "status.json"
    found = json.loads(file.read_text()) if file.exists() else {"doing": None}
    assert isinstance(found, dict)
    return found


def checks(out: str) -> dict[tuple[str | None, str], str]:
    return {(check["member"], check["what"]): check["level"] for check in json.loads(out)["checks"]}


@pytest.fixture
def waiting(two: Federation) -> Iterator[tuple[Path, int, Command]]:
    """Peer 0, who trained round 0 and waits for peer 1: its run directory, its metrics' port, its process."""
    (port,) = free_ports(1)
    process = start(two.folder, *starting(two, 0, "--metrics-port", str(port)))
    run = two.folder / "runs" / "0"
    try:
        wait_until(lambda: standing(run)["doing"] == "waiting", process)
        yield run, port, process
    finally:
        process.kill()
        finish(process)


def test_a_peer_that_waits_says_so_until_it_is_gone(
    two: Federation, peertune: Call, waiting: tuple[Path, int, Command]
) -> None:
    run, port, process = waiting
    code, out, err = peertune("peer", "status", run)
    assert (code, err) == (0, "")
    assert "peer         peer-0, client 0 of trial, roster 1\n" in out
    assert "round        0 of 2, waiting, step 1 of 1; trains A, B, head, sends A, B, head\n" in out
    assert "1       peer-1" in out
    assert "never" in out
    as_json = json.loads(peertune("peer", "status", "--json")[1])
    assert (as_json["run"], as_json["running"], as_json["doing"]) == ("runs/0", True, "waiting")
    assert [known["name"] for known in as_json["neighbours"]] == ["peer-1"]

    with urllib.request.urlopen(f"http://127.0.0.1:{port}/metrics", timeout=30) as answer:
        metrics = answer.read().decode()
    assert 'peertune_doing{doing="waiting"} 1.0\n' in metrics
    assert 'peertune_edges_total{outcome="counted",peer="peer-1"} 0.0\n' in metrics

    code, out, _ = peertune("peer", "doctor", "--recipe", "digits-demo", *who(two, 1), "--json", *SMALL)
    found = checks(out)
    assert (code, set(found.values()) - {"warning"}) == (0, {"ok"}), out  # this machine may be short of memory
    assert {("peer-0", what) for what in ("outwards", "clock", "run", "inwards")} <= found.keys()
    assert {(None, what) for what in ("key", "certificate", "expiry", "recipe", "disk", "port")} <= found.keys()
    others = [*SMALL, "rounds=3", "seed=7"]
    code, out, _ = peertune("peer", "doctor", "--recipe", "digits-demo", *who(two, 1), *others)
    assert code == 1
    (line,) = [line for line in out.splitlines() if line.startswith("failed")]
    assert "peer-0: run" in line
    assert "rounds: 3 here, 2 there; seed: 7 here, 0 there" in line
    resumed = checks(peertune("peer", "doctor", "--resume", run, *who(two, 0), "--json")[1])
    assert (resumed[None, "port"], resumed[None, "recipe"], resumed["peer-1", "outwards"]) == ("ok", "ok", "warning")
    assert "problem" in peertune("peer", "status", run)[1]
    assert standing(run)["doing"] == "waiting", "nothing that was asked has moved it"

    process.kill()
    process.wait(60)
    code, out, _ = peertune("peer", "status", run)
    assert code == 0
    assert "NOT RUNNING: it ended without a word" in out
    assert json.loads(peertune("peer", "status", run, "--json")[1])["running"] is False


def test_peers_that_finish_say_what_came_of_each_edge(two: Federation, peertune: Call) -> None:
    processes = [start(two.folder, *starting(two, client)) for client in range(2)]
    finish_well(processes)
    for client in range(2):
        run = two.folder / "runs" / str(client)
        found = json.loads(peertune("peer", "status", run, "--json")[1])
        assert (found["doing"], found["running"], found["round"]) == ("finished", False, 1)
        (known,) = found["neighbours"]
        assert (known["client"], known["up"], known["down"]) == (1 - client, 2, 0)
        assert known["bytes_sent"] == known["bytes_received"] > 0
        assert "round        2 of 2, finished " in peertune("peer", "status", run)[1]


def test_doctor_without_an_identity_goes_as_far_as_it_can(peertune: Call) -> None:
    code, out, err = peertune("peer", "doctor")
    assert (code, err) == (1, "")
    lines = out.splitlines()
    assert lines[0].split(None, 2)[:2] == ["failed", "key"]
    assert any(line.startswith("ok") and " disk " in line for line in lines)
    assert "checks: 3 failed, " in lines[-1]


def test_a_recipe_that_can_t_be_built_is_a_failed_check(two: Federation, peertune: Call) -> None:
    code, out, err = peertune("peer", "doctor", "--recipe", "digits-demo", *who(two, 0), "--json", "clients=1")
    assert (code, err) == (1, "")
    (built,) = [check for check in json.loads(out)["checks"] if check["what"] == "recipe"]
    assert built["level"] == "failed"
    assert built["finding"] == "clients: 1, but the roster has 2 members; give as many or more"


MISTAKES = {
    "no runs": (["peer", "status"], "peer status: no peer has run in runs/ here; give its RUN_DIR"),
    "no run": (["peer", "status", "x"], "x/status.json: can't be read (No such file or directory)"),
    "both": (["peer", "doctor", "--recipe", "r", "--resume", "x"], "peer doctor: give one of --recipe and --resume"),
    "data alone": (["peer", "doctor", "--data", "x"], "peer doctor: overrides and --data go with --recipe or --resume"),
    "overrides alone": (["peer", "doctor", "seed=1"], "peer doctor: overrides and --data go with --recipe"),
    "no run to resume": (["peer", "doctor", "--resume", "x"], "x: is no run, it holds no resolved.yaml"),
}


@pytest.mark.parametrize("mistake", MISTAKES)
def test_a_mistake_is_one_line_and_exit_2(peertune: Call, mistake: str) -> None:
    words, said = MISTAKES[mistake]
    code, out, err = peertune(*words)
    assert (code, out, err.count("\n")) == (2, "", 1)
    assert err.startswith(f"peertune: {said}")
