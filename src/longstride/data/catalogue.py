"""Every kind of data by name, and which kind a path most likely is."""

import importlib
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from longstride.data.bytes import walk
from longstride.data.kind import Kind
from longstride.errors import DataError

# Each is imported when it is asked for, so that plain bytes need none of the libraries that the others read with.
MODULES = {
    "images": ("longstride.data.images", "Images"),
    "audio": ("longstride.data.audio", "Audio"),
    "midi": ("longstride.data.midi", "Midi"),
    "piano-roll": ("longstride.data.piano_roll", "PianoRoll"),
    "csv": ("longstride.data.series", "Series"),
    "documents": ("longstride.data.documents", "Documents"),
}

# What --kind takes. Bytes are read as they lie and need no decoding; the others are `Kind`s.
KINDS = ("bytes", *MODULES)

# So many files decide what a folder holds.
FILES_TO_GUESS_FROM = 1000


def make_kind(name: str, context: int, settings: Mapping[str, Any]) -> Kind:
    """The kind called ``name``, with those of ``settings`` that it has.

    Args:
        context: tokens in a window; the side of an image follows from it.
        settings: values of the recipe's section on data, such as ``sample_rate_hz``.

    Raises:
        DataError: an unknown name, or a value that the kind cannot work with.
    """
    return _kind_class(name).from_settings(context, settings)


def restore_kind(name: str, settings: Mapping[str, Any]) -> Kind:
    """The kind whose `Kind.settings` were written down.

    Raises:
        DataError: an unknown name, or a value that the kind cannot work with.
        TypeError: settings that the kind does not have.
    """
    return _kind_class(name)(**settings)


def guess_kind(path: Path) -> tuple[str, str]:
    """The kind of a file or folder by the names of its files, and why, in words.

    Bytes, unless every file that is not a mere companion (a licence, a list of labels) is of one other kind.
    """
    files = [Path(path.name)] if path.is_file() else sorted(walk(path))[:FILES_TO_GUESS_FROM] if path.is_dir() else []
    data = [file for file in files if file.name not in COMPANIONS]
    for name in MODULES:
        kind = _kind_class(name)
        if data and all(kind.surely(file) for file in data):
            return name, f"by the names of its files, such as {data[0].name}"
    return "bytes", "as no other kind is sure"


# Files that come with data sets and are none of the data.
COMPANIONS = frozenset(
    {"LICENSE", "LICENSE.txt", "README", "README.md", "README.txt", "batches.meta", "batches.meta.txt", "readme.html"}
)


def _kind_class(name: str) -> type[Kind]:
    if name not in MODULES:
        raise DataError(f"--kind {name}: it must be one of {', '.join(KINDS)}")
    module, attribute = MODULES[name]
    return getattr(importlib.import_module(module), attribute)
