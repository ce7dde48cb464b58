"""Sparse against dense attention on a CPU: ``python benchmarks/attention_cpu.py``.

Every pattern is first checked against the dense reference in float64, outputs and gradients. Then dense causal
`scaled_dot_product_attention` and all patterns are timed in turn, round by round in one process, so that a slow moment
of the machine falls on all; the median of the rounds counts. Results go to benchmarks/results/ as JSON, and as Markdown
made from it.
"""

from __future__ import annotations

import argparse
import json
import platform
import statistics
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path

import torch
from torch.nn.functional import scaled_dot_product_attention

import longstride as ls

CASES = ((1024, 32), (4096, 64), (16384, 128))
BATCH, HEADS, HEAD_DIM = 1, 8, 64


def patterns(stride: int) -> list[ls.Pattern]:
    local, strided = ls.Local(stride), ls.Strided(stride)
    return [strided, local, local | strided, ls.Fixed(stride, 8)]


def check(stride: int) -> dict[str, float]:
    """The worst relative error of output and gradients against the float64 reference, by pattern."""
    errors = {}
    for pattern in patterns(stride):
        torch.manual_seed(0)
        inputs = [torch.randn(BATCH, 2, 700, HEAD_DIM) for _ in range(3)]
        weight = torch.randn_like(inputs[0])
        found = []
        for dtype, backend in ((torch.float32, "torch"), (torch.float64, "reference")):
            leaves = [x.to(dtype).requires_grad_() for x in inputs]
            out = ls.attention(*leaves, pattern, backend=backend)
            found.append([out, *torch.autograd.grad((out * weight).sum(), leaves)])
        errors[str(pattern)] = max(((a - b).norm() / b.norm()).item() for a, b in zip(*found, strict=True))
    return errors


def timed(call: Callable[[], object]) -> float:
    start = time.perf_counter()
    call()
    return (time.perf_counter() - start) * 1e3


def measure(length: int, stride: int, rounds: int) -> list[dict]:
    q, k, v = (torch.randn(BATCH, HEADS, length, HEAD_DIM, requires_grad=True) for _ in range(3))
    grad_out = torch.randn(BATCH, HEADS, length, HEAD_DIM)
    forwards: dict[str, Callable[[], torch.Tensor]] = {
        "dense causal SDPA": lambda: scaled_dot_product_attention(q, k, v, is_causal=True)
    }
    for pattern in patterns(stride):
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
    dense = [statistics.median(series) for series in times["dense causal SDPA"]]
    rows = []
    for name, series in times.items():
        median = [statistics.median(each) for each in series]
        rows.append(
            {
                "length": length,
                "stride": stride,
                "what": name,
                "forward_ms": median[0],
                "forward_spread_ms": [min(series[0]), max(series[0])],
                "both_ms": median[1],
                "both_spread_ms": [min(series[1]), max(series[1])],
                "forward_speedup": dense[0] / median[0],
                "both_speedup": dense[1] / median[1],
            }
        )
    return rows


def processor() -> str:
    try:
        lines = Path("/proc/cpuinfo").read_text().splitlines()
        return next(line.split(":")[1].strip() for line in lines if line.startswith("model name"))
    except (OSError, StopIteration):
        return platform.processor() or platform.machine()


def commit() -> str:
    try:
        return subprocess.run(
            ["git", "rev-parse", "--short", "HEAD"], capture_output=True, text=True, check=True
        ).stdout.strip()
    except (OSError, subprocess.CalledProcessError):
        return "unknown"


def render(result: dict) -> str:
    """The Markdown page of a result."""
    lines = [
        "# Attention on a CPU",
        "",
        f"{result['processor']}, {result['threads']} threads, torch {result['torch']}, Python {result['python']}, "
        f"commit {result['commit']}; `{result['command']}`.",
        f"B{BATCH} H{HEADS} D{HEAD_DIM}, float32; median of {result['rounds']} rounds, all rows in one process. "
        "In brackets: how many times faster than dense causal `scaled_dot_product_attention` in the same run.",
        "",
        "| T | what | forward, ms | forward + backward, ms | spread, ms |",
        "|---|---|---|---|---|",
    ]
    for row in result["rows"]:
        spread = "{:.1f} to {:.1f}".format(*row["both_spread_ms"])
        lines.append(
            f"| {row['length']:,} | {row['what'].replace('|', chr(92) + '|')} | {row['forward_ms']:.1f} "
            f"({row['forward_speedup']:.1f}x) | {row['both_ms']:.1f} ({row['both_speedup']:.1f}x) | {spread} |"
        )
    lines += [
        "",
        "Relative error against the float64 reference (output and gradients, T = 700), checked before timing:",
    ]
    lines += [f"{name}: {error:.1e}." for name, error in result["errors"].items()]
    return "\n".join(lines) + "\n"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--output", type=Path, default=Path(__file__).parent / "results" / "attention_cpu")
    options = parser.parse_args()
    torch.set_num_threads(options.threads)
    errors: dict[str, float] = {}
    for _, stride in CASES:
        errors |= check(stride)
    if not all(error < 1e-5 for error in errors.values()):  # NaN fails too
        sys.exit(f"not timed: an error exceeds 1e-5: {errors}")
    print("correct: worst relative error {:.1e}".format(max(errors.values())))
    rows: list[dict] = []
    for length, stride in CASES:
        for row in measure(length, stride, options.rounds):
            rows.append(row)
            print(
                f"T={length:<6} {row['what']:32} forward {row['forward_ms']:8.1f} ms ({row['forward_speedup']:5.1f}x)   "
                f"forward+backward {row['both_ms']:8.1f} ms ({row['both_speedup']:5.1f}x)",
                flush=True,
            )
    result = {
        "processor": processor(),
        "threads": options.threads,
        "torch": torch.__version__,
        "python": platform.python_version(),
        "commit": commit(),
        "command": f"python benchmarks/attention_cpu.py --threads {options.threads} --rounds {options.rounds}",
        "rounds": options.rounds,
        "errors": errors,
        "rows": rows,
    }
    options.output.parent.mkdir(parents=True, exist_ok=True)
    options.output.with_suffix(".json").write_text(json.dumps(result, indent=1) + "\n")
    options.output.with_suffix(".md").write_text(render(result))
    print(f"written: {options.output.with_suffix('.json').name}, {options.output.with_suffix('.md').name}")


if __name__ == "__main__":
    main()
