"""Recipes: defaults, YAML, overrides, and errors that say what to write instead."""

import dataclasses
from pathlib import Path

import pytest
import yaml

from longstride.errors import RecipeError
from longstride.training import Recipe, parse_assignments, read_recipe

RECIPES = Path(__file__).parents[2] / "recipes"


def recipe_file(tmp_path, text: str) -> Path:
    path = tmp_path / "recipe.yaml"
    path.write_text(text)
    return path


def test_bytes_small_spells_out_the_defaults():
    written = yaml.safe_load((RECIPES / "bytes-small.yaml").read_text())
    spelled_out = {f"{section}.{name}" for section, entries in written.items() for name in entries}
    assert spelled_out == {key for key, _ in Recipe().items()}
    assert read_recipe(RECIPES / "bytes-small.yaml") == Recipe()


def test_file_changes_what_it_names_and_nothing_else(tmp_path):
    path = recipe_file(tmp_path, "model:\n  hidden_size: 96\n  patterns: [Local(8), Strided(8)]\nschedule:\n")
    expected = dataclasses.replace(
        Recipe(),
        model=dataclasses.replace(Recipe().model, hidden_size=96, patterns=("Local(8)", "Strided(8)")),
    )
    assert read_recipe(path) == expected


def test_written_recipe_reads_back(tmp_path):
    recipe = Recipe().override(
        {"model.patterns": ["Causal()"], "data.path": "über/alles.txt", "evaluation.max_bytes": None, "run.seed": 3}
    )
    assert read_recipe(recipe_file(tmp_path, recipe.to_yaml())) == recipe


def test_assignments_are_yaml_and_override():
    values = parse_assignments(
        ["model.hidden_size=256", "optimizer.learning_rate=1e-3", "data.path=null", "model.patterns=[Local(4)]"]
    )
    recipe = Recipe().override(values)
    assert recipe.model.hidden_size == 256
    assert recipe.optimizer.learning_rate == 0.001
    assert recipe.data.path is None
    assert recipe.model.patterns == ("Local(4)",)


@pytest.mark.parametrize(
    ("key", "suggestion"),
    [
        ("model.hiden_size", "did you mean model.hidden_size?"),
        ("optimiser.learning_rate", "did you mean optimizer.learning_rate?"),
        ("hiden_size", "did you mean model.hidden_size?"),
        ("model.steps", "did you mean schedule.steps?"),
        ("evaluation.zzz", "it must be one of evaluation.min_context, evaluation.max_bytes"),
    ],
)
def test_unknown_key_suggests_the_nearest(key, suggestion):
    with pytest.raises(RecipeError) as error:
        Recipe().override({key: 1})
    assert str(error.value) == f"unknown key {key}: {suggestion}"


def test_unknown_keys_of_a_file_name_the_file(tmp_path):
    path = recipe_file(tmp_path, "model:\n  hiden_size: 96\n")
    with pytest.raises(RecipeError) as error:
        read_recipe(path)
    assert str(error.value) == f"{path}: unknown key model.hiden_size: did you mean model.hidden_size?"
    path = recipe_file(tmp_path, "modle: {}\n")
    with pytest.raises(RecipeError, match=r"unknown section modle: did you mean model\?"):
        read_recipe(path)


