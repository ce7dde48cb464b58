"""What the attention benchmarks share: check first, then time all rows in turn, then write JSON and Markdown.

Rows are timed round by round in one process, so that a slow moment of the machine falls on all of them; the median of
the rounds counts. On a GPU times are device events, with the L2 cache overwritten before each call.
"""

from __future__ import annotations

import json
import platform
import statistics
import subprocess
import sys
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import torch
from torch.nn.functional import scaled_dot_product_attention

import longstride as ls

DENSE = "dense causal SDPA"


@dataclass(frozen=True)
class Case:
    """One setting: [batch, heads, length, head_dim] and the patterns to time there."""

    batch: int
    heads: int
    length: int
    head_dim: int
    patterns: tuple[ls.Pattern, ...]

    def inputs(self, device: str, dtype: torch.dtype) -> list[torch.Tensor]:
        shape = (self.batch, self.heads, self.length, self.head_dim)
        return [torch.randn(shape, device=device, dtype=dtype, requires_grad=True) for _ in range(3)]


def check(cases: tuple[Case, ...], device: str, dtype: torch.dtype, bound: float) -> dict[str, float]:
    """The worst relative error of outputs and gradients against float64, by pattern; exits above `bound`."""
    errors: dict[str, float] = {}
    for case in cases:
        for pattern in case.patterns:
            torch.manual_seed(0)
            inputs = [torch.randn(1, 2, 700, case.head_dim, device=device).to(dtype) for _ in range(3)]
            weight = torch.randn_like(inputs[0])
            found = []
            for as_dtype, backend in ((dtype, None), (torch.float64, "reference")):
                leaves = [x.detach().to(as_dtype).requires_grad_() for x in inputs]
                out = ls.attention(*leaves, pattern, backend=backend)
                found.append([out, *torch.autograd.grad((out * weight.to(as_dtype)).sum(), leaves)])
            pairs = zip(*found, strict=True)
            errors[str(pattern)] = max(((a.double() - b).norm() / b.norm()).item() for a, b in pairs)
    if not all(error < bound for error in errors.values()):  # NaN fails too
        sys.exit(f"not timed: an error exceeds {bound}: {errors}")
    print(f"correct: worst relative error {max(errors.values()):.1e}")
    return errors


def stopwatch(device: str) -> Callable[[Callable[[], object]], float]:
    """A function that runs a call and returns its milliseconds."""
    if device == "cpu":

        def on_cpu(call: Callable[[], object]) -> float:
            start = time.perf_counter()
            call()
            return (time.perf_counter() - start) * 1e3

        return on_cpu
    flush = torch.empty(256 << 20, dtype=torch.uint8, device=device)

    def on_gpu(call: Callable[[], object]) -> float:
        flush.zero_()
        start, end = torch.cuda.Event(enable_timing=True), torch.cuda.Event(enable_timing=True)
        start.record()
        call()
        end.record()
        torch.cuda.synchronize()
        return start.elapsed_time(end)

    return on_gpu


