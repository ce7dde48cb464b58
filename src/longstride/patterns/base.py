"""The `Pattern` value: a rule that says which (query, key) pairs may attend, whatever the length, device or dtype."""

from __future__ import annotations

import dataclasses
import operator
from collections.abc import Callable, Iterator, Sequence
from typing import Any, ClassVar, Self

import torch

from longstride.errors import PatternError
from longstride.patterns.counting import count_union
from longstride.patterns.regions import FARTHEST, Rule, Term


class Pattern:
    """Which pairs (i, j) of absolute, 0-based query and key positions may attend.

    A pattern is a frozen value. Subclass it and write `allows` to make one of your own; a frozen dataclass gets its
    text form, equality and `parse` for nothing. Patterns join by ``|`` (union, each pair once) and ``&``
    (intersection).
    """

    #: Pattern classes by name, so that `parse` reads the text of user-made patterns too.
    registered: ClassVar[dict[str, type[Pattern]]] = {}

    #: False for a pattern that torch.compile is tracing the making of: there is no such value yet, only its text.
    exists: ClassVar[bool] = False

    #: What a compiled graph calls the pattern: its text, or "" where that does not say all.
    name: ClassVar[str] = ""

    def __new__(cls, *_args: Any, **_kwargs: Any) -> Self:
        made = super().__new__(cls)
        if not torch.compiler.is_compiling():
            object.__setattr__(made, "exists", True)
        return made

    def __post_init__(self) -> None:
        """Every dataclass ends here, its fields set and checked."""
        if not torch.compiler.is_compiling():
            object.__setattr__(self, "name", _name(self))

    def __getstate__(self) -> dict[str, Any]:
        # The name may stand for something that only this process knows.
        return {key: value for key, value in vars(self).items() if key != "name"}

    def __init_subclass__(cls, **kwargs: Any) -> None:
        super().__init_subclass__(**kwargs)
        known = Pattern.registered.get(cls.__name__)
        if known is not None and known.__module__.startswith("longstride.") and cls.__module__ != known.__module__:
            raise PatternError(f"class {cls.__name__}: the name is that of a built-in pattern; choose another")
        if not cls.__name__.startswith("_"):
            Pattern.registered[cls.__name__] = cls

    # ---- the definition -------------------------------------------------------------------------------------------

    def allows(self, i: torch.Tensor, j: torch.Tensor) -> torch.Tensor:
        """True where the query at position `i` may read the key at position `j`.

        Args:
            i, j: integer tensors that broadcast together; absolute positions.

        Returns:
            bool tensor of the broadcast shape. Written in tensor operations alone, so that it can be traced and used
            as a FlexAttention `mask_mod` (``lambda b, h, i, j: pattern.allows(i, j)``).
        """
        raise NotImplementedError(f"{type(self).__name__} must define allows(i, j)")

    @property
    def is_causal(self) -> bool:
        """True when no query may read a later key.

        The built-in patterns know. For a subclass that does not override this, the first 512 positions are examined;
        override it where `allows` behaves differently further on.
        """
        return not bool(self.mask(512).triu(1).any())

    @property
    def repeats_every(self) -> int | None:
        """A shift that changes nothing: ``allows(i + n, j + n) == allows(i, j)`` for all positions and this n, if any.

        It is where a memory of earlier tokens may begin: counting from there, the pattern is the same. None where no
        such shift is known, as for a subclass that does not say, and for patterns that name positions once and for all.

        >>> import longstride as ls
        >>> (ls.Local(8) | ls.Fixed(16, 4)).repeats_every, ls.Global(2).repeats_every
        (16, None)
        """
        return None

    def retained(self, next_position: int) -> torch.Tensor:
        """Which of the cached keys 0 .. next_position - 1 some query at or after `next_position` may still read.

        Returns:
            bool [next_position]. A subclass that does not say keeps every key, which is always safe.
        """
        return torch.ones_like(cached(next_position), dtype=torch.bool)

    def terms(self) -> tuple[Term, ...]:
        """The pattern as a union of regular regions, the form that plans and exact counts are made from."""
        return (Term.of(Rule(self)),)

    def bind(self, kv_len: int) -> Pattern:  # noqa: ARG002 - for those that look at it
        """This pattern at one length: the same value for all but those whose rule looks at the length itself."""
        return self

    # ---- heads ----------------------------------------------------------------------------------------------------

    @property
    def num_heads(self) -> int | None:
        """How many heads the pattern distinguishes by itself; None when one rule serves every head."""
        return None

    def split_heads(self, num_heads: int) -> tuple[Pattern, ...]:
        """The rule of every head, as `num_heads` patterns that no longer depend on the head."""
        return (self,) * num_heads

    def tables(self) -> dict[str, torch.Tensor]:
        """The block tables that the text form refers to by name: {} but for `BlockSparse`."""
        return {}

    # ---- looking and counting -------------------------------------------------------------------------------------

    def mask(self, q_len: int, kv_len: int | None = None, *, heads: int | None = None) -> torch.Tensor:
        """The dense mask, for looking and testing: it costs q_len x kv_len.

        Returns:
            bool [q_len, kv_len]; [heads, q_len, kv_len] when `heads` is given or the pattern is per head. The queries
            are the last `q_len` of the `kv_len` positions.
        """
        q_len, kv_len = lengths(q_len, kv_len)
        heads = self.num_heads if heads is None else _length("heads", heads)
        with torch.device("cpu"):
            j = torch.arange(kv_len)
            i = j[kv_len - q_len :, None]
            if heads is None:
                return self.bind(kv_len).allows(i, j).expand(q_len, kv_len)
            rules = [pattern.bind(kv_len) for pattern in self.split_heads(heads)]
            return torch.stack([rule.allows(i, j).expand(q_len, kv_len) for rule in rules])

    def pairs(self, q_len: int, kv_len: int | None = None, *, heads: int | None = None) -> int:
        """How many pairs are allowed: ``mask(q_len, kv_len).sum()`` without building the mask.

        Closed forms for the built-in patterns and their unions and intersections, milliseconds at 2^20 positions.
        """
        q_len, kv_len = lengths(q_len, kv_len)
        heads = self.num_heads if heads is None else _length("heads", heads)
        rules = (self,) if heads is None else self.split_heads(heads)
        counts: dict[Pattern, int] = {}
        with torch.device("cpu"):
            for rule in rules:
                if rule not in counts:
                    counts[rule] = count_union(rule.bind(kv_len).terms(), q_len, kv_len)
        return sum(counts[rule] for rule in rules)

    def density(self, length: int) -> float:
        """The allowed share of the length x length matrix; the mean over heads for a per-head pattern."""
        return self.pairs(length) / (length * length * (self.num_heads or 1))

    def reach(self, length: int, layers: int = 1) -> torch.Tensor:
        """Which keys a query can draw on through `layers` layers of this pattern.

        Returns:
            bool [length, length]; after one layer the mask itself (the union over heads).
        """
        return reach([self] * _length("layers", layers), length)

    # ---- text and operators ---------------------------------------------------------------------------------------

    def __str__(self) -> str:
        if not dataclasses.is_dataclass(self):
            # What the attributes mean is not known, so this is no text that `parse` would take for the whole truth.
            return f"{type(self).__name__}({'...' if vars(self).keys() - {'exists', 'name'} else ''})"
        words = []
        for name, required, default in _fields(type(self)):
            value = getattr(self, name)
            if required:
                words.append(str(value))
            elif value != default:
                words.append(f"{name}={value}")
        return f"{type(self).__name__}({', '.join(words)})"

    def __repr__(self) -> str:
        return str(self)

    def __or__(self, other: Pattern) -> Pattern:
        from longstride.patterns.algebra import Union

        return Union.of(self, other) if isinstance(other, Pattern) else NotImplemented

    def __and__(self, other: Pattern) -> Pattern:
        from longstride.patterns.algebra import Intersection

        return Intersection.of(self, other) if isinstance(other, Pattern) else NotImplemented

    def __bool__(self) -> bool:
        raise PatternError(f"{self}: a pattern is neither true nor false; join patterns with | and &, not or and and")


