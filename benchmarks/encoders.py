"""Our encoder attention against transformers' Longformer and BigBird: ``python benchmarks/encoders.py --device cuda``.

A layer's whole attention but the last projection: hidden states to queries, keys and values, and what attends to what,
with the same weights on either side, in training and without dropout. Checked first, outputs and all gradients against
their layer in float32; then timed in turn, round by round. Dense attention in our layer stands beside them. The figures
of a device join those of others in one JSON; ``--render`` writes the page again from it.
"""

from __future__ import annotations

import argparse
import json
import platform
import sys
from collections.abc import Callable
from functools import partial
from pathlib import Path

import torch
import transformers
from torch import Tensor, nn

import longstride as ls
from encoder_peers import Pair, bigbird_pair, draw_once, longformer_pair
from harness import Clock, commit, device_name, spread, write_whole
from longstride.nn import EncoderSelfAttention

HEAD_DIM = 64
LENGTH, WINDOW, GLOBALS, BLOCK, RANDOM_BLOCKS = 4096, 512, 4, 64, 3
#: The greatest relative error that is timed.
BOUND = {torch.float32: 1e-5, torch.bfloat16: 2e-2}
#: Dtype, batch and heads on a device.
SIZES = {"cpu": (torch.float32, 1, 4), "cuda": (torch.bfloat16, 4, 12)}


