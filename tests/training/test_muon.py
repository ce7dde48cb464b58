"""Muon beside AdamW: which parameters go where, and that each steps as torch's own optimizer would."""

import copy
import math
import weakref

import pytest
import torch
from accelerate.optimizer import AcceleratedOptimizer
from torch import nn
from torch.utils._python_dispatch import TorchDispatchMode

from longstride.models import (
    SparseTransformerConfig,
    SparseTransformerForCausalLM,
    SparseTransformerForMaskedLM,
    SparseTransformerForSequenceClassification,
)
from longstride.training import muon
from longstride.training.arguments import trainer_arguments
from longstride.training.muon import MuonWithAdamW, block_matrices, orthogonalised
from longstride.training.recipe import OptimizerRecipe, ScheduleRecipe
from longstride.training.recipe_trainer import RecipeTrainer

ENCODER = {"patterns": "Local(5, lookahead=4) | Global(1, causal=False)"}
PEAK, DECAY = 0.01, 0.1


def tiny(kind=SparseTransformerForCausalLM, **options):
    torch.manual_seed(0)
    config = {"patterns": "Local(4)", "vocab_size": 32, "hidden_size": 8, "num_hidden_layers": 1, "block": "modern"}
    return kind(SparseTransformerConfig(**config | {"num_attention_heads": 2, "max_position_embeddings": 16} | options))


def trainer_of(model, tmp_path, name="muon"):
    arguments = trainer_arguments(
        OptimizerRecipe(name=name, learning_rate=PEAK, weight_decay=DECAY),
        ScheduleRecipe(steps=10, warmup_steps=3),
        folder=tmp_path,
        device=torch.device("cpu"),
        precision="fp32",
        seed=0,
        log_every=1,
        report_to="none",
    )
    return RecipeTrainer(model=model, optimizer_name=name, args=arguments)


def optimizer_of(model, tmp_path, name="muon"):
    return trainer_of(model, tmp_path, name).create_optimizer()


def names(model, groups):
    of = {parameter: name for name, parameter in model.named_parameters()}
    return [{of[parameter] for parameter in group["params"]} for group in groups]


def give_gradients(model, generator, scale=1.0):
    for parameter in model.parameters():
        parameter.grad = scale * torch.randn(parameter.shape, generator=generator)


@pytest.mark.parametrize(
    ("model", "expected"),
    [
        (
            lambda: tiny(),
            {"attention.qkv_proj", "attention.out_proj", "feed_forward.gate_up_proj", "feed_forward.down_proj"},
        ),
        (
            lambda: tiny(block="sparse_transformer", tie_word_embeddings=True),
            {"attention.qkv_proj", "attention.out_proj", "feed_forward.up_proj", "feed_forward.down_proj"},
        ),
        (
            lambda: tiny(SparseTransformerForMaskedLM, **ENCODER, global_projections="separate"),
            {"attention.qkv_proj", "attention.out_proj", "feed_forward.gate_up_proj", "feed_forward.down_proj"}
            | {"attention.global_projections.q_proj", "attention.global_projections.kv_proj"},
        ),
        (
            lambda: tiny(SparseTransformerForSequenceClassification, **ENCODER, block="sparse_transformer"),
            {"attention.qkv_proj", "attention.out_proj", "feed_forward.up_proj", "feed_forward.down_proj"},
        ),
    ],
    ids=["modern", "the paper's, tied", "global projections", "classifier"],
)
def test_muon_takes_the_matrices_of_the_blocks_and_adamw_the_rest_as_without_it(tmp_path, model, expected):
    model = model()
    matrices, *rest = names(model, optimizer_of(model, tmp_path).param_groups)
    assert matrices == {f"model.layers.0.{name}.weight" for name in expected}
    plain = optimizer_of(model, tmp_path, "adamw")
    assert type(plain) is torch.optim.AdamW
    decayed, others = names(model, plain.param_groups)
    assert rest == [decayed - matrices, others]
    assert "model.embed_tokens.weight" in decayed - matrices
    assert all("norm" in name or "bias" in name for name in others)


