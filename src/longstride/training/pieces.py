"""Documents as the bytes of an encoder: a beginning, a piece of the document, and padding up to the longest of a batch.

A token is a byte. Two more stand beside them: `BEGINNING`, the first token of every piece, and so the one that
``Global(1, causal=False)`` names; and `MASK`, which hides a byte in masked pretraining. A document that is longer
than the context is read in pieces: in training, one that begins at random; in the evaluation, pieces side by side, all
of them full as in training.
"""

from collections.abc import Sequence

import numpy as np
import torch
from torch import Tensor
from torch.utils.data import Dataset

from longstride.data import Labelled

BEGINNING, MASK = 256, 257
VOCAB_SIZE = 258

#: Of the bytes of a piece, so many are to be filled in; of those, so many are hidden and so many replaced by others.
MASKED, HIDDEN, REPLACED = 0.15, 0.8, 0.1


class RandomPieces(Dataset[dict[str, Tensor]]):
    """``count`` pieces of at most ``context`` tokens: a document drawn uniformly, and a place in it, by a hash.

    Item i depends on (seed, i) alone. Each is ``{"input_ids": int64[n], "labels": int64[]}``, the label being the
    document's class.
    """

    def __init__(self, documents: Sequence[Labelled], context: int, count: int, seed: int) -> None:
        self.documents = documents
        self.context = context
        self.count = count
        self.seed = seed

    def __len__(self) -> int:
        return self.count

    def draw(self, index: int) -> tuple[Labelled, np.ndarray, np.random.Generator]:
        """The document, the bytes of the piece as int64[n], and what goes on drawing for this item."""
        if not 0 <= index < self.count:
            raise IndexError(index)
        # An item may draw as much as it likes before it comes to the numbers of the next.
        generator = np.random.Generator(np.random.Philox(key=self.seed, counter=index << 64))
        document = self.documents[int(generator.integers(len(self.documents)))]
        start = int(generator.integers(max(0, len(document.text) - (self.context - 1)) + 1))
        return document, _tokens(document.text[start : start + self.context - 1]), generator

    def __getitem__(self, index: int) -> dict[str, Tensor]:
        document, tokens, _ = self.draw(index)
        return {"input_ids": torch.from_numpy(tokens), "labels": torch.tensor(document.label)}


class MaskedPieces(RandomPieces):
    """The pieces of `RandomPieces`, 15 % of their bytes hidden; the labels int64[n] are these, and -100 elsewhere.

    Source: Devlin 2019 (BERT), section 3.1: of the bytes to fill in 80 % are hidden, 10 % replaced, 10 % as they were.
    """

    def __getitem__(self, index: int) -> dict[str, Tensor]:
        _, tokens, generator = self.draw(index)
        chosen = generator.random(len(tokens)) < MASKED
        chosen[0] = False
        if not chosen.any() and len(tokens) > 1:
            chosen[int(generator.integers(1, len(tokens)))] = True  # a short piece has one at least
        labels = np.where(chosen, tokens, -100)
        how = generator.random(len(tokens))
        tokens = np.where(chosen & (how < HIDDEN), MASK, tokens)
        other = generator.integers(256, size=len(tokens))
        tokens = np.where(chosen & (how >= HIDDEN) & (how < HIDDEN + REPLACED), other, tokens)
        return {"input_ids": torch.from_numpy(tokens), "labels": torch.from_numpy(labels)}


def pieces_of(text: bytes, context: int, most: int) -> list[Tensor]:
    """A document's pieces side by side, int64[at most context] each; of more than ``most``, so many, spread evenly.

    The last one ends with the document, and is as long as the others: a few bytes that are left over would have as much
    say as any other piece, and the model has seen no such pieces of long documents.

    >>> [piece.tolist() for piece in pieces_of(b"abcde", context=3, most=9)]
    [[256, 97, 98], [256, 99, 100], [256, 100, 101]]
    """
    last = max(0, len(text) - (context - 1))
    starts = [*range(0, last, context - 1), last]
    if len(starts) > most:
        starts = [starts[place * (len(starts) - 1) // max(1, most - 1)] for place in range(most)]
    return [torch.from_numpy(_tokens(text[start : start + context - 1])) for start in starts]


def collate(items: Sequence[dict[str, Tensor]]) -> dict[str, Tensor]:
    """A batch: pieces padded on the right to the longest, with their mask; labels of tokens are padded with -100."""
    pieces = [item["input_ids"] for item in items]
    batch = pad(pieces)
    labels = [item["labels"] for item in items]
    if labels[0].dim():
        return batch | {"labels": torch.nn.utils.rnn.pad_sequence(labels, batch_first=True, padding_value=-100)}
    return batch | {"labels": torch.stack(labels)}


def pad(pieces: Sequence[Tensor]) -> dict[str, Tensor]:
    """``input_ids`` and ``attention_mask``, int64[pieces, length of the longest]."""
    longest = max(map(len, pieces))
    lengths = torch.tensor([len(piece) for piece in pieces])
    return {
        "input_ids": torch.nn.utils.rnn.pad_sequence(list(pieces), batch_first=True),
        "attention_mask": (torch.arange(longest) < lengths[:, None]).long(),
    }


def _tokens(text: bytes) -> np.ndarray:
    return np.concatenate([[BEGINNING], np.frombuffer(text, dtype=np.uint8)]).astype(np.int64)
