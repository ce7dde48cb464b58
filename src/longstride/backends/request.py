"""What is asked of a backend, shapes, dtype and device without the data; and what a backend is."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, ClassVar, Protocol

import torch

from longstride.patterns import Pattern

#: What belongs to q, k and v: their gradients, or memory for these.
QKV = tuple[torch.Tensor, torch.Tensor, torch.Tensor]


@dataclass(frozen=True)
class Request:
    """One call of `attention` or `attention_varlen`, as far as choosing a backend goes.

    Attributes:
        q_shape, k_shape, v_shape: [batch, heads, length, dim] each; with `varlen` batch is 1 and length is that of the
            longest document.
        dtype, device_type: of q, k and v.
        strides: of q, k and v, in elements; None where all three are contiguous.
        through_lse: gradients may come through the log-sum-exp.
        varlen: packed documents.
        deterministic: PyTorch is told to use deterministic algorithms alone.
    """

    pattern: Pattern
    q_shape: tuple[int, ...]
    k_shape: tuple[int, ...]
    v_shape: tuple[int, ...]
    dtype: torch.dtype
    device_type: str
    strides: tuple[tuple[int, ...], tuple[int, ...], tuple[int, ...]] | None = None
    through_lse: bool = False
    varlen: bool = False
    deterministic: bool = False

    @property
    def num_heads(self) -> int:
        return self.q_shape[1]

    @property
    def num_kv_heads(self) -> int:
        return self.k_shape[1]

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
    """What runs a plan. Shapes are those of `longstride.attention` and `longstride.attention_varlen`.

    A backend whose `forward` is differentiable by autograd has no `backward`. One that has `forward_varlen` and
    `backward_varlen` takes packed documents; they have cu_seqlens and max_seqlen before the pattern.
    """

    name: str

    #: True where autograd differentiates `forward` by itself; else `forward` and `backward` run inside an operator.
    differentiable: ClassVar[bool] = False

    #: False where there is no gradient of the log-sum-exp: requests with `through_lse` go to others.
    takes_lse_gradient: ClassVar[bool] = True

    def refusals(self, request: Request) -> list[str]:
        """Why this backend cannot take the request; [] when it can. The same answer selects and explains."""
        ...

    def prefers(self, request: Request) -> str | None:
        """Why this backend goes before all others for a request that it takes; None where the usual order holds.

        Optional: a backend without it follows the usual order always.
        """
        ...

    def prefers_backward(self, request: Request) -> str | None:
        """As `prefers`, for the backward half of a call alone. Optional."""
        ...

    def describe(self, request: Request) -> str:
        """In a line, how the request would be computed, and at what cost where that is not plain."""
        ...

    def forward(self, q: Any, k: Any, v: Any, pattern: Pattern, scale: float) -> tuple[torch.Tensor, torch.Tensor]:
        """out and lse, both new; out lies in memory as `layout.empty_as` makes it of q, lse contiguous.

        Where autograd differentiates the backend, nothing is promised of memory.
        """
        ...

    def forward_only(self, q: Any, k: Any, v: Any, pattern: Pattern, scale: float) -> torch.Tensor:
        """out alone. Optional: for a backend that saves by leaving the log-sum-exp out."""
        ...

    def backward(
        self,
        grad_out: Any,
        grad_lse: Any,
        q: Any,
        k: Any,
        v: Any,
        out: Any,
        lse: Any,
        pattern: Pattern,
        scale: float,
        into: QKV | None = None,
    ) -> QKV:
        """Gradients of q, k and v; grad_lse is a tensor or None. Any backend's out and lse will do.

        They are new, and laid as `layout.empty_as` of each; or they are written `into` what is given, whatever its
        strides.
        """
        ...


def accumulator(dtype: torch.dtype) -> torch.dtype:
    """The dtype of softmax, sums and the log-sum-exp: float64 for float64, else float32."""
    return torch.float64 if dtype == torch.float64 else torch.float32
