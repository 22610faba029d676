"""Peers as real processes that are killed, stopped, filled up and cut off: the others go on, and they come back."""

import ctypes
import json
import os
import random
import re
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from functools import partial
from pathlib import Path
from typing import Any

import pytest
from federation import Federation, found
from processes import AT_MOST_S, forking, wait_until

from peertune.api.replaying import Replay
from peertune.errors import Exit, RunError
from peertune.runs import checkpoints, records

RECIPE = (
    "digits-demo",
    "evaluate={every: 1000, rows: 10}",
    "lora={r: 2, lora_alpha: 4, target_modules: [q_proj]}",
    "training={learning_rate: 5e-3, local_steps: 1, per_device_train_batch_size: 2}",
    "partition={name: iid}",
    "algorithm={name: adf_lora}",
    "graph={name: complete, activation: 0.5}",
)


class Peers:
    """The peers of a federation, each a process that the command line runs; forked, so that none imports anew."""

    def __init__(
        self, made: Federation, *overrides: str, networks: Sequence[str] = (), options: Sequence[str] = ()
    ) -> None:
        self.networks, self.options = networks, options
        self.made, self.overrides = made, [*RECIPE[1:], f"clients={len(made.ports)}", *overrides]
        self.running: dict[int, Any] = {}
        self._forks = forking()

    def run(self, client: int) -> Path:
        return self.made.folder / f"disk-{client}" / "run"

    def start(self, *clients: int) -> None:
        """Start these, or go on with what they left."""
        for client in clients:
            run = self.run(client)
            words = ["peer", "start", "--dir", str(self.made.peer(client)), "--roster", str(self.made.roster)]
            words += self.options
            if (run / "resolved.yaml").exists():
                words += ["--resume", str(run)]
            else:
                words += ["--recipe", RECIPE[0], "--out", str(run), *self.overrides]
            network = self.networks[client] if self.networks else None
            process = self._forks.Process(target=_command, args=(words, self.made.folder / f"log-{client}", network))
            process.start()
            self.running[client] = process

    def signal(self, client: int, number: int) -> None:
        os.kill(self.running[client].pid, number)

    def kill(self, *clients: int) -> None:
        for client in clients:
            self.signal(client, signal.SIGKILL)
        for client in clients:
            self.running[client].join(AT_MOST_S)
            assert self.running[client].exitcode == -signal.SIGKILL

    def end(self, *clients: int) -> None:
        """Wait until these have finished, as they should."""
        for client in clients:
            self.running[client].join(AT_MOST_S)
            assert self.running[client].exitcode == 0, self.log(client)

    def log(self, client: int) -> str:
        file = self.made.folder / f"log-{client}"
        return file.read_text() if file.exists() else ""

    def records(self, client: int) -> list[dict[str, Any]]:
        return records.read(self.run(client)) if (self.run(client) / "rounds.jsonl").exists() else []

    def rounds(self, client: int) -> int:
        """The round after the last one recorded."""
        file = self.run(client) / "rounds.jsonl"
        whole = file.read_bytes().rpartition(b"\n")[0] if file.exists() else b""
        return int(json.loads(whole.rpartition(b"\n")[2])["round"]) + 1 if whole else 0

    def kept(self, client: int) -> int:
        """The round of its newest checkpoint."""
        found = (self.run(client) / "checkpoints").glob("round-*")
        return max((int(path.name.removeprefix("round-")) for path in found), default=0)

    def back(self, client: int, round: int) -> bool:
        """Whether it has kept a checkpoint after this round, where it went on."""
        return self.kept(client) > round

    def stopped_within(self, client: int) -> bool:
        """Stop its process, and let it go on unless it has kept a checkpoint within its round."""
        self.signal(client, signal.SIGSTOP)
        within = any((self.run(client) / "checkpoints").glob("within-*"))
        if not within:
            self.signal(client, signal.SIGCONT)
        return within

    def beyond(self, round: int, *clients: int) -> bool:
        """Whether all of these have recorded a round after this one."""
        return all(self.rounds(client) > round for client in clients)

    def wait_until(self, happened: Callable[[], bool]) -> None:
        wait_until(happened, said=lambda: "\n".join(self.log(client) for client in self.running))


