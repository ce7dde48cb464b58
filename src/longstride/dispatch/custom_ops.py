"""The operators behind the public ops: what autograd, fake tensors and the compiler know of them.

PyTorch's operators take no Python values, so a pattern travels by a name that is looked up again inside. The name is a
plain string, which torch.compile treats as a constant of the graph. So does the backend: what
`longstride.dispatch.choice.both_halves` or `later` says.

There are two doors to one room. An operator's own machinery takes longer than a GPU takes for a short sequence, and in
ordinary eager code nobody looks at it. So `batched`, `stacked` and `packed` use the operator where it is `watched`, and
else call the backend, through a `torch.autograd.Function` where gradients are wanted. Both doors have the same backend,
the same tensors kept and the same derivative. Microseconds of `attention` besides the backend's own, on one core of a
CPU:

    =====================  ========  =======
    call                   operator  without
    =====================  ========  =======
    forward, no gradients        14        6
    forward, gradients           30       12
    forward and backward         68       35
    =====================  ========  =======

22 of the last 35 are those of a `torch.autograd.Function` that does nothing.
"""

from __future__ import annotations

from functools import lru_cache
from typing import Any

import torch

from longstride.backends.layout import empty_as, heads_of, placed
from longstride.backends.request import QKV, Request
from longstride.dispatch.checks import no_autocast, wants_gradients, watched
from longstride.dispatch.choice import BACKENDS, backward_of, forward_of, settled
from longstride.errors import UnsupportedError
from longstride.patterns import Pattern, parse
from longstride.patterns.base import name_of, named


@lru_cache(maxsize=256)
def _pattern(name: str) -> Pattern:
    pattern = named(name)
    return parse(name) if pattern is None else pattern


def operator_name(pattern: Pattern) -> str:
    """What the operator calls the pattern: only its text where compiled code makes the pattern itself."""
    return pattern.name or (name_of(pattern) if pattern.exists else str(pattern))


def _past_the_operator(pattern: Pattern | str, tensors: tuple[torch.Tensor | None, ...]) -> bool:
    """True where a backward may leave the operator out: its forward did, and nobody watches now either.

    tensors: the gradients that come in; what the forward saw was looked at there. Where a derivative of the derivative
    may follow, the operator is what refuses it.
    """
    return not isinstance(pattern, str) and not torch.is_grad_enabled() and not watched(*tensors)


def _text(pattern: Pattern | str) -> str:
    return pattern if isinstance(pattern, str) else operator_name(pattern)


def _lse_dtype(q: torch.Tensor) -> torch.dtype:
    return torch.float64 if q.dtype == torch.float64 else torch.float32


def _refuse_second_derivative(_ctx: Any, *_grads: Any) -> Any:
    raise UnsupportedError("the sparse backends have no second derivatives: pass backend='reference', which has")


# ---- batches ------------------------------------------------------------------------------------------------------


def _settled(told: str, q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, pattern: Pattern) -> str:
    if told in BACKENDS:
        return told
    strides, fixed = (q.stride(), k.stride(), v.stride()), torch.are_deterministic_algorithms_enabled()
    shapes = (q.shape, k.shape, v.shape)
    return settled(told, Request(pattern, *shapes, q.dtype, q.device.type, strides, deterministic=fixed))


def _run_backward(
    grad_out: torch.Tensor,
    grad_lse: torch.Tensor | None,
    q: torch.Tensor,
    k: torch.Tensor,
    v: torch.Tensor,
    out: torch.Tensor,
    lse: torch.Tensor,
    rule: Pattern,
    scale: float,
    told: str,
    into: QKV | None = None,
) -> QKV:
    with no_autocast(q):
        chosen = BACKENDS[backward_of(_settled(told, q, k, v, rule))]
        return chosen.backward(grad_out, grad_lse, q, k, v, out, lse, rule, scale, into)


@torch.library.custom_op("longstride::attention", mutates_args=())
def _attention(
    q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, pattern: str, scale: float, backend: str
) -> tuple[torch.Tensor, torch.Tensor]:
    rule = _pattern(pattern)
    with no_autocast(q):
        chosen = BACKENDS[forward_of(_settled(backend, q, k, v, rule))]
        return chosen.forward(q, k, v, rule, scale)


@_attention.register_fake
def _(q: torch.Tensor, _k: torch.Tensor, v: torch.Tensor, *_settings: Any) -> Any:
    return empty_as(q, v.shape[3]), q.new_empty(q.shape[:3], dtype=_lse_dtype(q))


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
    backend: str,
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    return _run_backward(grad_out, grad_lse, q, k, v, out, lse, _pattern(pattern), scale, backend)


