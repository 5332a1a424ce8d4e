"""DeepSpeed ZeRO, stages 0 to 3."""

import math
import os
import sys
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn

from rayrlhf.config import TrainingConfig
from rayrlhf.training.backend.interface import Backend
from rayrlhf.training.backend.optimizer import (
    clip_gradients,
    make_optimizer,
    may_update,
    named_state,
    set_named_state,
)


class DeepSpeedBackend(Backend):
    """ZeRO: optimizer (1), gradients (2) and weights (3) are partitioned over the ranks.

    Under bfloat16, stages 1 to 3 hold the weights in bfloat16 and float32 masters in the optimizer;
    stage 0 uses autocast as DDP does. State is saved per rank: it fits the same number of ranks.
    """

    def __init__(
        self, module: nn.Module, cfg: TrainingConfig, total_steps: int, device: torch.device
    ) -> None:
        meet_deepspeed_needs(device)
        import deepspeed

        super().__init__(module.to(device), cfg, total_steps, device)
        self.stage = cfg.zero_stage
        self._trained = {n: p for n, p in self.module.named_parameters() if p.requires_grad}
        self.engine, *_ = deepspeed.initialize(
            model=self.module,
            optimizer=make_optimizer(self.module, cfg),
            config=_deepspeed_config(cfg, self._precision, on_gpu=device.type == "cuda"),
            dist_init_required=False,
        )

    @property
    def _layout(self) -> str:
        if self.stage == 0:
            return "backend=deepspeed zero_stage=0"
        return (
            f"backend=deepspeed zero_stage={self.stage} precision={self._precision} "
            f"num_workers={self.world_size}"
        )

    def _state_file(self, folder: str | Path) -> Path:
        name = "optimizer" if self.stage == 0 else f"optimizer-rank{self.rank:05d}"
        return Path(folder) / f"{name}.safetensors"

    def _masters(self) -> list[Tensor]:
        """Return this rank's flat float32 partitions of the weights."""
        if self.stage == 3:
            partitions: list[Tensor] = self.engine.optimizer.fp32_partitioned_groups_flat
            return partitions
        return [
            p for group in self.engine.optimizer.optimizer.param_groups for p in group["params"]
        ]

    def _state(self) -> dict[str, Tensor] | None:
        if self.stage == 0:
            return named_state(self.engine.optimizer, self._trained) if self.rank == 0 else None
        tensors = {}
        for index, master in enumerate(self._masters()):
            tensors[f"master.{index}"] = master
            for key, value in self.engine.optimizer.optimizer.state[master].items():
                tensors[f"{key}.{index}"] = value
        return tensors

    @torch.no_grad()
    def _restore(self, tensors: dict[str, Tensor]) -> None:
        if self.stage == 0:
            set_named_state(self.engine.optimizer, self._trained, tensors)
            return
        zero = self.engine.optimizer
        if self.stage == 3 and zero.persistent_parameters:
            zero.persistent_parameters[0].partition(zero.persistent_parameters)
        for index, master in enumerate(self._masters()):
            master.copy_(tensors.pop(f"master.{index}"))
            zero.optimizer.state[master] = {
                name.rpartition(".")[0]: value.to(master.device)
                for name, value in tensors.items()
                if name.rpartition(".")[2] == str(index)
            }
        if self.stage == 3:
            for index in range(len(self._masters())):
                zero._reassign_or_swap_out_partitioned_parameters(index)
            zero.checkpoint_event_epilogue()  # gathers the parameters kept whole
        else:
            zero.update_lp_params()

    def _optimizer(self) -> torch.optim.Optimizer:
        optimizer: torch.optim.Optimizer = self.engine.optimizer
        return optimizer

    def _forward(self, *args: Any, **kwargs: Any) -> Any:
        return self.engine(*args, **kwargs)

    def _backward(self, loss: Tensor, is_last: bool) -> None:
        self.engine.set_gradient_accumulation_boundary(is_last)
        self.engine.backward(loss, scale_wrt_gas=False)

    def _update(self, norm_limit: float) -> float:
        if self.stage == 0:
            norm = clip_gradients(self._trained.values(), self.cfg.grad_clip)
            if may_update(norm, norm_limit):
                self.engine.step()
            self.engine.optimizer.zero_grad()
            return norm
        # Of a step that may be skipped, the norm is needed before DeepSpeed clips and updates.
        norm = math.nan if norm_limit == math.inf else self._norm()
        if norm > norm_limit:
            for gradient in self._reduced_gradients():
                gradient.fill_(math.nan)
        self.engine.step()  # clips, and skips on overflow
        return norm if norm > norm_limit else float(self.engine.get_global_grad_norm())

    @property
    def _reduces_whole(self) -> bool:
        """Whether every rank has all of the gradients: stage 1 under bfloat16."""
        return self.stage == 1 and self._precision == "bfloat16"

    def _reduced_gradients(self) -> list[Tensor]:
        """Return this rank's reduced gradients, as `engine.step` will read them."""
        zero = self.engine.optimizer
        groups = (
            zero.fp32_groups_gradients if self._reduces_whole else zero.averaged_gradients.values()
        )
        return [gradient for group in groups for gradient in group if gradient is not None]

    def _norm(self) -> float:
        """Return the global norm of the gradients; where they are in parts, none overlap."""
        squares = sum(float(g.float().square().sum()) for g in self._reduced_gradients())
        return math.sqrt(squares if self._reduces_whole else self.global_sum(squares))

    def _full(self, parameter: nn.Parameter) -> Tensor:
        if self.stage == 0:
            return parameter
        from deepspeed.utils import safe_get_full_fp32_param

        if self.stage == 3 and not parameter.requires_grad:
            from deepspeed.runtime.zero import GatheredParameters

            with GatheredParameters([parameter]):
                return parameter.detach().clone()
        full: Tensor | None = safe_get_full_fp32_param(parameter)
        return parameter if full is None else full


def _deepspeed_config(cfg: TrainingConfig, precision: str, *, on_gpu: bool) -> dict[str, Any]:
    """Return DeepSpeed's config; batch sizes are 1 because Backend scales and accumulates."""
    return {
        "train_micro_batch_size_per_gpu": 1,
        "gradient_accumulation_steps": 1,
        # Stage 0 clips in _update, where it also sees NaN and Inf.
        "gradient_clipping": cfg.grad_clip if cfg.zero_stage else 0.0,
        "bf16": {"enabled": precision == "bfloat16", "check_grad_overflow": True},
        # On GPUs it ends an autocast that is not its own. No module is safe: all reduce in float32.
        "torch_autocast": {
            "enabled": precision == "autocast",
            "dtype": "bfloat16",
            "lower_precision_safe_modules": [],
        },
        "data_types": {"grad_accum_dtype": "fp32"},
        "zero_optimization": {
            "stage": cfg.zero_stage,
            "overlap_comm": on_gpu,
            "contiguous_gradients": True,
        },
        "steps_per_print": None,
    }


def meet_deepspeed_needs(device: torch.device) -> None:
    """Give DeepSpeed the environment and the process group that it insists on."""
    os.environ.setdefault("LOCAL_RANK", str(device.index or 0))
    # On CPU it compiles its shared-memory collectives, with the ninja that stands beside Python.
    beside = str(Path(sys.executable).parent)
    if beside not in os.environ["PATH"].split(os.pathsep):
        os.environ["PATH"] = os.pathsep.join([os.environ["PATH"], beside])
    if not dist.is_initialized():
        backend = "nccl" if device.type == "cuda" else "gloo"
        alone = dist.HashStore()
        dist.init_process_group(backend, store=alone, rank=0, world_size=1)
