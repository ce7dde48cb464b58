"""Patterns as PNG pictures: one pattern, a schedule over layers, a family side by side."""

import itertools
import math
import textwrap
from collections.abc import Mapping, Sequence
from pathlib import Path

import matplotlib
import torch
from matplotlib.axes import Axes
from matplotlib.colors import to_rgb
from matplotlib.figure import Figure
from matplotlib.patches import Patch

from longstride.errors import ArgumentError
from longstride.patterns import Pattern
from longstride.plotting.cells import HeadCells, part_cells, reach_cells, visible_pairs
from longstride.plotting.style import FORBIDDEN, FUTURE, PAPER, PARTS, REACH, STYLE, save

# A panel, and what stands around it: its title, its tick and axis labels.
PANEL_INCHES = 2.9
ABOVE_INCHES, BELOW_INCHES, LEFT_INCHES, RIGHT_INCHES = 0.5, 0.5, 0.62, 0.18
LEGEND_CHARACTERS = 46
MOST_COLUMNS = 4
# Heads that all draw at random differ; a few show what they are like.
MOST_HEADS = 4


def plot_pattern(pattern: Pattern, length: int, png_path: str | Path, *, num_heads: int | None = None) -> Path:
    """Draws the allowed pairs, the parts that the plan splits them into, and what one and two layers reach.

    Args:
        pattern: what to draw; heads that differ get a row each.
        length: number of positions, 1 to 1,024.
        png_path: the picture's file; missing folders are made.
        num_heads: number of heads for patterns that differ by head; by default as many as the pattern names.

    Raises:
        ArgumentError: the length is below 1 or too long, or the file cannot be written.
    """
    groups = part_cells(pattern, length, num_heads)[:MOST_HEADS]
    reached = reach_cells([pattern, pattern], length)
    causal = pattern.is_causal
    with matplotlib.rc_context(STYLE):
        figure, axes = _panel_grid(len(groups), 3, str(pattern), max(2, *map(_legend_lines, groups)))
        for (allowed, parts, _), group in zip(axes, groups, strict=True):
            heads = f", {_heads(group)}" if group.heads else ""
            _draw_cells(allowed, (group.cells > 0).long(), causal, PARTS)
            allowed.set_title(f"allowed pairs{heads}\n{_share(group.pairs, causal, length)}")
            _draw_cells(parts, group.cells, causal, PARTS)
            parts.set_title(f"parts of the plan{heads}\neach pair in exactly one")
            _legend(parts, group.labels, PARTS)
        reach, *unused = (row[2] for row in axes)
        _draw_reach(reach, reached, causal, "reach of 2 layers", ("in one layer", "in two layers"))
        for ax in unused:
            ax.remove()
        return save(figure, png_path, dots_per_inch=_dots_per_inch(length))


def plot_schedule(patterns: Sequence[Pattern], length: int, png_path: str | Path, *, num_heads: int = 1) -> Path:
    """Draws the patterns over a model's layers, first layer first: a panel for each that is distinct, then the reach.

    Args:
        patterns: the pattern of every layer.
        length: number of positions, 1 to 1,024.
        png_path: the picture's file; missing folders are made.
        num_heads: number of heads a layer; heads that differ get a panel each.

    Raises:
        ArgumentError: there is no layer, the length is below 1 or too long, or the file cannot be written.
    """
    if len(patterns) == 0:
        raise ArgumentError("patterns=[]: a schedule needs the pattern of at least one layer")
    layers_of: dict[Pattern, list[int]] = {}
    for layer, pattern in enumerate(patterns):
        layers_of.setdefault(pattern, []).append(layer)
    panels = [
        (pattern, layers, group)
        for pattern, layers in layers_of.items()
        for group in part_cells(pattern, length, num_heads)[:MOST_HEADS]
    ]
    # The shades tell four steps apart; patterns repeat, so that a few layers show what the stack does.
    first_layers = patterns[: len(REACH)]
    reached = reach_cells(first_layers, length)
    causal = all(pattern.is_causal for pattern in patterns)
    columns = min(len(panels) + 1, MOST_COLUMNS)
    with matplotlib.rc_context(STYLE):
        rows = math.ceil((len(panels) + 1) / columns)
        title = f"{len(patterns)} layer{'s' if len(patterns) > 1 else ''}: {', '.join(map(str, layers_of))}"
        legend_lines = max(int(reached.max()), *(_legend_lines(group) for _, _, group in panels))
        figure, grid = _panel_grid(rows, columns, title, legend_lines)
        axes = [ax for row in grid for ax in row]
        for ax, (pattern, layers, group) in zip(axes, panels, strict=False):
            _draw_cells(ax, group.cells, pattern.is_causal, PARTS)
            place = _numbers("layer", layers) + (f", {_heads(group)}" if group.heads else "")
            ax.set_title(f"{place}\n{_share(group.pairs, pattern.is_causal, length)}")
            _legend(ax, group.labels, PARTS)
        reach, *unused = axes[len(panels) :]
        some = "the first " if len(first_layers) < len(patterns) else ""
        name = f"reach of {some}{len(first_layers)} layer{'s' if len(first_layers) > 1 else ''}"
        _draw_reach(reach, reached, causal, name, [f"by layer {layer}" for layer in range(len(first_layers))])
        for ax in unused:
            ax.remove()
        return save(figure, png_path, dots_per_inch=_dots_per_inch(length))


