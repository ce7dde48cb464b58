"""Padding and packing: every row, and every document of a row, is computed as if it stood alone."""

import pytest
import torch
from transformers import DynamicCache

import longstride as ls
from longstride.integrations.transformers import SparsifiedCache

LENGTHS = (5, 12, 9, 1)
SIDES = {"left": lambda length: 12 - length, "right": lambda _: 0, "both": lambda length: (12 - length) // 2}
PATTERNS = [["Local(4)", "Strided(4)"], "Fixed(4, 1)", "per_head(BlockLocal(4), Strided(3))"]


@pytest.fixture
def rows():
    generator = torch.Generator().manual_seed(4)
    return [torch.randint(1, 31, (length,), generator=generator) for length in LENGTHS]


def pad(rows, offset):
    """Rows in a batch [rows, 12] with their mask and positions; offset(row length) pads on the left."""
    ids, mask = torch.zeros(len(rows), 12, dtype=torch.long), torch.zeros(len(rows), 12, dtype=torch.long)
    for index, row in enumerate(rows):
        start = offset(len(row))
        ids[index, start : start + len(row)], mask[index, start : start + len(row)] = row, 1
    return ids, {"attention_mask": mask, "position_ids": (mask.cumsum(1) - 1).clamp(min=0)}


def gradients(model, loss):
    model.zero_grad()
    loss.backward()
    return {name: p.grad.clone() for name, p in model.named_parameters() if p.grad is not None}


@pytest.mark.parametrize("side", SIDES)
@pytest.mark.parametrize("patterns", PATTERNS, ids=str)
@pytest.mark.parametrize("name", ["llama", "gpt2", "mistral"])
def test_a_padded_row_equals_the_row_alone(make, rows, side, patterns, name):
    model = ls.sparsify(make(name), patterns)
    ids, padding = pad(rows, SIDES[side])
    logits = model(ids, **padding).logits
    assert logits.isfinite().all()
    for index, row in enumerate(rows):
        real = padding["attention_mask"][index].bool()
        torch.testing.assert_close(logits[index][real], model(row[None]).logits[0], rtol=1e-9, atol=1e-9)


@pytest.mark.parametrize("side", SIDES)
@pytest.mark.parametrize("pattern", ["Local(3, lookahead=2) | Global(2, causal=False)", "BlockLocal(4, causal=False)"])
@pytest.mark.parametrize("name", ["bert", "modernbert"])
def test_a_padded_row_of_an_encoder_equals_the_row_alone(make, rows, side, pattern, name):
    model = ls.sparsify(make(name), pattern)
    ids, padding = pad(rows, SIDES[side])
    out = model(ids, **padding).last_hidden_state
    for index, row in enumerate(rows):
        real = padding["attention_mask"][index].bool()
        torch.testing.assert_close(out[index][real], model(row[None]).last_hidden_state[0], rtol=1e-9, atol=1e-9)


@pytest.mark.parametrize("side", ["left", "right"])
def test_gradients_of_padded_rows(make, rows, side):
    model = ls.sparsify(make(), ["Local(4)", "Strided(4)"])
    ids, padding = pad(rows, SIDES[side])
    real = padding["attention_mask"].bool()
    padded = gradients(model, model(ids, **padding).logits[real].sin().sum())
    alone = gradients(model, sum(model(row[None]).logits.sin().sum() for row in rows))
    torch.testing.assert_close(padded, alone, rtol=1e-9, atol=1e-9)


@pytest.mark.parametrize("dtype", [torch.long, torch.bool, torch.float32], ids=str)
def test_what_stands_in_the_padding_changes_nothing(make, rows, dtype):
    model = ls.sparsify(make(), "Strided(4)")
    ids, padding = pad(rows, SIDES["left"])
    padding["attention_mask"] = padding["attention_mask"].to(dtype)
    real = padding["attention_mask"].bool()
    other = torch.where(real, ids, 11)
    assert torch.equal(model(ids, **padding).logits[real], model(other, **padding).logits[real])


@pytest.mark.parametrize("use_cache", [False, True])
def test_a_row_of_padding_does_no_harm(make, rows, use_cache):
    model = ls.sparsify(make(), "Local(4)")
    ids, padding = pad(rows, SIDES["left"])
    padding["attention_mask"][1] = 0
    logits = model(ids, **padding, use_cache=use_cache).logits
    assert logits.isfinite().all()
    torch.testing.assert_close(logits[0, -5:], model(rows[0][None]).logits[0], rtol=1e-9, atol=1e-9)


@pytest.mark.parametrize("mask", [[1, 0, 1, 1], [0, 1, 0, 1], [1, 1, 0, 1]])
def test_a_hole_in_the_mask_is_refused(make, mask):
    model = ls.sparsify(make(), "Local(4)")
    with pytest.raises(ls.ArgumentError, match="padding between the real tokens of a row"):
        model(torch.ones(1, 4, dtype=torch.long), attention_mask=torch.tensor([mask]))


DOCUMENTS = (3, 1, 8, 5)


@pytest.mark.parametrize("patterns", PATTERNS, ids=str)
@pytest.mark.parametrize("name", ["llama", "mistral", "gpt2"])
def test_packed_documents_equal_the_documents_alone(make, patterns, name):
    model = ls.sparsify(make(name), patterns)
    model.config.use_cache = False  # transformers looks for packing where there is no cache
    ids = torch.randint(1, 31, (2, sum(DOCUMENTS)), generator=torch.Generator().manual_seed(2))
    positions = torch.cat([torch.arange(length) for length in DOCUMENTS])[None]
    logits = model(ids, position_ids=positions).logits
    for row in range(2):
        alone = [model(document[None]).logits[0] for document in ids[row].split(DOCUMENTS)]
        torch.testing.assert_close(logits[row], torch.cat(alone), rtol=1e-9, atol=1e-9)


def test_packing_that_the_collator_of_transformers_makes(make):
    from transformers import DataCollatorWithFlattening

    model = ls.sparsify(make(), "Fixed(4, 1)")
    generator = torch.Generator().manual_seed(2)
    documents = [{"input_ids": torch.randint(1, 31, (length,), generator=generator).tolist()} for length in DOCUMENTS]
    plain = DataCollatorWithFlattening(return_position_ids=True)(documents)
    flash = DataCollatorWithFlattening(return_flash_attn_kwargs=True)(documents)
    alone = [model(torch.tensor(document["input_ids"])[None], use_cache=False).logits[0] for document in documents]
    for batch in (plain, flash):
        batch.pop("labels")
        logits = model(**batch, use_cache=False).logits
        torch.testing.assert_close(logits[0], torch.cat(alone), rtol=1e-9, atol=1e-9)


@pytest.mark.parametrize("name", ["llama", "mistral", "gpt2"])
@pytest.mark.parametrize(
    "inputs", [{}, {"use_cache": False, "attention_mask": torch.ones(1, 6)}], ids=["cache", "mask"]
)
def test_packing_that_transformers_does_not_see_is_refused_not_mixed(make, name, inputs):
    model = ls.sparsify(make(name), "Local(4)")
    packed = torch.tensor([[0, 1, 2, 0, 1, 2]])
    with pytest.raises(ls.ArgumentError, match=r"position_ids begin again within a row.*use_cache=False"):
        model(torch.ones(1, 6, dtype=torch.long), position_ids=packed, **inputs)


@pytest.mark.parametrize("side", ["left", "right"])
def test_packing_with_padding_is_refused_not_mixed(make, side):
    model = ls.sparsify(make(), "Local(4)")
    mask = torch.ones(2, 8, dtype=torch.long)
    mask[:, slice(0, 2) if side == "left" else slice(6, 8)] = 0
    positions = torch.zeros(2, 8, dtype=torch.long)
    positions[mask.bool()] = torch.tensor([0, 1, 2, 0, 1, 2] * 2)
    with pytest.raises(ls.ArgumentError, match="position_ids begin again within a row"):
        model(torch.ones(2, 8, dtype=torch.long), position_ids=positions, attention_mask=mask, use_cache=False)


OFFSETS = {"cu_seq_lens_q": torch.tensor([0, 4, 10, 14, 20], dtype=torch.int32), "max_length_q": 6}


@pytest.mark.parametrize("name", ["bert", "modernbert"])
def test_documents_of_an_encoder_are_told_apart_by_their_offsets(make, name):
    model = ls.sparsify(make(name), "Local(3, lookahead=2)")
    ids = torch.randint(1, 31, (2, 10), generator=torch.Generator().manual_seed(2))
    positions = torch.tensor([[*range(4), *range(6)]])
    out = model(ids, position_ids=positions, **OFFSETS).last_hidden_state
    for row in range(2):
        alone = [model(document[None]).last_hidden_state[0] for document in ids[row].split((4, 6))]
        torch.testing.assert_close(out[row], torch.cat(alone), rtol=1e-9, atol=1e-9)
    if name == "bert":  # which tells its layers the positions
        with pytest.raises(ls.ArgumentError, match=r"in decoders alone.*or also pass cu_seq_lens_q and max_length_q"):
            model(ids, position_ids=positions)


def test_offsets_that_cannot_be_kept_to_are_refused(make, tokens):
    model, ids = ls.sparsify(make(), "Local(4)"), tokens[:, :10]
    with pytest.raises(ls.ArgumentError, match="cu_seq_lens_q without max_length_q"):
        model(ids, cu_seq_lens_q=OFFSETS["cu_seq_lens_q"], use_cache=False)
    mask = torch.ones_like(ids)
    mask[0, :2] = 0
    for inputs in ({"attention_mask": mask}, {"past_key_values": SparsifiedCache(model.config)}):
        with torch.no_grad(), pytest.raises(ls.ArgumentError, match="cu_seq_lens_q packs documents in rows without"):
            model(ids, **OFFSETS, **inputs)


@pytest.mark.parametrize("kind", [DynamicCache, lambda: None])
def test_a_mask_of_too_few_tokens_is_refused(make, tokens, kind):
    model, cache = ls.sparsify(make(), "Local(4)"), kind()
    mask = torch.ones_like(tokens)
    if cache is not None:
        model(tokens[:, :10], attention_mask=mask[:, :10], past_key_values=cache)
        tokens = tokens[:, 10:]
    with pytest.raises(ls.ArgumentError, match=r"attention_mask of 10 tokens for 20: .*the cache has seen included"):
        model(tokens, attention_mask=mask[:, 10:], past_key_values=cache)


@pytest.mark.parametrize("shape", [(1, 6), (3, 6), (2, 2, 6)], ids=str)
def test_a_mask_of_another_batch_is_refused(make, shape):
    model = ls.sparsify(make(), "Local(4)")
    with pytest.raises(ls.ArgumentError, match=r"attention_mask has shape .*: it must be \[batch, length\]"):
        model(torch.ones(2, 6, dtype=torch.long), attention_mask=torch.ones(shape))
