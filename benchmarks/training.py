"""Training steps on a CUDA device, sparse against dense and against no attention: ``python3 benchmarks/training.py``.

Whole steps (forward, backward, clipping, AdamW) of compiled models in bf16, whose forward and backward passes are
replayed as CUDA graphs; a breakdown of a step; peak memory of deep and of long models. A
compiled step is compared with an eager one before it is timed. Results are written after every case, and a run of some
cases replaces these in the file that is there; ``--render`` makes the page again.
"""

from __future__ import annotations

import argparse
import gc
import json
import platform
import sys
import time
from collections.abc import Callable
from contextlib import suppress
from dataclasses import dataclass, replace
from pathlib import Path

import torch

from harness import commit, device_name, spread, write_whole
from longstride.training.step_graph import WARM_UP
from peers import kernels_of, why
from training_page import render
from training_profile import breakdown
from training_steps import DENSE, NONE, SDPA, Size, Stepper, checked, compared, step_times_ms


@dataclass(frozen=True)
class Case:
    """Models of one size with several patterns, timed in turn.

    Attributes:
        arms: what each is called, and the patterns of its layers.
        turns, steps: so many steps in a row of each arm, so many times around.
        profiled: the arm whose step is broken down.
        compares: the first step of each arm is compared with an eager one.
    """

    name: str
    sizes: tuple[Size, ...]
    arms: tuple[tuple[str, tuple[str, ...]], ...]
    turns: int = 3
    steps: int = 5
    profiled: str | None = None
    compares: bool = True


def _arms(stride: int, summary: int, sdpa: bool) -> tuple[tuple[str, tuple[str, ...]], ...]:
    return (
        (NONE, (NONE,)),
        ("local, strided", (f"Local({stride})", f"Strided({stride})")),
        ("fixed", (f"Fixed({stride}, {summary})",)),
        (DENSE, (DENSE,)),
        *(((SDPA, (SDPA,)),) if sdpa else ()),
    )


IMAGE = Size(3072, 16, 128, 256, 2, qk_hidden_size=128, intermediate_size=512, recompute="blocks")
STEPS = (
    Case("T12288", (Size(12288, 4, 10),), _arms(128, 32, sdpa=True), profiled="local, strided"),
    Case("T65536", (Size(65536, 1, 10),), _arms(256, 32, sdpa=True), profiled="local, strided", turns=2, steps=3),
    Case("T12288-30", (Size(12288, 4, 30), Size(12288, 2, 30)), _arms(128, 32, sdpa=False), turns=2, compares=False),
    Case("T65536-30", (Size(65536, 1, 30),), _arms(256, 32, sdpa=False), turns=1, steps=3, compares=False),
    Case(
        "T3072-image",
        (IMAGE,),
        ((NONE, (NONE,)), ("local, strided", ("Local(96)", "Strided(96)")), (DENSE, (DENSE,)), (SDPA, (SDPA,))),
        turns=2,
        steps=3,
        compares=False,
    ),
)


@dataclass(frozen=True)
class MemoryCase:
    """One model whose peak memory counts, the first of the recomputations that fits."""

    name: str
    size: Size
    patterns: tuple[str, ...]
    recomputes: tuple[str, ...]
    steps: int = 3


DEEP = Size(12288, 1, 128, 256, 4)
LONG = Size(1 << 20, 1, 8, 512, 8)
MEMORY = (
    MemoryCase("128-layers-blocks", DEEP, ("Local(128)", "Strided(128)"), ("blocks",)),
    MemoryCase("128-layers-all-but-attention", DEEP, ("Local(128)", "Strided(128)"), ("all_but_attention",)),
    MemoryCase("T1048576", LONG, ("Local(1024)", "Strided(1024)"), ("all_but_attention", "blocks")),
    MemoryCase("T1048576-short-window", LONG, ("Local(256)", "Strided(1024)"), ("all_but_attention", "blocks")),
)


