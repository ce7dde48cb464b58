"""Sampling: the same draws as ``generate()``, a window that slides, and text that appears while it is drawn."""

import pytest
import torch

from longstride.errors import ArgumentError
from longstride.generation import START, as_text, cache_for, sample_bytes
from longstride.models import SparseTransformerConfig, SparseTransformerForCausalLM

CONTEXT = 24


@pytest.fixture(scope="module")
def model() -> SparseTransformerForCausalLM:
    config = SparseTransformerConfig(
        vocab_size=256,
        hidden_size=16,
        num_hidden_layers=2,
        num_attention_heads=2,
        max_position_embeddings=CONTEXT,
        patterns=["Local(4) | Strided(4)"],
    )
    with torch.random.fork_rng():
        torch.manual_seed(0)
        model = SparseTransformerForCausalLM(config).eval()
        # The logits' weights start at zero, which would make every draw uniform.
        torch.nn.init.normal_(model.lm_head.weight, std=0.5)
    return model


def draw(model, prompt: bytes, length: int, seed: int = 0, **options) -> bytes:
    return b"".join(sample_bytes(model, prompt, length, generator=torch.Generator().manual_seed(seed), **options))


@pytest.mark.parametrize(
    "options",
    [{}, {"temperature": 0.7}, {"top_k": 5}, {"top_p": 0.5}, {"temperature": 1.5, "top_k": 50, "top_p": 0.9}],
    ids=str,
)
def test_draws_are_those_of_generate(model, options):
    prompt = b"def f"
    with torch.random.fork_rng():
        torch.manual_seed(11)
        expected = model.generate(
            torch.tensor([list(prompt)]),
            attention_mask=torch.ones(1, len(prompt), dtype=torch.int64),
            do_sample=True,
            max_new_tokens=CONTEXT - len(prompt),
            # Without this, generate() keeps the 50 likeliest.
            **{"top_k": 0, **options},
        )
    assert prompt + draw(model, prompt, CONTEXT - len(prompt), seed=11, **options) == bytes(expected[0].tolist())


def test_temperature_zero_takes_the_likeliest(model):
    tokens = list(b"ab")
    for byte in draw(model, b"ab", 10, temperature=0):
        assert byte == int(model(input_ids=torch.tensor([tokens])).logits[0, -1].argmax())
        tokens.append(byte)
    assert (
        draw(model, b"ab", 10, temperature=0) == draw(model, b"ab", 10, top_k=1) == draw(model, b"ab", 10, top_p=1e-9)
    )


def test_seed_decides_and_the_global_generator_is_left_alone(model):
    state = torch.get_rng_state()
    first = draw(model, b"x", 30, seed=1)
    assert draw(model, b"x", 30, seed=1) == first
    assert draw(model, b"x", 30, seed=2) != first
    assert torch.equal(torch.get_rng_state(), state)


def test_window_slides_when_the_context_is_full(model):
    prompt = bytes(range(100, 100 + CONTEXT + 10))
    tokens = list(prompt)
    for byte in draw(model, prompt, 15, temperature=0):
        assert byte == int(model(input_ids=torch.tensor([tokens[-CONTEXT:]])).logits[0, -1].argmax())
        tokens.append(byte)


@pytest.mark.parametrize("prompt", [b"", b"abc", bytes(range(CONTEXT)), bytes(range(CONTEXT - 1))], ids=len)
def test_a_cache_changes_nothing(model, prompt):
    """Each byte is the likeliest after a pass over everything before it, within the context and past it."""
    tokens = list(prompt or START)
    for byte in draw(model, prompt, CONTEXT + 3, temperature=0):
        assert byte == int(model(input_ids=torch.tensor([tokens[-CONTEXT:]])).logits[0, -1].argmax())
        tokens.append(byte)


def test_within_the_context_each_byte_is_read_once(model, monkeypatch):
    lengths = []
    forward = model.model.forward
    monkeypatch.setattr(
        model.model, "forward", lambda ids, **kwargs: lengths.append(ids.shape[1]) or forward(ids, **kwargs)
    )
    draw(model, b"abcdef", 8)
    assert lengths == [6] + [1] * 7


def test_the_cache_has_room_for_the_sample_and_no_more(model):
    assert cache_for(model, b"abc", 8).capacity == 10
    assert cache_for(model, b"", 0).capacity == 1
    assert cache_for(model, b"abc", 1000).capacity == CONTEXT


def test_empty_prompt_starts_after_a_line_end(model):
    assert draw(model, b"", 12, seed=5) == draw(model, START, 12, seed=5)
    assert START == b"\n"


def test_bytes_come_one_at_a_time(model):
    pieces = sample_bytes(model, b"x", 3, generator=torch.Generator().manual_seed(0))
    assert [len(piece) for piece in pieces] == [1, 1, 1]
    assert draw(model, b"x", 0) == b""


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"temperature": -1}, "temperature -1: it must be at least 0"),
        ({"temperature": float("nan")}, "temperature nan: it must be at least 0"),
        ({"top_k": 0}, "top-k 0: it must be at least 1"),
        ({"top_p": 0}, "top-p 0: it must be above 0"),
        ({"top_p": 1.5}, "top-p 1.5: it must be above 0 and at most 1"),
    ],
)
def test_values_that_cannot_be_sampled_with(model, options, message):
    with pytest.raises(ArgumentError, match=message):
        sample_bytes(model, b"x", 1, generator=torch.Generator(), **options)


def test_negative_length(model):
    with pytest.raises(ArgumentError, match="length of -1 bytes"):
        sample_bytes(model, b"x", -1, generator=torch.Generator())


def single(data: bytes) -> list[bytes]:
    return [data[i : i + 1] for i in range(len(data))]


def test_text_shows_a_character_with_its_last_byte():
    assert list(as_text(single("aé€😀".encode()))) == ["a", "é", "€", "😀"]


def test_text_shows_what_is_not_utf8_as_the_replacement_character():
    assert "".join(as_text(single(b"a\xffb\xc3"))) == "a\ufffdb\ufffd"
