"""Small cases on the Triton backend, both passes and decoding, to run under compute-sanitizer (make gpu-sanitize).

Outputs are compared with the reference too: a sanitizer says nothing of a kernel that was never launched.
"""

from __future__ import annotations

import sys

import torch

import longstride as ls

#: Every owner and source of the kernels, ragged lengths, fewer queries than keys, cells of one tile and of two.
CASES: list[tuple[ls.Pattern, int, int, int, int]] = [  # pattern, q_len, kv_len, head_dim, kv_heads
    (ls.Causal(), 150, 150, 64, 2),
    (ls.Local(40, lookahead=9), 77, 150, 64, 1),
    (ls.Dilated(9, 4), 130, 130, 32, 2),
    (ls.Strided(16), 203, 203, 64, 2),
    (ls.Strided(2), 200, 200, 64, 2),
    (ls.Strided(24), 7, 203, 64, 1),
    (ls.BlockLocal(100, causal=False), 203, 203, 48, 2),
    (ls.Fixed(32, 5), 150, 150, 64, 1),
    (ls.LogSparse(), 1, 203, 20, 2),
    (ls.LogSparse(3) | ls.Strided(24), 130, 130, 64, 2),
    (ls.bigbird(16), 150, 150, 64, 1),
    (ls.longformer(32, (0, 70, 140)), 60, 150, 64, 2),
    (ls.per_head(ls.Local(24), ls.RandomBlocks(31, 2)), 150, 150, 64, 2),
]


def difference(pattern: ls.Pattern, q_len: int, kv_len: int, dim: int, kv_heads: int) -> float:
    """The largest difference from float64 in out and the gradients, relative to the largest number of each."""
    torch.manual_seed(0)
    shapes = ((2, q_len, dim), (kv_heads, kv_len, dim), (kv_heads, kv_len, dim))
    inputs = [torch.randn(1, *shape, device="cuda", dtype=torch.float16) for shape in shapes]
    weight = torch.randn(1, 2, q_len, dim, device="cuda", dtype=torch.float16)
    found = []
    for backend, dtype in (("triton", torch.float16), ("reference", torch.float64)):
        leaves = [x.to(dtype).requires_grad_() for x in inputs]
        out = ls.attention(*leaves, pattern, backend=backend)
        found.append([out, *torch.autograd.grad(out, leaves, weight.to(dtype))])
    return max(((a - b).abs().max() / b.abs().max()).item() for a, b in zip(*found, strict=True))


def documents() -> float:
    """Packed documents against the same ones, one by one."""
    q, k, v = (torch.randn(150, 2, 64, device="cuda", dtype=torch.float16, requires_grad=True) for _ in range(3))
    lengths, pattern = [0, 70, 1, 79], ls.Local(20) | ls.Strided(20)
    cu_seqlens = torch.tensor([0, 0, 70, 71, 150], device="cuda", dtype=torch.int32)
    packed = ls.attention_varlen(q, k, v, cu_seqlens, pattern, backend="triton", max_seqlen=79)
    torch.autograd.grad(packed.sum(), (q, k, v))
    alone = []
    for document in zip(*(x.split(lengths) for x in (q, k, v)), strict=True):
        if len(document[0]):
            out = ls.attention(*(x.transpose(0, 1)[None] for x in document), pattern, backend="triton")
            alone.append(out[0].transpose(0, 1))
    return (packed - torch.cat(alone)).abs().max().item()


#: Every store and walk of the decode kernel, one split and several, heads that share their keys.
DECODED: list[tuple[ls.Pattern, int]] = [  # pattern, kv_heads
    (ls.Local(40) | ls.Strided(24), 4),
    (ls.Fixed(32, 5), 1),
    (ls.LogSparse() | ls.Global((3, 70)), 4),
    (ls.RandomBlocks(16, 2) | ls.BlockLocal(16), 2),
]


def decoded(pattern: ls.Pattern, kv_heads: int, length: int = 203) -> float:
    """Tokens one by one behind a prompt, against attention over all of them; the largest difference."""
    shapes = ((4, length, 64), (kv_heads, length, 64), (kv_heads, length, 64))
    q, k, v = (torch.randn(2, *shape, device="cuda", dtype=torch.float16) for shape in shapes)
    sizes = {"num_heads": 4, "num_kv_heads": kv_heads, "head_dim": 64, "batch": 2, "dtype": q.dtype}
    cache = ls.PatternCache(pattern, capacity=length, device="cuda", **sizes)
    found = []
    for cut in ((0, length - 5), *((at, at + 1) for at in range(length - 5, length))):
        new = (x[:, :, slice(*cut)] for x in (q, k, v))
        found.append(ls.attention_cached(*new, pattern, cache))
        cache.advance()
    whole = ls.attention(q, k, v, pattern, backend="reference")
    return (torch.cat(found, 2) - whole).abs().max().item()


def main() -> int:
    worst = 0.0
    for case in CASES:
        error = difference(*case)
        print(f"{error:.1e}  {case[0]}, q_len {case[1]}, kv_len {case[2]}, head_dim {case[3]}", flush=True)
        worst = max(worst, error)
    error = documents()
    print(f"{error:.1e}  packed documents", flush=True)
    worst = max(worst, error)
    for pattern, kv_heads in DECODED:
        error = decoded(pattern, kv_heads)
        print(f"{error:.1e}  decoded: {pattern}, kv_heads {kv_heads}", flush=True)
        worst = max(worst, error)
    return int(not worst < 2e-2)


if __name__ == "__main__":
    sys.exit(main())
