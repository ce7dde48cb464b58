"""The same weights along other patterns: one way for our own models and for those of other architectures."""

import copy
import dataclasses
from collections.abc import Generator, Sequence
from contextlib import contextmanager
from pathlib import Path

import torch

from longstride.checks.schedule_file import patterns_in
from longstride.checks.subject import Subject
from longstride.errors import ArgumentError, PatternError, UnsupportedError
from longstride.integrations.transformers import ATTENTION, sparsify
from longstride.models import SparseTransformerForCausalLM, layer_patterns
from longstride.models.schedule import read_patterns
from longstride.patterns import Causal, Local, Pattern, parse


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
    """The pattern that every layer attends along as the model is: its own, those it was sparsified with, or dense.

    A model of another architecture is read by its configuration: layers that transformers gives a sliding window are
    ``Local``. What else a model may do is not in there.

    Raises:
        UnsupportedError: some layers do not attend, but mix tokens in another way.
    """
    if isinstance(subject.model, SparseTransformerForCausalLM):
        return layer_patterns(subject.model.config)
    _check_every_layer_attends(subject)
    config = subject.model.config.get_text_config()
    if hasattr(config, ATTENTION):
        entry = config.longstride
        cycle = read_patterns(entry["patterns"], entry.get("tables"), subject.num_heads, config.max_position_embeddings)
        return tuple(cycle[layer % len(cycle)] for layer in range(subject.num_layers))
    window = getattr(config, "sliding_window", None)
    kinds = getattr(config, "layer_types", None) or ["sliding_attention"] * subject.num_layers
    return tuple(Local(window) if window and kind == "sliding_attention" else Causal() for kind in kinds)


def _check_every_layer_attends(subject: Subject) -> None:
    # By transformers' convention attention layers say whether they are causal, and know their numbers.
    numbers = {getattr(module, "layer_idx", None) for module in subject.model.modules() if hasattr(module, "is_causal")}
    others = sorted(set(range(subject.num_layers)) - numbers)
    if numbers - {None} and others:
        raise UnsupportedError(
            f"layers {', '.join(map(str, others))} of this {type(subject.model).__name__} do not attend, so that no "
            "pattern says which tokens they read, nor what they cost; take a model in which every layer attends"
        )


@contextmanager
def attending(subject: Subject, patterns: Sequence[Pattern]) -> Generator[Subject]:
    """The subject with the same weights and another pattern in every layer, while the block runs.

    A Sparse Transformer is built once more around its weights. A model of another architecture is sparsified in place,
    and is as it was after the block.

    Args:
        patterns: one for each layer, as `read_schedule` gives them.

    Raises:
        PatternError: a pattern does not serve the model's whole context.
        UnsupportedError: the model's attention has something that patterns have no place for.
    """
    model = subject.model
    if isinstance(model, SparseTransformerForCausalLM):
        yield dataclasses.replace(subject, model=_rebuilt(model, patterns))
        return
    # Of a model of several parts, the language model has the patterns.
    config = model.config.get_text_config()
    entry = copy.deepcopy(getattr(config, ATTENTION, None))
    before = None if entry is None else list(schedule_of(subject))
    implementation = model.config._attn_implementation
    try:
        yield dataclasses.replace(subject, model=sparsify(model, list(patterns)))
    finally:
        sparsify(model, before, backend=None if entry is None else entry.get("backend"))
        if entry is None:
            model.set_attn_implementation(implementation)
        else:
            config.longstride = entry  # as it was written, not once for each layer


def _rebuilt(model: SparseTransformerForCausalLM, patterns: Sequence[Pattern]) -> SparseTransformerForCausalLM:
    """Another model of the same parameters, not of copies, along other patterns."""
    config = copy.deepcopy(model.config)
    # The position axes, which patterns would choose in a new model, are those of the weights.
    config.patterns, config.pattern_tables = [str(pattern) for pattern in patterns], {}
    for pattern in patterns:
        config.pattern_tables |= pattern.tables()
    with torch.device("meta"):
        other = SparseTransformerForCausalLM(config)
    other.load_state_dict(model.state_dict(keep_vars=True), assign=True)
    return other.eval()
