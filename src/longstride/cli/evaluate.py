"""``longstride evaluate``: bits per byte, with the context that every prediction had; and checks of what it was for."""

import dataclasses
import json
from contextlib import nullcontext
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

if TYPE_CHECKING:
    from longstride.checks import Subject
    from longstride.cli.saved import Text
    from longstride.training import Evaluation

# A model along its own patterns, and along those that the user wants to try.
AS_IT_IS, OTHERWISE = "as it is", "otherwise"


def evaluate(
    run: Annotated[
        Path,
        typer.Argument(
            metavar="MODEL",
            help="The output folder of `longstride train`, or the folder of a saved causal language model, of any "
            "architecture that transformers knows.",
        ),
    ],
    data: Annotated[Path | None, typer.Option(help="Measure on this file or folder instead, all of it.")] = None,
    split: Annotated[str, typer.Option(help="The part of the run's data: test, validation or train.")] = "test",
    context: Annotated[
        int | None,
        typer.Option(help="Tokens in a window; the model's context, of other architectures at most 2,048."),
    ] = None,
    min_context: Annotated[
        int | None,
        typer.Option(help="Count only bytes with at least so many earlier bytes in their window; half the context."),
    ] = None,
    max_bytes: Annotated[int | None, typer.Option(help="Read only so many bytes, to take less time.")] = None,
    batch_size: Annotated[
        int | None, typer.Option(help="Windows that go through the model at once; 8, fewer with a large vocabulary.")
    ] = None,
    pattern: Annotated[
        list[str] | None,
        typer.Option(
            "--pattern",
            metavar="PATTERN",
            help="Measure the same weights along this attention pattern too; given again, layers alternate.",
        ),
    ] = None,
    schedule: Annotated[
        Path | None, typer.Option(help="Measure the same weights along the patterns of this file too: see `suggest`.")
    ] = None,
    checks: Annotated[
        bool,
        typer.Option("--checks", help="Also measure loss against context, and look for needles in a haystack."),
    ] = False,
    length: Annotated[
        list[int] | None,
        typer.Option(help="Of --checks: tokens of a haystack; repeatable. An eighth of the context up to all of it."),
    ] = None,
    depth: Annotated[
        list[float] | None,
        typer.Option(
            help="Of --checks: where a needle lies, 0 (first) to 1 (last); repeatable. 0, 0.25, 0.5, 0.75, 1."
        ),
    ] = None,
    trials: Annotated[int | None, typer.Option(help="Of --checks: needles for each length and depth; 8.")] = None,
    candidates: Annotated[
        int | None, typer.Option(help="Of --checks: values among which the right one must be the likeliest; 16.")
    ] = None,
    needle: Annotated[
        str | None,
        typer.Option(help="Of --checks: the sentence that is hidden, such as 'The code of {key} is {value}.'"),
    ] = None,
    seed: Annotated[int | None, typer.Option(help="Of --checks: the same seed hides the same needles; 0.")] = None,
    output: Annotated[
        Path | None, typer.Option(help="Of --checks: the folder for their figures and pictures; MODEL/checks.")
    ] = None,
    device: Annotated[str, typer.Option(help="auto, cpu, cuda or mps.")] = "auto",
    json_output: Annotated[bool, typer.Option("--json", help="Print the figures as JSON.")] = False,
) -> None:
    """Measure how well a model predicts text that it has not seen.

    The figure is in bits per byte: 8 is guessing, lower is better. Beside it stand two yardsticks for the same bytes:
    their frequencies alone (order-0 entropy), and the compressor `xz -9e`.

    Data of another kind are measured in bits per token of it: of images, bits per dim; of models with a tokenizer, bits
    per token.

    With --checks, two more: how the loss falls with the context before a token, and how often a fact is found again
    that stands at some depth of a text of some length. With --pattern, all of it once more along other patterns.
    """
    from longstride.checks import attending, load_subject, read_schedule
    from longstride.cli.checked import choose_haystack, run_checks, show_checks, write_checks
    from longstride.cli.saved import choose_batch_size, choose_context, how_it_is_read, read_text
    from longstride.errors import ArgumentError
    from longstride.training import resolve_device

    hiding = {"lengths": length, "depths": depth, "trials": trials, "candidates": candidates, "needle": needle}
    hiding = {name: value for name, value in (hiding | {"seed": seed}).items() if value is not None}
    if not checks and (hiding or output is not None):
        raise ArgumentError(f"--{_option(hiding)} without --checks: it says how to check; add --checks")
    if pattern and schedule is not None:
        raise ArgumentError(f"--pattern and --schedule {schedule}: both name patterns; give one of them")
    subject = load_subject(run, resolve_device(device))
    asked = schedule if schedule is not None else pattern
    others = read_schedule(asked, subject) if asked else None
    text = read_text(run, subject, data, split, max_bytes)
    if hiding and not text.is_text:
        raise ArgumentError(f"--{_option(hiding)}: a needle is a sentence, and {text.name} is no text; leave it out")
    context = choose_context(subject, context)
    batch_size = choose_batch_size(subject, context, batch_size)
    haystack = choose_haystack(subject, context, hiding) if checks and text.is_text else None
    if not json_output:
        typer.echo(f"Evaluating on {len(text.tokens):,} {text.unit}s of {text.name}.")
    if others is not None:
        with attending(subject, others):
            pass  # patterns that the model cannot have are refused before anything is measured
    evaluations, checked = {}, {}
    for name, patterns in {AS_IT_IS: None, **({} if others is None else {OTHERWISE: others})}.items():
        with nullcontext(subject) if patterns is None else attending(subject, patterns) as seen:
            if checks:
                # First, because what cannot be hidden shows at once.
                checked[name] = run_checks(seen, text, haystack, context, batch_size)
            evaluations[name] = _measure(seen, text, context, min_context, batch_size)
    figures = _figures(evaluations, text)
    if others is not None:
        figures[OTHERWISE]["patterns"] = [str(pattern) for pattern in others]
    if checked:
        figures["checks"] = {name: dataclasses.asdict(entry) for name, entry in checked.items()}
    folder = run / "checks" if output is None else output
    # What was measured is said first: files that cannot be written do not take it along.
    if json_output:
        typer.echo(json.dumps(figures, indent=2, allow_nan=False))
        if checked:
            write_checks(checked, folder, text)
        return
    typer.echo(str(evaluations[AS_IT_IS]))
    if text.text_bytes is not None:
        typer.echo(f"{figures['bits_per_text_byte']:.4f} bits per byte of the text, {text.bytes_per_token:.2f} a token")
    if others is not None:
        more = evaluations[OTHERWISE].bits_per_byte - evaluations[AS_IT_IS].bits_per_byte
        along = "; ".join(dict.fromkeys(map(str, others)))
        # The yardsticks are those above: the text is the same.
        first_line = str(evaluations[OTHERWISE]).splitlines()[0]
        typer.echo(f"\nOtherwise, along {along}: {more:+.4f} bits per {text.unit}\n{first_line}")
    if checked:
        typer.echo("\n".join(["", show_checks(checked, text), *how_it_is_read(subject, text), ""]))
        for path in write_checks(checked, folder, text):
            typer.echo(f"{path.stem:<12}{path}")


