"""docs/results.md and its pictures, from the results of the experiments: nothing on the page is written by hand."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np

from experiment_arms import EXPERIMENTS
from experiment_pictures import (
    draw_context,
    draw_curves,
    draw_images,
    draw_maps,
    draw_spectrogram,
    kind_of,
)
from harness import write_whole

#: Of Child et al. 2019, as the comments of `recipes/` have them: data, model, bits; and the experiment beside it.
PAPER = (
    ("enwik8", "95 M, fixed, T 12,288", 0.99, "text"),
    ("CIFAR-10", "59 M, strided, T 3,072", 2.80, "images"),
    ("ImageNet 64 x 64", "152 M, strided, T 12,288", 3.44, None),
    ("classical music, 5 s", "152 M, strided, T 65,536", 1.97, "audio-65k"),
    ("classical music, 22 s", "25 M, strided, T 262,144", 2.17, "audio-262k"),
    ("classical music, 87 s", "3 M, strided, T 1,048,576", 2.99, "audio-1m"),
)
#: What the paper finds of its patterns, to be held against ours: the better arm, the worse one.
ORDER = {
    "text": (("fixed", "dense"), ("dense", "strided")),
    "images": (("strided", "dense"), ("strided", "fixed")),
}
#: Bits by which one and the same arm differs from run to run: on audio, 2.742 and 2.752.
NOISE = 0.01
OPTIMIZERS = {"adamw": "AdamW", "muon": "Muon and AdamW"}
DIFFERS = {
    "text": "other text (not enwik8), a smaller model, minutes instead of days",
    "images": "fewer, wider layers; minutes of training instead of 120 epochs",
    "audio-65k": "17 minutes of synthesised piano instead of many hours of recordings",
    "audio-262k": "17 minutes of synthesised piano instead of many hours of recordings",
    "audio-1m": "13 minutes of synthesised piano instead of many hours of recordings",
}
SAMPLE_LINES = 30


def write_page(results: Path, docs: Path) -> None:
    """The page ``docs/results.md``, and its pictures and samples in ``docs/results``."""
    found = {name: json.loads(path.read_text()) for name in EXPERIMENTS if (path := results / f"{name}.json").exists()}
    found = {name: result for name, result in found.items() if result["arms"]}
    if not found:
        raise SystemExit(f"there are no results in {results}: run the experiments first")
    lines = [
        "# The paper's experiments, small",
        "",
        "Child et al. 2019 trained for days on eight or more GPUs. Here every arm of an experiment gets the same "
        "minutes of one GPU, the same model and the same schedule, and only its attention differs: what a pattern "
        "saves in time is spent on more tokens. Arms of half the time are whole trainings with half as many steps. "
        "Every arm is `python3 benchmarks/experiments.py --data DATA --only EXPERIMENT --arms ARM`, with seed 0; "
        f"`--prepare` makes DATA. The same arm again comes to bits that differ by up to {NOISE}. Written by `--render` "
        "from `benchmarks/results/experiments/`.",
        "",
        *paper_table(found),
    ]
    for name, result in found.items():
        lines += _experiment(name, result, results, docs)
    write_whole(docs / "results.md", "\n".join(lines).rstrip() + "\n")
    print(f"written: {docs / 'results.md'}")


def best(result: dict) -> tuple[str, dict]:
    """The arm with the fewest bits."""
    return min(result["arms"].items(), key=lambda item: bits_of(item[1]))


def longest(result: dict) -> dict[str, dict]:
    """The arms with the longest windows: those of the paper's length."""
    length = max(arm["recipe"].get("data.context", 0) for arm in result["arms"].values())
    return {name: arm for name, arm in result["arms"].items() if arm["recipe"].get("data.context", 0) == length}


def bits_of(arm: dict) -> float:
    return arm["evaluation"]["bits_per_byte"]


def paper_table(found: dict[str, dict]) -> list[str]:
    """The paper's table 1, as far as it is of its own models, with the best of ours beside it."""
    lines = [
        "## Beside the paper",
        "",
        "Bits per byte or dim; not comparable where the data differ. Ours is the best arm of the paper's length.",
        "",
        "| data | the paper's model | the paper | ours | our model | what differs |",
        "|---|---|---|---|---|---|",
    ]
    for data, model, bits, name in PAPER:
        if name is None or name not in found:
            lines.append(f"| {data} | {model} | {bits:.2f} | - | - | not run |")
            continue
        arm_name, arm = best({"arms": longest(found[name])})
        what = f"{arm['parameters'] / 1e6:.0f} M, {arm_name}, {arm['seconds']:.0f} s"
        lines.append(f"| {data} | {model} | {bits:.2f} | {bits_of(arm):.3f} | {what} | {DIFFERS[name]} |")
    return [*lines, ""]


def orders(name: str, result: dict) -> list[str]:
    """Whether ours are in the paper's order, pair by pair, in words."""
    arms, sentences = result["arms"], []
    for better, worse in ORDER.get(name, ()):
        if better in arms and worse in arms:
            gap = bits_of(arms[worse]) - bits_of(arms[better])
            word = "undecided" if abs(gap) <= NOISE else "confirmed" if gap > 0 else "not confirmed"
            sentences.append(f"the paper has {better} ahead of {worse}: {word} ({gap:+.3f} bits)")
    return sentences


