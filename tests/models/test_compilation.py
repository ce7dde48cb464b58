"""Compiled blocks: the same training steps, one graph for equal blocks, and a model that is as it was."""

import pytest
import torch
from torch._dynamo.utils import counters

from longstride.backends import torch as torch_backend
from longstride.models import SegmentMemory, compiled_blocks, recompute_in_backward

pytestmark = [
    pytest.mark.usefixtures("fresh_compiler"),
    # Dynamo looks at `.grad` of what it is given, and silences the warning itself where warnings are no errors.
    pytest.mark.filterwarnings("ignore:The .grad attribute of a Tensor that is not a leaf:UserWarning"),
]


def steps(model, tokens, count=2):
    """Losses and weights after so many steps of AdamW."""
    optimizer = torch.optim.AdamW(model.parameters(), lr=0.01)
    losses = []
    for _ in range(count):
        loss = model(tokens, labels=tokens).loss
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        losses.append(loss.detach())
    return [*losses, *(parameter.detach().clone() for parameter in model.parameters())]


@pytest.mark.parametrize(
    ("block", "what"), [("modern", "nothing"), ("modern", "blocks"), ("sparse_transformer", "all_but_attention")]
)
def test_the_same_steps_and_a_graph_a_pattern(make_model, tokens, block, what):
    options = {"block": block, "patterns": ["Local(4)", "Strided(4)"], "num_hidden_layers": 4}
    plain, compiled = (make_model(**options).train() for _ in range(2))
    names = list(compiled.state_dict())
    recompute_in_backward(compiled, what)
    counters.clear()
    with compiled_blocks(compiled, backend="aot_eager"):
        found = steps(compiled, tokens)
        # Fullgraph would have raised at a break; two patterns, the last norm and the loss.
        assert counters["stats"]["unique_graphs"] == 4
        assert list(compiled.state_dict()) == names
    for ours, theirs in zip(found, steps(plain, tokens), strict=True):
        torch.testing.assert_close(ours, theirs)


@pytest.mark.parametrize(("what", "forwards"), [("nothing", 3), ("blocks", 6), ("all_but_attention", 3)])
def test_what_is_computed_twice(make_model, tokens, monkeypatch, what, forwards):
    model = make_model(patterns="Local(4)").train()
    recompute_in_backward(model, what)
    with compiled_blocks(model, backend="aot_eager"):
        model(tokens, labels=tokens).loss.backward()  # compiles, for which the operator is called as well
        calls = []
        forward = torch_backend.forward
        monkeypatch.setattr(torch_backend, "forward", lambda *given: calls.append(given) or forward(*given))
        model(tokens, labels=tokens).loss.backward()
    assert len(calls) == forwards


@pytest.mark.slow
@pytest.mark.filterwarnings("ignore:.*is deprecated:DeprecationWarning")  # PyTorch's own, where it loads the inductor
def test_inductor_under_autocast(make_model, tokens):
    options = {"patterns": ["Local(4)"], "num_hidden_layers": 1, "dtype": torch.float32}
    plain, compiled = (make_model(**options).train() for _ in range(2))
    found = []
    with torch.autocast("cpu", dtype=torch.bfloat16):
        with compiled_blocks(compiled):
            found.append(compiled(tokens, labels=tokens).loss)
        found.append(plain(tokens, labels=tokens).loss)
    for loss in found:
        loss.backward()
    torch.testing.assert_close(*found, rtol=1e-3, atol=1e-3)
    for ours, theirs in zip(compiled.parameters(), plain.parameters(), strict=True):
        # Two ways of rounding to bfloat16 differ by a few units in its last place.
        assert (ours.grad - theirs.grad).norm() <= 0.05 * theirs.grad.norm()


def test_more_patterns_than_torch_compile_takes_by_itself(make_model, tokens):
    patterns = [f"Local({window})" for window in range(1, 12)]
    model = make_model(patterns=patterns, num_hidden_layers=len(patterns)).train()
    with compiled_blocks(model, backend="eager"):
        assert torch.isfinite(model(tokens, labels=tokens).loss)


@pytest.mark.slow
def test_a_memory_grows_to_more_sizes_than_torch_compile_takes_by_itself(make_model, tokens):
    model = make_model(patterns="Strided(4)", block="modern", initializer_scale=1.0, num_hidden_layers=1, memory=10)
    segments = tokens[:1, :11].split(1, dim=1)
    memory, plain_memory = (SegmentMemory(model.train().config) for _ in range(2))
    with compiled_blocks(model, backend="eager"):
        compiled = [model(segment, memory=memory).logits for segment in segments]
    plain = [model(segment, memory=plain_memory).logits for segment in segments]
    assert memory.seen == plain_memory.seen == [11]
    assert memory.nbytes == plain_memory.nbytes > 0
    torch.testing.assert_close(torch.cat(compiled, 1), torch.cat(plain, 1))


def test_no_size_of_a_memory_is_one_too_many(make_model):
    patterns = ["Strided(4)", "Causal()"]
    model = make_model(patterns=patterns, block="modern", initializer_scale=1.0, num_hidden_layers=2, memory=200)
    with compiled_blocks(model):
        # 1 to 200 tokens, in rows that have equally many and in rows that do not, along either pattern.
        assert torch._dynamo.config.recompile_limit >= 800
        assert torch._dynamo.config.accumulated_recompile_limit >= 800


def test_evaluation_and_generation_are_not_compiled(make_model, tokens):
    model = make_model().eval()
    counters.clear()
    with compiled_blocks(model, backend="eager"):
        model(tokens)
        model.generate(tokens[:, :4], max_new_tokens=2, do_sample=False)
    assert not counters["stats"]


def test_afterwards_nothing_is_compiled(make_model, tokens):
    model = make_model().train()
    with compiled_blocks(model, backend="eager"):
        pass
    counters.clear()
    model(tokens, labels=tokens)
    assert not counters["stats"]
