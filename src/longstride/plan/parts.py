"""Plans: a pattern's allowed pairs at given lengths, split into disjoint parts of six kinds.

| kind    | what it is                                                        | made from                           |
|---------|-------------------------------------------------------------------|-------------------------------------|
| Rows    | a few queries that read (nearly) everything                       | Global                              |
| Band    | in each residue class mod dilation, keys at class distance lo..hi | Causal, Full, Local, Dilated, Strided |
| Chunk   | block-diagonal                                                    | BlockLocal, Fixed                   |
| Offsets | single diagonals                                                  | LogSparse                           |
| Columns | a compacted set of keys, read by all queries                      | Summary, Fixed, Global              |
| Table   | listed pairs of blocks                                            | RandomBlocks, BlockSparse, own rules |

A part is arithmetic: it costs O(1) memory whatever the length. Parts are laid in the order of the table; each leaves
out what an earlier one covers, by arithmetic on bands where that is exact, else by terms that it carries in `minus`
and every tile looks up.
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import cached_property, lru_cache

import torch

from longstride.errors import PatternError
from longstride.patterns.base import Pattern, lengths, whole
from longstride.patterns.counting import count_without
from longstride.patterns.regions import (
    Band,
    BlockTable,
    KeyGroup,
    KeyList,
    Powers,
    QueryList,
    Rule,
    SameBlock,
    Term,
    without_contained,
)

#: The kinds of part, in the order in which a plan lays them.
KINDS = ("Rows", "Band", "Chunk", "Offsets", "Columns", "Table")


@dataclass(frozen=True)
class Part:
    """One regular piece of a plan: the pairs of `term` less those of `minus`.

    Attributes:
        kind: one of `KINDS`: how the part is computed.
        term: the regions whose intersection the part is.
        minus: terms of earlier parts that overlap it.
        skip_rows: queries (positions) that an earlier part covers whole, so that this one leaves them out.
    """

    kind: str
    term: Term
    minus: tuple[Term, ...] = ()
    skip_rows: tuple[int, ...] = ()

    def allows(self, i: torch.Tensor, j: torch.Tensor) -> torch.Tensor:
        """True where the pair (i, j) of positions belongs to this part."""
        allowed = self.term.allows(i, j)
        for term in self.minus:
            allowed = allowed & ~term.allows(i, j)
        if self.skip_rows:
            allowed = allowed & ~QueryList(self.skip_rows).allows(i, j)
        return allowed

    def pairs(self, q_len: int, kv_len: int | None = None) -> int:
        """How many pairs the part has, exactly."""
        skipped = (Term.of(QueryList(self.skip_rows)),) if self.skip_rows else ()
        with torch.device("cpu"):
            return count_without(self.term, self.minus + skipped, *lengths(q_len, kv_len))

    def __str__(self) -> str:
        words = [_describe_band(self.term.band)] if self.term.band is not None else []
        words += [_describe(region) for region in self.term.regions]
        text = f"{self.kind}({' and '.join(words) or 'all pairs'})"
        if self.minus:
            text += f" less {len(self.minus)} earlier part{'s' if len(self.minus) > 1 else ''}"
        if self.skip_rows:
            text += f" less {len(self.skip_rows)} rows"
        return text


@dataclass(frozen=True)
class Plan:
    """How a pattern is computed at given lengths.

    Attributes:
        pattern: what is computed.
        q_len, kv_len: the queries are the last q_len of kv_len positions.
        groups: (heads, parts): which heads share which disjoint parts.
    """

    pattern: Pattern
    q_len: int
    kv_len: int
    groups: tuple[tuple[tuple[int, ...], tuple[Part, ...]], ...]

    @property
    def parts(self) -> tuple[Part, ...]:
        """The parts of every group, in order."""
        return tuple(part for _, parts in self.groups for part in parts)

    @cached_property
    def pairs(self) -> int:
        """Allowed pairs over all heads, exactly."""
        return sum(len(heads) * part.pairs(self.q_len, self.kv_len) for heads, parts in self.groups for part in parts)

    @cached_property
    def scored_pairs(self) -> int:
        """Pairs that the tiles of the torch backend score, padding and masked pairs included, over all heads.

        A causal triangle counts as one: its fused kernel skips the other half.
        """
        from longstride.plan.tiles import tiles

        return sum(
            len(heads) * tile.scored_pairs
            for heads, parts in self.groups
            for part in parts
            for tile in tiles(part, self.q_len, self.kv_len)
        )


@lru_cache(maxsize=256)
def plan(pattern: Pattern, q_len: int, kv_len: int | None = None, num_heads: int | None = None) -> Plan:
    """Split the pairs that `pattern` allows into disjoint parts.

    Args:
        pattern: what to compute.
        q_len: queries: the last q_len positions.
        kv_len: keys; as many as queries when not given.
        num_heads: query heads; by default 1, or as many as a per-head pattern has patterns.

    Returns:
        A `Plan`, cached by its arguments. It costs arithmetic on the pattern alone, not on the length.
    """
    if not isinstance(pattern, Pattern):
        raise PatternError(f"plan({pattern!r}): it must be a Pattern; longstride.parse(text) makes one of a text")
    q_len, kv_len = lengths(q_len, kv_len)
    num_heads = (pattern.num_heads or 1) if num_heads is None else whole("plan", "num_heads", num_heads, 1)
    shared: dict[Pattern, list[int]] = {}
    for head, rule in enumerate(pattern.split_heads(num_heads)):
        shared.setdefault(rule.bind(kv_len), []).append(head)
    with torch.device("cpu"):
        groups = tuple((tuple(heads), _disjoint(rule.terms(), q_len, kv_len)) for rule, heads in shared.items())
    return Plan(pattern, q_len, kv_len, groups)


def _disjoint(terms: tuple[Term, ...], q_len: int, kv_len: int) -> tuple[Part, ...]:
    """Lay the terms one after another, each less what is laid already."""
    kept = without_contained(terms)
    order = {term: _cheapest_kind(term, q_len, kv_len) for term in kept}
    kept.sort(key=lambda term: (KINDS.index(order[term]), bool(term.find(KeyList)), term.span.dilation))
    parts: list[Part] = []
    laid: list[Term] = []
    for term in kept:
        for rest in _without_laid(term, laid):
            if not _empty(rest, q_len, kv_len):
                overlapping = [before for before in laid if _overlap(rest, before)]
                rows = [before for before in overlapping if _covers_rows(before, rest)]
                skip_rows = tuple(sorted({token for before in rows for token in before.find(QueryList)[0].tokens}))
                minus = tuple(before for before in overlapping if before not in rows)
                parts.append(Part(order[term], rest, minus, skip_rows))
        laid.append(term)
    return tuple(parts)


def _cheapest_kind(term: Term, q_len: int, kv_len: int) -> str:
    """The kind whose defining region leaves the fewest keys a query; further regions are looked up inside its tiles."""
    if term.find(BlockTable):  # laid last, so that no other part has to leave out what it lists
        return "Table"
    costs: dict[str, float] = {}
    for region in term.regions:
        match region:
            case QueryList(tokens):
                costs["Rows"] = len(tokens) * kv_len / q_len
            case KeyList(tokens):
                costs["Columns"] = len(tokens)
            case KeyGroup(block, start, stop):
                costs["Columns"] = min(costs.get("Columns", kv_len), kv_len * (stop - start) / block)
            case Powers():
                costs["Offsets"] = 2 * len(region.distances(kv_len))
            case SameBlock(block):
                costs["Chunk"] = min(costs.get("Chunk", kv_len), block)
            case _:
                costs.setdefault("Table", kv_len)
    band = term.band
    if band is not None or not costs:
        width = None if band is None or band.lo is None or band.hi is None else band.hi - band.lo + 1
        costs["Band"] = min(kv_len / (band.dilation if band else 1), kv_len if width is None else width)
    return min(KINDS, key=lambda kind: (costs.get(kind, float("inf")), kind == "Band"))


def _without_laid(term: Term, laid: list[Term]) -> list[Term]:
    """`term` less the laid terms as far as band arithmetic goes; [] where they cover it."""
    pieces = [term]
    for before in laid:
        rest: list[Term] = []
        for piece in pieces:
            if before.contains(piece):
                continue
            fewer = None
            if not before.regions and not piece.regions and before.band is not None:
                fewer = (piece.band or Band(1, None, None)).without(before.band)
            rest += [piece] if fewer is None else [Term(band) for band in fewer]
        pieces = rest
    return pieces


def _overlap(term: Term, before: Term) -> bool:
    """False where the two are seen to share no pair."""
    return term.intersect(before) is not None and term.span.intersect(before.span) is not None


def _covers_rows(before: Term, term: Term) -> bool:
    """True when `before` has every pair of `term` on the queries that it lists."""
    listed = len(before.regions) == 1 and isinstance(before.regions[0], QueryList)
    return listed and (before.band is None or before.band.contains(term.span))


def _empty(term: Term, q_len: int, kv_len: int) -> bool:
    """True when the term is seen to have no pair at these lengths: its offsets, rows or columns lie outside."""
    if term.span.intersect(Band(1, 1 - q_len, kv_len - 1)) is None:
        return True
    rows = term.find(QueryList)
    if rows and not any(kv_len - q_len <= token < kv_len for token in rows[0].tokens):
        return True
    columns = term.find(KeyList)
    return bool(columns) and not any(token < kv_len for token in columns[0].tokens)


def _describe_band(band: Band) -> str:
    if band.lo == 0 and band.hi is None:
        return "j <= i" if band.dilation == 1 else f"keys a multiple of {band.dilation} back"
    low = "" if band.lo is None else f"{band.lo * band.dilation} <= "
    high = "" if band.hi is None else f" <= {band.hi * band.dilation}"
    step = f", a multiple of {band.dilation}" if band.dilation > 1 else ""
    return f"{low}i - j{high}{step}"


def _describe(region: object) -> str:
    match region:
        case SameBlock(block):
            return f"same block of {block}"
        case KeyGroup(block, start, stop):
            return f"keys {start}..{stop - 1} of every block of {block}"
        case KeyList(tokens):
            return f"{len(tokens)} listed keys"
        case QueryList(tokens):
            return f"{len(tokens)} listed queries"
        case Powers(base):
            return f"distances 0 and powers of {base}"
        case BlockTable(source, block):
            return f"blocks of {block} of {source}"
        case Rule(pattern):
            return f"the rule of {pattern}"
        case _:
            return str(region)
