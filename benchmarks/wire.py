"""What swapping costs: bytes beside the factors', goodput beside a bare stream's, and a round of eight peers."""

import multiprocessing
import socket
import tempfile
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import ExitStack
from functools import partial
from pathlib import Path
from typing import Any

import torch

from benchmarks.measure import Figure, figure, ratios, seconds
from peertune.files import write_file
from peertune.identity import authority as ca
from peertune.identity.certificates import bundle, read_request
from peertune.identity.incarnation import Incarnation
from peertune.identity.keys import request
from peertune.identity.membership import Membership
from peertune.memory import keep_free
from peertune.types import Tensors
from peertune.wire import tls
from peertune.wire.codec import CHUNK_BYTES, encode
from peertune.wire.node import OPTIONS
from peertune.wire.rpc import grpc
from peertune.wire.swap import Swapper

PEERS = 8
LARGE = 64 * 2**20  # bytes of a payload that takes long enough to be timed: LLaMA-2-7B, r = 8 on query and value
SITES, WIDTH, RANK = 12, 384, 8  # MiniLM-L6, query and value
SLOW_BITS = 100e6  # bits per second of a slow line


def payload(sites: int, width: int, rank: int) -> Tensors:
    """Return one client's factors."""
    made = {}
    for site in range(sites):
        made[f"encoder.layer.{site // 2}.attention.self.{site % 2}.A"] = torch.randn(1, rank, width)
        made[f"encoder.layer.{site // 2}.attention.self.{site % 2}.B"] = torch.randn(1, width, rank)
    return made


