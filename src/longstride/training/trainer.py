"""Hugging Face's Trainer, made to survive an interruption at any moment without a trace in the result.

Trainer brings the loop, mixed precision, gradient accumulation, clipping, the schedule and TensorBoard. Added here:
checkpoints that are complete or absent, one record a step (`Curve`), bits per byte, Ctrl-C and a time limit.
"""

# ruff: noqa: ARG002 (Trainer decides what its methods and callbacks take)

import math
import signal
import time
from collections.abc import Callable, Generator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any, cast

import torch
from safetensors import SafetensorError
from transformers import TrainerCallback, TrainerControl, TrainerState, TrainingArguments

from longstride.data import written_whole
from longstride.errors import CheckpointError
from longstride.models import SegmentMemory, SparseTransformerForCausalLM
from longstride.training.checkpoints import list_checkpoints, prune, seal
from longstride.training.curve import Curve, bits
from longstride.training.recipe_trainer import RecipeTrainer
from longstride.training.step_graph import StepGraph

#: What a checkpoint holds of a model with a memory, beside Trainer's files.
MEMORY = "memory.pt"


class ByteTrainer(RecipeTrainer):
    """Trainer with windows in order, a curve, and atomic checkpoints.

    A model with a memory is given it with every batch, and the batch says which rows begin anew (`Segments`).
    Validation has a memory of its own; that of the training is saved with the checkpoints.

    Args:
        model: what is trained.
        curve: receives the loss of every step.
        checkpoints: the folder of the checkpoints, which is the ``output_dir`` of the arguments.
        keep_checkpoints: how many of the newest are kept.
        cuda_graph: passes are recorded once and replayed, see `StepGraph`.
        options: the arguments of `RecipeTrainer`.
    """

    def __init__(
        self,
        *,
        model: SparseTransformerForCausalLM,
        curve: Curve,
        checkpoints: Path,
        keep_checkpoints: int,
        cuda_graph: bool = False,
        **options: Any,
    ) -> None:
        super().__init__(model=model, **options)
        self.curve = curve
        self.keep_checkpoints = keep_checkpoints
        self.step_loss: torch.Tensor | None = None
        self.step_graph = StepGraph(self._pass, model.parameters()) if cuda_graph else None
        self.memory = SegmentMemory(model.config) if model.config.memory else None
        self.validation_memory = SegmentMemory(model.config) if model.config.memory else None
        self.checkpoints = checkpoints
        self._run_dir = checkpoints

    def training_step(self, model: torch.nn.Module, inputs: dict[str, Any], *args: Any, **kwargs: Any) -> torch.Tensor:
        """One batch forward and backward; adds its share to the loss of the update."""
        if self.step_graph is None:
            loss = super().training_step(model, inputs, *args, **kwargs)
        else:
            loss = self.step_graph(self._prepare_inputs(inputs), self.current_gradient_accumulation_steps)
        self.step_loss = loss if self.step_loss is None else self.step_loss + loss
        return loss

    def _pass(self, batch: Mapping[str, torch.Tensor]) -> torch.Tensor:
        """What Trainer does of a batch, for the graph."""
        return super().training_step(cast(torch.nn.Module, self.model_wrapped), dict(batch))

    def compute_loss(self, model: torch.nn.Module, inputs: dict[str, Any], *args: Any, **kwargs: Any) -> Any:
        """The loss of a batch, whose rows go on from what the memory has of them."""
        memory = self.memory if model.training else self.validation_memory
        if memory is not None:
            memory.reset(inputs.pop("starts"))
            inputs["memory"] = memory
        return super().compute_loss(model, inputs, *args, **kwargs)

    def restore_memory(self, checkpoint: Path) -> None:
        """Go on with the memory of a checkpoint, if the model has one."""
        if self.memory is not None:
            state = torch.load(checkpoint / MEMORY, map_location="cpu", weights_only=True)
            self.memory.load_state_dict(state, self.args.device)

    def log(self, logs: dict[str, float], start_time: float | None = None) -> None:
        """Adds bits per byte to what the trackers see."""
        for key in ("loss", "eval_loss"):
            if key in logs:
                logs[key.replace("loss", "bits_per_byte")] = bits(logs[key])
        super().log(logs, start_time)

    def _get_output_dir(self, trial: Any) -> str:
        return str(self._run_dir)

    def _save_checkpoint(self, model: torch.nn.Module, trial: Any) -> None:
        step = self.state.global_step
        # The curve first: a checkpoint promises that the records up to its step are on the disk.
        self.curve.flush()
        try:
            with written_whole(self.checkpoints / f"checkpoint-{step}") as unfinished:
                # Trainer makes "checkpoint-<step>" inside the folder it is given.
                self._run_dir = unfinished
                super()._save_checkpoint(model, trial)
                written = unfinished / f"checkpoint-{step}"
                if self.memory is not None:
                    torch.save(self.memory.state_dict(), written / MEMORY)
                for file in written.iterdir():
                    file.rename(unfinished / file.name)
                written.rmdir()
                seal(unfinished)
        except (OSError, SafetensorError, RuntimeError) as error:
            # torch.save and safetensors report a full disk as errors of their own.
            raise CheckpointError(self._not_written(step, error)) from error
        finally:
            self._run_dir = self.checkpoints
        prune(self.checkpoints, self.keep_checkpoints)

    def _not_written(self, step: int, error: Exception) -> str:
        why = error.strerror if isinstance(error, OSError) and error.strerror else str(error).splitlines()[0]
        earlier = list_checkpoints(self.checkpoints)
        remains = f"{earlier[-1].folder} is still whole" if earlier else "there is no earlier one"
        return (
            f"the checkpoint of step {step} could not be written to {self.checkpoints}: {why}; {remains}. "
            "Free some space, then add --resume to the command to go on"
        )


