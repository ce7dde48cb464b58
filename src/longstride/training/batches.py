"""What a training and its periodic evaluations read: which tokens make a batch, and what the model is told of them."""

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

from torch.utils.data import Dataset

from longstride.data import EvenWindows, PackedWindows, PreparedData, RandomWindows, Segments
from longstride.training.recipe import Recipe


@dataclass(frozen=True, eq=False)
class Batches:
    """The data sets for `ByteTrainer`, and how their items become a batch; None for the Trainer's own way."""

    train: Dataset
    validation: Dataset
    collate: Callable[[list[Any]], dict[str, Any]] | None


def batches_of(recipe: Recipe, data: PreparedData) -> Batches:
    """The batches of a recipe.

    ============================  ========================================================================
    ``model.memory`` above 0      `Segments`: each row of a batch goes on where the last one ended
    ``data.documents=packed``     `PackedWindows`: windows with the boundaries of the documents in them;
                                  with a memory, segments that end with their documents
    otherwise                     windows of the files joined
    ============================  ========================================================================

    Training reads as many as its steps ask for; validation at most ``run.validation_windows``, the same each time.
    """
    schedule, context, seed = recipe.schedule, recipe.data.context, recipe.run.seed
    count = schedule.steps * schedule.batch_size * schedule.gradient_accumulation_steps
    most = recipe.run.validation_windows
    packed = recipe.data.documents == "packed"
    train, validation = data.split("train"), data.split("validation")
    if recipe.model.memory:
        rows = schedule.batch_size
        records = {name: data.records(name) if packed else None for name in ("train", "validation")}
        # Whole batches: a row is followed through all of them.
        steps = max(1, min(most, len(validation) // context) // rows)
        return Batches(
            Segments(train, context, rows=rows, count=count, records=records["train"]),
            Segments(validation, context, rows=rows, count=steps * rows, records=records["validation"]),
            Segments.collate,
        )
    random = RandomWindows(train, context, count, seed, data.record)
    even = EvenWindows(validation, context, most, data.record)
    if packed:
        return Batches(
            PackedWindows(random, data.records("train")),
            PackedWindows(even, data.records("validation")),
            PackedWindows.collate,
        )
    return Batches(random, even, None)