def test_weight_decay_falls_on_matrices_and_tables_alone(tmp_path):
    model = tiny(block="sparse_transformer")
    optimizer = optimizer_of(model, tmp_path)
    assert [group["weight_decay"] for group in optimizer.param_groups] == [DECAY, DECAY, 0.0]
    before = copy.deepcopy(model)
    for parameter in model.parameters():
        parameter.grad = torch.zeros_like(parameter)
    optimizer.step()
    for (name, parameter), was in zip(model.named_parameters(), before.parameters(), strict=True):
        kept = 1 if "norm" in name or "bias" in name else 1 - PEAK * DECAY
        torch.testing.assert_close(parameter, kept * was, msg=name)


@pytest.fixture(params=[torch.float32, torch.bfloat16], ids=str)
def iterations(request, monkeypatch) -> torch.dtype:
    """The dtype of the iterations: that of CPUs, and that of other devices."""
    monkeypatch.setattr(muon, "iteration_dtype", lambda _: request.param)
    return request.param


@pytest.mark.parametrize(("rows", "columns"), [(32, 32), (32, 88), (88, 32), (1, 16), (16, 1)])
def test_maps_keep_their_directions_and_have_their_singular_values_brought_near_one(iterations, rows, columns):
    generator = torch.Generator().manual_seed(0)
    short = min(rows, columns)
    shapes = (5, rows, short), (5, columns, short)
    u, v = (torch.linalg.qr(torch.randn(s, generator=generator, dtype=torch.float64)).Q for s in shapes)
    # However large or small a map is.
    norms = torch.tensor([1e-5, 0.1, 1.0, 10.0, 1e5], dtype=torch.float64)[:, None, None]
    result = orthogonalised((norms * u * torch.logspace(-2, 0, short, dtype=torch.float64) @ v.mT).float())
    assert result.dtype == iterations
    between = u.mT @ result.double() @ v
    values = between.diagonal(dim1=1, dim2=2)
    # In exact arithmetic it is 0.68 to 1.20, from 0.002 of the norm on.
    assert values.min() > 0.65
    assert values.max() < 1.25
    assert (between - torch.diag_embed(values)).abs().max() < 0.1
    torch.testing.assert_close(u @ between @ v.mT, result.double(), rtol=0, atol=0.1)


def test_maps_of_zeros_stay_zeros():
    assert torch.equal(orthogonalised(torch.zeros(2, 4, 8)), torch.zeros(2, 4, 8))


def test_iterations_are_in_bfloat16_but_on_cpus():
    assert muon.iteration_dtype(torch.device("cuda", 1)) == torch.bfloat16
    assert muon.iteration_dtype(torch.device("mps")) == torch.bfloat16
    assert muon.iteration_dtype(torch.device("cpu")) == torch.float32


class MapTwice:
    """One map as trained by torch's Muon, and in float64 by the papers' formulas."""

    def __init__(self, weight):
        self.by_torch = nn.Parameter(weight.detach().clone())
        self.muon = torch.optim.Muon([self.by_torch], adjust_lr_fn="match_rms_adamw")
        self.exact = weight.detach().double()
        self.momentum = torch.zeros_like(self.exact)

    def step(self, gradient, rate, decay):
        self.muon.param_groups[0].update(lr=rate, weight_decay=decay)
        self.by_torch.grad = gradient
        self.muon.step()
        self.momentum = 0.95 * self.momentum + 0.05 * gradient
        x = 0.95 * self.momentum + 0.05 * gradient
        x = x / x.norm()
        for _ in range(5):
            gram = x @ x.T
            x = 3.4445 * x - 4.7750 * gram @ x + 2.0315 * gram @ gram @ x
        self.exact = (1 - rate * decay) * self.exact - rate * 0.2 * math.sqrt(max(x.shape)) * x


