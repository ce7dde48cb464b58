"""Trainings by segments and on packed documents: what the model is given, what is saved, and what is measured."""

import json
import math
from itertools import pairwise

import numpy as np
import pytest
import torch
from typer.testing import CliRunner

from longstride.checks.subject import PROBE_TOKENS, Predictor
from longstride.cli import app
from longstride.data import decode_source, make_kind, open_source, prepare
from longstride.errors import ArgumentError, DataError, RecipeError, UnsupportedError
from longstride.models import SegmentMemory, SparseTransformerConfig, SparseTransformerForCausalLM
from longstride.training import (
    Recipe,
    RunFolder,
    evaluate_as_trained,
    model_config,
    read_curve,
    train,
)
from longstride.training.checkpoints import list_checkpoints
from longstride.training.trainer import MEMORY, ByteTrainer

TINY = {
    "data.context": 16,
    "model.patterns": ["Local(8)", "Strided(4)"],
    "model.block": "modern",
    "model.hidden_size": 16,
    "model.num_hidden_layers": 2,
    "model.num_attention_heads": 2,
    "model.dropout": 0.1,
    "schedule.steps": 8,
    "schedule.warmup_steps": 3,
    "schedule.batch_size": 2,
    "run.device": "cpu",
    "run.log_every": 3,
    "run.evaluate_every": 4,
    "run.checkpoint_every": 3,
    "run.validation_windows": 6,
}
LINES = [f"line {number} of a text that repeats itself\n" * (1 + number % 4) for number in range(60)]


class Run:
    """A folder in which tiny trainings run, on documents."""

    def __init__(self, path, **changed):
        changed = {key.replace("__", "."): value for key, value in changed.items()}
        self.recipe = Recipe().override({**TINY, "data.kind": "documents", **changed})
        self.folder = RunFolder(path / "run")
        file = path / "lines.jsonl"
        file.write_text("\n".join(json.dumps({"text": line}) for line in LINES))
        if self.recipe.data.kind == "documents":
            source = decode_source(file, make_kind("documents", context=16, settings={}), cache=path / "cache")
        else:
            source = open_source(file)
        self.folder.start(self.recipe)
        self.data = prepare(source, self.folder.data, self.recipe.data.context)

    def train(self):
        return train(self.recipe, self.data, self.folder, lambda _: None)

    def curve(self):
        return read_curve(self.folder.metrics)

    def losses(self):
        return [record["loss"] for record in self.curve() if "loss" in record]


@pytest.fixture
def start(tmp_path):
    def start(name="a", **changed):
        (tmp_path / name).mkdir()
        return Run(tmp_path / name, **changed)

    return start


@pytest.fixture
def batches(monkeypatch):
    """What the trainer gives the model, batch by batch: (while training, inputs, tokens that the memory has seen)."""
    given = []
    original = ByteTrainer.compute_loss

    def compute_loss(self, model, inputs, *args, **kwargs):
        inputs = dict(inputs)
        memory = self.memory if model.training else self.validation_memory
        seen = None if memory is None else list(memory.seen)
        given.append((model.training, dict(inputs), seen))
        return original(self, model, inputs, *args, **kwargs)

    monkeypatch.setattr(ByteTrainer, "compute_loss", compute_loss)
    return given


CHOICES = {
    "joined, with a memory": {"model__memory": 16, "data__kind": "bytes"},
    "documents, with a memory": {"model__memory": 16, "data__documents": "packed"},
    "packed": {"data__documents": "packed", "data__context": 64},
}


@pytest.mark.parametrize(
    ("choice", "accumulated"), [("joined, with a memory", 2), ("documents, with a memory", 1), ("packed", 2)]
)
def test_a_resumed_run_equals_an_uninterrupted_one(start, choice, accumulated):
    options = CHOICES[choice] | {"schedule__gradient_accumulation_steps": accumulated}
    whole, resumed = start("a", **options), start("b", **options)
    result = whole.train()
    assert all(math.isfinite(loss) for loss in whole.losses())
    resumed.train()
    for checkpoint in list_checkpoints(resumed.folder.checkpoints)[1:]:
        for file in checkpoint.folder.iterdir():
            file.unlink()
        checkpoint.folder.rmdir()
    again = resumed.train()
    assert resumed.curve() == whole.curve()
    for (name, weight), (_, same) in zip(result.model.named_parameters(), again.model.named_parameters(), strict=True):
        assert torch.equal(weight, same), name


