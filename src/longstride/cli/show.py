"""``longstride show``: a picture of a pattern, or of the patterns over a model's layers."""

import re
import sys
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from longstride.errors import ArgumentError

if TYPE_CHECKING:
    from longstride.models import SparseTransformerConfig
    from longstride.patterns import Pattern

SHORTEST_DEFAULT, LONGEST_DEFAULT = 32, 512


def show(
    target: Annotated[
        str,
        typer.Argument(
            metavar="PATTERN|FOLDER|RECIPE",
            help="A pattern such as 'Local(8) | Strided(8)', the output folder of `longstride train`, the folder of a "
            "saved model, or a recipe (YAML).",
        ),
    ],
    length: Annotated[
        int | None, typer.Option(help="Positions to draw, at most 1,024. By default enough to see the pattern repeat.")
    ] = None,
    heads: Annotated[
        int | None, typer.Option(help="Number of heads, for patterns that differ by head; a model knows its own.")
    ] = None,
    output: Annotated[Path, typer.Option(help="The PNG to write.")] = Path("pattern.png"),
) -> None:
    """Draw which positions may attend to which.

    A pattern is drawn in the terminal and as a PNG: the allowed pairs, the parts that they are computed in, and what
    one and two layers reach. For a model: the patterns over its layers, and the number of its parameters.
    """
    if output.suffix.lower() != ".png":
        raise ArgumentError(f"--output {output}: pictures are PNG files; use a name that ends in .png")
    if Path(target).exists():
        _show_model(_configuration(Path(target)), length, heads, output)
    elif "(" not in target and (target.endswith((".yaml", ".yml")) or "/" in target):
        raise ArgumentError(f"{target}: there is no such file or folder")
    else:
        _show_pattern(target, length, heads, output)
    typer.echo(f"\npicture     {output}")


def _show_pattern(text: str, length: int | None, heads: int | None, output: Path) -> None:
    from longstride.patterns import parse
    from longstride.plotting import draw_terminal, plot_pattern

    pattern = parse(text)
    length = _length_to_see([pattern]) if length is None else length
    # A terminal that cannot print block characters gets letters.
    ascii_only = not (sys.stdout.encoding or "").lower().startswith("utf")
    if heads is not None and heads < 1:
        raise ArgumentError(f"--heads {heads}: it must be at least 1")
    typer.echo(draw_terminal(pattern, length, num_heads=heads, ascii_only=ascii_only))
    plot_pattern(pattern, length, output, num_heads=heads)


def _show_model(config: "SparseTransformerConfig", length: int | None, heads: int | None, output: Path) -> None:
    from longstride.models import layer_patterns, parameter_count
    from longstride.plotting import plot_schedule

    if heads is not None:
        raise ArgumentError(
            f"--heads {heads}: a model knows its own heads ({config.num_attention_heads}); leave it out"
        )
    patterns = layer_patterns(config)
    if length is None:
        length = min(_length_to_see(patterns), config.max_position_embeddings)
    for layer, pattern in enumerate(patterns):
        typer.echo(f"layer {layer:<6}{pattern}")
    typer.echo(f"\nparameters\n{parameter_count(config)}")
    plot_schedule(patterns, length, output, num_heads=config.num_attention_heads)


def _configuration(path: Path) -> "SparseTransformerConfig":
    """The model of a run's folder, a saved model's folder, or a recipe."""
    from longstride.models import SparseTransformerConfig
    from longstride.training import model_config, read_recipe

    if path.is_file():
        return model_config(read_recipe(path))
    if (path / "recipe.yaml").is_file():
        return model_config(read_recipe(path / "recipe.yaml"))
    for saved in (path, path / "model"):
        if (saved / "config.json").is_file():
            return SparseTransformerConfig.from_pretrained(saved)
    raise ArgumentError(f"{path}: neither a run (recipe.yaml) nor a saved model (config.json) is in this folder")


def _length_to_see(patterns: "list[Pattern] | tuple[Pattern, ...]") -> int:
    """Four times the longest window, stride or block, so that it is seen to repeat."""
    numbers = re.findall(r"\d+", re.sub(r"seed=\d+", "", " ".join(map(str, patterns))))
    return min(max(4 * max(map(int, numbers), default=0), SHORTEST_DEFAULT), LONGEST_DEFAULT)
