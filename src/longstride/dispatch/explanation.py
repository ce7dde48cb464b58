"""`explain`: the plan, the backend that would run it, and of every other why not."""

from __future__ import annotations

from contextlib import suppress
from dataclasses import dataclass

import torch

from longstride.backends.request import Request
from longstride.dispatch.checks import autocast, autocast_on, request_of
from longstride.dispatch.choice import BACKENDS, choose, choose_backward, only_named, refusals_of
from longstride.errors import UnsupportedError
from longstride.patterns import Pattern
from longstride.plan import plan


@dataclass(frozen=True, repr=False)
class Explanation:
    """What `attention` would do with a request, and the text that says so.

    Attributes:
        backend: the one chosen, or None where all refuse; backward: that of the backward half, mostly the same.
        reasons: against each other one.
    """

    backend: str | None
    reasons: dict[str, str]
    text: str
    backward: str | None = None

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
    chosen, why, backward, why_backward = None, "", None, ""
    with suppress(UnsupportedError):
        chosen, why = choose(request, backend)
        backward, why_backward = choose_backward(request, chosen, backend)
    reasons = {}
    for name, module in BACKENDS.items():
        refusals = refusals_of(name, request)
        if name == chosen:
            lines.append(f"  backend {name}: chosen ({why}): {module.describe(request)}")
            continue
        if name == backward:
            lines.append(f"  backend {name}: chosen for the backward ({why_backward}): {module.describe(request)}")
            continue
        if refusals:
            reasons[name] = "; ".join(refusals)
        elif only_named(name):
            reasons[name] = f"only used when named: {module.describe(request)}"
        else:
            reasons[name] = f"backend {backend!r} was asked for" if backend else f"{chosen} comes first here"
        lines.append(f"  backend {name}: not chosen: {reasons[name]}")
    return Explanation(chosen, reasons, "\n".join(lines), backward)


def explain(
    q: torch.Tensor,
    k: torch.Tensor,
    v: torch.Tensor,
    pattern: Pattern,
    *,
    scale: float | None = None,
    backend: str | None = None,
    return_lse: bool = False,
) -> Explanation:
    """Print what `attention` would do with these arguments, and return it.

    Tensors on the meta device do: only shapes, strides, dtypes and devices are looked at.

    Returns:
        An `Explanation`; ``str()`` of it is what was printed.
    """
    if autocast_on(q):
        q, k, v = autocast(q, k, v)
    explanation = describe(request_of(q, k, v, pattern, scale, return_lse), backend)
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
