"""Segment recurrence: segments give what the whole text gives, and gradients end where the memory begins."""

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

import longstride as ls
from longstride.attention import attention
from longstride.backends.layout import heads_of
from longstride.errors import ArgumentError, UnsupportedError
from longstride.models import SegmentMemory, compiled_blocks, layer_patterns, recompute_in_backward
from longstride.models.memory import kept_tokens
from longstride.nn.self_attention import PatternAttention

# Every kind of pattern that a memory takes, with its reach: how far back its farthest key lies, None for no bound.
REACH = {
    "Local(5)": 4,
    "Dilated(3, 4)": 8,
    "Local(3) | Dilated(2, 5)": 5,
    "BlockLocal(6)": 5,
    "BlockLocal(4) | Local(7)": 6,
    "per_head(Local(9), BlockLocal(4))": 8,
    "Fixed(4, 2) & Local(10)": 9,
    "Causal()": None,
    "Strided(4)": None,
    "Local(4) | Strided(4)": None,
    "LogSparse()": None,
    "Summary(4, 1, offset=1) | Local(1)": None,
    "Fixed(6, 2)": None,
    "per_head(Fixed(4, 1), Strided(3))": None,
}
# Segments as in training, and ones that begin anywhere in a repetition.
CUTS = ((12, 12, 12), (5, 7, 1, 13, 10))
TEXT = 36


@pytest.fixture
def text():
    return torch.randint(17, (2, TEXT), generator=torch.Generator().manual_seed(5))


def by_segments(model, text, cuts, memory):
    return torch.cat([model(segment, memory=memory).logits for segment in text.split(cuts, 1)], 1)


@pytest.mark.parametrize("cuts", CUTS, ids=str)
@pytest.mark.parametrize("pattern", REACH)
def test_segments_give_what_the_whole_text_gives(make_either, text, pattern, cuts):
    model = make_either(patterns=pattern, num_hidden_layers=2)
    every = layer_patterns(model.config)[0].repeats_every
    enough = TEXT if REACH[pattern] is None else REACH[pattern] + every - 1
    memory = SegmentMemory(model.config, tokens=max(1, enough))
    with torch.no_grad():
        torch.testing.assert_close(by_segments(model, text, cuts, memory), model(text).logits, rtol=1e-9, atol=1e-9)
    assert memory.seen == [TEXT, TEXT]


def test_token_by_token(make_model, text):
    model = make_model(patterns=["Local(4)", "Fixed(4, 1)"], block="modern", initializer_scale=1.0)
    with torch.no_grad():
        ours = by_segments(model, text, (1,) * TEXT, SegmentMemory(model.config, tokens=TEXT))
        torch.testing.assert_close(ours, model(text).logits, rtol=1e-9, atol=1e-9)


@pytest.mark.parametrize("cuts", CUTS, ids=str)
@pytest.mark.parametrize("pattern", REACH)
def test_a_short_memory_is_the_pattern_up_to_where_the_memory_begins(make_model, text, pattern, cuts):
    """Held to `allows`: one layer, its mask cut at the beginning of each segment's memory."""
    model = make_model(patterns=pattern, num_hidden_layers=1, block="modern", initializer_scale=1.0)
    rule = layer_patterns(model.config)[0]
    masks, start = [], 0
    positions = torch.arange(TEXT)
    for length in cuts:
        allowed = torch.stack([head.allows(positions[:, None], positions) for head in rule.split_heads(2)])
        # The first place where the pattern repeats that at most 11 tokens lie behind, before the segment.
        repeats = range(0, start + 1, rule.repeats_every)
        first = next(place for place in repeats if start - place <= 11)
        masks.append((allowed & (positions >= first))[:, start : start + length])
        start += length
    mask = torch.cat(masks, 1)  # bool[heads, text, text]

    def masked(q, k, v, *_, **__):
        return torch.nn.functional.scaled_dot_product_attention(q, k, v, mask).nan_to_num()

    ours = by_segments(model, text, cuts, SegmentMemory(model.config, 11))
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("longstride.nn.self_attention.attention", masked)
        expected = model(text).logits
    torch.testing.assert_close(ours, expected, rtol=1e-9, atol=1e-9)


