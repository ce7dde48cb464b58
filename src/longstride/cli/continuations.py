"""Samples of data that are not text: windows of the test split that the model has finished, as files to open."""

from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    import torch

    from longstride.data import PreparedData
    from longstride.models import SparseTransformerForCausalLM
    from longstride.training import Recipe


def write_continuations(
    recipe: "Recipe",
    data: "PreparedData",
    folder: Path,
    model: "SparseTransformerForCausalLM",
    say: Callable[[str], None],
) -> None:
    """Write ``sample-1.png`` (or .wav, .mid, ...) and so on: each a window of the test split with its end replaced.

    The model draws the last ``sample.length_bytes`` tokens, of at most all but the first, with the seeds that samples
    of text would have.
    """
    from longstride.data import EvenWindows

    kind = data.decoded_as
    assert kind is not None, "bytes are sampled as text"
    context, count = recipe.data.context, recipe.sample.count
    drawn = min(recipe.sample.length_bytes, context - 1)
    folder.mkdir(exist_ok=True)
    if not count:
        return
    windows = EvenWindows(data.split("test"), context, count, data.record)
    for number in range(count):
        window = windows[number % len(windows)]["input_ids"]
        tokens = _finish(model, window[: context - drawn], drawn, recipe, recipe.run.seed + number)
        path = folder / f"sample-{number + 1}{kind.sample_suffix}"
        kind.write(tokens.numpy(), path)
        say(f"Sample {number + 1}: the last {drawn:,} of {context:,} {kind.unit}s are the model's, in {path.name}.")


def _finish(
    model: "SparseTransformerForCausalLM", prompt: "torch.Tensor", drawn: int, recipe: "Recipe", seed: int
) -> "torch.Tensor":
    """``prompt``, int64[n], and ``drawn`` more tokens."""
    import torch

    if not drawn:
        return prompt
    sample = recipe.sample
    options: dict[str, Any] = {"do_sample": False}
    if sample.temperature > 0:
        # 0 and 1 stand for no limit there.
        options = {
            "do_sample": True,
            "temperature": float(sample.temperature),
            "top_k": sample.top_k or 0,
            "top_p": 1.0 if sample.top_p is None else sample.top_p,
        }
    devices = [model.device] if model.device.type == "cuda" else []
    # generate() draws from the global generators, which are put back afterwards.
    with torch.random.fork_rng(devices=devices):
        torch.manual_seed(seed)
        model.eval()
        # ty reads a protocol of transformers' own more strictly than transformers does.
        return model.generate(prompt[None].to(model.device), max_new_tokens=drawn, **options)[0].cpu()  # ty: ignore[invalid-argument-type]
