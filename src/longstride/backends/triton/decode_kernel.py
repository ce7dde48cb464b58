"""The decode kernel: a few queries a row of the batch against the rows that a cache holds for them.

Every program takes one query position of one lane (all its heads at once) and a share of the keys, which it finds by
arithmetic on the position (`decode_geometry`). Programs of the last share also attend to the step's own new tokens,
as these were given, and write them to the cache: no row that they overwrite is read by any query of the step. Of the
programs of one query the one that finishes last joins their results.
"""

import triton
import triton.language as tl

from longstride.backends.triton.decode_geometry import (
    STORE_WORDS,
    WALK_WORDS,
    allowed,
    bounds,
    listed,
    position,
    row,
    word,
)

#: Below every score, and finite, so that a row without keys has no infinity less infinity.
NOTHING = tl.constexpr(-1.0e30)


# ---- attention ------------------------------------------------------------------------------------------------------


@triton.jit
def _absorb(
    q, keys, values, ok, scale, peak, total, acc, DOTS: tl.constexpr, UPCAST: tl.constexpr, PRECISION: tl.constexpr
):
    """The running softmax after some more keys [BLOCK_N, BLOCK_D] and their values [BLOCK_N, BLOCK_DV].

    One head's q is [BLOCK_D], its peak and total are numbers and its acc [BLOCK_DV]: nothing changes its layout on the
    way. Several heads, [BLOCK_G, BLOCK_D] and so on, share their keys in matrix products.
    """
    if DOTS:
        if UPCAST:  # the interpreter multiplies the bits of bfloat16
            keys = keys.to(tl.float32)
            values = values.to(tl.float32)
        scores = tl.dot(q.to(keys.dtype), tl.trans(keys), input_precision=PRECISION)
        scores = tl.where(ok[None, :], scores * scale, float("-inf"))
        new_peak = tl.maximum(peak, tl.max(scores, 1))
        weights = tl.exp2(scores - new_peak[:, None])
        faded = tl.exp2(peak - new_peak)
        more = tl.dot(weights.to(values.dtype), values, input_precision=PRECISION)
        return new_peak, total * faded + tl.sum(weights, 1), acc * faded[:, None] + more
    else:
        scores = tl.sum(q.to(tl.float32)[None, :] * keys.to(tl.float32), 1)
        scores = tl.where(ok, scores * scale, float("-inf"))
        new_peak = tl.maximum(peak, tl.max(scores, 0))
        weights = tl.exp2(scores - new_peak)
        faded = tl.exp2(peak - new_peak)
        more = tl.sum(weights[:, None] * values.to(tl.float32), 0)
        return new_peak, total * faded + tl.sum(weights, 0), acc * faded + more


