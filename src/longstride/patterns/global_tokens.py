"""A few positions that read everything and that everything reads."""

from __future__ import annotations

from dataclasses import dataclass

import torch

from longstride.errors import PatternError
from longstride.patterns.base import Pattern, cached, flag, whole
from longstride.patterns.regions import CAUSAL, KeyList, QueryList, Term

#: Each global position is listed, and costs a whole row and a whole column of the matrix.
MOST_TOKENS = 1 << 20


@dataclass(frozen=True, repr=False)
class Global(Pattern):
    """``i`` in tokens or ``j`` in tokens (and ``j <= i``).

    >>> import longstride as ls
    >>> print(ls.picture(ls.Global((1, 5)), 8))
    . . . . . . . .
    # # . . . . . .
    . # . . . . . .
    . # . . . . . .
    . # . . . . . .
    # # # # # # . .
    . # . . . # . .
    . # . . . # . .

    Args:
        tokens: an int n means the first n positions, a tuple names positions.
        causal: False lets global queries read later keys, and earlier queries read global keys.

    Source: Longformer; BigBird.
    """

    tokens: int | tuple[int, ...]
    causal: bool = True

    def __post_init__(self) -> None:
        flag("Global", "causal", self.causal)
        tokens = self.tokens
        if hasattr(tokens, "__index__"):
            fixed: int | tuple[int, ...] = whole("Global", "tokens", tokens, 1)
            if whole("Global", "tokens", tokens, 1) > MOST_TOKENS:
                raise PatternError(
                    f"Global(tokens={tokens}): at most {MOST_TOKENS} positions can be global; for more use Full()"
                )
        elif isinstance(tokens, tuple | list) and tokens:
            fixed = tuple(sorted({whole("Global", "token", token, 0) for token in tokens}))
        else:
            raise PatternError(f"Global(tokens={tokens!r}): tokens must be a whole number or a tuple of positions")
        object.__setattr__(self, "tokens", fixed)
        super().__post_init__()

    def positions(self) -> tuple[int, ...]:
        """The global positions, ascending."""
        return tuple(range(self.tokens)) if isinstance(self.tokens, int) else self.tokens

    def allows(self, i: torch.Tensor, j: torch.Tensor) -> torch.Tensor:
        tokens = self.positions()
        allowed = QueryList(tokens).allows(i, j) | KeyList(tokens).allows(i, j)
        return allowed & (j <= i) if self.causal else allowed

    @property
    def is_causal(self) -> bool:
        return self.causal

    def retained(self, next_position: int) -> torch.Tensor:
        j, tokens = cached(next_position), self.positions()
        # A global query that is still to come reads everything before it.
        return torch.ones_like(j, dtype=torch.bool) if tokens[-1] >= next_position else KeyList(tokens).allows(j, j)

    def terms(self) -> tuple[Term, ...]:
        cut = (CAUSAL,) if self.causal else ()
        tokens = self.positions()
        return Term.of(QueryList(tokens), *cut), Term.of(KeyList(tokens), *cut)
