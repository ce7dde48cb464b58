"""The one public op: validate, choose a backend, run; and `explain`, which says what it would do."""

from __future__ import annotations

import math
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass
from functools import lru_cache
from typing import Any, Literal, overload

import torch
from torch.autograd import forward_ad

from longstride.backends import reference
from longstride.backends import torch as torch_backend
from longstride.backends.request import Request
from longstride.errors import ArgumentError, UnsupportedError
from longstride.patterns import Pattern, parse
from longstride.patterns.base import name_of, named
from longstride.plan import plan

#: The backends, the one to prefer first. `reference` is for checking: it is never chosen, only named.
BACKENDS: dict[str, Any] = {"torch": torch_backend, "reference": reference}


@overload
def attention(
    q: torch.Tensor,
    k: torch.Tensor,
    v: torch.Tensor,
    pattern: Pattern,
    *,
    scale: float | None = ...,
    backend: str | None = ...,
    return_lse: Literal[False] = ...,
) -> torch.Tensor: ...
@overload
def attention(
    q: torch.Tensor,
    k: torch.Tensor,
    v: torch.Tensor,
    pattern: Pattern,
    *,
    scale: float | None = ...,
    backend: str | None = ...,
    return_lse: Literal[True],
) -> tuple[torch.Tensor, torch.Tensor]: ...
def attention(
    q: torch.Tensor,
    k: torch.Tensor,
    v: torch.Tensor,
    pattern: Pattern,
    *,
    scale: float | None = None,
    backend: str | None = None,
    return_lse: bool = False,
) -> torch.Tensor | tuple[torch.Tensor, torch.Tensor]:
    """``softmax(q k^T * scale + log(pattern)) v``: exact attention over the pairs that `pattern` allows.

    >>> import torch, longstride as ls
    >>> q, k, v = (torch.randn(1, 2, 100, 16) for _ in range(3))
    >>> ls.attention(q, k, v, ls.Local(8) | ls.Strided(8)).shape
    torch.Size([1, 2, 100, 16])

    Args:
        q: [batch, heads, q_len, head_dim], float16, bfloat16, float32 or float64, any strides. The queries are the
            last q_len of the kv_len positions.
        k: [batch, kv_heads, kv_len, head_dim]; heads is a multiple of kv_heads, and query head h reads key head
            h * kv_heads // heads (grouped-query attention).
        v: [batch, kv_heads, kv_len, v_head_dim].
        pattern: which pairs may attend.
        scale: factor of the scores; 1 / sqrt(head_dim) when not given.
        backend: ``"torch"`` or ``"reference"``; the fastest that takes the request when not given. A backend that is
            named is used or refused, never replaced.
        return_lse: also return the natural log of the sum of exponentials.

    Returns:
        out [batch, heads, q_len, v_head_dim] in q's dtype; with `return_lse` also lse [batch, heads, q_len] in float32
        (float64 for float64), differentiable. A query with no allowed key gets output 0, lse -inf, zero gradients.

    Raises:
        ArgumentError: shapes, dtypes or devices that do not fit together.
        UnsupportedError: no backend, or not the named one, takes the request.
    """
    if _autocast_on(q):
        q, k, v = _autocast(q, k, v)
        with _no_autocast(q):
            return attention(q, k, v, pattern, scale=scale, backend=backend, return_lse=return_lse)
    _check(q, k, v, pattern, scale)
    request = Request(pattern, tuple(q.shape), tuple(k.shape), tuple(v.shape), q.dtype, q.device.type)
    chosen = _choose(request, backend)
    scale = 1.0 / math.sqrt(q.shape[-1]) if scale is None else float(scale)
    if chosen != "reference" and _has_tangent(q, k, v):
        raise UnsupportedError(
            f"the {chosen} backend has no forward-mode derivatives: pass backend='reference', which has"
        )
    if chosen == "reference":
        out, lse = reference.forward(q, k, v, pattern, scale)
    else:
        # Inside compiled code that makes the pattern itself, only its text is there.
        name = pattern.name or (name_of(pattern) if pattern.exists else str(pattern))
        out, lse = torch.ops.longstride.attention(q, k, v, name, scale)
    return (out, lse) if return_lse else out


# ---- validation ---------------------------------------------------------------------------------------------------


def _has_tangent(*tensors: torch.Tensor) -> bool:
    """True under forward-mode differentiation, which would find no formula and silently give zeros."""
    if getattr(forward_ad, "_current_level", -1) < 0:
        return False
    return any(forward_ad.unpack_dual(x).tangent is not None for x in tensors)


def _autocast_on(q: torch.Tensor) -> bool:
    if not isinstance(q, torch.Tensor):
        return False
    return q.device.type != "meta" and torch.is_autocast_enabled(q.device.type)


def _no_autocast(q: torch.Tensor) -> AbstractContextManager:
    """Softmax and sums stay in float32: nothing inside is cast again. A backward may run under autocast as well."""
    return torch.autocast(q.device.type, enabled=False) if _autocast_on(q) else nullcontext()


