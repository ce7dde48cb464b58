"""Running the tiles of a plan, forward and backward, on any device.

Every tile scores a batch of small dense attentions and merges them into the running output by log-sum-exp; the
backward runs every tile again with the merged output and log-sum-exp. Loops go over slabs: runs of tiles whose scores
fit in the cache together, so their number is the work divided by a constant, whatever the length or the heads.
"""

from __future__ import annotations

import torch

from longstride.backends.torch.dense import dense_backward, dense_forward
from longstride.backends.torch.masked import masked_backward, masked_forward
from longstride.backends.torch.shifts import shifts_backward, shifts_forward
from longstride.backends.torch.state import Gradients, Inputs, Output
from longstride.backends.torch.tile_math import merge
from longstride.backends.torch.window import window_backward, window_forward
from longstride.plan import Dense, Listed, Masked, Part, Shifts, Tile, Window, tiles


def run_forward(inputs: Inputs, parts: tuple[Part, ...]) -> Output:
    """out and log-sum-exp of all `parts` in one softmax."""
    q_len, kv_len = inputs.q.shape[1], inputs.k.shape[1]
    whole = bool(parts) and not parts[0].skip_rows and _writes_every_row(tiles(parts[0], q_len, kv_len), q_len)
    result = Output.empty(inputs, filled=not whole)
    first = True
    for part in parts:
        rows = _skipped_rows(part, inputs)
        for tile in tiles(part, q_len, kv_len):
            if len(rows) or (isinstance(tile, Window) and tile.flip):
                _forward_aside(inputs, tile, result, rows)
            else:
                _forward(inputs, tile, result, first)
            first = False
    return result


def run_backward(inputs: Inputs, parts: tuple[Part, ...], grads: Gradients) -> None:
    """Add the gradients of all `parts` to ``grads.q``, ``grads.k`` and ``grads.v``."""
    for part in parts:
        rows = _skipped_rows(part, inputs)
        counted = grads.without_rows(rows) if len(rows) else grads
        for tile in tiles(part, inputs.q.shape[1], inputs.k.shape[1]):
            if isinstance(tile, Window) and tile.flip:
                flipped = inputs.flip()
                aside = counted.flip(flipped)
                window_backward(flipped, tile, aside)
                for total, more in zip((grads.q, grads.k, grads.v), (aside.q, aside.k, aside.v), strict=True):
                    total += more.flip(1)
            else:
                _backward(inputs, tile, counted)


def _writes_every_row(of_part: tuple[Tile, ...], q_len: int) -> bool:
    """True when the first tile gives every row a result, so that the output need not be filled before."""
    match of_part:
        case (Dense(batch, q_rows), *_):
            return batch * q_rows == q_len
        case (Window(_, rows), *_):
            return rows == q_len and not of_part[0].flip
        case _:
            return False


def _skipped_rows(part: Part, inputs: Inputs) -> torch.Tensor:
    rows = [token - inputs.before for token in part.skip_rows if 0 <= token - inputs.before < inputs.q.shape[1]]
    return torch.tensor(rows, dtype=torch.int64, device=inputs.q.device)


def _forward_aside(inputs: Inputs, tile: Tile, result: Output, rows: torch.Tensor) -> None:
    """Run a tile on its own, reversed in time or with some rows cut off, and merge the whole."""
    flip = isinstance(tile, Window) and tile.flip
    alone = Output.empty(inputs)
    _forward(inputs.flip() if flip else inputs, tile, alone, True)
    out, lse = (alone.out.flip(1), alone.lse.flip(1)) if flip else (alone.out, alone.lse)
    merge(result.out, result.lse, out, lse.index_fill(1, rows, float("-inf")))


def _forward(inputs: Inputs, tile: Tile, result: Output, first: bool) -> None:
    """`first`: nothing was merged yet, so that the tile's result can be copied."""
    match tile:
        case Dense():
            dense_forward(inputs, tile, result, first)
        case Window():
            window_forward(inputs, tile, result, first)
        case Masked() | Listed():
            masked_forward(inputs, tile, result)
        case Shifts():
            shifts_forward(inputs, tile, result)


def _backward(inputs: Inputs, tile: Tile, grads: Gradients) -> None:
    match tile:
        case Dense():
            dense_backward(inputs, tile, grads)
        case Window():
            window_backward(inputs, tile, grads)
        case Masked() | Listed():
            masked_backward(inputs, tile, grads)
        case Shifts():
            shifts_backward(inputs, tile, grads)
