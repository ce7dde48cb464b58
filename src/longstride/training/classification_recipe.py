"""The recipe of a classifier of long documents: what a fine-tuning reads, starts from and does.

``ClassificationRecipe()`` is the default; ``recipes/finetuning/documents.yaml`` spells it out.
"""

from dataclasses import dataclass, field, replace
from pathlib import Path

from longstride.errors import PatternError, RecipeError
from longstride.models import GLOBAL_PROJECTIONS
from longstride.patterns import parse
from longstride.training.recipe import ModelRecipe, OptimizerRecipe, Recipe, RunRecipe, ScheduleRecipe
from longstride.training.sections import Sections, read_sections


@dataclass(frozen=True)
class DocumentsRecipe:
    """What is classified.

    Args:
        path: a folder with a sub-folder a class, or a file with the columns text and label; see
            `longstride.data.labelled`.
        context: tokens that the model reads at once: the beginning, and one fewer bytes. Longer documents are read in
            pieces.
    """

    path: str | None = None
    context: int = 512


@dataclass(frozen=True)
class EncoderRecipe(ModelRecipe):
    """The encoder, in the terms of `SparseTransformerConfig`.

    Args:
        patterns: all must look ahead.
        global_projections: ``shared`` or ``separate``.
        start_from: the folder of an encoder to go on from, whose own values take the place of all others here, which
            must then be left at their defaults; None for a new one.
    """

    patterns: tuple[str, ...] = ("Local(33, lookahead=32) | Global(1, causal=False)",)
    # Small, so that it reads many pieces in minutes on a CPU.
    hidden_size: int = 64
    num_hidden_layers: int = 2
    block: str = "modern"
    dropout: float = 0.1
    global_projections: str = "shared"
    start_from: str | None = None


@dataclass(frozen=True)
class PretrainingRecipe:
    """Masked-language-model training on the same documents, before their classes are learnt.

    Args:
        steps: updates; 0 for none.
    """

    steps: int = 0


@dataclass(frozen=True)
class ClassificationRun:
    """How the training is run: as `RunRecipe`, without checkpoints."""

    seed: int = 0
    device: str = "auto"
    precision: str = "fp32"
    log_every: int = 25
    evaluate_every: int = 200
    time_limit_s: float | None = None
    recompute: str = "nothing"


@dataclass(frozen=True)
class PiecesRecipe:
    """How documents are judged.

    Args:
        most_pieces: of a document of more pieces than these, so many are read, spread evenly.
    """

    most_pieces: int = 16


@dataclass(frozen=True)
class ClassificationRecipe(Sections):
    """All of a fine-tuning. Raises RecipeError for a value that cannot work."""

    data: DocumentsRecipe = field(default_factory=DocumentsRecipe)
    model: EncoderRecipe = field(default_factory=EncoderRecipe)
    pretraining: PretrainingRecipe = field(default_factory=PretrainingRecipe)
    optimizer: OptimizerRecipe = field(default_factory=OptimizerRecipe)
    schedule: ScheduleRecipe = field(default_factory=lambda: ScheduleRecipe(steps=600, warmup_steps=60, batch_size=16))
    run: ClassificationRun = field(default_factory=ClassificationRun)
    evaluation: PiecesRecipe = field(default_factory=PiecesRecipe)

    def __post_init__(self) -> None:
        # What the two kinds of recipe share is checked where it is written; causal patterns are that one's own.
        shared = {name: getattr(self.run, name) for name in vars(self.run)}
        Recipe(
            model=replace(self.model, patterns=Recipe().model.patterns),
            optimizer=self.optimizer,
            schedule=self.schedule,
            run=replace(RunRecipe(), **shared),
        )
        for key, least in (("data.context", 2), ("pretraining.steps", 0), ("evaluation.most_pieces", 1)):
            if self.value(key) < least:
                raise RecipeError(f"{key} is {self.value(key)}: it must be at least {least}")
        if self.model.global_projections not in GLOBAL_PROJECTIONS:
            raise RecipeError(
                f"model.global_projections is {self.model.global_projections!r}: it must be one of "
                f"{', '.join(GLOBAL_PROJECTIONS)}"
            )
        if self.model.memory:
            raise RecipeError(
                f"model.memory is {self.model.memory}: it must be 0, for an encoder reads both sides at once"
            )
        if self.model.start_from is not None:
            for name, default in vars(EncoderRecipe(start_from=self.model.start_from)).items():
                if getattr(self.model, name) != default:
                    raise RecipeError(
                        f"model.{name} with model.start_from: the model in {self.model.start_from} has values of its "
                        "own; leave one out"
                    )
        if not self.model.patterns:
            raise RecipeError("model.patterns is empty: name at least one, such as 'Local(33, lookahead=32)'")
        for text in self.model.patterns:
            try:
                parse(text)
            except PatternError as error:
                raise RecipeError(f"model.patterns: {error}") from error


def read_classification_recipe(path: Path) -> ClassificationRecipe:
    """The recipe in a YAML file; what the file leaves out has its default.

    Raises:
        RecipeError: no such file, not YAML, an unknown key or an illegal value.
    """
    return read_sections(path, ClassificationRecipe())
