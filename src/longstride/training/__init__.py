"""Training: recipes, Hugging Face's Trainer with atomic checkpoints and exact resuming, and the evaluation."""

from longstride.training.checkpoints import latest_sound
from longstride.training.curve import read_curve
from longstride.training.evaluation import (
    Evaluation,
    Span,
    evaluate,
    evaluating,
    record_spans,
    window_losses,
    xz_bits_per_byte,
)
from longstride.training.evaluation_as_trained import evaluate_as_trained
from longstride.training.folder import RunFolder, find_model
from longstride.training.kinds import kind_of
from longstride.training.recipe import Recipe, parse_assignments, read_recipe
from longstride.training.run import TrainingResult, check_precision, model_config, resolve_device, train
from longstride.training.scaling import read_scale, scaled

__all__ = [
    "Evaluation",
    "Recipe",
    "RunFolder",
    "Span",
    "TrainingResult",
    "check_precision",
    "evaluate",
    "evaluate_as_trained",
    "evaluating",
    "find_model",
    "kind_of",
    "latest_sound",
    "model_config",
    "parse_assignments",
    "read_curve",
    "read_recipe",
    "read_scale",
    "record_spans",
    "resolve_device",
    "scaled",
    "train",
    "window_losses",
    "xz_bits_per_byte",
]
