"""The checks that the tests of the core share, and that `test_mutations.py` shows to catch broken code.

The truth is `pattern.allows` and the dense softmax, never a plan.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence

import torch
from torch.utils._python_dispatch import TorchDispatchMode

import longstride as ls
from longstride.backends import torch as torch_backend
from longstride.plan import Dense, Listed, Masked, Part, Shifts, Tile, Window, tiles

#: The largest difference that two ways of computing the same float64 numbers may show.
EXACT = 1e-10

#: A result in a lower precision may err so many times as much as the same computation done plainly in that dtype.
TIMES_PLAIN = {"out": 2.0, "lse": 2.0, "grad_q": 3.0, "grad_k": 3.0, "grad_v": 3.0}

#: And so much besides, relative to the largest number of the truth: a few roundings, for where the plain computation
#: happens to make none (a softmax over one key).
FLOOR = {torch.float32: 5e-7, torch.bfloat16: 2e-3, torch.float16: 2.5e-4}


# ---- patterns -----------------------------------------------------------------------------------------------------


def assert_mask_is(pattern: ls.Pattern, formula: Callable[[int, int], bool]) -> None:
    """The mask against a rule for two ints, over lengths that strides and blocks divide or not."""
    for q_len, kv_len in ((1, 1), (2, 2), (23, 23), (32, 32), (1, 37), (9, 40)):
        wanted = [[bool(formula(i, j)) for j in range(kv_len)] for i in range(kv_len - q_len, kv_len)]
        assert pattern.mask(q_len, kv_len).tolist() == wanted, f"{pattern} at {q_len}, {kv_len}"


def assert_counts_its_pairs(pattern: ls.Pattern, q_len: int, kv_len: int, heads: int | None = None) -> None:
    counted, there = pattern.pairs(q_len, kv_len, heads=heads), int(pattern.mask(q_len, kv_len, heads=heads).sum())
    assert counted == there, f"{pattern} at {q_len}, {kv_len}: {counted} pairs, not {there}"


def assert_keeps_what_is_read(pattern: ls.Pattern, now: int, later: int, exactly: bool = False) -> None:
    """`retained` against the keys that the queries now .. later - 1 read; `exactly` these, or at least these."""
    kept, read = pattern.retained(now), pattern.mask(later)[..., now:, :now].any(-2)
    assert kept.dtype == torch.bool
    assert kept.shape == read.shape
    assert not (read & ~kept).any(), f"{pattern} drops a key at {now} that is still read"
    assert not exactly or torch.equal(kept, read), f"{pattern} keeps a key at {now} that nobody reads"


# ---- plans --------------------------------------------------------------------------------------------------------


def positions(q_len: int, kv_len: int) -> tuple[torch.Tensor, torch.Tensor]:
    """Query positions as a column, key positions as a row."""
    return torch.arange(kv_len - q_len, kv_len)[:, None], torch.arange(kv_len)


def rules_of(pattern: ls.Pattern, heads: int | None = None) -> tuple[ls.Pattern, ...]:
    return pattern.split_heads((pattern.num_heads or 1) if heads is None else heads)


def assert_parts_are_the_pattern(pattern: ls.Pattern, q_len: int, kv_len: int, heads: int | None = None) -> None:
    """Every allowed pair lies in exactly one part, no other pair in any, for every head; counts agree."""
    made = ls.plan(pattern, q_len, kv_len, heads)
    rules = rules_of(pattern, heads)
    assert sorted(head for members, _ in made.groups for head in members) == list(range(len(rules)))
    i, j = positions(q_len, kv_len)
    total = 0
    for members, parts in made.groups:
        times = torch.zeros(q_len, kv_len, dtype=torch.int64)
        for part in parts:
            inside = part.allows(i, j)
            times += inside
            assert part.pairs(q_len, kv_len) == int(inside.sum()), f"{part}.pairs({q_len}, {kv_len})"
        for head in members:
            assert torch.equal(times, rules[head].mask(q_len, kv_len).long()), f"{pattern} at {q_len}, {kv_len}"
            total += int(times.sum())
    assert made.pairs == total
    assert made.scored_pairs >= total


def times_scored(tile: Tile, q_len: int, kv_len: int) -> torch.Tensor:
    """int64 [q_len, kv_len]: how often a tile counts each pair, decoded from the tile's own description."""
    times = torch.zeros(q_len, kv_len, dtype=torch.int64)
    before = kv_len - q_len
    match tile:
        case Dense():
            keys = torch.arange(kv_len) if tile.keys is None else tile.keys.positions(kv_len)
            for t in range(tile.batch):
                rows = tile.q_start + t * tile.q_step + torch.arange(tile.q_rows) * tile.stride
                columns = keys[tile.k_start + t * tile.k_step + torch.arange(tile.k_rows) * tile.stride]
                ones = torch.ones(tile.q_rows, tile.k_rows, dtype=torch.int64)
                times[rows[:, None], columns] += ones.tril() if tile.causal else ones
        case Window():
            i, j = positions(tile.q_len, tile.kv_len)
            distance = torch.div(i - j, tile.dilation, rounding_mode="floor")
            band = ((i - j) % tile.dilation == 0) & (distance >= 0) & (distance < tile.window)
            times[tile.q_start : tile.q_start + tile.q_len, : tile.kv_len] += band
            if tile.flip:
                times = times.flip(0, 1)
        case Masked() | Listed():
            q, k = tile.positions(0, tile.count, torch.device("cpu"))
            assert q.shape == (tile.count, tile.shape[0])
            assert k.shape == (tile.count, tile.shape[1])
            # A query must lie in one tile only: results are copied back by row.
            assert len(q[q >= 0]) == len(q[q >= 0].unique())
            allowed = tile.part.allows(q.clamp(min=0)[:, :, None], k.clamp(min=0)[:, None, :])
            allowed = allowed & (q >= 0)[:, :, None] & (k >= 0)[:, None, :]
            t, row, column = allowed.nonzero(as_tuple=True)
            where = (q[t, row] - before, k[t, column])
            times.index_put_(where, torch.ones(len(t), dtype=torch.int64), accumulate=True)
        case Shifts():
            for offset in tile.offsets:
                i = torch.arange(before, kv_len)
                i = i[(i - offset >= 0) & (i - offset < kv_len)]
                i = i[tile.part.allows(i, i - offset)]
                times[i - before, i - offset] += 1
    return times


