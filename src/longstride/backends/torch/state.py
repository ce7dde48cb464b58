"""What the tiles of a plan share while they run: inputs, the running output, gradients."""

from __future__ import annotations

from dataclasses import dataclass

import torch

from longstride.backends.request import accumulator
from longstride.backends.torch.tile_math import merge


def slab_scores(device: torch.device) -> int:
    """How many scores a slab of tiles holds at once.

    On a CPU 2 MB of float32, which stay in a core's cache between the products that use them; elsewhere 64 MB, which
    keep the launches few.
    """
    return 1 << 19 if device.type == "cpu" else 1 << 24


@dataclass
class Inputs:
    """q [n, q_len, dim], k and v [n, kv_len, dim]: all heads of all batch rows, one after another."""

    q: torch.Tensor
    k: torch.Tensor
    v: torch.Tensor
    scale: float

    @property
    def before(self) -> int:
        """Keys before the first query."""
        return self.k.shape[1] - self.q.shape[1]

    def flip(self) -> Inputs:
        """Reversed in time."""
        return Inputs(self.q.flip(1), self.k.flip(1), self.v.flip(1), self.scale)


@dataclass
class Output:
    """The running result: out [n, q_len, v_dim] and lse [n, q_len] in the accumulator's dtype."""

    out: torch.Tensor
    lse: torch.Tensor

    @staticmethod
    def empty(inputs: Inputs, filled: bool = True) -> Output:
        """`filled`: with 0 and -inf, what rows without keys have; else to be written whole."""
        n, q_len, _ = inputs.q.shape
        dtype = accumulator(inputs.q.dtype)
        out, lse = (
            inputs.q.new_empty(n, q_len, inputs.v.shape[2], dtype=dtype),
            inputs.q.new_empty(n, q_len, dtype=dtype),
        )
        return Output(out.zero_(), lse.fill_(float("-inf"))) if filled else Output(out, lse)


@dataclass
class Gradients:
    """What the backward knows of the merged result, and the gradients that it adds up (accumulator's dtype)."""

    grad_out: torch.Tensor
    out: torch.Tensor
    lse: torch.Tensor  # +inf in rows without keys: exp(score - inf) = 0
    delta: torch.Tensor  # sum(out * grad_out) - grad_lse
    through_lse: bool  # grad_lse is there
    q: torch.Tensor
    k: torch.Tensor
    v: torch.Tensor

    @staticmethod
    def empty(
        inputs: Inputs,
        grad_out: torch.Tensor,
        out: torch.Tensor,
        lse: torch.Tensor,
        delta: torch.Tensor,
        through_lse: bool,
    ) -> Gradients:
        zeros = [torch.zeros_like(x, dtype=accumulator(x.dtype)) for x in (inputs.q, inputs.k, inputs.v)]
        return Gradients(grad_out, out, lse, delta, through_lse, *zeros)

    def flip(self, inputs: Inputs) -> Gradients:
        """The same reversed in time, with gradients of its own; `inputs` are reversed already."""
        known = (x.flip(1) for x in (self.grad_out, self.out, self.lse, self.delta))
        return Gradients.empty(inputs, *known, self.through_lse)

    def without_rows(self, rows: torch.Tensor) -> Gradients:
        """The same, for a part that leaves out `rows`; the gradients are shared."""
        return Gradients(
            self.grad_out,
            self.out,
            self.lse.index_fill(1, rows, float("inf")),
            self.delta,
            self.through_lse,
            self.q,
            self.k,
            self.v,
        )


def put(out: torch.Tensor, lse: torch.Tensor, part_out: torch.Tensor, part_lse: torch.Tensor, first: bool) -> None:
    """Copy a part where nothing was merged before (`first`), else merge it."""
    if first:
        out.copy_(part_out)
        lse.copy_(part_lse)
    else:
        merge(out, lse, part_out, part_lse)
