"""Sampling bytes from a model, one at a time, and reading them as text while they come.

There is no key/value cache: every byte costs one pass over the window. When prompt and sample outgrow the model's
context, the window slides: each byte is drawn from the latest ``max_position_embeddings`` bytes.
"""

import codecs
from collections.abc import Iterable, Iterator

import torch
from transformers import PreTrainedModel, TemperatureLogitsWarper, TopKLogitsWarper, TopPLogitsWarper

from longstride.errors import ArgumentError

# Stands before the first byte when there is no prompt, because a model needs something to go on from; it is not part
# of the sample. A line begins after it.
START = b"\n"


def sample_bytes(
    model: PreTrainedModel,
    prompt: bytes,
    length_bytes: int,
    *,
    generator: torch.Generator,
    temperature: float = 1.0,
    top_k: int | None = None,
    top_p: float | None = None,
) -> Iterator[bytes]:
    """Continue ``prompt`` byte by byte; temperature, top-k and top-p mean what they mean in ``generate()``.

    Args:
        model: maps int64[1, length] to ``.logits`` float[1, length, 256].
        prompt: bytes to continue; `START` stands in for an empty one.
        length_bytes: how many bytes to draw.
        generator: on the CPU; the same state gives the same bytes.
        temperature: divides the logits; 0 takes the likeliest byte.
        top_k: draw from the k likeliest bytes only.
        top_p: draw from the fewest bytes whose probabilities sum to p.

    Yields:
        One byte at a time.

    Raises:
        ArgumentError: a value that cannot be sampled with.
    """
    if length_bytes < 0:
        raise ArgumentError(f"length of {length_bytes} bytes: it must not be negative")
    if not 0 <= temperature < float("inf"):
        raise ArgumentError(f"temperature {temperature}: it must be at least 0 and finite")
    if top_k is not None and top_k < 1:
        raise ArgumentError(f"top-k {top_k}: it must be at least 1")
    if top_p is not None and not 0 < top_p <= 1:
        raise ArgumentError(f"top-p {top_p}: it must be above 0 and at most 1")
    # The order in which generate() applies them.
    warpers = []
    if temperature not in (0, 1):
        warpers.append(TemperatureLogitsWarper(float(temperature)))
    if top_k is not None:
        warpers.append(TopKLogitsWarper(top_k))
    if top_p is not None and top_p < 1:
        warpers.append(TopPLogitsWarper(top_p))
    return _draw(model, prompt or START, length_bytes, generator, warpers, greedy=temperature == 0)


@torch.no_grad()
def _draw(
    model: PreTrainedModel,
    prompt: bytes,
    length_bytes: int,
    generator: torch.Generator,
    warpers: list,
    greedy: bool,
) -> Iterator[bytes]:
    context = model.config.max_position_embeddings
    tokens = torch.tensor([list(prompt)], device=model.device)
    model.eval()
    for _ in range(length_bytes):
        tokens = tokens[:, -context:]
        # float32 on the CPU, so that a seed means the same draw from the same logits everywhere.
        logits = model(input_ids=tokens).logits[:, -1].float().cpu()
        for warper in warpers:
            logits = warper(tokens.cpu(), logits)
        if greedy:
            drawn = logits.argmax(dim=-1, keepdim=True)
        else:
            drawn = torch.multinomial(logits.softmax(dim=-1), 1, generator=generator)
        tokens = torch.cat([tokens, drawn.to(tokens.device)], dim=1)
        yield bytes([int(drawn)])


def as_text(pieces: Iterable[bytes]) -> Iterator[str]:
    """Bytes read as UTF-8 as they come: a character appears with its last byte, and what is not UTF-8 as U+FFFD."""
    decoder = codecs.getincrementaldecoder("utf-8")(errors="replace")
    for piece in pieces:
        if text := decoder.decode(piece):
            yield text
    if text := decoder.decode(b"", final=True):
        yield text
