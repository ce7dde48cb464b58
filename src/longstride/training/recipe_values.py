"""Values and keys as a person writes them in a recipe or on the command line."""

import difflib
import types
import typing
from collections.abc import Sequence


def suggestion(key: str, known: Sequence[str]) -> str:
    """What may have been meant by an unknown `key`, or what there is, as the end of a sentence."""
    section, _, name = key.rpartition(".")
    # The right name in the wrong section or in none, then a misspelt one.
    close = [candidate for candidate in known if candidate.split(".")[-1] == name]
    close = close or difflib.get_close_matches(key, known, n=1, cutoff=0.75)
    if not close:
        names = difflib.get_close_matches(name, [candidate.split(".")[-1] for candidate in known], n=1, cutoff=0.75)
        close = [candidate for candidate in known if candidate.split(".")[-1] in names]
    if close:
        return f": did you mean {close[0]}?"
    choices = [candidate for candidate in known if candidate.startswith(f"{section}.")] or known
    return f": it must be one of {', '.join(choices)}"


def convert(value: typing.Any, hint: typing.Any) -> typing.Any:
    """``value`` as the type ``hint``; ValueError says what it must be."""
    if isinstance(hint, types.UnionType):
        inner = next(option for option in typing.get_args(hint) if option is not types.NoneType)
        if value is None:
            return None
        try:
            return convert(value, inner)
        except ValueError as error:
            raise ValueError(f"{error}, or null") from error
    if hint is bool and isinstance(value, bool):
        return value
    if hint is int and isinstance(value, int) and not isinstance(value, bool):
        return value
    if hint is float and isinstance(value, int | float | str) and not isinstance(value, bool):
        # YAML 1.1 reads 1e-3 (without a point) as text.
        try:
            return float(value)
        except ValueError:
            pass
    if hint is str and isinstance(value, str):
        return value
    if typing.get_origin(hint) is tuple:
        kind, names = typing.get_args(hint)[0], {str: "a text or a list of texts", int: "a list of whole numbers"}
        try:
            return tuple(convert(entry, kind) for entry in (value if isinstance(value, list | tuple) else [value]))
        except ValueError as error:
            raise ValueError(names[kind]) from error
    raise ValueError({bool: "true or false", int: "a whole number", float: "a number", str: "a text"}[hint])
