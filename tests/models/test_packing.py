"""Packed rows: every document comes out as if it stood alone, and learns as if it did."""

import pytest
import torch

from longstride.data import PackedWindows
from longstride.errors import ArgumentError
from longstride.models import SegmentMemory, compiled_blocks, recompute_in_backward
from longstride.models.packing import document_positions

PATTERNS = [
    ["Local(4)", "Strided(4)"],
    ["Fixed(4, 1)"],
    ["per_head(BlockLocal(4), Strided(3))", "Local(3) | Global(1)"],
]
# Documents of two rows of 23 tokens; none begins where a stride or a block of the row does.
LENGTHS = ((9, 1, 13), (5, 18))


@pytest.fixture
def positions():
    return torch.stack([torch.cat([torch.arange(length) for length in row]) for row in LENGTHS])


@pytest.fixture
def offsets():
    return torch.tensor([0, *LENGTHS[0], *LENGTHS[1]]).cumsum(0)


def documents(tokens):
    return [document for row, lengths in zip(tokens, LENGTHS, strict=True) for document in row.split(lengths)]


@pytest.mark.parametrize("patterns", PATTERNS, ids=str)
@pytest.mark.parametrize("said", ["positions", "offsets", "offsets alone"])
def test_outputs_are_those_of_each_document_alone(make_either, tokens, positions, offsets, patterns, said):
    model = make_either(patterns=patterns)
    options = {
        "positions": {"position_ids": positions},
        "offsets": {"cu_seq_lens_q": offsets.int(), "max_length_q": 23, "cu_seq_lens_k": offsets, "max_length_k": 23},
        "offsets alone": {"cu_seq_lens_q": offsets, "position_ids": positions},
    }[said]
    packed = documents(model(tokens, **options).logits)
    for ours, document in zip(packed, documents(tokens), strict=True):
        torch.testing.assert_close(ours, model(document[None]).logits[0], rtol=1e-9, atol=1e-9)


