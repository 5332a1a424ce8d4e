"""What a backend computes in."""

from typing import Literal

import torch

from rayrlhf.config import TrainingConfig


def has_bfloat16(device: torch.device) -> bool:
    """Tell whether `device` has instructions for bfloat16 products: without, it is the slower."""
    if device.type == "cuda":
        return torch.cuda.is_bf16_supported(including_emulation=False)
    capabilities = torch.cpu.get_capabilities()
    return bool(capabilities.get("avx512_bf16") or capabilities.get("amx_bf16"))


def forward_precision(
    cfg: TrainingConfig, device: torch.device
) -> Literal["float32", "autocast", "bfloat16"]:
    """Say what a backend computes in: float32, bfloat16 by autocast, or with bfloat16 weights."""
    if cfg.precision == "float32" or (cfg.precision == "auto" and not has_bfloat16(device)):
        return "float32"
    return "bfloat16" if cfg.zero_stage > 0 or cfg.backend == "fsdp" else "autocast"
