"""``longstride train``: from a recipe and a folder of anything to a model, its curve, its figures and its samples."""

import json
import os
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from longstride.data import KINDS
from longstride.errors import DataError

if TYPE_CHECKING:
    from longstride.data import ByteSource, DecodedSource, PreparedData
    from longstride.models import SparseTransformerForCausalLM
    from longstride.training import Evaluation, Recipe, RunFolder

# A picture of more positions than these has cells too small to see.
PICTURE_LENGTH = 128


def train(
    recipe: Annotated[
        Path | None, typer.Option(help="A recipe (YAML) with the values that differ from the defaults.")
    ] = None,
    data: Annotated[
        Path | None,
        typer.Option(
            help="A file or folder of anything. Without it: the source of Python's own standard library on this "
            "machine."
        ),
    ] = None,
    kind: Annotated[
        str | None,
        typer.Option(
            help="How --data is read: " + ", ".join(KINDS) + ". Without it the files' names decide where they leave "
            "no doubt, and bytes do otherwise."
        ),
    ] = None,
    output: Annotated[Path, typer.Option(help="The folder for all results; it must not hold a run yet.")] = Path(
        "runs/latest"
    ),
    resume: Annotated[
        bool, typer.Option("--resume", help="Go on with the interrupted run in --output, from its last checkpoint.")
    ] = False,
    sample_rate: Annotated[int | None, typer.Option(help="Of audio: samples a second, after resampling.")] = None,
    steps: Annotated[int | None, typer.Option(help="Updates of the weights.")] = None,
    batch_size: Annotated[int | None, typer.Option(help="Windows in a batch.")] = None,
    context: Annotated[
        int | None, typer.Option(help="Bytes (or tokens) in a window: how far the model can look back.")
    ] = None,
    on_corrupt: Annotated[
        str | None, typer.Option(help="Corrupt files: skip (named and counted) or stop at the first.")
    ] = None,
    pattern: Annotated[
        list[str] | None,
        typer.Option(
            "--pattern",
            metavar="PATTERN",
            help="An attention pattern such as 'Local(32) | Strided(16)'; given again, layers alternate.",
        ),
    ] = None,
    scale: Annotated[
        str | None,
        typer.Option(
            help="About so many times the parameters, 1/64 to 4: the model's widths and its depth by the cube root of "
            "it. Heads, context, batch and learning rate stay."
        ),
    ] = None,
    lr: Annotated[float | None, typer.Option(help="The peak learning rate.")] = None,
    device: Annotated[str | None, typer.Option(help="auto, cpu, cuda or mps.")] = None,
    precision: Annotated[str | None, typer.Option(help="fp32, bf16 or fp16.")] = None,
    seed: Annotated[int | None, typer.Option(help="Another seed: other first weights, windows and samples.")] = None,
    time_limit: Annotated[
        float | None, typer.Option(help="Stop training after so many seconds, then evaluate and sample as usual.")
    ] = None,
    tensorboard: Annotated[bool, typer.Option("--tensorboard", help="Write TensorBoard event files too.")] = False,
    assignments: Annotated[
        list[str] | None,
        typer.Option(
            "--set",
            metavar="KEY=VALUE",
            help="Any other value of the recipe, such as --set model.hidden_size=256; repeatable.",
        ),
    ] = None,
) -> None:
    """Train a Sparse Transformer on bytes, or on images, sound, music or tables.

    Everything has a default: `longstride train` alone trains a small model on Python's own source in a few minutes.
    Press Ctrl-C at any time: the run can go on later with --resume and ends as if nothing had happened.

    The output folder gets the model, the recipe with every value, metrics.jsonl, a loss curve, a picture of the
    attention patterns, samples, and the evaluation on text that the model has not seen.
    """
    from longstride.training import (
        RunFolder,
        check_precision,
        check_recording,
        model_config,
        parse_assignments,
        resolve_device,
    )

    overrides = parse_assignments(assignments or [])
    flags: dict[str, Any] = {
        "data.path": None if data is None else str(data),
        "data.kind": kind,
        "data.context": context,
        "data.on_corrupt": on_corrupt,
        "data.sample_rate_hz": sample_rate,
        "model.patterns": tuple(pattern) if pattern else None,
        "optimizer.learning_rate": lr,
        "schedule.steps": steps,
        "schedule.batch_size": batch_size,
        "run.device": device,
        "run.precision": precision,
        "run.seed": seed,
        "run.time_limit_s": time_limit,
        "run.tensorboard": True if tensorboard else None,
    }
    overrides.update({key: value for key, value in flags.items() if value is not None})

    folder = RunFolder(output)
    chosen = _choose_kind(_choose_recipe(folder, recipe, scale, overrides, resume), guess=not resume)
    # Everything that can be wrong with the recipe shows before anything is written.
    model_config(chosen)
    machine = resolve_device(chosen.run.device)
    check_precision(chosen.run.precision, machine)
    check_recording(chosen.run.cuda_graph, machine)
    try:
        prepared = _prepare(folder, chosen, resume)
        _say(prepared.describe())
        ended = _train_and_finish(chosen, prepared, folder)
    except KeyboardInterrupt:
        # Before or after the training, or the second time.
        ended = "interrupted"
        _say("\nInterrupted.")
    if ended != "finished":
        _say(f"To go on: {_resume_command(output)}")
    if ended == "interrupted":
        raise typer.Exit(130)