@pytest.mark.parametrize(
    ("key", "value", "message"),
    [
        ("model.hidden_size", "big", "model.hidden_size is 'big': it must be a whole number"),
        ("model.hidden_size", 1.5, "model.hidden_size is 1.5: it must be a whole number"),
        ("model.hidden_size", True, "model.hidden_size is True: it must be a whole number"),
        ("model.hidden_size", 0, "model.hidden_size is 0: it must be at least 1"),
        ("optimizer.learning_rate", "fast", "optimizer.learning_rate is 'fast': it must be a number"),
        ("optimizer.learning_rate", 0, "optimizer.learning_rate is 0.0: it must be above 0"),
        ("optimizer.learning_rate", ".nan", "optimizer.learning_rate is '.nan': it must be a number"),
        ("optimizer.learning_rate", float("inf"), "optimizer.learning_rate is inf: it must be a finite number"),
        ("optimizer.adam_beta2", 1.0, "optimizer.adam_beta2 is 1.0: it must be at least 0 and below 1"),
        ("optimizer.name", "sgd", "optimizer.name is 'sgd': it must be one of adamw, muon"),
        ("run.tensorboard", 1, "run.tensorboard is 1: it must be true or false"),
        ("run.precision", "fp8", "run.precision is 'fp8': it must be one of fp32, bf16, fp16"),
        ("run.device", "tpu", "run.device is 'tpu': it must be one of auto, cpu, cuda, mps"),
        ("run.seed", -1, "run.seed is -1: it must not be negative"),
        ("evaluation.max_bytes", "all", "evaluation.max_bytes is 'all': it must be a whole number, or null"),
        ("evaluation.min_context", 5000, "evaluation.min_context is 5000: it must be at most data.context, 512"),
        ("run.recompute", "all", "run.recompute is 'all': it must be one of nothing, blocks, all_but_attention"),
        ("model.block", "gpt", "model.block is 'gpt': it must be one of sparse_transformer, modern"),
        ("model.position_axes", [32, "3"], "model.position_axes is [32, '3']: it must be a list of whole numbers, or"),
        ("model.patterns", [], "model.patterns is empty: name at least one pattern"),
        ("model.patterns", [3], "model.patterns is [3]: it must be a text or a list of texts"),
        ("model.patterns", "Full()", "model.patterns: Full() lets a byte see later bytes: use a causal pattern"),
        ("sample.top_p", 0.0, "sample.top_p is 0.0: it must be above 0 and at most 1"),
    ],
)
def test_illegal_value_says_what_is_legal(key, value, message):
    with pytest.raises(RecipeError) as error:
        Recipe().override({key: value})
    assert str(error.value).startswith(message)


def test_illegal_pattern_text_comes_through_with_the_parsers_message():
    with pytest.raises(RecipeError, match=r"model\.patterns: .*Strdied"):
        Recipe().override({"model.patterns": "Local(8) | Strdied(8)"})


@pytest.mark.parametrize(
    ("text", "message"),
    [("a: [", "is not a YAML file"), ("- 1\n", "a recipe consists of the sections"), ("model: 3\n", "must hold keys")],
)
def test_file_that_is_no_recipe(tmp_path, text, message):
    with pytest.raises(RecipeError, match=message):
        read_recipe(recipe_file(tmp_path, text))


def test_missing_file_names_the_flag(tmp_path):
    with pytest.raises(RecipeError, match=r"cannot read the recipe .*none.yaml: No such file.*check --recipe"):
        read_recipe(tmp_path / "none.yaml")


def test_python_objects_in_yaml_are_not_built(tmp_path):
    with pytest.raises(RecipeError, match="is not a YAML file"):
        read_recipe(recipe_file(tmp_path, "data: !!python/object/apply:os.getcwd []\n"))


def test_assignment_without_a_value():
    with pytest.raises(RecipeError, match=r"--set model\.hidden_size: write key=value"):
        parse_assignments(["model.hidden_size"])


def test_resuming_may_change_what_the_curve_does_not_depend_on():
    started = Recipe()
    started.override({"schedule.steps": 10, "run.device": "cpu", "sample.count": 0}).check_resumable(started)
    # A run that was recorded on a GPU goes on without one.
    started.check_resumable(started.override({"run.cuda_graph": True}))
    with pytest.raises(RecipeError, match=r"model\.hidden_size is .* in the run to resume and cannot become 64"):
        started.override({"model.hidden_size": 64}).check_resumable(started)
    with pytest.raises(RecipeError, match=r"optimizer\.name is 'muon' in the run to resume and cannot become 'adamw'"):
        started.override({"optimizer.name": "adamw"}).check_resumable(started)
