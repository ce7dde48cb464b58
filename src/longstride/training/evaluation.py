"""Bits per byte with a stated minimum context, beside what simple compressors need for the same bytes.

A byte counts once, in a window where at least ``min_context`` bytes stand before it. Windows overlap accordingly: a
larger minimum is a stricter, slower and usually better figure (Child et al. 2019, table 3). Other kinds of data are
measured alike, in bits per token (of an image: per dim). Where windows must begin at a record, as with images, they
stand side by side instead, as in training, and all tokens of each count but the first, which nothing stands before.
"""

import lzma
import math
import time
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch import nn
from torch.nn import functional as F
from tqdm import tqdm

from longstride.errors import ArgumentError, DataError


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
    """Windows of ``context`` tokens side by side, each at a multiple of ``record``; all but its first are predicted."""
    for start in range(0, total - context + 1, -(-context // record) * record):
        yield Span(start, context - 1, first=0)


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
    """
    check_min_context(data, context, min_context)
    if record > 1 and min_context != 1:
        raise ArgumentError(
            f"--min-context {min_context}: windows that begin at records of {record:,} tokens stand side by side, so "
            "that it must be 1"
        )
    if record > 1 and len(data) < context:
        raise DataError(f"{len(data):,} tokens are too few to evaluate: a window has {context:,}; give more data")
    windows = list(spans(len(data), context, min_context) if record == 1 else record_spans(len(data), context, record))

    def batches() -> Iterator[Batch]:
        for first in range(0, len(windows), batch_size):
            batch = windows[first : first + batch_size]
            # [batch, length + 1]; all windows are equally long.
            read = np.stack([data[span.start : span.start + span.length + 1] for span in batch]).astype(np.int64)
            tokens = torch.from_numpy(read)
            targets = tokens[:, 1:].clone()
            for row, span in enumerate(batch):
                targets[row, : span.first] = -100
            yield {"input_ids": tokens[:, :-1]}, targets

    # The compressors get the first token of each record, too.
    counted_data = np.asarray(data[min_context:] if record == 1 else data[: windows[-1].start + context])
    looks_back = (min_context, windows[0].length)
    number = -(-len(windows) // batch_size)
    result = measured(model, batches(), number, counted_data, looks_back=looks_back, progress=progress, unit=unit)
    assert result.counted_bytes == (len(counted_data) if record == 1 else len(windows) * (context - 1))
    return result


#: What a model is called with, and what its predictions are held against: int64[batch, length], -100 where they do not
#: count.
Batch = tuple[dict[str, Any], torch.Tensor]


@torch.no_grad()
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
    device = next(model.parameters()).device
    was_training = model.training
    model.eval()
    began = time.monotonic()
    nats, counted = 0.0, 0
    for given, targets in tqdm(
        batches, total=number, desc="evaluating", unit="batch", leave=False, disable=None if progress else True
    ):
        inputs = {name: x.to(device) if isinstance(x, torch.Tensor) else x for name, x in given.items()}
        logits = model(**inputs).logits.float()
        losses = F.cross_entropy(logits.transpose(1, 2), targets.to(device), reduction="none")  # 0 at -100
        nats += losses.double().sum().item()
        counted += int((targets != -100).sum())
    model.train(was_training)
    return Evaluation(
        bits_per_byte=nats / counted / math.log(2),
        counted_bytes=counted,
        min_context=looks_back[0],
        max_context=looks_back[1],
        order0_bits_per_byte=order0_entropy(counted_data),
        xz_bits_per_byte=xz_bits_per_byte(counted_data),
        elapsed_s=time.monotonic() - began,
        unit=unit,
    )


def check_min_context(data: np.ndarray, context: int, min_context: int) -> None:
    """Raise unless some token of the data has so many others before it, and the model can look back over them."""
    if not 1 <= min_context <= context:
        raise ArgumentError(f"--min-context {min_context}: it must be from 1 to the model's context, {context}")
    if len(data) <= min_context:
        raise DataError(
            f"{len(data):,} bytes are too few to evaluate: no byte has {min_context:,} others before it; give more "
            "data or a smaller --min-context"
        )


def order0_entropy(data: np.ndarray) -> float:
    """-sum_b p(b) log2 p(b), with p the frequencies of the bytes in ``data``, uint8[bytes]; in bits per byte."""
    counts = np.bincount(data, minlength=256)
    p = counts[counts > 0] / len(data)
    return float(-(p * np.log2(p)).sum())


def xz_bits_per_byte(data: np.ndarray) -> float:
    """What ``xz -9e`` needs for ``data``, uint8[bytes]; in bits per byte."""
    return 8 * len(lzma.compress(data.tobytes(), preset=9 | lzma.PRESET_EXTREME)) / len(data)