@_attention_backward.register_fake
def _(_grad_out: Any, _grad_lse: Any, q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, *_others: Any) -> Any:
    return empty_as(q), empty_as(k), empty_as(v)


def _save(ctx: Any, inputs: tuple[Any, ...], output: tuple[torch.Tensor, torch.Tensor]) -> None:
    q, k, v, *ctx.settings = inputs
    ctx.save_for_backward(q, k, v, *output)
    ctx.set_materialize_grads(False)


def _differentiate(ctx: Any, grad_out: torch.Tensor | None, grad_lse: torch.Tensor | None) -> tuple[Any, ...]:
    q, k, v, out, lse = ctx.saved_tensors
    if grad_out is None and grad_lse is None:
        return (None,) * 6
    grad_out = torch.zeros_like(out) if grad_out is None else grad_out
    pattern, scale, told = ctx.settings
    known = (grad_out, grad_lse, q, k, v, out, lse)
    if _past_the_operator(pattern, (grad_out, grad_lse)):
        grads = _run_backward(*known, pattern, scale, told)
    else:
        grads = _batched_backward(*known, _text(pattern), scale, told)
    return *grads, None, None, None


_attention.register_autograd(_differentiate, setup_context=_save)
_attention_backward.register_autograd(_refuse_second_derivative)

# Looking an overload up by name at each call would cost as much as the call.
_batched = torch.ops.longstride.attention.default
_batched_backward = torch.ops.longstride.attention_backward.default


class Attention(torch.autograd.Function):
    """The other door.

    `forward` keeps what it needs itself: with a `setup_context` PyTorch inspects its signature at each call, for 17
    microseconds. That is only of use to transforms such as vmap, which go by the operator.
    """

    @staticmethod
    def forward(ctx: Any, *inputs: Any) -> tuple[torch.Tensor, torch.Tensor]:
        *known, told = inputs
        output = BACKENDS[forward_of(told)].forward(*known)
        _save(ctx, inputs, output)
        return output

    @staticmethod
    def backward(ctx: Any, *grads: Any) -> tuple[Any, ...]:
        return _differentiate(ctx, *grads)


def batched(
    q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, pattern: Pattern, scale: float, told: str, wants_lse: bool
) -> tuple[torch.Tensor, torch.Tensor | None]:
    """out and lse, differentiable, of the backend `told`; autocast is off. lse may be None where it is not wanted."""
    if watched(q, k, v):
        return _batched(q, k, v, operator_name(pattern), scale, told)
    if wants_gradients(q, k, v):
        return Attention.apply(q, k, v, pattern, scale, told)
    backend = BACKENDS[forward_of(told)]
    if not wants_lse and (forward_only := getattr(backend, "forward_only", None)) is not None:
        return forward_only(q, k, v, pattern, scale), None
    return backend.forward(q, k, v, pattern, scale)


# ---- q, k and v side by side ----------------------------------------------------------------------------------------
#
# As one projection writes them. Their gradients lie side by side, too, so that its backward pass reads them as they
# are; of three tensors autograd would make one by a copy.

#: Bytes that the backends' kernels take memory given to them to begin at a multiple of.
ALIGNMENT = 16


def _run_stacked_backward(
    grad_out: torch.Tensor,
    stacked: torch.Tensor,
    out: torch.Tensor,
    lse: torch.Tensor,
    heads: int,
    qk_width: int,
    rule: Pattern,
    scale: float,
    told: str,
) -> torch.Tensor:
    grad = torch.empty_like(stacked, memory_format=torch.contiguous_format)
    into = heads_of(grad, heads, qk_width)
    q, k, v = heads_of(stacked, heads, qk_width)
    aligned = all(x.data_ptr() % ALIGNMENT == 0 for x in into)
    grads = _run_backward(grad_out, None, q, k, v, out, lse, rule, scale, told, into if aligned else None)
    placed(grads, (q, k, v), into)
    return grad


@torch.library.custom_op("longstride::attention_stacked", mutates_args=())
def _attention_stacked(
    stacked: torch.Tensor, heads: int, qk_width: int, pattern: str, scale: float, backend: str
) -> tuple[torch.Tensor, torch.Tensor]:
    q, k, v = heads_of(stacked, heads, qk_width)
    rule = _pattern(pattern)
    with no_autocast(q):
        return BACKENDS[forward_of(_settled(backend, q, k, v, rule))].forward(q, k, v, rule, scale)


@_attention_stacked.register_fake
def _(stacked: torch.Tensor, heads: int, qk_width: int, *_settings: Any) -> Any:
    q, _, v = heads_of(stacked, heads, qk_width)
    return empty_as(q, v.shape[3]), q.new_empty(q.shape[:3], dtype=_lse_dtype(q))


