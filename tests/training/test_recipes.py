"""The recipes of the repository: each builds at full size, and trains at a 64th of it."""

import math
from pathlib import Path

import pytest
import torch

from longstride.data import open_source, prepare
from longstride.models import SparseTransformerForCausalLM, layer_patterns
from longstride.models.memory import kept_tokens
from longstride.training import RunFolder, model_config, read_curve, read_recipe, read_scale, scaled, train

RECIPES = Path(__file__).parents[2] / "recipes"

# Exact parameters, and what the paper says of its model in millions; None where it says nothing that can be compared.
PARAMETERS = {
    "bytes-small": (862_976, None),
    "cifar10": (59_098_368, 59),
    "enwik8": (94_887_936, 95),
    "imagenet64": (151_546_368, 152),
    "music-65k": (151_741_440, 152),
    "music-262k": (25_633_280, 25),
    "music-1m": (3_096_576, 3),
    # 125 M with 50,257 token embeddings instead of 256.
    "gpt3-alternating": (86_788_608, (125.2e6 - (50_257 - 256) * 768) / 1e6),
    # 41 M, with weights for relative positions that rotary ones do not have.
    "longformer-lm": (38_074_368, None),
    # As many as Longformer's, which has this model's sizes; 41 M with those weights.
    "transformer-xl": (38_074_368, None),
}


def test_every_recipe_is_held_to_a_count():
    assert {path.stem for path in RECIPES.glob("*.yaml")} == set(PARAMETERS)


@pytest.mark.parametrize("name", PARAMETERS)
def test_full_size_has_the_paper_s_parameters(name):
    recipe = read_recipe(RECIPES / f"{name}.yaml")
    with torch.device("meta"):
        model = SparseTransformerForCausalLM(model_config(recipe))
    exact, millions = PARAMETERS[name]
    assert sum(parameter.numel() for parameter in model.parameters()) == exact
    if millions is not None:
        assert exact / 1e6 == pytest.approx(millions, rel=0.04)
    assert model.config.max_position_embeddings == recipe.data.context + recipe.model.memory


@pytest.mark.parametrize("name", PARAMETERS)
def test_two_steps_at_a_64th_of_the_size(name, tmp_path):
    """As the recipe says but for the size, the window, the batch, the steps and the machine."""
    recipe = scaled(read_recipe(RECIPES / f"{name}.yaml"), read_scale("1/64"))
    recipe = recipe.override(
        {
            "data.kind": "bytes",
            "data.context": min(recipe.data.context, 1536),
            "schedule.steps": 2,
            "schedule.batch_size": 1,
            "schedule.gradient_accumulation_steps": 1,
            "schedule.warmup_steps": 0,
            "run.device": "cpu",
            "run.validation_windows": 1,
        }
    )
    generator = torch.Generator().manual_seed(0)
    (tmp_path / "bytes").write_bytes(bytes(torch.randint(8, (40_000,), generator=generator).tolist()))
    folder = RunFolder(tmp_path / "run")
    folder.start(recipe)
    result = train(recipe, prepare(open_source(tmp_path / "bytes"), folder.data, recipe.data.context), folder, print)
    assert (result.step, result.ended) == (2, "finished")
    losses = [record["loss"] for record in read_curve(folder.metrics) if "loss" in record]
    assert len(losses) == 2
    assert all(math.isfinite(loss) for loss in losses)
    if not recipe.model.tie_word_embeddings:
        assert losses[0] == pytest.approx(math.log(256), abs=1e-3)
    assert losses[1] < losses[0]


def test_the_papers_values_are_in_the_recipes():
    cifar10, enwik8, imagenet64 = (
        dict(read_recipe(RECIPES / f"{name}.yaml").items()) for name in ("cifar10", "enwik8", "imagenet64")
    )
    for recipe in (cifar10, enwik8, imagenet64):
        assert recipe["schedule.warmup_steps"] == 5000
        assert recipe["optimizer.max_grad_norm"] == 1.0
        assert recipe["optimizer.weight_decay"] == 0.01
        assert recipe["model.initializer_scale"] == 0.125
        assert recipe["model.block"] == "sparse_transformer"
    assert cifar10["optimizer.learning_rate"] == 3.5e-4
    assert [recipe["model.dropout"] for recipe in (cifar10, enwik8, imagenet64)] == [0.25, 0.4, 0.01]
    assert [recipe["data.context"] for recipe in (cifar10, enwik8, imagenet64)] == [3072, 12288, 12288]
    assert enwik8["model.patterns"] == ("Fixed(128, 32)",)


def test_transformer_xl_carries_a_window_and_what_its_patterns_read_of_it():
    config = model_config(read_recipe(RECIPES / "transformer-xl.yaml"))
    kept = [kept_tokens(pattern, 512 + 512, config.memory) for pattern in layer_patterns(config)]
    assert (config.memory, config.max_position_embeddings) == (512, 1024)
    assert kept == [127, 512] * 6


def test_longformer_s_windows_grow_and_two_heads_of_the_upper_half_are_dilated():
    patterns = layer_patterns(model_config(read_recipe(RECIPES / "longformer-lm.yaml")))
    last = [pattern.mask(1, 8192, heads=8)[:, 0] for pattern in patterns]  # bool[8 heads, 8192 keys]
    windows = [int(keys[0].sum()) for keys in last]
    assert windows == sorted(windows)
    assert windows[0] < windows[-1]
    for layer, keys in enumerate(last):
        nearest_but_one = [int(head.nonzero()[-2]) for head in keys]
        assert nearest_but_one.count(8190) == (8 if layer < 6 else 6)
