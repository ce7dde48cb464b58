"""Pictures and sounds of the experiments: curves, images, spectrograms, learned attention, and the samples as files."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path

import matplotlib
import numpy as np
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from PIL import Image

from experiment_arms import HALF
from longstride.data import Kind, make_kind
from longstride.data.companding import expand
from longstride.data.images import tokens_to_image
from longstride.plotting.style import FORBIDDEN, PARTS, STYLE, save

#: Between images of a grid, and how much larger they are shown.
GAP, ZOOM = 2, 3
SPECTROGRAM_WINDOW, SPECTROGRAM_STEP = 1024, 256


def _axes(width: float = 6.4, height: float = 3.8, count: int = 1, columns: int = 3) -> tuple[Figure, list[Axes]]:
    """``count`` panels of that size, at most so many in a row."""
    columns = min(count, columns)
    rows = -(-count // columns)
    figure = Figure(figsize=(width * columns, height * rows), layout="constrained")
    axes = [figure.add_subplot(rows, columns, number + 1) for number in range(count)]
    for ax in axes:
        ax.spines[["top", "right"]].set_visible(False)
    return figure, axes


def _colours(result: dict) -> dict[str, str]:
    """Of each arm; those of half the time have that of the whole one."""
    whole = list(dict.fromkeys(name.removesuffix(HALF) for name in result["arms"]))
    return {name: PARTS[whole.index(name.removesuffix(HALF)) % len(PARTS)] for name in result["arms"]}


def draw_curves(result: dict, path: Path) -> Path:
    """Bits against seconds and against tokens of training: the validation split, and faintly the training batches."""
    with matplotlib.rc_context(STYLE):
        figure, axes = _axes(5.2, count=2)
        lowest, highest = float("inf"), 0.0
        colours = _colours(result)
        for name, arm in result["arms"].items():
            colour, line = colours[name], "--" if name.endswith(HALF) else "-"
            for curve, looks in (
                ("training", {"linewidth": 0.6, "alpha": 0.35}),
                ("validation", {"linewidth": 1.4, "linestyle": line, "marker": "o", "markersize": 2.5, "label": name}),
            ):
                seconds, steps, bits = zip(*arm[curve], strict=True)
                axes[0].plot(seconds, bits, color=colour, **looks)
                axes[1].plot([n * arm["tokens_per_step"] / 1e6 for n in steps], bits, color=colour, **looks)
            lowest, highest = min(lowest, *bits), max(highest, bits[len(bits) // 4])
        # The beginning, where all fall steeply, would squeeze the rest.
        margin = 0.1 * (highest - lowest) or 0.1
        for ax, label in zip(axes, ("seconds of training", f"millions of {result['unit']}s read"), strict=True):
            ax.set_ylim(lowest - margin, highest + margin)
            ax.set_xlabel(label)
            ax.grid(color=FORBIDDEN, linewidth=0.8)
            ax.set_axisbelow(True)
        axes[0].set_ylabel(f"bits per {result['unit']}")
        figure.legend(*axes[0].get_legend_handles_labels(), loc="outside lower center", ncols=3)
        return save(figure, path)


def draw_context(result: dict, path: Path) -> Path:
    """Bits of the predictions around each position of a window: what more context is worth."""
    with matplotlib.rc_context(STYLE):
        figure, (ax,) = _axes()
        values = []
        for name, arm in result["arms"].items():
            if name.endswith(HALF):
                continue
            places, bits = zip(*arm["by_context"]["around"], strict=True)
            ax.plot(places, bits, color=_colours(result)[name], linewidth=1.2, label=name)
            values += bits[len(bits) // 2 :]
        ax.set_xscale("log")
        ax.set_ylim(min(values) * 0.95, max(values) * 1.4)
        ax.set_xlabel(f"{result['unit']}s of context")
        ax.set_ylabel(f"bits per {result['unit']}")
        ax.grid(color=FORBIDDEN, linewidth=0.8)
        ax.legend(loc="upper right")
        return save(figure, path)


def draw_maps(maps: Mapping[str, np.ndarray], path: Path) -> Path:
    """Learned attention, a panel a pattern: queries downwards, keys to the right, square roots of the weights."""
    with matplotlib.rc_context(STYLE):
        figure, axes = _axes(3.6, 3.7, len(maps))
        for ax, (title, picture) in zip(axes, maps.items(), strict=True):
            ax.imshow(picture, cmap="magma", interpolation="nearest", vmin=0, vmax=max(1, np.quantile(picture, 0.999)))
            ax.set_title(title)
            ax.set_xlabel("key position")
            ax.set_ylabel("query position")
        return save(figure, path)


def draw_images(rows: Sequence[np.ndarray], path: Path) -> Path:
    """Rows of images, int[count, 3 * side * side] each, as one PNG."""
    side = round((rows[0].shape[1] // 3) ** 0.5)
    columns = max(len(row) for row in rows)
    cell = side + GAP
    sheet = np.full((len(rows) * cell + GAP, columns * cell + GAP, 3), 255, dtype=np.uint8)
    for number, row in enumerate(rows):
        for place, tokens in enumerate(row):
            top, left = number * cell + GAP, place * cell + GAP
            sheet[top : top + side, left : left + side] = tokens_to_image(tokens, side)
    path.parent.mkdir(parents=True, exist_ok=True)
    picture = Image.fromarray(sheet)
    picture.resize((picture.width * ZOOM, picture.height * ZOOM), Image.Resampling.NEAREST).save(path)
    return path


def draw_spectrogram(tokens: np.ndarray, prompt: int, sample_rate_hz: int, path: Path) -> Path:
    """The spectrogram of one sample, int[samples] of mu-law, with a line where the model begins."""
    samples = expand(tokens)
    window = min(SPECTROGRAM_WINDOW, len(samples) // 2)
    step = min(SPECTROGRAM_STEP, window)
    starts = range(0, len(samples) - window + 1, step)
    frames = np.stack([samples[start : start + window] * np.hanning(window) for start in starts])
    decibels = 20 * np.log10(np.abs(np.fft.rfft(frames, axis=1)).T + 1e-6)
    with matplotlib.rc_context(STYLE):
        figure, (ax,) = _axes(6.4, 3.2)
        seconds, khz = len(samples) / sample_rate_hz, sample_rate_hz / 2000
        top = decibels.max()
        ax.imshow(decibels, origin="lower", aspect="auto", cmap="magma", extent=(0, seconds, 0, khz), vmin=top - 70)
        ax.axvline(prompt / sample_rate_hz, color="white", linewidth=1, linestyle="--")
        ax.set_xlabel("seconds; the model plays from the line on")
        ax.set_ylabel("kHz")
        return save(figure, path)


def kind_of(arm: dict) -> Kind | None:
    """The kind of data that an arm was trained on; None for bytes."""
    name = arm["recipe"].get("data.kind")
    if name is None:
        return None
    return make_kind(name, arm["recipe"].get("data.context", 512), {"sample_rate_hz": 12_000, **_settings(arm)})


def _settings(arm: dict) -> dict:
    return {key.removeprefix("data."): value for key, value in arm["recipe"].items() if key.startswith("data.")}
