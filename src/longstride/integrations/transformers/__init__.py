"""Sparse patterns for the models of Hugging Face transformers: `sparsify`, and a cache that keeps what they read.

Importing this package makes ``attn_implementation="longstride"`` known to transformers, so that models which were
sparsified and saved can be loaded, and has ``generate`` of those make its cache. `longstride.sparsify` imports it.
"""

from transformers import AttentionInterface, GenerationMixin
from transformers.masking_utils import AttentionMaskInterface

from longstride.integrations.transformers.cache import SparsifiedCache
from longstride.integrations.transformers.generating import prepare_cache
from longstride.integrations.transformers.interface import attend
from longstride.integrations.transformers.placement import place
from longstride.integrations.transformers.saved import ATTENTION
from longstride.integrations.transformers.sparsify import sparsify

AttentionInterface.register(ATTENTION, attend)
AttentionMaskInterface.register(ATTENTION, place)
GenerationMixin._prepare_cache_for_generation = prepare_cache

__all__ = ["ATTENTION", "SparsifiedCache", "sparsify"]
