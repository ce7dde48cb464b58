"""``longstride suggest``: which layers of a model can go sparse, and along what, within a stated loss."""

import json
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

if TYPE_CHECKING:
    from longstride.checks import Suggestion
    from longstride.cli.saved import Text


def suggest(
    model: Annotated[
        Path,
        typer.Argument(
            help="The output folder of `longstride train`, or the folder of a saved causal language model, of any "
            "architecture that transformers knows."
        ),
    ],
    data: Annotated[
        Path | None, typer.Option(help="The text to measure on, a file or folder; a run has data of its own.")
    ] = None,
    split: Annotated[str, typer.Option(help="The part of the run's data: validation, test or train.")] = "validation",
    tolerance: Annotated[
        str, typer.Option(help="How much the loss may rise: bits a token, such as 0.02, or a share, such as 1%.")
    ] = "1%",
    pattern: Annotated[
        list[str] | None,
        typer.Option(
            "--pattern",
            metavar="PATTERN",
            help="A pattern that layers may come to attend along; repeatable. By default windows of a sixteenth and a "
            "quarter of the context, each with and without the first four tokens, and a window with a stride.",
        ),
    ] = None,
    windows: Annotated[
        int, typer.Option(help="Windows of text that the search measures on; as many others confirm its result.")
    ] = 16,
    context: Annotated[
        int | None,
        typer.Option(help="Tokens in a window; the model's context, of other architectures at most 2,048."),
    ] = None,
    max_bytes: Annotated[int | None, typer.Option(help="Read only so many bytes of the text.")] = None,
    batch_size: Annotated[
        int | None, typer.Option(help="Windows that go through the model at once; 8, fewer with a large vocabulary.")
    ] = None,
    output: Annotated[
        Path | None, typer.Option(help="The file for the schedule, in YAML; MODEL/checks/schedule.yaml.")
    ] = None,
    device: Annotated[str, typer.Option(help="auto, cpu, cuda or mps.")] = "auto",
    json_output: Annotated[bool, typer.Option("--json", help="Print the figures as JSON.")] = False,
) -> None:
    """Search for sparser patterns that a model keeps its quality with, without training it again.

    First every layer alone along every pattern; then layer after layer together, as long as the loss stays within the
    tolerance. What is printed at the end was measured of the whole schedule at once, on windows that the search did not
    see; changes that are too much there are undone, and then the figure is a little better than it would be elsewhere.
    The schedule is for `longstride.sparsify`, and for `longstride evaluate --schedule`.
    """
    from longstride.checks import Search, Tolerance, load_subject, read_schedule, suggest_schedule, write_schedule
    from longstride.cli.saved import choose_batch_size, choose_context, how_it_is_read, read_text
    from longstride.training import resolve_device

    allowed = Tolerance.parse(tolerance)
    subject = load_subject(model, resolve_device(device))
    candidates = tuple(read_schedule([text], subject)[0] for text in pattern or ())
    text = read_text(model, subject, data, split, max_bytes)
    context = choose_context(subject, context)
    search = Search(
        context,
        allowed,
        candidates,
        windows=windows,
        batch_size=choose_batch_size(subject, context, batch_size),
        record=text.record,
        unit=text.unit,
    )
    if not json_output:
        typer.echo(f"Searching on {len(text.tokens):,} {text.unit}s of {text.name}.")
    suggestion = suggest_schedule(subject, text.tokens, search, documents=text.documents, progress=True)
    figures = _figures(suggestion, text)
    path = model / "checks" / "schedule.yaml" if output is None else output
    # What was found is said first: a file that cannot be written does not take it along.
    if json_output:
        patterns = [str(pattern) for pattern in suggestion.patterns]
        typer.echo(json.dumps({"patterns": patterns, "measured": figures}, indent=2, allow_nan=False))
    else:
        typer.echo("\n".join(["", str(suggestion), *how_it_is_read(subject, text), ""]))
    write_schedule(path, suggestion.patterns, figures)
    if not json_output:
        typer.echo(f"schedule    {path}")


def _figures(suggestion: "Suggestion", text: "Text") -> dict[str, Any]:
    """What was measured, in plain values."""
    return {
        "text": text.name,
        "unit": suggestion.unit,
        "context": suggestion.context,
        "windows": suggestion.windows,
        "undone": suggestion.undone,
        "bits_before": suggestion.bits_before,
        "bits": suggestion.bits,
        "rise_bits": suggestion.rise_bits,
        "standard_error_bits": suggestion.standard_error_bits,
        "tolerance_bits": suggestion.tolerance_bits,
        "pairs_before": sum(suggestion.pairs_before),
        "pairs": sum(suggestion.pairs),
        "layers_alone": [
            {
                "layer": cost.layer,
                "pattern": str(cost.pattern),
                "rise_bits": cost.rise_bits,
                "standard_error_bits": cost.standard_error_bits,
                "pairs_saved": cost.pairs_saved,
            }
            for cost in suggestion.costs
        ],
    }
