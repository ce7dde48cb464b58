"""The forward kernel: a tile of queries against every source of keys that it meets, in one softmax."""

import triton
import triton.language as tl

from longstride.backends.triton.geometry import (
    BOTH,
    CLEAR,
    DIAGONALS,
    FAR,
    LN_2,
    LOG2_E,
    NEAR,
    allowed,
    asks,
    count_of,
    edge,
    guarded,
    index_of,
    kind_of,
    met,
    owned,
    place_in_grid,
    places,
    source_of,
    splits,
    stretch,
)


@triton.jit
def rows_of(X, position, there, stride_t, stride_d, d, DIM: tl.constexpr, DIM_PAD: tl.constexpr, WIDE: tl.constexpr):
    """X[position, :] as [BLOCK, DIM_PAD]; zeros where nothing is there."""
    offset = position.to(tl.int64) if WIDE else position
    at = X + offset[:, None] * stride_t + d[None, :] * stride_d
    if DIM == DIM_PAD:
        return tl.load(at, mask=there[:, None], other=0.0)
    return tl.load(at, mask=there[:, None] & (d < DIM)[None, :], other=0.0)


@triton.jit
def all_rows_of(X, position, stride_t, stride_d, d, DIM: tl.constexpr, DIM_PAD: tl.constexpr, WIDE: tl.constexpr):
    """`rows_of` where every row is there."""
    offset = position.to(tl.int64) if WIDE else position
    at = X + offset[:, None] * stride_t + d[None, :] * stride_d
    if DIM == DIM_PAD:
        return tl.load(at)
    return tl.load(at, mask=(d < DIM)[None, :], other=0.0)


@triton.jit
def put_rows(
    X, value, position, there, stride_t, stride_d, d, DIM: tl.constexpr, DIM_PAD: tl.constexpr, WIDE: tl.constexpr
):
    """X[position, :] = value where there."""
    offset = position.to(tl.int64) if WIDE else position
    at = X + offset[:, None] * stride_t + d[None, :] * stride_d
    mask = there[:, None] if DIM == DIM_PAD else there[:, None] & (d < DIM)[None, :]
    tl.store(at, value.to(X.dtype.element_ty), mask=mask)


@triton.jit
def document(starts, batch, low, kv_len, VARLEN: tl.constexpr):
    """Where a batch row's positions lie: (batch index, first row, low, kv_len); packed documents are rows of one."""
    if VARLEN:
        begin = tl.load(starts + batch).to(tl.int32)
        end = tl.load(starts + batch + 1).to(tl.int32)
        # A document longer than was announced is cut: its tiles were never launched.
        return 0, begin, 0, tl.minimum(end - begin, kv_len)
    return batch, 0, low, kv_len


@triton.jit
def begin_softmax(
    Out, Lse, i, there, o_t, o_d, l_t, dv, MERGE: tl.constexpr, BLOCK: tl.constexpr, V_DIM: tl.constexpr,
    V_DIM_PAD: tl.constexpr, WIDE: tl.constexpr,
):  # fmt: skip
    """acc, top, total of a running softmax: empty, or with MERGE what Out and Lse hold already."""
    if MERGE:
        top = tl.load(Lse + i.to(tl.int64) * l_t, mask=there, other=float("-inf")) * LOG2_E
        total = tl.where(top == float("-inf"), 0.0, 1.0)
        acc = rows_of(Out, i, there, o_t, o_d, dv, V_DIM, V_DIM_PAD, WIDE).to(tl.float32)
    else:
        top = tl.full([BLOCK], float("-inf"), tl.float32)
        total = tl.zeros([BLOCK], tl.float32)
        acc = tl.zeros([BLOCK, V_DIM_PAD], tl.float32)
    return acc, top, total


@triton.jit
def put_softmax(
    Out, Lse, acc, top, total, i, there, o_t, o_d, l_t, dv, V_DIM: tl.constexpr, V_DIM_PAD: tl.constexpr,
    WIDE: tl.constexpr
):  # fmt: skip
    """Write out and log-sum-exp: 0 and -inf for rows without a key."""
    nothing = total == 0.0
    out = acc / tl.where(nothing, 1.0, total)[:, None]
    lse = tl.where(nothing, float("-inf"), (top + tl.log2(tl.where(nothing, 1.0, total))) * LN_2)
    put_rows(Out, out, i, there, o_t, o_d, dv, V_DIM, V_DIM_PAD, WIDE)
    tl.store(Lse + i.to(tl.int64) * l_t, lse, mask=there)


