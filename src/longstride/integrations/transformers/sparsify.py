"""`sparsify`: give a model of transformers patterns to attend along, in place, or take them off again."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from torch import nn
from transformers import PreTrainedModel

from longstride.errors import ArgumentError, UnsupportedError
from longstride.integrations.transformers.saved import ATTENTION, check_backend, entry_of, pattern_of
from longstride.models.schedule import check_causal, read_patterns
from longstride.patterns import Pattern


def sparsify(
    model: PreTrainedModel,
    patterns: Pattern | str | Sequence[Pattern | str] | None,
    *,
    backend: str | None = None,
) -> PreTrainedModel:
    """Have `model` attend along `patterns`, whatever it attended along before. Its weights are not touched.

    The patterns are in its configuration from then on, and are saved and loaded with it: before ``from_pretrained``,
    import `longstride.integrations.transformers`; without it transformers refuses to load the model. ``generate`` of a
    decoder keeps the keys that its patterns may still read, in a `SparsifiedCache`, unless it is told otherwise.

    >>> import longstride as ls
    >>> from transformers import LlamaConfig, LlamaForCausalLM
    >>> config = LlamaConfig(vocab_size=99, hidden_size=32, intermediate_size=64, num_hidden_layers=2,
    ...                      num_attention_heads=4)
    >>> model = ls.sparsify(LlamaForCausalLM(config), ["Local(8)", "Strided(8)"])
    >>> model.config.longstride
    {'patterns': ['Local(8)', 'Strided(8)']}

    Args:
        model: a decoder or an encoder whose attention goes through transformers' AttentionInterface; or a model that
            generates with one as its language model, which alone gets the patterns.
        patterns: a pattern or its text; or a list of those, cycled over the layers, the first one for layer 0.
            ``per_head(...)`` gives groups of query heads patterns of their own. Decoders take causal patterns alone.
            None makes the model as dense as transformers has it, sliding windows of its own included.
        backend: one of `longstride.attention.BACKENDS` by name, saved with the patterns; the fastest that takes the
            request when not given.

    Returns:
        The model itself.

    Raises:
        ArgumentError: not a model of transformers; not patterns; more patterns than layers; an unknown backend.
        PatternError: a pattern that is not legal, looks ahead in a decoder, depends on a decoder's length, or does not
            split over the heads.
        UnsupportedError: a model with something in its attention that patterns have no place for.
    """
    if not isinstance(model, PreTrainedModel):
        raise ArgumentError(
            f"model is {type(model).__name__}: it must be a transformers PreTrainedModel; sparsify the model before it "
            "is wrapped in another"
        )
    part, name = _part(model)
    if patterns is None:
        for config in (model.config, part.config):
            if hasattr(config, "longstride"):
                del config.longstride
        if part.config._attn_implementation == ATTENTION:
            part.set_attn_implementation(part.get_correct_attn_implementation(None))
        return model
    check_backend(backend)
    _check_model(part)
    entry = entry_of(patterns, backend)
    _check_patterns(part, entry)
    part.set_attn_implementation(ATTENTION)
    part.config.longstride = entry
    if name is not None:
        model.config.longstride = {"part": name}
    return model


def _part(model: PreTrainedModel) -> tuple[PreTrainedModel, str | None]:
    """The language model that attends along patterns, and what the whole's configuration calls its own."""
    config = model.config.get_text_config()
    if config is model.config:
        return model, None
    names = [name for name in model.config.sub_configs if getattr(model.config, name) is config]
    parts = [part for part in model.modules() if isinstance(part, PreTrainedModel) and part.config is config]
    if not (names and parts and model.can_generate()):
        raise UnsupportedError(
            f"{type(model).__name__} consists of several models ({', '.join(model.config.sub_configs)}), none of which "
            "is its language model: sparsify the one that you mean by itself"
        )
    return parts[0], names[0]


def _check_model(model: PreTrainedModel) -> None:
    """Raise an UnsupportedError unless patterns can take the place of this model's attention."""
    name, config = type(model).__name__, model.config
    if getattr(config, "is_encoder_decoder", False) or getattr(config, "add_cross_attention", False):
        raise UnsupportedError(
            f"{name} attends to an encoder (cross-attention), which has no pattern: sparsify models that attend to "
            "themselves alone"
        )
    if not model._can_set_attn_implementation() or not _attentions(model):
        raise UnsupportedError(
            f"{name} does not call its attention through transformers' AttentionInterface, so that nothing can take "
            "its place; take a model that does, such as Llama, Mistral, Qwen, GPT-2, BERT or ModernBERT"
        )
    obstacles = {
        "caps its scores (attn_logit_softcapping)": getattr(config, "attn_logit_softcapping", None) is not None,
        "has attention sinks": any(hasattr(module, "sinks") for module in model.modules()),
        "attends by chunks of its own (attention_chunk_size)": getattr(config, "attention_chunk_size", None)
        is not None,
        "has config.output_attentions=True, and sparse attention never forms its weights": bool(
            getattr(config, "output_attentions", False)
        ),
    }
    for what, found in obstacles.items():
        if found:
            raise UnsupportedError(f"{name} {what}, which patterns have no place for: keep its attention dense")


def _attentions(model: PreTrainedModel) -> list[nn.Module]:
    """The attention layers: by transformers' convention they say whether they are causal."""
    return [module for module in model.modules() if hasattr(module, "is_causal")]


def _check_patterns(model: PreTrainedModel, entry: dict[str, Any]) -> None:
    config, texts = model.config, entry["patterns"]
    layers, heads = config.num_hidden_layers, config.num_attention_heads
    if len(texts) > layers:
        raise ArgumentError(f"{len(texts)} patterns for {layers} layers: give at most one for each")
    attentions = _attentions(model)
    if len(texts) > 1 and any(getattr(module, "layer_idx", None) is None for module in attentions):
        raise ArgumentError(
            f"{len(texts)} patterns, and the layers of {type(model).__name__} do not know their numbers: give one "
            "pattern for all"
        )
    longest = getattr(config, "max_position_embeddings", None)
    # A decoder that is told so attends in both directions.
    if getattr(config, "is_causal", True) and any(module.is_causal for module in attentions):
        check_causal(read_patterns(texts, entry.get("tables"), heads, 2**20 if longest is None else longest))
        return
    for text in texts:
        pattern = pattern_of(text)
        pattern.split_heads(heads)
        if longest is not None:
            pattern.bind(longest)
