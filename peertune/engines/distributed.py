"""All clients in several processes on torch.distributed, each with a base of its own and its share of the stack.

It runs the simulator's rounds and comes to the same adapters; only the exchange differs. Processes are called by their
rank, as torchrun numbers them. Each knows everybody's part of a round's exchange without being told, since the mixing
matrix is a pure function of the round: what goes from one to another is one message, of exactly the adapters that the
other's clients hear.
"""

import json
import logging
import os
import socket
import sys
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import asdict, dataclass, replace
from datetime import timedelta
from functools import partial
from hashlib import sha256
from itertools import chain
from typing import Any
from uuid import uuid4

import numpy as np
import torch
import torch.distributed as dist
from numpy.typing import NDArray
from torch import Tensor
from torch.distributed import TCPStore  # type: ignore[attr-defined]  # public, and not re-exported
from torch.distributed.distributed_c10d import PrefixStore, Store

from peertune.errors import Exit, PeertuneError, RunError
from peertune.rounds.asynchronous import run_asynchronous
from peertune.rounds.job import Heard, Job, Refuse
from peertune.rounds.mixing import exchanged
from peertune.rounds.record import Evaluation, RoundRecord, put_together, summed
from peertune.rounds.round import run_rounds
from peertune.topology import clients_down, whose_adapters
from peertune.types import ALONE, Group, Stack, Tensors, only, payload_bytes, stacked, take

log = logging.getLogger(__name__)


def share(clients: int, group: Group) -> list[int]:
    """Return the clients of this process: neighbouring ones, as evenly as can be.

    Raises RunError for more processes than clients.
    """
    if group.size > clients:
        raise RunError(f"clients: {clients}, for {group.size} processes; start {clients} at most")
    mine: list[int] = np.array_split(range(clients), group.size)[group.rank].tolist()
    return mine


def run_cluster(job: Job) -> Iterator[RoundRecord]:
    """Run the rounds that are left of a job that is dealt among `job.group`, and yield a record after each.

    The record is of all clients, and the same in all processes but for `record.state`, which is of the job's own.
    """
    shares = job.group.gather(list(job.clients))
    if job.pushing is None:
        records = run_rounds(job, partial(_exchange, job, shares))
    else:
        whose = [rank for rank, share in enumerate(shares) for _ in share]
        records = run_asynchronous(job, partial(_carry, whose, job.group))
    for record in records:
        yield _merged(record, job.group)


_LISTS = ("clients", "loss", "grad_norm", "epsilon", "bytes_sent", "neighbours", "out_of_phase", "spans", "sites_sent")
_EDGES = ("edges", "failed_edges", "not_mixed")


def _merged(own: RoundRecord, group: Group) -> RoundRecord:
    """Put the parts of a record together, by rank, which is by client."""
    parts = group.gather(asdict(replace(own, state=None)))
    evaluation = own.evaluation and Evaluation.of(put_together([part["evaluation"] for part in parts]))
    merged: dict[str, Any] = {name: [value for part in parts for value in part[name]] for name in _LISTS}
    merged |= {name: sorted({(i, j) for part in parts for i, j in part[name]}) for name in _EDGES}
    merged["taken"] = summed(chain(*(part["taken"] for part in parts)))
    cross_terms = [part["neighbourhood_cross_term"] for part in parts]
    merged["neighbourhood_cross_term"] = None if cross_terms[0] is None else [x for part in cross_terms for x in part]
    stages = dict.fromkeys(stage for part in parts for stage in part["seconds"])
    seconds = {stage: max(part["seconds"].get(stage, 0.0) for part in parts) for stage in stages}
    time_s = None if own.time_s is None else max(part["time_s"] for part in parts)
    return replace(own, **merged, seconds=seconds, evaluation=evaluation, time_s=time_s)


def _exchange(
    job: Job, shares: Sequence[Sequence[int]], clients: Sequence[int], payload: Sequence[Stack], t: int, refuse: Refuse
) -> Heard:
    """Bring each process the adapters that its clients hear, and no others."""
    matrix = whose_adapters(job.graph, job.faults, t)
    down = clients_down(job.faults, t)
    up = [np.array([client for client in share if client not in down], dtype=np.int64) for share in shares]
    heard = [np.union1d(matrix[own].indices, own) for own in up]
    mine = heard[job.group.rank]
    return exchanged(job, clients, mine.tolist(), _swap_by_rank(job, payload, up, heard, t), t, refuse)


