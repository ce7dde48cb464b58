"""The checks of ``longstride evaluate``: what is asked, how it is shown, and the files that it leaves."""

import dataclasses
import json
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from longstride.errors import ArgumentError

if TYPE_CHECKING:
    from longstride.checks import Haystack, LossByContext, Retrieval, Subject
    from longstride.cli.saved import Text

# Shares of the context that a haystack is as long as, unless lengths are asked for.
EIGHTHS = (1, 2, 4, 8)


@dataclass(frozen=True)
class Checked:
    """What the checks of one model along one schedule gave; needles are None in data that are no text."""

    by_context: "LossByContext"
    needles: "Retrieval | None"


def choose_haystack(subject: "Subject", context: int, asked: Mapping[str, Any]) -> "Haystack":
    """The haystacks that were asked for; unless said, of an eighth of the context up to all of it.

    Args:
        asked: fields of `Haystack`, those that were given.
    """
    from longstride.checks import Haystack, shortest_length

    fields: dict[str, Any] = {"lengths": (context,)}
    fields |= {name: tuple(value) if isinstance(value, list) else value for name, value in asked.items()}
    haystack = Haystack(**fields)
    if "lengths" in asked:
        return haystack
    shortest = shortest_length(subject, haystack)
    lengths = [context * eighths // 8 for eighths in EIGHTHS]
    # Those that are too short for any needle tell nothing; if all are, the longest says so.
    fitting = tuple(length for length in lengths if length >= shortest)
    return dataclasses.replace(haystack, lengths=fitting) if fitting else haystack


def run_checks(subject: "Subject", text: "Text", haystack: "Haystack | None", context: int, batch_size: int) -> Checked:
    """Look for needles, and measure the loss by context."""
    from longstride.checks import find_needles, loss_by_context

    needles = None
    if haystack is not None:
        needles = find_needles(subject, text.tokens, haystack, batch_size=batch_size, progress=True)
    by_context = loss_by_context(
        subject.predictor(),
        text.tokens,
        context=context,
        batch_size=batch_size,
        progress=True,
        record=text.record,
        unit=text.unit,
        documents=text.documents,
    )
    return Checked(by_context, needles)


def show_checks(checked: Mapping[str, Checked], text: "Text") -> str:
    """The tables for the screen."""
    from longstride.checks import context_table

    by_context = {name: entry.by_context for name, entry in checked.items()}
    windows = next(iter(by_context.values())).windows
    pieces = [
        f"Loss by context, over {windows:,} window{'s' if windows > 1 else ''} side by side:",
        context_table(by_context),
    ]
    for name, entry in checked.items():
        if entry.needles is not None:
            pieces += ["", f"Needles in a haystack, the model {name}:", str(entry.needles)]
    if text.kind is not None and not text.is_text:
        pieces += ["", f"No needles: they are sentences, and these data are {text.kind.name}."]
    return "\n".join(pieces)


def write_checks(checked: Mapping[str, Checked], folder: Path, text: "Text") -> list[Path]:
    """Write context.json and context.png and, of text, needle.json and needle.png; the paths.

    Raises:
        ArgumentError: the folder cannot be written.
    """
    from longstride.plotting import plot_loss_by_context, plot_retrieval

    by_context = {name: entry.by_context for name, entry in checked.items()}
    written = [_write_figures(by_context, folder / "context.json", text)]
    curves = {
        name: [(entry.fewest, entry.most, entry.bits, entry.standard_error_bits) for entry in losses.ranges]
        for name, losses in by_context.items()
    }
    written.append(plot_loss_by_context(curves, folder / "context.png", unit=text.unit))
    needles = {name: entry.needles for name, entry in checked.items() if entry.needles is not None}
    if needles:
        written.append(_write_figures(needles, folder / "needle.json", text))
        haystack = next(iter(needles.values())).haystack
        tables = {name: entry.chosen for name, entry in needles.items()}
        picture = folder / "needle.png"
        written.append(plot_retrieval(tables, haystack.lengths, haystack.depths, picture, unit=text.unit))
    return written


def _write_figures(figures: Mapping[str, Any], path: Path, text: "Text") -> Path:
    """What was measured on which text, by the name of the schedule, as JSON."""
    measured = {name: dataclasses.asdict(entry) for name, entry in figures.items()}
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(json.dumps({"text": text.name, "measured": measured}, indent=2) + "\n", encoding="utf-8")
    except OSError as error:
        raise ArgumentError(f"cannot write in {path.parent} ({error.strerror}): choose another --output") from error
    return path
