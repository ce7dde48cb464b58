"""``longstride train`` from the outside: what it says, what it writes, and how it refuses."""

import errno
import json
import os

import pytest
import torch
import yaml
from typer.testing import CliRunner

from longstride.cli import app
from longstride.models import SparseTransformerForCausalLM

TINY = (
    "--context", "32", "--pattern", "Local(8)", "--pattern", "Strided(8)", "--device", "cpu", "--steps", "4",
    "--batch-size", "2", "--set", "model.hidden_size=16", "--set", "model.num_hidden_layers=2",
    "--set", "model.num_attention_heads=2", "--set", "sample.length_bytes=6", "--set", "schedule.warmup_steps=1",
)  # fmt: skip


def train(*arguments: str):
    return CliRunner().invoke(app, ["train", *arguments])


@pytest.fixture(autouse=True)
def here(tmp_path, monkeypatch):
    """A working folder with text.txt in it."""
    text = b"".join(b"the number %d and the number %d\n" % (number, number + 1) for number in range(200))
    (tmp_path / "text.txt").write_bytes(text)
    monkeypatch.chdir(tmp_path)
    return tmp_path


def assert_refused(result, *words: str) -> None:
    assert result.exit_code == 2, result.output
    lines = [line for line in result.output.splitlines() if line.startswith("error: ")]
    assert len(lines) == 1, result.output
    for word in words:
        assert word in lines[0], lines[0]
    assert "Traceback" not in result.output


def test_result_is_complete_and_its_parts_are_named_relative_to_here(here):
    result = train("--data", "text.txt", "--output", "runs/a", *TINY)
    assert result.exit_code == 0, result.output
    total = len((here / "text.txt").read_bytes())
    assert f"text.txt, split at 90 % and 95 % of the bytes: train {int(total * 0.9):,} bytes (1 file)" in result.output
    assert "2 layers, context 32 bytes, patterns Local(8); Strided(8)" in result.output
    files = {
        "model": "runs/a/model",
        "recipe": "runs/a/recipe.yaml",
        "metrics": "runs/a/metrics.jsonl",
        "loss curve": "runs/a/loss.png",
        "patterns": "runs/a/patterns.png",
        "samples": "runs/a/samples.txt",
        "evaluation": "runs/a/evaluation.json",
    }
    for what, path in files.items():
        assert f"{what:<12}{path}\n" in result.output
        assert (here / path).exists()
    for picture in ("loss.png", "patterns.png"):
        assert (here / "runs/a" / picture).read_bytes().startswith(b"\x89PNG")
    model = SparseTransformerForCausalLM.from_pretrained("runs/a/model")
    assert model.config.patterns == ["Local(8)", "Strided(8)"]
    evaluation = json.loads((here / "runs/a/evaluation.json").read_text())
    assert evaluation["step"] == 4
    assert evaluation["min_context"] == 16
    assert evaluation["counted_bytes"] == total - int(total * 0.95) - 16
    assert f"{evaluation['bits_per_byte']:.4f} bits per byte" in result.output
    assert f"{evaluation['xz_bits_per_byte']:.4f} for the same bytes by xz -9e" in result.output
    samples = (here / "runs/a/samples.txt").read_text()
    assert samples.startswith("--- sample 1, seed 0, temperature 0.8 ---\n")
    assert "--- sample 2, seed 1, temperature 0.8 ---" in samples
    assert samples in result.output


def test_resolved_recipe_has_file_flags_and_assignments_in_this_order(here):
    (here / "mine.yaml").write_text("schedule: {steps: 2, batch_size: 1}\nmodel: {hidden_size: 8}\nrun: {seed: 4}\n")
    result = train("--recipe", "mine.yaml", "--data", "text.txt", "--output", "a", *TINY, "--set", "run.seed=5")
    assert result.exit_code == 0, result.output
    written = yaml.safe_load((here / "a/recipe.yaml").read_text())
    assert written["schedule"]["steps"] == 4
    assert written["schedule"]["batch_size"] == 2
    assert written["model"]["hidden_size"] == 16
    assert written["run"]["seed"] == 5
    assert written["data"]["path"] == "text.txt"
    assert written["optimizer"]["weight_decay"] == 0.01


def test_without_data_it_trains_on_the_standard_library_and_says_so():
    result = train("--output", "a", *TINY, "--set", "evaluation.max_bytes=500")
    assert result.exit_code == 0, result.output
    assert "the source of Python's standard library" in result.output
    assert "split by a hash of each file's path: train " in result.output
    assert "Evaluating on 500 of the " in result.output


