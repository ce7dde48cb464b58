"""`Dense` tiles: strided views of q, k and v into a fused kernel; nothing is copied."""

from __future__ import annotations

import torch

from longstride.backends.torch.fused import fused_backward, fused_forward
from longstride.backends.torch.state import Gradients, Inputs, Output, put
from longstride.plan import Dense


def _tiled(x: torch.Tensor, batch: int, rows: int, start: int, step: int, stride: int) -> torch.Tensor:
    """[n, batch, rows(, dim)]: the tiles of x [n, length(, dim)] as a view; nothing is copied."""
    n, length, *dim = x.stride()
    size = (x.shape[0], batch, rows, *x.shape[2:])
    return x.as_strided(size, (n, step * length, stride * length, *dim), x.storage_offset() + start * length)


def _dense_views(inputs: Inputs, tile: Dense) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    keys = [inputs.k, inputs.v]
    if tile.keys is not None:
        positions = tile.keys.positions(inputs.k.shape[1]).to(inputs.k.device)
        keys = [x.index_select(1, positions) for x in keys]
    q = _tiled(inputs.q, tile.batch, tile.q_rows, tile.q_start, tile.q_step, tile.stride)
    k, v = (_tiled(x, tile.batch, tile.k_rows, tile.k_start, tile.k_step, tile.stride) for x in keys)
    return q, k, v


def _dense_rows(x: torch.Tensor, tile: Dense) -> torch.Tensor:
    return _tiled(x, tile.batch, tile.q_rows, tile.q_start, tile.q_step, tile.stride)


def dense_forward(inputs: Inputs, tile: Dense, result: Output, first: bool) -> None:
    out, lse = fused_forward(*_dense_views(inputs, tile), inputs.scale, tile.causal)
    put(_dense_rows(result.out, tile), _dense_rows(result.lse, tile), out[..., : result.out.shape[2]], lse, first)


def dense_backward(inputs: Inputs, tile: Dense, grads: Gradients) -> None:
    views = _dense_views(inputs, tile)
    grad_out, out, lse, delta = (_dense_rows(x, tile) for x in (grads.grad_out, grads.out, grads.lse, grads.delta))
    grad_q, grad_k, grad_v = fused_backward(
        grad_out,
        *views,
        out,
        lse,
        delta,
        scale=inputs.scale,
        causal=tile.causal,
        through_lse=grads.through_lse,
    )
    _dense_rows(grads.q, tile).add_(grad_q)
    for total, more in ((grads.k, grad_k), (grads.v, grad_v)):
        where = (tile.batch, tile.k_rows, tile.k_start, tile.k_step, tile.stride)
        if tile.keys is None:
            _tiled(total, *where).add_(more)
        else:
            positions = tile.keys.positions(total.shape[1]).to(total.device)
            compact = torch.zeros(
                total.shape[0], len(positions), total.shape[2], dtype=total.dtype, device=total.device
            )
            _tiled(compact, *where).add_(more)
            total.index_add_(1, positions, compact)
