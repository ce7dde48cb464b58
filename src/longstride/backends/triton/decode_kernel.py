"""The decode kernel: a few queries a row of the batch against the rows that a cache holds for them.

Every program takes one query position of one lane (all its heads at once) and a share of the keys, which it finds by
arithmetic on the position. Programs of the first share also attend to the step's own new tokens, as these were given,
and write them to the cache: no row that they overwrite is read by any query of the step. Words are as `decode_lowering`
writes them.
"""

import triton
import triton.language as tl

from longstride.backends.triton import decode_lowering

STORE_WORDS = tl.constexpr(decode_lowering.STORE_WORDS)
WALK_WORDS = tl.constexpr(decode_lowering.WALK_WORDS)
CONDITION_WORDS = tl.constexpr(decode_lowering.CONDITION_WORDS)
UNBOUNDED = tl.constexpr(decode_lowering.UNBOUNDED)
RING = tl.constexpr(decode_lowering.RING)
LIST = tl.constexpr(decode_lowering.LIST)
STEPS = tl.constexpr(decode_lowering.STEPS)
COLUMNS = tl.constexpr(decode_lowering.COLUMNS)
LISTED = tl.constexpr(decode_lowering.LISTED)
DISTANCES = tl.constexpr(decode_lowering.DISTANCES)
BLOCKS = tl.constexpr(decode_lowering.BLOCKS)
LEAST = tl.constexpr(decode_lowering.LEAST)
MOST = tl.constexpr(decode_lowering.MOST)
CLASS = tl.constexpr(decode_lowering.CLASS)
SAME_BLOCK = tl.constexpr(decode_lowering.SAME_BLOCK)
KEY_GROUP = tl.constexpr(decode_lowering.KEY_GROUP)
KEY_FIRST = tl.constexpr(decode_lowering.KEY_FIRST)
KEY_LIST = tl.constexpr(decode_lowering.KEY_LIST)
QUERY_FIRST = tl.constexpr(decode_lowering.QUERY_FIRST)
QUERY_LIST = tl.constexpr(decode_lowering.QUERY_LIST)
DISTANCE = tl.constexpr(decode_lowering.DISTANCE)

LOG2_E = tl.constexpr(1.4426950408889634)
#: Below every score, and finite, so that a row without keys has no infinity less infinity.
NOTHING = tl.constexpr(-1.0e30)


@triton.constexpr_function
def word(PROGRAM, at):
    """One word of the program."""
    return int(PROGRAM[at])


# ---- spots and lists ------------------------------------------------------------------------------------------------


@triton.jit
def _place(spots, SPOT: tl.constexpr):
    return tl.load(spots + 2 * SPOT)


@triton.jit
def _count(spots, SPOT: tl.constexpr):
    return tl.load(spots + 2 * SPOT + 1)


@triton.jit
def _listed(x, SPOT: tl.constexpr, spots, lists):
    place = _place(spots, SPOT)
    found = x < 0
    for n in range(_count(spots, SPOT)):
        found = found | (x == tl.load(lists + place + n))
    return found


# ---- conditions -----------------------------------------------------------------------------------------------------


