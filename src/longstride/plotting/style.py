"""Colours and type that all pictures share, and how a picture is written."""

from pathlib import Path
from typing import Any

from matplotlib.figure import Figure

from longstride.errors import ArgumentError

INK, FAINT_INK = "#1f2933", "#6b7785"
PAPER, FORBIDDEN, FUTURE = "#ffffff", "#e9edf2", "#ffffff"
PARTS = ("#2a6fbb", "#ef8636", "#35a079", "#9a5fc0", "#d5475f", "#b8961c", "#3bb0c9", "#8a6d5a")
REACH = ("#1f4e79", "#6fa8d8", "#a8d5ba", "#f3d98b")
STYLE: dict[Any, Any] = {
    "font.size": 8.5,
    "axes.edgecolor": FAINT_INK,
    "axes.labelcolor": FAINT_INK,
    "axes.linewidth": 0.6,
    "axes.titlecolor": INK,
    "axes.titlesize": 9,
    "legend.fontsize": 8,
    "legend.frameon": False,
    "text.color": INK,
    "xtick.color": FAINT_INK,
    "ytick.color": FAINT_INK,
    "xtick.labelsize": 7.5,
    "ytick.labelsize": 7.5,
    "xtick.major.width": 0.6,
    "ytick.major.width": 0.6,
    "xtick.major.size": 2.5,
    "ytick.major.size": 2.5,
}


def save(figure: Figure, png_path: str | Path, dots_per_inch: int = 160) -> Path:
    """Writes the figure as PNG; ArgumentError where that is not possible."""
    path = Path(png_path)
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        # No metadata, so that the same picture is the same file.
        figure.savefig(
            path,
            format="png",
            dpi=dots_per_inch,
            facecolor=PAPER,
            bbox_inches="tight",
            pad_inches=0.15,
            metadata={"Software": None},
        )
    except OSError as error:
        reason = error.strerror or error
        raise ArgumentError(f"{path}: the picture cannot be written ({reason}); choose another file") from error
    return path
