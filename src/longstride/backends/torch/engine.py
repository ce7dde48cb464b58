"""Running the tiles of a plan, forward and backward, on any device.

Every tile scores a batch of small dense attentions and merges them into the running output by log-sum-exp; the
backward runs every tile again with the merged output and log-sum-exp. Loops go over slabs: runs of tiles whose scores
fit in the cache together, so their number is the work divided by a constant, whatever the length or the heads.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

import torch
from torch.nn.functional import pad

from longstride.backends.request import accumulator
from longstride.backends.torch.fused import fused_backward, fused_forward
from longstride.backends.torch.tile_math import merge, tile_backward, tile_forward
from longstride.plan import Dense, Listed, Masked, Part, Shifts, Tile, Window, tiles

#: Scores a slab holds: 2 MB of float32, which stays in a core's cache between the products that use it.
SLAB_SCORES = 1 << 19


@dataclass
class Inputs:
    """q [n, q_len, dim], k and v [n, kv_len, dim]: all heads of all batch rows, one after another."""

    q: torch.Tensor
    k: torch.Tensor
    v: torch.Tensor
    scale: float

    @property
    def before(self) -> int:
        """Keys before the first query."""
        return self.k.shape[1] - self.q.shape[1]

    def flip(self) -> Inputs:
        """Reversed in time."""
        return Inputs(self.q.flip(1), self.k.flip(1), self.v.flip(1), self.scale)


@dataclass
class Output:
    """The running result: out [n, q_len, v_dim] and lse [n, q_len] in the accumulator's dtype."""

    out: torch.Tensor
    lse: torch.Tensor

    @staticmethod
    def empty(inputs: Inputs, filled: bool = True) -> Output:
        """`filled`: with 0 and -inf, what rows without keys have; else to be written whole."""
        n, q_len, _ = inputs.q.shape
        dtype = accumulator(inputs.q.dtype)
        out, lse = (
            inputs.q.new_empty(n, q_len, inputs.v.shape[2], dtype=dtype),
            inputs.q.new_empty(n, q_len, dtype=dtype),
        )
        return Output(out.zero_(), lse.fill_(float("-inf"))) if filled else Output(out, lse)


@dataclass
class Gradients:
    """What the backward knows of the merged result, and the gradients that it adds up (accumulator's dtype)."""

    grad_out: torch.Tensor
    out: torch.Tensor
    lse: torch.Tensor  # +inf in rows without keys: exp(score - inf) = 0
    delta: torch.Tensor  # sum(out * grad_out) - grad_lse
    grad_lse: torch.Tensor | None
    q: torch.Tensor
    k: torch.Tensor
    v: torch.Tensor

    @staticmethod
    def empty(
        inputs: Inputs,
        grad_out: torch.Tensor,
        out: torch.Tensor,
        lse: torch.Tensor,
        delta: torch.Tensor,
        grad_lse: torch.Tensor | None,
    ) -> Gradients:
        zeros = [torch.zeros_like(x, dtype=accumulator(x.dtype)) for x in (inputs.q, inputs.k, inputs.v)]
        return Gradients(grad_out, out, lse, delta, grad_lse, *zeros)

    def flip(self, inputs: Inputs) -> Gradients:
        """The same reversed in time, with gradients of its own; `inputs` are reversed already."""
        grad_lse = None if self.grad_lse is None else self.grad_lse.flip(1)
        known = (x.flip(1) for x in (self.grad_out, self.out, self.lse, self.delta))
        return Gradients.empty(inputs, *known, grad_lse)

    def without_rows(self, rows: torch.Tensor) -> Gradients:
        """The same, for a part that leaves out `rows`; the gradients are shared."""
        return Gradients(
            self.grad_out,
            self.out,
            self.lse.index_fill(1, rows, float("inf")),
            self.delta,
            self.grad_lse,
            self.q,
            self.k,
            self.v,
        )


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
                _window_backward(flipped, tile, aside)
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
            _dense_forward(inputs, tile, result, first)
        case Window():
            _window_forward(inputs, tile, result, first)
        case Masked() | Listed():
            _masked_forward(inputs, tile, result)
        case Shifts():
            _shifts_forward(inputs, tile, result)


def _backward(inputs: Inputs, tile: Tile, grads: Gradients) -> None:
    match tile:
        case Dense():
            _dense_backward(inputs, tile, grads)
        case Window():
            _window_backward(inputs, tile, grads)
        case Masked() | Listed():
            _masked_backward(inputs, tile, grads)
        case Shifts():
            _shifts_backward(inputs, tile, grads)


def _merge(out: torch.Tensor, lse: torch.Tensor, part_out: torch.Tensor, part_lse: torch.Tensor, first: bool) -> None:
    if first:
        out.copy_(part_out)
        lse.copy_(part_lse)
    else:
        merge(out, lse, part_out, part_lse)


# ---- Dense: strided views into a fused kernel -----------------------------------------------------------------------


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


def _dense_forward(inputs: Inputs, tile: Dense, result: Output, first: bool) -> None:
    out, lse = fused_forward(*_dense_views(inputs, tile), inputs.scale, tile.causal)
    _merge(_dense_rows(result.out, tile), _dense_rows(result.lse, tile), out[..., : result.out.shape[2]], lse, first)


