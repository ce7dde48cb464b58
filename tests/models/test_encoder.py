"""Encoders: padding on any side, both blocks, saving, checkpointing, compilation, and which patterns they take."""

import pytest
import torch
from transformers import AutoModelForMaskedLM, AutoModelForSequenceClassification

import longstride as ls
from longstride.errors import ArgumentError, PatternError, UnsupportedError
from longstride.models import (
    RECOMPUTE,
    SparseTransformerConfig,
    SparseTransformerForCausalLM,
    SparseTransformerForMaskedLM,
    SparseTransformerForSequenceClassification,
    SparseTransformerModel,
    recompute_in_backward,
)

LONGFORMER = "Local(5, lookahead=4) | Global(2, causal=False)"
# Which blocks are drawn depends on the length, and so on what of a row is real.
BIGBIRD = str(ls.bigbird(4, global_blocks=1, random_blocks=1))
SCATTERED = [
    "Local(3, lookahead=2) | Global((0, 7), causal=False)",
    "Strided(4, causal=False) | Global(1, causal=False)",
]
LENGTHS = (5, 16, 9, 1)
SIDES = {
    "left": lambda length: 16 - length,
    "right": lambda _: 0,
    "both": lambda length: (16 - length) // 2,
}


def make(model=SparseTransformerForMaskedLM, dtype=torch.float64, **changes):
    """A small encoder whose logits are not all zero."""
    small = {
        "vocab_size": 17,
        "hidden_size": 16,
        "num_hidden_layers": 2,
        "num_attention_heads": 2,
        "max_position_embeddings": 48,
        "patterns": LONGFORMER,
        "initializer_scale": 1.0,
    }
    torch.manual_seed(0)
    made = model(SparseTransformerConfig(**(small | changes)))
    if model is SparseTransformerForMaskedLM:
        torch.nn.init.normal_(made.lm_head.weight)
    return made.to(dtype).eval()


@pytest.fixture(params=["sparse_transformer", "modern"])
def block(request):
    return request.param


@pytest.fixture
def rows():
    generator = torch.Generator().manual_seed(4)
    return [torch.randint(17, (length,), generator=generator) for length in LENGTHS]


def pad(rows, side):
    """Rows in a batch [rows, 16] with their mask."""
    ids, mask = torch.zeros(len(rows), 16, dtype=torch.long), torch.zeros(len(rows), 16, dtype=torch.long)
    for index, row in enumerate(rows):
        start = SIDES[side](len(row))
        ids[index, start : start + len(row)] = row
        mask[index, start : start + len(row)] = 1
    return ids, mask


@pytest.mark.parametrize("side", SIDES)
@pytest.mark.parametrize("global_projections", ["shared", "separate"])
@pytest.mark.parametrize("patterns", [LONGFORMER, BIGBIRD, SCATTERED], ids=str)
def test_a_padded_row_equals_the_row_alone(rows, block, side, global_projections, patterns):
    model = make(block=block, patterns=patterns, global_projections=global_projections)
    ids, mask = pad(rows, side)
    logits = model(ids, attention_mask=mask).logits
    for index, row in enumerate(rows):
        alone = model(row[None]).logits[0]
        torch.testing.assert_close(logits[index][mask[index].bool()], alone, rtol=1e-10, atol=1e-10)


@pytest.mark.parametrize("patterns", [LONGFORMER, BIGBIRD, SCATTERED], ids=str)
def test_a_packed_document_equals_the_document_alone(rows, block, patterns):
    model = make(block=block, patterns=patterns)
    packed = torch.cat(rows)[None]
    alone = torch.cat([model(row[None]).logits[0] for row in rows])
    positions = torch.cat([torch.arange(len(row)) for row in rows])[None]
    offsets = torch.tensor([0, *LENGTHS]).cumsum(0)
    for said in ({"position_ids": positions}, {"cu_seq_lens_q": offsets, "max_length_q": max(LENGTHS)}):
        torch.testing.assert_close(model(packed, **said).logits[0], alone, rtol=1e-10, atol=1e-10)
    separate = make(block=block, global_projections="separate")
    with pytest.raises(UnsupportedError, match="give each document a row of its own"):
        separate(packed, position_ids=positions)


def test_a_classifier_refuses_packed_documents(rows):
    model = make(SparseTransformerForSequenceClassification)
    packed = torch.cat(rows)[None]
    positions = torch.cat([torch.arange(len(row)) for row in rows])[None]
    for said in ({"position_ids": positions}, {"cu_seq_lens_q": torch.tensor([0, *LENGTHS]).cumsum(0)}):
        with pytest.raises(UnsupportedError, match="a row has one class; give each document a row of its own"):
            model(packed, **said)
    one = torch.arange(len(rows[1]))[None]
    assert torch.equal(model(rows[1][None], position_ids=one).logits, model(rows[1][None]).logits)


