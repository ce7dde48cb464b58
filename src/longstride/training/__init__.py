"""Training: recipes, Hugging Face's Trainer with atomic checkpoints and exact resuming, and the evaluation."""

from longstride.training.checkpoints import latest_sound
from longstride.training.classification import Classifier, classifier_config, load_encoder, train_classifier
from longstride.training.classification_evaluation import (
    ClassificationEvaluation,
    document_log_probabilities,
    evaluate_classifier,
)
from longstride.training.classification_recipe import ClassificationRecipe, read_classification_recipe
from longstride.training.curve import read_curve
from longstride.training.evaluation import (
    Evaluation,
    Span,
    evaluate,
    evaluating,
    side_by_side,
    window_losses,
    xz_bits_per_byte,
)
from longstride.training.evaluation_as_trained import evaluate_as_trained
from longstride.training.folder import RunFolder, find_model
from longstride.training.kinds import kind_of
from longstride.training.pieces import VOCAB_SIZE
from longstride.training.recipe import Recipe, parse_assignments, read_recipe
from longstride.training.run import (
    TrainingResult,
    check_precision,
    check_recording,
    model_config,
    resolve_device,
    train,
)
from longstride.training.scaling import read_scale, scaled
from longstride.training.step_graph import StepGraph

__all__ = [
    "VOCAB_SIZE",
    "ClassificationEvaluation",
    "ClassificationRecipe",
    "Classifier",
    "Evaluation",
    "Recipe",
    "RunFolder",
    "Span",
    "StepGraph",
    "TrainingResult",
    "check_precision",
    "check_recording",
    "classifier_config",
    "document_log_probabilities",
    "evaluate",
    "evaluate_as_trained",
    "evaluate_classifier",
    "evaluating",
    "find_model",
    "kind_of",
    "latest_sound",
    "load_encoder",
    "model_config",
    "parse_assignments",
    "read_classification_recipe",
    "read_curve",
    "read_recipe",
    "read_scale",
    "resolve_device",
    "scaled",
    "side_by_side",
    "train",
    "train_classifier",
    "window_losses",
    "xz_bits_per_byte",
]
