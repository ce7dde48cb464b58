"""The experiments without a GPU: their arms, their page from made-up results, and the whole way at tiny sizes."""

from __future__ import annotations

import copy
import json
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

from longstride import SparseTransformerConfig, SparseTransformerForCausalLM
from longstride.data import decode_source, open_source, prepare
from longstride.data.images import Images
from longstride.training import model_config

BENCHMARKS = Path(__file__).parents[2] / "benchmarks"
sys.path.insert(0, str(BENCHMARKS))

import experiment_arms  # noqa: E402
import experiment_measures  # noqa: E402
import experiments  # noqa: E402
import experiments_page  # noqa: E402


def arm(bits: float, name: str, **more: object) -> dict:
    """Made-up results of an arm."""
    return {
        "device": "a device", "torch": "2", "triton": "3", "commit": "0", "wanted_seconds": 1.0,
        "data": {"tokens": {"train": 1000}}, "patterns": [f"Local({len(name)})"], "recipe": {"data.context": 64},
        "parameters": 12, "step_s": 0.1, "steps": 10, "ended": "finished", "tokens": 10**6, "seconds": 1.0,
        "tokens_per_step": 10**5,
        "training": [[0.1, 1, 8.0], [1.0, 10, bits]], "validation": [[0.5, 5, bits + 1], [1.0, 10, bits]],
        "evaluation": {
            "bits_per_byte": bits, "counted_bytes": 99, "min_context": 32, "max_context": 64,
            "xz_bits_per_byte": 2.0, "order0_bits_per_byte": 4.0,
        },
        "by_context": {"windows": 3, "at_least": [[0, bits], [32, bits - 0.1]], "around": [[1.0, 4.0], [33.0, bits]]},
        **more,
    }  # fmt: skip


@pytest.mark.parametrize("name", experiment_arms.EXPERIMENTS)
def test_recipes_of_all_arms(name: str) -> None:
    experiment = experiment_arms.EXPERIMENTS[name]
    assert len({each.name for each in experiment.arms}) == len(experiment.arms)
    assert experiment.prompt + experiment.drawn <= experiment.recipe["data.context"]
    for each in experiment.arms:
        recipe = experiment.recipe_of(each)
        assert model_config(recipe).num_hidden_layers == experiment.recipe["model.num_hidden_layers"]
        assert recipe.run.compile
        # Arms differ in their patterns, and see as many tokens a step.
        shared = experiment.recipe["data.context"] * experiment.recipe["schedule.batch_size"]
        assert recipe.data.context * recipe.schedule.batch_size == shared
        assert recipe.run.validation_windows * recipe.data.context == experiment.validation_tokens


def test_the_page_of_made_up_results(tmp_path: Path) -> None:
    results, docs = tmp_path / "results", tmp_path / "docs"
    results.mkdir()
    short = arm(1.5, "short", recipe={"data.context": 32})
    arms = {"short": short, "dense": arm(1.7, "dense"), "fixed": arm(1.6, "fixed"), "strided": arm(1.65, "strided")}
    arms["fixed"]["kernels"] = arms["short"]["kernels"] = ["Fixed(8, 2): triton"]
    arms["dense"]["kernels"] = ["Causal(): vendor (flash-attn-4)"]
    text = {"title": "Text", "unit": "byte", "arms": arms, "failed": {"local": "out of memory"}, "note": "So far."}
    (results / "text.json").write_text(json.dumps(text))
    experiments_page.write_page(results, docs)
    page = (docs / "results.md").read_text()
    assert "| enwik8 | 95 M, fixed, T 12,288 | 0.99 | 1.600 | 0 M, fixed, 1 s |" in page
    assert "| CIFAR-10 | 59 M, strided, T 3,072 | 2.80 | - | - | not run |" in page
    assert "the paper has fixed ahead of dense: confirmed (+0.100 bits)" in page
    assert "the paper has dense ahead of strided: not confirmed (-0.050 bits)" in page
    assert "- fixed reaches the bits that dense ends with in 0.95 of dense's time" in page
    assert "| at least | 0 | 32 |" in page
    assert "Not trained: local: out of memory" in page
    assert "\nAttention runs on: Fixed(8, 2): triton; Causal(): vendor (flash-attn-4).\n" in page
    assert "\nSo far.\n" in page
    # The best arm comes first.
    assert page.index("| fixed | Local(5)") < page.index("| strided | Local(7)") < page.index("| dense | Local(5)")
    for name in ("text-curves.png", "text-context.png"):
        with Image.open(docs / "results" / name) as picture:
            assert picture.width > 400
    with pytest.raises(SystemExit, match="run the experiments first"):
        experiments_page.write_page(tmp_path / "nothing", docs)


def test_the_share_of_time_that_the_same_bits_took() -> None:
    dense = [[50.0, 5, 2.5], [100.0, 10, 2.0]]
    curve = [[20.0, 9, 3.0], [40.0, 18, 1.5], [90.0, 40, 1.0]]
    assert experiments_page.share_of_time(curve, dense) == pytest.approx((20 + 20 * 1.0 / 1.5) / 100)
    assert experiments_page.share_of_time(curve[1:], dense) == 0.4
    assert experiments_page.share_of_time(curve[:1], dense) is None


