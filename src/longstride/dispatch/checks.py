"""What must hold of the arguments, whatever the backend; who is watching; autocast; forward-mode derivatives."""

from __future__ import annotations

import math
from contextlib import AbstractContextManager, nullcontext
from typing import Any

import torch
from torch.autograd import forward_ad

from longstride.backends.request import Request
from longstride.errors import ArgumentError, UnsupportedError
from longstride.patterns import Pattern

#: The dims of q, k and v in each of the two ops.
BATCHED = "batch, heads, length, dim"
PACKED = "tokens, heads, dim"


def check_types(q: Any, k: Any, v: Any, pattern: Any, scale: Any, dims: str = BATCHED) -> None:
    """Tensors, a pattern, and a scale that is a finite number or None."""
    if not (isinstance(q, torch.Tensor) and isinstance(k, torch.Tensor) and isinstance(v, torch.Tensor)):
        name, x = next((name, x) for name, x in (("q", q), ("k", k), ("v", v)) if not isinstance(x, torch.Tensor))
        raise ArgumentError(f"{name} is {type(x).__name__}: it must be a tensor [{dims}]")
    if not isinstance(pattern, Pattern):
        raise ArgumentError(f"pattern is {pattern!r}: it must be a Pattern; longstride.parse(text) makes one of a text")
    if type(pattern).__hash__ is None:
        raise ArgumentError(f"pattern {pattern}: a pattern is a fixed value: declare it @dataclass(frozen=True)")
    if scale is not None:
        if isinstance(scale, bool) or not isinstance(scale, int | float):
            raise ArgumentError(f"scale={scale!r}: it must be a number, or None for 1 / sqrt(head_dim)")
        if not math.isfinite(scale):
            raise ArgumentError(f"scale={scale}: it must be finite")


def check_tensors(
    shapes: tuple[tuple[int, ...], ...],
    dtypes: tuple[torch.dtype, ...],
    devices: tuple[torch.device, ...],
    dims: str = BATCHED,
) -> None:
    """The shapes, dtypes and devices of q, k and v fit together."""
    count = len(dims.split())
    for name, shape, dtype, device in zip("qkv", shapes, dtypes, devices, strict=True):
        if len(shape) != count:
            raise ArgumentError(f"{name} has shape {list(shape)}: it must have {count} dims, [{dims}]")
        if dtype != dtypes[0]:
            raise ArgumentError(f"{name} is {dtype}, q is {dtypes[0]}: q, k and v must have one dtype; convert them")
        if device != devices[0]:
            raise ArgumentError(
                f"{name} is on {device}, q on {devices[0]}: q, k and v must be on one device; move them"
            )
        if 0 in shape:
            raise ArgumentError(f"{name} has shape {list(shape)}: every dim must be at least 1")
    if wrong := _misfit(*shapes, dims):
        q, k, v = map(list, shapes)
        raise ArgumentError(f"q {q}, k {k}, v {v}: {wrong}")


def _misfit(q: tuple[int, ...], k: tuple[int, ...], v: tuple[int, ...], dims: str) -> str | None:
    """How the three shapes do not go together, if so."""
    if q[-1] != k[-1]:
        return "q and k must have one head_dim"
    if dims == PACKED:
        if not q[0] == k[0] == v[0]:
            return "q, k and v must have the same tokens"
        if k[1] != v[1]:
            return "k and v must have the same kv_heads"
    else:
        if not q[0] == k[0] == v[0]:
            return "q, k and v must have one batch size"
        if k[1:3] != v[1:3]:
            return "k and v must have the same kv_heads and kv_len"
        if q[2] > k[2]:
            return "the queries are the last q_len positions, so q_len must be at most kv_len"
    if q[1] % k[1]:
        return f"{q[1]} heads must be a multiple of {k[1]} kv_heads"
    return None


def request_of(
    q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, pattern: Pattern, scale: float | None, return_lse: bool
) -> Request:
    """The request of a call of `attention`, checked."""
    check_types(q, k, v, pattern, scale)
    check_tensors((q.shape, k.shape, v.shape), (q.dtype, k.dtype, v.dtype), (q.device, k.device, v.device))
    strides = (q.stride(), k.stride(), v.stride())
    through_lse = wants_lse_gradient(return_lse, q, k, v)
    fixed = torch.are_deterministic_algorithms_enabled()
    shapes = (q.shape, k.shape, v.shape)
    return Request(pattern, *shapes, q.dtype, q.device.type, strides, through_lse, deterministic=fixed)


# ---- who is watching ----------------------------------------------------------------------------------------------

