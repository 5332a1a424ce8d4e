"""Weights on their way from the actor to the engines: in buckets, no larger than they have to be.

Rank 0 of the actor holds one bucket beside its model, whatever the size of the model. Engines that
compute in bfloat16 get bfloat16: rounded before the way or behind it, the bits are the same.
"""

from collections.abc import Iterable, Iterator
from typing import Any

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor

Bucket = dict[str, npt.NDArray[Any]]
"""By their names in a Hugging Face checkpoint: float32, or the bits of bfloat16 as uint16, which
NumPy lacks."""
BUCKET_BYTES = 2**28
"""Of a bucket with more than one tensor."""


def packed(weights: Iterable[tuple[str, Tensor]], dtype: str) -> Iterator[Bucket]:
    """Yield float32 CPU tensors in buckets, as `bfloat16` if that is the dtype, else as they are.

    An array shares the memory of its tensor where nothing is rounded.
    """
    bucket: Bucket = {}
    size = 0
    for name, tensor in weights:
        array = _array(tensor, dtype)
        if bucket and size + array.nbytes > BUCKET_BYTES:
            yield bucket
            bucket, size = {}, 0
        bucket[name] = array
        size += array.nbytes
    if bucket:
        yield bucket


def unpacked(buckets: Iterable[Bucket]) -> Iterator[tuple[str, Tensor]]:
    """Yield (name, tensor) of all buckets; a tensor shares the memory of its array."""
    for bucket in buckets:
        for name, array in bucket.items():
            tensor = torch.as_tensor(array)
            yield name, tensor.view(torch.bfloat16) if array.dtype == np.uint16 else tensor


def _array(tensor: Tensor, dtype: str) -> npt.NDArray[Any]:
    if dtype == "bfloat16":
        return tensor.to(torch.bfloat16).view(torch.uint16).numpy()
    return tensor.numpy()