def overtakings(result: dict) -> list[str]:
    """How soon the other arms of dense's length have the bits of validation that dense ends with, in words."""
    arms = result["arms"]
    dense = arms.get("dense")
    if dense is None:
        return []
    sentences = []
    for name, arm in arms.items():
        if arm is dense or arm["recipe"].get("data.context") != dense["recipe"].get("data.context"):
            continue
        share = share_of_time(arm["validation"], dense["validation"])
        sentences.append(
            f"{name} does not reach the bits that dense ends with"
            if share is None
            else f"{name} reaches the bits that dense ends with in {share:.2f} of dense's time (aim: 0.5 or less)"
        )
    return sentences


def share_of_time(curve: list[list[float]], dense: list[list[float]]) -> float | None:
    """When a curve of (seconds, step, bits) comes to the other's last bits, as a share of the other's seconds.

    Between two evaluations the bits are taken to fall evenly. Of two arms of equal time, the curve is held in the
    middle of its schedule, at a high learning rate, against the end of the other's; arms of half the time are not.
    """
    ended, _, wanted = dense[-1]
    before: list[float] | None = None
    for point in curve:
        seconds, _, bits = point
        if bits <= wanted:
            if before is None:
                return seconds / ended
            return (before[0] + (seconds - before[0]) * (before[2] - wanted) / (before[2] - bits)) / ended
        before = point
    return None


def _experiment(name: str, result: dict, results: Path, docs: Path) -> list[str]:
    arms, unit = result["arms"], result["unit"]
    first = next(iter(arms.values()))
    folder = docs / "results"
    lines = [
        f"## {result['title']}",
        "",
        f"{first['device']}, torch {first['torch']}, triton {first['triton']}, commit {first['commit']}. "
        f"{first['wanted_seconds']:.0f} s of training an arm, periodic evaluations included, compiling not; trained on "
        f"{first['data']['tokens']['train']:,} {unit}s.",
        "",
        _recipe_text(first),
        "",
        *_kernels(arms),
        f"| arm | patterns, in turn over the layers | parameters | ms a step | steps | tokens | bits per {unit} |",
        "|---|---|---|---|---|---|---|",
    ]
    for arm_name, arm in sorted(arms.items(), key=lambda item: bits_of(item[1])):
        patterns = _patterns_text(arm["patterns"])
        cut = "" if arm["ended"] == "finished" else f" ({arm['ended']})"
        lines.append(
            f"| {arm_name} | {patterns} | {arm['parameters']:,} | {arm['step_s'] * 1e3:.1f} | {arm['steps']:,}{cut} "
            f"| {arm['tokens'] / 1e6:.1f} M | {bits_of(arm):.4f} |"
        )
    found = first["evaluation"]
    lines += [
        "",
        f"Over {found['counted_bytes']:,} {unit}s of the test split, each predicted from at least "
        f"{found['min_context']:,} others in a window of {found['max_context']:,} (arms of another length: half of "
        f"theirs). `xz -9e` needs {found['xz_bits_per_byte']:.3f}, the {unit}s' frequencies alone "
        f"{found['order0_bits_per_byte']:.3f}.",
        "",
        *(f"- {sentence}" for sentence in (*orders(name, result), *overtakings(result))),
        "",
        f"![bits against seconds and tokens](results/{draw_curves(result, folder / f'{name}-curves.png').name})",
        "",
        *_context_table(result),
        f"![bits by context](results/{draw_context(result, folder / f'{name}-context.png').name})",
        "",
    ]
    if "note" in result:
        lines += [result["note"], ""]
    for arm_name, reason in result.get("failed", {}).items():
        if arm_name not in arms:
            lines += [f"Not trained: {arm_name}: {reason}", ""]
    samples = results / f"{name}.npz"
    if samples.exists():
        with np.load(samples) as arrays:
            lines += _samples(name, result, dict(arrays), folder)
    return lines


def _patterns_text(patterns: list[str]) -> str:
    """Pattern texts, runs of equal ones counted."""
    runs: list[tuple[str, int]] = []
    for text in patterns:
        if runs and runs[-1][0] == text:
            runs[-1] = (text, runs[-1][1] + 1)
        else:
            runs.append((text, 1))
    return "; ".join(text + (f" x {count}" if count > 1 else "") for text, count in runs).replace("|", "\\|")


def _recipe_text(arm: dict) -> str:
    recipe = arm["recipe"]
    value = recipe.get
    return (
        f"{value('model.num_hidden_layers', 4)} layers, d {value('model.hidden_size', 128)}, "
        f"{value('model.num_attention_heads', 4)} heads, block {value('model.block', 'sparse_transformer')}, dropout "
        f"{value('model.dropout', 0.0)}; T {value('data.context', 512):,}, {value('schedule.batch_size', 2)} windows a "
        f"step; {OPTIMIZERS[value('optimizer.name', 'adamw')]}, peak learning rate "
        f"{value('optimizer.learning_rate', 1.5e-3)}, betas {value('optimizer.adam_beta1', 0.9)} and "
        f"{value('optimizer.adam_beta2', 0.95)}, decay {value('optimizer.weight_decay', 0.01)}, "
        f"{value('schedule.warmup_steps', 60)} steps to warm up, a cosine to zero; "
        f"{value('run.precision', 'fp32')}."
    )


