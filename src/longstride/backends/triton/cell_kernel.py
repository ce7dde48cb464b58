"""Closed cells, residue classes or blocks whose queries read no key outside: forward, and a single-pass backward.

A program holds a whole cell, or several small ones side by side: it reads q, k, v, out and grad_out once and writes all
three gradients once, so that nothing is computed twice and nothing is added up in memory. Cells that one tile would
fit badly take two, of BLOCK_A and BLOCK_B rows (class of 96: 64 + 32).
"""

import triton
import triton.language as tl

from longstride.backends.triton.backward_kernels import _logs_of, delta_of, scores
from longstride.backends.triton.forward_kernel import absorb, begin_softmax, document, put_rows, put_softmax, rows_of
from longstride.backends.triton.geometry import BOTH, allowed, asks, guarded, source_of


@triton.jit
def _positions(
    tile, OFFSET: tl.constexpr, CLASSES: tl.constexpr, INDEX: tl.constexpr, numbers: tl.constexpr, kv_len,
    BLOCK: tl.constexpr, PACK: tl.constexpr, PER_TILE: tl.constexpr,
):  # fmt: skip
    """Positions OFFSET .. OFFSET + BLOCK - 1 of a tile's cells, and which are there."""
    m = OFFSET + tl.arange(0, BLOCK)
    if CLASSES:
        step = numbers[INDEX]
        lane = tile * PACK + m % PACK
        position = lane + m // PACK * step
        return position, (position < kv_len) & (lane < step)
    block = numbers[INDEX]
    rows = PER_TILE // block * block  # as many whole blocks as fit
    position = tile * rows + m
    return position, (m < rows) & (position < kv_len)


@triton.jit
def _put(
    X, value, position, there, stride_t, stride_d, d, ADD: tl.constexpr, DIM: tl.constexpr, DIM_PAD: tl.constexpr,
    WIDE: tl.constexpr,
):  # fmt: skip
    """X[position, :] = value where there, or += with ADD."""
    if ADD:
        value += rows_of(X, position, there, stride_t, stride_d, d, DIM, DIM_PAD, WIDE).to(tl.float32)
    put_rows(X, value, position, there, stride_t, stride_d, d, DIM, DIM_PAD, WIDE)


