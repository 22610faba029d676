import json
import logging
import socket
import threading
import time
import urllib.request
from collections.abc import Iterator
from contextlib import ExitStack, closing
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import torch
from conftest import Call
from federation import Federation, found
from processes import wait_until
from prometheus_client.parser import text_string_to_metric_families

from peertune.errors import RunError
from peertune.files import locked
from peertune.identity.membership import Membership
from peertune.method import Phase
from peertune.wire.node import METHOD, PROTOCOL
from peertune.wire.peer_pb2 import Chunk, Hello
from peertune.wire.prometheus import served
from peertune.wire.status import kept, known_before, peer_status, read
from peertune.wire.swap import Swapper
from peertune.wire.tls import secure_channel

AGREED = {"rounds": "5"}
PHASE = Phase(frozenset({"B"}), frozenset({"A", "B"}))


@pytest.fixture(scope="module")
def three(tmp_path_factory: pytest.TempPathFactory) -> Federation:
    return found(tmp_path_factory.mktemp("three"), 3)


@pytest.fixture
def swappers(three: Federation) -> Iterator[list[Swapper]]:
    """Peers 0 and 1, at work; nobody is peer 2."""
    with ExitStack() as stack:
        made = []
        for client in range(2):
            swapper = Swapper(Membership(three.peer(client), three.roster), AGREED, patience_s=60)
            stack.callback(swapper.stop)
            swapper.start(three.address(client))
            made.append(swapper)
        yield made


def swapped(swappers: list[Swapper], round: int) -> None:
    """Have the two swap a tensor of four numbers."""
    payload = {"w.A": torch.ones(1, 2, 2)}
    ends = [
        threading.Thread(target=swapper.swap, args=(round, payload, [1 - swapper.me]), daemon=True)
        for swapper in swappers
    ]
    for end in ends:
        end.start()
    for end in ends:
        end.join(60)


def of(swapper: Swapper, neighbours: tuple[int, ...] = (1, 2)) -> dict[str, Any]:
    return peer_status(swapper, rounds=5, local_steps=4, neighbours=neighbours, failed_writes=3)


def test_it_tells_who_the_peer_is_where_it_is_and_what_it_knows_of_the_others(swappers: list[Swapper]) -> None:
    before = time.time()
    swapper = swappers[0]
    assert of(swapper)["doing"] == "starting"
    swapper.enter(3, PHASE)
    swappers[1].enter(3)
    swapper.stepped(1)
    now = of(swapper)
    assert (now["federation"], now["name"], now["client"], now["roster"]) == ("trial", "peer-0", 0, 1)
    assert now["valid_until"] > before + 29 * 86400
    assert (now["doing"], now["round"], now["rounds"], now["step"], now["local_steps"]) == ("training", 3, 5, 1, 4)
    assert (now["train"], now["send"]) == (["B"], ["A", "B"])
    swapped(swappers, 3)
    now = of(swapper)
    assert now["doing"] == "mixing"
    near, silent = now["neighbours"]
    assert (near["client"], near["name"], near["round"], near["reached"]) == (1, "peer-1", 3, True)
    assert (near["up"], near["down"], near["problem"]) == (1, 0, "")
    assert near["bytes_sent"] == near["bytes_received"] > 16
    assert before <= near["seen_at"] <= now["written_at"]
    assert abs(near["clock_offset_s"]) < 5
    assert (silent["client"], silent["name"], silent["seen_at"], silent["reached"]) == (2, "peer-2", None, False)
    assert json.loads(json.dumps(now, allow_nan=False)) == now


def test_it_tells_whether_the_peer_swaps_or_waits(swappers: list[Swapper]) -> None:
    swapper = swappers[0]
    swapper.enter(0)
    end = threading.Thread(target=swapper.swap, args=(0, {"w.A": torch.ones(1, 2, 2)}, [2]), daemon=True)
    end.start()
    wait_until(lambda: of(swapper)["doing"] == "waiting")
    wait_until(lambda: of(swapper)["neighbours"][1]["problem"] != "")
    swapper.stop_waiting()
    end.join(30)
    assert of(swapper)["doing"] == "mixing"


