"""Masks of packed rows, by hand."""

import pytest
import torch

from rayrlhf.data.packing import pack, pack_best_fit
from rayrlhf.data.row_masks import row_masks

EOS = 0


def test_a_full_row_predicts_everything_but_its_first_token() -> None:
    rows = torch.from_numpy(pack([[5, 6], [7, 8, 9]], 7, EOS)[0]).long()
    attention_mask, loss_mask = row_masks(rows, EOS, apart=False)
    assert attention_mask.tolist() == [[1] * 7]
    assert loss_mask.tolist() == [[False] + [True] * 6]


@pytest.mark.parametrize(
    ("apart", "attention", "loss"),
    [
        (False, [1, 1, 1, 1, 1, 1, 1, 0], [0, 1, 1, 1, 1, 1, 1, 0]),
        # The first token of document 2 has nothing before it to be predicted from.
        (True, [1, 1, 1, 1, 2, 2, 2, 0], [0, 1, 1, 1, 0, 1, 1, 0]),
    ],
)
def test_filling_is_neither_seen_nor_predicted(
    apart: bool, attention: list[int], loss: list[int]
) -> None:
    packed, filling = pack_best_fit([[5, 6, 7], [8, 9]], 8, EOS)
    assert (packed.tolist(), filling) == ([[5, 6, 7, EOS, 8, 9, EOS, EOS]], 1)
    attention_mask, loss_mask = row_masks(torch.from_numpy(packed).long(), EOS, apart=apart)
    assert attention_mask.tolist() == [attention]
    assert loss_mask.int().tolist() == [loss]
