"""What is asked of a backend: shapes, dtype and device, without the data."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Protocol

import torch

from longstride.patterns import Pattern


@dataclass(frozen=True)
class Request:
    """One call of `attention`, as far as choosing a backend goes.

    Attributes:
        q_shape, k_shape, v_shape: [batch, heads, length, dim] each.
        dtype, device_type: of q, k and v.
    """

    pattern: Pattern
    q_shape: tuple[int, ...]
    k_shape: tuple[int, ...]
    v_shape: tuple[int, ...]
    dtype: torch.dtype
    device_type: str

    @property
    def num_heads(self) -> int:
        return self.q_shape[1]

    @property
    def q_len(self) -> int:
        return self.q_shape[2]

    @property
    def kv_len(self) -> int:
        return self.k_shape[2]

    @property
    def head_dim(self) -> int:
        return self.q_shape[3]

    @property
    def v_head_dim(self) -> int:
        return self.v_shape[3]


#: What every backend takes, unless it says otherwise.
DTYPES = (torch.float16, torch.bfloat16, torch.float32, torch.float64)


class Backend(Protocol):
    """What runs a plan."""

    name: str

    def refusals(self, request: Request) -> list[str]:
        """Why this backend cannot take the request; [] when it can. The same answer selects and explains."""
        ...

    def describe(self, request: Request) -> str:
        """In a line, how the request would be computed, and at what cost where that is not plain."""
        ...


def accumulator(dtype: torch.dtype) -> torch.dtype:
    """The dtype of softmax, sums and the log-sum-exp: float64 for float64, else float32."""
    return torch.float64 if dtype == torch.float64 else torch.float32
