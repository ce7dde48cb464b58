"""Patterns as text: `parse` reads what `str(pattern)` writes. A small recursive descent; nothing is evaluated.

union        = intersection { "|" intersection }
intersection = atom { "&" atom }
atom         = "(" union ")" | name "(" [ argument { "," argument } ] ")"
argument     = [ name "=" ] value          value = int | True | False | None | "(" ints ")" | table name | union
"""

from __future__ import annotations

import difflib
import inspect
import re
from collections.abc import Mapping
from typing import Any

import torch

from longstride.errors import PatternError
from longstride.patterns.algebra import Intersection, PerHead, Union, per_head
from longstride.patterns.base import Pattern

_TOKEN = re.compile(r"\s*(?:(?P<number>-?\d+)|(?P<name>[A-Za-z_]\w*)|(?P<sign>[()|&,=]))")
#: What no pattern of use needs more of; text may come from anywhere.
MOST_NESTED, MOST_DIGITS = 100, 40

_WORDS = {"True": True, "False": False, "None": None}
_JOINS = {Union.__name__, Intersection.__name__, PerHead.__name__}


def parse(text: str, tables: Mapping[str, torch.Tensor] | None = None) -> Pattern:
    """The pattern that `text` describes: ``parse(str(pattern), pattern.tables()) == pattern``.

    Args:
        text: for example ``"Local(128) | Strided(128)"`` or ``"per_head(Local(64), Fixed(64, 8))"``.
        tables: the block tables that `BlockSparse` names in the text.

    Raises:
        PatternError: with the position in the text and what was expected there.
    """
    if not isinstance(text, str):
        raise PatternError(f"parse({text!r}): a pattern's text must be a str")
    return _Reader(text, tables or {}).read()


class _Reader:
    def __init__(self, text: str, tables: Mapping[str, torch.Tensor]) -> None:
        self.text, self.tables = text, tables
        self.tokens: list[tuple[str, str, int]] = []
        at = 0
        while text[at:].strip():
            found = _TOKEN.match(text, at)
            if found is None:
                at += len(text[at:]) - len(text[at:].lstrip())
                raise self._error(f"unexpected {text[at]!r}", at)
            kind = str(found.lastgroup)
            self.tokens.append((kind, found.group(kind), found.start(kind)))
            at = found.end()
        self.tokens.append(("end", "", len(text)))
        self.next = 0
        self.depth = 0

    def read(self) -> Pattern:
        pattern = self._union()
        kind, word, at = self.tokens[self.next]
        if kind != "end":
            hint = f"; join patterns with | or &, not {word!r}" if word in ("and", "or") else ""
            raise self._error(f"unexpected {word!r}{hint}", at)
        return pattern

    def _error(self, what: str, at: int) -> PatternError:
        return PatternError(f"{what} at position {at} of the pattern text\n  {self.text}\n  {' ' * at}^")

    def _take(self, sign: str) -> bool:
        if self.tokens[self.next][:2] == ("sign", sign):
            self.next += 1
            return True
        return False

    def _expect(self, sign: str) -> None:
        if not self._take(sign):
            _, word, at = self.tokens[self.next]
            raise self._error(f"expected {sign!r}, found {word or 'the end'!r}", at)

    def _union(self) -> Pattern:
        self.depth += 1
        if self.depth > MOST_NESTED:
            raise self._error(f"patterns nested more than {MOST_NESTED} deep", self.tokens[self.next][2])
        members = [self._intersection()]
        while self._take("|"):
            members.append(self._intersection())
        self.depth -= 1
        return Union.of(*members)

    def _intersection(self) -> Pattern:
        members = [self._atom()]
        while self._take("&"):
            members.append(self._atom())
        return Intersection.of(*members)

    def _atom(self) -> Pattern:
        if self._take("("):
            pattern = self._union()
            self._expect(")")
            return pattern
        kind, name, at = self.tokens[self.next]
        if kind != "name":
            raise self._error(f"expected a pattern, found {name or 'the end'!r}", at)
        names = {**{n: c for n, c in Pattern.registered.items() if n not in _JOINS}, "per_head": per_head}
        if name not in names:
            near = difflib.get_close_matches(name, names, 1, 0.5)
            hint = f"did you mean {near[0]}?" if near else f"known: {', '.join(sorted(names))}"
            raise self._error(f"unknown pattern {name!r} ({hint})", at)
        self.next += 1
        self._expect("(")
        positional, named = self._arguments()
        make = names[name]
        try:
            inspect.signature(make).bind(*positional, **named)
        except TypeError as error:
            raise self._error(f"{name}: {error}; it takes {inspect.signature(make)}", at) from None
        try:
            return make(*positional, **named)
        except PatternError as error:
            raise self._error(str(error), at) from None

    def _arguments(self) -> tuple[list[Any], dict[str, Any]]:
        positional: list[Any] = []
        named: dict[str, Any] = {}
        while not self._take(")"):
            if positional or named:
                self._expect(",")
            kind, word, at = self.tokens[self.next]
            if kind == "name" and self.tokens[self.next + 1][:2] == ("sign", "="):
                self.next += 2
                if word in named:
                    raise self._error(f"{word!r} is given twice", at)
                named[word] = self._value()
            elif named:
                raise self._error("a positional value after a named one", at)
            else:
                positional.append(self._value())
        return positional, named

    def _value(self) -> Any:
        kind, word, at = self.tokens[self.next]
        if kind == "number":
            return self._number()
        if kind == "name" and word in _WORDS:
            self.next += 1
            return _WORDS[word]
        if kind == "name" and word in self.tables:
            self.next += 1
            return self.tables[word]
        if kind == "name" and word.startswith("table_"):
            raise self._error(f"no table {word!r} was given; pass parse(text, tables=pattern.tables())", at)
        if word == "(" and self.tokens[self.next + 1][0] == "number":
            numbers = self._numbers()
            # As in Python, it is the comma that makes a tuple of one.
            return numbers[0] if len(numbers) == 1 and self.tokens[self.next - 2][1] != "," else numbers
        return self._union()

    def _numbers(self) -> tuple[int, ...]:
        self._expect("(")
        numbers: list[int] = []
        while not self._take(")"):
            if numbers:
                self._expect(",")
                if self._take(")"):
                    break
            numbers.append(self._number())
        return tuple(numbers)

    def _number(self) -> int:
        kind, word, at = self.tokens[self.next]
        if kind != "number":
            raise self._error(f"expected a number, found {word or 'the end'!r}", at)
        if len(word) > MOST_DIGITS:
            raise self._error(f"a number of {len(word)} digits: numbers must be at most 2**62", at)
        self.next += 1
        return int(word)