@pytest.mark.parametrize("side", SIDES)
def test_the_class_of_a_padded_row_is_that_of_the_row_alone(rows, block, side):
    model = make(SparseTransformerForSequenceClassification, block=block, num_labels=3)
    ids, mask = pad(rows, side)
    labels = torch.tensor([0, 2, 1, 2])
    output = model(ids, attention_mask=mask, labels=labels)
    alone = torch.cat([model(row[None]).logits for row in rows])
    torch.testing.assert_close(output.logits, alone, rtol=1e-10, atol=1e-10)
    torch.testing.assert_close(output.loss, torch.nn.functional.cross_entropy(alone, labels))


@pytest.mark.parametrize("global_projections", ["shared", "separate"])
def test_padding_gets_no_gradient_and_gives_none(rows, block, global_projections):
    model = make(block=block, global_projections=global_projections)
    ids, mask = pad(rows, "left")
    labels = torch.where(mask.bool(), ids, -100)
    model(ids, attention_mask=mask, labels=labels, num_items_in_batch=1).loss.backward()
    padded = [parameter.grad.clone() for parameter in model.parameters()]
    model.zero_grad()
    sum(model(row[None], labels=row[None], num_items_in_batch=1).loss for row in rows).backward()
    for ours, parameter in zip(padded, model.parameters(), strict=True):
        torch.testing.assert_close(ours, parameter.grad, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("global_projections", ["shared", "separate"])
def test_a_row_of_padding_does_no_harm(rows, global_projections):
    model = make(SparseTransformerForSequenceClassification, global_projections=global_projections, num_labels=3)
    ids, mask = pad(rows, "left")
    mask[1] = 0
    logits = model(ids, attention_mask=mask).logits
    logits.sum().backward()
    assert logits.isfinite().all()
    assert all(parameter.grad.isfinite().all() for parameter in model.parameters())
    torch.testing.assert_close(logits[0], model(rows[0][None]).logits[0])


def test_a_mask_of_ones_changes_nothing(rows):
    model = make()
    assert torch.equal(model(rows[1][None], attention_mask=torch.ones(1, 16)).logits, model(rows[1][None]).logits)


def test_the_loss_of_training_is_that_of_evaluation(rows):
    model = make()
    ids, mask = pad(rows, "right")
    labels = torch.where(mask.bool() & (torch.arange(16) % 3 == 0), ids, -100)
    with_logits = model(ids, attention_mask=mask, labels=labels)
    by_chunks = model.train()(ids, attention_mask=mask, labels=labels)
    assert by_chunks.logits is None
    torch.testing.assert_close(by_chunks.loss, with_logits.loss)
    counted = labels != -100
    expected = torch.nn.functional.cross_entropy(with_logits.logits[counted].float(), labels[counted])
    torch.testing.assert_close(with_logits.loss, expected)


def test_every_token_sees_both_sides():
    model = make(patterns="Local(2, lookahead=1)")
    ids = torch.zeros(1, 9, dtype=torch.long)
    other = ids.clone()
    other[0, 4] = 5
    changed = (model(ids).logits != model(other).logits).any(-1)[0]
    assert changed.nonzero().flatten().tolist() == [2, 3, 4, 5, 6]  # one on either side a layer


def test_separate_projections_change_the_rows_of_global_tokens_alone():
    model = make(num_hidden_layers=1, global_projections="separate", patterns="Full() | Global((1, 5), causal=False)")
    ids = torch.arange(9)[None]
    before = model(ids).logits
    torch.nn.init.normal_(model.model.layers[0].attention.global_projections.q_proj.weight)
    changed = (model(ids).logits != before).any(-1)[0]
    assert changed.nonzero().flatten().tolist() == [1, 5]


@pytest.mark.parametrize("global_projections", ["shared", "separate"])
def test_saving_and_loading_by_auto_classes(tmp_path, block, global_projections, rows):
    model = make(dtype=torch.float32, block=block, global_projections=global_projections)
    model.save_pretrained(tmp_path)
    loaded, report = AutoModelForMaskedLM.from_pretrained(tmp_path, output_loading_info=True)
    assert type(loaded) is SparseTransformerForMaskedLM
    assert not any(report[name] for name in ("missing_keys", "unexpected_keys", "mismatched_keys"))
    ids, mask = pad(rows, "right")
    assert torch.equal(loaded.eval()(ids, attention_mask=mask).logits, model(ids, attention_mask=mask).logits)
    # All but the classifier, which starts anew.
    classifier, report = AutoModelForSequenceClassification.from_pretrained(
        tmp_path, num_labels=5, output_loading_info=True
    )
    assert set(report["missing_keys"]) == {"classifier.weight", "classifier.bias"}
    assert set(report["unexpected_keys"]) == {"lm_head.weight"}
    assert classifier(ids, attention_mask=mask).logits.shape == (4, 5)
    assert classifier.classifier.weight.std() < 1
    for name, weight in model.model.state_dict().items():
        assert torch.equal(classifier.model.state_dict()[name], weight)


def test_tied_logit_weights(tmp_path):
    model = make(dtype=torch.float32, tie_word_embeddings=True)
    assert model.lm_head.weight is model.model.embed_tokens.weight
    model.save_pretrained(tmp_path)
    loaded = SparseTransformerForMaskedLM.from_pretrained(tmp_path)
    assert loaded.lm_head.weight is loaded.model.embed_tokens.weight
    assert torch.equal(loaded.lm_head.weight, model.lm_head.weight)


@pytest.mark.parametrize("masked", [False, True])
def test_recomputation_changes_no_gradient(rows, block, masked):
    ids, mask = pad(rows, "left")
    options = {"attention_mask": mask} if masked else {}
    model = make(block=block, global_projections="separate", dropout=0.2).train()
    found = []
    for what in RECOMPUTE:
        recompute_in_backward(model, what)
        model.zero_grad()
        torch.manual_seed(3)
        model(ids, labels=ids, **options).loss.backward()
        found.append([parameter.grad.clone() for parameter in model.parameters()])
    for other in found[1:]:
        for ours, theirs in zip(other, found[0], strict=True):
            torch.testing.assert_close(ours, theirs)


@pytest.mark.slow
@pytest.mark.filterwarnings("ignore:.*torch.jit.script_method.*:DeprecationWarning")  # PyTorch's own
def test_compiles_without_a_graph_break(rows):
    torch.compiler.reset()
    model = make(
        SparseTransformerForSequenceClassification,
        block="modern",
        global_projections="separate",
        num_hidden_layers=1,
    )
    # With the decompositions of inductor, whose code would take longer to build.
    compiled = torch.compile(model, fullgraph=True, backend="aot_eager_decomp_partition")
    ids, mask = pad(rows, "left")
    labels = torch.tensor([0, 1, 1, 0])
    found = []
    for either in (model, compiled):
        model.zero_grad()
        output = either(ids, attention_mask=mask, labels=labels)
        output.loss.backward()
        found.append([output.logits, *(parameter.grad for parameter in model.parameters())])
    for ours, theirs in zip(*found, strict=True):
        torch.testing.assert_close(ours, theirs)
    torch.compiler.reset()


def test_autocast(rows, block):
    model = make(
        SparseTransformerForSequenceClassification, dtype=torch.float32, block=block, global_projections="separate"
    )
    ids, mask = pad(rows, "left")
    with torch.autocast("cpu", dtype=torch.bfloat16):
        loss = model(ids, attention_mask=mask, labels=torch.tensor([0, 1, 1, 0])).loss
    loss.backward()
    assert all(parameter.grad.isfinite().all() for parameter in model.parameters())


@pytest.mark.parametrize("model", [SparseTransformerForMaskedLM, SparseTransformerForSequenceClassification])
@pytest.mark.parametrize("patterns", ["Local(8)", [LONGFORMER, "Strided(4)"]], ids=str)
def test_a_causal_pattern_is_refused(model, patterns):
    with pytest.raises(PatternError, match=r"this pattern lets no token attend to later ones, .* causal=False"):
        make(model, patterns=patterns)


def test_a_language_model_refuses_an_encoder_s_pattern():
    with pytest.raises(PatternError, match=r"later ones, and a causal language model predicts those"):
        make(SparseTransformerForCausalLM, patterns=["Local(4)", LONGFORMER])


def test_an_encoder_has_no_cache_and_no_weights():
    model = make(SparseTransformerModel)
    ids = torch.zeros(1, 4, dtype=torch.long)
    assert model(ids).past_key_values is None
    with pytest.raises(PatternError, match="a cache is for patterns in which no query reads a later key"):
        model(ids, use_cache=True)
    with pytest.raises(PatternError, match="lets a token attend to later ones"):
        make(block="modern", memory=8)
    with pytest.raises(UnsupportedError, match="never forms its weights"):
        make()(ids, output_attentions=True)
    with pytest.raises(ArgumentError, match="the sequence has 49 tokens"):
        make()(torch.zeros(1, 49, dtype=torch.long))


def test_the_names_are_at_the_top_of_the_package():
    assert ls.SparseTransformerForMaskedLM is SparseTransformerForMaskedLM
    assert ls.SparseTransformerForSequenceClassification is SparseTransformerForSequenceClassification
