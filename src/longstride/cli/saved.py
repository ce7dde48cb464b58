"""The model in a folder that the user names."""

from pathlib import Path
from typing import TYPE_CHECKING

from longstride.errors import ArgumentError

if TYPE_CHECKING:
    import torch

    from longstride.models import SparseTransformerForCausalLM


def load_model(folder: Path, device: "torch.device") -> "SparseTransformerForCausalLM":
    """The finished model of a run, or its newest sound checkpoint while it has none, or a saved model itself.

    Raises:
        ArgumentError: there is no model, or it cannot be read.
        CheckpointError: there are only damaged checkpoints.
    """
    from safetensors import SafetensorError
    from transformers.utils import logging

    from longstride.models import SparseTransformerForCausalLM
    from longstride.training import RunFolder, latest_sound

    run = RunFolder(folder)
    checkpoint, _ = latest_sound(run.checkpoints) if not run.model.exists() else (None, [])
    candidates = [run.model, *([checkpoint.folder] if checkpoint else []), folder]
    found = next((candidate for candidate in candidates if (candidate / "config.json").is_file()), None)
    if found is None:
        raise ArgumentError(
            f"{folder} holds no model: name the --output folder of a training, or one that save_pretrained wrote"
        )
    # Reading a few small files needs no bar.
    logging.disable_progress_bar()
    try:
        return SparseTransformerForCausalLM.from_pretrained(found).to(device).eval()
    except (OSError, ValueError, SafetensorError) as error:
        raise ArgumentError(f"the model in {found} cannot be read: {str(error).splitlines()[0]}") from error
