"""Kinds of data from `longstride train` to samples: what is taken, said, written, and measured."""

import json

import numpy as np
import pytest
import torch
from PIL import Image
from typer.testing import CliRunner

from longstride.cli import app
from longstride.errors import ArgumentError, DataError, RecipeError
from longstride.models import SparseTransformerConfig, SparseTransformerForCausalLM
from longstride.training import Recipe, evaluate, kind_of, model_config
from longstride.training.evaluation import record_spans

TINY = (
    "--pattern", "Local(8)", "--device", "cpu", "--steps", "2", "--batch-size", "2", "--output", "run",
    "--set", "model.hidden_size=16", "--set", "model.num_hidden_layers=1", "--set", "model.num_attention_heads=2",
    "--set", "sample.length_bytes=6", "--set", "schedule.warmup_steps=1",
)  # fmt: skip


def train(*arguments: str):
    return CliRunner().invoke(app, ["train", *arguments])


@pytest.fixture(autouse=True)
def here(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / ".cache"))
    return tmp_path


@pytest.fixture
def pictures(here):
    """40 images of 4 x 4 in a folder called pictures, the last of them of another size."""
    (here / "pictures").mkdir()
    for number in range(40):
        image = np.random.default_rng(number).integers(0, 256, (4 if number < 39 else 6, 4, 3), dtype=np.uint8)
        Image.fromarray(image).save(here / "pictures" / f"{number:02}.png")
    return here / "pictures"


def test_images_are_guessed_trained_on_sampled_and_measured_whole(here, pictures):
    (pictures / "zz.png").write_bytes(b"damaged")
    result = train("--data", "pictures", "--context", "48", *TINY)
    assert result.exit_code == 0, result.output
    for line in (
        "Taking pictures for images by the names of its files, such as 00.png; --kind bytes reads it as bytes.",
        "1 images were of another size, and were cropped to their centred square and scaled.",
        "Skipped zz.png: not a sound PNG or JPEG",
        "1 of 41 files were corrupt and are left out.",
        "context 48 dims",
        "bits per dim over",
    ):
        assert line in result.output
    model = SparseTransformerForCausalLM.from_pretrained(here / "run" / "model")
    assert (model.config.vocab_size, model.config.position_axes) == (256, [4, 4, 3])
    test = np.fromfile(here / "run" / "data" / "test.bin", np.uint8)
    with Image.open(here / "run" / "samples" / "sample-1.png") as image:
        tokens = np.asarray(image).reshape(-1)
    assert tokens[:42].tolist() == test[:42].tolist(), "all but the last 6 are the first test image's"
    figures = json.loads((here / "run" / "evaluation.json").read_text())
    assert figures["unit"] == "dim"
    assert figures["counted_bytes"] == len(test) // 48 * 47
    again = CliRunner().invoke(app, ["evaluate", "run", "--json", "--device", "cpu"])
    assert json.loads(again.output)["bits_per_byte"] == pytest.approx(figures["bits_per_byte"], rel=1e-5)
    other = CliRunner().invoke(app, ["evaluate", "run", "--data", "pictures/00.png", "--device", "cpu"])
    assert "over 47 dims" in other.output, other.output


def test_images_can_be_sampled_again(here, pictures):  # noqa: ARG001 - the folder that is trained on
    assert train("--data", "pictures", "--context", "48", *TINY).exit_code == 0
    (here / "run" / "samples" / "sample-1.png").unlink()
    result = CliRunner().invoke(app, ["sample", "run", "--length", "9", "--seed", "3", "--device", "cpu"])
    assert result.exit_code == 0, result.output
    assert "the last 9 of 48 dims are the model's" in result.output
    test = np.fromfile(here / "run" / "data" / "test.bin", np.uint8)
    with Image.open(here / "run" / "samples" / "sample-1.png") as image:
        assert np.asarray(image).reshape(-1)[:39].tolist() == test[:39].tolist()
    refused = CliRunner().invoke(app, ["sample", "run", "--prompt", "def ", "--device", "cpu"])
    assert refused.exit_code == 2
    assert "--prompt 'def ': run is of images" in refused.output


