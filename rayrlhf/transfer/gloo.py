"""An engine's end on CPUs, behind vLLM's interface for weight transfer; made by its name."""

from dataclasses import dataclass, field
from typing import Any

import torch
from vllm.distributed.weight_transfer.base import (
    WeightTransferEngine,
    WeightTransferInitInfo,
    WeightTransferUpdateInfo,
)
from vllm.model_executor.model_loader.reload import (
    finalize_layerwise_reload,
    initialize_layerwise_reload,
)

from rayrlhf.transfer import Meeting
from rayrlhf.transfer.sender import broadcast, gloo_group


@dataclass
class GlooInitInfo(WeightTransferInitInfo):
    """Where to meet, and as whom."""

    master_address: str
    master_port: int
    rank_offset: int
    world_size: int
    timeout_s: float


@dataclass
class GlooUpdateInfo(WeightTransferUpdateInfo):
    """What is sent, in order."""

    names: list[str]
    dtype_names: list[str]
    shapes: list[list[int]]
    tied: dict[str, str] = field(default_factory=dict)
    """A tied head and the weight that it shares, of which a CPU engine keeps a repacked copy."""


class GlooWeightTransferEngine(WeightTransferEngine[GlooInitInfo, GlooUpdateInfo]):
    """Receives one broadcast per weight."""

    init_info_cls = GlooInitInfo
    update_info_cls = GlooUpdateInfo
    _group: Any = None

    def init_transfer_engine(self, init_info: GlooInitInfo) -> None:
        """Join the group."""
        meeting = Meeting(
            init_info.master_address,
            init_info.master_port,
            init_info.world_size,
            init_info.timeout_s,
        )
        self._group = gloo_group(meeting, init_info.rank_offset + self.parallel_config.rank)

    def start_weight_update(self) -> None:
        """Put every layer back into the form of a checkpoint."""
        initialize_layerwise_reload(self.model)

    def update_weights(self, update_info: dict[str, Any]) -> None:
        """Receive; there is no device to wait for, as the one that this takes the place of does."""
        self.receive_weights(self.parse_update_info(update_info))

    def receive_weights(self, update_info: GlooUpdateInfo) -> None:
        """Load every weight as it comes."""
        copies = {source: name for name, source in update_info.tied.items()}
        for name, dtype, shape in zip(
            update_info.names, update_info.dtype_names, update_info.shapes, strict=True
        ):
            tensor = torch.empty(shape, dtype=getattr(torch, dtype))
            broadcast(self._group, tensor)
            self.model.load_weights([(name, tensor)])
            if name in copies:
                self.model.load_weights([(copies[name], tensor)])

    def finish_weight_update(self) -> None:
        """Put every layer into the form that its kernels read."""
        finalize_layerwise_reload(self.model, self.model_config)

    def shutdown(self) -> None:
        """Leave the group."""
        self._group = None
