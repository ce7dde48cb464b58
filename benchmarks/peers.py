"""Everything that is timed, ours and its peers, each at its best, behind one form: a `Contender`.

Peers get their own layout for nothing: what they would have to copy first is copied before the clock starts.
"""

from __future__ import annotations

import contextlib
import io
import re
import warnings
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from functools import lru_cache

import torch
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.nn.functional import pad, scaled_dot_product_attention

import longstride as ls
from block_masks import block_mask, rule_of
from cases import Case, Inputs
from correctness import Results

OURS, DENSE, PEER = "ours", "dense", "peer"

Attend = Callable[[torch.Tensor, torch.Tensor, torch.Tensor], torch.Tensor]
SDPA = {"SDPA cuDNN": SDPBackend.CUDNN_ATTENTION, "SDPA flash": SDPBackend.FLASH_ATTENTION}
FLASH_ATTENTION_4 = "flash-attn-4"
FLEX = "FlexAttention"


@dataclass(frozen=True)
class Layout:
    """How a kernel wants its tensors: from [batch, heads, length, dim], contiguous, and back."""

    to: Callable[[torch.Tensor], torch.Tensor]
    back: Callable[[torch.Tensor], torch.Tensor]


AS_GIVEN = Layout(lambda x: x, lambda x: x)
HEADS_LAST = Layout(lambda x: x.transpose(1, 2).contiguous(), lambda x: x.transpose(1, 2))


def residue_classes(case: Case, stride: int, *, heads_last: bool) -> Layout:
    """The view in which strided attention is dense causal attention: every residue class is a head of its own."""
    rows = case.length // stride

    def to(x: torch.Tensor) -> torch.Tensor:
        split = x.view(case.batch * case.heads, rows, stride, x.shape[-1])
        return split if heads_last else split.transpose(1, 2)

    def back(x: torch.Tensor) -> torch.Tensor:
        split = x if heads_last else x.transpose(1, 2)
        return split.reshape(case.batch, case.heads, case.length, x.shape[-1])

    return Layout(to, back)


class Contender:
    """One kernel on one set of inputs: `forward`, `backward` and `both` are what is timed.

    Args:
        attend: the kernel, differentiable.
        inputs: the case's, which every contender computes on.
        layout: of its tensors.
        needs_grad: its forward is timed with gradients on. FlexAttention is: without, it would be compiled once more,
            into the same kernel.
    """

    def __init__(self, attend: Attend, inputs: Inputs, layout: Layout = AS_GIVEN, needs_grad: bool = False) -> None:
        self._attend, self._layout, self._needs_grad = attend, layout, needs_grad
        self._dims = tuple(x.shape[-1] for x in (inputs.q, inputs.k, inputs.v))
        self._leaves = [layout.to(x).detach().requires_grad_() for x in (inputs.q, inputs.k, inputs.v)]
        self._out = attend(*self._leaves)
        # In the strides of the output, or some kernels would copy it within the timed region.
        self._grad_out = torch.empty_like(self._out).copy_(layout.to(inputs.grad_out))

    def forward(self) -> torch.Tensor:
        with contextlib.nullcontext() if self._needs_grad else torch.no_grad():
            return self._attend(*self._leaves)

    def backward(self) -> tuple[torch.Tensor, ...]:
        """The gradients, from a graph that was built before."""
        return torch.autograd.grad(self._out, self._leaves, self._grad_out, retain_graph=True)

    def both(self) -> tuple[torch.Tensor, ...]:
        return torch.autograd.grad(self._attend(*self._leaves), self._leaves, self._grad_out)

    def results(self, lse: torch.Tensor | None = None) -> Results:
        """Outputs and gradients in the common layout, without padding."""
        grads = [self._layout.back(x)[..., :dim] for x, dim in zip(self.backward(), self._dims, strict=True)]
        return Results(self._layout.back(self._out.detach()), *grads, lse=lse)


@dataclass(frozen=True)
class Offer:
    """A row to be timed: what it is called, and how to make its contender.

    Attributes:
        kind: OURS; DENSE, which ignores the pattern; or PEER, which computes the very same pattern.
        compiles: its first call takes seconds.
        reason: why it is not even tried.
    """

    what: str
    kind: str
    pattern: ls.Pattern
    make: Callable[[Inputs], Contender]
    compiles: bool = False
    reason: str | None = None


