"""Memory: what tensors take while they live, of real ones and of those on the meta device, and what there is.

Tensors on PyTorch's meta device have a shape and no numbers. What runs on them makes the same tensors, for as long, as
it would on a real device, so their sizes are known without any being there. For that to hold, code that goes another
way on another device asks `device_type`.
"""

import ctypes
import sys
import weakref
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from contextvars import ContextVar
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

_stands_for: ContextVar[str] = ContextVar("stands_for", default="cpu")


@contextmanager
def meta_stands_for(device_type: str) -> Iterator[None]:
    """For the length of a `with` block, have what runs on the meta device run as it would on this kind of device."""
    token = _stands_for.set(device_type)
    try:
        yield
    finally:
        _stands_for.reset(token)


def device_type(x: Tensor) -> str:
    """Return on what kind of device `x` is computed, or would be."""
    return _stands_for.get() if x.is_meta else x.device.type


MAPPED_BYTES = 32 * 2**20
"""From this size on glibc maps a tensor by itself and does not put it in its heap."""


class Most(NamedTuple):
    """What was taken at a peak, in bytes."""

    taken: int
    small: int  # of it in tensors of less than MAPPED_BYTES


class LiveBytes(TorchDispatchMode):
    """Counts the bytes of the tensors on one kind of device that come to be in a `with` block, as long as they live.

    Views share what they look at. Sparse tensors, and what an operator takes and gives back inside itself, are not
    seen. On the meta device whoever asks for a number gets 1, and for an array zeros.
    """

    def __init__(self, device_type: str) -> None:
        super().__init__()  # type: ignore[no-untyped-call]  # as PyTorch has it
        self.device_type = device_type
        self.now = self.small = 0
        self._peak = Most(0, 0)
        self._held: dict[int, int] = {}  # storage → bytes

    def hold(self, *values: Any) -> None:
        """Count these tensors too, in whatever they lie."""
        for x in tree_leaves(values):
            if isinstance(x, Tensor) and x.device.type == self.device_type and x.layout is torch.strided:
                storage = x.untyped_storage()
                key = storage._cdata
                if key not in self._held:
                    self._held[key] = storage.nbytes()
                    self._add(storage.nbytes(), 1)
                    weakref.finalize(storage, self._drop, key).atexit = False
        if self.now > self._peak.taken:
            self._peak = Most(self.now, self.small)

    def most(self, action: Callable[[], object]) -> Most:
        """Return by how much an action raises the count while it runs."""
        before = self._peak = Most(self.now, self.small)
        action()
        return Most(self._peak.taken - before.taken, self._peak.small - before.small)

    def _add(self, size: int, sign: int) -> None:
        self.now += sign * size
        self.small += sign * size * (size < MAPPED_BYTES)

    def _drop(self, key: int) -> None:
        self._add(self._held.pop(key), -1)

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        if func is torch.ops.aten._local_scalar_dense.default and args[0].is_meta:
            return 1
        if func is torch.ops.aten._to_copy.default and args[0].is_meta:
            device, dtype = kwargs.get("device") or args[0].device, kwargs.get("dtype") or args[0].dtype
            if device.type != "meta":
                return torch.zeros(args[0].shape, dtype=dtype, device=device)
        result = func(*args, **kwargs)
        self.hold(result)
        return result


def map_tensors_alone() -> None:
    """Have glibc map each tensor of a megabyte or more by itself, in this process, from now on.

    Its heap leaves holes between tensors, up to several times what lives at a time; without them a process takes what
    its tensors take, for a little more time spent on fresh pages. Elsewhere than on Linux with glibc nothing is done.
    """
    _glibc("mallopt", -3, 2**20)  # M_MMAP_THRESHOLD, which set once no longer moves


KEPT_BYTES = 2**27


def keep_free() -> None:
    """Have glibc keep what is freed for what comes next, up to `KEPT_BYTES`, in this process, from now on.

    A peer's swaps take and free as much as they send, round by round, and fresh pages cost more than all else. What is
    `MAPPED_BYTES` or larger is mapped by itself as before. Elsewhere than on Linux with glibc nothing is done.
    """
    _glibc("mallopt", -3, MAPPED_BYTES)  # M_MMAP_THRESHOLD
    _glibc("mallopt", -1, KEPT_BYTES)  # M_TRIM_THRESHOLD


def give_back_free() -> None:
    """Have glibc return what it holds free: micro-batches of many sizes fragment it, by a gigabyte in 200 steps."""
    _glibc("malloc_trim", 0)


def _glibc(name: str, *arguments: int) -> None:
    """Call a function of the allocator where there is one of this name."""
    function = getattr(ctypes.CDLL(None), name, None) if sys.platform == "linux" else None
    if function is not None:
        function(*arguments)


def resident_bytes() -> int:
    """Return what this process holds in memory, 0 where the system doesn't say."""
    return told_bytes("/proc/self/status", "VmRSS") or 0


def available_bytes(device: torch.device) -> int | None:
    """Return what a process on this device can have, with what this one has; None where it can't be known.

    Of the CPU that is what the system can give, within the limit of the control group.
    """
    if device.type == "cuda":
        if not torch.cuda.is_available():
            return None
        free, _ = torch.cuda.mem_get_info(device)
        return free + torch.cuda.memory_reserved(device)
    system = told_bytes("/proc/meminfo", "MemAvailable")
    if system is None:
        return None
    limits = [system + resident_bytes()]
    for folder, limit in (("/sys/fs/cgroup", "memory.max"), ("/sys/fs/cgroup/memory", "memory.limit_in_bytes")):
        try:
            limits.append(int(Path(folder, limit).read_text()))
        except (OSError, ValueError):  # there is none, or it is "max"
            continue
    return min(limits)


def told_bytes(file: str, name: str) -> int | None:
    """Return the bytes that a line such as `VmRSS: 1234 kB` of the system's file tells; None where there is none."""
    try:
        lines = Path(file).read_text().splitlines()
    except OSError:
        return None
    return next((1024 * int(line.split()[1]) for line in lines if line.startswith(f"{name}:")), None)
