"""DDP and DeepSpeed ZeRO behind one small interface; all loss scaling lives here.

    num_tokens = backend.global_sum(local_tokens)             # the one denominator of the step
    for i, micro in enumerate(micros):
        loss_sum = loss(backend(micro.input_ids, micro.attention_mask), micro)
        backend.backward(loss_sum, num_tokens, is_last=i == len(micros) - 1)
    stats = backend.step()                                    # clip, AdamW, schedule

The gradient is that of (sum of loss_sum over every micro-batch of every rank) / denominator,
however the batch is split. Every rank calls backward equally often: with ZeRO, forward and backward
are collective, so a rank with less to do adds micro-batches whose mask is 0.
"""

import math
import os
import sys
from abc import ABC, abstractmethod
from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import nullcontext
from pathlib import Path
from typing import Any, Literal

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.nn.parallel import DistributedDataParallel

from rayrlhf.config import RecipeError, TrainingConfig
from rayrlhf.training.checkpoint import load_tensors, save_tensors


def learning_rate(step: int, cfg: TrainingConfig, total_steps: int) -> float:
    """Return the learning rate of optimizer step `step` (0 is the first).

    Linear warm-up over `warmup_ratio` of the steps, then a cosine that ends, at the last step, at
    `min_learning_rate_ratio` of the peak. Source: GPT-3, arXiv:2005.14165, appendix B.
    """
    warmup = round(cfg.warmup_ratio * total_steps)
    if step < warmup:
        return cfg.learning_rate * (step + 1) / warmup
    progress = min(1.0, (step - warmup) / max(1, total_steps - 1 - warmup))
    cosine = 0.5 * (1 + math.cos(math.pi * progress))
    floor = cfg.min_learning_rate_ratio
    return cfg.learning_rate * (floor + (1 - floor) * cosine)


def make_optimizer(module: nn.Module, cfg: TrainingConfig) -> torch.optim.AdamW:
    """Return AdamW over the trainable parameters; norms, biases and embeddings do not decay."""
    embeddings = {
        id(parameter)
        for child in module.modules()
        if isinstance(child, nn.Embedding)
        for parameter in child.parameters()
    }
    trained = [parameter for parameter in module.parameters() if parameter.requires_grad]
    decayed = [p for p in trained if p.ndim >= 2 and id(p) not in embeddings]
    others = [p for p in trained if p.ndim < 2 or id(p) in embeddings]
    groups = [
        {"params": decayed, "weight_decay": cfg.weight_decay},
        {"params": others, "weight_decay": 0.0},
    ]
    # fused: one pass over memory per parameter, on CPU as on CUDA.
    return torch.optim.AdamW(
        [group for group in groups if group["params"]],
        lr=cfg.learning_rate,
        betas=(cfg.adam_beta1, cfg.adam_beta2),
        eps=cfg.adam_eps,
        fused=True,
    )


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
    return "bfloat16" if cfg.zero_stage > 0 else "autocast"