def test_bits_by_context() -> None:
    nats = np.log(2) * np.array([4.0, 3.0, 2.0, 1.0])  # with 1, 2, 3 and 4 tokens before
    found = experiment_measures.bits_by_context(nats)
    assert found["at_least"][0] == [0, 2.5]
    assert [2, 2.0] in found["at_least"]
    assert [3, 1.5] in found["at_least"]


@pytest.fixture
def model() -> SparseTransformerForCausalLM:
    torch.manual_seed(0)
    config = SparseTransformerConfig(
        hidden_size=16,
        num_hidden_layers=2,
        num_attention_heads=2,
        max_position_embeddings=32,
        patterns=["Local(4)", "per_head(Local(4), Strided(4))"],
        initializer_scale=1.0,
    )
    made = SparseTransformerForCausalLM(config)
    torch.nn.init.normal_(made.lm_head.weight)
    return made.eval()


def test_samples_come_from_the_model(model: SparseTransformerForCausalLM) -> None:
    prompts = torch.randint(256, (2, 5), generator=torch.Generator().manual_seed(0))
    # A distribution so sharp that drawing is choosing the likeliest.
    sharp = copy.deepcopy(model)
    with torch.no_grad():
        sharp.lm_head.weight *= 1e4
    tokens, facts = experiment_measures.draw(sharp, prompts, 6, seconds=60)
    expected = sharp.generate(prompts, max_new_tokens=6, do_sample=False)
    assert tokens.tolist() == expected.tolist()
    assert facts["drawn"] == 6


def test_maps_are_rows_of_weights_inside_the_pattern(model: SparseTransformerForCausalLM) -> None:
    found = experiment_measures.attention_maps(model, torch.arange(32))
    assert sorted(found) == ["Local(4)", "Strided(4)"]
    for text, (picture, _) in found.items():
        allowed = model.model.layers[1].attention.pattern.split_heads(2)[text == "Strided(4)"].mask(32)
        assert not picture[~allowed.reshape(32, 32).numpy()].any()
        assert np.allclose(((picture / 255.0) ** 2).sum(1), 1, atol=0.05)
    # Nothing is left behind in the model.
    assert "attend" not in model.model.layers[0].attention.__dict__


@pytest.fixture
def data(tmp_path: Path) -> Path:
    """Prepared text and images of 4 x 4 pixels."""
    rng = np.random.default_rng(0)
    (tmp_path / "text").write_bytes(b"".join(b"line %d of a text that repeats itself\n" % n for n in range(300)))
    prepare(open_source(tmp_path / "text"), tmp_path / "data" / "wiki", 64)
    (tmp_path / "pictures").mkdir()
    for number in range(60):
        Image.fromarray(rng.integers(0, 256, (4, 4, 3), dtype=np.uint8)).save(tmp_path / "pictures" / f"{number}.png")
    source = decode_source(tmp_path / "pictures", Images(4), cache=tmp_path / "cache")
    prepare(source, tmp_path / "data" / "cifar10", 48)
    return tmp_path / "data"


def test_the_whole_way_at_tiny_sizes(tmp_path: Path, data: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(experiments, "EVALUATIONS", 4)
    output, docs = tmp_path / "results", tmp_path / "docs"
    start = ["experiments.py", "--tiny", "--data", str(data), "--output", str(output), "--docs", str(docs)]
    monkeypatch.setattr(sys, "argv", [*start, "--only", "text,images", "--seconds", "0.1", "--arms", "fixed;strided"])
    experiments.main()
    text = json.loads((output / "text.json").read_text())
    assert list(text["arms"]) == ["fixed"]
    fixed = text["arms"]["fixed"]
    assert len(fixed["validation"]) == experiments.EVALUATIONS
    assert fixed["validation"][-1][2] < fixed["validation"][0][2]
    assert fixed["tokens"] == fixed["steps"] * 128
    assert 0 < fixed["training"][0][0] < fixed["training"][-1][0] <= fixed["seconds"]
    assert "reason" not in fixed["sampled"]
    assert fixed["maps"]
    assert fixed["kernels"] == ["Fixed(8, 2): torch"]
    images = json.loads((output / "images.json").read_text())["arms"]["strided"]
    assert images["evaluation"]["unit"] == "dim"
    # What is there is not trained again, and other arms are added.
    slower = ["--set", "optimizer.learning_rate=0.0005"]
    monkeypatch.setattr(sys, "argv", [*start, "--only", "text", "--seconds", "0.1", *slower])
    experiments.main()
    again = json.loads((output / "text.json").read_text())["arms"]
    assert again.pop("fixed") == fixed
    (other,) = again.values()
    assert (fixed["recipe"]["optimizer.learning_rate"], other["recipe"]["optimizer.learning_rate"]) == (0.006, 0.0005)
    monkeypatch.setattr(sys, "argv", [*start, "--render"])
    experiments.main()
    page = (docs / "results.md").read_text()
    for name in ("text-curves", "images-curves", "images-samples", "images-completions", "text-attention"):
        assert f"](results/{name}.png)" in page
        with Image.open(docs / "results" / f"{name}.png") as picture:
            assert len(np.unique(np.asarray(picture.convert("RGB")).reshape(-1, 3), axis=0)) > 5
    assert "[the model from here on]" in page