def test_a_run_that_lost_its_memory_would_end_otherwise(start, monkeypatch):
    """What the test above would see: without the memory in the checkpoint, the curve differs."""
    options = CHOICES["joined, with a memory"]
    whole, resumed = start("a", **options), start("b", **options)
    whole.train()
    resumed.train()
    for checkpoint in list_checkpoints(resumed.folder.checkpoints)[1:]:
        for file in checkpoint.folder.iterdir():
            file.unlink()
        checkpoint.folder.rmdir()
    monkeypatch.setattr(ByteTrainer, "restore_memory", lambda *_: None)
    resumed.train()
    assert resumed.curve() != whole.curve()


def test_rows_go_on_from_batch_to_batch_and_validation_leaves_them_alone(start, batches):
    run = start(**CHOICES["joined, with a memory"])
    run.train()
    trained = [(inputs, seen) for training, inputs, seen in batches if training]
    assert len(trained) == 8
    text = run.data.split("train")
    for (before, _), (after, _) in pairwise(trained):
        assert torch.equal(before["shift_labels"][:, -1], after["input_ids"][:, 0])
    assert [seen for _, seen in trained] == [[], *[[16 * step] * 2 for step in range(1, 8)]]
    assert [inputs["starts"] for inputs, _ in trained] == [[True, True], *[[False, False]] * 7]
    assert torch.equal(trained[0][0]["input_ids"][0], torch.from_numpy(text[:16].astype(np.int64)))
    validated = [inputs["starts"] for training, inputs, _ in batches if not training]
    assert validated == [[True, True], [False, False], [False, False]] * 2


def test_a_document_begins_with_an_empty_memory(start, batches):
    run = start(**CHOICES["documents, with a memory"])
    run.train()
    starts = [inputs["starts"] for training, inputs, _ in batches if training]
    assert [True, False] in starts
    assert [False, True] in starts
    first = [tokens for training, tokens, start in seen_by_rows(batches) if training and start]
    assert first
    assert all(tokens.startswith(b"line ") for tokens in first)


def seen_by_rows(batches):
    """(while training, real tokens, whether the row begins) of every row whose memory is not begun by the training."""
    for training, inputs, seen in batches:
        for row, start in enumerate(inputs["starts"]):
            if seen:
                yield training, bytes(inputs["input_ids"][row][inputs["shift_labels"][row] != -100].tolist()), start


def test_packed_windows_say_where_documents_begin(start, batches):
    run = start(**CHOICES["packed"])
    run.train()
    text, records = run.data.split("train").tobytes(), run.data.records("train").tolist()
    ends = {text[max(0, record - 8) : record] for record in records[1:-1]}
    for training, inputs, _ in batches:
        assert inputs["max_length_q"] == 64
        offsets = inputs["cu_seq_lens_q"].tolist()
        assert {0, 64, 128} <= set(offsets)
        if not training:
            continue
        tokens = bytes(inputs["input_ids"].flatten().tolist())
        for offset in offsets[1:-1]:
            if offset != 64 and offset % 64 >= 8:
                assert tokens[offset - 8 : offset] in ends


def small_model(**changed):
    values = {
        "hidden_size": 16,
        "num_hidden_layers": 2,
        "num_attention_heads": 2,
        "max_position_embeddings": 16,
        "patterns": ["Local(6)", "Strided(4)"],
        "block": "modern",
        "initializer_scale": 1.0,
    }
    torch.manual_seed(0)
    model = SparseTransformerForCausalLM(SparseTransformerConfig(**(values | changed))).double()
    torch.nn.init.normal_(model.lm_head.weight, std=0.3)
    return model.eval()


TEXT = np.frombuffer("".join(LINES).encode(), np.uint8)[:700]


def bits(model, pieces):
    """Bits of every prediction in each of the pieces by itself, one after another."""
    with torch.no_grad():
        found = []
        for piece in pieces:
            tokens = torch.from_numpy(piece.astype(np.int64))[None]
            memory = SegmentMemory(model.config, tokens=10_000) if model.config.memory else None
            logits = model(tokens[:, :-1], memory=memory).logits.float()
            found.append(torch.nn.functional.cross_entropy(logits[0], tokens[0, 1:], reduction="none") / math.log(2))
        return torch.cat(found)