@torch.library.custom_op("longstride::attention_stacked_backward", mutates_args=())
def _attention_stacked_backward(
    grad_out: torch.Tensor,
    stacked: torch.Tensor,
    out: torch.Tensor,
    lse: torch.Tensor,
    heads: int,
    qk_width: int,
    pattern: str,
    scale: float,
    backend: str,
) -> torch.Tensor:
    return _run_stacked_backward(grad_out, stacked, out, lse, heads, qk_width, _pattern(pattern), scale, backend)


@_attention_stacked_backward.register_fake
def _(_grad_out: Any, stacked: torch.Tensor, *_others: Any) -> Any:
    return torch.empty_like(stacked, memory_format=torch.contiguous_format)


def _save_stacked(ctx: Any, inputs: tuple[Any, ...], output: tuple[torch.Tensor, torch.Tensor]) -> None:
    stacked, *ctx.settings = inputs
    ctx.save_for_backward(stacked, *output)
    ctx.mark_non_differentiable(output[1])
    ctx.set_materialize_grads(False)


def _differentiate_stacked(ctx: Any, grad_out: torch.Tensor | None, _grad_lse: Any) -> tuple[Any, ...]:
    if grad_out is None:
        return (None,) * 6
    heads, qk_width, pattern, scale, told = ctx.settings
    known = (grad_out, *ctx.saved_tensors, heads, qk_width)
    if _past_the_operator(pattern, (grad_out,)):
        grad = _run_stacked_backward(*known, pattern, scale, told)
    else:
        grad = _stacked_backward(*known, _text(pattern), scale, told)
    return grad, None, None, None, None, None


_attention_stacked.register_autograd(_differentiate_stacked, setup_context=_save_stacked)
_attention_stacked_backward.register_autograd(_refuse_second_derivative)

_stacked = torch.ops.longstride.attention_stacked.default
_stacked_backward = torch.ops.longstride.attention_stacked_backward.default


class AttentionStacked(torch.autograd.Function):
    """The other door, as `Attention` is."""

    @staticmethod
    def forward(ctx: Any, *inputs: Any) -> tuple[torch.Tensor, torch.Tensor]:
        stacked, heads, qk_width, pattern, scale, told = inputs
        output = BACKENDS[forward_of(told)].forward(*heads_of(stacked, heads, qk_width), pattern, scale)
        _save_stacked(ctx, inputs, output)
        return output

    @staticmethod
    def backward(ctx: Any, *grads: Any) -> tuple[Any, ...]:
        return _differentiate_stacked(ctx, *grads)


def stacked(
    together: torch.Tensor, heads: int, qk_width: int, pattern: Pattern, scale: float, told: str
) -> torch.Tensor:
    """out, differentiable, of the backend `told`; autocast is off."""
    if watched(together):
        return _stacked(together, heads, qk_width, operator_name(pattern), scale, told)[0]
    return AttentionStacked.apply(together, heads, qk_width, pattern, scale, told)[0]


# ---- packed documents ---------------------------------------------------------------------------------------------


def varlen_request(
    pattern: Pattern,
    shapes: tuple[tuple[int, ...], ...],
    max_seqlen: int,
    dtype: torch.dtype,
    device_type: str,
    through_lse: bool = False,
) -> Request:
    """Packed documents as a request: `shapes` are those of q, k and v without the tokens."""
    q, k, v = ((1, heads, max_seqlen, dim) for heads, dim in shapes)
    return Request(pattern, q, k, v, dtype, device_type, through_lse=through_lse, varlen=True)


def _varlen_backend(told: str, q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, longest: int, rule: Pattern) -> Any:
    if told in BACKENDS:
        return BACKENDS[told]
    shapes = (q.shape[1:], k.shape[1:], v.shape[1:])
    return BACKENDS[settled(told, varlen_request(rule, shapes, longest, q.dtype, q.device.type))]