def _swap_by_rank(
    job: Job, payload: Sequence[Stack], up: list[NDArray[np.int64]], heard: list[NDArray[np.int64]], t: int
) -> list[Stack]:
    """Return what the clients `heard[rank]` sent, a stack for each of their ranks, of whom this process has `up[rank]`.

    A process that has no client of some rank knows the shapes of what such a one sends.
    """
    if not job.ranks:
        return stacked(_swap(only(payload), up, heard, job.group))
    ranks, me, found = np.array(job.ranks), job.group.rank, []
    own = {int(ranks[up[me][int(rows[0])]]): tensors for rows, tensors in payload if len(rows)}
    for r in job.cuts:
        held, wanted = ([some[ranks[some] == r] for some in each] for each in (up, heard))
        sent = own.get(r) or take(job.sent(job.algorithm.phase(t).send, job.ranks.index(r)), slice(0, 0))
        tensors = _swap(sent, held, wanted, job.group)
        if tensors and len(wanted[me]):
            found.append(Stack(torch.from_numpy(np.searchsorted(heard[me], wanted[me])), tensors))
    return found


def _carry(
    whose: Sequence[int], group: Group, payload: Tensors, to: Mapping[int, Sequence[int]]
) -> tuple[Sequence[int], Tensors]:
    """Bring each process what is sent to its clients, and nothing where all of it is sent within processes."""
    held: list[list[int]] = [[] for _ in range(group.size)]
    heard: list[set[int]] = [set() for _ in range(group.size)]
    for sender, receivers in to.items():
        held[whose[sender]].append(sender)
        for client in (sender, *receivers):
            heard[whose[client]].add(sender)
    mine = sorted(heard[group.rank])
    if [*map(len, held)] == [*map(len, heard)]:
        return mine, payload
    here, wanted = ([np.array(sorted(own), dtype=np.int64) for own in part] for part in (held, heard))
    return mine, _swap(payload, here, wanted, group)


def _swap(payload: Tensors, held: list[NDArray[np.int64]], heard: list[NDArray[np.int64]], group: Group) -> Tensors:
    """Return the rows `heard[rank]` of the payload, whose rows `held[rank]` this process has.

    All processes know all of both. Where each hears all rows of all others, these are gathered in one go; elsewhere
    each pair that has something to tell swaps one message.
    """
    me, size = group.rank, payload_bytes(payload)
    if not size:
        return {}
    device = next(iter(payload.values())).device
    parts = [np.intersect1d(heard[me], rows) for rows in held]  # what comes from each
    gathered = group.size > 1 and all(len(rows) == sum(map(len, held)) for rows in heard)
    if gathered:
        most = max(map(len, held)) * size
        own = torch.zeros(most, dtype=torch.uint8, device=device)
        _write(own, payload, np.arange(len(held[me])))
        came = [torch.empty_like(own) for _ in held]
        with _others():
            dist.all_gather(came, own)
    else:
        came = [torch.empty(len(rows) * size, dtype=torch.uint8, device=device) for rows in parts]
        messages = []
        for other in range(group.size):
            places = np.searchsorted(held[me], np.intersect1d(held[me], heard[other]))
            if other != me and len(places):
                message = torch.empty(len(places) * size, dtype=torch.uint8, device=device)
                _write(message, payload, places)
                messages.append(dist.P2POp(dist.isend, message, other))
            if other != me and len(parts[other]):
                messages.append(dist.P2POp(dist.irecv, came[other], other))
        with _others():
            for work in dist.batch_isend_irecv(messages) if messages else []:
                work.wait()
    tensors = {name: x.new_empty((len(heard[me]), *x.shape[1:])) for name, x in payload.items()}
    for rank, rows in enumerate(parts):
        places = np.searchsorted(heard[me], rows)
        if rank == me:
            for name, x in payload.items():
                tensors[name][places] = x
        elif len(rows):
            _read(came[rank], tensors, slice(places[0], places[-1] + 1))
    return tensors


def _write(message: Tensor, payload: Tensors, places: NDArray[np.int64]) -> None:
    """Write these rows into a message of bytes, one tensor after the other."""
    start = 0
    for x in payload.values():
        data = x[torch.from_numpy(places).to(x.device)].reshape(-1).view(torch.uint8)
        message[start : start + len(data)] = data
        start += len(data)