# Names of PyTorch's own, for want of public ones. Where a later PyTorch lacks one, the answer is that somebody is
# watching, which is slower and never wrong.
_dispatch_modes = getattr(torch._C, "_len_torch_dispatch_stack", lambda: 1)
_function_modes = getattr(torch._C, "_len_torch_function_stack", lambda: 1)
_transforms = getattr(torch._C, "_are_functorch_transforms_active", lambda: True)
_jit_trace = getattr(torch._C, "_get_tracing_state", lambda: True)
_keys = getattr(torch._C, "_dispatch_keys", None)

_PLAIN = (torch.Tensor, torch.nn.Parameter)

#: The dispatch keys, as a number, of tensors that are simply their memory, on the devices seen so far.
_plain_keys: set[int] = set()


def watched(*tensors: torch.Tensor | None) -> bool:
    """True where something besides autograd may want to see an operator, not what a backend does inside; or in doubt.

    That is torch.compile and export, modes (fake tensors, selective checkpoints, counters of operations, a default
    device), vmap and its like, tracing, subclasses of tensors, and tensors that are not simply their memory: on the
    meta device, batched, negated lazily, or zeros that take none. PyTorch puts those right before an operator runs.
    """
    if torch.compiler.is_compiling() or _dispatch_modes() or _function_modes() or _transforms() or _jit_trace():
        return True
    if _keys is None:
        return True
    for x in tensors:  # as a generator in `any` it would take twice as long
        if x is None:
            continue
        if type(x) not in _PLAIN or (_keys(x).raw_repr() not in _plain_keys and not _has_plain_keys(x)):
            return True
    return False


def _has_plain_keys(x: torch.Tensor) -> bool:
    """True where x has the keys of a new tensor on its device; there are others in inference mode."""
    if x.is_meta or _keys is None:
        return False
    for inference in (False, True):
        with torch.inference_mode(inference):
            _plain_keys.add(_keys(torch.empty(0, device=x.device)).raw_repr())
    return _keys(x).raw_repr() in _plain_keys


# ---- derivatives --------------------------------------------------------------------------------------------------


def wants_lse_gradient(return_lse: bool, q: torch.Tensor, k: torch.Tensor, v: torch.Tensor) -> bool:
    """True when gradients may come through the log-sum-exp."""
    return bool(return_lse) and wants_gradients(q, k, v)


def wants_gradients(q: torch.Tensor, k: torch.Tensor, v: torch.Tensor) -> bool:
    return torch.is_grad_enabled() and (q.requires_grad or k.requires_grad or v.requires_grad)


def refuse_tangents(backend: str, *tensors: torch.Tensor) -> None:
    """Forward-mode differentiation would find no formula in an operator, and silently give zeros."""
    if getattr(forward_ad, "_current_level", -1) < 0:
        return
    if any(forward_ad.unpack_dual(x).tangent is not None for x in tensors):
        raise UnsupportedError(
            f"the {backend} backend has no forward-mode derivatives: pass backend='reference', which has"
        )


# ---- autocast -----------------------------------------------------------------------------------------------------


def autocast_on(q: Any) -> bool:
    if not isinstance(q, torch.Tensor):
        return False
    device = q.device.type
    return device != "meta" and torch.is_autocast_enabled(device)


class _Off:
    """Autocast off for a while: what ``torch.autocast(enabled=False)`` does, at a tenth of its eight microseconds."""

    def __init__(self, device_type: str) -> None:
        self.device_type = device_type

    def __enter__(self) -> None:
        torch.set_autocast_enabled(self.device_type, False)

    def __exit__(self, *_error: object) -> None:
        torch.set_autocast_enabled(self.device_type, True)


_NOTHING_TO_DO = nullcontext()


def no_autocast(q: torch.Tensor) -> AbstractContextManager:
    """Softmax and sums stay in float32: nothing inside is cast again. A backward may run under autocast as well."""
    if not autocast_on(q):
        return _NOTHING_TO_DO
    if torch.compiler.is_compiling():
        return torch.autocast(q.device.type, enabled=False)
    return _Off(q.device.type)


def autocast(*tensors: torch.Tensor) -> list[torch.Tensor]:
    """Inputs in autocast's dtype, as for `scaled_dot_product_attention`; float64 stays."""
    dtype = torch.get_autocast_dtype(tensors[0].device.type)
    narrow = (torch.float16, torch.bfloat16, torch.float32)
    # Asked for first: `to` takes a while to find that there is nothing to do.
    return [
        x.to(dtype) if isinstance(x, torch.Tensor) and x.dtype != dtype and x.dtype in narrow else x for x in tensors
    ]
