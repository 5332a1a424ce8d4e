"""Optimizer state in host memory while others need the device's.

The tensors stay where they are, with all that points into them (views, DTensors, the flat
partitions of ZeRO): only their storage is given back, and filled again from the copy.
"""

from collections.abc import Iterable

import torch
from torch import Tensor

from rayrlhf.training.backend.state import flat


class HostCopies:
    """Copies of tensors whose memory on the device was given back."""

    def __init__(self, tensors: Iterable[Tensor]) -> None:
        """Copy the tensors, and free what they take on their device."""
        self._copies: list[tuple[torch.UntypedStorage, Tensor]] = []
        seen: set[int] = set()
        for tensor in tensors:
            storage = flat(tensor).untyped_storage()
            # Several parts of one storage are one copy; a scalar is not worth it.
            if storage.data_ptr() in seen or storage.nbytes() <= 8:
                continue
            seen.add(storage.data_ptr())
            everything = torch.empty(0, dtype=torch.uint8, device=storage.device).set_(storage)
            self._copies.append((storage, everything.to("cpu", copy=True)))
        for storage, _ in self._copies:
            storage.resize_(0)
        if torch.cuda.is_available():
            torch.cuda.empty_cache()  # for the other processes on the device

    def bring_back(self) -> None:
        """Take memory again, and fill it."""
        for storage, copy in self._copies:
            storage.resize_(copy.numel())
            torch.empty(0, dtype=torch.uint8, device=storage.device).set_(storage).copy_(copy)
        self._copies = []
