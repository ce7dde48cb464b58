"""The Sparse Transformer in the Hugging Face conventions.

Importing this package registers the model type ``sparse_transformer`` with transformers' ``AutoConfig``, ``AutoModel``,
``AutoModelForCausalLM``, ``AutoModelForMaskedLM`` and ``AutoModelForSequenceClassification``. ``import longstride``
alone does not, since it does not load transformers; the first use of ``longstride.SparseTransformerConfig`` or of a
model at the top of the package does.
"""

from transformers import (
    AutoConfig,
    AutoModel,
    AutoModelForCausalLM,
    AutoModelForMaskedLM,
    AutoModelForSequenceClassification,
)

from longstride.models.cache import SparseTransformerCache
from longstride.models.compilation import compiled_blocks
from longstride.models.configuration import BLOCKS, GLOBAL_PROJECTIONS, SparseTransformerConfig
from longstride.models.decode_graph import DecodeGraph, graph_obstacle
from longstride.models.encoder import SparseTransformerForMaskedLM, SparseTransformerForSequenceClassification
from longstride.models.memory import SegmentMemory, check_memory
from longstride.models.modeling import SparseTransformerForCausalLM, SparseTransformerModel
from longstride.models.recomputation import RECOMPUTE, check_recomputation, recompute_in_backward
from longstride.models.schedule import layer_patterns
from longstride.models.summary import ParameterCount, parameter_count

AutoConfig.register(SparseTransformerConfig.model_type, SparseTransformerConfig, exist_ok=True)
AutoModel.register(SparseTransformerConfig, SparseTransformerModel, exist_ok=True)
AutoModelForCausalLM.register(SparseTransformerConfig, SparseTransformerForCausalLM, exist_ok=True)
AutoModelForMaskedLM.register(SparseTransformerConfig, SparseTransformerForMaskedLM, exist_ok=True)
AutoModelForSequenceClassification.register(
    SparseTransformerConfig, SparseTransformerForSequenceClassification, exist_ok=True
)

__all__ = [
    "BLOCKS",
    "GLOBAL_PROJECTIONS",
    "RECOMPUTE",
    "DecodeGraph",
    "ParameterCount",
    "SegmentMemory",
    "SparseTransformerCache",
    "SparseTransformerConfig",
    "SparseTransformerForCausalLM",
    "SparseTransformerForMaskedLM",
    "SparseTransformerForSequenceClassification",
    "SparseTransformerModel",
    "check_memory",
    "check_recomputation",
    "compiled_blocks",
    "graph_obstacle",
    "layer_patterns",
    "parameter_count",
    "recompute_in_backward",
]
