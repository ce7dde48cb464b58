"""Softmax attention of a batch of small tiles, forward and backward, in plain PyTorch."""

from __future__ import annotations

import torch


def tile_forward(
    q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, scale: float, allowed: torch.Tensor | None
) -> tuple[torch.Tensor, torch.Tensor]:
    """Attention within each tile.

    Args:
        q, k, v: [tiles, q_rows or k_rows, dim], in the dtype to compute in.
        allowed: bool, broadcasts to [tiles, q_rows, k_rows]; None allows all.

    Returns:
        out [tiles, q_rows, v_dim]; lse [tiles, q_rows]: 0 and -inf where a row has no allowed key.
    """
    scores = torch.matmul(q * scale, k.transpose(-1, -2))
    if allowed is not None:
        # A fill, not an added -inf: a score that overflowed to +inf must vanish too, not become NaN.
        scores = scores.masked_fill_(~allowed, float("-inf"))
    most = scores.amax(-1, keepdim=True)
    if allowed is not None:
        most = most.masked_fill_(most == float("-inf"), 0.0)
    weights = scores.sub_(most).exp_()
    total = weights.sum(-1, keepdim=True)
    lse = (total.log() + most).squeeze(-1)
    out = torch.matmul(weights, v)
    return out.div_(total if allowed is None else total.masked_fill_(total == 0, 1.0)), lse


def tile_backward(
    q: torch.Tensor,
    k: torch.Tensor,
    v: torch.Tensor,
    grad_out: torch.Tensor,
    lse: torch.Tensor,
    delta: torch.Tensor,
    scale: float,
    allowed: torch.Tensor | None,
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """Gradients of a tile's q, k and v, given the *merged* log-sum-exp of all parts.

    Args:
        lse: [tiles, q_rows], +inf for rows that the tile is not to count.
        delta: [tiles, q_rows]: sum(out * grad_out) - grad_lse of the merged output.
        others: as in `tile_forward`.

    Source: Dao 2022, FlashAttention, Algorithm 4, with the log-sum-exp and delta of the whole softmax.
    """
    q = q * scale
    # A weight is at most 1; a score too large for its own rounding must not make it infinite.
    weights = torch.matmul(q, k.transpose(-1, -2)).sub_(lse[..., None]).clamp_(max=0.0).exp_()
    if allowed is not None:
        weights = weights.masked_fill_(~allowed, 0.0)
    grad_v = torch.matmul(weights.transpose(-1, -2), grad_out)
    grad_scores = torch.matmul(grad_out, v.transpose(-1, -2)).sub_(delta[..., None]).mul_(weights)
    if allowed is not None:
        # 0 times an overflowed product is NaN: fill again.
        grad_scores = grad_scores.masked_fill_(~allowed, 0.0)
    grad_q = torch.matmul(grad_scores, k).mul_(scale)
    return grad_q, torch.matmul(grad_scores.transpose(-1, -2), q), grad_v


def merge(out: torch.Tensor, lse: torch.Tensor, part_out: torch.Tensor, part_lse: torch.Tensor) -> None:
    """Merge a part into `out` and `lse` in place: ``lse = logaddexp``, ``out = sum exp(l_p - lse) o_p``."""
    merged = torch.logaddexp(lse, part_lse)
    base = merged.masked_fill(merged == float("-inf"), 0.0)
    out.mul_((lse - base).exp_()[..., None]).add_(part_out * (part_lse - base).exp_()[..., None])
    lse.copy_(merged)
