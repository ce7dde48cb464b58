"""The Markdown page of the training benchmark, with its aims and whether they are held."""

from __future__ import annotations

from training_profile import PARTS
from training_steps import DENSE, NONE, SDPA

#: Times as fast as the fastest dense step, by case; the attention tax that every sparse step should keep to.
SPEEDUPS = {"T12288": 2.5, "T12288-30": 2.5, "T65536": 9.0, "T65536-30": 9.0, "T3072-image": 1.2}
TAX = 1.15
#: GiB at most of the deep models, and of the device for the longest one.
DEEP_GIB, LONG_GIB = 16, 80
LONG_PARAMETERS = 25e6


def render(result: dict) -> str:
    cases = result["cases"]
    lines = ["# Training steps", ""]
    for name, case in cases.items():
        if "rows" in case:
            lines += _steps(name, case)
    memory = {name: case for name, case in cases.items() if "rows" not in case}
    if memory:
        lines += _memory(memory)
    return "\n".join(lines).rstrip() + "\n"


def _facts(case: dict) -> str:
    return (
        f"{case['device']}, torch {case['torch']}, triton {case['triton']}, Python {case['python']}, commit "
        f"{case['commit']}; `{case['command']}`."
    ) + (f" {case['note']}" if case.get("note") else "")


def fastest(case: dict, names: tuple[str, ...]) -> float | None:
    return min((row["ms"] for row in case["rows"] if row["what"] in names and "ms" in row), default=None)


def _steps(name: str, case: dict) -> list[str]:
    size = case["size"]
    dense, none = fastest(case, (DENSE, SDPA)), fastest(case, (NONE,))
    lines = [
        f"## {name}: {case['text']}",
        "",
        _facts(case),
        "",
        "A step is forward, backward, clipping and AdamW of the paper's block in bf16 autocast, compiled, without "
        f"dropout; recomputed in the backward pass: {size['recompute']}. "
        "Forward and backward are replayed as one CUDA graph. Median (least to greatest). `none` is the same model "
        "with the attention replaced by its values, so that a step over it is the attention tax.",
        "",
        "| attention | layers' patterns | ms a step | tokens/s | times dense | tax | peak memory |",
        "|---|---|---|---|---|---|---|",
    ]
    for row in case["rows"]:
        patterns = "; ".join(row["patterns"]).replace("|", "\\|")
        if "ms" not in row:
            lines.append(f"| {row['what']} | {patterns} | {row['reason']} | - | - | - | - |")
            continue
        ms = row["ms"]
        times = f"{dense / ms:.2f}x" if dense else "-"
        tax = f"{ms / none:.3f}" if none else "-"
        tokens = size["batch"] * size["length"] / ms * 1e3
        spread = f"{ms:.2f} ({row['low']:.2f} to {row['high']:.2f})"
        memory = f"{row['peak_bytes'] / 2**30:.1f} GiB"
        lines.append(f"| {row['what']} | {patterns} | {spread} | {tokens:,.0f} | {times} | {tax} | {memory} |")
    backends = sorted({text for row in case["rows"] for text in row["how"]})
    lines += ["", f"Attention runs on: {'; '.join(backends)}.", ""]
    lines += [f"- {aim}" for aim in aims(name, case)]
    lines += ["", *(_breakdown(case) if "breakdown" in case else [])]
    return lines


def aims(name: str, case: dict) -> list[str]:
    """Each aim of a case with what was reached, and whether it is held."""
    dense, none = fastest(case, (DENSE, SDPA)), fastest(case, (NONE,))
    found = []
    for row in case["rows"]:
        if row["what"] in (DENSE, SDPA, NONE) or "ms" not in row:
            continue
        if dense and name in SPEEDUPS:
            reached, wanted = dense / row["ms"], SPEEDUPS[name]
            word = "held" if reached >= wanted else "missed"
            found.append(f"{row['what']}: {reached:.2f} times as fast as dense, aim {wanted:g}: {word}")
        if none:
            tax = row["ms"] / none
            found.append(f"{row['what']}: tax {tax:.3f}, aim {TAX:g}: {'held' if tax <= TAX else 'missed'}")
    return found


def _breakdown(case: dict) -> list[str]:
    found = case["breakdown"]
    total = sum(found["ms"].values())
    step = next(row["ms"] for row in case["rows"] if row["what"] == found["what"])
    lines = [
        f"Where the time of `{found['what']}` goes, by `torch.profiler` over {found['steps']} compiled steps that are "
        "launched kernel by kernel: kernels by the operator that launched them; a matrix product by its widths; other "
        "fused kernels by their names.",
        "",
        "| part | ms a step | share |",
        "|---|---|---|",
        *(f"| {part} | {found['ms'][part]:.2f} | {found['ms'][part] / total:.1%} |" for part in PARTS),
        f"| all kernels | {total:.2f} | {total / step:.1%} of the step |",
        "",
        limits(found["ms"], step),
        "",
    ]
    return lines


def limits(parts: dict[str, float], step_ms: float) -> str:
    """What a step is limited by, in a sentence that the breakdown supports."""
    total = sum(parts.values())
    products = parts["projections"] + parts["feed-forward"]
    if total < 0.9 * step_ms:
        busy = f"The device computes for {total / step_ms:.0%} of the step"
        return f"{busy}: the host, which launches the kernels, limits it."
    largest = max(parts, key=lambda part: parts[part])
    return (
        f"The device is busy all the time; {products / total:.0%} of it is projections and feed-forward networks, "
        f"which no attention can shorten, {parts['attention'] / total:.0%} attention; the largest part is {largest}."
    )


def _memory(cases: dict[str, dict]) -> list[str]:
    lines = [
        "## Peak memory",
        "",
        *dict.fromkeys(_facts(case) for case in cases.values()),
        "",
        "Of PyTorch's allocator, over whole steps (weights, gradients and AdamW's two moments included), the counter "
        "reset after the first step.",
        "",
        "| model | patterns | recomputed | parameters | peak | s a step | tokens/s |",
        "|---|---|---|---|---|---|---|",
    ]
    for case in cases.values():
        patterns = "; ".join(case["patterns"])
        if "ms" not in case:
            lines.append(f"| {case['text']} | {patterns} | {case['reason']} | - | - | - | - |")
            continue
        peak, tokens_per_s = f"{case['peak_bytes'] / 2**30:.2f} GiB", case["tokens"] / case["ms"] * 1e3
        lines.append(
            f"| {case['text']} | {patterns} | {case['recompute']} | {case['parameters']:,} | {peak} "
            f"| {case['ms'] / 1e3:.2f} | {tokens_per_s:,.0f} |"
        )
    return [*lines, "", *(f"- {aim}" for aim in memory_aims(cases)), ""]


def memory_aims(cases: dict[str, dict]) -> list[str]:
    """Each aim on memory with what was reached, and whether it is held."""
    found = []
    for name, case in cases.items():
        if "ms" not in case:
            found.append(f"{name}: {case['reason']}: missed")
            continue
        gib = case["peak_bytes"] / 2**30
        allowed = DEEP_GIB if name.startswith("128") else LONG_GIB
        enough = name.startswith("128") or case["parameters"] >= LONG_PARAMETERS
        word = "held" if gib < allowed and enough else "missed"
        found.append(f"{name}: {gib:.2f} GiB, aim below {allowed}: {word}")
    return found
