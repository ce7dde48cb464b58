"""Training in this process: the recipe's values arrive, and the curve says what happened."""

import errno
import math
import shutil

import numpy as np
import pytest
import torch
from safetensors import safe_open

from longstride.data import PreparedData, open_source, prepare
from longstride.errors import ArgumentError, CheckpointError, LongstrideError
from longstride.training import Recipe, RunFolder, StepGraph, read_curve, train
from longstride.training import run as run_module
from longstride.training.checkpoints import list_checkpoints
from longstride.training.muon import MuonWithAdamW
from longstride.training.run import check_precision, resolve_device

TEXT = b"".join(b"line %d of a text that repeats itself\n" % number for number in range(300))

TINY = {
    "data.context": 32,
    "model.patterns": ["Local(8) | Strided(8)"],
    "model.hidden_size": 16,
    "model.num_hidden_layers": 2,
    "model.num_attention_heads": 2,
    "schedule.steps": 12,
    "schedule.warmup_steps": 4,
    "schedule.batch_size": 4,
    "run.device": "cpu",
    "run.log_every": 3,
    "run.evaluate_every": 6,
    "run.checkpoint_every": 5,
}


class Run:
    """A folder in which tiny trainings run."""

    def __init__(self, path, **changed):
        self.recipe = Recipe().override({**TINY, **{key.replace("__", "."): value for key, value in changed.items()}})
        self.folder = RunFolder(path / "run")
        self.lines = []
        (path / "text").write_bytes(TEXT)
        self.folder.start(self.recipe)
        self.data: PreparedData = prepare(open_source(path / "text"), self.folder.data, self.recipe.data.context)

    def train(self):
        return train(self.recipe, self.data, self.folder, self.lines.append)

    def losses(self) -> dict[int, float]:
        return {record["step"]: record["loss"] for record in read_curve(self.folder.metrics) if "loss" in record}


@pytest.fixture
def start(tmp_path):
    def start(name="a", **changed):
        path = tmp_path / name
        path.mkdir()
        return Run(path, **changed)

    return start


def test_curve_has_every_step_the_schedule_and_the_evaluations(start):
    run = start()
    result = run.train()
    assert (result.step, result.ended) == (12, "finished")
    assert result.train_bytes_per_s > 0
    records = read_curve(run.folder.metrics)
    steps = [record for record in records if "loss" in record]
    assert [record["step"] for record in steps] == list(range(1, 13))
    for record in steps:
        assert record["bits_per_byte"] == pytest.approx(record["loss"] / math.log(2))
    # Logit weights start at zero: the first predictions are uniform.
    assert steps[0]["bits_per_byte"] == pytest.approx(8, abs=1e-5)
    peak = run.recipe.optimizer.learning_rate
    expected = [
        peak * step / 4 if step < 4 else peak * (1 + math.cos(math.pi * (step - 4) / 8)) / 2 for step in range(12)
    ]
    assert [record["learning_rate"] for record in steps] == pytest.approx(expected)
    evaluations = [record for record in records if "validation_loss" in record]
    assert [record["step"] for record in evaluations] == [6, 12]
    assert evaluations[1]["validation_bits_per_byte"] < 8


def test_training_learns(start):
    run = start(schedule__steps=60, optimizer__learning_rate=0.01, run__checkpoint_every=100)
    run.train()
    losses = run.losses()
    assert losses[60] < 0.6 * losses[1]


def test_training_with_muon_learns_within_40_steps(start):
    run = start(optimizer__name="muon", schedule__steps=40, optimizer__learning_rate=0.01, run__checkpoint_every=100)
    run.train()
    losses = run.losses()
    assert losses[40] < 0.8 * losses[1]


@pytest.mark.parametrize("precision", ["fp32", "bf16"])
def test_a_training_with_muon_goes_on_exactly(start, precision):
    """From a checkpoint in the middle: the same curve, and the same weights bit for bit."""
    changed = {"optimizer__name": "muon", "model__block": "modern", "model__dropout": 0.1, "run__precision": precision}
    whole, parted = start("whole", **changed), start("parted", **changed)
    expected = whole.train().model.state_dict()
    parted.train()
    shutil.rmtree(list_checkpoints(parted.folder.checkpoints)[-1].folder)
    result = parted.train()
    assert "Resuming at step 10 of 12" in "".join(parted.lines)
    assert read_curve(parted.folder.metrics) == read_curve(whole.folder.metrics)
    for name, weight in result.model.state_dict().items():
        assert torch.equal(weight, expected[name]), name
    other = start("other", **changed | {"optimizer__name": "adamw"})
    other.train()
    assert other.losses() != whole.losses()


def test_newest_checkpoints_are_kept_and_the_last_is_the_result(start):
    run = start()
    result = run.train()
    assert [checkpoint.step for checkpoint in list_checkpoints(run.folder.checkpoints)] == [10, 12]
    again = run.train()
    assert (again.step, again.ended, again.train_bytes_per_s) == (12, "finished", None)
    for (name, weight), (_, same) in zip(result.model.named_parameters(), again.model.named_parameters(), strict=True):
        assert torch.equal(weight, same), name


