"""`Shifts`: single diagonals, rowwise products of q and shifted k."""

from __future__ import annotations

from collections.abc import Iterator

import torch

from longstride.backends.torch.state import Gradients, Inputs, Output
from longstride.backends.torch.tile_math import merge
from longstride.plan import Shifts


def _diagonals(inputs: Inputs, tile: Shifts) -> Iterator[tuple[int, slice, slice]]:
    """(place among the offsets, query rows, key positions) of every diagonal."""
    for place, offset in enumerate(tile.offsets):
        low = max(0, offset - inputs.before)
        high = min(inputs.q.shape[1], inputs.q.shape[1] + offset)
        if low < high:
            key = inputs.before - offset
            yield place, slice(low, high), slice(low + key, high + key)


def _shift_scores(inputs: Inputs, tile: Shifts, dtype: torch.dtype) -> torch.Tensor:
    """[n, q_len, offsets]: scaled scores, -inf where the diagonal leaves the matrix or an earlier part has the pair."""
    n, q_len, _ = inputs.q.shape
    scores = torch.full((n, q_len, len(tile.offsets)), float("-inf"), dtype=dtype, device=inputs.q.device)
    for place, rows, keys in _diagonals(inputs, tile):
        products = torch.linalg.vecdot(inputs.q[:, rows].to(dtype), inputs.k[:, keys].to(dtype))
        i = torch.arange(rows.start, rows.stop, device=scores.device) + inputs.before
        counted = tile.part.allows(i, i - tile.offsets[place])
        scores[:, rows, place] = (products * inputs.scale).masked_fill(~counted, float("-inf"))
    return scores


def shifts_forward(inputs: Inputs, tile: Shifts, result: Output) -> None:
    scores = _shift_scores(inputs, tile, result.out.dtype)
    lse = scores.logsumexp(-1)
    weights = (scores - lse.masked_fill(lse == float("-inf"), 0.0)[..., None]).exp_()
    out = torch.zeros_like(result.out)
    for place, rows, keys in _diagonals(inputs, tile):
        out[:, rows].addcmul_(weights[:, rows, place, None], inputs.v[:, keys].to(out.dtype))
    merge(result.out, result.lse, out, lse)


def shifts_backward(inputs: Inputs, tile: Shifts, grads: Gradients) -> None:
    dtype = grads.q.dtype
    scores = _shift_scores(inputs, tile, dtype)
    # A score of -inf in a row whose log-sum-exp stands as +inf gives exp(-inf) = 0 too.
    weights = (scores - grads.lse[..., None]).exp_()
    for place, rows, keys in _diagonals(inputs, tile):
        weight, grad_out = weights[:, rows, place], grads.grad_out[:, rows].to(dtype)
        grads.v[:, keys].addcmul_(weight[..., None], grad_out)
        products = torch.linalg.vecdot(grad_out, inputs.v[:, keys].to(dtype))
        grad_score = (products.sub_(grads.delta[:, rows]) * weight).masked_fill(weight == 0, 0.0)[..., None]
        grads.q[:, rows].addcmul_(grad_score, inputs.k[:, keys].to(dtype), value=inputs.scale)
        grads.k[:, keys].addcmul_(grad_score, inputs.q[:, rows].to(dtype), value=inputs.scale)