@pytest.mark.parametrize("batch_size", [3, 64])
@pytest.mark.parametrize("min_context", [1, 9])
def test_a_text_by_segments_is_the_whole_text(batch_size, min_context):
    """With a memory of the windows' reach through all layers, any number of rows measures what one forward does."""
    model = small_model(memory=16, patterns=["Local(6)", "Local(8)"], max_position_embeddings=32)
    result = evaluate_as_trained(model, TEXT, min_context=min_context, batch_size=batch_size)
    assert result.counted_bytes == 700 - min_context
    assert (result.min_context, result.max_context) == (min_context, 32)
    assert result.bits_per_byte == pytest.approx(float(bits(model, [TEXT])[min_context - 1 :].mean()), abs=1e-5)


@pytest.mark.parametrize("batch_size", [1, 3])
def test_documents_by_segments_are_each_document(batch_size):
    model = small_model(memory=16, patterns=["Local(6)", "Local(8)"], max_position_embeddings=32)
    documents = np.array([0, 1, 90, 200, 333, 700])
    result = evaluate_as_trained(model, TEXT, min_context=1, batch_size=batch_size, documents=documents)
    pieces = np.split(TEXT, documents[1:-1])
    assert result.counted_bytes == 700 - 5
    expected = float(bits(model, [piece for piece in pieces if len(piece) > 1]).mean())
    assert result.bits_per_byte == pytest.approx(expected, abs=1e-5)


@pytest.mark.parametrize("block", ["modern", "sparse_transformer"])
def test_packed_documents_are_measured_apart(block):
    model = small_model(block=block)
    documents = np.array([0, 1, 90, 200, 333, 700])
    result = evaluate_as_trained(model, TEXT, min_context=1, batch_size=3, documents=documents)
    cuts = np.unique(np.concatenate([documents[1:-1], np.arange(16, 688, 16)]))
    pieces = [piece for piece in np.split(TEXT[:688], cuts) if len(piece) > 1]
    assert result.counted_bytes == sum(len(piece) - 1 for piece in pieces)
    assert (result.min_context, result.max_context) == (1, 15)
    assert result.bits_per_byte == pytest.approx(float(bits(model, pieces).mean()), abs=1e-5)
    with pytest.raises(ArgumentError, match="--min-context 4: documents that do not see one another"):
        evaluate_as_trained(model, TEXT, min_context=4, documents=documents)


def test_packed_documents_in_shorter_windows():
    model = small_model()
    documents = np.array([0, 1, 90, 200, 333, 700])
    result = evaluate_as_trained(model, TEXT, min_context=1, context=10, documents=documents)
    cuts = np.unique(np.concatenate([documents[1:-1], np.arange(10, 700, 10)]))
    pieces = [piece for piece in np.split(TEXT, cuts) if len(piece) > 1]
    assert result.max_context == 9
    assert result.bits_per_byte == pytest.approx(float(bits(model, pieces).mean()), abs=1e-5)
    for context, words in (
        (17, "this model was trained with 16 tokens in a window, and that is the most"),
        (1, "a win"),
    ):
        with pytest.raises(ArgumentError, match=f"--context {context}: {words}"):
            evaluate_as_trained(model, TEXT, min_context=1, context=context, documents=documents)
    remembering = small_model(memory=16, patterns=["Local(6)"], max_position_embeddings=32)
    with pytest.raises(ArgumentError, match="--context 10: this model was trained with 16 tokens in a segment"):
        evaluate_as_trained(remembering, TEXT, min_context=1, context=10)


def test_documents_of_one_token_predict_nothing():
    with pytest.raises(DataError, match="32 bytes are too few to evaluate: none of them has another before it"):
        evaluate_as_trained(small_model(), TEXT[:32], min_context=1, documents=np.arange(33))