def _autocast(*tensors: torch.Tensor) -> list[torch.Tensor]:
    """Inputs in autocast's dtype, as for `scaled_dot_product_attention`; float64 stays."""
    dtype = torch.get_autocast_dtype(tensors[0].device.type)
    narrow = (torch.float16, torch.bfloat16, torch.float32)
    return [x.to(dtype) if isinstance(x, torch.Tensor) and x.dtype in narrow else x for x in tensors]


def _check(q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, pattern: Pattern, scale: float | None) -> None:
    for name, x in (("q", q), ("k", k), ("v", v)):
        if not isinstance(x, torch.Tensor):
            raise ArgumentError(f"{name} is {type(x).__name__}: it must be a tensor [batch, heads, length, dim]")
        if x.dim() != 4:
            raise ArgumentError(f"{name} has shape {list(x.shape)}: it must have 4 dims, [batch, heads, length, dim]")
        if x.dtype != q.dtype:
            raise ArgumentError(f"{name} is {x.dtype}, q is {q.dtype}: q, k and v must have one dtype; convert them")
        if x.device != q.device:
            raise ArgumentError(
                f"{name} is on {x.device}, q on {q.device}: q, k and v must be on one device; move them"
            )
        if 0 in x.shape:
            raise ArgumentError(f"{name} has shape {list(x.shape)}: every dim must be at least 1")
    if not isinstance(pattern, Pattern):
        raise ArgumentError(f"pattern is {pattern!r}: it must be a Pattern; longstride.parse(text) makes one of a text")
    if type(pattern).__hash__ is None:
        raise ArgumentError(f"pattern {pattern}: a pattern is a fixed value: declare it @dataclass(frozen=True)")
    shapes = f"q {list(q.shape)}, k {list(k.shape)}, v {list(v.shape)}"
    if not q.shape[0] == k.shape[0] == v.shape[0]:
        raise ArgumentError(f"{shapes}: q, k and v must have one batch size")
    if q.shape[3] != k.shape[3]:
        raise ArgumentError(f"{shapes}: q and k must have one head_dim")
    if k.shape[1:3] != v.shape[1:3]:
        raise ArgumentError(f"{shapes}: k and v must have the same kv_heads and kv_len")
    if q.shape[1] % k.shape[1]:
        raise ArgumentError(f"{shapes}: {q.shape[1]} heads must be a multiple of {k.shape[1]} kv_heads")
    if q.shape[2] > k.shape[2]:
        raise ArgumentError(f"{shapes}: the queries are the last q_len positions, so q_len must be at most kv_len")
    if scale is not None and (isinstance(scale, bool) or not isinstance(scale, int | float)):
        raise ArgumentError(f"scale={scale!r}: it must be a number, or None for 1 / sqrt(head_dim)")
    if scale is not None and not math.isfinite(scale):
        raise ArgumentError(f"scale={scale}: it must be finite")


def _choose(request: Request, backend: str | None) -> str:
    if backend is not None:
        if not isinstance(backend, str) or backend not in BACKENDS:
            raise ArgumentError(f"backend={backend!r}: known backends are {', '.join(map(repr, BACKENDS))}")
        if refusals := BACKENDS[backend].refusals(request):
            raise UnsupportedError(_refusal_text(request, f"backend {backend!r} was asked for, but {refusals[0]}"))
        return backend
    for name in BACKENDS:
        if name != "reference" and not BACKENDS[name].refusals(request):
            return name
    raise UnsupportedError(_refusal_text(request, "no backend takes the request"))


def _refusal_text(request: Request, what: str) -> str:
    lines = [f"{what}; all backends:"]
    for name, module in BACKENDS.items():
        refusals = module.refusals(request)
        lines.append(f"  {name}: {'; '.join(refusals) if refusals else 'takes it: pass backend=' + repr(name)}")
    return "\n".join(lines)


# ---- the operator -------------------------------------------------------------------------------------------------
# PyTorch's operators take no Python values, so a pattern travels by a name that is looked up again inside. The name is
# a plain string, which torch.compile treats as a constant of the graph.


@lru_cache(maxsize=256)
def _pattern(name: str) -> Pattern:
    pattern = named(name)
    return parse(name) if pattern is None else pattern


@torch.library.custom_op("longstride::attention", mutates_args=())
def _attention(
    q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, pattern: str, scale: float
) -> tuple[torch.Tensor, torch.Tensor]:
    with _no_autocast(q):
        return torch_backend.forward(q, k, v, _pattern(pattern), scale)


@_attention.register_fake
def _(q: torch.Tensor, _k: torch.Tensor, v: torch.Tensor, *_settings: Any) -> Any:
    lse = torch.float64 if q.dtype == torch.float64 else torch.float32
    return q.new_empty(*q.shape[:3], v.shape[3]), q.new_empty(q.shape[:3], dtype=lse)


