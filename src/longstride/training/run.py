"""One training run from a recipe: the model, Trainer's arguments, resuming, and how it ended."""

import os
import sys
import time
from collections.abc import Callable
from contextlib import nullcontext
from dataclasses import dataclass
from typing import Any, Literal

import torch
from tqdm import tqdm
from transformers import TrainingArguments, set_seed

from longstride.data import PreparedData
from longstride.errors import ArgumentError
from longstride.models import (
    SparseTransformerConfig,
    SparseTransformerForCausalLM,
    check_recomputation,
    compiled_blocks,
    recompute_in_backward,
)
from longstride.training.arguments import trainer_arguments
from longstride.training.batches import batches_of
from longstride.training.checkpoints import latest_sound
from longstride.training.curve import Curve
from longstride.training.folder import RunFolder
from longstride.training.kinds import longest_sequence, position_axes, vocab_size
from longstride.training.recipe import Recipe
from longstride.training.trainer import ByteTrainer, Observer, stop_on_ctrl_c


@dataclass(frozen=True, eq=False)
class TrainingResult:
    """How a training ended.

    Args:
        model: with the weights after ``step`` updates.
        ended: ``"finished"``, or stopped early by Ctrl-C or by the time limit; then a checkpoint of ``step`` exists.
        train_bytes_per_s: bytes that went through the model per second of this process; None if it trained nothing.
    """

    model: SparseTransformerForCausalLM
    step: int
    ended: Literal["finished", "interrupted", "time limit"]
    train_bytes_per_s: float | None


def resolve_device(name: str) -> torch.device:
    """``auto`` as the machine's accelerator, or the CPU where there is none; other names as they are.

    Raises:
        ArgumentError: there is no such device.
    """
    available = {"cuda": torch.cuda.is_available(), "mps": torch.backends.mps.is_available(), "cpu": True}
    if name == "auto":
        return torch.device(next(device for device, there in available.items() if there))
    if name not in available:
        raise ArgumentError(f"--device {name}: it must be one of auto, {', '.join(available)}")
    if not available[name]:
        raise ArgumentError(f"--device {name}: this PyTorch sees no such device here; use --device cpu or auto")
    return torch.device(name)


def check_precision(precision: str, device: torch.device) -> None:
    """Raises ArgumentError where the device cannot train in the precision."""
    if precision == "fp16" and device.type == "cpu":
        raise ArgumentError("--precision fp16 needs a GPU: use bf16 or fp32 on the CPU")
    if precision == "bf16" and device.type == "cuda" and not torch.cuda.is_bf16_supported():
        raise ArgumentError("--precision bf16: this GPU does not support it; use fp16 or fp32")


def check_recording(cuda_graph: bool, device: torch.device) -> None:
    """Raises ArgumentError where the device has no CUDA graphs and one is asked for."""
    if cuda_graph and device.type != "cuda":
        raise ArgumentError(f"run.cuda_graph on {device.type}: it needs a CUDA device; set it to false here")


def model_config(recipe: Recipe) -> SparseTransformerConfig:
    """The configuration of the recipe's model.

    Raises:
        ArgumentError: values that do not fit together, such as heads that do not divide the width.
        RecipeError: values that do not fit the kind of the data.
        UnsupportedError: the attention's outputs cannot be kept with the backend that the recipe names; a memory
            with patterns that do not repeat.
    """
    model = recipe.model
    check_recomputation(recipe.run.recompute, model.attention_backend)
    return SparseTransformerConfig(
        vocab_size=vocab_size(recipe),
        position_axes=position_axes(recipe),
        max_position_embeddings=longest_sequence(recipe),
        memory=model.memory,
        patterns=list(model.patterns),
        hidden_size=model.hidden_size,
        num_hidden_layers=model.num_hidden_layers,
        num_attention_heads=model.num_attention_heads,
        block=model.block,
        intermediate_size=model.intermediate_size,
        qk_hidden_size=model.qk_hidden_size,
        dropout=model.dropout,
        initializer_scale=model.initializer_scale,
        tie_word_embeddings=model.tie_word_embeddings,
        attention_backend=model.attention_backend,
    )


