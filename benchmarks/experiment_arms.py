"""The experiments: what each trains on, and its arms, which differ in their patterns and have equal wall time.

All arms of an experiment share model, optimiser, schedule and evaluation; what an arm changes stands in it. The values
are the same for every pattern. The optimiser was chosen by trainings of 45 s along Local(128) on text: Muon came to
1.91, 1.81 and 1.82 bits at 1e-3, 2e-3 and 5e-3, AdamW to 1.95 and 1.91 at 7e-4 and 2e-3, although Muon had half as many
steps in them.
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from typing import Any

from longstride.training import Recipe

#: Of every arm. A linear warm-up, then a cosine that ends at zero when the arm's time is over.
SHARED: dict[str, Any] = {
    "optimizer.name": "muon",
    "optimizer.adam_beta1": 0.9,
    "optimizer.adam_beta2": 0.95,
    "optimizer.max_grad_norm": 1.0,
    "schedule.warmup_steps": 150,
    "run.precision": "bf16",
    "run.compile": True,
    "run.cuda_graph": True,
    "run.log_every": 50,
    # The state after the last step alone.
    "run.checkpoint_every": 1_000_000,
    "run.keep_checkpoints": 1,
}
MODERN: dict[str, Any] = {"model.block": "modern", "optimizer.learning_rate": 3e-3, "optimizer.weight_decay": 0.1}


#: What the names of arms end with that get half of an experiment's time.
HALF = ", half the time"


@dataclass(frozen=True)
class Arm:
    """One training.

    Attributes:
        changes: dotted keys of the recipe that differ from the experiment's.
        maps: learned attention is drawn from it.
        share: of the experiment's seconds that it gets: a whole training, its schedule as short.
    """

    name: str
    patterns: tuple[str, ...]
    changes: Mapping[str, Any] = field(default_factory=dict)
    maps: bool = False
    share: float = 1.0


@dataclass(frozen=True)
class Experiment:
    """Arms of equal wall time.

    Attributes:
        data: the folder of the prepared data.
        recipe: dotted keys of all arms.
        seconds: of training a whole arm, periodic evaluations included, compiling not.
        evaluation_tokens: of the test split that the last evaluation reads.
        validation_tokens: that each of the periodic evaluations reads.
        prompt, drawn, count: tokens that samples start from, tokens to draw, and how many samples.
        sample_seconds: drawing ends after so long, finished or not.
        unit: what bits are counted per.
    """

    name: str
    title: str
    data: str
    recipe: Mapping[str, Any]
    arms: tuple[Arm, ...]
    seconds: float
    evaluation_tokens: int
    validation_tokens: int
    prompt: int
    drawn: int
    count: int
    unit: str = "byte"
    sample_seconds: float = 15.0

    def recipe_of(self, arm: Arm) -> Recipe:
        """The recipe of an arm; its number of steps is still to be measured."""
        values = {**SHARED, **self.recipe, **arm.changes, "model.patterns": list(arm.patterns)}
        recipe = Recipe().override(values)
        return recipe.override({"run.validation_windows": max(1, self.validation_tokens // recipe.data.context)})


def _every(layers: int, place: int, others: str, one: str) -> tuple[str, ...]:
    """A cycle of so many layers, all alike but one."""
    return tuple(one if layer == place else others for layer in range(layers))


#: Of eight.
TWO_DENSE_HEADS = "per_head(Local(256), Local(256), Local(256), Causal())"
SUMMARY = "Local(128) | Summary(128, 8)"
TEXT = Experiment(
    name="text",
    title="Text: 10^8 bytes of English Wikipedia (not enwik8)",
    data="wiki",
    recipe={
        **MODERN,
        # Twice the others': along local windows and two dense heads 1.294 bits after 130 s, and 1.311 at 3e-3.
        "optimizer.learning_rate": 6e-3,
        "data.context": 12288,
        "model.hidden_size": 512,
        "model.num_hidden_layers": 10,
        "model.num_attention_heads": 8,
        "schedule.batch_size": 4,
    },
    arms=(
        Arm("fixed", ("Fixed(128, 32)",), maps=True),
        Arm("local and two dense heads", _every(5, 4, "Local(256)", TWO_DENSE_HEADS), maps=True),
        Arm("strided", ("Local(128)", "Strided(128)"), maps=True),
        Arm("dense", ("Causal()",), maps=True),
        Arm("local", ("Local(128)",)),
        Arm("local and summary", _every(4, 3, "Local(256)", SUMMARY)),
        Arm("local and one dense layer", _every(10, 6, "Local(256)", "Causal()")),
        Arm("dense, T 3,072", ("Causal()",), {"data.context": 3072, "schedule.batch_size": 16}),
        # Whether they need half of dense's time.
        Arm("local and two dense heads" + HALF, _every(5, 4, "Local(256)", TWO_DENSE_HEADS), share=0.5),
        Arm("local and summary" + HALF, _every(4, 3, "Local(256)", SUMMARY), share=0.5),
        Arm("fixed" + HALF, ("Fixed(128, 32)",), share=0.5),
        Arm("strided" + HALF, ("Local(128)", "Strided(128)"), share=0.5),
    ),
    seconds=130,
    evaluation_tokens=2_000_000,
    validation_tokens=98_304,
    prompt=1024,
    drawn=1024,
    count=4,
)
IMAGES = Experiment(
    name="images",
    title="Images: CIFAR-10",
    data="cifar10",
    recipe={
        "data.kind": "images",
        "data.context": 3072,
        "model.hidden_size": 384,
        "model.num_hidden_layers": 16,
        "model.num_attention_heads": 6,
        "optimizer.learning_rate": 2e-3,
        "optimizer.weight_decay": 0.01,
        "schedule.batch_size": 16,
    },
    arms=(
        Arm("strided", ("Local(96)", "Strided(96)"), maps=True),
        Arm("fixed", ("Fixed(96, 8)",), maps=True),
        Arm("dense", ("Causal()",), maps=True),
    ),
    seconds=170,
    evaluation_tokens=2000 * 3072,
    validation_tokens=98_304,
    prompt=1536,
    drawn=1536,
    count=16,
    unit="dim",
)
AUDIO_65K = Experiment(
    name="audio-65k",
    title="Synthesised piano at 12 kHz, 65,536 samples (5.5 s)",
    data="audio",
    recipe={
        **MODERN,
        "data.kind": "audio",
        "data.sample_rate_hz": 12_000,
        "data.context": 65536,
        "model.hidden_size": 384,
        "model.num_hidden_layers": 10,
        "model.num_attention_heads": 6,
        "model.dropout": 0.1,
        "schedule.batch_size": 1,
    },
    arms=(Arm("strided", ("Local(256)", "Strided(256)"), maps=True), Arm("local", ("Local(256)",))),
    seconds=70,
    evaluation_tokens=600_000,
    validation_tokens=131_072,
    prompt=24_000,
    drawn=24_000,
    count=2,
    unit="sample",
    sample_seconds=25,
)
AUDIO_262K = replace(
    AUDIO_65K,
    name="audio-262k",
    title="Synthesised piano at 12 kHz, 262,144 samples (22 s)",
    recipe={**AUDIO_65K.recipe, "data.context": 262_144, "model.hidden_size": 256, "model.num_attention_heads": 4},
    arms=(Arm("strided", ("Local(512)", "Strided(512)")),),
    validation_tokens=262_144,
)
AUDIO_1M = replace(
    AUDIO_65K,
    name="audio-1m",
    title="Synthesised piano at 12 kHz, 1,048,576 samples (87 s)",
    data="audio-by-piece",
    # The paper's 3 M parameters, in the shape of recipes/music-1m.yaml; some hundred steps in all.
    recipe={
        **AUDIO_65K.recipe,
        "data.context": 1 << 20,
        "model.hidden_size": 128,
        "model.num_hidden_layers": 14,
        "model.num_attention_heads": 4,
        "model.dropout": 0.0,
        "run.recompute": "blocks",
        "schedule.warmup_steps": 30,
        "run.log_every": 10,
    },
    arms=(Arm("strided", ("Local(1024)", "Strided(1024)")),),
    seconds=120,
    evaluation_tokens=2 << 20,
    validation_tokens=1 << 20,
)
MIDI = Experiment(
    name="midi",
    title="Piano pieces as MIDI events",
    data="midi",
    recipe={
        **MODERN,
        "data.kind": "midi",
        "data.context": 8192,
        "model.hidden_size": 256,
        "model.num_hidden_layers": 6,
        "model.num_attention_heads": 4,
        "model.dropout": 0.3,
        "schedule.batch_size": 2,
    },
    arms=(Arm("strided", ("Local(128)", "Strided(64)"), maps=True), Arm("dense", ("Causal()",))),
    # The pieces are read some ten times in it; in 25 s, fifty times, both arms learnt them by heart.
    seconds=6,
    evaluation_tokens=1_000_000,
    validation_tokens=65_536,
    prompt=512,
    drawn=2048,
    count=4,
    unit="event",
)
EXPERIMENTS = {experiment.name: experiment for experiment in (TEXT, IMAGES, AUDIO_65K, AUDIO_262K, AUDIO_1M, MIDI)}


def tiny(experiment: Experiment) -> Experiment:
    """The experiment at a size for a CPU and a few steps."""
    context = 48 if experiment.data == "cifar10" else 64
    recipe = {
        **experiment.recipe,
        "data.context": context,
        "model.hidden_size": 32,
        "model.num_attention_heads": 4,
        "model.num_hidden_layers": 2,
        "schedule.batch_size": 2,
        "schedule.warmup_steps": 1,
        "run.device": "cpu",
        "run.precision": "fp32",
        "run.compile": False,
        "run.cuda_graph": False,
        "run.log_every": 1,
    }

    def small(text: str) -> str:
        return re.sub(r"\d+", lambda number: str(max(2, int(number[0]) // 16)), text)

    arms = tuple(
        Arm(arm.name, tuple(small(text) for text in arm.patterns[-2:]), maps=arm.maps) for arm in experiment.arms[:2]
    )
    return replace(
        experiment,
        recipe=recipe,
        arms=arms,
        seconds=0.3,
        evaluation_tokens=20 * context,
        validation_tokens=2 * context,
        prompt=context // 2,
        drawn=context // 2,
        count=2,
        sample_seconds=5,
    )