class Backend(ABC):
    """A module in training on this rank; see the head of this file."""

    def __init__(
        self, module: nn.Module, cfg: TrainingConfig, total_steps: int, device: torch.device
    ) -> None:
        self.module = module
        self.cfg = cfg
        self.total_steps = total_steps
        self.device = device
        self.rank = dist.get_rank() if dist.is_initialized() else 0
        self.world_size = dist.get_world_size() if dist.is_initialized() else 1
        self.num_steps = 0
        self.num_skipped = 0
        self._precision = forward_precision(cfg, device)

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
        # Both DDP and DeepSpeed divide the sum over ranks by the world size.
        scale = self.world_size / denominator if denominator > 0 else 0.0
        self._backward(loss_sum * scale, is_last)

    def step(self) -> dict[str, float]:
        """Clip, update and clear the gradients; return grad_norm, learning_rate, skipped_steps.

        A NaN or Inf in any rank's gradient makes every rank leave weights and moments as they are;
        `skipped_steps` counts how often that has happened. The schedule goes on all the same.
        """
        rate = learning_rate(self.num_steps, self.cfg, self.total_steps)
        for group in self._optimizer().param_groups:
            group["lr"] = rate
        norm = self._update()
        self.num_steps += 1
        self.num_skipped += not math.isfinite(norm)
        return {"grad_norm": norm, "learning_rate": rate, "skipped_steps": float(self.num_skipped)}

    def global_sums(self, values: Sequence[float]) -> list[float]:
        """Return each value summed over the ranks (float64)."""
        return self._reduce(values, dist.ReduceOp.SUM)

    def global_sum(self, value: float) -> float:
        """Return `value` summed over the ranks (float64)."""
        return self._reduce([value], dist.ReduceOp.SUM)[0]

    def global_max(self, value: float) -> float:
        """Return the largest `value` of all ranks."""
        return self._reduce([value], dist.ReduceOp.MAX)[0]

    def barrier(self) -> None:
        """Wait for every rank."""
        self.global_sum(0.0)

    def save_state(self, folder: str | Path) -> None:
        """Write what `load_state` needs into `folder` (which exists); every rank calls it."""
        tensors = self._state()
        if tensors is not None:
            meta = {
                "num_steps": self.num_steps,
                "num_skipped": self.num_skipped,
                "world_size": self.world_size,
                "layout": self._layout,
            }
            save_tensors(self._state_file(folder), tensors, meta)
        self.barrier()

    def load_state(self, folder: str | Path) -> None:
        """Continue from `save_state`; every rank calls it.

        The module must have been built from the weights of the same checkpoint.
        Raises RecipeError when another backend or number of workers wrote it.
        """
        tensors, meta = load_tensors(self._state_file(folder))
        if meta["layout"] != self._layout:
            raise RecipeError(
                f"{folder}: written with {meta['layout']}, but the recipe says "
                f"{self._layout}: use that, or start afresh in another run_dir"
            )
        self.num_steps = meta["num_steps"]
        self.num_skipped = meta["num_skipped"]
        self._restore(tensors)

    def full_weights(self) -> Iterator[tuple[str, Tensor]]:
        """Yield (name, float32 CPU tensor) of every weight, shared ones once; every rank calls it.

        Under ZeRO-3 each step of the iterator is a collective: exhaust it on every rank.
        """
        kept = set(self.module.state_dict(keep_vars=True))
        for name, parameter in self.module.named_parameters():
            yield name, self._full(parameter).detach().to("cpu", torch.float32)
        for name, buffer in self.module.named_buffers():
            if name in kept:
                yield name, buffer.detach().to("cpu", torch.float32)

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
    @abstractmethod
    def _layout(self) -> str:
        """How the state is spread over files; a checkpoint fits the same layout only."""

    @abstractmethod
    def _state_file(self, folder: str | Path) -> Path: ...

    @abstractmethod
    def _state(self) -> dict[str, Tensor] | None:
        """Return what this rank has to store, None when another rank stores it."""

    @abstractmethod
    def _restore(self, tensors: dict[str, Tensor]) -> None: ...

    @abstractmethod
    def _optimizer(self) -> torch.optim.Optimizer:
        """Return the optimizer whose param_groups hold the learning rate."""

    @abstractmethod
    def _backward(self, loss: Tensor, is_last: bool) -> None: ...

    @abstractmethod
    def _update(self) -> float:
        """Clip, update and clear; return the norm before clipping (Inf or NaN: skipped)."""


class DDPBackend(Backend):
    """The whole model and optimizer on every rank; DistributedDataParallel reduces gradients."""

    _layout = "backend=ddp"

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

    def _state_file(self, folder: str | Path) -> Path:
        return Path(folder) / "optimizer.safetensors"

    def _state(self) -> dict[str, Tensor] | None:
        return _named_state(self.optimizer, self._trained) if self.rank == 0 else None

    def _restore(self, tensors: dict[str, Tensor]) -> None:
        _set_named_state(self.optimizer, self._trained, tensors)

    def _optimizer(self) -> torch.optim.Optimizer:
        return self.optimizer

    def _backward(self, loss: Tensor, is_last: bool) -> None:
        # DDP reduces in the backward pass that its reducer was prepared for. The forward goes to
        # the module itself, as under no_sync(), because only here it is known which is the last.
        if is_last and self._wrapper is not None:
            self._wrapper.reducer.prepare_for_backward([])
        loss.backward()

    def _update(self) -> float:
        norm = clip_gradients(self._trained.values(), self.cfg.grad_clip)
        # The reduced gradient is the same on every rank, so all of them decide alike.
        if math.isfinite(norm):
            self.optimizer.step()
        self.optimizer.zero_grad()
        return norm


