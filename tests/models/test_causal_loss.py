"""The model's loss in training: equal to the plain one, in memory that does not grow with length x vocabulary."""

import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch

import longstride as ls
from longstride.nn import token_loss


@pytest.fixture(autouse=True)
def chunks_of_five_tokens(monkeypatch):
    monkeypatch.setattr(token_loss, "FEWEST_TOKENS", 5)
    monkeypatch.setattr(token_loss, "CHUNK_LOGITS", 1)


def both(model, *arguments, **options):
    """(loss, gradients, logits) of the same call in training and in evaluation; the model has no dropout."""
    results = []
    for training in (True, False):
        model.train(training)
        model.zero_grad()
        output = model(*arguments, **options)
        output.loss.backward()
        results.append((output.loss.detach(), [p.grad.clone() for p in model.parameters()], output.logits))
    return results


@pytest.mark.parametrize("tied", [False, True], ids=["untied", "tied"])
@pytest.mark.parametrize("items", [None, 100, torch.tensor(31)], ids=["mean", "int", "tensor"])
def test_loss_and_gradients_are_those_of_the_logits(make_model, tokens, tied, items):
    model = make_model(dtype=torch.float32, tie_word_embeddings=tied)
    labels = tokens.clone()
    labels[0, :12] = -100
    options = {} if items is None else {"num_items_in_batch": items}
    (loss, gradients, logits), (plain, expected, whole) = both(model, tokens, labels=labels, **options)
    assert logits is None
    assert whole.shape == (2, 23, 17)
    torch.testing.assert_close(loss, plain, rtol=1e-6, atol=1e-6)
    for ours, theirs in zip(gradients, expected, strict=True):
        torch.testing.assert_close(ours, theirs, rtol=2e-5, atol=2e-6)


@pytest.mark.parametrize("options", [{"ignore_index": 3}, {"shift_labels": torch.arange(46).view(2, 23) % 17}], ids=str)
def test_the_other_arguments_of_the_loss(make_model, tokens, options):
    (loss, _, _), (plain, _, _) = both(make_model(dtype=torch.float32), tokens, labels=tokens, **options)
    torch.testing.assert_close(loss, plain)


def test_padded_rows(make_model, tokens):
    mask = torch.ones_like(tokens)
    mask[1, :9] = 0
    labels = torch.where(mask.bool(), tokens, -100)
    (loss, _, _), (plain, _, _) = both(make_model(), tokens, attention_mask=mask, labels=labels)
    torch.testing.assert_close(loss, plain)


def test_a_batch_in_which_nothing_counts_is_nan_as_the_plain_mean(make_model, tokens):
    (loss, _, _), (plain, _, _) = both(make_model(), tokens, labels=torch.full_like(tokens, -100))
    assert loss.isnan()
    assert plain.isnan()


def test_autocast(make_model, tokens):
    model = make_model(dtype=torch.float32)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        (loss, gradients, _), (plain, expected, _) = both(model, tokens, labels=tokens)
    assert loss.dtype == torch.float32
    torch.testing.assert_close(loss, plain, rtol=1e-6, atol=1e-6)
    for ours, theirs in zip(gradients, expected, strict=True):
        # Chunks of a weight's gradient are rounded to bfloat16 each.
        assert (ours - theirs).norm() <= 0.02 * theirs.norm()


def test_logits_to_keep_and_a_loss_of_one_s_own_have_logits(make_model, tokens):
    model = make_model(dtype=torch.float32).train()
    assert model(tokens).logits.shape == (2, 23, 17)
    every = torch.arange(23)
    assert model(tokens, labels=tokens, logits_to_keep=every).logits.shape == (2, 23, 17)
    model.loss_function = lambda logits, labels, **_: logits.sum() + labels.sum()
    output = model(tokens, labels=tokens)
    torch.testing.assert_close(output.loss, output.logits.sum() + tokens.sum())


def test_tuples_begin_with_the_loss(make_model, tokens):
    model = make_model().train()
    assert torch.equal(model(tokens, labels=tokens, return_dict=False)[0], model(tokens, labels=tokens).loss)


@pytest.mark.slow
@pytest.mark.usefixtures("fresh_compiler")
def test_compiles_in_training_without_a_graph_break(make_model, tokens):
    model = make_model(dtype=torch.float32).train()
    loss = torch.compile(model, fullgraph=True, backend="aot_eager")(tokens, labels=tokens).loss
    loss.backward()
    compiled = [parameter.grad.clone() for parameter in model.parameters()]
    model.zero_grad()
    plain = model(tokens, labels=tokens).loss
    plain.backward()
    torch.testing.assert_close(loss, plain)
    for ours, parameter in zip(compiled, model.parameters(), strict=True):
        torch.testing.assert_close(ours, parameter.grad)


PROGRAM = """
import pathlib, sys, torch
from longstride import SparseTransformerConfig, SparseTransformerForCausalLM
length, vocab_size = 8192, 8192
model = SparseTransformerForCausalLM(SparseTransformerConfig(
    vocab_size=vocab_size, hidden_size=16, num_hidden_layers=1, num_attention_heads=1, max_position_embeddings=length,
    patterns="Local(16)",
))
model.train(sys.argv[1] == "train")
tokens = torch.zeros(1, length, dtype=torch.long)
model(tokens[:, :600], labels=tokens[:, :600]).loss.backward()  # what PyTorch loads when first used
def peak():  # of this program: what getrusage says may be that of the program which started it
    lines = pathlib.Path("/proc/self/status").read_text().splitlines()
    return int(next(line for line in lines if line.startswith("VmHWM")).split()[1])
before = peak()
model(tokens, labels=tokens).loss.backward()
print((peak() - before) / 1024)
"""


@pytest.mark.skipif(sys.platform != "linux", reason="the peak is read where Linux writes it")
def test_training_never_takes_the_memory_of_the_logits():
    """8192 x 8192 float32 logits are 256 MiB, and the plain loss holds them at least twice."""
    paths = [str(Path(ls.__file__).parents[1]), os.environ.get("PYTHONPATH", "")]
    environment = os.environ | {"PYTHONPATH": os.pathsep.join(filter(None, paths))}
    # Freed memory goes back at once, so that the peak is what was in use and not what malloc kept.
    environment["MALLOC_MMAP_THRESHOLD_"] = str(2**20)
    megabytes = {}
    for mode in ("train", "eval"):
        command = [sys.executable, "-c", PROGRAM, mode]
        done = subprocess.run(command, capture_output=True, text=True, check=False, env=environment)
        assert done.returncode == 0, done.stderr
        megabytes[mode] = float(done.stdout)
    assert megabytes["eval"] > 400
    assert megabytes["train"] < 256  # not even once
