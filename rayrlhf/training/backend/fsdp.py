"""FSDP2: weights, gradients and optimizer sharded by rows, with nothing but PyTorch.

A unit is a transformer layer; embedding, last norm and head are the root's. Each is gathered for
its forward and again for its backward. Micro-batches before a step's last keep their gradients
whole on every rank, in float32, and one reduction at the end adds them up.
"""

import math
import warnings
from collections.abc import Iterator

import torch
from torch import Tensor, nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import (
    CPUOffloadPolicy,
    FSDPModule,
    MixedPrecisionPolicy,
    OffloadPolicy,
    fully_shard,
    register_fsdp_forward_method,
)
from torch.distributed.tensor import DTensor

from rayrlhf.config import TrainingConfig
from rayrlhf.models.causal_lm import CausalLMModel
from rayrlhf.training.backend.interface import Backend
from rayrlhf.training.backend.optimizer import make_optimizer, may_update, scale_gradients
from rayrlhf.training.backend.process_group import need_process_group
from rayrlhf.training.backend.state import Slot


class FSDPBackend(Backend):
    """`fully_shard`: float32 weights in shards, gathered in the precision of the forward."""

    def __init__(
        self, module: nn.Module, cfg: TrainingConfig, total_steps: int, device: torch.device
    ) -> None:
        need_process_group(device)
        super().__init__(module, cfg, total_steps, device)
        # The log-probs are a view, which nobody overwrites.
        warnings.filterwarnings("ignore", message="FSDP2-wrapped module .* returned a view tensor")
        mesh = init_device_mesh(device.type, (self.world_size,))
        precision = MixedPrecisionPolicy(
            param_dtype=torch.bfloat16 if self._precision == "bfloat16" else None,
            reduce_dtype=torch.float32,
        )
        offload = OffloadPolicy()
        if cfg.offload == "cpu":
            offload = CPUOffloadPolicy(pin_memory=device.type == "cuda")
        for part in (*_layers(module), module):
            # The root, too, is sharded again after its forward: else, after one without backward,
            # it would go on with the weights that it had gathered before the next update.
            fully_shard(
                part,
                mesh=mesh,
                mp_policy=precision,
                offload_policy=offload,
                reshard_after_forward=True,
            )
        if isinstance(module, CausalLMModel):
            register_fsdp_forward_method(module, "generate")
        self.optimizer = make_optimizer(module, cfg)
        self._trained = {n: p for n, p in module.named_parameters() if p.requires_grad}

    def _slots(self, changes: bool) -> Iterator[list[Slot]]:
        del changes
        slots = []
        for name, parameter in self._trained.items():
            assert isinstance(parameter, DTensor)
            per_rank = -(-parameter.shape[0] // self.world_size)  # of torch.chunk
            row_numel = math.prod(parameter.shape[1:])
            offset = min(self.rank * per_rank, parameter.shape[0]) * row_numel
            slots.append(Slot(name, offset, parameter.to_local().numel(), parameter))
        yield slots

    def _optimizer(self) -> torch.optim.Optimizer:
        return self.optimizer

    def _backward(self, loss: Tensor, is_last: bool) -> None:
        assert isinstance(self.module, FSDPModule)
        self.module.set_requires_gradient_sync(is_last)
        loss.backward()

    def _update(self, norm_limit: float) -> float:
        trained = [p for p in self._trained.values() if p.grad is not None]
        shards = [p.grad.to_local() for p in trained if isinstance(p.grad, DTensor)]
        here = nn.utils.get_total_norm(shards, foreach=True).item()
        norm = math.sqrt(self.rank_sum(here**2))
        # The same on every rank, so all of them decide alike.
        if may_update(norm, norm_limit):
            scale_gradients(trained, norm, self.cfg.grad_clip)
            self.optimizer.step()
        self.optimizer.zero_grad()
        return norm

    def _full(self, parameter: nn.Parameter) -> Tensor:
        # With offload, shards lie where no collective of the GPUs reaches.
        sharded = parameter.detach().to(self.device)
        assert isinstance(sharded, DTensor)
        return sharded.full_tensor()


def _layers(module: nn.Module) -> Iterator[nn.Module]:
    """Yield the members of the outermost lists of modules: the layers of a transformer."""
    for child in module.children():
        if isinstance(child, nn.ModuleList):
            yield from child
        else:
            yield from _layers(child)
