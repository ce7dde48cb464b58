"""What no kernel can beat: the bytes that must move, over what a copy moves in a second. And the arithmetic."""

from __future__ import annotations

import statistics
from functools import lru_cache

import torch

import longstride as ls
from cases import Case
from harness import Clock

MEASURES = ("forward", "backward", "both")


def bytes_moved(case: Case, element_bytes: int = 2) -> dict[str, int]:
    """Each tensor once: forward reads q, k, v and writes o; backward reads q, k, v, o, do and writes dq, dk, dv."""
    q = case.batch * case.heads * case.length * case.head_dim
    o = case.batch * case.heads * case.length * case.v_head_dim
    kv = case.batch * case.kv_heads * case.length * (case.head_dim + case.v_head_dim)
    forward, backward = (q + kv + o) * element_bytes, 2 * (q + kv + o) * element_bytes
    return {"forward": forward, "backward": backward, "both": forward + backward}


@lru_cache(maxsize=256)
def operations(case: Case, pattern: ls.Pattern) -> dict[str, float]:
    """Multiplications and additions over the allowed pairs alone: 2 products forward, 5 backward."""
    pairs = case.batch * pattern.pairs(case.length, heads=case.heads)
    forward = 2.0 * (case.head_dim + case.v_head_dim) * pairs
    return {"forward": forward, "backward": 2.5 * forward, "both": 3.5 * forward}


def copy_gbps(clock: Clock, device: str, copied_bytes: int = 1 << 30, rounds: int = 20) -> float:
    """Gigabytes a second of a plain copy, bytes read and bytes written both counted."""
    source = torch.empty(copied_bytes, dtype=torch.uint8, device=device).fill_(1)
    target = torch.empty_like(source)
    times = [clock(lambda: target.copy_(source))[0] for _ in range(rounds + 1)][1:]
    return 2 * copied_bytes / statistics.median(times) * 1e-6


def metrics(case: Case, pattern: ls.Pattern, measure: str, ms: float, gbps: float) -> dict[str, float]:
    """The floor in ms, how many times that a call took, TFLOP/s over allowed pairs, GB/s of what must move."""
    moved = bytes_moved(case)[measure]
    floor_ms = moved / gbps * 1e-6
    return {
        "floor_ms": floor_ms,
        "share": ms / floor_ms,
        "tflops": operations(case, pattern)[measure] / ms * 1e-9,
        "gbps": moved / ms * 1e-6,
    }