@pytest.mark.parametrize("patterns", PATTERNS, ids=str)
@pytest.mark.parametrize("what", ["nothing", "blocks", "all_but_attention"])
def test_loss_and_gradients_are_those_of_each_document_alone(make_either, tokens, positions, patterns, what):
    model = make_either(patterns=patterns).train()
    recompute_in_backward(model, what)
    loss = model(tokens, position_ids=positions, labels=tokens, num_items_in_batch=1).loss
    loss.backward()
    packed = [parameter.grad.clone() for parameter in model.parameters()]
    model.zero_grad()
    alone = [document[None] for document in documents(tokens) if len(document) > 1]
    sum_alone = sum(model(document, labels=document, num_items_in_batch=1).loss for document in alone)
    sum_alone.backward()
    torch.testing.assert_close(loss, sum_alone, rtol=1e-5, atol=1e-5)
    for ours, parameter in zip(packed, model.parameters(), strict=True):
        torch.testing.assert_close(ours, parameter.grad, rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("training", [True, False])
def test_no_loss_of_a_document_s_first_token(make_model, tokens, positions, training):
    """By its own count, too: the mean is over the labels that are left."""
    model = make_model().train(training)
    other = tokens.clone()
    other[positions == 0] = -100
    loss = model(tokens, position_ids=positions, labels=tokens).loss
    assert torch.equal(loss, model(tokens, position_ids=positions, labels=other).loss)
    assert not torch.equal(loss, model(tokens, labels=tokens).loss)


def test_a_collator_of_transformers(make_model, tokens):
    from transformers import DataCollatorWithFlattening

    collate = DataCollatorWithFlattening(return_flash_attn_kwargs=True)
    rows = [{"input_ids": document.tolist()} for document in documents(tokens)]
    batch = collate(rows)
    model = make_model()
    loss = model(**batch).loss
    for ours, document in zip(
        model(batch["input_ids"], position_ids=batch["position_ids"])
        .logits[0]
        .split([len(d) for d in documents(tokens)]),
        documents(tokens),
        strict=True,
    ):
        torch.testing.assert_close(ours, model(document[None]).logits[0])
    losses = [model(document[None], labels=document[None], num_items_in_batch=1).loss for document in documents(tokens)]
    counted = sum(len(document) - 1 for document in documents(tokens))
    torch.testing.assert_close(loss, sum(losses) / counted, rtol=1e-5, atol=1e-5)


def test_a_row_may_be_longer_than_the_context_if_no_document_is(make_either, tokens):
    row = tokens.repeat(1, 3)[:1]  # 69 tokens; the context is 48
    lengths = [30, 39]
    model = make_either()
    packed = model(row, position_ids=torch.cat([torch.arange(length) for length in lengths])[None]).logits[0]
    for ours, document in zip(packed.split(lengths), row[0].split(lengths), strict=True):
        torch.testing.assert_close(ours, model(document[None]).logits[0])
    with pytest.raises(ArgumentError, match="a packed document has 50 tokens and max_position_embeddings=48"):
        model(row, cu_seq_lens_q=torch.tensor([0, 50, 69]))


def test_hidden_states_and_embeddings(make_model, tokens, positions):
    model = make_model()
    embeds = model.get_input_embeddings()(tokens)
    one = model(inputs_embeds=embeds, position_ids=positions, output_hidden_states=True)
    two = model(tokens, position_ids=positions, output_hidden_states=True)
    assert torch.equal(one.logits, two.logits)
    assert all(torch.equal(ours, theirs) for ours, theirs in zip(one.hidden_states, two.hidden_states, strict=True))


def test_under_autocast(make_either, tokens, positions):
    model = make_either(dtype=torch.float32)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        packed = documents(model(tokens, position_ids=positions).logits)
        for ours, document in zip(packed, documents(tokens), strict=True):
            torch.testing.assert_close(ours, model(document[None]).logits[0], rtol=0.05, atol=0.2)


@pytest.mark.slow
@pytest.mark.usefixtures("fresh_compiler")
def test_offsets_compile_without_a_graph_break(make_model, tokens, offsets):
    model = make_model(dtype=torch.float32, num_hidden_layers=1).train()
    options = {"labels": tokens, "cu_seq_lens_q": offsets.int(), "max_length_q": 23}
    model(tokens, **options).loss.backward()
    plain = [parameter.grad.clone() for parameter in model.parameters()]
    model.zero_grad()
    torch.compile(model, fullgraph=True, backend="aot_eager")(tokens, **options).loss.backward()
    for parameter, theirs in zip(model.parameters(), plain, strict=True):
        torch.testing.assert_close(parameter.grad, theirs)


@pytest.mark.usefixtures("fresh_compiler")
@pytest.mark.filterwarnings(
    "ignore:The .grad attribute of a Tensor that is not a leaf:UserWarning"
)  # dynamo's own look
@pytest.mark.parametrize("said", ["positions", "a batch of windows"])
def test_compiled_blocks_meet_any_number_of_documents(make_model, tokens, said):
    """More numbers than graphs that fullgraph lets there be."""
    model = make_model(num_hidden_layers=1).train()
    with compiled_blocks(model, backend="eager"):
        for number in range(1, 16):
            begins = torch.arange(number + 1, dtype=torch.int32)
            begins[-1] = 23
            items = [{"input_ids": row, "labels": row, "cu_seqlens": begins} for row in tokens]
            batch = PackedWindows.collate(items)
            if said == "positions":
                positions = document_positions(batch["cu_seq_lens_q"], 46).view(2, 23)
                batch = {"input_ids": tokens, "labels": tokens, "position_ids": positions}
            assert torch.isfinite(model(**batch).loss)


@pytest.mark.parametrize("wrong", [[0, 1, 2, 0, 2, 3], [1, 2, 3, 0, 1, 2], [0, 1, 2, 0, 0, 2]])
def test_positions_that_do_not_count_are_refused(make_model, wrong):
    with pytest.raises(
        ArgumentError, match="position_ids of packed documents must begin with 0 in every row and count"
    ):
        make_model()(torch.ones(1, 6, dtype=torch.long), position_ids=torch.tensor([wrong]))


def test_what_does_not_go_with_packed_documents(make_model, tokens, offsets):
    model = make_model()
    packed = {"cu_seq_lens_q": offsets, "max_length_q": 23}
    for options, match in (
        ({"attention_mask": torch.ones_like(tokens)} | packed, "attention_mask with packed documents"),
        ({"use_cache": True} | packed, "past_key_values and packed documents together"),
        ({"memory": SegmentMemory(model.config, 8)} | packed, "memory and packed documents together"),
        ({"max_length_q": 23}, "max_length_q=23 without cu_seq_lens_q: give where the documents begin, too"),
        (
            {"cu_seq_lens_q": torch.tensor([[0, 46]])},
            r"cu_seq_lens_q has shape \(1, 2\): it must be \[documents \+ 1\]",
        ),
        ({"cu_seq_lens_q": torch.tensor([0, 40])}, "46"),
    ):
        with pytest.raises(ArgumentError, match=match):
            model(tokens, **options)


def test_positions_in_documents_of_which_some_are_empty():
    offsets = torch.tensor([0, 0, 2, 2, 5, 5], dtype=torch.int32)
    assert document_positions(offsets, 5).tolist() == [0, 1, 0, 1, 2]
