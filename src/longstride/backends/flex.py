"""The `flex` backend: PyTorch's FlexAttention, which compiles any rule that can be traced into its kernels.

It is for patterns of the user's own on CUDA devices: the rule runs inside the kernel, and blocks of pairs that have
none are skipped.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from functools import lru_cache
from typing import Any

import torch
from torch.nn.functional import pad

from longstride.backends.recorded import kept
from longstride.backends.request import Request
from longstride.errors import UnsupportedError
from longstride.patterns import Pattern
from longstride.patterns.regions import Rule
from longstride.plan import plan

name = "flex"
differentiable = True
takes_lse_gradient = True

#: Queries and keys of a block that is skipped, masked or taken whole.
BLOCK = 128

#: Pairs on which the rule is evaluated once, to find the blocks; more would take minutes.
MOST_PAIRS = 2**36

#: Pairs whose rule is evaluated at once.
SLAB = 2**26

DTYPES = (torch.float16, torch.bfloat16, torch.float32)


def refusals(request: Request) -> list[str]:
    if request.device_type != "cuda":
        return [f"FlexAttention has a backward on CUDA devices alone, and the tensors are on {request.device_type}"]
    found = []
    if request.dtype not in DTYPES:
        found.append(f"dtype {request.dtype} is none of float16, bfloat16, float32")
    for what, dim in (("head_dim", request.head_dim), ("v_head_dim", request.v_head_dim)):
        if not 16 <= dim <= 256:
            found.append(f"{what} {dim} is not between 16 and 256")
    if request.q_len * request.kv_len > MOST_PAIRS:
        found.append(
            f"finding the blocks would evaluate the rule on {request.q_len * request.kv_len:,} pairs, more than the "
            f"{MOST_PAIRS:,} that it does"
        )
    return found


def prefers(request: Request) -> str | None:
    """Rules of the user's own, which no kernel written beforehand can call."""
    parts = plan(request.pattern, request.q_len, request.kv_len, request.num_heads).parts
    terms = [term for part in parts for term in (part.term, *part.minus)]
    rules = sorted({str(rule.pattern) for term in terms for rule in term.find(Rule)})
    return f"the rule of {', '.join(rules)} is the user's own, and is compiled into its kernel" if rules else None


def describe(request: Request) -> str:
    cost = request.q_len * request.kv_len
    return (
        f"FlexAttention, compiled for this pattern and these shapes at the first call, over blocks of {BLOCK} x "
        f"{BLOCK}, which are found by evaluating the rule on all {cost:,} pairs once a length"
    )


def forward(
    q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, pattern: Pattern, scale: float
) -> tuple[torch.Tensor, torch.Tensor]:
    """Attention and its natural log-sum-exp, differentiable by autograd; shapes as in `longstride.attention`.

    Raises:
        UnsupportedError: the pattern's `allows` cannot be traced.
    """
    from torch._dynamo.exc import TorchDynamoException

    # Made first: compiled code would trace the making of it.
    mask = kept(block_mask(pattern, q.shape[2], k.shape[2], q.shape[1], q.device), q.device)
    attend = _compiled(pattern, (q.shape, k.shape, v.shape), q.dtype, q.device, scale)
    try:
        out, aux = attend(q, k, v, mask)
    except TorchDynamoException as error:
        cause = str(error).strip().splitlines()[0]
        raise UnsupportedError(
            f"backend 'flex' could not compile {pattern}: {cause}; write `allows` in tensor operations alone, or pass "
            f"backend='torch'"
        ) from error
    return out, aux.lse


@lru_cache(maxsize=256)
def _compiled(
    pattern: Pattern,  # noqa: ARG001 - a function of its own for every kind of call
    shapes: tuple[tuple[int, ...], ...],
    dtype: torch.dtype,
    device: torch.device,  # noqa: ARG001
    scale: float,
) -> Callable:
    from torch.nn.attention.flex_attention import AuxRequest, flex_attention

    shared = shapes[0][1] != shapes[1][1]
    # For few queries PyTorch takes another kernel, which has no tiles that fit float32 with shared keys.
    options: Any = {"FORCE_USE_FLEX_ATTENTION": True} if dtype == torch.float32 else None

    def attend(q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, mask: Any) -> Any:
        return flex_attention(
            q,
            k,
            v,
            block_mask=mask,
            scale=scale,
            enable_gqa=shared,
            kernel_options=options,
            return_aux=AuxRequest(lse=True),
        )

    # PyTorch counts recompilations by code object, and gives up after eight: with code of its own, no kind of call
    # uses up the count of another.
    attend.__code__ = attend.__code__.replace(co_name=f"attend_{id(attend)}")
    return torch.compile(attend, dynamic=False, fullgraph=True)


