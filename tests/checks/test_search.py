"""The search for a schedule, on models of which it is known what each layer needs."""

import dataclasses
import json

import numpy as np
import pytest
import torch
import yaml
from tests.copier import CONTEXT, copier, dense_copier
from typer.testing import CliRunner

from longstride.checks import (
    Search,
    Subject,
    Tolerance,
    attending,
    default_candidates,
    read_schedule,
    suggest_schedule,
    write_schedule,
)
from longstride.checks import search as search_module
from longstride.cli import app
from longstride.errors import ArgumentError, DataError, PatternError, UnsupportedError
from longstride.models import SparseTransformerConfig, SparseTransformerForCausalLM
from longstride.patterns import BlockSparse, Causal, Local, Pattern, parse
from longstride.training import evaluate

# Whoever sees 30 bytes back knows what comes.
REPEATING = np.tile(np.random.default_rng(0).permutation(31).astype(np.uint8), 60)
# In this order, so that no order of theirs helps.
CANDIDATES = tuple(map(parse, ("Local(16)", "Local(31)", "Local(2)", "Local(40)")))
SEARCH = Search(context=60, tolerance=Tolerance(0.05), candidates=CANDIDATES, windows=4)


@pytest.fixture(scope="module")
def dense() -> Subject:
    return Subject(dense_copier(), None, CONTEXT)


def test_each_layer_gets_the_sparsest_pattern_that_it_works_with(dense):
    """The first layer reads the byte before, the second one the one 30 back: nothing less will do, and no more."""
    suggestion = suggest_schedule(dense, REPEATING, SEARCH)
    assert [str(pattern) for pattern in suggestion.patterns] == ["Local(2)", "Local(31)"]
    assert suggestion.before == (Causal(), Causal())
    assert suggestion.pairs == (Local(2).pairs(60), Local(31).pairs(60))
    assert suggestion.pairs_left == pytest.approx((Local(2).pairs(60) + Local(31).pairs(60)) / (2 * Causal().pairs(60)))
    alone = {(cost.layer, str(cost.pattern)): cost for cost in suggestion.costs}
    assert len(alone) == 8
    assert alone[1, "Local(16)"].rise_bits > 1
    assert alone[1, "Local(31)"].rise_bits < 0.05
    assert alone[0, "Local(2)"].rise_bits < 0.05
    assert alone[0, "Local(2)"].pairs_saved == Causal().pairs(60) - Local(2).pairs(60)
    assert suggestion.rise_bits <= suggestion.tolerance_bits == 0.05


def test_what_is_reported_is_the_loss_of_the_whole_schedule_on_other_windows(dense, monkeypatch):
    measured = []
    bits_of = search_module._Yardstick.bits

    def recorded(self, schedule):
        bits = bits_of(self, schedule)
        measured.append((tuple(span.start for span in self.windows), schedule, bits))
        return bits

    monkeypatch.setattr(search_module._Yardstick, "bits", recorded)
    noisy = np.random.default_rng(1).integers(0, 256, 3000, dtype=np.uint8)
    suggestion = suggest_schedule(dense, noisy, dataclasses.replace(SEARCH, tolerance=Tolerance(30.0)))
    starts = {windows for windows, _, _ in measured}
    assert len(starts) == 2
    searched, confirmed = measured[0][0], measured[-1][0]
    assert not set(searched) & set(confirmed)
    assert (len(searched), len(confirmed)) == (4, 4)
    # The last measurement is of the schedule itself, of all of it, and none other of it counts.
    assert measured[-1][1] == suggestion.patterns
    with attending(dense, suggestion.patterns) as tried:
        windows = [noisy[start : start + 61] for start in confirmed]
        bits = [evaluate(tried.predictor(), window, context=60, min_context=30).bits_per_byte for window in windows]
    assert suggestion.bits == pytest.approx(np.mean(bits), abs=1e-5)


def test_nothing_within_the_tolerance_changes_nothing(dense):
    short = dataclasses.replace(SEARCH, candidates=(Local(1),), tolerance=Tolerance(0.01))
    suggestion = suggest_schedule(dense, REPEATING, short)
    assert suggestion.patterns == suggestion.before
    assert suggestion.rise_bits == 0
    assert suggestion.pairs_left == 1
    assert "0 of 2 layers changed; 100.0% of the pairs" in str(suggestion)


