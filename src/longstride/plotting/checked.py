"""What the checks of a model measured: loss against context, and tables as heat maps."""

import math
from collections.abc import Mapping, Sequence
from pathlib import Path

import matplotlib
from matplotlib.axes import Axes
from matplotlib.colors import LinearSegmentedColormap
from matplotlib.figure import Figure

from longstride.errors import ArgumentError
from longstride.plotting.style import FORBIDDEN, INK, PAPER, PARTS, REACH, STYLE, save

CELL_INCHES = (0.62, 0.42)
# From what was never found to what always was.
FOUND = LinearSegmentedColormap.from_list("found", (FORBIDDEN, REACH[1], REACH[0]))


def plot_loss_by_context(
    curves: Mapping[str, Sequence[tuple[int, int, float, float | None]]], png_path: str | Path, *, unit: str = "byte"
) -> Path:
    """Draws bits a token against the tokens that stood before it, a line for each curve.

    Args:
        curves: by name, for each range of contexts: its fewest and most tokens, the mean loss in bits, and the
            standard error of that mean, in bits, or None.
        png_path: the picture's file; missing folders are made.
        unit: what a token is called.

    Raises:
        ArgumentError: there is no curve, or the picture cannot be written.
    """
    if not curves:
        raise ArgumentError("curves={}: a picture needs at least one curve")
    with matplotlib.rc_context(STYLE):
        figure = Figure(figsize=(6.4, 3.8), layout="constrained")
        ax = figure.add_subplot()
        for (name, ranges), colour in zip(curves.items(), PARTS, strict=False):
            # A range stands where its middle is, as contexts are compared by their ratios.
            middles = [math.sqrt(fewest * most) for fewest, most, *_ in ranges]
            bits = [mean for *_, mean, _ in ranges]
            errors = [error or 0.0 for *_, error in ranges]
            ax.plot(middles, bits, color=colour, linewidth=1.6, marker="o", markersize=3.5, label=name)
            low, high = ([mean + sign * error for mean, error in zip(bits, errors, strict=True)] for sign in (-1, 1))
            ax.fill_between(middles, low, high, color=colour, alpha=0.15, linewidth=0)
        ax.set_xscale("log", base=2)
        ax.xaxis.set_major_formatter(lambda value, _: f"{value:,.0f}")
        ax.set_xlabel(f"{unit}s of context")
        ax.set_ylabel(f"bits per {unit}")
        ax.grid(color=FORBIDDEN, linewidth=0.8)
        ax.set_axisbelow(True)
        ax.spines[["top", "right"]].set_visible(False)
        ax.legend(loc="upper right")
        return save(figure, png_path)


def plot_retrieval(
    tables: Mapping[str, Sequence[Sequence[float]]],
    lengths: Sequence[int],
    depths: Sequence[float],
    png_path: str | Path,
    *,
    unit: str = "byte",
) -> Path:
    """Draws shares of needles that were found, a heat map for each table, with the lengths down and the depths across.

    Args:
        tables: by name: [lengths][depths], shares from 0 to 1.
        lengths: of the sequences, in tokens.
        depths: of the needles, from 0 (the beginning) to 1.
        png_path: the picture's file; missing folders are made.
        unit: what a token is called.

    Raises:
        ArgumentError: there is no table, or the picture cannot be written.
    """
    if not tables:
        raise ArgumentError("tables={}: a picture needs at least one table")
    wide, high = CELL_INCHES[0] * len(depths) + 1.0, CELL_INCHES[1] * len(lengths) + 1.2
    with matplotlib.rc_context(STYLE):
        figure = Figure(figsize=(max(3.0, wide) * len(tables), high), layout="constrained")
        for ax, (name, table) in zip(figure.subplots(1, len(tables), squeeze=False)[0], tables.items(), strict=True):
            _heat_map(ax, table)
            ax.set_title(name)
            ax.set_xticks(range(len(depths)), [f"{depth:g}" for depth in depths])
            ax.set_yticks(range(len(lengths)), [f"{length:,}" for length in lengths])
            ax.set_xlabel("depth of the needle")
            ax.set_ylabel(f"length in {unit}s")
        return save(figure, png_path)


def _heat_map(ax: Axes, table: Sequence[Sequence[float]]) -> None:
    """Cells coloured by a share from 0 to 1, which is also written into them."""
    ax.imshow(table, cmap=FOUND, vmin=0, vmax=1, aspect="auto", interpolation="nearest")
    for row, shares in enumerate(table):
        for column, share in enumerate(shares):
            ax.text(
                column, row, f"{share:.2f}", ha="center", va="center", fontsize=7.5, color=INK if share < 0.5 else PAPER
            )
    ax.tick_params(length=0)
    ax.spines[:].set_visible(False)
