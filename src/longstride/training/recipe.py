"""A recipe: every value that decides what a training run does, as frozen dataclasses, a YAML file, or overrides.

``Recipe()`` is the default; ``recipes/bytes-small.yaml`` spells it out. A YAML file names only what differs. A dotted
key such as ``model.hidden_size`` names one value on the command line and in error messages.
"""

import math
import typing
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path

import yaml

from longstride.data import KINDS, ON_CORRUPT
from longstride.errors import PatternError, RecipeError
from longstride.models import BLOCKS, RECOMPUTE
from longstride.patterns import parse
from longstride.training.sections import Sections, read_sections


@dataclass(frozen=True)
class DataRecipe:
    """What is learnt.

    Args:
        path: a file or folder; None for the source of Python's standard library on this machine.
        kind: how it is read, one of `longstride.data.KINDS`; None to guess from the names of its files.
        context: tokens (of bytes: bytes) in a training window, and the most that the model can look back over.
        documents: ``joined`` to let windows run through the ends of documents (files, pieces, recordings) as if there
            were none; ``packed`` to keep documents apart that lie in one window: none sees another, and positions,
            strides and blocks count from each one's beginning. With a memory, each is read in segments of its own.
        on_corrupt: ``skip`` to leave corrupt files out and count them, ``stop`` to stop at the first.
        sample_rate_hz: of audio: the rate that recordings are resampled to.
        step_ms: of piano rolls: how long a step lasts.
        bins, binning: of CSV files: the bins of each column, and whether they are ``quantile`` or ``uniform`` ones.
    """

    path: str | None = None
    kind: str | None = None
    context: int = 512
    documents: str = "joined"
    on_corrupt: str = "skip"
    sample_rate_hz: int = 16_000
    step_ms: int = 100
    bins: int = 255
    binning: str = "quantile"


@dataclass(frozen=True)
class ModelRecipe:
    """The Sparse Transformer, in the terms of `SparseTransformerConfig`.

    Args:
        patterns: pattern texts, cycled over the layers.
        block: ``sparse_transformer``, the paper's, or ``modern``.
        memory: tokens of earlier windows that a layer may read, for which windows follow one another in every row of
            the batch (Dai et al. 2019); 0 for windows drawn at random. It needs ``modern`` blocks.
        intermediate_size: width of the feed-forward network; None for 4 * hidden_size, in the modern block 8/3 of it.
        qk_hidden_size: width of queries and keys, all heads together; None for hidden_size.
        position_axes: sizes of the position embeddings' axes, slowest first, such as (32, 32, 3) for an image's rows,
            columns and channels; None for rows and columns as wide as the patterns' stride.
        initializer_scale: weights start with standard deviation initializer_scale / sqrt(fan-in); the paper has 0.125,
            a small model learns faster from 1.
        attention_backend: a backend of `longstride.attention` by name; None for the fastest that fits.
    """

    patterns: tuple[str, ...] = ("Local(32) | Strided(16)",)
    hidden_size: int = 128
    num_hidden_layers: int = 4
    num_attention_heads: int = 4
    block: str = "sparse_transformer"
    memory: int = 0
    intermediate_size: int | None = None
    qk_hidden_size: int | None = None
    position_axes: tuple[int, ...] | None = None
    dropout: float = 0.0
    initializer_scale: float = 1.0
    tie_word_embeddings: bool = False
    attention_backend: str | None = None


@dataclass(frozen=True)
class OptimizerRecipe:
    """Muon with AdamW, or AdamW alone, after clipping to a norm. Decay and norm are the paper's, sec. 6.

    The paper trains with Adam, and so do its recipes; it names no betas. Of the small default model Muon makes another
    one: in as many minutes of a CPU it comes to 1.5 bits per byte instead of 2.6 on the same part of the test split.

    Args:
        name: ``muon`` for `longstride.training.muon.MuonWithAdamW`, or ``adamw``.
        learning_rate: the peak, reached at the end of the warm-up; of Muon's steps as of AdamW's.
        adam_beta1, adam_beta2: AdamW's alone.
    """

    name: str = "muon"
    learning_rate: float = 6e-3
    weight_decay: float = 0.01
    adam_beta1: float = 0.9
    adam_beta2: float = 0.95
    max_grad_norm: float = 1.0


@dataclass(frozen=True)
class ScheduleRecipe:
    """How long and with how much at a time: a linear warm-up, then a cosine down to zero at ``steps``.

    Args:
        steps: updates of the weights.
        batch_size: windows that go through the model at once.
        gradient_accumulation_steps: batches that one update sums over.
    """

    steps: int = 2200
    warmup_steps: int = 60
    batch_size: int = 2
    gradient_accumulation_steps: int = 1