@pytest.mark.usefixtures("iterations")
@pytest.mark.parametrize("batch_elements", [muon.BATCH_ELEMENTS, 3 * 32 * 32, 1])
def test_each_map_steps_as_by_torch_s_muon_and_the_rest_as_by_torch_s_adamw(monkeypatch, batch_elements):
    """Stacked maps one by one; layers with rates and decays of their own; for a step a gradient is missing.

    Roundings of bfloat16 differ between products of one map and of many, and small singular values enlarge them: so
    what is held against torch's steps is how far both are from float64's.
    """
    monkeypatch.setattr(muon, "BATCH_ELEMENTS", batch_elements)
    options = {"hidden_size": 32, "qk_hidden_size": 16, "num_hidden_layers": 3, "global_projections": "separate"}
    model = tiny(SparseTransformerForMaskedLM, **ENCODER, **options)
    first, *others = model.model.layers
    apart = set(first.parameters())
    of_adamw = {"betas": (0.9, 0.95), "fused": True}
    optimizer = MuonWithAdamW(
        torch.optim.AdamW(
            [
                {"params": list(apart), "lr": PEAK / 4, "weight_decay": 0.0},
                {"params": [p for p in model.parameters() if p not in apart], "lr": PEAK, "weight_decay": DECAY},
            ],
            **of_adamw,
        ),
        block_matrices(model),
    )
    groups = optimizer.param_groups
    assert [(g["lr"], g["weight_decay"]) for g in groups] == 2 * [(PEAK / 4, 0.0), (PEAK, DECAY)]
    assert [set(g["params"]) <= apart for g in groups] == [True, False, True, False]
    stacked = {"qkv_proj": [16, 16, 32], "kv_proj": [16, 32], "gate_up_proj": 2 * [model.config.intermediate_size]}
    rows = {p: stacked.get(name.split(".")[-2], [len(p)]) for name, p in model.named_parameters()}
    maps = {p: [MapTwice(part) for part in p.split(rows[p])] for g in groups[:2] for p in g["params"]}
    rest = {p: nn.Parameter(p.detach().clone()) for g in groups[2:] for p in g["params"]}
    adamw = torch.optim.AdamW([{"params": [rest[p]]} for g in groups[2:] for p in g["params"]], **of_adamw)
    start = {p: p.detach().clone() for p in maps}
    generator = torch.Generator().manual_seed(1)
    for step in range(3):
        give_gradients(model, generator)
        if step == 1:
            others[0].attention.out_proj.weight.grad = None
        for group in groups:
            group["lr"] /= step + 1
        for group in groups[:2]:
            for p in group["params"]:
                if p.grad is not None:
                    for twice, gradient in zip(maps[p], p.grad.split(rows[p]), strict=True):
                        twice.step(gradient, group["lr"], group["weight_decay"])
        of_rest = (group for group in groups[2:] for _ in group["params"])
        for theirs, group in zip(adamw.param_groups, of_rest, strict=True):
            theirs.update(lr=group["lr"], weight_decay=group["weight_decay"])
        for p, copied in rest.items():
            copied.grad = p.grad
        optimizer.step()
        adamw.step()
        assert all(torch.equal(p, copied) for p, copied in rest.items())
    of_ours, of_torch = [], []
    for p, parts in maps.items():
        for twice, ours, was in zip(parts, p.detach().split(rows[p]), start[p].split(rows[p]), strict=True):
            of_ours.append((ours - twice.exact).norm())
            of_torch.append((twice.by_torch.detach() - twice.exact).norm())
            # A single map may round better or worse than torch's, by more the smaller it is.
            assert of_ours[-1] < 0.1 * (twice.exact - was).norm()
    assert len(of_ours) == 3 * 10
    assert torch.stack(of_ours).norm() <= 1.5 * torch.stack(of_torch).norm()


class Calls(TorchDispatchMode):
    """What is called while it lasts, without views, and the elements of the largest batch that is multiplied."""

    def __init__(self):
        super().__init__()
        self.names = []
        self.largest = 0

    def __torch_dispatch__(self, call, types, args=(), kwargs=None):
        if not call.is_view:
            self.names.append(str(call))
        if call is torch.ops.aten.baddbmm.default:
            self.largest = max(self.largest, args[0].numel())
        return call(*args, **(kwargs or {}))


def calls_of_a_step(layers, tmp_path):
    model = tiny(num_hidden_layers=layers)
    optimizer = optimizer_of(model, tmp_path)
    give_gradients(model, torch.Generator().manual_seed(0))
    optimizer.step()
    with Calls() as calls:
        optimizer.step()
    return calls


def test_a_step_is_as_many_calls_whatever_the_depth(tmp_path):
    one, many = calls_of_a_step(1, tmp_path), calls_of_a_step(12, tmp_path)
    assert one.names == many.names
    # Square, wide and tall maps: five times three products each, and what goes before and after.
    assert sum("bmm" in name for name in one.names) == 3 * 5 * 3
    assert len(one.names) < 90
    # Numbers that the host waits for.
    assert "aten._local_scalar_dense.default" not in one.names


