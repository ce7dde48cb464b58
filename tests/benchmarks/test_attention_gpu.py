"""The GPU benchmark without a GPU: its figures, its page and plot, and its whole way at tiny sizes on the CPU."""

from __future__ import annotations

import argparse
import json
import sys
from functools import partial
from pathlib import Path

import pytest
import torch
from torch.nn.attention.flex_attention import create_block_mask

import longstride as ls

BENCHMARKS = Path(__file__).parents[2] / "benchmarks"
# The benchmarks are scripts that lie beside one another, not a package.
sys.path.insert(0, str(BENCHMARKS))

import attention_gpu  # noqa: E402
import block_masks  # noqa: E402
import cases  # noqa: E402
import correctness  # noqa: E402
import figures  # noqa: E402
import floor  # noqa: E402
import page  # noqa: E402
import peers  # noqa: E402

GBPS = 3000.0
TINY = cases.Case("S1", 1, 2, 64, 16, (ls.Strided(8), ls.Local(8)))


@pytest.fixture
def bench() -> attention_gpu.Bench:
    return attention_gpu.Bench("cpu", torch.bfloat16, rounds=2, deadline=float("inf"))


def row(case: cases.Case, offer: peers.Offer, share: float) -> dict:
    """A row whose every time is `share` times the floor."""
    made = attention_gpu.row_of(case, offer)
    made["backend"] = "triton" if offer.kind == peers.OURS else None
    for measure in floor.MEASURES:
        floor_ms = floor.bytes_moved(case)[measure] / GBPS * 1e-6
        timed = floor.metrics(case, offer.pattern, measure, share * floor_ms, GBPS)
        made[measure] = {"ms": share * floor_ms, "low": 0.9, "high": 1.1, "queued_late": False, **timed}
    return made


def result(names: tuple[str, ...], share: float, dense_share: float = 1e3, peer_share: float = 10.0) -> dict:
    """A result as a run would have written it."""
    made = attention_gpu.started(Path("nowhere"), "a device", "bfloat16")
    made["overhead"] = {f"ours {each}": {"us": 20.0, "low": 19.0, "high": 22.0} for each in ("forward", "backward")}
    run = {"cases": [], "torch": "2.11.0", "triton": "3.6.0", "cuda": "13.0", "python": "3.12.3", "commit": "0" * 7}
    run |= {"rounds": 20, "copy_gbps": GBPS, "command": "python3 benchmarks/attention_gpu.py"}
    for name in names:
        case = cases.CASES[name]
        offers = [peers.ours(pattern) for pattern in case.patterns]
        rows = [row(case, offer, share) for offer in offers]
        for pattern in case.patterns:
            offer = peers.Offer(peers.FLEX, peers.PEER, pattern, peers.ours(pattern).make)
            rows.append(row(case, offer, peer_share))
        dense = peers.Offer("dense, SDPA cuDNN", peers.DENSE, case.dense, peers.ours(case.dense).make)
        rows.append(row(case, dense, dense_share))
        if case.extrapolate_from:
            far = dict.fromkeys(floor.MEASURES, 1.0)
            rows[-1] |= {"extrapolated_from": case.extrapolate_from[-1], "measured": {"262144": far}}
        figures.compare(rows)
        attention_gpu.merge(made, run, name, rows)
    return made


def states(made: dict) -> dict[str, str]:
    return {figure.text: figure.state for figure in figures.figures(made)}


def test_figures_are_met_and_missed() -> None:
    names = tuple(cases.CASES)
    memory_bound = [text for text in states(result(names, 1.0)) if "/ floor" in text]
    assert len(memory_bound) == 5
    for share, expected in ((1.1, "aim met"), (1.29, "met"), (3.0, "missed")):
        found = states(result(names, share))
        assert found["Strided on S1, S1w, S3, forward / floor"] == expected
    assert states(result(names, 3.0))["Local on S3, forward; backward / floor"] == "missed"
    some = states(result(names, 1.75))["Strided backward / floor: S1 and S1w; S3"]
    assert some == "missed: S1 bwd 1.75; S1w bwd 1.75"