def test_change_that_only_suits_the_searched_windows_is_undone(dense, monkeypatch):
    """Windows that the search sees repeat after 10 bytes, which a window of 16 is enough for; the others after 31."""
    pieces = []
    for number in range(8):
        period = 10 if number % 2 == 0 else 31
        pieces.append(np.tile(np.random.default_rng(number).permutation(200)[:period], 7)[:61])
    text = np.concatenate(pieces).astype(np.uint8)
    tried = dataclasses.replace(SEARCH, candidates=(Local(2), Local(16)))
    asked = []
    bits_of = search_module._Yardstick.bits
    monkeypatch.setattr(
        search_module._Yardstick, "bits", lambda self, schedule: (asked.append(schedule), bits_of(self, schedule))[1]
    )
    suggestion = suggest_schedule(dense, text, tried)
    # As the search left it, it was measured on the other windows, and that was not the end.
    assert (Local(2), Local(16)) in asked
    assert suggestion.patterns[1] == Causal()
    assert suggestion.rise_bits <= 0.05
    # Of a schedule that is left, these windows no longer show what others would: they have chosen, too.
    assert suggestion.undone == 2
    assert str(suggestion).endswith("With 2 changes more it was above that there, so that they were undone.")
    left = dataclasses.replace(suggestion, patterns=(Local(2), Causal()), undone=1)
    assert "so that they were undone. This text has chosen, too, and the schedule looks a little better" in str(left)


def test_layers_alone_are_not_taken_for_all_together(monkeypatch):
    """Each of two layers may go, but not both: the search finds out by measuring."""
    subject = Subject(copier("Causal()"), None, CONTEXT)

    def bits(self, schedule: tuple[Pattern, ...] | None) -> np.ndarray:
        changed = 0 if schedule is None else sum(pattern == Local(2) for pattern in schedule)
        return np.full(len(self.windows), 1.0 if changed == 2 else 0.5)

    monkeypatch.setattr(search_module._Yardstick, "bits", bits)
    monkeypatch.setattr(search_module, "schedule_of", lambda _: (Causal(), Causal()))
    suggestion = suggest_schedule(subject, REPEATING, dataclasses.replace(SEARCH, candidates=(Local(2),)))
    assert sorted(map(str, suggestion.patterns)) == ["Causal()", "Local(2)"]
    assert suggestion.bits == 0.5


def test_own_models_start_from_their_own_patterns():
    """A layer is only offered what has fewer pairs than it has already."""
    subject = Subject(copier("Local(40)"), None, CONTEXT)
    suggestion = suggest_schedule(subject, REPEATING, SEARCH)
    assert [str(pattern) for pattern in suggestion.patterns] == ["OnlyPrevious()", "Local(31)"]
    assert {(cost.layer, str(cost.pattern)) for cost in suggestion.costs} == {
        (1, text) for text in ("Local(16)", "Local(31)", "Local(2)")
    }


def test_model_that_attends_in_a_way_of_its_own_is_refused(dense, monkeypatch):
    monkeypatch.setattr(search_module, "schedule_of", lambda _: (Local(2), Local(2)))
    with pytest.raises(UnsupportedError, match=r"along Local\(2\), which its configuration names, this model's loss"):
        suggest_schedule(dense, REPEATING, SEARCH)


def test_model_with_a_memory_is_offered_what_it_can_have(monkeypatch):
    """Its memory moves on, so it has no first tokens; whoever asks for them is told before anything is measured."""
    config = SparseTransformerConfig(
        hidden_size=16, num_hidden_layers=1, num_attention_heads=2, max_position_embeddings=96, memory=32,
        patterns=["Local(32)"], block="modern",
    )  # fmt: skip
    subject = Subject(SparseTransformerForCausalLM(config).eval(), None, 64)
    search = Search(context=64, tolerance=Tolerance(0.1), windows=1)
    suggestion = suggest_schedule(subject, REPEATING, search)
    tried = {str(cost.pattern) for cost in suggestion.costs}
    assert tried == {"Local(4)", "Local(16)", "Local(8) | Strided(8)"}
    monkeypatch.setattr(search_module._Yardstick, "bits", None)
    with pytest.raises(UnsupportedError, match=r"Local\(4\) \| Global\(4\) names positions counted from the beginning"):
        suggest_schedule(subject, REPEATING, dataclasses.replace(search, candidates=(parse("Local(4) | Global(4)"),)))


def test_tables(dense):
    lines = str(suggest_schedule(dense, REPEATING, SEARCH)).splitlines()
    assert lines[0] == "bits per byte more with one layer alone along"
    assert lines[1].split() == ["layer", "Local(16)", "Local(31)", "Local(2)", "Local(40)"]
    assert lines[6].split() == ["0", "Local(2)", "6.5%", "changed"]
    assert lines[9].startswith("2 of 2 layers changed; 41.4% of the pairs at 60 bytes are left.")
    assert lines[10].endswith("allowed was +0.0500.")
    assert len(lines) == 11


def test_default_candidates_are_causal_and_distinct_at_any_context():
    for context in (1, 2, 7, 64, 4096):
        candidates = default_candidates(context)
        assert len(set(candidates)) == len(candidates) > 0
        assert all(pattern.is_causal for pattern in candidates)


@pytest.mark.parametrize(("text", "bits"), [("0.02", 0.02), ("1%", 0.03), (" 2.5 % ", 0.075), (".5", 0.5), ("0", 0)])
def test_tolerances(text, bits):
    assert Tolerance.parse(text).in_bits(3.0) == pytest.approx(bits)


