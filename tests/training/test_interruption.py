"""A real process that is really killed, at several moments, and resumed: the same curve, bit-equal weights.

Dropout and accumulated batches are on, so that a generator or a batch out of step would show.
"""

import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file
from typer.testing import CliRunner

from longstride.cli import app
from longstride.training import read_curve
from longstride.training.checkpoints import list_checkpoints

STEPS = 60

pytestmark = pytest.mark.slow

# What a process does before the command line, given as ``python -c``.
PLAIN = "from longstride.cli import main; main()"

# Dies in the middle of writing the optimiser's state of step 40, with half a file on the disk.
KILLED_WHILE_WRITING = """
import os, signal, torch
original = torch.save
def save(value, path, *args, **kwargs):
    original(value, path, *args, **kwargs)
    if "checkpoint-40" in str(path) and "optimizer" in str(path):
        os.truncate(path, os.path.getsize(path) // 2)
        os.kill(os.getpid(), signal.SIGKILL)
torch.save = save
"""

# Dies when the checkpoint of step 40 is all there, but does not have its name yet.
KILLED_BEFORE_RENAME = """
import os, pathlib, signal
original = pathlib.Path.rename
def rename(self, target):
    if pathlib.Path(target).name == "checkpoint-40":
        os.kill(os.getpid(), signal.SIGKILL)
    return original(self, target)
pathlib.Path.rename = rename
"""

# Dies before there is any checkpoint.
KILLED_EARLY = """
import os, signal
from longstride.training import trainer
original = trainer.ByteTrainer.training_step
def training_step(self, *args, **kwargs):
    if self.state.global_step == 7:
        os.kill(os.getpid(), signal.SIGKILL)
    return original(self, *args, **kwargs)
trainer.ByteTrainer.training_step = training_step
"""


def command(folder: Path, text: Path, before: str = "") -> list[str]:
    return [sys.executable, "-c", before + PLAIN, "train", "--output", str(folder), *arguments(text)]


def environment() -> dict[str, str]:
    # One thread: the sums of a matrix product must be in the same order in every process.
    source = str(Path(__file__).parents[2] / "src")
    path = os.pathsep.join(filter(None, (source, os.environ.get("PYTHONPATH"))))
    return {**os.environ, "PYTHONPATH": path, "OMP_NUM_THREADS": "1"}


def arguments(text: Path) -> list[str]:
    values = {
        "model.hidden_size": 16,
        "model.num_hidden_layers": 2,
        "model.num_attention_heads": 2,
        "model.dropout": 0.1,
        "schedule.warmup_steps": 5,
        "schedule.gradient_accumulation_steps": 2,
        "run.log_every": 4,
        "run.evaluate_every": 15,
        "run.checkpoint_every": 20,
        "sample.length_bytes": 5,
        "sample.count": 1,
    }
    flags = ["--data", str(text), "--context", "32", "--pattern", "Local(8) | Strided(8)", "--device", "cpu"]
    flags += ["--steps", str(STEPS), "--batch-size", "2"]
    return flags + [f"--set={key}={value}" for key, value in values.items()]


def finish(*arguments: str) -> str:
    """A command line that runs to its end, in this process to save the time of starting another."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        done = CliRunner().invoke(app, ["train", *arguments])
    finally:
        torch.set_num_threads(threads)
    assert done.exit_code == 0, done.output
    return done.output


@pytest.fixture(scope="module")
def text(tmp_path_factory) -> Path:
    path = tmp_path_factory.mktemp("text") / "text.txt"
    path.write_bytes(b"".join(b"%d bottles of beer on the wall\n" % number for number in range(300)))
    return path


@pytest.fixture(scope="module")
def uninterrupted(tmp_path_factory, text) -> Path:
    folder = tmp_path_factory.mktemp("uninterrupted") / "run"
    finish("--output", str(folder), *arguments(text))
    return folder


def assert_same_run(folder: Path, expected: Path) -> None:
    assert (folder / "metrics.jsonl").read_text() == (expected / "metrics.jsonl").read_text()
    weights, same = (
        load_file(folder / "model" / "model.safetensors"),
        load_file(expected / "model" / "model.safetensors"),
    )
    assert weights.keys() == same.keys()
    for name, weight in weights.items():
        assert torch.equal(weight, same[name]), name
    assert (folder / "samples.txt").read_text() == (expected / "samples.txt").read_text()


def test_uninterrupted_run_has_all_steps(uninterrupted):
    steps = [record["step"] for record in read_curve(uninterrupted / "metrics.jsonl") if "loss" in record]
    assert steps == list(range(1, STEPS + 1))


@pytest.mark.parametrize(
    ("before", "last_whole"),
    [(KILLED_WHILE_WRITING, 20), (KILLED_BEFORE_RENAME, 20), (KILLED_EARLY, None)],
    ids=["while writing a checkpoint", "before a checkpoint has its name", "before the first checkpoint"],
)
def test_killed_at_a_chosen_moment(tmp_path, text, uninterrupted, before, last_whole):
    folder = tmp_path / "run"
    killed = subprocess.run(command(folder, text, before), env=environment(), capture_output=True, timeout=120)
    assert killed.returncode == -signal.SIGKILL
    checkpoints = list_checkpoints(folder / "checkpoints")
    assert [checkpoint.step for checkpoint in checkpoints] == ([] if last_whole is None else [last_whole])
    half_written = (folder / "checkpoints" / ".unfinished-checkpoint-40").exists()
    assert half_written == (last_whole is not None)
    said = finish("--output", str(folder), "--resume")
    assert ("Resuming at step 20 of 60" in said) == (last_whole is not None)
    assert_same_run(folder, uninterrupted)
    assert not list((folder / "checkpoints").glob(".unfinished-*"))


def wait_for_step(process: subprocess.Popen, folder: Path, step: int) -> None:
    deadline = time.monotonic() + 60
    while not any(record["step"] >= step for record in read_curve(folder / "metrics.jsonl")):
        assert process.poll() is None, "the training ended before it could be interrupted"
        assert time.monotonic() < deadline
        time.sleep(0.002)


def test_killed_from_outside_in_the_middle(tmp_path, text, uninterrupted):
    folder = tmp_path / "run"
    process = subprocess.Popen(
        command(folder, text), env=environment(), stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL
    )
    wait_for_step(process, folder, 24)
    process.kill()
    assert process.wait() == -signal.SIGKILL
    finish("--output", str(folder), "--resume")
    assert_same_run(folder, uninterrupted)


def test_ctrl_c_saves_says_what_to_type_and_goes_on_exactly(tmp_path, text, uninterrupted):
    folder = tmp_path / "run"
    process = subprocess.Popen(
        command(folder, text),
        env=environment(),
        cwd=tmp_path,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
    )
    wait_for_step(process, folder, 12)
    process.send_signal(signal.SIGINT)
    said, complaints = process.communicate(timeout=60)
    assert process.returncode == 130
    assert "Traceback" not in complaints
    stopped = list_checkpoints(folder / "checkpoints")[-1].step
    assert 12 <= stopped < STEPS
    assert f"Interrupted after step {stopped} of 60; everything is saved." in said
    assert said.rstrip().endswith("To go on: longstride train --output run --resume")
    assert not (folder / "model").exists()
    finish("--output", str(folder), "--resume")
    assert_same_run(folder, uninterrupted)