def test_time_limit_still_gives_a_result_and_says_how_to_train_on(here):
    result = train("--data", "text.txt", "--output", "a", *TINY, "--time-limit", "0")
    assert result.exit_code == 0, result.output
    assert "The time limit of 0 s ended the training at step 1." in result.output
    assert result.output.rstrip().endswith("To go on: longstride train --output a --resume")
    assert (here / "a/model").exists()
    result = train("--output", "a", "--resume")
    assert "Resuming at step 1 of 4" in result.output
    assert json.loads((here / "a/evaluation.json").read_text())["step"] == 4


def test_finished_run_does_not_train_again_but_finishes_what_was_lost(here):
    assert train("--data", "text.txt", "--output", "a", *TINY).exit_code == 0
    before = (here / "a/samples.txt").read_text()
    (here / "a/samples.txt").unlink()
    result = train("--output", "a", "--resume")
    assert result.exit_code == 0, result.output
    assert (here / "a/samples.txt").read_text() == before


def test_ctrl_c_before_the_training_says_what_to_type_and_that_works(here, monkeypatch):
    def interrupted(*_, **__):
        raise KeyboardInterrupt

    with monkeypatch.context() as patch:
        patch.setattr("longstride.data.prepare", interrupted)
        result = train("--data", "text.txt", "--output", "a", *TINY)
    assert result.exit_code == 130
    assert result.output.rstrip().endswith("Interrupted.\nTo go on: longstride train --output a --resume")
    result = train("--output", "a", "--resume")
    assert result.exit_code == 0, result.output
    assert json.loads((here / "a/evaluation.json").read_text())["step"] == 4


def test_help_names_every_flag_and_the_folder_content():
    text = " ".join(train("--help").output.split())
    for words in ("--data", "--resume", "--set", "--pattern", "Ctrl-C", "metrics.jsonl", "standard library"):
        assert words in text


def test_empty_file(here):
    (here / "empty").write_bytes(b"")
    assert_refused(train("--data", "empty", "--output", "a"), "empty is empty (0 bytes)", "--data")
    assert not (here / "a").exists()


def test_missing_data(here):
    assert_refused(train("--data", "nowhere", "--output", "a"), "no file or folder nowhere", "check --data")
    assert not (here / "a").exists()


def test_data_shorter_than_the_context(here):
    result = train("--data", "text.txt", "--output", "a", "--context", "8192")
    assert_refused(result, "text.txt holds", "fewer than the context of 8,192", "--context of at most")
    assert not (here / "a").exists()


def test_unknown_key_suggests_the_nearest(here):
    assert_refused(train("--output", "a", "--set", "model.hiden_size=3"), "did you mean model.hidden_size?")
    (here / "r.yaml").write_text("optimizer:\n  learnig_rate: 0.1\n")
    result = train("--output", "a", "--recipe", "r.yaml")
    assert_refused(result, "r.yaml: unknown key optimizer.learnig_rate", "did you mean optimizer.learning_rate?")


def test_wrong_type_in_the_recipe():
    result = train("--output", "a", "--set", "model.hidden_size=wide")
    assert_refused(result, "model.hidden_size is 'wide': it must be a whole number")


def test_heads_that_do_not_divide_the_width(here):
    result = train("--output", "a", "--set", "model.hidden_size=10", "--set", "model.num_attention_heads=4")
    assert_refused(result, "hidden_size=10", "num_attention_heads=4")
    assert not (here / "a").exists()


def test_output_that_holds_a_run(here):
    (here / "a").mkdir()
    (here / "a/recipe.yaml").write_text("")
    result = train("--data", "text.txt", "--output", "a", *TINY)
    assert_refused(result, "a already holds a run", "--resume", "another --output")


def test_output_that_cannot_be_made(here):
    (here / "file").write_text("")
    result = train("--data", "text.txt", "--output", "file/run", *TINY)
    assert_refused(result, "cannot make the folder file/run (Not a directory)", "choose another --output")


def test_output_that_cannot_be_written(monkeypatch):
    def refuse(*_):
        raise PermissionError(errno.EACCES, "Permission denied", "a/recipe.yaml")

    # Not by taking the permission away: tests may run as root, who may write anywhere.
    monkeypatch.setattr(os, "replace", refuse)
    result = train("--data", "text.txt", "--output", "a", *TINY)
    assert_refused(result, "cannot write in a (Permission denied)", "choose another --output")