# ---- the mask -----------------------------------------------------------------------------------------------------


def mask_mod(pattern: Pattern, q_len: int, kv_len: int, heads: int) -> Callable:
    """The pattern as FlexAttention wants it: a rule for (batch, head, query row, key)."""
    rules = _rules(pattern, kv_len, heads)
    before = kv_len - q_len

    def allowed(_batch: torch.Tensor, head: torch.Tensor, row: torch.Tensor, key: torch.Tensor) -> torch.Tensor:
        (_, first), *others = rules
        found = first.allows(row + before, key)
        for runs, rule in others:
            for low, high in runs:
                found = torch.where((head >= low) & (head < high), rule.allows(row + before, key), found)
        return found

    return allowed


@lru_cache(maxsize=64)
def block_mask(pattern: Pattern, q_len: int, kv_len: int, heads: int, device: torch.device) -> Any:
    """The pattern as a FlexAttention `BlockMask`, [1, heads or 1, q_len, kv_len].

    `create_block_mask` would hold the whole mask, and integers of its size besides; here runs of rows pass by, so that
    memory follows the blocks.
    """
    from torch.nn.attention.flex_attention import BlockMask

    rules = _rules(pattern, kv_len, heads)
    counts = [torch.cat(list(_pairs_of_blocks(rule, q_len, kv_len, device))) for _, rule in rules]
    if len(rules) > 1:
        rule_of = {head: n for n, (runs, _) in enumerate(rules) for low, high in runs for head in range(low, high)}
        counts = [counts[rule_of[head]] for head in range(heads)]
    pairs = torch.stack(counts)[None]  # [1, heads or 1, query blocks, key blocks]
    whole = pairs == BLOCK * BLOCK
    return BlockMask.from_kv_blocks(
        *_listed((pairs > 0) & ~whole),
        *_listed(whole),
        BLOCK_SIZE=BLOCK,
        mask_mod=mask_mod(pattern, q_len, kv_len, heads),
        seq_lengths=(q_len, kv_len),
    )


def _rules(pattern: Pattern, kv_len: int, heads: int) -> list[tuple[list[tuple[int, int]], Pattern]]:
    """Each rule with the runs of heads [low, high) that follow it."""
    found: dict[Pattern, list[tuple[int, int]]] = {}
    for head, rule in enumerate(pattern.split_heads(heads)):
        runs = found.setdefault(rule.bind(kv_len), [])
        if runs and runs[-1][1] == head:
            runs[-1] = (runs[-1][0], head + 1)
        else:
            runs.append((head, head + 1))
    return [(runs, rule) for rule, runs in found.items()]


def _pairs_of_blocks(rule: Pattern, q_len: int, kv_len: int, device: torch.device) -> Iterator[torch.Tensor]:
    """int64 [some query blocks, key blocks]: the pairs of each block, run of rows after run of rows."""
    key = torch.arange(kv_len, device=device)
    step = BLOCK * max(1, SLAB // (BLOCK * kv_len))
    for low in range(0, q_len, step):
        row = torch.arange(low, min(low + step, q_len), device=device)
        allowed = rule.allows(row[:, None] + (kv_len - q_len), key).expand(len(row), kv_len)
        allowed = pad(allowed, (0, -kv_len % BLOCK, 0, -len(row) % BLOCK))
        yield allowed.unflatten(1, (-1, BLOCK)).unflatten(0, (-1, BLOCK)).sum((1, 3))


def _listed(blocks: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """How many key blocks each query block has, int32, and their numbers before those of the others, int32."""
    count = blocks.sum(-1, dtype=torch.int32)
    numbers = blocks.to(torch.int8).argsort(dim=-1, descending=True, stable=True).to(torch.int32)
    return count, numbers