def test_figures_against_peers_and_dense() -> None:
    names = tuple(cases.CASES)
    against = "every pattern on every case, against the best peer for that very pattern"
    assert states(result(names, 1.0, peer_share=1.3))[against] == "aim met"
    assert states(result(names, 1.0, peer_share=1.0))[against] == "met"
    assert states(result(names, 1.0, peer_share=0.9))[against] == "missed"
    win = "shortest T at which Local | Strided (stride ~ sqrt(T)) beats the best dense kernel, fwd+bwd"
    assert states(result(names, 1.0, dense_share=1.1))[win] == "aim met"
    assert states(result(names, 1.0, dense_share=0.9))[win] == "missed"
    fixed = "Fixed(128, 32) merged, S1, against the best dense kernel, both ways"
    assert states(result(("S1",), 1.0, dense_share=3.0))[fixed] == "met"


def test_the_shortest_win_ends_where_dense_wins_once() -> None:
    def point(length: int, times: float) -> dict:
        versus = {"both": {"times": times, "what": "dense"}}
        union = "Local(8) | Strided(8)"
        return {"scaling": True, "kind": "ours", "pattern": union, "length": length, "vs_dense": versus}

    lengths = [512, 1024, 2048, 4096]
    assert figures.shortest_win([point(*at) for at in zip(lengths, (2, 0.9, 2, 3), strict=True)]) == 2048
    assert figures.shortest_win([point(*at) for at in zip(lengths, (2, 2, 2, 0.5), strict=True)]) == float("inf")
    assert figures.shortest_win([]) is None


def test_what_is_not_measured_is_not_met() -> None:
    found = states(result(("S1",), 1.0))
    assert found["Strided on S1, S1w, S3, forward / floor"] == "not measured"
    assert found["plan + launch overhead on the CPU side, warm"] == "aim met"
    failed = result(("S1",), 1.0)
    del failed["rows"][0]["forward"]
    against = "every pattern on every case, against the best peer for that very pattern"
    assert states(failed)[against] == "not measured"
    assert figures.Reading("x", float("nan"), 1, 2).state == "missed"


def test_page_begins_with_the_figures(tmp_path: Path) -> None:
    made = result(tuple(cases.CASES), 1.0)
    made["rows"][1]["reason"] = "out of memory"
    attention_gpu.write(made, tmp_path / "gpu", draw=True)
    text = (tmp_path / "gpu.md").read_text()
    assert text.index("| figure | must | aim | measured | |") < text.index("## S1:") < text.index("## S7:")
    assert "gpu.png" in text
    assert "out of memory" in text
    assert "scaled by the square of the length from T = 262,144" in text
    assert (tmp_path / "gpu.png").stat().st_size > 10_000
    assert json.loads((tmp_path / "gpu.json").read_text()) == made
    assert len(page.summary(made)) <= 60


def test_a_case_that_runs_again_replaces_its_rows() -> None:
    made = result(("S1", "S2"), 1.0)
    again = {**made["runs"][0], "cases": [], "commit": "1" * 7}
    attention_gpu.merge(made, again, "S2", [])
    assert [run["cases"] for run in made["runs"]] == [["S1"], ["S2"]]
    assert {row["case"] for row in made["rows"]} == {"S1"}
    attention_gpu.merge(made, again, "S1", [])
    assert [run["commit"] for run in made["runs"]] == ["1" * 7]


def test_names_of_cases() -> None:
    assert cases.chosen("all") == cases.ORDER
    assert set(cases.ORDER) == {*cases.CASES, cases.OVERHEAD}
    assert cases.chosen("S3,S1") == ("S1", "S3")
    assert cases.chosen("scaling") == cases.SCALING
    with pytest.raises(ValueError, match="unknown cases S9"):
        cases.chosen("S9")


