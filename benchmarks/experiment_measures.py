"""What is measured of a trained model beside its bits per token: bits by context, samples, learned attention."""

from __future__ import annotations

import itertools
import math
import time
from typing import Any

import numpy as np
import torch

from longstride import SparseTransformerForCausalLM
from longstride.data import EvenWindows, PreparedData
from longstride.models import DecodeGraph, SparseTransformerCache, graph_obstacle

#: Points of the curve of bits by position; the last position's is the mean over the last part of the windows.
POINTS = 40
#: Positions of a picture of learned attention.
MAP_LENGTH = 512


@torch.no_grad()
def nats_by_position(model: SparseTransformerForCausalLM, windows: EvenWindows, batch: int) -> tuple[np.ndarray, int]:
    """Mean loss of the prediction that has i + 1 tokens before it, float64[context - 1], and the windows it is over."""
    total: torch.Tensor | None = None
    device = model.device
    for first in range(0, len(windows), batch):
        tokens = torch.stack([windows[index]["input_ids"] for index in range(first, min(first + batch, len(windows)))])
        tokens = tokens.to(device)
        logits = model(input_ids=tokens[:, :-1]).logits
        # A window at a time: the losses want the logits in float32 once more.
        losses = sum(
            torch.nn.functional.cross_entropy(row.float(), targets, reduction="none").double()
            for row, targets in zip(logits, tokens[:, 1:], strict=True)
        )
        total = losses if total is None else total + losses
    assert total is not None
    return (total / len(windows)).cpu().numpy(), len(windows)


def bits_by_context(nats: np.ndarray) -> dict[str, list]:
    """Bits per token by context: of all predictions with at least c tokens before them, and around each position."""
    bits = nats / math.log(2)
    length = len(bits) + 1
    least = [0, *(length // part for part in (32, 16, 8, 4, 2)), length * 3 // 4, length * 7 // 8, length * 31 // 32]
    edges = np.unique(np.geomspace(1, len(bits), POINTS + 1).astype(int))
    return {
        "at_least": [[int(c), float(bits[max(c - 1, 0) :].mean())] for c in dict.fromkeys(least)],
        "around": [
            [float((low + high) / 2), float(bits[low - 1 : high - 1].mean())] for low, high in itertools.pairwise(edges)
        ],
    }


def for_sampling(model: SparseTransformerForCausalLM) -> SparseTransformerForCausalLM:
    """The same model in the dtype that it was trained in by autocast, as it would be loaded for generation."""
    copy = SparseTransformerForCausalLM(model.config)
    copy.load_state_dict(model.state_dict())
    dtype = torch.bfloat16 if model.device.type == "cuda" else torch.float32
    return copy.to(model.device, dtype).eval()


@torch.no_grad()
def draw(
    model: SparseTransformerForCausalLM, prompts: torch.Tensor, drawn: int, seconds: float, seed: int = 0
) -> tuple[np.ndarray, dict[str, Any]]:
    """Continue prompts, int64[count, length], by the model's cache, one token a row at a time, at temperature 1.

    Returns:
        int64[count, length + tokens], and how long it took. It ends early after ``seconds``.
    """
    count, length = prompts.shape
    generator = torch.Generator(model.device).manual_seed(seed)
    cache = SparseTransformerCache(model.config)
    tokens = torch.zeros(count, length + drawn, dtype=torch.int64, device=model.device)
    tokens[:, :length] = prompts.to(model.device)
    began = time.perf_counter()
    logits = model(tokens[:, :length], past_key_values=cache, logits_to_keep=1).logits[:, -1]
    graph = DecodeGraph(model, cache) if graph_obstacle(model, cache) is None else None
    prompt_s = time.perf_counter() - began
    began, place = time.perf_counter(), length
    for place in range(length, length + drawn):
        picked = torch.multinomial(logits.float().softmax(-1), 1, generator=generator)
        tokens[:, place] = picked[:, 0]
        if place == length + drawn - 1:
            break
        if place % 256 == 0:
            picked[0].item()  # the host waits here, so that the time is true
            if time.perf_counter() - began > seconds:
                break
        if graph is not None:
            logits = graph.step(picked)
        else:
            logits = model(picked, past_key_values=cache, logits_to_keep=1).logits[:, -1]
    tokens = tokens[:, : place + 1].cpu()
    took = time.perf_counter() - began
    made = place + 1 - length
    facts = {"prompt_s": prompt_s, "seconds": took, "drawn": made, "tokens_per_s": count * made / took}
    return tokens.numpy(), {**facts, "cache_bytes": cache.nbytes, "graph": graph is not None}


@torch.no_grad()
def attention_maps(
    model: SparseTransformerForCausalLM, window: torch.Tensor
) -> dict[str, tuple[np.ndarray, dict[str, Any]]]:
    """Of each kind of pattern, the weights of the head that looks furthest back: square roots as uint8[n, n].

    Args:
        window: int64[tokens]; its first positions are drawn.
    """
    length = min(MAP_LENGTH, len(window))
    seen: dict[int, tuple[torch.Tensor, torch.Tensor]] = {}
    layers = model.model.layers
    for index, layer in enumerate(layers):
        attend = layer.attention.attend

        def noting(q: Any, k: Any, v: Any, index: int = index, attend: Any = attend, **others: Any) -> torch.Tensor:
            seen[index] = (q.float(), k.float())
            return attend(q, k, v, **others)

        layer.attention.attend = noting
    try:
        model(window[None, :length].to(model.device))
    finally:
        for layer in layers:
            del layer.attention.attend
    found: dict[str, tuple[float, np.ndarray, dict[str, Any]]] = {}
    distance = torch.arange(length, device=model.device)[:, None] - torch.arange(length, device=model.device)
    for index, (q, k) in seen.items():
        pattern = layers[index].attention.pattern
        heads = pattern.split_heads(q.shape[1])
        scores = (q @ k.mT)[0] / q.shape[-1] ** 0.5
        for head, (each, of_head) in enumerate(zip(heads, scores, strict=True)):
            mask = each.mask(length).to(model.device)
            weights = of_head.masked_fill(~mask.reshape(length, length), -torch.inf).softmax(-1).nan_to_num()
            reach = float((weights * distance).sum() / length)
            if str(each) not in found or reach > found[str(each)][0]:
                picture = (weights.sqrt() * 255).round().to(torch.uint8).cpu().numpy()
                found[str(each)] = (reach, picture, {"layer": index, "head": head, "mean_distance": reach})
    return {text: (picture, facts) for text, (_, picture, facts) in found.items()}


def prompts_of(data: PreparedData, context: int, length: int, count: int) -> torch.Tensor:
    """The beginnings of windows of the test split, int64[count, length]; fewer where it has fewer windows."""
    windows = EvenWindows(data.split("test"), context, count, data.record)
    found = [windows[index]["input_ids"][:length] for index in range(len(windows))]
    return torch.stack([found[index % len(found)] for index in range(count)])
