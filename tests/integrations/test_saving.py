"""A sparse model that is saved comes back sparse, or not at all."""

import copy
import json
import subprocess
import sys
from dataclasses import dataclass

import pytest
import torch
from tests.integrations.conftest import GROUPED
from transformers import (
    AutoConfig,
    AutoModelForCausalLM,
    CLIPVisionConfig,
    LlamaConfig,
    LlamaForCausalLM,
    LlavaConfig,
    LlavaForConditionalGeneration,
)

import longstride as ls
from longstride.integrations.transformers import SparsifiedCache

PATTERNS = ["Local(4)", "per_head(Fixed(4, 1), Strided(3))"]


@dataclass(frozen=True)
class KeysAtMultiples(ls.Pattern):
    """Every query reads itself and the earlier keys at multiples of `step`."""

    step: int

    def allows(self, i, j):
        return (j <= i) & ((j % self.step == 0) | (i == j))


class Nameless(ls.Pattern):
    """A pattern whose text does not say what it is."""

    def __init__(self, step):
        self.step = step

    def allows(self, i, j):
        return (j <= i) & (j % self.step == 0)


def reload(model, folder, loader=LlamaForCausalLM, **options):
    model.save_pretrained(folder)
    return loader.from_pretrained(folder, dtype=torch.float64, **options).eval()