def _train_and_finish(recipe: "Recipe", data: "PreparedData", folder: "RunFolder") -> str:
    """How the training ended: see `TrainingResult`."""
    from transformers.utils import logging

    from longstride.models import parameter_count
    from longstride.training import model_config, resolve_device, train

    # The bars of writing and reading a few small files would break ours.
    logging.disable_progress_bar()
    config = model_config(recipe)
    _say(
        f"Model: {parameter_count(config).total:,} parameters, {config.num_hidden_layers} layers, context "
        f"{config.max_position_embeddings:,} {data.unit}s, patterns {'; '.join(config.patterns)}."
    )
    _say(
        f"Training: {recipe.schedule.steps:,} steps of {recipe.schedule.batch_size} windows on "
        f"{resolve_device(recipe.run.device)} in {recipe.run.precision}, into {_shown(folder.path)}."
    )
    result = train(recipe, data, folder, _say)
    if result.ended == "interrupted":
        _say(f"Interrupted after step {result.step:,} of {recipe.schedule.steps:,}; everything is saved.")
        return result.ended
    if result.ended == "time limit":
        _say(f"The time limit of {recipe.run.time_limit_s:g} s ended the training at step {result.step:,}.")
    _finish(recipe, data, folder, result.model, result.step, result.train_bytes_per_s)
    return result.ended


def _choose_recipe(
    folder: "RunFolder", file: Path | None, scale: str | None, overrides: dict[str, Any], resume: bool
) -> "Recipe":
    from longstride.errors import ArgumentError
    from longstride.training import Recipe, read_recipe, read_scale, scaled

    if not resume:
        started = read_recipe(file) if file is not None else Recipe()
        if scale is not None:
            started = scaled(started, read_scale(scale))
        return started.override(overrides)
    if scale is not None:
        raise ArgumentError(f"--scale {scale} with --resume: a run goes on with its own model; leave --scale out")
    if file is not None:
        raise ArgumentError(f"--recipe {file} with --resume: a run goes on with its own recipe; leave --recipe out")
    started = folder.started_with()
    # A time limit is for one sitting.
    chosen = started.override({"run.time_limit_s": None, **overrides})
    chosen.check_resumable(started)
    return chosen


def _choose_kind(recipe: "Recipe", guess: bool) -> "Recipe":
    """The recipe with its kind of data: named, guessed and said, or bytes."""
    from longstride.data import guess_kind
    from longstride.errors import ArgumentError

    if recipe.data.path is None and recipe.data.kind not in (None, "bytes"):
        raise ArgumentError(f"--kind {recipe.data.kind} without --data: name the file or folder to read")
    if recipe.data.kind is not None or not guess:
        return recipe
    if recipe.data.path is None:
        return recipe.override({"data.kind": "bytes"})
    kind, why = guess_kind(Path(recipe.data.path))
    if kind != "bytes":
        _say(f"Taking {recipe.data.path} for {kind} {why}; --kind bytes reads it as bytes.")
    return recipe.override({"data.kind": kind})


def _prepare(folder: "RunFolder", recipe: "Recipe", resume: bool) -> "PreparedData":
    from longstride.data import PreparedData, prepare, split_source

    if resume:
        folder.write_recipe(recipe)
        if folder.data.exists():
            return PreparedData.open(folder.data)
    _check_not_inside(folder.path, recipe)
    source = _open_source(recipe)
    split_source(source, shortest=recipe.data.context)
    if not resume:
        folder.start(recipe)
    return prepare(source, folder.data, recipe.data.context)