def _kernels(arms: dict[str, dict]) -> list[str]:
    """What the arms' attention ran on, where their results say it."""
    found = dict.fromkeys(text for arm in arms.values() for text in arm.get("kernels", ()))
    return [f"Attention runs on: {'; '.join(found)}.", ""] if found else []


def _context_table(result: dict) -> list[str]:
    """The paper's table 3: the loss at positions with at least so much context."""
    lengths = {arm["recipe"].get("data.context", 512) for arm in result["arms"].values()}
    lines: list[str] = []
    for length in sorted(lengths, reverse=True):
        arms = {n: arm for n, arm in result["arms"].items() if arm["recipe"].get("data.context", 512) == length}
        least = [c for c, _ in next(iter(arms.values()))["by_context"]["at_least"]]
        windows = next(iter(arms.values()))["by_context"]["windows"]
        lines += [
            f"Bits by context, as the paper's table 3, over {windows:,} windows of {length:,} spread over the test: "
            "the mean of all predictions with at least so much before them.",
            "",
            "| at least | " + " | ".join(f"{c:,}" for c in least) + " |",
            "|---|" + "---|" * len(least),
            *(
                f"| {name} | " + " | ".join(f"{bits:.4f}" for _, bits in arm["by_context"]["at_least"]) + " |"
                for name, arm in arms.items()
            ),
            "",
        ]
    return lines


def _samples(name: str, result: dict, arrays: dict[str, np.ndarray], folder: Path) -> list[str]:
    """Samples of the best arm that has some, and learned attention of all arms that have maps."""
    arms = result["arms"]
    lines: list[str] = []
    maps = {
        f"{arm}: {key.split('/map/')[1]}": array
        for key, array in arrays.items()
        if "/map/" in key and (arm := key.split("/")[0]) in arms
    }
    if maps:
        path = draw_maps(maps, folder / f"{name}-attention.png")
        lines += [
            "Learned attention, of each kind of pattern the head that looks back furthest, at the beginning of a test "
            "window:",
            "",
            f"![learned attention](results/{path.name})",
            "",
        ]
    with_samples = {arm: row for arm, row in arms.items() if f"{arm}/continued" in arrays}
    if not with_samples:
        return lines
    arm, row = best({"arms": with_samples})
    tokens, facts = arrays[f"{arm}/continued"], row["sampled"]
    kind = kind_of(row)
    lines += [
        f"Samples of `{arm}` at temperature 1, {facts['count']} at once through the cache: "
        f"{facts['tokens_per_s']:,.0f} tokens/s.",
        "",
    ]
    if kind is None:
        return lines + _text(tokens[0], facts["prompt"])
    if kind.name == "images":
        return lines + _images(arm, arrays, facts["prompt"], folder)
    path = folder / f"{name}-sample{kind.sample_suffix}"
    folder.mkdir(parents=True, exist_ok=True)
    kind.write(tokens[0].astype(np.int64), path)
    lines += [f"The model goes on after {facts['prompt']:,} {kind.unit}s: [{path.name}](results/{path.name}).", ""]
    if kind.name == "audio":
        picture = draw_spectrogram(
            tokens[0], facts["prompt"], row["recipe"].get("data.sample_rate_hz", 16_000), folder / f"{name}-sample.png"
        )
        lines += [f"![spectrogram](results/{picture.name})", ""]
    return lines


def _text(tokens: np.ndarray, prompt: int) -> list[str]:
    """A continuation as a block of text, the end of its prompt before it."""
    before = tokens[:prompt].astype(np.uint8).tobytes().decode(errors="replace")[-160:]
    after = tokens[prompt:].astype(np.uint8).tobytes().decode(errors="replace")
    shown = "\n".join(after.splitlines()[:SAMPLE_LINES])
    quoted = [f"    {line}" for line in f"...{before} [the model from here on] {shown}".splitlines()]
    return [*quoted, ""]


def _images(arm: str, arrays: dict[str, np.ndarray], prompt: int, folder: Path) -> list[str]:
    lines = []
    whole = arrays.get(f"{arm}/whole")
    length = arrays["truth"].shape[1]
    if whole is not None and whole.shape[1] == length:
        half = -(-len(whole) // 2)
        path = draw_images([whole[:half], whole[half:]], folder / "images-samples.png")
        lines += [f"![sampled images](results/{path.name})", ""]
    continued, truth = arrays[f"{arm}/continued"], arrays["truth"]
    if continued.shape[1] == length:
        given = truth.copy()
        given[:, prompt:] = 128
        count = min(8, len(truth))
        path = draw_images([given[:count], continued[:count], truth[:count]], folder / "images-completions.png")
        lines += [
            "What the model was given of test images, what it made of it, and the truth:",
            "",
            f"![completions](results/{path.name})",
            "",
        ]
    return lines