class DeepSpeedBackend(Backend):
    """ZeRO: optimizer (1), gradients (2) and weights (3) are partitioned over the ranks.

    Under bfloat16, stages 1 to 3 hold the weights in bfloat16 and float32 masters in the optimizer;
    stage 0 uses autocast as DDP does. State is saved per rank: it fits the same number of ranks.
    """

    def __init__(
        self, module: nn.Module, cfg: TrainingConfig, total_steps: int, device: torch.device
    ) -> None:
        _meet_deepspeed_needs(device)
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
            return _named_state(self.engine.optimizer, self._trained) if self.rank == 0 else None
        tensors = {}
        for index, master in enumerate(self._masters()):
            tensors[f"master.{index}"] = master
            for key, value in self.engine.optimizer.optimizer.state[master].items():
                tensors[f"{key}.{index}"] = value
        return tensors

    @torch.no_grad()
    def _restore(self, tensors: dict[str, Tensor]) -> None:
        if self.stage == 0:
            _set_named_state(self.engine.optimizer, self._trained, tensors)
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

    def _update(self) -> float:
        if self.stage == 0:
            norm = clip_gradients(self._trained.values(), self.cfg.grad_clip)
            if math.isfinite(norm):
                self.engine.step()
            self.engine.optimizer.zero_grad()
            return norm
        self.engine.step()  # clips, and skips on overflow
        return float(self.engine.get_global_grad_norm())

    def _full(self, parameter: nn.Parameter) -> Tensor:
        if self.stage == 0:
            return parameter
        from deepspeed.utils import safe_get_full_fp32_param

        full: Tensor | None = safe_get_full_fp32_param(parameter)
        return parameter if full is None else full


def make_backend(
    module: nn.Module, cfg: TrainingConfig, *, total_steps: int, device: torch.device
) -> Backend:
    """Return `module` ready to train under cfg.backend, on `device`.

    torch.distributed is initialised before, except where one process trains alone.
    """
    kind = DeepSpeedBackend if cfg.backend == "deepspeed" else DDPBackend
    return kind(module, cfg, total_steps, device)


def clip_gradients(parameters: Iterable[nn.Parameter], max_norm: float) -> float:
    """Scale the gradients in place to a global norm of at most `max_norm`; return their norm."""
    trained = [parameter for parameter in parameters if parameter.grad is not None]
    total = nn.utils.get_total_norm([p.grad for p in trained if p.grad is not None], foreach=True)
    norm = total.item()
    if math.isfinite(norm) and norm > max_norm:
        nn.utils.clip_grads_with_norm_(trained, max_norm, total, foreach=True)
    return norm


def _named_state(
    optimizer: torch.optim.Optimizer, parameters: Mapping[str, nn.Parameter]
) -> dict[str, Tensor]:
    """Return an optimizer's state as {"exp_avg.<name>": tensor, ...}; empty before a step."""
    return {
        f"{key}.{name}": value
        for name, parameter in parameters.items()
        for key, value in optimizer.state.get(parameter, {}).items()
    }


def _set_named_state(
    optimizer: torch.optim.Optimizer,
    parameters: Mapping[str, nn.Parameter],
    tensors: Mapping[str, Tensor],
) -> None:
    """Put back what `_named_state` returned."""
    optimizer.state.clear()
    for label, value in tensors.items():
        key, _, name = label.partition(".")
        parameter = parameters[name]
        optimizer.state[parameter][key] = value.to(parameter.device)


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


def _meet_deepspeed_needs(device: torch.device) -> None:
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
