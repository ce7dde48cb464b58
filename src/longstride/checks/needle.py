"""A needle in a haystack: is a fact still found that was said long before it is asked for?

A sentence such as "The password of account 482135 is qkzt." is hidden in a text of the user's own, at a depth from 0
(the beginning) to 1 (right before the question); the text ends with "The password of account 482135 is ", and the
model is to go on with "qkzt". One pass of the model over the sequence says both of:

- *chosen*: held to a list of candidate values, no two of which begin with the same token, does it write the right one?
  That is whether the right first token is the likeliest of the candidates'. Guessing has 1 / candidates.
- *written*: does it write the whole value, greedily and unprompted, among all tokens that it knows?

A tie is no retrieval: a model that cannot tell the candidates apart has chosen nothing.
"""

import itertools
import string
from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import numpy as np
import torch
from tqdm import tqdm

from longstride.checks.subject import Predictor, Subject
from longstride.errors import ArgumentError, DataError
from longstride.training import evaluating

KEY_DIGITS, VALUE_LETTERS = 6, 4
DEPTHS = (0.0, 0.25, 0.5, 0.75, 1.0)
# More values cannot all begin with letters of their own.
MOST_CANDIDATES = len(string.ascii_lowercase)


@dataclass(frozen=True)
class Haystack:
    """What is hidden where.

    Args:
        lengths: tokens of a sequence up to the last of the value, which is predicted from so many.
        depths: where the needle stands, from 0 (first) to 1 (right before the question).
        trials: sequences for each length and depth, of other keys, values and places of the text.
        candidates: values that the model chooses from, the right one among them.
        needle: the sentence, with ``{key}`` before ``{value}``; what stands before the value is the question.
        seed: the same seed asks the same.
    """

    lengths: tuple[int, ...]
    depths: tuple[float, ...] = DEPTHS
    trials: int = 8
    candidates: int = 16
    needle: str = "\nThe password of account {key} is {value}.\n"
    seed: int = 0

    def __post_init__(self) -> None:
        if not self.lengths or min(self.lengths) < 1:
            raise ArgumentError(f"--length {_words(self.lengths)}: give whole numbers of tokens, at least 1")
        if not self.depths or not all(0 <= depth <= 1 for depth in self.depths):
            raise ArgumentError(f"--depth {_words(self.depths)}: give numbers from 0 (the beginning) to 1 (the end)")
        if self.trials < 1:
            raise ArgumentError(f"--trials {self.trials}: it must be at least 1")
        if not 2 <= self.candidates <= MOST_CANDIDATES:
            raise ArgumentError(f"--candidates {self.candidates}: it must be from 2 to {MOST_CANDIDATES}")
        if self.seed < 0:
            raise ArgumentError(f"--seed {self.seed}: it must not be negative")
        places = [self.needle.find(name) for name in ("{key}", "{value}")]
        if not -1 < places[0] < places[1] or self.needle.count("{key}") + self.needle.count("{value}") != 2:
            raise ArgumentError(
                f"--needle {self.needle!r}: it must name {{key}} and then {{value}}, once each, as in "
                "'The password of account {key} is {value}.'"
            )


@dataclass(frozen=True)
class Retrieval:
    """How often the fact was found; each table is [lengths][depths], a share of the trials from 0 to 1.

    Args:
        chosen: the right value was likelier than each other candidate.
        probability: what it had of the probability of all candidates together, on average.
        written: the whole value was the likeliest continuation, token by token.
    """

    haystack: Haystack
    chosen: tuple[tuple[float, ...], ...]
    probability: tuple[tuple[float, ...], ...]
    written: tuple[tuple[float, ...], ...]
    unit: str = "byte"

    def __str__(self) -> str:
        hay = self.haystack
        lines = [f"{'length':>10} " + "".join(f"{f'depth {depth:g}':>12}" for depth in hay.depths)]
        for length, row in zip(hay.lengths, self.chosen, strict=True):
            lines.append(f"{length:>10,} " + "".join(f"{share:>12.2f}" for share in row))
        lines.append(
            f"shares of {hay.trials} needles that were chosen among {hay.candidates} values; guessing has "
            f"{1 / hay.candidates:.2f}; {np.mean(self.written):.2f} of all were written without a list to choose from"
        )
        return "\n".join(lines)


