"""Training passes recorded as CUDA graphs: whole trainings, against the same ones without."""

from __future__ import annotations

import gc
from pathlib import Path

import pytest
import torch

import longstride as ls
from longstride.backends.triton import lowering
from longstride.data import PreparedData, open_source, prepare
from longstride.errors import UnsupportedError
from longstride.models import SparseTransformerConfig, SparseTransformerForCausalLM, compiled_blocks
from longstride.training import Recipe, RunFolder, StepGraph, read_curve, train
from longstride.training.step_graph import WARM_UP

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device"),
    pytest.mark.filterwarnings("ignore"),  # PyTorch's own, while it compiles
]

RECIPE = {
    "data.context": 512,
    "model.patterns": ["Local(32)", "Strided(32)", "Fixed(32, 4)", "Causal()"],
    "model.hidden_size": 128,
    "model.num_hidden_layers": 4,
    "model.block": "modern",
    "schedule.steps": 16,
    "schedule.warmup_steps": 2,
    "schedule.batch_size": 2,
    "run.device": "cuda",
    "run.precision": "bf16",
    "run.log_every": 4,
    "run.evaluate_every": 5,
    "run.checkpoint_every": 8,
}
#: At Muon's, which is the default, two trainings that round differently soon differ in their losses, too.
LEARNING_RATES = {"adamw": 1e-3, "muon": 6e-3}


@pytest.fixture(autouse=True)
def fresh_compiler() -> None:
    """Every model compiles the same functions, and torch.compile takes only so many variants of one."""
    torch.compiler.reset()


def prepared(place: Path) -> PreparedData:
    (place / "text").write_bytes(b"".join(b"line %d of a text that repeats itself\n" % n for n in range(4000)))
    return prepare(open_source(place / "text"), place / "data", 512)


def trained(place: Path, data: PreparedData, **changed: object) -> tuple[dict[int, float], torch.nn.Module]:
    recipe = Recipe().override(RECIPE | changed)
    folder = RunFolder(place)
    folder.start(recipe)
    result = train(recipe, data, folder, lambda _: None)
    assert result.ended == "finished"
    return {each["step"]: each["loss"] for each in read_curve(folder.metrics) if "loss" in each}, result.model


@pytest.mark.parametrize("compiled", [False, True])
@pytest.mark.parametrize("name", ["adamw", "muon"])
@pytest.mark.parametrize(("accumulated", "recompute"), [(1, "blocks"), (1, "all_but_attention"), (2, "nothing")])
def test_recorded_trainings_are_the_same(
    tmp_path: Path, name: str, compiled: bool, accumulated: int, recompute: str
) -> None:
    data = prepared(tmp_path)
    changed = {
        "optimizer.name": name,
        "optimizer.learning_rate": LEARNING_RATES[name],
        "run.compile": compiled,
        "schedule.gradient_accumulation_steps": accumulated,
        "run.recompute": recompute,
    }
    plain, model = trained(tmp_path / "plain", data, **changed)
    recorded, same = trained(tmp_path / "recorded", data, **changed, **{"run.cuda_graph": True})
    assert list(recorded) == list(plain) == list(range(1, 17))
    # The first three are the same passes; some gradients are added up in another order, in bfloat16 at that.
    assert list(recorded.values()) == pytest.approx(list(plain.values()), rel=5e-3)
    assert recorded[16] < recorded[1] - 0.3
    for (what, weight), (_, other) in zip(model.named_parameters(), same.named_parameters(), strict=True):
        assert (weight - other).norm() <= 0.03 * weight.norm(), what


@pytest.mark.parametrize("compiled", [False, True])
@pytest.mark.parametrize("name", ["adamw", "muon"])
def test_fp16_with_dynamic_loss_scaling(tmp_path: Path, name: str, compiled: bool) -> None:
    """The first scale, 65,536, overflows: such a step is skipped, and what remains is a training as in float32."""
    data = prepared(tmp_path)
    changed = {"optimizer.name": name, "optimizer.learning_rate": LEARNING_RATES[name], "schedule.steps": 40}
    half, model = trained(tmp_path / "half", data, **changed, **{"run.compile": compiled, "run.precision": "fp16"})
    full, _ = trained(tmp_path / "full", data, **changed, **{"run.compile": compiled, "run.precision": "fp32"})
    assert all(weight.isfinite().all() for weight in model.parameters())
    # As far as the steps that were not skipped bring it.
    assert full[40] - 0.1 < half[40] < full[16]