def test_checks_and_search_of_a_packed_run_stay_within_documents(monkeypatch, start):
    """The lines have 39 to 160 bytes. Every window must be a piece of one of them, which the model saw alone."""
    run = start("a", data__documents="packed", data__context=64, schedule__steps=1)
    run.train().model.save_pretrained(run.folder.model)
    seen = []
    predict = Predictor.forward

    def recorded(self, input_ids, logits_to_keep=0):
        if not logits_to_keep and input_ids.shape[1] > PROBE_TOKENS:
            seen.extend(bytes(row.tolist()).decode() for row in input_ids)
        return predict(self, input_ids, logits_to_keep)

    monkeypatch.setattr(Predictor, "forward", recorded)
    for command in (["evaluate", "--checks", "--needle", "{key}={value}!", "--trials", "1"], ["suggest"]):
        seen.clear()
        asked = [command[0], str(run.folder.path), *command[1:], "--split", "train", "--context", "40"]
        done = CliRunner().invoke(app, asked)
        assert done.exit_code == 0, done.output
        assert "Every window is of one document" in done.output
        assert seen
        assert {len(piece) for piece in seen} == {40}
        assert [piece for piece in seen if not any(piece in line for line in LINES)] == []
    done = CliRunner().invoke(app, ["suggest", str(run.folder.path), "--split", "test", "--max-bytes", "90"])
    assert "needs two windows of 64 within single documents, which are all that this model sees at once" in done.output
    figures = CliRunner().invoke(app, ["evaluate", str(run.folder.path), "--context", "20", "--json"])
    assert json.loads(figures.output)["max_context"] == 19


def test_checks_of_a_run_with_a_memory_say_that_it_is_empty(start):
    run = start("a", model__memory=16, data__kind="bytes", schedule__steps=1)
    run.train().model.save_pretrained(run.folder.model)
    done = CliRunner().invoke(app, ["suggest", str(run.folder.path), "--windows", "1", "--pattern", "Local(2)"])
    assert done.exit_code == 0, done.output
    assert "Every window is read by itself: the model's memory is empty where it begins." in done.output


@pytest.mark.parametrize("choice", CHOICES)
def test_from_the_command_line(tmp_path, monkeypatch, choice):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / ".cache"))
    (tmp_path / "lines.jsonl").write_text("\n".join(json.dumps({"text": line}) for line in LINES))
    values = {**TINY, "data.kind": "documents", "schedule.steps": 2, "sample.length_bytes": 5, "sample.count": 1}
    values |= {key.replace("__", "."): value for key, value in CHOICES[choice].items()}
    assignments = [f"--set={key}={json.dumps(value)}" for key, value in values.items()]
    done = CliRunner().invoke(app, ["train", "--data", "lines.jsonl", "--output", "run", *assignments])
    assert done.exit_code == 0, done.output
    told = json.loads((tmp_path / "run" / "evaluation.json").read_text())
    # The first samples of either kind of text have no more than a file's end before them.
    for more in (["--split", "test"], ["--data", "lines.jsonl", "--max-bytes", "500"]):
        measured = CliRunner().invoke(app, ["evaluate", "run", "--json", *more])
        assert measured.exit_code == 0, measured.output
        found = json.loads(measured.output)
        if more[0] == "--split":
            assert found["bits_per_byte"] == pytest.approx(told["bits_per_byte"], abs=1e-4)
        assert 6 < found["bits_per_byte"] < 9


@pytest.mark.parametrize(
    ("values", "error", "match"),
    [
        ({"data.documents": "apart"}, RecipeError, "data.documents is 'apart': it must be one of joined, packed"),
        ({"data.documents": "packed", "data.kind": "bytes"}, RecipeError, "bytes, which keeps no boundaries"),
        ({"model.memory": -1}, RecipeError, "model.memory is -1: it must not be negative"),
        ({"model.memory": 16, "model.block": "sparse_transformer"}, ArgumentError, "learned position embeddings"),
        ({"model.memory": 16, "model.patterns": ["Global(2) | Local(4)"]}, UnsupportedError, "counted from the begin"),
        (
            {"model.memory": 16, "data.kind": "images", "data.context": 48},
            RecipeError,
            "model.memory is 16 with data.kind images: windows of it begin with a record of 48 tokens",
        ),
    ],
)
def test_recipes_that_cannot_be(values, error, match):
    with pytest.raises(error, match=match):
        model_config(Recipe().override({**TINY, **values}))


def test_the_memory_is_a_file_of_the_checkpoint(start):
    run = start(**CHOICES["joined, with a memory"])
    run.train()
    last = list_checkpoints(run.folder.checkpoints)[-1].folder
    state = torch.load(last / MEMORY, weights_only=True)
    assert state["seen"] == [128, 128]
    # Local(8) leaves 7 tokens to read, Strided(4) all that there is room for.
    assert state["lengths"] == [[7, 7], [16, 16]]
    assert MEMORY in json.loads((last / "complete.json").read_text())