def tiny(case: Case | MemoryCase) -> Case | MemoryCase:
    """The case at a size for a CPU."""
    small = {"length": 64, "batch": 2, "layers": 2, "hidden_size": 32, "heads": 2, "intermediate_size": None}
    small["qk_hidden_size"] = None
    if isinstance(case, MemoryCase):
        return replace(case, size=replace(case.size, **small), patterns=("Local(8)", "Strided(8)"), steps=2)
    patterns = {"local, strided": ("Local(8)", "Strided(8)"), "fixed": ("Fixed(8, 2)",)}
    arms = tuple((name, patterns.get(name, texts)) for name, texts in case.arms)
    return replace(case, sizes=(replace(case.sizes[0], **small),), arms=arms, turns=1, steps=2)


#: Steps until every pass is a replay: those before it is recorded, and the one that records it.
RECORDED_AFTER = WARM_UP + 1


def release(device: str) -> None:
    gc.collect()
    if device != "cpu":
        torch.cuda.empty_cache()
        torch.cuda.reset_peak_memory_stats()


def peak_bytes(device: str) -> int:
    return 0 if device == "cpu" else torch.cuda.max_memory_allocated()


def held_bytes(device: str) -> int:
    return 0 if device == "cpu" else torch.cuda.memory_allocated()


# ---- steps --------------------------------------------------------------------------------------------------------


def measure(case: Case, device: str, backend: str) -> dict:
    """Rows of the first size that fits: medians and spreads of every arm, all arms in turn."""
    for size in case.sizes:
        # Outside of the handler: inside, the error holds on to what did not fit.
        with suppress(torch.cuda.OutOfMemoryError):
            return _measure(case, size, device, backend)
        print(f"  {case.name}: {size.text} does not fit", flush=True)
        release(device)
    raise SystemExit(f"{case.name}: no batch fits into the memory of this device")


def _measure(case: Case, size: Size, device: str, backend: str) -> dict:
    rows: dict[str, dict] = {}
    steppers: dict[str, Stepper] = {}
    # Of all arms' recorded passes, which would not fit side by side.
    pool = None if device == "cpu" else torch.cuda.graph_pool_handle()
    for name, patterns in case.arms:
        row = rows[name] = {"what": name, "patterns": list(patterns), "how": kernels(patterns, size, device)}
        release(device)
        others = held_bytes(device)
        try:
            stepper = Stepper(size, patterns, device, pool)
            row["parameters"] = stepper.parameters
            eager = [value.item() for value in stepper.gradients()] if case.compares else None
            stepper.optimizer.zero_grad()
            with stepper.compiled(backend):
                row |= checked(stepper)
                if eager is not None:
                    row["eager_loss"], row["eager_gradient_norm"] = eager
                    compared(row, *eager)
                release(device)
                for _ in range(RECORDED_AFTER):
                    stepper.step()
            row["peak_bytes"] = peak_bytes(device) - others
            steppers[name] = stepper
        except torch.cuda.OutOfMemoryError:
            raise
        except Exception as error:  # one arm that cannot is a row with its reason, and the others go on
            row["reason"] = why(error)
            print(f"  {case.name} {name}: not timed: {row['reason']}", flush=True)
    series: dict[str, list[float]] = {name: [] for name in steppers}
    for _ in range(case.turns):
        for name, stepper in steppers.items():
            with stepper.compiled(backend):
                series[name] += step_times_ms(stepper, case.steps)
    for name, times in series.items():
        rows[name]["ms"], rows[name]["low"], rows[name]["high"] = spread(times)
        rows[name]["steps"] = len(times)
        print(f"  {case.name} {name:20} {rows[name]['ms']:9.2f} ms", flush=True)
    result = {"size": size.__dict__, "text": size.text, "rows": list(rows.values())}
    if case.profiled in steppers:
        with steppers[case.profiled].compiled(backend):
            result["breakdown"] = {"what": case.profiled, **breakdown(steppers[case.profiled], size)}
    return result