def test_accumulated_batches_are_one_large_batch(start):
    at_once = start("a", schedule__batch_size=4)
    in_parts = start("b", schedule__batch_size=1, schedule__gradient_accumulation_steps=4)
    at_once.train()
    in_parts.train()
    assert list(in_parts.losses().values()) == pytest.approx(list(at_once.losses().values()), rel=1e-3)


def test_seed_decides(start):
    first, same, other = start("a"), start("b"), start("c", run__seed=1)
    for run in (first, same, other):
        run.train()
    assert first.losses() == same.losses()
    assert first.losses()[8] != other.losses()[8]


@pytest.mark.filterwarnings("ignore:The .grad attribute of a Tensor that is not a leaf:UserWarning")  # Dynamo's own
def test_compiling_changes_no_loss_and_no_name(start, monkeypatch):
    compiled_blocks = run_module.compiled_blocks
    entered = []

    def without_inductor(model):
        entered.append(model)
        return compiled_blocks(model, backend="eager")

    monkeypatch.setattr(run_module, "compiled_blocks", without_inductor)
    plain, compiled = start("a"), start("b", run__compile=True, run__recompute="blocks")
    weights = plain.train().model.state_dict()
    assert not entered
    seen = compiled.train().model.state_dict()
    assert len(entered) == 1
    assert compiled.losses() == pytest.approx(plain.losses(), rel=1e-5)
    assert list(seen) == list(weights)
    saved = list_checkpoints(compiled.folder.checkpoints)[-1].folder / "model.safetensors"
    with safe_open(saved, "pt") as file:
        assert set(file.keys()) == set(weights)


def test_recording_passes_changes_no_loss(start, monkeypatch):
    """Recordings are made up: what they add to gradients and losses is the Trainer's own."""
    monkeypatch.setattr(StepGraph, "_aside", lambda self, batch: self.run(batch))
    monkeypatch.setattr(StepGraph, "_record", lambda self, _: self.run)
    monkeypatch.setattr(run_module, "check_recording", lambda *_: None)
    changed = {"schedule__batch_size": 1, "schedule__gradient_accumulation_steps": 2}
    plain, recorded = start("a", **changed), start("b", **changed, run__cuda_graph=True)
    plain.train()
    recorded.train()
    assert recorded.losses() == plain.losses()


def test_recording_needs_cuda(start):
    with pytest.raises(ArgumentError, match=r"run\.cuda_graph on cpu: it needs a CUDA device"):
        start(run__cuda_graph=True).train()


def test_watching_sees_every_step_and_evaluation(start):
    run, seen = start(), []
    train(run.recipe, run.data, run.folder, run.lines.append, lambda *report: seen.append(report))
    assert [step for step, _, validation in seen if validation is None] == list(range(1, 13))
    # The training loss where it is read anyway, and the validation loss.
    assert [step for step, bits, _ in seen if bits is not None] == [3, 5, 6, 9, 10, 12]
    assert [step for step, _, validation in seen if validation is not None] == [6, 12]


@pytest.mark.parametrize("what", ["blocks", "all_but_attention"])
def test_recomputing_changes_no_loss(start, what):
    plain, recomputed = start("a"), start("b", run__recompute=what)
    plain.train()
    recomputed.train()
    assert list(recomputed.losses().values()) == pytest.approx(list(plain.losses().values()), rel=1e-5)


def test_bf16_trains_close_to_fp32(start):
    full, half = start("a"), start("b", run__precision="bf16")
    full.train()
    half.train()
    assert half.losses() != full.losses()
    assert list(half.losses().values()) == pytest.approx(list(full.losses().values()), rel=0.02)


def test_clipping_and_weight_decay_arrive_at_the_optimiser(start):
    # A norm of 0 would mean no clipping at all.
    still = start("a", optimizer__max_grad_norm=1e-12, optimizer__weight_decay=0.0)
    result = still.train()
    # Adam divides by the size of the gradient, but not by less than 1e-8.
    assert result.model.lm_head.weight.abs().max() < 1e-4
    moved = start("b").train()
    assert moved.model.lm_head.weight.abs().max() > 1e-3


@pytest.mark.parametrize("most", [0.05, 0.0])
def test_muon_steps_on_clipped_gradients(start, monkeypatch, most):
    """A norm of 0 is no clipping, as with AdamW alone."""
    step, norms = MuonWithAdamW.step, []

    def watched(self, closure=None):
        gradients = [p.grad for group in self.param_groups for p in group["params"] if p.grad is not None]
        norms.append(torch.nn.utils.get_total_norm(gradients).item())
        return step(self, closure)

    monkeypatch.setattr(MuonWithAdamW, "step", watched)
    start(optimizer__name="muon", optimizer__max_grad_norm=most).train()
    assert len(norms) == 12
    assert (max(norms) < 0.0501) == (most > 0)