def plot_family(patterns: Mapping[str, Pattern], length: int, png_path: str | Path) -> Path:
    """Draws several patterns side by side, the parts of each in colours, without legends.

    Args:
        patterns: what to draw, by title, in reading order; of heads that differ, the first is drawn.
        length: number of positions, 1 to 1,024.
        png_path: the picture's file; missing folders are made.

    Raises:
        ArgumentError: there is no pattern, the length is below 1 or too long, or the file cannot be written.
    """
    if len(patterns) == 0:
        raise ArgumentError("patterns={}: a picture needs at least one pattern")
    panels = [(title, pattern.is_causal, part_cells(pattern, length)[0].cells) for title, pattern in patterns.items()]
    columns = min(len(panels), MOST_COLUMNS)
    with matplotlib.rc_context(STYLE):
        figure, grid = _panel_grid(math.ceil(len(panels) / columns), columns)
        axes = [ax for row in grid for ax in row]
        for number, (ax, (title, causal, cells)) in enumerate(zip(axes, panels, strict=False)):
            _draw_cells(ax, cells, causal, PARTS)
            ax.set_title(title)
            ax.set_ylabel("query position" if number % columns == 0 else "")
            ax.set_xlabel("key position" if number + columns >= len(panels) else "")
        for ax in axes[len(panels) :]:
            ax.remove()
        return save(figure, png_path, dots_per_inch=_dots_per_inch(length))


def _panel_grid(rows: int, columns: int, title: str = "", legend_lines: int = 0) -> tuple[Figure, list[list[Axes]]]:
    """A figure with a title and rows x columns square panels, with room for titles and for legends of so many lines."""
    title = textwrap.fill(title, 38 * columns, break_long_words=False)
    title_inches = 0.1 + 0.2 * len(title.splitlines())
    row_inches = ABOVE_INCHES + PANEL_INCHES + BELOW_INCHES + 0.17 * legend_lines
    column_inches = LEFT_INCHES + PANEL_INCHES + RIGHT_INCHES
    width, height = columns * column_inches, title_inches + rows * row_inches
    figure = Figure(figsize=(width, height))
    figure.suptitle(title, fontsize=11, x=0.5, y=1 - 0.05 / height, verticalalignment="top")
    grid = []
    for row in range(rows):
        bottom = height - title_inches - row * row_inches - ABOVE_INCHES - PANEL_INCHES
        lefts = (column * column_inches + LEFT_INCHES for column in range(columns))
        boxes = ((left / width, bottom / height, PANEL_INCHES / width, PANEL_INCHES / height) for left in lefts)
        grid.append([figure.add_axes(box) for box in boxes])
    return figure, grid


def _draw_cells(ax: Axes, cells: torch.Tensor, causal: bool, colours: Sequence[str]) -> None:
    """Paints cells [length, length]: 0 is empty, n the n-th colour (colours repeat)."""
    length = len(cells)
    palette = torch.tensor([to_rgb(FUTURE), to_rgb(FORBIDDEN), *map(to_rgb, colours)])
    index = torch.where(cells > 0, (cells - 1) % len(colours) + 2, 1)
    if causal:
        future = torch.ones(length, length, dtype=torch.bool).triu(1)
        index[future & (cells == 0)] = 0
    ax.imshow(palette[index].numpy(), interpolation="nearest", aspect="equal")
    if length <= 64:
        edges = [position - 0.5 for position in range(1, length)]
        ax.set_xticks(edges, minor=True)
        ax.set_yticks(edges, minor=True)
        ax.grid(which="minor", color=PAPER, linewidth=16 / length)
        ax.tick_params(which="minor", length=0)
    step = max(1, 2 ** math.ceil(math.log2(length / 6)))
    ax.set_xticks(range(0, length, step))
    ax.set_yticks(range(0, length, step))
    ax.set_xlabel("key position")
    ax.set_ylabel("query position")


def _draw_reach(ax: Axes, reached: torch.Tensor, causal: bool, name: str, labels: Sequence[str]) -> None:
    """Paints how many layers a pair needs; the legend names only what occurs."""
    _draw_cells(ax, reached, causal, REACH)
    ax.set_title(f"{name}\n{_share(int((reached > 0).sum()), causal, len(reached))}")
    _legend(ax, labels[: int(reached.max())], REACH)


def _legend(ax: Axes, labels: Sequence[str], colours: Sequence[str]) -> None:
    patches = [
        Patch(facecolor=colours[number % len(colours)], label=textwrap.fill(label, LEGEND_CHARACTERS))
        for number, label in enumerate(labels)
    ]
    ax.legend(handles=patches, loc="upper center", bbox_to_anchor=(0.5, -0.14), handlelength=1.0, handleheight=1.0)


def _legend_lines(group: HeadCells) -> int:
    return sum(len(textwrap.wrap(label, LEGEND_CHARACTERS)) for label in group.labels)


def _share(pairs: int, causal: bool, length: int) -> str:
    dense = visible_pairs(causal, length)
    return f"{pairs:,} of {dense:,} pairs, {pairs / dense:.1%}"


def _heads(group: HeadCells) -> str:
    return _numbers("head", group.heads)


def _numbers(name: str, numbers: Sequence[int]) -> str:
    """``layer 3``, ``layers 0, 1``, ``heads 0 to 7``, ``layers 0, 2, ... 18``."""
    if len(numbers) == 1:
        return f"{name} {numbers[0]}"
    steps = {b - a for a, b in itertools.pairwise(numbers)}
    if len(numbers) < 4 or len(steps) > 1:
        return f"{name}s {', '.join(map(str, numbers))}"
    if steps == {1}:
        return f"{name}s {numbers[0]} to {numbers[-1]}"
    return f"{name}s {numbers[0]}, {numbers[1]}, ... {numbers[-1]}"


def _dots_per_inch(length: int) -> int:
    """At least one pixel for each cell, so that a line one position wide does not vanish."""
    return max(160, math.ceil(1.4 * length / PANEL_INCHES))