def llava():
    """A language model with a vision model beside it."""
    vision = {"hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 1, "num_attention_heads": 4}
    config = LlavaConfig(
        text_config=LlamaConfig(**GROUPED), vision_config=CLIPVisionConfig(**vision), image_token_index=30
    )
    torch.manual_seed(0)
    return LlavaForConditionalGeneration(config).double().eval()


@pytest.mark.parametrize("whole", [True, False])
def test_the_language_model_of_a_larger_one(tokens, tmp_path, whole):
    model, ids = llava(), tokens.clamp(max=29)
    dense = model(ids).logits
    part = model.model.language_model
    ls.sparsify(model if whole else part, "Local(4)")
    sparse = model(ids).logits
    assert not torch.allclose(sparse, dense)
    assert part.config.longstride == {"patterns": ["Local(4)"]}
    assert getattr(model.config, "longstride", None) == ({"part": "text_config"} if whole else None)
    again = reload(model, tmp_path / "one", LlavaForConditionalGeneration)
    third = reload(again, tmp_path / "two", LlavaForConditionalGeneration)
    assert torch.equal(third(ids).logits, sparse)
    prompt = {"input_ids": ids, "max_new_tokens": 4, "do_sample": False}
    out = third.generate(**prompt, return_dict_in_generate=True)
    assert torch.equal(out.sequences, model.generate(**prompt, use_cache=False))
    assert isinstance(out.past_key_values, SparsifiedCache)
    asked = reload(third, tmp_path / "three", LlavaForConditionalGeneration, attn_implementation="sdpa")
    assert torch.equal(asked(ids).logits, dense)
    ls.sparsify(third, None)
    assert torch.equal(third(ids).logits, dense)
    assert "longstride" not in third.config.to_json_string()


@pytest.mark.parametrize("loader", [LlamaForCausalLM, AutoModelForCausalLM])
def test_patterns_come_back_with_the_weights(make, tokens, tmp_path, loader):
    model = ls.sparsify(make(), PATTERNS, backend="torch")
    again = reload(model, tmp_path, loader)
    assert again.config.longstride == {"patterns": PATTERNS, "backend": "torch"}
    assert torch.equal(again(tokens).logits, model(tokens).logits)
    assert again.config.to_dict() | {"_name_or_path": ""} == model.config.to_dict()


def test_what_came_back_can_be_saved_again_before_it_was_used(make, tokens, tmp_path):
    model = ls.sparsify(make(), PATTERNS)
    third = reload(reload(model, tmp_path / "second"), tmp_path / "third")
    assert torch.equal(third(tokens).logits, model(tokens).logits)
    entry = json.loads((tmp_path / "third" / "config.json").read_text())
    assert (entry["longstride"], entry["attn_implementation"]) == ({"patterns": PATTERNS}, "longstride")


def test_a_configuration_alone_makes_a_sparse_model(make, tokens, tmp_path):
    model = ls.sparsify(make(), PATTERNS)
    model.save_pretrained(tmp_path)
    config = AutoConfig.from_pretrained(tmp_path)
    for built in (AutoModelForCausalLM.from_config(config), LlamaForCausalLM(copy.deepcopy(config))):
        built.double().eval().load_state_dict(model.state_dict())
        assert torch.equal(built(tokens).logits, model(tokens).logits)


def test_dense_is_what_one_asks_for(make, tokens, tmp_path):
    model = make()
    dense = model(tokens).logits
    again = reload(ls.sparsify(model, PATTERNS), tmp_path / "one", attn_implementation="sdpa")
    assert torch.equal(again(tokens).logits, dense)
    # Saved again, it is what it was: the choice was this process's.
    assert torch.equal(reload(again, tmp_path / "two")(tokens).logits, model(tokens).logits)
    taken_off = reload(ls.sparsify(again, None), tmp_path / "three")
    assert torch.equal(taken_off(tokens).logits, dense)
    assert "longstride" not in (tmp_path / "three" / "config.json").read_text()


def test_a_copy_of_a_model_is_sparse(make, tokens):
    model = ls.sparsify(make(), PATTERNS)
    assert torch.equal(copy.deepcopy(model)(tokens).logits, model(tokens).logits)


def test_another_process_refuses_to_load_it_without_the_package_and_with_it_has_all(make, tokens, tmp_path):
    table = torch.ones(4, 16, 16, dtype=torch.bool).tril()
    table[1:, 3] = torch.eye(16, dtype=torch.bool)[3]
    model = ls.sparsify(make(), ls.BlockSparse(table, 4) & ls.Causal())
    again = reload(model, tmp_path)
    assert torch.equal(again(tokens).logits, model(tokens).logits)
    whole = ls.sparsify(llava(), "Local(4)")
    whole.save_pretrained(tmp_path / "whole")
    load = (
        "import torch\n"
        "from transformers import LlamaForCausalLM, LlavaForConditionalGeneration\n"
        f"for cls, name in ((LlamaForCausalLM, '.'), (LlavaForConditionalGeneration, 'whole')):\n"
        "    try:\n"
        f"        cls.from_pretrained({str(tmp_path)!r} + '/' + name)\n"
        "    except ValueError as error:\n"
        "        print(error)\n"
        "import longstride.integrations.transformers\n"
        f"model = LlamaForCausalLM.from_pretrained({str(tmp_path)!r}, dtype=torch.float64)\n"
        f"print(model(torch.tensor({tokens.tolist()})).logits.sum().item())"
    )
    result = subprocess.run([sys.executable, "-c", load], capture_output=True, text=True, check=True)
    *refusals, total = result.stdout.splitlines()
    assert len(refusals) == 2
    assert all(line.startswith('Specified `attn_implementation="longstride"` is not supported') for line in refusals)
    assert float(total) == pytest.approx(model(tokens).logits.sum().item(), rel=1e-9)


@pytest.mark.parametrize("name", ["llama", "bert"])
def test_a_table_that_a_text_names_is_saved_with_it(make, name):
    pattern = ls.BlockSparse(torch.eye(16, dtype=torch.bool), 4) & ls.Causal()
    entry = ls.sparsify(make(name), pattern).config.longstride
    assert len(entry["tables"]) == 1
    assert ls.sparsify(make(name), entry["patterns"]).config.longstride == entry


def test_a_table_is_what_its_name_says(make, tokens):
    entry = ls.sparsify(make(), ls.BlockSparse(torch.eye(16, dtype=torch.bool), 4) & ls.Causal()).config.longstride
    (name,) = entry["tables"]
    changed = {"patterns": entry["patterns"], "tables": {name: ["1" * 16] * 16}}
    with pytest.raises(ls.ArgumentError, match=rf"the table '{name}' has other blocks than its name says"):
        make().config.longstride = changed
    with torch.device("meta"):
        config = LlamaConfig(**GROUPED, longstride=entry)
    model = LlamaForCausalLM(config).double().eval()
    assert model(tokens).logits.isfinite().all()


def test_patterns_of_one_s_own(make, tokens, tmp_path):
    model = ls.sparsify(make(), KeysAtMultiples(3) | ls.Local(2))
    again = reload(model, tmp_path)
    assert again.config.longstride["patterns"] == ["KeysAtMultiples(3) | Local(2)"]
    assert torch.equal(again(tokens).logits, model(tokens).logits)
    with pytest.raises(ls.PatternError, match=r"Nameless.*could not be saved with the model; make it a"):
        ls.sparsify(model, Nameless(3))
    assert model.config.longstride["patterns"] == ["KeysAtMultiples(3) | Local(2)"]


def test_a_class_that_is_defined_anew(make, tokens):
    def define(first):
        @dataclass(frozen=True)
        class Anew(ls.Pattern):
            """Every query reads itself and one more."""

            def allows(self, i, j):
                return (i == j) | (j == first) & (j <= i)

        return Anew()

    model = ls.sparsify(make(), define(1))
    before = model(tokens).logits
    assert not torch.allclose(ls.sparsify(model, define(0))(tokens).logits, before)
    assert torch.equal(ls.sparsify(model, define(1))(tokens).logits, before)


@pytest.mark.parametrize(
    "entry",
    [
        "Local(4)",
        {},
        {"patterns": []},
        {"part": "text_config"},
        {"patterns": ["Local(4)"], "more": 1},
        {"patterns": "Local(4)"},
        {"patterns": ["Local(4)"], "tables": ["10", "11"]},
    ],
    ids=str,
)
def test_a_damaged_entry_is_refused(make, tmp_path, entry):
    ls.sparsify(make(), "Local(4)").save_pretrained(tmp_path)
    path = tmp_path / "config.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | {"longstride": entry}))
    with pytest.raises(ls.ArgumentError, match=r"config.longstride=.*: it must be a dict of patterns"):
        LlamaForCausalLM.from_pretrained(tmp_path)


@pytest.mark.parametrize(
    ("entry", "message"),
    [
        ({"patterns": ["Locl(4)"]}, "unknown pattern 'Locl'"),
        ({"patterns": ["per_head(Local(1), Local(2), Local(3))"]}, "4 heads do not divide into 3 equal groups"),
        ({"patterns": ["Local(4)"], "backend": "turbo"}, "backend='turbo': known backends are"),
    ],
    ids=str,
)
def test_an_entry_that_means_nothing_says_so(make, tmp_path, entry, message):
    ls.sparsify(make(), "Local(4)").save_pretrained(tmp_path)
    path = tmp_path / "config.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | {"longstride": entry}))
    with pytest.raises(ls.LongstrideError, match=message):
        LlamaForCausalLM.from_pretrained(tmp_path)


def test_dense_configurations_have_no_such_property(make):
    config = make().config
    assert not hasattr(config, "longstride")
    assert "attn_implementation" not in config.to_dict()
    with pytest.raises(AttributeError, match=r"longstride.sparsify\(model, patterns\) sets it"):
        _ = config.longstride
