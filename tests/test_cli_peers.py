"""`peer status`, `peer doctor` and metrics, with peers as real processes."""

import json
import os
import resource
import socket
import time
import urllib.request
from collections.abc import Callable, Iterator
from contextlib import ExitStack
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from federation import Federation, found, free_ports
from processes import Command, finish, finish_well, start, wait_until
from seeing import COLOURS, save_images, save_vit

from peertune.api.peering import Peer, joined_peers
from peertune.assembly.registry import build_graph, choice_defaults, graph_settings
from peertune.errors import Exit, GraphError
from peertune.identity import authority as ca
from peertune.identity.membership import Membership
from peertune.identity.neighbour_roster import KnownGraph
from peertune.identity.roster import sign_roster
from peertune.methods.schedules import switching_interval
from peertune.recipe import load_recipe
from peertune.runs import checkpoints, records
from peertune.topology import GraphSummary, Neighbourhood
from peertune.wire.node import Neighbour
from peertune.wire.status import kept, peer_status
from peertune.wire.swap import Swapper

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


def test_a_peer_that_the_recipe_makes_hostile_says_so_in_a_line(
    two: Federation, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    asked = [*SMALL, "attacks=[{name: noise, clients: [1], rounds: [1, 1]}]"]
    for client in (0, 1):
        peer = Peer(two.peer(client), two.roster)
        with joined_peers("digits-demo", asked, tmp_path / f"{client}", peer):
            assert json.loads((tmp_path / f"{client}" / "facts.json").read_text())["hostile"] == [1]
    warned = [record.getMessage() for record in caplog.records if "hostile to" in record.getMessage()]
    assert warned == ["attacks: the recipe makes peer-1, client 1, hostile to the others; it is for tests"]


def test_a_peer_that_waits_says_so_until_it_is_gone(
    two: Federation, peertune: Call, waiting: tuple[Path, int, Command]
) -> None:
    run, port, process = waiting
    code, out, err = peertune("peer", "status", run)
    assert (code, err) == (0, "")
    assert "peer         peer-0, client 0 of trial, roster 1\n" in out
    assert "rounds       0 of 2 behind it, waiting, step 1 of 1; trains A, B, head, sends A, B, head\n" in out
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
        assert "rounds       2 of 2 behind it, finished " in peertune("peer", "status", run)[1]


def test_a_stranger_s_connections_neither_end_a_peer_nor_keep_its_neighbour_out(two: Federation) -> None:
    process = start(two.folder, *starting(two, 0))
    resource.prlimit(process.pid, resource.RLIMIT_NOFILE, (200, 256))  # before it has come to its own code
    run = two.folder / "runs" / "0"
    with ExitStack() as stack:
        stack.callback(process.kill)
        wait_until(lambda: standing(run)["doing"] == "waiting", process)
        assert resource.prlimit(process.pid, resource.RLIMIT_NOFILE) == (256, 256), "raised as far as it goes"
        idle = [stack.enter_context(socket.create_connection(("127.0.0.1", two.ports[0]), 60)) for _ in range(400)]
        wait_until(lambda: sum(map(closed, idle)) >= 400 - 68, process)  # are turned away
        assert len(os.listdir(f"/proc/{process.pid}/fd")) < 200
        opened = time.time()
        wait_until(lambda: standing(run)["written_at"] > opened, process)
        other = start(two.folder, *starting(two, 1))
        finish_well([process, other])  # it gets in once those who do not shake hands have been cut off
        assert all(closed(connection) for connection in idle)
    assert [record["edges"] for record in records.read(run)] == [[[0, 1]]] * 2


def closed(connection: socket.socket) -> bool:
    """Whether the other end has hung up."""
    connection.settimeout(0.001)
    try:
        return connection.recv(1) == b""
    except TimeoutError:
        return False
    except ConnectionResetError:
        return True


def test_status_names_whose_key_another_process_has(two: Federation, peertune: Call, tmp_path: Path) -> None:
    swapper = Swapper(Membership(two.peer(0), two.roster), {}, patience_s=1.0)
    swapper.neighbours[1] = Neighbour(clones=1200)
    with kept(tmp_path, partial(peer_status, swapper, rounds=2, local_steps=1, neighbours=[1])):
        pass
    assert peertune("peer", "status", tmp_path)[1].endswith(
        "\npeer-1: another process spoke with its key, 1,200 times\n"
    )


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


# ---- by rosters of their own, among a million


@pytest.fixture(scope="module")
def mine(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A tiny ViT, images of two parties, and a recipe for them."""
    folder = tmp_path_factory.mktemp("mine")
    save_vit(folder / "vit")
    for client in range(2):
        save_images(folder / f"data-{client}", dict.fromkeys(COLOURS, 4))
    (folder / "recipe.yaml").write_text(
        f"model: {{name: {folder}/vit, dtype: float32}}\n"
        "lora: {r: 2, target_modules: [q_proj, v_proj]}\n"
        "head: trained\n"
        f"task: {{name: images, path: none, classes: {sorted(COLOURS)}}}\n"
        "algorithm: {name: tad_lora, switch_every: 2}\n"
        "training: {learning_rate: 1.0e-2, local_steps: 1, per_device_train_batch_size: 2}\n"
        "rounds: 3\n"
        "network: {patience_s: 100}\n"
    )
    return folder


def meet(made: Federation, mine: Path, name: str, *settings: str) -> list[dict[str, Any]]:
    """Have both peers run the recipe by their own rosters, `peer-K/NAME.roster.yaml`; return their facts."""
    commands = [
        start(
            made.folder,
            *["peer", "start", "--recipe", str(mine / "recipe.yaml"), "--data", str(mine / f"data-{client}")],
            *["--roster", str(made.own(client, name)), "--dir", str(made.peer(client))],
            *["--out", f"runs/{name}-{client}", *settings],
        )
        for client in range(2)
    ]
    finish_well(commands)
    for client in range(2):
        run = made.folder / "runs" / f"{name}-{client}"
        assert [record["edges"] for record in records.read(run)] == [[[0, 1]]] * 3
    return [json.loads((made.folder / "runs" / f"{name}-{client}" / "facts.json").read_text()) for client in range(2)]


def test_a_peer_does_among_a_million_what_it_does_among_ten(two: Federation, mine: Path, peertune: Call) -> None:
    adapters = []
    for name, clients in (("ten", 10), ("million", 1_000_000)):
        settings = [f"clients={clients}", "graph={name: ring}"]
        words = ["roster", "--dir", two.parties.ca, "--recipe", mine / "recipe.yaml", *settings, "--out", name]
        assert peertune(*words)[0] == 0
        for client in range(2):
            Path(name, f"peer-{client}.roster.yaml").rename(two.own(client, name))
        facts = meet(two, mine, name, *settings)
        assert [fact["graph"]["clients"] for fact in facts] == [clients] * 2
        files = [f"runs/{name}-{client}/adapters/client-00{client}/adapter_model.safetensors" for client in range(2)]
        adapters.append([(two.folder / file).read_bytes() for file in files])
        assert max(two.own(client, name).stat().st_size for client in range(2)) < 4_000
    assert adapters[0] == adapters[1], "to the bit"


def test_a_peer_makes_no_graph_of_which_it_was_told_its_part(two: Federation, mine: Path, peertune: Call) -> None:
    settings = ["clients=1000000", "graph={name: erdos_renyi, probability: 2.0e-5}", "algorithm.switch_every=auto"]
    told = GraphSummary(1_000_000, 1e7, 20.0, 0.0, 0.84, 0.16, 0)
    recipe = load_recipe(str(mine / "recipe.yaml"), settings)
    with pytest.raises(GraphError, match="1,000,000 clients make 499,999,500,000 pairs to draw"):
        build_graph(recipe)
    with ca.opened(two.parties.ca) as authority:
        for client in range(2):
            known = Neighbourhood(client, "erdos_renyi", "0123", (np.array([[0, 1]]),), (), told)
            defaults = choice_defaults("graph", "erdos_renyi") if client else {}  # older rosters have them written out
            own = KnownGraph(defaults | graph_settings(recipe), known)
            raw = sign_roster(authority.key, authority.certificate, 7, authority.members, own=own)
            two.own(client, "told").write_bytes(raw)
    for facts in meet(two, mine, "told", *settings):
        described = {"name": "erdos_renyi", "activation": 1.0, "weights": "metropolis", "period": 1, "one_period": None}
        assert facts["graph"] == described | vars(told) | {"switching_interval": switching_interval(0.84)}
    who = ["--roster", two.own(0, "told"), "--dir", two.peer(0)]
    words = ["--recipe", mine / "recipe.yaml", *who, *settings, "clients=9"]
    for command, code in ((["start", "--out", "x"], 2), (["doctor"], 1)):
        ended, out, err = peertune("peer", *command, *words)
        assert ended == code
        assert "graph: the roster is for clients 1000000, the recipe says clients 9; use the recipe" in out + err


# ---- how they end


def test_a_peer_whom_nobody_meets_trains_to_the_end_and_says_that_it_was_alone(two: Federation, peertune: Call) -> None:
    code, out, err = peertune(*starting(two, 0), "network.patience_s=0.2")
    assert code == Exit.ALONE
    assert "made 2 of the 2 rounds in which this peer was up; the run has 2\n" in out
    assert err.endswith("alone: no edge ever counted; see peertune peer status and peertune peer doctor\n")
    assert standing(two.folder / "runs" / "0")["doing"] == "finished"


def test_a_revoked_peer_that_starts_with_an_old_roster_stops_and_says_who_refuses_it(
    two: Federation, peertune: Call
) -> None:
    run = two.folder / "runs" / "1"
    old = two.roster.read_bytes()
    two.parties.revoke("peer-1")
    two.issue()
    with ExitStack() as stack:
        other = Swapper(Membership(two.peer(0), two.roster), {}, patience_s=1.0)
        stack.callback(other.stop)
        other.start(two.address(0))
        other.enter(0)
        two.roster.write_bytes(old)
        longer = ["rounds=100000", "network.patience_s=1", "checkpoint.every=100000"]
        code, out, err = peertune(*starting(two, 1, "--json"), *longer)
        assert code == Exit.REFUSED
        why = "refused by peer-0: ends the handshake with this peer: revoked, or one roster is old"
        assert f"stops, as network.when_refused says: {why}\n" in err
        said = json.loads(out)
        assert 0 < said["rounds"] == said["rounds_up"] < 100_000
        assert said["exit"] == Exit.REFUSED
        state = checkpoints.load(run)
        assert state is not None
        assert state.round == said["rounds"], "nothing is lost"
        assert standing(run)["doing"] == "stopped"
        waits = [*longer, "network.when_alone=wait"]
        code, _, err = peertune(*starting(two, 1, "--out", "waits"), *waits)
        assert (code, why in err) == (Exit.REFUSED, True)
        goes_on = ["network.patience_s=1", "network.when_refused=train"]
        assert peertune(*starting(two, 1, "--out", "goes-on"), *goes_on)[0] == Exit.REFUSED
        assert standing(Path("goes-on"))["doing"] == "finished"


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