def test_output_inside_the_data():
    assert_refused(train("--data", ".", "--output", "runs/a", *TINY), "--output runs/a lies inside --data .")


def test_nothing_to_resume(here):
    (here / "empty").mkdir()
    for output in ("empty", "nowhere"):
        assert_refused(train("--output", output, "--resume"), f"nothing to resume in {output}", "leave --resume out")
    assert not (here / "nowhere").exists()


def test_resuming_with_other_values(here):
    assert train("--data", "text.txt", "--output", "a", *TINY).exit_code == 0
    result = train("--output", "a", "--resume", "--batch-size", "3")
    assert_refused(result, "schedule.batch_size is 2 in the run to resume and cannot become 3")
    (here / "r.yaml").write_text("")
    assert_refused(train("--output", "a", "--resume", "--recipe", "r.yaml"), "leave --recipe out")


def test_only_damaged_checkpoints(here):
    assert train("--data", "text.txt", "--output", "a", *TINY).exit_code == 0
    (here / "a/checkpoints/checkpoint-4/optimizer.pt").write_bytes(b"")
    result = train("--output", "a", "--resume")
    assert_refused(result, "checkpoint-4 is damaged: optimizer.pt has 0 bytes", "new --output")


def test_full_disk_at_a_checkpoint(here, monkeypatch):
    def full(_, path, *__, **___):
        raise OSError(errno.ENOSPC, "No space left on device", str(path))

    with monkeypatch.context() as patch:
        patch.setattr(torch, "save", full)
        result = train("--data", "text.txt", "--output", "a", *TINY)
    assert_refused(result, "checkpoint of step 4", "No space left on device", "no earlier one", "--resume")
    assert list((here / "a/checkpoints").iterdir()) == []


def test_full_disk_elsewhere(monkeypatch):
    def full(*_, **__):
        raise OSError(errno.ENOSPC, "No space left on device", "a/data/train.bin")

    monkeypatch.setattr("longstride.data.prepare", full)
    result = train("--data", "text.txt", "--output", "a", *TINY)
    assert_refused(result, "No space left on device: a/data/train.bin")


def test_cuda_without_cuda(here, monkeypatch):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    result = train("--data", "text.txt", "--output", "a", "--device", "cuda")
    assert_refused(result, "--device cuda: this PyTorch sees no such device here; use --device cpu or auto")
    assert not (here / "a").exists()


def test_fp16_on_the_cpu():
    result = train("--data", "text.txt", "--output", "a", "--device", "cpu", "--precision", "fp16")
    assert_refused(result, "--precision fp16 needs a GPU: use bf16 or fp32")


def test_a_recording_on_the_cpu(here):
    result = train("--data", "text.txt", "--output", "a", "--device", "cpu", "--set", "run.cuda_graph=true")
    assert_refused(result, "run.cuda_graph on cpu: it needs a CUDA device; set it to false here")
    assert not (here / "a").exists()


def test_scale_makes_another_size_of_the_recipe(here):
    options = ("--context", "32", "--device", "cpu", "--steps", "1", "--set", "sample.count=0")
    result = train("--data", "text.txt", "--output", "runs/s", "--scale", "1/8", "--batch-size", "1", *options)
    assert result.exit_code == 0, result.output
    model = yaml.safe_load((here / "runs/s/recipe.yaml").read_text())["model"]
    assert (model["hidden_size"], model["num_hidden_layers"], model["num_attention_heads"]) == (64, 2, 4)
    assert "2 layers" in result.output
    # What is named beside it stands.
    result = train(
        "--data", "text.txt", "--output", "runs/t", "--scale", "1/8", "--set", "model.hidden_size=16", *options
    )
    assert yaml.safe_load((here / "runs/t/recipe.yaml").read_text())["model"]["hidden_size"] == 16
    assert_refused(
        train("--output", "runs/s", "--resume", "--scale", "1/8"), "--scale 1/8 with --resume", "leave --scale"
    )


def test_other_scales_are_refused(here):
    assert_refused(train("--data", "text.txt", "--scale", "9"), "--scale 9", "from 1/64 to 4")
    assert not (here / "runs").exists()


def test_recomputation_that_cannot_be_is_refused_before_anything_is_written(here):
    options = ("--set", "run.recompute=all_but_attention", "--set", "model.attention_backend=reference")
    assert_refused(train("--data", "text.txt", *TINY, *options), "autograd differentiates that backend")
    assert not (here / "runs").exists()