def assert_tiles_are_the_part(part: Part, q_len: int, kv_len: int) -> None:
    """The tiles of a part score each of its pairs once, and no other pair."""
    cut = tiles(part, q_len, kv_len)
    times = torch.zeros(q_len, kv_len, dtype=torch.int64)
    for tile in cut:
        times += times_scored(tile, q_len, kv_len)
        assert tile.scored_pairs >= int(times_scored(tile, q_len, kv_len).sum())
    # Rows that an earlier part has whole are cut off after the tiles have run.
    skipped = [row - (kv_len - q_len) for row in part.skip_rows if kv_len - q_len <= row < kv_len]
    times[skipped] = 0
    wanted = part.allows(*positions(q_len, kv_len)).long()
    assert torch.equal(times, wanted), f"{part} at {q_len}, {kv_len}: {cut}"


def assert_plan_is_sound(pattern: ls.Pattern, q_len: int, kv_len: int, heads: int | None = None) -> None:
    assert_parts_are_the_pattern(pattern, q_len, kv_len, heads)
    for part in ls.plan(pattern, q_len, kv_len, heads).parts:
        assert_tiles_are_the_part(part, q_len, kv_len)


class ScoreCounter(TorchDispatchMode):
    """Multiplications of matrix products and of the fused attention operator, a causal triangle counted as one."""

    multiplications = 0

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        if func in (torch.ops.aten.bmm.default, torch.ops.aten.mm.default):
            *batch, rows, inner = args[0].shape
            self.multiplications += math.prod(batch) * rows * inner * args[1].shape[-1]
        elif func is torch.ops.aten._scaled_dot_product_flash_attention_for_cpu.default:
            (*batch, rows, dim), keys, causal = args[0].shape, args[1].shape[-2], args[4:5] == (True,)
            self.multiplications += 2 * math.prod(batch) * dim * (rows * (rows + 1) // 2 if causal else rows * keys)
        return func(*args, **(kwargs or {}))


def assert_scores_what_it_says(pattern: ls.Pattern, q_len: int, kv_len: int) -> None:
    """`scored_pairs` against the matrix products that the torch backend makes."""
    q, k, v = (x.detach() for x in make_inputs(3, 2, 2, q_len, kv_len, dim=8))
    with ScoreCounter() as counter:
        torch_backend.forward(q, k, v, pattern, 0.3)
    # Two products a score, q with k and weights with v, of eight numbers each.
    assert counter.multiplications / 16 == 3 * ls.plan(pattern, q_len, kv_len, 2).scored_pairs


# ---- attention ----------------------------------------------------------------------------------------------------


def make_inputs(
    batch: int,
    heads: int,
    kv_heads: int,
    q_len: int,
    kv_len: int,
    dim: int = 4,
    v_dim: int | None = None,
    dtype: torch.dtype = torch.float64,
    seed: int = 0,
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """Random q, k, v that want gradients."""
    random = torch.Generator().manual_seed(seed)
    shapes = ((heads, q_len, dim), (kv_heads, kv_len, dim), (kv_heads, kv_len, dim if v_dim is None else v_dim))
    drawn = (torch.randn(batch, *shape, generator=random, dtype=torch.float64).to(dtype) for shape in shapes)
    q, k, v = (x.requires_grad_() for x in drawn)
    return q, k, v


def plain(
    q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, mask: torch.Tensor, scale: float | None = None
) -> tuple[torch.Tensor, torch.Tensor]:
    """Masked softmax attention in the dtype of its inputs, as anybody would write it. mask bool [heads, q, kv]."""
    scale = q.shape[-1] ** -0.5 if scale is None else scale
    groups = q.shape[1] // k.shape[1]
    k, v = k.repeat_interleave(groups, 1), v.repeat_interleave(groups, 1)
    scores = (q @ k.transpose(-1, -2) * scale).masked_fill(~mask, -math.inf)
    lse = scores.logsumexp(-1)
    weights = (scores - lse[..., None]).exp().masked_fill(~mask.any(-1)[..., None], 0.0)
    return weights @ v, lse


def results(
    compute: Callable[..., tuple[torch.Tensor, torch.Tensor]],
    inputs: Sequence[torch.Tensor],
    *,
    through_lse: bool = True,
    seed: int = 1,
) -> dict[str, torch.Tensor]:
    """out, lse and the gradients of a random weighting of both (the lse of rows without keys has none)."""
    out, lse = compute(*inputs)
    random = torch.Generator().manual_seed(seed)
    loss = (out * torch.randn(out.shape, generator=random, dtype=torch.float64).to(out.dtype)).sum()
    if through_lse:
        weights = torch.randn(lse.shape, generator=random, dtype=torch.float64).to(lse.dtype)
        loss = loss.to(lse.dtype) + (lse.masked_fill(lse == -math.inf, 0.0) * weights).sum()
    grads = torch.autograd.grad(loss, inputs)
    return dict(zip(TIMES_PLAIN, (out.detach(), lse.detach(), *grads), strict=True))


def attend(pattern: ls.Pattern, backend: str | None, scale: float | None = None) -> Callable[..., tuple]:
    return lambda q, k, v: ls.attention(q, k, v, pattern, scale=scale, backend=backend, return_lse=True)


def assert_same(got: dict[str, torch.Tensor], wanted: dict[str, torch.Tensor], tolerance: float = EXACT) -> None:
    """Every number within `tolerance`; -inf only where it is wanted; NaN nowhere."""
    for name, truth in wanted.items():
        value = got[name]
        assert value.shape == truth.shape, f"{name}: {list(value.shape)}, not {list(truth.shape)}"
        assert not value.isnan().any(), f"{name} has NaN"
        assert torch.equal(value == -math.inf, truth == -math.inf), f"{name}: -inf in the wrong rows"
        error = (value - truth).masked_fill(truth == -math.inf, 0.0).abs().max().item()
        assert error <= tolerance, f"{name} is off by {error:.3g}"


def assert_torch_is_reference(
    pattern: ls.Pattern,
    q_len: int,
    kv_len: int,
    *,
    batch: int = 1,
    heads: int = 4,
    kv_heads: int = 4,
    dim: int = 4,
    v_dim: int | None = None,
    scale: float | None = None,
    through_lse: bool | None = None,
) -> None:
    """out, lse and all gradients of the two backends agree in float64.

    Gradients through out alone and through the log-sum-exp too take different kernels: both are checked unless
    `through_lse` names one.
    """
    inputs = make_inputs(batch, heads, kv_heads, q_len, kv_len, dim, v_dim)
    for through in (False, True) if through_lse is None else (through_lse,):
        got, wanted = (
            results(attend(pattern, backend, scale), inputs, through_lse=through) for backend in ("torch", "reference")
        )
        assert_same(got, wanted)


def assert_as_precise_as_plain(
    pattern: ls.Pattern, q_len: int, kv_len: int, dtype: torch.dtype, backend: str, **shapes: int
) -> None:
    """Errors against float64 stay within `TIMES_PLAIN` of those of the plain computation in `dtype`, and `FLOOR`."""
    shape = {"batch": 1, "heads": 2, "kv_heads": 2, "dim": 16} | shapes
    inputs = make_inputs(q_len=q_len, kv_len=kv_len, dtype=dtype, **shape)
    mask = pattern.mask(q_len, kv_len, heads=shape["heads"])
    assert mask.any(-1).all(), "choose a pattern without empty rows: the plain computation has no answer there"
    exact = [x.detach().double().requires_grad_() for x in inputs]
    for through_lse in (False, True):
        truth = results(lambda q, k, v: plain(q, k, v, mask), exact, through_lse=through_lse)
        usual = results(lambda q, k, v: plain(q, k, v, mask), inputs, through_lse=through_lse)
        got = results(attend(pattern, backend), inputs, through_lse=through_lse)
        for name, factor in TIMES_PLAIN.items():
            assert not got[name].isnan().any(), f"{name} has NaN"
            error, allowed = ((x[name].double() - truth[name]).abs() for x in (got, usual))
            floor = FLOOR[dtype] * truth[name].abs().max().item()
            for measure in (torch.max, lambda x: x.square().mean().sqrt()):
                most = factor * measure(allowed).item() + floor
                found = measure(error).item()
                assert found <= most, f"{name} of {pattern}, {dtype}, {through_lse=}: {found:.3g} > {most:.3g}"


def assert_blind(
    pattern: ls.Pattern,
    q_len: int,
    kv_len: int,
    row: int,
    backend: str,
    poison: float,
    dtype: torch.dtype = torch.float32,
    heads: int = 4,
    kv_heads: int = 2,
) -> None:
    """Writing `poison` into every key and value that query `row` may not see leaves its out and lse as they are."""
    q, k, v = (x.detach() for x in make_inputs(1, heads, kv_heads, q_len, kv_len, 8, dtype=dtype))
    seen = pattern.mask(q_len, kv_len, heads=heads)[:, row].unflatten(0, (kv_heads, -1)).any(1)
    before = ls.attention(q, k, v, pattern, backend=backend, return_lse=True)
    # Alternating signs: sums of products overflow to inf - inf as well as to inf.
    signs = torch.tensor([1.0, -1.0], dtype=dtype).repeat(4)
    poisoned = (torch.where(seen[None, :, :, None], x, poison * signs) for x in (k, v))
    after = ls.attention(q, *poisoned, pattern, backend=backend, return_lse=True)
    for name, old, new in zip(("out", "lse"), before, after, strict=True):
        assert torch.equal(old[:, :, row], new[:, :, row]), f"{name}[{row}] of {pattern} saw what it may not see"
