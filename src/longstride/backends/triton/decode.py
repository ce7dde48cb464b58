"""Decoding with a kernel of our own: no length is looked at on the host, so a CUDA graph can replay a step."""

from __future__ import annotations

from dataclasses import dataclass
from functools import lru_cache
from importlib import import_module
from typing import Any

import torch

from longstride.backends.decode_request import CachedRows, DecodeRequest
from longstride.backends.recorded import kept
from longstride.backends.triton import DTYPES, MOST_HEAD_DIM, _installed, _on, _tf32, interpreted
from longstride.backends.triton.decode_lowering import decode_obstacles, lower_layout
from longstride.backends.triton.tuning import family
from longstride.plan import Layout

LOG2_E = 1.4426950408889634

#: The most splits of the keys of a query; as many partial results are joined at the end.
MOST_SPLITS = 64


@dataclass(frozen=True)
class DecodeShape:
    """How the kernel is cut: keys a tile, warps, and the programs that a device should have at once."""

    keys: int
    warps: int
    programs: int


def decode_shape(family: str, dtype: torch.dtype, dim: int, share: int, span: int) -> DecodeShape:
    """The shape for a family of devices (`tuning.family`); dim is the larger head_dim as a power of two.

    A tile of one head is multiplied in registers, keys x dim numbers at a time, hence fewer keys for wider heads, and
    where the keys of a query (span) are few: more programs then wait for memory at the same time.
    """
    if family == "interpreter":
        return DecodeShape(16, 4, 4)
    wide = dim > 128 or dtype == torch.float32
    if family == "hopper":
        return DecodeShape(32 if wide or span <= 1024 else 64, 4, 528)
    return DecodeShape(16 if wide and share == 1 else 32, 4, 128)


@lru_cache(maxsize=256)
def _obstacles(layout: Layout) -> tuple[str, ...]:
    return tuple(decode_obstacles(layout))


def decode_refusals(request: DecodeRequest) -> list[str]:
    if not _installed():
        return ["triton is not installed: pip install longstride[triton]"]
    if request.device_type != "cuda" and not interpreted():
        return [f"device {request.device_type} is not cuda"]
    found = []
    if request.dtype not in DTYPES:
        found.append(f"dtype {request.dtype} is none of float16, bfloat16, float32")
    if max(request.head_dim, request.v_head_dim) > MOST_HEAD_DIM:
        found.append(f"head_dim {request.head_dim} or v_head_dim {request.v_head_dim} exceeds {MOST_HEAD_DIM}")
    return found + list(_obstacles(request.layout))


def splits_for(shape: DecodeShape, programs: int, span: int) -> int:
    """Into how many stretches the keys of a query are cut: a power of two that fills the device, a tile each."""
    wanted = min(shape.programs // max(1, programs), -(-span // shape.keys), MOST_SPLITS)
    return 1 << max(0, wanted.bit_length() - 1)


def decode(q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, rows: CachedRows, scale: float) -> torch.Tensor:
    """out [batch, heads, tokens, v_head_dim] in q's dtype; shapes as in `Decoder`."""
    kernels: Any = import_module("longstride.backends.triton.decode_kernel")
    layout = rows.layout
    lowered = kept(lower_layout(layout, q.device), q.device)
    q, k, v = (x if x.stride(3) == 1 else x.contiguous() for x in (q, k, v))
    batch, heads, tokens, dim = q.shape
    v_dim = v.shape[3]
    block_d, block_dv = (max(16, 1 << (x - 1).bit_length()) for x in (dim, v_dim))
    out = torch.empty(batch, heads, tokens, v_dim, dtype=q.dtype, device=q.device)
    with _on(q):
        for launch in lowered.launches:
            shape = decode_shape(family(q.device), q.dtype, max(block_d, block_dv), layout.share, launch.span)
            count = len(launch.lanes)
            splits = splits_for(shape, batch * tokens * count, launch.span)
            parts = [out] * 3
            if splits > 1:
                lines = batch * heads * tokens * splits
                parts = [
                    torch.empty(lines, *width, dtype=torch.float32, device=q.device) for width in ((v_dim,), (), ())
                ]
            kernels.decode[(batch * tokens, count, splits)](
                q,
                k,
                v,
                rows.keys,
                rows.values,
                rows.lengths,
                launch.lanes,
                launch.spots,
                lowered.lists,
                out,
                *parts,
                rows.arrivals,
                *q.stride()[:3],
                *k.stride()[:3],
                *v.stride()[:3],
                layout.rows,
                heads,
                scale * LOG2_E,
                PROGRAM=launch.program,
                SPOTS=launch.spots.shape[1],
                TOKENS=tokens,
                SHARE=layout.share,
                SPLITS=splits,
                HEAD_DIM=dim,
                V_HEAD_DIM=v_dim,
                BLOCK_D=block_d,
                BLOCK_DV=block_dv,
                BLOCK_G=1 if layout.share == 1 else max(16, 1 << (layout.share - 1).bit_length()),
                BLOCK_N=shape.keys,
                BLOCK_T=max(1 if layout.share == 1 else 16, 1 << (tokens - 1).bit_length()),
                UPCAST=interpreted(),
                PRECISION="tf32" if _tf32(q.dtype) else "ieee",
                num_warps=shape.warps,
            )
    return out