def run(repeats: int = 9) -> list[Figure]:
    """Measure on loopback, a process for each peer; the two streams of a ratio alternate."""
    small, large = payload(SITES, WIDTH, RANK), {"A": torch.randn(1, LARGE // 4)}
    factors = sum(x.numel() * x.element_size() for x in small.values())
    with tempfile.TemporaryDirectory() as folder, ExitStack() as stack:
        addresses = federation(Path(folder))
        others = [stack.enter_context(_Other(Path(folder), client, addresses)) for client in range(1, PEERS)]
        own = _Peer(Path(folder), 0, addresses)
        stack.callback(own.stop)
        swapped, bare = [], []
        for turn in range(repeats + 1):
            others[0].ask("swap", turn, "large", [0])
            swapped.append(seconds(partial(own.swap, turn, large, [1])))
            others[0].answer()
            others[0].ask("bare")
            bare.append(seconds(own.bare))
            others[0].answer()
        rounds = []
        everyone = list(range(PEERS))
        for turn in range(repeats + 1, 3 * repeats + 1):
            for client, other in enumerate(others, start=1):
                other.ask("swap", turn, "small", [k for k in everyone if k != client])
            rounds.append(seconds(partial(own.swap, turn, small, everyone[1:])))
            for other in others:
                other.answer()
    swapped, bare = swapped[1:], bare[1:]  # the first connects
    sent = (PEERS - 1) * len(encode(small))
    return [
        figure("bytes on the wire, of the factors'", [100 * len(encode(small)) / factors], "%", target="≤ 102"),
        figure("goodput of a swap, each way", [LARGE / 1e6 / x for x in swapped], "MB/s", note=f"{LARGE >> 20} MiB"),
        figure("a bare gRPC stream, each way", [LARGE / 1e6 / x for x in bare], "MB/s", note="the same TLS"),
        figure("goodput of a swap, of a bare stream's", [100 * x for x in ratios(bare, swapped)], "%", target="≥ 90"),
        figure(
            f"a round of {PEERS} peers that all meet, MiniLM", rounds[2:], "s", note=f"{sent / 1e6:.1f} MB sent by each"
        ),
        figure("that round at 100 Mbit/s, by its bytes alone", [8 * sent / SLOW_BITS], "s"),
    ]


def federation(folder: Path) -> list[str]:
    """Make a federation in the folder; return the peers' addresses."""
    ca.create_authority(folder / "ca", "bench")
    with ExitStack() as held:
        sockets = [held.enter_context(socket.socket()) for _ in range(PEERS + 1)]
        for one in sockets:
            one.bind(("127.0.0.1", 0))
        addresses = [f"127.0.0.1:{one.getsockname()[1]}" for one in sockets]
    for client in range(PEERS):
        asked = request(folder / f"{client}", f"peer-{client}", addresses[client]).file
        with ca.opened(folder / "ca") as before:
            after, certificate = ca.approve(before, read_request(asked.read_bytes(), asked), 30)
            ca.keep(folder / "ca", after)
        write_file(folder / f"{client}" / f"peer-{client}.certificate.pem", bundle(certificate, after.certificate))
    with ca.opened(folder / "ca") as before:
        after, data = ca.issue_roster(before)
        ca.keep(folder / "ca", after)
    write_file(folder / "roster.yaml", data)
    return addresses


class _Peer:
    """A peer, and beside it a bare stream of bytes: peer 1 answers, peer 0 calls."""

    def __init__(self, folder: Path, client: int, addresses: list[str]) -> None:
        torch.set_num_threads(1)
        keep_free()  # as a peer does
        self.membership = Membership(folder / f"{client}", folder / "roster.yaml")
        self.swapper = Swapper(self.membership, {}, patience_s=60.0, incarnation=Incarnation(1, client + 1))
        self.swapper.start(addresses[client])
        self.address, self.client = addresses[-1], client
        self.channel: Any = None
        if client == 1:
            self.server = grpc.server(ThreadPoolExecutor(2), options=OPTIONS)
            handler = grpc.stream_stream_rpc_method_handler(_bare)
            self.server.add_generic_rpc_handlers((grpc.method_handlers_generic_handler("bare", {"Bare": handler}),))
            self.server.add_secure_port(self.address, tls.server_credentials(self.membership.current))
            self.server.start()

    def swap(self, round: int, own: Tensors, others: list[int]) -> None:
        """Swap once, and see that everybody was heard."""
        self.swapper.enter(round)
        heard = self.swapper.swap(round, own, others)
        assert heard.keys() == set(others)

    def bare(self) -> None:
        """Send as many bytes as a large payload has, and take as many."""
        if self.channel is None:
            identity, roster = self.membership.current()
            member = roster.by_client(1)
            assert member is not None
            at = type(member)(member.client, member.name, self.address, member.certificates)
            self.channel = tls.secure_channel(identity, at, OPTIONS)
        taken = sum(map(len, self.channel.stream_stream("/bare/Bare")(_parts())))
        assert taken == LARGE

    def stop(self) -> None:
        """Leave."""
        self.swapper.stop_waiting()
        self.swapper.stop()


def _parts() -> Iterator[bytes]:
    part = bytes(CHUNK_BYTES)
    for _ in range(LARGE // CHUNK_BYTES):
        yield part


def _bare(requests: Iterator[bytes], _: Any) -> Iterator[bytes]:
    for part, _came in zip(_parts(), requests, strict=True):
        yield part


class _Other:
    """A peer in a process of its own, which does as it is asked."""

    def __init__(self, folder: Path, client: int, addresses: list[str]) -> None:
        spawn = multiprocessing.get_context("spawn")
        self.pipe, theirs = spawn.Pipe()
        self.process = spawn.Process(target=_serve, args=(theirs, folder, client, addresses), daemon=True)
        self.process.start()

    def __enter__(self) -> "_Other":
        self.answer()
        return self

    def __exit__(self, *_: object) -> None:
        self.ask("stop")
        self.process.join(10)

    def ask(self, *words: Any) -> None:
        """Say what to do."""
        self.pipe.send(words)

    def answer(self) -> None:
        """Wait until it is done."""
        assert self.pipe.recv() == "done"


def _serve(pipe: Any, folder: Path, client: int, addresses: list[str]) -> None:
    peer = _Peer(folder, client, addresses)
    own = {"small": payload(SITES, WIDTH, RANK), "large": {"A": torch.randn(1, LARGE // 4)} if client == 1 else {}}
    pipe.send("done")
    while True:
        match pipe.recv():
            case ("swap", round, size, others):
                peer.swap(round, own[size], others)
            case ("stop",):
                break
        pipe.send("done")
    peer.stop()
