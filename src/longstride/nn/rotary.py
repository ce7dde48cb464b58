"""Rotary positions, and self-attention whose queries and keys are normalised and then rotated by them."""

from typing import Any

import torch
from torch import Tensor, nn

from longstride.cache import PatternCache
from longstride.errors import ArgumentError
from longstride.nn.self_attention import KeysValues, PatternAttention
from longstride.patterns import Pattern

#: cos and sin of every position's angles: float32 [length, head_dim / 2], or [batch, length, head_dim / 2].
Rotation = tuple[Tensor, Tensor]


class RotaryPositions(nn.Module):
    """cos and sin of the angles p * base^(-2 m / head_dim), m = 0 ... head_dim / 2 - 1, for every position p.

    The angles are worked out in float64 and rounded once: a float32 product would be wrong by 0.06 radians at the
    millionth position. MPS devices have no float64; there the error grows to that.

    Args:
        head_dim: width of a head's queries; even.
        base: the longest wavelength is about 2 pi base positions; 10,000 in the paper.

    Raises:
        ArgumentError: an odd head_dim.

    Source: Su 2021 (RoFormer), section 3.2.2.
    """

    def __init__(self, head_dim: int, base: float = 10000.0) -> None:
        super().__init__()
        if head_dim % 2:
            raise ArgumentError(f"head_dim={head_dim}: rotary positions turn pairs of numbers, so it must be even")
        self.head_dim = head_dim
        self.base = base

    def forward(self, positions: Tensor) -> Rotation:
        """Positions int64[length] or [batch, length] to their :data:`Rotation`."""
        exact = torch.float32 if positions.device.type == "mps" else torch.float64
        # Made anew at each call, on the device: a buffer would have to be saved, or be lost on loading.
        pairs = torch.arange(0, self.head_dim, 2, device=positions.device, dtype=exact)
        angles = positions[..., None].to(exact) * self.base ** (-pairs / self.head_dim)
        return angles.cos().float(), angles.sin().float()

    def extra_repr(self) -> str:
        return f"head_dim={self.head_dim}, base={self.base:g}"


def rotate(x: Tensor, rotation: Rotation) -> Tensor:
    """Turn the pairs (x_m, x_{m + head_dim / 2}) by their position's angles, so that q . k depends on the distance.

    Args:
        x: float[batch, heads, length, head_dim].
        rotation: of the positions of x.

    Returns:
        The same shape and dtype.

    Source: Su 2021, equation 34; the pairs lie half a head apart, as in GPT-NeoX and Llama.
    """
    cos, sin = (table[..., None, :, None, :].to(x.dtype) for table in rotation)  # one for all heads
    pairs = x.unflatten(-1, (2, -1))  # [batch, heads, length, 2, head_dim / 2]
    # Every number beside its partner, instead of two halves that are joined: compilers read it as a single pass.
    turned = pairs * cos + pairs.flip(-2) * torch.cat((-sin, sin), -2)
    return turned.flatten(-2)


class RotarySelfAttention(PatternAttention):
    """Self-attention along a pattern with QK-norm and rotary positions; [B, T, d] to [B, T, d].

    ``q' = rotate(q_norm(q))`` and ``k' = rotate(k_norm(k))`` take the place of q and k; each norm has one weight for
    every place of a head, shared by the heads. A cache gets keys as they are here, normalised and rotated.

    Args:
        pattern, hidden_size, num_heads, qk_hidden_size, backend: as :class:`longstride.nn.SelfAttention`'s.
        norm_eps: added to the mean square in the two norms.

    Source: Su 2021 (rotary positions); Henry 2020 and Dehghani 2023, section 2 (normalised queries and keys).
    """

    def __init__(
        self,
        pattern: Pattern,
        *,
        hidden_size: int,
        num_heads: int,
        qk_hidden_size: int | None = None,
        norm_eps: float = 1e-5,
        backend: str | None = None,
    ) -> None:
        super().__init__(
            pattern, hidden_size=hidden_size, num_heads=num_heads, qk_hidden_size=qk_hidden_size, backend=backend
        )
        head_dim = self.widths[0] // num_heads
        self.q_norm = nn.RMSNorm(head_dim, eps=norm_eps)
        self.k_norm = nn.RMSNorm(head_dim, eps=norm_eps)

    def forward(
        self,
        hidden: Tensor,
        rotation: Rotation,
        cache: PatternCache | None = None,
        **beside: Any,
    ) -> Tensor | tuple[Tensor, KeysValues]:
        """As `SelfAttention.forward`; ``rotation`` is that of the positions of ``hidden``."""
        q, k, v = self.project(hidden)
        q, k = (
            # The weight's dtype is float32 under autocast: one rounding, after the rotation.
            rotate(norm(x.to(norm.weight.dtype)), rotation).to(v.dtype)
            for norm, x in ((self.q_norm, q), (self.k_norm, k))
        )
        return self.attend(q, k, v, cache=cache, **beside)
