"""``longstride sample`` from the outside."""

import re

import pytest
import torch
from typer.testing import CliRunner

from longstride.cli import app
from longstride.generation import as_text, sample_bytes
from longstride.models import SparseTransformerConfig, SparseTransformerForCausalLM


def sample(*arguments: str):
    return CliRunner().invoke(app, ["sample", *arguments])


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    path = tmp_path_factory.mktemp("model")
    config = SparseTransformerConfig(
        hidden_size=16, num_hidden_layers=1, num_attention_heads=2, max_position_embeddings=32, patterns=["Local(4)"]
    )
    model = SparseTransformerForCausalLM(config)
    torch.nn.init.normal_(model.lm_head.weight, std=0.5, generator=torch.Generator().manual_seed(0))
    model.save_pretrained(path)
    return path


def expected(folder, prompt: str, length: int, seed: int, **options) -> str:
    model = SparseTransformerForCausalLM.from_pretrained(folder)
    generator = torch.Generator().manual_seed(seed)
    return (
        prompt + "".join(as_text(sample_bytes(model, prompt.encode(), length, generator=generator, **options))) + "\n"
    )


def test_prompt_and_continuation_and_nothing_else(folder):
    result = sample(str(folder), "--prompt", "héllo", "--length", "20", "--seed", "3", "--top-k", "9", "--top-p", "0.8")
    assert result.exit_code == 0, result.output
    assert result.stdout == expected(folder, "héllo", 20, 3, temperature=0.8, top_k=9, top_p=0.8)


def test_no_prompt_longer_than_the_context(folder):
    result = sample(str(folder), "--length", "50", "--temperature", "0")
    assert result.stdout == expected(folder, "", 50, 0, temperature=0)


def test_text_is_shown_as_it_comes(folder, monkeypatch):
    """Each character is written before the next byte is drawn."""
    events = []

    def draws(*_, **__):
        for byte in b"xyz":
            events.append(f"draw {chr(byte)}")
            yield bytes([byte])

    monkeypatch.setattr("longstride.generation.sample_bytes", draws)
    monkeypatch.setattr("typer.echo", lambda text="", **_: events.append(f"show {text}"))
    assert sample(str(folder)).exit_code == 0
    *text, figures = events
    assert text == ["show ", "draw x", "show x", "draw y", "show y", "draw z", "show z", "show "]
    assert "tokens/s" in figures


def test_speed_and_memory_go_to_the_standard_error(folder):
    result = sample(str(folder), "--length", "20")
    found = re.fullmatch(
        r"([\d,]+) tokens/s after the first; the cache of keys and values took ([\d,]+) bytes\n", result.stderr
    )
    assert found is not None, result.stderr
    assert int(found[1].replace(",", "")) > 0
    # Two heads of 8 numbers, keys and values, in float32: the window of 4, two rows to spare; then the row's length,
    # and both heads' arrivals.
    assert found[2] == f"{2 * 4 * 8 * (2 * 4 + 2) + 8 + 2 * 4}"
    assert "tokens/s" not in sample(str(folder), "--length", "1").stderr


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (("--length", "-1"), "length of -1 bytes: it must not be negative"),
        (("--temperature", "-0.5"), "temperature -0.5: it must be at least 0"),
        (("--top-k", "0"), "top-k 0: it must be at least 1"),
        (("--top-p", "2"), "top-p 2.0: it must be above 0 and at most 1"),
        (("--seed", "-1"), "--seed -1: it must be from 0"),
        (("--device", "abacus"), "--device abacus: it must be one of auto"),
    ],
)
def test_refusals(folder, arguments, words):
    result = sample(str(folder), *arguments)
    assert result.exit_code == 2
    assert f"error: {words}" in result.output


def test_folder_without_a_model(tmp_path):
    result = sample(str(tmp_path))
    assert result.exit_code == 2
    assert f"error: {tmp_path} holds no model" in result.output