def constant_when_compiled(function: Callable) -> Callable:
    """Have torch.compile call `function` while it traces and keep what it returns.

    This is `torch.compiler.assume_constant_result` without the second and a half that importing torch._dynamo takes.
    """
    function.__dict__["_dynamo_marked_constant"] = True
    return function


@constant_when_compiled
def _fields(cls: Any) -> tuple[tuple[str, bool, Any], ...]:
    """(name, whether it has no default, the default) of a dataclass's fields."""
    fields = dataclasses.fields(cls)
    return tuple(
        (f.name, f.default is dataclasses.MISSING, None if f.default is dataclasses.MISSING else f.default)
        for f in fields
    )


#: Patterns whose text does not say all (tables, classes of the user's own), by the name that stands for them.
_NAMED: dict[str, Pattern] = {}
_NAMES: dict[Pattern, str] = {}


def _name(pattern: Pattern) -> str:
    """A text that `named` turns into this very pattern."""
    text = str(pattern)
    if type(pattern).__hash__ is None:
        return ""  # not a fixed value; `attention` says so
    if not pattern.tables() and all(type(member).__module__.startswith("longstride.") for member in _members(pattern)):
        return text
    if pattern not in _NAMES:
        # Two patterns that are not equal may still read alike, when a user's own class hides its settings.
        name = text if text not in _NAMED else f"{text} #{len(_NAMED)}"
        _NAMES[pattern], _NAMED[name] = name, pattern
    return _NAMES[pattern]


