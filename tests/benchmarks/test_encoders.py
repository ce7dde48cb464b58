"""The encoder benchmark without a GPU: its whole way at tiny sizes on the CPU, and that nothing wrong is timed."""

from __future__ import annotations

import json
import sys
from pathlib import Path

import pytest
import torch

BENCHMARKS = Path(__file__).parents[2] / "benchmarks"
sys.path.insert(0, str(BENCHMARKS))

import encoders  # noqa: E402


def run(monkeypatch: pytest.MonkeyPatch, *arguments: object) -> None:
    threads = torch.get_num_threads()
    monkeypatch.setattr(sys, "argv", ["encoders.py", "--threads", "1", *map(str, arguments)])
    try:
        encoders.main()
    finally:
        torch.set_num_threads(threads)


def test_the_whole_way_and_another_device_s_figures_stay(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    output = tmp_path / "encoders"
    run(monkeypatch, "--tiny", "--rounds", 1, "--output", output)
    result = json.loads(output.with_suffix(".json").read_text())
    rows = result["cpu"]["rows"]
    assert [(row["case"], row["what"]) for row in rows] == [
        (case, what)
        for case in ("Longformer: window 64, 4 global", "BigBird: blocks of 8, 3 random")
        for what in ("ours", "transformers", "dense, in our layer")
    ]
    assert all(0 < row["forward_ms"] < row["both_ms"] for row in rows)
    # As if a GPU had been measured before.
    gpu = result["cpu"] | {"device": "a GPU", "rows": [row | {"peak_bytes": 3 << 20} for row in rows]}
    output.with_suffix(".json").write_text(json.dumps({"cuda": gpu}))
    run(monkeypatch, "--tiny", "--rounds", 1, "--output", output, "--commit", "abc")
    result = json.loads(output.with_suffix(".json").read_text())
    assert set(result) == {"cpu", "cuda"}
    assert result["cpu"]["commit"] == "abc"
    page = output.with_suffix(".md").read_text()
    output.with_suffix(".md").unlink()
    run(monkeypatch, "--render", "--output", output)
    assert output.with_suffix(".md").read_text() == page
    assert "## a GPU" in page
    assert page.count("(1.0x)") >= 8
    assert "| 3 |" in page


def test_nothing_wrong_is_timed(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    right = encoders.Pair.ours
    monkeypatch.setattr(encoders.Pair, "ours", lambda pair, hidden, counts=None: 1.01 * right(pair, hidden, counts))
    with pytest.raises(SystemExit, match="not timed: an error exceeds 1e-05: Longformer"):
        run(monkeypatch, "--tiny", "--output", tmp_path / "encoders")
    assert not list(tmp_path.iterdir())


def test_bfloat16_is_held_to_theirs_in_float32() -> None:
    for pair in encoders.pairs(heads=1, length=256, shrink=8):
        found = encoders.errors(pair, 256, torch.bfloat16, "cpu")
        for what in ("forward", "gradients"):
            assert 1e-4 < found[f"ours {what}"] < 2 * found[f"theirs {what}"]
