"""Triton's kernels on the CPU: importing this module makes them in Triton's interpreter, in this process for good.

`triton.jit` looks at TRITON_INTERPRET when it meets a function, those of Triton's own library too. So the variable is
set here while both are imported, before any test runs, and taken away again: only inside `interpreter` does the backend
know of it and take CPU tensors. Machines with a CUDA device leave their kernels alone: tests/gpu checks those.
"""

from __future__ import annotations

import importlib
from collections.abc import Iterator
from contextlib import contextmanager
from importlib.util import find_spec

import pytest
import torch

from longstride.attention import forget
from longstride.dispatch.choice import settled
from longstride.dispatch.decoding import choose_decoder


def _why_not() -> str:
    if torch.cuda.is_available():
        return "with a CUDA device tests/gpu checks the kernels themselves"
    if find_spec("triton") is None:
        return "triton is not installed"
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("TRITON_INTERPRET", "1")
        importlib.import_module("longstride.backends.triton.launch")
        importlib.import_module("longstride.backends.triton.decode_kernel")
        library = importlib.import_module("triton.language")
    if type(library.sum).__name__ != "InterpretedFunction":
        return "something imported triton before this module could: run these tests alone"
    return ""


#: Why there is no interpreter here; "" when there is.
WHY_NOT = _why_not()


@contextmanager
def interpreter() -> Iterator[None]:
    """Inside, the backend runs on CPU tensors."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("TRITON_INTERPRET", "1")
        yield
    forget()
    settled.cache_clear()
    choose_decoder.cache_clear()
