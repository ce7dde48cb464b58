import pytest
import torch

from longstride.models import SparseTransformerConfig, SparseTransformerForCausalLM


@pytest.fixture
def make_model():
    """Build a small model whose logits are not all zero: the paper's start of the logit weights hides every mistake."""

    def make(seed=0, dtype=torch.float64, **changes):
        small = {
            "vocab_size": 17,
            "hidden_size": 16,
            "num_hidden_layers": 3,
            "num_attention_heads": 2,
            "max_position_embeddings": 48,
            "patterns": ["Local(4)", "Strided(4)"],
            "initializer_scale": 2.0,
        }
        torch.manual_seed(seed)
        model = SparseTransformerForCausalLM(SparseTransformerConfig(**(small | changes)))
        torch.nn.init.normal_(model.lm_head.weight)
        return model.to(dtype).eval()

    return make


@pytest.fixture(params=["sparse_transformer", "modern"])
def make_either(make_model, request):
    """`make_model` of either kind of block, for what must hold of both."""
    sizes = {"block": request.param} | ({"initializer_scale": 1.0} if request.param == "modern" else {})
    return lambda **changes: make_model(**(sizes | changes))


@pytest.fixture
def tokens():
    """Token ids int64[2, 23] of a small model's vocabulary."""
    return torch.randint(17, (2, 23), generator=torch.Generator().manual_seed(1))


@pytest.fixture
def fresh_compiler():
    """PyTorch counts how often a function is compiled anew, over all tests of a process, and gives up after eight."""
    torch.compiler.reset()
    yield
    torch.compiler.reset()
