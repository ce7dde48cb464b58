"""The checks on models of transformers: found, read, tried along other patterns, and left as they were."""

import json

import numpy as np
import pytest
import torch
import transformers
from tests.copier import CONTEXT, dense_copier
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, processors, trainers
from transformers import BertConfig, BertLMHeadModel, GPT2Config, GPT2LMHeadModel, PreTrainedTokenizerFast
from typer.testing import CliRunner

from longstride import sparsify
from longstride.checks import (
    Haystack,
    Subject,
    attending,
    find_needles,
    load_subject,
    loss_by_context,
    read_schedule,
    schedule_of,
)
from longstride.cli import app
from longstride.errors import ArgumentError, DataError, PatternError, UnsupportedError

CPU = torch.device("cpu")
TEXT = b"0123456789 .,;" * 40
HAYSTACK = Haystack(lengths=(60,), trials=3, needle="{key}={value}!")
SMALL = {
    "vocab_size": 300,
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "max_position_embeddings": 64,
    "bos_token_id": None,
    "eos_token_id": None,
    "pad_token_id": None,
}
TINY = {
    "vocab_size": 300,
    "n_embd": 16,
    "n_layer": 1,
    "n_head": 1,
    "n_positions": 32,
    "attn_pdrop": 0.0,
    "bos_token_id": None,
    "eos_token_id": None,
}
GROUPED = SMALL | {"num_key_value_heads": 2}
SLIDING = GROUPED | {"sliding_window": 5}
ARCHITECTURES = {
    "Llama": (GROUPED, ["Causal()", "Causal()"]),
    "Mistral": (SLIDING, ["Local(5)", "Local(5)"]),
    "Qwen2": (SLIDING | {"use_sliding_window": True, "max_window_layers": 1}, ["Causal()", "Local(5)"]),
}


@pytest.fixture
def characters() -> PreTrainedTokenizerFast:
    """A tokenizer whose tokens are characters, numbered as bytes are, behind a token that marks the beginning."""
    vocabulary = {"<s>": 0, "<unk>": 1} | {chr(byte): byte for byte in range(32, 127)} | {"\n": 10}
    tokenizer = Tokenizer(models.WordLevel(vocabulary, unk_token="<unk>"))
    tokenizer.pre_tokenizer = pre_tokenizers.Split("", "isolated")
    tokenizer.post_processor = processors.TemplateProcessing(single="<s> $A", special_tokens=[("<s>", 0)])
    return PreTrainedTokenizerFast(tokenizer_object=tokenizer, bos_token="<s>", unk_token="<unk>")


@pytest.fixture
def words() -> PreTrainedTokenizerFast:
    """A tokenizer of byte pairs, whose tokens begin with the space before them."""
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    text = ["The password of account 123456 is abcd. " * 5, "letters and words and numbers 1 2 3 4"]
    tokenizer.train_from_iterator(
        text,
        trainers.BpeTrainer(vocab_size=290, show_progress=False, initial_alphabet=pre_tokenizers.ByteLevel.alphabet()),
    )
    return PreTrainedTokenizerFast(tokenizer_object=tokenizer)


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """The copier without a tokenizer: a token is a byte."""
    path = tmp_path_factory.mktemp("gpt2")
    dense_copier().save_pretrained(path)
    return path


def test_what_a_dense_model_finds_it_loses_along_a_window_and_finds_again(folder):
    subject = load_subject(folder, CPU)
    assert (subject.unit, subject.context, subject.num_layers) == ("byte", CONTEXT, 2)
    text = subject.encode(TEXT)
    assert find_needles(subject, text, HAYSTACK).written == ((1.0,) * 5,)
    with attending(subject, read_schedule(["Local(2)", "Local(24)"], subject)) as tried:
        assert find_needles(tried, text, HAYSTACK).chosen == ((0.0, 0.0, 0.0, 1.0, 1.0),)
    assert find_needles(subject, text, HAYSTACK).written == ((1.0,) * 5,)


