"""The public op of generation: attention of new tokens to themselves and to what a cache holds of the earlier ones."""

from __future__ import annotations

import math

import torch

from longstride.attention import attention
from longstride.backends.decode_request import CachedRows, DecodeRequest
from longstride.cache import PatternCache, Step
from longstride.dispatch.checks import autocast_on, check_tensors, check_types, no_autocast, wants_gradients
from longstride.dispatch.decoding import DECODERS, choose_decoder
from longstride.errors import ArgumentError, UnsupportedError
from longstride.patterns import Pattern


def attention_cached(
    q: torch.Tensor,
    k: torch.Tensor,
    v: torch.Tensor,
    pattern: Pattern,
    cache: PatternCache,
    *,
    layer: int = 0,
    counts: torch.Tensor | None = None,
    scale: float | None = None,
    backend: str | None = None,
) -> torch.Tensor:
    """What `attention` gives the last rows of the whole sequences, from the new tokens and the cache.

    Keeps of k and v what the pattern may read later. `cache.advance()` ends the step, when all layers have been given
    their tokens. Up to headroom + 1 tokens are decoded in place, at the cost of the keys that they read. More are a
    chunk of a prompt: it runs through `attention`, behind what the cache holds laid out as a sequence.

    Args:
        q: [batch, heads, tokens, head_dim], float16, bfloat16, float32 or float64.
        k, v: the same tokens: [batch, kv_heads, tokens, head_dim] and [batch, kv_heads, tokens, v_head_dim].
        pattern: the one that the cache's layer was made for.
        cache: what earlier calls kept.
        layer: whose keys and values these are.
        counts: int64 [batch]: how many tokens of each row there are, the first ones; all of them when not given. What
            comes out behind them means nothing.
        scale: factor of the scores; 1 / sqrt(head_dim) when not given.
        backend: one of `longstride.attention.BACKENDS` by name; the fastest that takes the request when not given. One
            that has no decoding of its own is given every step as a chunk.

    Returns:
        out [batch, heads, tokens, v_head_dim] in q's dtype.

    Raises:
        ArgumentError: tensors that do not fit together or into the cache; another pattern than the cache's; no room.
        UnsupportedError: gradients are wanted; no backend, or not the named one, takes the request.
    """
    check_types(q, k, v, pattern, scale)
    if not isinstance(cache, PatternCache):
        raise ArgumentError(f"cache is {type(cache).__name__}: it must be a longstride.PatternCache")
    if wants_gradients(q, k, v):
        raise UnsupportedError(
            "a cache keeps no gradients: call it under torch.no_grad(), and attention() on whole sequences to train"
        )
    if autocast_on(q):
        q, k, v = (x.to(cache.dtype) for x in (q, k, v))
    check_tensors((q.shape, k.shape, v.shape), (q.dtype, k.dtype, v.dtype), (q.device, k.device, v.device))
    with no_autocast(q):
        step = cache.feed(layer, q.shape[2], counts)
        try:
            _check_layer(q, k, v, pattern, cache, layer)
            return _attend(q, k, v, cache, layer, step, scale, backend)
        except BaseException:
            step.fed.discard(layer)
            if not step.fed:
                cache.abandon()
            raise


def _check_layer(
    q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, pattern: Pattern, cache: PatternCache, layer: int
) -> None:
    made = cache.layouts[layer]
    if pattern != made.pattern:
        raise ArgumentError(
            f"pattern {pattern}: layer {layer} of this cache keeps what {made.pattern} reads; make a cache for it"
        )
    if k.shape[2] != q.shape[2]:
        raise ArgumentError(f"{q.shape[2]} queries and {k.shape[2]} keys: give the queries and keys of the same tokens")
    found = (q.shape[0], q.shape[1], k.shape[1], k.shape[3], v.shape[3])
    keys, values = cache.keys[layer], cache.values[layer]
    expected = (cache.batch, made.num_heads, made.num_kv_heads, keys.shape[2], values.shape[2])
    if found != expected:
        raise ArgumentError(
            f"batch, heads, kv_heads, head_dim, v_head_dim are {found}: this cache was made for {expected}"
        )
    if (q.dtype, q.device) != (cache.dtype, cache.device):
        raise ArgumentError(
            f"q, k and v are {q.dtype} on {q.device}: this cache is {cache.dtype} on {cache.device}; convert them"
        )


