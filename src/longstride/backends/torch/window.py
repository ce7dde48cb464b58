"""`Window` tiles: every tile of queries against its own and a few preceding tiles of keys."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

import torch
from torch.nn.functional import pad

from longstride.backends.torch.state import Gradients, Inputs, Output, put, slab_scores
from longstride.backends.torch.tile_math import tile_backward, tile_forward
from longstride.plan import Window


@dataclass(frozen=True)
class _Slab:
    """Sequences n_low .. n_high - 1 and tiles t_low .. t_high - 1 of a `Window`."""

    tile: Window
    n_low: int
    n_high: int
    t_low: int
    t_high: int

    @property
    def step(self) -> int:
        """Positions a tile covers."""
        return self.tile.rows * self.tile.dilation

    @property
    def rows(self) -> tuple[int, int]:
        """The slab's query rows, first and end."""
        start = self.tile.q_start
        return start + self.t_low * self.step, start + min(self.t_high * self.step, self.tile.q_len)

    @property
    def keys(self) -> tuple[int, int]:
        """The slab's key positions, first (may be negative) and end (may lie past the last key)."""
        before = self.tile.kv_len - self.tile.q_len
        return before + (self.t_low - self.tile.back) * self.step, before + self.t_high * self.step

    def take(self, x: torch.Tensor, first: int, end: int, dtype: torch.dtype | None = None) -> torch.Tensor:
        """[classes, tiles, rows(, dim)] of x[n_low:n_high, first:end], zeros before 0 and past `end`."""
        low = max(first, 0)
        piece = x[self.n_low : self.n_high, low:end]
        piece = piece if dtype is None else piece.to(dtype)
        short = -(end - first) % self.step
        if low > first or short:
            piece = pad(piece, (0, 0) * (x.dim() - 2) + (low - first, short))
        piece = piece.unflatten(1, (-1, self.tile.rows, self.tile.dilation)).movedim(3, 1)
        return piece.flatten(0, 1)

    def take_queries(self, x: torch.Tensor, dtype: torch.dtype | None = None) -> torch.Tensor:
        """[classes * tiles, rows(, dim)]"""
        return self.take(x, *self.rows, dtype).flatten(0, 1)

    def take_keys(self, x: torch.Tensor, dtype: torch.dtype) -> torch.Tensor:
        """[classes * tiles, (back + 1) * rows, dim]: every tile's own keys after those of the preceding tiles."""
        first, end = self.keys
        blocks = self.take(x, first, min(end, self.tile.kv_len), dtype)
        flat = blocks.flatten(1, 2)
        span = (self.tile.back + 1) * self.tile.rows
        return flat.unfold(1, span, self.tile.rows).transpose(-1, -2).flatten(0, 1)

    def put(self, blocks: torch.Tensor, first: int, end: int) -> torch.Tensor:
        """The inverse of `take`: [n, end - max(first, 0)(, dim)]."""
        x = blocks.unflatten(0, (self.n_high - self.n_low, self.tile.dilation)).movedim(1, 3).flatten(1, 3)
        return x[:, max(first, 0) - first : end - first]

    def put_queries(self, x: torch.Tensor) -> torch.Tensor:
        return self.put(x.unflatten(0, (-1, self.t_high - self.t_low)), *self.rows)

    def put_keys(self, x: torch.Tensor) -> torch.Tensor:
        """Add up what the tiles say of the keys they share: [n, keys, dim]."""
        back, rows, count = self.tile.back, self.tile.rows, self.t_high - self.t_low
        x = x.unflatten(1, (back + 1, rows)).unflatten(0, (-1, count))  # [classes, tiles, back + 1, rows, dim]
        if count == 1:
            blocks = x[:, 0]
        else:
            blocks = x.new_zeros(x.shape[0], count + back, rows, x.shape[-1])
            for shift in range(back + 1):
                blocks[:, shift : shift + count] += x[:, :, shift]
        first, end = self.keys
        return self.put(blocks, first, min(end, self.tile.kv_len))

    def allowed(self, device: torch.device) -> torch.Tensor:
        """bool [rows, span], or [classes * tiles, rows, span] where some keys lie before position 0."""
        tile = self.tile
        span = (tile.back + 1) * tile.rows
        row, key = torch.arange(tile.rows, device=device), torch.arange(span, device=device)
        distance = row[:, None] + tile.back * tile.rows - key
        band = (distance >= 0) & (distance < tile.window)
        first = self.keys[0]
        if first >= 0:
            return band
        lane = torch.arange(tile.dilation, device=device)[:, None, None]
        number = torch.arange(self.t_high - self.t_low, device=device)[:, None]
        exists = first + number * self.step + key * tile.dilation + lane >= 0  # [dilation, tiles, span]
        return (band & exists.flatten(0, 1)[:, None]).repeat(self.n_high - self.n_low, 1, 1)


def _slabs(tile: Window, q: torch.Tensor) -> Iterator[_Slab]:
    sequences, scores, most = q.shape[0], tile.scored_pairs // tile.tiles, slab_scores(q.device)
    n_step = min(sequences, max(1, most // scores))
    t_step = min(tile.tiles, max(1, most // (scores * n_step)))
    for n_low in range(0, sequences, n_step):
        for t_low in range(0, tile.tiles, t_step):
            yield _Slab(tile, n_low, min(n_low + n_step, sequences), t_low, min(t_low + t_step, tile.tiles))


def window_forward(inputs: Inputs, tile: Window, result: Output, first: bool) -> None:
    dtype = result.out.dtype
    for slab in _slabs(tile, inputs.q):
        q, k, v = slab.take_queries(inputs.q, dtype), slab.take_keys(inputs.k, dtype), slab.take_keys(inputs.v, dtype)
        out, lse = tile_forward(q, k, v, inputs.scale, slab.allowed(q.device))
        low, high = slab.rows
        where = (slice(slab.n_low, slab.n_high), slice(low, high))
        put(result.out[where], result.lse[where], slab.put_queries(out), slab.put_queries(lse), first)


def window_backward(inputs: Inputs, tile: Window, grads: Gradients) -> None:
    dtype = grads.q.dtype
    for slab in _slabs(tile, inputs.q):
        q, k, v = slab.take_queries(inputs.q, dtype), slab.take_keys(inputs.k, dtype), slab.take_keys(inputs.v, dtype)
        grad_out, lse, delta = (slab.take_queries(x, dtype) for x in (grads.grad_out, grads.lse, grads.delta))
        grad_q, grad_k, grad_v = tile_backward(q, k, v, grad_out, lse, delta, inputs.scale, slab.allowed(q.device))
        n = slice(slab.n_low, slab.n_high)
        grads.q[n, slice(*slab.rows)] += slab.put_queries(grad_q)
        first, end = slab.keys
        keys = slice(max(first, 0), min(end, tile.kv_len))
        grads.k[n, keys] += slab.put_keys(grad_k)
        grads.v[n, keys] += slab.put_keys(grad_v)
