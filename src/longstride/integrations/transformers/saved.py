"""The patterns of a pretrained model in its configuration: saved with it, and in force when it is loaded again.

A configuration with patterns has two more keys in its ``config.json``::

    "longstride": {"patterns": ["Local(128)", "Strided(128)"]},
    "attn_implementation": "longstride"

transformers reads the second one and forgets it. So a process without this package refuses to build the model, since
it knows no such attention, instead of building a dense one; and with this package a property of every configuration,
``config.longstride``, puts the second key back whenever the first is read. Where a model has a language model as a
part, the part's configuration has the patterns, and that of the whole has ``{"part": "text_config"}``.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import torch
from transformers import PreTrainedConfig

from longstride.attention import BACKENDS
from longstride.errors import ArgumentError, PatternError
from longstride.models.schedule import tables_from_json, tables_to_json
from longstride.patterns import BlockSparse, Pattern, parse

#: What the models of transformers know this attention by, and their configurations its patterns.
ATTENTION = "longstride"

#: The tables that texts name by their content; the patterns of the texts; whether they look ahead; the rules of their
#: heads. Filled as configurations come, and looked up afterwards, which torch.compile can follow where it cannot follow
#: the reading.
_TABLES: dict[str, torch.Tensor] = {}
_PATTERNS: dict[str, Pattern] = {}
_AHEAD: dict[str, bool] = {}
_RULES: dict[tuple[str, int], tuple[Pattern, ...]] = {}


def pattern_of(text: str) -> Pattern:
    """The pattern of a configuration's text.

    Raises:
        PatternError: the text is not a pattern.
    """
    if text not in _PATTERNS:
        _PATTERNS[text] = _read(text)
    return _PATTERNS[text]


def looks_ahead(text: str) -> bool:
    """Whether a text's pattern is not causal."""
    if text not in _AHEAD:
        _AHEAD[text] = not pattern_of(text).is_causal
    return _AHEAD[text]


def head_rules(text: str, num_heads: int) -> tuple[Pattern, ...]:
    """The rule of every head of a text's pattern; a single one where all heads share it.

    Raises:
        PatternError: the pattern does not split over the heads.
    """
    if (text, num_heads) not in _RULES:
        rules = pattern_of(text).split_heads(num_heads)
        _RULES[text, num_heads] = rules[:1] if all(rule == rules[0] for rule in rules) else rules
    return _RULES[text, num_heads]


def _read(text: str) -> Pattern:
    # A model may be built under torch.device("meta") or on an accelerator; a pattern's rule is read on the CPU.
    with torch.device("cpu"):
        return parse(text, tables=_TABLES)


def entry_of(patterns: Pattern | str | Sequence[Pattern | str], backend: str | None) -> dict[str, Any]:
    """What a configuration holds of `patterns`: plain JSON data that `config.longstride` takes.

    Raises:
        ArgumentError: not patterns, or none.
        PatternError: a text is not a pattern, or a pattern has no text that could be saved.
    """
    listed = [patterns] if isinstance(patterns, (str, Pattern)) else patterns
    if not isinstance(listed, Sequence) or not listed or not all(isinstance(one, (str, Pattern)) for one in listed):
        raise ArgumentError(
            f"patterns={patterns!r}: give a pattern, its text, or a list of those that the layers take in turn, such "
            "as ['Local(128)', 'Strided(128)']; None makes the model dense again"
        )
    # A text may name the table of a pattern that this process has seen, and the table is saved with it all the same.
    given = [one if isinstance(one, Pattern) else _read(one) for one in listed]
    named = {name: table for pattern in given for name, table in pattern.tables().items()}
    _TABLES.update(named)
    # As patterns write themselves, so that equal patterns make equal configurations.
    texts = [_saved_text(pattern) for pattern in given]
    entry: dict[str, Any] = {"patterns": texts}
    if named:
        entry["tables"] = tables_to_json(named)
    if backend is not None:
        entry["backend"] = backend
    return entry


def _saved_text(pattern: Pattern) -> str:
    """The pattern's text, which from now on stands for it."""
    text = str(pattern)
    try:
        faithful = _read(text) == pattern
    except PatternError:
        faithful = False
    if not faithful:
        raise PatternError(
            f"{pattern}: its text does not read as this pattern again, so it could not be saved with the model; make "
            "it a frozen dataclass, whose text has all its fields"
        )
    if _PATTERNS.get(text) != pattern:  # a class of one's own that was defined anew
        _AHEAD.pop(text, None)
        for key in [key for key in _RULES if key[0] == text]:
            del _RULES[key]
        _PATTERNS[text] = pattern
    return text


