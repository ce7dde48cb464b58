"""``longstride finetune``: from labelled documents to a classifier, and how many it gets right."""

import dataclasses
import json
import os
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from longstride.errors import ArgumentError

if TYPE_CHECKING:
    from longstride.models import SparseTransformerConfig
    from longstride.training import ClassificationRecipe

RECIPE = "finetuning.yaml"


def finetune(
    data: Annotated[
        Path | None,
        typer.Option(
            help="A folder with a sub-folder of documents for every class, or a .csv, .tsv or .jsonl with text and "
            "label."
        ),
    ] = None,
    recipe: Annotated[
        Path | None, typer.Option(help="A recipe (YAML) with the values that differ from the defaults.")
    ] = None,
    output: Annotated[Path, typer.Option(help="The folder for all results; it must not hold a run yet.")] = Path(
        "runs/classifier"
    ),
    start_from: Annotated[Path | None, typer.Option(help="Go on from this saved encoder instead of a new one.")] = None,
    pretrain: Annotated[
        int | None,
        typer.Option(help="First so many updates of masked pretraining: bytes of the documents are filled in."),
    ] = None,
    steps: Annotated[int | None, typer.Option(help="Updates of the weights.")] = None,
    batch_size: Annotated[int | None, typer.Option(help="Pieces of documents in a batch.")] = None,
    context: Annotated[
        int | None, typer.Option(help="Bytes that the model reads at once; longer documents are read in pieces.")
    ] = None,
    pattern: Annotated[
        list[str] | None,
        typer.Option(
            "--pattern",
            metavar="PATTERN",
            help="An attention pattern that looks ahead, such as 'Local(65, lookahead=64) | Global(1, causal=False)'; "
            "given again, layers alternate.",
        ),
    ] = None,
    lr: Annotated[float | None, typer.Option(help="The peak learning rate.")] = None,
    device: Annotated[str | None, typer.Option(help="auto, cpu, cuda or mps.")] = None,
    precision: Annotated[str | None, typer.Option(help="fp32, bf16 or fp16.")] = None,
    seed: Annotated[int | None, typer.Option(help="Another seed: other first weights and pieces.")] = None,
    time_limit: Annotated[
        float | None, typer.Option(help="Stop training after so many seconds, then evaluate as usual.")
    ] = None,
    assignments: Annotated[
        list[str] | None,
        typer.Option(
            "--set",
            metavar="KEY=VALUE",
            help="Any other value of the recipe, such as --set model.hidden_size=256; repeatable.",
        ),
    ] = None,
) -> None:
    """Train an encoder to classify long documents, and measure it on documents that it has not seen.

    Of every class 80 % of the documents are trained on, 10 % watched, and 10 % tested, unless folders named train,
    val and test say otherwise. Press Ctrl-C at any time: what was learnt until then is evaluated and saved.

    The output folder gets the model, the recipe with every value, metrics.jsonl, and the evaluation.
    """
    from transformers.utils import logging

    from longstride.data import read_labelled, written_whole
    from longstride.training import (
        check_precision,
        classifier_config,
        evaluate_classifier,
        parse_assignments,
        resolve_device,
        train_classifier,
    )

    flags: dict[str, Any] = {
        "data.path": None if data is None else str(data),
        "data.context": context,
        "model.patterns": tuple(pattern) if pattern else None,
        "model.start_from": None if start_from is None else str(start_from),
        "pretraining.steps": pretrain,
        "optimizer.learning_rate": lr,
        "schedule.steps": steps,
        "schedule.batch_size": batch_size,
        "run.device": device,
        "run.precision": precision,
        "run.seed": seed,
        "run.time_limit_s": time_limit,
    }
    overrides = parse_assignments(assignments or [])
    overrides.update({key: value for key, value in flags.items() if value is not None})
    chosen = _choose_recipe(recipe, overrides)
    assert chosen.data.path is not None
    # Everything that can be wrong shows before anything is written.
    machine = resolve_device(chosen.run.device)
    check_precision(chosen.run.precision, machine)
    splits = read_labelled(Path(chosen.data.path))
    config = classifier_config(chosen, splits.labels)
    _start(output, chosen)
    typer.echo(splits.describe())
    typer.echo(
        f"Model: {_parameters(config):,} parameters, {config.num_hidden_layers} layers, context "
        f"{config.max_position_embeddings:,} bytes, patterns {'; '.join(config.patterns)}."
    )
    # The bars and warnings of reading and writing a few small files would break our lines.
    logging.disable_progress_bar()
    logging.set_verbosity_error()
    typer.echo(
        f"Training: {chosen.pretraining.steps + chosen.schedule.steps:,} steps of {chosen.schedule.batch_size} pieces "
        f"on {machine} in {chosen.run.precision}, into {os.path.relpath(output)}."
    )
    result = train_classifier(chosen, splits, output, typer.echo)
    if result.ended != "finished":
        typer.echo(f"Stopped ({result.ended}) after step {result.step:,} of {chosen.schedule.steps:,}.")
    with written_whole(output / "model") as unfinished:
        result.model.save_pretrained(unfinished)
    evaluation = evaluate_classifier(
        result.model,
        splits.splits["test"],
        splits.labels,
        splits.splits["train"],
        context=chosen.data.context,
        most_pieces=chosen.evaluation.most_pieces,
        batch_size=chosen.schedule.batch_size,
        progress=True,
    )
    figures = {**dataclasses.asdict(evaluation), "step": result.step, "split": "test"}
    (output / "evaluation.json").write_text(json.dumps(figures, indent=2) + "\n")
    typer.echo(f"Test: {evaluation}\n")
    for what, name in (
        ("model", "model"), ("recipe", RECIPE), ("metrics", "metrics.jsonl"), ("evaluation", "evaluation.json"),
    ):  # fmt: skip
        typer.echo(f"{what:<12}{os.path.relpath(output / name)}")
    typer.echo(f"\nTo classify others: longstride classify {os.path.relpath(output)} FILE ...")


def _parameters(config: "SparseTransformerConfig") -> int:
    import torch

    from longstride.models import SparseTransformerForSequenceClassification

    with torch.device("meta"):
        return SparseTransformerForSequenceClassification(config).num_parameters()


def _choose_recipe(file: Path | None, overrides: dict[str, Any]) -> "ClassificationRecipe":
    from longstride.training import ClassificationRecipe, read_classification_recipe

    chosen = (ClassificationRecipe() if file is None else read_classification_recipe(file)).override(overrides)
    if chosen.data.path is None:
        raise ArgumentError(
            "there is nothing to classify: name a folder with a sub-folder a class, or a file with text and label, by "
            "--data"
        )
    return chosen


def _start(output: Path, recipe: "ClassificationRecipe") -> None:
    if (output / RECIPE).exists() or (output / "recipe.yaml").exists():
        raise ArgumentError(f"{output} already holds a run: choose another --output")
    assert recipe.data.path is not None
    if output.resolve().is_relative_to(Path(recipe.data.path).resolve()):
        raise ArgumentError(f"--output {output} lies inside --data {recipe.data.path}: choose an --output elsewhere")
    try:
        output.mkdir(parents=True, exist_ok=True)
        (output / RECIPE).write_text(recipe.to_yaml(), encoding="utf-8")
    except OSError as error:
        raise ArgumentError(f"cannot write in {output} ({error.strerror}): choose another --output") from error
