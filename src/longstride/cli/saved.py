"""What the user names on the command line: a model, and the text to measure it on."""

from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

from longstride.errors import ArgumentError

if TYPE_CHECKING:
    import numpy as np
    import torch

    from longstride.checks import Subject
    from longstride.data import Kind
    from longstride.models import SparseTransformerForCausalLM

# Models of other architectures often could look back farther than anyone has time for.
MOST_CONTEXT_UNASKED = 2048
# float32 logits of one batch: a gibibyte.
MOST_LOGITS = 2**28
MOST_WINDOWS_UNASKED = 8


def load_model(folder: Path, device: "torch.device") -> "SparseTransformerForCausalLM":
    """The finished Sparse Transformer of a run, or its newest sound checkpoint while it has none, or a saved one.

    Raises:
        ArgumentError: there is no model, it cannot be read, or it is of another architecture.
        CheckpointError: there are only damaged checkpoints.
    """
    from longstride.checks import load_causal_lm
    from longstride.models import SparseTransformerForCausalLM
    from longstride.training import find_model

    found = find_model(folder)
    model = load_causal_lm(found, device)
    if not isinstance(model, SparseTransformerForCausalLM):
        raise ArgumentError(
            f"the model in {found} is a {type(model).__name__}, and this command is for Sparse Transformers: name the "
            "folder of one"
        )
    return model


@dataclass(frozen=True, eq=False)
class Text:
    """What a model is measured on.

    Args:
        tokens: integers [tokens].
        name: what a reader of the screen should see.
        kind: what decoded it; None for text.
        text_bytes: uint8[bytes]: the text itself, where a tokenizer made its tokens.
        documents: int64[documents + 1], where documents begin, and the end, for a model of documents that were packed.
    """

    tokens: "np.ndarray"
    name: str
    unit: str
    record: int = 1
    kind: "Kind | None" = None
    text_bytes: "np.ndarray | None" = None
    documents: "np.ndarray | None" = None

    @property
    def bytes_per_token(self) -> float:
        """Of a text that a tokenizer read."""
        assert self.text_bytes is not None
        return len(self.text_bytes) / len(self.tokens)

    @property
    def is_text(self) -> bool:
        """Whether a sentence can be hidden in it."""
        return self.kind is None or self.kind.name == "documents"


def read_text(run: Path, subject: "Subject", data: Path | None, split: str, max_bytes: int | None) -> Text:
    """The tokens of ``data``, all of it, or of a split of the run's own data; at most ``max_bytes`` bytes or tokens.

    Raises:
        ArgumentError: an unknown split, too few bytes asked for, or neither data nor a run that has some.
        DataError: the data cannot be read.
    """
    from longstride.data import SPLITS, DecodedSource, PreparedData, decode_source, open_source
    from longstride.training import RunFolder

    if split not in SPLITS:
        raise ArgumentError(f"--split {split}: it must be one of {', '.join(SPLITS)}")
    if max_bytes is not None and max_bytes < 2:
        raise ArgumentError(f"--max-bytes {max_bytes}: it must be at least 2")
    prepared = PreparedData.open(RunFolder(run).data) if RunFolder(run).data.exists() else None
    kind = None if prepared is None else prepared.decoded_as
    packed, documents = prepared is not None and RunFolder(run).packs_documents, None
    if data is not None:
        # A model reads what it was trained on, as it was decoded then.
        source = open_source(data) if kind is None else decode_source(data, kind)
        read, name = source.read(max_bytes), str(data)
        if packed and isinstance(source, DecodedSource):
            documents = source.boundaries(len(read))
    elif prepared is not None:
        read, name = prepared.split(split)[:max_bytes], f"the {split} split of {run}"
        documents = prepared.records(split, len(read)) if packed else None
    else:
        raise ArgumentError(f"{run} has no data of its own: name some with --data")
    if kind is not None:
        return Text(read, name, kind.unit, kind.record, kind, documents=documents)
    return Text(subject.encode(read), name, subject.unit, text_bytes=None if subject.tokenizer is None else read)


def how_it_is_read(subject: "Subject", text: Text) -> list[str]:
    """What the checks and the search do otherwise than the evaluation; nothing of most models."""
    said = []
    if getattr(subject.model.config, "memory", 0):
        said.append("Every window is read by itself: the model's memory is empty where it begins.")
    if text.documents is not None:
        said.append(
            "Every window is of one document, as the model sees no other beside it; needles are hidden across them."
        )
    return said


def choose_context(subject: "Subject", asked: int | None) -> int:
    """Tokens of context in a window: those of ``--context``, or else the model's, of other architectures at most 2,048.

    Raises:
        ArgumentError: the model cannot look back so far.
    """
    from longstride.models import SparseTransformerForCausalLM

    if asked is not None:
        if asked < 1 or (subject.context is not None and asked > subject.context):
            most = "" if subject.context is None else f" and at most the model's, {subject.context:,}"
            raise ArgumentError(f"--context {asked}: it must be at least 1{most}")
        if asked != subject.context and getattr(subject.model.config, "memory", 0):
            raise ArgumentError(
                f"--context {asked}: this model reads segments of {subject.context:,} tokens, as it was trained; leave "
                "it out"
            )
        return asked
    if subject.context is not None and isinstance(subject.model, SparseTransformerForCausalLM):
        return subject.context
    return min(MOST_CONTEXT_UNASKED, subject.context or MOST_CONTEXT_UNASKED)


def choose_batch_size(subject: "Subject", context: int, asked: int | None) -> int:
    """Windows that go through the model at once: those of ``--batch-size``, or 8, fewer with a large vocabulary."""
    if asked is not None:
        if asked < 1:
            raise ArgumentError(f"--batch-size {asked}: it must be at least 1")
        return asked
    return max(1, min(MOST_WINDOWS_UNASKED, MOST_LOGITS // (context * subject.vocab_size)))
