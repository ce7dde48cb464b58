"""Decoding on a CUDA device against dense decoding: ``make gpu-bench`` (or ``python3 benchmarks/decode_gpu.py``).

One new token a row: the attention of one layer from 4K to 1M positions, whole models at the end of their context, and
a batch of images. Correctness first, then time. Everything is replayed as a CUDA graph, ours and the dense peers, so
that the host is out of the way; the L2 cache is flushed before each attention step. Results are written after every
part; ``--parts`` runs some of them and keeps the others.
"""

from __future__ import annotations

import argparse
import gc
import json
import platform
import sys
import time
from collections.abc import Callable
from contextlib import nullcontext
from dataclasses import dataclass, replace
from pathlib import Path

import torch
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.nn.functional import scaled_dot_product_attention

import longstride as ls
from decode_models import IMAGES, MODELS, measure_images, measure_models
from decode_page import render
from harness import Clock, commit, device_name, spread, write_whole
from peers import flash_attention_4, why

#: The largest relative error of a result that is timed.
BOUND = 2e-2
#: Bytes that the keys and values of a dense peer may take: another peer wants them once more, in its own layout.
MOST_BYTES = 20 << 30
DENSE = {
    "SDPA flash": SDPBackend.FLASH_ATTENTION,
    "SDPA cuDNN": SDPBackend.CUDNN_ATTENTION,
    "SDPA efficient": SDPBackend.EFFICIENT_ATTENTION,
}