def measure(case: Case, device: str, dtype: torch.dtype, rounds: int) -> list[dict]:
    """A row for dense attention and for every pattern: medians, spreads, and how many times faster than dense."""
    q, k, v = case.inputs(device, dtype)
    grad_out = torch.randn_like(q)
    timed = stopwatch(device)
    forwards: dict[str, Callable[[], torch.Tensor]] = {
        DENSE: lambda: scaled_dot_product_attention(q, k, v, is_causal=True)
    }
    for pattern in case.patterns:
        forwards[str(pattern)] = lambda pattern=pattern: ls.attention(q, k, v, pattern)

    def both(forward: Callable[[], torch.Tensor]) -> None:
        torch.autograd.grad(forward(), (q, k, v), grad_out)

    times: dict[str, tuple[list[float], list[float]]] = {name: ([], []) for name in forwards}
    for turn in range(rounds + 1):
        for name, forward in forwards.items():
            with torch.no_grad():
                forward_ms = timed(forward)
            both_ms = timed(lambda forward=forward: both(forward))
            if turn:  # the first round warms up
                times[name][0].append(forward_ms)
                times[name][1].append(both_ms)
    dense = [statistics.median(series) for series in times[DENSE]]
    rows = []
    for name, series in times.items():
        forward_ms, both_ms = (statistics.median(each) for each in series)
        row = {
            "shape": f"B{case.batch} H{case.heads} T{case.length} D{case.head_dim}",
            "what": name,
            "forward_ms": forward_ms,
            "both_ms": both_ms,
            "both_spread_ms": [min(series[1]), max(series[1])],
            "forward_speedup": dense[0] / forward_ms,
            "both_speedup": dense[1] / both_ms,
        }
        rows.append(row)
        print(
            f"{row['shape']:20} {name:34} forward {forward_ms:9.2f} ms ({row['forward_speedup']:6.1f}x)  "
            f"forward+backward {both_ms:9.2f} ms ({row['both_speedup']:6.1f}x)",
            flush=True,
        )
    return rows


def run(cases: tuple[Case, ...], device: str, dtype: torch.dtype, bound: float, rounds: int, output: Path) -> None:
    """Check, measure, write ``output.json`` and ``output.md``."""
    errors = check(cases, device, dtype, bound)
    rows = [row for case in cases for row in measure(case, device, dtype, rounds)]
    result = {
        "device": _device(device),
        "torch": torch.__version__,
        "python": platform.python_version(),
        "commit": _commit(),
        "command": f"python benchmarks/{Path(sys.argv[0]).name} --rounds {rounds}",
        "dtype": str(dtype).removeprefix("torch."),
        "rounds": rounds,
        "errors": errors,
        "rows": rows,
    }
    output.parent.mkdir(parents=True, exist_ok=True)
    output.with_suffix(".json").write_text(json.dumps(result, indent=1) + "\n")
    output.with_suffix(".md").write_text(render(result))
    print(f"written: {output.stem}.json, {output.stem}.md")


def render(result: dict) -> str:
    """The Markdown page of a result."""
    lines = [
        f"# Attention on {result['device']}",
        "",
        f"torch {result['torch']}, Python {result['python']}, commit {result['commit']}; `{result['command']}`.",
        f"{result['dtype']}; median of {result['rounds']} rounds, all rows in one process. In brackets: how many times "
        "faster than dense causal `scaled_dot_product_attention` in the same run.",
        "",
        "| shape | what | forward, ms | forward + backward, ms | its spread, ms |",
        "|---|---|---|---|---|",
    ]
    for row in result["rows"]:
        low, high = row["both_spread_ms"]
        lines.append(
            f"| {row['shape']} | {row['what'].replace('|', chr(92) + '|')} | {row['forward_ms']:.2f} "
            f"({row['forward_speedup']:.1f}x) | {row['both_ms']:.2f} ({row['both_speedup']:.1f}x) "
            f"| {low:.2f} to {high:.2f} |"
        )
    worst = max(result["errors"].values())
    lines += ["", f"Checked before timing against the float64 reference at T = 700: worst relative error {worst:.1e}."]
    return "\n".join(lines) + "\n"


def _device(device: str) -> str:
    if device != "cpu":
        return torch.cuda.get_device_name()
    try:
        lines = Path("/proc/cpuinfo").read_text().splitlines()
        name = next(line.split(":")[1].strip() for line in lines if line.startswith("model name"))
    except (OSError, StopIteration):
        name = platform.processor() or platform.machine()
    return f"{name}, {torch.get_num_threads()} threads"


def _commit() -> str:
    try:
        found = subprocess.run(["git", "rev-parse", "--short", "HEAD"], capture_output=True, text=True, check=True)
    except (OSError, subprocess.CalledProcessError):
        return "not in a checkout"
    return found.stdout.strip()
