"""Bits per byte with a stated minimum context, beside what simple compressors need for the same bytes.

A byte counts once, in a window where at least ``min_context`` bytes stand before it. Windows overlap accordingly: a
larger minimum is a stricter, slower and usually better figure (Child et al. 2019, table 3). Other kinds of data are
measured alike, in bits per token (of an image: per dim). Where windows must begin at a record, as with images, they
stand side by side instead, as in training, and all tokens of each count but the first, which nothing stands before.
"""

import itertools
import lzma
import math
import time
from collections.abc import Generator, Iterable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch import nn
from torch.nn import functional as F
from tqdm import tqdm

from longstride.errors import ArgumentError, DataError, LongstrideError

# float32 logits at once, a quarter of a gibibyte: with a large vocabulary those of a batch are its largest tensor, and
# the model has them in its own type already.
LOGITS_AT_ONCE = 2**26


@dataclass(frozen=True)
class Evaluation:
    """What was measured.

    Args:
        bits_per_byte: mean of -log2 p(byte) over the counted bytes; of other data, tokens.
        counted_bytes: how many bytes that are; of other data, tokens.
        min_context, max_context: the fewest and the most bytes that any prediction looked back over.
        order0_bits_per_byte: entropy of the counted bytes' own frequencies.
        xz_bits_per_byte: 8 * size after ``xz -9e`` / size.
        elapsed_s: seconds that the model took.
        unit: what a token is called.
    """

    bits_per_byte: float
    counted_bytes: int
    min_context: int
    max_context: int
    order0_bits_per_byte: float
    xz_bits_per_byte: float
    elapsed_s: float
    unit: str = "byte"

    def __str__(self) -> str:
        # Of one token, and of several.
        one, many = self.unit, f"{self.unit}s"
        return "\n".join(
            (
                f"{self.bits_per_byte:.4f} bits per {one} over {self.counted_bytes:,} {many}, each predicted from "
                f"{self.min_context:,} to {self.max_context:,} earlier {many}",
                f"{self.order0_bits_per_byte:.4f} for the same {many} by their frequencies alone (order-0 entropy)",
                f"{self.xz_bits_per_byte:.4f} for the same {many} by xz -9e",
            )
        )


@dataclass(frozen=True)
class Span:
    """A window: inputs ``start`` to ``start + length``; the predictions from input ``first`` on are counted."""

    start: int
    length: int
    first: int