def _open_source(recipe: "Recipe") -> "ByteSource | DecodedSource":
    from longstride.data import decode_source, open_source
    from longstride.training import kind_of

    path = None if recipe.data.path is None else Path(recipe.data.path)
    kind = kind_of(recipe)
    if kind is None or path is None:
        return open_source(path)
    source = decode_source(path, kind, on_corrupt=recipe.data.on_corrupt)
    for line in source.describe():
        _say(line)
    return source


def _check_not_inside(output: Path, recipe: "Recipe") -> None:
    """A run that wrote into its own data would learn its own checkpoints the next time."""
    if recipe.data.path is not None and output.resolve().is_relative_to(Path(recipe.data.path).resolve()):
        raise DataError(f"--output {output} lies inside --data {recipe.data.path}: choose an --output elsewhere")


def _finish(
    recipe: "Recipe",
    data: "PreparedData",
    folder: "RunFolder",
    model: "SparseTransformerForCausalLM",
    step: int,
    train_bytes_per_s: float | None,
) -> None:
    """Everything after the training; done again from the last checkpoint if it is interrupted."""
    from longstride.cli.continuations import write_continuations
    from longstride.data import written_whole
    from longstride.models import layer_patterns
    from longstride.plotting import plot_loss, plot_schedule
    from longstride.training import evaluate_as_trained

    with written_whole(folder.model) as unfinished:
        model.save_pretrained(unfinished)
    plot_loss(folder.metrics, folder.loss_picture)
    plot_schedule(
        layer_patterns(model.config),
        min(recipe.data.context, PICTURE_LENGTH),
        folder.patterns_picture,
        num_heads=recipe.model.num_attention_heads,
    )
    if data.decoded_as is None:
        _write_samples(recipe, folder, model)
        samples = folder.samples
    else:
        samples = folder.sample_files
        write_continuations(recipe, data, samples, model, _say)
    test = data.split("test")[: recipe.evaluation.max_bytes]
    _say(f"Evaluating on {len(test):,} of the {data.tokens['test']:,} {data.unit}s of the test split.")
    documents = data.records("test", len(test)) if recipe.data.documents == "packed" else None
    evaluation = evaluate_as_trained(
        model,
        test,
        min_context=min(recipe.min_context, len(test) - 1) if data.record == 1 and documents is None else 1,
        batch_size=recipe.schedule.batch_size,
        progress=True,
        record=data.record,
        unit=data.unit,
        documents=documents,
    )
    write_evaluation(evaluation, folder.evaluation, step=step, split="test", train_bytes_per_s=train_bytes_per_s)
    _say(str(evaluation))
    _say("")
    for what, path in (
        ("model", folder.model),
        ("recipe", folder.recipe),
        ("metrics", folder.metrics),
        ("loss curve", folder.loss_picture),
        ("patterns", folder.patterns_picture),
        ("samples", samples),
        ("evaluation", folder.evaluation),
        *([("TensorBoard", folder.tensorboard)] if recipe.run.tensorboard else []),
    ):
        _say(f"{what:<12}{_shown(path)}")
    if data.decoded_as is None:
        _say(f"\nTo write more: longstride sample {_shown(folder.path)} --prompt 'def '")


def _write_samples(recipe: "Recipe", folder: "RunFolder", model: "SparseTransformerForCausalLM") -> None:
    import torch

    from longstride.generation import as_text, sample_bytes

    with folder.samples.open("w", encoding="utf-8") as file:
        for number in range(recipe.sample.count):
            seed = recipe.run.seed + number
            title = f"--- sample {number + 1}, seed {seed}, temperature {recipe.sample.temperature:g} ---"
            _say(title)
            file.write(title + "\n" + recipe.sample.prompt)
            typer.echo(recipe.sample.prompt, nl=False)
            pieces = sample_bytes(
                model,
                recipe.sample.prompt.encode(),
                recipe.sample.length_bytes,
                generator=torch.Generator().manual_seed(seed),
                temperature=recipe.sample.temperature,
                top_k=recipe.sample.top_k,
                top_p=recipe.sample.top_p,
            )
            for text in as_text(pieces):
                file.write(text)
                typer.echo(text, nl=False)
            file.write("\n")
            typer.echo()


def write_evaluation(evaluation: "Evaluation", path: Path, **more: object) -> None:
    """The figures as JSON."""
    import dataclasses

    path.write_text(json.dumps({**dataclasses.asdict(evaluation), **more}, indent=2) + "\n")


def _resume_command(output: Path) -> str:
    return f"longstride train --output {_shown(output)} --resume"


def _shown(path: Path) -> str:
    return os.path.relpath(path)


def _say(line: str) -> None:
    typer.echo(line)
