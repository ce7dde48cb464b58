"""``--scale``: what it changes, what it leaves, and how near it comes."""

from fractions import Fraction
from pathlib import Path

import pytest

from longstride.errors import ArgumentError
from longstride.models import parameter_count
from longstride.training import Recipe, model_config, read_recipe, read_scale, scaled

RECIPES = sorted((Path(__file__).parents[2] / "recipes").glob("*.yaml"))


@pytest.mark.parametrize(("text", "scale"), [("1/64", Fraction(1, 64)), ("0.25", Fraction(1, 4)), ("4", 4), ("1", 1)])
def test_scales_are_fractions_or_decimals(text, scale):
    assert read_scale(text) == scale


@pytest.mark.parametrize("text", ["1/65", "4.1", "0", "-1", "big", "1/0", "nan", "inf", ""])
def test_other_scales_are_refused(text):
    with pytest.raises(ArgumentError, match=r"^--scale .*: it must be a number from 1/64 to 4, such as 1/16"):
        read_scale(text)


def test_a_64th_is_a_quarter_of_width_and_depth_and_nothing_else():
    recipe = Recipe().override(
        {
            "model.hidden_size": 512,
            "model.qk_hidden_size": 256,
            "model.intermediate_size": 1024,
            "model.num_hidden_layers": 32,
            "model.num_attention_heads": 8,
        }
    )
    changed = {
        "model.hidden_size": 128,
        "model.qk_hidden_size": 64,
        "model.intermediate_size": 256,
        "model.num_hidden_layers": 8,
    }
    assert dict(scaled(recipe, Fraction(1, 64)).items()) == dict(recipe.items()) | changed
    assert scaled(scaled(recipe, Fraction(1, 64)), Fraction(1)) == scaled(recipe, Fraction(1, 64))


def test_one_changes_nothing_not_even_widths_that_it_would_round():
    recipe = Recipe().override({"model.hidden_size": 100})
    assert scaled(recipe, Fraction(1)) == recipe


def test_heads_stay_multiples_of_eight_and_at_least_that():
    recipe = Recipe().override({"model.hidden_size": 96, "model.num_attention_heads": 6})
    assert scaled(recipe, Fraction(1, 64)).model.hidden_size == 48
    assert scaled(recipe, Fraction(4)).model.hidden_size == 144


def test_a_pattern_for_every_layer_keeps_its_relative_depth():
    recipe = Recipe().override({"model.patterns": [f"Local({n})" for n in (1, 2, 3, 4)], "model.num_hidden_layers": 4})
    assert scaled(recipe, Fraction(1, 8)).model.patterns == ("Local(1)", "Local(3)")
    assert scaled(recipe, Fraction(4)).model.patterns == tuple(f"Local({n})" for n in (1, 1, 2, 3, 3, 4))


def test_a_cycle_of_patterns_stays_whole():
    recipe = Recipe().override({"model.patterns": ["Local(8)", "Strided(8)"], "model.num_hidden_layers": 4})
    small = scaled(recipe, Fraction(1, 64)).model
    assert (small.num_hidden_layers, small.patterns) == (2, ("Local(8)", "Strided(8)"))


@pytest.mark.parametrize("path", RECIPES, ids=lambda path: path.stem)
@pytest.mark.parametrize("text", ["1/64", "1/8", "1/2", "2", "4"])
def test_parameters_of_the_blocks_follow_the_scale(path, text):
    recipe = read_recipe(path)

    def blocks(recipe):
        counts = parameter_count(model_config(recipe))
        return counts.attention + counts.feed_forward

    ratio = blocks(scaled(recipe, read_scale(text))) / blocks(recipe)
    # Heads in steps of 8 and whole layers: the largest step is that of the smallest model.
    assert 0.7 < ratio / float(read_scale(text)) < 1.4