@triton.jit
def absorb(acc, top, total, s, v, scale, PRECISION: tl.constexpr):
    """One step of the running softmax: scores s [BLOCK_Q, BLOCK_KV] (unscaled), values v."""
    new_top = tl.maximum(top, tl.max(s, 1) * scale)
    # A row without a key so far has a top of -inf, and -inf - -inf is no number.
    safe = tl.where(new_top == float("-inf"), 0.0, new_top)
    p = tl.exp2(s * scale - safe[:, None])
    fade = tl.exp2(top - safe)
    total = total * fade + tl.sum(p, 1)
    acc = tl.dot(p.to(v.dtype), v, acc * fade[:, None], input_precision=PRECISION)
    return acc, new_top, total


@triton.jit
def _sweep(
    acc, top, total, q, i, K, V, k_t, k_d, v_t, v_d, d, dv, begin, end, stop, first, STEP: tl.constexpr, scale,
    numbers: tl.constexpr, spots, lists, low, kv_len, SOURCE: tl.constexpr, SIDE: tl.constexpr, BLOCK_KV: tl.constexpr,
    PACK: tl.constexpr, STAGES: tl.constexpr, DIM: tl.constexpr, V_DIM: tl.constexpr, DIM_PAD: tl.constexpr,
    V_DIM_PAD: tl.constexpr, PRECISION: tl.constexpr, WIDE: tl.constexpr,
):  # fmt: skip
    """The running softmax over the places begin .. end - 1 of a source, whose conditions of `SIDE` are in doubt."""
    for place in tl.range(begin, end, places(SOURCE, BLOCK_KV, PACK), num_stages=STAGES):
        j, there = met(place, first, STEP, stop, SOURCE, numbers, spots, lists, low, kv_len, True, BLOCK_KV, PACK)
        if SIDE == CLEAR:
            k = all_rows_of(K, j, k_t, k_d, d, DIM, DIM_PAD, WIDE)
            v = all_rows_of(V, j, v_t, v_d, dv, V_DIM, V_DIM_PAD, WIDE)
        else:
            k = rows_of(K, j, there, k_t, k_d, d, DIM, DIM_PAD, WIDE)
            v = rows_of(V, j, there, v_t, v_d, dv, V_DIM, V_DIM_PAD, WIDE)
        x = tl.dot(q, tl.trans(k), input_precision=PRECISION)
        if asks(SOURCE, PACK, SIDE):
            ok = allowed(i[:, None], j[None, :], SOURCE, numbers, spots, lists, PACK, SIDE)
            if not guarded(SOURCE, numbers, PACK):
                ok = ok & there[None, :]
            x = tl.where(ok, x, float("-inf"))
        elif SIDE != CLEAR:
            x = tl.where(there[None, :], x, float("-inf"))
        acc, top, total = absorb(acc, top, total, x, v, scale, PRECISION)
    return acc, top, total


