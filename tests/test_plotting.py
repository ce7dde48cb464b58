"""Pictures against the patterns' own masks, and against pixels."""

import json
from pathlib import Path

import matplotlib.colors
import pytest
import torch
from PIL import Image

import longstride as ls
from longstride.plotting import (
    draw_terminal,
    plot_family,
    plot_loss,
    plot_loss_by_context,
    plot_pattern,
    plot_retrieval,
    plot_schedule,
)
from longstride.plotting.cells import LONGEST_PICTURE, part_cells, reach_cells
from longstride.plotting.style import FORBIDDEN, PARTS, REACH

UNION = ls.Local(8) | ls.Strided(8)
PATTERNS = (UNION, ls.Fixed(8, 2), ls.LogSparse(), ls.longformer(6, 2), ls.RandomBlocks(6, 2), ls.Dilated(3, 4))


def pixels(png: Path, colour: str) -> int:
    """How many pixels have exactly this colour."""
    wanted = tuple(round(255 * value) for value in matplotlib.colors.to_rgb(colour))
    with Image.open(png) as picture:
        return sum(count for count, seen in picture.convert("RGB").getcolors(1 << 24) if seen == wanted)


def width(png: Path) -> int:
    with Image.open(png) as picture:
        return picture.width


@pytest.mark.parametrize("pattern", PATTERNS, ids=str)
def test_cells_are_the_mask(pattern: ls.Pattern) -> None:
    (group,) = part_cells(pattern, 43)
    assert torch.equal(group.cells > 0, pattern.mask(43))
    assert group.cells.max() <= len(group.labels)
    assert group.pairs == pattern.pairs(43)


def test_cells_of_heads_that_differ() -> None:
    pattern = ls.per_head(ls.Local(5), ls.Strided(5))
    groups = part_cells(pattern, 23, num_heads=4)
    assert sorted(head for group in groups for head in group.heads) == [0, 1, 2, 3]
    masks = pattern.mask(23, heads=4)
    for group in groups:
        for head in group.heads:
            assert torch.equal(group.cells > 0, masks[head])


def test_reach_counts_layers() -> None:
    needed = reach_cells([ls.Local(8), ls.Strided(8)], 40)
    assert torch.equal(needed == 1, ls.Local(8).mask(40))
    assert torch.equal(needed > 0, torch.ones(40, 40, dtype=torch.bool).tril())
    # A window alone adds window - 1 positions a layer.
    assert torch.equal(reach_cells([ls.Local(8)] * 2, 40) > 0, ls.Local(15).mask(40))


def test_terminal_picture_exactly() -> None:
    assert draw_terminal(ls.Local(2), 4, ascii_only=True).splitlines()[:6] == [
        "Local(2)",
        "",
        "  aa",
        "  aaaa",
        "  . aaaa",
        "  . . aaaa",
    ]
    assert draw_terminal(ls.Local(2), 4, ascii_only=True).isascii()
    assert draw_terminal(ls.Local(2), 4).splitlines()[2:6] == ["  ██", "  ████", "  · ████", "  · · ████"]


