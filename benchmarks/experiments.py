"""The paper's experiments as arms of equal wall time: ``python3 benchmarks/experiments.py --data FOLDER --only text``.

Each arm is trained by `longstride.training.train`, with the schedule that its measured step time fits into the time,
then evaluated, sampled and drawn. Results are written after every arm, and a run skips the arms that are there.
``--prepare`` makes the data from files of their own formats; ``--render`` makes docs/results.md and its pictures.
"""

from __future__ import annotations

import argparse
import gc
import json
import math
import platform
import sys
import tempfile
import time
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import torch
from transformers.utils import logging

from experiment_arms import EXPERIMENTS, Arm, Experiment, tiny
from experiment_measures import attention_maps, bits_by_context, draw, for_sampling, nats_by_position, prompts_of
from experiments_page import write_page
from harness import commit, device_name, write_whole
from longstride.data import EvenWindows, PreparedData, decode_source, make_kind, open_source, prepare
from longstride.training import (
    Recipe,
    RunFolder,
    TrainingResult,
    evaluate,
    parse_assignments,
    resolve_device,
    train,
)
from peers import kernels_of, why

#: Steps before an arm that measure its time, and of these the first, which compile, allocate and warm up.
MEASURED_STEPS, WARM_STEPS = 40, 20
#: Periodic evaluations of an arm, the last one after its last step.
EVALUATIONS = 12
RESULTS = Path(__file__).parent / "results" / "experiments"
DOCS = Path(__file__).parents[1] / "docs"

#: What --prepare reads below its folder: the name, the kind and the settings of the data, and the longest window.
SOURCES: dict[str, tuple[str, str | None, dict[str, Any], int]] = {
    "wiki": ("wiki.txt", None, {}, 12288),
    "cifar10": ("cifar-10-batches-bin", "images", {}, 3072),
    "audio": ("piano", "audio", {"sample_rate_hz": 12_000}, 262_144),
    # Its folder's test/ and validation/ hold a piece each: a tenth of all is too short for such windows.
    "audio-by-piece": ("piano-by-piece", "audio", {"sample_rate_hz": 12_000}, 1 << 20),
    "midi": ("midi", "midi", {}, 8192),
}
PLACES = ", ".join(place for place, *_ in SOURCES.values())


class Watch:
    """When each step and each evaluation of a training ended, in seconds of a clock of its own.

    Steps whose training loss was read are true times: the reading waits for the device.
    """

    def __init__(self) -> None:
        self.steps: list[tuple[float, int, float]] = []
        self.evaluations: list[tuple[float, int, float]] = []

    def __call__(self, step: int, train_bits: float | None, validation_bits: float | None) -> None:
        now = time.perf_counter()
        if train_bits is not None:
            self.steps.append((now, step, train_bits))
        if validation_bits is not None:
            self.evaluations.append((now, step, validation_bits))


def trained(recipe: Recipe, data: PreparedData, say: Callable[[str], None]) -> tuple[TrainingResult, Watch]:
    """One training in a folder that is thrown away."""
    watch = Watch()
    with tempfile.TemporaryDirectory() as place:
        folder = RunFolder(Path(place) / "run")
        folder.start(recipe)
        result = train(recipe, data, folder, say, watch)
    return result, watch


