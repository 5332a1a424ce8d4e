"""Learning rate by steps and by tokens, and batches that grow: the papers' numbers by hand."""

import math
from collections.abc import Callable

import pytest
from hypothesis import given
from hypothesis import strategies as st

from rayrlhf.config import Recipe, TrainingConfig
from rayrlhf.data.datasets import records_between
from rayrlhf.training import loop
from rayrlhf.training.backend import learning_rate
from rayrlhf.training.pretrain import PretrainStage, log_spaced
from rayrlhf.training.schedule import BatchSizes, warmup_cosine
from rayrlhf.training.sft import SFTStage

MakeRecipe = Callable[..., Recipe]
BILLION = 10**9
GPT3 = {"peak": 6e-4, "warmup": 375e6, "end": 260 * BILLION, "floor": 0.1}


def test_gpt3s_rate_by_tokens() -> None:
    batch = 2**19
    assert warmup_cosine(0, batch, **GPT3) == pytest.approx(6e-4 * batch / 375e6)
    assert warmup_cosine(187.5e6 - batch, 187.5e6, **GPT3) == pytest.approx(3e-4)
    assert warmup_cosine(375e6, 375e6 + batch, **GPT3) == pytest.approx(6e-4)
    middle = (375e6 + 260 * BILLION) / 2
    assert warmup_cosine(middle, middle + batch, **GPT3) == pytest.approx(0.55 * 6e-4)
    for tokens in (260 * BILLION, 300 * BILLION):
        assert warmup_cosine(tokens, tokens + batch, **GPT3) == pytest.approx(6e-5)


def test_llamas_rate_by_steps() -> None:
    cfg = TrainingConfig(learning_rate=3e-4, warmup_steps=2000)
    assert learning_rate(0, cfg, 250_000) == pytest.approx(3e-4 / 2000)
    assert learning_rate(1999, cfg, 250_000) == learning_rate(2000, cfg, 250_000) == 3e-4
    assert learning_rate(249_999, cfg, 250_000) == pytest.approx(3e-5)


def test_a_growing_batch_by_hand() -> None:
    """From 2 to 6 over 10 records: 2 + floor(4 n / 10) with n = 0, 2, 4, 7, then all of 6."""
    sizes = BatchSizes(6, 2, 10)
    assert [sizes.before(step) for step in range(8)] == [0, 2, 4, 7, 11, 17, 23, 29]
    assert [sizes.steps(records) for records in (0, 1, 2, 3, 11, 12, 17, 18)] == [
        *(0, 1, 1, 2, 4, 5, 5, 6)
    ]
    assert [BatchSizes(4).before(step) for step in range(3)] == [0, 4, 8]
    assert [BatchSizes(4).steps(records) for records in (0, 4, 5)] == [0, 1, 2]