def test_tensorboard_files_have_bits_per_byte(start):
    pytest.importorskip("tensorboard")
    run = start(run__tensorboard=True)
    run.train()
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    events = EventAccumulator(str(run.folder.tensorboard))
    events.Reload()
    assert {"train/bits_per_byte", "eval/bits_per_byte", "train/learning_rate"} <= set(events.Tags()["scalars"])


def test_time_limit_stops_with_a_checkpoint(start):
    run = start(run__time_limit_s=0.0)
    result = run.train()
    assert (result.step, result.ended) == (1, "time limit")
    assert [checkpoint.step for checkpoint in list_checkpoints(run.folder.checkpoints)] == [1]


def test_diverged_training_says_so_and_saves_nothing(start, monkeypatch):
    run = start(run__checkpoint_every=1, run__log_every=100)
    from longstride.training.trainer import ByteTrainer

    original = ByteTrainer.training_step
    calls = []

    def training_step(self, *args, **kwargs):
        calls.append(1)
        loss = original(self, *args, **kwargs)
        if len(calls) == 4:
            self.step_loss = self.step_loss * float("nan")
        return loss

    monkeypatch.setattr(ByteTrainer, "training_step", training_step)
    with pytest.raises(LongstrideError, match=r"the loss became nan at step 4 .*lower --lr"):
        run.train()
    assert [checkpoint.step for checkpoint in list_checkpoints(run.folder.checkpoints)] == [2, 3]


def test_full_disk_during_a_checkpoint_leaves_the_last_good_one(start, monkeypatch):
    reference = start("reference")
    reference.train()
    run = start("run")
    original = torch.save

    def save(value, path, *args, **kwargs):
        if "checkpoint-10" in str(path) and "optimizer" in str(path):
            path = str(path)
            with open(path, "wb") as half:
                half.write(b"half")
            raise OSError(errno.ENOSPC, "No space left on device", path)
        original(value, path, *args, **kwargs)

    with monkeypatch.context() as patch:
        patch.setattr(torch, "save", save)
        with pytest.raises(CheckpointError) as error:
            run.train()
    for words in ("step 10", "No space left on device", "checkpoint-5 is still whole", "add --resume"):
        assert words in str(error.value)
    assert [path.name for path in run.folder.checkpoints.iterdir()] == ["checkpoint-5"]
    result = run.train()
    assert result.step == 12
    assert run.losses() == reference.losses()


def test_corrupt_checkpoint_is_passed_over_with_a_warning_and_the_curve_ends_the_same(start):
    reference = start("reference")
    reference.train()
    run = start("run")
    run.train()
    damaged = run.folder.checkpoints / "checkpoint-12" / "model.safetensors"
    content = bytearray(damaged.read_bytes())
    content[-1] ^= 1
    damaged.write_bytes(content)
    run.lines.clear()
    run.train()
    assert "checkpoint-12 is damaged: model.safetensors was changed" in run.lines[0]
    assert "Resuming at step 10 of 12" in run.lines[1]
    assert read_curve(run.folder.metrics) == read_curve(reference.folder.metrics)


def test_longer_schedule_may_go_on_from_a_finished_run(start):
    run = start()
    run.train()
    run.recipe = run.recipe.override({"schedule.steps": 15})
    assert run.train().step == 15
    assert list(run.losses()) == list(range(1, 16))


def test_cuda_without_cuda(monkeypatch):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    with pytest.raises(ArgumentError, match="--device cuda: this PyTorch sees no such device here; use --device cpu"):
        resolve_device("cuda")
    with pytest.raises(ArgumentError, match="--device tpu: it must be one of auto, cuda, mps, cpu"):
        resolve_device("tpu")
    with pytest.raises(ArgumentError, match="--precision fp16 needs a GPU: use bf16 or fp32"):
        check_precision("fp16", torch.device("cpu"))


def test_windows_of_the_training_are_those_of_the_seed(start):
    """The bytes that the model sees, step by step, also after resuming."""
    from longstride.data import RandomWindows
    from longstride.training.trainer import ByteTrainer

    run = start()
    seen = []
    original = ByteTrainer.training_step

    def training_step(self, model, inputs, *args, **kwargs):
        seen.extend(inputs["input_ids"].tolist())
        return original(self, model, inputs, *args, **kwargs)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(ByteTrainer, "training_step", training_step)
        run.train()
        for checkpoint in list_checkpoints(run.folder.checkpoints)[1:]:
            for file in checkpoint.folder.iterdir():
                file.unlink()
            checkpoint.folder.rmdir()
        run.train()
    windows = RandomWindows(run.data.split("train"), 32, 48, seed=0)
    expected = [windows[index]["input_ids"].tolist() for index in range(48)]
    assert np.array_equal(seen, expected + expected[40:])
