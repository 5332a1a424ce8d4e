"""DeepSpeed ZeRO, stages 0 to 3."""

import math
import os
import socket
import sys
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from rayrlhf.config import RecipeError, TrainingConfig
from rayrlhf.training.backend import native_ops
from rayrlhf.training.backend.interface import Backend
from rayrlhf.training.backend.optimizer import clip_gradients, make_optimizer, may_update
from rayrlhf.training.backend.process_group import need_process_group
from rayrlhf.training.backend.state import Slot, flat


class DeepSpeedBackend(Backend):
    """ZeRO: optimizer (1), gradients (2) and weights (3) are partitioned over the ranks.

    Under bfloat16, stages 1 to 3 hold the weights in bfloat16 and float32 masters in the optimizer;
    stage 0 uses autocast as DDP does. With `offload`, the optimizer (and under stage 3 the weights
    between their uses) lie in the host's memory or on NVMe, and PyTorch's AdamW runs on the CPU.
    """

    def __init__(
        self, module: nn.Module, cfg: TrainingConfig, total_steps: int, device: torch.device
    ) -> None:
        meet_deepspeed_needs(device)
        if cfg.offload == "nvme":
            _require_async_io()
        import deepspeed

        float32 = {n: p.data for n, p in module.named_parameters() if p.requires_grad}
        largest = max(p.numel() for p in module.parameters())
        super().__init__(module.to(device), cfg, total_steps, device)
        self.stage = cfg.zero_stage
        self._trained = {n: p for n, p in self.module.named_parameters() if p.requires_grad}
        config = deepspeed_config(
            cfg, self._precision, on_gpu=device.type == "cuda", largest_parameter=largest
        )
        if cfg.offload == "nvme" and device.type == "cpu":
            # Told the dtype, as `initialize` does, DeepSpeed 0.19 stores bfloat16 on CPUs whatever
            # it is told; told none, it takes that of the config.
            deepspeed.zero.Init(module=self.module, config_dict_or_path=config)
        self.engine, *_ = deepspeed.initialize(
            model=self.module,
            optimizer=make_optimizer(self.module, cfg),
            config=config,
            dist_init_required=False,
        )
        if self._precision == "bfloat16":
            self._set_masters(float32)

    @torch.no_grad()
    def _set_masters(self, float32: Mapping[str, Tensor]) -> None:
        """Give the masters what DeepSpeed rounds off: it makes them of the bfloat16 weights."""
        for slots in self._slots(changes=True):
            for slot in slots:
                master = flat(slot.owner).narrow(0, slot.start, slot.numel)
                master.copy_(flat(float32[slot.name]).narrow(0, slot.offset, slot.numel))

    @property
    def _replicated(self) -> bool:
        return self.stage == 0

    def _slots(self, changes: bool) -> Iterator[list[Slot]]:
        if self.stage == 0:
            yield [Slot(name, 0, p.numel(), p) for name, p in self._trained.items()]
        elif self.stage == 3:
            yield from self._partitions_of_stage_3(changes)
        else:
            yield list(self._partitions_of_stage_1_and_2())

    def _partitions_of_stage_1_and_2(self) -> Iterator[Slot]:
        """Yield where parameters overlap with this rank's flat partition of their group."""
        groups = self._optimizer().param_groups
        parameter: Any
        for name, parameter in self._trained.items():
            mapping = parameter._hp_mapping
            if mapping is not None:
                here, there = mapping.lp_fragment_address, mapping.hp_fragment_address
                (master,) = groups[mapping.param_group_index]["params"]
                yield Slot(name, here.start, here.numel, master, there.start)

    def _partitions_of_stage_3(self, changes: bool) -> Iterator[list[Slot]]:
        """Yield this rank's part of every parameter, group by group; some are read from NVMe."""
        zero = self.engine.optimizer
        names = {id(parameter): name for name, parameter in self._trained.items()}
        for index, group in enumerate(zero.fp16_groups):
            is_swapped = zero._swappable_optimizer_subgroup(index)
            if is_swapped:
                zero._optimizer_states_and_gradient_swap_in(index)
            slots, start = [], 0
            for parameter in group:
                per_rank = parameter.partition_numel()
                offset = per_rank * self.rank
                numel = min(per_rank, parameter.ds_numel - offset)  # the last are padded
                if numel > 0:
                    master = zero.fp32_partitioned_groups_flat[index]
                    slots.append(Slot(names[id(parameter)], offset, numel, master, start))
                start += per_rank
            yield slots
            if is_swapped and changes:
                zero._optimizer_states_and_gradient_swap_out(index)
            elif is_swapped:
                zero._release_swap_buffers(index)

    def _optimizer(self) -> torch.optim.Optimizer:
        zero = self.engine.optimizer
        optimizer: torch.optim.Optimizer = zero if self.stage == 0 else zero.optimizer
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
        spoilt = self._spoil() if norm > norm_limit else []
        self.engine.step()  # clips, and skips on overflow
        for gradient in spoilt:
            gradient.zero_()  # stage 3 keeps them, and never writes to what fills a part up
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
        if self.cfg.offload != "none":
            norms = self.engine.optimizer.norm_for_param_grads.values()
            return math.sqrt(self.rank_sum(sum(float(norm) ** 2 for norm in norms)))
        squares = sum(float(g.float().square().sum()) for g in self._reduced_gradients())
        return math.sqrt(squares if self._reduces_whole else self.rank_sum(squares))

    def _spoil(self) -> list[Tensor]:
        """Make `engine.step` skip, as it does for a NaN; return what has one now."""
        if self.cfg.offload == "none":
            gradients = self._reduced_gradients()
            for gradient in gradients:
                gradient.fill_(math.nan)
            return gradients
        # The gradients are away, and DeepSpeed clips and skips by the norms that it took before.
        norms = self.engine.optimizer.norm_for_param_grads
        for key, norm in norms.items():
            norms[key] = norm * math.nan
        return []

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


