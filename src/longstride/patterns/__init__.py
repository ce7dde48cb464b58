"""Patterns: which (query, key) pairs may attend."""

from longstride.patterns.algebra import Intersection, PerHead, Union, per_head
from longstride.patterns.bands import Causal, Dilated, Full, Local, LogSparse, Strided
from longstride.patterns.base import Pattern, layers_to_reach, reach
from longstride.patterns.blocks import BlockLocal, BlockSparse, Fixed, RandomBlocks, Summary
from longstride.patterns.global_tokens import Global
from longstride.patterns.picture import picture
from longstride.patterns.recipes import (
    bigbird,
    gpt3,
    longformer,
    mistral,
    sparse_transformer_fixed,
    sparse_transformer_strided,
)
from longstride.patterns.text import parse

__all__ = [
    "BlockLocal",
    "BlockSparse",
    "Causal",
    "Dilated",
    "Fixed",
    "Full",
    "Global",
    "Intersection",
    "Local",
    "LogSparse",
    "Pattern",
    "PerHead",
    "RandomBlocks",
    "Strided",
    "Summary",
    "Union",
    "bigbird",
    "gpt3",
    "layers_to_reach",
    "longformer",
    "mistral",
    "parse",
    "per_head",
    "picture",
    "reach",
    "sparse_transformer_fixed",
    "sparse_transformer_strided",
]