class SavedPatterns:
    """The property ``config.longstride``: absent from dense models' configurations.

    Setting it, as transformers does with every key of a ``config.json``, also chooses the attention that reads it.
    """

    def __get__(self, config: PreTrainedConfig | None, owner: type) -> Any:
        if config is None:
            return self
        if "longstride" not in config.__dict__:
            raise AttributeError(f"{owner.__name__} has no 'longstride': longstride.sparsify(model, patterns) sets it")
        return config.__dict__["longstride"]

    def __set__(self, config: PreTrainedConfig, entry: Any) -> None:
        _check_entry(config, entry)
        choice: Any = ATTENTION
        if "part" in entry:
            choice = {entry["part"]: ATTENTION}
        else:
            _TABLES.update(_named_by_content(entry.get("tables", {})))
            for text in entry["patterns"]:
                looks_ahead(text)
                head_rules(text, config.num_attention_heads)
        config.__dict__["longstride"] = entry
        config.__dict__["attn_implementation"] = choice
        config._attn_implementation = choice

    def __delete__(self, config: PreTrainedConfig) -> None:
        del config.__dict__["longstride"], config.__dict__["attn_implementation"]


def _check_entry(config: PreTrainedConfig, entry: Any) -> None:
    if isinstance(entry, Mapping) and entry.keys() == {"part"} and entry["part"] in config.sub_configs:
        return
    texts = entry.get("patterns") if isinstance(entry, Mapping) else None
    listed = isinstance(texts, list) and texts and all(isinstance(text, str) for text in texts)
    known = isinstance(entry, Mapping) and not entry.keys() - {"patterns", "tables", "backend"}
    if not (listed and known and isinstance(entry.get("tables", {}), Mapping)):
        raise ArgumentError(
            f"config.longstride={entry!r}: it must be a dict of patterns (a list of texts) and, where there are, "
            "tables and backend, as longstride.sparsify writes it"
        )
    check_backend(entry.get("backend"))


def _named_by_content(tables: Mapping[str, Any]) -> dict[str, torch.Tensor]:
    """The tables of an entry. A text stands for one pattern in a process, so a name stands for one table."""
    with torch.device("cpu"):  # as in _read
        named = tables_from_json(tables)
    for name, table in named.items():
        (right,) = BlockSparse(table, 1).tables()
        if name != right:
            raise ArgumentError(
                f"config.longstride: the table {name!r} has other blocks than its name says, which would be {right!r}; "
                "give the pattern itself to longstride.sparsify, which names it"
            )
    return named


def check_backend(backend: Any) -> None:
    """Raise an ArgumentError unless `backend` is the name of one, or None."""
    if backend is not None and not (isinstance(backend, str) and backend in BACKENDS):
        raise ArgumentError(
            f"backend={backend!r}: known backends are {', '.join(map(repr, BACKENDS))}; None chooses by itself"
        )


def layer_text(config: PreTrainedConfig, layer_idx: int | None) -> str:
    """The text of a layer's pattern: layer i takes ``patterns[i % len(patterns)]``.

    Raises:
        ArgumentError: the configuration has no patterns, or several and the layer does not know its number.
    """
    if not hasattr(config, "longstride"):
        raise ArgumentError(
            f"attn_implementation={ATTENTION!r} and no patterns in the configuration: call "
            "longstride.sparsify(model, patterns), which sets both"
        )
    texts = config.longstride["patterns"]
    if len(texts) == 1:
        return texts[0]
    if layer_idx is None:
        raise ArgumentError(
            f"{len(texts)} patterns, and the layers of this model do not know their numbers: give one pattern for all"
        )
    return texts[layer_idx % len(texts)]


def _choose(config: PreTrainedConfig, choice: Any) -> None:
    """transformers' choice of an attention, except that a model which is told None, as the parts of one that is loaded
    are, does not lose its patterns by it.
    """
    _transformers_choice.__set__(config, choice)
    if choice is None and "longstride" in config.__dict__ and "part" not in config.longstride:
        config._attn_implementation_internal = ATTENTION


_transformers_choice: property = PreTrainedConfig._attn_implementation
PreTrainedConfig._attn_implementation = _transformers_choice.setter(_choose)
setattr(PreTrainedConfig, ATTENTION, SavedPatterns())
