"""One stop-watch for CPU and GPU: rounds that take turns, with cold caches, and the peak memory of a call.

Before every round a buffer of four times the last-level cache is written, so that nobody finds the inputs where the
last one left them. On a GPU CUDA events enclose the call, on a CPU `time.perf_counter` does.

The peak of a call is what the allocator saw (GPU), or the process's highest resident size (Linux: VmHWM, reset before)
less what was resident when it began. glibc keeps freed memory and would hand it out again unseen, so for that one call
every block of 64 KiB and more is mapped afresh; for timings the threshold stands where glibc's own adaptation ends.
What libraries keep for good after a first call (packing buffers, thread pools) is not part of it, unless a call is
too slow to be made twice.
"""

import ctypes
import gc
import time
from collections.abc import Callable, Sequence
from contextlib import suppress
from pathlib import Path
from typing import Any

import torch

STATUS, CLEAR = Path("/proc/self/status"), Path("/proc/self/clear_refs")
CACHES = Path("/sys/devices/system/cpu/cpu0/cache")
M_TRIM_THRESHOLD, M_MMAP_THRESHOLD = -1, -3
ADAPTED, FRESH = 32 << 20, 1 << 16  # bytes
LEAST_FLUSH = 1 << 26


def last_level_cache() -> int:
    """Bytes; 0 where the system does not say."""
    found = [0]
    for path in CACHES.glob("index*/size"):
        with suppress(OSError, ValueError):
            text = path.read_text().strip()
            found.append(int(text.rstrip("KM")) << {"K": 10, "M": 20}.get(text[-1], 0))
    return max(found)


def resident(field: str) -> int:
    """Bytes of a line of /proc/self/status, VmRSS or VmHWM."""
    lines = STATUS.read_text().splitlines()
    return 1024 * next(int(line.split()[1]) for line in lines if line.startswith(field))


def allocator(threshold: int) -> None:
    """From where on glibc maps a block of its own; other C libraries do without."""
    mallopt = getattr(ctypes.CDLL(None), "mallopt", None)
    if mallopt is not None:
        mallopt(M_MMAP_THRESHOLD, threshold)
        mallopt(M_TRIM_THRESHOLD, 2 * ADAPTED)


class Stopwatch:
    """Seconds and bytes of calls without arguments."""

    def __init__(self, device: torch.device):
        self.cuda = device.type == "cuda"
        if self.cuda:
            cache = torch.cuda.get_device_properties(device).L2_cache_size
        else:
            cache = last_level_cache()
            allocator(ADAPTED)
        self.flush = torch.zeros(max(LEAST_FLUSH, 4 * cache), dtype=torch.uint8, device=device)

    def synchronize(self) -> None:
        if self.cuda:
            torch.cuda.synchronize()

    def once(self, call: Callable[[], Any]) -> tuple[float, Any]:
        """Seconds of a call, compilation and all, and what it returned."""
        self.synchronize()
        start = time.perf_counter()
        found = call()
        self.synchronize()
        return time.perf_counter() - start, found

    def round(self, call: Callable[[], Any]) -> Callable[[], float]:
        """Makes a call that finds cold caches, and returns what tells its seconds: on a GPU after a synchronisation, as
        waiting after each call would show how long launches take, which a training step hides."""
        self.flush.add_(1)
        if self.cuda:
            begin, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
            begin.record()
            call()
            end.record()
            return lambda: begin.elapsed_time(end) / 1e3
        start = time.perf_counter()
        call()
        seconds = time.perf_counter() - start
        return lambda: seconds

    def interleaved(self, calls: Sequence[Callable[[], Any]], counts: Sequence[int]) -> list[list[float]]:
        """Seconds of `counts[i]` rounds of `calls[i]`: all take turns, and each turn begins with another one."""
        found: list[list[Callable[[], float]]] = [[] for _ in calls]
        for turn in range(max(counts, default=0)):
            for place in range(len(calls)):
                who = (turn + place) % len(calls)
                if turn < counts[who]:
                    found[who].append(self.round(calls[who]))
        self.synchronize()
        return [[read() for read in reads] for reads in found]

    def peak(self, call: Callable[[], Any]) -> tuple[int | None, float, Any]:
        """Bytes at the highest point of a call beyond what was there before (None where nobody can tell), its seconds,
        and what it returned, which is still part of those bytes."""
        gc.collect()
        if self.cuda:
            torch.cuda.synchronize()
            torch.cuda.reset_peak_memory_stats()
            before = torch.cuda.memory_allocated()
            seconds, found = self.once(call)
            return torch.cuda.max_memory_allocated() - before, seconds, found
        if not CLEAR.exists():
            return None, *self.once(call)
        allocator(FRESH)
        trim = getattr(ctypes.CDLL(None), "malloc_trim", None)
        if trim is not None:
            trim(0)
        try:
            CLEAR.write_text("5")
            before = resident("VmRSS")
            seconds, found = self.once(call)
            return max(0, resident("VmHWM") - before), seconds, found
        finally:
            allocator(ADAPTED)
