"""What a mask function is asked travels through the layers, and only where it still holds."""

import pytest
import torch
from transformers import LlamaConfig
from transformers.masking_utils import create_bidirectional_mask, create_causal_mask

import longstride.integrations.transformers  # noqa: F401 - so that transformers knows the attention
from longstride.integrations.transformers.placement import Placement

CONFIG = LlamaConfig(attn_implementation="longstride")


def placed(make_mask=create_causal_mask, mask=None, length=6, **inputs):
    given = {"past_key_values": None} | inputs
    embeds = torch.zeros(2 if mask is None else len(mask), length, 8)
    return make_mask(config=CONFIG, inputs_embeds=embeds, attention_mask=mask, **given)


def test_it_is_a_mask_of_no_elements():
    made = placed()
    assert isinstance(made, Placement)
    assert (made.shape, made.numel()) == ((2, 1, 6, 0), 0)
    facts = made.facts
    assert (facts.q_len, facts.kv_len, facts.q_offset, facts.kv_offset, facts.is_causal) == (6, 6, 0, 0, True)
    assert (facts.real, facts.documents, facts.restarts) == (None, None, None)
    assert not placed(create_bidirectional_mask).facts.is_causal


def test_a_padded_batch_is_never_without_a_mask():
    mask = torch.tensor([[0, 0, 1, 1, 1, 1], [1, 1, 1, 1, 1, 0]])
    for make_mask in (create_causal_mask, create_bidirectional_mask):
        facts = placed(make_mask, mask).facts
        assert torch.equal(facts.real, mask.bool())
        # Left padding, content, right padding of either row, one after another.
        assert facts.documents.tolist() == [0, 2, 6, 6, 6, 11, 12]
    assert placed(mask=torch.ones(2, 6)).facts.real is None


def test_packed_documents_begin_where_positions_do():
    positions = torch.tensor([[0, 1, 0, 1, 2, 3], [0, 1, 2, 3, 4, 0]])
    assert placed(position_ids=positions).facts.documents.tolist() == [0, 2, 6, 11, 12]
    assert placed(position_ids=torch.arange(6)[None]).facts.documents is None


@pytest.mark.parametrize("same", [torch.detach, torch.clone, lambda x: x.to("cpu"), lambda x: x.contiguous()])
def test_facts_stay_with_the_same_mask(same):
    made = placed(mask=torch.tensor([[0, 1, 1, 1, 1, 1]]))
    assert same(made).facts is made.facts


def test_facts_follow_to_another_device():
    made = placed(mask=torch.tensor([[0, 1, 1, 1, 1, 1]])).to("meta")
    assert (made.facts.real.device.type, made.facts.documents.device.type, made.facts.q_len) == ("meta", "meta", 6)


@pytest.mark.parametrize(
    "other", [lambda x: x[:1], lambda x: x.repeat(2, 1, 1, 1), lambda x: x[:, :, :3], torch.zeros_like]
)
def test_facts_do_not_stay_with_another(other):
    changed = other(placed())
    assert not isinstance(changed, Placement) or changed.facts is None
