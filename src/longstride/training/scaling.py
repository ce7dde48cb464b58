"""A recipe's model made smaller or larger: ``longstride train --scale``."""

from fractions import Fraction

from longstride.errors import ArgumentError
from longstride.training.recipe import ModelRecipe, Recipe

SMALLEST, LARGEST = Fraction(1, 64), Fraction(4)
#: Kernels like heads of such widths; what a head's width is rounded to a multiple of.
HEAD_DIM = 8


def read_scale(text: str) -> Fraction:
    """``"1/16"``, ``"0.25"`` or ``"4"`` as a number from 1/64 to 4.

    Raises:
        ArgumentError: not a number, or beyond these.
    """
    try:
        scale = Fraction(text)
    except (ValueError, ZeroDivisionError):
        scale = None
    if scale is None or not SMALLEST <= scale <= LARGEST:
        raise ArgumentError(f"--scale {text}: it must be a number from 1/64 to 4, such as 1/16, 0.25 or 2")
    return scale


def scaled(recipe: Recipe, scale: Fraction) -> Recipe:
    """The recipe with about ``scale`` times as many parameters in its residual blocks, and nothing else changed.

    A block's parameters grow with the square of the width, so with f the cube root of ``scale``:

    ========================================  =======================================================================
    ``hidden_size``, ``qk_hidden_size``       times f, each head rounded to a multiple of 8, at least 8
    ``intermediate_size``                     times f, rounded to a multiple of 8; null stays null
    ``num_hidden_layers``                     times f, rounded; never fewer than a cycle of patterns has
    ``patterns``                              as they are; but where every layer has one of its own, a layer of the
                                              new depth has that of the same relative depth
    ========================================  =======================================================================

    The number of heads, context, batch, learning rate, steps and all else stay. 1/64, 1/8 and 1 have f = 1/4, 1/2, 1.

    Args:
        scale: 1/64 to 4; 1 changes nothing.
    """
    if scale == 1:
        return recipe
    factor = float(scale) ** (1 / 3)
    model = recipe.model
    layers = max(1, round(model.num_hidden_layers * factor))
    patterns = model.patterns
    if len(patterns) == model.num_hidden_layers:
        patterns = tuple(patterns[layer * len(patterns) // layers] for layer in range(layers))
    layers = max(layers, len(patterns))
    return recipe.override(
        {
            "model.hidden_size": _width(model, model.hidden_size, factor),
            "model.qk_hidden_size": _width(model, model.qk_hidden_size, factor),
            "model.intermediate_size": (
                None if model.intermediate_size is None else max(1, round(model.intermediate_size * factor / 8)) * 8
            ),
            "model.num_hidden_layers": layers,
            "model.patterns": patterns,
        },
        origin=f"--scale {scale}",
    )


def _width(model: ModelRecipe, width: int | None, factor: float) -> int | None:
    if width is None:
        return None
    unit = HEAD_DIM * model.num_attention_heads
    return max(1, round(width * factor / unit)) * unit
