import pytest

from longstride.models import SparseTransformerConfig, SparseTransformerForCausalLM, parameter_count


@pytest.mark.parametrize(
    "changes",
    [{}, {"qk_hidden_size": 16, "intermediate_size": 48}, {"position_axes": [8, 4, 2]}, {"tie_word_embeddings": True}],
    ids=str,
)
def test_counts_by_formula(changes):
    config = SparseTransformerConfig(
        **{
            "vocab_size": 100,
            "hidden_size": 32,
            "num_hidden_layers": 3,
            "num_attention_heads": 4,
            "max_position_embeddings": 64,
            "patterns": "Strided(8)",
        }
        | changes
    )
    width, qk, inner = 32, changes.get("qk_hidden_size", 32), changes.get("intermediate_size", 128)
    count = parameter_count(config)
    assert count.token_embedding == 100 * width
    assert count.position_embedding == sum(changes.get("position_axes", [8, 8])) * width
    assert count.attention == 3 * (width * (2 * qk + width) + width * width)
    assert count.feed_forward == 3 * (2 * width * inner + inner + width)
    assert count.norms == (2 * 3 + 1) * 2 * width
    assert count.logits == (0 if changes.get("tie_word_embeddings") else 100 * width)
    assert count.total == sum(p.numel() for p in SparseTransformerForCausalLM(config).parameters())
    assert f"{count.total:,}" in str(count)


def test_the_papers_enwik8_model_has_95_million_parameters():
    assert round(parameter_count(SparseTransformerConfig()).total / 1e6) == 95


def test_the_papers_cifar_model_has_59_million_parameters():
    """128 layers, half-size queries, keys and feed-forward, 2 heads, d = 256 (Child et al. 2019, section 7.1)."""
    config = SparseTransformerConfig(
        hidden_size=256,
        num_hidden_layers=128,
        num_attention_heads=2,
        max_position_embeddings=3072,
        intermediate_size=512,
        qk_hidden_size=128,
        position_axes=[32, 32, 3],
        patterns="per_head(Local(128), Strided(128))",
    )
    assert round(parameter_count(config).total / 1e6) == 59