def test_dropout_draws_anew_at_every_replay(tmp_path: Path) -> None:
    """A replay that drew the same again would have the same loss for the same batch and weights."""
    data = prepared(tmp_path)
    changed = {"model.dropout": 0.5, "optimizer.learning_rate": 1e-12, "run.cuda_graph": True, "schedule.steps": 12}
    losses, model = trained(tmp_path / "run", data, **changed)
    assert len(losses) == 12
    batch = torch.randint(256, (2, 512), device="cuda")

    def run(given: dict[str, torch.Tensor]) -> torch.Tensor:
        loss = model(given["x"], labels=given["x"]).loss
        loss.backward()
        return loss.detach()

    with torch.no_grad():
        model.lm_head.weight.normal_()
    graph = StepGraph(run, model.train().parameters())
    found = [graph({"x": batch}).item() for _ in range(WARM_UP + 4)]
    assert len(set(found)) == len(found)


def test_the_gradients_of_replays_are_those_of_passes() -> None:
    """In float32, for a batch that the recording has not seen."""
    torch.manual_seed(0)
    config = SparseTransformerConfig(
        hidden_size=64,
        num_hidden_layers=2,
        num_attention_heads=2,
        max_position_embeddings=256,
        patterns=["Local(16)", "Strided(16)"],
        initializer_scale=1.0,
    )
    model = SparseTransformerForCausalLM(config).cuda().train()
    torch.nn.init.normal_(model.lm_head.weight, std=0.1)

    def run(batch: dict[str, torch.Tensor]) -> torch.Tensor:
        loss = model(batch["x"], labels=batch["x"]).loss
        loss.backward()
        return loss.detach()

    graph = StepGraph(run, model.parameters())
    with compiled_blocks(model):
        for _ in range(WARM_UP + 2):
            x = torch.randint(256, (2, 256), device="cuda")
            loss = graph({"x": x})
            replayed = {name: weight.grad.clone() for name, weight in model.named_parameters()}
            model.zero_grad()
            torch.testing.assert_close(loss, run({"x": x}), rtol=1e-5, atol=0)
            for name, weight in model.named_parameters():
                torch.testing.assert_close(replayed[name], weight.grad, rtol=1e-4, atol=1e-6, msg=name)
            model.zero_grad()


def test_a_pass_that_waits_is_refused() -> None:
    weight = torch.nn.Parameter(torch.ones(3, device="cuda"))

    def run(batch: dict[str, torch.Tensor]) -> torch.Tensor:
        loss = (weight * batch["x"]).sum()
        loss.backward()
        loss.item()
        return loss.detach()

    graph = StepGraph(run, [weight])
    for _ in range(WARM_UP):
        graph({"x": torch.ones(3, device="cuda")})
    with pytest.raises(UnsupportedError, match=r"cannot be recorded as a CUDA graph \(.*\): something in it waits"):
        graph({"x": torch.ones(3, device="cuda")})
    # What comes after it can still draw and be recorded.
    assert torch.randn(3, device="cuda").isfinite().all()
    other = StepGraph(lambda batch: batch["x"].sum(), [])
    for n in range(WARM_UP + 2):
        assert other({"x": torch.full((3,), float(n), device="cuda")}).item() == 3 * n


@pytest.mark.skipif(torch.cuda.device_count() < 2, reason="needs two CUDA devices")
def test_a_model_on_another_device_than_the_current_one() -> None:
    weight = torch.nn.Parameter(torch.ones(3, device="cuda:1"))

    def run(batch: dict[str, torch.Tensor]) -> torch.Tensor:
        loss = (weight * batch["x"]).sum()
        loss.backward()
        return loss.detach()

    graph = StepGraph(run, [weight])
    for n in range(WARM_UP + 3):
        x = torch.full((3,), float(n), device="cuda:1")
        assert graph({"x": x}).item() == 3 * n
        assert torch.equal(weight.grad, x)
        weight.grad = None
    assert len(graph.recordings) == 1
    assert torch.cuda.current_device() == 0


def test_what_a_graph_reads_outlives_the_caches() -> None:
    """The tables of a pattern, which are forgotten after calls at some hundreds of other lengths."""
    q, k, v = (torch.randn(1, 4, 1024, 64, device="cuda") for _ in range(3))
    rule = ls.bigbird(64)

    def run(batch: dict[str, torch.Tensor]) -> torch.Tensor:
        return ls.attention(batch["q"], k, v, rule, backend="triton")

    graph = StepGraph(run, [])
    for _ in range(WARM_UP + 1):
        before = graph({"q": q})
    pytest.importorskip("longstride.backends.triton.prepare").forget()
    lowering.lowered.cache_clear()
    gc.collect()
    torch.cuda.empty_cache()
    garbage = [torch.full((1 << n,), 7, dtype=torch.int32, device="cuda") for n in range(4, 18) for _ in range(50)]
    assert torch.equal(graph({"q": q}), before)
    assert len(garbage) > 0
