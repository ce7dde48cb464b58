"""Where the device's time goes in a compiled training step: kernels by the operator that launched them."""

from __future__ import annotations

from collections.abc import Iterable, Sequence

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
    stepper.step()
    with profile(activities=activities, record_shapes=True) as profiler:
        for _ in range(steps):
            stepper.step()
        if not on_cpu:
            torch.cuda.synchronize()
    parts = dict.fromkeys(PARTS, 0.0)
    unknown: dict[str, float] = {}
    for event in profiler.events():
        if event.device_type != torch.autograd.DeviceType.CPU:
            continue
        us = event.self_cpu_time_total if on_cpu else sum(kernel.duration for kernel in event.kernels)
        if us:
            names = [*_ancestors(event), *(kernel.name for kernel in event.kernels)]
            part = part_of(names, event.input_shapes or (), size)
            parts[part] += us / 1e3 / steps
            if part == "other":
                unknown[event.name] = unknown.get(event.name, 0.0) + us / 1e3 / steps
    return {
        "steps": steps,
        "ms": parts,
        "largest_other": sorted(unknown.items(), key=lambda item: -item[1])[:8],
    }


def _ancestors(event: FunctionEvent) -> Iterable[str]:
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
