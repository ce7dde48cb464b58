"""``longstride evaluate --checks`` and ``--pattern`` from the outside."""

import json
import math
from pathlib import Path

import pytest
import torch
from PIL import Image
from tests.copier import copier
from transformers import Gemma2Config, Gemma2ForCausalLM
from typer.testing import CliRunner

from longstride.cli import app
from longstride.data import decode_source, make_kind, prepare
from longstride.models import SparseTransformerConfig, SparseTransformerForCausalLM
from longstride.training import evaluation

NEEDLE = ("--needle", "{key}={value}!")


def evaluate(*arguments: object):
    return CliRunner().invoke(app, ["evaluate", *map(str, arguments)])


@pytest.fixture(scope="module")
def folder(tmp_path_factory) -> Path:
    path = tmp_path_factory.mktemp("copier")
    copier("Causal()").save_pretrained(path)
    return path


@pytest.fixture(scope="module")
def text(tmp_path_factory) -> Path:
    path = tmp_path_factory.mktemp("data") / "text.txt"
    path.write_bytes(b"0123456789 .,;" * 40)
    return path


def test_tables_files_and_pictures(folder, text, tmp_path):
    patterns = ("--pattern", "OnlyPrevious()", "--pattern", "Local(8)")
    asked = ("--checks", *NEEDLE, "--trials", 2, "--output", tmp_path / "checks", *patterns)
    result = evaluate(folder, "--data", text, *asked)
    assert result.exit_code == 0, result.output
    assert "Otherwise, along OnlyPrevious(); Local(8): " in result.output
    assert "Loss by context, over 8 windows side by side:" in result.output
    assert result.output.count("guessing has 0.06") == 2
    by_context = json.loads((tmp_path / "checks" / "context.json").read_text())
    assert by_context["text"] == str(text)
    as_it_is, otherwise = (by_context["measured"][name]["ranges"][-1] for name in ("as it is", "otherwise"))
    assert (as_it_is["fewest"], as_it_is["most"], as_it_is["tokens"]) == (33, 64, 256)
    assert as_it_is["bits"] < 2 < 4 < otherwise["bits"]
    needles = json.loads((tmp_path / "checks" / "needle.json").read_text())["measured"]
    # An eighth and a quarter of the context are too short for a needle.
    assert needles["as it is"]["haystack"]["lengths"] == [32, 64]
    assert needles["as it is"]["chosen"] == [[1.0] * 5] * 2
    assert needles["otherwise"]["chosen"] == [[0.0] * 5] * 2
    for name in ("context.png", "needle.png"):
        assert str(tmp_path / "checks" / name) in result.output
        with Image.open(tmp_path / "checks" / name) as picture:
            assert picture.width > 200


def test_json_holds_everything(folder, text, tmp_path):
    schedule = tmp_path / "schedule.yaml"
    schedule.write_text("patterns:\n- OnlyPrevious()\n- Local(8)\n")
    asked = ("--checks", *NEEDLE, "--length", 40, "--depth", 0.5, "--trials", 1, "--seed", 7)
    result = evaluate(folder, "--data", text, *asked, "--schedule", schedule, "--output", tmp_path, "--json")
    assert result.exit_code == 0, result.output
    figures = json.loads(result.output)
    assert figures["bits_per_byte"] < 2 < figures["otherwise"]["bits_per_byte"]
    assert figures["otherwise"]["patterns"] == ["OnlyPrevious()", "Local(8)"]
    assert figures["checks"]["as it is"]["needles"]["chosen"] == [[1.0]]
    assert figures["checks"]["otherwise"]["needles"]["haystack"]["seed"] == 7


def test_context_of_the_windows_is_chosen(folder, text):
    result = evaluate(folder, "--data", text, "--context", 20, "--json")
    assert json.loads(result.output)["max_context"] == 20


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (("--length", 40), "--length without --checks: it says how to check; add --checks"),
        (("--output", "x"), "--output without --checks"),
        (("--pattern", "Locl(8)"), "unknown pattern 'Locl' (did you mean Local?) at position 0"),
        (("--pattern", "Full()"), "Full(): this pattern lets a token attend to later ones"),
        (("--pattern", "Local(4)") * 3, "3 patterns for 2 layers: give at most one for each layer"),
        (("--pattern", "Local(4)", "--schedule", "x.yaml"), "--pattern and --schedule x.yaml: both name patterns"),
        (("--schedule", "x.yaml"), "x.yaml: the schedule cannot be read (No such file or directory)"),
        (("--context", 65), "--context 65: it must be at least 1 and at most the model's, 64"),
        (("--checks", "--length", 65), "--length 65: the model looks back over at most 64 bytes"),
        (("--checks",), "--length 64: the needle and its question alone take 79 bytes; ask for longer sequences"),
        (("--checks", *NEEDLE, "--max-bytes", 40), "40 bytes are too few to hide a needle in"),
        (("--checks", "--needle", "nothing"), "--needle 'nothing': it must name {key} and then {value}"),
    ],
)
def test_refusals(folder, text, arguments, words):
    result = evaluate(folder, "--data", text, *arguments)
    assert result.exit_code == 2
    assert f"error: {words}" in result.output


