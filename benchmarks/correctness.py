"""Nothing wrong is timed: small sizes against the float64 reference, full sizes on rows recomputed in float64."""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass, replace

import torch

import longstride as ls
from cases import Case, Inputs

#: The greatest relative error that is timed, for outputs and gradients of bfloat16 inputs.
BOUND = 2e-2
#: Rows (queries, and keys) that are recomputed at the full length.
ROWS = 64
#: The longest length at which the reference, which holds a dense mask and scores, is asked.
LONGEST_REFERENCE = 2200

NAMES = ("out", "dq", "dk", "dv")


@dataclass(frozen=True)
class Results:
    """What a kernel made of `Inputs`: out, dq, dk, dv, each [batch, heads, length, dim]; lse where it is known."""

    out: torch.Tensor
    dq: torch.Tensor
    dk: torch.Tensor
    dv: torch.Tensor
    lse: torch.Tensor | None = None


def right(errors: dict[str, float]) -> bool:
    return all(error < BOUND for error in errors.values())  # NaN is wrong too


def text(errors: dict[str, float]) -> str:
    return ", ".join(f"{name} {error:.1e}" for name, error in errors.items())


def relative_error(found: torch.Tensor, expected: torch.Tensor) -> float:
    # float32 is enough to compare two bfloat16 results, and takes half the memory.
    dtype = torch.float64 if expected.dtype == torch.float64 else torch.float32
    expected = expected.to(dtype)
    return ((found.to(dtype) - expected).norm() / expected.norm().clamp(min=1e-30)).item()


def against_reference(case: Case, pattern: ls.Pattern, device: str, dtype: torch.dtype) -> dict[str, float]:
    """Relative errors at a small ragged length, with the case's head dims and grouping of heads."""
    span = max(
        (getattr(member, "stride", 0) or getattr(member, "window", 0) for member in _members(pattern)), default=0
    )
    groups = case.heads // case.kv_heads
    kv_heads = min(case.kv_heads, 2)
    length = min(max(700, 2 * span + 60), LONGEST_REFERENCE)
    small = replace(case, batch=1, heads=kv_heads * groups, kv_heads=kv_heads, length=length)
    inputs = Inputs.of(small, device, dtype)
    found = []
    for as_dtype, backend in ((dtype, None), (torch.float64, "reference")):
        leaves = [x.to(as_dtype).requires_grad_() for x in (inputs.q, inputs.k, inputs.v)]
        out = ls.attention(*leaves, pattern, backend=backend)
        found.append((out.detach(), *torch.autograd.grad(out, leaves, inputs.grad_out.to(as_dtype))))
    return {name: relative_error(a, b) for name, a, b in zip(NAMES, *found, strict=True)}


def _members(pattern: ls.Pattern) -> tuple[ls.Pattern, ...]:
    return (pattern, *getattr(pattern, "patterns", ()))


def against(found: Results, expected: Results) -> dict[str, float]:
    """Relative errors of a peer's results against ours, which were checked before."""
    return {name: relative_error(getattr(found, name), getattr(expected, name)) for name in NAMES}


def against_rows(pattern: ls.Pattern, inputs: Inputs, results: Results, count: int = ROWS) -> dict[str, float]:
    """Relative errors on random rows at the full length, recomputed in float64 from `pattern.allows` alone.

    Of `count` queries the outputs and dq (and the log-sum-exp), and, where the log-sum-exp of all queries is known, of
    `count` keys dk and dv. The worst over batch and heads; for the outputs the worst single row too.
    """
    batch, heads, length, head_dim = inputs.q.shape
    groups, scale = heads // inputs.k.shape[1], 1.0 / math.sqrt(head_dim)
    generator = torch.Generator().manual_seed(length)
    count = min(count, length)
    rows, keys = (torch.randperm(length, generator=generator)[:count].to(inputs.q.device) for _ in range(2))
    everything = torch.arange(length, device=inputs.q.device)
    # Where one rule serves every head, its masks are made once.
    rules = [rule.bind(length) for rule in pattern.split_heads(heads)]
    masks: dict[ls.Pattern, tuple[torch.Tensor, torch.Tensor]] = {}
    errors: dict[str, float] = {}

    def note(name: str, error: float) -> None:
        errors[name] = error if math.isnan(error) else max(errors.get(name, 0.0), error)

    for b in range(batch):
        for kv_head in range(inputs.k.shape[1]):
            k, v = inputs.k[b, kv_head].double(), inputs.v[b, kv_head].double()
            dk, dv = (torch.zeros(count, x.shape[1], dtype=torch.float64, device=x.device) for x in (k, v))
            for head in range(kv_head * groups, (kv_head + 1) * groups):
                if rules[head] not in masks:
                    masks = masks if len(set(rules)) == 1 else {}
                    by_row = _allowed(rules[head], rows[:, None], everything[None])
                    masks[rules[head]] = by_row, _allowed(rules[head], everything[:, None], keys[None])
                by_row, by_key = masks[rules[head]]
                _check_queries(note, inputs, results, (b, head), rows, by_row, k, v, scale)
                if results.lse is not None:
                    more_dk, more_dv = _key_gradients(inputs, results, (b, head), keys, by_key, k, v, scale)
                    dk, dv = dk + more_dk, dv + more_dv
            if results.lse is not None:
                note("dk", relative_error(results.dk[b, kv_head, keys], dk))
                note("dv", relative_error(results.dv[b, kv_head, keys], dv))
    return errors


def _allowed(rule: ls.Pattern, i: torch.Tensor, j: torch.Tensor) -> torch.Tensor:
    return rule.allows(i, j).expand(torch.broadcast_shapes(i.shape, j.shape))


def _check_queries(
    note: Callable[[str, float], None],
    inputs: Inputs,
    results: Results,
    where: tuple[int, int],
    rows: torch.Tensor,
    allowed: torch.Tensor,
    k: torch.Tensor,
    v: torch.Tensor,
    scale: float,
) -> None:
    q, grad_out = inputs.q[where][rows].double(), inputs.grad_out[where][rows].double()
    scores = (q @ k.T * scale).masked_fill(~allowed, float("-inf"))
    lse = scores.logsumexp(-1)
    weights = (scores - lse[:, None]).exp()
    out = weights @ v
    found = results.out[where][rows].double()
    note("out", ((found - out).norm(dim=-1) / out.norm(dim=-1)).max().item())
    if results.lse is not None:
        note("lse", (results.lse[where][rows].double() - lse).abs().max().item())
    grad_weights = grad_out @ v.T
    grad_scores = weights * (grad_weights - (weights * grad_weights).sum(-1, keepdim=True))
    note("dq", relative_error(results.dq[where][rows], grad_scores @ k * scale))


def _key_gradients(
    inputs: Inputs,
    results: Results,
    where: tuple[int, int],
    keys: torch.Tensor,
    allowed: torch.Tensor,
    k: torch.Tensor,
    v: torch.Tensor,
    scale: float,
) -> tuple[torch.Tensor, torch.Tensor]:
    """dk and dv of `keys` from one head, with the log-sum-exp and outputs that the kernel itself gave."""
    assert results.lse is not None
    q, grad_out = inputs.q[where].double(), inputs.grad_out[where].double()
    scores = (q @ k[keys].T * scale).masked_fill(~allowed, float("-inf"))
    weights = (scores - results.lse[where].double()[:, None]).exp()
    delta = (results.out[where].double() * grad_out).sum(-1, keepdim=True)
    grad_scores = weights * (grad_out @ v[keys].T - delta)
    return grad_scores.T @ q * scale, weights.T @ grad_out
