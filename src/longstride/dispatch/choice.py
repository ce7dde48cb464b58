"""Which backend runs a request: the one that is named, or the fastest that takes it."""

from __future__ import annotations

from dataclasses import replace
from functools import lru_cache
from typing import Any

from longstride.backends import flex, reference, triton, vendor
from longstride.backends import torch as torch_backend
from longstride.backends.request import Request
from longstride.errors import ArgumentError, UnsupportedError

#: The backends, the one to prefer first, except where another one `prefers` the request.
BACKENDS: dict[str, Any] = {
    "triton": triton,
    "torch": torch_backend,
    "flex": flex,
    "vendor": vendor,
    "reference": reference,
}

#: A choice that is left to the operator, with what it needs to know. Compiled code does not choose: lengths may be
#: symbolic there, and plans are not for tracing.
_LATER = "later:"


def choose(request: Request, backend: str | None = None, *, operators_only: bool = False) -> tuple[str, str]:
    """The backend that runs the request, and why.

    Args:
        request: what is asked.
        backend: the name asked for, or None.
        operators_only: leave out the backends that autograd differentiates by itself.

    Raises:
        ArgumentError: no backend has that name.
        UnsupportedError: the named one, or all, refuse. The message lists every backend.
    """
    if backend is not None:
        check_name(backend)
        if refusals := refusals_of(backend, request):
            raise UnsupportedError(_refusal_text(request, f"backend {backend!r} was asked for, but {refusals[0]}"))
        return backend, "it was asked for"
    taking: list[str] = []
    for name in BACKENDS:
        if only_named(name) or (operators_only and differentiable(name)):
            continue
        if not refusals_of(name, request):
            if reason := _preference(name, request):
                return name, reason
            taking.append(name)
    if taking:
        return taking[0], "the fastest that takes the request"
    raise UnsupportedError(_refusal_text(request, "no backend takes the request"))


def choose_backward(request: Request, forward: str, backend: str | None = None) -> tuple[str, str]:
    """The backend of the backward half, where `forward` runs the other, and why.

    It is the same one, unless it is left to choose and a backend knows its halves apart: then the one that prefers this
    half, or else the first in the usual order.
    """
    if backend is not None or differentiable(forward):
        return forward, "it was asked for" if backend is not None else "autograd differentiates it"
    for name in BACKENDS:
        takes = hasattr(BACKENDS[name], "prefers_backward") and not refusals_of(name, request)
        reason = _preference(name, request, "prefers_backward") if takes else None
        if reason is not None:
            return name, reason
    if not hasattr(BACKENDS[forward], "prefers_backward"):
        return forward, "it runs the forward"
    others = (name for name in BACKENDS if name != forward and not only_named(name) and not differentiable(name))
    taking = (name for name in others if not refusals_of(name, request))
    return next(taking, forward), "the fastest that takes the request"


#: Between the names of the two halves of a call, where they differ.
_AND = "+"


def both_halves(request: Request, backend: str | None = None, *, operators_only: bool = False) -> str:
    """The backends of a call as one text: ``triton``, or ``vendor+triton`` for forward and backward."""
    forward = choose(request, backend, operators_only=operators_only)[0]
    backward = choose_backward(request, forward, backend)[0]
    return forward if forward == backward else f"{forward}{_AND}{backward}"


def forward_of(told: str) -> str:
    return told.partition(_AND)[0]


def backward_of(told: str) -> str:
    return told.rpartition(_AND)[2]


def refusals_of(name: str, request: Request) -> list[str]:
    """Why the backend cannot take the request; [] when it can."""
    module = BACKENDS[name]
    found = list(module.refusals(request))
    if request.varlen and not hasattr(module, "forward_varlen"):
        found.append("it takes no packed documents")
    if request.through_lse and not getattr(module, "takes_lse_gradient", True):
        found.append("it has no gradient through the log-sum-exp, which return_lse=True asks for")
    return found


def only_named(name: str) -> bool:
    """True where the backend is never chosen, only named.

    That is the truth, and kernels that Triton interprets.
    """
    return name == "reference" or (name == "triton" and triton.interpreted())


def differentiable(name: str) -> bool:
    """True where autograd differentiates the backend's `forward`; False where it runs inside an operator."""
    return getattr(BACKENDS[name], "differentiable", False)


def check_name(backend: Any) -> None:
    if not isinstance(backend, str) or backend not in BACKENDS:
        raise ArgumentError(f"backend={backend!r}: known backends are {', '.join(map(repr, BACKENDS))}")


def _preference(name: str, request: Request, half: str = "prefers") -> str | None:
    prefers = getattr(BACKENDS[name], half, None)
    return None if prefers is None else prefers(request)


def _refusal_text(request: Request, what: str) -> str:
    lines = [f"{what}; all backends:"]
    for name in BACKENDS:
        refusals = refusals_of(name, request)
        lines.append(f"  {name}: {'; '.join(refusals) if refusals else 'takes it: pass backend=' + repr(name)}")
    return "\n".join(lines)


# ---- choosing when the operator runs ------------------------------------------------------------------------------


def later(backend: str | None, through_lse: bool) -> str:
    """What compiled code is told in place of a backend's name; `settled` reads it inside the operator."""
    if backend is None:
        return f"{_LATER}:lse" if through_lse else _LATER
    check_name(backend)
    if backend == "reference":
        return backend
    if differentiable(backend):
        raise UnsupportedError(
            f"the {backend} backend compiles itself: call it outside torch.compile, or name another backend"
        )
    return f"{_LATER}{backend}:lse" if through_lse else f"{_LATER}{backend}"


@lru_cache(maxsize=1024)
def settled(told: str, request: Request) -> str:
    """The backends that `later` has put off, chosen for the request at hand, as `both_halves` says them."""
    if not told.startswith(_LATER):
        return told
    name, _, lse = told.removeprefix(_LATER).partition(":")
    return both_halves(replace(request, through_lse=bool(lse)), name or None, operators_only=True)
