"""Muon beside AdamW: orthogonal steps for the matrices of the residual blocks, AdamW's for everything else.

Muon replaces the momentum of a matrix's gradient by the nearest matrix with orthonormal rows or columns, so that no
direction dominates a step. Tables, of embeddings or logits, and vectors are no maps between hidden states and stay
with AdamW.

Two optimizers must be one for Trainer, its schedule, its gradient scaler and its checkpoints: `MuonWithAdamW`.
"""

import math
from collections.abc import Callable, Iterator, Mapping
from typing import Any

import torch
from torch import Tensor, nn
from torch.optim import Optimizer

from longstride.nn import StackedProjection

# All as torch.optim.Muon's defaults. x -> ax + bx^3 + cx^5, five times, brings all of [0.002, 1] to 0.68 to 1.20.
COEFFICIENTS = 3.4445, -4.7750, 2.0315
ITERATIONS = 5
SMALLEST_NORM = 1e-7
MOMENTUM = 0.95
# Enough to fill any device; what a step holds beside weights, gradients and momenta is at most 12 bytes for each, less
# than 1 GiB, unless a single map is larger.
BATCH_ELEMENTS = 2**26


def block_matrices(model: Any) -> dict[Tensor, tuple[int, ...]]:
    """The weights of all linear maps in the residual blocks, each with the rows of the maps that are stacked in it."""
    return {
        layer.weight: layer.widths if isinstance(layer, StackedProjection) else (layer.out_features,)
        for layer in model.base_model.get_submodule("layers").modules()
        if isinstance(layer, nn.Linear)
    }


def iteration_dtype(device: torch.device) -> torch.dtype:
    """bfloat16, which is precise enough; float32 on CPUs, most of which take ten times as long for bfloat16."""
    return torch.float32 if device.type == "cpu" else torch.bfloat16


def orthogonalised(maps: Tensor) -> Tensor:
    """About U V^T for each U S V^T of a batch, by Newton-Schulz iterations in `iteration_dtype`.

    Args:
        maps: [n, rows, columns], of any floating dtype.

    Returns:
        [n, rows, columns] in that dtype. Singular values that were at least 0.002 of a map's Frobenius norm are about
        0.7 to 1.2, smaller ones are less. A map of zeros stays one.

    Source: Jordan 2024 (Muon).
    """
    a, b, c = COEFFICIENTS
    tall = maps.size(1) > maps.size(2)
    x = maps.to(iteration_dtype(maps.device))
    x = x / torch.linalg.vector_norm(x, dim=(1, 2), keepdim=True).clamp(min=SMALLEST_NORM)
    # The Gram matrices are of the shorter side. The transposition is a view: the products read either order.
    x = x.mT if tall else x
    for _ in range(ITERATIONS):
        gram = torch.bmm(x, x.mT)
        x = torch.baddbmm(x, torch.baddbmm(gram, gram, gram, beta=b, alpha=c), x, beta=a)
    return x.mT if tall else x


class MuonWithAdamW(Optimizer):
    """Muon for some matrices, AdamW for the other parameters, with one learning rate and decay.

    Muon's steps are scaled by 0.2 sqrt(max(rows, columns)), which gives them the size that AdamW's usually have; so a
    learning rate, a weight decay and a schedule mean the same for both. Momentum is 0.95, with Nesterov's look ahead,
    and orthogonalisation takes 5 Newton-Schulz iterations, in bfloat16 or, on CPUs, float32. Each map's steps equal
    those of `torch.optim.Muon` with ``adjust_lr_fn="match_rms_adamw"``, but for bfloat16's rounding. torch takes one
    map after another, some 25 kernels each; here all maps of one shape go through the same batched products, so that
    the number of kernels hardly grows with the depth.

    Maps that are stacked in one parameter, such as those to queries, keys and values, are orthogonalised one by one.
    Groups and state are those of whole parameters, Muon's before AdamW's, and are saved and loaded as every
    optimizer's.

    Args:
        adamw: an AdamW over all parameters, not yet stepped; it gives up the matrices, and Muon takes over the learning
            rates and decays that they have there.
        matrices: two-dimensional parameters of ``adamw``, each with the rows of the maps stacked in it.

    Source: Jordan 2024 (Muon); Liu 2025 ("Muon is scalable for LLM training"), section 2.2, for scale and decay.
    """

    def __init__(self, adamw: Optimizer, matrices: Mapping[Tensor, tuple[int, ...]]) -> None:
        of_muon = []
        for group in adamw.param_groups:
            taken = [parameter for parameter in group["params"] if parameter in matrices]
            group["params"] = [parameter for parameter in group["params"] if parameter not in matrices]
            if taken:
                of_muon.append({"params": taken, "lr": group["lr"], "weight_decay": group["weight_decay"]})
        self.matrices = matrices
        self.adamw = adamw
        self.muon_groups = len(of_muon)
        super().__init__([*of_muon, *adamw.param_groups], {})

    @torch.no_grad()
    def step(self, closure: Callable[[], Any] | None = None) -> Any:
        """One step of both; the loss of ``closure``, if there is one."""
        loss = None
        if closure is not None:
            with torch.enable_grad():
                loss = closure()
        # Loading replaces the groups and the state, so AdamW takes up here what this optimizer has now.
        self.adamw.param_groups = self.param_groups[self.muon_groups :]
        self.adamw.state = self.state
        self.adamw.step()
        for group in self.param_groups[: self.muon_groups]:
            self._muon_step(group)
        return loss

    def _muon_step(self, group: dict[str, Any]) -> None:
        trained = []
        for matrix in group["params"]:
            if matrix.grad is not None:
                state = self.state[matrix]
                if not state:
                    state["momentum_buffer"] = torch.zeros_like(matrix)
                trained.append((matrix, matrix.grad, state["momentum_buffer"]))
        if not trained:
            return
        matrices, gradients, momenta = zip(*trained, strict=True)
        torch._foreach_lerp_(momenta, gradients, 1 - MOMENTUM)
        torch._foreach_mul_(matrices, 1 - group["lr"] * group["weight_decay"])
        for maps, of_gradients, of_momenta in self._batches(trained):
            steps = orthogonalised(torch.stack(torch._foreach_lerp(of_gradients, of_momenta, MOMENTUM)))
            # In the dtype and the order of the maps: otherwise the addition would be a kernel for each of them.
            steps = steps.to(maps[0].dtype, memory_format=torch.contiguous_format)
            scale = 0.2 * math.sqrt(max(maps[0].shape))
            torch._foreach_add_(maps, steps.unbind(), alpha=-group["lr"] * scale)

    def _batches(self, trained: list[tuple[Tensor, Tensor, Tensor]]) -> Iterator[tuple[tuple[Tensor, ...], ...]]:
        """Views of maps of one shape, their gradients and their momenta; of `BATCH_ELEMENTS` or of one map."""
        alike: dict[Any, list[tuple[Tensor, ...]]] = {}
        for matrix, gradient, momentum in trained:
            rows = self.matrices[matrix]
            for views in zip(matrix.split(rows), gradient.split(rows), momentum.split(rows), strict=True):
                alike.setdefault((views[0].shape, views[0].device, views[0].dtype), []).append(views)
        for (shape, _, _), maps in alike.items():
            count = max(1, BATCH_ELEMENTS // shape.numel())
            for first in range(0, len(maps), count):
                yield tuple(zip(*maps[first : first + count], strict=True))
