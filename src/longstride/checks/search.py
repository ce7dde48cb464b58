"""Which layers can attend along a sparser pattern within a stated loss: a search that measures what it proposes.

1. Every layer alone along every candidate pattern, all other layers as they are: what that costs.
2. These changes one after another, those first that cost least for the pairs that they save. Each is measured together
   with all that were taken before it, and taken if the whole stays within the tolerance: what single layers cost does
   not add up, so it decides the order and nothing else.
3. The result is measured on windows that neither step saw, beside the model as it is: a search finds what suits its
   own windows, and looks better there than it is. While the rise is above the tolerance, the last change is undone;
   then these windows have chosen, too, and the rise that they show is somewhat low. `Suggestion.undone` says so.

Loss is the mean of -log2 p(token) over the second half of each window, as in `longstride.training.evaluate`.
"""

import math
from collections.abc import Sequence
from contextlib import nullcontext
from dataclasses import dataclass

import numpy as np
from tqdm import tqdm

from longstride.checks.attending import attending, read_schedule, schedule_of
from longstride.checks.subject import Subject
from longstride.checks.tolerance import Tolerance
from longstride.errors import ArgumentError, DataError, PatternError, UnsupportedError
from longstride.patterns import Global, Local, Pattern, Strided
from longstride.training import Span, side_by_side, window_losses

# Numbers alone may move a loss by so much, in bits; more says that a model attends in a way of its own.
MOST_NUMERICAL_BITS = 0.01
# Tokens that every later one reads, besides its window: the first ones of a text often hold what none needs.
FIRST_TOKENS = 4


@dataclass(frozen=True)
class Search:
    """What is searched, and on how much text.

    Args:
        context: tokens of context in a window; with records, tokens in a window.
        tolerance: how much the loss may rise.
        candidates: patterns that a layer may come to attend along; () for `default_candidates`.
        windows: windows of the search; as many others confirm its result.
        batch_size: windows that go through the model at once.
        record: above 1, windows begin at multiples of so many tokens.
        unit: what a token is called.
    """

    context: int
    tolerance: Tolerance
    candidates: tuple[Pattern, ...] = ()
    windows: int = 16
    batch_size: int = 8
    record: int = 1
    unit: str = "byte"

    def __post_init__(self) -> None:
        for name in ("context", "windows", "batch_size"):
            if getattr(self, name) < 1:
                option = name.replace("_", "-")
                raise ArgumentError(f"--{option} {getattr(self, name)}: it must be at least 1")


@dataclass(frozen=True)
class LayerCost:
    """What it costs to change one layer alone.

    Args:
        rise_bits: how much the loss rises, in bits a token.
        standard_error_bits: of the rise, from how much it differs between windows; None with one window.
        pairs_saved: fewer pairs, over all heads, at the whole context.
    """

    layer: int
    pattern: Pattern
    rise_bits: float
    standard_error_bits: float | None
    pairs_saved: int


