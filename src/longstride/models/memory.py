"""Segment recurrence: the keys and values of earlier segments, which a model reads without learning through them.

A long text goes through the model in segments. Every layer attends to its own segment and to what is kept of the ones
before it, so that a token can draw on more than a segment, and more with every layer. It is the recurrence of
Transformer-XL, with two differences: keys and values are kept, where the paper keeps the hidden states that they are
made from; and positions are rotary, which like the paper's depend on distances alone.

What is kept is cut where the pattern repeats (`Pattern.repeats_every`), because attention counts positions from the
first key that it is given.

Source: Dai, Yang, Yang, Carbonell, Le, Salakhutdinov 2019, sections 3.2 and 3.3.
"""

from collections.abc import Sequence
from functools import lru_cache
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from longstride.errors import ArgumentError, UnsupportedError
from longstride.models.schedule import check_causal, layer_patterns
from longstride.nn import Earlier, KeysValues
from longstride.patterns import Pattern

if TYPE_CHECKING:
    from longstride.models.configuration import SparseTransformerConfig


class SegmentMemory:
    """What a model carries from one segment to the next; give it to every call, as ``memory=``.

    Layer by layer, the latest ``tokens`` tokens at most, and of these no more than the layer's pattern may still read:
    ``Local(w)`` takes w - 1. The first one stands where the pattern repeats, so up to ``repeats_every - 1`` tokens
    fewer are kept. With ``tokens`` of at least the pattern's reach and ``repeats_every - 1`` more, segments give what
    the whole text gives.

    Args:
        config: the model's.
        tokens: the most that a layer keeps of each row; config.memory unless given.

    Raises:
        ArgumentError: a number of tokens that cannot be kept.
        UnsupportedError: a pattern that does not repeat, such as one with global tokens.
    """

    def __init__(self, config: "SparseTransformerConfig", tokens: int | None = None) -> None:
        self.tokens = config.memory if tokens is None else tokens
        self.patterns = layer_patterns(config)
        check_memory(self.patterns, self.tokens)
        #: Tokens that each row has been given since it began; empty before the first call.
        self.seen: list[int] = []
        # For each layer the keys and values, as many as the row with the most has; the last ones are a row's own.
        self._held: list[KeysValues | None] = [None] * len(self.patterns)
        self._lengths: list[list[int]] = [[] for _ in self.patterns]
        # `Earlier.lengths`, moved to the device once for all layers of a segment.
        self._on_device: dict[tuple[int, ...], Tensor] = {}

    def open(self, batch: int, patterns: Sequence[Pattern]) -> None:
        """Take a segment of so many rows, before the layers, with these patterns, ask for what is `earlier`.

        Raises:
            ArgumentError: other rows than before; another model's layers.
        """
        if tuple(patterns) != tuple(self.patterns):
            raise ArgumentError(
                f"a model with {_layers(patterns)}: this memory is for {_layers(self.patterns)}; make one of the "
                "model's config"
            )
        if not self.seen:
            self.seen = [0] * batch
            self._lengths = [[0] * batch for _ in self.patterns]
        if len(self.seen) != batch:
            raise ArgumentError(
                f"a batch of {batch} rows: this memory has the earlier segments of {len(self.seen)}; make one for each "
                "batch, or reset() it"
            )

    def earlier(self, layer: int) -> Earlier:
        """What the layer reads of the earlier segments."""
        held, lengths = self._held[layer], tuple(self._lengths[layer])
        if held is None or min(lengths) == max(lengths):
            return Earlier(held)
        if lengths not in self._on_device:
            self._on_device[lengths] = torch.tensor(lengths, device=held[0].device)
        return Earlier(held, self._on_device[lengths])

    def carry(self, layer: int, own: KeysValues) -> None:
        """Keep what later segments may read of a layer's earlier keys and values and its `own`, which come after."""
        length = own[0].shape[2]
        lengths = [kept_tokens(self.patterns[layer], held + length, self.tokens) for held in self._lengths[layer]]
        most, held = max(lengths), self._held[layer]
        if most > length and held is not None:
            keys, values = (torch.cat((old[:, :, length - most :], new), 2) for old, new in zip(held, own, strict=True))
        else:
            # A copy: a view would keep all of the segment's keys and values.
            keys, values = (x[:, :, length - min(most, length) :].clone() for x in own)
        self._held[layer] = (keys, values) if most else None
        self._lengths[layer] = lengths

    def advance(self, length: int) -> None:
        """Count a segment's tokens, when every layer has carried its own."""
        self._on_device.clear()
        self.seen = [seen + length for seen in self.seen]

    def reset(self, rows: Sequence[bool] | None = None) -> None:
        """Forget everything, or the rows that are marked: what they are given next begins a text.

        Args:
            rows: one for each row of the batch.
        """
        if rows is None or all(rows):
            self.seen = []
            self._held = [None] * len(self.patterns)
            return
        if not self.seen:
            return
        if len(rows) != len(self.seen):
            raise ArgumentError(f"{len(rows)} rows are marked: this memory has {len(self.seen)}; mark each of them")
        self.seen = [0 if marked else seen for seen, marked in zip(self.seen, rows, strict=True)]
        for layer, lengths in enumerate(self._lengths):
            kept = [0 if marked else held for held, marked in zip(lengths, rows, strict=True)]
            self._lengths[layer], held = kept, self._held[layer]
            if held is not None:
                keys, values = (x[:, :, x.shape[2] - max(kept) :] for x in held)
                self._held[layer] = (keys, values) if max(kept) else None

    def positions(self, length: int, device: torch.device) -> Tensor:
        """Positions of a segment's tokens in their texts: int64[length], or [batch, length] where rows differ."""
        segment = torch.arange(length, device=device)
        if min(self.seen) == max(self.seen):
            return segment + self.seen[0]
        return torch.tensor(self.seen, device=device)[:, None] + segment

    @property
    def nbytes(self) -> int:
        """Bytes of the keys and values that it holds."""
        return sum(x.nbytes for held in self._held if held is not None for x in held)

    def state_dict(self) -> dict[str, Any]:
        """Everything, as `torch.save` takes it."""
        return {"seen": self.seen, "lengths": self._lengths, "held": self._held}

    def load_state_dict(self, state: dict[str, Any], device: torch.device) -> None:
        """Go on where `state_dict` was written, with the keys and values on ``device``."""
        self.seen, self._lengths = list(state["seen"]), [list(lengths) for lengths in state["lengths"]]
        self._held = [None if held is None else (held[0].to(device), held[1].to(device)) for held in state["held"]]