def _dense_backward(inputs: Inputs, tile: Dense, grads: Gradients) -> None:
    views = _dense_views(inputs, tile)
    grad_out, out, lse, delta = (_dense_rows(x, tile) for x in (grads.grad_out, grads.out, grads.lse, grads.delta))
    grad_lse = None if grads.grad_lse is None else _dense_rows(grads.grad_lse, tile)
    grad_q, grad_k, grad_v = fused_backward(
        grad_out, *views, out, lse, delta, grad_lse, scale=inputs.scale, causal=tile.causal
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


# ---- Window: tiles of queries against their own and a few preceding tiles of keys -----------------------------------


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


def _slabs(tile: Window, sequences: int) -> Iterator[_Slab]:
    scores = tile.scored_pairs // tile.tiles
    n_step = min(sequences, max(1, SLAB_SCORES // scores))
    t_step = min(tile.tiles, max(1, SLAB_SCORES // (scores * n_step)))
    for n_low in range(0, sequences, n_step):
        for t_low in range(0, tile.tiles, t_step):
            yield _Slab(tile, n_low, min(n_low + n_step, sequences), t_low, min(t_low + t_step, tile.tiles))


def _window_forward(inputs: Inputs, tile: Window, result: Output, first: bool) -> None:
    dtype = result.out.dtype
    for slab in _slabs(tile, inputs.q.shape[0]):
        q, k, v = slab.take_queries(inputs.q, dtype), slab.take_keys(inputs.k, dtype), slab.take_keys(inputs.v, dtype)
        out, lse = tile_forward(q, k, v, inputs.scale, slab.allowed(q.device))
        low, high = slab.rows
        where = (slice(slab.n_low, slab.n_high), slice(low, high))
        _merge(result.out[where], result.lse[where], slab.put_queries(out), slab.put_queries(lse), first)


def _window_backward(inputs: Inputs, tile: Window, grads: Gradients) -> None:
    dtype = grads.q.dtype
    for slab in _slabs(tile, inputs.q.shape[0]):
        q, k, v = slab.take_queries(inputs.q, dtype), slab.take_keys(inputs.k, dtype), slab.take_keys(inputs.v, dtype)
        grad_out, lse, delta = (slab.take_queries(x, dtype) for x in (grads.grad_out, grads.lse, grads.delta))
        grad_q, grad_k, grad_v = tile_backward(q, k, v, grad_out, lse, delta, inputs.scale, slab.allowed(q.device))
        n = slice(slab.n_low, slab.n_high)
        grads.q[n, slice(*slab.rows)] += slab.put_queries(grad_q)
        first, end = slab.keys
        keys = slice(max(first, 0), min(end, tile.kv_len))
        grads.k[n, keys] += slab.put_keys(grad_k)
        grads.v[n, keys] += slab.put_keys(grad_v)


# ---- Masked: tiles gathered by position, with the part's rule looked up inside --------------------------------------


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
    n_step = min(sequences, max(1, SLAB_SCORES // (q_rows * k_rows)))
    step = max(1, SLAB_SCORES // (q_rows * k_rows * n_step))
    for first in range(0, tile.count, step):
        q, k = tile.positions(first, min(first + step, tile.count), device)
        i, j = q.clamp(min=0)[:, :, None], k.clamp(min=0)[:, None, :]
        allowed = tile.part.allows(i, j) & (q >= 0)[:, :, None] & (k >= 0)[:, None, :]
        rows = (q - inputs.before).clamp(min=0).flatten()
        for low in range(0, sequences, n_step):
            yield _Gathered(slice(low, low + n_step), rows, k.clamp(min=0).flatten(), (q >= 0).flatten(), allowed)


def _masked_forward(inputs: Inputs, tile: Masked | Listed, result: Output) -> None:
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


def _masked_backward(inputs: Inputs, tile: Masked | Listed, grads: Gradients) -> None:
    dtype = grads.q.dtype
    for some in _gather(inputs, tile):
        q, k, v = some.queries(inputs.q, dtype), some.reads(inputs.k, dtype), some.reads(inputs.v, dtype)
        grad_out, lse, delta = (some.queries(x, dtype) for x in (grads.grad_out, grads.lse, grads.delta))
        grad_q, grad_k, grad_v = tile_backward(q, k, v, grad_out, lse, delta, inputs.scale, some.allowed)
        grads.q[some.n].index_add_(1, some.rows[some.real], grad_q.flatten(1, 2)[:, some.real])
        grads.k[some.n].index_add_(1, some.keys, grad_k.flatten(1, 2))
        grads.v[some.n].index_add_(1, some.keys, grad_v.flatten(1, 2))


# ---- Shifts: single diagonals, rowwise ------------------------------------------------------------------------------


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


def _shifts_forward(inputs: Inputs, tile: Shifts, result: Output) -> None:
    scores = _shift_scores(inputs, tile, result.out.dtype)
    lse = scores.logsumexp(-1)
    weights = (scores - lse.masked_fill(lse == float("-inf"), 0.0)[..., None]).exp_()
    out = torch.zeros_like(result.out)
    for place, rows, keys in _diagonals(inputs, tile):
        out[:, rows].addcmul_(weights[:, rows, place, None], inputs.v[:, keys].to(out.dtype))
    merge(result.out, result.lse, out, lse)


def _shifts_backward(inputs: Inputs, tile: Shifts, grads: Gradients) -> None:
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