@constant_when_compiled
def name_of(pattern: Pattern) -> str:
    """The name of a pattern that has none yet, such as one of a plain class."""
    return pattern.name or _name(pattern)


def named(name: str) -> Pattern | None:
    """The pattern that `name` stands for in this process; None where the name is its whole text."""
    return _NAMED.get(name)


def _members(pattern: Pattern) -> Iterator[Pattern]:
    yield pattern
    for member in getattr(pattern, "patterns", ()):
        yield from _members(member)


def reach(patterns: Sequence[Pattern], length: int) -> torch.Tensor:
    """Which keys a query can draw on through layers that use `patterns`, the first layer first.

    A query of the last layer reads keys, which are outputs of the layer before, which read keys, and so on (Child
    2019, section 4.3: two layers of a factorised pattern reach every earlier position).

    Returns:
        bool [length, length]: row i, column j.
    """
    length = _length("length", length)
    if not patterns:
        raise PatternError("reach of no patterns: give at least one layer")
    reached: torch.Tensor | None = None
    for pattern in patterns:
        layer = pattern.mask(length)
        layer = layer.any(0) if layer.dim() == 3 else layer
        # float32 counts paths: exact as far as zero against not zero goes, which is all that is asked.
        reached = layer if reached is None else (layer.float() @ reached.float()) > 0
    assert reached is not None
    return reached


def layers_to_reach(patterns: Sequence[Pattern], length: int, most: int = 4096) -> int | None:
    """The fewest layers, cycling through `patterns`, after which every query draws on every earlier position.

    Returns:
        The number of layers, or None when `most` layers are not enough or nothing new is reached any more.
    """
    length = _length("length", length)
    if not patterns:
        raise PatternError("layers_to_reach of no patterns: give at least one layer")
    masks = [mask.any(0) if mask.dim() == 3 else mask for mask in (pattern.mask(length) for pattern in patterns)]
    wanted = torch.ones(length, length, dtype=torch.bool).tril()
    reached, seen = torch.eye(length, dtype=torch.bool), []
    for layer in range(min(most, length * len(masks))):
        reached = (masks[layer % len(masks)].float() @ reached.float()) > 0
        if bool((reached | ~wanted).all()):
            return layer + 1
        seen.append(reached)
        # A whole cycle that changed nothing will never change anything.
        if len(seen) > len(masks) and torch.equal(seen.pop(0), reached):
            return None
    return None


def whole(owner: str, name: str, value: Any, least: int) -> int:
    """`value` as a whole number of at least `least`, or a PatternError that names owner, field and value."""
    if isinstance(value, bool) or not hasattr(value, "__index__"):
        raise PatternError(f"{owner}({name}={value!r}): {name} must be a whole number")
    value = operator.index(value)
    if value < least:
        raise PatternError(f"{owner}({name}={value}): {name} must be at least {least}")
    if value > FARTHEST:
        raise PatternError(f"{owner}({name}={value}): {name} must be at most 2**62, as positions are")
    return value


def flag(owner: str, name: str, value: Any) -> bool:
    """`value` as True or False, or a PatternError that names owner, field and value."""
    if not isinstance(value, bool):
        raise PatternError(f"{owner}({name}={value!r}): {name} must be True or False")
    return value


def cached(next_position: int) -> torch.Tensor:
    """The key positions 0 .. next_position - 1 that a cache may hold."""
    return torch.arange(_length("next_position", next_position, least=0), device="cpu")


def _length(name: str, value: int, least: int = 1) -> int:
    if isinstance(value, bool) or not hasattr(value, "__index__") or operator.index(value) < least:
        raise PatternError(f"{name}={value!r}: must be a whole number of at least {least}")
    return operator.index(value)


def lengths(q_len: int, kv_len: int | None) -> tuple[int, int]:
    """(q_len, kv_len), kv_len as q_len where not given, or a PatternError that names what is wrong."""
    q_len = _length("q_len", q_len)
    kv_len = q_len if kv_len is None else _length("kv_len", kv_len)
    if q_len > kv_len:
        raise PatternError(
            f"q_len={q_len}, kv_len={kv_len}: the queries are the last q_len positions, so q_len <= kv_len"
        )
    return q_len, kv_len
