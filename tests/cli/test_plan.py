"""``longstride plan`` as a user types it."""

import pytest
from typer.testing import CliRunner, Result

import longstride as ls
from longstride.cli import app


def plan(*arguments: object) -> Result:
    return CliRunner().invoke(app, ["plan", *map(str, arguments)])


def row(result: Result, name: str) -> list[str]:
    """The words of one line of the table, its name left out."""
    assert result.exit_code == 0, result.output
    (line,) = (line for line in result.output.splitlines() if line.startswith(f"  {name}"))
    return line.removeprefix(f"  {name}").split()


def test_pairs_against_dense() -> None:
    pattern = ls.Local(16) | ls.Strided(16)
    result = plan(str(pattern), "--length", 500, "--heads", 4)
    pairs, dense = 4 * int(pattern.mask(500).sum()), 4 * 500 * 501 // 2
    assert row(result, "pairs, all heads") == [f"{pairs:,}", f"{dense:,}", f"{dense / pairs:.1f}", "times", "fewer"]
    for part in ls.plan(pattern, 500).parts:
        assert str(part) in result.output


def test_arithmetic_and_bytes() -> None:
    result = plan("Causal()", "--length", 100, "--heads", 2, "--head-dim", 8, "--batch", 3, "--dtype", "bf16")
    pairs = 3 * 2 * 100 * 101 // 2
    # A pair costs 8 multiplications and 8 additions for each of two products forward, five backward.
    assert row(result, "forward")[:2] == [f"{pairs * 2 * 16 / 1000:.2f}", "kFLOP"]
    assert row(result, "backward")[:2] == [f"{pairs * 5 * 16 / 1e6:.2f}", "MFLOP"]
    assert row(result, "q, k, v and o")[:2] == [f"{4 * 3 * 2 * 100 * 8 * 2 / 1000:.2f}", "kB"]


def test_fewer_queries_and_key_heads() -> None:
    result = plan("Local(8)", "--length", 1, "--kv-length", 100, "--heads", 4, "--kv-heads", 1, "--head-dim", 10)
    assert row(result, "pairs, all heads")[:2] == ["32", "400"]
    assert row(result, "q, k, v and o")[:2] == [f"{2 * (4 * 10 + 100 * 10) * 4 / 1000:.2f}", "kB"]


def test_heads_that_differ_are_listed_apart() -> None:
    result = plan("per_head(Local(8), Strided(8))", "--length", 64, "--heads", 8)
    assert "heads 0-3:" in result.output
    assert "heads 4-7:" in result.output


def test_not_causal_is_compared_with_all_pairs() -> None:
    assert row(plan("Local(4, lookahead=3)", "--length", 10, "--heads", 1), "pairs, all heads")[1] == "100"


def test_a_million_positions_at_once() -> None:
    pairs = 2**20 * 128 - 128 * 127 // 2
    assert row(plan("Local(128)", "--length", 2**20, "--heads", 1), "pairs, all heads")[0] == f"{pairs:,}"


def test_backend_and_reason() -> None:
    by_itself = plan("Local(8)", "--length", 64).output
    assert "backend torch: chosen (the fastest" in by_itself
    assert "backend reference: not chosen" in by_itself
    assert "backend reference: chosen (it was asked for)" in plan("Local(8)", "--backend", "reference").output


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (["Locale(3)"], "did you mean Local?"),
        (["Local(3)", "--length", 0], "--length 0: it must be at least 1"),
        (["Local(3)", "--heads", -1], "--heads -1: it must be at least 1"),
        (
            ["Local(3)", "--length", 8, "--kv-length", 4],
            "--kv-length 4: there must be at least as many keys as queries, 8",
        ),
        (["Local(3)", "--heads", 8, "--kv-heads", 3], "--kv-heads 3: they must divide the 8 query heads"),
        (["Local(3)", "--dtype", "int8"], "--dtype int8: it must be one of fp16, bf16, fp32, fp64"),
        (["Local(3)", "--device", "tpu"], "--device tpu: it must be one of cpu, cuda, mps"),
        (["Local(3)", "--backend", "fast"], "--backend fast: it must be one of triton, torch, flex, vendor, reference"),
        (["per_head(Local(4), Strided(4))", "--heads", 3], "3 heads"),
    ],
)
def test_one_clear_error(arguments: list[object], words: str) -> None:
    result = plan(*arguments)
    assert result.exit_code == 2
    assert result.output.startswith("error: ")
    assert words in result.output
    assert "Traceback" not in result.output
