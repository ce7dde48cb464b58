import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from safetensors import safe_open

import longstride as ls
from longstride.models import SparseTransformerConfig, SparseTransformerForCausalLM

TABLE = torch.tensor([[1, 0, 0], [0, 1, 0], [1, 0, 1]], dtype=torch.bool)


@pytest.mark.parametrize(
    "changes",
    [
        {"patterns": ["Local(4)", "Strided(4)"]},
        {"patterns": "per_head(Fixed(4, 1), Local(3))", "qk_hidden_size": 8, "intermediate_size": 24},
        {"patterns": [ls.BlockSparse(TABLE, 16) & ls.Causal(), "Local(4)"]},
        {"patterns": "Strided(5)", "position_axes": [4, 4, 3]},
        {"tie_word_embeddings": True},
    ],
    ids=["interleaved", "widths", "table", "axes", "tied"],
)
def test_a_plain_from_pretrained_gives_identical_logits(make_model, tokens, tmp_path, changes):
    model = make_model(dtype=torch.float32, **changes)
    model.save_pretrained(tmp_path)
    loaded, report = SparseTransformerForCausalLM.from_pretrained(tmp_path, output_loading_info=True)
    assert not any(report[name] for name in ("missing_keys", "unexpected_keys", "mismatched_keys"))
    assert torch.equal(loaded.eval()(tokens).logits, model(tokens).logits)
    assert loaded.config.patterns == model.config.patterns
    assert loaded.generation_config.use_cache is True


def test_the_file_holds_every_weight_and_there_are_no_buffers(make_model, tmp_path):
    model = make_model(dtype=torch.float32)
    model.save_pretrained(tmp_path)
    assert list(model.buffers()) == []
    with safe_open(tmp_path / "model.safetensors", "pt") as file:
        assert set(file.keys()) == {name for name, _ in model.named_parameters()}


def test_attributes_of_a_loaded_model_are_those_of_the_saved_one(make_model, tmp_path):
    """Nothing that the forward pass reads may live outside the configuration and the weights."""
    model = make_model(dtype=torch.float32, patterns=["Local(4)", "Fixed(4, 1)"], layer_norm_eps=1e-3, dropout=0.3)
    model.save_pretrained(tmp_path)
    loaded = SparseTransformerForCausalLM.from_pretrained(tmp_path)
    assert str(loaded) == str(model)


def test_loading_in_another_process_by_auto_classes(make_model, tokens, tmp_path):
    model = make_model(dtype=torch.float32)
    model.save_pretrained(tmp_path)
    torch.save({"tokens": tokens, "logits": model(tokens).logits}, tmp_path / "expected.pt")
    script = f"""
import torch, longstride
longstride.SparseTransformerConfig
from transformers import AutoConfig, AutoModelForCausalLM
folder = {str(tmp_path)!r}
model = AutoModelForCausalLM.from_pretrained(folder).eval()
expected = torch.load(folder + "/expected.pt")
assert type(model).__name__ == "SparseTransformerForCausalLM"
assert type(AutoConfig.from_pretrained(folder)) is longstride.SparseTransformerConfig
assert torch.equal(model(expected["tokens"]).logits, expected["logits"])
"""
    source = Path(ls.__file__).parents[1]
    environment = os.environ | {"PYTHONPATH": str(source)}
    done = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, check=False, env=environment)
    assert done.returncode == 0, done.stderr


def test_the_backend_is_saved_and_can_be_replaced_on_loading(make_model, tmp_path):
    make_model(attention_backend="reference").save_pretrained(tmp_path)
    loaded = SparseTransformerForCausalLM.from_pretrained(tmp_path)
    assert [layer.attention.backend for layer in loaded.model.layers] == ["reference"] * 3
    replaced = SparseTransformerForCausalLM.from_pretrained(tmp_path, attention_backend=None)
    assert [layer.attention.backend for layer in replaced.model.layers] == [None] * 3


def test_half_precision_weights_stay_so(make_model, tokens, tmp_path):
    model = make_model(dtype=torch.bfloat16)
    model.save_pretrained(tmp_path)
    loaded = SparseTransformerForCausalLM.from_pretrained(tmp_path)
    assert loaded.dtype == torch.bfloat16
    assert torch.equal(loaded.eval()(tokens).logits, model(tokens).logits)


def test_missing_weights_start_as_the_paper_says(make_model, tmp_path):
    """from_pretrained builds on the meta device and must draw what a checkpoint lacks."""
    from safetensors.torch import load_file, save_file

    model = make_model(dtype=torch.float32, initializer_scale=0.125, hidden_size=64)
    model.save_pretrained(tmp_path)
    weights = load_file(tmp_path / "model.safetensors")
    kept = weights.pop("model.layers.0.attention.qkv_proj.weight")
    del weights["model.layers.1.attention.out_proj.weight"], weights["lm_head.weight"]
    save_file(weights, tmp_path / "model.safetensors", metadata={"format": "pt"})
    loaded = dict(SparseTransformerForCausalLM.from_pretrained(tmp_path).named_parameters())
    assert loaded["lm_head.weight"].abs().max() == 0
    assert loaded["model.layers.0.attention.qkv_proj.weight"].std().item() == pytest.approx(0.125 / 8, rel=0.05)
    assert not torch.equal(loaded["model.layers.0.attention.qkv_proj.weight"], kept)
    expected = 0.125 / 8 / 6**0.5
    assert loaded["model.layers.1.attention.out_proj.weight"].std().item() == pytest.approx(expected, rel=0.05)


def test_the_configuration_file_is_plain_and_short(make_model, tmp_path):
    make_model(patterns=[ls.BlockSparse(TABLE, 16) & ls.Causal()]).save_pretrained(tmp_path)
    text = (tmp_path / "config.json").read_text()
    assert '"100"' in text
    assert "attn_implementation" not in text
    assert SparseTransformerConfig.from_pretrained(tmp_path).model_type == "sparse_transformer"