def _command(words: list[str], log: Path, network: str | None) -> None:
    """Be the command line, in this process, within a namespace of the network."""
    import torch

    if network is not None:
        with open(f"/run/netns/{network}") as space:
            assert ctypes.CDLL(None).setns(space.fileno(), 0x40000000) == 0  # CLONE_NEWNET
    torch.set_num_threads(1)
    signal.signal(signal.SIGINT, signal.default_int_handler)
    with log.open("a") as file:
        os.dup2(file.fileno(), 1)
        os.dup2(file.fileno(), 2)
    sys.argv = ["peertune", *words]
    from peertune.cli import main

    main()


@contextmanager
def peers(
    made: Federation, *overrides: str, networks: Sequence[str] = (), options: Sequence[str] = ()
) -> Iterator[Peers]:
    group = Peers(made, *overrides, networks=networks, options=options)
    try:
        yield group
    finally:
        for process in group.running.values():
            process.kill()
            process.join()


def assert_whole(group: Peers, client: int, rounds: int) -> None:
    """The run is finished, none of its lines is damaged, and its newest checkpoint is the end."""
    run = group.run(client)
    lines = (run / "rounds.jsonl").read_text().splitlines()
    numbers = [json.loads(line)["round"] for line in lines]
    assert numbers == sorted(set(numbers))
    assert numbers[-1] == rounds - 1
    state = checkpoints.load(run)
    assert state is not None
    assert state.round == rounds
    assert (run / "adapters" / f"client-{client:03d}" / "adapter_model.safetensors").exists()


def test_twenty_five_kills_at_random_moments_stop_nobody_and_damage_nothing(tmp_path: Path) -> None:
    rounds, kills = 80, 25
    draw = random.Random(0)
    with peers(found(tmp_path, 4), f"rounds={rounds}", "network.patience_s=20") as group:
        group.start(*range(4))
        group.wait_until(lambda: all(group.rounds(client) > 2 for client in range(4)))
        resumed = []
        for _ in range(kills):
            victim = draw.randrange(4)
            before = group.kept(victim)
            # A random moment of its round, of mixing, of writing: within two rounds, since a fast machine makes many.
            took = sum(group.records(victim)[-1]["seconds"].values())
            time.sleep(draw.uniform(0, min(0.3, 2 * took)))
            group.kill(victim)
            state = checkpoints.load(group.run(victim))
            assert state is not None
            assert state.round >= max(before, group.rounds(victim) - 1)  # at most the round in progress is lost
            resumed.append(state.round)
            group.start(victim)
            group.wait_until(partial(group.back, victim, state.round))
        assert len(resumed) == kills
        assert max(resumed) < rounds, "the last kill came after the end"
        group.end(*range(4))
        for client in range(4):
            assert_whole(group, client, rounds)
            assert "Traceback" not in group.log(client)
        met = [len(record["edges"]) for client in range(4) for record in group.records(client)]
        lost = [len(record["failed_edges"]) for client in range(4) for record in group.records(client)]
        assert sum(lost) < 0.2 * sum(met)  # a round that was cut off is made again with those that counted it


