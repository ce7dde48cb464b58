"""How well tokens are predicted, by how much context stands before them.

A model that uses its context predicts better the more it has. A pattern that cuts off what the model used shows as a
curve that goes flat, or rises, from where the pattern no longer reaches.
"""

import itertools
import math
import sys
from collections.abc import Mapping
from dataclasses import dataclass

import numpy as np
import torch
from torch import nn

from longstride.errors import ArgumentError, DataError
from longstride.training import side_by_side, window_losses


@dataclass(frozen=True)
class ContextRange:
    """The predictions that had from ``fewest`` to ``most`` tokens before them.

    Args:
        tokens: how many predictions were measured.
        bits: the mean of -log2 p(token).
        standard_error_bits: of that mean, from how much it differs between windows; None with one window.
    """

    fewest: int
    most: int
    tokens: int
    bits: float
    standard_error_bits: float | None

    @property
    def perplexity(self) -> float:
        # What no float holds.
        return 2**self.bits if self.bits < sys.float_info.max_exp else math.inf


@dataclass(frozen=True)
class LossByContext:
    """The ranges, least context first, over ``windows`` windows that stand side by side in the text."""

    ranges: tuple[ContextRange, ...]
    windows: int
    unit: str = "byte"

    def __str__(self) -> str:
        return context_table({"": self})


def context_ranges(longest: int) -> list[tuple[int, int]]:
    """1, 2, 3 to 4, 5 to 8, ... up to ``longest``, both ends included.

    >>> context_ranges(10)
    [(1, 1), (2, 2), (3, 4), (5, 8), (9, 10)]
    """
    ends = [1, *(min(2**power, longest) for power in range(1, (longest - 1).bit_length() + 1))]
    return [(previous + 1, end) for previous, end in itertools.pairwise([0, *ends])]


def loss_by_context(
    model: nn.Module,
    data: np.ndarray,
    *,
    context: int,
    batch_size: int = 8,
    progress: bool = False,
    record: int = 1,
    unit: str = "byte",
    documents: np.ndarray | None = None,
) -> LossByContext:
    """Measure a model on windows of a text, every prediction of each.

    Args:
        model, data, batch_size, progress, record, unit: as in `longstride.training.evaluate`.
        context: the most tokens before a prediction; with records, tokens in a window.
        documents: int64[documents + 1], where documents begin, and the end, for a model of documents that do not see
            one another: each window is of one of them.

    Raises:
        ArgumentError: a context below 1.
        DataError: the text has not one such window.
        LongstrideError: a loss is no finite number.
    """
    if context < 1:
        raise ArgumentError(f"--context {context}: it must be at least 1")
    windows = side_by_side(len(data), context, record, documents)
    if not windows:
        where = "fits in" if documents is None else "fits into one document, which is all that this model sees at once"
        raise DataError(
            f"{len(data):,} {unit}s are too few: not one window with {context:,} {unit}s of context {where}; give more "
            "data or a smaller --context"
        )
    ranges = context_ranges(windows[0].length)
    means = []  # [windows, ranges]
    for _, losses in window_losses(model, data, windows, batch_size, progress):
        bits = losses.double() / math.log(2)
        means.append(torch.stack([bits[:, fewest - 1 : most].mean(1) for fewest, most in ranges], dim=1))
    by_window = torch.cat(means)
    return LossByContext(
        tuple(
            ContextRange(
                fewest,
                most,
                tokens=len(windows) * (most - fewest + 1),
                bits=column.mean().item(),
                standard_error_bits=column.std().item() / len(windows) ** 0.5 if len(windows) > 1 else None,
            )
            for (fewest, most), column in zip(ranges, by_window.T, strict=True)
        ),
        windows=len(windows),
        unit=unit,
    )


def context_table(measured: Mapping[str, LossByContext]) -> str:
    """The losses of one model along several schedules, by name, in columns; of the same windows."""
    first, *others = measured.values()
    header = f"{'context':>17} {f'{first.unit}s':>11} {'bits':>8} {'+/-':>7} {'perplexity':>11}"
    lines = [header + "".join(f"  {f'bits {name}':>8} {'more':>8}" for name in list(measured)[1:])]
    for row, entry in enumerate(first.ranges):
        span = f"{entry.fewest:,}" if entry.fewest == entry.most else f"{entry.fewest:,} to {entry.most:,}"
        error = "" if entry.standard_error_bits is None else f"{entry.standard_error_bits:.3f}"
        line = f"{span:>17} {entry.tokens:>11,} {entry.bits:>8.4f} {error:>7} {entry.perplexity:>11,.2f}"
        for name, other in zip(list(measured)[1:], others, strict=True):
            bits = other.ranges[row].bits
            line += f"  {bits:>{max(8, len(name) + 5)}.4f} {_signed(bits - entry.bits):>8}"
        lines.append(line)
    return "\n".join(lines)


def _signed(bits: float) -> str:
    """Four digits, and no minus before a zero."""
    return f"{round(bits, 4) + 0.0:+.4f}"
