"""Sparse attention on a CUDA device, against the memory floor, dense kernels and every peer: ``make gpu-bench``.

Correctness first, then all rows of a case in turn, round by round. Results are written after every case, and a run of
some cases replaces these in the file that is there. ``--render`` makes the page and the plot again, without a device.
"""

from __future__ import annotations

import argparse
import gc
import importlib.metadata
import json
import platform
import sys
import time
from collections.abc import Callable, Iterable
from dataclasses import dataclass, field, replace
from functools import partial
from pathlib import Path

import torch
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.nn.functional import scaled_dot_product_attention

import correctness
import longstride as ls
from cases import CASES, OVERHEAD, Case, Inputs, chosen
from correctness import Results
from figures import NOTHING, compare
from floor import MEASURES, copy_gbps, metrics
from harness import Clock, commit, device_name, spread, write_whole
from page import plot, render, summary
from peers import OURS, Contender, Offer, choice, dense, flash_attention_4, heard, ours, same_pattern, why

#: A row's rounds are cut so that they take no longer than this together, but never below three.
ROW_MS = 1500.0
#: What the rest of a run is thought to take at least, a case, when a kernel asks for seconds of compiling.
RESERVE_S = 10.0


@dataclass
class Bench:
    """What a run measures with."""

    device: str
    dtype: torch.dtype
    rounds: int
    deadline: float
    clock: Clock = field(init=False)
    gbps: float = field(init=False)
    cases_left: int = 0
    failed: list[str] = field(default_factory=list)

    def __post_init__(self) -> None:
        self.clock = Clock(self.device)
        self.gbps = copy_gbps(self.clock, self.device, copied_bytes=1 << 30 if self.device != "cpu" else 1 << 20)

    def seconds_left(self) -> float:
        return self.deadline - time.monotonic()

    def may_compile(self) -> bool:
        return self.seconds_left() > 15 + RESERVE_S * self.cases_left

    def finish(self, row: dict, series: dict[str, list[tuple[float, float]]], case: Case, pattern: ls.Pattern) -> None:
        """Medians, spreads and what follows from them, into the row."""
        for measure, times in series.items():
            ms, low, high = spread([each for each, _ in times])
            enqueue_ms = spread([each for _, each in times])[0]
            row[measure] = {
                "ms": ms,
                "low": low,
                "high": high,
                "rounds": len(times),
                "enqueue_ms": enqueue_ms,
                "queued_late": self.device != "cpu" and enqueue_ms > self.clock.hidden_ms,
                **metrics(case, pattern, measure, ms, self.gbps),
            }


def row_of(case: Case, offer: Offer) -> dict:
    return {
        "case": case.name,
        "shape": case.shape,
        "length": case.length,
        "scaling": case.scaling,
        "pattern": str(offer.pattern),
        "what": offer.what,
        "kind": offer.kind,
        "backend": None,
        "how": "",
        "errors": {},
        "reason": offer.reason,
    }


# ---- correctness --------------------------------------------------------------------------------------------------


def prove_ours(bench: Bench, case: Case, offer: Offer, inputs: Inputs, row: dict) -> tuple[Contender, Results]:
    """Our contender and its results, or AssertionError where they are wrong."""
    row["backend"], row["how"] = choice(offer.pattern, inputs.q, inputs.k, inputs.v)
    start = time.perf_counter()
    contender = offer.make(inputs)
    _wait(bench)
    row["first_call_s"] = time.perf_counter() - start
    contender.backward()
    _wait(bench)
    row["first_backward_s"] = time.perf_counter() - start - row["first_call_s"]
    with torch.no_grad():
        _, lse = ls.attention(inputs.q, inputs.k, inputs.v, offer.pattern, return_lse=True)
    results = contender.results(lse)
    row["errors"] = correctness.against_rows(offer.pattern, inputs, results)
    row["small_errors"] = correctness.against_reference(case, offer.pattern, bench.device, bench.dtype)
    at_length, at_small = correctness.text(row["errors"]), correctness.text(row["small_errors"])
    print(f"  {case.name} {offer.pattern}: {at_length} at T = {case.length}; {at_small} at a small length", flush=True)
    if not correctness.right(row["errors"]) or not correctness.right(row["small_errors"]):
        raise AssertionError(f"wrong: {at_length} at T = {case.length}; {at_small} at a small length")
    return contender, results