def test_peers_without_rounds_are_killed_and_stopped_and_all_that_they_did_can_be_made_again(tmp_path: Path) -> None:
    rounds, draw = 300, random.Random(0)  # more than anybody makes here
    slow = [f"{{slow: {client}, rounds: [0, {rounds}], delay_s: 0.3}}" for client in range(3)]
    overrides = (
        "time={mode: asynchronous, staleness_exponent: 1.0}",
        "model.dtype=float64",
        "algorithm.switch_every=2",
        "training.local_steps=3",
        "checkpoint.steps=1",
    )
    settings = (f"rounds={rounds}", f"faults=[{', '.join(slow)}]", *overrides)
    with peers(found(tmp_path, 3), *settings, options=["--keep-messages"]) as group:
        group.start(*range(3))
        group.wait_until(lambda: all(group.rounds(client) > 2 for client in range(3)))
        for number, victim in enumerate((0, 1, 0, 2)):
            time.sleep(draw.uniform(0, 0.4))
            if number == 0:
                group.wait_until(partial(group.stopped_within, victim))
            before = group.kept(victim)
            group.kill(victim)
            assert group.kept(victim) >= max(before, group.rounds(victim) - 1)
            group.start(victim)
            group.wait_until(partial(group.back, victim, before))
        assert re.search(r"goes on within round \d+, after [12] of its 3 local steps", group.log(0))
        group.wait_until(lambda: all(group.rounds(client) > 15 for client in range(3)))
        for client in range(3):
            group.signal(client, signal.SIGTERM)
        for client in range(3):
            group.running[client].join(AT_MOST_S)
            assert group.running[client].exitcode == Exit.STOPPED, group.log(client)
    runs = [group.run(client) for client in range(3)]
    found_again = Replay(runs).finish()
    assert [one.starts for one in found_again] == [3, 2, 2]
    assert max(one.apart for one in found_again) <= 1e-12
    (alone,) = Replay(runs[:1], own=True).finish()
    assert (alone.client, alone.starts) == (0, 3)
    assert alone.apart <= 1e-12
    assert sum(len(record["edges"]) for client in range(3) for record in group.records(client)) > 10
    with pytest.raises(RunError, match="whose run isn't here; give the run directories of all"):
        Replay(runs[:2]).finish()
    next((runs[2] / "messages").rglob("*.safetensors")).unlink()
    with pytest.raises(RunError, match="is missing or damaged; it was kept if peer start had --keep-messages"):
        Replay(runs[2:], own=True).finish()


def test_a_peer_that_is_stopped_for_longer_than_the_patience_rejoins_where_the_others_are(tmp_path: Path) -> None:
    rounds = 60
    with peers(found(tmp_path, 4), f"rounds={rounds}", "network.patience_s=2", "graph.activation=1.0") as group:
        group.start(*range(4))
        group.wait_until(lambda: group.rounds(3) > 2)
        group.signal(3, signal.SIGSTOP)
        stopped = group.rounds(3)

        def without() -> list[int]:
            return [r["round"] for r in group.records(0) if [0, 3] in r["failed_edges"]]

        group.wait_until(lambda: len(without()) >= 3)
        group.signal(3, signal.SIGCONT)
        group.wait_until(lambda: any(r["round"] > max(without()) and [0, 3] in r["edges"] for r in group.records(0)))
        group.end(*range(4))
        for client in range(4):
            assert_whole(group, client, rounds)
        numbers = [record["round"] for record in group.records(3)]
        missing = set(range(rounds)) - set(numbers)
        assert missing, stopped  # it went on from where the others were
        assert "behind: going on from round" in group.log(3)
        assert re.search(r"peer-3: round \d+ goes on without it", group.log(0))


def test_peers_that_are_all_restarted_at_once_go_on(tmp_path: Path) -> None:
    rounds = 35
    with peers(found(tmp_path, 4), f"rounds={rounds}", "network.patience_s=30") as group:
        group.start(*range(4))
        for at in (3, 9, 15):
            group.wait_until(partial(group.beyond, at, *range(4)))
            group.kill(*range(4))
            group.start(*range(4))
        group.end(*range(4))
        for client in range(4):
            assert_whole(group, client, rounds)


def test_sigterm_finishes_the_round_and_resuming_goes_on(tmp_path: Path) -> None:
    rounds = 40
    with peers(found(tmp_path, 2), f"rounds={rounds}", "graph.activation=1.0") as group:
        group.start(0, 1)
        group.wait_until(lambda: group.rounds(1) > 2)
        group.signal(1, signal.SIGTERM)
        group.running[1].join(AT_MOST_S)
        assert group.running[1].exitcode == 130
        state = checkpoints.load(group.run(1))
        assert state is not None
        assert state.round == group.rounds(1)
        group.start(1)
        group.end(0, 1)
        for client in (0, 1):
            assert_whole(group, client, rounds)


