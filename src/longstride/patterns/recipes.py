"""Published models' patterns as one-liners."""

from __future__ import annotations

from longstride.errors import PatternError
from longstride.patterns.bands import Causal, Local, Strided
from longstride.patterns.base import Pattern, whole
from longstride.patterns.blocks import Fixed, RandomBlocks
from longstride.patterns.global_tokens import Global


def longformer(window: int, global_tokens: int | tuple[int, ...] = 1) -> Pattern:
    """Longformer's encoder: a two-sided window and global tokens.

    Args:
        window: the paper's and Hugging Face's `attention_window`: window // 2 keys on either side, besides one's own.
        global_tokens: the first n positions, or positions by name; 0 for none.

    Source: Beltagy 2020, section 3.1.
    """
    whole("longformer", "window", window, 2)
    local = Local(window // 2 + 1, lookahead=window // 2)
    return local if global_tokens == 0 else local | Global(global_tokens, causal=False)


def bigbird(
    block: int, window_blocks: int = 3, global_blocks: int = 1, random_blocks: int = 3, seed: int = 0
) -> Pattern:
    """BigBird's encoder: window, global and random attention, one exact softmax.

    Args:
        block: positions a block.
        window_blocks: width of the sliding window in blocks (odd); here a window of positions of that width.
        global_blocks: how many blocks at the beginning are global.
        random_blocks: random key blocks a query block.
        seed: of the random draw.

    Source: Zaheer 2020, section 2; Appendix D (blocks of 64, 3 window, 2 global, 3 random).
    """
    whole("bigbird", "block", block, 1)
    whole("bigbird", "window_blocks", window_blocks, 1)
    if window_blocks % 2 == 0:
        raise PatternError(f"bigbird(window_blocks={window_blocks}): window_blocks must be odd, half on either side")
    side = window_blocks * block // 2
    pattern: Pattern = Local(side + 1, lookahead=side)
    if whole("bigbird", "global_blocks", global_blocks, 0):
        pattern = pattern | Global(global_blocks * block, causal=False)
    if whole("bigbird", "random_blocks", random_blocks, 0):
        pattern = pattern | RandomBlocks(block, random_blocks, seed=seed, causal=False)
    return pattern


def mistral(window: int) -> Pattern:
    """Mistral 7B's sliding window (4096 there). Source: Jiang 2023, section 2."""
    return Local(window)


def sparse_transformer_strided(stride: int) -> Pattern:
    """Strided attention with both parts in one head: what suits images and audio. Source: Child 2019, section 4.3."""
    return Local(stride) | Strided(stride)


def sparse_transformer_fixed(block: int, summary: int) -> Pattern:
    """Fixed attention with both parts in one head: what suits text. Source: Child 2019, section 4.3."""
    return Fixed(block, summary)


def gpt3(window: int) -> tuple[Pattern, Pattern]:
    """A schedule over layers: dense and locally banded layers in turn. Source: Brown 2020, section 2.1."""
    return Causal(), Local(window)