def _run_varlen_backward(
    grad_out: torch.Tensor,
    grad_lse: torch.Tensor | None,
    q: torch.Tensor,
    k: torch.Tensor,
    v: torch.Tensor,
    out: torch.Tensor,
    lse: torch.Tensor,
    cu_seqlens: torch.Tensor,
    max_seqlen: int,
    rule: Pattern,
    scale: float,
    told: str,
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    with no_autocast(q):
        chosen = _varlen_backend(told, q, k, v, max_seqlen, rule)
        return chosen.backward_varlen(grad_out, grad_lse, q, k, v, out, lse, cu_seqlens, max_seqlen, rule, scale)


@torch.library.custom_op("longstride::attention_varlen", mutates_args=())
def _attention_varlen(
    q: torch.Tensor,
    k: torch.Tensor,
    v: torch.Tensor,
    cu_seqlens: torch.Tensor,
    max_seqlen: int,
    pattern: str,
    scale: float,
    backend: str,
) -> tuple[torch.Tensor, torch.Tensor]:
    rule = _pattern(pattern)
    with no_autocast(q):
        chosen = _varlen_backend(backend, q, k, v, max_seqlen, rule)
        return chosen.forward_varlen(q, k, v, cu_seqlens, max_seqlen, rule, scale)


@_attention_varlen.register_fake
def _(q: torch.Tensor, _k: torch.Tensor, v: torch.Tensor, *_settings: Any) -> Any:
    return q.new_empty(*q.shape[:2], v.shape[2]), q.new_empty(q.shape[:2], dtype=_lse_dtype(q))


@torch.library.custom_op("longstride::attention_varlen_backward", mutates_args=())
def _attention_varlen_backward(
    grad_out: torch.Tensor,
    grad_lse: torch.Tensor | None,
    q: torch.Tensor,
    k: torch.Tensor,
    v: torch.Tensor,
    out: torch.Tensor,
    lse: torch.Tensor,
    cu_seqlens: torch.Tensor,
    max_seqlen: int,
    pattern: str,
    scale: float,
    backend: str,
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    known = (grad_out, grad_lse, q, k, v, out, lse, cu_seqlens, max_seqlen)
    return _run_varlen_backward(*known, _pattern(pattern), scale, backend)


@_attention_varlen_backward.register_fake
def _(_grad_out: Any, _grad_lse: Any, q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, *_others: Any) -> Any:
    return q.new_empty(q.shape), k.new_empty(k.shape), v.new_empty(v.shape)


def _save_varlen(ctx: Any, inputs: tuple[Any, ...], output: tuple[torch.Tensor, torch.Tensor]) -> None:
    q, k, v, cu_seqlens, *ctx.settings = inputs
    ctx.save_for_backward(q, k, v, *output, cu_seqlens)
    ctx.set_materialize_grads(False)


def _differentiate_varlen(ctx: Any, grad_out: torch.Tensor | None, grad_lse: torch.Tensor | None) -> tuple[Any, ...]:
    q, k, v, out, lse, cu_seqlens = ctx.saved_tensors
    if grad_out is None and grad_lse is None:
        return (None,) * 8
    grad_out = torch.zeros_like(out) if grad_out is None else grad_out
    max_seqlen, pattern, scale, told = ctx.settings
    known = (grad_out, grad_lse, q, k, v, out, lse, cu_seqlens)
    if _past_the_operator(pattern, (grad_out, grad_lse)):
        grads = _run_varlen_backward(*known, max_seqlen, pattern, scale, told)
    else:
        grads = _packed_backward(*known, max_seqlen, _text(pattern), scale, told)
    return *grads, None, None, None, None, None


_attention_varlen.register_autograd(_differentiate_varlen, setup_context=_save_varlen)
_attention_varlen_backward.register_autograd(_refuse_second_derivative)

_packed = torch.ops.longstride.attention_varlen.default
_packed_backward = torch.ops.longstride.attention_varlen_backward.default


class AttentionVarlen(torch.autograd.Function):
    """The other door, as `Attention` is."""

    @staticmethod
    def forward(ctx: Any, *inputs: Any) -> tuple[torch.Tensor, torch.Tensor]:
        *known, told = inputs
        output = BACKENDS[told].forward_varlen(*known)
        _save_varlen(ctx, inputs, output)
        return output

    @staticmethod
    def backward(ctx: Any, *grads: Any) -> tuple[Any, ...]:
        return _differentiate_varlen(ctx, *grads)


def packed(
    q: torch.Tensor,
    k: torch.Tensor,
    v: torch.Tensor,
    cu_seqlens: torch.Tensor,
    max_seqlen: int,
    pattern: Pattern,
    scale: float,
    told: str,
) -> tuple[torch.Tensor, torch.Tensor]:
    """out and lse, differentiable, of the backend `told`; autocast is off."""
    if watched(q, k, v, cu_seqlens):
        return _packed(q, k, v, cu_seqlens, max_seqlen, operator_name(pattern), scale, told)
    if wants_gradients(q, k, v):
        return AttentionVarlen.apply(q, k, v, cu_seqlens, max_seqlen, pattern, scale, told)
    return BACKENDS[told].forward_varlen(q, k, v, cu_seqlens, max_seqlen, pattern, scale)
