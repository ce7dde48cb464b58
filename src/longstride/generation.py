"""Sampling bytes from a model, one at a time, and reading them as text while they come.

A cache holds what the model's patterns may still read, so a byte costs what they read. When prompt and sample outgrow
the model's context, the window slides: each byte is drawn from the latest ``max_position_embeddings`` bytes. Every
position then changes with every byte, so that nothing is kept, and each byte costs a pass over the window.
"""

import codecs
from collections.abc import Iterable, Iterator

import torch
from transformers import TemperatureLogitsWarper, TopKLogitsWarper, TopPLogitsWarper

from longstride.errors import ArgumentError
from longstride.models import DecodeGraph, SparseTransformerCache, SparseTransformerForCausalLM, graph_obstacle

# Stands before the first byte when there is no prompt, because a model needs something to go on from; it is not part
# of the sample. A line begins after it.
START = b"\n"


def sample_bytes(
    model: SparseTransformerForCausalLM,
    prompt: bytes,
    length_bytes: int,
    *,
    generator: torch.Generator,
    cache: SparseTransformerCache | None = None,
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
        cache: a fresh one of `cache_for`; made here when not given.
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
    cache = cache_for(model, prompt, length_bytes) if cache is None else cache
    return _draw(model, prompt or START, length_bytes, generator, cache, warpers, greedy=temperature == 0)


def cache_for(model: SparseTransformerForCausalLM, prompt: bytes, length_bytes: int) -> SparseTransformerCache:
    """A cache with room for the prompt and a sample, as far as the model's context goes."""
    # The last byte that is drawn is never read.
    longest = max(1, len(prompt or START) + length_bytes - 1)
    return SparseTransformerCache(model.config, capacity=min(longest, model.config.max_position_embeddings))


@torch.no_grad()
def _draw(
    model: SparseTransformerForCausalLM,
    prompt: bytes,
    length_bytes: int,
    generator: torch.Generator,
    cache: SparseTransformerCache,
    warpers: list,
    greedy: bool,
) -> Iterator[bytes]:
    context = model.config.max_position_embeddings
    tokens = torch.tensor([list(prompt)], device=model.device)
    model.eval()
    graph: DecodeGraph | None = None
    for _ in range(length_bytes):
        if tokens.shape[1] > context:
            logits = model(input_ids=tokens[:, -context:], logits_to_keep=1).logits[:, -1]
        elif tokens.shape[1] > cache.seen + 1 or graph_obstacle(model, cache) is not None:
            logits = model(input_ids=tokens[:, cache.seen :], past_key_values=cache, logits_to_keep=1).logits[:, -1]
        else:
            graph = DecodeGraph(model, cache) if graph is None else graph
            logits = graph.step(tokens[:, -1])
        # float32 on the CPU, so that a seed means the same draw from the same logits everywhere.
        logits = logits.float().cpu()
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