def _option(hiding: dict[str, Any]) -> str:
    """What the command line calls the first of the settings of a `Haystack` that were given."""
    first = next(iter(hiding), "output")
    return {"lengths": "length", "depths": "depth"}.get(first, first)


def _measure(subject: "Subject", text: "Text", context: int, min_context: int | None, batch_size: int) -> "Evaluation":
    """The evaluation; of text that a tokenizer read, xz is given the text, all of it, and not the tokens' numbers."""
    from longstride.training import evaluate as measure
    from longstride.training import evaluate_as_trained, xz_bits_per_byte

    if min_context is None:
        min_context = max(1, context // 2) if text.record == 1 and text.documents is None else 1
    how: dict[str, Any] = {"min_context": min_context, "batch_size": batch_size, "progress": True}
    how |= {"record": text.record, "unit": text.unit}
    if text.documents is not None or getattr(subject.model.config, "memory", 0):
        evaluation = evaluate_as_trained(subject.model, text.tokens, context=context, documents=text.documents, **how)
    else:
        evaluation = measure(subject.predictor(), text.tokens, context=context, **how)
    if text.text_bytes is None:
        return evaluation
    return dataclasses.replace(evaluation, xz_bits_per_byte=xz_bits_per_byte(text.text_bytes) * text.bytes_per_token)


def _figures(evaluations: "dict[str, Evaluation]", text: "Text") -> dict[str, Any]:
    """What --json prints: of the model as it is at the top, and of it otherwise below its name."""
    each = {name: dataclasses.asdict(evaluation) for name, evaluation in evaluations.items()}
    if text.text_bytes is not None:
        for figures in each.values():
            figures["bits_per_text_byte"] = figures["bits_per_byte"] / text.bytes_per_token
    return {**each.pop(AS_IT_IS), **each}