@torch.library.custom_op("longstride::attention_backward", mutates_args=())
def _attention_backward(
    grad_out: torch.Tensor,
    grad_lse: torch.Tensor | None,
    q: torch.Tensor,
    k: torch.Tensor,
    v: torch.Tensor,
    out: torch.Tensor,
    lse: torch.Tensor,
    pattern: str,
    scale: float,
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    with _no_autocast(q):
        return torch_backend.backward(grad_out, grad_lse, q, k, v, out, lse, _pattern(pattern), scale)


@_attention_backward.register_fake
def _(_grad_out: Any, _grad_lse: Any, q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, *_others: Any) -> Any:
    return q.new_empty(q.shape), k.new_empty(k.shape), v.new_empty(v.shape)


def _save(ctx: Any, inputs: tuple[Any, ...], output: tuple[torch.Tensor, torch.Tensor]) -> None:
    q, k, v, ctx.pattern, ctx.scale = inputs
    ctx.save_for_backward(q, k, v, *output)
    ctx.set_materialize_grads(False)


def _differentiate(ctx: Any, grad_out: torch.Tensor | None, grad_lse: torch.Tensor | None) -> tuple[Any, ...]:
    q, k, v, out, lse = ctx.saved_tensors
    if grad_out is None and grad_lse is None:
        return None, None, None, None, None
    grad_out = torch.zeros_like(out) if grad_out is None else grad_out
    grads = torch.ops.longstride.attention_backward(grad_out, grad_lse, q, k, v, out, lse, ctx.pattern, ctx.scale)
    return *grads, None, None


_attention.register_autograd(_differentiate, setup_context=_save)


def _refuse_second_derivative(_ctx: Any, *_grads: Any) -> Any:
    raise UnsupportedError("the torch backend has no second derivatives: pass backend='reference', which has")


_attention_backward.register_autograd(_refuse_second_derivative)


# ---- explain ------------------------------------------------------------------------------------------------------


@dataclass(frozen=True, repr=False)
class Explanation:
    """What `attention` would do with a request: `backend` chosen, `reasons` against each other one, and the text."""

    backend: str | None
    reasons: dict[str, str]
    text: str

    def __str__(self) -> str:
        return self.text

    def __repr__(self) -> str:
        return f"<Explanation: backend {self.backend}>"


def describe(request: Request, backend: str | None = None) -> Explanation:
    """The plan, the backend that would run it, and of every other why not."""
    made = plan(request.pattern, request.q_len, request.kv_len, request.num_heads)
    dense = request.num_heads * request.q_len * request.kv_len
    lines = [
        f"{request.pattern}: {request.q_len:,} queries, {request.kv_len:,} keys, {request.num_heads} heads",
        f"  {made.pairs:,} of {dense:,} pairs allowed ({made.pairs / dense:.3%})",
    ]
    for heads, parts in made.groups:
        lines.append(f"  heads {_ranges(heads)}:" if len(made.groups) > 1 else "  parts, which share no pair:")
        lines += [f"    {part}: {part.pairs(request.q_len, request.kv_len):,} pairs" for part in parts]
    try:
        chosen: str | None = _choose(request, backend)
    except UnsupportedError:
        chosen = None
    reasons = {}
    for name, module in BACKENDS.items():
        refusals = module.refusals(request)
        if name == chosen:
            why = "it was asked for" if backend else "the fastest that takes the request"
            lines.append(f"  backend {name}: chosen ({why}): {module.describe(request)}")
            continue
        if refusals:
            reasons[name] = "; ".join(refusals)
        elif name == "reference":
            reasons[name] = f"only used when named: {module.describe(request)}"
        else:
            reasons[name] = f"backend {backend!r} was asked for" if backend else f"{chosen} is faster here"
        lines.append(f"  backend {name}: not chosen: {reasons[name]}")
    return Explanation(chosen, reasons, "\n".join(lines))


def explain(
    q: torch.Tensor,
    k: torch.Tensor,
    v: torch.Tensor,
    pattern: Pattern,
    *,
    scale: float | None = None,
    backend: str | None = None,
    return_lse: bool = False,  # noqa: ARG001 - the same call as `attention`, whatever it returns
) -> Explanation:
    """Print what `attention` would do with these arguments, and return it.

    Tensors on the meta device do: only shapes, dtypes and devices are looked at.

    Returns:
        An `Explanation`; ``str()`` of it is what was printed.
    """
    if _autocast_on(q):
        q, k, v = _autocast(q, k, v)
    _check(q, k, v, pattern, scale)
    request = Request(pattern, tuple(q.shape), tuple(k.shape), tuple(v.shape), q.dtype, q.device.type)
    explanation = describe(request, backend)
    print(explanation)
    return explanation


def _ranges(heads: tuple[int, ...]) -> str:
    """(0, 1, 2, 5) as ``0-2, 5``."""
    runs: list[list[int]] = []
    for head in heads:
        if runs and head == runs[-1][-1] + 1:
            runs[-1].append(head)
        else:
            runs.append([head])
    return ", ".join(str(run[0]) if len(run) == 1 else f"{run[0]}-{run[-1]}" for run in runs)
