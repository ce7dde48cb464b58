"""`Masked` and `Listed` tiles: gathered by position, with the part's rule looked up inside."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

import torch

from longstride.backends.torch.state import Gradients, Inputs, Output, slab_scores
from longstride.backends.torch.tile_math import merge, tile_backward, tile_forward
from longstride.plan import Listed, Masked


@dataclass(frozen=True)
class _Gathered:
    """A run of masked tiles: which rows and keys they hold, and which pairs count.

    n: sequences; rows int64 [tiles * q_rows] and keys int64 [tiles * k_rows], padding clamped to 0;
    real bool [tiles * q_rows]; allowed bool [tiles, q_rows, k_rows].
    """

    n: slice
    rows: torch.Tensor
    keys: torch.Tensor
    real: torch.Tensor
    allowed: torch.Tensor

    def queries(self, x: torch.Tensor, dtype: torch.dtype) -> torch.Tensor:
        """[n, tiles, q_rows(, dim)]"""
        return x[self.n].index_select(1, self.rows).to(dtype).unflatten(1, self.allowed.shape[:2])

    def reads(self, x: torch.Tensor, dtype: torch.dtype) -> torch.Tensor:
        """[n, tiles, k_rows, dim]"""
        tiles_, _, keys = self.allowed.shape
        return x[self.n].index_select(1, self.keys).to(dtype).unflatten(1, (tiles_, keys))


def _gather(inputs: Inputs, tile: Masked | Listed) -> Iterator[_Gathered]:
    device, (q_rows, k_rows) = inputs.q.device, tile.shape
    sequences = inputs.q.shape[0]
    most = slab_scores(device)
    n_step = min(sequences, max(1, most // (q_rows * k_rows)))
    step = max(1, most // (q_rows * k_rows * n_step))
    for first in range(0, tile.count, step):
        q, k = tile.positions(first, min(first + step, tile.count), device)
        i, j = q.clamp(min=0)[:, :, None], k.clamp(min=0)[:, None, :]
        allowed = tile.part.allows(i, j) & (q >= 0)[:, :, None] & (k >= 0)[:, None, :]
        rows = (q - inputs.before).clamp(min=0).flatten()
        for low in range(0, sequences, n_step):
            yield _Gathered(slice(low, low + n_step), rows, k.clamp(min=0).flatten(), (q >= 0).flatten(), allowed)


def masked_forward(inputs: Inputs, tile: Masked | Listed, result: Output) -> None:
    dtype = result.out.dtype
    for some in _gather(inputs, tile):
        q, k, v = some.queries(inputs.q, dtype), some.reads(inputs.k, dtype), some.reads(inputs.v, dtype)
        out, lse = tile_forward(q, k, v, inputs.scale, some.allowed)
        rows = some.rows[some.real]
        part_out, part_lse = out.flatten(1, 2)[:, some.real], lse.flatten(1, 2)[:, some.real]
        merged_out, merged_lse = result.out[some.n].index_select(1, rows), result.lse[some.n].index_select(1, rows)
        merge(merged_out, merged_lse, part_out, part_lse)
        result.out[some.n].index_copy_(1, rows, merged_out)
        result.lse[some.n].index_copy_(1, rows, merged_lse)


def masked_backward(inputs: Inputs, tile: Masked | Listed, grads: Gradients) -> None:
    dtype = grads.q.dtype
    for some in _gather(inputs, tile):
        q, k, v = some.queries(inputs.q, dtype), some.reads(inputs.k, dtype), some.reads(inputs.v, dtype)
        grad_out, lse, delta = (some.queries(x, dtype) for x in (grads.grad_out, grads.lse, grads.delta))
        grad_q, grad_k, grad_v = tile_backward(q, k, v, grad_out, lse, delta, inputs.scale, some.allowed)
        grads.q[some.n].index_add_(1, some.rows[some.real], grad_q.flatten(1, 2)[:, some.real])
        grads.k[some.n].index_add_(1, some.keys, grad_k.flatten(1, 2))
        grads.v[some.n].index_add_(1, some.keys, grad_v.flatten(1, 2))
