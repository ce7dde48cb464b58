"""The loss curve of a training run."""

import itertools
import json
from pathlib import Path

import matplotlib
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.ticker import MaxNLocator

from longstride.errors import DataError
from longstride.plotting.style import FORBIDDEN, PARTS, STYLE, save

LONGEST_UNSMOOTHED = 40


def plot_loss(metrics_jsonl_path: str | Path, png_path: str | Path) -> Path:
    """Draws training and validation bits per byte against steps.

    Args:
        metrics_jsonl_path: a JSON object a line, with ``step`` and ``bits_per_byte`` (of the step's batch) or
            ``validation_bits_per_byte``; other keys and a line that was cut off are passed over.
        png_path: the picture's file; missing folders are made.

    Raises:
        DataError: the metrics are missing or hold no bits per byte.
        ArgumentError: the picture cannot be written.
    """
    metrics = Path(metrics_jsonl_path)
    training, validation = _curve(metrics, "bits_per_byte"), _curve(metrics, "validation_bits_per_byte")
    if not training and not validation:
        raise DataError(f"{metrics}: no bits per byte to draw; did the run stop before its first step?")
    with matplotlib.rc_context(STYLE):
        figure = Figure(figsize=(6.4, 3.8), layout="constrained")
        ax = figure.add_subplot()
        if training:
            _draw_training(ax, training)
        if validation:
            steps, values = zip(*validation, strict=True)
            ax.plot(steps, values, color=PARTS[1], linewidth=1.6, marker="o", markersize=3.5, label="validation split")
            ax.annotate(
                f"{values[-1]:.2f}",
                (steps[-1], values[-1]),
                xytext=(6, 0),
                textcoords="offset points",
                color=PARTS[1],
                va="center",
            )
        ax.set_xlabel("step")
        ax.set_ylabel("bits per byte")
        ax.set_ylim(bottom=0)
        ax.xaxis.set_major_locator(MaxNLocator(integer=True, steps=[1, 2, 5, 10]))
        ax.grid(color=FORBIDDEN, linewidth=0.8)
        ax.set_axisbelow(True)
        ax.spines[["top", "right"]].set_visible(False)
        ax.legend(loc="upper right")
        return save(figure, png_path)


def _draw_training(ax: Axes, curve: list[tuple[int, float]]) -> None:
    """Single batches are noisy: they are drawn faintly, under a mean over a fiftieth of the run."""
    steps, values = zip(*curve, strict=True)
    if len(curve) <= LONGEST_UNSMOOTHED:
        ax.plot(steps, values, color=PARTS[0], linewidth=1.4, marker="o", markersize=2.5, label="training batches")
        return
    ax.plot(steps, values, color=PARTS[0], linewidth=0.6, alpha=0.35, label="training batches")
    half = len(curve) // 100 + 1
    sums = [0.0, *itertools.accumulate(values)]
    span = 2 * half + 1
    # Centred, so that the mean does not lag behind a falling curve.
    means = [(end - start) / span for start, end in zip(sums, sums[span:], strict=False)]
    ax.plot(steps[half:-half], means, color=PARTS[0], linewidth=1.4, label=f"mean of {span} batches")


def _curve(metrics: Path, key: str) -> list[tuple[int, float]]:
    """(step, value) of the records that have the key, in the order of the steps."""
    try:
        lines = metrics.read_text(encoding="utf-8").splitlines()
    except OSError as error:
        raise DataError(f"{metrics}: the metrics cannot be read ({error.strerror or error})") from error
    points = {}
    for line in lines:
        try:
            record = json.loads(line)
        except json.JSONDecodeError:
            continue
        if key in record:
            points[int(record["step"])] = float(record[key])
    return sorted(points.items())