def ours(pattern: ls.Pattern) -> Offer:
    return Offer("Longstride", OURS, pattern, lambda inputs: Contender(_longstride(pattern), inputs))


def _longstride(pattern: ls.Pattern) -> Attend:
    return lambda q, k, v: ls.attention(q, k, v, pattern)


def choice(pattern: ls.Pattern, q: torch.Tensor, k: torch.Tensor, v: torch.Tensor) -> tuple[str | None, str]:
    """The backends that `longstride.attention` takes for these inputs, and the lines of `explain` that say why."""
    with contextlib.redirect_stdout(io.StringIO()):
        explanation = ls.explain(q, k, v, pattern)
    lines = [line.strip() for line in str(explanation).splitlines() if ": chosen" in line]
    names = dict.fromkeys(name for name in (explanation.backend, explanation.backward) if name)
    return "+".join(names) or None, "; ".join(lines)


def kernels_of(texts: Sequence[str], shape: tuple[int, int, int], qk_dim: int, v_dim: int, device: str) -> list[str]:
    """Each pattern with the backends that it runs on, and of vendors' kernels whose they are.

    Args:
        shape: batch, heads and length of what a model in bf16, on the CPU in float32, gives to its attention.
    """
    dtype = torch.float32 if device == "cpu" else torch.bfloat16
    q, k, v = (torch.empty(*shape, dim, dtype=dtype, device=device) for dim in (qk_dim, qk_dim, v_dim))
    found = []
    for text in dict.fromkeys(texts):
        backends, lines = choice(ls.parse(text), q, k, v)
        whose = dict.fromkeys(re.findall(r" attention of (.+?) over ", lines))
        found.append(f"{text}: {backends}" + (f" ({', '.join(whose)})" if whose else ""))
    return found


def dense(case: Case) -> Iterator[Offer]:
    """Dense attention by every kernel, whatever the pattern."""
    pattern, shares_keys = case.dense, case.heads != case.kv_heads
    for label, backend in SDPA.items():
        attend = _sdpa(backend, causal=case.causal, enable_gqa=shares_keys)
        yield from _with_padding(case, f"dense, {label}", DENSE, pattern, attend)
    if flash_attention_4()[0] is not None:
        attend = _flash(causal=case.causal)
        yield from _with_padding(
            case, f"dense, {FLASH_ATTENTION_4}", DENSE, pattern, attend, layout=HEADS_LAST, compiles=True
        )


def same_pattern(case: Case, pattern: ls.Pattern) -> Iterator[Offer]:
    """Every other kernel that computes this very pattern."""
    known = flash_attention_4()[0] is not None
    if isinstance(pattern, ls.Strided) and case.length % pattern.stride == 0 and case.heads == case.kv_heads:
        view = residue_classes(case, pattern.stride, heads_last=False)
        for label, backend in SDPA.items():
            attend = _sdpa(backend, causal=True)
            yield from _with_padding(case, f"zero-copy view, {label}", PEER, pattern, attend, layout=view)
        if known:
            view = residue_classes(case, pattern.stride, heads_last=True)
            what = f"zero-copy view, {FLASH_ATTENTION_4}"
            yield from _with_padding(case, what, PEER, pattern, _flash(causal=True), layout=view, compiles=True)
    if isinstance(pattern, ls.Local) and not pattern.lookahead and known:
        attend = _flash(causal=True, window=pattern.window)
        what = f"window, {FLASH_ATTENTION_4}"
        yield from _with_padding(case, what, PEER, pattern, attend, layout=HEADS_LAST, compiles=True)
    if pattern in case.flex:
        yield Offer(FLEX, PEER, pattern, lambda inputs: _flex(case, pattern, inputs), compiles=True)
    elif not case.scaling:
        reason = "not run: every block of 128 x 128 holds an allowed pair, so that it costs as much as dense"
        yield Offer(FLEX, PEER, pattern, lambda inputs: _flex(case, pattern, inputs), reason=reason)


