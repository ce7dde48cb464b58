"""Where the decode kernel finds its keys: positions by number, pairs that count, rows of positions.

Words of the program, spots and lists are as `decode_lowering` writes them. Positions and numbers are int32.
"""

import triton
import triton.language as tl

from longstride.backends.triton import decode_lowering
from longstride.backends.triton.geometry import before

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
def listed(x, SPOT: tl.constexpr, spots, lists):
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
        return listed(j, A, spots, lists)
    elif KIND == QUERY_FIRST:
        return i + j - j < A  # in j's shape
    elif KIND == QUERY_LIST:
        return listed(i + j - j, A, spots, lists)
    elif KIND == DISTANCE:
        return listed(i - j, A, spots, lists)
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
def allowed(i, j, PROGRAM: tl.constexpr, KEEP: tl.constexpr, DROPS: tl.constexpr, spots, lists):
    """True where the pair meets the conditions at KEEP, and no dropped term's."""
    ok = _all_hold(i, j, PROGRAM, KEEP, spots, lists)
    for t in tl.static_range(word(PROGRAM, DROPS)):
        ok = ok & ~_all_hold(i, j, PROGRAM, word(PROGRAM, DROPS + 1 + t), spots, lists)
    return ok


# ---- stores ---------------------------------------------------------------------------------------------------------


@triton.jit
def row(j, PROGRAM: tl.constexpr, AT: tl.constexpr, spots, lists, there):
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
            number = before(j, BLOCK, START, WIDTH)
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
def bounds(i, seen, PROGRAM: tl.constexpr, AT: tl.constexpr, spots):
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
        top = before(tl.minimum(i - D, seen - 1) + 1, A, B, C)
        bottom = top - top
        if E < UNBOUNDED:
            bottom = before(i - E, A, B, C)
        return top - 1, top - bottom
    elif KIND == BLOCKS:
        return i - i, _count(spots, B) * A
    else:  # LISTED and DISTANCES
        return i - i, _count(spots, A)


@triton.jit
def position(i, first, n, PROGRAM: tl.constexpr, AT: tl.constexpr, spots, lists, there):
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
