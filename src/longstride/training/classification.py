"""Fine-tuning an encoder to classify documents: masked pretraining if asked for, then the classes.

Hugging Face's Trainer does the steps. Ctrl-C or a time limit ends the training after the step; what was learnt until
then is evaluated and saved as usual.
"""

import math
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

from safetensors import SafetensorError
from transformers import set_seed

from longstride.data import LabelledSplits
from longstride.errors import ArgumentError
from longstride.models import (
    SparseTransformerConfig,
    SparseTransformerForMaskedLM,
    SparseTransformerForSequenceClassification,
    check_recomputation,
    layer_patterns,
    recompute_in_backward,
)
from longstride.models.schedule import check_bidirectional
from longstride.training.arguments import trainer_arguments
from longstride.training.classification_recipe import ClassificationRecipe
from longstride.training.document_trainer import DocumentTrainer, Watch
from longstride.training.pieces import VOCAB_SIZE, MaskedPieces, RandomPieces, collate
from longstride.training.run import check_precision, resolve_device
from longstride.training.trainer import stop_on_ctrl_c

Ended = Literal["finished", "interrupted", "time limit"]


@dataclass(frozen=True, eq=False)
class Classifier:
    """What a fine-tuning made.

    Args:
        model: with ``config.id2label``.
        step: updates on the classes.
        ended: ``"finished"``, or stopped early by Ctrl-C or by the time limit.
    """

    model: SparseTransformerForSequenceClassification
    step: int
    ended: Ended


def classifier_config(recipe: ClassificationRecipe, labels: tuple[str, ...]) -> SparseTransformerConfig:
    """The configuration of the recipe's encoder: a new one's, or that of the model it starts from.

    Raises:
        ArgumentError: values that do not fit together; no encoder of bytes at ``model.start_from``.
        PatternError: a pattern that does not look ahead, or does not fit.
        UnsupportedError: the attention's outputs cannot be kept with the backend that the recipe names.
    """
    model = recipe.model
    classes: dict[str, Any] = {
        "id2label": dict(enumerate(labels)),
        "label2id": {label: n for n, label in enumerate(labels)},
        "problem_type": "single_label_classification",  # whatever an encoder to start from did
    }
    if model.start_from is not None:
        config = _started_config(Path(model.start_from), recipe.data.context)
        for name, value in classes.items():
            setattr(config, name, value)
    else:
        config = SparseTransformerConfig(
            vocab_size=VOCAB_SIZE,
            max_position_embeddings=recipe.data.context,
            patterns=list(model.patterns),
            hidden_size=model.hidden_size,
            num_hidden_layers=model.num_hidden_layers,
            num_attention_heads=model.num_attention_heads,
            block=model.block,
            intermediate_size=model.intermediate_size,
            qk_hidden_size=model.qk_hidden_size,
            position_axes=None if model.position_axes is None else list(model.position_axes),
            global_projections=model.global_projections,
            dropout=model.dropout,
            initializer_scale=model.initializer_scale,
            tie_word_embeddings=model.tie_word_embeddings,
            attention_backend=model.attention_backend,
            **classes,
        )
    check_bidirectional(layer_patterns(config))
    check_recomputation(recipe.run.recompute, config.attention_backend)
    return config


def _started_config(folder: Path, context: int) -> SparseTransformerConfig:
    if not (folder / "config.json").is_file():
        raise ArgumentError(
            f"{folder} holds no model to start from (no config.json): name a folder that save_pretrained wrote, such "
            "as the folder model of a run"
        )
    try:
        written, _ = SparseTransformerConfig.get_config_dict(folder)
        if (kind := written.get("model_type")) != SparseTransformerConfig.model_type:
            raise ArgumentError(
                f"the model in {folder} is of the type {kind}, none of ours: start from an encoder that "
                "`longstride finetune` made"
            )
        config = SparseTransformerConfig.from_pretrained(folder)
    except (OSError, ValueError) as error:
        raise ArgumentError(f"{folder / 'config.json'} cannot be read: {str(error).splitlines()[0]}") from error
    if config.vocab_size < VOCAB_SIZE:
        raise ArgumentError(
            f"the model in {folder} knows {config.vocab_size} tokens and {VOCAB_SIZE} are needed, the bytes, a "
            "beginning and a mask: start from an encoder that `longstride finetune` made"
        )
    if config.max_position_embeddings < context:
        raise ArgumentError(
            f"the model in {folder} reads at most {config.max_position_embeddings:,} tokens, fewer than the context of "
            f"{context:,}: give --context {config.max_position_embeddings}"
        )
    # What it is trained on now is what it will read.
    config.max_position_embeddings = context
    return config


