"""Sparse against dense attention on a CPU: ``python benchmarks/attention_cpu.py``.

Checked first, then timed: all rows in turn, round by round in one process, so that a slow moment of the machine falls
on all of them; the median of the rounds counts. Written as JSON and Markdown.
"""

from __future__ import annotations

import argparse
import json
import platform
import sys
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import torch
from torch.nn.functional import scaled_dot_product_attention

import longstride as ls
from harness import commit, device_name, elapsed_ms, spread, write_whole

DENSE = "dense causal SDPA"
BOUND = 1e-5


@dataclass(frozen=True)
class Case:
    """One setting: [batch, heads, length, head_dim] and the patterns to time there."""

    batch: int
    heads: int
    length: int
    head_dim: int
    patterns: tuple[ls.Pattern, ...]

    def inputs(self) -> list[torch.Tensor]:
        shape = (self.batch, self.heads, self.length, self.head_dim)
        return [torch.randn(shape, requires_grad=True) for _ in range(3)]


def case(length: int, stride: int) -> Case:
    local, strided = ls.Local(stride), ls.Strided(stride)
    return Case(1, 8, length, 64, (strided, local, local | strided, ls.Fixed(stride, 8)))


def check(cases: tuple[Case, ...]) -> dict[str, float]:
    """The worst relative error of outputs and gradients against float64, by pattern; exits above `BOUND`."""
    errors: dict[str, float] = {}
    for case in cases:
        for pattern in case.patterns:
            torch.manual_seed(0)
            inputs = [torch.randn(1, 2, 700, case.head_dim) for _ in range(3)]
            weight = torch.randn_like(inputs[0])
            found = []
            for as_dtype, backend in ((torch.float32, None), (torch.float64, "reference")):
                leaves = [x.detach().to(as_dtype).requires_grad_() for x in inputs]
                out = ls.attention(*leaves, pattern, backend=backend)
                found.append([out, *torch.autograd.grad((out * weight.to(as_dtype)).sum(), leaves)])
            pairs = zip(*found, strict=True)
            errors[str(pattern)] = max(((a.double() - b).norm() / b.norm()).item() for a, b in pairs)
    if not all(error < BOUND for error in errors.values()):  # NaN fails too
        sys.exit(f"not timed: an error exceeds {BOUND}: {errors}")
    print(f"correct: worst relative error {max(errors.values()):.1e}")
    return errors


def measure(case: Case, rounds: int) -> list[dict]:
    """A row for dense attention and for every pattern: medians, spreads, and how many times faster than dense."""
    q, k, v = case.inputs()
    grad_out = torch.randn_like(q)
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
                forward_ms = elapsed_ms(forward)
            both_ms = elapsed_ms(lambda forward=forward: both(forward))
            if turn:  # the first round warms up
                times[name][0].append(forward_ms)
                times[name][1].append(both_ms)
    dense = [spread(series)[0] for series in times[DENSE]]
    rows = []
    for name, series in times.items():
        forward_ms, _, _ = spread(series[0])
        both_ms, *both_spread = spread(series[1])
        row = {
            "shape": f"B{case.batch} H{case.heads} T{case.length} D{case.head_dim}",
            "what": name,
            "forward_ms": forward_ms,
            "both_ms": both_ms,
            "both_spread_ms": both_spread,
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


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--output", type=Path, default=Path(__file__).parent / "results" / "attention_cpu")
    options = parser.parse_args()
    torch.set_num_threads(options.threads)
    cases = (case(1024, 32), case(4096, 64), case(16384, 128))
    errors = check(cases)
    result = {
        "device": device_name("cpu"),
        "torch": torch.__version__,
        "python": platform.python_version(),
        "commit": commit(),
        "command": f"python benchmarks/{Path(sys.argv[0]).name} --rounds {options.rounds}",
        "dtype": "float32",
        "rounds": options.rounds,
        "errors": errors,
        "rows": [row for case in cases for row in measure(case, options.rounds)],
    }
    write_whole(options.output.with_suffix(".json"), json.dumps(result, indent=1) + "\n")
    write_whole(options.output.with_suffix(".md"), render(result))
    print(f"written: {options.output.stem}.json, {options.output.stem}.md")


if __name__ == "__main__":
    main()
