"""The same weights along other patterns: one way for our own models and for those of other architectures."""

import copy
import dataclasses
from collections.abc import Generator, Sequence
from contextlib import contextmanager
from pathlib import Path

import torch

from longstride.checks.schedule_file import patterns_in
from longstride.checks.subject import Subject
from longstride.errors import ArgumentError, PatternError
from longstride.models import SparseTransformerForCausalLM, layer_patterns
from longstride.patterns import Causal, Pattern, parse


def read_schedule(patterns: Path | Sequence[str | Pattern], subject: Subject) -> tuple[Pattern, ...]:
    """The pattern of every layer.

    Args:
        patterns: texts or values, cycled over the layers; or the file of a schedule, as `write_schedule` leaves it.

    Raises:
        ArgumentError: there are none, more than layers, or the file has no such list.
        PatternError: a text is not a pattern, or a pattern lets a token see later ones, or does not split over the
            heads.
    """
    if isinstance(patterns, Path):
        patterns = patterns_in(patterns)
    if not patterns:
        raise ArgumentError("patterns=[]: give at least one pattern, such as 'Local(128)'")
    if len(patterns) > subject.num_layers:
        raise ArgumentError(
            f"{len(patterns)} patterns for {subject.num_layers} layers: give at most one for each layer"
        )
    cycle = [parse(entry) if isinstance(entry, str) else entry for entry in patterns]
    for pattern in cycle:
        if not pattern.is_causal:
            raise PatternError(
                f"{pattern}: this pattern lets a token attend to later ones, which a causal language model predicts; "
                f"use ({pattern}) & Causal(), or drop its lookahead"
            )
        pattern.split_heads(subject.num_heads)
    return tuple(cycle[layer % len(cycle)] for layer in range(subject.num_layers))


def schedule_of(subject: Subject) -> tuple[Pattern, ...]:
    """The pattern that every layer attends along as the model is."""
    if isinstance(subject.model, SparseTransformerForCausalLM):
        return layer_patterns(subject.model.config)
    return (Causal(),) * subject.num_layers


@contextmanager
def attending(subject: Subject, patterns: Sequence[Pattern]) -> Generator[Subject]:
    """The subject with the same weights and another pattern in every layer, while the block runs.

    Args:
        patterns: one for each layer, as `read_schedule` gives them.

    Raises:
        PatternError: a pattern does not serve the model's whole context.
    """
    model = subject.model
    assert isinstance(model, SparseTransformerForCausalLM)
    config = copy.deepcopy(model.config)
    # Position axes are those of the weights, whatever the patterns.
    config.patterns, config.pattern_tables = list(patterns), None
    with torch.device("meta"):
        other = SparseTransformerForCausalLM(config)
    other.load_state_dict(model.state_dict(keep_vars=True), assign=True)
    yield dataclasses.replace(subject, model=other.eval())