def _attend(
    q: torch.Tensor,
    k: torch.Tensor,
    v: torch.Tensor,
    cache: PatternCache,
    layer: int,
    step: Step,
    scale: float | None,
    backend: str | None,
) -> torch.Tensor:
    scale = 1.0 / math.sqrt(q.shape[-1]) if scale is None else float(scale)
    made = cache.layouts[layer]
    memory = (cache.keys[layer], cache.values[layer], cache.lengths, cache.arrivals)
    rows = CachedRows(made, *memory, cache.shortest, cache.longest, step.shared)
    if step.counts is None and step.tokens <= made.headroom + 1:
        chosen = choose_decoder(DecodeRequest(made, q.shape[3], v.shape[3], q.dtype, q.device.type), backend)
        if chosen is not None:
            _refuse_to_be_recorded(q, chosen)
            return DECODERS[chosen].decode(q, k, v, rows, scale)
    _refuse_to_be_recorded(q, "a chunk")
    if step.most == 0:
        return q.new_zeros(*q.shape[:3], v.shape[3])
    if cache.longest == 0:
        out = attention(q, k, v, made.pattern, scale=scale, backend=backend)
    else:
        out = _after_held(q, k, v, rows, step, scale, backend)
    assert isinstance(out, torch.Tensor)  # a pair comes with return_lse alone
    _keep(k, v, rows, step)
    return out


def _refuse_to_be_recorded(q: torch.Tensor, how: str) -> None:
    """All but the kernel look at lengths on the host, which a CUDA graph would keep for good."""
    if q.is_cuda and how != "triton" and torch.cuda.is_current_stream_capturing():
        raise UnsupportedError(
            f"a CUDA graph cannot record this step ({how}): its lengths would stay as they are now; record steps of up "
            "to headroom + 1 tokens, with backend='triton'"
        )


def _after_held(
    q: torch.Tensor,
    k: torch.Tensor,
    v: torch.Tensor,
    rows: CachedRows,
    step: Step,
    scale: float,
    backend: str | None,
) -> torch.Tensor:
    """Attention over what is held, laid out as a sequence: zeros, which nobody reads, stand for what was evicted."""
    tokens, lengths = step.tokens, rows.lengths[:, None]
    kv_len = step.longest
    if "held" not in rows.shared:
        rows.shared["held"] = {}
    held = rows.shared["held"]
    if rows.layout not in held:
        held[rows.layout] = rows.layout.held_rows(rows.longest, rows.lengths)
    old = held[rows.layout]
    keys, values = (_laid_out(memory, old, new) for memory, new in ((rows.keys, k), (rows.values, v)))
    if rows.shortest == rows.longest:
        cut = slice(0, kv_len)
        q = q[:, :, : step.most]
        out = attention(q, keys[:, :, cut], values[:, :, cut], rows.layout.pattern, scale=scale, backend=backend)
        assert isinstance(out, torch.Tensor)
        return torch.nn.functional.pad(out, (0, 0, 0, tokens - step.most))
    # Rows differ: bring every row's new tokens to their own positions, and their queries beside the shortest row's.
    position = torch.arange(kv_len, device=q.device)
    source = torch.where(position < lengths, position, (rows.longest + position - lengths).clamp(max=keys.shape[2] - 1))
    keys, values = _taken(keys, source), _taken(values, source)
    turn = position[rows.shortest :]
    queries = _taken(q, (turn - lengths).clamp(0, tokens - 1))
    out = attention(queries, keys, values, rows.layout.pattern, scale=scale, backend=backend)
    assert isinstance(out, torch.Tensor)
    back = lengths - rows.shortest + torch.arange(tokens, device=q.device)
    return _taken(out, back.clamp(max=out.shape[2] - 1))


def _laid_out(memory: torch.Tensor, old: torch.Tensor, new: torch.Tensor) -> torch.Tensor:
    """What is held at the places `old` int64 [batch, heads, kv_len], and the new tokens behind it."""
    batch, heads, kv_len = old.shape
    index = old.flatten(1)[..., None].expand(-1, -1, memory.shape[2])
    return torch.cat([memory.gather(1, index).view(batch, heads, kv_len, -1), new], 2)


def _taken(x: torch.Tensor, places: torch.Tensor) -> torch.Tensor:
    """x [batch, heads, length, dim] at places int64 [batch, n]."""
    return x.gather(2, places[:, None, :, None].expand(-1, x.shape[1], -1, x.shape[3]))


def _keep(k: torch.Tensor, v: torch.Tensor, rows: CachedRows, step: Step) -> None:
    """Write the new tokens that a later query may read."""
    key = ("write", rows.layout)
    if key not in rows.shared:
        turn = torch.arange(step.tokens, device=k.device)
        position, counts = rows.lengths[:, None] + turn, step.counts
        if counts is None:
            places = rows.layout.write_rows(position, position[:, -1:] + 1)
        else:
            places = rows.layout.write_rows(position, (rows.lengths + counts)[:, None], turn < counts[:, None])
        rows.shared[key] = places
    places = rows.shared[key]
    for memory, new in ((rows.keys, k), (rows.values, v)):
        source = new[:, :, None].expand(-1, -1, places.shape[2], -1, -1).flatten(1, 3)
        memory.scatter_(1, places.flatten(1)[..., None].expand_as(source), source)
