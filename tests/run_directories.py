"""Run directories with something in them, and several processes, or a full disk, to write them."""

import resource
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from pathlib import Path
from threading import Barrier
from typing import Any

import numpy as np
import torch
from peft import LoraConfig
from processes import AT_MOST_S

from peertune.rounds.record import Evaluation, RoundRecord
from peertune.runs import directory
from peertune.types import Group, State

CLIENTS = 3


def state(round: int, r: int = 2) -> State:
    generator = torch.Generator().manual_seed(round)
    adapters = {
        "enc.q.A": torch.randn(CLIENTS, r, 6, generator=generator),
        "enc.q.B": torch.randn(CLIENTS, 4, r, generator=generator, dtype=torch.float64),
        "out.weight.head": torch.randn(CLIENTS, 5, 4, generator=generator).bfloat16(),
    }
    moments = {f"{name}.m": x * 1e-30 for name, x in adapters.items()} | {"steps.A": torch.tensor([round, 0, 7])}
    memory = {"its.probe": torch.tensor([[1.0, torch.nan]] * CLIENTS), "its.number": torch.arange(CLIENTS)}
    return State(adapters, moments, torch.full((CLIENTS,), round), memory)


def record(round: int, evaluation: Evaluation | None = None) -> RoundRecord:
    return RoundRecord(
        round=round,
        train=["B"],
        send=["A", "B"],
        clients=[0, 1, 2],
        loss=[0.1, 1 / 3, 2e-9],
        grad_norm=[1.0, 2.0, 3.0],
        bytes_sent=[8, 0, 8],
        neighbours=[1, 0, 1],
        edges=[(0, 2)],
        failed_edges=[(0, 2)],
        out_of_phase=[],
        neighbourhood_cross_term=[0.5, 0.0, 0.5],
        diagnostics={"cross_term": 1e-17},
        seconds={"train": 0.5},
        evaluation=evaluation,
        state=state(round + 1),
    )


def create(folder: Path, **changed: Any) -> Path:
    given: dict[str, Any] = {
        "recipe": "# naïve\nrounds: 3\n",
        "resolved": "rounds: 3\n",
        "environment": {"torch": "2"},
        "facts": {"graph": {"rho": 0.5}},
        "lora": LoraConfig(r=2, lora_alpha=4, target_modules=["q"]),
        "head": {"out.bias": torch.ones(5)},
        "labels": ("no", "yes"),
        "taken": {},
    }
    directory.create(folder, **(given | changed))
    return folder


@contextmanager
def no_room(most_bytes: int) -> Iterator[None]:
    """Let no file grow beyond so many bytes, as on a disk that is full."""
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (most_bytes, hard))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))


def everything(folder: Path) -> dict[str, bytes]:
    return {str(file.relative_to(folder)): file.read_bytes() for file in folder.rglob("*") if file.is_file()}


def assert_same_bits(ours: State | None, theirs: State) -> None:
    assert ours is not None
    assert torch.equal(ours.rounds, theirs.rounds)
    parts = ((ours.adapters, theirs.adapters), (ours.moments, theirs.moments), (ours.memory, theirs.memory))
    for part, expected in parts:
        assert part.keys() == expected.keys()
        for name, x in expected.items():
            assert part[name].dtype == x.dtype
            torch.testing.assert_close(part[name], x, rtol=0, atol=0, equal_nan=True)


class Thread(Group):
    """One of several threads in the place of processes."""

    def __init__(self, rank: int, size: int, together: Barrier, told: list[Any]) -> None:
        self.rank, self.size, self.together, self.told = rank, size, together, told

    def gather(self, value: Any) -> list[Any]:
        self.told[self.rank] = value
        self.together.wait(AT_MOST_S)
        found = list(self.told)
        self.together.wait(AT_MOST_S)
        return found

    def add(self, x: torch.Tensor) -> torch.Tensor:
        return torch.stack(self.gather(x)).sum(0)


def share(group: Group) -> list[int]:
    return [int(client) for client in np.array_split(np.arange(CLIENTS), group.size)[group.rank]]


def in_threads(size: int, work: Callable[[Group], Any]) -> list[Any]:
    """Do the work in so many threads; one that fails ends the others, as a process does."""
    together, told = Barrier(size), [None] * size

    def alone(rank: int) -> Any:
        try:
            return work(Thread(rank, size, together, told))
        except BaseException:
            together.abort()
            raise

    with ThreadPoolExecutor(size) as pool:
        return [future.result() for future in [pool.submit(alone, rank) for rank in range(size)]]


def part(of: State, group: Group) -> State:
    return of.take(torch.tensor(share(group)))