@triton.jit
def _attend(
    acc, top, total, q, k, v, i, j, there, scale, numbers: tl.constexpr, spots, lists, SOURCE: tl.constexpr,
    PACK: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """One step of the running softmax over one pair of tiles."""
    x = tl.dot(q, tl.trans(k), input_precision=PRECISION)
    if asks(SOURCE, PACK, BOTH):
        ok = allowed(i[:, None], j[None, :], SOURCE, numbers, spots, lists, PACK, BOTH)
        if not guarded(SOURCE, numbers, PACK):
            ok = ok & there[None, :]
    else:
        ok = there[None, :]
    return absorb(acc, top, total, tl.where(ok, x, float("-inf")), v, scale, PRECISION)


@triton.jit
def _queries(
    Q, Out, Lse, GradOut, GradLse, Delta, i, i_there, q_t, q_d, o_t, o_d, l_t, go_t, go_d, gl_t, d, dv,
    MAKE_DELTA: tl.constexpr, KEEP_DELTA: tl.constexpr, HAS_GRAD_LSE: tl.constexpr, SIGN: tl.constexpr,
    DIM: tl.constexpr, V_DIM: tl.constexpr, DIM_PAD: tl.constexpr, V_DIM_PAD: tl.constexpr, WIDE: tl.constexpr,
):  # fmt: skip
    """q, grad_out, lse and delta of a tile's queries."""
    q = rows_of(Q, i, i_there, q_t, q_d, d, DIM, DIM_PAD, WIDE)
    if SIGN != 1:
        q = (q * SIGN).to(q.dtype)
    do = rows_of(GradOut, i, i_there, go_t, go_d, dv, V_DIM, V_DIM_PAD, WIDE)
    lse = _logs_of(Lse, i, i_there, l_t)
    if MAKE_DELTA:
        delta = delta_of(do, Out, GradLse, i, i_there, o_t, o_d, gl_t, dv, V_DIM, V_DIM_PAD, WIDE, HAS_GRAD_LSE)
        if KEEP_DELTA:
            tl.store(Delta + i.to(tl.int64) * l_t, delta, mask=i_there)
    else:
        delta = tl.load(Delta + i.to(tl.int64) * l_t, mask=i_there, other=0.0)
    return q, do, lse, delta


@triton.jit
def backward_cell(
    Q, K, V, Out, Lse, GradOut, GradLse, Delta, GradQ, GradK, GradV, lists, starts, spots,
    q_b, q_h, q_t, q_d, k_b, k_h, k_t, k_d, v_b, v_h, v_t, v_d, o_b, o_h, o_t, o_d, l_b, l_h, l_t,
    go_b, go_h, go_t, go_d, gl_b, gl_h, gl_t, gq_b, gq_h, gq_t, gq_d, gk_b, gk_h, gk_t, gk_d, gv_b, gv_h, gv_t, gv_d,
    low, kv_len, scale, grad_scale, head_first, share, readers,
    CLASSES: tl.constexpr, numbers: tl.constexpr, OWNER_INDEX: tl.constexpr, SOURCES: tl.constexpr,
    ADD_Q: tl.constexpr, ADD_KV: tl.constexpr, MAKE_DELTA: tl.constexpr, KEEP_DELTA: tl.constexpr,
    HAS_GRAD_LSE: tl.constexpr, CAUSAL: tl.constexpr, VARLEN: tl.constexpr, SIGN: tl.constexpr, WIDE: tl.constexpr,
    BLOCK_A: tl.constexpr, BLOCK_B: tl.constexpr, PACK: tl.constexpr,
    DIM: tl.constexpr, V_DIM: tl.constexpr, DIM_PAD: tl.constexpr, V_DIM_PAD: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """All three gradients of a cell. Arguments as in `backward_q` and `backward_kv`; BLOCK_B is 0 for a single tile,
    and two tiles take
    one reader (query head) alone."""
    SOURCE: tl.constexpr = source_of(SOURCES, 0)
    tile = tl.program_id(0)
    kv_head_here = tl.program_id(1)
    b, row0, low, kv_len = document(starts, tl.program_id(2), low, kv_len, VARLEN)
    j, j_there = _positions(tile, 0, CLASSES, OWNER_INDEX, numbers, kv_len, BLOCK_A, PACK, BLOCK_A + BLOCK_B)
    i_there = j_there & (j >= low)
    b = tl.cast(b, tl.int64)
    kv_head = tl.cast(head_first // share + kv_head_here, tl.int64)
    h = tl.cast(head_first + kv_head_here * readers, tl.int64)
    K += b * k_b + kv_head * k_h + tl.cast(row0, tl.int64) * k_t
    V += b * v_b + kv_head * v_h + tl.cast(row0, tl.int64) * v_t
    GradK += b * gk_b + kv_head * gk_h + tl.cast(row0, tl.int64) * gk_t
    GradV += b * gv_b + kv_head * gv_h + tl.cast(row0, tl.int64) * gv_t
    Q += b * q_b + h * q_h + tl.cast(row0 - low, tl.int64) * q_t
    GradQ += b * gq_b + h * gq_h + tl.cast(row0 - low, tl.int64) * gq_t
    GradOut += b * go_b + h * go_h + tl.cast(row0 - low, tl.int64) * go_t
    Out += b * o_b + h * o_h + tl.cast(row0 - low, tl.int64) * o_t
    GradLse += b * gl_b + h * gl_h + tl.cast(row0 - low, tl.int64) * gl_t
    logs = b * l_b + h * l_h + tl.cast(row0 - low, tl.int64) * l_t
    Lse += logs
    Delta += logs
    d = tl.arange(0, DIM_PAD)
    dv = tl.arange(0, V_DIM_PAD)

    k = rows_of(K, j, j_there, k_t, k_d, d, DIM, DIM_PAD, WIDE)
    v = rows_of(V, j, j_there, v_t, v_d, dv, V_DIM, V_DIM_PAD, WIDE)
    if BLOCK_B == 0:
        grad_k = tl.zeros([BLOCK_A, DIM_PAD], tl.float32)
        grad_v = tl.zeros([BLOCK_A, V_DIM_PAD], tl.float32)
        for _ in tl.range(0, readers, num_stages=1):
            q, do, lse, delta = _queries(
                Q, Out, Lse, GradOut, GradLse, Delta, j, i_there, q_t, q_d, o_t, o_d, l_t, go_t, go_d, gl_t, d, dv,
                MAKE_DELTA, KEEP_DELTA, HAS_GRAD_LSE, SIGN, DIM, V_DIM, DIM_PAD, V_DIM_PAD, WIDE,
            )  # fmt: skip
            p, ds = scores(
                q, do, lse, delta, j, k, v, j, j_there, scale, numbers, spots, lists, SOURCE, PACK, BOTH, PRECISION
            )
            grad_v = tl.dot(tl.trans(p), do, grad_v, input_precision=PRECISION)
            grad_k = tl.dot(tl.trans(ds), q, grad_k, input_precision=PRECISION)
            grad_q = tl.dot(ds, k, input_precision=PRECISION)
            _put(GradQ, grad_q * (grad_scale * SIGN), j, i_there, gq_t, gq_d, d, ADD_Q, DIM, DIM_PAD, WIDE)
            Q += q_h
            Out += o_h
            Lse += l_h
            GradOut += go_h
            GradLse += gl_h
            Delta += l_h
            GradQ += gq_h
        _put(GradK, grad_k * grad_scale, j, j_there, gk_t, gk_d, d, ADD_KV, DIM, DIM_PAD, WIDE)
        _put(GradV, grad_v, j, j_there, gv_t, gv_d, dv, ADD_KV, V_DIM, V_DIM_PAD, WIDE)
    else:
        # Everything is read at once; what is done with is written before more is computed.
        j2, j2_there = _positions(
            tile, BLOCK_A, CLASSES, OWNER_INDEX, numbers, kv_len, BLOCK_B, PACK, BLOCK_A + BLOCK_B
        )
        i2_there = j2_there & (j2 >= low)
        q, do, lse, delta = _queries(
            Q, Out, Lse, GradOut, GradLse, Delta, j, i_there, q_t, q_d, o_t, o_d, l_t, go_t, go_d, gl_t, d, dv,
            MAKE_DELTA, KEEP_DELTA, HAS_GRAD_LSE, SIGN, DIM, V_DIM, DIM_PAD, V_DIM_PAD, WIDE,
        )  # fmt: skip
        q2, do2, lse2, delta2 = _queries(
            Q, Out, Lse, GradOut, GradLse, Delta, j2, i2_there, q_t, q_d, o_t, o_d, l_t, go_t, go_d, gl_t, d, dv,
            MAKE_DELTA, KEEP_DELTA, HAS_GRAD_LSE, SIGN, DIM, V_DIM, DIM_PAD, V_DIM_PAD, WIDE,
        )  # fmt: skip
        k2 = rows_of(K, j2, j2_there, k_t, k_d, d, DIM, DIM_PAD, WIDE)
        v2 = rows_of(V, j2, j2_there, v_t, v_d, dv, V_DIM, V_DIM_PAD, WIDE)

        p, ds = scores(
            q, do, lse, delta, j, k, v, j, j_there, scale, numbers, spots, lists, SOURCE, PACK, BOTH, PRECISION
        )
        grad_v = tl.dot(tl.trans(p), do, input_precision=PRECISION)
        grad_k = tl.dot(tl.trans(ds), q, input_precision=PRECISION)
        grad_q = tl.dot(ds, k, input_precision=PRECISION)
        if not CAUSAL:
            p, ds = scores(
                q, do, lse, delta, j, k2, v2, j2, j2_there, scale, numbers, spots, lists, SOURCE, PACK, BOTH, PRECISION
            )
            grad_v2 = tl.dot(tl.trans(p), do, input_precision=PRECISION)
            grad_k2 = tl.dot(tl.trans(ds), q, input_precision=PRECISION)
            grad_q = tl.dot(ds, k2, grad_q, input_precision=PRECISION)
        else:
            grad_v2 = tl.zeros([BLOCK_B, V_DIM_PAD], tl.float32)
            grad_k2 = tl.zeros([BLOCK_B, DIM_PAD], tl.float32)
        _put(GradQ, grad_q * (grad_scale * SIGN), j, i_there, gq_t, gq_d, d, ADD_Q, DIM, DIM_PAD, WIDE)

        p, ds = scores(
            q2, do2, lse2, delta2, j2, k, v, j, j_there, scale, numbers, spots, lists, SOURCE, PACK, BOTH, PRECISION
        )
        grad_v = tl.dot(tl.trans(p), do2, grad_v, input_precision=PRECISION)
        grad_k = tl.dot(tl.trans(ds), q2, grad_k, input_precision=PRECISION)
        grad_q2 = tl.dot(ds, k, input_precision=PRECISION)
        _put(GradK, grad_k * grad_scale, j, j_there, gk_t, gk_d, d, ADD_KV, DIM, DIM_PAD, WIDE)
        _put(GradV, grad_v, j, j_there, gv_t, gv_d, dv, ADD_KV, V_DIM, V_DIM_PAD, WIDE)

        p, ds = scores(
            q2, do2, lse2, delta2, j2, k2, v2, j2, j2_there, scale, numbers, spots, lists, SOURCE, PACK, BOTH, PRECISION
        )
        grad_v2 = tl.dot(tl.trans(p), do2, grad_v2, input_precision=PRECISION)
        grad_k2 = tl.dot(tl.trans(ds), q2, grad_k2, input_precision=PRECISION)
        grad_q2 = tl.dot(ds, k2, grad_q2, input_precision=PRECISION)
        _put(GradQ, grad_q2 * (grad_scale * SIGN), j2, i2_there, gq_t, gq_d, d, ADD_Q, DIM, DIM_PAD, WIDE)
        _put(GradK, grad_k2 * grad_scale, j2, j2_there, gk_t, gk_d, d, ADD_KV, DIM, DIM_PAD, WIDE)
        _put(GradV, grad_v2, j2, j2_there, gv_t, gv_d, dv, ADD_KV, V_DIM, V_DIM_PAD, WIDE)


@triton.jit
def forward_cell(
    Q, K, V, Out, Lse, lists, starts, spots,
    q_b, q_h, q_t, q_d, k_b, k_h, k_t, k_d, v_b, v_h, v_t, v_d, o_b, o_h, o_t, o_d, l_b, l_h, l_t,
    low, kv_len, scale, head_first, share,
    CLASSES: tl.constexpr, numbers: tl.constexpr, OWNER_INDEX: tl.constexpr, SOURCES: tl.constexpr,
    MERGE: tl.constexpr, CAUSAL: tl.constexpr, VARLEN: tl.constexpr, SIGN: tl.constexpr, WIDE: tl.constexpr,
    BLOCK_A: tl.constexpr, BLOCK_B: tl.constexpr, PACK: tl.constexpr,
    DIM: tl.constexpr, V_DIM: tl.constexpr, DIM_PAD: tl.constexpr, V_DIM_PAD: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """`forward` for closed cells: all rows of a cell are read at once,
    without a loop whose steps wait for each other."""
    SOURCE: tl.constexpr = source_of(SOURCES, 0)
    tile = tl.program_id(0)
    b, row0, low, kv_len = document(starts, tl.program_id(2), low, kv_len, VARLEN)
    j, j_there = _positions(tile, 0, CLASSES, OWNER_INDEX, numbers, kv_len, BLOCK_A, PACK, BLOCK_A + BLOCK_B)
    i_there = j_there & (j >= low)
    b = tl.cast(b, tl.int64)
    head = tl.cast(head_first + tl.program_id(1), tl.int64)
    Q += b * q_b + head * q_h + tl.cast(row0 - low, tl.int64) * q_t
    K += b * k_b + head // share * k_h + tl.cast(row0, tl.int64) * k_t
    V += b * v_b + head // share * v_h + tl.cast(row0, tl.int64) * v_t
    Out += b * o_b + head * o_h + tl.cast(row0 - low, tl.int64) * o_t
    Lse += b * l_b + head * l_h + tl.cast(row0 - low, tl.int64) * l_t
    d = tl.arange(0, DIM_PAD)
    dv = tl.arange(0, V_DIM_PAD)

    q = rows_of(Q, j, i_there, q_t, q_d, d, DIM, DIM_PAD, WIDE)
    k = rows_of(K, j, j_there, k_t, k_d, d, DIM, DIM_PAD, WIDE)
    v = rows_of(V, j, j_there, v_t, v_d, dv, V_DIM, V_DIM_PAD, WIDE)
    if BLOCK_B > 0:
        j2, j2_there = _positions(
            tile, BLOCK_A, CLASSES, OWNER_INDEX, numbers, kv_len, BLOCK_B, PACK, BLOCK_A + BLOCK_B
        )
        i2_there = j2_there & (j2 >= low)
        q2 = rows_of(Q, j2, i2_there, q_t, q_d, d, DIM, DIM_PAD, WIDE)
        k2 = rows_of(K, j2, j2_there, k_t, k_d, d, DIM, DIM_PAD, WIDE)
        v2 = rows_of(V, j2, j2_there, v_t, v_d, dv, V_DIM, V_DIM_PAD, WIDE)
        if SIGN != 1:
            q2 = (q2 * SIGN).to(q2.dtype)
    if SIGN != 1:
        q = (q * SIGN).to(q.dtype)
    acc, top, total = begin_softmax(Out, Lse, j, i_there, o_t, o_d, l_t, dv, MERGE, BLOCK_A, V_DIM, V_DIM_PAD, WIDE)
    acc, top, total = _attend(
        acc, top, total, q, k, v, j, j, j_there, scale, numbers, spots, lists, SOURCE, PACK, PRECISION
    )
    if BLOCK_B > 0 and not CAUSAL:
        acc, top, total = _attend(
            acc, top, total, q, k2, v2, j, j2, j2_there, scale, numbers, spots, lists, SOURCE, PACK, PRECISION
        )
    put_softmax(Out, Lse, acc, top, total, j, i_there, o_t, o_d, l_t, dv, V_DIM, V_DIM_PAD, WIDE)
    if BLOCK_B > 0:
        acc2, top2, total2 = begin_softmax(
            Out, Lse, j2, i2_there, o_t, o_d, l_t, dv, MERGE, BLOCK_B, V_DIM, V_DIM_PAD, WIDE
        )
        acc2, top2, total2 = _attend(
            acc2,
            top2,
            total2,
            q2,
            k,
            v,
            j2,
            j,
            j_there,
            scale,
            numbers,
            spots,
            lists,
            SOURCE,
            PACK,
            PRECISION,
        )
        acc2, top2, total2 = _attend(
            acc2, top2, total2, q2, k2, v2, j2, j2, j2_there, scale, numbers, spots, lists, SOURCE, PACK, PRECISION
        )  # fmt: skip
        put_softmax(Out, Lse, acc2, top2, total2, j2, i2_there, o_t, o_d, l_t, dv, V_DIM, V_DIM_PAD, WIDE)
