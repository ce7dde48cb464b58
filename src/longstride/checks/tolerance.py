"""How much worse a model may become: a number of bits, or a share of what it has."""

import math
import re
from dataclasses import dataclass

from longstride.errors import ArgumentError

_TEXT = re.compile(r"\s*(\d+(?:\.\d*)?|\.\d+)\s*(%?)\s*")


@dataclass(frozen=True)
class Tolerance:
    """``amount`` bits a token or, where ``relative``, a share ``amount`` of the loss itself."""

    amount: float
    relative: bool = False

    def __post_init__(self) -> None:
        if not self.amount >= 0 or math.isinf(self.amount):
            raise ArgumentError(f"tolerance={self.amount}: it must be a number of at least 0")

    @classmethod
    def parse(cls, text: str) -> "Tolerance":
        """``0.02`` bits, or ``1%`` of the loss.

        >>> Tolerance.parse("1%").in_bits(2.5)
        0.025

        Raises:
            ArgumentError: the text is neither.
        """
        found = _TEXT.fullmatch(text)
        if found is None:
            raise ArgumentError(
                f"--tolerance {text}: give bits a token, such as 0.02, or a share of the loss, such as 1%"
            )
        return cls(float(found[1]) / 100, relative=True) if found[2] else cls(float(found[1]))

    def in_bits(self, loss_bits: float) -> float:
        """What a loss of so many bits may rise by."""
        return self.amount * loss_bits if self.relative else self.amount