@dataclass(frozen=True)
class RunRecipe:
    """How the training is run: machine, seed, what is written how often (in steps).

    Args:
        device: ``auto`` (CUDA or MPS where there is one), ``cpu``, ``cuda`` or ``mps``.
        precision: ``fp32``, ``bf16`` or ``fp16`` (the latter two by autocast).
        validation_windows: windows of the validation split that each periodic evaluation reads.
        keep_checkpoints: how many of the newest are kept.
        time_limit_s: stop after so many seconds of training in this process; None for no limit.
        recompute: what the backward pass computes again, to save memory: ``nothing``, ``blocks``, or
            ``all_but_attention``; see `longstride.models.recompute_in_backward`.
        compile: compile the residual blocks for training, on the first step; see
            `longstride.models.compiled_blocks`.
        cuda_graph: record the forward and the backward pass as a CUDA graph, after the first steps, and replay it: for
            models whose steps take the host longer than the device; see `longstride.training.StepGraph`.
        tensorboard: write event files too.
    """

    seed: int = 0
    device: str = "auto"
    precision: str = "fp32"
    log_every: int = 25
    evaluate_every: int = 250
    validation_windows: int = 32
    checkpoint_every: int = 250
    keep_checkpoints: int = 2
    time_limit_s: float | None = None
    recompute: str = "nothing"
    compile: bool = False
    cuda_graph: bool = False
    tensorboard: bool = False


@dataclass(frozen=True)
class EvaluationRecipe:
    """The evaluation on the test split after the training.

    Args:
        min_context: bytes that must stand before a byte in its window for its prediction to count; None for half
            the context.
        max_bytes: how much of the test split to read; None for all.
    """

    min_context: int | None = None
    max_bytes: int | None = 262_144


@dataclass(frozen=True)
class SampleRecipe:
    """The samples after the training; see `longstride.generation` for the meaning of the values.

    Args:
        prompt: text to continue; empty for the model's own beginning of a line.
        length_bytes: bytes that each sample adds.
        count: samples, with the seeds ``run.seed``, ``run.seed + 1``, ...
    """

    prompt: str = ""
    length_bytes: int = 300
    count: int = 2
    temperature: float = 0.8
    top_k: int | None = None
    top_p: float | None = None


PRECISIONS = ("fp32", "bf16", "fp16")
DOCUMENTS = ("joined", "packed")
OPTIMIZERS = ("adamw", "muon")
DEVICES = ("auto", "cpu", "cuda", "mps")
CHOICES = {
    "run.precision": PRECISIONS,
    "run.device": DEVICES,
    "run.recompute": RECOMPUTE,
    "model.block": BLOCKS,
    "optimizer.name": OPTIMIZERS,
    "data.on_corrupt": ON_CORRUPT,
    "data.documents": DOCUMENTS,
}

# What run.cuda_graph takes: with other values the host scales, packs or remembers step by step.
RECORDED: dict[str, tuple[typing.Any, ...]] = {
    "run.precision": ("fp32", "bf16"),
    "data.documents": ("joined",),
    "model.memory": (0,),
}

# What may differ when a run goes on: none of these changes the curve up to where the run stands.
CHANGEABLE = (
    "schedule.steps",
    "run.device",
    "run.cuda_graph",
    "run.keep_checkpoints",
    "run.time_limit_s",
    "run.tensorboard",
)
CHANGEABLE_SECTIONS = ("evaluation.", "sample.")


