"""What the kernels share: which positions a tile owns, which stretch of the other side it meets, which pairs count.

All positions and class indices are int32; lists and numbers are as `sources` writes them.
"""

import triton
import triton.language as tl

from longstride.backends.triton import sources

LANES = tl.constexpr(sources.LANES)
BLOCKS = tl.constexpr(sources.BLOCKS)
GROUP = tl.constexpr(sources.GROUP)
LIST = tl.constexpr(sources.LIST)
RANGE = tl.constexpr(sources.RANGE)
CHUNK = tl.constexpr(sources.CHUNK)
COLUMNS = tl.constexpr(sources.COLUMNS)
LISTED = tl.constexpr(sources.LISTED)
TABLE = tl.constexpr(sources.TABLE)
DIAGONALS = tl.constexpr(sources.DIAGONALS)
LEAST = tl.constexpr(sources.LEAST)
MOST = tl.constexpr(sources.MOST)
CLASS = tl.constexpr(sources.CLASS)
OWN_CLASS = tl.constexpr(sources.OWN_CLASS)
SAME_BLOCK = tl.constexpr(sources.SAME_BLOCK)
KEY_GROUP = tl.constexpr(sources.KEY_GROUP)
KEY_FIRST = tl.constexpr(sources.KEY_FIRST)
KEY_LIST = tl.constexpr(sources.KEY_LIST)
QUERY_FIRST = tl.constexpr(sources.QUERY_FIRST)
QUERY_LIST = tl.constexpr(sources.QUERY_LIST)
DISTANCE = tl.constexpr(sources.DISTANCE)

LOG2_E = tl.constexpr(1.4426950408889634)
LN_2 = tl.constexpr(0.6931471805599453)


# ---- sources as text ------------------------------------------------------------------------------------------------
# The compiler takes no nested tuples as constants, but text, and functions of it that it calls while compiling.


@triton.constexpr_function
def count_of(SOURCES):
    """How many sources there are."""
    return len(SOURCES.split(";"))


@triton.constexpr_function
def source_of(SOURCES, s):
    """One source: kind/index/split/keep/drop."""
    return SOURCES.split(";")[s]


@triton.constexpr_function
def kind_of(SOURCE):
    return int(SOURCE.split("/")[0])


@triton.constexpr_function
def index_of(SOURCE):
    return int(SOURCE.split("/")[1])


@triton.constexpr_function
def along(SOURCE):
    """True for sources that go along the tile's own classes: RANGE and CHUNK."""
    return int(SOURCE.split("/")[0]) < 2


@triton.constexpr_function
def splits(SOURCE):
    """True where the clear stretch is run without a mask."""
    return SOURCE.split("/")[2] == "1"


@triton.constexpr_function
def keeps(SOURCE):
    """How many conditions a pair must meet."""
    return len(SOURCE.split("/")[3].split(",")) if SOURCE.split("/")[3] else 0


@triton.constexpr_function
def keep_of(SOURCE, c, n):
    """Kind (n = 0) or index (n = 1) of a condition to meet."""
    return int(SOURCE.split("/")[3].split(",")[c].split(".")[n])


#: Which conditions of a band are in doubt in a stretch: all; only that i - j is large enough; only that it is not too
#: large (earlier parts then lie behind as well); none.
BOTH, NEAR, FAR, CLEAR = (tl.constexpr(side) for side in range(4))


@triton.constexpr_function
def asked(kind, pack, side):
    """True where a condition is in doubt. A tile of one class need not ask whether a pair is of one class."""
    if kind == OWN_CLASS.value:
        return pack > 1
    return not ((kind == LEAST.value and side == FAR.value) or (kind == MOST.value and side == NEAR.value))


@triton.constexpr_function
def asks(SOURCE, pack, side):
    """True where any condition is in doubt."""
    if side == CLEAR.value:
        return False
    found = len(SOURCE.split("/")[4]) > 0 and side != FAR.value
    for condition in SOURCE.split("/")[3].split(","):
        if condition:
            kind = int(condition.split(".")[0])
            own = kind == OWN_CLASS.value and pack == 1
            known = (kind == LEAST.value and side == FAR.value) or (kind == MOST.value and side == NEAR.value)
            found = found or not (own or known)
    return found