@triton.jit
def forward(
    Q, K, V, Out, Lse, lists, starts, spots,
    q_b, q_h, q_t, q_d, k_b, k_h, k_t, k_d, v_b, v_h, v_t, v_d, o_b, o_h, o_t, o_d, l_b, l_h, l_t,
    low, kv_len, scale, head_first, share,
    OWNER: tl.constexpr, numbers: tl.constexpr, OWNER_INDEX: tl.constexpr, SOURCES: tl.constexpr, STEP: tl.constexpr,
    MERGE: tl.constexpr, VARLEN: tl.constexpr, SIGN: tl.constexpr, WIDE: tl.constexpr, HEADS_FIRST: tl.constexpr,
    BLOCK_Q: tl.constexpr, BLOCK_KV: tl.constexpr, PACK: tl.constexpr, STAGES: tl.constexpr,
    DIM: tl.constexpr, V_DIM: tl.constexpr, DIM_PAD: tl.constexpr, V_DIM_PAD: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """out and log-sum-exp of the queries low .. kv_len - 1.

    Q, K, V, Out with strides of batch, head, position and dim; Lse float32 with strides of batch, head and position.
    scale: |scale| * log2(e), the sign in SIGN (0 for a scale of 0). MERGE: Out and Lse already hold the result over
    other keys, and this launch adds its own. starts: int [documents + 1] with VARLEN, else unused.
    """
    tile, tiles, head_here = place_in_grid(HEADS_FIRST)
    tile = tiles - 1 - tile  # the last tiles have most to do
    head = head_first + head_here
    b, row0, low, kv_len = document(starts, tl.program_id(2), low, kv_len, VARLEN)
    i, i_there, first, last = owned(tile, OWNER, OWNER_INDEX, numbers, spots, lists, low, kv_len, BLOCK_Q, PACK)
    if (first > last) | (first >= kv_len):
        return
    b = tl.cast(b, tl.int64)
    Q += b * q_b + tl.cast(head, tl.int64) * q_h + tl.cast(row0 - low, tl.int64) * q_t
    K += b * k_b + tl.cast(head // share, tl.int64) * k_h + tl.cast(row0, tl.int64) * k_t
    V += b * v_b + tl.cast(head // share, tl.int64) * v_h + tl.cast(row0, tl.int64) * v_t
    Out += b * o_b + tl.cast(head, tl.int64) * o_h + tl.cast(row0 - low, tl.int64) * o_t
    Lse += b * l_b + tl.cast(head, tl.int64) * l_h + tl.cast(row0 - low, tl.int64) * l_t
    d = tl.arange(0, DIM_PAD)
    dv = tl.arange(0, V_DIM_PAD)

    q = rows_of(Q, i, i_there, q_t, q_d, d, DIM, DIM_PAD, WIDE)
    if SIGN != 1:
        q = (q * SIGN).to(q.dtype)
    acc, top, total = begin_softmax(Out, Lse, i, i_there, o_t, o_d, l_t, dv, MERGE, BLOCK_Q, V_DIM, V_DIM_PAD, WIDE)

    for s in tl.static_range(count_of(SOURCES)):
        if kind_of(source_of(SOURCES, s)) == DIAGONALS:
            place = spots[index_of(source_of(SOURCES, s))]
            for n in tl.range(0, spots[index_of(source_of(SOURCES, s)) + 1]):
                j = i - tl.load(lists + place + n)
                ok = i_there & (j >= 0) & (j < kv_len)
                ok = ok & allowed(i, j, source_of(SOURCES, s), numbers, spots, lists, PACK, BOTH)
                k = rows_of(K, j, ok, k_t, k_d, d, DIM, DIM_PAD, WIDE)
                v = rows_of(V, j, ok, v_t, v_d, dv, V_DIM, V_DIM_PAD, WIDE)
                x = tl.sum(q.to(tl.float32) * k.to(tl.float32), 1) * scale
                x = tl.where(ok, x, float("-inf"))
                new_top = tl.maximum(top, x)
                safe = tl.where(new_top == float("-inf"), 0.0, new_top)
                p = tl.exp2(x - safe)
                fade = tl.exp2(top - safe)
                total = total * fade + p
                acc = acc * fade[:, None] + p[:, None] * v.to(tl.float32)
                top = new_top
        else:
            start, clear_start, clear_stop, stop = stretch(
                first, last, STEP, source_of(SOURCES, s), numbers, spots, lists, head_here, low, kv_len, True,
                BLOCK_KV, PACK
            )  # fmt: skip
            if splits(source_of(SOURCES, s)) and PACK == 1:
                acc, top, total = _sweep(
                    acc, top, total, q, i, K, V, k_t, k_d, v_t, v_d, d, dv, start, clear_start, stop, first, STEP,
                    scale,
                    numbers, spots, lists, low, kv_len, source_of(SOURCES, s),
                    edge(source_of(SOURCES, s), numbers, BLOCK_Q, BLOCK_KV, FAR), BLOCK_KV, PACK,
                    STAGES, DIM, V_DIM, DIM_PAD, V_DIM_PAD, PRECISION, WIDE,
                )  # fmt: skip
                acc, top, total = _sweep(
                    acc, top, total, q, i, K, V, k_t, k_d, v_t, v_d, d, dv, clear_start, clear_stop, stop, first, STEP,
                    scale, numbers, spots, lists, low, kv_len, source_of(SOURCES, s), CLEAR, BLOCK_KV, PACK, STAGES,
                    DIM,
                    V_DIM, DIM_PAD, V_DIM_PAD, PRECISION, WIDE,
                )  # fmt: skip
                acc, top, total = _sweep(
                    acc, top, total, q, i, K, V, k_t, k_d, v_t, v_d, d, dv, clear_stop, stop, stop, first, STEP, scale,
                    numbers, spots, lists, low, kv_len, source_of(SOURCES, s),
                    edge(source_of(SOURCES, s), numbers, BLOCK_Q, BLOCK_KV, NEAR), BLOCK_KV, PACK,
                    STAGES, DIM, V_DIM, DIM_PAD, V_DIM_PAD, PRECISION, WIDE,
                )  # fmt: skip
            else:
                acc, top, total = _sweep(
                    acc, top, total, q, i, K, V, k_t, k_d, v_t, v_d, d, dv, start, stop, stop, first, STEP, scale,
                    numbers, spots, lists, low, kv_len, source_of(SOURCES, s), BOTH, BLOCK_KV, PACK, STAGES, DIM, V_DIM,
                    DIM_PAD, V_DIM_PAD, PRECISION, WIDE,
                )  # fmt: skip

    put_softmax(Out, Lse, acc, top, total, i, i_there, o_t, o_d, l_t, dv, V_DIM, V_DIM_PAD, WIDE)