def test_late_peers_go_on_with_the_others(tmp_path: Path) -> None:
    rounds = 30
    with peers(found(tmp_path, 3), f"rounds={rounds}", "network.patience_s=2", "graph.activation=1.0") as group:
        group.start(0, 1)
        group.wait_until(lambda: group.rounds(0) > 6)
        group.start(2)
        group.end(*range(3))
        first = group.records(2)[0]
        assert first["round"] > 4
        assert any([0, 2] in record["edges"] for record in group.records(0))
        for client in range(3):
            assert_whole(group, client, rounds)


def test_a_peer_that_shall_not_be_alone_waits_for_company(tmp_path: Path) -> None:
    rounds = 5
    with peers(found(tmp_path, 2), f"rounds={rounds}", "network.when_alone=wait", "graph.activation=1.0") as group:
        group.start(0)
        group.wait_until(lambda: "nobody can be reached: waiting" in group.log(0))
        assert group.records(0) == []
        group.start(1)
        group.end(0, 1)
        for client in (0, 1):
            assert_whole(group, client, rounds)
            assert all(record["edges"] == [[0, 1]] for record in group.records(client))


def test_a_peer_goes_on_from_an_older_checkpoint_and_a_copy_of_its_disk_that_is_started_too_is_found_out(
    tmp_path: Path,
) -> None:
    settings = ("rounds=5000", "network.patience_s=3", "faults=[{slow: 0, rounds: [0, 5000], delay_s: 0.1}]")
    made = found(tmp_path, 2, silent=[1])
    with peers(made, *settings, "graph.activation=1.0", "checkpoint.keep=6") as group:

        def clones() -> int:
            known = json.loads((group.run(0) / "status.json").read_text())["neighbours"]
            return sum(int(one["clones"]) for one in known)

        def meets_again(after: int) -> bool:
            return any(record["edges"] and record["round"] > after for record in group.records(0))

        group.start(0, 1)
        group.wait_until(lambda: group.rounds(1) > 6)
        group.kill(1)
        shutil.copytree(made.peer(1), made.peer(2))
        shutil.copytree(group.run(1), group.run(2))
        for newest in sorted((group.run(1) / "checkpoints").glob("round-*"))[-3:]:
            shutil.rmtree(newest)
        group.start(1)
        group.wait_until(partial(meets_again, group.rounds(0)))
        assert clones() == 0
        assert "two processes" not in group.log(0)

        group.start(2)
        ended = group.running
        group.wait_until(lambda: any(ended[client].exitcode is not None for client in (1, 2)))
        (out,) = (client for client in (1, 2) if ended[client].exitcode is not None)
        assert ended[out].exitcode == Exit.REFUSED, group.log(out)
        assert "stops, as network.when_refused says: refused by peer-0: refuses (two processes with" in group.log(out)
        group.wait_until(partial(meets_again, group.rounds(0)))
        assert ended[3 - out].exitcode is None, "the other goes on"
        assert clones() >= 1
        assert group.log(0).count("peer-1: two processes with its key") == 1


