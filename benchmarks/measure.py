"""Figures: timed repeatedly, ratios taken within one run, kept with their spread and their target."""

import os
import platform
import statistics
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass
from functools import partial
from importlib.metadata import version
from typing import Any, NamedTuple

import torch


@dataclass(frozen=True)
class Figure:
    """One measured number: the median of `runs` values, with the least and the largest of them."""

    name: str
    value: float
    low: float
    high: float
    unit: str
    runs: int
    target: str = ""  # such as "≥ 3"; empty where there is none
    note: str = ""

    @property
    def met(self) -> bool | None:
        """Whether the median meets the target; None without one."""
        if not self.target:
            return None
        sign, number = self.target.split()
        return self.value >= float(number) if sign == "≥" else self.value <= float(number)

    def json(self) -> dict[str, Any]:
        """Return all fields, and whether the target is met."""
        return asdict(self) | {"met": self.met}


def figure(name: str, values: Sequence[float], unit: str, target: str = "", note: str = "") -> Figure:
    """Make a figure of repeated values."""
    return Figure(name, statistics.median(values), min(values), max(values), unit, len(values), target, note)


class Compared(NamedTuple):
    """One figure of two builds, turn by turn."""

    old: list[Figure]
    new: list[Figure]

    @property
    def over(self) -> list[float]:
        """Old over new, of each turn."""
        return ratios([one.value for one in self.old], [one.value for one in self.new])


def processor(action: Callable[[], object], repeats: int = 5) -> list[float]:
    """Return the processor seconds that each repetition of an action takes this process, after a warm-up.

    Of one thread this is what a shared machine tells most surely.
    """
    return [processor_seconds(action) for _ in range(repeats + 1)][1:]


def processor_seconds(action: Callable[[], object]) -> float:
    """Return the processor seconds that an action takes this process."""
    begin = time.process_time()
    action()
    return time.process_time() - begin


def seconds(action: Callable[[], object]) -> float:
    """Return how long an action takes, a GPU's work included."""
    return timed(action)[1]


def timed(action: Callable[..., Any], *arguments: Any) -> tuple[Any, float]:
    """Return what an action gives, and how long it takes, a GPU's work included."""
    synchronize()
    start = time.perf_counter()
    result = action(*arguments)
    synchronize()
    return result, time.perf_counter() - start


def synchronize() -> None:
    """Wait for the GPU, where there is one."""
    if torch.cuda.is_available():
        torch.cuda.synchronize()


def interleaved(
    actions: Mapping[str, Callable[[int], object]],
    repeats: int,
    warmup: int = 1,
    timer: Callable[[Callable[[], object]], float] = seconds,
) -> dict[str, list[float]]:
    """Time each action `repeats` times, in turn, so that a slow spell of the machine strikes all of them alike.

    An action gets the number of the turn. The first `warmup` turns are not counted. `timer` tells what an action takes.
    """
    times: dict[str, list[float]] = {name: [] for name in actions}
    for turn in range(warmup + repeats):
        for name, action in actions.items():
            taken = timer(partial(action, turn))
            if turn >= warmup:
                times[name].append(taken)
    return times


def ratios(over: Sequence[float], under: Sequence[float]) -> list[float]:
    """Divide turn by turn."""
    return [a / b for a, b in zip(over, under, strict=True)]


def matrix_product(dtype: torch.dtype, device: torch.device, size: int = 4096) -> tuple[Callable[[int], object], float]:
    """Return a large square product, and its floating-point operations."""
    a, b = (torch.randn(size, size, device=device).to(dtype) for _ in range(2))
    return lambda _: torch.nn.functional.linear(a, b), 2.0 * size**3


def copy_bandwidth(size: int = 2**28) -> float:
    """Return bytes read and written per second by a large copy; the median of 7."""
    source = torch.ones(size // 4)
    target = torch.empty_like(source)
    taken = [seconds(lambda: target.copy_(source)) for _ in range(8)]
    return 2 * size / statistics.median(taken[1:])


def machine() -> dict[str, Any]:
    """Say what the figures were taken on."""
    found = {
        "cpu": _cpu(),
        "cores": len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count(),
        "memory_GiB": round(os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES") / 2**30),
        "threads": torch.get_num_threads(),
        "python": platform.python_version(),
        "torch": torch.__version__,  # which build, as its metadata don't always say
    }
    if torch.cuda.is_available():
        found["gpu"] = torch.cuda.get_device_name()
    return found | {name: version(name) for name in ("transformers", "peft")}


def _cpu() -> str:
    try:
        with open("/proc/cpuinfo", encoding="utf-8") as file:
            names = [line.partition(":")[2].strip() for line in file if line.startswith("model name")]
    except OSError:
        names = []
    return names[0] if names else platform.processor() or platform.machine()