@pytest.mark.parametrize("name", ARCHITECTURES)
def test_model_is_along_the_patterns_that_its_configuration_names(name):
    settings, expected = ARCHITECTURES[name]
    model = getattr(transformers, f"{name}ForCausalLM")(getattr(transformers, f"{name}Config")(**settings)).eval()
    subject = Subject(model, None, 64)
    assert [str(pattern) for pattern in schedule_of(subject)] == expected
    tokens = torch.randint(0, 256, (2, 40), generator=torch.Generator().manual_seed(0))
    with torch.no_grad():
        before = model(tokens).logits
        with attending(subject, schedule_of(subject)) as same:
            torch.testing.assert_close(same.predictor()(tokens).logits, before, atol=1e-4, rtol=1e-3)
        with attending(subject, read_schedule(["Local(2)"], subject)) as other:
            assert not torch.allclose(other.predictor()(tokens).logits, before, atol=1e-3)
        assert torch.equal(model(tokens).logits, before)


def test_model_in_which_some_layers_do_not_attend_has_no_schedule():
    """Convolutions would cost nothing along any pattern, and would be said to save pairs."""
    mixed = SMALL | {"num_hidden_layers": 3, "layer_types": ["conv", "full_attention", "conv"]}
    model = transformers.Lfm2ForCausalLM(transformers.Lfm2Config(**mixed))
    with pytest.raises(
        UnsupportedError, match=r"layers 0, 2 of this Lfm2ForCausalLM do not attend, so that no pattern"
    ):
        schedule_of(Subject(model, None, 64))


def test_language_model_with_others_beside_it_keeps_its_patterns():
    """It has the patterns in its own configuration, which the whole's only points at."""
    text = SMALL | {"head_dim": 8, "num_key_value_heads": 2, "sliding_window": 8, "layer_types": ["full_attention"] * 2}
    seeing = {"hidden_size": 16, "intermediate_size": 16, "num_hidden_layers": 1, "num_attention_heads": 2}
    config = transformers.Gemma3Config(
        text_config=transformers.Gemma3TextConfig(**text | {"pad_token_id": 0}),
        vision_config=seeing | {"image_size": 28, "patch_size": 14},
        image_token_index=299, boi_token_index=298, eoi_token_index=297, mm_tokens_per_image=4,
    )  # fmt: skip
    model = sparsify(transformers.Gemma3ForConditionalGeneration(config).eval(), "Local(3)", backend="reference")
    subject = Subject(model, None, 64)
    tokens = torch.arange(20)[None]
    with torch.no_grad():
        before = model(tokens).logits
        with attending(subject, read_schedule(["Causal()"], subject)) as dense:
            assert not torch.allclose(dense.model(tokens).logits, before)
        assert torch.equal(model(tokens).logits, before)
    assert model.config.text_config.longstride == {"patterns": ["Local(3)"], "backend": "reference"}
    assert model.config.longstride == {"part": "text_config"}


def test_model_that_was_sparsified_before_keeps_its_patterns(tmp_path):
    model = sparsify(GPT2LMHeadModel(GPT2Config(**TINY | {"n_layer": 2})), "Local(3)")
    model.save_pretrained(tmp_path)
    subject = load_subject(tmp_path, CPU)
    assert [str(pattern) for pattern in schedule_of(subject)] == ["Local(3)"] * 2
    tokens = torch.arange(20)[None]
    with torch.no_grad():
        before = subject.model(tokens).logits
        with attending(subject, read_schedule(["Causal()"], subject)) as dense:
            assert not torch.allclose(dense.model(tokens).logits, before)
        assert torch.equal(subject.model(tokens).logits, before)
    assert subject.model.config.longstride == {"patterns": ["Local(3)"]}


@pytest.mark.parametrize("training", [False, True])
def test_model_stays_in_its_mode(training):
    """GPT-2 drops out what it embeds, so that figures of a model in training mode would be others each time."""
    subject = Subject(dense_copier().train(training), None, CONTEXT)
    text = subject.encode(TEXT)
    first, second = (loss_by_context(subject.predictor(), text, context=40) for _ in range(2))
    assert first == second
    assert find_needles(subject, text, HAYSTACK).written == ((1.0,) * 5,)
    assert all(module.training == training for module in subject.model.modules())


