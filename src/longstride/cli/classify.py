"""``longstride classify``: the classes of documents, by a model of ``longstride finetune``."""

import json
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from longstride.errors import ArgumentError

if TYPE_CHECKING:
    import torch

    from longstride.models import SparseTransformerForSequenceClassification


def classify(
    run: Annotated[Path, typer.Argument(help="The output folder of `longstride finetune`, or a saved classifier's.")],
    files: Annotated[list[Path], typer.Argument(help="The documents, a file each.")],
    most_pieces: Annotated[int, typer.Option(help="Of a longer document, read so many pieces, spread evenly.")] = 16,
    batch_size: Annotated[int, typer.Option(help="Pieces that go through the model at once.")] = 8,
    device: Annotated[str, typer.Option(help="auto, cpu, cuda or mps.")] = "auto",
    json_output: Annotated[bool, typer.Option("--json", help="Print every class's probability as JSON.")] = False,
) -> None:
    """Say which class each document is of, and how probable the model takes that to be."""
    from longstride.training import document_log_probabilities, resolve_device

    for name, value in (("--most-pieces", most_pieces), ("--batch-size", batch_size)):
        if value < 1:
            raise ArgumentError(f"{name} {value}: it must be at least 1")
    missing = [file for file in files if not file.is_file()]
    if missing:
        raise ArgumentError(f"there is no file {missing[0]}: name the documents, a file each")
    model = load_classifier(run, resolve_device(device))
    scores = document_log_probabilities(
        model,
        [file.read_bytes() for file in files],
        context=model.config.max_position_embeddings,
        most_pieces=most_pieces,
        batch_size=batch_size,
        progress=not json_output,
    ).exp()
    labels = {int(number): label for number, label in (model.config.id2label or {}).items()}
    if json_output:
        found = {
            str(file): {labels[number]: probability for number, probability in enumerate(row)}
            for file, row in zip(files, scores.tolist(), strict=True)
        }
        typer.echo(json.dumps(found, indent=2))
        return
    for file, row in zip(files, scores, strict=True):
        best = int(row.argmax())
        typer.echo(f"{file}: {labels[best]} ({100 * float(row[best]):.1f} %)")


def load_classifier(folder: Path, device: "torch.device") -> "SparseTransformerForSequenceClassification":
    """The classifier of a run, or a saved one itself.

    Raises:
        ArgumentError: there is none, or it cannot be read.
    """
    from transformers.utils import logging

    from longstride.models import SparseTransformerConfig, SparseTransformerForSequenceClassification
    from longstride.training import VOCAB_SIZE, load_encoder

    found = next((place for place in (folder / "model", folder) if (place / "config.json").is_file()), None)
    if found is None:
        raise ArgumentError(f"{folder} holds no model: name the --output folder of `longstride finetune`")
    logging.disable_progress_bar()
    try:
        config = SparseTransformerConfig.from_pretrained(found)
    except (OSError, ValueError) as error:
        raise ArgumentError(f"the model in {found} cannot be read: {str(error).splitlines()[0]}") from error
    kinds = config.architectures or []
    if SparseTransformerForSequenceClassification.__name__ not in kinds or config.vocab_size < VOCAB_SIZE:
        raise ArgumentError(
            f"the model in {found} is no classifier of documents (it is {', '.join(kinds) or 'of no known kind'}): "
            "make one with `longstride finetune`"
        )
    return load_encoder(SparseTransformerForSequenceClassification, found, config).to(device).eval()
