"""Fine-tuning in this process, at tiny size: two steps of each kind, what is learnt, and what is refused."""

import json
import os
import signal
from pathlib import Path

import pytest
import torch
from transformers import BertConfig

from longstride.data import Labelled, LabelledSplits
from longstride.errors import ArgumentError, LongstrideError, PatternError, RecipeError
from longstride.models import (
    SparseTransformerConfig,
    SparseTransformerForCausalLM,
    SparseTransformerForMaskedLM,
    SparseTransformerForSequenceClassification,
)
from longstride.training import (
    ClassificationRecipe,
    document_log_probabilities,
    evaluate_classifier,
    read_classification_recipe,
    train_classifier,
)
from longstride.training.muon import MuonWithAdamW

ROOT = Path(__file__).parents[2]
TINY = {
    "data.context": 24,
    "model.patterns": ["Local(5, lookahead=4) | Global(1, causal=False)"],
    "model.hidden_size": 16,
    "model.num_hidden_layers": 1,
    "model.num_attention_heads": 2,
    "schedule.steps": 2,
    "schedule.warmup_steps": 0,
    "schedule.batch_size": 4,
    "run.device": "cpu",
    "run.log_every": 1,
    "run.evaluate_every": 2,
}


def documents(count, first=0):
    """Half of ``ab``s, half of ``cd``s, longer than the context."""
    return tuple(
        Labelled((b"abab", b"cdcd")[number % 2] * 12 + b"%d" % number, number % 2)
        for number in range(first, first + count)
    )


@pytest.fixture
def data():
    splits = {"train": documents(20), "validation": documents(6, 50), "test": documents(6, 70)}
    return LabelledSplits("documents", ("first", "second"), splits, {})


def recipe(**changed):
    return ClassificationRecipe().override({**TINY, **{key.replace("__", "."): v for key, v in changed.items()}})


def starting_from(folder, **changed):
    """The tiny recipe without values of the model, which are those of the one in ``folder``."""
    values = {key: value for key, value in TINY.items() if not key.startswith("model.")}
    return ClassificationRecipe().override({**values, "model.start_from": str(folder), **changed})


def curve(folder):
    return [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]


@pytest.mark.parametrize(
    ("block", "global_projections"), [("sparse_transformer", "separate"), ("modern", "shared")], ids=str
)
def test_two_steps_of_pretraining_and_two_of_classes(data, tmp_path, block, global_projections):
    lines = []
    chosen = recipe(pretraining__steps=2, model__block=block, model__global_projections=global_projections)
    result = train_classifier(chosen, data, tmp_path, lines.append)
    assert (result.step, result.ended) == (2, "finished")
    assert result.model.config.id2label == {0: "first", 1: "second"}
    phases = [(record["phase"], record["step"]) for record in curve(tmp_path) if "loss" in record]
    assert phases == [("pretraining", 1), ("pretraining", 2), ("training", 1), ("training", 2)]
    assert 4 < curve(tmp_path)[0]["loss"] < 7  # log 258 = 5.55
    assert "validation_accuracy" in curve(tmp_path)[-1]
    assert lines[0].startswith("pretraining, step 1 of 2: loss 5.")
    assert lines[-1].startswith("training, step 2 of 2: ")


def test_it_learns_and_the_saved_model_says_the_same(data, tmp_path):
    chosen = recipe(schedule__steps=25, optimizer__learning_rate=0.02, model__dropout=0.0)
    result = train_classifier(chosen, data, tmp_path, lambda _: None)
    options = {"context": 24, "most_pieces": 8}
    test, labels, training = data.splits["test"], data.labels, data.splits["train"]
    found = evaluate_classifier(result.model, test, labels, training, **options)
    assert found.accuracy == 1
    assert (found.majority_label, found.majority_accuracy) == ("first", 0.5)
    assert found.right_by_class == {"first": (3, 3), "second": (3, 3)}
    assert "100.0 % of 6 documents are classified right\n50.0 % would be if all were taken for first" in str(found)
    result.model.save_pretrained(tmp_path / "model")
    loaded = SparseTransformerForSequenceClassification.from_pretrained(tmp_path / "model").eval()
    texts = [document.text for document in test]
    expected = document_log_probabilities(result.model, texts, **options)
    assert torch.equal(document_log_probabilities(loaded, texts, **options), expected)


def test_muon_trains_both_phases(data, tmp_path, monkeypatch):
    step, groups = MuonWithAdamW.step, []

    def watched(self, closure=None):
        groups.append(len(self.param_groups[0]["params"]))
        return step(self, closure)

    monkeypatch.setattr(MuonWithAdamW, "step", watched)
    train_classifier(recipe(optimizer__name="muon", pretraining__steps=2), data, tmp_path, lambda _: None)
    assert groups == [4] * 4