def test_floor_counts_shared_keys_once() -> None:
    case = cases.Case("x", 2, 8, 100, 16, (), kv_heads=2, v_head_dim=32)
    q, k, v, o = 2 * 8 * 100 * 16, 2 * 2 * 100 * 16, 2 * 2 * 100 * 32, 2 * 8 * 100 * 32
    assert floor.bytes_moved(case) == {
        m: n * 2 * (q + k + v + o) for m, n in zip(floor.MEASURES, (1, 2, 3), strict=True)
    }
    assert floor.operations(case, ls.Causal())["forward"] == 2 * (16 + 32) * 2 * 8 * 5050


@pytest.mark.parametrize(
    "pattern",
    [ls.Local(128), ls.Strided(96), ls.Local(200) | ls.Strided(200), ls.Fixed(128, 32), ls.LogSparse(), ls.bigbird(64)],
    ids=str,
)
def test_block_masks_are_those_of_pytorch(pattern: ls.Pattern) -> None:
    length, heads = 640, 2
    rule = block_masks.rule_of(pattern, heads, length, "cpu")
    head, j = torch.arange(heads)[:, None, None], torch.arange(length)
    allowed = rule.mask_mod(head, head, j[:, None], j).expand(heads, length, length)
    assert torch.equal(allowed, pattern.mask(length, heads=heads))
    ours = block_masks.block_mask(rule, length, "cpu")
    theirs = create_block_mask(rule.mask_mod, None, rule.heads if rule.heads > 1 else None, length, length, "cpu")
    assert torch.equal(ours.to_dense(), theirs.to_dense())
    for name in ("kv_indices", "full_kv_indices", "q_indices", "full_q_num_blocks"):
        assert torch.equal(getattr(ours, name), getattr(theirs, name))


@pytest.mark.parametrize("pattern", [ls.Local(8) | ls.Strided(8), ls.bigbird(8)], ids=str)
def test_recomputed_rows_find_what_is_wrong(pattern: ls.Pattern) -> None:
    case = cases.Case("x", 2, 4, 96, 16, (pattern,), kv_heads=2, v_head_dim=24)
    inputs = cases.Inputs.of(case, "cpu", torch.float32)
    contender = peers.ours(pattern).make(inputs)
    with torch.no_grad():
        _, lse = ls.attention(inputs.q, inputs.k, inputs.v, pattern, return_lse=True)
    results = contender.results(lse)
    errors = correctness.against_rows(pattern, inputs, results)
    assert set(errors) == {"out", "lse", "dq", "dk", "dv"}
    assert max(errors.values()) < 1e-4
    for name in ("out", "dq", "dk", "dv"):
        tensor = getattr(results, name)
        tensor = tensor + (torch.randperm(96)[:, None] < 72) * 0.5  # wrong rows among those that are drawn
        wrong = correctness.Results(**{**vars(results), name: tensor})
        assert not correctness.right(correctness.against_rows(pattern, inputs, wrong))
    assert not correctness.right({"out": float("nan")})


def test_views_compute_the_strided_pattern() -> None:
    case = cases.Case("x", 2, 3, 96, 16, (), v_head_dim=24)
    inputs = cases.Inputs.of(case, "cpu", torch.float32)
    ours = peers.ours(ls.Strided(8)).make(inputs).results()

    def heads_last(q: torch.Tensor, k: torch.Tensor, v: torch.Tensor) -> torch.Tensor:
        q, k, v = (x.transpose(1, 2) for x in (q, k, v))
        return torch.nn.functional.scaled_dot_product_attention(q, k, v, is_causal=True).transpose(1, 2)

    def heads_first(q: torch.Tensor, k: torch.Tensor, v: torch.Tensor) -> torch.Tensor:
        return torch.nn.functional.scaled_dot_product_attention(q, k, v, is_causal=True)

    for attend, last in ((heads_last, True), (heads_first, False)):
        view = peers.residue_classes(case, 8, heads_last=last)
        found = peers.Contender(attend, inputs, view).results()
        assert max(correctness.against(found, ours).values()) < 1e-4
        assert found.dq.shape == inputs.q.shape


