"""Patterns that depend on the distance i - j alone: dense, windows, strides, powers."""

from __future__ import annotations

from dataclasses import dataclass

import torch

from longstride.patterns.base import Pattern, cached, flag, whole
from longstride.patterns.regions import CAUSAL, Band, Powers, Term


@dataclass(frozen=True, repr=False)
class _Banded(Pattern):
    """A pattern that is one `Band`."""

    def band(self) -> Band:
        raise NotImplementedError

    def allows(self, i: torch.Tensor, j: torch.Tensor) -> torch.Tensor:
        return self.band().allows(i, j)

    @property
    def is_causal(self) -> bool:
        least = self.band().least
        return least is not None and least >= 0

    @property
    def repeats_every(self) -> int:
        return 1

    def retained(self, next_position: int) -> torch.Tensor:
        band, j = self.band(), cached(next_position)
        # The first present or future query in j's residue class is the nearest that can read it.
        distance = -((j - next_position) // band.dilation)
        return torch.ones_like(j, dtype=torch.bool) if band.hi is None else distance <= band.hi

    def terms(self) -> tuple[Term, ...]:
        return (Term.of(self.band()),)


@dataclass(frozen=True, repr=False)
class Causal(_Banded):
    """``j <= i``: dense causal attention.

    >>> import longstride as ls
    >>> print(ls.picture(ls.Causal(), 8))
    # . . . . . . .
    # # . . . . . .
    # # # . . . . .
    # # # # . . . .
    # # # # # . . .
    # # # # # # . .
    # # # # # # # .
    # # # # # # # #
    """

    def band(self) -> Band:
        return CAUSAL


@dataclass(frozen=True, repr=False)
class Full(_Banded):
    """All pairs: dense attention of an encoder.

    >>> import longstride as ls
    >>> print(ls.picture(ls.Full(), 3))
    # # #
    # # #
    # # #
    """

    def band(self) -> Band:
        return Band(1, None, None)


@dataclass(frozen=True, repr=False)
class Local(_Banded):
    """``-lookahead <= i - j < window``: a sliding window of `window` keys, the query's own among them.

    >>> import longstride as ls
    >>> print(ls.picture(ls.Local(3), 8))
    # . . . . . . .
    # # . . . . . .
    # # # . . . . .
    . # # # . . . .
    . . # # # . . .
    . . . # # # . .
    . . . . # # # .
    . . . . . # # #

    Args:
        window: keys at distance 0 .. window - 1 back.
        lookahead: keys ahead; 0 is causal. Longformer's ``attention_window=w`` is
            ``Local(w // 2 + 1, lookahead=w // 2)``.

    Source: Child 2019, section 4.3, A(1); Mistral 7B; Longformer.
    """

    window: int
    lookahead: int = 0

    def __post_init__(self) -> None:
        whole("Local", "window", self.window, 1)
        whole("Local", "lookahead", self.lookahead, 0)
        super().__post_init__()

    def band(self) -> Band:
        return Band(1, -self.lookahead, self.window - 1)


@dataclass(frozen=True, repr=False)
class Dilated(_Banded):
    """``(i - j) % dilation == 0`` and ``-lookahead <= (i - j) // dilation < window``: a window with gaps.

    >>> import longstride as ls
    >>> print(ls.picture(ls.Dilated(2, 3), 8))
    # . . . . . . .
    . # . . . . . .
    . . # . . . . .
    # . . # . . . .
    . # . . # . . .
    . . # . . # . .
    . . . # . . # .
    . . . . # . . #

    Args:
        window: keys read, at distance 0, dilation, 2 dilation ...
        dilation: positions from one key to the next.
        lookahead: keys ahead, as many dilations apart.

    Source: Longformer, dilated sliding window; NATTEN's dilation.
    """

    window: int
    dilation: int
    lookahead: int = 0

    def __post_init__(self) -> None:
        whole("Dilated", "window", self.window, 1)
        whole("Dilated", "dilation", self.dilation, 1)
        whole("Dilated", "lookahead", self.lookahead, 0)
        super().__post_init__()

    def band(self) -> Band:
        return Band(self.dilation, -self.lookahead, self.window - 1)


@dataclass(frozen=True, repr=False)
class Strided(_Banded):
    """``(i - j) % stride == 0`` (and ``j <= i``): every stride-th key, back to the beginning.

    >>> import longstride as ls
    >>> print(ls.picture(ls.Strided(3), 8))
    # . . . . . . .
    . # . . . . . .
    . . # . . . . .
    # . . # . . . .
    . # . . # . . .
    . . # . . # . .
    # . . # . . # .
    . # . . # . . #

    Args:
        stride: positions from one key to the next; about sqrt(T) makes both heads of the paper equally dear.
        causal: False reads later keys of the same residue class too.

    Source: Child 2019, section 4.3, A(2) of strided attention.
    """

    stride: int
    causal: bool = True

    def __post_init__(self) -> None:
        whole("Strided", "stride", self.stride, 1)
        flag("Strided", "causal", self.causal)
        super().__post_init__()

    def band(self) -> Band:
        return Band(self.stride, 0 if self.causal else None, None)


@dataclass(frozen=True, repr=False)
class LogSparse(Pattern):
    """``i - j`` in {0, 1, base, base^2, ...} (both sides when not causal): exponentially dilated keys.

    >>> import longstride as ls
    >>> print(ls.picture(ls.LogSparse(), 8))
    # . . . . . . .
    # # . . . . . .
    # # # . . . . .
    . # # # . . . .
    # . # # # . . .
    . # . # # # . .
    . . # . # # # .
    . . . # . # # #

    Args:
        base: ratio from one distance to the next.
        causal: False reads the same distances ahead too.

    Source: Li 2019, LogSparse Transformer; the exponential dilation i±1, i±2, i±4, i±8.
    """

    base: int = 2
    causal: bool = True

    def __post_init__(self) -> None:
        whole("LogSparse", "base", self.base, 2)
        flag("LogSparse", "causal", self.causal)
        super().__post_init__()

    def allows(self, i: torch.Tensor, j: torch.Tensor) -> torch.Tensor:
        allowed = Powers(self.base).allows(i, j)
        return allowed & (j <= i) if self.causal else allowed

    @property
    def is_causal(self) -> bool:
        return self.causal

    @property
    def repeats_every(self) -> int:
        return 1

    def terms(self) -> tuple[Term, ...]:
        return (Term.of(Powers(self.base), CAUSAL) if self.causal else Term.of(Powers(self.base)),)