def _with_padding(
    case: Case,
    what: str,
    kind: str,
    pattern: ls.Pattern,
    attend: Attend,
    *,
    layout: Layout = AS_GIVEN,
    compiles: bool = False,
) -> Iterator[Offer]:
    """An offer; where the head dims differ, which few kernels take, another one with q and k padded by zeros."""
    yield Offer(what, kind, pattern, lambda inputs: Contender(attend, inputs, layout), compiles)
    if case.head_dim < case.v_head_dim:
        wider = case.v_head_dim - case.head_dim
        padded = Layout(lambda x: layout.to(_padded(x, case.head_dim, wider)), layout.back)
        what = f"{what}, q and k padded to {case.v_head_dim}"
        yield Offer(what, kind, pattern, lambda inputs: Contender(_scaled(attend, case), inputs, padded), compiles)


def _padded(x: torch.Tensor, head_dim: int, wider: int) -> torch.Tensor:
    return pad(x, (0, wider)) if x.shape[-1] == head_dim else x


def _scaled(attend: Attend, case: Case) -> Attend:
    """Padded heads look wider than they are: the scale stays that of the true width."""
    return lambda q, k, v: attend(q, k, v, scale=case.head_dim**-0.5)  # type: ignore[call-arg]


def _sdpa(backend: SDPBackend, *, causal: bool, enable_gqa: bool = False) -> Attend:
    def attend(q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, scale: float | None = None) -> torch.Tensor:
        with sdpa_kernel(backend):
            return scaled_dot_product_attention(q, k, v, is_causal=causal, enable_gqa=enable_gqa, scale=scale)

    return attend


def _flash(*, causal: bool, window: int | None = None) -> Attend:
    function = flash_attention_4()[0]
    assert function is not None
    settings = {"causal": causal} if window is None else {"causal": causal, "window_size": (window - 1, 0)}

    def attend(q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, scale: float | None = None) -> torch.Tensor:
        out = function(q, k, v, softmax_scale=scale, **settings)
        return out[0] if isinstance(out, tuple) else out  # some releases return the log-sum-exp too

    return attend


@lru_cache(maxsize=1)
def flash_attention_4() -> tuple[Callable | None, str]:
    """flash-attn-4's function, or None and why not."""
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            from flash_attn.cute import flash_attn_func  # type: ignore[import-not-found]
    except Exception as error:  # its own imports fail in many ways
        return None, why(error)
    return flash_attn_func, ""


def _flex(case: Case, pattern: ls.Pattern, inputs: Inputs) -> Contender:
    import torch._dynamo.config
    import torch._functorch.config
    from torch.nn.attention.flex_attention import flex_attention

    # Every rule is compiled anew, and a backward that may run twice must not give its buffers away.
    torch._dynamo.config.recompile_limit = 64
    torch._functorch.config.donated_buffer = False
    device = inputs.q.device.type
    mask = block_mask(rule_of(pattern, case.heads, case.length, device), case.length, device)
    compiled = torch.compile(flex_attention, dynamic=False, fullgraph=True)
    shares_keys = case.heads != case.kv_heads

    def attend(q: torch.Tensor, k: torch.Tensor, v: torch.Tensor) -> torch.Tensor:
        return compiled(q, k, v, block_mask=mask, enable_gqa=shares_keys)

    return Contender(attend, inputs, needs_grad=True)


def why(error: BaseException) -> str:
    """An error in one line. Raises where the device is lost: nothing after that would be true."""
    if isinstance(error, torch.OutOfMemoryError):
        return "out of memory"
    if torch.cuda.is_available():
        torch.cuda.synchronize()
    text = re.sub(r"\x1b\[[0-9;]*m", "", str(error))  # colours
    return f"{type(error).__name__}: {' '.join(text.split())}"[:300]


@contextlib.contextmanager
def heard() -> Iterator[list[str]]:
    """What was warned of meanwhile, which is where PyTorch says why it refuses a kernel."""
    said: list[str] = []
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        try:
            yield said
        finally:
            said += [" ".join(str(warning.message).split())[:160] for warning in caught]
