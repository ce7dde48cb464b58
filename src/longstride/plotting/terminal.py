"""A pattern drawn in characters, for a terminal."""

import torch

from longstride.patterns import Pattern
from longstride.plotting.cells import HeadCells, part_cells, visible_pairs

# Two characters a cell, because a character is about twice as high as it is wide.
SHADES = ("██", "▒▒", "░░", "▚▚")
LETTERS = "abcdefghijklmnopqrstuvwxyz"
EMPTY, ASCII_EMPTY, FUTURE = "· ", ". ", "  "
MOST_ROWS = 32


def draw_terminal(pattern: Pattern, length: int, *, num_heads: int | None = None, ascii_only: bool = False) -> str:
    """The allowed pairs of a pattern, rows for queries and columns for keys, each part in its own shade.

    Pictures have at most 32 rows: a longer length is drawn with several positions to a row, and a cell then shows the
    part that most of its pairs belong to, if it holds any.

    Args:
        pattern: what to draw; heads that differ are drawn one after another.
        length: number of positions, 1 to 1,024.
        num_heads: number of heads for patterns that differ by head; by default as many as the pattern names.
        ascii_only: ASCII characters instead of blocks, a letter for each part.

    Raises:
        ArgumentError: the length is below 1 or too long for a picture.
    """
    groups = part_cells(pattern, length, num_heads)
    step = -(-length // MOST_ROWS)
    lines = [str(pattern)]
    for group in groups:
        if group.heads:
            lines += ["", f"heads {', '.join(map(str, group.heads))}"]
        lines += ["", *_rows(group, step, pattern.is_causal, ascii_only), ""]
        lines += [f"  {_symbol(number, ascii_only)} {label}" for number, label in enumerate(group.labels)]
    # Alike or not, a head counts as one.
    heads = sum(len(group.heads) for group in groups) or 1
    allowed = sum(group.pairs * (len(group.heads) or 1) for group in groups)
    dense = visible_pairs(pattern.is_causal, length) * heads
    over = f" over {heads} heads" if heads > 1 else ""
    scale = f"; one row or column is {step} positions" if step > 1 else ""
    lines += ["", f"length {length}: {allowed:,} of {dense:,} pairs{over}, {allowed / dense:.1%}{scale}"]
    return "\n".join(lines)


def _symbol(part: int, ascii_only: bool) -> str:
    if not ascii_only and part < len(SHADES):
        return SHADES[part]
    return LETTERS[part % len(LETTERS)] * 2


def _rows(group: HeadCells, step: int, causal: bool, ascii_only: bool) -> list[str]:
    parts = _coarse(group.cells, step, len(group.labels))
    empty = ASCII_EMPTY if ascii_only else EMPTY
    return [
        "  "
        + "".join(
            _symbol(part - 1, ascii_only) if part > 0 else FUTURE if causal and column > row else empty
            for column, part in enumerate(parts_of_row)
        ).rstrip()
        for row, parts_of_row in enumerate(parts.tolist())
    ]


def _coarse(cells: torch.Tensor, step: int, num_parts: int) -> torch.Tensor:
    """The most frequent part of each step x step block, 0 for none: int64 [rows, rows], rows = ceil(length / step)."""
    margin = -len(cells) % step
    padded = torch.nn.functional.pad(cells, (0, margin, 0, margin))
    side = len(padded) // step
    blocks = padded.view(side, step, side, step)
    counts = torch.stack([(blocks == part).sum(dim=(1, 3)) for part in range(num_parts + 1)])
    counts[0] = 0
    most, part = counts.max(dim=0)
    return torch.where(most > 0, part, 0)