@pytest.mark.parametrize("length", [1, 7, 32, 33, 100, LONGEST_PICTURE])
def test_terminal_picture_shows_every_block_that_holds_a_pair(length: int) -> None:
    step = -(-length // 32)
    lines = draw_terminal(UNION, length, ascii_only=True).splitlines()
    rows = [line.removeprefix("  ") for line in lines[2 : 2 + -(-length // step)]]
    drawn = torch.tensor([[row[2 * k : 2 * k + 2] in ("aa", "bb") for k in range(len(rows))] for row in rows])
    mask = UNION.mask(length).float()[None, None]
    expected = torch.nn.functional.max_pool2d(mask, step, ceil_mode=True)[0, 0] > 0
    assert torch.equal(drawn, expected)
    assert f"length {length}: {UNION.pairs(length):,} of {length * (length + 1) // 2:,} pairs" in lines[-1]


def test_terminal_shows_the_part_that_fills_most_of_a_cell() -> None:
    picture = draw_terminal(ls.Local(64) | ls.Strided(64), 1024, ascii_only=True)
    # Each cell is 32 positions wide: the window fills cells on the diagonal, the strides run further out.
    last_row = picture.splitlines()[33]
    assert last_row.endswith("aa")
    assert "bb" in last_row


def test_terminal_legend_names_every_part() -> None:
    (group,) = part_cells(UNION, 40)
    picture = draw_terminal(UNION, 40)
    assert len(group.labels) == 2
    assert all(label in picture for label in group.labels)


def test_terminal_names_heads() -> None:
    picture = draw_terminal(ls.per_head(ls.Local(4), ls.Strided(4)), 12, num_heads=4)
    assert "heads 0, 1" in picture
    assert "heads 2, 3" in picture


def test_terminal_counts_every_head() -> None:
    pattern = ls.per_head(ls.Local(4), ls.Local(4), ls.Strided(4))
    pairs = pattern.pairs(12)
    assert f"length 12: {pairs} of {3 * 78} pairs over 3 heads, {pairs / (3 * 78):.1%}" in draw_terminal(pattern, 12)


@pytest.mark.parametrize(("length", "words"), [(0, "at least 1"), (-3, "at least 1"), (LONGEST_PICTURE + 1, "1,024")])
def test_length_of_a_picture(length: int, words: str, tmp_path: Path) -> None:
    with pytest.raises(ls.ArgumentError, match=words):
        draw_terminal(ls.Causal(), length)
    with pytest.raises(ls.ArgumentError, match=words):
        plot_pattern(ls.Causal(), length, tmp_path / "p.png")
    with pytest.raises(ls.ArgumentError, match=words):
        plot_schedule([ls.Causal()], length, tmp_path / "p.png")
    assert not (tmp_path / "p.png").exists()


def test_pattern_picture_has_its_parts_and_its_reach(tmp_path: Path) -> None:
    png = plot_pattern(UNION, 48, tmp_path / "new" / "folder" / "p.png")
    assert all(pixels(png, colour) > 500 for colour in (*PARTS[:2], *REACH[:2]))
    assert pixels(png, PARTS[2]) == 0


def test_area_painted_is_the_number_of_pairs(tmp_path: Path) -> None:
    # 100 positions: no lines between cells, so that the painted areas compare as the counts of pairs do.
    window = pixels(plot_family({"a": ls.Local(40)}, 100, tmp_path / "a.png"), PARTS[0])
    causal = pixels(plot_family({"a": ls.Causal()}, 100, tmp_path / "b.png"), PARTS[0])
    assert window / causal == pytest.approx(ls.Local(40).pairs(100) / ls.Causal().pairs(100), rel=0.03)


def test_a_line_one_position_wide_does_not_vanish(tmp_path: Path) -> None:
    length = LONGEST_PICTURE
    png = plot_family({"a": ls.Strided(512)}, length, tmp_path / "p.png")
    assert pixels(png, PARTS[0]) >= ls.Strided(512).pairs(length)


def test_schedule_picture(tmp_path: Path) -> None:
    schedule = [ls.Local(8), ls.Strided(8)] * 3
    png = plot_schedule(schedule, 40, tmp_path / "s.png")
    assert pixels(png, PARTS[0]) > 500
    # One layer reaches a window and two reach everything, so that no third shade is there.
    assert [pixels(png, colour) > 500 for colour in REACH] == [True, True, False, False]
    by_head = plot_schedule([ls.per_head(ls.Local(8), ls.Strided(8))], 40, tmp_path / "h.png", num_heads=4)
    # A panel for each half of the heads, and the reach.
    assert width(by_head) > 2.5 * width(plot_family({"a": ls.Local(8)}, 40, tmp_path / "f.png"))


def test_nothing_to_draw(tmp_path: Path) -> None:
    with pytest.raises(ls.ArgumentError, match="at least one layer"):
        plot_schedule([], 8, tmp_path / "s.png")
    with pytest.raises(ls.ArgumentError, match="at least one pattern"):
        plot_family({}, 8, tmp_path / "s.png")


def test_file_that_cannot_be_written(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    with pytest.raises(ls.ArgumentError, match=r"p\.png: the picture cannot be written.*choose another file"):
        plot_pattern(ls.Causal(), 8, tmp_path / "file" / "p.png")


def write_metrics(path: Path, steps: int, validate_every: int) -> Path:
    records = [{"step": step, "loss": 1.0, "bits_per_byte": 8 - step / steps} for step in range(1, steps + 1)]
    records += [
        {"step": step, "validation_bits_per_byte": 8.0} for step in range(validate_every, steps + 1, validate_every)
    ]
    path.write_text("".join(json.dumps(record) + "\n" for record in records) + '{"step": 9, "bits_')
    return path


@pytest.mark.parametrize("steps", [1, 2, 30, 300])
def test_loss_curve(steps: int, tmp_path: Path) -> None:
    metrics = write_metrics(tmp_path / "metrics.jsonl", steps, validate_every=max(1, steps // 3))
    png = plot_loss(metrics, tmp_path / "loss.png")
    assert pixels(png, PARTS[0]) > 20
    assert pixels(png, PARTS[1]) > 20


def test_loss_curve_without_validation(tmp_path: Path) -> None:
    metrics = write_metrics(tmp_path / "metrics.jsonl", steps=50, validate_every=100)
    png = plot_loss(metrics, tmp_path / "loss.png")
    assert pixels(png, PARTS[0]) > 20
    assert pixels(png, PARTS[1]) == 0


def test_loss_curve_of_nothing(tmp_path: Path) -> None:
    with pytest.raises(ls.DataError, match=r"none\.jsonl: the metrics cannot be read"):
        plot_loss(tmp_path / "none.jsonl", tmp_path / "loss.png")
    (tmp_path / "empty.jsonl").write_text("")
    with pytest.raises(ls.DataError, match="no bits per byte to draw"):
        plot_loss(tmp_path / "empty.jsonl", tmp_path / "loss.png")


def test_loss_by_context_has_a_line_for_each_schedule(tmp_path: Path) -> None:
    ranges = [(1, 1, 7.0, 0.1), (2, 3, 5.0, 0.1), (4, 7, 3.0, None)]
    alone = plot_loss_by_context({"as it is": ranges}, tmp_path / "alone.png")
    assert pixels(alone, PARTS[0]) > 50
    assert pixels(alone, PARTS[1]) == 0
    both = plot_loss_by_context({"as it is": ranges, "otherwise": [(1, 1, 8.0, None)] * 3}, tmp_path / "both.png")
    assert pixels(both, PARTS[1]) > 50
    with pytest.raises(ls.ArgumentError, match="at least one curve"):
        plot_loss_by_context({}, tmp_path / "none.png")


def test_retrieval_is_a_map_of_shares(tmp_path: Path) -> None:
    found, lost = [[1.0] * 3] * 2, [[0.0] * 3] * 2
    one = plot_retrieval({"as it is": found}, (64, 128), (0.0, 0.5, 1.0), tmp_path / "one.png")
    # Six cells full of the colour of what is always found.
    cells = pixels(one, REACH[0])
    assert cells > 6 * 2000
    assert pixels(one, FORBIDDEN) == 0
    two = plot_retrieval({"as it is": found, "otherwise": lost}, (64, 128), (0.0, 0.5, 1.0), tmp_path / "two.png")
    assert abs(pixels(two, FORBIDDEN) - pixels(two, REACH[0])) < 0.2 * cells
    with pytest.raises(ls.ArgumentError, match="at least one table"):
        plot_retrieval({}, (64,), (0.0,), tmp_path / "none.png")
