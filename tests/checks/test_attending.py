"""Our own models along other patterns: the same weights, and what a model of these patterns would compute."""

import pytest
import torch

from longstride.checks import Subject, attending, read_schedule, schedule_of
from longstride.models import SparseTransformerConfig, SparseTransformerForCausalLM


def model_of(patterns: list[str], **settings: object) -> SparseTransformerForCausalLM:
    config = SparseTransformerConfig(
        hidden_size=16,
        num_hidden_layers=3,
        num_attention_heads=2,
        max_position_embeddings=32,
        patterns=patterns,
        initializer_scale=1.0,
        **settings,  # ty: ignore[invalid-argument-type]
    )
    model = SparseTransformerForCausalLM(config).eval()
    generator = torch.Generator().manual_seed(0)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.copy_(0.3 * torch.randn(parameter.shape, generator=generator))
    return model


@pytest.mark.parametrize("settings", [{}, {"block": "modern"}, {"tie_word_embeddings": True}], ids=str)
def test_own_model_along_other_patterns(settings):
    axes = {} if "block" in settings else {"position_axes": [4, 8]}
    subject = Subject(model_of(["Strided(8)", "Local(4)"], **axes, **settings), None, 32)
    expected = model_of(["Local(2)", "Causal()", "per_head(Local(3), Strided(5))"], **axes, **settings)
    tokens = torch.randint(0, 256, (2, 32), generator=torch.Generator().manual_seed(1))
    with torch.no_grad():
        before = subject.model(tokens).logits
        with attending(subject, schedule_of(subject)) as same:
            torch.testing.assert_close(same.model(tokens).logits, before)
        with attending(subject, schedule_of(Subject(expected, None, 32))) as tried:
            torch.testing.assert_close(tried.model(tokens).logits, expected(tokens).logits)
            assert not torch.allclose(tried.model(tokens).logits, before)
        assert torch.equal(subject.model(tokens).logits, before)


def test_patterns_are_cycled_over_the_layers():
    subject = Subject(model_of(["Causal()"]), None, 32)
    assert [str(pattern) for pattern in read_schedule(["Local(2)", "Local(3)"], subject)] == [
        "Local(2)",
        "Local(3)",
        "Local(2)",
    ]
