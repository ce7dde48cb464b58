"""Cross-entropy of hidden states through the map to the logits, a chunk of tokens at a time."""

from collections.abc import Callable

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

#: Logits that are formed at once, unless the vocabulary alone asks for more: 8 MiB in float32.
CHUNK_LOGITS = 2**21
#: Fewer tokens at once would leave a GPU idle, whatever the vocabulary.
FEWEST_TOKENS = 512


def chunk_tokens(vocab_size: int) -> int:
    """Tokens whose logits :func:`summed_token_loss` forms at once.

    >>> chunk_tokens(256), chunk_tokens(50257)
    (8192, 512)
    """
    return max(FEWEST_TOKENS, CHUNK_LOGITS // vocab_size)


def chunk_loss(chunk: Tensor, to_logits: nn.Module, targets: Tensor, ignore_index: int) -> Tensor:
    """:func:`summed_token_loss` of one chunk, float[tokens, hidden_size], whose logits are formed again backward."""

    def loss(chunk: Tensor, targets: Tensor) -> Tensor:
        return F.cross_entropy(to_logits(chunk).float(), targets, ignore_index=ignore_index, reduction="sum")

    # Nothing in a chunk is drawn at random.
    return checkpoint(loss, chunk, targets, use_reentrant=False, preserve_rng_state=False)


def summed_token_loss(
    hidden: Tensor,
    to_logits: nn.Module,
    targets: Tensor,
    ignore_index: int = -100,
    chunk_loss: Callable[..., Tensor] = chunk_loss,
) -> Tensor:
    """sum_t -log softmax(to_logits(hidden_t))[targets_t] over the tokens whose target is not ``ignore_index``.

    The logits of a chunk are formed, reduced to one number and dropped; the backward pass forms them again. The memory
    is that of :func:`chunk_tokens` tokens' logits instead of all, for one more product with the map's weights. Softmax
    and sum are in float32, also for float64 logits, as in transformers' ``ForCausalLMLoss``, whose value and gradients
    these are but for the order in which chunks are added.

    Args:
        hidden: float[tokens, hidden_size].
        to_logits: maps [n, hidden_size] to logits [n, vocab_size]; it has a ``weight`` [vocab_size, hidden_size].
        targets: int64[tokens]; a token, or ignore_index.
        ignore_index: the target of tokens that do not count.
        chunk_loss: :func:`chunk_loss`, or what it was compiled to.

    Returns:
        float32[], differentiable with respect to ``hidden`` and the map's weights; 0 where no token counts.
    """
    weight = to_logits.weight
    assert isinstance(weight, Tensor)
    length = chunk_tokens(weight.shape[0])
    # Slices would each have a gradient as long as the whole; `split` has one for all of them.
    chunks = zip(hidden.split(length), targets.split(length), strict=True)
    total = torch.zeros((), dtype=torch.float32, device=hidden.device)
    for chunk, chunk_targets in chunks:
        total = total + chunk_loss(chunk, to_logits, chunk_targets, ignore_index)
    return total
