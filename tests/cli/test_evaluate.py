"""``longstride evaluate`` from the outside."""

import json

import pytest
import torch
from typer.testing import CliRunner

from longstride.cli import app
from longstride.models import SparseTransformerConfig, SparseTransformerForCausalLM
from longstride.training.evaluation import order0_entropy, xz_bits_per_byte


def evaluate(*arguments: str):
    return CliRunner().invoke(app, ["evaluate", *arguments])


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """A saved model that has learnt nothing: 8 bits for every byte."""
    path = tmp_path_factory.mktemp("model")
    config = SparseTransformerConfig(
        hidden_size=16, num_hidden_layers=1, num_attention_heads=2, max_position_embeddings=32, patterns=["Local(4)"]
    )
    SparseTransformerForCausalLM(config).save_pretrained(path)
    return path


@pytest.fixture
def text(tmp_path):
    path = tmp_path / "text.txt"
    path.write_bytes(b"abcd" * 100 + bytes(range(100)))
    return path


@pytest.fixture
def run(tmp_path, folder, text):
    """A run's folder, without training one."""
    from longstride.data import open_source, prepare

    prepare(open_source(text), tmp_path / "run" / "data", context=16)
    (tmp_path / "run" / "model").symlink_to(folder)
    return tmp_path / "run"


def test_uniform_model_needs_eight_bits_and_the_yardsticks_are_of_the_same_bytes(run, text):
    result = evaluate(str(run), "--json", "--min-context", "9")
    assert result.exit_code == 0, result.output
    figures = json.loads(result.output)
    import numpy as np

    counted = np.frombuffer(text.read_bytes()[475:][9:], dtype=np.uint8)
    assert figures["bits_per_byte"] == pytest.approx(8, abs=1e-5)
    assert figures["counted_bytes"] == len(counted) == 16
    assert (figures["min_context"], figures["max_context"]) == (9, 24)
    assert figures["order0_bits_per_byte"] == pytest.approx(order0_entropy(counted))
    assert figures["xz_bits_per_byte"] == pytest.approx(xz_bits_per_byte(counted))


def test_sentences_state_the_context(run):
    result = evaluate(str(run), "--split", "train")
    assert f"Evaluating on 450 bytes of the train split of {run}." in result.output
    assert "8.0000 bits per byte over 434 bytes, each predicted from 16 to 32 earlier bytes" in result.output
    assert "(order-0 entropy)" in result.output
    assert "by xz -9e" in result.output


def test_other_data_with_a_saved_model(folder, text):
    result = evaluate(str(folder), "--data", str(text), "--max-bytes", "60", "--json")
    assert json.loads(result.output)["counted_bytes"] == 60 - 16


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (("--split", "tset"), "--split tset: it must be one of train, validation, test"),
        (("--min-context", "33"), "--min-context 33: it must be from 1 to the model's context, 32"),
        (("--max-bytes", "1"), "--max-bytes 1: it must be at least 2"),
        (("--max-bytes", "10"), "10 bytes are too few to evaluate"),
        (("--batch-size", "0"), "--batch-size 0: it must be at least 1"),
        (("--data", "nowhere"), "no file or folder nowhere"),
        (("--device", "abacus"), "--device abacus: it must be one of auto"),
    ],
)
def test_refusals(run, arguments, words):
    result = evaluate(str(run), *arguments)
    assert result.exit_code == 2
    assert f"error: {words}" in result.output.replace("there is ", "")


def test_folder_without_a_model_or_data(tmp_path, folder):
    result = evaluate(str(tmp_path / "nowhere"))
    assert result.exit_code == 2
    assert f"error: {tmp_path}/nowhere holds no model: name the --output folder of a training" in result.output
    result = evaluate(str(folder))
    assert result.exit_code == 2
    assert "has no data of its own: name some with --data" in result.output


def test_damaged_model(tmp_path, folder):
    broken = tmp_path / "broken"
    broken.mkdir()
    (broken / "config.json").write_text((folder / "config.json").read_text())
    (broken / "model.safetensors").write_bytes(b"nonsense")
    result = evaluate(str(broken), "--data", str(folder / "config.json"))
    assert result.exit_code == 2
    assert f"error: the model in {broken} cannot be read" in result.output


def test_cuda_without_cuda(run, monkeypatch):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    result = evaluate(str(run), "--device", "cuda")
    assert result.exit_code == 2
    assert "error: --device cuda: this PyTorch sees no such device here" in result.output