def train(
    recipe: Recipe,
    data: PreparedData,
    folder: RunFolder,
    say: Callable[[str], None],
    watch: Callable[[int, float | None, float | None], None] | None = None,
) -> TrainingResult:
    """Train, going on from the newest sound checkpoint in ``folder`` if there is one.

    Args:
        say: called with a line for the screen.
        watch: called after every step and every periodic evaluation, as `Observer`'s ``show`` is.

    Raises:
        CheckpointError: a checkpoint could not be written, or none of those there is sound.
        ArgumentError: the device cannot do what the recipe asks.
        LongstrideError: the training diverged.
        UnsupportedError: the training pass cannot be recorded as a CUDA graph.
    """
    device = resolve_device(recipe.run.device)
    check_precision(recipe.run.precision, device)
    check_recording(recipe.run.cuda_graph, device)
    checkpoint, passed_over = latest_sound(folder.checkpoints)
    for sentence in passed_over:
        say(f"Warning: {sentence}; going on from an earlier one.")
    start = 0 if checkpoint is None else checkpoint.step
    if checkpoint is not None:
        say(f"Resuming at step {start:,} of {recipe.schedule.steps:,} from {_shown(checkpoint.folder)}.")
        if start >= recipe.schedule.steps:
            model = SparseTransformerForCausalLM.from_pretrained(checkpoint.folder).to(device)
            return TrainingResult(model, start, "finished", None)

    # Trainer seeds the global generators as well, which dropout draws from.
    set_seed(recipe.run.seed)
    model = SparseTransformerForCausalLM(model_config(recipe))
    recompute_in_backward(model, recipe.run.recompute)
    schedule = recipe.schedule
    batches = batches_of(recipe, data)
    curve = Curve(folder.metrics, start)
    began = time.monotonic()
    with stop_on_ctrl_c() as interruption, _Progress(start, schedule.steps, data.unit, say) as progress:

        def show(step: int, train_bits: float | None, validation_bits: float | None) -> None:
            progress.show(step, train_bits, validation_bits)
            if watch is not None:
                watch(step, train_bits, validation_bits)

        observer = Observer(curve, interruption, show, recipe.run.time_limit_s)
        trainer = ByteTrainer(
            curve=curve,
            checkpoints=folder.checkpoints,
            keep_checkpoints=recipe.run.keep_checkpoints,
            optimizer_name=recipe.optimizer.name,
            cuda_graph=recipe.run.cuda_graph,
            model=model,
            args=_training_arguments(recipe, folder, device),
            train_dataset=batches.train,
            eval_dataset=batches.validation,
            data_collator=batches.collate,
            callbacks=[observer],
        )
        observer.trainer = trainer
        if checkpoint is not None:
            trainer.restore_memory(checkpoint.folder)
        with compiled_blocks(model) if recipe.run.compile else nullcontext():
            trainer.train(resume_from_checkpoint=None if checkpoint is None else str(checkpoint.folder))
    curve.flush()
    step = trainer.state.global_step
    trained_bytes = (step - start) * schedule.batch_size * schedule.gradient_accumulation_steps * recipe.data.context
    ended = "finished" if step >= schedule.steps else "interrupted" if interruption.requested else "time limit"
    return TrainingResult(model, step, ended, trained_bytes / (time.monotonic() - began))


def _training_arguments(recipe: Recipe, folder: RunFolder, device: torch.device) -> TrainingArguments:
    optimizer, schedule, run = recipe.optimizer, recipe.schedule, recipe.run
    if run.tensorboard:
        # The only way to say it: TrainingArguments has no field for the folder.
        os.environ["TENSORBOARD_LOGGING_DIR"] = str(folder.tensorboard)
    return trainer_arguments(
        optimizer,
        schedule,
        folder=folder.checkpoints,
        device=device,
        precision=run.precision,
        seed=run.seed,
        log_every=run.log_every,
        per_device_eval_batch_size=schedule.batch_size,
        eval_strategy="steps",
        eval_steps=run.evaluate_every,
        prediction_loss_only=True,
        save_strategy="steps",
        save_steps=run.checkpoint_every,
        report_to=["tensorboard"] if run.tensorboard else "none",
    )


def _shown(path: Any) -> str:
    return os.path.relpath(path)


class _Progress:
    """A bar with bits per token on a terminal, and a line at each report elsewhere, such as in a log file."""

    def __init__(self, start: int, steps: int, unit: str, say: Callable[[str], None]) -> None:
        self.start, self.steps, self.unit, self.say = start, steps, unit, say
        self.began = time.monotonic()
        self.on_terminal = sys.stderr.isatty()
        self.bar = tqdm(total=steps, initial=start, unit="step", dynamic_ncols=True, disable=not self.on_terminal)

    def __enter__(self) -> "_Progress":
        return self

    def __exit__(self, *exception: object) -> None:
        self.bar.close()

    def show(self, step: int, train_bits: float | None, validation_bits: float | None) -> None:
        """Report after a step: see `Observer`."""
        if self.on_terminal:
            self.bar.update(step - self.bar.n)
            if train_bits is not None:
                self.bar.set_postfix_str(f"{train_bits:.3f} bits per {self.unit}")
            if validation_bits is not None:
                self.bar.write(f"step {step:,}: validation {validation_bits:.3f} bits per {self.unit}", file=sys.stderr)
        elif train_bits is not None:
            elapsed_s = time.monotonic() - self.began
            self.say(f"step {step:,} of {self.steps:,}: {train_bits:.3f} bits per {self.unit}, {elapsed_s:.0f} s")
        elif validation_bits is not None:
            self.say(f"step {step:,} of {self.steps:,}: validation {validation_bits:.3f} bits per {self.unit}")
