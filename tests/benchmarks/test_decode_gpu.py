"""The decode benchmark without a GPU: its page, its aims, and its whole way at tiny sizes on the CPU."""

from __future__ import annotations

import json
import sys
from pathlib import Path

import pytest

BENCHMARKS = Path(__file__).parents[2] / "benchmarks"
sys.path.insert(0, str(BENCHMARKS))

import decode_gpu  # noqa: E402
import decode_page  # noqa: E402


def row(what: str, kind: str, length: int, ms: float) -> dict:
    return {"what": what, "kind": kind, "length": length, "batch": 1, "ms": ms, "low": ms, "high": ms}


def test_aims_are_held_or_missed() -> None:
    lengths = (4096, 65536, 1048576)
    rows = [row("SDPA", "dense", length, length / 65536) for length in lengths]
    rows += [row("Local(256)", "ours", length, 0.01 if length < 10**6 else 0.0121) for length in lengths]
    rows += [row("Strided(sqrt T)", "ours", length, 0.2 * (length / 65536) ** 0.5) for length in lengths]
    found = decode_page.aims(rows)
    assert "batch 1, Local(256): 1.21x the time of T = 4,096, 1.2x: missed" in found
    assert "batch 1, Local(256) at 65,536: 100.0x dense, 10x: held" in found
    assert "batch 1, Strided(sqrt T): 16.00x the time of T = 4,096, 16.0x: held" in found
    assert "batch 1, Strided(sqrt T) at 65,536: 5.0x dense, 10x: missed" in found


def test_strides_are_at_the_root_of_the_length() -> None:
    assert [decode_gpu.Case(length, 1).stride for length in (4096, 16384, 65536, 262144, 1048576)] == [
        64,
        128,
        256,
        512,
        1024,
    ]


def test_the_whole_way_at_tiny_sizes(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    output = tmp_path / "decode"
    monkeypatch.setattr(
        sys, "argv", ["decode_gpu.py", "--device", "cpu", "--tiny", "--rounds", "1", "--output", str(output)]
    )
    decode_gpu.main()
    result = json.loads(output.with_suffix(".json").read_text())
    ours = [each for each in result["attention"]["rows"] if each["kind"] == "ours"]
    assert len(ours) == 9
    assert all(each["error"] < 1e-5 and each["ms"] > 0 for each in ours)
    assert all(each["tokens_per_s"] > 0 for each in result["models"]["rows"])
    page = output.with_suffix(".md").read_text()
    for words in ("Batch 1:", "Aims:", "tokens/s", "2 images of 192 bytes", "Not measured: flash-attn-4"):
        assert words in page
    # What was measured once is rendered again, and parts that are not run stay.
    monkeypatch.setattr(sys, "argv", ["decode_gpu.py", "--render", "--output", str(output)])
    decode_gpu.main()
    assert output.with_suffix(".md").read_text() == page
