"""Longstride: exact sparse attention for PyTorch at O(T sqrt(T)), from a one-line pattern to a Sparse Transformer."""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING, Any

from longstride.attention import attention, explain
from longstride.attention_cached import attention_cached
from longstride.attention_varlen import attention_varlen
from longstride.cache import PatternCache, cache_bytes
from longstride.errors import (
    ArgumentError,
    CheckpointError,
    DataError,
    LongstrideError,
    PatternError,
    RecipeError,
    UnsupportedError,
)
from longstride.patterns import (
    BlockLocal,
    BlockSparse,
    Causal,
    Dilated,
    Fixed,
    Full,
    Global,
    Local,
    LogSparse,
    Pattern,
    RandomBlocks,
    Strided,
    Summary,
    bigbird,
    gpt3,
    layers_to_reach,
    longformer,
    mistral,
    parse,
    per_head,
    picture,
    reach,
    sparse_transformer_fixed,
    sparse_transformer_strided,
)
from longstride.plan import plan

if TYPE_CHECKING:
    from longstride.integrations.transformers import sparsify
    from longstride.models import (
        SparseTransformerConfig,
        SparseTransformerForCausalLM,
        SparseTransformerForMaskedLM,
        SparseTransformerForSequenceClassification,
    )

__all__ = [
    "ArgumentError",
    "BlockLocal",
    "BlockSparse",
    "Causal",
    "CheckpointError",
    "DataError",
    "Dilated",
    "Fixed",
    "Full",
    "Global",
    "Local",
    "LogSparse",
    "LongstrideError",
    "Pattern",
    "PatternCache",
    "PatternError",
    "RandomBlocks",
    "RecipeError",
    "SparseTransformerConfig",
    "SparseTransformerForCausalLM",
    "SparseTransformerForMaskedLM",
    "SparseTransformerForSequenceClassification",
    "Strided",
    "Summary",
    "UnsupportedError",
    "attention",
    "attention_cached",
    "attention_varlen",
    "bigbird",
    "cache_bytes",
    "explain",
    "gpt3",
    "layers_to_reach",
    "longformer",
    "mistral",
    "parse",
    "per_head",
    "picture",
    "plan",
    "reach",
    "sparse_transformer_fixed",
    "sparse_transformer_strided",
    "sparsify",
]

__version__ = "0.1.0"

#: What needs transformers, by the module that has it.
_LAZY = {
    "SparseTransformerConfig": "longstride.models",
    "SparseTransformerForCausalLM": "longstride.models",
    "SparseTransformerForMaskedLM": "longstride.models",
    "SparseTransformerForSequenceClassification": "longstride.models",
    "sparsify": "longstride.integrations.transformers",
}


def __getattr__(name: str) -> Any:
    # Loaded when first asked for, so that the op needs torch alone.
    if name in _LAZY:
        try:
            return getattr(importlib.import_module(_LAZY[name]), name)
        except ModuleNotFoundError as error:
            if error.name != "transformers":
                raise
            raise ModuleNotFoundError(
                f"longstride.{name} needs the package transformers: pip install 'longstride[transformers]'",
                name=error.name,
            ) from None
    raise AttributeError(f"module 'longstride' has no attribute {name!r}")


def __dir__() -> list[str]:
    return sorted([*globals(), *_LAZY])
