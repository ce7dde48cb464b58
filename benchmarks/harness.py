"""What the attention benchmarks share: clocks, medians with their spread, the machine's facts, files written whole."""

from __future__ import annotations

import os
import platform
import statistics
import subprocess
import time
from collections.abc import Callable, Sequence
from pathlib import Path

import torch

#: What is written before each call on a device: many times any L2 cache, and long enough (over a millisecond)
#: that the host has queued the call's kernels before the first of them may start.
FLUSH_BYTES = 512 << 20
FLUSHES = 8


def elapsed_ms(call: Callable[[], object]) -> float:
    """Milliseconds that the host takes for a call."""
    start = time.perf_counter()
    call()
    return (time.perf_counter() - start) * 1e3


class Clock:
    """``clock(call)``: milliseconds of the device's own time, and of the host's until all was queued.

    The L2 cache is overwritten before each call. It is left full of lines that are still to be written back, as after
    any other operation of a model; the call leaves as many of its own behind, so that its traffic is what it moves. The
    host's time hides behind that as long as it is below `hidden_ms`; above, the device waits, and the time says so. On
    a CPU both times are the same.
    """

    def __init__(self, device: str) -> None:
        self.device = device
        self.hidden_ms = 0.0
        if device != "cpu":
            self._flush = torch.empty(FLUSH_BYTES, dtype=torch.uint8, device=device)
            self.hidden_ms = statistics.median(self._flushing_ms() for _ in range(5))

    def __call__(self, call: Callable[[], object]) -> tuple[float, float]:
        if self.device == "cpu":
            ms = elapsed_ms(call)
            return ms, ms
        start, end = torch.cuda.Event(enable_timing=True), torch.cuda.Event(enable_timing=True)
        self._overwrite()
        start.record()
        enqueue_ms = elapsed_ms(call)
        end.record()
        end.synchronize()
        return start.elapsed_time(end), enqueue_ms

    def _overwrite(self) -> None:
        for _ in range(FLUSHES):
            self._flush.zero_()

    def _flushing_ms(self) -> float:
        start, end = torch.cuda.Event(enable_timing=True), torch.cuda.Event(enable_timing=True)
        start.record()
        self._overwrite()
        end.record()
        end.synchronize()
        return start.elapsed_time(end)


def spread(series: Sequence[float]) -> tuple[float, float, float]:
    """(median, least, greatest)."""
    return statistics.median(series), min(series), max(series)


def device_name(device: str) -> str:
    if device != "cpu":
        return torch.cuda.get_device_name()
    try:
        lines = Path("/proc/cpuinfo").read_text().splitlines()
        name = next(line.split(":")[1].strip() for line in lines if line.startswith("model name"))
    except (OSError, StopIteration):
        name = platform.processor() or platform.machine()
    return f"{name}, {torch.get_num_threads()} threads"


def commit() -> str:
    try:
        found = subprocess.run(["git", "rev-parse", "--short", "HEAD"], capture_output=True, text=True, check=True)
    except (OSError, subprocess.CalledProcessError):
        return "not in a checkout"
    return found.stdout.strip()


def write_whole(path: Path, text: str) -> None:
    """Write a file so that a run killed meanwhile leaves the old one."""
    path.parent.mkdir(parents=True, exist_ok=True)
    part = path.with_name(path.name + ".part")
    part.write_text(text)
    os.replace(part, path)