@dataclass(frozen=True)
class Case:
    """One shape of a step: [batch, heads, 1, head_dim] against `length` positions, its own included."""

    length: int
    batch: int
    heads: int = 8
    head_dim: int = 64

    @property
    def stride(self) -> int:
        """A power of two at the root of the length, or just above."""
        return 1 << -(-(self.length.bit_length() - 1) // 2)

    def patterns(self) -> dict[str, ls.Pattern]:
        return {
            "Local(256)": ls.Local(256),
            "Fixed(sqrt T, 8)": ls.Fixed(self.stride, 8),
            "Strided(sqrt T)": ls.Strided(self.stride),
        }


CASES = tuple(Case(4096 << 2 * step, batch) for batch in (1, 16) for step in range(5))


def recorded(call: Callable[[], torch.Tensor], device: str) -> tuple[Callable[[], None], torch.Tensor]:
    """A replay of `call` as a CUDA graph (`call` itself on a CPU), and the tensor that it fills."""
    if device == "cpu":
        out = call()
        return (lambda: out.copy_(call())), out
    beside = torch.cuda.Stream()
    beside.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(beside):
        for _ in range(3):
            call()
    torch.cuda.current_stream().wait_stream(beside)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        out = call()
    return graph.replay, out


def timed(clock: Clock, replay: Callable[[], None], rounds: int) -> dict[str, float]:
    times = [clock(replay)[0] for _ in range(rounds + 3)][3:]
    ms, low, high = spread(times)
    return {"ms": ms, "low": low, "high": high, "rounds": rounds}


def error_of(found: torch.Tensor, expected: torch.Tensor) -> float:
    return ((found.double() - expected.double()).norm() / expected.double().norm()).item()


# ---- the attention of a step --------------------------------------------------------------------------------------


def fill(cache: ls.PatternCache, length: int, chunk: int = 1 << 16) -> None:
    """Let the cache hold `length` tokens, numbers out of a table, without a prompt's attention."""
    made = cache.layouts[0]
    heads = torch.arange(made.num_kv_heads, device=cache.device)[:, None, None] * 131
    end = torch.tensor([[length]], device=cache.device)
    tables = [torch.randn(8191, memory.shape[2], device=cache.device) for memory in (cache.keys[0], cache.values[0])]
    for start in range(0, length, chunk):
        position = torch.arange(start, min(start + chunk, length), device=cache.device)[None]
        rows = made.write_rows(position, end)[0]  # [kv_heads, stores, tokens]
        entry = ((position * 7919 + heads) % 8191).expand_as(rows)
        for memory, table in zip((cache.keys[0], cache.values[0]), tables, strict=True):
            memory[:, rows.flatten()] = table[entry.flatten()].to(memory.dtype)
    cache.lengths.fill_(length)
    cache.passed(length)


def measure_ours(case: Case, name: str, pattern: ls.Pattern, clock: Clock, device: str, rounds: int) -> dict:
    """A row of ours: a cache that stands one token before the end, whatever its rows hold."""
    dtype = torch.bfloat16 if device != "cpu" else torch.float32
    sizes = {"num_heads": case.heads, "head_dim": case.head_dim, "batch": case.batch, "dtype": dtype}
    cache = ls.PatternCache(pattern, capacity=case.length, device=device, **sizes)
    torch.manual_seed(case.length)
    fill(cache, case.length - 1)
    q, k, v = (torch.randn(case.batch, case.heads, 1, case.head_dim, dtype=dtype, device=device) for _ in range(3))

    def step() -> torch.Tensor:
        try:
            return ls.attention_cached(q, k, v, pattern, cache)
        finally:
            cache.abandon()  # the same token again and again

    # The truth for one row of the batch, from what is held before the step.
    made = cache.layouts[0]
    held = made.held_rows(case.length - 1, cache.lengths[:1]).flatten()
    whole = []
    for memory, new in ((cache.keys[0], k), (cache.values[0], v)):
        old = memory[0].index_select(0, held).view(1, case.heads, -1, case.head_dim)
        whole.append(torch.cat([old, new[:1]], 2))
    expected = ls.attention(q[:1], *whole, pattern, backend="reference")
    del whole, held
    replay, out = recorded(step, device)
    replay()
    error = error_of(out[:1], expected)
    if not error < BOUND:
        sys.exit(f"not timed: {pattern} at {case} is off by {error:.2e}")
    row = {"what": name, "kind": "ours", "pattern": str(pattern), "error": error, "cache_bytes": cache.nbytes}
    row["reads"] = made.reads(case.length - 1, case.length - 1)
    row |= timed(clock, replay, rounds)
    return row


def measure_dense(case: Case, clock: Clock, device: str, rounds: int) -> list[dict]:
    """A row a dense peer: one query against all keys, in the peer's own layout, without a mask."""
    dtype = torch.bfloat16 if device != "cpu" else torch.float32
    taken = 2 * case.batch * case.heads * case.length * case.head_dim * dtype.itemsize
    if taken > MOST_BYTES:
        return [{"what": "dense", "kind": "dense", "reason": f"its keys and values take {taken / 2**30:.0f} GiB"}]
    torch.manual_seed(case.length)
    q = torch.randn(case.batch, case.heads, 1, case.head_dim, dtype=dtype, device=device)
    k, v = (torch.randn(case.batch, case.heads, case.length, case.head_dim, dtype=dtype, device=device) for _ in "kv")
    scores = (q[:1].float() @ k[:1].float().mT) / case.head_dim**0.5
    expected = scores.softmax(-1) @ v[:1].float()
    calls: dict[str, Callable[[], torch.Tensor]] = {}
    for name, backend in DENSE.items() if device != "cpu" else {"SDPA": None}.items():
        within = (lambda backend=backend: sdpa_kernel(backend)) if backend is not None else nullcontext

        def attend(within: Callable = within) -> torch.Tensor:
            with within():
                return scaled_dot_product_attention(q, k, v)

        calls[name] = attend
    rows = []
    function, reason = flash_attention_4()
    if function is None:
        rows.append({"what": "flash-attn-4", "kind": "dense", "reason": reason})
    else:
        last = [x.transpose(1, 2).contiguous() for x in (q, k, v)]
        for splits in (1, 32):

            def attend_4(splits: int = splits) -> torch.Tensor:
                out = function(*last, causal=False, num_splits=splits)
                return (out[0] if isinstance(out, tuple) else out).transpose(1, 2)

            calls[f"flash-attn-4, {splits} splits"] = attend_4
    for name, call in calls.items():
        row = {"what": name, "kind": "dense"}
        rows.append(row)
        try:
            replay, out = recorded(call, device)
            replay()
            row["error"] = error_of(out[:1], expected)
            if not row["error"] < BOUND:
                row["reason"] = f"wrong: off by {row['error']:.2e}"
                continue
            row |= timed(clock, replay, rounds)
        except Exception as error:  # a peer that cannot is a row with its reason
            row["reason"] = why(error)
    return rows


def measure_attention(cases: tuple[Case, ...], device: str, rounds: int, keep: Callable[[list[dict]], None]) -> None:
    clock = Clock(device)
    rows: list[dict] = []
    for case in cases:
        found = measure_dense(case, clock, device, rounds)
        for name, pattern in case.patterns().items():
            found.append(measure_ours(case, name, pattern, clock, device, rounds))
        for row in found:
            row |= {"length": case.length, "batch": case.batch, "heads": case.heads, "head_dim": case.head_dim}
            text = f"{row['ms'] * 1e3:8.1f} us" if "ms" in row else row["reason"]
            print(f"  B{case.batch} T{case.length:>8} {row['what']:26} {text}", flush=True)
        rows += found
        keep(rows)
        gc.collect()
        if device != "cpu":
            torch.cuda.empty_cache()


# ---- a run --------------------------------------------------------------------------------------------------------


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--device", default="cuda")
    parser.add_argument("--rounds", type=int, default=20)
    parser.add_argument("--parts", nargs="*", default=["attention", "models", "images"])
    parser.add_argument("--tiny", action="store_true", help="sizes for a test of this script")
    parser.add_argument("--render", action="store_true", help="write the page again, and measure nothing")
    parser.add_argument("--output", type=Path, default=Path(__file__).parent / "results" / "decode_gpu")
    options = parser.parse_args()
    path = options.output.with_suffix(".json")
    result = json.loads(path.read_text()) if path.exists() else {}
    if not options.render:
        triton = sys.modules.get("triton")
        facts = {
            "device": device_name(options.device),
            "torch": torch.__version__,
            "triton": getattr(triton, "__version__", "not loaded"),
            "python": platform.python_version(),
            "commit": commit(),
            "command": f"python3 benchmarks/{Path(sys.argv[0]).name}",
            "rounds": options.rounds,
        }

        def keep(part: str, rows: list[dict]) -> None:
            result[part] = {**facts, "rows": rows}
            write_whole(path, json.dumps(result, indent=1) + "\n")

        cases = tuple(replace(case, length=case.length >> 6, heads=2, head_dim=16) for case in CASES[:3])
        start = time.monotonic()
        if "attention" in options.parts:
            chosen = cases if options.tiny else CASES
            measure_attention(chosen, options.device, options.rounds, lambda rows: keep("attention", rows))
        if "models" in options.parts:
            models = {name: made.tiny() for name, made in MODELS.items()} if options.tiny else MODELS
            batches = (1, 2) if options.tiny else (1, 16, 64)
            measure_models(models, batches, options.device, options.rounds, lambda rows: keep("models", rows))
        if "images" in options.parts:
            images = IMAGES.tiny() if options.tiny else IMAGES
            keep("images", [measure_images(images, 2 if options.tiny else 16, options.device)])
        print(f"took {time.monotonic() - start:.0f} s")
    write_whole(options.output.with_suffix(".md"), render(result))
    print(f"written: {options.output.stem}.json, {options.output.stem}.md")


if __name__ == "__main__":
    main()
