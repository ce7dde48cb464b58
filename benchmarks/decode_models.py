"""Whole models that decode: ours with its cache, and the same weights with dense attention over a static cache."""

from __future__ import annotations

import gc
import sys
import time
from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.nn.functional import scaled_dot_product_attention

from harness import spread
from longstride.models import DecodeGraph, SparseTransformerCache, SparseTransformerConfig, SparseTransformerForCausalLM
from peers import why

#: Steps that are timed together.
STEPS = 64
#: The largest relative error of logits, in float32.
BOUND = 1e-3
SDPA = {"flash": SDPBackend.FLASH_ATTENTION, "cuDNN": SDPBackend.CUDNN_ATTENTION}


@dataclass(frozen=True)
class Model:
    """A model's sizes; weights are random, which no time depends on."""

    layers: int
    hidden: int
    heads: int
    context: int
    patterns: tuple[str, ...]
    qk_hidden: int | None = None
    axes: tuple[int, ...] | None = None

    def tiny(self) -> Model:
        return replace(self, layers=2, hidden=32, heads=2, context=192, qk_hidden=None, axes=None)

    def make(self, device: str) -> SparseTransformerForCausalLM:
        torch.manual_seed(0)
        config = SparseTransformerConfig(
            hidden_size=self.hidden,
            num_hidden_layers=self.layers,
            num_attention_heads=self.heads,
            max_position_embeddings=self.context,
            patterns=list(self.patterns),
            qk_hidden_size=self.qk_hidden,
            position_axes=None if self.axes is None else list(self.axes),
        )
        made = SparseTransformerForCausalLM(config)
        torch.nn.init.normal_(made.lm_head.weight, std=0.1)
        return made.to(device, torch.bfloat16 if device != "cpu" else torch.float32).eval()


#: Child et al. 2019: enwik8 with fixed attention, and with strided attention in alternating layers; CIFAR-10.
MODELS = {
    "Fixed(128, 32)": Model(30, 512, 8, 12288, ("Fixed(128, 32)",)),
    "Local(128), Strided(128)": Model(30, 512, 8, 12288, ("Local(128)", "Strided(128)")),
}
IMAGES = Model(128, 256, 2, 3072, ("Local(128)", "Strided(128)"), qk_hidden=128, axes=(32, 32, 3))

Step = Callable[[torch.Tensor], torch.Tensor]


def stepper(model: SparseTransformerForCausalLM, cache: SparseTransformerCache) -> Step:
    """Logits after one more token a row: a replayed graph, or the model itself on a CPU."""
    if model.device.type != "cpu":
        return DecodeGraph(model, cache).step
    return lambda tokens: model(tokens.view(-1, 1), past_key_values=cache).logits[:, -1]


def stand_at(cache: SparseTransformerCache, length: int) -> None:
    """Let the cache stand at a length, whatever its rows hold: for time, not for results."""
    assert cache.rows is not None
    cache.rows.lengths.fill_(length)
    cache.rows.shortest = cache.rows.longest = cache.seen = length