@torch.no_grad()
def find_needles(
    subject: Subject, text: np.ndarray, haystack: Haystack, *, batch_size: int = 8, progress: bool = False
) -> Retrieval:
    """Hide needles in a text and ask for them.

    Args:
        text: [tokens] of `Subject.encode`, in which they are hidden.
        batch_size: sequences that go through the model at once.
        progress: show a bar on a terminal.

    Raises:
        ArgumentError: a length that the model cannot have, or that the needle and its question do not fit in.
        DataError: the text is too short to fill the longest sequence.
    """
    if subject.context is not None and max(haystack.lengths) > subject.context:
        raise ArgumentError(
            f"--length {max(haystack.lengths)}: the model looks back over at most {subject.context:,} {subject.unit}s"
        )
    facts = [_Fact.draw(subject, haystack, trial) for trial in range(haystack.trials)]
    each = (len(haystack.lengths), len(haystack.depths), haystack.trials)
    chosen, probability, written = (np.zeros(each) for _ in range(3))
    asked = list(_sequences(text, facts, haystack, subject.unit))
    for sequence, answer in _answers(subject.predictor(), asked, batch_size, progress):
        candidates = answer[0, list(sequence.fact.first_tokens)]  # [candidates], the right one first
        chosen[sequence.where] = bool((candidates[0] > candidates[1:]).all())
        probability[sequence.where] = candidates.softmax(0)[0].item()
        written[sequence.where] = answer.argmax(1).tolist() == list(sequence.fact.value)
    tables = (tuple(map(tuple, shares.mean(-1).tolist())) for shares in (chosen, probability, written))
    return Retrieval(haystack, *tables, unit=subject.unit)


def shortest_length(subject: Subject, haystack: Haystack) -> int:
    """The tokens of a sequence of nothing but a needle and its question, whatever the haystack's lengths."""
    return max(_Fact.draw(subject, haystack, trial).tokens for trial in range(haystack.trials))


@dataclass(frozen=True)
class _Fact:
    """One needle as tokens: the sentence is ``question + value + end``, and the text ends with ``question``.

    Args:
        value: what is to be found, without the tokens that every candidate begins with.
        first_tokens: the first token of each candidate, the right one's first.
    """

    question: tuple[int, ...]
    value: tuple[int, ...]
    end: tuple[int, ...]
    first_tokens: tuple[int, ...]

    @classmethod
    def draw(cls, subject: Subject, haystack: Haystack, trial: int) -> "_Fact":
        """The fact of a trial, the same for every length and depth."""
        generator = np.random.default_rng([haystack.seed, trial])
        letters = np.array(list(string.ascii_lowercase))
        key = "".join(generator.choice(list(string.digits), KEY_DIGITS))
        before, after = haystack.needle.replace("{key}", key).split("{value}")
        values = []
        for first in generator.permutation(letters):
            # No letter twice, so that what comes after a letter is never in doubt.
            rest = generator.choice(letters[letters != first], VALUE_LETTERS - 1, replace=False)
            values.append(first + "".join(rest))
        cut = len(before.rstrip(" "))
        # Most tokenizers make one token of a space and the beginning of a word; bytes, and some, do not.
        for question, space in ((before[:cut], before[cut:]), (before, "")):
            shared, distinct = _apart([_tokens(subject, space + value) for value in values])
            if len(distinct) >= haystack.candidates:
                right, *_ = distinct.values()
                first_tokens = tuple(distinct)[: haystack.candidates]
                return cls((*_tokens(subject, question), *shared), right, _tokens(subject, after), first_tokens)
        raise ArgumentError(
            f"--candidates {haystack.candidates}: this tokenizer tells only {len(distinct)} values apart by their "
            "first token; ask for fewer"
        )

    def sequence(self, length: int, depth: float, text: np.ndarray, generator: np.random.Generator) -> np.ndarray:
        """int64[length]: a piece of the text with the needle in it, the question, and the value but for its last."""
        needle = (*self.question, *self.value, *self.end)
        asked = (*self.question, *self.value[:-1])
        filling = length - len(needle) - len(asked)
        start = int(generator.integers(len(text) - filling + 1))
        filler = np.asarray(text[start : start + filling], dtype=np.int64)
        where = round(depth * filling)
        return np.concatenate((filler[:where], needle, filler[where:], asked)).astype(np.int64)

    @property
    def tokens(self) -> int:
        """What a sequence has besides the text around the needle."""
        return 2 * len(self.question) + 2 * len(self.value) + len(self.end) - 1


