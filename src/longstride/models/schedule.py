"""Which pattern each layer attends along: pattern texts of a configuration, cycled over the layers."""

import dataclasses
from collections.abc import Iterator, Mapping, Sequence
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from longstride.errors import PatternError
from longstride.patterns import Pattern, parse

if TYPE_CHECKING:
    from longstride.models.configuration import SparseTransformerConfig


def layer_patterns(config: "SparseTransformerConfig") -> tuple[Pattern, ...]:
    """The pattern of each layer: layer i has ``config.patterns[i % len(config.patterns)]``.

    Raises:
        PatternError: as `read_patterns`.
    """
    cycle = read_patterns(
        config.patterns, config.pattern_tables, config.num_attention_heads, config.max_position_embeddings
    )
    return tuple(cycle[layer % len(cycle)] for layer in range(config.num_hidden_layers))


def read_patterns(
    texts: Sequence[str], tables: Mapping[str, Any] | None, num_attention_heads: int, max_position_embeddings: int
) -> tuple[Pattern, ...]:
    """Parse pattern texts and hold them to what any model needs; whether they may look ahead is the model's matter.

    Args:
        texts: for example ``["Local(128)", "Strided(128)"]``.
        tables: the BlockSparse tables that the texts name, in any form that :func:`tables_to_json` reads.
        num_attention_heads: heads that a ``per_head`` pattern must divide.
        max_position_embeddings: length that the patterns must cover, and up to which causal ones must not depend on it.

    Raises:
        PatternError: a text is not a pattern, does not split over the heads, or does not serve every length up to the
            longest.
    """
    # Models are built under torch.device("meta") or on an accelerator; a pattern's rule is read on the CPU.
    with torch.device("cpu"):
        named_tables = tables_from_json(tables or {})
        return tuple(_read(text, named_tables, num_attention_heads, max_position_embeddings) for text in texts)


def _read(text: str, tables: dict[str, Tensor], num_attention_heads: int, max_position_embeddings: int) -> Pattern:
    pattern = parse(text, tables=tables)
    pattern.split_heads(num_attention_heads)
    # A pattern that looks ahead sees the whole sequence at once, and may look at how long it is.
    if pattern.bind(max_position_embeddings) != pattern and pattern.is_causal:
        raise PatternError(
            f"{text}: what this pattern allows depends on the length of the sequence, so a token's past would change "
            "as the sequence grows; make its members causal"
        )
    return pattern


def check_causal(patterns: Sequence[Pattern]) -> None:
    """Hold the layers' patterns to what a language model needs, which predicts what comes later.

    Raises:
        PatternError: a pattern looks ahead.
    """
    for pattern in patterns:
        if not pattern.is_causal:
            raise PatternError(
                f"{pattern}: this pattern lets a token attend to later ones, and a causal language model predicts "
                f"those; intersect it with Causal(), as in ({pattern}) & Causal(), or drop its lookahead"
            )


def check_bidirectional(patterns: Sequence[Pattern]) -> None:
    """Hold the layers' patterns to what an encoder needs, which reads a text from both sides.

    Raises:
        PatternError: a pattern never looks ahead.
    """
    for pattern in patterns:
        if pattern.is_causal:
            raise PatternError(
                f"{pattern}: this pattern lets no token attend to later ones, and an encoder reads both sides; give it "
                "a lookahead or causal=False, as in Local(129, lookahead=128) | Global(1, causal=False)"
            )


def pattern_stride(patterns: Sequence[Pattern]) -> int | None:
    """The stride of the first strided pattern, else the block of the first blocked one, else None.

    It is the width of the matrix that the position embeddings' rows and columns refer to.
    """
    atoms = [atom for pattern in patterns for atom in _atoms(pattern)]
    for field in ("stride", "block"):
        for atom in atoms:
            if isinstance(getattr(atom, field, None), int):
                return getattr(atom, field)
    return None


def _atoms(pattern: Pattern) -> Iterator[Pattern]:
    """The pattern itself and every pattern inside it, outermost first."""
    yield pattern
    for field in dataclasses.fields(pattern) if dataclasses.is_dataclass(pattern) else ():
        value = getattr(pattern, field.name)
        for inner in value if isinstance(value, tuple) else (value,):
            if isinstance(inner, Pattern):
                yield from _atoms(inner)


def tables_to_json(tables: Mapping[str, Any]) -> dict[str, list]:
    """Tables as plain JSON data: a row of blocks is a text of 0 and 1, so a configuration file stays readable.

    Args:
        tables: name to bool[(heads,) query blocks, key blocks], as a tensor, nested lists, or already as row texts.

    >>> tables_to_json({"t": torch.tensor([[True, False], [True, True]])})
    {'t': ['10', '11']}
    """

    def rows(name: str, value: Any) -> Any:
        if isinstance(value, Tensor):
            value = value.int().tolist()
        if isinstance(value, str) and value and not value.strip("01"):
            return value
        if (
            isinstance(value, (list, tuple))
            and value
            and all(isinstance(cell, int) and cell in (0, 1) for cell in value)
        ):
            return "".join(str(int(cell)) for cell in value)
        if isinstance(value, (list, tuple)) and value and not any(isinstance(cell, int) for cell in value):
            return [rows(name, inner) for inner in value]
        raise PatternError(
            f"pattern_tables[{name!r}] holds {value!r}: a table is a bool tensor, nested lists of 0 and 1, or a list "
            "of row texts such as ['10', '11']"
        )

    return {name: rows(name, value) for name, value in tables.items()}


def tables_from_json(tables: Mapping[str, Any]) -> dict[str, Tensor]:
    """The bool tensors [(heads,) query blocks, key blocks] that :func:`tables_to_json` wrote.

    >>> tables_from_json({"t": ["10", "11"]})["t"].tolist()
    [[True, False], [True, True]]
    """

    def cells(value: Any) -> Any:
        return [int(cell) for cell in value] if isinstance(value, str) else [cells(inner) for inner in value]

    named = {}
    for name, value in tables_to_json(tables).items():
        try:
            named[name] = torch.tensor(cells(value), dtype=torch.bool)
        except ValueError as error:
            raise PatternError(
                f"pattern_tables[{name!r}]: the rows of a table must be equally long ({error})"
            ) from error
    return named