def test_a_full_disk_costs_checkpoints_and_stops_nobody(tmp_path: Path) -> None:
    rounds = 60
    made = found(tmp_path, 3)
    small = made.folder / "disk-1"
    small.mkdir()
    mounted = subprocess.run(["mount", "-t", "tmpfs", "-o", "size=2m", "tmpfs", str(small)], capture_output=True)
    if mounted.returncode:
        pytest.skip("only root can mount a small file system")
    try:
        with peers(made, f"rounds={rounds}", "network.patience_s=3") as group:
            group.start(*range(3))
            group.wait_until(lambda: group.rounds(1) > 1)
            _fill(small / "filler")
            group.wait_until(lambda: "device); give one you can write to, with room; the run goes on" in group.log(1))
            kept = group.kept(1)
            group.wait_until(partial(group.beyond, group.rounds(0) + 2, 0))
            assert group.kept(1) == kept
            (small / "filler").unlink()
            group.wait_until(lambda: "can be written again: " in group.log(1))
            group.end(0, 1, 2)
            assert "Traceback" not in group.log(1)
            assert group.records(1)[-1]["failed_writes"] > 0
            assert [record["round"] for record in group.records(1)] == list(range(rounds))
            for client in range(3):
                assert_whole(group, client, rounds)
    finally:
        subprocess.run(["umount", "-l", str(small)], check=True)


def _fill(file: Path) -> None:
    """Write until there is no room."""
    with file.open("wb", buffering=0) as out:
        try:
            while True:
                out.write(b"x" * 4096)
        except OSError:
            return


@contextmanager
def two_networks(count: int) -> Iterator[list[str]]:
    """Make namespaces on two bridges, half of them on each, with a link `pt-link` between; yield their names."""
    names = [f"pt-{os.getpid()}-{number}" for number in range(count)]

    def ip(*words: str) -> None:
        subprocess.run(["ip", *words], check=True, capture_output=True)

    try:
        try:
            ip("link", "add", "pt-link", "type", "veth", "peer", "name", "pt-knil")
            for bridge, end in (("pt-0", "pt-link"), ("pt-1", "pt-knil")):
                ip("link", "add", bridge, "type", "bridge")
                ip("link", "set", bridge, "up")
                ip("link", "set", end, "master", bridge, "up")
            for number, name in enumerate(names):
                ip("netns", "add", name)
                ip("link", "add", f"pt-v{number}", "type", "veth", "peer", "name", "eth0", "netns", name)
                ip("link", "set", f"pt-v{number}", "master", f"pt-{2 * number // count}", "up")
                ip("-n", name, "addr", "add", f"10.77.0.{number + 1}/24", "dev", "eth0")
                ip("-n", name, "link", "set", "eth0", "up")
                ip("-n", name, "link", "set", "lo", "up")
        except (OSError, subprocess.CalledProcessError):
            pytest.skip("this machine lets nobody make networks")
        yield names
    finally:
        for words in [["netns", "del", name] for name in names] + [
            ["link", "del", x] for x in ("pt-link", "pt-0", "pt-1")
        ]:
            subprocess.run(["ip", *words], check=False, capture_output=True)


def test_a_network_that_falls_in_two_goes_on_in_both_halves_and_heals(tmp_path: Path) -> None:
    rounds = 120
    with two_networks(4) as networks:
        made = found(tmp_path, 4, hosts=[f"10.77.0.{number + 1}" for number in range(4)])
        # So long may a peer be kept from its work by others on this machine, and lose no edge in its half.
        settings = (f"rounds={rounds}", "network.patience_s=15", "graph.activation=1.0")
        with peers(made, *settings, networks=networks) as group:

            def across(key: str) -> list[int]:
                """The rounds in which peer 0's edges to the other half are all under this key."""
                return [r["round"] for r in group.records(0) if all([0, other] in r[key] for other in (2, 3))]

            group.start(*range(4))
            group.wait_until(lambda: len(across("edges")) > 3)
            subprocess.run(["ip", "link", "set", "pt-link", "down"], check=True)
            group.wait_until(lambda: len(across("failed_edges")) > 3)
            apart = across("failed_edges")
            assert all([0, 1] in r["edges"] for r in group.records(0) if r["round"] in apart)
            assert any([2, 3] in r["edges"] and [0, 2] in r["failed_edges"] for r in group.records(2))
            subprocess.run(["ip", "link", "set", "pt-link", "up"], check=True)
            group.wait_until(lambda: max(across("edges")) > max(apart))
            group.end(*range(4))
            for client in range(4):
                assert_whole(group, client, rounds)
                assert "Traceback" not in group.log(client)
