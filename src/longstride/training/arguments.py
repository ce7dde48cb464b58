"""What every training tells Hugging Face's Trainer: optimiser, schedule, machine."""

from pathlib import Path
from typing import Any

import torch
from transformers import TrainingArguments

from longstride.training.recipe import OptimizerRecipe, ScheduleRecipe


def trainer_arguments(
    optimizer: OptimizerRecipe,
    schedule: ScheduleRecipe,
    *,
    folder: Path,
    device: torch.device,
    precision: str,
    seed: int,
    log_every: int,
    **others: Any,
) -> TrainingArguments:
    """Trainer's arguments: AdamW, a warm-up and a cosine down to zero, items in order, on one device.

    They have no name for Muon: see `longstride.training.recipe_trainer.RecipeTrainer`.

    Args:
        folder: where Trainer may write.
        precision: ``fp32``, ``bf16`` or ``fp16``.
        log_every: steps between two reports of the loss.
        others: any other of its arguments.
    """
    args = TrainingArguments(
        output_dir=str(folder),
        max_steps=schedule.steps,
        per_device_train_batch_size=schedule.batch_size,
        gradient_accumulation_steps=schedule.gradient_accumulation_steps,
        learning_rate=optimizer.learning_rate,
        weight_decay=optimizer.weight_decay,
        adam_beta1=optimizer.adam_beta1,
        adam_beta2=optimizer.adam_beta2,
        max_grad_norm=optimizer.max_grad_norm,
        lr_scheduler_type="cosine",
        warmup_steps=schedule.warmup_steps,
        train_sampling_strategy="sequential",
        bf16=precision == "bf16",
        fp16=precision == "fp16",
        use_cpu=device.type == "cpu",
        seed=seed,
        logging_steps=log_every,
        # A loss that is not finite is reported, instead of averaged away.
        logging_nan_inf_filter=False,
        disable_tqdm=True,
        log_level="error",
        remove_unused_columns=False,
        dataloader_pin_memory=device.type == "cuda",
        # Batches are on their way while the device computes: waiting for each would empty its queue at every step.
        accelerator_config={"non_blocking": device.type == "cuda"},
        **others,
    )
    if args.n_gpu > 1:
        # Trainer would split every batch over all GPUs of the machine by DataParallel, unasked.
        args._n_gpu = 1
    return args
