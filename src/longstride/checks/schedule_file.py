"""A schedule as a file: YAML with the pattern of every layer, and what was measured of it.

``patterns`` is what `longstride.sparsify` and ``SparseTransformerConfig(patterns=...)`` take. ``tables`` are there
where patterns name some (`BlockSparse`); ``measured`` is for the reader.
"""

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
import yaml

from longstride.errors import ArgumentError
from longstride.models.schedule import tables_from_json, tables_to_json
from longstride.patterns import Pattern, parse


def write_schedule(path: Path, patterns: Sequence[Pattern], measured: Mapping[str, Any]) -> None:
    """Write the pattern of each layer.

    Args:
        measured: plain values, by name.

    Raises:
        ArgumentError: the file cannot be written.
    """
    written: dict[str, Any] = {"patterns": [str(pattern) for pattern in patterns]}
    tables: dict[str, torch.Tensor] = {}
    for pattern in patterns:
        tables |= pattern.tables()
    if tables:
        written["tables"] = tables_to_json(tables)
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(yaml.safe_dump({**written, "measured": dict(measured)}, sort_keys=False), encoding="utf-8")
    except OSError as error:
        raise ArgumentError(
            f"{path}: the schedule cannot be written ({error.strerror}); choose another file"
        ) from error


def patterns_in(path: Path) -> list[Pattern]:
    """The patterns of a schedule's file.

    Raises:
        ArgumentError: the file cannot be read, or is no schedule.
        PatternError: a text in it is not a pattern.
    """
    try:
        written = yaml.safe_load(path.read_text(encoding="utf-8"))
    except (OSError, UnicodeDecodeError, yaml.YAMLError) as error:
        reason = str(getattr(error, "strerror", None) or error).splitlines()[0]
        raise ArgumentError(f"{path}: the schedule cannot be read ({reason})") from error
    texts = written.get("patterns") if isinstance(written, dict) else None
    if not isinstance(texts, list) or not texts or not all(isinstance(text, str) for text in texts):
        raise ArgumentError(f"{path}: a schedule is YAML with a list of pattern texts under `patterns`")
    tables = written.get("tables") or {}
    if not isinstance(tables, dict):
        raise ArgumentError(f"{path}: `tables` of a schedule are tables by name, as `longstride suggest` writes them")
    tables = tables_from_json(tables)
    return [parse(text, tables=tables) for text in texts]
