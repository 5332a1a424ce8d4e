"""Weights in buckets, there and back."""

import weakref
from collections.abc import Iterator

import pytest
import torch

from rayrlhf.rl import buckets
from rayrlhf.rl.buckets import packed, unpacked


@pytest.fixture
def weights() -> dict[str, torch.Tensor]:
    torch.manual_seed(0)
    return {
        "a": torch.randn(6),
        "b": torch.randn(2, 2),
        "large": torch.randn(50),
        "c": torch.ones(3),
    }


def test_buckets_are_bounded_and_keep_the_order(
    monkeypatch: pytest.MonkeyPatch, weights: dict[str, torch.Tensor]
) -> None:
    monkeypatch.setattr(buckets, "BUCKET_BYTES", 40)
    found = list(packed(weights.items(), "float32"))
    assert [list(bucket) for bucket in found] == [["a", "b"], ["large"], ["c"]]
    assert [name for name, _ in unpacked(found)] == list(weights)
    for name, tensor in unpacked(found):
        assert torch.equal(tensor, weights[name])
        assert tensor.data_ptr() == weights[name].data_ptr()  # nothing is copied


def test_bfloat16_takes_half_the_room_and_has_the_same_bits(
    weights: dict[str, torch.Tensor],
) -> None:
    (bucket,) = packed(weights.items(), "bfloat16")
    assert sum(array.nbytes for array in bucket.values()) == 2 * 63
    for name, tensor in unpacked([bucket]):
        assert torch.equal(tensor, weights[name].to(torch.bfloat16))


def test_tensors_are_gone_as_soon_as_they_are_packed() -> None:
    alive: list[int] = []
    seen: list[weakref.ref[torch.Tensor]] = []

    def gathered() -> Iterator[tuple[str, torch.Tensor]]:
        for number in range(20):
            alive.append(sum(ref() is not None for ref in seen))
            tensor = torch.full((512,), float(number))
            seen.append(weakref.ref(tensor))
            yield f"w{number}", tensor
            del tensor

    assert len(list(unpacked(packed(gathered(), "bfloat16")))) == 20
    assert max(alive) == 1
