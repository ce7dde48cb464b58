"""Tile shapes: a small table by device family, with a fallback that always works. No autotuning."""

from __future__ import annotations

from dataclasses import dataclass
from functools import lru_cache

import torch


@dataclass(frozen=True)
class Shape:
    """How a kernel is cut: rows of the owner's tile, rows of a source's tile, warps, pipeline stages.

    registers: the most a thread may take (more programs then share a multiprocessor); 0 leaves it to the compiler.
    """

    own: int
    other: int
    warps: int
    stages: int
    registers: int = 0


@lru_cache(maxsize=8)
def family(device: torch.device) -> str:
    """``hopper``, ``other`` (any other GPU) or ``interpreter`` (no GPU)."""
    if device.type != "cuda":
        return "interpreter"
    return "hopper" if torch.version.hip is None and torch.cuda.get_device_capability(device)[0] == 9 else "other"


#: Pairs a query from which on it pays to run the middle of a window in a loop of its own, without a mask.
LONG = 256


def both_shape(family: str, dtype: torch.dtype, dim: int, span: int) -> Shape | None:
    """The tile shape of ``backward_both``; None where its two halves are faster in launches of their own."""
    if family == "interpreter":
        return Shape(16, 16, 4, 1)
    wide = family == "hopper" and dtype != torch.float32 and dim == 128
    return Shape(64, 64, 4, 2) if wide and 32 < span < LONG else None


def shape(kernel: str, family: str, dtype: torch.dtype, dim: int, span: int) -> Shape:
    """The tile shape of ``forward``, ``backward_q`` or ``backward_kv``.

    Args:
        dim: the larger of head_dim and v_head_dim, rounded up to a power of two.
        span: about how many keys a query meets, on average.
    """
    if family == "interpreter":
        return Shape(16, 16, 4, 1)
    if dtype == torch.float32:
        return Shape(32, 32, 4, 1) if dim <= 128 else Shape(16, 16, 4, 1)
    if family == "hopper":
        return _hopper(kernel, dim, span)
    return Shape(64, 32, 4, 2) if dim <= 128 else Shape(32, 32, 4, 1)


#: Rows from which on products run on Hopper's asynchronous units. In a pipelined loop both kinds of products must not
#: meet in one buffer: Triton (3.6, seen in the machine code) then leaves out the fence between the copy that fills it
#: and the unit that reads it, and the results are wrong now and then.
WIDE_ROWS = 64


def beside_keys(own: int, other: int) -> int:
    """Rows of a tile of queries beside `own` rows of keys in ``backward_kv``, so that all products are of one kind.

    Queries lie along the rows of the scores there, and keys along those of the gradients.
    """
    return min(other, WIDE_ROWS // 2) if own < WIDE_ROWS else other


def _hopper(kernel: str, dim: int, span: int) -> Shape:
    """Measured on an H100 (benchmarks/results/attention_gpu.md holds what they reach)."""
    if span <= 32:  # narrow windows, and single diagonals, which have no matrix products
        return Shape(32, 32, 2 if kernel == "forward" else 4, 1)
    if dim > 128:
        if kernel == "backward_kv":
            return Shape(32, 32, 4, 1)
        return Shape(64, 32, 4, 2) if kernel == "forward" else Shape(64, 32, 8, 1)
    if kernel == "forward":
        if dim > 64:
            return Shape(128, 128, 8, 3) if span > 2 * LONG else Shape(64, 32, 4, 3)
        if span >= 2 * LONG:
            return Shape(128, 64, 4, 3)
        return Shape(64, 64, 4, 3) if span < LONG else Shape(64, 64, 4, 2)
    if kernel == "backward_q":
        if dim > 64:
            return Shape(64, 64, 4, 2)
        return Shape(128, 64, 4, 2) if span == 2 * LONG else Shape(64, 32, 4, 3)
    if dim > 64:
        return Shape(64, 64, 4, 2)
    return Shape(64, 64, 4, 3) if span > 2 * LONG else Shape(64, 64, 4, 2, 168)


@dataclass(frozen=True)
class CellShape:
    """How a closed cell is held on chip: rows of its one or two tiles (b = 0 for one), warps,
    registers as in `Shape`."""

    a: int
    b: int
    warps: int
    registers: int = 0


def cell_shape(kernel: str, family: str, dtype: torch.dtype, dim: int, rows: int) -> CellShape | None:
    """How ``forward_cell`` or ``backward_cell`` holds a cell of `rows` rows, None where it does not fit or is none."""
    if family == "interpreter":
        most = 64
    elif dtype == torch.float32 or dim > 128:
        most = 32
    elif family == "hopper":
        most = 128 if dim <= 64 or kernel == "backward_cell" else 64
    else:
        most = 64
    if not 0 < rows <= most:
        return None
    fit = max(16, 1 << (rows - 1).bit_length())
    if family == "interpreter":
        return CellShape(fit // 2, fit // 2, 4) if fit > 32 else CellShape(fit, 0, 4)
    if fit == 128 and dim <= 64:
        if rows > 96:
            return CellShape(64, 64, 4, 168)
        return CellShape(32, 64, 4, 168) if kernel == "backward_cell" else CellShape(32, 64, 4)
    if fit == 128:
        return CellShape(128, 0, 8)
    if kernel == "forward_cell" and dtype != torch.float32 and dim <= 128:
        return CellShape(64, 0, 4)
    fit = max(32, fit)
    return CellShape(fit, 0, 2 if fit == 32 else 4)
