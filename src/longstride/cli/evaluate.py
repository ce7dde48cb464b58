"""``longstride evaluate``: bits per byte, with the context that every prediction had."""

import dataclasses
import json
from pathlib import Path
from typing import Annotated

import typer


def evaluate(
    run: Annotated[Path, typer.Argument(help="The output folder of `longstride train`, or a saved model's folder.")],
    data: Annotated[Path | None, typer.Option(help="Measure on this file or folder instead, all of it.")] = None,
    split: Annotated[str, typer.Option(help="The part of the run's data: test, validation or train.")] = "test",
    min_context: Annotated[
        int | None,
        typer.Option(help="Count only bytes with at least so many earlier bytes in their window; half the context."),
    ] = None,
    max_bytes: Annotated[int | None, typer.Option(help="Read only so many bytes, to take less time.")] = None,
    batch_size: Annotated[int, typer.Option(help="Windows that go through the model at once.")] = 8,
    device: Annotated[str, typer.Option(help="auto, cpu, cuda or mps.")] = "auto",
    json_output: Annotated[bool, typer.Option("--json", help="Print the figures as JSON.")] = False,
) -> None:
    """Measure how well a model predicts text that it has not seen.

    The figure is in bits per byte: 8 is guessing, lower is better. Beside it stand two yardsticks for the same bytes:
    their frequencies alone (order-0 entropy), and the compressor `xz -9e`.

    Data of another kind are measured in bits per token of it: of images, bits per dim.
    """
    from longstride.cli.saved import load_model
    from longstride.data import SPLITS, DecodedSource, PreparedData, decode_source, open_source
    from longstride.errors import ArgumentError
    from longstride.training import RunFolder, evaluate_as_trained, resolve_device

    if split not in SPLITS:
        raise ArgumentError(f"--split {split}: it must be one of {', '.join(SPLITS)}")
    if max_bytes is not None and max_bytes < 2:
        raise ArgumentError(f"--max-bytes {max_bytes}: it must be at least 2")
    if batch_size < 1:
        raise ArgumentError(f"--batch-size {batch_size}: it must be at least 1")
    model = load_model(run, resolve_device(device))
    context = model.config.max_position_embeddings - model.config.memory
    prepared = PreparedData.open(RunFolder(run).data) if RunFolder(run).data.exists() else None
    kind = None if prepared is None else prepared.decoded_as
    packed = prepared is not None and RunFolder(run).packs_documents
    documents = None
    if data is not None:
        # A model reads what it was trained on, as it was decoded then.
        source = open_source(data) if kind is None else decode_source(data, kind)
        text, name = source.read(max_bytes), str(data)
        if packed and isinstance(source, DecodedSource):
            documents = source.boundaries(len(text))
    elif prepared is not None:
        text, name = prepared.split(split)[:max_bytes], f"the {split} split of {run}"
        documents = prepared.records(split, len(text)) if packed else None
    else:
        raise ArgumentError(f"{run} has no data of its own: name some with --data")
    if not json_output:
        typer.echo(f"Evaluating on {len(text):,} {'byte' if kind is None else kind.unit}s of {name}.")
    record = 1 if kind is None else kind.record
    if min_context is None:
        min_context = context // 2 if record == 1 and documents is None else 1
    evaluation = evaluate_as_trained(
        model,
        text,
        min_context=min_context,
        batch_size=batch_size,
        progress=True,
        record=record,
        unit="byte" if kind is None else kind.unit,
        documents=documents,
    )
    typer.echo(json.dumps(dataclasses.asdict(evaluation), indent=2) if json_output else str(evaluation))
