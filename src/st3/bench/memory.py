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
