"""What the backward pass computes again instead of having it kept: memory against time."""

from functools import partial
from typing import Any

import torch
from torch.utils.checkpoint import create_selective_checkpoint_contexts

from longstride.dispatch.choice import BACKENDS, differentiable
from longstride.errors import ArgumentError, UnsupportedError
from longstride.models.modeling import SparseTransformerPreTrainedModel

RECOMPUTE = ("nothing", "blocks", "all_but_attention")


def check_recomputation(what: str, backend: str | None) -> None:
    """Whether a model with the backend, by name or None, can recompute that.

    Raises:
        ArgumentError: not a word of RECOMPUTE.
        UnsupportedError: ``all_but_attention`` with a backend that autograd differentiates itself: it is no operator
            whose output could be kept.
    """
    if what not in RECOMPUTE:
        raise ArgumentError(f"recompute={what!r}: it must be one of {', '.join(map(repr, RECOMPUTE))}")
    if what == "all_but_attention" and backend in BACKENDS and differentiable(backend):
        raise UnsupportedError(
            f"recompute='all_but_attention' with attention_backend={backend!r}: autograd differentiates that "
            "backend step by step, so there is no one output to keep; recompute 'blocks', or leave the choice of "
            "the backend to the library"
        )


def recompute_in_backward(model: SparseTransformerPreTrainedModel, what: str) -> None:
    """Decide what a training of this model keeps of its residual blocks; gradients are the same for all.

    With d the width, n the tokens of a batch and H the heads, a block keeps for the backward pass

    =====================  ============================================================================
    ``nothing``            every activation: nothing is computed twice
    ``blocks``             its input, n d numbers; the block is computed twice (Child et al. 2019, section 5.4)
    ``all_but_attention``  its input, the attention's output and its log-sum-exp, n (2 d + H) numbers in all;
                           everything but the attention is computed twice
    =====================  ============================================================================

    Args:
        model: dropout draws the same again.
        what: one of RECOMPUTE.

    Raises:
        ArgumentError, UnsupportedError: as `check_recomputation`.
    """
    check_recomputation(what, model.config.attention_backend)
    if what == "nothing":
        # transformers 5.23 has renamed it.
        getattr(model, "activation_checkpointing_disable", model.gradient_checkpointing_disable)()
        return
    # Without dropout nothing is drawn, and no random state has to be read from the device.
    options: dict[str, Any] = {"use_reentrant": False, "preserve_rng_state": model.config.dropout > 0}
    if what == "all_but_attention":
        operators = torch.ops.longstride
        kept = [each.default for each in (operators.attention, operators.attention_stacked, operators.attention_varlen)]
        options["context_fn"] = partial(create_selective_checkpoint_contexts, kept)
    getattr(model, "activation_checkpointing_enable", model.gradient_checkpointing_enable)(options)