@triton.constexpr_function
def edge(SOURCE, numbers, own, other, side):
    """`side` where each edge of the window can be masked alone, else BOTH.

    It can where no tile of `other` meets both edges of the window of a tile of `own`.
    """
    kind = int(SOURCE.split("/")[0])
    index = int(SOURCE.split("/")[1])
    if kind == CHUNK.value:
        return BOTH.value
    hi, clear = int(numbers[index + 1]), int(numbers[index + 2])
    alone = hi >= 2**30 or (kind == RANGE.value and hi - clear >= own + other - 3)
    return side if alone else BOTH.value


@triton.constexpr_function
def guarded(SOURCE, numbers, pack):
    """True when the conditions already keep out keys that are not there, which are later than every query."""
    found = False
    for condition in SOURCE.split("/")[3].split(","):
        if condition and int(condition.split(".")[0]) == LEAST.value:
            found = int(numbers[int(condition.split(".")[1])]) >= 0
    return found and pack == 1 and int(SOURCE.split("/")[0]) <= COLUMNS.value


@triton.constexpr_function
def drops(SOURCE):
    """How many terms are left out."""
    return len(SOURCE.split("/")[4].split("|")) if SOURCE.split("/")[4] else 0


@triton.constexpr_function
def drop_size(SOURCE, t):
    return len(SOURCE.split("/")[4].split("|")[t].split(","))


@triton.constexpr_function
def drop_of(SOURCE, t, c, n):
    """Kind (n = 0) or index (n = 1) of a condition of a term that is left out."""
    return int(SOURCE.split("/")[4].split("|")[t].split(",")[c].split(".")[n])


# ---- owners ---------------------------------------------------------------------------------------------------------


