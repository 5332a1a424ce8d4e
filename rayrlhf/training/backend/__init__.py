"""DDP, FSDP2 and DeepSpeed ZeRO behind one small interface; all loss scaling lives here.

    num_tokens = backend.global_sum(local_tokens)             # the one denominator of the step
    for i, micro in enumerate(micros):
        loss_sum = loss(backend(micro.input_ids, micro.attention_mask), micro)
        backend.backward(loss_sum, num_tokens, is_last=i == len(micros) - 1)
    stats = backend.step()                                    # clip, AdamW, schedule

The gradient is that of (sum of loss_sum over every micro-batch of every rank) / denominator,
however the batch is split. Every rank calls backward equally often: with ZeRO and FSDP, forward and
backward are collective, so a rank with less to do adds micro-batches whose mask is 0.
"""

import torch
from torch import nn

from rayrlhf.config import TrainingConfig
from rayrlhf.models.execution import huggingface_model, set_execution
from rayrlhf.training.backend.ddp import DDPBackend
from rayrlhf.training.backend.deepspeed import DeepSpeedBackend
from rayrlhf.training.backend.fsdp import FSDPBackend
from rayrlhf.training.backend.interface import Backend
from rayrlhf.training.backend.optimizer import (
    clip_gradients,
    learning_rate,
    make_optimizer,
    warmup_steps,
)
from rayrlhf.training.backend.precision import forward_precision, has_bfloat16
from rayrlhf.training.backend.ulysses import split_sequences

__all__ = [
    "Backend",
    "DDPBackend",
    "DeepSpeedBackend",
    "FSDPBackend",
    "clip_gradients",
    "forward_precision",
    "has_bfloat16",
    "learning_rate",
    "make_backend",
    "make_optimizer",
    "warmup_steps",
]


def make_backend(
    module: nn.Module,
    cfg: TrainingConfig,
    *,
    total_steps: int,
    device: torch.device,
    sequence_parallel: int = 1,
) -> Backend:
    """Return `module` ready to train under cfg.backend, on `device`.

    torch.distributed is initialised before, except where one process trains alone. With
    `sequence_parallel` as many neighbouring ranks share each row; see ulysses.py. Raises
    RecipeError when the model or the machine cannot run as `cfg` says.
    """
    model = huggingface_model(module)
    if model is not None:
        set_execution(
            model,
            attention=cfg.attention,
            gradient_checkpointing=cfg.gradient_checkpointing,
            compile=cfg.compile,
            device=device,
        )
    if sequence_parallel > 1:
        split_sequences(module, sequence_parallel, device)
    kinds: dict[str, type[Backend]] = {
        "ddp": DDPBackend,
        "fsdp": FSDPBackend,
        "deepspeed": DeepSpeedBackend,
    }
    backend = kinds[cfg.backend](module, cfg, total_steps, device)
    backend.sequence_parallel = sequence_parallel
    return backend