def test_the_whole_way_on_a_cpu(monkeypatch: pytest.MonkeyPatch, tmp_path: Path, capsys: pytest.CaptureFixture) -> None:
    far = cases.Case("T128", 1, 2, 128, 16, (ls.Strided(8),), extrapolate_from=(32, 64), scaling=True)
    wide = cases.Case("S2", 1, 2, 64, 8, (ls.Strided(8),), v_head_dim=16)
    monkeypatch.setattr(attention_gpu, "CASES", {"S1": TINY, "S2": wide, "T128": far})
    monkeypatch.setattr(attention_gpu, "overhead", partial(attention_gpu.overhead, calls=3, repeats=2))
    options = argparse.Namespace(budget_seconds=600.0, output=tmp_path / "gpu", commit="abcdef0", rounds=2)
    assert attention_gpu.run(options, ("S1", "S2", "T128", cases.OVERHEAD), "cpu") == 0
    made = json.loads((tmp_path / "gpu.json").read_text())
    assert made["runs"][0]["cases"] == ["S1", "S2", "T128", cases.OVERHEAD]
    ours = [row for row in made["rows"] if row["kind"] == "ours"]
    assert [row["pattern"] for row in ours] == ["Strided(8)", "Local(8)", "Strided(8)", "Strided(8)"]
    for row in ours:
        assert row["backend"]
        assert row["errors"].keys() == {"out", "lse", "dq", "dk", "dv"}
        assert row["forward"]["rounds"] == 2
        assert row["backward"]["share"] > 0
        assert row["vs_dense"]["both"]["times"] > 0
    # No cuDNN on a CPU: a row with the reason, and no times.
    refused = [row for row in made["rows"] if row["what"] == "dense, SDPA cuDNN"]
    assert all(row["reason"] and "forward" not in row for row in refused)
    assert [row for row in made["rows"] if row["what"].endswith("q and k padded to 16") and "forward" in row]
    dense = next(row for row in made["rows"] if row["case"] == "T128" and row["what"] == "dense, SDPA flash")
    assert dense["extrapolated_from"] == 64
    assert set(dense["measured"]) == {"32", "64"}
    assert dense["both"]["ms"] == pytest.approx(dense["measured"]["64"]["both"] * 4)
    printed = capsys.readouterr().out
    assert printed.index("out ") < printed.index("fwd ms")


def test_what_is_wrong_is_not_timed(monkeypatch: pytest.MonkeyPatch, bench: attention_gpu.Bench) -> None:
    true = ls.attention

    def one_key_short(
        q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, pattern: ls.Pattern, **settings: object
    ) -> object:
        shorter = ls.Local(7) if pattern == ls.Local(8) and settings.get("backend") is None else pattern
        return true(q, k, v, shorter, **settings)

    monkeypatch.setattr(ls, "attention", one_key_short)
    rows = [row for row in attention_gpu.measure_case(bench, TINY) if row["kind"] == "ours"]
    assert ["forward" in row for row in rows] == [True, False]
    assert "wrong" in rows[1]["reason"]
    assert len(bench.failed) == 1


def test_no_compiling_when_the_time_is_short(bench: attention_gpu.Bench) -> None:
    bench.deadline = 0.0
    offer = peers.Offer(peers.FLEX, peers.PEER, ls.Local(8), peers.ours(ls.Local(8)).make, compiles=True)
    made = attention_gpu.row_of(TINY, offer)
    assert attention_gpu.attempt(bench, made, offer, lambda: pytest.fail("tried")) is None
    assert made["reason"] == "not run: no time left to compile it"