def test_schedule_that_is_none(folder, text, tmp_path):
    schedule = tmp_path / "other.yaml"
    schedule.write_text("layers: 3\n")
    result = evaluate(folder, "--data", text, "--schedule", schedule)
    assert f"error: {schedule}: a schedule is YAML with a list of pattern texts under `patterns`" in result.output


def test_schedule_with_tables_that_are_none(folder, text, tmp_path):
    schedule = tmp_path / "schedule.yaml"
    schedule.write_text("patterns: [Local(3)]\ntables: 5\n")
    result = evaluate(folder, "--data", text, "--schedule", schedule)
    assert result.exit_code == 2
    assert f"error: {schedule}: `tables` of a schedule are tables by name" in result.output


def test_folder_that_cannot_be_written(folder, text, tmp_path):
    blocked = tmp_path / "file"
    blocked.write_text("")
    result = evaluate(folder, "--data", text, "--checks", *NEEDLE, "--trials", 1, "--output", blocked / "checks")
    assert result.exit_code == 2
    assert f"error: cannot write in {blocked}/checks (Not a directory): choose another --output" in result.output
    # What took so long is not lost.
    assert "bits per byte over" in result.output
    assert "guessing has 0.06" in result.output


def test_patterns_that_a_model_cannot_have_are_refused_before_anything_is_measured(tmp_path, text, monkeypatch):
    settings = {"vocab_size": 256, "hidden_size": 16, "intermediate_size": 16, "num_hidden_layers": 1, "head_dim": 8}
    heads = {"num_attention_heads": 2, "num_key_value_heads": 2, "max_position_embeddings": 32}
    Gemma2ForCausalLM(Gemma2Config(**settings, **heads)).save_pretrained(tmp_path)
    monkeypatch.setattr(evaluation, "batch_losses", None)
    result = evaluate(tmp_path, "--data", text, "--pattern", "Local(4)")
    assert result.exit_code == 2
    assert "error: Gemma2ForCausalLM caps its scores (attn_logit_softcapping)" in result.output


def test_model_of_no_numbers_is_told_and_no_json_is_printed(tmp_path, text):
    model = copier("Causal()")
    with torch.no_grad():
        model.lm_head.weight.fill_(math.nan)
    model.save_pretrained(tmp_path)
    for asked in (("evaluate",), ("suggest",)):
        result = CliRunner().invoke(app, [*asked, str(tmp_path), "--data", str(text), "--json"])
        assert result.exit_code == 2
        assert result.output.startswith(
            "error: the model's loss is nan at a token of the data: its weights, or what it"
        )


def test_data_that_are_no_text_have_no_needles(tmp_path):
    """A run on a table: three tokens, fewer than there are bytes."""
    table = tmp_path / "table.csv"
    table.write_text("a,b\n" + "1,2\n3,4\n5,7\n" * 200)
    source = decode_source(table, make_kind("csv", 32, {"bins": 2, "binning": "quantile"}), cache=tmp_path / "cache")
    prepare(source, tmp_path / "run" / "data", context=32)
    config = SparseTransformerConfig(
        vocab_size=3, hidden_size=16, num_hidden_layers=1, num_attention_heads=2, max_position_embeddings=32
    )
    SparseTransformerForCausalLM(config).save_pretrained(tmp_path / "run" / "model")
    result = evaluate(tmp_path / "run", "--checks", "--split", "train")
    assert result.exit_code == 0, result.output
    assert "No needles: they are sentences, and these data are csv." in result.output
    assert sorted(path.name for path in (tmp_path / "run" / "checks").iterdir()) == ["context.json", "context.png"]
    refused = evaluate(tmp_path / "run", "--checks", "--length", 20)
    assert refused.exit_code == 2
    assert "error: --length: a needle is a sentence, and the test split of" in refused.output
