"""Free memory, and the peak that a piece of work adds to what was in use before."""

from __future__ import annotations

import contextlib
import ctypes
import gc
from pathlib import Path
from types import TracebackType

import torch

_STATUS = Path("/proc/self/status")
_CLEAR = Path("/proc/self/clear_refs")


def available_bytes(device: torch.device) -> int | None:
    """Bytes that can still be allocated on ``device``; None where that cannot be told."""
    if device.type == "cuda":
        free, _ = torch.cuda.mem_get_info(device)
        return int(free)
    if device.type == "cpu":
        return _read(Path("/proc/meminfo"), "MemAvailable")
    return None


class Peak:
    """Context manager; ``bytes`` afterwards is the highest use inside, above that at the start.

    On CUDA it is the allocator's, on Linux CPUs the resident set's (``VmHWM``, which the kernel
    lets a process reset). None elsewhere.
    """

    def __init__(self, device: torch.device) -> None:
        self.device = device
        self.bytes: int | None = None
        self._before: int | None = None

    def __enter__(self) -> Peak:
        gc.collect()
        if self.device.type == "cuda":
            torch.cuda.reset_peak_memory_stats(self.device)
            self._before = torch.cuda.memory_allocated(self.device)
        elif self.device.type == "cpu":
            _give_back()
            self._before = _read(_STATUS, "VmRSS") if _reset_peak() else None
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        if self._before is None or error is not None:
            return
        if self.device.type == "cuda":
            peak: int | None = torch.cuda.max_memory_allocated(self.device)
        else:
            peak = _read(_STATUS, "VmHWM")
        self.bytes = None if peak is None else max(0, peak - self._before)


def keep_freed_memory() -> bool:
    """Let this process keep the memory that it frees, for whatever it allocates next, as caching
    allocators do; whether the C library took it.

    By default glibc hands large blocks back to the system at once, and each tensor made anew costs
    a page fault every 4 KiB: in virtual machines up to half of the time of copying it. How many
    blocks go back depends on sizes and order, so that without this methods are not told apart
    from their luck with the allocator.
    """
    trim_threshold, top_pad, mmap_max = -1, -2, -4
    try:
        mallopt = ctypes.CDLL("libc.so.6").mallopt
    except (OSError, AttributeError):  # another C library
        return False
    wanted = {mmap_max: 0, trim_threshold: 2**31 - 1, top_pad: 1 << 28}
    return sum(mallopt(name, value) for name, value in wanted.items()) == len(wanted)


def _give_back() -> None:
    """Let glibc return what was freed: memory that is kept would hide the next peak."""
    with contextlib.suppress(OSError, AttributeError):  # another C library
        ctypes.CDLL("libc.so.6").malloc_trim(0)


def _reset_peak() -> bool:
    try:
        _CLEAR.write_text("5")
    except OSError:
        return False
    return True


def _read(path: Path, name: str) -> int | None:
    """A line ``Name:  123 kB`` of a file in /proc, in bytes."""
    try:
        text = path.read_text()
    except OSError:
        return None
    for line in text.splitlines():
        if line.startswith(f"{name}:"):
            return int(line.split()[1]) * 1024
    return None