@triton.jit
def _read(
    r: tl.constexpr,
    i,
    seen,
    split,
    query,
    keys,
    values,
    spots,
    lists,
    scale,
    peak,
    total,
    acc,
    PROGRAM: tl.constexpr,
    SPLITS: tl.constexpr,
    HEAD_DIM: tl.constexpr,
    V_HEAD_DIM: tl.constexpr,
    BLOCK_D: tl.constexpr,
    BLOCK_DV: tl.constexpr,
    BLOCK_N: tl.constexpr,
    DOTS: tl.constexpr,
    UPCAST: tl.constexpr,
    PRECISION: tl.constexpr,
):
    """The running softmax after this split's stretch of read r: positions before the step alone.

    The reads begin at different splits, so that short ones do not all fall to the first.
    """
    READ: tl.constexpr = word(PROGRAM, 2 + STORE_WORDS * word(PROGRAM, 0) + r)
    STORE: tl.constexpr = word(PROGRAM, READ + 1 + WALK_WORDS)
    QUERIES: tl.constexpr = word(PROGRAM, READ + 2 + WALK_WORDS)
    KEEP: tl.constexpr = word(PROGRAM, READ + 3 + WALK_WORDS)
    DROPS: tl.constexpr = word(PROGRAM, READ + 5 + WALK_WORDS)
    n = tl.arange(0, BLOCK_N)
    d = tl.arange(0, BLOCK_D)
    dv = tl.arange(0, BLOCK_DV)
    first, count = bounds(i, seen, PROGRAM, READ, spots)
    count = tl.maximum(count, 0)
    if QUERIES >= 0:
        count = tl.where(listed(i, QUERIES, spots, lists), count, 0)
    stretch = tl.cdiv(tl.cdiv(count, SPLITS), BLOCK_N) * BLOCK_N
    split = (split + r * SPLITS // word(PROGRAM, 1)) % SPLITS
    for begin in range(split * stretch, tl.minimum(count, (split + 1) * stretch), BLOCK_N):
        there = begin + n < count
        j = position(i, first, begin + n, PROGRAM, READ, spots, lists, there)
        there = there & (j >= 0) & (j < seen)
        j = tl.where(there, j, 0)
        ok = there & allowed(i, j, PROGRAM, KEEP, DROPS, spots, lists)
        place, _ = row(j, PROGRAM, STORE, spots, lists, ok)
        place = tl.where(ok, place, 0).to(tl.int64)
        key_at = keys + place[:, None] * HEAD_DIM + d[None, :]
        key = tl.load(key_at, mask=ok[:, None] & (d < HEAD_DIM)[None, :], other=0.0)
        value_at = values + place[:, None] * V_HEAD_DIM + dv[None, :]
        value = tl.load(value_at, mask=ok[:, None] & (dv < V_HEAD_DIM)[None, :], other=0.0)
        peak, total, acc = _absorb(query, key, value, ok, scale, peak, total, acc, DOTS, UPCAST, PRECISION)
    return peak, total, acc


@triton.jit
def _own(r: tl.constexpr, i, j, spots, lists, PROGRAM: tl.constexpr):
    """True where read r's part has the pair, whatever its walk."""
    READ: tl.constexpr = word(PROGRAM, 2 + STORE_WORDS * word(PROGRAM, 0) + r)
    FULL: tl.constexpr = word(PROGRAM, READ + 4 + WALK_WORDS)
    DROPS: tl.constexpr = word(PROGRAM, READ + 5 + WALK_WORDS)
    return allowed(i, j, PROGRAM, FULL, DROPS, spots, lists)


@triton.jit
def _join(
    line, part_acc, part_peak, part_total, out, SPLITS: tl.constexpr, V_HEAD_DIM: tl.constexpr, BLOCK_DV: tl.constexpr
):
    """One softmax of a query's line in out, of those of its splits: read past the first-level cache of this core."""
    s = tl.arange(0, SPLITS)
    dv = tl.arange(0, BLOCK_DV)
    peaks = tl.load(part_peak + line * SPLITS + s, cache_modifier=".cg")
    totals = tl.load(part_total + line * SPLITS + s, cache_modifier=".cg")
    at = part_acc + (line * SPLITS + s)[:, None] * V_HEAD_DIM + dv[None, :]
    acc = tl.load(at, mask=(dv < V_HEAD_DIM)[None, :], other=0.0, cache_modifier=".cg")
    faded = tl.exp2(peaks - tl.max(peaks, 0))
    total = tl.sum(totals * faded, 0)
    result = tl.sum(acc * faded[:, None], 0) / tl.where(total > 0, total, 1.0)
    tl.store(out + line * V_HEAD_DIM + dv, result.to(out.dtype.element_ty), mask=dv < V_HEAD_DIM)


@triton.jit
def decode(
    q,
    new_k,
    new_v,
    keys,
    values,
    lengths,
    lanes,
    spots,
    lists,
    out,
    part_acc,
    part_peak,
    part_total,
    arrivals,
    q_batch,
    q_head,
    q_token,
    k_batch,
    k_head,
    k_token,
    v_batch,
    v_head,
    v_token,
    rows,
    heads,
    scale,
    PROGRAM: tl.constexpr,
    SPOTS: tl.constexpr,
    TOKENS: tl.constexpr,
    SHARE: tl.constexpr,
    SPLITS: tl.constexpr,
    HEAD_DIM: tl.constexpr,
    V_HEAD_DIM: tl.constexpr,
    BLOCK_D: tl.constexpr,
    BLOCK_DV: tl.constexpr,
    BLOCK_G: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_T: tl.constexpr,
    UPCAST: tl.constexpr,
    PRECISION: tl.constexpr,
):
    """Grid [batch * TOKENS, lanes, SPLITS]: out.

    keys, values: [batch, rows, dim], contiguous; out and the parts: contiguous, heads as in out [batch, heads, tokens].
    arrivals: int32 [batch * TOKENS * all lanes], zeros, and zeros again at the end. scale: in base 2.
    """
    batch = (tl.program_id(0) // TOKENS).to(tl.int64)
    turn = tl.program_id(0) % TOKENS
    lane = tl.program_id(1)
    split = tl.program_id(2)
    first_head = tl.load(lanes + 4 * lane) * SHARE
    kv_head = tl.load(lanes + 4 * lane + 1)
    base = tl.load(lanes + 4 * lane + 2)
    writes = tl.load(lanes + 4 * lane + 3)
    spots += lane * 2 * SPOTS
    seen = tl.load(lengths + batch).to(tl.int32)
    i = seen + turn
    DOTS: tl.constexpr = SHARE > 1

    d = tl.arange(0, BLOCK_D)
    dv = tl.arange(0, BLOCK_DV)
    in_d = d < HEAD_DIM
    in_dv = dv < V_HEAD_DIM
    q += batch * q_batch + turn * q_token
    if DOTS:
        g = tl.arange(0, BLOCK_G)
        head = first_head + g
        real = g < SHARE
        query = tl.load(q + head[:, None] * q_head + d[None, :], mask=real[:, None] & in_d[None, :], other=0.0)
        if UPCAST:
            query = query.to(tl.float32)
        peak = tl.full([BLOCK_G], NOTHING, tl.float32)
        total = tl.zeros([BLOCK_G], tl.float32)
        acc = tl.zeros([BLOCK_G, BLOCK_DV], tl.float32)
    else:
        query = tl.load(q + first_head * q_head + d, mask=in_d, other=0.0)
        peak = tl.full([], NOTHING, tl.float32)
        total = tl.full([], 0.0, tl.float32)
        acc = tl.zeros([BLOCK_DV], tl.float32)

    keys += (batch * rows + base) * HEAD_DIM
    values += (batch * rows + base) * V_HEAD_DIM
    new_k += batch * k_batch + kv_head * k_head
    new_v += batch * v_batch + kv_head * v_head

    # The step's own tokens, up to the query's: loaded early, since nothing but the lane decides where they are.
    own = split == SPLITS - 1
    t = tl.arange(0, BLOCK_T)
    there = t <= tl.where(own, turn, -1)
    own_keys = tl.load(new_k + t[:, None] * k_token + d[None, :], mask=there[:, None] & in_d[None, :], other=0.0)
    own_values = tl.load(new_v + t[:, None] * v_token + dv[None, :], mask=there[:, None] & in_dv[None, :], other=0.0)

    # Everything before the step, the numbers of each read cut into SPLITS stretches.
    for r in tl.static_range(word(PROGRAM, 1)):
        peak, total, acc = _read(
            r,
            i,
            seen,
            split,
            query,
            keys,
            values,
            spots,
            lists,
            scale,
            peak,
            total,
            acc,
            PROGRAM,
            SPLITS,
            HEAD_DIM,
            V_HEAD_DIM,
            BLOCK_D,
            BLOCK_DV,
            BLOCK_N,
            DOTS,
            UPCAST,
            PRECISION,
        )

    if own:
        j = seen + t
        ok = t < 0
        for r in tl.static_range(word(PROGRAM, 1)):
            ok = ok | _own(r, i, j, spots, lists, PROGRAM)
        ok = ok & there
        peak, total, acc = _absorb(query, own_keys, own_values, ok, scale, peak, total, acc, DOTS, UPCAST, PRECISION)
        if writes != 0:
            own_key = tl.load(new_k + turn * k_token + d, mask=in_d, other=0.0)
            own_value = tl.load(new_v + turn * v_token + dv, mask=in_dv, other=0.0)
            for s in tl.static_range(word(PROGRAM, 0)):
                place, member = row(i, PROGRAM, 2 + STORE_WORDS * s, spots, lists, i >= 0)
                if member:
                    tl.store(keys + place.to(tl.int64) * HEAD_DIM + d, own_key, mask=in_d)
                    tl.store(values + place.to(tl.int64) * V_HEAD_DIM + dv, own_value, mask=in_dv)

    line = (batch * heads + first_head) * TOKENS + turn  # int64; a head further on is TOKENS lines further on
    if SPLITS == 1:
        if DOTS:
            result = acc / tl.where(total > 0, total, 1.0)[:, None]
            at = out + (line + g * TOKENS)[:, None] * V_HEAD_DIM + dv[None, :]
            tl.store(at, result.to(out.dtype.element_ty), mask=real[:, None] & in_dv[None, :])
        else:
            result = acc / tl.where(total > 0, total, 1.0)
            tl.store(out + line * V_HEAD_DIM + dv, result.to(out.dtype.element_ty), mask=in_dv)
    else:
        if DOTS:
            parts = (line + g * TOKENS) * SPLITS + split
            tl.store(part_peak + parts, peak, mask=real)
            tl.store(part_total + parts, total, mask=real)
            at = part_acc + parts[:, None] * V_HEAD_DIM + dv[None, :]
            tl.store(at, acc, mask=real[:, None] & in_dv[None, :])
        else:
            part = line * SPLITS + split
            tl.store(part_peak + part, peak)
            tl.store(part_total + part, total)
            tl.store(part_acc + part * V_HEAD_DIM + dv, acc, mask=in_dv)
        # All warps of this program must have stored before one thread says so to the others.
        tl.debug_barrier()
        arrival = arrivals + (batch * TOKENS + turn) * (heads // SHARE) + first_head // SHARE
        if tl.atomic_add(arrival, 1, sem="acq_rel", scope="gpu") == SPLITS - 1:
            for member in range(SHARE):
                _join(line + member * TOKENS, part_acc, part_peak, part_total, out, SPLITS, V_HEAD_DIM, BLOCK_DV)
            tl.store(arrival, 0)
