"""Records without padding, and how a step is cut up."""

import pickle

import pytest
import torch

from rayrlhf.generation import Completion
from rayrlhf.rl.experience import (
    Experience,
    Rollout,
    RowReader,
    Rows,
    flatten,
    minibatches,
    pad_rows,
    rank_microbatches,
    scatter_rows,
)

EOS = 0


def rollout() -> Rollout:
    """Three rows; the first is truncated, the second ends in eos, the last has an eos prompt."""
    return Rollout.from_completions(
        [[4, 5], [6], [EOS, 7, 8]],
        [
            Completion([3, 4, 5, 6], [-1.0, -2.0, -3.0, -4.0], "length", [2] * 4),
            Completion([9, EOS], [-0.5, -0.25], "stop", [2, 3]),
            Completion([EOS], [-0.1], "stop", [2]),
        ],
    )


def test_rollout_keeps_rows_unpadded() -> None:
    batch = rollout()
    assert batch.prompt_ids.tolist() == [4, 5, 6, EOS, 7, 8]
    assert batch.response_ids.tolist() == [3, 4, 5, 6, 9, EOS, EOS]
    assert batch.mask.tolist() == [[1, 1, 1, 1], [1, 1, 0, 0], [1, 0, 0, 0]]
    assert batch.lengths == [6, 3, 4]
    assert batch.responses() == [[3, 4, 5, 6], [9, EOS], [EOS]]


def test_finish_reason_alone_says_truncated() -> None:
    # The longest row that ended with eos is not truncated, nor is an eos in the prompt an end.
    batch = Rollout.from_completions(
        [[EOS, 1], [1]],
        [
            Completion([2], [0.0], "length", [0]),
            Completion([2, 3, EOS], [0.0] * 3, "stop", [0] * 3),
        ],
    )
    assert batch.truncated.tolist() == [True, False]


def test_join_puts_rows_in_order() -> None:
    both = Rollout.join([rollout(), rollout()])
    assert both.responses() == rollout().responses() * 2
    assert len(both) == 6


def test_token_batch_masks_come_from_lengths_where_pad_is_eos() -> None:
    micro = RowReader(rollout(), pad_id=EOS).tokens([1, 0])
    assert micro.input_ids.tolist() == [[6, 9, EOS, EOS, EOS, EOS], [4, 5, 3, 4, 5, 6]]
    assert micro.attention_mask.tolist() == [[1, 1, 1, 0, 0, 0], [1, 1, 1, 1, 1, 1]]
    assert micro.mask.tolist() == [[1, 1, 0, 0], [1, 1, 1, 1]]
    assert micro.positions.tolist() == [[1, 2, 2, 2], [2, 3, 4, 5]]


def test_microbatch_without_work_has_mask_0() -> None:
    micro = RowReader(rollout(), pad_id=EOS).tokens([])
    assert micro.indices == []
    assert micro.mask.sum() == 0


def test_floats_are_padded_like_the_tokens() -> None:
    batch = rollout()
    reader = RowReader(batch, pad_id=EOS)
    assert torch.equal(
        reader.floats(batch.log_probs, [2, 1]), torch.tensor([[-0.1, 0], [-0.5, -0.25]])
    )
    padded = pad_rows(batch.log_probs, batch.response_lengths)
    assert torch.equal(flatten(padded, batch.mask), batch.log_probs)


def test_minibatches_hold_every_row_once_per_epoch() -> None:
    parts = minibatches(24, 8, seed=3, step=5, epoch=1)
    assert [len(part) for part in parts] == [3] * 8
    assert sorted(row for part in parts for row in part) == list(range(24))
    assert parts == minibatches(24, 8, seed=3, step=5, epoch=1)
    assert parts != minibatches(24, 8, seed=3, step=5, epoch=0)
    assert parts != minibatches(24, 8, seed=3, step=6, epoch=1)


@pytest.mark.parametrize("world_size", [1, 2, 3])
@pytest.mark.parametrize("tokens", [1, 64, 10_000])
def test_ranks_take_every_row_once_in_equally_many_microbatches(
    world_size: int, tokens: int
) -> None:
    lengths = [3, 50, 7, 7, 20, 9, 31, 4, 60, 5, 2, 11]
    rows = [11, 3, 8, 1, 5, 0]
    plans = rank_microbatches(rows, lengths, world_size=world_size, tokens_per_microbatch=tokens)
    assert len(plans) == world_size
    assert sorted(row for plan in plans for group in plan for row in group) == sorted(rows)
    assert len({len(plan) for plan in plans}) == 1
    for group in (group for plan in plans for group in plan):
        assert len(group) <= 1 or len(group) * max(lengths[row] for row in group) <= tokens


def test_scatter_rows_restores_the_order() -> None:
    def rows(*tensors: list[float]) -> list[torch.Tensor]:
        return [torch.tensor(each) for each in tensors]

    parts = [Rows.of([2, 0], rows([2.0, 2.5], [0.0])), Rows.of([], []), Rows.of([1], rows([1.0]))]
    assert scatter_rows(parts).tolist() == [0.0, 1.0, 2.0, 2.5]
    with pytest.raises(ValueError, match="exactly once"):
        scatter_rows([Rows.of([0, 0], rows([0.0], [0.0]))])


def test_rows_travel_without_what_they_were_cut_from() -> None:
    wide = torch.arange(64_000.0).view(64, 1000)
    rows = Rows.of(list(range(64)), [row[:3] for row in wide])
    sent = pickle.dumps(rows)
    assert len(sent) < 64 * 3 * 4 + 2000
    assert torch.equal(pickle.loads(sent).flat, rows.flat)


def test_records_travel_as_arrays_and_come_back_as_tensors() -> None:
    batch = rollout()
    sent = Experience(batch, old_log_probs=batch.log_probs, advantages=-batch.log_probs)
    pickled = pickle.dumps(sent, protocol=5)
    assert b"torch" not in pickled.replace(b"rayrlhf", b"")
    found = pickle.loads(pickled)
    for name, value in vars(batch).items():
        got = getattr(found.rollout, name)
        assert got.dtype == value.dtype and torch.equal(got, value)
        got.zero_()  # and may be written to
    assert torch.equal(found.advantages, sent.advantages) and found.returns is None