def _read(message: Tensor, tensors: Tensors, places: slice) -> None:
    """Read such a message into neighbouring rows."""
    start = 0
    for x in tensors.values():
        data = x[places].view(-1).view(torch.uint8)
        data.copy_(message[start : start + len(data)])
        start += len(data)


class _GoneError(RunError):
    """Another process is gone."""


@contextmanager
def _others() -> Iterator[None]:
    """Say in one line that another process is gone."""
    try:
        yield
    except RuntimeError as error:
        raise _GoneError("another process of the run is gone; see what it said, and go on with --resume") from error


@dataclass(frozen=True)
class Processes(Group):
    """The processes that torch.distributed joined."""

    rank: int
    size: int

    def add(self, x: Tensor) -> Tensor:
        """Return the sum of what the processes give, to the same bits in all of them."""
        total = x.clone()
        with _others():
            dist.all_reduce(total)
        return total

    def concat(self, x: Tensor) -> Tensor:
        """Return what the processes give, by rank one below the other: `[m, …]`, of which m may differ."""
        lengths = [torch.empty(1, dtype=torch.int64) for _ in range(self.size)]
        with _others():
            dist.all_gather(lengths, torch.tensor([len(x)]))
        own = x.new_zeros((int(max(lengths)), *x.shape[1:]))
        own[: len(x)] = x
        parts = [torch.empty_like(own) for _ in range(self.size)]
        with _others():
            dist.all_gather(parts, own)
        return torch.cat([part[:length] for part, length in zip(parts, map(int, lengths), strict=True)])

    def gather(self, value: Any) -> list[Any]:
        """Return what each process gives, by rank, as JSON brings it back."""
        own = torch.frombuffer(bytearray(json.dumps(value).encode() + b"\n"), dtype=torch.uint8)
        return [json.loads(line) for line in bytes(self.concat(own).numpy()).splitlines()]


def check_alike(group: Group, what: Mapping[str, Any]) -> None:
    """Raise RunError where the processes don't hold the same, name by name, of what JSON can hold."""
    told = group.gather({"what": dict(what), "host": socket.gethostname()})
    first = told[0]["what"]
    for rank, own in enumerate(told):
        for name, value in own["what"].items():
            if value != first.get(name):
                raise RunError(
                    f"rank {rank} ({own['host']}): {name} is {value}, and {first.get(name)} at rank 0; "
                    "give all processes the same"
                )


def check_devices(device: str, group: Group) -> None:
    """Open the way between the GPUs where processes have one each. Raises RunError where that can't be."""
    here, gpus = int(os.environ.get("LOCAL_WORLD_SIZE", "1")), torch.cuda.device_count()
    if device == "cpu" or not gpus:
        return
    if device.startswith("cuda:"):
        raise RunError(f"device: {device} for {group.size} processes; use device=cuda, each takes its own")
    if gpus < here:
        raise RunError(f"device: {gpus} GPUs for {here} processes; start {gpus} on this machine, or use device=cpu")
    group.add(torch.zeros(1, device="cuda"))  # NCCL wants all processes in its first call, which an exchange may not be


def _store(host: str, port: str, rank: int, size: int, deadline: float) -> Store:
    """Return the store where the processes meet, at this place: rank 0's, or torchrun's where that has one.

    Here and in `_meeting` Python waits, not the store, which would hear of no signal until all have come to it.
    """
    if not host or not port.isdecimal() or not 0 < int(port) < 2**16:
        raise ValueError("MASTER_ADDR and MASTER_PORT must be rank 0's host and a port there")
    store = partial(
        TCPStore,
        host,
        int(port),
        size,
        timeout=timedelta(seconds=min(300.0, max(1.0, deadline - time.monotonic()))),
        wait_for_workers=False,
        use_libuv=os.environ.get("USE_LIBUV", "0" if sys.platform == "win32" else "1") == "1",
    )
    if rank == 0 and os.environ.get("TORCHELASTIC_USE_AGENT_STORE") != "True":
        return store(is_master=True)
    while True:
        try:
            socket.create_connection((host, int(port)), timeout=1).close()
            return store(is_master=False)
        except OSError as error:
            _wait(deadline, 0.1, str(error))


