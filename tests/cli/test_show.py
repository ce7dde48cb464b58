"""``longstride show`` as a user types it."""

from pathlib import Path

import pytest
from PIL import Image
from typer.testing import CliRunner, Result

import longstride as ls
from longstride.cli import app


def show(*arguments: object) -> Result:
    return CliRunner().invoke(app, ["show", *map(str, arguments)])


def is_png(path: Path) -> bool:
    with Image.open(path) as picture:
        return picture.format == "PNG"


def test_pattern_in_terminal_and_as_png(tmp_path: Path) -> None:
    png = tmp_path / "p.png"
    result = show("Local(4) | Strided(4)", "--length", 16, "--output", png)
    assert result.exit_code == 0, result.output
    assert result.output.startswith("Local(4) | Strided(4)\n")
    # Distances 0 to 3 of 16 positions, and 4, 8 and 12.
    assert f"{(16 + 15 + 14 + 13) + (12 + 8 + 4)} of 136 pairs" in result.output
    assert f"picture     {png}" in result.output
    assert is_png(png)


def test_default_length_shows_the_pattern_repeat(tmp_path: Path) -> None:
    for text, length in (
        ("Local(3)", 32),
        ("Strided(20)", 80),
        ("Local(4096)", 512),
        ("RandomBlocks(8, 2, seed=99)", 32),
    ):
        assert f"length {length}:" in show(text, "--output", tmp_path / "p.png").output


def test_heads(tmp_path: Path) -> None:
    result = show("per_head(Local(4), Strided(4))", "--heads", 8, "--length", 8, "--output", tmp_path / "p.png")
    assert result.exit_code == 0, result.output
    assert "heads 0, 1, 2, 3" in result.output


def test_saved_model(tmp_path: Path) -> None:
    config = ls.SparseTransformerConfig(
        hidden_size=32,
        num_hidden_layers=3,
        num_attention_heads=4,
        max_position_embeddings=64,
        patterns=["Local(16)", "Strided(16)"],
    )
    config.save_pretrained(tmp_path)
    result = show(tmp_path, "--output", tmp_path / "p.png")
    assert result.exit_code == 0, result.output
    layers = [line.split()[-1] for line in result.output.splitlines() if line.startswith("layer")]
    assert layers == ["Local(16)", "Strided(16)", "Local(16)"]
    total = sum(parameter.numel() for parameter in ls.SparseTransformerForCausalLM(config).parameters())
    assert f"{total:,}" in result.output
    assert is_png(tmp_path / "p.png")


def test_recipe(tmp_path: Path) -> None:
    recipe = tmp_path / "recipe.yaml"
    recipe.write_text("model:\n  num_hidden_layers: 2\n  patterns: ['Fixed(16, 4)']\n")
    from_file = show(recipe, "--output", tmp_path / "p.png")
    assert from_file.exit_code == 0, from_file.output
    assert from_file.output.count("Fixed(16, 4)") == 2
    # The folder of a run holds its recipe under this name.
    assert show(tmp_path, "--output", tmp_path / "p.png").output == from_file.output


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (["Local(4) | Strode(4)"], "did you mean Strided?"),
        (["Strided(0)"], "stride must be at least 1"),
        (["Local(4)", "--length", 0], "length=0: a picture needs at least 1 position"),
        (["Local(4)", "--length", 1_000_000], "length=1,000,000: a picture shows at most 1,024 positions"),
        (["per_head(Local(4), Strided(4))", "--heads", 3], "3 heads"),
        (["no/such/folder"], "no/such/folder: there is no such file or folder"),
        (["none.yaml"], "none.yaml: there is no such file or folder"),
    ],
)
def test_one_clear_error(arguments: list[object], words: str, tmp_path: Path) -> None:
    result = show(*arguments, "--output", tmp_path / "p.png")
    assert result.exit_code == 2
    assert result.output.startswith("error: ")
    assert words in result.output
    assert "Traceback" not in result.output
    assert not (tmp_path / "p.png").exists()


def test_unknown_pattern_points_at_its_place(tmp_path: Path) -> None:
    lines = show("Local(4) | Strode(4)", "--output", tmp_path / "p.png").output.splitlines()
    assert lines[1].index("Strode") == lines[2].index("^")


def test_output_and_folder_that_cannot_be(tmp_path: Path) -> None:
    assert "pictures are PNG files" in show("Local(4)", "--output", "p.pdf").output
    assert "neither a run (recipe.yaml) nor a saved model (config.json)" in show(tmp_path).output
    (tmp_path / "config.json").write_text("{}")
    ls.SparseTransformerConfig(max_position_embeddings=64).save_pretrained(tmp_path)
    assert "a model knows its own heads (8)" in show(tmp_path, "--heads", 4).output