@given(st.sampled_from(sorted(REACH)), st.integers(0, 60), st.integers(11, 60))
def test_what_is_kept_is_all_that_may_be_read_and_no_more(text, given_tokens, most):
    pattern = ls.parse(text)
    kept = kept_tokens(pattern, given_tokens, most)
    first = given_tokens - kept
    assert 0 <= kept <= most
    assert first % pattern.repeats_every == 0
    later = torch.arange(given_tokens, given_tokens + 70)[:, None]
    readable = [rule.allows(later, torch.arange(given_tokens)).any(0) for rule in pattern.split_heads(2)]
    readable = torch.stack(readable).any(0)
    dropped = readable[max(0, given_tokens - most) : first]
    # Tokens that would be read are dropped for the room, or to begin where the pattern repeats.
    assert len(dropped) < pattern.repeats_every or not dropped.any()
    # A repetition more at the front would be all unread, or too much.
    earlier = readable[max(0, first - pattern.repeats_every) : first]
    assert kept + pattern.repeats_every > most or not earlier.any()


class Detached:
    """Attention whose keys and values before a place are detached, at whatever place a test sets."""

    def __init__(self, monkeypatch):
        self.place = 0

        def attend(q, k, v, pattern, **options):
            k, v = (torch.cat((x[:, :, : self.place].detach(), x[:, :, self.place :]), 2) for x in (k, v))
            return attention(q, k, v, pattern, **options)

        monkeypatch.setattr("longstride.nn.self_attention.attention", attend)
        monkeypatch.setattr(
            "longstride.nn.self_attention.attention_stacked",
            lambda stacked, pattern, *, heads, qk_width, **_: attend(*heads_of(stacked, heads, qk_width), pattern),
        )


@pytest.mark.parametrize(
    ("pattern", "what"),
    [
        ("Local(5)", "blocks"),
        ("Local(4) | Strided(4)", "nothing"),
        ("Local(4) | Strided(4)", "all_but_attention"),
        ("Fixed(6, 2)", "nothing"),
        ("Fixed(6, 2)", "blocks"),
    ],
)
def test_gradients_are_those_of_the_whole_text_with_earlier_keys_and_values_detached(make_either, text, pattern, what):
    model = make_either(patterns=pattern).train()
    recompute_in_backward(model, what)
    cuts, start = (12, 7), 0
    memory = SegmentMemory(model.config, tokens=TEXT)
    for length in cuts:
        segment = text[:, start : start + length]
        model.zero_grad()
        model(segment, labels=segment, memory=memory, num_items_in_batch=1).loss.backward()
        ours = [parameter.grad.clone() for parameter in model.parameters()]
        model.zero_grad()
        with pytest.MonkeyPatch.context() as patch:
            Detached(patch).place = start
            labels = text[:, : start + length].clone()
            labels[:, : start + 1] = -100
            recompute_in_backward(model, "nothing")
            model(text[:, : start + length], labels=labels, num_items_in_batch=1).loss.backward()
            recompute_in_backward(model, what)
        for parameter, mine in zip(model.parameters(), ours, strict=True):
            torch.testing.assert_close(mine, parameter.grad, rtol=1e-5, atol=1e-7)
        start += length


def test_a_memory_has_no_gradients_and_only_the_bytes_that_it_says(make_model, text):
    model = make_model(patterns=["Local(5)", "BlockLocal(12)", "Causal()"], block="modern", initializer_scale=1.0)
    memory = SegmentMemory(model.config, tokens=20)
    for segment in text.split(12, 1):
        model(segment, memory=memory)
    held = [memory.earlier(layer).keys_values for layer in range(3)]
    assert [None if x is None else x[0].shape[2] for x in held] == [4, None, 20]
    assert not any(x.requires_grad for layer in held if layer is not None for x in layer)
    # Two rows, two heads, widths of 8 for keys and for values, float64.
    assert memory.nbytes == (4 + 20) * 2 * 2 * (8 + 8) * 8
    assert all(x.untyped_storage().nbytes() == x.nbytes for layer in held if layer is not None for x in layer)