@pytest.mark.parametrize("clock", [float("nan"), float("inf"), 1e300, -1.0, 0.0])
def test_a_clock_that_is_none_is_not_repeated(three: Federation, swappers: list[Swapper], clock: float) -> None:
    identity, roster = swappers[1].membership.current()
    swappers[0].enter(0)
    hello = Hello(protocol=PROTOCOL, federation="trial", agreed=AGREED, purpose=Hello.PING, clock=clock)
    with secure_channel(identity, roster.members[0]) as channel:
        call = channel.stream_stream(
            METHOD, request_serializer=Chunk.SerializeToString, response_deserializer=Chunk.FromString
        )
        assert next(call(iter([Chunk(hello=hello)]))).WhichOneof("part") == "hello"
    (known, _) = of(swappers[0])["neighbours"]
    assert (known["client"], known["clock_offset_s"]) == (1, None)


# ---- status.json


def test_the_file_is_written_anew_while_the_peer_runs_and_says_how_it_ended(
    swappers: list[Swapper], tmp_path: Path
) -> None:
    with locked(tmp_path, "run"), kept(tmp_path, partial(of, swappers[0])):
        first = read(tmp_path)
        assert (first["running"], first["doing"]) == (True, "starting")
        swappers[0].enter(2)
        wait_until(lambda: read(tmp_path)["round"] == 2)
        assert read(tmp_path)["age_s"] < 60
    last = read(tmp_path)
    assert (last["running"], last["doing"], last["round"]) == (False, "finished", 2)
    with pytest.raises(KeyboardInterrupt), kept(tmp_path, partial(of, swappers[0])):
        raise KeyboardInterrupt
    assert read(tmp_path)["doing"] == "stopped"
    assert {path.name for path in tmp_path.iterdir()} == {".lock", "status.json"}


def test_a_peer_whose_process_is_gone_does_not_run(swappers: list[Swapper], tmp_path: Path) -> None:
    (tmp_path / "status.json").write_text(json.dumps(of(swappers[0])))  # as one leaves it that is killed
    assert not read(tmp_path)["running"]
    assert not (tmp_path / ".lock").exists(), "looking changes nothing"
    with locked(tmp_path, "run"):
        assert read(tmp_path)["running"]
        for ended in ("finished", "stopped"):  # though the process is at work yet
            (tmp_path / "status.json").write_text(json.dumps(of(swappers[0]) | {"doing": ended}))
            assert not read(tmp_path)["running"]
    assert not read(tmp_path)["running"]


def test_what_was_said_by_a_clock_that_was_set_back_since_was_said_just_now(tmp_path: Path) -> None:
    (tmp_path / "status.json").write_text(json.dumps({"doing": "training", "written_at": time.time() + 3600}))
    assert read(tmp_path)["age_s"] == 0


