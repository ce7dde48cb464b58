"""Which backend decodes a step: the one that is named, or the fastest that takes it."""

from __future__ import annotations

from functools import lru_cache
from typing import Any

from longstride.backends.decode_request import DecodeRequest
from longstride.backends.torch import decode as torch_decode
from longstride.backends.triton import decode as triton_decode
from longstride.dispatch.choice import check_name, only_named
from longstride.errors import UnsupportedError

#: The backends that decode, the one to prefer first.
DECODERS: dict[str, Any] = {"triton": triton_decode, "torch": torch_decode}


@lru_cache(maxsize=1024)
def choose_decoder(request: DecodeRequest, backend: str | None) -> str | None:
    """The backend that decodes; None where the one that is named has no decoding of its own.

    Such a backend is given what the cache holds, laid out as a sequence.

    Raises:
        ArgumentError: no backend has that name.
        UnsupportedError: the named one, or all, refuse. The message lists every backend.
    """
    if backend is not None:
        check_name(backend)
        if backend not in DECODERS:
            return None
        if refusals := DECODERS[backend].decode_refusals(request):
            raise UnsupportedError(_refusal_text(request, f"backend {backend!r} was asked for, but {refusals[0]}"))
        return backend
    for name, module in DECODERS.items():
        if not only_named(name) and not module.decode_refusals(request):
            return name
    raise UnsupportedError(_refusal_text(request, "no backend decodes this"))


def _refusal_text(request: DecodeRequest, what: str) -> str:
    lines = [f"{what}; all backends that decode:"]
    for name, module in DECODERS.items():
        refusals = module.decode_refusals(request)
        lines.append(f"  {name}: {'; '.join(refusals) if refusals else 'takes it: pass backend=' + repr(name)}")
    return "\n".join(lines)
