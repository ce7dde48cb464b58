"""The folder of a run: what lies where, and whether a run may start or resume in it."""

import os
from dataclasses import dataclass
from pathlib import Path

from longstride.errors import ArgumentError, CheckpointError, RecipeError
from longstride.training.recipe import Recipe, read_recipe


@dataclass(frozen=True)
class RunFolder:
    """The paths of a run; ``recipe.yaml`` is what makes a folder one."""

    path: Path

    @property
    def recipe(self) -> Path:
        return self.path / "recipe.yaml"

    @property
    def data(self) -> Path:
        return self.path / "data"

    @property
    def checkpoints(self) -> Path:
        return self.path / "checkpoints"

    @property
    def metrics(self) -> Path:
        return self.path / "metrics.jsonl"

    @property
    def tensorboard(self) -> Path:
        return self.path / "tensorboard"

    @property
    def model(self) -> Path:
        return self.path / "model"

    @property
    def evaluation(self) -> Path:
        return self.path / "evaluation.json"

    @property
    def samples(self) -> Path:
        return self.path / "samples.txt"

    @property
    def sample_files(self) -> Path:
        """Where samples lie that are no text: pictures, sound, music."""
        return self.path / "samples"

    @property
    def loss_picture(self) -> Path:
        return self.path / "loss.png"

    @property
    def patterns_picture(self) -> Path:
        return self.path / "patterns.png"

    @property
    def packs_documents(self) -> bool:
        """Whether the run's model was trained on documents that do not see one another; not where no recipe says so."""
        return self.recipe.is_file() and self.started_with().data.documents == "packed"

    def start(self, recipe: Recipe) -> None:
        """Make the folder and write the resolved recipe.

        Raises:
            ArgumentError: it holds a run already, or cannot be written.
        """
        if self.recipe.exists():
            raise ArgumentError(
                f"{self.path} already holds a run: add --resume to go on with it, or choose another --output"
            )
        try:
            self.path.mkdir(parents=True, exist_ok=True)
        except OSError as error:
            raise ArgumentError(
                f"cannot make the folder {self.path} ({error.strerror}): choose another --output"
            ) from error
        self.write_recipe(recipe)

    def write_recipe(self, recipe: Recipe) -> None:
        """Write the resolved recipe, completely or not at all."""
        unfinished = self.recipe.with_suffix(".unfinished")
        try:
            unfinished.write_text(recipe.to_yaml(), encoding="utf-8")
            os.replace(unfinished, self.recipe)
        except OSError as error:
            raise ArgumentError(f"cannot write in {self.path} ({error.strerror}): choose another --output") from error

    def started_with(self) -> Recipe:
        """The recipe of the run in this folder.

        Raises:
            CheckpointError: there is no run to resume.
        """
        if not self.recipe.is_file():
            raise CheckpointError(
                f"there is nothing to resume in {self.path}: no recipe.yaml; leave --resume out to start a run there, "
                "or name the folder of the run with --output"
            )
        try:
            return read_recipe(self.recipe)
        except RecipeError as error:
            raise CheckpointError(f"the run in {self.path} cannot be resumed: {error}") from error
