"""Sampling with a cache against recomputing, on a CPU: ``python benchmarks/generation_cpu.py``.

The model has the shape of the demo's (recipes/bytes-small.yaml) and a context that holds the prompt; its weights are
random, which no time depends on. Checked first: both ways give the same bytes. With the cache the whole sample is
timed, prompt included. A byte without it costs a pass over everything so far; a few are timed, evenly spread over the
sample, and stand for the others. Written as JSON and Markdown.
"""

from __future__ import annotations

import argparse
import json
import platform
import sys
from pathlib import Path

import torch
import yaml

from harness import commit, device_name, elapsed_ms, spread, write_whole
from longstride.generation import cache_for, sample_bytes
from longstride.models import SparseTransformerConfig, SparseTransformerForCausalLM

ROOT = Path(__file__).parents[1]
PROMPT_BYTES, SAMPLE_BYTES = 8192, 1000


def demo_model(context: int) -> SparseTransformerForCausalLM:
    """The demo's model with a longer context, and logits that are not all equal."""
    recipe = yaml.safe_load((ROOT / "recipes" / "bytes-small.yaml").read_text())["model"]
    torch.manual_seed(0)
    model = SparseTransformerForCausalLM(SparseTransformerConfig(**recipe, max_position_embeddings=context))
    torch.nn.init.normal_(model.lm_head.weight, std=0.1)
    return model.eval()


def check(model: SparseTransformerForCausalLM) -> int:
    """How many bytes agree with a pass over everything before them; exits where one does not."""
    tokens = list(b"def generate(self, prompt):\n" * 20)
    drawn = sample_bytes(model, bytes(tokens), 100, generator=torch.Generator(), temperature=0)
    for place, byte in enumerate(b"".join(drawn)):
        with torch.no_grad():
            expected = int(model(input_ids=torch.tensor([tokens])).logits[0, -1].argmax())
        if byte != expected:
            sys.exit(f"not timed: byte {place} is {byte} with the cache and {expected} without")
        tokens.append(byte)
    print("correct: 100 bytes are the same with the cache and without")
    return 100


def measure(model: SparseTransformerForCausalLM, rounds: int, passes: int) -> dict:
    prompt = bytes(torch.randint(256, (PROMPT_BYTES,), generator=torch.Generator().manual_seed(1)).tolist())
    cache = cache_for(model, prompt, SAMPLE_BYTES)

    def with_cache() -> None:
        cache.reset()
        drawn = sample_bytes(model, prompt, SAMPLE_BYTES, generator=torch.Generator().manual_seed(0), cache=cache)
        assert len(b"".join(drawn)) == SAMPLE_BYTES

    @torch.no_grad()
    def one_pass(length: int) -> None:
        model(input_ids=torch.zeros(1, length, dtype=torch.int64), logits_to_keep=1)

    lengths = [PROMPT_BYTES + SAMPLE_BYTES * place // max(1, passes - 1) for place in range(passes)]
    cached, recomputed = [], []
    for turn in range(rounds + 1):
        sampled = elapsed_ms(with_cache)
        passed = [elapsed_ms(lambda length=length: one_pass(length)) for length in lengths]
        if turn:  # the first round warms up
            cached.append(sampled)
            recomputed.append(sum(passed) / passes * SAMPLE_BYTES)
            print(f"with the cache {cached[-1] / 1e3:.2f} s, recomputing {recomputed[-1] / 1e3:.1f} s", flush=True)
    with_ms, with_low, with_high = spread(cached)
    without_ms, without_low, without_high = spread(recomputed)
    return {
        "prompt_bytes": PROMPT_BYTES,
        "sample_bytes": SAMPLE_BYTES,
        "cached_ms": with_ms,
        "cached_spread_ms": [with_low, with_high],
        "recomputed_ms": without_ms,
        "recomputed_spread_ms": [without_low, without_high],
        "speedup": without_ms / with_ms,
        "tokens_per_s": SAMPLE_BYTES / with_ms * 1e3,
        "cache_bytes": cache.nbytes,
    }


def render(result: dict) -> str:
    """The Markdown page of a result."""
    rows = []
    for way, how in (
        ("cached", f"with the cache ({result['cache_bytes']:,} bytes)"),
        ("recomputed", f"recomputing, from {result['passes']} of the {result['sample_bytes']:,} passes"),
    ):
        seconds = result[f"{way}_ms"] / 1e3
        low, high = (ms / 1e3 for ms in result[f"{way}_spread_ms"])
        rows.append(f"| {how} | {seconds:.2f} | {low:.2f} to {high:.2f} | {result['sample_bytes'] / seconds:.1f} |")
    lines = [
        f"# Generation on {result['device']}",
        "",
        f"torch {result['torch']}, Python {result['python']}, commit {result['commit']}; `{result['command']}`.",
        f"{result['sample_bytes']:,} bytes after a prompt of {result['prompt_bytes']:,}, prompt included, by a model "
        f"of the demo's shape ({result['model']}), float32; median of {result['rounds']} rounds.",
        "",
        "| how | time, s | its spread, s | tokens/s |",
        "|---|---|---|---|",
        *rows,
        "",
        f"The cache is {result['speedup']:.0f} times as fast. Checked before timing: {result['checked']} bytes are the "
        "same with it and without.",
    ]
    return "\n".join(lines) + "\n"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--passes", type=int, default=5)
    parser.add_argument("--output", type=Path, default=Path(__file__).parent / "results" / "generation_cpu")
    options = parser.parse_args()
    torch.set_num_threads(options.threads)
    model = demo_model(PROMPT_BYTES + SAMPLE_BYTES)
    config = model.config
    checked = check(model)
    result = {
        "device": device_name("cpu"),
        "torch": torch.__version__,
        "python": platform.python_version(),
        "commit": commit(),
        "command": f"python benchmarks/{Path(sys.argv[0]).name} --rounds {options.rounds}",
        "model": f"{config.num_hidden_layers} layers, d {config.hidden_size}, {config.num_attention_heads} heads, "
        f"{' and '.join(config.patterns)}".replace("|", "\\|"),
        "rounds": options.rounds,
        "passes": options.passes,
        "checked": checked,
        **measure(model, options.rounds, options.passes),
    }
    write_whole(options.output.with_suffix(".json"), json.dumps(result, indent=1) + "\n")
    write_whole(options.output.with_suffix(".md"), render(result))
    print(f"written: {options.output.stem}.json, {options.output.stem}.md")


if __name__ == "__main__":
    main()