def prove_peer(offer: Offer, inputs: Inputs, expected: Results | None, row: dict) -> tuple[Contender, Results]:
    """A peer's contender, compared with proven results where there are some, and with recomputed rows otherwise."""
    contender = offer.make(inputs)
    results = contender.results()
    if expected is not None:
        row["errors"] = correctness.against(results, expected)
    else:
        row["errors"] = correctness.against_rows(offer.pattern, inputs, results)
    print(f"  {row['case']} {offer.pattern}, {offer.what}: {correctness.text(row['errors'])}", flush=True)
    if not correctness.right(row["errors"]):
        raise AssertionError(f"wrong: {correctness.text(row['errors'])}")
    return contender, results


def attempt(bench: Bench, row: dict, offer: Offer, prove: Callable[[], tuple[Contender, Results]]) -> tuple | None:
    """What `prove` gives, or None with the reason in the row."""
    if offer.reason:
        return None
    if offer.compiles and not bench.may_compile():
        row["reason"] = "not run: no time left to compile it"
        return None
    with heard() as said:
        try:
            return prove()
        except Exception as error:
            row["reason"] = why(error)
    if said:
        row["reason"] += f" ({'; '.join(dict.fromkeys(said))})"[:600]
    print(f"  {row['case']} {offer.pattern}, {offer.what}: not timed: {row['reason'][:160]}", flush=True)
    if offer.kind == OURS:
        bench.failed.append(f"{row['case']} {offer.pattern}: {row['reason']}")
    _release()
    return None


# ---- timing -------------------------------------------------------------------------------------------------------


def time_in_turn(bench: Bench, contenders: Iterable[Contender], rows: Iterable[dict]) -> list[dict[str, list]]:
    """All contenders in turn, round by round, after one round to warm up: series of (ms, enqueue ms) by measure."""
    entries = list(zip(contenders, rows, strict=True))
    series: list[dict[str, list]] = [{measure: [] for measure in MEASURES} for _ in entries]
    rounds = [bench.rounds] * len(entries)
    gc.collect()
    gc.disable()
    try:
        for turn in range(bench.rounds + 1):
            for index, (contender, row) in enumerate(entries):
                if turn > rounds[index] or row["reason"]:
                    continue
                try:
                    times = {m: bench.clock(getattr(contender, m)) for m in MEASURES}
                except Exception as error:
                    row["reason"] = why(error)
                    if row["kind"] == OURS:
                        bench.failed.append(f"{row['case']} {row['pattern']}: {row['reason']}")
                    continue
                if turn == 0:
                    total = sum(ms for ms, _ in times.values())
                    rounds[index] = min(bench.rounds, max(3, int(ROW_MS / max(total, 1e-3))))
                    continue
                for measure, pair in times.items():
                    series[index][measure].append(pair)
    finally:
        gc.enable()
    return series


def measure_case(bench: Bench, case: Case) -> list[dict]:
    """All rows of a case: ours, dense kernels and peers."""
    print(f"{case.name}: {case.shape}", flush=True)
    inputs = Inputs.of(case, bench.device, bench.dtype)
    rows: list[dict] = []
    proven: list[tuple[Contender, dict, ls.Pattern]] = []
    for pattern in case.patterns:
        offer = ours(pattern)
        row = row_of(case, offer)
        rows.append(row)
        made = attempt(bench, row, offer, partial(prove_ours, bench, case, offer, inputs, row))
        expected = None
        if made is not None:
            proven.append((made[0], row, pattern))
            expected = made[1]
        _attempt_all(bench, case, same_pattern(case, pattern), inputs, expected, rows, proven)
        del made, expected
    if not case.extrapolate_from:
        _attempt_all(bench, case, dense(case), inputs, None, rows, proven)
    _release()
    timed = time_in_turn(bench, [c for c, _, _ in proven], [row for _, row, _ in proven])
    for (_, row, pattern), series in zip(proven, timed, strict=True):
        if not row["reason"]:
            bench.finish(row, series, case, pattern)
    del proven, inputs
    _release()
    if case.extrapolate_from:
        rows += extrapolated(bench, case)
    compare(rows)
    if bench.device != "cpu":
        torch._dynamo.reset()  # the compiled kernels of this case, which no other uses
    return rows


def _attempt_all(
    bench: Bench,
    case: Case,
    offers: Iterable[Offer],
    inputs: Inputs,
    expected: Results | None,
    rows: list[dict],
    proven: list[tuple[Contender, dict, ls.Pattern]],
) -> None:
    """Rows for all offers. Without `expected`, the first that is right on recomputed rows is what others must match."""
    for offer in offers:
        row = row_of(case, offer)
        rows.append(row)
        made = attempt(bench, row, offer, partial(prove_peer, offer, inputs, expected, row))
        if made is not None:
            proven.append((made[0], row, offer.pattern))
            expected = expected or made[1]


