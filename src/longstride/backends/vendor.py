"""The `vendor` backend: kernels of cuDNN and FlashAttention, on views that make a stride dense.

In the residue classes of a stride, strided attention is dense. With n = length / stride, position c + r * stride is
row r of class c, so that a view [batch * heads, stride, n, dim] of q, k and v gives every class as a head of its own,
and the kernels that chip makers write for dense attention compute it exactly; nothing is copied. flash-attn-4, where it
is installed, takes windows too, and key heads that query heads share.
"""

from __future__ import annotations

import warnings
from functools import lru_cache
from importlib import import_module
from inspect import signature
from typing import Any, NamedTuple

import torch

from longstride.backends.layout import empty_as, laid_as, placed
from longstride.backends.request import QKV, Request
from longstride.patterns import Pattern
from longstride.patterns.regions import Band
from longstride.plan import plan

name = "vendor"
differentiable = False
takes_lse_gradient = False  # the kernels compute delta = sum(out * grad_out) themselves, with no place for the lse's

DTYPES = (torch.float16, torch.bfloat16)
FLASH_ATTENTION_4 = "flash-attn-4"
#: The most rows of a batch, or heads, of one launch.
MOST_ROWS = 65535


class Classes(NamedTuple):
    """What the kernels run in each residue class mod `dilation`: dense attention, causal or not, or a causal window."""

    dilation: int
    causal: bool
    window: int | None = None

    @property
    def text(self) -> str:
        return f"window of {self.window:,}" if self.window else "causal" if self.causal else "full"


# ---- what it takes ------------------------------------------------------------------------------------------------


def refusals(request: Request) -> list[str]:
    if request.device_type != "cuda":
        return [f"its kernels are for CUDA devices, and the tensors are on {request.device_type}"]
    found = []
    if request.dtype not in DTYPES:
        found.append(f"dtype {request.dtype} is neither float16 nor bfloat16")
    if request.head_dim != request.v_head_dim:
        found.append(f"v_head_dim {request.v_head_dim} is not head_dim {request.head_dim}")
    if request.head_dim % 8 or request.head_dim > 128:
        found.append(f"head_dim {request.head_dim} is not a multiple of 8 up to 128")
    if request.q_len != request.kv_len:
        found.append(f"{request.q_len} queries for {request.kv_len} keys: it wants as many of both")
        return found
    classes = classes_of(request.pattern, request.q_len, request.num_heads)
    if classes is None:
        found.append(f"{request.pattern} is not dense, nor dense in every residue class of a stride, nor a window")
        return found
    shares = request.num_heads != request.num_kv_heads
    if shares and classes.dilation > 1:
        found.append(f"{request.num_heads} heads share {request.num_kv_heads} kv_heads: in classes it wants as many")
    elif (shares or classes.window) and not _newest(classes, request.head_dim, shares):
        what = "windows" if classes.window else f"{request.num_heads} heads that share {request.num_kv_heads} kv_heads"
        dims = ", ".join(map(str, NEWEST_HEAD_DIMS))
        found.append(f"{what} are for flash-attn-4 (head_dims {dims}) alone, which is not installed or does not fit")
    if request.q_len % classes.dilation:
        found.append(f"the stride {classes.dilation} does not divide the length {request.q_len}")
    elif max(_batch_and_heads(request, classes.dilation)) > MOST_ROWS:
        found.append(f"its kernels take {MOST_ROWS:,} rows of a batch, or heads, and these are more")
    elif request.q_len == classes.dilation:
        found.append("each class has a single position, which its kernels do not take")
    elif request.strides is not None and not all(
        fits(shape, stride, classes.dilation)
        for shape, stride in zip((request.q_shape, request.k_shape, request.v_shape), request.strides, strict=True)
    ):
        found.append("q, k or v lies in memory so that its classes are no view; make it contiguous")
    if not found and kernel() is None:
        found.append("PyTorch has neither cuDNN nor FlashAttention kernels for this device")
    return found


#: Rows of a class from which on these kernels are faster than ours, forward for head_dims up to 64 and 128, and
#: backward: measured on an H100 (benchmarks/results/attention_gpu.md). Ours hold shorter classes on chip as a whole.
FROM_ROWS = {64: 129, 128: 65}
FROM_ROWS_BACKWARD = 512
#: And keys of a window from which on flash-attn-4 is, both ways.
FROM_WINDOW = 512