def measure_step(recipe: Recipe, data: PreparedData, quick: bool) -> dict[str, float]:
    """Seconds of a step and of a periodic evaluation, from a short training that compiles everything."""
    steps, warm = (4, 2) if quick else (MEASURED_STEPS, WARM_STEPS)
    began = time.perf_counter()
    short = {"schedule.steps": steps, "run.evaluate_every": warm, "run.log_every": warm // 2}
    _, watch = trained(recipe.override(short), data, lambda _: None)
    # The first evaluation, at `warm`, warms up; the steps after it are timed, and the evaluation at the end.
    (after_evaluation, _, _), (ended, _, _) = watch.evaluations
    last = watch.steps[-1][0]
    return {
        "step_s": (last - after_evaluation) / (steps - warm),
        "evaluation_s": ended - last,
        "preparation_s": time.perf_counter() - began,
    }


def run_arm(experiment: Experiment, arm: Arm, data: PreparedData, quick: bool) -> tuple[dict, dict[str, np.ndarray]]:
    """An arm's results, as JSON and as arrays."""
    # Arms compile the same function, and torch.compile takes only so many variants of one.
    torch.compiler.reset()
    recipe = experiment.recipe_of(arm)
    cuda = resolve_device(recipe.run.device).type == "cuda"
    measured = measure_step(recipe, data, quick)
    release(cuda)
    seconds = arm.share * experiment.seconds
    training_s = seconds - EVALUATIONS * measured["evaluation_s"]
    steps = max(2 * EVALUATIONS, int(training_s / measured["step_s"]))
    recipe = recipe.override(
        {
            "schedule.steps": steps,
            "run.evaluate_every": math.ceil(steps / EVALUATIONS),
            # Against a step time that was measured badly.
            "run.time_limit_s": 1.3 * seconds + 30,
        }
    )
    say(f"{arm.name}: {measured['step_s'] * 1e3:.1f} ms a step, {steps:,} steps")
    result, watch = trained(recipe, data, say)
    peak_bytes = torch.cuda.max_memory_allocated() if cuda else 0
    # The clock starts one step before the end of the first steps that were reported.
    start = watch.steps[0][0] - measured["step_s"] * watch.steps[0][1]
    per_step = recipe.schedule.batch_size * recipe.schedule.gradient_accumulation_steps * recipe.data.context
    row = {
        "patterns": list(arm.patterns),
        "kernels": kernels(recipe, cuda),
        "recipe": {key: value for key, value in recipe.items() if _said(key, value)},
        "parameters": sum(parameter.numel() for parameter in result.model.parameters()),
        **measured,
        "steps": result.step,
        "ended": result.ended,
        "seconds": max(watch.steps[-1][0], watch.evaluations[-1][0]) - start,
        "tokens_per_step": per_step,
        "tokens": result.step * per_step,
        "peak_bytes": peak_bytes,
        "training": [[at - start, step, bits] for at, step, bits in watch.steps],
        "validation": [[at - start, step, bits] for at, step, bits in watch.evaluations],
    }
    model = result.model.eval()
    device_type = model.device.type
    with torch.autocast(device_type, torch.bfloat16, enabled=cuda):
        row |= measure_bits(experiment, recipe, model, data)
    arrays: dict[str, np.ndarray] = {}
    # What fails here must not cost the arm.
    for what in (sampled, mapped):
        try:
            facts, found = what(experiment, arm, recipe, model, data)
        except Exception as error:
            facts, found = {what.__name__: {"reason": why(error)}}, {}
            say(f"{arm.name}: {what.__name__}: {why(error)}")
        row |= facts
        arrays |= found
    return row, arrays


def kernels(recipe: Recipe, cuda: bool) -> list[str]:
    """What attention runs on."""
    model, heads = recipe.model, recipe.model.num_attention_heads
    shape = (recipe.schedule.batch_size, heads, recipe.data.context)
    qk_dim = (model.qk_hidden_size or model.hidden_size) // heads
    return kernels_of(model.patterns, shape, qk_dim, model.hidden_size // heads, "cuda" if cuda else "cpu")


def _said(key: str, value: Any) -> bool:
    """What a reader of the results must be told: what differs from the defaults, and how it was trained."""
    return key.startswith("optimizer.") or value != Recipe().value(key)


def measure_bits(experiment: Experiment, recipe: Recipe, model: Any, data: PreparedData) -> dict:
    """Bits per token of the test split, with the least context that every prediction had, and by context."""
    context, batch = recipe.data.context, recipe.schedule.batch_size
    test = data.split("test")[: experiment.evaluation_tokens]
    least = context // 2 if data.record == 1 else 1
    found = evaluate(
        model, test, context=context, min_context=least, batch_size=batch, record=data.record, unit=data.unit
    )
    windows = EvenWindows(data.split("test"), context, max(1, len(test) // context), data.record)
    nats, count = nats_by_position(model, windows, batch)
    say(f"  {found.bits_per_byte:.4f} bits per {data.unit} with at least {least:,} {data.unit}s of context")
    return {"evaluation": found.__dict__, "by_context": {"windows": count, **bits_by_context(nats)}}


def sampled(
    experiment: Experiment, arm: Arm, recipe: Recipe, model: Any, data: PreparedData
) -> tuple[dict, dict[str, np.ndarray]]:
    """Continuations of windows of the test split; of images, also whole ones from their first byte."""
    copy = for_sampling(model)
    prompts = prompts_of(data, recipe.data.context, experiment.prompt, experiment.count)
    dtype = np.uint8 if copy.config.vocab_size <= 256 else np.uint16
    tokens, facts = draw(copy, prompts, experiment.drawn, experiment.sample_seconds)
    arrays = {f"{arm.name}/continued": tokens.astype(dtype)}
    if data.kind == "images":
        whole, facts["whole"] = draw(copy, prompts[:, :1], recipe.data.context - 1, experiment.sample_seconds)
        arrays[f"{arm.name}/whole"] = whole.astype(dtype)
        truth = prompts_of(data, recipe.data.context, recipe.data.context, experiment.count)
        arrays["truth"] = truth.numpy().astype(dtype)
    say(f"  {facts['drawn']:,} tokens of {experiment.count} samples: {facts['seconds']:.1f} s")
    return {"sampled": {"prompt": experiment.prompt, "count": experiment.count, **facts}}, arrays


def mapped(
    _: Experiment, arm: Arm, recipe: Recipe, model: Any, data: PreparedData
) -> tuple[dict, dict[str, np.ndarray]]:
    """Learned attention of the arms that ask for it."""
    if not arm.maps:
        return {}, {}
    window = prompts_of(data, recipe.data.context, recipe.data.context, 1)[0]
    found = attention_maps(for_sampling(model), window)
    arrays = {f"{arm.name}/map/{text}": picture for text, (picture, _) in found.items()}
    return {"maps": {text: facts for text, (_, facts) in found.items()}}, arrays


def release(cuda: bool) -> None:
    gc.collect()
    if cuda:
        torch.cuda.empty_cache()
        torch.cuda.reset_peak_memory_stats()


def say(line: str) -> None:
    print(line, flush=True)


def run(experiment: Experiment, options: argparse.Namespace) -> None:
    """All arms that are not there yet, in order."""
    path = options.output / f"{experiment.name}.json"
    samples_path = path.with_suffix(".npz")
    result: dict = {"title": experiment.title, "unit": experiment.unit, "arms": {}}
    if path.exists():
        result = json.loads(path.read_text())
    arrays = dict(np.load(samples_path)) if samples_path.exists() else {}
    data = PreparedData.open(options.data / experiment.data)
    say(f"{experiment.title}: {data.describe()}")
    triton = sys.modules.get("triton")
    device = "cpu" if options.tiny else "cuda"
    for arm in experiment.arms:
        if arm.name in result["arms"] or (options.arms and arm.name not in options.arms):
            continue
        began = time.monotonic()
        facts = {
            "device": device_name(device),
            "torch": torch.__version__,
            "triton": getattr(triton, "__version__", "not loaded"),
            "python": platform.python_version(),
            "commit": options.commit or commit(),
            "wanted_seconds": arm.share * experiment.seconds,
            "data": {"tokens": data.tokens, "method": data.method},
        }
        try:
            row, found = run_arm(experiment, arm, data, options.tiny)
        except Exception as error:  # the other arms go on
            say(f"{experiment.name}, {arm.name}: {why(error)}")
            result.setdefault("failed", {})[arm.name] = why(error)
            row = None
        if row is not None:
            result["arms"][arm.name] = {**facts, **row}
            arrays |= found
            np.savez_compressed(samples_path.with_suffix(".part.npz"), **arrays)
            samples_path.with_suffix(".part.npz").replace(samples_path)
        write_whole(path, json.dumps(result, indent=1) + "\n")
        release(device == "cuda")
        say(f"{experiment.name}, {arm.name}: {time.monotonic() - began:.0f} s")


def prepare_all(source: Path, target: Path) -> None:
    """The splits of whatever `SOURCES` finds below ``source``, as the experiments read them."""
    for name, (place, kind_name, settings, context) in SOURCES.items():
        if not (source / place).exists():
            say(f"{name}: no {source / place}")
            continue
        if kind_name is None:
            opened: Any = open_source(source / place)
        else:
            with tempfile.TemporaryDirectory() as cache:
                kind = make_kind(kind_name, context, settings)
                opened = decode_source(source / place, kind, cache=Path(cache))
                say(prepare(replace(opened, name=place), target / name, context).describe())
            continue
        data = prepare(opened, target / name, context)
        splits = data.folder / "splits.json"
        # Not where it lay on this machine.
        splits.write_text(json.dumps({**json.loads(splits.read_text()), "source": place}, indent=2) + "\n")
        say(PreparedData.open(target / name).describe())


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--data", type=Path, help="the folder of the prepared data")
    parser.add_argument(
        "--prepare", type=Path, metavar="SOURCE", help=f"make --data of the files below SOURCE: {PLACES}"
    )
    parser.add_argument("--only", default="all", help=f"all, or names with commas: {','.join(EXPERIMENTS)}")
    parser.add_argument("--arms", type=lambda text: text.split(";"), help="names with semicolons; all unless given")
    parser.add_argument("--seconds", type=float, help="of training an arm; each experiment has its own")
    parser.add_argument("--set", action="append", default=[], metavar="KEY=VALUE", help="of the recipe of every arm")
    parser.add_argument("--tiny", action="store_true", help="sizes for a test of this script, on the CPU")
    parser.add_argument("--commit", help="what was measured, where there is no checkout to ask")
    parser.add_argument("--render", action="store_true", help="make the page and the pictures, and train nothing")
    parser.add_argument("--docs", type=Path, default=DOCS, help="the folder of the page")
    parser.add_argument("--output", type=Path, default=RESULTS)
    options = parser.parse_args()
    names = list(EXPERIMENTS) if options.only == "all" else options.only.split(",")
    if unknown := sorted(set(names) - set(EXPERIMENTS)):
        parser.error(f"unknown experiments {', '.join(unknown)}: there are {', '.join(EXPERIMENTS)}")
    if options.render:
        write_page(options.output, options.docs)
        return
    if options.data is None:
        parser.error("name the folder of the prepared data with --data")
    if options.prepare is not None:
        prepare_all(options.prepare, options.data)
        return
    # The bars of writing a few small files would stand between the lines of the arms.
    logging.disable_progress_bar()
    options.output.mkdir(parents=True, exist_ok=True)
    for name in names:
        experiment = tiny(EXPERIMENTS[name]) if options.tiny else EXPERIMENTS[name]
        experiment = replace(experiment, recipe={**experiment.recipe, **parse_assignments(options.set)})
        if options.seconds is not None:
            experiment = replace(experiment, seconds=options.seconds)
        if not (options.data / experiment.data).is_dir():
            say(f"{name}: no data in {options.data / experiment.data}")
            continue
        run(experiment, options)


if __name__ == "__main__":
    main()
