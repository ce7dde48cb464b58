"""What is kept for CUDA graphs, without one: recordings are made up, and devices are named alone."""

import gc
import weakref

import pytest
import torch

from longstride.backends import recorded

CUDA = torch.device("cuda")


class Table:
    """As large as a weak reference needs."""


@pytest.mark.parametrize("device", ["cuda", "cpu"])
@pytest.mark.parametrize("capturing", [True, False])
def test_what_a_recording_uses_is_kept(monkeypatch: pytest.MonkeyPatch, device: str, capturing: bool) -> None:
    monkeypatch.setattr(recorded, "_kept", {})
    monkeypatch.setattr(torch.cuda, "is_current_stream_capturing", lambda: capturing)
    table = Table()
    seen = weakref.ref(table)
    assert recorded.kept(table, torch.device(device)) is table
    del table
    gc.collect()
    assert (seen() is not None) == (capturing and device == "cuda")


def test_a_compiler_does_not_ask() -> None:
    """It can follow no question about streams, and would give up on the whole function."""
    compiled = torch.compile(lambda x: recorded.kept(x + 1, CUDA), fullgraph=True, backend="eager")
    assert compiled(torch.ones(2)).tolist() == [2, 2]