def test_a_model_of_other_tokens_says_that_it_writes_no_text(here):
    config = SparseTransformerConfig(
        vocab_size=30, hidden_size=16, num_hidden_layers=1, num_attention_heads=2, max_position_embeddings=32,
        patterns=["Local(4)"],
    )  # fmt: skip
    SparseTransformerForCausalLM(config).save_pretrained(here / "saved")
    result = CliRunner().invoke(app, ["sample", "saved", "--device", "cpu"])
    assert result.exit_code == 2
    assert "knows 30 tokens, which are no bytes" in result.output


@pytest.mark.usefixtures("pictures")
def test_resuming_takes_the_recipe_s_kind():
    assert train("--data", "pictures", "--context", "48", *TINY).exit_code == 0
    resumed = train("--output", "run", "--resume")
    assert resumed.exit_code == 0, resumed.output
    assert "Taking" not in resumed.output


@pytest.mark.usefixtures("pictures")
def test_bytes_are_taken_if_asked_for():
    result = train("--data", "pictures", "--kind", "bytes", "--context", "16", *TINY)
    assert result.exit_code == 0, result.output
    assert "Taking" not in result.output
    assert "context 16 bytes" in result.output


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (("--data", "pictures", "--context", "50"), ("--context 50 with --kind images", "--context 3072 (32 x 32)")),
        (("--data", "pictures", "--kind", "photos"), ("data.kind is 'photos'", "bytes, images")),
        (("--data", "pictures", "--context", "48", "--on-corrupt", "ignore"), ("data.on_corrupt", "skip, stop")),
        (
            ("--data", "pictures", "--context", "48", "--on-corrupt", "stop"),
            ("zz.png: not", "--on-corrupt skip"),
        ),
        (("--kind", "images", "--context", "48"), ("--kind images without --data",)),
    ],
)
def test_refusals(here, pictures, arguments, words):
    (pictures / "zz.png").write_bytes(b"damaged")
    result = train(*arguments, *TINY)
    assert result.exit_code == 2, result.output
    (line,) = [line for line in result.output.splitlines() if line.startswith("error: ")]
    for word in words:
        assert word in line
    assert not (here / "run").exists()


def finished(here, *arguments: str) -> tuple[SparseTransformerForCausalLM, dict, str]:
    """(model, evaluation, output) of a training that must succeed."""
    result = train(*arguments, *TINY)
    assert result.exit_code == 0, result.output
    figures = json.loads((here / "run" / "evaluation.json").read_text())
    assert np.isfinite(figures["bits_per_byte"])
    return SparseTransformerForCausalLM.from_pretrained(here / "run" / "model"), figures, result.output


def test_recordings_are_guessed_trained_on_and_written(here):
    soundfile = pytest.importorskip("soundfile")
    (here / "sound").mkdir()
    for name in ("a.wav", "b.flac"):
        soundfile.write(here / "sound" / name, np.sin(np.arange(4000) / 20) / 2, 16000)
    model, figures, output = finished(here, "--data", "sound", "--context", "64", "--sample-rate", "8000")
    assert "Taking sound for audio by the names of its files, such as a.wav" in output
    assert "train 3,600 samples (2 files)" in output
    assert model.config.vocab_size == 256
    assert figures["unit"] == "sample"
    written, rate_hz = soundfile.read(here / "run" / "samples" / "sample-2.wav")
    assert (len(written), rate_hz) == (64, 8000)


@pytest.mark.parametrize("kind", ["midi", "piano-roll"])
def test_music_is_trained_on_and_written(here, kind):
    symusic = pytest.importorskip("symusic")
    from longstride.data.notes import Notes, write_notes

    (here / "music").mkdir()
    for number in range(3):
        onset = np.arange(200) / 4
        notes = Notes(onset, onset + 0.3, 40 + (np.arange(200) * 7 + number) % 40, np.full(200, 80))
        write_notes(notes, here / "music" / f"{number}.mid")
    named = () if kind == "midi" else ("--kind", kind)
    model, figures, output = finished(here, "--data", "music", "--context", "88", *named)
    assert ("Taking music for midi" in output) == (kind == "midi")
    expected = {"midi": (388, "event"), "piano-roll": (3, "cell")}[kind]
    assert (model.config.vocab_size, figures["unit"]) == expected
    assert (model.config.position_axes == [1, 88]) == (kind == "piano-roll")
    assert symusic.Score(here / "run" / "samples" / "sample-1.mid").ticks_per_quarter == 500