def test_a_disk_that_fails_later_does_not_end_the_run(
    swappers: list[Swapper], tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    run = tmp_path / "run"
    run.mkdir()
    with caplog.at_level(logging.WARNING), kept(run, partial(of, swappers[0])):
        run.rename(tmp_path / "elsewhere")
        wait_until(lambda: len(caplog.messages) > 0)
    assert caplog.messages[0].startswith(f"{run}/status.json: can't be written")


def test_what_it_knew_of_the_others_is_known_after_a_restart(
    three: Federation, swappers: list[Swapper], tmp_path: Path
) -> None:
    swapped(swappers, 0)
    start = {"incarnation": 1000, "nonce": 7, "keys": ["1f0a"]}
    vars(swappers[0].neighbours[1]).update(start)
    with kept(tmp_path, partial(of, swappers[0])):
        pass
    known = known_before(tmp_path)
    assert known.keys() == {1}, "nobody has heard peer 2"
    assert start.items() <= vars(known[1]).items()
    again = Swapper(Membership(three.peer(0), three.roster), AGREED, patience_s=60, known=known)
    assert again.last_heard() == swappers[0].last_heard()
    assert not again.in_touch([1]), "it must be heard again to count as reached"


@pytest.mark.parametrize(
    "text", ["", "{", "[]", '{"neighbours": [{}]}', '{"neighbours": [{"client": 1, "seen_at": Infinity}]}']
)
def test_of_a_file_that_tells_nothing_of_the_others_nothing_is_known(tmp_path: Path, text: str) -> None:
    assert known_before(tmp_path) == {}
    (tmp_path / "status.json").write_text(text)
    assert known_before(tmp_path) == {}


@pytest.mark.parametrize("text", ["", "{", "[]", "{}", '{"doing": "training", "written_at": null}'])
def test_a_damaged_file_is_one_line(tmp_path: Path, text: str) -> None:
    (tmp_path / "status.json").write_text(text)
    with pytest.raises(RunError, match=r"status.json: is damaged; a running peer writes it anew"):
        read(tmp_path)


def test_a_run_of_no_peer_is_one_line(tmp_path: Path) -> None:
    with pytest.raises(RunError, match=r"can't be read \(No such file or directory\); give the run directory of a pe"):
        read(tmp_path)


def test_writes_that_failed_are_shown(swappers: list[Swapper], tmp_path: Path, peertune: Call) -> None:
    for failed, shown in ((0, False), (3, True)):
        (tmp_path / "status.json").write_text(json.dumps(of(swappers[0]) | {"failed_writes": failed}))
        assert ("disk         3 writes failed since the start; " in peertune("peer", "status", tmp_path)[1]) == shown


# ---- metrics


LABELS = {"peertune_peer_info": {"federation", "name", "client"}, "peertune_doing": {"doing"}}
LABELS |= {"peertune_edges_total": {"peer", "outcome"}}


def samples(port: int) -> dict[tuple[str, tuple[str, ...]], float]:
    """Get the metrics: name and values of the labels → value."""
    with urllib.request.urlopen(f"http://127.0.0.1:{port}/metrics", timeout=30) as answer:
        families = text_string_to_metric_families(answer.read().decode())
        found = [sample for family in families for sample in family.samples]
    assert all(not s.labels or s.labels.keys() == LABELS.get(s.name, {"peer"}) for s in found)
    return {(s.name, tuple(s.labels.values())): s.value for s in found}


def test_prometheus_reads_how_the_peer_stands(swappers: list[Swapper]) -> None:
    before = time.time()
    for swapper in swappers:
        swapper.enter(3, PHASE)
    swapped(swappers, 3)
    with served(0, partial(of, swappers[0])) as port:
        got = samples(port)
        assert got["peertune_peer_info", ("0", "trial", "peer-0")] == 1
        assert got["peertune_doing", ("mixing",)] == 1
        assert sum(value for (name, _), value in got.items() if name == "peertune_doing") == 1
        own = [got[f"peertune_{name}", ()] for name in ("round", "rounds", "step", "local_steps", "roster_serial")]
        assert own == [3, 5, 0, 4, 1]
        assert got["peertune_certificate_expiry_timestamp_seconds", ()] > before
        assert got["peertune_failed_writes_total", ()] == 3
        assert got["peertune_edges_total", ("counted", "peer-1")] == 1
        assert got["peertune_edges_total", ("failed", "peer-1")] == 0
        assert got["peertune_clones_total", ("peer-1",)] == 0
        assert ("peertune_peer_taken", ("peer-1",)) not in got, "no rule has weighed it"
        swappers[0].neighbours[1].clones = 3
        swappers[0].note_mixed([1, 1], [(1, 0.5, 0.2)])
        now = samples(port)
        assert now["peertune_clones_total", ("peer-1",)] == 3
        assert now["peertune_unmixed_total", ("peer-1",)] == 2
        assert now["peertune_peer_taken", ("peer-1",)] == 0.4
        assert got["peertune_bytes_sent_total", ("peer-1",)] == got["peertune_bytes_received_total", ("peer-1",)] > 16
        assert got["peertune_peer_reached", ("peer-1",)] == 1
        assert got["peertune_peer_round", ("peer-1",)] == 3
        assert got["peertune_peer_last_seen_timestamp_seconds", ("peer-1",)] >= before
        assert abs(got["peertune_peer_clock_offset_seconds", ("peer-1",)]) < 5
        assert ("peertune_peer_last_seen_timestamp_seconds", ("peer-2",)) not in got, "never heard is not 1970"
        assert got["peertune_edges_total", ("counted", "peer-2")] == 0
        swappers[0].enter(4)
        assert samples(port)["peertune_round", ()] == 4


def test_metrics_are_served_on_this_machine_only_and_no_longer_than_asked(swappers: list[Swapper]) -> None:
    with served(0, partial(of, swappers[0])) as port:
        with pytest.raises(ConnectionRefusedError):
            socket.create_connection(("127.0.0.2", port), timeout=10)
        taken = pytest.raises(RunError, match=rf"127.0.0.1:{port}: no metrics can be served there")
        with taken, served(port, partial(of, swappers[0])):
            pass
    with closing(socket.socket()) as probe, pytest.raises(ConnectionRefusedError):
        probe.connect(("127.0.0.1", port))
