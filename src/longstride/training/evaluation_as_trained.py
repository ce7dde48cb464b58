"""The evaluation of models that were trained by segments, or on documents that do not see one another.

A model with a memory reads a text in segments that follow one another, as in training, in several rows at once; each
row but the first begins early, so that its memory is full where it begins to count. Documents that were packed in
training are packed here, too, and all their tokens count but the first of each, which nothing stands before.
"""

from collections.abc import Iterator

import numpy as np
import torch

from longstride.data import EvenWindows, PackedWindows, Segments
from longstride.errors import ArgumentError, DataError
from longstride.models import SegmentMemory, SparseTransformerForCausalLM
from longstride.training.evaluation import Batch, Evaluation, check_min_context, evaluate, measured


def evaluate_as_trained(
    model: SparseTransformerForCausalLM,
    data: np.ndarray,
    *,
    min_context: int,
    context: int | None = None,
    batch_size: int = 8,
    progress: bool = False,
    record: int = 1,
    unit: str = "byte",
    documents: np.ndarray | None = None,
) -> Evaluation:
    """`evaluate`, in the way that the model was trained: by windows, by segments, or within documents.

    Args:
        model, data, batch_size, progress, record, unit: as in `evaluate`.
        min_context: as in `evaluate`; 1 with documents.
        context: tokens of a window, as many as the model was trained with unless given; of a segment no others.
        documents: int64[documents + 1], where documents begin in ``data``, and its end, for a model of packed ones.

    Raises:
        ArgumentError, DataError, LongstrideError: as `evaluate`.
    """
    trained = model.config.max_position_embeddings - model.config.memory
    if context is None:
        context = trained
    if context > trained or (model.config.memory and context != trained):
        raise ArgumentError(
            f"--context {context}: this model was trained with {trained:,} tokens in a "
            + ("segment, and reads no others" if model.config.memory else "window, and that is the most")
        )
    if documents is not None and min_context != 1:
        raise ArgumentError(
            f"--min-context {min_context}: documents that do not see one another are predicted from their beginnings "
            "on, so that it must be 1"
        )
    if model.config.memory:
        return _by_segments(model, data, context, min_context, batch_size, progress, unit, documents)
    if documents is not None:
        return _packed(model, data, context, batch_size, progress, unit, documents)
    return evaluate(
        model,
        data,
        context=context,
        min_context=min_context,
        batch_size=batch_size,
        progress=progress,
        record=record,
        unit=unit,
    )


def _by_segments(
    model: SparseTransformerForCausalLM,
    data: np.ndarray,
    context: int,
    min_context: int,
    batch_size: int,
    progress: bool,
    unit: str,
    documents: np.ndarray | None,
) -> Evaluation:
    check_min_context(data, context, min_context, unit)
    segments = Segments(data, context, rows=1, count=1, records=documents)
    rows = min(batch_size, segments.total)
    bounds = [row * segments.total // rows for row in range(rows + 1)]
    early = -(-max(min_context, model.config.memory) // context)
    firsts = [max(0, bound - early) for bound in bounds[:-1]]
    steps = max(end - first for first, end in zip(firsts, bounds[1:], strict=True))
    memory = SegmentMemory(model.config)

    def batches() -> Iterator[Batch]:
        for step in range(steps):
            inputs, targets, starts = [], [], []
            for first, begin, end in zip(firsts, bounds[:-1], bounds[1:], strict=True):
                number = first + step
                # A row that is through reads its last segment again, and counts nothing.
                read, following, begins = segments.read(min(number, end - 1))
                if not begin <= number < end:
                    following = torch.full_like(following, -100)
                elif documents is None:
                    following[: max(0, min_context - 1 - number * context)] = -100
                inputs.append(read)
                targets.append(following)
                starts.append(begins or step == 0)
            memory.reset(starts)
            yield {"input_ids": torch.stack(inputs), "memory": memory}, torch.stack(targets)

    longest = len(data) if documents is None else int(np.diff(documents).max())
    counted = np.asarray(data[min_context:]) if documents is None else np.delete(data, documents[:-1])
    looks_back = (min_context, min(context + model.config.memory, longest - 1))
    return measured(model, batches(), steps, counted, looks_back=looks_back, progress=progress, unit=unit)


def _packed(
    model: SparseTransformerForCausalLM,
    data: np.ndarray,
    context: int,
    batch_size: int,
    progress: bool,
    unit: str,
    documents: np.ndarray,
) -> Evaluation:
    if context < 2:
        raise ArgumentError(f"--context {context}: a window has a first token, which is not predicted: at least 2")
    number = len(data) // context
    if not number:
        raise DataError(f"{len(data):,} tokens are too few to evaluate: a window has {context:,}; give more data")
    # Side by side; what is left over is less than one.
    data = data[: number * context]
    documents = np.unique(np.minimum(documents, len(data)))
    windows = PackedWindows(EvenWindows(data, context, number), documents)

    def batches() -> Iterator[Batch]:
        for first in range(0, number, batch_size):
            batch = windows.collate([windows[index] for index in range(first, min(first + batch_size, number))])
            yield batch, torch.nn.functional.pad(batch.pop("labels")[:, 1:], (0, 1), value=-100)

    looks_back = (1, min(context, int(np.diff(documents).max())) - 1)
    steps = -(-number // batch_size)
    return measured(model, batches(), steps, np.asarray(data), looks_back=looks_back, progress=progress, unit=unit)
