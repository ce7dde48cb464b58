"""A pattern of one's own: a subclass with `allows`, used everywhere."""

from dataclasses import dataclass

import pytest
import torch
from tests.oracle import assert_plan_is_sound, assert_torch_is_reference

import longstride as ls


@dataclass(frozen=True, repr=False)
class StepKeys(ls.Pattern):
    """Earlier keys at multiples of `step`, and one's own."""

    step: int
    own: bool = True

    def __post_init__(self) -> None:
        if self.step < 1:
            raise ls.PatternError(f"StepKeys(step={self.step}): step must be at least 1")

    def allows(self, i: torch.Tensor, j: torch.Tensor) -> torch.Tensor:
        keys = (j % self.step == 0) & (j <= i)
        return keys | (i == j) if self.own else keys


class Mirror(ls.Pattern):
    """No dataclass, no settings: key and query stand symmetrically about position 12."""

    def allows(self, i: torch.Tensor, j: torch.Tensor) -> torch.Tensor:
        return i + j == 24


class Nothing(ls.Pattern):
    """A rule that allows no pair, and looks at neither position."""

    def allows(self, i: torch.Tensor, j: torch.Tensor) -> torch.Tensor:
        return torch.zeros((), dtype=torch.bool).expand(torch.broadcast_shapes(i.shape, j.shape))


class ByKeyAlone(ls.Pattern):
    """The result has the shape of `j` only, which broadcasts."""

    def allows(self, i: torch.Tensor, j: torch.Tensor) -> torch.Tensor:  # noqa: ARG002
        return j % 2 == 0


OWN = [StepKeys(3), StepKeys(4, own=False), Mirror(), Nothing(), ByKeyAlone()]


@pytest.mark.parametrize("pattern", OWN, ids=str)
@pytest.mark.parametrize("size", [(25, 25), (1, 25), (9, 40)])
def test_a_rule_of_ones_own_is_planned_counted_and_computed(pattern, size):
    for expression in (pattern, pattern | ls.Local(3), pattern & ls.Local(9), ls.Strided(4) | pattern | ls.Global(2)):
        assert expression.pairs(*size) == int(expression.mask(*size).sum())
        assert_plan_is_sound(expression, *size)
        assert_torch_is_reference(expression, *size)
    assert_torch_is_reference(ls.per_head(pattern, ls.Local(4)), *size)


def test_a_dataclass_has_its_text_for_nothing():
    assert str(StepKeys(3)) == "StepKeys(3)"
    assert str(StepKeys(3, own=False)) == "StepKeys(3, own=False)"
    for pattern in (StepKeys(3), StepKeys(3, own=False) | ls.Local(2), ls.per_head(StepKeys(2), ls.Full())):
        assert ls.parse(str(pattern)) == pattern
    with pytest.raises(ls.PatternError, match=r"StepKeys\(step=0\): .* at position 11"):
        ls.parse("Local(2) & StepKeys(0)")


def test_a_plain_class_has_a_text_too():
    assert str(Mirror()) == "Mirror()"
    assert isinstance(ls.parse("Mirror()"), Mirror)


class Hidden(ls.Pattern):
    def __init__(self, step: int = 2) -> None:
        self.step = step

    def allows(self, i, j):
        return (j <= i) & (j % self.step == 0)


def test_a_text_that_would_not_say_all_is_no_text_to_parse():
    assert str(Hidden(8)) == "Hidden(...)"
    with pytest.raises(ls.PatternError):
        ls.parse(str(Hidden(8)))


def test_a_class_may_not_take_the_name_of_a_built_in_pattern():
    with pytest.raises(ls.PatternError, match="class Local: the name is that of a built-in pattern"):
        type("Local", (ls.Pattern,), {})


def test_causality_is_found_by_looking():
    assert StepKeys(3).is_causal
    assert not Mirror().is_causal
    assert (Mirror() & ls.Causal()).is_causal


def test_every_key_is_retained_where_nothing_is_known():
    assert StepKeys(3).retained(7).all()
    assert StepKeys(3).retained(0).shape == (0,)


def test_a_subclass_without_a_rule_says_so():
    class Forgetful(ls.Pattern):
        pass

    with pytest.raises(NotImplementedError, match=r"Forgetful must define allows\(i, j\)"):
        Forgetful().mask(4)


def test_two_rules_that_read_alike_stay_two():
    """A class that hides its settings from its text must not be computed with another's settings."""

    class Shift(ls.Pattern):
        def __init__(self, by: int) -> None:
            self.by = by

        def allows(self, i: torch.Tensor, j: torch.Tensor) -> torch.Tensor:
            return i - j == self.by

    x = torch.randn(1, 1, 9, 4, dtype=torch.float64)
    for by in (0, 1, 3):
        assert torch.equal(ls.attention(x, x, x, Shift(by))[:, :, by:], x[:, :, : 9 - by])