@pytest.mark.parametrize("pattern", ["Local(5)", "Local(4) | Strided(4)", "Fixed(6, 2)", "BlockLocal(6)"])
@pytest.mark.parametrize("trained", [False, True])
def test_rows_begin_anew_each_by_itself(make_model, text, pattern, trained):
    """Row 0 is reset after the second segment, row 1 after the first: each as if it stood alone."""
    model = make_model(patterns=pattern, block="modern", initializer_scale=1.0, num_hidden_layers=4)
    text = torch.cat((text, text.flip(1)))
    memory, starts, outputs = SegmentMemory(model.config, tokens=24), [], []
    begins = [[True] * 4, [False, True, False, True], [True, False, False, False], [False] * 4]
    segments = text.split((12, 6, 12, 6), 1)
    model.train(trained)
    for segment, marks in zip(segments, begins, strict=True):
        memory.reset(marks)
        outputs.append(model(segment, memory=memory).logits)
        starts.append(marks)
    for row in range(4):
        alone = SegmentMemory(model.config, tokens=24)
        for segment, marks, together in zip(segments, starts, outputs, strict=True):
            if marks[row]:
                alone.reset()
            torch.testing.assert_close(
                together[row], model(segment[row : row + 1], memory=alone).logits[0], rtol=1e-9, atol=1e-9
            )
    sum(output.sum() for output in outputs).backward()


def test_a_saved_memory_goes_on(make_model, text, tmp_path):
    model = make_model(patterns=["Local(5)", "Fixed(6, 2)"], block="modern", initializer_scale=1.0)
    memory, again = (SegmentMemory(model.config, tokens=24) for _ in range(2))
    first, second, third = text.split(12, 1)
    model(first, memory=memory)
    memory.reset([True, False])
    model(second, memory=memory)
    torch.save(memory.state_dict(), tmp_path / "memory.pt")
    again.load_state_dict(torch.load(tmp_path / "memory.pt"), torch.device("cpu"))
    assert torch.equal(model(third, memory=memory).logits, model(third, memory=again).logits)


@pytest.mark.slow
@pytest.mark.usefixtures("fresh_compiler")
@pytest.mark.filterwarnings(
    "ignore:The .grad attribute of a Tensor that is not a leaf:UserWarning"
)  # dynamo's own look
def test_compiled_blocks_carry_a_memory(make_model, text):
    """Rows begin at all times, and the memory grows: fullgraph would raise at a break, or at a graph too many."""
    model = make_model(
        dtype=torch.float32,
        patterns="Local(5) | Strided(4)",
        block="modern",
        initializer_scale=1.0,
        num_hidden_layers=1,
        memory=24,
    ).train()
    marks = [[True, True], [False, False], [True, False], [False, True], [False, True], [False, False], [True, True]]

    def gradients():
        memory = SegmentMemory(model.config)
        model.zero_grad()
        for segment, rows in zip(text.repeat(1, 3).split(12, 1), marks, strict=False):
            memory.reset(rows)
            model(segment, labels=segment, memory=memory).loss.backward()
        return [parameter.grad.clone() for parameter in model.parameters()]

    expected = gradients()
    with compiled_blocks(model, backend="aot_eager"):
        for ours, theirs in zip(gradients(), expected, strict=True):
            torch.testing.assert_close(ours, theirs, rtol=1e-4, atol=1e-4)


