"""Recorded passes: which are recorded, and where gradients are. tests/gpu/test_training_gpu.py has real recordings."""

import pytest
import torch
from torch import nn

from longstride.errors import RecipeError
from longstride.training import Recipe, StepGraph
from longstride.training.step_graph import WARM_UP


class MadeUp(StepGraph):
    """A recording is what would be recorded: the pass, over inputs that stay where they are."""

    def __init__(self, *args):
        super().__init__(*args)
        self.recorded, self.replayed = [], 0

    def _aside(self, batch):
        return self.run(batch)

    def _record(self, batch):
        self.recorded.append({name: x.shape for name, x in batch.items()})
        homes = {x: x.grad.data_ptr() for x in self.gradients}

        def replay(batch):
            self.replayed += 1
            # A graph writes to the addresses that it was recorded with.
            assert {x: x.grad.data_ptr() for x in self.gradients} == homes
            return self.run(batch)

        return replay


@pytest.fixture
def model():
    torch.manual_seed(0)
    return nn.ModuleDict({"used": nn.Linear(4, 4), "unused": nn.Linear(4, 4)})


@pytest.fixture
def graph(model):
    def run(batch):
        loss = model["used"](batch["x"]).square().mean()
        loss.backward()
        return loss.detach()

    return MadeUp(run, model.parameters())


def gradient_of(model, x):
    (grad,) = torch.autograd.grad(model["used"](x).square().mean(), model["used"].weight)
    return grad


def test_passes_are_recorded_after_some_and_give_the_same(model, graph):
    for step in range(WARM_UP + 3):
        x = torch.randn(2, 4)
        loss = graph({"x": x})
        assert loss == model["used"](x).square().mean()
        assert torch.equal(model["used"].weight.grad, gradient_of(model, x))
        assert graph.replayed == max(0, step + 1 - WARM_UP)
        model.zero_grad()
    assert len(graph.recorded) == 1
    assert model["unused"].weight.grad is None


def test_gradients_are_never_there_twice(model, graph):
    """A model whose first pass just fits has no room for another set of them in its second."""
    homes = set()
    for _ in range(WARM_UP + 2):
        graph({"x": torch.randn(2, 4)})
        homes.add(model["used"].weight.grad.data_ptr())
        model.zero_grad()
    assert len(homes) == 1


@pytest.mark.parametrize("to_none", [True, False])
def test_gradients_are_accumulated_until_they_are_dropped(model, graph, to_none):
    for _ in range(WARM_UP + 2):
        batches = [torch.randn(2, 4) for _ in range(3)]
        model.zero_grad(set_to_none=to_none)
        for x in batches:
            graph({"x": x})
        expected = sum(gradient_of(model, x) for x in batches)
        torch.testing.assert_close(model["used"].weight.grad, expected)


def test_every_shape_and_fact_has_a_recording_of_its_own(model, graph):
    for _ in range(WARM_UP + 1):
        graph({"x": torch.randn(2, 4)})
    model.zero_grad()
    # A pass as it is between recorded ones, with gradients of its own and then with those that are there.
    other = torch.randn(3, 4)
    graph({"x": other})
    assert len(graph.recorded) == 1
    same = torch.randn(2, 4)
    graph({"x": same})
    torch.testing.assert_close(model["used"].weight.grad, gradient_of(model, other) + gradient_of(model, same))
    graph({"x": other})
    torch.testing.assert_close(model["used"].weight.grad, 2 * gradient_of(model, other) + gradient_of(model, same))
    for _ in range(WARM_UP):
        graph({"x": other})
        graph({"x": same}, 2)
    graph({"x": same}, 2)
    assert [shapes["x"] for shapes in graph.recorded] == [(2, 4), (3, 4), (2, 4)]


@pytest.mark.parametrize(
    ("key", "value", "set_to"),
    [
        ("run.precision", "fp16", "fp32 or bf16"),
        ("data.documents", "packed", "joined"),
        ("model.memory", 16, "0"),
    ],
)
def test_what_cannot_be_recorded_is_refused(key, value, set_to):
    other = {"data.kind": "documents", "model.block": "modern", key: value}
    with pytest.raises(RecipeError, match=rf"run.cuda_graph with {key} {value!r}: .* set {key} to {set_to}, or leave"):
        Recipe().override({"run.cuda_graph": True, **other})


def test_dropout_that_is_computed_again_is_refused():
    Recipe().override({"run.cuda_graph": True, "run.recompute": "blocks"})
    with pytest.raises(
        RecipeError, match=r"run.recompute 'blocks' and model.dropout 0.1: .* leave one of the three out"
    ):
        Recipe().override({"run.cuda_graph": True, "run.recompute": "blocks", "model.dropout": 0.1})