def test_patterns_are_put_back_after_an_error(folder):
    subject = load_subject(folder, CPU)
    with pytest.raises(KeyboardInterrupt), attending(subject, read_schedule(["Local(2)"], subject)):
        raise KeyboardInterrupt
    assert not hasattr(subject.model.config, "longstride")
    assert subject.model.config._attn_implementation == "sdpa"


def test_tokenizer_reads_the_text_and_its_first_token_stands_before_every_window(tmp_path, characters):
    dense_copier().save_pretrained(tmp_path)
    characters.save_pretrained(tmp_path)
    subject = load_subject(tmp_path, CPU)
    # One place is taken by the token that marks the beginning.
    assert (subject.unit, subject.context) == ("token", CONTEXT - 1)
    text = subject.encode(TEXT)
    assert text.tolist() == list(TEXT)
    seen = []
    subject.model.register_forward_pre_hook(lambda _, __, inputs: seen.append(inputs["input_ids"]), with_kwargs=True)
    assert find_needles(subject, text, HAYSTACK).written == ((1.0,) * 5,)
    measured = loss_by_context(subject.predictor(), text, context=CONTEXT - 1, unit="token")
    assert measured.ranges[-1].most == CONTEXT - 1
    assert all((batch[:, 0] == 0).all() for batch in seen)


def test_values_of_byte_pairs_differ_in_their_first_token(words):
    model = GPT2LMHeadModel(GPT2Config(**TINY | {"n_positions": 200})).eval()
    subject = Subject(model, words, 200)
    seen = []
    model.register_forward_pre_hook(lambda _, __, inputs: seen.append(inputs["input_ids"]), with_kwargs=True)
    text = subject.encode(b"letters and words and numbers 1 2 3 4 " * 30)
    hay = Haystack(lengths=(150,), depths=(0.5,), trials=4)
    found = find_needles(subject, text, hay)
    assert 0 <= found.probability[0][0] < 0.5
    for row in torch.cat(seen):
        said = words.decode(row)
        fact = said[said.index("The password") :].split("\n")[0]
        assert fact.startswith("The password of account ")
        assert fact.endswith(".")
        # The question is what stands before the value, and all of the value but its last token comes behind it.
        question = said[said.rindex("The password") :]
        assert fact.startswith(question)
        assert len(fact) - len(question) in (2, 3, 4)


def test_text_cut_inside_a_character_and_text_that_is_none(characters):
    subject = Subject(None, characters, None)
    assert subject.encode("é".encode()[:1]).tolist() == []
    with pytest.raises(DataError, match=r"byte 2 of the text is not UTF-8, which the model's tokenizer reads"):
        subject.encode(b"ab\xff\xfe")


@pytest.mark.parametrize("kind", [models.BPE, models.WordLevel])
def test_tokenizer_that_knows_no_letter_a_still_has_a_first_token(tmp_path, kind):
    """What stands before every text must not be lost, though of "a" this one makes nothing, or raises: bases of DNA."""
    vocabulary = {"<s>": 0, "A": 1, "C": 2, "G": 3, "T": 4}
    tokenizer = Tokenizer(kind(vocabulary, []) if kind is models.BPE else kind(vocabulary))
    tokenizer.pre_tokenizer = pre_tokenizers.Split("", "isolated")
    tokenizer.post_processor = processors.TemplateProcessing(single="<s> $A", special_tokens=[("<s>", 0)])
    PreTrainedTokenizerFast(tokenizer_object=tokenizer, bos_token="<s>").save_pretrained(tmp_path)
    GPT2LMHeadModel(GPT2Config(**TINY | {"vocab_size": 5})).save_pretrained(tmp_path)
    subject = load_subject(tmp_path, CPU)
    assert subject.context == TINY["n_positions"] - 1
    assert subject.encode(b"ACGT").tolist() == [1, 2, 3, 4]
    assert subject.predictor().start == (0,)


