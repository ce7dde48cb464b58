"""Where the device's time goes in a compiled training step: kernels by the operator that launched them."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator, Sequence

import torch
from torch.autograd.profiler_util import FunctionEvent
from torch.profiler import ProfilerActivity, profile

from training_steps import Size, Stepper

PARTS = (
    "attention",
    "projections",
    "feed-forward",
    "norms, residuals, copies",
    "embeddings",
    "loss",
    "optimizer",
    "other",
)
PRODUCTS = ("aten::mm", "aten::addmm", "aten::bmm", "aten::linear", "aten::matmul")


def breakdown(stepper: Stepper, size: Size, steps: int = 3) -> dict:
    """Milliseconds a step by part, of the device's kernels (on a CPU: of its operators)."""
    on_cpu = stepper.device == "cpu"
    activities = [ProfilerActivity.CPU, *([] if on_cpu else [ProfilerActivity.CUDA])]
    # In a graph no kernel is known by its operator.
    stepper.step(recorded=False)
    with profile(activities=activities, record_shapes=True, acc_events=True) as profiler:
        for _ in range(steps):
            stepper.step(recorded=False)
        if not on_cpu:
            torch.cuda.synchronize()
    parts = dict.fromkeys(PARTS, 0.0)
    other: Counter[str] = Counter()
    for names, shapes, us in _spent(profiler.events(), on_cpu):
        part = part_of(names, shapes, size)
        parts[part] += us / 1e3 / steps
        if part == "other":
            other[names[0]] += us / 1e3 / steps
    return {"steps": steps, "ms": parts, "largest_other": other.most_common(8)}


def _spent(events: Sequence[FunctionEvent], on_cpu: bool) -> Iterator[tuple[list[str], Sequence, float]]:
    """(names, shapes, microseconds) of what ran: of kernels, by the operator that launched them where it is known."""
    unlaunched: Counter[str] = Counter()
    for event in events:
        if event.device_type != torch.autograd.DeviceType.CPU:
            # Ranges that a user names are shown on the device, too, around the kernels.
            if not getattr(event, "is_user_annotation", False):
                unlaunched[event.name] += event.time_range.elapsed_us()
            continue
        for kernel in event.kernels:
            unlaunched[kernel.name] -= kernel.duration
        us = event.self_cpu_time_total if on_cpu else sum(kernel.duration for kernel in event.kernels)
        if us:
            yield [*_ancestors(event), *(kernel.name for kernel in event.kernels)], event.input_shapes or (), us
    yield from (([name], (), us) for name, us in unlaunched.items() if us > 0)


def _ancestors(event: FunctionEvent) -> Iterator[str]:
    """The event's name, and its callers'."""
    while event is not None:
        yield event.name
        event = event.cpu_parent


def part_of(names: Sequence[str], shapes: Sequence[Sequence[int]], size: Size) -> str:
    """The part that a kernel belongs to.

    Args:
        names: of the operator that launched it, of the operators around that, and of the kernel.
        shapes: of the operator's inputs; a product is known by the widths that are not numbers of tokens.
        size: the model's widths.
    """
    text = " ".join(names).lower()
    if "longstride" in text or "scaled_dot_product" in text or "flash" in text or "cudnn_attention" in text:
        return "attention"
    if "optimizer" in text or "_fused_adam" in text or "_foreach" in text or "multi_tensor" in text:
        return "optimizer"
    d = size.hidden_size
    wide = size.intermediate_size or 4 * d
    qkv = 2 * (size.qk_hidden_size or d) + d
    if any(name in PRODUCTS for name in names):
        tokens = size.batch * size.length
        dims = {n for shape in shapes[-2:] or () for n in shape if n not in (tokens, 8192)}
        for part, width in (("feed-forward", wide), ("projections", qkv), ("loss", 256)):
            if width in dims and width != d:
                return part
        return "projections" if dims == {d} else "other"
    if "embedding" in text:
        return "embeddings"
    if "log_softmax" in text or "nll_loss" in text or "cross_entropy" in text or "logsumexp" in text:
        return "loss"
    if "sigmoid" in text or "silu" in text or "gelu" in text:
        return "feed-forward"
    if "norm" in text or "triton_" in text or "aten::add" in text:
        return "norms, residuals, copies"
    return "other"