@dataclass(frozen=True)
class Suggestion:
    """A schedule, and what was measured of it. Losses are in bits a token, of windows that the search did not see.

    They are unbiased for windows of the text where nothing was undone.

    Args:
        before, patterns: the pattern of each layer, before and in the schedule.
        costs: what each layer costs alone, on the search's own windows.
        bits_before, bits: the loss of the model as it is, and of all of the schedule at once.
        standard_error_bits: of their difference; None with one window.
        tolerance_bits: how much it was allowed to rise.
        pairs_before, pairs: of each layer, over all heads, at the whole context.
        windows: how many windows the search had; as many others confirm it, or one fewer.
        undone: changes that were within the tolerance on the search's windows, and taken back because all were not on
            the others.
    """

    before: tuple[Pattern, ...]
    patterns: tuple[Pattern, ...]
    costs: tuple[LayerCost, ...]
    bits_before: float
    bits: float
    standard_error_bits: float | None
    tolerance_bits: float
    pairs_before: tuple[int, ...]
    pairs: tuple[int, ...]
    context: int
    windows: int
    unit: str = "byte"
    undone: int = 0

    @property
    def rise_bits(self) -> float:
        return self.bits - self.bits_before

    @property
    def pairs_left(self) -> float:
        """The share of the model's pairs that the schedule has."""
        return sum(self.pairs) / sum(self.pairs_before)

    def __str__(self) -> str:
        return f"{self._cost_table()}\n\n{self._schedule_table()}\n\n{self._verdict()}"

    def _cost_table(self) -> str:
        """Layers down, candidates across: what one alone costs."""
        candidates = list(dict.fromkeys(cost.pattern for cost in self.costs))
        widths = [max(10, len(str(pattern)) + 2) for pattern in candidates]
        rises = {(cost.layer, cost.pattern): f"{cost.rise_bits:+.4f}" for cost in self.costs}
        lines = [
            f"bits per {self.unit} more with one layer alone along",
            "layer" + "".join(f"{pattern!s:>{width}}" for pattern, width in zip(candidates, widths, strict=True)),
        ]
        for layer in range(len(self.before)):
            cells = (rises.get((layer, pattern), "-") for pattern in candidates)
            lines.append(f"{layer:>5}" + "".join(f"{cell:>{width}}" for cell, width in zip(cells, widths, strict=True)))
        return "\n".join(lines)

    def _schedule_table(self) -> str:
        width = max(len(str(pattern)) for pattern in self.patterns) + 2
        lines = [f"layer  {'pattern':<{width}}{'pairs':>7}"]
        for layer, (before, pattern) in enumerate(zip(self.before, self.patterns, strict=True)):
            share = self.pairs[layer] / self.pairs_before[layer]
            lines.append(f"{layer:>5}  {pattern!s:<{width}}{share:>7.1%}" + ("" if pattern == before else "  changed"))
        return "\n".join(lines)

    def _verdict(self) -> str:
        changed = sum(old != new for old, new in zip(self.before, self.patterns, strict=True))
        error = "" if self.standard_error_bits is None else f" (standard error {self.standard_error_bits:.4f})"
        said = (
            f"{changed} of {len(self.patterns)} layers changed; {self.pairs_left:.1%} of the pairs at "
            f"{self.context:,} {self.unit}s are left.\n"
            f"Measured as a whole, on text that the search did not see: {self.bits_before:.4f} bits per {self.unit} as "
            f"it is, {self.bits:.4f} along the schedule, {self.rise_bits:+.4f}{error}; allowed was "
            f"{self.tolerance_bits:+.4f}."
        )
        if self.undone:
            more = f"{self.undone} change{'s' if self.undone > 1 else ''}"
            said += f"\nWith {more} more it was above that there, so that they were undone."
            if changed:
                said += " This text has chosen, too, and the schedule looks a little better on it than elsewhere."
        return said