@triton.jit
def _holds(i, j, PROGRAM: tl.constexpr, AT: tl.constexpr, spots, lists):
    KIND: tl.constexpr = word(PROGRAM, AT)
    A: tl.constexpr = word(PROGRAM, AT + 1)
    B: tl.constexpr = word(PROGRAM, AT + 2)
    C: tl.constexpr = word(PROGRAM, AT + 3)
    # One chain: the compiler goes on past a `return` that is not the last thing of its branch.
    if KIND == LEAST:
        return j <= i - A
    elif KIND == MOST:
        return j >= i - A
    elif KIND == CLASS:
        return i % A == j % A
    elif KIND == SAME_BLOCK:
        return i // A == j // A
    elif KIND == KEY_GROUP:
        return (j % A >= B) & (j % A < C)
    elif KIND == KEY_FIRST:
        return j < A
    elif KIND == KEY_LIST:
        return _listed(j, A, spots, lists)
    elif KIND == QUERY_FIRST:
        return i + j - j < A  # in j's shape
    elif KIND == QUERY_LIST:
        return _listed(i + j - j, A, spots, lists)
    elif KIND == DISTANCE:
        return _listed(i - j, A, spots, lists)
    else:  # TABLE
        width = _count(spots, B)
        row = lists + _place(spots, B) + (i // A) * width
        found = j < 0
        for n in range(width):
            found = found | (j // A == tl.load(row + n))
        return found


@triton.jit
def _all_hold(i, j, PROGRAM: tl.constexpr, AT: tl.constexpr, spots, lists):
    ok = j >= 0
    for c in tl.static_range(word(PROGRAM, AT)):
        ok = ok & _holds(i, j, PROGRAM, AT + 1 + CONDITION_WORDS * c, spots, lists)
    return ok


@triton.jit
def _allowed(i, j, PROGRAM: tl.constexpr, KEEP: tl.constexpr, DROPS: tl.constexpr, spots, lists):
    """True where the pair meets the conditions at KEEP, and no dropped term's."""
    ok = _all_hold(i, j, PROGRAM, KEEP, spots, lists)
    for t in tl.static_range(word(PROGRAM, DROPS)):
        ok = ok & ~_all_hold(i, j, PROGRAM, word(PROGRAM, DROPS + 1 + t), spots, lists)
    return ok


# ---- stores ---------------------------------------------------------------------------------------------------------


@triton.jit
def _before(x, block, start, width):
    """How many keys of a group lie before position x."""
    x = tl.maximum(x, 0)
    return (x // block) * width + tl.minimum(tl.maximum(x % block - start, 0), width)


@triton.jit
def _row(j, PROGRAM: tl.constexpr, AT: tl.constexpr, spots, lists, there):
    """The row of position j in the store at AT, from its head's first, and whether the store keeps it at all."""
    KIND: tl.constexpr = word(PROGRAM, AT)
    offset = _place(spots, word(PROGRAM, AT + 1))
    if KIND == RING:
        ROWS: tl.constexpr = word(PROGRAM, AT + 2)
        BLOCK: tl.constexpr = word(PROGRAM, AT + 3)
        START: tl.constexpr = word(PROGRAM, AT + 4)
        WIDTH: tl.constexpr = word(PROGRAM, AT + 5)
        if BLOCK == 1:
            number = j
            member = j >= 0
        else:
            number = _before(j, BLOCK, START, WIDTH)
            member = (j % BLOCK >= START) & (j % BLOCK < START + WIDTH)
        if ROWS > 0:
            number = number % ROWS
        return offset + number, member
    elif KIND == LIST:
        place = _place(spots, word(PROGRAM, AT + 2))
        number = j - j
        member = j < 0
        for n in range(_count(spots, word(PROGRAM, AT + 2))):
            token = tl.load(lists + place + n)
            number = number + (token < j).to(tl.int32)
            member = member | (token == j)
        return offset + number, member
    else:  # PLACED
        SIZE: tl.constexpr = word(PROGRAM, AT + 2)
        slot = tl.load(lists + _place(spots, word(PROGRAM, AT + 3)) + j // SIZE, mask=there, other=-1)
        return offset + slot * SIZE + j % SIZE, slot >= 0


# ---- walks ----------------------------------------------------------------------------------------------------------


@triton.jit
def _bounds(i, seen, PROGRAM: tl.constexpr, AT: tl.constexpr, spots):
    """The first number of the walk at AT that lies among the `seen` positions, and how many follow."""
    KIND: tl.constexpr = word(PROGRAM, AT)
    A: tl.constexpr = word(PROGRAM, AT + 1)
    B: tl.constexpr = word(PROGRAM, AT + 2)
    C: tl.constexpr = word(PROGRAM, AT + 3)
    D: tl.constexpr = word(PROGRAM, AT + 4)
    E: tl.constexpr = word(PROGRAM, AT + 5)
    if KIND == STEPS:
        near = tl.maximum((i - seen + A) // A, B)
        far = tl.minimum(i // A, C)
        if D > 0:
            far = tl.minimum(far, i % D // A)
        return near, far - near + 1
    elif KIND == COLUMNS:
        top = _before(tl.minimum(i - D, seen - 1) + 1, A, B, C)
        bottom = top - top
        if E < UNBOUNDED:
            bottom = _before(i - E, A, B, C)
        return top - 1, top - bottom
    elif KIND == BLOCKS:
        return i - i, _count(spots, B) * A
    else:  # LISTED and DISTANCES
        return i - i, _count(spots, A)


@triton.jit
def _position(i, first, n, PROGRAM: tl.constexpr, AT: tl.constexpr, spots, lists, there):
    """The walk's positions numbers n, negative where there is none."""
    KIND: tl.constexpr = word(PROGRAM, AT)
    A: tl.constexpr = word(PROGRAM, AT + 1)
    B: tl.constexpr = word(PROGRAM, AT + 2)
    C: tl.constexpr = word(PROGRAM, AT + 3)
    if KIND == STEPS:
        return i - (first + n) * A
    elif KIND == COLUMNS:
        number = tl.maximum(first - n, 0)
        return (number // C) * A + B + number % C
    elif KIND == LISTED:
        return tl.load(lists + _place(spots, A) + n, mask=there, other=-1)
    elif KIND == DISTANCES:
        return i - tl.load(lists + _place(spots, A) + n, mask=there, other=0)
    else:  # BLOCKS
        row = _place(spots, B) + (i // A) * _count(spots, B)
        block = tl.load(lists + row + n // A, mask=there, other=-1)
        return tl.where(block < 0, -1, block * A + n % A)


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
    """The running softmax after this split's stretch of read r: positions before the step alone."""
    READ: tl.constexpr = word(PROGRAM, 2 + STORE_WORDS * word(PROGRAM, 0) + r)
    STORE: tl.constexpr = word(PROGRAM, READ + 1 + WALK_WORDS)
    QUERIES: tl.constexpr = word(PROGRAM, READ + 2 + WALK_WORDS)
    KEEP: tl.constexpr = word(PROGRAM, READ + 3 + WALK_WORDS)
    DROPS: tl.constexpr = word(PROGRAM, READ + 5 + WALK_WORDS)
    n = tl.arange(0, BLOCK_N)
    d = tl.arange(0, BLOCK_D)
    dv = tl.arange(0, BLOCK_DV)
    first, count = _bounds(i, seen, PROGRAM, READ, spots)
    count = tl.maximum(count, 0)
    if QUERIES >= 0:
        count = tl.where(_listed(i, QUERIES, spots, lists), count, 0)
    stretch = tl.cdiv(tl.cdiv(count, SPLITS), BLOCK_N) * BLOCK_N
    for begin in range(split * stretch, tl.minimum(count, (split + 1) * stretch), BLOCK_N):
        there = begin + n < count
        j = _position(i, first, begin + n, PROGRAM, READ, spots, lists, there)
        there = there & (j >= 0) & (j < seen)
        j = tl.where(there, j, 0)
        ok = there & _allowed(i, j, PROGRAM, KEEP, DROPS, spots, lists)
        row, _ = _row(j, PROGRAM, STORE, spots, lists, ok)
        row = tl.where(ok, row, 0).to(tl.int64)
        key_at = keys + row[:, None] * HEAD_DIM + d[None, :]
        key = tl.load(key_at, mask=ok[:, None] & (d < HEAD_DIM)[None, :], other=0.0)
        value_at = values + row[:, None] * V_HEAD_DIM + dv[None, :]
        value = tl.load(value_at, mask=ok[:, None] & (dv < V_HEAD_DIM)[None, :], other=0.0)
        peak, total, acc = _absorb(query, key, value, ok, scale, peak, total, acc, DOTS, UPCAST, PRECISION)
    return peak, total, acc


@triton.jit
def _own(r: tl.constexpr, i, j, spots, lists, PROGRAM: tl.constexpr):
    """True where read r's part has the pair, whatever its walk."""
    READ: tl.constexpr = word(PROGRAM, 2 + STORE_WORDS * word(PROGRAM, 0) + r)
    FULL: tl.constexpr = word(PROGRAM, READ + 4 + WALK_WORDS)
    DROPS: tl.constexpr = word(PROGRAM, READ + 5 + WALK_WORDS)
    return _allowed(i, j, PROGRAM, FULL, DROPS, spots, lists)


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
    """Grid [batch * TOKENS, lanes, SPLITS]: out, or with several splits what `combine` makes it of.

    keys, values: [batch, rows, dim], contiguous; out and the parts: contiguous, heads as in out [batch, heads, tokens].
    scale: in base 2.
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

    # The step's own tokens, up to the query's.
    if split == 0:
        t = tl.arange(0, BLOCK_T)
        there = t <= turn
        j = seen + t
        ok = t < 0
        for r in tl.static_range(word(PROGRAM, 1)):
            ok = ok | _own(r, i, j, spots, lists, PROGRAM)
        ok = ok & there
        key = tl.load(new_k + t[:, None] * k_token + d[None, :], mask=there[:, None] & in_d[None, :], other=0.0)
        value = tl.load(new_v + t[:, None] * v_token + dv[None, :], mask=there[:, None] & in_dv[None, :], other=0.0)
        peak, total, acc = _absorb(query, key, value, ok, scale, peak, total, acc, DOTS, UPCAST, PRECISION)
        if writes != 0:
            own_key = tl.load(new_k + turn * k_token + d, mask=in_d, other=0.0)
            own_value = tl.load(new_v + turn * v_token + dv, mask=in_dv, other=0.0)
            for s in tl.static_range(word(PROGRAM, 0)):
                row, member = _row(i, PROGRAM, 2 + STORE_WORDS * s, spots, lists, i >= 0)
                if member:
                    tl.store(keys + row.to(tl.int64) * HEAD_DIM + d, own_key, mask=in_d)
                    tl.store(values + row.to(tl.int64) * V_HEAD_DIM + dv, own_value, mask=in_dv)

    line = (batch * heads + first_head) * TOKENS + turn  # int64; a head further on is TOKENS lines further on
    if DOTS:
        lines = line + g * TOKENS
        if SPLITS == 1:
            result = acc / tl.where(total > 0, total, 1.0)[:, None]
            at = out + lines[:, None] * V_HEAD_DIM + dv[None, :]
            tl.store(at, result.to(out.dtype.element_ty), mask=real[:, None] & in_dv[None, :])
        else:
            parts = lines * SPLITS + split
            tl.store(part_peak + parts, peak, mask=real)
            tl.store(part_total + parts, total, mask=real)
            at = part_acc + parts[:, None] * V_HEAD_DIM + dv[None, :]
            tl.store(at, acc, mask=real[:, None] & in_dv[None, :])
    elif SPLITS == 1:
        result = acc / tl.where(total > 0, total, 1.0)
        tl.store(out + line * V_HEAD_DIM + dv, result.to(out.dtype.element_ty), mask=in_dv)
    else:
        part = line * SPLITS + split
        tl.store(part_peak + part, peak)
        tl.store(part_total + part, total)
        tl.store(part_acc + part * V_HEAD_DIM + dv, acc, mask=in_dv)


@triton.jit
def combine(
    lanes,
    part_acc,
    part_peak,
    part_total,
    out,
    heads,
    TOKENS: tl.constexpr,
    SHARE: tl.constexpr,
    SPLITS: tl.constexpr,
    V_HEAD_DIM: tl.constexpr,
    BLOCK_DV: tl.constexpr,
):
    """Grid [batch * TOKENS, lanes, SHARE]: one softmax out of those of the splits."""
    batch = (tl.program_id(0) // TOKENS).to(tl.int64)
    head = tl.load(lanes + 4 * tl.program_id(1)) * SHARE + tl.program_id(2)
    line = (batch * heads + head) * TOKENS + tl.program_id(0) % TOKENS
    s = tl.arange(0, SPLITS)
    dv = tl.arange(0, BLOCK_DV)
    peaks = tl.load(part_peak + line * SPLITS + s)
    faded = tl.exp2(peaks - tl.max(peaks, 0))
    total = tl.sum(tl.load(part_total + line * SPLITS + s) * faded, 0)
    at = part_acc + (line * SPLITS + s)[:, None] * V_HEAD_DIM + dv[None, :]
    acc = tl.load(at, mask=(dv < V_HEAD_DIM)[None, :], other=0.0)
    result = tl.sum(acc * faded[:, None], 0) / tl.where(total > 0, total, 1.0)
    tl.store(out + line * V_HEAD_DIM + dv, result.to(out.dtype.element_ty), mask=dv < V_HEAD_DIM)