def test_a_document_is_judged_by_the_mean_over_its_pieces(data, tmp_path):
    model = train_classifier(recipe(), data, tmp_path, lambda _: None).model
    text = bytes(range(69))  # 23 bytes a piece
    whole = document_log_probabilities(model, [text, b"x"], context=24, most_pieces=9, batch_size=2)
    parts = [document_log_probabilities(model, [text[n : n + 23]], context=24, most_pieces=1)[0] for n in (0, 23, 46)]
    torch.testing.assert_close(whole[0], torch.stack(parts).mean(0).log_softmax(0))
    torch.testing.assert_close(whole.exp().sum(1), torch.ones(2))


def test_starting_from_a_saved_encoder(data, tmp_path):
    torch.manual_seed(0)
    config = SparseTransformerConfig(
        vocab_size=258, hidden_size=16, num_hidden_layers=1, num_attention_heads=2, max_position_embeddings=64,
        patterns="Local(3, lookahead=2) | Global(1, causal=False)", block="modern",
    )  # fmt: skip
    saved = SparseTransformerForMaskedLM(config)
    saved.save_pretrained(tmp_path / "saved")
    chosen = starting_from(tmp_path / "saved", **{"optimizer.learning_rate": 1e-9})
    model = train_classifier(chosen, data, tmp_path, lambda _: None).model
    assert model.config.patterns == config.patterns
    assert model.config.max_position_embeddings == 24
    for name, weight in saved.model.state_dict().items():
        torch.testing.assert_close(model.model.state_dict()[name], weight)
    # And from a classifier of other classes, with a loss of its own.
    model.config.id2label = {0: "a", 1: "b", 2: "c"}
    model.config.problem_type = "regression"
    other = SparseTransformerForSequenceClassification(model.config)
    other.save_pretrained(tmp_path / "other")
    again = train_classifier(starting_from(tmp_path / "other"), data, tmp_path, lambda _: None).model
    assert again.classifier.out_features == 2
    assert again.config.problem_type == "single_label_classification"


def test_weights_that_do_not_fit_are_not_started_anew(data, tmp_path):
    config = SparseTransformerConfig(
        vocab_size=258, hidden_size=16, num_hidden_layers=2, num_attention_heads=2, max_position_embeddings=64,
        patterns="Full()",
    )  # fmt: skip
    SparseTransformerForMaskedLM(config).save_pretrained(tmp_path)
    for name, value in (("num_hidden_layers", 3), ("intermediate_size", 32)):
        written = json.loads((tmp_path / "config.json").read_text()) | {name: value}
        (tmp_path / "config.json").write_text(json.dumps(written))
        with pytest.raises(ArgumentError, match=r"are missing or of another shape, such as model\.layers\."):
            train_classifier(starting_from(tmp_path), data, tmp_path, lambda _: None)


def test_ctrl_c_ends_it_after_the_step(data, tmp_path):
    def press(line):
        if line.startswith("training, step 3 of 50"):
            os.kill(os.getpid(), signal.SIGINT)

    before = signal.getsignal(signal.SIGINT)
    result = train_classifier(recipe(schedule__steps=50), data, tmp_path, press)
    assert result.ended == "interrupted"
    assert 3 <= result.step <= 4
    assert signal.getsignal(signal.SIGINT) is before


def test_a_time_limit_ends_it(data, tmp_path):
    result = train_classifier(recipe(run__time_limit_s=0, schedule__steps=50), data, tmp_path, lambda _: None)
    assert (result.step, result.ended) == (0, "time limit")


def test_a_training_that_diverges_says_so(data, tmp_path, monkeypatch):
    forward = SparseTransformerForSequenceClassification.forward

    def broken(self, *args, **kwargs):
        output = forward(self, *args, **kwargs)
        output.loss = output.loss * float("nan")
        return output

    monkeypatch.setattr(SparseTransformerForSequenceClassification, "forward", broken)
    with pytest.raises(LongstrideError, match=r"the loss became nan at step 1 of the training: .* lower --lr"):
        train_classifier(recipe(), data, tmp_path, lambda _: None)


def test_a_loss_after_the_last_report_counts(data, tmp_path, monkeypatch):
    chosen = recipe(schedule__steps=5, run__log_every=3)
    train_classifier(chosen, data, tmp_path, lambda _: None)
    assert [record["step"] for record in curve(tmp_path) if "loss" in record] == [3, 5]
    forward, calls = SparseTransformerForSequenceClassification.forward, []

    def broken(self, *args, **kwargs):
        output = forward(self, *args, **kwargs)
        calls.append(self.training)
        if sum(calls) == 5:
            output.loss = output.loss * float("nan")
        return output

    monkeypatch.setattr(SparseTransformerForSequenceClassification, "forward", broken)
    with pytest.raises(LongstrideError, match="the loss became nan at step 5"):
        train_classifier(chosen, data, tmp_path, lambda _: None)


