"""Muon beside AdamW: orthogonal steps for the matrices of the residual blocks, AdamW's for everything else.

Muon replaces the momentum of a matrix's gradient by the nearest matrix with orthonormal rows or columns, so that no
direction dominates a step. Tables, of embeddings or logits, and vectors are no maps between hidden states and stay
with AdamW.

Two optimizers must be one for Trainer, its schedule, its gradient scaler and its checkpoints: `MuonWithAdamW`.
"""

from collections.abc import Callable, Iterator, Mapping
from typing import Any

import torch
from torch import Tensor, nn
from torch.optim import Muon, Optimizer

from longstride.nn import StackedProjection


def block_matrices(model: Any) -> dict[Tensor, tuple[int, ...]]:
    """The weights of all linear maps in the residual blocks, each with the rows of the maps that are stacked in it."""
    return {
        layer.weight: layer.widths if isinstance(layer, StackedProjection) else (layer.out_features,)
        for layer in model.base_model.get_submodule("layers").modules()
        if isinstance(layer, nn.Linear)
    }


class MuonWithAdamW(Optimizer):
    """`torch.optim.Muon` for some matrices, AdamW for the other parameters, with one learning rate and decay.

    Muon's steps are scaled by 0.2 sqrt(max(rows, columns)), which gives them the size that AdamW's usually have; so a
    learning rate, a weight decay and a schedule mean the same for both. Momentum is 0.95, with Nesterov's look ahead,
    and orthogonalisation takes 5 Newton-Schulz iterations in bfloat16 on every device: torch's defaults. torch has
    no batched form of it: each map of each layer is some 25 kernels a step, however many tokens went through the model.

    Maps that are stacked in one parameter, such as those to queries, keys and values, are orthogonalised one by one:
    Muon is given views of the parameter, of its gradient and of its momentum. Groups and state are those of whole
    parameters, Muon's before AdamW's, and are saved and loaded as every optimizer's.

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
        self.muon = Muon(of_muon, adjust_lr_fn="match_rms_adamw")
        self.muon_groups = len(of_muon)
        super().__init__([*self.muon.param_groups, *adamw.param_groups], {})

    @torch.no_grad()
    def step(self, closure: Callable[[], Any] | None = None) -> Any:
        """One step of both; the loss of ``closure``, if there is one."""
        loss = None
        if closure is not None:
            with torch.enable_grad():
                loss = closure()
        # Loading replaces the groups and the state, so both take up here what this optimizer has now.
        self.adamw.param_groups = self.param_groups[self.muon_groups :]
        self.adamw.state = self.state
        self.adamw.step()
        self.muon.param_groups = [
            {**group, "params": [view for matrix in group["params"] for view in self._maps(matrix)]}
            for group in self.param_groups[: self.muon_groups]
        ]
        self.muon.step()
        # Views would keep the gradients in memory.
        self.muon.param_groups = []
        self.muon.state.clear()
        return loss

    def _maps(self, matrix: Tensor) -> Iterator[Tensor]:
        """Views of the maps stacked in a matrix, whose gradients and momentum are views of the matrix's."""
        if matrix.grad is None:
            return
        state = self.state[matrix]
        if not state:
            state["momentum_buffer"] = torch.zeros_like(matrix)
        rows = self.matrices[matrix]
        parts = (whole.split(rows) for whole in (matrix.detach(), matrix.grad, state["momentum_buffer"]))
        for view, gradient, momentum in zip(*parts, strict=True):
            view.grad = gradient
            self.muon.state[view] = {"momentum_buffer": momentum}
            yield view