def default_candidates(context: int) -> tuple[Pattern, ...]:
    """Windows of a sixteenth and a quarter of the context, each with and without the first tokens, and a stride.

    >>> default_candidates(256)
    (Local(16), Local(16) | Global(4), Local(64), Local(64) | Global(4), Local(16) | Strided(16))
    """
    found: list[Pattern] = []
    for window in (max(2, context // 16), max(2, context // 4)):
        found += [Local(window), Local(window) | Global(FIRST_TOKENS)]
    stride = max(2, math.isqrt(context))
    return tuple(dict.fromkeys([*found, Local(stride) | Strided(stride)]))


def suggest_schedule(
    subject: Subject,
    data: np.ndarray,
    search: Search,
    *,
    documents: np.ndarray | None = None,
    progress: bool = False,
) -> Suggestion:
    """Search for a schedule that keeps the loss on a text within the tolerance.

    Args:
        data: [tokens] of the text, as `Subject.encode` gives them.
        documents: int64[documents + 1], where documents begin, and the end, for a model of documents that do not see
            one another: each window is of one of them.
        progress: show bars on a terminal.

    Raises:
        ArgumentError: a context that the model does not have.
        DataError: the text has not two windows.
        PatternError: a candidate that the model cannot have.
        UnsupportedError: the model does not attend as its configuration says, or patterns have no place in it.
        LongstrideError: a loss is no finite number.
    """
    if subject.context is not None and search.context > subject.context:
        raise ArgumentError(f"--context {search.context}: it must be at most the model's, {subject.context:,}")
    candidates = _candidates(subject, search)
    seen, unseen = _windows(data, search, documents)
    searched, confirmed = (_Yardstick(subject, data, windows, search) for windows in (seen, unseen))
    before = schedule_of(subject)
    base = searched.bits(None)
    _check_schedule(searched.bits(before), base, before)
    tolerance_bits = search.tolerance.in_bits(base.mean().item())
    pairs = {pattern: pattern.pairs(search.context, heads=subject.num_heads) for pattern in {*before, *candidates}}

    costs = []
    changes = [
        (layer, pattern)
        for layer in range(len(before))
        for pattern in candidates
        if pairs[pattern] < pairs[before[layer]]
    ]
    for layer, pattern in tqdm(changes, desc="layers alone", leave=False, disable=None if progress else True):
        rises = searched.bits(_changed(before, layer, pattern)) - base
        saved = pairs[before[layer]] - pairs[pattern]
        costs.append(LayerCost(layer, pattern, rises.mean().item(), _standard_error(rises), saved))

    taken = [before]
    affordable = [cost for cost in costs if cost.rise_bits <= tolerance_bits]
    affordable.sort(key=lambda cost: cost.rise_bits / cost.pairs_saved)
    for cost in tqdm(affordable, desc="together", leave=False, disable=None if progress else True):
        if pairs[cost.pattern] >= pairs[taken[-1][cost.layer]]:
            continue
        tried = _changed(taken[-1], cost.layer, cost.pattern)
        if (searched.bits(tried) - base).mean() <= tolerance_bits:
            taken.append(tried)

    base = confirmed.bits(None)
    tolerance_bits = search.tolerance.in_bits(base.mean().item())
    found = len(taken)
    bits = base if len(taken) == 1 else confirmed.bits(taken[-1])
    while len(taken) > 1 and (bits - base).mean() > tolerance_bits:
        taken.pop()
        bits = base if len(taken) == 1 else confirmed.bits(taken[-1])
    return Suggestion(
        before=before,
        patterns=taken[-1],
        costs=tuple(costs),
        bits_before=base.mean().item(),
        bits=bits.mean().item(),
        standard_error_bits=_standard_error(bits - base),
        tolerance_bits=tolerance_bits,
        pairs_before=tuple(pairs[pattern] for pattern in before),
        pairs=tuple(pairs[pattern] for pattern in taken[-1]),
        context=search.context,
        windows=len(seen),
        unit=search.unit,
        undone=found - len(taken),
    )


@dataclass(frozen=True)
class _Yardstick:
    """The loss of any schedule on the same windows."""

    subject: Subject
    data: np.ndarray
    windows: Sequence[Span]
    search: Search

    def bits(self, schedule: tuple[Pattern, ...] | None) -> np.ndarray:
        """float64[windows]: bits a token in each window, along a schedule or, with None, as the model is."""
        # Input i has i + 1 tokens of context, itself included.
        first = max(0, self.search.context // 2 - 1) if self.search.record == 1 else 0
        with nullcontext(self.subject) if schedule is None else attending(self.subject, schedule) as tried:
            losses = window_losses(tried.predictor(), self.data, self.windows, self.search.batch_size)
            return np.concatenate([batch[:, first:].double().mean(1).numpy() for _, batch in losses]) / math.log(2)


def _candidates(subject: Subject, search: Search) -> list[Pattern]:
    """Those that were asked for, all of which the model must be able to have; else those of the defaults that it can.

    A model with a memory, for example, has no first tokens.
    """
    found = []
    for one in search.candidates or default_candidates(search.context):
        schedule = read_schedule([one], subject)
        try:
            with attending(subject, schedule):
                found.append(schedule[0])
        except (PatternError, UnsupportedError):
            if search.candidates:
                raise
    return found


def _windows(data: np.ndarray, search: Search, documents: np.ndarray | None) -> tuple[list[Span], list[Span]]:
    """Windows spread evenly over the text, by turns for the search and for the confirmation of its result."""
    every = side_by_side(len(data), search.context, search.record, documents)
    if len(every) < 2:
        where = "" if documents is None else " within single documents, which are all that this model sees at once"
        raise DataError(
            f"{len(data):,} {search.unit}s are too few: the search needs two windows of {search.context:,}{where}, one "
            "for itself and one for its result; give more data or a smaller --context"
        )
    count = min(2 * search.windows, len(every))
    chosen = [every[number * len(every) // count] for number in range(count)]
    return chosen[::2], chosen[1::2]


def _check_schedule(along: np.ndarray, base: np.ndarray, schedule: tuple[Pattern, ...]) -> None:
    """Along the patterns that it is said to have already, a model must come out as it is."""
    apart = abs((along - base).mean().item())
    if not apart <= MOST_NUMERICAL_BITS:
        raise UnsupportedError(
            f"along {', '.join(dict.fromkeys(map(str, schedule)))}, which its configuration names, this model's loss "
            f"is {apart:.3f} bits from what it is: its attention has something that patterns do not describe"
        )


def _changed(schedule: tuple[Pattern, ...], layer: int, pattern: Pattern) -> tuple[Pattern, ...]:
    return (*schedule[:layer], pattern, *schedule[layer + 1 :])


def _standard_error(values: np.ndarray) -> float | None:
    return values.std(ddof=1).item() / len(values) ** 0.5 if len(values) > 1 else None