def record_spans(total: int, context: int, record: int) -> Iterator[Span]:
    """Windows of ``context`` tokens side by side, each at a multiple of ``record``; all but its first are predicted.

    Raises:
        ArgumentError: a context of one token, in which nothing is predicted.
    """
    if context < 2:
        raise ArgumentError(f"--context {context}: a window has a first token, which is not predicted: at least 2")
    for start in range(0, total - context + 1, -(-context // record) * record):
        yield Span(start, context - 1, first=0)


def side_by_side(total: int, context: int, record: int, documents: np.ndarray | None = None) -> list[Span]:
    """Windows with one prediction from each number of tokens up to ``context``; none reaches into another document.

    Args:
        total: tokens of the text.
        context: with records, tokens of a window, the last of which nothing is predicted from.
        record: above 1, windows begin at multiples of so many tokens.
        documents: int64[documents + 1], where documents that do not see one another begin, and the end.
    """
    if record > 1:
        return list(record_spans(total, context, record))
    bounds = [0, total] if documents is None else documents.tolist()
    return [
        Span(begin + span.start, span.length, span.first)
        for begin, end in itertools.pairwise(bounds)
        for span in record_spans(end - begin, context + 1, 1)
    ]


def spans(total: int, context: int, min_context: int) -> Iterator[Span]:
    """Windows in which every byte from number ``min_context`` on is predicted, and counted, exactly once.

    Input i of a window predicts the byte after it from i + 1 bytes of context.

    Args:
        total: bytes of the text.
        context: the most inputs in a window.
        min_context: at least so many inputs before a counted prediction, itself included.
    """
    predicted = min_context
    while predicted < total:
        length = min(context, total - 1)
        # The last window ends with the text, and so do windows after the first give each byte its context.
        start = min(predicted - min_context, total - 1 - length)
        yield Span(start, length, first=predicted - start - 1)
        predicted = start + length + 1


@contextmanager
def evaluating(model: nn.Module) -> Generator[None]:
    """The model in evaluation mode while the block runs, and afterwards in the mode that it had."""
    was_training = model.training
    model.eval()
    try:
        yield
    finally:
        model.train(was_training)


#: What a model is called with, and what its predictions are held against: int64[batch, length], -100 where they do not
#: count.
Batch = tuple[dict[str, Any], torch.Tensor]


@torch.no_grad()
def batch_losses(
    model: nn.Module, batches: Iterable[Batch], number: int, progress: bool
) -> Iterator[tuple[torch.Tensor, int]]:
    """-ln p of every prediction in ``number`` batches, and how many of them count.

    Args:
        model: in evaluation mode meanwhile.
        progress: show a bar on a terminal.

    Yields:
        the losses of a batch, float32[batch, length] on the CPU, 0 where they do not count; and the number of those
        that do.

    Raises:
        LongstrideError: a loss is no finite number.
    """
    device = next(model.parameters()).device
    with evaluating(model):
        for given, targets in tqdm(
            batches, total=number, desc="evaluating", unit="batch", leave=False, disable=None if progress else True
        ):
            inputs = {name: x.to(device) if isinstance(x, torch.Tensor) else x for name, x in given.items()}
            losses = _losses(model(**inputs).logits, targets.to(device)).cpu()
            if not losses.isfinite().all():
                raise LongstrideError(
                    f"the model's loss is {losses[~losses.isfinite()][0].item()} at a token of the data: its weights, "
                    f"or what it computes in {next(model.parameters()).dtype}, are no finite numbers, or it holds the "
                    "token for impossible; there is nothing to measure"
                )
            yield losses, int((targets != -100).sum())


def _losses(logits: torch.Tensor, targets: torch.Tensor) -> torch.Tensor:
    """float32[batch, length]: -ln p of each target, 0 at -100, some positions at a time."""
    positions = max(1, LOGITS_AT_ONCE // (len(logits) * logits.shape[-1]))
    pieces = zip(logits.split(positions, dim=1), targets.split(positions, dim=1), strict=True)
    found = [
        F.cross_entropy(some.float().flatten(0, 1), theirs.flatten(), reduction="none").view_as(theirs)
        for some, theirs in pieces
    ]
    return torch.cat(found, dim=1)


def window_losses(
    model: nn.Module, data: np.ndarray, windows: Sequence[Span], batch_size: int, progress: bool = False
) -> Iterator[tuple[Sequence[Span], torch.Tensor]]:
    """-ln p(token) of the predictions in equally long windows of a text, some windows at a time.

    Args:
        model: maps int64[batch, length] to ``.logits`` float[batch, length, vocabulary]; in evaluation mode meanwhile.
        data: [tokens], of any whole type.
        windows: of one length, each with one token after it.
        batch_size: windows that go through the model at once.
        progress: show a bar on a terminal.

    Yields:
        some windows and the losses of their predictions, float32[windows, length] on the CPU, in nats; 0 before the
        first that counts.

    Raises:
        LongstrideError: as `batch_losses`.
    """
    groups = [windows[first : first + batch_size] for first in range(0, len(windows), batch_size)]
    batches = (_window_batch(data, group) for group in groups)
    for group, (losses, _) in zip(groups, batch_losses(model, batches, len(groups), progress), strict=True):
        yield group, losses


def _window_batch(data: np.ndarray, windows: Sequence[Span]) -> Batch:
    # [batch, length + 1]; all windows are equally long.
    read = np.stack([data[span.start : span.start + span.length + 1] for span in windows]).astype(np.int64)
    tokens = torch.from_numpy(read)
    targets = tokens[:, 1:].clone()
    for row, span in enumerate(windows):
        targets[row, : span.first] = -100
    return {"input_ids": tokens[:, :-1]}, targets


def evaluate(
    model: nn.Module,
    data: np.ndarray,
    *,
    context: int,
    min_context: int,
    batch_size: int = 8,
    progress: bool = False,
    record: int = 1,
    unit: str = "byte",
) -> Evaluation:
    """Measure a model on a text.

    Args:
        model: maps int64[batch, length] to ``.logits`` float[batch, length, vocabulary].
        data: uint8[bytes], or the tokens of another kind.
        context: the model's longest input, in bytes.
        min_context: 1 to ``context``, in bytes; 1 with records.
        batch_size: windows that go through the model at once.
        progress: show a bar on a terminal.
        record: above 1, windows begin at multiples of so many tokens and stand side by side.
        unit: what a token is called.

    Raises:
        ArgumentError: a minimum that the model cannot have.
        DataError: no byte of the text has so much context.
        LongstrideError: a loss is no finite number.
    """
    check_min_context(data, context, min_context, unit)
    if record > 1 and min_context != 1:
        raise ArgumentError(
            f"--min-context {min_context}: windows that begin at records of {record:,} tokens stand side by side, so "
            "that it must be 1"
        )
    if record > 1 and len(data) < context:
        raise DataError(f"{len(data):,} tokens are too few to evaluate: a window has {context:,}; give more data")
    windows = list(spans(len(data), context, min_context) if record == 1 else record_spans(len(data), context, record))
    groups = [windows[first : first + batch_size] for first in range(0, len(windows), batch_size)]
    batches = (_window_batch(data, group) for group in groups)
    # The compressors get the first token of each record, too.
    counted_data = np.asarray(data[min_context:] if record == 1 else data[: windows[-1].start + context])
    looks_back = (min_context, windows[0].length)
    result = measured(model, batches, len(groups), counted_data, looks_back=looks_back, progress=progress, unit=unit)
    assert result.counted_bytes == (len(counted_data) if record == 1 else len(windows) * (context - 1))
    return result


def measured(
    model: nn.Module,
    batches: Iterable[Batch],
    number: int,
    counted_data: np.ndarray,
    *,
    looks_back: tuple[int, int],
    progress: bool,
    unit: str,
) -> Evaluation:
    """Run the model over ``number`` batches.

    Args:
        counted_data: the tokens that the compressors get.
        looks_back: the fewest and the most tokens before a prediction.
        progress, unit: as in `evaluate`.
    """
    began = time.monotonic()
    nats, counted = 0.0, 0
    for losses, counts in batch_losses(model, batches, number, progress):
        nats += losses.double().sum().item()
        counted += counts
    elapsed_s = time.monotonic() - began
    if not counted:
        raise DataError(
            f"{len(counted_data):,} {unit}s are too few to evaluate: none of them has another before it, to be "
            "predicted from; give more data"
        )
    return Evaluation(
        bits_per_byte=nats / counted / math.log(2),
        counted_bytes=counted,
        min_context=looks_back[0],
        max_context=looks_back[1],
        order0_bits_per_byte=order0_entropy(counted_data),
        xz_bits_per_byte=xz_bits_per_byte(counted_data),
        elapsed_s=elapsed_s,
        unit=unit,
    )


def check_min_context(data: np.ndarray, context: int, min_context: int, unit: str) -> None:
    """Raise unless some token of the data has so many others before it, and the model can look back over them."""
    if not 1 <= min_context <= context:
        raise ArgumentError(f"--min-context {min_context}: it must be from 1 to the model's context, {context}")
    if len(data) <= min_context:
        raise DataError(
            f"{len(data):,} {unit}s are too few to evaluate: no {unit} has {min_context:,} others before it; give more "
            "data or a smaller --min-context"
        )


def order0_entropy(data: np.ndarray) -> float:
    """-sum_b p(b) log2 p(b), with p the frequencies of the bytes in ``data``, uint8[bytes]; in bits per byte."""
    counts = np.bincount(data, minlength=256)
    p = counts[counts > 0] / len(data)
    # Never -0.0, of one byte over and over.
    return float((p * -np.log2(p)).sum()) + 0.0


def xz_bits_per_byte(data: np.ndarray) -> float:
    """What ``xz -9e`` needs for ``data``, uint8[bytes]; in bits per byte."""
    return 8 * len(lzma.compress(data.tobytes(), preset=9 | lzma.PRESET_EXTREME)) / len(data)