@dataclass(frozen=True)
class Recipe(Sections):
    """All of a training run. Raises RecipeError for a value that cannot work."""

    data: DataRecipe = field(default_factory=DataRecipe)
    model: ModelRecipe = field(default_factory=ModelRecipe)
    optimizer: OptimizerRecipe = field(default_factory=OptimizerRecipe)
    schedule: ScheduleRecipe = field(default_factory=ScheduleRecipe)
    run: RunRecipe = field(default_factory=RunRecipe)
    evaluation: EvaluationRecipe = field(default_factory=EvaluationRecipe)
    sample: SampleRecipe = field(default_factory=SampleRecipe)

    def __post_init__(self) -> None:
        at_least_one = (
            "data.context", "model.hidden_size", "model.num_hidden_layers", "model.num_attention_heads",
            "model.intermediate_size", "model.qk_hidden_size",
            "schedule.steps", "schedule.batch_size", "schedule.gradient_accumulation_steps", "run.log_every",
            "run.evaluate_every", "run.validation_windows", "run.checkpoint_every", "run.keep_checkpoints",
            "evaluation.min_context", "evaluation.max_bytes", "sample.top_k",
        )  # fmt: skip
        not_negative = (
            "model.memory", "schedule.warmup_steps", "run.seed", "optimizer.weight_decay", "optimizer.max_grad_norm",
            "sample.length_bytes", "sample.count", "sample.temperature", "run.time_limit_s",
        )  # fmt: skip
        for key, value in self.items():
            if isinstance(value, float) and not math.isfinite(value):
                raise RecipeError(f"{key} is {value}: it must be a finite number")
            if key in at_least_one and value is not None and value < 1:
                raise RecipeError(f"{key} is {value}: it must be at least 1")
            if key in not_negative and value is not None and value < 0:
                raise RecipeError(f"{key} is {value}: it must not be negative")
        for key, low, high in (
            ("model.dropout", 0.0, 1.0),
            ("optimizer.adam_beta1", 0.0, 1.0),
            ("optimizer.adam_beta2", 0.0, 1.0),
        ):
            value = self.value(key)
            if not low <= value < high:
                raise RecipeError(f"{key} is {value}: it must be at least {low:g} and below {high:g}")
        if self.run.seed >= 2**32:
            raise RecipeError(f"run.seed is {self.run.seed}: it must be below 2**32, as numpy's seeds are")
        for key in ("optimizer.learning_rate", "model.initializer_scale"):
            if self.value(key) <= 0:
                raise RecipeError(f"{key} is {self.value(key)}: it must be above 0")
        if self.sample.top_p is not None and not 0 < self.sample.top_p <= 1:
            raise RecipeError(f"sample.top_p is {self.sample.top_p}: it must be above 0 and at most 1")
        for key, allowed in CHOICES.items():
            if self.value(key) not in allowed:
                raise RecipeError(f"{key} is {self.value(key)!r}: it must be one of {', '.join(allowed)}")
        if self.data.kind is not None and self.data.kind not in KINDS:
            raise RecipeError(f"data.kind is {self.data.kind!r}: it must be one of {', '.join(KINDS)}, or null")
        if self.data.documents == "packed" and self.data.kind == "bytes":
            raise RecipeError(
                "data.documents is packed with data.kind bytes, which keeps no boundaries: take data.kind documents, "
                "where a file, or a line of a .jsonl file, is a document"
            )
        if self.run.cuda_graph:
            for key, allowed in RECORDED.items():
                if self.value(key) not in allowed:
                    raise RecipeError(
                        f"run.cuda_graph with {key} {self.value(key)!r}: the host takes part in every such step, and "
                        f"what it does is not recorded; set {key} to {' or '.join(map(str, allowed))}, or leave "
                        "run.cuda_graph out"
                    )
            if self.run.recompute != "nothing" and self.model.dropout > 0:
                raise RecipeError(
                    f"run.cuda_graph with run.recompute {self.run.recompute!r} and model.dropout {self.model.dropout}: "
                    "to draw the same again, the host reads random states, and what it does is not recorded; leave one "
                    "of the three out"
                )
        if self.data.context < 2:
            raise RecipeError("data.context is 1: a byte needs at least one byte before it, so it must be at least 2")
        if self.min_context > self.data.context:
            raise RecipeError(
                f"evaluation.min_context is {self.min_context}: it must be at most data.context, {self.data.context}"
            )
        if not self.model.patterns:
            raise RecipeError("model.patterns is empty: name at least one pattern, such as 'Local(32) | Strided(32)'")
        for text in self.model.patterns:
            try:
                pattern = parse(text)
            except PatternError as error:
                raise RecipeError(f"model.patterns: {error}") from error
            if not pattern.is_causal:
                raise RecipeError(f"model.patterns: {text} lets a byte see later bytes: use a causal pattern")

    @property
    def min_context(self) -> int:
        """The resolved `EvaluationRecipe.min_context`, in bytes."""
        if self.evaluation.min_context is None:
            return self.data.context // 2
        return self.evaluation.min_context

    def check_resumable(self, started: "Recipe") -> None:
        """Whether a run started with the recipe ``started`` may go on with this one.

        Raises:
            RecipeError: a value differs that the run so far depends on.
        """
        before = dict(started.items())
        for key, value in self.items():
            if value != before[key] and key not in CHANGEABLE and not key.startswith(CHANGEABLE_SECTIONS):
                raise RecipeError(
                    f"{key} is {before[key]!r} in the run to resume and cannot become {value!r}: leave it out, or "
                    "start a new run in another --output"
                )


def read_recipe(path: Path) -> Recipe:
    """The recipe in a YAML file; what the file leaves out has its default.

    Raises:
        RecipeError: no such file, not YAML, an unknown key or an illegal value.
    """
    return read_sections(path, Recipe())


def parse_assignments(assignments: Sequence[str]) -> dict[str, typing.Any]:
    """``["model.hidden_size=256"]`` as ``{"model.hidden_size": 256}``; the values are YAML.

    Raises:
        RecipeError: a text without ``=``, or whose value is not YAML.
    """
    values = {}
    for assignment in assignments:
        key, equals, text = assignment.partition("=")
        if not equals:
            raise RecipeError(f"--set {assignment}: write key=value, such as --set model.hidden_size=256")
        try:
            values[key.strip()] = yaml.safe_load(text)
        except yaml.YAMLError as error:
            raise RecipeError(f"--set {assignment}: the value is not YAML: {' '.join(str(error).split())}") from error
    return values