def test_autocast_keeps_what_the_layers_compute(make_model, text):
    model = make_model(dtype=torch.float32, patterns="Local(5)", block="modern", initializer_scale=1.0)
    memory = SegmentMemory(model.config, tokens=8)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        outputs = by_segments(model, text, (12, 12, 12), memory)
        expected = model(text).logits
    torch.testing.assert_close(outputs, expected, rtol=0.05, atol=0.1)
    assert memory.earlier(0).keys_values[0].dtype == torch.bfloat16


@pytest.mark.parametrize(
    ("pattern", "tokens", "error", "match"),
    [
        ("Global(2) | Local(4)", 16, UnsupportedError, r"memory=16: Global\(2\) \| Local\(4\) names positions counted"),
        ("RandomBlocks(4, 2)", 16, UnsupportedError, "use patterns of distances and blocks"),
        ("Fixed(8, 2)", 6, ArgumentError, r"memory=6: Fixed\(8, 2\) repeats every 8 positions.* give at least 7"),
        ("Local(4)", 0, ArgumentError, "memory=0: it must be a whole number of tokens, at least 1"),
    ],
)
def test_memories_that_cannot_be(make_model, pattern, tokens, error, match):
    model = make_model(patterns=pattern)
    with pytest.raises(error, match=match):
        SegmentMemory(model.config, tokens)
    if tokens:
        with pytest.raises(error, match=match):
            make_model(patterns=pattern, memory=tokens, block="modern")


def test_learned_positions_end(make_model, text):
    with pytest.raises(ArgumentError, match=r"memory=16 with block='sparse_transformer': learned position embeddings"):
        make_model(memory=16)
    model = make_model()
    memory = SegmentMemory(model.config, tokens=48)
    model(text, memory=memory)
    with pytest.raises(ArgumentError, match=r"the text has 72 tokens with this segment and max_position_embeddings=48"):
        model(text, memory=memory)
    modern = make_model(block="modern", initializer_scale=1.0, memory=8)
    endless = SegmentMemory(modern.config)
    for _ in range(3):
        modern(text, memory=endless)
    assert endless.seen == [108, 108]


def test_what_does_not_go_with_a_memory(make_model, text):
    model = make_model()
    memory = SegmentMemory(model.config, tokens=8)
    for options, match in (
        ({"attention_mask": torch.ones_like(text)}, "attention_mask with memory: all tokens are real there"),
        ({"use_cache": True}, "past_key_values and memory together"),
        ({"position_ids": torch.arange(TEXT)[None]}, "position_ids with memory"),
        ({"cu_seq_lens_q": torch.tensor([0, 2 * TEXT]), "max_length_q": TEXT}, "memory and packed documents together"),
    ):
        with pytest.raises(ArgumentError, match=match):
            model(text, memory=memory, **options)
    model(text[:, :4], memory=memory)
    with pytest.raises(ArgumentError, match="a batch of 1 rows: this memory has the earlier segments of 2"):
        model(text[:1], memory=memory)
    with pytest.raises(ArgumentError, match="3 rows are marked: this memory has 2"):
        memory.reset([False, True, False])
    with pytest.raises(ArgumentError, match="memory is int: give a SegmentMemory of this model's config"):
        model(text, memory=8)


@pytest.mark.parametrize("changed", [{"patterns": "Strided(5)"}, {"num_hidden_layers": 3}])
def test_a_memory_of_another_model(make_model, text, changed):
    values = {"patterns": ["Local(5)"], "num_hidden_layers": 2}
    memory = SegmentMemory(make_model(**values).config, tokens=8)
    other = make_model(**values | changed)
    with pytest.raises(ArgumentError, match=r"a model with . layers along .*: this memory is for 2 layers along Local"):
        other(text, memory=memory)


def test_without_a_memory_a_block_gives_one_tensor(make_model):
    block = make_model().model.layers[0]
    assert isinstance(block(torch.zeros(1, 4, 16, dtype=torch.float64)), torch.Tensor)
    assert isinstance(block.attention, PatternAttention)