@pytest.mark.parametrize("text", ["", "much", "-1", "1%%", "1e9x", "nan", "inf"])
def test_tolerances_that_are_none(text):
    with pytest.raises(ArgumentError, match=f"--tolerance {text}: give bits a token, such as 0.02, or a share"):
        Tolerance.parse(text)


def test_schedule_comes_back_from_its_file(tmp_path, dense):
    table = BlockSparse(torch.tensor([[True, False], [True, True]]), block=32) & Causal()
    write_schedule(tmp_path / "sub" / "schedule.yaml", [table, Local(3)], {"bits": 1.5})
    assert read_schedule(tmp_path / "sub" / "schedule.yaml", dense) == (table, Local(3))
    assert yaml.safe_load((tmp_path / "sub" / "schedule.yaml").read_text())["measured"] == {"bits": 1.5}
    with pytest.raises(ArgumentError, match="the schedule cannot be written"):
        write_schedule(tmp_path / "sub" / "schedule.yaml" / "x", [Local(3)], {})


def test_refusals(dense):
    with pytest.raises(DataError, match="121 bytes are too few: the search needs two windows of 60"):
        suggest_schedule(dense, REPEATING[:121], SEARCH)
    with pytest.raises(ArgumentError, match="--context 65: it must be at most the model's, 64"):
        suggest_schedule(dense, REPEATING, dataclasses.replace(SEARCH, context=65))
    with pytest.raises(PatternError, match=r"Full\(\): this pattern lets a token attend to later ones"):
        suggest_schedule(dense, REPEATING, dataclasses.replace(SEARCH, candidates=(parse("Full()"),)))
    for name in ("context", "windows", "batch_size"):
        with pytest.raises(ArgumentError, match=f"--{name.replace('_', '-')} 0: it must be at least 1"):
            dataclasses.replace(SEARCH, **{name: 0})
    with pytest.raises(ArgumentError, match=r"tolerance=-1\.0: it must be a number of at least 0"):
        Tolerance(-1.0)


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    path = tmp_path_factory.mktemp("dense")
    dense_copier().save_pretrained(path)
    (path / "text.txt").write_bytes(REPEATING.tobytes())
    return path


def suggest(*arguments: object):
    return CliRunner().invoke(app, ["suggest", *map(str, arguments)])


def test_command_writes_a_schedule_that_evaluate_and_sparsify_take(folder, tmp_path):
    patterns = [word for pattern in CANDIDATES for word in ("--pattern", pattern)]
    asked = ("--data", folder / "text.txt", "--tolerance", "0.05", "--windows", 4, "--context", 60, *patterns)
    result = suggest(folder, *asked)
    assert result.exit_code == 0, result.output
    path = folder / "checks" / "schedule.yaml"
    assert f"schedule    {path}" in result.output
    written = yaml.safe_load(path.read_text())
    assert written["patterns"] == ["Local(2)", "Local(31)"]
    assert written["measured"]["rise_bits"] <= 0.05
    import longstride

    assert longstride.sparsify(dense_copier(), written["patterns"]).config.longstride["patterns"] == written["patterns"]
    assert written["measured"]["undone"] == 0
    again = suggest(folder, *asked, "--json", "--output", tmp_path / "other.yaml")
    assert json.loads(again.output)["measured"] == written["measured"]
    tried = CliRunner().invoke(
        app, ["evaluate", str(folder), "--data", str(folder / "text.txt"), "--schedule", str(path), "--json"]
    )
    assert json.loads(tried.output)["otherwise"]["patterns"] == written["patterns"]


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (("--tolerance", "much"), "--tolerance much: give bits a token"),
        (("--pattern", "Local("), "expected a pattern, found 'the end' at position 6"),
        (("--windows", 0), "--windows 0: it must be at least 1"),
        (("--context", 65), "--context 65: it must be at least 1 and at most the model's, 64"),
        (("--max-bytes", 100), "100 bytes are too few: the search needs two windows of 64"),
    ],
)
def test_command_refuses(folder, arguments, words):
    result = suggest(folder, "--data", folder / "text.txt", *arguments)
    assert result.exit_code == 2
    assert f"error: {words}" in result.output


def test_what_was_found_is_said_even_if_it_cannot_be_written(folder, tmp_path):
    (tmp_path / "file").write_text("")
    asked = ("--windows", 1, "--pattern", "Local(2)", "--output", tmp_path / "file" / "schedule.yaml")
    result = suggest(folder, "--data", folder / "text.txt", *asked)
    assert result.exit_code == 2
    assert "the schedule cannot be written (File exists); choose another file" in result.output
    assert "of 2 layers changed" in result.output


def test_command_without_a_model_or_data(folder, tmp_path):
    assert f"error: {tmp_path} holds no model" in suggest(tmp_path).output
    assert "has no data of its own: name some with --data" in suggest(folder).output
