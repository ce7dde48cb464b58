import pytest
import torch

from longstride.errors import ArgumentError

LENGTHS = (5, 16, 9, 1)


@pytest.fixture
def rows():
    generator = torch.Generator().manual_seed(4)
    return [torch.randint(1, 17, (length,), generator=generator) for length in LENGTHS]


def pad(rows, length, offset):
    """Rows in a batch [rows, length] with their mask; offset(row length) pads on the left."""
    ids, mask = torch.zeros(len(rows), length, dtype=torch.long), torch.zeros(len(rows), length, dtype=torch.long)
    for index, row in enumerate(rows):
        start = offset(len(row))
        ids[index, start : start + len(row)] = row
        mask[index, start : start + len(row)] = 1
    return ids, mask


SIDES = {
    "left": lambda length: 16 - length,
    "right": lambda _: 0,
    "both": lambda length: (16 - length) // 2,
}


@pytest.mark.parametrize("side", SIDES)
@pytest.mark.parametrize(
    "patterns", [["Local(4)", "Strided(4)"], "Fixed(4, 1)", "per_head(BlockLocal(4), Strided(3))"], ids=str
)
@pytest.mark.parametrize("mask_dtype", [torch.long, torch.bool, torch.float32], ids=str)
def test_a_padded_row_equals_the_row_alone(make_model, rows, side, patterns, mask_dtype):
    model = make_model(patterns=patterns)
    ids, mask = pad(rows, 16, SIDES[side])
    logits = model(ids, attention_mask=mask.to(mask_dtype)).logits
    for index, row in enumerate(rows):
        torch.testing.assert_close(
            logits[index][mask[index].bool()], model(row[None]).logits[0], rtol=1e-10, atol=1e-10
        )


@pytest.mark.parametrize("side", SIDES)
def test_what_stands_in_the_padding_changes_nothing(make_model, rows, side):
    model = make_model()
    ids, mask = pad(rows, 16, SIDES[side])
    other = torch.where(mask.bool(), ids, 11)
    kept = mask.bool()
    assert torch.equal(model(ids, attention_mask=mask).logits[kept], model(other, attention_mask=mask).logits[kept])


def test_gradients_and_loss_of_left_padding(make_model, rows):
    model = make_model()
    ids, mask = pad(rows, 16, SIDES["left"])
    loss = model(ids, attention_mask=mask, labels=torch.where(mask.bool(), ids, -100), num_items_in_batch=1).loss
    loss.backward()
    padded = [parameter.grad.clone() for parameter in model.parameters()]
    model.zero_grad()
    # A first real token has a label, which the last padding position would predict: it is not part of a row alone.
    first = sum(
        torch.nn.functional.cross_entropy(model(ids, attention_mask=mask).logits[index, 15 - len(row)].float(), row[0])
        for index, row in enumerate(rows)
        if len(row) < 16
    )
    alone = sum(model(row[None], labels=row[None], num_items_in_batch=1).loss for row in rows if len(row) > 1)
    torch.testing.assert_close(loss, alone + first, rtol=1e-5, atol=1e-5)
    (alone + first).backward()
    for ours, parameter in zip(padded, model.parameters(), strict=True):
        torch.testing.assert_close(ours, parameter.grad, rtol=1e-4, atol=1e-4)


def test_hidden_states_and_embeddings_follow_the_mask(make_model, rows):
    model = make_model()
    ids, mask = pad(rows, 16, SIDES["left"])
    states = model(ids, attention_mask=mask, output_hidden_states=True).hidden_states
    alone = model(rows[0][None], output_hidden_states=True).hidden_states
    for padded, single in zip(states, alone, strict=True):
        torch.testing.assert_close(padded[0, -5:], single[0])
    embeds = model.get_input_embeddings()(ids)
    assert torch.equal(model(inputs_embeds=embeds, attention_mask=mask).logits, model(ids, attention_mask=mask).logits)


def test_a_row_of_padding_does_no_harm(make_model, rows):
    model = make_model()
    ids, mask = pad(rows, 16, SIDES["left"])
    mask[1] = 0
    logits = model(ids, attention_mask=mask).logits
    assert logits.isfinite().all()
    torch.testing.assert_close(logits[0, -5:], model(rows[0][None]).logits[0])


def test_position_ids_that_agree_with_the_mask_are_accepted(make_model, rows):
    model = make_model()
    ids, mask = pad(rows, 16, SIDES["left"])
    positions = (mask.cumsum(-1) - 1).clamp(min=0)
    assert torch.equal(
        model(ids, attention_mask=mask, position_ids=positions).logits, model(ids, attention_mask=mask).logits
    )
    counted = torch.arange(16)[None]
    assert torch.equal(model(ids, position_ids=counted).logits, model(ids).logits)


@pytest.mark.parametrize("masked", [False, True])
def test_other_position_ids_are_refused(make_model, masked):
    ids = torch.ones(1, 6, dtype=torch.long)
    # Packed documents go without a mask; without one, positions that leave some out are no documents either.
    other = torch.tensor([[0, 1, 2, 0, 1, 2] if masked else [0, 1, 2, 4, 5, 6]])
    with pytest.raises(ArgumentError, match=r"position_ids must count 0, 1, 2, .* in each packed document"):
        make_model()(ids, position_ids=other, attention_mask=torch.ones_like(ids) if masked else None)


@pytest.mark.parametrize("mask", [[1, 0, 1, 1], [0, 1, 0, 1], [1, 1, 0, 1]])
def test_a_hole_in_the_mask_is_refused(make_model, mask):
    with pytest.raises(ArgumentError, match="padding between the real tokens"):
        make_model()(torch.ones(1, 4, dtype=torch.long), attention_mask=torch.tensor([mask]))


@pytest.mark.parametrize("shape", [(1, 5), (2, 4), (1, 1, 4, 4)])
def test_a_mask_of_another_shape_is_refused(make_model, shape):
    with pytest.raises(ArgumentError, match=r"it must be \[batch, length\] = \(1, 4\)"):
        make_model()(torch.ones(1, 4, dtype=torch.long), attention_mask=torch.ones(shape))
