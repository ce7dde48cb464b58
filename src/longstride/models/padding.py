"""Padded batches, exactly: every row is computed as if it stood alone.

A pattern counts positions, so a row that begins with padding would be cut at the wrong phase. Each row is therefore
rolled left until its first real token stands at position 0; all padding then lies on the right, where no causal
pattern looks, and the result is rolled back. Patterns that look ahead are told besides how many tokens are real
(`longstride.nn.real_documents`).
"""

import torch
from torch import Tensor

from longstride.errors import ArgumentError


class RowShift:
    """How far each row of a padded batch is rolled so that its content starts at position 0.

    Args:
        attention_mask: bool, int or float[batch, length]; nonzero where the token is real. The real tokens of a row
            stand together: padding on the left, on the right or on both sides. A row may be padding altogether.
        batch: rows of the batch.
        length: tokens of a row, padding included.

    Raises:
        ArgumentError: the mask has another shape, or a row has padding between real tokens.
    """

    def __init__(self, attention_mask: Tensor, batch: int, length: int) -> None:
        if attention_mask.shape != (batch, length):
            raise ArgumentError(
                f"attention_mask has shape {tuple(attention_mask.shape)}: it must be [batch, length] = "
                f"{(batch, length)} and say which tokens are real; what attends to what is in config.patterns"
            )
        self.mask = attention_mask != 0
        # argmax takes the first of equals: the first real token, and 0 in a row of padding.
        self.first = self.mask.int().argmax(dim=1)
        self.real = self.roll(self.mask)
        holes = self.real[:, 1:] & ~self.real[:, :-1]
        _check(
            ~holes.any(),
            "attention_mask has padding between the real tokens of a row: real tokens must stand together; pad on the "
            "left to generate, on the left or the right to score",
        )

    def counts(self) -> Tensor | None:
        """int64[batch]: how many tokens of each row are real, the first ones once it is rolled; None where all are.

        A compiled graph cannot ask whether all are, and gets the counts.
        """
        return self.mask.sum(1) if torch.compiler.is_compiling() or not self.mask.all() else None

    def roll(self, rows: Tensor) -> Tensor:
        """Move every row's content to position 0; rows[batch, length, ...] to the same shape."""
        return self._gather(rows, self.first)

    def unroll(self, rows: Tensor) -> Tensor:
        """Move every row's content back to where the mask has it."""
        return self._gather(rows, -self.first)

    def _gather(self, rows: Tensor, shift: Tensor) -> Tensor:
        batch, length = rows.shape[:2]
        source = (torch.arange(length, device=rows.device) + shift[:, None]) % length
        return rows[torch.arange(batch, device=rows.device)[:, None], source]


class ChunkShift:
    """A chunk of a padded batch whose earlier tokens a cache has: how it is rolled, and how many tokens are real.

    Args:
        attention_mask: bool, int or float[batch, seen + length], as for `RowShift`: of the earlier tokens too.
        lengths: int64[batch]: how many real tokens of each row the cache was given.
        seen: tokens that it was given, padding included.
        length: tokens of the chunk.

    Attributes:
        shift: rolls every row's real tokens to the chunk's start; None where all tokens are real.
        counts: int64[batch], the real tokens of each row; None where all are.

    Raises:
        ArgumentError: as `RowShift`; or the mask says something else of the earlier tokens than they came with.
    """

    def __init__(self, attention_mask: Tensor, lengths: Tensor, seen: int, length: int) -> None:
        batch = len(lengths)
        real = RowShift(attention_mask, batch, seen + length).mask
        _check(
            (real[:, :seen].sum(1) == lengths).all(),
            f"attention_mask has other real tokens among the first {seen} than the cache was given: pass the mask of "
            "all tokens, the earlier ones as they were",
        )
        chunk = real[:, seen:]
        self.shift: RowShift | None = None
        self.counts: Tensor | None = None
        if not chunk.all():
            self.shift = RowShift(chunk, batch, length)
            self.counts = chunk.sum(1)


def check_positions(
    position_ids: Tensor, batch: int, length: int, shift: RowShift | None, lengths: Tensor | None = None
) -> None:
    """Raise unless position_ids, int[batch or 1, length], count 0, 1, 2, ... from each row's first real token.

    Args:
        shift: where the real tokens stand; None when all are real. What stands at padding does not matter.
        lengths: int64[batch]: real tokens of each row that came before; 0 when not given.

    Raises:
        ArgumentError: another shape, or other positions.
    """
    if position_ids.shape not in ((batch, length), (1, length)):
        raise ArgumentError(
            f"position_ids has shape {tuple(position_ids.shape)}: it must be [batch, length] = {(batch, length)}"
        )
    counted = torch.arange(length, device=position_ids.device)
    counted = counted if lengths is None else lengths[:, None] + counted
    if shift is None:
        agree = position_ids == counted
    else:
        agree = (shift.roll(position_ids.expand(batch, length)) == counted) | ~shift.real
    _check(
        agree.all(),
        "position_ids must count 0, 1, 2, ... from each row's first real token, because patterns do, or from 0 again "
        "in each packed document of a row without padding; leave them out, and say boundaries to a compiler by "
        "cu_seq_lens_q",
    )


def _check(condition: Tensor, message: str) -> None:
    if torch.compiler.is_compiling():
        # Reading the value would break the graph; the assertion runs on the device.
        torch._assert_async(condition, message)
    elif not condition:
        raise ArgumentError(message)