@torch.no_grad()
def check(model: SparseTransformerForCausalLM, tokens: int = 160) -> float:
    """The relative error of logits that are decoded, in float32, against one pass; exits above `BOUND`."""
    dtype = model.dtype
    model.float()
    ids = torch.randint(256, (2, tokens), device=model.device)
    cache = SparseTransformerCache(model.config)
    model(ids[:, : tokens // 2], past_key_values=cache, logits_to_keep=1)
    step = stepper(model, cache)
    found = torch.stack([step(ids[:, t]).clone() for t in range(tokens // 2, tokens)], 1).double()
    wanted = model(ids).logits[:, tokens // 2 :].double()
    error = ((found - wanted).norm() / wanted.norm()).item()
    if not error < BOUND:
        sys.exit(f"not timed: {model.config.patterns} decodes logits that are off by {error:.2e}")
    model.to(dtype)  # its weights were such before: nothing is lost
    return error


def measured(run: Callable[[], None], device: str, rounds: int) -> dict[str, float]:
    """Milliseconds a step of `run`, which does `STEPS`."""
    times = []
    for _ in range(rounds + 1):
        if device != "cpu":
            torch.cuda.synchronize()
        start = time.perf_counter()
        run()
        if device != "cpu":
            torch.cuda.synchronize()
        times.append((time.perf_counter() - start) * 1e3 / STEPS)
    ms, low, high = spread(times[1:])
    return {"ms": ms, "low": low, "high": high}


@torch.no_grad()
def measure_ours(model: SparseTransformerForCausalLM, batch: int, device: str, rounds: int) -> dict[str, Any]:
    cache = SparseTransformerCache(model.config)
    tokens = torch.randint(256, (batch,), device=device)
    model(tokens[:, None], past_key_values=cache)
    step = stepper(model, cache)
    end = model.config.max_position_embeddings

    def run() -> None:
        stand_at(cache, end - STEPS)
        for _ in range(STEPS):
            tokens.copy_(step(tokens).argmax(-1))

    return {**measured(run, device, rounds), "cache_bytes": cache.nbytes}


class DenseDecode:
    """The same weights with dense attention over a static cache, standing at the end of the context: all keys count."""

    def __init__(self, model: SparseTransformerForCausalLM, batch: int, backend: SDPBackend | None) -> None:
        config = model.config
        self.model, self.backend = model.model, backend
        self.head = model.lm_head
        heads, length = config.num_attention_heads, config.max_position_embeddings
        assert config.qk_hidden_size is not None
        widths = (config.qk_hidden_size // heads, config.hidden_size // heads)
        self.caches = [
            [torch.randn(batch, heads, length, width, device=model.device, dtype=model.dtype) for width in widths]
            for _ in range(config.num_hidden_layers)
        ]
        self.tokens = torch.zeros(batch, 1, dtype=torch.int64, device=model.device)
        self.position = torch.tensor([length - 1], device=model.device)

    @property
    def nbytes(self) -> int:
        return sum(x.untyped_storage().nbytes() for pair in self.caches for x in pair)

    def forward(self) -> torch.Tensor:
        hidden = self.model.embed_tokens(self.tokens) + self.model.embed_positions(self.position)
        for block, (keys, values) in zip(self.model.layers, self.caches, strict=True):
            attention: Any = block.attention
            projected = attention.qkv_proj(block.attention_norm(hidden)).split(attention.widths, -1)
            q, k, v = (x.unflatten(-1, (attention.num_heads, -1)).transpose(1, 2) for x in projected)
            keys.index_copy_(2, self.position, k)
            values.index_copy_(2, self.position, v)
            if self.backend is None:
                attended = scaled_dot_product_attention(q, keys, values)
            else:
                with sdpa_kernel(self.backend):
                    attended = scaled_dot_product_attention(q, keys, values)
            hidden = hidden + attention.out_proj(attended.transpose(1, 2).flatten(2))
            hidden = hidden + block.feed_forward(block.feed_forward_norm(hidden))
        return self.head(self.model.norm(hidden))[:, -1]


@torch.no_grad()
def measure_dense(model: SparseTransformerForCausalLM, batch: int, device: str, rounds: int) -> list[dict[str, Any]]:
    rows = []
    for name, backend in SDPA.items() if device != "cpu" else {"CPU": None}.items():
        row: dict[str, Any] = {"what": f"dense, SDPA {name}", "kind": "dense"}
        rows.append(row)
        try:
            dense = DenseDecode(model, batch, backend)
            replay: Callable[[], object] = dense.forward
            if device != "cpu":
                beside = torch.cuda.Stream()
                beside.wait_stream(torch.cuda.current_stream())
                with torch.cuda.stream(beside):
                    for _ in range(2):
                        dense.forward()
                torch.cuda.current_stream().wait_stream(beside)
                graph = torch.cuda.CUDAGraph()
                with torch.cuda.graph(graph):
                    logits = dense.forward()

                def replay(graph: Any = graph, dense: DenseDecode = dense, logits: torch.Tensor = logits) -> None:
                    graph.replay()
                    dense.tokens.copy_(logits.argmax(-1, keepdim=True))

            def run(replay: Callable[[], object] = replay) -> None:
                for _ in range(STEPS):
                    replay()

            row |= {**measured(run, device, rounds), "cache_bytes": dense.nbytes}
        except Exception as error:  # out of memory, or a kernel that will not: a row with its reason
            row["reason"] = why(error)
        _free(device)
    return rows


def measure_models(
    models: dict[str, Model], batches: tuple[int, ...], device: str, rounds: int, keep: Callable[[list[dict]], None]
) -> None:
    """Tokens a second at the end of the context, ours and dense."""
    rows: list[dict] = []
    for name, sizes in models.items():
        model = sizes.make(device)
        error = check(model)
        for batch in batches:
            row: dict[str, Any] = {"what": name, "kind": "ours", "error": error}
            try:
                row |= measure_ours(model, batch, device, rounds)
            except torch.OutOfMemoryError as found:
                row["reason"] = why(found)
            _free(device)
            # The dense model does not look at the patterns: once is enough.
            others = [] if rows and rows[0]["what"] != name else measure_dense(model, batch, device, rounds)
            for each in (row, *others):
                each |= {"batch": batch, "length": sizes.context, "layers": sizes.layers}
                if "ms" in each:
                    each["tokens_per_s"] = batch / each["ms"] * 1e3
                text = f"{each['tokens_per_s']:10,.0f} tokens/s" if "ms" in each else each["reason"]
                print(f"  B{batch:3} {each['what']:28} {text}", flush=True)
                rows.append(each)
            keep(rows)
        del model
        _free(device)


@torch.no_grad()
def measure_images(sizes: Model, batch: int, device: str) -> dict[str, Any]:
    """Seconds for one batch of images, sampled byte by byte from the first to the last."""
    model = sizes.make(device)
    error = check(model)
    cache = SparseTransformerCache(model.config)
    drawn = torch.zeros(batch, sizes.context, dtype=torch.int64, device=device)
    drawn[:, 0] = torch.randint(256, (batch,), device=device)
    start = time.perf_counter()
    logits = model(drawn[:, :1], past_key_values=cache).logits[:, -1]
    step = stepper(model, cache)
    for place in range(1, sizes.context):
        drawn[:, place] = torch.multinomial(logits.float().softmax(-1), 1)[:, 0]
        logits = step(drawn[:, place])
    if device != "cpu":
        torch.cuda.synchronize()
    seconds = time.perf_counter() - start
    print(f"  {batch} images of {sizes.context} bytes: {seconds:.1f} s", flush=True)
    return {
        "what": f"{sizes.layers} layers, d {sizes.hidden}, {sizes.heads} heads, {', '.join(sizes.patterns)}",
        "batch": batch,
        "length": sizes.context,
        "seconds": seconds,
        "tokens_per_s": batch * sizes.context / seconds,
        "cache_bytes": cache.nbytes,
        "error": error,
    }


def _free(device: str) -> None:
    gc.collect()
    if device != "cpu":
        torch.cuda.empty_cache()
