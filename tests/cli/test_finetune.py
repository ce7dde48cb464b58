"""``longstride finetune`` and ``longstride classify`` from the outside."""

import json

import pytest
from typer.testing import CliRunner

from longstride.cli import app

TINY = (
    "--steps", "2", "--batch-size", "2", "--context", "16", "--device", "cpu",
    "--pattern", "Local(3, lookahead=2) | Global(1, causal=False)",
    "--set", "model.hidden_size=8", "--set", "model.num_hidden_layers=1", "--set", "model.num_attention_heads=2",
    "--set", "run.log_every=1",
)  # fmt: skip


def run(*arguments):
    return CliRunner().invoke(app, [*map(str, arguments)])


@pytest.fixture(scope="module")
def data(tmp_path_factory):
    folder = tmp_path_factory.mktemp("documents")
    for label in ("cats", "dogs"):
        (folder / label).mkdir()
        for number in range(5):
            (folder / label / f"{number}.txt").write_text(f"about {label} and nothing else, {number}")
    return folder


@pytest.fixture(scope="module")
def finished(data, tmp_path_factory):
    output = tmp_path_factory.mktemp("runs") / "pets"
    return output, run("finetune", "--data", data, "--output", output, "--pretrain", 1, *TINY)


def test_a_run_leaves_its_results(finished):
    output, result = finished
    assert result.exit_code == 0, result.output
    assert "2 classes, 6 for train, 2 for validation, 2 for test documents" in result.output
    assert "pretraining, step 1 of 1: loss" in result.output
    assert "Test: " in result.output
    assert "of 2 documents are classified right" in result.output
    assert sorted(file.name for file in output.iterdir()) == [
        "evaluation.json", "finetuning.yaml", "metrics.jsonl", "model",
    ]  # fmt: skip
    figures = json.loads((output / "evaluation.json").read_text())
    assert (figures["documents"], figures["majority_accuracy"], figures["step"]) == (2, 0.5, 2)


def test_its_model_classifies_files(finished, data):
    output, _ = finished
    files = [data / "cats" / "0.txt", data / "dogs" / "1.txt"]
    result = run("classify", output, *files, "--device", "cpu", "--json")
    assert result.exit_code == 0, result.output
    found = json.loads(result.output)
    assert list(found) == [str(file) for file in files]
    for probabilities in found.values():
        assert set(probabilities) == {"cats", "dogs"}
        assert sum(probabilities.values()) == pytest.approx(1)
    plain = run("classify", output / "model", files[0], "--device", "cpu")
    best = max(found[str(files[0])], key=found[str(files[0])].get)
    assert plain.output.startswith(f"{files[0]}: {best} (")


def test_a_run_starts_from_another_and_is_shown(finished, data, tmp_path):
    output, _ = finished
    result = run(
        "finetune", "--data", data, "--output", tmp_path / "next", "--start-from", output / "model", "--steps", 1,
        "--context", 16, "--device", "cpu",
    )  # fmt: skip
    assert result.exit_code == 0, result.output
    shown = run("show", tmp_path / "next", "--output", tmp_path / "picture.png")
    assert shown.exit_code == 0, shown.output
    assert "layer 0     Local(3, lookahead=2) | Global(1, causal=False)" in shown.output


def test_mistakes_are_one_line(finished, data, tmp_path):
    output, _ = finished
    free = tmp_path / "free"
    for arguments, message in (
        (("finetune",), "there is nothing to classify: name a folder with a sub-folder a class"),
        (("finetune", "--data", data, "--output", output, *TINY), "already holds a run: choose another --output"),
        (("finetune", "--data", data, "--output", data / "out", *TINY), "lies inside --data"),
        (("finetune", "--data", data / "cats", "--output", free), "has no sub-folders"),
        (("finetune", "--data", data, "--output", free, "--pattern", "Local(4)"), "lets no token attend to later ones"),
        (
            ("finetune", "--data", data, "--output", free, "--start-from", output / "model", "--pattern", "Full()"),
            "model.patterns with model.start_from: the model in",
        ),
        (("finetune", "--data", data, "--output", free, "--precision", "fp16", "--device", "cpu"), "needs a GPU"),
        (("classify", tmp_path, data / "cats" / "0.txt"), "holds no model: name the --output folder"),
        (("classify", output, data / "cats" / "9.txt"), "there is no file"),
        (("classify", output, data / "cats" / "0.txt", "--batch-size", 0), "--batch-size 0: it must be at least 1"),
        (("sample", output), "this pattern lets a token attend to later ones"),
    ):
        result = run(*arguments)
        assert result.exit_code == 2, result.output
        assert result.output.count("\n") == 1, result.output
        assert message in result.output
        assert not free.exists()