class Interruption:
    """A request to stop after the current step; see `stop_on_ctrl_c`."""

    def __init__(self) -> None:
        self.requested = False


@contextmanager
def stop_on_ctrl_c() -> Generator[Interruption]:
    """The first Ctrl-C inside asks to stop after the step and save; the second one stops at once."""
    interruption = Interruption()

    def handle(*_: Any) -> None:
        interruption.requested = True
        signal.signal(signal.SIGINT, signal.default_int_handler)

    previous = signal.signal(signal.SIGINT, handle)
    try:
        yield interruption
    finally:
        signal.signal(signal.SIGINT, previous)


class Observer(TrainerCallback):
    """Writes the curve, shows progress, and ends the training on Ctrl-C or when its time is over.

    Args:
        show: called with (step, mean training bits per byte since the last call or None, validation bits per byte
            or None).
        time_limit_s: seconds; None for no limit.
    """

    def __init__(
        self,
        curve: Curve,
        interruption: Interruption,
        show: Callable[[int, float | None, float | None], None],
        time_limit_s: float | None,
    ) -> None:
        self.curve = curve
        self.interruption = interruption
        self.show = show
        self.deadline = math.inf if time_limit_s is None else time.monotonic() + time_limit_s
        self.trainer: ByteTrainer | None = None
        self.learning_rate = 0.0

    def on_step_begin(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        """Before each update: the learning rate that it will be done with."""
        self.learning_rate = kwargs["optimizer"].param_groups[0]["lr"]

    def on_step_end(self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any) -> None:
        """After each update."""
        assert self.trainer is not None
        assert self.trainer.step_loss is not None
        self.curve.add_step(state.global_step, self.trainer.step_loss, self.learning_rate)
        self.trainer.step_loss = None
        loss = self.curve.flush() if control.should_log or control.should_save else None
        self.show(state.global_step, None if loss is None else bits(loss), None)
        self._stop_if_asked(control)

    def on_evaluate(self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any) -> None:
        """After each periodic evaluation, which a Ctrl-C may have come during."""
        loss = kwargs["metrics"]["eval_loss"]
        self.curve.add_evaluation(state.global_step, loss)
        self.show(state.global_step, None, bits(loss))
        self._stop_if_asked(control)

    def _stop_if_asked(self, control: TrainerControl) -> None:
        if self.interruption.requested or time.monotonic() > self.deadline:
            control.should_save = True
            control.should_training_stop = True
