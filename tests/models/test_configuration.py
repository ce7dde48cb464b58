import pytest
import torch

import longstride as ls
from longstride.errors import ArgumentError, PatternError
from longstride.models import SparseTransformerConfig, layer_patterns


def config(**changes):
    small = {"hidden_size": 16, "num_hidden_layers": 5, "num_attention_heads": 2, "max_position_embeddings": 64}
    return SparseTransformerConfig(**(small | changes))


def test_defaults_are_derived():
    made = config(patterns=["Local(8)", "Strided(8)"])
    assert (made.intermediate_size, made.qk_hidden_size, made.position_axes) == (64, 16, [8, 8])
    assert made.tie_word_embeddings is False
    assert made.use_cache is True
    assert made.attention_backend is None


def test_a_training_s_use_cache_does_not_stick():
    made = config(use_cache=False)
    assert made.use_cache is True
    made.use_cache = False  # as the Trainer does
    made.resolve()
    assert made.use_cache is True


def test_patterns_cycle_over_the_layers():
    made = config(patterns=["Local(8)", "Strided(8) | Local(8)"])
    local, merged = ls.Local(8), ls.Strided(8) | ls.Local(8)
    assert layer_patterns(made) == (local, merged, local, merged, local)


@pytest.mark.parametrize("given", ["Local( 8 )", ["Local(8)"], ls.Local(8), [ls.Local(8)], ("Local(8)",)])
def test_one_pattern_in_any_form(given):
    assert config(patterns=given).patterns == ["Local(8)"]


@pytest.mark.parametrize(
    ("patterns", "axes"),
    [
        ("Strided(16)", [4, 16]),
        (["Local(8)", "Strided(16)"], [4, 16]),
        ("Fixed(32, 4)", [2, 32]),
        ("per_head(Local(8), Strided(16))", [4, 16]),
        ("BlockLocal(32) | Strided(8)", [8, 8]),
        ("Local(8)", [8, 8]),
        ("Strided(100)", [1, 64]),
    ],
)
def test_position_axes_come_from_the_patterns_stride(patterns, axes):
    assert config(patterns=patterns).position_axes == axes


def test_block_tables_are_kept_as_readable_json_data():
    table = torch.tensor([[1, 0], [1, 1]], dtype=torch.bool)
    expected = ls.BlockSparse(table, 32).mask(64) & ls.Causal().mask(64)
    made = config(patterns=[ls.BlockSparse(table, 32) & ls.Causal()])
    assert list(made.pattern_tables.values()) == [["10", "11"]]
    again = config(patterns=made.patterns, pattern_tables=made.pattern_tables)
    named = config(
        patterns="BlockSparse(mine, 32) & Causal()", pattern_tables={"mine": [[1, 0], [True, 1]], "unused": ["1"]}
    )
    assert named.patterns == made.patterns
    assert named.pattern_tables == made.pattern_tables
    for known in (made, again):
        assert torch.equal(layer_patterns(known)[0].mask(64), expected)


def test_a_table_a_head():
    table = torch.rand(2, 3, 3, generator=torch.Generator().manual_seed(0)) < 0.5
    made = config(patterns=[ls.BlockSparse(table, 32) & ls.Causal()])
    blocks = table.repeat_interleave(32, 1).repeat_interleave(32, 2)[:, :64, :64]
    assert torch.equal(layer_patterns(made)[0].mask(64, heads=2), blocks & ls.Causal().mask(64))


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"vocab_size": 0}, "vocab_size=0: it must be a whole number of at least 1"),
        ({"num_hidden_layers": 2.5}, "num_hidden_layers=2.5: it must be a whole number"),
        ({"num_hidden_layers": True}, "num_hidden_layers=True"),
        (
            {"hidden_size": 15},
            "hidden_size=15 is not divisible by num_attention_heads=2: take a multiple of 2, such as 14",
        ),
        ({"qk_hidden_size": 7}, "qk_hidden_size=7 is not divisible by num_attention_heads=2"),
        ({"intermediate_size": -1}, "intermediate_size=-1"),
        ({"dropout": 1.0}, "dropout=1.0: it must be a number from 0 up to, but not including, 1"),
        ({"dropout": "0.1"}, "dropout='0.1'"),
        ({"layer_norm_eps": 0}, "layer_norm_eps=0: it must be a number greater than 0"),
        ({"global_projections": "own"}, "global_projections='own': it must be one of 'shared', 'separate'"),
        ({"attention_backend": 3}, "attention_backend=3: give a backend's name"),
        ({"patterns": []}, "give at least one pattern text"),
        ({"patterns": None}, "give at least one pattern text"),
        ({"patterns": [3]}, "give at least one pattern text"),
        ({"position_axes": []}, "give at least one axis"),
        ({"position_axes": [8, 0]}, r"position_axes\[1\]=0"),
        ({"position_axes": [7, 9]}, "cover 63 positions, fewer than max_position_embeddings=64"),
    ],
)
def test_illegal_values_are_named(changes, message):
    with pytest.raises(ArgumentError, match=message):
        config(**changes)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"patterns": "Locale(8)"}, "Locale"),
        ({"patterns": "Local(0)"}, "at least 1"),
        ({"patterns": "per_head(Local(8), Local(8), Local(8))"}, "multiple of 3 heads"),
        ({"patterns": "RandomBlocks(8, 1, causal=False) & Causal()"}, "depends on the length of the sequence"),
        (
            {"patterns": ["Full()", "Local(8) | Global(1)"], "global_projections": "separate"},
            r"Full\(\): separate global projections are those of global tokens",
        ),
        ({"pattern_tables": {"t": ["10", "11"]}, "max_position_embeddings": 65}, "covers 64 positions, not 65"),
        ({"pattern_tables": {"t": ["10", "1"]}}, "equally long"),
        ({"pattern_tables": {"t": [[1, 2]]}}, "nested lists of 0 and 1"),
    ],
)
def test_illegal_patterns_are_named(changes, message):
    if "pattern_tables" in changes:
        changes = changes | {"patterns": "BlockSparse(t, 32) & Causal()"}
    with pytest.raises(PatternError, match=message):
        config(**changes)


def test_round_trip_through_a_file(tmp_path):
    made = config(patterns=["Local(8)", "Strided(8)"], qk_hidden_size=8, dropout=0.1, attention_backend="reference")
    made.save_pretrained(tmp_path)
    loaded = SparseTransformerConfig.from_pretrained(tmp_path)
    before, after = made.to_dict(), loaded.to_dict()
    assert {name: before[name] for name in before if name != "transformers_version"} == {
        name: after[name] for name in before if name != "transformers_version"
    }
    assert SparseTransformerConfig.from_pretrained(tmp_path, attention_backend=None).attention_backend is None
