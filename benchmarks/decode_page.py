"""The Markdown page of the decode benchmark, with its aims and whether they are held."""

from __future__ import annotations

import math

#: The aims: attention steps within these times what they took at the shortest length.
FLAT = 1.2
#: (positions, how many times as fast as the fastest dense peer).
FASTER = ((65536, 10.0), (1048576, 50.0))
MODEL_SPEEDUP = 2.0


def render(result: dict) -> str:
    lines = ["# Decoding on a GPU", ""]
    lines += _attention(result["attention"]) if "attention" in result else []
    lines += _models(result["models"]) if "models" in result else []
    lines += _images(result["images"]) if "images" in result else []
    return "\n".join(lines).rstrip() + "\n"


def _facts(part: dict) -> list[str]:
    return [
        f"{part['device']}, torch {part['torch']}, triton {part['triton']}, Python {part['python']}, commit "
        f"{part['commit']}; `{part['command']}`.",
        "",
    ]


def _attention(part: dict) -> list[str]:
    lines = ["## The attention of one layer, one new token a row", "", *_facts(part)]
    lines += [
        f"bfloat16, 8 heads of 64; microseconds, median of {part['rounds']} replays of a CUDA graph with a cold L2 "
        "cache (least to greatest). In brackets: how many times as fast as the fastest dense peer of the same row.",
        "",
    ]
    for batch in dict.fromkeys(row["batch"] for row in part["rows"]):
        rows = [row for row in part["rows"] if row["batch"] == batch]
        lengths = list(dict.fromkeys(row["length"] for row in rows))
        lines += [
            f"Batch {batch}:",
            "",
            "| what | " + " | ".join(f"T = {length:,}" for length in lengths) + " |",
            "|---|" + "---|" * len(lengths),
        ]
        for what in dict.fromkeys(row["what"] for row in rows):
            cells = [_cell(rows, what, length) for length in lengths]
            lines.append(f"| {what} | " + " | ".join(cells) + " |")
        lines.append("")
    lines += ["Aims:", "", *(f"- {aim}" for aim in aims(part["rows"])), ""]
    reasons = {f"{row['what']}: {row['reason']}" for row in part["rows"] if "reason" in row}
    return lines + ([f"Not measured: {'; '.join(sorted(reasons))}.", ""] if reasons else [])


def _cell(rows: list[dict], what: str, length: int) -> str:
    row = next((row for row in rows if (row["what"], row["length"]) == (what, length)), None)
    if row is None or "ms" not in row:
        return "-"
    text = f"{row['ms'] * 1e3:.1f} ({row['low'] * 1e3:.1f} to {row['high'] * 1e3:.1f})"
    dense = fastest_dense(rows, length)
    return text + (f" ({dense / row['ms']:.1f}x)" if row["kind"] == "ours" and dense is not None else "")


def fastest_dense(rows: list[dict], length: int) -> float | None:
    times = [row["ms"] for row in rows if row["kind"] == "dense" and row["length"] == length and "ms" in row]
    return min(times, default=None)


def aims(rows: list[dict]) -> list[str]:
    """Each aim with what was reached, and whether it is held."""
    found = []
    for batch in dict.fromkeys(row["batch"] for row in rows):
        of_batch = [row for row in rows if row["batch"] == batch]
        ours = [row for row in of_batch if row["kind"] == "ours" and "ms" in row]
        lengths = sorted({row["length"] for row in ours})
        for what in dict.fromkeys(row["what"] for row in ours):
            times = {row["length"]: row["ms"] for row in ours if row["what"] == what}
            grown = max(times.values()) / times[lengths[0]]
            allowed = FLAT if what.startswith("Local") else math.sqrt(lengths[-1] / lengths[0])
            word = "held" if grown <= allowed else "missed"
            grown_text = f"{grown:.2f}x the time of T = {lengths[0]:,}"
            found.append(f"batch {batch}, {what}: {grown_text}, {allowed:.1f}x: {word}")
            for length, wanted in FASTER:
                dense = fastest_dense(of_batch, length)
                if dense is not None and length in times:
                    speedup = dense / times[length]
                    word = "held" if speedup >= wanted else "missed"
                    found.append(f"batch {batch}, {what} at {length:,}: {speedup:.1f}x dense, {wanted:.0f}x: {word}")
    return found


def _models(part: dict) -> list[str]:
    rows = part["rows"]
    first = rows[0]
    lines = [
        f"## A whole model at the end of its {first['length']:,} tokens",
        "",
        *_facts(part),
        f"{first['layers']} layers, bfloat16, random weights; every step a CUDA graph; median of {part['rounds']} runs "
        "of 64 steps. The dense model has the same weights and a static cache.",
        "",
        "| batch | what | ms a token | tokens/s | times dense | cache |",
        "|---|---|---|---|---|---|",
    ]
    for row in rows:
        if "ms" not in row:
            lines.append(f"| {row['batch']} | {row['what']} | {row['reason']} | - | - | - |")
            continue
        dense = [r["ms"] for r in rows if r["kind"] == "dense" and r["batch"] == row["batch"] and "ms" in r]
        times = f"{min(dense) / row['ms']:.2f}x" if dense and row["kind"] == "ours" else "-"
        if times != "-" and row["batch"] == 1:
            times += f" ({'held' if min(dense) / row['ms'] >= MODEL_SPEEDUP else 'missed'}: {MODEL_SPEEDUP:.0f}x)"
        spread = f"{row['ms']:.3f} ({row['low']:.3f} to {row['high']:.3f})"
        lines.append(
            f"| {row['batch']} | {row['what']} | {spread} | {row['tokens_per_s']:,.0f} | {times} "
            f"| {row['cache_bytes'] / 2**20:,.0f} MiB |"
        )
    return [*lines, ""]


def _images(part: dict) -> list[str]:
    row = part["rows"][0]
    return [
        "## A batch of images",
        "",
        *_facts(part),
        f"{row['batch']} images of {row['length']:,} bytes by {row['what']}: {row['seconds']:.1f} s, "
        f"{row['tokens_per_s']:,.0f} tokens/s, recording included; the cache took "
        f"{row['cache_bytes'] / 2**20:,.0f} MiB.",
        "",
    ]
