"""Hugging Face's Trainer as every recipe uses it: with the optimizer that the recipe names."""

from typing import Any

import torch
from transformers import PreTrainedModel, PrinterCallback, Trainer

from longstride.training.muon import MuonWithAdamW, block_matrices


class RecipeTrainer(Trainer):
    """Trainer that trains with AdamW, or with Muon beside it, and prints nothing.

    Args:
        model: what is trained.
        optimizer_name: one of `longstride.training.recipe.OPTIMIZERS`.
        options: the arguments of Trainer.
    """

    def __init__(self, *, model: PreTrainedModel, optimizer_name: str, **options: Any) -> None:
        super().__init__(model=model, **options)
        self.optimizer_name = optimizer_name
        # The mean over batches, which is the mean over bytes where all windows count in full. Batches of documents
        # count alike, also those with fewer places that count, such as the last segments of documents.
        self.model_accepts_loss_kwargs = False
        self.remove_callback(PrinterCallback)

    def create_optimizer(self, model: Any = None) -> torch.optim.Optimizer:
        """AdamW as Trainer makes it, which gives up the blocks' matrices where the recipe names Muon."""
        if self.optimizer is None and self.optimizer_name == "muon":
            matrices = block_matrices(self.model if model is None else model)
            self.optimizer = MuonWithAdamW(super().create_optimizer(model), matrices)
        return super().create_optimizer(model)