def test_a_batch_holds_no_more_than_the_bound(monkeypatch, tmp_path):
    whole = calls_of_a_step(12, tmp_path)
    monkeypatch.setattr(muon, "BATCH_ELEMENTS", whole.largest // 3)
    parts = calls_of_a_step(12, tmp_path)
    assert 0 < parts.largest <= whole.largest // 3
    assert len(parts.names) > len(whole.names)


def test_the_schedule_reaches_all_groups(tmp_path):
    model = tiny()
    trainer = trainer_of(model, tmp_path)
    optimizer = trainer.create_optimizer()
    scheduler = trainer.create_scheduler(10)
    rates = []
    for _ in range(4):
        assert len({group["lr"] for group in optimizer.param_groups}) == 1
        rates.append(optimizer.param_groups[0]["lr"])
        give_gradients(model, torch.Generator().manual_seed(0))
        optimizer.step()
        scheduler.step()
    assert rates == pytest.approx([0, PEAK / 3, 2 * PEAK / 3, PEAK])


def test_state_is_saved_and_loaded_as_one(tmp_path):
    """Also by accelerate's wrapper, which loads the state once at its beginning; and rates still reach all groups."""
    model = tiny()
    optimizer = AcceleratedOptimizer(optimizer_of(model, tmp_path))
    generator = torch.Generator().manual_seed(1)
    for _ in range(2):
        give_gradients(model, generator)
        optimizer.step()
    torch.save(optimizer.state_dict(), tmp_path / "optimizer.pt")
    other = copy.deepcopy(model)
    resumed = optimizer_of(other, tmp_path)
    resumed.load_state_dict(torch.load(tmp_path / "optimizer.pt", weights_only=True))
    for trained, by in ((model, optimizer), (other, resumed)):
        for group in by.param_groups:
            group["lr"] = PEAK / 2
        give_gradients(trained, torch.Generator().manual_seed(2))
        by.step()
    again = copy.deepcopy(other)
    for (name, parameter), same in zip(model.named_parameters(), other.parameters(), strict=True):
        assert torch.equal(parameter, same), name
    for group in resumed.param_groups:
        group["lr"] = 0.0
    resumed.step()
    for (name, parameter), same in zip(again.named_parameters(), other.parameters(), strict=True):
        assert torch.equal(parameter, same), name


def test_a_gradient_scaler_scales_back_and_leaves_out_steps_that_overflow(tmp_path):
    plain, scaled = tiny(), tiny()
    optimizer = optimizer_of(plain, tmp_path)
    scaler = torch.amp.GradScaler("cpu", init_scale=1024.0)
    wrapped = AcceleratedOptimizer(optimizer_of(scaled, tmp_path), scaler=scaler)
    ids = torch.randint(32, (2, 16), generator=torch.Generator().manual_seed(0))
    plain(ids, labels=ids).loss.backward()
    optimizer.step()
    scaler.scale(scaled(ids, labels=ids).loss).backward()
    wrapped.step()
    assert not wrapped.step_was_skipped
    for (name, parameter), same in zip(plain.named_parameters(), scaled.named_parameters(), strict=True):
        # The iterations enlarge the last bit of a gradient.
        torch.testing.assert_close(parameter, same[1], rtol=0.01, atol=1e-4, msg=name)
    give_gradients(scaled, torch.Generator().manual_seed(0))
    scaled.model.layers[0].attention.out_proj.weight.grad[0, 0] = float("inf")
    before = copy.deepcopy(scaled)
    wrapped.step()
    assert wrapped.step_was_skipped
    for parameter, was in zip(scaled.parameters(), before.parameters(), strict=True):
        assert torch.equal(parameter, was)


def test_gradients_are_not_kept_beyond_the_step(tmp_path):
    model = tiny()
    optimizer = optimizer_of(model, tmp_path)
    give_gradients(model, torch.Generator().manual_seed(0))
    gradients = [weakref.ref(parameter.grad) for parameter in model.parameters()]
    optimizer.step()
    optimizer.zero_grad()
    assert isinstance(optimizer, MuonWithAdamW)
    assert not any(gradient() is not None for gradient in gradients)