def kernels(patterns: tuple[str, ...], size: Size, device: str) -> list[str]:
    """What attention runs on, where it is ours to say."""
    if patterns[0] in (NONE, SDPA):
        return []
    texts = ("Causal()",) if patterns == (DENSE,) else patterns
    qk_dim = (size.qk_hidden_size or size.hidden_size) // size.heads
    return kernels_of(texts, (size.batch, size.heads, size.length), qk_dim, size.hidden_size // size.heads, device)


# ---- memory -------------------------------------------------------------------------------------------------------


def measure_memory(case: MemoryCase, device: str, backend: str) -> dict:
    """Peak memory and step time of the first recomputation that fits."""
    for recompute in case.recomputes:
        size = replace(case.size, recompute=recompute)
        row: dict = {}
        with suppress(torch.cuda.OutOfMemoryError):
            row = _memory_row(case, size, device, backend)
        if row:
            print(
                f"  {case.name}, {recompute}: {row['peak_bytes'] / 2**30:.1f} GiB, {row['ms']:,.0f} ms a step",
                flush=True,
            )
            return row
        print(f"  {case.name}: recompute {recompute} does not fit", flush=True)
    return {"text": case.size.text, "patterns": list(case.patterns), "reason": "no recomputation makes it fit"}


def _memory_row(case: MemoryCase, size: Size, device: str, backend: str) -> dict:
    release(device)
    stepper = Stepper(size, case.patterns, device)
    with stepper.compiled(backend):
        found = checked(stepper)
        release(device)
        for _ in range(RECORDED_AFTER):
            stepper.step()
        times = step_times_ms(stepper, case.steps)
    ms, low, high = spread(times)
    return {
        "text": size.text,
        "patterns": list(case.patterns),
        "recompute": size.recompute,
        "tokens": size.batch * size.length,
        "parameters": stepper.parameters,
        "peak_bytes": peak_bytes(device),
        "ms": ms,
        "low": low,
        "high": high,
        **found,
    }


# ---- a run --------------------------------------------------------------------------------------------------------

#: In the order of a run: what a budget of time cuts off is at the end.
ORDER = (*STEPS, *MEMORY)
CASES: dict[str, Case | MemoryCase] = {case.name: case for case in ORDER}


def run(options: argparse.Namespace, names: list[str]) -> None:
    path = options.output.with_suffix(".json")
    result = json.loads(path.read_text()) if path.exists() else {"cases": {}}
    triton = sys.modules.get("triton")
    facts = {
        "device": device_name(options.device),
        "torch": torch.__version__,
        "triton": getattr(triton, "__version__", "not loaded"),
        "python": platform.python_version(),
        "commit": options.commit or commit(),
        "command": f"python3 benchmarks/{Path(sys.argv[0]).name}",
        "note": options.note,
    }
    start = time.monotonic()
    for name in names:
        if time.monotonic() - start > options.budget_seconds:
            print(f"no time left for {name}: run again with --cases {name}")
            continue
        began = time.monotonic()
        # All cases compile the same function, and torch.compile takes only so many variants of one.
        torch.compiler.reset()
        case = tiny(CASES[name]) if options.tiny else CASES[name]
        measured: Callable[..., dict] = measure_memory if isinstance(case, MemoryCase) else measure
        result["cases"][name] = {**facts, **measured(case, options.device, options.backend)}
        write_whole(path, json.dumps(result, indent=1) + "\n")
        release(options.device)
        print(f"{name}: {time.monotonic() - began:.0f} s, {time.monotonic() - start:.0f} s in all", flush=True)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--device", default="cuda")
    parser.add_argument("--cases", default="all", help=f"all, or names with commas: {','.join(CASES)}")
    parser.add_argument("--backend", default="inductor", help="of torch.compile")
    parser.add_argument("--tiny", action="store_true", help="sizes for a test of this script")
    parser.add_argument("--budget-seconds", type=float, default=400.0, help="begin no case after that")
    parser.add_argument("--commit", help="what was measured, where there is no checkout to ask")
    parser.add_argument("--note", help="what a reader of the page should know, such as what else the machine did")
    parser.add_argument("--render", action="store_true", help="write the page again, and measure nothing")
    parser.add_argument("--output", type=Path, default=Path(__file__).parent / "results" / "training")
    options = parser.parse_args()
    names = list(CASES) if options.cases == "all" else options.cases.split(",")
    if unknown := sorted(set(names) - set(CASES)):
        parser.error(f"unknown cases {', '.join(unknown)}: there are {', '.join(CASES)}")
    if not options.render:
        run(options, names)
    result = json.loads(options.output.with_suffix(".json").read_text())
    write_whole(options.output.with_suffix(".md"), render(result))
    print(f"written: {options.output.stem}.json, {options.output.stem}.md")


if __name__ == "__main__":
    main()