@triton.jit
def owned(
    tile,
    OWNER: tl.constexpr,
    INDEX: tl.constexpr,
    numbers: tl.constexpr,
    spots,
    lists,
    low,
    kv_len,
    BLOCK: tl.constexpr,
    PACK: tl.constexpr,
):
    """The positions low .. kv_len - 1 that a tile owns.

    Returns int32 [BLOCK] positions, bool [BLOCK] which of them are there, the first and the last position (or bounds
    on them) as scalars, and for LANES the step and the first position's class index.
    """
    m = tl.arange(0, BLOCK)
    if OWNER == LANES:
        step = numbers[INDEX]
        rows: tl.constexpr = BLOCK // PACK
        groups = tl.cdiv(step, PACK)
        lane = tile % groups * PACK
        first = low + lane + (tile // groups) * rows * step
        if PACK == 1:
            position = first + m * step
            there = position < kv_len
        else:
            position = first + m % PACK + (m // PACK) * step
            there = (position < kv_len) & (lane + m % PACK < step)
        last = tl.minimum(first + (rows - 1) * step, first + (kv_len - 1 - first) // step * step)
        return position, there, first, last
    if OWNER == BLOCKS:
        block = numbers[INDEX]
        pieces = tl.cdiv(block, BLOCK)
        start = (low // block + tile // pieces) * block
        first = start + tile % pieces * BLOCK
        position = first + m
        last = tl.minimum(tl.minimum(first + BLOCK, start + block), kv_len) - 1
        return position, (position >= low) & (position <= last), tl.maximum(first, low), last
    c = tile * BLOCK + m
    if OWNER == GROUP:
        block = numbers[INDEX]
        count = numbers[INDEX + 2]
        position = (c // count) * block + numbers[INDEX + 1] + c % count
        there = position < kv_len
        start = tile * BLOCK
        stop = start + BLOCK - 1
        first = (start // count) * block + numbers[INDEX + 1] + start % count
        last = tl.minimum((stop // count) * block + numbers[INDEX + 1] + stop % count, kv_len - 1)
        return position, there, first, last
    count = spots[INDEX + 1]
    position = tl.load(lists + spots[INDEX] + c, mask=c < count, other=0)
    there = (c < count) & (position >= low) & (position < kv_len)
    first = tl.min(tl.where(there, position, kv_len))
    last = tl.max(tl.where(there, position, -1))
    return position, there, first, last


# ---- conditions -----------------------------------------------------------------------------------------------------


@triton.jit
def _listed(x, lists, place, count):
    found = x < 0
    for n in range(count):
        found = found | (x == tl.load(lists + place + n))
    return found


@triton.jit
def _holds(i, j, KIND: tl.constexpr, INDEX: tl.constexpr, numbers: tl.constexpr, spots, lists):
    # One chain: the compiler goes on past a `return` that is not the last thing of its branch.
    if KIND == KEY_LIST:
        return _listed(j, lists, spots[INDEX], spots[INDEX + 1])
    elif KIND == QUERY_LIST:
        return _listed(i, lists, spots[INDEX], spots[INDEX + 1])
    elif KIND == DISTANCE:
        return _listed(tl.abs(i - j), lists, spots[INDEX], spots[INDEX + 1])
    elif KIND == LEAST:  # written so that the only step in two dimensions is a comparison
        return j <= i - numbers[INDEX]
    elif KIND == MOST:
        return j >= i - numbers[INDEX]
    elif KIND == SAME_BLOCK:
        return i // numbers[INDEX] == j // numbers[INDEX]
    elif KIND == KEY_GROUP:
        return (j % numbers[INDEX] >= numbers[INDEX + 1]) & (j % numbers[INDEX] < numbers[INDEX + 2])
    elif KIND == QUERY_FIRST:
        return i < numbers[INDEX]
    elif KIND == KEY_FIRST:
        return j < numbers[INDEX]
    else:  # CLASS and OWN_CLASS
        return i % numbers[INDEX] == j % numbers[INDEX]


@triton.jit
def place_in_grid(HEADS_FIRST: tl.constexpr):
    """(tile, tiles, head) of a program."""
    tiles: tl.constexpr = 1 if HEADS_FIRST else 0
    return tl.program_id(tiles), tl.num_programs(tiles), tl.program_id(1 - tiles)


@triton.jit
def allowed(i, j, SOURCE: tl.constexpr, numbers: tl.constexpr, spots, lists, PACK: tl.constexpr, SIDE: tl.constexpr):
    """The conditions of the source's part that are in doubt on this side. i and j broadcast to the result's shape."""
    ok = i == i
    for c in tl.static_range(keeps(SOURCE)):
        if asked(keep_of(SOURCE, c, 0), PACK, SIDE):
            ok = ok & _holds(i, j, keep_of(SOURCE, c, 0), keep_of(SOURCE, c, 1), numbers, spots, lists)
    if SIDE != FAR:
        for t in tl.static_range(drops(SOURCE)):
            covered = i == i
            for c in tl.static_range(drop_size(SOURCE, t)):
                covered = covered & _holds(
                    i, j, drop_of(SOURCE, t, c, 0), drop_of(SOURCE, t, c, 1), numbers, spots, lists
                )
            ok = ok & ~covered
    return ok


# ---- sources --------------------------------------------------------------------------------------------------------


@triton.jit
def before(x, block, start, count):
    """How many keys of a group lie before position x."""
    x = tl.maximum(x, 0)
    return (x // block) * count + tl.minimum(tl.maximum(x % block - start, 0), count)


@triton.jit
def stretch(
    first,
    last,
    step: tl.constexpr,
    SOURCE: tl.constexpr,
    numbers: tl.constexpr,
    spots,
    lists,
    head,
    low,
    kv_len,
    KEYS: tl.constexpr,
    BLOCK: tl.constexpr,
    PACK: tl.constexpr,
):
    """Which places of a source a tile with positions first .. last meets.

    KEYS: the source is of keys (the tile owns queries), positions 0 .. kv_len - 1; else of queries, positions
    low .. kv_len - 1. Returns start, clear_start, clear_stop, stop: places start .. stop - 1, of which
    clear_start .. clear_stop - 1 need no mask; clear_start - start and clear_stop - start are multiples of BLOCK.
    """
    KIND: tl.constexpr = kind_of(SOURCE)
    INDEX: tl.constexpr = index_of(SOURCE)
    if along(SOURCE):
        lo = numbers[INDEX]
        hi = numbers[INDEX + 1]
        clear = numbers[INDEX + 2]
        # Class indices: position = first % step + index * step. Packed classes beyond the first may have an index -1.
        near = first // step
        far = last // step
        if KEYS:
            start = tl.maximum(near - hi, 0 if PACK == 1 else -1)
            stop = tl.minimum(far - lo, (kv_len - 1 - first % step) // step) + 1
            clear_start = far - hi
            clear_stop = near - clear + 1
        else:
            if PACK == 1:
                least = (low - first % step + step - 1) // step
            else:
                least = tl.maximum(low - first % step - PACK, 0) // step
            start = tl.maximum(near + lo, least)
            stop = tl.minimum(far + hi, (kv_len - 1 - first % step) // step) + 1
            clear_start = far + clear
            clear_stop = near + hi + 1
        if KIND == CHUNK:
            block = numbers[INDEX + 3]
            start = tl.maximum(start, first // block * block)
            stop = tl.minimum(stop, (last // block + 1) * block)
            clear_start = tl.maximum(clear_start, last // block * block)
            clear_stop = tl.minimum(clear_stop, (first // block + 1) * block)
    elif KIND == COLUMNS:
        block = numbers[INDEX + 3]
        begin = numbers[INDEX + 4]
        count = numbers[INDEX + 5]
        total = before(kv_len, block, begin, count)
        start = before(first - numbers[INDEX + 1], block, begin, count)
        stop = tl.minimum(before(last - numbers[INDEX] + 1, block, begin, count), total)
        clear_start = before(last - numbers[INDEX + 1], block, begin, count)
        clear_stop = before(first - numbers[INDEX + 2] + 1, block, begin, count)
    elif KIND == TABLE:
        block = numbers[INDEX]
        spot: tl.constexpr = numbers[INDEX + 1]
        row = lists + spots[spot] + head * spots[spot + 1] + first // block
        pieces = tl.cdiv(block, BLOCK)
        start = tl.load(row) * pieces * BLOCK
        stop = tl.load(row + 1) * pieces * BLOCK
        clear_start = start
        clear_stop = start
    else:
        start = 0
        stop = spots[INDEX + 1]
        clear_start = start
        clear_stop = start
    if splits(SOURCE) and PACK == 1:
        stop = tl.maximum(stop, start)
        clear_start = start + tl.cdiv(tl.minimum(tl.maximum(clear_start - start, 0), stop - start), BLOCK) * BLOCK
        clear_stop = start + tl.minimum(tl.maximum(clear_stop, start), stop) - start
        clear_stop = tl.maximum(start + (clear_stop - start) // BLOCK * BLOCK, clear_start)
        return start, clear_start, clear_stop, stop
    # One masked run: everything comes after the empty clear stretch.
    return start, start, start, stop


@triton.jit
def places(SOURCE: tl.constexpr, BLOCK: tl.constexpr, PACK: tl.constexpr):
    """How many places of a source a tile of BLOCK positions takes: packed classes share each place."""
    if kind_of(SOURCE) == RANGE:
        return BLOCK // PACK
    else:
        return BLOCK


@triton.jit
def met(
    place,
    first,
    step: tl.constexpr,
    stop,
    SOURCE: tl.constexpr,
    numbers: tl.constexpr,
    spots,
    lists,
    low,
    kv_len,
    KEYS: tl.constexpr,
    BLOCK: tl.constexpr,
    PACK: tl.constexpr,
):
    """Positions int32 [BLOCK] at places place .. place + BLOCK - 1 of a source, and which of them are there."""
    KIND: tl.constexpr = kind_of(SOURCE)
    INDEX: tl.constexpr = index_of(SOURCE)
    n = tl.arange(0, BLOCK)
    if along(SOURCE):
        if PACK == 1:
            position = first % step + (place + n) * step
            there = place + n < stop
        else:
            position = first % step + n % PACK + (place + n // PACK) * step
            there = (place + n // PACK < stop) & (position >= (0 if KEYS else low)) & (position < kv_len)
            # Past the last class the same positions would come once more, as another row of the first classes.
            lane = (first - low) % step if KEYS else first % step
            there = there & (lane + n % PACK < step)
    elif KIND == COLUMNS:
        count = numbers[INDEX + 5]
        c = tl.minimum(place + n, stop)  # the first n keys are a group of one huge block, whose successor is far enough
        position = (c // count) * numbers[INDEX + 3] + numbers[INDEX + 4] + c % count
        there = place + n < stop
    elif KIND == TABLE:
        block = numbers[INDEX]
        pieces = tl.cdiv(block, BLOCK)
        piece = place // BLOCK
        inside = piece % pieces * BLOCK + n
        position = tl.load(lists + piece // pieces) * block + inside
        there = (inside < block) & (position >= (0 if KEYS else low)) & (position < kv_len)
    else:
        tl.static_assert(KIND == LISTED)
        c = place + n
        position = tl.load(lists + spots[INDEX] + c, mask=c < stop, other=0)
        there = (c < stop) & (position >= (0 if KEYS else low)) & (position < kv_len)
    return position, there
