"""Data parallelism: every rank holds everything."""

from collections.abc import Iterator

import torch
from torch import Tensor, nn
from torch.nn.parallel import DistributedDataParallel

from rayrlhf.config import TrainingConfig
from rayrlhf.training.backend.interface import Backend
from rayrlhf.training.backend.optimizer import clip_gradients, make_optimizer, may_update
from rayrlhf.training.backend.state import Slot


class DDPBackend(Backend):
    """The whole model and optimizer on every rank; DistributedDataParallel reduces gradients."""

    def __init__(
        self, module: nn.Module, cfg: TrainingConfig, total_steps: int, device: torch.device
    ) -> None:
        super().__init__(module.to(device), cfg, total_steps, device)
        self.optimizer = make_optimizer(self.module, cfg)
        self._trained = {n: p for n, p in self.module.named_parameters() if p.requires_grad}
        self._wrapper: DistributedDataParallel | None = None
        if self.world_size > 1:
            self._wrapper = DistributedDataParallel(
                self.module,
                device_ids=[device] if device.type == "cuda" else None,
                forward_sync_buffers=False,
                gradient_as_bucket_view=True,
            )

    @property
    def _replicated(self) -> bool:
        return True

    def _slots(self, changes: bool) -> Iterator[list[Slot]]:
        del changes
        yield [Slot(name, 0, p.numel(), p) for name, p in self._trained.items()]

    def _optimizer(self) -> torch.optim.Optimizer:
        return self.optimizer

    def _backward(self, loss: Tensor, is_last: bool) -> None:
        # DDP reduces in the backward pass that its reducer was prepared for. The forward goes to
        # the module itself, as under no_sync(), because only here it is known which is the last.
        if is_last and self._wrapper is not None:
            self._wrapper.reducer.prepare_for_backward([])
        loss.backward()

    def _update(self, norm_limit: float) -> float:
        norm = clip_gradients(self._trained.values(), self.cfg.grad_clip)
        # The reduced gradient is the same on every rank, so all of them decide alike.
        if may_update(norm, norm_limit):
            self.optimizer.step()
        self.optimizer.zero_grad()
        return norm