@pytest.mark.parametrize(
    ("changed", "error", "message"),
    [
        ({"model__patterns": "Local(8)"}, PatternError, "lets no token attend to later ones"),
        (
            {"model__patterns": "Full()", "model__global_projections": "separate"},
            PatternError,
            "this pattern names none",
        ),
    ],
)
def test_what_cannot_be_built_is_refused(data, tmp_path, changed, error, message):
    with pytest.raises(error, match=message):
        train_classifier(recipe(**changed), data, tmp_path, lambda _: None)


@pytest.mark.parametrize(
    ("sizes", "message"),
    [
        ({"vocab_size": 256}, "knows 256 tokens and 258 are needed"),
        ({"max_position_embeddings": 16}, "reads at most 16 tokens, fewer than the context of 24: give --context 16"),
    ],
)
def test_a_model_that_cannot_be_started_from(data, tmp_path, sizes, message):
    small = {"vocab_size": 258, "hidden_size": 16, "num_hidden_layers": 1, "num_attention_heads": 2}
    sizes = small | {"max_position_embeddings": 64, "patterns": "Full()"} | sizes
    SparseTransformerForMaskedLM(SparseTransformerConfig(**sizes)).save_pretrained(tmp_path)
    with pytest.raises(ArgumentError, match=message):
        train_classifier(starting_from(tmp_path), data, tmp_path, lambda _: None)


def test_what_is_no_model_of_ours_cannot_be_started_from(data, tmp_path):
    with pytest.raises(ArgumentError, match="nowhere holds no model to start from"):
        train_classifier(starting_from("nowhere"), data, tmp_path, lambda _: None)
    BertConfig().save_pretrained(tmp_path)
    with pytest.raises(ArgumentError, match="is of the type bert, none of ours: start from an encoder that"):
        train_classifier(starting_from(tmp_path), data, tmp_path, lambda _: None)


def test_a_language_model_cannot_be_started_from(data, tmp_path):
    config = SparseTransformerConfig(
        vocab_size=258, hidden_size=16, num_hidden_layers=1, num_attention_heads=2, max_position_embeddings=64,
        patterns="Local(8)",
    )  # fmt: skip
    SparseTransformerForCausalLM(config).save_pretrained(tmp_path)
    with pytest.raises(PatternError, match=r"Local\(8\): this pattern lets no token attend to later ones"):
        train_classifier(starting_from(tmp_path), data, tmp_path, lambda _: None)


def test_the_recipe_of_the_repository_spells_the_defaults_out():
    assert read_classification_recipe(ROOT / "recipes" / "finetuning" / "documents.yaml") == ClassificationRecipe()


def test_a_written_recipe_reads_back(tmp_path):
    chosen = starting_from("a/model", **{"pretraining.steps": 3})
    (tmp_path / "recipe.yaml").write_text(chosen.to_yaml())
    assert read_classification_recipe(tmp_path / "recipe.yaml") == chosen


@pytest.mark.parametrize(
    ("key", "value", "message"),
    [
        ("data.context", 1, "data.context is 1: it must be at least 2"),
        ("pretraining.steps", -1, "pretraining.steps is -1: it must be at least 0"),
        ("evaluation.most_pieces", 0, "evaluation.most_pieces is 0: it must be at least 1"),
        ("model.global_projections", "own", "model.global_projections is 'own': it must be one of shared, separate"),
        ("model.patterns", [], "model.patterns is empty"),
        ("model.patterns", "Locale(3)", "model.patterns: .*Locale"),
        ("model.hidden_size", 0, "model.hidden_size is 0: it must be at least 1"),
        ("schedule.steps", 0, "schedule.steps is 0: it must be at least 1"),
        ("optimizer.learning_rate", 0, "optimizer.learning_rate is 0.0: it must be above 0"),
        ("run.precision", "fp8", "run.precision is 'fp8': it must be one of"),
        ("run.recompute", "all", "run.recompute is 'all': it must be one of"),
        ("run.time_limit_s", -1, "run.time_limit_s is -1.0: it must not be negative"),
        ("model.dropout", 1, "model.dropout is 1.0: it must be at least 0 and below 1"),
        ("model.memory", 8, "model.memory is 8: it must be 0, for an encoder reads both sides"),
        ("run.seed", 2**32, r"run.seed is 4294967296: it must be below 2\*\*32"),
        ("data.contxt", 3, "unknown key data.contxt: did you mean data.context"),
    ],
)
def test_illegal_values_are_named(key, value, message):
    with pytest.raises(RecipeError, match=message):
        ClassificationRecipe().override({key: value})


def test_a_model_to_start_from_leaves_no_other_value_of_the_model():
    with pytest.raises(RecipeError, match=r"model.hidden_size with model.start_from: the model in a has values of its"):
        ClassificationRecipe().override({"model.start_from": "a", "model.hidden_size": 256})