def test_gpt3s_batch_grows_as_the_continuous_law() -> None:
    """dn/ds = 16 + (256 - 16) n / R: the ramp of 4 billion tokens takes R / 240 * ln(16) steps."""
    records = 4 * BILLION // 2048
    sizes = BatchSizes(256, 16, records)
    steps = sizes.steps(records)
    # The floor makes every batch half a record smaller on average.
    assert steps == pytest.approx(records / 240 * math.log(16), rel=0.02)
    assert sizes.before(1) == 16
    halfway = sizes.steps(records // 2)
    assert sizes.before(halfway + 1) - sizes.before(halfway) == pytest.approx(136, abs=1)
    after = sizes.before(steps + 1)
    assert sizes.before(steps + 2) - after == 256


@given(
    full=st.integers(1, 12),
    start=st.integers(1, 12),
    ramp=st.integers(0, 200),
    num_records=st.integers(1, 60),
    seed=st.integers(0, 3),
)
def test_every_record_occurs_once_per_epoch(
    full: int, start: int, ramp: int, num_records: int, seed: int
) -> None:
    sizes = BatchSizes(full, min(start, full), ramp)
    steps = sizes.steps(2 * num_records)
    assert sizes.before(steps - 1) < 2 * num_records <= sizes.before(steps)
    batches = [
        records_between(
            sizes.before(step), sizes.before(step + 1), seed=seed, num_records=num_records
        )
        for step in range(steps)
    ]
    lengths = [len(batch) for batch in batches]
    assert lengths == sorted(lengths) and lengths[0] >= 1 and lengths[-1] <= full
    seen = [record for batch in batches for record in batch]
    assert sorted(seen[:num_records]) == sorted(seen[num_records : 2 * num_records])
    assert sorted(seen[:num_records]) == list(range(num_records))


def test_a_stage_counts_its_ramp(make_recipe: MakeRecipe) -> None:
    """Rows of 16 tokens: 150 tokens are 10 rows; 19 rows take batches of 2, 2, 3, 4, 6, 2 of 6."""
    ramp = {"batch_size": 6, "batch_size_start": 2, "batch_ramp_tokens": 150}
    stage = PretrainStage(make_recipe(pretrain={**ramp, "max_steps": None, "epochs": 1}))
    assert stage.total_steps == 6
    assert [len(stage.batch(step)) for step in range(6)] == [2, 2, 3, 4, 6, 6]
    assert sorted(sum(map(stage.batch, range(6)), [])[:19]) == list(range(19))
    assert "6 steps of 2 to 6 sequences" in loop.derived_numbers(stage)


def test_a_stages_rate_follows_its_tokens(make_recipe: MakeRecipe) -> None:
    """Batches of 1, 2, 4, 4 rows, hence 16, 48, 112, 176 tokens after each."""
    ramp = {"batch_size": 4, "batch_size_start": 1, "batch_ramp_tokens": 48}
    recipe = {**ramp, "max_steps": 9, "learning_rate": 1.0, "warmup_ratio": 0.0}
    by_tokens = PretrainStage(
        make_recipe(pretrain={**recipe, "warmup_tokens": 48, "decay_tokens": 240})
    )
    assert [by_tokens.batch_sizes.before(step) for step in range(5)] == [0, 1, 3, 7, 11]
    rates = [by_tokens.learning_rate(step) for step in range(9)]
    # The warm-up has 16 and 48 of 48 tokens; the cosine goes on from there to 240.
    cosine = [0.1 + 0.45 * (1 + math.cos(math.pi * done / 192)) for done in (0, 64, 128)]
    assert rates[:2] == pytest.approx([1 / 3, 1])
    assert rates[2:5] == pytest.approx(cosine)
    assert rates[5:] == pytest.approx([0.1] * 4)
    mixed = PretrainStage(make_recipe(pretrain={**recipe, "warmup_steps": 3, "decay_tokens": 240}))
    assert mixed.learning_rate(1) == pytest.approx(3 / 7)  # the warm-up of 3 steps has 7 rows
    by_steps = PretrainStage(make_recipe(pretrain={**recipe, "warmup_steps": 3}))
    assert [by_steps.learning_rate(step) for step in (0, 2, 8)] == pytest.approx([1 / 3, 1, 0.1])


def test_other_stages_warm_up_by_steps_too(make_recipe: MakeRecipe) -> None:
    stage = SFTStage(make_recipe(sft={"warmup_steps": 4, "learning_rate": 1.0}))
    assert [stage.learning_rate(step) for step in range(4)] == [0.25, 0.5, 0.75, 1.0]


def test_samples_are_log_spaced() -> None:
    assert log_spaced(5, 10_000) == [1, 10, 100, 1000, 10_000]
    assert log_spaced(4, 24) == [1, 3, 8, 24]
    assert log_spaced(8, 10) == [1, 2, 3, 4, 5, 6, 7, 10]
    assert log_spaced(9, 3) == [1, 2, 3]
    assert log_spaced(1, 50) == [50]
    assert log_spaced(0, 50) == []
