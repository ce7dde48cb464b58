"""The loss by chunks: the plain computation's value and gradients, without its memory."""

import pytest
import torch
import torch.nn.functional as F
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from longstride.nn import LogitsProjection, chunk_tokens, summed_token_loss
from longstride.nn import token_loss as module


@pytest.fixture
def small_chunks(monkeypatch):
    monkeypatch.setattr(module, "FEWEST_TOKENS", 1)
    monkeypatch.setattr(module, "CHUNK_LOGITS", 7 * 13)
    assert chunk_tokens(13) == 7


def drawn(tokens, hidden_size=8, vocab_size=13, dtype=torch.float32):
    generator = torch.Generator().manual_seed(0)
    hidden = torch.randn(tokens, hidden_size, generator=generator).to(dtype).requires_grad_()
    projection = LogitsProjection(hidden_size, vocab_size, bias=False)
    torch.nn.init.normal_(projection.weight, generator=generator)
    targets = torch.randint(vocab_size, (tokens,), generator=generator)
    return hidden, projection.to(dtype), targets


@pytest.mark.parametrize("tokens", [1, 6, 7, 8, 21, 40])
@pytest.mark.usefixtures("small_chunks")
def test_value_and_gradients_are_the_plain_ones(tokens):
    hidden, projection, targets = drawn(tokens)
    targets[::3] = -100
    targets[7:14] = -100  # a chunk in which nothing counts
    plain = F.cross_entropy(projection(hidden), targets, reduction="sum")
    expected = torch.autograd.grad(3 * plain, (hidden, projection.weight))
    loss = summed_token_loss(hidden, projection, targets)
    assert loss.dtype == torch.float32
    torch.testing.assert_close(loss, plain, rtol=1e-6, atol=1e-6)
    found = torch.autograd.grad(3 * loss, (hidden, projection.weight))
    for ours, theirs in zip(found, expected, strict=True):
        torch.testing.assert_close(ours, theirs, rtol=1e-5, atol=1e-6)


@pytest.mark.usefixtures("small_chunks")
def test_nothing_counts_and_another_ignored_target():
    hidden, projection, targets = drawn(10)
    loss = summed_token_loss(hidden, projection, torch.full_like(targets, -100))
    assert loss == 0
    loss.backward()
    assert not hidden.grad.any()
    targets[2:5] = 4
    ours = summed_token_loss(hidden, projection, targets, ignore_index=4)
    torch.testing.assert_close(ours, F.cross_entropy(projection(hidden), targets, ignore_index=4, reduction="sum"))


@pytest.mark.usefixtures("small_chunks")
def test_half_precision_is_summed_in_float32():
    hidden, projection, targets = drawn(40, dtype=torch.bfloat16)
    loss = summed_token_loss(hidden, projection, targets)
    torch.testing.assert_close(loss, F.cross_entropy(projection(hidden).float(), targets, reduction="sum"))
    loss.backward()
    assert hidden.grad.dtype == projection.weight.grad.dtype == torch.bfloat16


class Largest(TorchDispatchMode):
    """The elements of the largest tensor that any operator returned."""

    elements = 0

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        out = func(*args, **(kwargs or {}))
        sizes = [leaf.numel() for leaf in tree_leaves(out) if isinstance(leaf, torch.Tensor)]
        self.elements = max(self.elements, *sizes, 0)
        return out


def test_no_tensor_has_more_logits_than_a_chunk():
    tokens, vocab_size = 4096, 4096
    assert chunk_tokens(vocab_size) == 512
    hidden, projection, targets = drawn(tokens, vocab_size=vocab_size)
    kept = []
    watching = torch.autograd.graph.saved_tensors_hooks(lambda x: kept.append(x.numel()) or x, lambda x: x)
    with watching, Largest() as seen:
        loss = summed_token_loss(hidden, projection, targets)
        loss.backward()
    assert seen.elements == 512 * vocab_size
    # What waits for the backward pass has the size of the hidden states, not of any logits.
    assert sum(kept) < 3 * hidden.numel() + 2 * targets.numel() + 8 * projection.weight.numel()
    with Largest() as seen:
        F.cross_entropy(projection(hidden), targets)
    assert seen.elements == tokens * vocab_size