def extrapolated(bench: Bench, case: Case) -> list[dict]:
    """Dense rows at a length that would take too long: timed at shorter ones, scaled by the square of the lengths."""
    found: dict[str, dict] = {}
    for length in case.extrapolate_from:
        shorter = replace(case, length=length, extrapolate_from=())
        inputs = Inputs.of(shorter, bench.device, bench.dtype)
        rows: list[dict] = []
        proven: list[tuple[Contender, dict, ls.Pattern]] = []
        _attempt_all(bench, shorter, dense(shorter), inputs, None, rows, proven)
        timed = time_in_turn(bench, [c for c, _, _ in proven], [row for _, row, _ in proven])
        for (_, row, _), series in zip(proven, timed, strict=True):
            row["series"] = series
        for row in rows:
            series = row.pop("series", None)
            whole = found.setdefault(row["what"], {**row, "shape": case.shape, "length": case.length, "measured": {}})
            whole["errors"], whole["reason"] = row["errors"], row["reason"]
            if series is None or row["reason"]:
                continue
            factor = (case.length / length) ** 2
            whole["measured"][str(length)] = {m: spread([ms for ms, _ in series[m]])[0] for m in MEASURES}
            whole["extrapolated_from"] = length
            scaled = {m: [(ms * factor, enqueue_ms) for ms, enqueue_ms in series[m]] for m in MEASURES}
            bench.finish(whole, scaled, case, case.dense)
        del proven, inputs
        _release()
    return list(found.values())


def _release() -> None:
    gc.collect()
    if torch.cuda.is_available():
        torch.cuda.empty_cache()


def _wait(bench: Bench) -> None:
    if bench.device != "cpu":
        torch.cuda.synchronize()


# ---- the host's side ----------------------------------------------------------------------------------------------


class Nothing(torch.autograd.Function):
    """What autograd itself costs a function of three tensors in Python: it allocates its results, and no more."""

    @staticmethod
    def forward(ctx, *inputs: torch.Tensor) -> torch.Tensor:  # type: ignore[override]
        ctx.save_for_backward(*inputs)
        return inputs[0].new_empty(inputs[0].shape)

    @staticmethod
    def backward(ctx, _grad: torch.Tensor) -> tuple[torch.Tensor, ...]:  # type: ignore[override]
        return tuple(x.new_empty(x.shape) for x in ctx.saved_tensors)


def overhead(bench: Bench, calls: int = 200, repeats: int = 7) -> dict[str, dict[str, float]]:
    """Microseconds a call that the host takes, warm and without waiting: so small that the device keeps up."""
    torch.manual_seed(0)
    q, k, v, grad_out = (torch.randn(1, 1, 256, 64, device=bench.device, dtype=bench.dtype) for _ in range(4))
    leaves = [x.requires_grad_() for x in (q, k, v)]
    pattern = ls.Strided(16)

    def sdpa() -> torch.Tensor:
        return scaled_dot_product_attention(q, k, v, is_causal=True)

    found: dict[str, dict[str, float]] = {}
    calls_of = {
        "ours": lambda: ls.attention(q, k, v, pattern),
        NOTHING: lambda: Nothing.apply(q, k, v),
        "dense SDPA flash": sdpa,
    }
    for name, attend in calls_of.items():
        with sdpa_kernel(SDPBackend.FLASH_ATTENTION) if "flash" in name else torch.enable_grad():
            out = attend()

            def backward(out: torch.Tensor = out) -> object:
                return torch.autograd.grad(out, leaves, grad_out, retain_graph=True)

            for measure, call in (("forward", attend), ("backward", backward)):
                with torch.set_grad_enabled(measure == "backward"):
                    series = [_us_a_call(bench, call, calls) for _ in range(repeats + 1)][1:]
                us, low, high = spread(series)
                found[f"{name} {measure}"] = {"us": us, "low": low, "high": high}
                print(f"  {name} {measure}: {us:.1f} us of the host's time a call", flush=True)
    return found


def _us_a_call(bench: Bench, call: Callable[[], object], calls: int) -> float:
    _wait(bench)
    start = time.perf_counter()
    for _ in range(calls):
        call()
    elapsed = time.perf_counter() - start
    _wait(bench)
    return elapsed / calls * 1e6


# ---- results ------------------------------------------------------------------------------------------------------


def version(package: str) -> str:
    try:
        return importlib.metadata.version(package)
    except importlib.metadata.PackageNotFoundError:
        return "none"


