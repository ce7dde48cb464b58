"""The curve of a training: ``metrics.jsonl``, one JSON object a line.

After every step ``{"step", "loss", "bits_per_byte", "learning_rate"}``, after every periodic evaluation ``{"step",
"validation_loss", "validation_bits_per_byte"}``. Losses are mean cross-entropies in nats a byte. No time of day and no
speed stands here, so an interrupted and resumed run has the same file as an uninterrupted one.
"""

import json
import math
import os
from pathlib import Path

import torch

from longstride.errors import LongstrideError


def bits(nats: float) -> float:
    """Nats as bits."""
    return nats / math.log(2)


def read_curve(path: Path) -> list[dict[str, float]]:
    """The complete records of a ``metrics.jsonl``; a last line that was cut off by a kill is left out."""
    records = []
    if path.exists():
        for line in path.read_text().splitlines():
            try:
                records.append(json.loads(line))
            except ValueError:
                break
    return records


class Curve:
    """Appends to ``metrics.jsonl``.

    Args:
        path: the file.
        step: where the training stands: later records, written by a process that was interrupted, are dropped.
    """

    def __init__(self, path: Path, step: int) -> None:
        self.path = path
        kept = [record for record in read_curve(path) if record["step"] <= step]
        rewritten = path.with_name(path.name + ".rewritten")
        rewritten.write_text("".join(json.dumps(record) + "\n" for record in kept))
        os.replace(rewritten, path)
        # Losses stay on the device until they are written: reading one would make the device wait at every step.
        self._pending: list[tuple[int, torch.Tensor, float]] = []

    def add_step(self, step: int, loss: torch.Tensor, learning_rate: float) -> None:
        """The mean loss (nats a byte, float32[]) of an update, written at the next `flush`."""
        self._pending.append((step, loss, learning_rate))

    def flush(self) -> float | None:
        """Write what is pending and have it on the disk.

        Returns:
            The mean loss of the steps written, in nats; None if there were none.

        Raises:
            LongstrideError: a loss is not a finite number.
        """
        if not self._pending:
            return None
        losses = torch.stack([loss for _, loss, _ in self._pending]).tolist()
        records = []
        for (step, _, learning_rate), loss in zip(self._pending, losses, strict=True):
            if not math.isfinite(loss):
                raise LongstrideError(
                    f"the loss became {loss} at step {step} with learning rate {learning_rate:g}: train with a lower "
                    "--lr, a longer schedule.warmup_steps, or --precision fp32"
                )
            records.append({"step": step, "loss": loss, "bits_per_byte": bits(loss), "learning_rate": learning_rate})
        self._pending.clear()
        self._append(records)
        return sum(losses) / len(losses)

    def add_evaluation(self, step: int, loss: float) -> None:
        """The validation loss (nats a byte) after ``step`` updates."""
        self.flush()
        self._append([{"step": step, "validation_loss": loss, "validation_bits_per_byte": bits(loss)}])

    def _append(self, records: list[dict[str, float]]) -> None:
        with self.path.open("a") as file:
            file.write("".join(json.dumps(record) + "\n" for record in records))
            file.flush()
            os.fsync(file.fileno())
