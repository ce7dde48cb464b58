"""``longstride plan``: what a pattern costs at given lengths, and what would compute it."""

import math
from typing import Annotated

import typer

from longstride.errors import ArgumentError

# Products of two vectors of the head's width for each pair, a multiplication and an addition an element: forward q k
# and p v; backward q k again, do v, and those for dq, dk, dv.
FORWARD_PRODUCTS, BACKWARD_PRODUCTS = 2, 5
DTYPES = {"fp16": "float16", "bf16": "bfloat16", "fp32": "float32", "fp64": "float64"}
PREFIXES = ("", "k", "M", "G", "T", "P", "E")
DEVICES = ("cpu", "cuda", "mps")


def plan(
    pattern: Annotated[str, typer.Argument(help="A pattern such as 'Local(128) | Strided(128)'.")],
    length: Annotated[int, typer.Option(help="Number of queries, the last positions of the sequence.")] = 4096,
    kv_length: Annotated[int | None, typer.Option(help="Number of keys, if there are more than queries.")] = None,
    heads: Annotated[int, typer.Option(help="Query heads.")] = 8,
    kv_heads: Annotated[int | None, typer.Option(help="Key and value heads, if fewer than query heads.")] = None,
    head_dim: Annotated[int, typer.Option(help="Width of a head.")] = 64,
    batch: Annotated[int, typer.Option(help="Sequences at once.")] = 1,
    dtype: Annotated[str, typer.Option(help="fp16, bf16, fp32 or fp64.")] = "fp32",
    device: Annotated[str, typer.Option(help="cpu, cuda or mps; it need not be in this machine.")] = "cpu",
    backend: Annotated[str | None, typer.Option(help="Ask for this backend instead of the fastest.")] = None,
) -> None:
    """Say what a pattern costs, without computing any attention.

    The disjoint parts that it is computed in, the pairs beside those of dense attention, the arithmetic, the memory of
    the tensors, and the backend that would run it, with the reason.
    """
    import torch

    from longstride.attention import BACKENDS, describe
    from longstride.backends.request import Request
    from longstride.patterns import Causal, Full, parse
    from longstride.plan import plan as make_plan

    counts = {"length": length, "heads": heads, "head-dim": head_dim, "batch": batch}
    counts |= {name: n for name, n in (("kv-length", kv_length), ("kv-heads", kv_heads)) if n is not None}
    for name, count in counts.items():
        if count < 1:
            raise ArgumentError(f"--{name} {count}: it must be at least 1")
    kv_length = length if kv_length is None else kv_length
    kv_heads = heads if kv_heads is None else kv_heads
    if kv_length < length:
        raise ArgumentError(f"--kv-length {kv_length}: there must be at least as many keys as queries, {length}")
    if heads % kv_heads:
        raise ArgumentError(f"--kv-heads {kv_heads}: they must divide the {heads} query heads")
    for name, value, allowed in (("dtype", dtype, DTYPES), ("device", device, DEVICES), ("backend", backend, BACKENDS)):
        if value is not None and value not in allowed:
            raise ArgumentError(f"--{name} {value}: it must be one of {', '.join(allowed)}")

    q_shape, k_shape = (batch, heads, length, head_dim), (batch, kv_heads, kv_length, head_dim)
    request = Request(parse(pattern), q_shape, k_shape, k_shape, getattr(torch, DTYPES[dtype]), device)
    typer.echo(describe(request, backend))

    made = make_plan(request.pattern, length, kv_length, heads)
    dense = heads * (Causal() if request.pattern.is_causal else Full()).pairs(length, kv_length)
    tensor_bytes = 2 * (math.prod(q_shape) + math.prod(k_shape)) * request.dtype.itemsize
    flops = 2 * head_dim * batch
    fewer = f"{dense / made.pairs:,.1f} times fewer" if 0 < made.pairs < dense else ""
    rows = [
        ("", "pattern", "dense causal" if request.pattern.is_causal else "dense", ""),
        ("pairs, all heads", f"{made.pairs:,}", f"{dense:,}", fewer),
    ]
    for direction, products in (("forward", FORWARD_PRODUCTS), ("backward", BACKWARD_PRODUCTS)):
        cost, dense_cost = (_in_units(products * flops * pairs, "FLOP") for pairs in (made.pairs, dense))
        rows.append((direction, cost, dense_cost, ""))
    size = _in_units(tensor_bytes, "B")
    rows.append(("q, k, v and o", size, size, f"in {dtype}"))
    typer.echo()
    for name, sparse_value, dense_value, note in rows:
        typer.echo(f"  {name:<16} {sparse_value:>18} {dense_value:>22}   {note}".rstrip())


def _in_units(amount: int, unit: str) -> str:
    """``1_234_000`` FLOP as ``1.23 MFLOP``."""
    power = min(max(len(str(amount)) - 1, 0) // 3, len(PREFIXES) - 1)
    return f"{amount / 1000**power:,.{0 if power == 0 else 2}f} {PREFIXES[power]}{unit}"