def prefers(request: Request) -> str | None:
    return _preference(request, FROM_ROWS[64 if request.head_dim <= 64 else 128])


def prefers_backward(request: Request) -> str | None:
    if request.deterministic:  # they add up grad_q in whatever order programs finish
        return None
    return _preference(request, FROM_ROWS_BACKWARD)


def _preference(request: Request, least: int) -> str | None:
    classes = _classes(request)
    keys, least = (classes.window, FROM_WINDOW) if classes.window else (request.q_len // classes.dilation, least)
    return f"{keys:,} keys a query are its own trade, from {least} on" if keys >= least else None


def _classes(request: Request) -> Classes:
    """The classes of a request that is not refused."""
    classes = classes_of(request.pattern, request.q_len, request.num_heads)
    assert classes is not None, "asked of requests that are not refused"
    return classes


def describe(request: Request) -> str:
    classes, shares = _classes(request), request.num_heads != request.num_kv_heads
    forward = FLASH_ATTENTION_4 if _newest(classes, request.head_dim, shares) else kernel()
    backward = FLASH_ATTENTION_4 if _newest(DENSE, request.head_dim, shares) else kernel()
    runs = forward if forward == backward else f"{forward} (backward: {backward})"
    rows = request.q_len // classes.dilation
    what = f"{classes.text} attention of {runs} over {rows:,} rows in each of {classes.dilation:,} classes, a view"
    return what if classes.window else f"dense {what}"


def _batch_and_heads(request: Request, dilation: int) -> tuple[int, int]:
    """Of the view that the kernels get."""
    batch, heads = request.q_shape[:2]
    return (batch, heads) if dilation == 1 else (batch * heads, dilation)


def classes_of(pattern: Pattern, length: int, heads: int) -> Classes | None:
    """The pattern as dense or windowed attention in residue classes; None where it is something else."""
    groups = plan(pattern, length, length, heads).groups
    if len(groups) != 1 or len(groups[0][1]) != 1:
        return None
    part = groups[0][1][0]
    if part.minus or part.skip_rows or part.term.regions:
        return None
    dilation, lo, hi = _ends(part.term.band or Band(1, None, None), length)
    if hi is not None:
        return Classes(dilation, True, hi + 1) if lo == 0 else None
    return Classes(dilation, lo == 0) if lo in (0, None) else None


def _ends(band: Band, length: int) -> tuple[int, int | None, int | None]:
    """dilation, lo and hi, where an end that reaches past the length is none."""
    most = (length - 1) // band.dilation
    lo = None if band.lo is None or band.lo <= -most else band.lo
    hi = None if band.hi is None or band.hi >= most else band.hi
    return band.dilation, lo, hi


def fits(shape: tuple[int, ...], stride: tuple[int, ...], dilation: int) -> bool:
    """True where the classes of a tensor of that shape and stride are a view that the kernels can read."""
    batch, heads, length, dim = shape
    by_batch, by_head, by_row, by_dim = stride
    # Kernels load 16 bytes at a time; an expanded dim, of stride 0, is not for every one of them.
    aligned = all(
        step > 0 and step % 8 == 0 for n, step in ((batch, by_batch), (heads, by_head), (length, by_row)) if n > 1
    )
    one_dim = dilation == 1 or batch == 1 or heads == 1 or by_batch == heads * by_head
    return aligned and one_dim and (by_dim == 1 or dim == 1)


@lru_cache
def kernel() -> str | None:
    """``cudnn`` or ``flash``, as this device and this PyTorch have them; None for neither."""
    if not torch.cuda.is_available():
        return None
    generation = torch.cuda.get_device_capability()[0]
    cudnn = torch.backends.cudnn.version() or 0
    if generation >= 9 and cudnn >= 90100 and _has("_scaled_dot_product_cudnn_attention", "compute_log_sumexp"):
        return "cudnn"
    return "flash" if generation >= 8 and _has("_scaled_dot_product_flash_attention", "return_debug_mask") else None


def _has(operator: str, argument: str) -> bool:
    """True when this PyTorch has a private operator and its backward, under the signature that is used here."""
    if not (hasattr(torch.ops.aten, operator) and hasattr(torch.ops.aten, operator + "_backward")):
        return False
    arguments = [a.name for a in getattr(torch.ops.aten, operator).default._schema.arguments]
    return argument in arguments and "is_causal" in arguments and "scale" in arguments


#: The head_dims that flash-attn-4 is tuned for.
NEWEST_HEAD_DIMS = (64, 96, 128)
DENSE = Classes(1, True)


def _newest(classes: Classes, head_dim: int, shares: bool = False) -> Any:
    """flash-attn-4 where it is installed and is the fastest of all, or alone takes what is asked.

    In forward that is for windows and dense patterns (dilation 1): in the classes of a stride cuDNN was faster, from 96
    rows to 1,024. In backward it was the fastest in all, whatever the classes: ask for `DENSE`.
    """
    asked = classes.dilation == 1 or classes.window is not None or shares
    return _flash_attn_4() if asked and head_dim in NEWEST_HEAD_DIMS else None


@lru_cache
def _flash_attn_4() -> Any:
    """The module of the package flash-attn-4 with its forward and backward, on a Hopper device; None without."""
    if not torch.cuda.is_available() or torch.cuda.get_device_capability()[0] != 9:
        return None
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # of its own deprecations, which some programs take for errors
            module = import_module("flash_attn.cute.interface")
    except Exception:  # its own imports fail in many ways
        return None
    places = {"_flash_attn_fwd": {"out"}, "_flash_attn_bwd": {"dq", "dk", "dv"}}  # where they are told to write
    for function, names in places.items():
        if not hasattr(module, function) or not names <= signature(getattr(module, function)).parameters.keys():
            return None
    return module


# ---- running ------------------------------------------------------------------------------------------------------


def classed(x: torch.Tensor, dilation: int) -> torch.Tensor:
    """[batch, heads, length, dim] as [batch * heads, dilation, length / dilation, dim]; a view where `fits`."""
    if dilation == 1:
        return x
    return x.flatten(0, 1).unflatten(1, (-1, dilation)).transpose(1, 2)


def _by_token(x: torch.Tensor, dilation: int) -> torch.Tensor:
    """As flash-attn-4 has it: [batch, length, heads, dim], or of classes [batch * heads, rows, dilation, dim]."""
    return classed(x, dilation).transpose(1, 2)


def whole(x: torch.Tensor, batch: int, dilation: int) -> torch.Tensor:
    """The inverse of `classed`, of a log-sum-exp too, without dim."""
    if dilation > 1:
        x = x.transpose(1, 2).flatten(1, 2).unflatten(0, (batch, -1))
    return x


def forward(
    q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, pattern: Pattern, scale: float
) -> tuple[torch.Tensor, torch.Tensor]:
    """out in the order of q, and lse, contiguous; not differentiable by itself."""
    out, lse = _forward(q, k, v, pattern, scale, wants_lse=True)
    dilation = _classes_of(q, pattern).dilation
    # cuDNN has a last dim of 1 for the log-sum-exp; FlashAttention of some versions rounds its rows up.
    lse = lse.reshape(*lse.shape[:2], -1)[..., : q.shape[2] // dilation]
    return out, whole(lse, q.shape[0], dilation).contiguous()


def forward_only(q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, pattern: Pattern, scale: float) -> torch.Tensor:
    """out, where nobody asks for the log-sum-exp: putting the classes' in order takes a copy."""
    return _forward(q, k, v, pattern, scale, wants_lse=False)[0]


def _forward(
    q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, pattern: Pattern, scale: float, wants_lse: bool
) -> tuple[torch.Tensor, torch.Tensor]:
    """out in the order of q, and the log-sum-exp as the kernel leaves it: meaningless where it is not wanted."""
    classes = _classes_of(q, pattern)
    dilation, causal = classes.dilation, classes.causal
    if scale <= 0:
        # The kernels take the largest score of a row before they scale it.
        q, scale = q * scale, 1.0
    q, k, v = (_aligned(x) for x in (q, k, v))
    newest = _newest(classes, q.shape[3], q.shape[1] != k.shape[1])
    if newest is not None:
        out = _room(q, dilation)
        by_token = (_by_token(x, dilation) for x in (q, k, v))
        asked = {"softmax_scale": scale, "causal": causal, "window_size_left": _left(classes), "return_lse": wants_lse}
        lse = newest._flash_attn_fwd(*by_token, **asked, out=_by_token(out, dilation))[1]
        return laid_as(out, q), lse
    views = (classed(x, dilation) for x in (q, k, v))
    if kernel() == "cudnn":
        cudnn = torch.ops.aten._scaled_dot_product_cudnn_attention
        out, lse = cudnn(*views, None, wants_lse, 0.0, causal, False, scale=scale)[:2]
    else:
        flash = torch.ops.aten._scaled_dot_product_flash_attention
        out, lse = flash(*views, 0.0, causal, False, scale=scale)[:2]
    return laid_as(whole(out, q.shape[0], dilation), q), lse


def backward(
    grad_out: torch.Tensor,
    grad_lse: torch.Tensor | None,
    q: torch.Tensor,
    k: torch.Tensor,
    v: torch.Tensor,
    out: torch.Tensor,
    lse: torch.Tensor,
    pattern: Pattern,
    scale: float,
    into: QKV | None = None,
) -> QKV:
    """Gradients in the orders of q, k and v."""
    assert grad_lse is None, "requests with gradients through the log-sum-exp are refused"
    if scale <= 0:
        grad_q, grad_k, grad_v = backward(grad_out, None, q * scale, k, v, out, lse, pattern, 1.0, into)
        return grad_q.mul_(scale), grad_k, grad_v
    classes = _classes_of(q, pattern)
    dilation, causal = classes.dilation, classes.causal
    batch = q.shape[0]
    q, k, v = (_aligned(x) for x in (q, k, v))
    # cuDNN wants both of these in one layout.
    out, grad_out = laid_as(out, q), laid_as(grad_out, q)
    newest = _newest(DENSE, q.shape[3])
    if newest is not None:
        by_token = (_by_token(x, dilation) for x in (q, k, v, out, grad_out))
        classed_lse = classed(lse[..., None], dilation)[..., 0].contiguous()
        asked = {"softmax_scale": scale, "causal": causal, "window_size_left": _left(classes)}
        # The classes of several sequences are a view only where each head's tokens lie together.
        fits_in = into is not None and (dilation == 1 or batch == 1)
        grads = into if fits_in else [_room(x, dilation) for x in (q, k, v)]
        views = (_by_token(grad, dilation) for grad in grads)
        newest._flash_attn_bwd(*by_token, classed_lse, **asked, **dict(zip(("dq", "dk", "dv"), views, strict=True)))
        return placed(grads, (q, k, v), into)
    likes = (q, k, v)
    q, k, v, out, grad_out = (classed(x, dilation) for x in (q, k, v, out, grad_out))
    lse = classed(lse[..., None], dilation).contiguous()
    rows = q.shape[2]
    if kernel() == "cudnn":
        # Dropout's seed and offset: asked for, and not looked at without dropout.
        seed, offset = (torch.zeros((), dtype=torch.int64, device=q.device) for _ in range(2))
        cudnn = torch.ops.aten._scaled_dot_product_cudnn_attention_backward
        known = (grad_out, q, k, v, out, lse, seed, offset, None, None, None)
        grads = cudnn(*known, rows, rows, 0.0, causal, scale=scale)
    else:
        seed = torch.zeros(2, dtype=torch.uint64, device=q.device)
        offset = torch.zeros(0, dtype=torch.uint64, device=q.device)
        flash = torch.ops.aten._scaled_dot_product_flash_attention_backward
        known = (grad_out, q, k, v, out, lse[..., 0], None, None, rows, rows)
        grads = flash(*known, 0.0, causal, seed, offset, scale=scale)
    return placed([whole(grad, batch, dilation) for grad in grads[:3]], likes, into)


def _room(x: torch.Tensor, dilation: int) -> torch.Tensor:
    """A new tensor of x's shape whose classes are a view; in the order of x where that is one."""
    return empty_as(x) if dilation == 1 or x.shape[0] == 1 else x.new_empty(x.shape)


def _left(classes: Classes) -> int | None:
    """How many keys before a query's own it reads in its class, where there is a bound."""
    return None if classes.window is None else classes.window - 1


def _classes_of(q: torch.Tensor, pattern: Pattern) -> Classes:
    classes = classes_of(pattern, q.shape[2], q.shape[1])
    assert classes is not None, "requests for other patterns are refused"
    return classes


def _aligned(x: torch.Tensor) -> torch.Tensor:
    """The kernels want the first number at a multiple of 16 bytes, as slices of a wider tensor may not have it."""
    return x if x.data_ptr() % 16 == 0 else x.clone()