def started(output: Path, device: str, dtype: str) -> dict:
    """The result that is already there, if it is one of this device; otherwise an empty one."""
    path = output.with_suffix(".json")
    if path.exists():
        result = json.loads(path.read_text())
        if "runs" in result:
            if (result["device"], result["dtype"]) == (device, dtype):
                return result
            print(f"{path.name} is of {result['device']}, {result['dtype']}: it is begun anew", flush=True)
    return {"device": device, "dtype": dtype, "runs": [], "overhead": {}, "rows": []}


def merge(result: dict, this_run: dict, name: str, rows: list[dict]) -> None:
    """Replace one case's rows, and let the run that they came from, and no other, name the case."""
    result["rows"] = [row for row in result["rows"] if row["case"] != name] + rows
    for other in result["runs"]:
        other["cases"] = [case for case in other["cases"] if case != name]
    if all(other is not this_run for other in result["runs"]):
        result["runs"].append(this_run)
    this_run["cases"].append(name)
    result["runs"] = [other for other in result["runs"] if other["cases"]]


def write(result: dict, output: Path, *, draw: bool) -> None:
    picture = output.with_suffix(".png")
    drawn = plot(result, picture) if draw else picture.exists()
    write_whole(output.with_suffix(".json"), json.dumps(result, indent=1) + "\n")
    write_whole(output.with_suffix(".md"), render(result, picture.name if drawn else ""))


def _command(arguments: list[str]) -> str:
    """The command of this run, less where it wrote: that is the machine's own."""
    place = arguments.index("--output") if "--output" in arguments else len(arguments)
    return " ".join(["python3 benchmarks/attention_gpu.py", *arguments[:place], *arguments[place + 2 :]])


def run(options: argparse.Namespace, names: tuple[str, ...], device: str = "cuda") -> int:
    """Measure the cases, write after each, print the summary; 1 where one of ours was wrong or failed."""
    start = time.monotonic()
    bench = Bench(device, torch.bfloat16, options.rounds, start + options.budget_seconds)
    result = started(options.output, device_name(device), "bfloat16")
    this_run = {
        "cases": [],
        "torch": torch.__version__,
        "triton": version("triton"),
        "cuda": torch.version.cuda,
        "python": platform.python_version(),
        "commit": options.commit or commit(),
        "command": _command(sys.argv[1:]),
        "rounds": options.rounds,
        "copy_gbps": bench.gbps,
        "hidden_ms": bench.clock.hidden_ms,
        "absent": {} if flash_attention_4()[0] else {"flash-attn-4": flash_attention_4()[1]},
        "flash_attn_4": version("flash-attn-4"),
    }
    print(f"{result['device']}: copy {bench.gbps:,.0f} GB/s, host hidden up to {bench.clock.hidden_ms:.2f} ms")
    skipped = []
    for index, name in enumerate(names):
        bench.cases_left = len(names) - index
        if bench.seconds_left() < RESERVE_S:
            skipped.append(name)
            continue
        began = time.monotonic()
        if name == OVERHEAD:
            result["overhead"], rows = overhead(bench), []
        else:
            rows = measure_case(bench, CASES[name])
        merge(result, this_run, name, rows)
        write(result, options.output, draw=False)
        print(f"{name}: {time.monotonic() - began:.0f} s, {time.monotonic() - start:.0f} s in all", flush=True)
    write(result, options.output, draw=True)
    print("\n".join(summary(result)))
    for failure in bench.failed:
        print(f"FAILED {failure[:200]}")
    if skipped:
        print(f"no time left for {', '.join(skipped)}: run again with --cases {','.join(skipped)}")
    return 1 if bench.failed else 0


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rounds", type=int, default=20)
    parser.add_argument("--cases", default="all", help="all, scaling, or names with commas: S1,S3,T12288,overhead")
    parser.add_argument("--output", type=Path, default=Path(__file__).parent / "results" / "attention_gpu")
    parser.add_argument("--budget-seconds", type=float, default=470.0, help="begin nothing long after that")
    parser.add_argument("--commit", help="what was measured, where there is no checkout to ask")
    parser.add_argument("--render", action="store_true", help="only make the page and the plot from the JSON")
    options = parser.parse_args()
    try:
        names = chosen(options.cases)
    except ValueError as error:
        parser.error(str(error))
    if options.render:
        result = json.loads(options.output.with_suffix(".json").read_text())
        if "runs" not in result:
            sys.exit(f"{options.output.stem}.json is of an older form: measure again")
        write(result, options.output, draw=True)
        return 0
    if not torch.cuda.is_available():
        sys.exit("no CUDA device here: run this on a machine with one; --render needs none")
    return run(options, names)


if __name__ == "__main__":
    sys.exit(main())