def train_classifier(
    recipe: ClassificationRecipe, data: LabelledSplits, folder: Path, say: Callable[[str], None]
) -> Classifier:
    """Train the recipe's classifier, and write the curve into ``folder / "metrics.jsonl"``.

    Args:
        say: called with a line for the screen.

    Raises:
        ArgumentError, PatternError, UnsupportedError: as `classifier_config`.
        LongstrideError: the training diverged.
    """
    device = resolve_device(recipe.run.device)
    check_precision(recipe.run.precision, device)
    config = classifier_config(recipe, data.labels)
    set_seed(recipe.run.seed)
    model = _load_or_make(SparseTransformerForSequenceClassification, config, recipe)
    metrics = folder / "metrics.jsonl"
    metrics.write_text("")
    limit = recipe.run.time_limit_s
    deadline = math.inf if limit is None else time.monotonic() + limit
    with stop_on_ctrl_c() as interruption:
        if recipe.pretraining.steps:
            masked = _load_or_make(SparseTransformerForMaskedLM, config, recipe)
            watch = Watch("pretraining", recipe.pretraining.steps, metrics, say, interruption, deadline)
            _steps(masked, recipe, data, folder, watch, recipe.pretraining.steps)
            model.model.load_state_dict(masked.model.state_dict())
            del masked
        watch = Watch("training", recipe.schedule.steps, metrics, say, interruption, deadline)
        step = 0 if watch.over else _steps(model, recipe, data, folder, watch, recipe.schedule.steps)
    ended: Ended = "interrupted" if interruption.requested else "time limit"
    return Classifier(model.to(device), step, "finished" if step >= recipe.schedule.steps else ended)


def _load_or_make(kind: Any, config: SparseTransformerConfig, recipe: ClassificationRecipe) -> Any:
    start = recipe.model.start_from
    # Another classifier's classes are not these, and a masked language model has none.
    model = kind(config) if start is None else load_encoder(kind, Path(start), config, anew=("classifier.", "lm_head."))
    recompute_in_backward(model, recipe.run.recompute)
    return model


def load_encoder(kind: Any, folder: Path, config: SparseTransformerConfig, *, anew: tuple[str, ...] = ()) -> Any:
    """A model of the class ``kind`` with the weights in ``folder``.

    Args:
        anew: how the names of those weights begin that start anew where the folder has none that fit.

    Raises:
        ArgumentError: the weights cannot be read, or others are missing or of another shape.
    """
    try:
        model, report = kind.from_pretrained(
            folder, config=config, ignore_mismatched_sizes=True, output_loading_info=True
        )
    except (OSError, SafetensorError) as error:
        raise ArgumentError(f"the model in {folder} cannot be read: {str(error).splitlines()[0]}") from error
    unfit = {*report["missing_keys"], *(name for name, *_ in report["mismatched_keys"])}
    if lacking := sorted(name for name in unfit if not name.startswith(anew)):
        raise ArgumentError(
            f"the weights in {folder} do not fit its config.json: {len(lacking)} are missing or of another shape, such "
            f"as {lacking[0]}; name a folder that save_pretrained wrote as a whole"
        )
    return model


def _steps(
    model: Any, recipe: ClassificationRecipe, data: LabelledSplits, folder: Path, watch: Watch, steps: int
) -> int:
    """Train for so many steps, or until ``watch`` says stop; how many they were."""
    schedule, run = recipe.schedule, recipe.run
    from_classes = isinstance(model, SparseTransformerForSequenceClassification)
    pieces = (RandomPieces if from_classes else MaskedPieces)(
        data.splits["train"],
        recipe.data.context,
        steps * schedule.batch_size * schedule.gradient_accumulation_steps,
        # The classes are learnt from other pieces than the pretraining's.
        run.seed * 2 + from_classes,
    )
    arguments = trainer_arguments(
        recipe.optimizer,
        schedule,
        folder=folder,
        device=resolve_device(run.device),
        precision=run.precision,
        seed=run.seed,
        log_every=min(run.log_every, steps),
        eval_strategy="steps" if from_classes else "no",
        eval_steps=run.evaluate_every,
        save_strategy="no",
        report_to="none",
    )
    arguments.max_steps = steps
    arguments.warmup_steps = min(schedule.warmup_steps, steps)
    trainer = DocumentTrainer(
        recipe=recipe, data=data, model=model, args=arguments, train_dataset=pieces, data_collator=collate,
        eval_dataset=pieces, callbacks=[watch],
    )  # fmt: skip
    trainer.train()
    return trainer.state.global_step
