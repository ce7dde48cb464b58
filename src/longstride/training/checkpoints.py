"""Checkpoints that are complete or absent, and that notice when they were damaged afterwards.

``checkpoints/checkpoint-<step>/`` holds what Trainer writes (weights, optimiser, schedule, random states) and
``complete.json``, which lists every file with its length and SHA-256. Half-written folders have another name
(`longstride.data.folders`).
"""

import hashlib
import json
import shutil
from dataclasses import dataclass
from pathlib import Path

from longstride.data.folders import UNFINISHED
from longstride.errors import CheckpointError

MANIFEST = "complete.json"
PREFIX = "checkpoint-"


@dataclass(frozen=True)
class Checkpoint:
    """A folder with the whole state of a training after ``step`` updates."""

    folder: Path
    step: int


def seal(folder: Path) -> None:
    """Write the manifest of a folder whose other files are complete."""
    files = {
        file.relative_to(folder).as_posix(): {"bytes": file.stat().st_size, "sha256": _sha256(file)}
        for file in sorted(folder.rglob("*"))
        if file.is_file()
    }
    (folder / MANIFEST).write_text(json.dumps(files, indent=2) + "\n")


def damage(folder: Path) -> str | None:
    """What is wrong with a checkpoint, in a few words, or None for a sound one."""
    try:
        files = json.loads((folder / MANIFEST).read_text())
        for name, expected in files.items():
            file = folder / name
            if not file.is_file():
                return f"{name} is missing"
            if file.stat().st_size != expected["bytes"]:
                return f"{name} has {file.stat().st_size:,} bytes instead of {expected['bytes']:,}"
            if _sha256(file) != expected["sha256"]:
                return f"{name} was changed (its SHA-256 differs)"
    except (OSError, ValueError, KeyError, TypeError, AttributeError) as error:
        return f"{MANIFEST} cannot be read ({error})"
    return None


def list_checkpoints(parent: Path) -> list[Checkpoint]:
    """All checkpoints in ``parent``, sound or not, oldest first."""
    if not parent.is_dir():
        return []
    named = [
        (folder.name.removeprefix(PREFIX), folder) for folder in parent.iterdir() if folder.name.startswith(PREFIX)
    ]
    return sorted(
        (Checkpoint(folder, int(step)) for step, folder in named if step.isdecimal()),
        key=lambda checkpoint: checkpoint.step,
    )


def latest_sound(parent: Path) -> tuple[Checkpoint | None, list[str]]:
    """The newest checkpoint without damage, and a sentence for each newer one that had to be passed over.

    Returns:
        None as the checkpoint when there are none at all.

    Raises:
        CheckpointError: there are checkpoints, and all of them are damaged.
    """
    passed_over = []
    for checkpoint in reversed(list_checkpoints(parent)):
        what = damage(checkpoint.folder)
        if what is None:
            return checkpoint, passed_over
        passed_over.append(f"the checkpoint {checkpoint.folder} is damaged: {what}")
    if passed_over:
        raise CheckpointError(
            f"{'; '.join(passed_over)}. No sound checkpoint is left to resume from: train into a new --output, "
            "or delete these folders to start this run again from step 0"
        )
    return None, []


def prune(parent: Path, keep: int) -> None:
    """Delete all but the ``keep`` newest checkpoints, and what killed processes left unfinished."""
    for leftover in parent.glob(f"{UNFINISHED}*"):
        shutil.rmtree(leftover, ignore_errors=True)
    for checkpoint in list_checkpoints(parent)[:-keep]:
        shutil.rmtree(checkpoint.folder, ignore_errors=True)


def _sha256(file: Path) -> str:
    with file.open("rb") as data:
        return hashlib.file_digest(data, "sha256").hexdigest()
