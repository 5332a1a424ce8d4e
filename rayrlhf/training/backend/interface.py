"""What every backend has in common; all loss scaling lives here."""

import math
from abc import ABC, abstractmethod
from collections.abc import Callable, Container, Iterator, Sequence
from contextlib import nullcontext
from functools import partial
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn

from rayrlhf.config import TrainingConfig
from rayrlhf.training.backend.offload import HostCopies
from rayrlhf.training.backend.optimizer import learning_rate, may_update
from rayrlhf.training.backend.precision import forward_precision
from rayrlhf.training.backend.state import SavedState, Slot, file_of, save_slots


class Backend(ABC):
    """A module in training on this rank; see the head of this package."""

    def __init__(
        self, module: nn.Module, cfg: TrainingConfig, total_steps: int, device: torch.device
    ) -> None:
        self.module = module
        self.cfg = cfg
        self.total_steps = total_steps
        self.rate: Callable[[int], float] = partial(learning_rate, cfg=cfg, total_steps=total_steps)
        self.device = device
        self.rank = dist.get_rank() if dist.is_initialized() else 0
        self.world_size = dist.get_world_size() if dist.is_initialized() else 1
        self.sequence_parallel = 1
        self.num_steps = 0
        self.num_skipped = 0
        self._precision = forward_precision(cfg, device)
        self._away: HostCopies | None = None

    @property
    def data_rank(self) -> int:
        """Which part of the data is this rank's: ranks that share rows have the same."""
        return self.rank // self.sequence_parallel

    @property
    def data_size(self) -> int:
        """Into how many parts the data is shared out."""
        return self.world_size // self.sequence_parallel

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        """Run the module's forward."""
        autocast = self._precision == "autocast"
        with torch.autocast(self.device.type, torch.bfloat16) if autocast else nullcontext():
            return self._forward(*args, **kwargs)

    def backward(self, loss_sum: Tensor, denominator: float, *, is_last: bool) -> None:
        """Add the gradient of loss_sum / denominator; `is_last` on a step's last micro-batch.

        `denominator` is the global count, equal on every rank; where it is 0, so is every loss.
        Losses with denominators of their own (PPO-ptx) may be added within one step.
        """
        # DDP, FSDP and DeepSpeed divide the sum over ranks by the world size.
        scale = self.world_size / denominator if denominator > 0 else 0.0
        self._backward(loss_sum * scale, is_last)

    def step(self, norm_limit: float = math.inf) -> dict[str, float]:
        """Clip, update and clear the gradients; return grad_norm, learning_rate, skipped_steps.

        A NaN or Inf in any rank's gradient, or a global norm above `norm_limit` (-1: any), makes
        every rank leave weights and moments as they are; `skipped_steps` counts how often that has
        happened. The schedule goes on all the same.
        """
        self.rest(asleep=False)
        rate = self.rate(self.num_steps)
        for group in self._optimizer().param_groups:
            group["lr"] = rate
        norm = self._update(norm_limit)
        self.num_steps += 1
        self.num_skipped += not may_update(norm, norm_limit)
        return {"grad_norm": norm, "learning_rate": rate, "skipped_steps": float(self.num_skipped)}

    def global_sums(self, values: Sequence[float]) -> list[float]:
        """Return each value summed over the parts of the data (float64).

        Ranks that share rows have the same values, which count once.
        """
        sums = self._reduce(values, dist.ReduceOp.SUM)
        return [each / self.sequence_parallel for each in sums]

    def global_sum(self, value: float) -> float:
        """Return `value` summed over the parts of the data (float64)."""
        return self.global_sums([value])[0]

    def rank_sum(self, value: float) -> float:
        """Return `value` summed over all ranks (float64), each of which has its own."""
        return self._reduce([value], dist.ReduceOp.SUM)[0]

    def global_max(self, value: float) -> float:
        """Return the largest `value` of all ranks."""
        return self._reduce([value], dist.ReduceOp.MAX)[0]

    def barrier(self) -> None:
        """Wait for every rank."""
        self.global_sum(0.0)

    def save_state(self, folder: str | Path) -> None:
        """Write what `load_state` needs into `folder` (which exists); every rank calls it."""
        self.rest(asleep=False)
        meta = {"num_steps": self.num_steps, "num_skipped": self.num_skipped}
        for part, slots in enumerate(self._slots(changes=False)):
            path = file_of(folder, self.rank, self.world_size, part)
            if self._replicated:
                slots = [slot.share(self.rank, self.world_size) for slot in slots]
            save_slots(path, slots, self._optimizer().state, meta)
        self.barrier()

    def load_state(self, folder: str | Path) -> None:
        """Continue from `save_state` of any backend and number of ranks; every rank calls it.

        The module must have been built from the weights of the same checkpoint. With the same
        backend and number of ranks, training goes on bit by bit as it would have.
        Raises RecipeError for a folder that is incomplete, or of a model that trains other
        parameters.
        """
        self.rest(asleep=False)
        saved = SavedState(folder)
        saved.check(name for name, p in self.module.named_parameters() if p.requires_grad)
        self.num_steps = saved.meta["num_steps"]
        self.num_skipped = saved.meta["num_skipped"]
        for slots in self._slots(changes=True):
            saved.restore(slots, self._optimizer().state)

    def rest(self, asleep: bool) -> None:
        """Move the optimizer's state to host memory, or back; each rank its own part.

        Asleep, the module computes; `step`, `save_state` and `load_state` wake it up.
        """
        if asleep and self._away is None:
            states = self._optimizer().state.values()
            self._away = HostCopies(
                value for state in states for value in state.values() if isinstance(value, Tensor)
            )
        elif not asleep and self._away is not None:
            self._away.bring_back()
            self._away = None

    def full_weights(
        self, wanted: Container[str] | None = None, *, on_device: bool = False
    ) -> Iterator[tuple[str, Tensor]]:
        """Yield (name, float32 CPU tensor) of every weight, shared ones once; every rank calls it.

        `wanted` leaves out all others, the same on every rank; `on_device` leaves them where they
        are gathered. Where weights are sharded, each step is a collective: exhaust the iterator on
        every rank.
        """
        place = self.device if on_device else torch.device("cpu")
        kept = set(self.module.state_dict(keep_vars=True))
        for name, parameter in self.module.named_parameters():
            if wanted is None or name in wanted:
                yield name, self._full(parameter).detach().to(place, torch.float32)
        for name, buffer in self.module.named_buffers():
            if name in kept and (wanted is None or name in wanted):
                yield name, buffer.detach().to(place, torch.float32)

    def _reduce(self, values: Sequence[float], op: dist.ReduceOp.RedOpType) -> list[float]:
        if self.world_size == 1:
            return [float(value) for value in values]
        tensor = torch.tensor(values, dtype=torch.float64, device=self.device)
        dist.all_reduce(tensor, op)
        result: list[float] = tensor.tolist()
        return result

    def _forward(self, *args: Any, **kwargs: Any) -> Any:
        return self.module(*args, **kwargs)

    def _full(self, parameter: nn.Parameter) -> Tensor:
        """Return the whole of one parameter, in the best precision there is."""
        return parameter

    @property
    def _replicated(self) -> bool:
        """Whether every rank has all of the optimizer's state."""
        return False

    @abstractmethod
    def _slots(self, changes: bool) -> Iterator[list[Slot]]:
        """Yield what this rank has of the optimizer's state, in parts.

        A part is in memory until the next is asked for, and is then stored again if `changes`.
        """

    @abstractmethod
    def _optimizer(self) -> torch.optim.Optimizer:
        """Return the optimizer of PyTorch that holds the learning rate and the state."""

    @abstractmethod
    def _backward(self, loss: Tensor, is_last: bool) -> None: ...

    @abstractmethod
    def _update(self, norm_limit: float) -> float:
        """Clip, update if `may_update`, and clear; return the norm before clipping."""