def test_table_is_trained_on_with_its_own_vocabulary_and_written(here):
    rows = "".join(f"{number},{number % 7},{number * 0.1}\n" for number in range(1000))
    (here / "table.csv").write_text("time,day,level\n" + rows)
    arguments = ("--data", "table.csv", "--kind", "csv", "--context", "30", "--set", "data.bins=300")
    model, figures, _ = finished(here, *arguments)
    assert (model.config.vocab_size, figures["unit"]) == (301, "value")
    written = (here / "run" / "samples" / "sample-1.csv").read_text().splitlines()
    assert written[0] == "time,day,level"
    assert len(written) == 11
    # The first row of the test split, to within its bins.
    assert float(written[1].split(",")[0]) == pytest.approx(950, abs=3)
    again = CliRunner().invoke(app, ["evaluate", "run", "--data", "table.csv", "--device", "cpu"])
    assert "over 2,900 values" in again.output, again.output


def test_documents_are_trained_on_joined_and_their_boundaries_lie_in_the_run(here):
    (here / "texts.jsonl").write_text("".join(f'{{"text": "document {number}. "}}\n' for number in range(300)))
    model, figures, _ = finished(here, "--data", "texts.jsonl", "--kind", "documents", "--context", "32")
    assert (model.config.vocab_size, figures["unit"]) == (256, "byte")
    records = np.load(here / "run" / "data" / "train.records.npy")
    assert records[:3].tolist() == [0, 12, 24]
    assert len((here / "run" / "samples" / "sample-1.txt").read_bytes()) == 32


def test_help_names_the_kinds():
    # Lines may break anywhere, even after a hyphen.
    text = "".join(CliRunner().invoke(app, ["train", "--help"]).output.split())
    for word in ("--kind", "bytes,images,audio,midi,piano-roll,csv,documents", "--sample-rate", "--on-corrupt"):
        assert word in text


def test_recipe_with_bytes_or_no_kind_is_as_before():
    for kind in (None, "bytes"):
        recipe = Recipe().override({"data.kind": kind})
        assert kind_of(recipe) is None
        assert model_config(recipe).vocab_size == 256
    with pytest.raises(RecipeError, match="--context 512 with --kind images"):
        kind_of(Recipe().override({"data.kind": "images"}))


class Previous(torch.nn.Module):
    """Sure that the next token is this one plus one; notes where the windows begin."""

    def __init__(self):
        super().__init__()
        self.weight = torch.nn.Parameter(torch.zeros(1))
        self.first = []

    def forward(self, input_ids):
        self.first += input_ids[:, 0].tolist()
        return _Output(100.0 * torch.nn.functional.one_hot((input_ids + 1) % 256, 256))


class _Output:
    def __init__(self, logits):
        self.logits = logits


def test_windows_of_records_stand_side_by_side_in_an_evaluation():
    data = np.concatenate([np.arange(start, start + 12) for start in (100, 50, 200)]).astype(np.uint8)
    model = Previous()
    result = evaluate(model, data, context=12, min_context=1, record=12, unit="dim")
    assert model.first == [100, 50, 200]
    assert result.counted_bytes == 33
    # Right at every token of every image, and never asked for the first of the next one.
    assert result.bits_per_byte < 1e-6
    assert str(result).startswith("0.0000 bits per dim over 33 dims, each predicted from 1 to 11 earlier dims")
    assert [span.start for span in record_spans(100, 30, 12)] == [0, 36]
    with pytest.raises(ArgumentError, match=r"--min-context 5: .*it must be 1"):
        evaluate(model, data, context=12, min_context=5, record=12)
    with pytest.raises(ArgumentError, match="--context 1: a window has a first token, which is not predicted"):
        evaluate(model, data, context=1, min_context=1, record=12)
    with pytest.raises(DataError, match="11 tokens are too few"):
        evaluate(model, data[:11], context=12, min_context=1, record=12)