def pairs(heads: int, length: int, shrink: int) -> list[Pair]:
    sizes = {"hidden_size": heads * HEAD_DIM, "num_heads": heads}
    torch.manual_seed(0)
    return [
        longformer_pair(WINDOW // shrink, GLOBALS, **sizes),
        bigbird_pair(BLOCK // shrink, RANDOM_BLOCKS, length, **sizes),
    ]


def errors(pair: Pair, length: int, dtype: torch.dtype, device: str) -> dict[str, float]:
    """Relative errors of ours, and of theirs in that dtype, against theirs in float32: output, and worst gradient."""
    hidden = torch.randn(1, length, pair.linears[0].in_features, device=device)
    weight = torch.randn_like(hidden)

    def results(
        layer: Callable[[Tensor], Tensor], gradients: Callable[[], list[Tensor]], as_dtype: torch.dtype
    ) -> list:
        pair.to(device, as_dtype)
        for module in pair.modules:
            module.zero_grad()
        leaf = hidden.detach().to(as_dtype).requires_grad_()
        out = layer(leaf)
        (out * weight.to(as_dtype)).sum().backward()
        # A bias of keys has no gradient but rounding; that of queries may be as small.
        weights = [gradient.float().clone() for gradient in gradients() if gradient.dim() == 2]
        return [out.detach().float(), leaf.grad.float(), *weights]

    expected = results(pair.theirs, pair.gradients_of_theirs, torch.float32)
    found = {}
    layers = {"ours": (pair.ours, pair.gradients_of_ours)}
    if dtype != torch.float32:
        layers["theirs"] = (pair.theirs, pair.gradients_of_theirs)
    for whose, (layer, gradients) in layers.items():
        each = [
            ((a - b).norm() / b.norm()).item() for a, b in zip(results(layer, gradients, dtype), expected, strict=True)
        ]
        found |= {f"{whose} forward": each[0], f"{whose} gradients": max(each[1:])}
    return found


def measure(pair: Pair, batch: int, length: int, dtype: torch.dtype, device: str, rounds: int) -> list[dict]:
    """A row for ours, theirs and dense attention: medians and spreads in ms, and the memory that a step takes."""
    pair.to(device, dtype)
    hidden = torch.randn(batch, length, pair.linears[0].in_features, device=device, dtype=dtype, requires_grad=True)
    grad_out = torch.randn_like(hidden)
    ours = pair.modules[0]
    dense = EncoderSelfAttention(ls.Full(), hidden_size=hidden.shape[-1], num_heads=ours.num_heads)
    dense.qkv_proj, dense.out_proj = ours.qkv_proj, nn.Identity()
    theirs = pair.prepare_theirs(hidden, None)
    calls = {"ours": ours, "transformers": theirs, "dense, in our layer": dense}
    clock = Clock(device)
    series: dict[str, tuple[list[float], list[float]]] = {name: ([], []) for name in calls}
    memory = {}

    def both(layer: Callable[[Tensor], Tensor]) -> None:
        hidden.grad = None
        for module in pair.modules:
            module.zero_grad()
        layer(hidden).backward(grad_out)

    for turn in range(rounds + 1):
        for name, layer in calls.items():
            with torch.no_grad():
                forward_ms, _ = clock(partial(layer, hidden))
            if device != "cpu":
                torch.cuda.reset_peak_memory_stats()
                before = torch.cuda.memory_allocated()
            both_ms, _ = clock(partial(both, layer))
            if device != "cpu":
                memory[name] = torch.cuda.max_memory_allocated() - before
            if turn:  # the first round warms up
                series[name][0].append(forward_ms)
                series[name][1].append(both_ms)
    rows = []
    for name, (forward, step) in series.items():
        (forward_ms, *forward_spread), (both_ms, *both_spread) = spread(forward), spread(step)
        row = {
            "case": pair.name, "what": name, "forward_ms": forward_ms, "forward_spread_ms": forward_spread,
            "both_ms": both_ms, "both_spread_ms": both_spread,
        } | ({"peak_bytes": memory[name]} if memory else {})  # fmt: skip
        rows.append(row)
        print(f"{pair.name:42} {name:22} forward {forward_ms:9.3f} ms, and backward {both_ms:9.3f} ms", flush=True)
    return rows


def render(result: dict) -> str:
    """The Markdown page of all devices' figures."""
    lines = ["# Encoder attention: ours, and that of transformers", ""]
    for part in result.values():
        lines += [
            f"## {part['device']}",
            "",
            f"torch {part['torch']}, transformers {part['transformers']}, triton {part['triton']}, Python "
            f"{part['python']}, commit {part['commit']}; `{part['command']}`.",
            f"{part['dtype']}, batch {part['batch']}, T = {part['length']:,}, {part['heads']} heads of {HEAD_DIM}, "
            f"projections included; median of {part['rounds']} rounds (least to greatest). In brackets: how many "
            "times as fast as transformers.",
            "",
            "| case | what | forward, ms | forward + backward, ms | memory of a step, MiB |",
            "|---|---|---|---|---|",
        ]
        for row in part["rows"]:
            peer = next(r for r in part["rows"] if (r["case"], r["what"]) == (row["case"], "transformers"))
            cells = []
            for key in ("forward", "both"):
                low, high = row[f"{key}_spread_ms"]
                ratio = peer[f"{key}_ms"] / row[f"{key}_ms"]
                cells.append(f"{row[f'{key}_ms']:.2f} ({low:.2f} to {high:.2f}) ({ratio:.1f}x)")
            memory = f"{row['peak_bytes'] / 2**20:,.0f}" if "peak_bytes" in row else "-"
            lines.append(f"| {row['case']} | {row['what']} | {' | '.join(cells)} | {memory} |")
        lines += ["", "Checked before timing, relative errors against their layer in float32:", ""]
        for case, found in part["errors"].items():
            lines.append(f"- {case}: " + ", ".join(f"{name} {error:.1e}" for name, error in found.items()))
        lines += [
            "",
            "BigBird's layer draws its random blocks on the host at every call; here it keeps its first draw, which "
            f"would add {part['draw_ms']:.1f} ms to every forward pass.",
            "",
        ]
    return "\n".join(lines).rstrip() + "\n"


def run(device: str, rounds: int, length: int, shrink: int) -> dict:
    dtype, batch, heads = SIZES[device]
    found, rows, draw_ms = {}, [], 0.0
    for pair in pairs(heads, length, shrink):
        if pair.name.startswith("BigBird"):
            clock = Clock("cpu")
            theirs = pair.modules[1]
            sizes = (theirs.max_seqlen, theirs.max_seqlen, theirs.block_size, theirs.block_size, RANDOM_BLOCKS)
            draws = [
                clock(lambda: [theirs._bigbird_block_rand_mask(*sizes, last_idx=1024) for _ in range(heads)])[0]  # noqa: B023
                for _ in range(5)
            ]
            draw_ms = spread(draws)[0]
            draw_once(pair, length)
        found[pair.name] = errors(pair, length, dtype, device)
        worst = max(error for name, error in found[pair.name].items() if name.startswith("ours"))
        if not worst < BOUND[dtype]:  # NaN fails too
            sys.exit(f"not timed: an error exceeds {BOUND[dtype]}: {pair.name}: {found[pair.name]}")
        print(f"correct: {pair.name}: {found[pair.name]}", flush=True)
        rows += measure(pair, batch, length, dtype, device, rounds)
    triton = sys.modules.get("triton")
    return {
        "device": device_name(device),
        "torch": torch.__version__,
        "transformers": transformers.__version__,
        "triton": getattr(triton, "__version__", "not loaded"),
        "python": platform.python_version(),
        "commit": commit(),
        "command": f"python benchmarks/{Path(__file__).name} --device {device} --rounds {rounds}"
        + (f" --threads {torch.get_num_threads()}" if device == "cpu" else ""),
        "dtype": str(dtype).removeprefix("torch."),
        "batch": batch,
        "heads": heads,
        "length": length,
        "rounds": rounds,
        "errors": found,
        "draw_ms": draw_ms,
        "rows": rows,
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--device", default="cpu", choices=sorted(SIZES))
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--threads", type=int, default=2, help="of a CPU")
    parser.add_argument("--tiny", action="store_true", help="sizes for a test of this script")
    parser.add_argument("--commit", help="what was measured, where there is no checkout to ask")
    parser.add_argument("--render", action="store_true", help="write the page again, and measure nothing")
    parser.add_argument("--output", type=Path, default=Path(__file__).parent / "results" / "encoders")
    options = parser.parse_args()
    path = options.output.with_suffix(".json")
    result = json.loads(path.read_text()) if path.exists() else {}
    if not options.render:
        if options.device == "cpu":
            torch.set_num_threads(options.threads)
        elif not torch.cuda.is_available():
            sys.exit("no CUDA device here: measure on a machine with one, or give --device cpu")
        measured = run(options.device, options.rounds, *((256, 8) if options.tiny else (LENGTH, 1)))
        result[options.device] = measured | ({"commit": options.commit} if options.commit else {})
        write_whole(path, json.dumps(result, indent=1) + "\n")
    write_whole(options.output.with_suffix(".md"), render(result))
    print(f"written: {options.output.stem}.json, {options.output.stem}.md")


if __name__ == "__main__":
    main()
