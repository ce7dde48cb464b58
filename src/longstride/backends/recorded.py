"""What CUDA graphs go on reading: tables on the device, which caches may forget while the graphs are still replayed."""

from __future__ import annotations

from typing import Any, TypeVar

import torch

Made = TypeVar("Made")

_kept: dict[int, Any] = {}


def kept(made: Made, device: torch.device) -> Made:
    """What was made for a call; kept for good where the call is being recorded.

    A graph knows addresses alone, and nobody says when it is gone. Tables are small, and one pattern at one length has
    the same for all graphs.
    """
    if recording(device):
        _kept[id(made)] = made
    return made


def recording(device: torch.device) -> bool:
    """True where launches on the device are being recorded as a CUDA graph.

    Not while a compiler traces the call: it cannot ask, nothing is launched yet, and its code holds what it reads.
    """
    return device.type == "cuda" and not torch.compiler.is_compiling() and torch.cuda.is_current_stream_capturing()
