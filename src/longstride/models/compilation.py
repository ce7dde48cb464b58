"""Residual blocks that are compiled for training: equal ones once, however many there are."""

from collections.abc import Generator
from contextlib import contextmanager

import torch

from longstride.models.modeling import SparseTransformerForCausalLM, run_block, run_norm
from longstride.models.schedule import layer_patterns
from longstride.nn import chunk_loss

#: Compiled variants of one block beside its layers' patterns: a last batch that is smaller, other precisions.
VARIANTS = 8


@contextmanager
def compiled_blocks(model: SparseTransformerForCausalLM, *, backend: str = "inductor") -> Generator[None]:
    """Inside, training passes run each residual block, the last norm and each chunk of the loss as a compiled graph.

    Blocks that differ in their weights alone share a graph: a model of 128 layers that alternate between two patterns
    compiles two. What `recompute_in_backward` chose is part of the graph. Only training mode is compiled: evaluation
    and generation, with their many lengths and their caches, run as ever. No module is wrapped, so that weights are
    saved under the same names, and afterwards the model is as it was.

    Args:
        model: on its device already, or moved before its first training pass.
        backend: of `torch.compile`.

    Raises:
        torch._dynamo.exc.Unsupported: in the first training pass, where a block is no single graph.
    """
    patterns = set(layer_patterns(model.config))
    # Every pattern is a graph of the same function, and torch.compile gives up on functions with more than 8. So is
    # each size that a memory has, once where all rows have it and once where they differ. How many of them there are,
    # as it grows and as rows begin anew, is up to the segments: a training must not end at any.
    limit = len(patterns) * (1 + 2 * model.config.memory) + VARIANTS
    model.model.run_block = torch.compile(run_block, fullgraph=True, dynamic=False, backend=backend)
    model.model.run_norm = torch.compile(run_norm, fullgraph=True, dynamic=False, backend=backend)
    model.chunk_loss = torch.compile(chunk_loss, fullgraph=True, dynamic=False, backend=backend)
    try:
        with torch._dynamo.config.patch(recompile_limit=limit, accumulated_recompile_limit=max(256, limit)):
            yield
    finally:
        model.model.run_block = run_block
        model.model.run_norm = run_norm
        model.chunk_loss = chunk_loss
