"""How many documents a classifier gets right, beside what the most frequent class would.

A document's class is the one with the greatest mean log-probability over its pieces (`pieces_of`): each piece has one
say, whatever its place.
"""

import time
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor, nn
from torch.nn import functional as F
from tqdm import tqdm

from longstride.data import Labelled
from longstride.training.pieces import pad, pieces_of


@dataclass(frozen=True)
class ClassificationEvaluation:
    """What was measured.

    Args:
        accuracy: the share of documents whose class is right.
        documents: how many there were.
        majority_label: the most frequent class of the training documents.
        majority_accuracy: the share that would be right if every document were taken for that.
        loss: mean of -log p(class) over the documents, in nats.
        right_by_class: of each class by name, (documents that are right, documents).
        elapsed_s: seconds that the model took.
    """

    accuracy: float
    documents: int
    majority_label: str
    majority_accuracy: float
    loss: float
    right_by_class: dict[str, tuple[int, int]]
    elapsed_s: float

    def __str__(self) -> str:
        width = max(map(len, self.right_by_class))
        return "\n".join(
            (
                f"{100 * self.accuracy:.1f} % of {self.documents:,} documents are classified right",
                f"{100 * self.majority_accuracy:.1f} % would be if all were taken for {self.majority_label}, the most "
                "frequent class in training",
                *(
                    f"  {label:<{width}}  {right:,} of {total:,}"
                    for label, (right, total) in self.right_by_class.items()
                ),
            )
        )


@torch.no_grad()
def document_log_probabilities(
    model: nn.Module,
    texts: Sequence[bytes],
    *,
    context: int,
    most_pieces: int,
    batch_size: int = 8,
    progress: bool = False,
) -> Tensor:
    """log p(class | document), float32[documents, classes] on the CPU: the mean over a document's pieces, normalised.

    Args:
        model: maps input_ids and attention_mask to ``.logits`` float[batch, classes].
        context: the model's longest input, in tokens.
        most_pieces: of a document of more pieces, so many are read.
        batch_size: pieces that go through the model at once.
        progress: show a bar on a terminal.
    """
    device = next(model.parameters()).device
    was_training = model.training
    model.eval()
    pieces = [(number, piece) for number, text in enumerate(texts) for piece in pieces_of(text, context, most_pieces)]
    pieces.sort(key=lambda entry: len(entry[1]))  # so that little is padded
    summed: Tensor | None = None
    counted = torch.zeros(len(texts), 1)
    batches = range(0, len(pieces), batch_size)
    for first in tqdm(batches, desc="reading", unit="batch", leave=False, disable=None if progress else True):
        numbers, batch = zip(*pieces[first : first + batch_size], strict=True)
        inputs = {name: tensor.to(device) for name, tensor in pad(batch).items()}
        scores = model(**inputs).logits.float().log_softmax(-1).cpu()
        if summed is None:
            summed = torch.zeros(len(texts), scores.shape[1])
        summed.index_add_(0, torch.tensor(numbers), scores)
        counted.index_add_(0, torch.tensor(numbers), torch.ones(len(numbers), 1))
    model.train(was_training)
    assert summed is not None
    return (summed / counted).log_softmax(-1)


def evaluate_classifier(
    model: nn.Module,
    documents: Sequence[Labelled],
    labels: Sequence[str],
    training: Sequence[Labelled],
    *,
    context: int,
    most_pieces: int,
    batch_size: int = 8,
    progress: bool = False,
) -> ClassificationEvaluation:
    """Measure a classifier on documents that it has not seen.

    Args:
        labels: the classes by name.
        training: the documents it was trained on, for their most frequent class.
        model, context, most_pieces, batch_size, progress: as in `document_log_probabilities`.
    """
    began = time.monotonic()
    scores = document_log_probabilities(
        model,
        [document.text for document in documents],
        context=context,
        most_pieces=most_pieces,
        batch_size=batch_size,
        progress=progress,
    )
    truth = torch.tensor([document.label for document in documents])
    right = scores.argmax(1) == truth
    majority, _ = Counter(document.label for document in training).most_common(1)[0]
    return ClassificationEvaluation(
        accuracy=right.float().mean().item(),
        documents=len(documents),
        majority_label=labels[majority],
        majority_accuracy=(truth == majority).float().mean().item(),
        loss=F.nll_loss(scores, truth).item(),
        right_by_class={
            label: (int(right[truth == number].sum()), int((truth == number).sum()))
            for number, label in enumerate(labels)
            if (truth == number).any()
        },
        elapsed_s=time.monotonic() - began,
    )
