"""The training benchmark without a GPU: its page, its aims, and its whole way at tiny sizes on the CPU."""

from __future__ import annotations

import json
import sys
from pathlib import Path

import pytest

BENCHMARKS = Path(__file__).parents[2] / "benchmarks"
sys.path.insert(0, str(BENCHMARKS))

import training  # noqa: E402
import training_page  # noqa: E402
import training_profile  # noqa: E402
from training_steps import Size  # noqa: E402

pytestmark = pytest.mark.filterwarnings("ignore:The .grad attribute of a Tensor that is not a leaf:UserWarning")


def row(what: str, ms: float) -> dict:
    return {"what": what, "ms": ms}


def test_aims_are_held_or_missed() -> None:
    case = {"rows": [row("none", 10.0), row("fixed", 11.4), row("dense", 30.0), row("dense, SDPA", 28.5)]}
    assert training_page.aims("T12288", case) == [
        "fixed: 2.50 times as fast as dense, aim 2.5: held",
        "fixed: tax 1.140, aim 1.15: held",
    ]
    case["rows"][1]["ms"] = 12.0
    assert [aim[-6:] for aim in training_page.aims("T12288", case)] == ["missed", "missed"]
    found = {"peak_bytes": 15 * 2**30, "ms": 1.0, "parameters": 10}
    assert training_page.memory_aims({"128-layers": found}) == ["128-layers: 15.00 GiB, aim below 16: held"]
    # A long model must also be large enough.
    assert training_page.memory_aims({"T1048576": found}) == ["T1048576: 15.00 GiB, aim below 80: missed"]


def test_what_limits_a_step() -> None:
    parts = dict.fromkeys(training_profile.PARTS, 1.0) | {"feed-forward": 3.0}
    assert "30%" not in training_page.limits(parts, 10.0)
    assert "40% of it is projections and feed-forward" in training_page.limits(parts, 10.0)
    assert "for 50% of the step: the host" in training_page.limits(parts, 20.0)


@pytest.mark.parametrize(
    ("names", "shapes", "part"),
    [
        (["longstride::attention", "_forward_kernel"], [], "attention"),
        (["aten::mm"], [[49152, 512], [512, 1536]], "projections"),
        (["aten::mm"], [[512, 49152], [49152, 512]], "projections"),
        (["aten::mm"], [[2048, 49152], [49152, 512]], "feed-forward"),
        (["aten::addmm"], [[2048], [49152, 512], [512, 2048]], "feed-forward"),
        (["aten::mm"], [[8192, 512], [512, 256]], "loss"),
        (["triton_poi_fused_mul_sigmoid_0"], [], "feed-forward"),
        (["triton_per_fused_native_layer_norm_1"], [], "norms, residuals, copies"),
        (["aten::_fused_adamw_", "Optimizer.step#AdamW.step"], [], "optimizer"),
        (["aten::embedding_dense_backward"], [], "embeddings"),
        (["Memset (Device)"], [], "other"),
    ],
)
def test_part_of_a_kernel(names: list[str], shapes: list[list[int]], part: str) -> None:
    assert training_profile.part_of(names, shapes, Size(12288, 4, 10)) == part


def test_the_whole_way_at_tiny_sizes(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    output = tmp_path / "training"
    start = ["training.py", "--device", "cpu", "--tiny", "--backend", "eager", "--output", str(output), "--cases"]
    monkeypatch.setattr(sys, "argv", [*start, "T12288,T1048576"])
    training.main()
    first = json.loads(output.with_suffix(".json").read_text())["cases"]
    assert [each["ms"] > 0 for each in first["T12288"]["rows"]] == [True] * 5
    assert first["T12288"]["breakdown"]["ms"]["attention"] > 0
    # Another case is added to those that are there.
    monkeypatch.setattr(sys, "argv", [*start, "128-layers-blocks"])
    training.main()
    assert list(json.loads(output.with_suffix(".json").read_text())["cases"]) == [*first, "128-layers-blocks"]
    page = output.with_suffix(".md").read_text()
    for words in ("## T12288: 2 layers", "tax", "## Peak memory", "all_but_attention", "kernels"):
        assert words in page
    monkeypatch.setattr(sys, "argv", ["training.py", "--render", "--output", str(output)])
    training.main()
    assert output.with_suffix(".md").read_text() == page