def _meeting(store: Store, rank: int, size: int, deadline: float) -> str:
    """Return a name for this meeting of the processes, the same in all of them and in no meeting before.

    After a restart the store still holds what was written before, and nothing tells one start from another. So each
    process writes a name of its own, and what all of them have read alike is the meeting.
    """
    store.set(f"here/{rank}", uuid4().hex)
    agreed, names = "", [f"here/{other}" for other in range(size)]
    while True:
        if store.check(names):
            here = sha256(b" ".join(store.multi_get(names))).hexdigest()
            if store.add(f"read/{here}", int(here != agreed)) == size:
                return here
            agreed = here
        _wait(deadline, 0.05 + size / 200)  # the more they are, the more each asks one store for


def _wait(deadline: float, pause_s: float, why: str = "") -> None:
    """Wait a moment. Raises TimeoutError after the deadline."""
    if time.monotonic() > deadline:
        raise TimeoutError(why)
    time.sleep(pause_s)


@contextmanager
def joined(timeout_s: float = 600) -> Iterator[Group]:
    """Join the processes that torchrun started, as its environment says; without it there is one.

    What a process has to say against going on, rank 0 says for it; the others end without a word, with exit code 2.
    Raises RunError where the processes don't meet within the time, and where one of them is gone.
    """
    if "RANK" not in os.environ or int(os.environ.get("WORLD_SIZE", "1")) == 1:
        yield ALONE
        return
    rank, size = int(os.environ["RANK"]), int(os.environ["WORLD_SIZE"])
    host, port = (os.environ.get(name, "") for name in ("MASTER_ADDR", "MASTER_PORT"))
    try:
        log.info("waiting for %d processes at %s:%s", size, host, port)
        deadline = time.monotonic() + timeout_s
        store = _store(host, port, rank, size, deadline)
        store = PrefixStore(_meeting(store, rank, size, deadline), store)
        backend = "gloo"
        if torch.cuda.is_available():
            torch.cuda.set_device(int(os.environ.get("LOCAL_RANK", "0")) % torch.cuda.device_count())
            backend = "cpu:gloo,cuda:nccl"
        dist.init_process_group(backend, store=PrefixStore("group", store), rank=rank, world_size=size)
    except (RuntimeError, ValueError, TimeoutError) as error:
        late = f" within {timeout_s:g} s" if isinstance(error, TimeoutError) else ""
        said = f" ({str(error).splitlines()[0]})" if str(error) else ""
        message = (
            f"rank {rank}: {size} processes did not meet at {host}:{port}{late}{said}; see that all were started, and "
            f"that {socket.gethostname()} reaches that address"
        )
        if rank == 0:
            raise RunError(message) from error
        log.error(message)
        sys.exit(Exit.INPUT)
    try:
        yield Processes(rank, size)
    except (_GoneError, KeyboardInterrupt) as error:  # torchrun stops those that are left
        if rank == 0 and store.check(["said"]):
            raise RunError(store.get("said").decode()) from None
        if rank > 0 and isinstance(error, _GoneError):
            sys.exit(Exit.INPUT)
        raise
    except (PeertuneError, OSError) as error:
        if rank == 0:
            raise
        store.set("said", f"rank {rank}: {error}")
        sys.exit(Exit.INPUT)
    finally:
        dist.destroy_process_group()


def launch(processes: int, words: Sequence[str]) -> int:
    """Start `peertune` with these words in so many processes on this machine, as torchrun does; return an exit code."""
    from torch.distributed.elastic.multiprocessing.api import SignalException
    from torch.distributed.elastic.multiprocessing.errors import ChildFailedError

    os.environ.setdefault("TORCH_ELASTIC_SHUTDOWN_TIMEOUT", "600")  # they finish the round
    os.environ.setdefault("OMP_NUM_THREADS", str(max(1, torch.get_num_threads() // processes)))
    logging.disable()  # what fails, the messages of the processes say
    try:
        start(processes, sys.executable, "-m", "peertune", *words)
    except SignalException:
        return 130
    except ChildFailedError as error:
        _, failure = error.get_first_failure()
        return failure.exitcode if failure.exitcode > 0 else 1
    return 0


def start(processes: int, entry: Callable[..., Any] | str, *arguments: Any) -> dict[int, Any]:
    """Run a function, or a program, in so many processes on this machine, and return what it returns, by rank."""
    from torch.distributed.launcher.api import LaunchConfig, elastic_launch

    config = LaunchConfig(
        min_nodes=1,
        max_nodes=1,
        nproc_per_node=processes,
        run_id=uuid4().hex,
        rdzv_backend="c10d",
        rdzv_endpoint="localhost:0",
        max_restarts=0,
    )
    found: dict[int, Any] = elastic_launch(config, entry)(*arguments)
    return found