def _layers(patterns: Sequence[Pattern]) -> str:
    return f"{len(patterns)} layers along {', '.join(dict.fromkeys(map(str, patterns)))}"


def check_memory(patterns: Sequence[Pattern], tokens: int) -> None:
    """Whether layers with these patterns can carry so many tokens from segment to segment.

    Raises:
        ArgumentError, UnsupportedError: as `SegmentMemory`.
        PatternError: a pattern looks ahead, to where the memory does not reach.
    """
    check_causal(patterns)
    if isinstance(tokens, bool) or not isinstance(tokens, int) or tokens < 1:
        raise ArgumentError(f"memory={tokens!r}: it must be a whole number of tokens, at least 1")
    for pattern in patterns:
        every = pattern.repeats_every
        if every is None:
            raise UnsupportedError(
                f"memory={tokens}: {pattern} names positions counted from the beginning of the text, which a memory of "
                "its latest tokens does not have; use patterns of distances and blocks, such as Local, Strided or Fixed"
            )
        if tokens < every - 1:
            raise ArgumentError(
                f"memory={tokens}: {pattern} repeats every {every} positions, where a memory must begin; give at least "
                f"{every - 1}"
            )


@lru_cache(maxsize=4096)
def kept_tokens(pattern: Pattern, given: int, most: int) -> int:
    """How many of ``given`` tokens, the first of which stands where the pattern repeats, are kept: the last ones.

    They begin where the pattern repeats, too, are at most ``most``, and hold all of the latest ``most`` that later
    queries may read, up to that beginning.

    >>> import longstride as ls
    >>> kept_tokens(ls.Local(4), 100, 64), kept_tokens(ls.Strided(4), 100, 64), kept_tokens(ls.Fixed(8, 2), 100, 63)
    (3, 64, 60)
    """
    every = pattern.repeats_every
    assert every is not None
    readable = pattern.retained(given)
    readable = (readable.any(0) if readable.dim() == 2 else readable).nonzero()
    # What comes next must stand at the right place of a repetition, even where nothing earlier is read.
    first_read = int(readable[0]) if len(readable) else given
    first = max(first_read // every * every, -(-max(0, given - most) // every) * every)
    return given - first
