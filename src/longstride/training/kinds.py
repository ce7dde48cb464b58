"""The kind of data that a recipe names, and what follows from it for the model: vocabulary and position axes."""

import dataclasses
from typing import TYPE_CHECKING

from longstride.data import make_kind
from longstride.errors import DataError, RecipeError

if TYPE_CHECKING:
    from longstride.data import Kind
    from longstride.training.recipe import Recipe


def kind_of(recipe: "Recipe") -> "Kind | None":
    """What decodes the recipe's data; None for bytes, which are read as they lie, and for a kind not yet chosen.

    Raises:
        RecipeError: an unknown kind, or a value that it cannot work with.
    """
    if recipe.data.kind in (None, "bytes"):
        return None
    try:
        return make_kind(recipe.data.kind, recipe.data.context, dataclasses.asdict(recipe.data))
    except DataError as error:
        raise RecipeError(str(error)) from error


def vocab_size(recipe: "Recipe") -> int:
    """The tokens that the model of a recipe knows; 256 for bytes."""
    kind = kind_of(recipe)
    return 256 if kind is None else kind.vocab_size


def longest_sequence(recipe: "Recipe") -> int:
    """The tokens that the model of a recipe sees at once: a window, and behind it what its memory has.

    Raises:
        RecipeError: a memory of data whose windows are whole records, such as images.
    """
    kind = kind_of(recipe)
    if recipe.model.memory and kind is not None and kind.record > 1:
        raise RecipeError(
            f"model.memory is {recipe.model.memory} with data.kind {kind.name}: windows of it begin with a record of "
            f"{kind.record} tokens and do not go on from one another; leave it at 0"
        )
    return recipe.data.context + recipe.model.memory


def position_axes(recipe: "Recipe") -> list[int] | None:
    """The model's position axes: the recipe's, or else those of the data; None to take them from the pattern.

    A modern block has no position embeddings, and so no axes, whatever the data.
    """
    if recipe.model.position_axes is not None:
        return list(recipe.model.position_axes)
    kind = kind_of(recipe)
    return None if kind is None or recipe.model.block == "modern" else kind.axes(recipe.data.context)
