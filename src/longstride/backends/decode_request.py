"""What is asked of a backend that decodes: new tokens against a cache, with no length anywhere but on the device."""

from __future__ import annotations

from collections.abc import Hashable
from dataclasses import dataclass, field
from typing import Any, Protocol

import torch

from longstride.plan import Layout


@dataclass(frozen=True)
class DecodeRequest:
    """One step of decoding, as far as choosing a backend goes."""

    layout: Layout
    head_dim: int
    v_head_dim: int
    dtype: torch.dtype
    device_type: str


@dataclass(frozen=True)
class CachedRows:
    """One layer's rows, and where its batch stands.

    Attributes:
        layout: which rows are which.
        keys: [batch, rows, head_dim]; row 0 is zero.
        values: [batch, rows, v_head_dim]; row 0 is zero.
        lengths: int64 [batch]: tokens that each batch row had before this step.
        arrivals: int32 [batch * (headroom + 1) * num_heads], zeros between steps: where programs that share a query
            count themselves, so that the last one knows that it is.
        shortest, longest: bounds of `lengths` that the host knows.
        shared: what a backend works out once a step, for all layers with one layout.
    """

    layout: Layout
    keys: torch.Tensor
    values: torch.Tensor
    lengths: torch.Tensor
    arrivals: torch.Tensor
    shortest: int
    longest: int
    shared: dict[Hashable, Any] = field(default_factory=dict)


class Decoder(Protocol):
    """A backend that decodes.

    `decode` keeps k and v of 1 .. headroom + 1 tokens in the rows, and attends from their queries to everything that
    the pattern allows. q [batch, heads, tokens, head_dim], k and v likewise; out [batch, heads, tokens, v_head_dim].
    """

    def decode_refusals(self, request: DecodeRequest) -> list[str]: ...

    def decode(
        self, q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, rows: CachedRows, scale: float
    ) -> torch.Tensor: ...
