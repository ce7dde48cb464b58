"""Muon beside AdamW: which parameters go where, and that each steps as torch's own optimizer would."""

import copy

import pytest
import torch
from accelerate.optimizer import AcceleratedOptimizer
from torch import nn

from longstride.models import (
    SparseTransformerConfig,
    SparseTransformerForCausalLM,
    SparseTransformerForMaskedLM,
    SparseTransformerForSequenceClassification,
)
from longstride.training.arguments import trainer_arguments
from longstride.training.muon import MuonWithAdamW
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


def test_each_map_steps_as_by_torch_s_muon_and_the_rest_as_by_torch_s_adamw(tmp_path):
    """Stacked maps one by one; bit for bit, over steps of different rates, and where a gradient is missing."""
    model = tiny(SparseTransformerForMaskedLM, **ENCODER, global_projections="separate", qk_hidden_size=4)
    optimizer = optimizer_of(model, tmp_path)
    attention, feed_forward = model.model.layers[0].attention, model.model.layers[0].feed_forward
    rows = {
        attention.qkv_proj.weight: [4, 4, 8],
        attention.out_proj.weight: [8],
        attention.global_projections.q_proj.weight: [4],
        attention.global_projections.kv_proj.weight: [4, 8],
        feed_forward.gate_up_proj.weight: [model.config.intermediate_size] * 2,
        feed_forward.down_proj.weight: [8],
    }
    maps = {
        weight: [nn.Parameter(part.detach().clone()) for part in weight.split(rows[weight])]
        for weight in optimizer.param_groups[0]["params"]
    }
    rest = {p: nn.Parameter(p.detach().clone()) for group in optimizer.param_groups[1:] for p in group["params"]}
    decays = {p: group["weight_decay"] for group in optimizer.param_groups[1:] for p in group["params"]}
    muon = torch.optim.Muon(
        [part for parts in maps.values() for part in parts],
        lr=PEAK,
        weight_decay=DECAY,
        momentum=0.95,
        nesterov=True,
        adjust_lr_fn="match_rms_adamw",
    )
    adamw = torch.optim.AdamW(
        [{"params": [copied], "weight_decay": decays[p]} for p, copied in rest.items()],
        lr=PEAK,
        betas=(0.9, 0.95),
        fused=True,
    )
    generator = torch.Generator().manual_seed(1)
    for step, rate in enumerate((PEAK, PEAK / 2, PEAK / 3)):
        for group in (*optimizer.param_groups, *muon.param_groups, *adamw.param_groups):
            group["lr"] = rate
        give_gradients(model, generator)
        if step == 1:
            attention.out_proj.weight.grad = None
        for weight, parts in maps.items():
            gradients = [None] if weight.grad is None else weight.grad.split(rows[weight])
            for part, gradient in zip(parts, gradients, strict=True):
                part.grad = gradient
        for parameter, copied in rest.items():
            copied.grad = parameter.grad
        optimizer.step()
        muon.step()
        adamw.step()
        for weight, parts in maps.items():
            assert torch.equal(weight, torch.cat(parts))
        for parameter, copied in rest.items():
            assert torch.equal(parameter, copied)


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
        # Muon's iterations are in bfloat16, where the last bit of a gradient can be seen.
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
    optimizer.step()
    assert isinstance(optimizer, MuonWithAdamW)
    assert not optimizer.muon.state
    assert not optimizer.muon.param_groups
    optimizer.zero_grad()
    assert all(parameter.grad is None for parameter in model.parameters())
