"""One training step of a model, as `longstride.training` does it: what the training benchmark builds and times."""

from __future__ import annotations

import itertools
import math
import time
from collections.abc import Mapping
from contextlib import AbstractContextManager
from dataclasses import dataclass
from typing import Any

import torch
from torch.nn.functional import scaled_dot_product_attention

from longstride import SparseTransformerConfig, SparseTransformerForCausalLM
from longstride.models import compiled_blocks, recompute_in_backward
from longstride.nn import SelfAttention
from longstride.training import StepGraph

#: How far the loss of a compiled step may be from the eager one's, in nats, and its gradient norm relatively.
LOSS_BOUND, NORM_BOUND = 0.02, 0.05
DENSE, NONE, SDPA = "dense", "none", "dense, SDPA"


class ValuesAttention(SelfAttention):
    """Attention replaced by its values: what everything but attention costs."""

    def forward(self, hidden: torch.Tensor, *_: object, **__: object) -> torch.Tensor:
        return self.out_proj(self.project(hidden)[2].transpose(1, 2).flatten(2))


class SdpaAttention(SelfAttention):
    """Dense attention by whichever kernel PyTorch takes first."""

    def forward(self, hidden: torch.Tensor, *_: object, **__: object) -> torch.Tensor:
        attended = scaled_dot_product_attention(*self.project(hidden), is_causal=True)
        return self.out_proj(attended.transpose(1, 2).flatten(2))


@dataclass(frozen=True)
class Size:
    """A model and its batch: everything but the attention.

    Attributes:
        recompute: what the backward pass computes again, as `run.recompute` of a recipe.
    """

    length: int
    batch: int
    layers: int
    hidden_size: int = 512
    heads: int = 8
    qk_hidden_size: int | None = None
    intermediate_size: int | None = None
    recompute: str = "nothing"

    @property
    def text(self) -> str:
        return f"{self.layers} layers, d {self.hidden_size}, {self.heads} heads, T {self.length:,}, batch {self.batch}"


class Stepper:
    """A model with its optimizer, whose `step` is a whole training step.

    Args:
        patterns: pattern texts of the layers, or what `DENSE`, `NONE` and `SDPA` stand for.
        pool: memory that its recorded pass shares with other models' passes.
    """

    def __init__(self, size: Size, patterns: tuple[str, ...], device: str, pool: Any = None) -> None:
        special = {(NONE,): ValuesAttention, (SDPA,): SdpaAttention}.get(patterns)
        texts = ("Causal()",) if special is not None or patterns == (DENSE,) else patterns
        config = SparseTransformerConfig(
            hidden_size=size.hidden_size,
            num_hidden_layers=size.layers,
            num_attention_heads=size.heads,
            max_position_embeddings=size.length,
            qk_hidden_size=size.qk_hidden_size,
            intermediate_size=size.intermediate_size,
            position_axes=_axes(size.length),
            patterns=list(texts),
        )
        torch.manual_seed(0)
        with torch.device(device):
            self.model = SparseTransformerForCausalLM(config).train()
            # The paper's logits start at zero, where every model has the same loss and attention no gradient.
            torch.nn.init.normal_(self.model.lm_head.weight, std=1 / math.sqrt(size.hidden_size))
            self.tokens = torch.randint(256, (size.batch, size.length))
        for layer in self.model.model.layers:
            layer.attention.__class__ = special or SelfAttention
        recompute_in_backward(self.model, size.recompute)
        self.device = device
        self.parameters = sum(parameter.numel() for parameter in self.model.parameters())
        self.graph = None if device == "cpu" else StepGraph(self._pass, self.model.parameters(), pool)
        self.optimizer = torch.optim.AdamW(self.model.parameters(), lr=1e-4, betas=(0.9, 0.95), fused=True)

    def _pass(self, batch: Mapping[str, torch.Tensor]) -> torch.Tensor:
        # The CPU has no bf16 kernel that could be compared with its eager one; there the benchmark only has to run.
        with torch.autocast(self.device, torch.bfloat16, enabled=self.device != "cpu"):
            loss = self.model(batch["tokens"], labels=batch["tokens"]).loss
        loss.backward()
        return loss.detach()

    def gradients(self, recorded: bool = True) -> tuple[torch.Tensor, torch.Tensor]:
        """Loss and gradient norm of a forward and a backward pass; the gradients are clipped to 1."""
        run = self.graph if self.graph is not None and recorded else self._pass
        loss = run({"tokens": self.tokens})
        return loss, torch.nn.utils.clip_grad_norm_(self.model.parameters(), 1.0)

    def step(self, recorded: bool = True) -> torch.Tensor:
        """Forward, backward, clipping, AdamW; the loss. With ``recorded`` from a CUDA graph, once there is one."""
        loss, _ = self.gradients(recorded)
        self.optimizer.step()
        self.optimizer.zero_grad()
        return loss

    def compiled(self, backend: str) -> AbstractContextManager[None]:
        """Inside, blocks are compiled."""
        return compiled_blocks(self.model, backend=backend)


def _axes(length: int) -> list[int]:
    """Rows and columns near the root, the same for every pattern."""
    columns = 1 << (length.bit_length() // 2)
    return [-(-length // columns), columns]


def checked(stepper: Stepper) -> dict[str, float]:
    """Loss and gradient norm of a first pass, and the seconds that it took, compiling included.

    Raises:
        AssertionError: they are not finite.
    """
    start = time.perf_counter()
    loss, norm = (value.item() for value in stepper.gradients())
    found = {"loss": loss, "gradient_norm": norm, "first_step_s": time.perf_counter() - start}
    stepper.optimizer.zero_grad()
    if not (math.isfinite(loss) and math.isfinite(norm)):
        raise AssertionError(f"loss {loss}, gradient norm {norm}")
    return found


def compared(found: dict[str, float], loss: float, norm: float) -> None:
    """AssertionError where a compiled step and an eager one differ."""
    if abs(found["loss"] - loss) > LOSS_BOUND or abs(found["gradient_norm"] / norm - 1) > NORM_BOUND:
        raise AssertionError(
            f"compiled: loss {found['loss']:.4f}, gradient norm {found['gradient_norm']:.4f}; eager: {loss:.4f}, "
            f"{norm:.4f}"
        )


def step_times_ms(stepper: Stepper, steps: int) -> list[float]:
    """Milliseconds of each of so many steps in a row, from one step's end to the next one's, host and device."""
    if stepper.device == "cpu":
        times = [time.perf_counter()]
        for _ in range(steps):
            stepper.step()
            times.append(time.perf_counter())
        return [(after - before) * 1e3 for before, after in itertools.pairwise(times)]
    events = [torch.cuda.Event(enable_timing=True) for _ in range(steps + 1)]
    # A step in front, so that the host is as far ahead of the device as it gets.
    stepper.step()
    events[0].record()
    for event in events[1:]:
        loss = stepper.step()
        event.record()
    torch.cuda.synchronize()
    if not math.isfinite(loss.item()):
        raise AssertionError(f"the loss became {loss.item()}")
    return [before.elapsed_time(after) for before, after in itertools.pairwise(events)]