@dataclass(frozen=True)
class _Sequence:
    """What the model is asked.

    Args:
        where: the numbers of its length, its depth and its trial.
        tokens: int64[length].
    """

    where: tuple[int, int, int]
    fact: _Fact
    tokens: np.ndarray


def _sequences(text: np.ndarray, facts: Sequence[_Fact], haystack: Haystack, unit: str) -> Iterator[_Sequence]:
    """Everything that is asked, length by length."""
    needed = max(fact.tokens for fact in facts)
    if min(haystack.lengths) < needed:
        raise ArgumentError(
            f"--length {min(haystack.lengths)}: the needle and its question alone take {needed:,} {unit}s; ask for "
            "longer sequences, or shorten --needle"
        )
    filling = max(haystack.lengths) - min(fact.tokens for fact in facts)
    if len(text) < filling:
        raise DataError(
            f"{len(text):,} {unit}s are too few to hide a needle in: sequences of {max(haystack.lengths):,} need "
            f"{filling:,} {unit}s of text; give more data or a smaller --length"
        )
    for place, length in enumerate(haystack.lengths):
        for column, depth in enumerate(haystack.depths):
            for trial, fact in enumerate(facts):
                # The same piece of text at every depth, so that depths differ by the depth alone.
                generator = np.random.default_rng([haystack.seed, trial, length])
                yield _Sequence((place, column, trial), fact, fact.sequence(length, depth, text, generator))


def _answers(
    predictor: Predictor, asked: Sequence[_Sequence], batch_size: int, progress: bool
) -> Iterator[tuple[_Sequence, torch.Tensor]]:
    """Each sequence, and the logits of its value's tokens, float32[value, vocabulary]."""
    device = next(predictor.parameters()).device
    bar = tqdm(total=len(asked), desc="needles", leave=False, disable=None if progress else True)
    with evaluating(predictor), bar:
        for _, equally_long in itertools.groupby(asked, key=lambda sequence: len(sequence.tokens)):
            alike = list(equally_long)
            for batch in (alike[first : first + batch_size] for first in range(0, len(alike), batch_size)):
                tokens = torch.from_numpy(np.stack([sequence.tokens for sequence in batch])).to(device)
                longest = max(len(sequence.fact.value) for sequence in batch)
                logits = predictor(tokens, logits_to_keep=longest).logits.float()  # [batch, longest, vocabulary]
                for sequence, answer in zip(batch, logits, strict=True):
                    yield sequence, answer[longest - len(sequence.fact.value) :]
                bar.update(len(batch))


def _apart(values: Sequence[tuple[int, ...]]) -> tuple[tuple[int, ...], dict[int, tuple[int, ...]]]:
    """What all values begin with, such as a token for a space, and the rest of those that then differ, by their first.

    >>> _apart([(9, 1, 2), (9, 3), (9, 1, 4)])
    ((9,), {1: (1, 2), 3: (3,)})
    """
    shared = 0
    while all(len(tokens) > shared for tokens in values) and len({tokens[shared] for tokens in values}) == 1:
        shared += 1
    distinct: dict[int, tuple[int, ...]] = {}
    for tokens in values:
        if len(tokens) > shared:
            distinct.setdefault(tokens[shared], tokens[shared:])
    return values[0][:shared], distinct


def _tokens(subject: Subject, text: str) -> tuple[int, ...]:
    return tuple(subject.encode(text.encode()).tolist())


def _words(values: Sequence[float]) -> str:
    return ", ".join(f"{value:g}" for value in values) or "of nothing"
