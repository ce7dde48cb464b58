"""The backward kernels: grad_q owned by tiles of queries, grad_k and grad_v by tiles of keys; no atomics.

With p = exp(score - lse) and delta = sum(out * grad_out) - grad_lse, both of the merged result:
grad_v = p^T grad_out, grad_score = p * (grad_out v^T - delta), grad_q = scale grad_score k,
grad_k = scale grad_score^T q.
"""

import triton
import triton.language as tl

from longstride.backends.triton.forward_kernel import all_rows_of, document, put_rows, rows_of
from longstride.backends.triton.geometry import (
    BOTH,
    CLEAR,
    DIAGONALS,
    FAR,
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
def _logs_of(Lse, position, there, l_t):
    """lse in base 2; +inf for rows without keys and rows not there, so that exp2(score - lse) is 0."""
    lse = tl.load(Lse + position.to(tl.int64) * l_t, mask=there, other=float("-inf"))
    return tl.where(lse == float("-inf"), float("inf"), lse * LOG2_E)


@triton.jit
def delta_of(grad_out, Out, GradLse, position, there, o_t, o_d, g_t, dv,
             V_DIM: tl.constexpr, V_DIM_PAD: tl.constexpr, WIDE: tl.constexpr, HAS_GRAD_LSE: tl.constexpr):  # fmt: skip
    """delta [BLOCK] float32 of the tile's rows."""
    out = rows_of(Out, position, there, o_t, o_d, dv, V_DIM, V_DIM_PAD, WIDE)
    delta = tl.sum(grad_out.to(tl.float32) * out.to(tl.float32), 1)
    if HAS_GRAD_LSE:
        delta -= tl.load(GradLse + position.to(tl.int64) * g_t, mask=there, other=0.0)
    return delta


@triton.jit
def scores(
    q, do, lse, delta, i, k, v, j, j_there, scale, numbers: tl.constexpr, spots, lists, SOURCE: tl.constexpr,
    PACK: tl.constexpr, SIDE: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """p and grad_score [queries, keys] of a pair of tiles.

    Queries that are not there are zeros, with an lse of +inf and a delta of 0: they add nothing to what is kept. Keys
    that are not there are looked at where no condition keeps them out: a very low lse would make them infinite.
    """
    x = tl.dot(q, tl.trans(k), input_precision=PRECISION)
    dp = tl.dot(do, tl.trans(v), input_precision=PRECISION)  # on its way while the weights are computed
    if asks(SOURCE, PACK, SIDE):
        ok = allowed(i[:, None], j[None, :], SOURCE, numbers, spots, lists, PACK, SIDE)
        if not guarded(SOURCE, numbers, PACK):
            ok = ok & j_there[None, :]
        x = tl.where(ok, x, float("-inf"))
    elif SIDE != CLEAR:
        x = tl.where(j_there[None, :], x, float("-inf"))
    p = tl.exp2(x * scale - lse[:, None])
    ds = p * (dp - delta[:, None])
    if asks(SOURCE, PACK, SIDE):
        # A key that may not be seen can hold anything, and 0 * inf is no number.
        ds = tl.where(p == 0.0, 0.0, ds)
    return p.to(do.dtype), ds.to(q.dtype)


@triton.jit
def _sweep_q(
    acc, q, do, lse, delta, i, K, V, k_t, k_d, v_t, v_d, d, dv, begin, end, stop, first, STEP: tl.constexpr, scale,
    numbers: tl.constexpr, spots, lists,
    low, kv_len, SOURCE: tl.constexpr, SIDE: tl.constexpr, BLOCK_KV: tl.constexpr, PACK: tl.constexpr,
    STAGES: tl.constexpr, DIM: tl.constexpr, V_DIM: tl.constexpr, DIM_PAD: tl.constexpr, V_DIM_PAD: tl.constexpr,
    PRECISION: tl.constexpr, WIDE: tl.constexpr,
):  # fmt: skip
    """acc += grad_score k over the places begin .. end - 1 of a source of keys."""
    for place in tl.range(begin, end, places(SOURCE, BLOCK_KV, PACK), num_stages=STAGES):
        j, there = met(place, first, STEP, stop, SOURCE, numbers, spots, lists, low, kv_len, True, BLOCK_KV, PACK)
        if SIDE == CLEAR:
            k = all_rows_of(K, j, k_t, k_d, d, DIM, DIM_PAD, WIDE)
            v = all_rows_of(V, j, v_t, v_d, dv, V_DIM, V_DIM_PAD, WIDE)
        else:  # keys that are not there are zeros: they add nothing
            k = rows_of(K, j, there, k_t, k_d, d, DIM, DIM_PAD, WIDE)
            v = rows_of(V, j, there, v_t, v_d, dv, V_DIM, V_DIM_PAD, WIDE)
        _, ds = scores(
            q, do, lse, delta, i, k, v, j, there, scale, numbers, spots, lists, SOURCE, PACK, SIDE, PRECISION
        )
        acc = tl.dot(ds, k, acc, input_precision=PRECISION)
    return acc


@triton.jit
def _tile_q(
    Q, K, V, Out, Lse, GradOut, GradLse, Delta, GradQ, lists, starts, spots,
    q_b, q_h, q_t, q_d, k_b, k_h, k_t, k_d, v_b, v_h, v_t, v_d, o_b, o_h, o_t, o_d, l_b, l_h, l_t,
    go_b, go_h, go_t, go_d, gl_b, gl_h, gl_t, gq_b, gq_h, gq_t, gq_d,
    low, kv_len, scale, grad_scale, tile, head_here, batch, head_first, share,
    OWNER: tl.constexpr, numbers: tl.constexpr, OWNER_INDEX: tl.constexpr, SOURCES: tl.constexpr, STEP: tl.constexpr,
    ADD: tl.constexpr, MAKE_DELTA: tl.constexpr, KEEP_DELTA: tl.constexpr, HAS_GRAD_LSE: tl.constexpr,
    VARLEN: tl.constexpr, SIGN: tl.constexpr, WIDE: tl.constexpr,
    BLOCK_Q: tl.constexpr, BLOCK_KV: tl.constexpr, PACK: tl.constexpr, STAGES: tl.constexpr,
    DIM: tl.constexpr, V_DIM: tl.constexpr, DIM_PAD: tl.constexpr, V_DIM_PAD: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    b, row0, low, kv_len = document(starts, batch, low, kv_len, VARLEN)
    b = tl.cast(b, tl.int64)
    head = tl.cast(head_first + head_here, tl.int64)
    d = tl.arange(0, DIM_PAD)
    dv = tl.arange(0, V_DIM_PAD)
    i, i_there, first, last = owned(tile, OWNER, OWNER_INDEX, numbers, spots, lists, low, kv_len, BLOCK_Q, PACK)
    if (first <= last) & (first < kv_len):
        Q += b * q_b + head * q_h + tl.cast(row0 - low, tl.int64) * q_t
        K += b * k_b + head // share * k_h + tl.cast(row0, tl.int64) * k_t
        V += b * v_b + head // share * v_h + tl.cast(row0, tl.int64) * v_t
        GradOut += b * go_b + head * go_h + tl.cast(row0 - low, tl.int64) * go_t
        GradQ += b * gq_b + head * gq_h + tl.cast(row0 - low, tl.int64) * gq_t
        logs = b * l_b + head * l_h + tl.cast(row0 - low, tl.int64) * l_t
        q = rows_of(Q, i, i_there, q_t, q_d, d, DIM, DIM_PAD, WIDE)
        if SIGN != 1:
            q = (q * SIGN).to(q.dtype)
        do = rows_of(GradOut, i, i_there, go_t, go_d, dv, V_DIM, V_DIM_PAD, WIDE)
        lse = _logs_of(Lse + logs, i, i_there, l_t)
        if MAKE_DELTA:
            Out += b * o_b + head * o_h + tl.cast(row0 - low, tl.int64) * o_t
            GradLse += b * gl_b + head * gl_h + tl.cast(row0 - low, tl.int64) * gl_t
            delta = delta_of(do, Out, GradLse, i, i_there, o_t, o_d, gl_t, dv, V_DIM, V_DIM_PAD, WIDE, HAS_GRAD_LSE)
            if KEEP_DELTA:
                tl.store(Delta + logs + i.to(tl.int64) * l_t, delta, mask=i_there)
        else:
            delta = tl.load(Delta + logs + i.to(tl.int64) * l_t, mask=i_there, other=0.0)
        acc = tl.zeros([BLOCK_Q, DIM_PAD], tl.float32)

        for s in tl.static_range(count_of(SOURCES)):
            if kind_of(source_of(SOURCES, s)) == DIAGONALS:
                place = spots[index_of(source_of(SOURCES, s))]
                for n in tl.range(0, spots[index_of(source_of(SOURCES, s)) + 1]):
                    j = i - tl.load(lists + place + n)
                    ok = i_there & (j >= 0) & (j < kv_len)
                    ok = ok & allowed(i, j, source_of(SOURCES, s), numbers, spots, lists, PACK, BOTH)
                    k = rows_of(K, j, ok, k_t, k_d, d, DIM, DIM_PAD, WIDE).to(tl.float32)
                    v = rows_of(V, j, ok, v_t, v_d, dv, V_DIM, V_DIM_PAD, WIDE).to(tl.float32)
                    p = tl.exp2(tl.sum(q.to(tl.float32) * k, 1) * scale - lse)
                    ds = tl.where(ok, p * (tl.sum(do.to(tl.float32) * v, 1) - delta), 0.0)
                    acc += ds[:, None] * k
            else:
                start, clear_start, clear_stop, stop = stretch(
                    first,
                    last,
                    STEP,
                    source_of(SOURCES, s),
                    numbers,
                    spots,
                    lists,
                    head_here,
                    low,
                    kv_len,
                    True,
                    BLOCK_KV,
                    PACK,
                )
                if splits(source_of(SOURCES, s)) and PACK == 1:
                    acc = _sweep_q(
                        acc, q, do, lse, delta, i, K, V, k_t, k_d, v_t, v_d, d, dv, start, clear_start, stop, first,
                        STEP,
                        scale, numbers, spots, lists, low, kv_len, source_of(SOURCES, s),
                    edge(source_of(SOURCES, s), numbers, BLOCK_Q, BLOCK_KV, FAR),
                        BLOCK_KV, PACK, STAGES, DIM, V_DIM, DIM_PAD, V_DIM_PAD, PRECISION, WIDE,
                    )  # fmt: skip
                    acc = _sweep_q(
                        acc, q, do, lse, delta, i, K, V, k_t, k_d, v_t, v_d, d, dv, clear_start, clear_stop, stop,
                        first,
                        STEP, scale, numbers, spots, lists, low, kv_len, source_of(SOURCES, s), CLEAR, BLOCK_KV, PACK,
                        STAGES, DIM, V_DIM, DIM_PAD, V_DIM_PAD, PRECISION, WIDE,
                    )  # fmt: skip
                    acc = _sweep_q(
                        acc, q, do, lse, delta, i, K, V, k_t, k_d, v_t, v_d, d, dv, clear_stop, stop, stop, first, STEP,
                        scale, numbers, spots, lists, low, kv_len, source_of(SOURCES, s),
                    edge(source_of(SOURCES, s), numbers, BLOCK_Q, BLOCK_KV, NEAR),
                        BLOCK_KV, PACK, STAGES, DIM, V_DIM, DIM_PAD, V_DIM_PAD, PRECISION, WIDE,
                    )  # fmt: skip
                else:
                    acc = _sweep_q(
                        acc, q, do, lse, delta, i, K, V, k_t, k_d, v_t, v_d, d, dv, start, stop, stop, first, STEP,
                        scale,
                        numbers, spots, lists, low, kv_len, source_of(SOURCES, s), BOTH, BLOCK_KV, PACK, STAGES, DIM,
                        V_DIM, DIM_PAD, V_DIM_PAD, PRECISION, WIDE,
                    )  # fmt: skip

        acc = acc * (grad_scale * SIGN)
        if ADD:
            acc += rows_of(GradQ, i, i_there, gq_t, gq_d, d, DIM, DIM_PAD, WIDE).to(tl.float32)
        put_rows(GradQ, acc, i, i_there, gq_t, gq_d, d, DIM, DIM_PAD, WIDE)


@triton.jit
def _sweep_kv(
    dk, dv_, k, v, j, Q, GradOut, Out, Lse, GradLse, Delta, q_t, q_d, go_t, go_d, o_t, o_d, l_t, gl_t, d, dv, begin,
    end,
    stop, first, STEP: tl.constexpr, scale, numbers: tl.constexpr, spots, lists, low, kv_len, SOURCE: tl.constexpr,
    SIDE: tl.constexpr,
    MAKE_DELTA: tl.constexpr, HAS_GRAD_LSE: tl.constexpr, SIGN: tl.constexpr,
    BLOCK_Q: tl.constexpr, PACK: tl.constexpr, STAGES: tl.constexpr, DIM: tl.constexpr, V_DIM: tl.constexpr,
    DIM_PAD: tl.constexpr, V_DIM_PAD: tl.constexpr, PRECISION: tl.constexpr, WIDE: tl.constexpr,
):  # fmt: skip
    """dk += grad_score^T q and dv += p^T grad_out over the places begin .. end - 1 of a source of queries."""
    for place in tl.range(begin, end, places(SOURCE, BLOCK_Q, PACK), num_stages=STAGES):
        i, there = met(place, first, STEP, stop, SOURCE, numbers, spots, lists, low, kv_len, False, BLOCK_Q, PACK)
        if SIDE == CLEAR:
            q = all_rows_of(Q, i, q_t, q_d, d, DIM, DIM_PAD, WIDE)
            do = all_rows_of(GradOut, i, go_t, go_d, dv, V_DIM, V_DIM_PAD, WIDE)
        else:
            q = rows_of(Q, i, there, q_t, q_d, d, DIM, DIM_PAD, WIDE)
            do = rows_of(GradOut, i, there, go_t, go_d, dv, V_DIM, V_DIM_PAD, WIDE)
        if SIGN != 1:
            q = (q * SIGN).to(q.dtype)
        lse = _logs_of(Lse, i, there, l_t)
        if MAKE_DELTA:
            delta = delta_of(do, Out, GradLse, i, there, o_t, o_d, gl_t, dv, V_DIM, V_DIM_PAD, WIDE, HAS_GRAD_LSE)
        else:
            delta = tl.load(Delta + i.to(tl.int64) * l_t, mask=there, other=0.0)
        # Queries along rows, so that a thread needs lse and delta of two rows, not of sixteen columns. What comes out
        # for keys that are not there is never kept.
        p, ds = scores(
            q, do, lse, delta, i, k, v, j, j >= 0, scale, numbers, spots, lists, SOURCE, PACK, SIDE, PRECISION
        )
        dv_ = tl.dot(tl.trans(p), do, dv_, input_precision=PRECISION)
        dk = tl.dot(tl.trans(ds), q, dk, input_precision=PRECISION)
    return dk, dv_


@triton.jit
def _tile_kv(
    Q, K, V, Out, Lse, GradOut, GradLse, Delta, GradK, GradV, lists, starts, spots,
    q_b, q_h, q_t, q_d, k_b, k_h, k_t, k_d, v_b, v_h, v_t, v_d, o_b, o_h, o_t, o_d, l_b, l_h, l_t,
    go_b, go_h, go_t, go_d, gl_b, gl_h, gl_t, gk_b, gk_h, gk_t, gk_d, gv_b, gv_h, gv_t, gv_d,
    low, kv_len, scale, grad_scale, tile, kv_head_here, batch, head_first, share, readers,
    OWNER: tl.constexpr, numbers: tl.constexpr, OWNER_INDEX: tl.constexpr, SOURCES: tl.constexpr, STEP: tl.constexpr,
    ADD: tl.constexpr, MAKE_DELTA: tl.constexpr, HAS_GRAD_LSE: tl.constexpr,
    VARLEN: tl.constexpr, SIGN: tl.constexpr, WIDE: tl.constexpr,
    BLOCK_KV: tl.constexpr, BLOCK_Q: tl.constexpr, PACK: tl.constexpr, STAGES: tl.constexpr,
    DIM: tl.constexpr, V_DIM: tl.constexpr, DIM_PAD: tl.constexpr, V_DIM_PAD: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    b, row0, low, kv_len = document(starts, batch, low, kv_len, VARLEN)
    b = tl.cast(b, tl.int64)
    d = tl.arange(0, DIM_PAD)
    dv = tl.arange(0, V_DIM_PAD)
    j, j_there, first, last = owned(tile, OWNER, OWNER_INDEX, numbers, spots, lists, 0, kv_len, BLOCK_KV, PACK)
    if (first <= last) & (first < kv_len):
        kv_head = tl.cast(head_first // share + kv_head_here, tl.int64)
        K += b * k_b + kv_head * k_h + tl.cast(row0, tl.int64) * k_t
        V += b * v_b + kv_head * v_h + tl.cast(row0, tl.int64) * v_t
        GradK += b * gk_b + kv_head * gk_h + tl.cast(row0, tl.int64) * gk_t
        GradV += b * gv_b + kv_head * gv_h + tl.cast(row0, tl.int64) * gv_t
        Q += b * q_b + tl.cast(row0 - low, tl.int64) * q_t
        GradOut += b * go_b + tl.cast(row0 - low, tl.int64) * go_t
        Out += b * o_b + tl.cast(row0 - low, tl.int64) * o_t
        GradLse += b * gl_b + tl.cast(row0 - low, tl.int64) * gl_t
        logs = b * l_b + tl.cast(row0 - low, tl.int64) * l_t
        k = rows_of(K, j, j_there, k_t, k_d, d, DIM, DIM_PAD, WIDE)
        v = rows_of(V, j, j_there, v_t, v_d, dv, V_DIM, V_DIM_PAD, WIDE)
        grad_k = tl.zeros([BLOCK_KV, DIM_PAD], tl.float32)
        grad_v = tl.zeros([BLOCK_KV, V_DIM_PAD], tl.float32)
        for reader in tl.range(0, readers, num_stages=1):
            head_here = kv_head_here * readers + reader
            h = tl.cast(head_first + head_here, tl.int64)
            Qh = Q + h * q_h
            Gh = GradOut + h * go_h
            Oh = Out + h * o_h
            GLh = GradLse + h * gl_h
            Lh = Lse + logs + h * l_h
            Dh = Delta + logs + h * l_h
            for s in tl.static_range(count_of(SOURCES)):
                if kind_of(source_of(SOURCES, s)) == DIAGONALS:
                    place = spots[index_of(source_of(SOURCES, s))]
                    for n in tl.range(0, spots[index_of(source_of(SOURCES, s)) + 1]):
                        i = j + tl.load(lists + place + n)
                        ok = j_there & (i >= low) & (i < kv_len)
                        ok = ok & allowed(i, j, source_of(SOURCES, s), numbers, spots, lists, PACK, BOTH)
                        q = rows_of(Qh, i, ok, q_t, q_d, d, DIM, DIM_PAD, WIDE).to(tl.float32) * SIGN
                        do = rows_of(Gh, i, ok, go_t, go_d, dv, V_DIM, V_DIM_PAD, WIDE).to(tl.float32)
                        lse = _logs_of(Lh, i, ok, l_t)
                        if MAKE_DELTA:
                            delta = delta_of(
                                do, Oh, GLh, i, ok, o_t, o_d, gl_t, dv, V_DIM, V_DIM_PAD, WIDE, HAS_GRAD_LSE
                            )
                        else:
                            delta = tl.load(Dh + i.to(tl.int64) * l_t, mask=ok, other=0.0)
                        p = tl.where(ok, tl.exp2(tl.sum(q * k.to(tl.float32), 1) * scale - lse), 0.0)
                        grad_v += p[:, None] * do
                        ds = tl.where(ok, p * (tl.sum(do * v.to(tl.float32), 1) - delta), 0.0)
                        grad_k += ds[:, None] * q
                else:
                    start, clear_start, clear_stop, stop = stretch(
                        first,
                        last,
                        STEP,
                        source_of(SOURCES, s),
                        numbers,
                        spots,
                        lists,
                        head_here,
                        low,
                        kv_len,
                        False,
                        BLOCK_Q,
                        PACK,
                    )
                    if splits(source_of(SOURCES, s)) and PACK == 1:
                        grad_k, grad_v = _sweep_kv(
                            grad_k, grad_v, k, v, j, Qh, Gh, Oh, Lh, GLh, Dh, q_t, q_d, go_t, go_d, o_t, o_d, l_t,
                            gl_t, d, dv,
                            start, clear_start, stop, first, STEP, scale, numbers, spots, lists, low, kv_len,
                            source_of(SOURCES, s),
                            edge(source_of(SOURCES, s), numbers, BLOCK_KV, BLOCK_Q, NEAR), MAKE_DELTA, HAS_GRAD_LSE,
                            SIGN, BLOCK_Q, PACK, STAGES, DIM, V_DIM, DIM_PAD, V_DIM_PAD,
                            PRECISION, WIDE,
                        )  # fmt: skip
                        grad_k, grad_v = _sweep_kv(
                            grad_k, grad_v, k, v, j, Qh, Gh, Oh, Lh, GLh, Dh, q_t, q_d, go_t, go_d, o_t, o_d, l_t,
                            gl_t, d, dv,
                            clear_start, clear_stop, stop, first, STEP, scale, numbers, spots, lists, low, kv_len,
                            source_of(SOURCES, s),
                            CLEAR, MAKE_DELTA, HAS_GRAD_LSE, SIGN, BLOCK_Q, PACK, STAGES, DIM, V_DIM, DIM_PAD,
                            V_DIM_PAD,
                            PRECISION, WIDE,
                        )  # fmt: skip
                        grad_k, grad_v = _sweep_kv(
                            grad_k, grad_v, k, v, j, Qh, Gh, Oh, Lh, GLh, Dh, q_t, q_d, go_t, go_d, o_t, o_d, l_t,
                            gl_t, d, dv,
                            clear_stop, stop, stop, first, STEP, scale, numbers, spots, lists, low, kv_len,
                            source_of(SOURCES, s),
                            edge(source_of(SOURCES, s), numbers, BLOCK_KV, BLOCK_Q, FAR), MAKE_DELTA, HAS_GRAD_LSE,
                            SIGN, BLOCK_Q, PACK, STAGES, DIM, V_DIM, DIM_PAD, V_DIM_PAD,
                            PRECISION, WIDE,
                        )  # fmt: skip
                    else:
                        grad_k, grad_v = _sweep_kv(
                            grad_k, grad_v, k, v, j, Qh, Gh, Oh, Lh, GLh, Dh, q_t, q_d, go_t, go_d, o_t, o_d, l_t,
                            gl_t, d, dv,
                            start, stop, stop, first, STEP, scale, numbers, spots, lists, low, kv_len,
                            source_of(SOURCES, s),
                            BOTH, MAKE_DELTA, HAS_GRAD_LSE, SIGN, BLOCK_Q, PACK, STAGES, DIM, V_DIM, DIM_PAD, V_DIM_PAD,
                            PRECISION, WIDE,
                        )  # fmt: skip

        grad_k = grad_k * grad_scale
        if ADD:
            grad_k += rows_of(GradK, j, j_there, gk_t, gk_d, d, DIM, DIM_PAD, WIDE).to(tl.float32)
            grad_v += rows_of(GradV, j, j_there, gv_t, gv_d, dv, V_DIM, V_DIM_PAD, WIDE).to(tl.float32)
        put_rows(GradK, grad_k, j, j_there, gk_t, gk_d, d, DIM, DIM_PAD, WIDE)
        put_rows(GradV, grad_v, j, j_there, gv_t, gv_d, dv, V_DIM, V_DIM_PAD, WIDE)


@triton.jit
def backward_q(
    Q, K, V, Out, Lse, GradOut, GradLse, Delta, GradQ, lists, starts, spots,
    q_b, q_h, q_t, q_d, k_b, k_h, k_t, k_d, v_b, v_h, v_t, v_d, o_b, o_h, o_t, o_d, l_b, l_h, l_t,
    go_b, go_h, go_t, go_d, gl_b, gl_h, gl_t, gq_b, gq_h, gq_t, gq_d,
    low, kv_len, scale, grad_scale, head_first, share,
    OWNER: tl.constexpr, numbers: tl.constexpr, OWNER_INDEX: tl.constexpr, SOURCES: tl.constexpr, STEP: tl.constexpr,
    ADD: tl.constexpr, MAKE_DELTA: tl.constexpr, KEEP_DELTA: tl.constexpr, HAS_GRAD_LSE: tl.constexpr,
    VARLEN: tl.constexpr, SIGN: tl.constexpr, WIDE: tl.constexpr, HEADS_FIRST: tl.constexpr,
    BLOCK_Q: tl.constexpr, BLOCK_KV: tl.constexpr, PACK: tl.constexpr, STAGES: tl.constexpr,
    DIM: tl.constexpr, V_DIM: tl.constexpr, DIM_PAD: tl.constexpr, V_DIM_PAD: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """grad_q of the queries; strides and settings as in `forward`.

    ADD: GradQ already holds the gradient through other keys. MAKE_DELTA: delta comes from Out, GradOut and GradLse, and
    with KEEP_DELTA goes to Delta (which has Lse's strides); else it is read there.
    """
    tile, tiles, head_here = place_in_grid(HEADS_FIRST)
    _tile_q(
        Q, K, V, Out, Lse, GradOut, GradLse, Delta, GradQ, lists, starts, spots,
        q_b, q_h, q_t, q_d, k_b, k_h, k_t, k_d, v_b, v_h, v_t, v_d, o_b, o_h, o_t, o_d, l_b, l_h, l_t,
        go_b, go_h, go_t, go_d, gl_b, gl_h, gl_t, gq_b, gq_h, gq_t, gq_d,
        low, kv_len, scale, grad_scale, tiles - 1 - tile, head_here, tl.program_id(2), head_first,
        share, OWNER, numbers, OWNER_INDEX, SOURCES, STEP, ADD, MAKE_DELTA, KEEP_DELTA, HAS_GRAD_LSE, VARLEN, SIGN,
        WIDE,
        BLOCK_Q, BLOCK_KV, PACK, STAGES, DIM, V_DIM, DIM_PAD, V_DIM_PAD, PRECISION,
    )  # fmt: skip


@triton.jit
def backward_kv(
    Q, K, V, Out, Lse, GradOut, GradLse, Delta, GradK, GradV, lists, starts, spots,
    q_b, q_h, q_t, q_d, k_b, k_h, k_t, k_d, v_b, v_h, v_t, v_d, o_b, o_h, o_t, o_d, l_b, l_h, l_t,
    go_b, go_h, go_t, go_d, gl_b, gl_h, gl_t, gk_b, gk_h, gk_t, gk_d, gv_b, gv_h, gv_t, gv_d,
    low, kv_len, scale, grad_scale, head_first, share, readers,
    OWNER: tl.constexpr, numbers: tl.constexpr, OWNER_INDEX: tl.constexpr, SOURCES: tl.constexpr, STEP: tl.constexpr,
    ADD: tl.constexpr, MAKE_DELTA: tl.constexpr, HAS_GRAD_LSE: tl.constexpr,
    VARLEN: tl.constexpr, SIGN: tl.constexpr, WIDE: tl.constexpr, HEADS_FIRST: tl.constexpr,
    BLOCK_KV: tl.constexpr, BLOCK_Q: tl.constexpr, PACK: tl.constexpr, STAGES: tl.constexpr,
    DIM: tl.constexpr, V_DIM: tl.constexpr, DIM_PAD: tl.constexpr, V_DIM_PAD: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """grad_k and grad_v of the keys, summed over the `readers` query heads of each of the `heads` key heads."""
    tile, _, head_here = place_in_grid(HEADS_FIRST)
    _tile_kv(
        Q, K, V, Out, Lse, GradOut, GradLse, Delta, GradK, GradV, lists, starts, spots,
        q_b, q_h, q_t, q_d, k_b, k_h, k_t, k_d, v_b, v_h, v_t, v_d, o_b, o_h, o_t, o_d, l_b, l_h, l_t,
        go_b, go_h, go_t, go_d, gl_b, gl_h, gl_t, gk_b, gk_h, gk_t, gk_d, gv_b, gv_h, gv_t, gv_d,
        low, kv_len, scale, grad_scale, tile, head_here, tl.program_id(2), head_first,
        share, readers, OWNER, numbers, OWNER_INDEX, SOURCES, STEP, ADD, MAKE_DELTA, HAS_GRAD_LSE, VARLEN, SIGN, WIDE,
        BLOCK_KV, BLOCK_Q, PACK, STAGES, DIM, V_DIM, DIM_PAD, V_DIM_PAD, PRECISION,
    )  # fmt: skip


@triton.jit
def backward_both(
    Q, K, V, Out, Lse, GradOut, GradLse, Delta, GradQ, GradK, GradV, lists, starts, spots,
    q_b, q_h, q_t, q_d, k_b, k_h, k_t, k_d, v_b, v_h, v_t, v_d, o_b, o_h, o_t, o_d, l_b, l_h, l_t,
    go_b, go_h, go_t, go_d, gl_b, gl_h, gl_t, gq_b, gq_h, gq_t, gq_d, gk_b, gk_h, gk_t, gk_d, gv_b, gv_h, gv_t, gv_d,
    low, kv_len, scale, grad_scale, head_first, share, readers,
    OWNER: tl.constexpr, numbers: tl.constexpr, OWNER_INDEX: tl.constexpr, SOURCES: tl.constexpr, STEP: tl.constexpr,
    ADD_Q: tl.constexpr, ADD_KV: tl.constexpr, HAS_GRAD_LSE: tl.constexpr, VARLEN: tl.constexpr, SIGN: tl.constexpr,
    WIDE: tl.constexpr, HEADS_FIRST: tl.constexpr,
    BLOCK: tl.constexpr, BLOCK_KV: tl.constexpr, BLOCK_Q: tl.constexpr, PACK: tl.constexpr, STAGES: tl.constexpr,
    DIM: tl.constexpr, V_DIM: tl.constexpr, DIM_PAD: tl.constexpr, V_DIM_PAD: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """`backward_q` and `backward_kv` in one launch, program by program, for as many keys as queries.

    Programs of the two kinds that run at the same time work on the same rows, so that most of what the second reads is
    in the cache still. delta is there already.
    """
    program, programs, head_here = place_in_grid(HEADS_FIRST)
    tile = programs // 2 - 1 - program // 2
    if program % 2 == 0:
        _tile_q(
            Q, K, V, Out, Lse, GradOut, GradLse, Delta, GradQ, lists, starts, spots,
            q_b, q_h, q_t, q_d, k_b, k_h, k_t, k_d, v_b, v_h, v_t, v_d, o_b, o_h, o_t, o_d, l_b, l_h, l_t,
            go_b, go_h, go_t, go_d, gl_b, gl_h, gl_t, gq_b, gq_h, gq_t, gq_d,
            low, kv_len, scale, grad_scale, tile, head_here, tl.program_id(2), head_first, share,
            OWNER, numbers, OWNER_INDEX, SOURCES, STEP, ADD_Q, False, False, HAS_GRAD_LSE, VARLEN, SIGN, WIDE,
            BLOCK, BLOCK_KV, PACK, STAGES, DIM, V_DIM, DIM_PAD, V_DIM_PAD, PRECISION,
        )  # fmt: skip
    else:
        _tile_kv(
            Q, K, V, Out, Lse, GradOut, GradLse, Delta, GradK, GradV, lists, starts, spots,
            q_b, q_h, q_t, q_d, k_b, k_h, k_t, k_d, v_b, v_h, v_t, v_d, o_b, o_h, o_t, o_d, l_b, l_h, l_t,
            go_b, go_h, go_t, go_d, gl_b, gl_h, gl_t, gk_b, gk_h, gk_t, gk_d, gv_b, gv_h, gv_t, gv_d,
            low, kv_len, scale, grad_scale, tile, head_here, tl.program_id(2), head_first, share, readers,
            OWNER, numbers, OWNER_INDEX, SOURCES, STEP, ADD_KV, False, HAS_GRAD_LSE, VARLEN, SIGN, WIDE,
            BLOCK, BLOCK_Q, PACK, STAGES, DIM, V_DIM, DIM_PAD, V_DIM_PAD, PRECISION,
        )  # fmt: skip


@triton.jit
def make_delta(
    Out, GradOut, GradLse, Delta, o_b, o_h, o_t, o_d, go_b, go_h, go_t, go_d, gl_b, gl_h, gl_t, l_b, l_h, l_t, rows,
    HAS_GRAD_LSE: tl.constexpr, WIDE: tl.constexpr, BLOCK: tl.constexpr, V_DIM: tl.constexpr, V_DIM_PAD: tl.constexpr,
):  # fmt: skip
    """Delta = sum(Out * GradOut) - GradLse, float32, for every row."""
    head = tl.cast(tl.program_id(1), tl.int64)
    b = tl.cast(tl.program_id(2), tl.int64)
    i = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    dv = tl.arange(0, V_DIM_PAD)
    GradOut += b * go_b + head * go_h
    do = rows_of(GradOut, i, i < rows, go_t, go_d, dv, V_DIM, V_DIM_PAD, WIDE)
    delta = delta_of(
        do, Out + b * o_b + head * o_h, GradLse + b * gl_b + head * gl_h, i, i < rows, o_t, o_d, gl_t, dv, V_DIM,
        V_DIM_PAD, WIDE, HAS_GRAD_LSE,
    )  # fmt: skip
    tl.store(Delta + b * l_b + head * l_h + i.to(tl.int64) * l_t, delta, mask=i < rows)
