"""The loss of a causal language model without the logits of the whole sequence."""

from collections.abc import Callable

import torch.nn.functional as F
from torch import Tensor, nn

from longstride.nn import chunk_loss as plain_chunk_loss
from longstride.nn import summed_token_loss


def chunked_causal_loss(
    hidden: Tensor,
    to_logits: nn.Module,
    labels: Tensor,
    *,
    num_items_in_batch: Tensor | int | None = None,
    ignore_index: int = -100,
    shift_labels: Tensor | None = None,
    chunk_loss: Callable[..., Tensor] = plain_chunk_loss,
    **kwargs: object,  # noqa: ARG001 (as transformers' losses do)
) -> Tensor:
    """Mean cross-entropy of the next token, in nats: transformers' ``ForCausalLMLoss`` by chunks, float32[].

    Args:
        hidden: float[batch, length, hidden_size], after the last norm.
        to_logits: the map to the logits.
        labels: int64[batch, length]; the prediction at t is held against labels[:, t + 1].
        num_items_in_batch: divides the sum; the number of labels that count unless given.
        ignore_index: the label of places that do not count.
        shift_labels: int64[batch, length], shifted already; then labels are not read.
        chunk_loss: `longstride.nn.chunk_loss`, or what it was compiled to.

    Returns:
        NaN where no label counts and num_items_in_batch is not given, as a mean of nothing is.
    """
    if shift_labels is None:
        shift_labels = F.pad(labels, (0, 1), value=ignore_index)[..., 1:]
    targets = shift_labels.reshape(-1).to(hidden.device)
    total = summed_token_loss(hidden.flatten(0, 1), to_logits, targets, ignore_index, chunk_loss)
    if num_items_in_batch is None:
        return total / (targets != ignore_index).sum()
    if isinstance(num_items_in_batch, Tensor):
        num_items_in_batch = num_items_in_batch.to(total.device)
    return total / num_items_in_batch
