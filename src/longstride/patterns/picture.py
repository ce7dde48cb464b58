"""The picture of a small pattern as text, for docstrings and a first look."""

from __future__ import annotations

from longstride.patterns.base import Pattern


def picture(pattern: Pattern, length: int = 8) -> str:
    """Rows are queries, columns are keys, ``#`` is allowed; a per-head pattern's heads follow one another."""
    mask = pattern.mask(length)
    heads = mask if mask.dim() == 3 else mask[None]
    return "\n\n".join(
        "\n".join(" ".join("#" if cell else "." for cell in row) for row in head) for head in heads.tolist()
    )
