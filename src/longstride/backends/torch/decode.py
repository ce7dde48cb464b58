"""Decoding with PyTorch's own operators: gather the rows that each query reads, then one small softmax.

Where rows lie is worked out once a step for all layers of one layout; a layer itself takes two writes, two gathers,
two products and a softmax.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch

from longstride.backends.decode_request import CachedRows, DecodeRequest
from longstride.backends.request import DTYPES, accumulator
from longstride.plan import Layout

#: Stands for minus infinity where a query reads nothing at all: its weights then fall on rows of zeros, evenly.
UNREAD = -1e30


@dataclass(frozen=True)
class Addresses:
    """Rows of a layer's flat memory [batch * rows, dim] for one step.

    Attributes:
        write: int64 [batch * kv_heads * stores * tokens].
        stores: the most stores a head of keys has.
        read: int64 [batch * tokens * lanes * reads].
        bias: [batch * tokens * lanes, 1, reads]: 0 where a row is read, `UNREAD` elsewhere.
    """

    write: torch.Tensor
    stores: int
    read: torch.Tensor
    bias: torch.Tensor


def decode_refusals(request: DecodeRequest) -> list[str]:
    if request.dtype not in DTYPES:
        return [f"dtype {request.dtype} is none of float16, bfloat16, float32, float64"]
    return []


def decode(q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, rows: CachedRows, scale: float) -> torch.Tensor:
    """out [batch, heads, tokens, v_head_dim] in q's dtype; shapes as in `Decoder`."""
    layout = rows.layout
    batch, heads, tokens, _ = q.shape
    key = ("torch", layout, tokens)
    if key not in rows.shared:
        rows.shared[key] = addresses(layout, rows, batch, tokens, accumulator(q.dtype))
    where: Addresses = rows.shared[key]
    keys, values = rows.keys.flatten(0, 1), rows.values.flatten(0, 1)
    for memory, new in ((keys, k), (values, v)):
        copies = new[:, :, None].expand(-1, -1, where.stores, -1, -1) if where.stores > 1 else new
        memory.index_copy_(0, where.write, copies.reshape(-1, new.shape[-1]))
    wide = where.bias.dtype
    queries = q.transpose(1, 2).reshape(where.bias.shape[0], layout.share, -1)
    found_keys = keys.index_select(0, where.read).view(queries.shape[0], -1, keys.shape[1])
    found_values = values.index_select(0, where.read).view(queries.shape[0], -1, values.shape[1])
    if q.dtype != wide:
        queries, found_keys, found_values = queries.to(wide), found_keys.to(wide), found_values.to(wide)
    weights = torch.baddbmm(where.bias, queries, found_keys.transpose(1, 2), alpha=scale).softmax(-1)
    out = torch.bmm(weights, found_values).view(batch, tokens, heads, -1).transpose(1, 2)
    return out.to(q.dtype).contiguous()


def addresses(layout: Layout, rows: CachedRows, batch: int, tokens: int, dtype: torch.dtype) -> Addresses:
    """Where a step of `tokens` tokens writes and reads."""
    device = rows.lengths.device
    together = rows.shortest == rows.longest
    lengths = rows.lengths[:1] if together else rows.lengths
    position = lengths[:, None] + torch.arange(tokens, device=device)
    write = layout.write_rows(position, position[:, -1:] + 1)
    read, there = layout.read_rows(position.flatten(), rows.shortest, rows.longest + tokens - 1)
    read = read.unflatten(0, (lengths.shape[0], tokens))
    first = torch.arange(0, batch * layout.rows, layout.rows, device=device)[:, None, None, None]
    bias = torch.zeros(there.shape, dtype=dtype, device=device).masked_fill_(~there, UNREAD)
    bias = bias.unflatten(0, (lengths.shape[0], tokens)).expand(batch, -1, -1, -1)
    return Addresses(
        (write + first).flatten(), write.shape[2], (read + first).flatten(), bias.flatten(0, 2)[:, None, :]
    )