def deepspeed_config(
    cfg: TrainingConfig, precision: str, *, on_gpu: bool, largest_parameter: int
) -> dict[str, Any]:
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
            **_offload(cfg, on_gpu=on_gpu, largest_parameter=largest_parameter),
        },
        # Offloaded, the fused AdamW of PyTorch runs on the CPU: no other optimizer to compile.
        "zero_force_ds_cpu_optimizer": False,
        "steps_per_print": None,
    }


def _offload(cfg: TrainingConfig, *, on_gpu: bool, largest_parameter: int) -> dict[str, Any]:
    """Return the part of `zero_optimization` on what is kept away from the device."""
    if cfg.offload == "none":
        return {}
    place: dict[str, Any] = {"device": cfg.offload, "pin_memory": on_gpu}
    if cfg.offload == "nvme":
        place["nvme_path"] = cfg.offload_dir
    parts = {"offload_optimizer": place}
    if cfg.zero_stage == 3:
        parts["offload_param"] = dict(place)
        if cfg.offload == "nvme":
            # A buffer holds a whole partition, and DeepSpeed's own size may be less than that.
            parts["offload_param"]["buffer_size"] = max(largest_parameter, 10**8)
    return parts


def _require_async_io() -> None:
    """Raise RecipeError where DeepSpeed cannot read and write NVMe."""
    from deepspeed.ops.op_builder import AsyncIOBuilder

    if not AsyncIOBuilder().is_compatible(verbose=False):
        raise RecipeError(
            f"offload=nvme needs libaio on every node, and {socket.gethostname()} lacks it: "
            "apt install libaio-dev, or set offload=cpu"
        )
    native_ops.build(AsyncIOBuilder().load)


def meet_deepspeed_needs(device: torch.device) -> None:
    """Give DeepSpeed the environment and the process group that it insists on."""
    os.environ.setdefault("LOCAL_RANK", str(device.index or 0))
    # On CPU it compiles its shared-memory collectives, with the ninja that stands beside Python.
    beside = str(Path(sys.executable).parent)
    if beside not in os.environ["PATH"].split(os.pathsep):
        os.environ["PATH"] = os.pathsep.join([os.environ["PATH"], beside])
    need_process_group(device)
    if device.type == "cpu":
        from deepspeed.comm.torch import build_shm_op

        native_ops.build(build_shm_op)
