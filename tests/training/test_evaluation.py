"""Bits per byte: which predictions count, and the two yardsticks."""

import math
import subprocess
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import nn
from torch.utils._python_dispatch import TorchDispatchMode

import longstride.training.evaluation as evaluation
from longstride.errors import ArgumentError, DataError, LongstrideError
from longstride.training import evaluate, side_by_side
from longstride.training.evaluation import order0_entropy, spans, xz_bits_per_byte

RANDOM = np.random.default_rng(0)


class Unigram(nn.Module):
    """The same logits everywhere."""

    def __init__(self, logits: torch.Tensor) -> None:
        super().__init__()
        self.logits = nn.Parameter(logits)

    def forward(self, input_ids: torch.Tensor) -> SimpleNamespace:
        return SimpleNamespace(logits=self.logits.expand(*input_ids.shape, 256))


class SureOfZeroAfter(nn.Module):
    """Knows that all bytes are 0 once it has seen ``context`` of them; claims the opposite before."""

    def __init__(self, context: int) -> None:
        super().__init__()
        self.context = nn.Parameter(torch.tensor(float(context)))

    def forward(self, input_ids: torch.Tensor) -> SimpleNamespace:
        seen = torch.arange(1, input_ids.shape[1] + 1)
        logits = torch.zeros(*input_ids.shape, 256)
        logits[:, :, 0] = torch.where(seen >= self.context, 50.0, -50.0)
        return SimpleNamespace(logits=logits)


@given(st.data())
def test_every_byte_with_enough_context_counts_exactly_once(data):
    context = data.draw(st.integers(1, 40))
    min_context = data.draw(st.integers(1, context))
    total = data.draw(st.integers(min_context + 1, 200))
    predicted = []
    for span in spans(total, context, min_context):
        assert span.start >= 0
        assert span.start + span.length < total
        assert span.length <= context
        for position in range(span.first, span.length):
            assert min_context <= position + 1 <= context
            predicted.append(span.start + position + 1)
    assert predicted == list(range(min_context, total))


@pytest.mark.parametrize("batch_size", [1, 3])
def test_bits_are_the_cross_entropy_of_the_counted_bytes(batch_size):
    data = RANDOM.integers(0, 256, 300, dtype=np.uint8)
    logits = torch.randn(256, generator=torch.Generator().manual_seed(0))
    result = evaluate(Unigram(logits), data, context=32, min_context=5, batch_size=batch_size)
    expected = -logits.double().log_softmax(0)[torch.from_numpy(data[5:].astype(np.int64))].mean().item() / math.log(2)
    assert result.bits_per_byte == pytest.approx(expected, abs=1e-6)
    assert result.counted_bytes == 295
    assert (result.min_context, result.max_context) == (5, 32)


def test_predictions_with_less_than_the_minimum_context_do_not_count():
    data = np.zeros(500, dtype=np.uint8)
    assert evaluate(SureOfZeroAfter(10), data, context=32, min_context=10).bits_per_byte < 1e-3
    # One earlier byte too few, for one prediction of every window.
    assert evaluate(SureOfZeroAfter(10), data, context=32, min_context=9).bits_per_byte > 1


def test_model_comes_back_in_the_mode_that_it_had():
    model = Unigram(torch.zeros(256)).train()
    assert evaluate(model, np.zeros(50, dtype=np.uint8), context=8, min_context=4).bits_per_byte == pytest.approx(8)
    assert model.training


def test_windows_side_by_side_stay_within_their_document():
    documents = np.array([0, 3, 3, 20, 29])
    assert [(span.start, span.length) for span in side_by_side(29, 4, 1, documents)] == [
        (3, 4), (8, 4), (13, 4), (20, 4)
    ]  # fmt: skip
    assert [span.start for span in side_by_side(29, 4, 1)] == [0, 5, 10, 15, 20]
    assert [(span.start, span.length) for span in side_by_side(29, 4, 6)] == [(0, 3), (6, 3), (12, 3), (18, 3), (24, 3)]


def test_seconds_are_the_models_alone(monkeypatch):
    """Compressing with xz -9e can take longer than the model did."""
    clock = [0.0]

    def slow(_):
        clock[0] += 100.0
        return 1.0

    monkeypatch.setattr(evaluation.time, "monotonic", lambda: clock[0])
    monkeypatch.setattr(evaluation, "xz_bits_per_byte", slow)
    text = RANDOM.integers(0, 256, 50, dtype=np.uint8)
    assert evaluate(Unigram(torch.zeros(256)), text, context=8, min_context=1).elapsed_s == 0


@pytest.mark.parametrize("value", [math.nan, math.inf])
def test_losses_that_are_no_numbers_are_refused(value):
    logits = torch.zeros(256)
    logits[7] = value
    with pytest.raises(LongstrideError, match=r"the model's loss is (nan|inf) at a token of the data"):
        evaluate(Unigram(logits), np.arange(50, dtype=np.uint8), context=8, min_context=1)


class Largest(TorchDispatchMode):
    """How many numbers the largest float32 tensor has that is made meanwhile."""

    numbers = 0

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        made = func(*args, **(kwargs or {}))
        for tensor in made if isinstance(made, tuple) else (made,):
            if isinstance(tensor, torch.Tensor) and tensor.dtype == torch.float32:
                self.numbers = max(self.numbers, tensor.numel())
        return made


def test_logits_are_float32_a_piece_at_a_time(monkeypatch):
    text = RANDOM.integers(0, 256, 500, dtype=np.uint8)
    model = Unigram(torch.randn(256, generator=torch.Generator().manual_seed(0)).bfloat16())
    whole = evaluate(model, text, context=40, min_context=20)
    monkeypatch.setattr(evaluation, "LOGITS_AT_ONCE", 8 * 256 * 3)
    with Largest() as largest:
        pieces = evaluate(model, text, context=40, min_context=20)
    assert pieces.bits_per_byte == pytest.approx(whole.bits_per_byte, abs=1e-6)
    assert 0 < largest.numbers <= 8 * 256 * 3


def test_order0_entropy():
    assert str(order0_entropy(np.zeros(100, dtype=np.uint8))) == "0.0"
    assert order0_entropy(np.arange(256, dtype=np.uint8)) == pytest.approx(8)
    assert order0_entropy(np.zeros(100, dtype=np.uint8)) == 0
    three_to_one = np.array([1, 1, 1, 2], dtype=np.uint8)
    assert order0_entropy(three_to_one) == pytest.approx(0.75 * math.log2(4 / 3) + 0.25 * 2)


def test_xz_is_what_the_program_xz_needs():
    data = np.frombuffer(b"import sys\n" * 500 + RANDOM.bytes(500), dtype=np.uint8)
    try:
        compressed = subprocess.run(["xz", "-9e", "-c"], input=data.tobytes(), capture_output=True, check=True).stdout
    except FileNotFoundError:
        pytest.skip("xz is not installed")
    assert xz_bits_per_byte(data) == 8 * len(compressed) / len(data)


@pytest.mark.parametrize("min_context", [0, 33])
def test_impossible_minimum_context(min_context):
    with pytest.raises(ArgumentError, match=f"--min-context {min_context}: it must be from 1 to .* 32"):
        evaluate(Unigram(torch.zeros(256)), np.zeros(50, dtype=np.uint8), context=32, min_context=min_context)


def test_too_few_bytes():
    with pytest.raises(DataError, match="16 bytes are too few to evaluate: no byte has 16 others before it"):
        evaluate(Unigram(torch.zeros(256)), np.zeros(16, dtype=np.uint8), context=32, min_context=16)
