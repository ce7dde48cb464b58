"""Hugging Face's Trainer for documents: judged whole, and watched."""

# ruff: noqa: ARG002 (Trainer decides what its methods and callbacks take)

import json
import math
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

from transformers import TrainerCallback, TrainerControl, TrainerState

from longstride.data import LabelledSplits
from longstride.errors import LongstrideError
from longstride.training.classification_evaluation import evaluate_classifier
from longstride.training.classification_recipe import ClassificationRecipe
from longstride.training.recipe_trainer import RecipeTrainer
from longstride.training.trainer import Interruption


class DocumentTrainer(RecipeTrainer):
    """Trainer whose evaluation judges whole documents of the validation split.

    Args:
        recipe: how documents are judged.
        data: the documents.
        options: the arguments of Trainer.
    """

    def __init__(self, *, recipe: ClassificationRecipe, data: LabelledSplits, **options: Any) -> None:
        super().__init__(optimizer_name=recipe.optimizer.name, **options)
        self.recipe = recipe
        self.data = data

    def evaluate(self, *args: Any, **kwargs: Any) -> dict[str, float]:
        """Accuracy and loss on the validation documents."""
        assert self.model is not None
        found = evaluate_classifier(
            self.model,
            self.data.splits["validation"],
            self.data.labels,
            self.data.splits["train"],
            context=self.recipe.data.context,
            most_pieces=self.recipe.evaluation.most_pieces,
            batch_size=self.recipe.schedule.batch_size,
        )
        metrics = {"eval_loss": found.loss, "eval_accuracy": found.accuracy}
        self.control = self.callback_handler.on_evaluate(self.args, self.state, self.control, metrics)
        return metrics


class Watch(TrainerCallback):
    """Writes the curve, shows progress, and ends the training on Ctrl-C or when its time is over.

    A line of the curve is ``{"phase", "step", "loss"}``, the mean over the steps since the last one in nats, or
    ``{"phase", "step", "validation_loss", "validation_accuracy"}``.

    Args:
        phase: ``pretraining`` or ``training``.
        steps: how many there will be.
        metrics: the file of the curve.
        say: called with a line for the screen.
        deadline: on `time.monotonic`'s clock.
    """

    def __init__(
        self,
        phase: str,
        steps: int,
        metrics: Path,
        say: Callable[[str], None],
        interruption: Interruption,
        deadline: float,
    ) -> None:
        self.phase = phase
        self.steps = steps
        self.metrics = metrics
        self.say = say
        self.interruption = interruption
        self.deadline = deadline
        self.began = time.monotonic()

    @property
    def over(self) -> bool:
        """Whether Ctrl-C was pressed or the time is up."""
        return self.interruption.requested or time.monotonic() > self.deadline

    def on_step_end(self, args: Any, state: TrainerState, control: TrainerControl, **kwargs: Any) -> None:
        """After each update."""
        if self.over:
            control.should_training_stop = True
        if control.should_training_stop:
            # Else what came since the last report would be neither in the curve nor held to be finite.
            control.should_log = True

    def on_log(self, args: Any, state: TrainerState, control: TrainerControl, **kwargs: Any) -> None:
        """At each report of the loss."""
        logs = kwargs["logs"]
        if "loss" not in logs:
            return  # the summary at the end
        loss, step = float(logs["loss"]), state.global_step
        if not math.isfinite(loss):
            raise LongstrideError(
                f"the loss became {loss} at step {step} of the {self.phase}: train with a lower --lr, a longer "
                "schedule.warmup_steps, or --precision fp32"
            )
        self._write(step, loss=loss)
        elapsed_s = time.monotonic() - self.began
        self.say(f"{self.phase}, step {step:,} of {self.steps:,}: loss {loss:.3f}, {elapsed_s:.0f} s")

    def on_evaluate(self, args: Any, state: TrainerState, control: TrainerControl, **kwargs: Any) -> None:
        """After each evaluation."""
        metrics = kwargs["metrics"]
        loss, accuracy = metrics["eval_loss"], metrics["eval_accuracy"]
        self._write(state.global_step, validation_loss=loss, validation_accuracy=accuracy)
        self.say(
            f"{self.phase}, step {state.global_step:,} of {self.steps:,}: {100 * accuracy:.1f} % of the validation "
            f"documents right, loss {loss:.3f}"
        )

    def _write(self, step: int, **values: float) -> None:
        with self.metrics.open("a") as file:
            file.write(json.dumps({"phase": self.phase, "step": step, **values}) + "\n")