def test_tokenizer_of_another_model_and_text_that_it_does_not_know(characters):
    with pytest.raises(ArgumentError, match="the tokenizer makes token 122 of the text, and the model knows 99"):
        Subject(GPT2LMHeadModel(GPT2Config(**TINY | {"vocab_size": 99})), characters, 32).encode(b"az")
    words = Tokenizer(models.WordLevel({"known": 0}))
    subject = Subject(None, PreTrainedTokenizerFast(tokenizer_object=words), None)
    with pytest.raises(DataError, match="the model's tokenizer cannot read the text: WordLevel error"):
        subject.encode(b"unknown")


def test_code_in_the_folder_is_not_run_even_if_one_would_say_yes(tmp_path, monkeypatch):
    settings = {"model_type": "theirs", "auto_map": {"AutoConfig": "code.Their", "AutoModelForCausalLM": "code.Model"}}
    (tmp_path / "config.json").write_text(json.dumps(settings))
    (tmp_path / "code.py").write_text(f"open({str(tmp_path / 'ran')!r}, 'w')\n")
    monkeypatch.setattr("builtins.input", lambda *_: "y")
    with pytest.raises(ArgumentError, match=r"the model in .* cannot be read: .* contains custom code"):
        load_subject(tmp_path, CPU)
    assert not (tmp_path / "ran").exists()


def test_command_measures_a_model_with_a_tokenizer(tmp_path, characters):
    dense_copier().save_pretrained(tmp_path / "model")
    characters.save_pretrained(tmp_path / "model")
    text = tmp_path / "text.txt"
    text.write_bytes(TEXT)
    asked = ("--data", str(text), "--context", "40", "--pattern", "Local(2)", "--checks", "--needle", "{key}={value}!")
    result = CliRunner().invoke(app, ["evaluate", str(tmp_path / "model"), *asked, "--trials", "1"])
    assert result.exit_code == 0, result.output
    assert "bits per token over" in result.output
    assert "bits per byte of the text, 1.00 a token" in result.output
    assert "length in tokens" not in result.output
    measured = json.loads((tmp_path / "model" / "checks" / "needle.json").read_text())["measured"]
    assert measured["as it is"]["chosen"][-1] == [1.0] * 5
    assert measured["otherwise"]["chosen"][-1] == [0.0] * 5


def test_folders_that_hold_no_causal_language_model(tmp_path):
    with pytest.raises(ArgumentError, match="holds no model: name the --output folder"):
        load_subject(tmp_path / "nowhere", CPU)
    settings = {**SMALL, "pad_token_id": 0}
    BertLMHeadModel(BertConfig(**settings, is_decoder=False)).save_pretrained(tmp_path / "bert")
    with pytest.raises(ArgumentError, match=r"is no causal language model: what it predicts depends on later tokens"):
        load_subject(tmp_path / "bert", CPU)
    (tmp_path / "other").mkdir()
    (tmp_path / "other" / "config.json").write_text('{"model_type": "nothing known"}')
    with pytest.raises(ArgumentError, match=r"the model in .*other cannot be read: "):
        load_subject(tmp_path / "other", CPU)


def test_too_few_tokens_for_bytes():
    model = GPT2LMHeadModel(GPT2Config(**TINY | {"vocab_size": 99}))
    with pytest.raises(ArgumentError, match="the model knows 99 tokens, which are no bytes, and has no tokenizer"):
        Subject(model, None, 32).encode(b"abc")


def test_patterns_that_a_model_cannot_have(folder):
    subject = load_subject(folder, CPU)
    with pytest.raises(PatternError, match="per_head"):
        read_schedule(["per_head(Local(2), Local(3))"], subject)
    with pytest.raises(ArgumentError, match=r"patterns=\[\]: give at least one pattern"):
        read_schedule([], subject)


def test_sample_is_for_sparse_transformers(folder):
    result = CliRunner().invoke(app, ["sample", str(folder)])
    assert result.exit_code == 2
    assert f"error: the model in {folder} is a GPT2LMHeadModel, and this command is for Sparse Tran" in result.output


def test_uint8_text_is_not_copied():
    text = np.arange(10, dtype=np.uint8)
    model = GPT2LMHeadModel(GPT2Config(**TINY))
    assert np.shares_memory(Subject(model, None, 32).encode(text), text)
