"""Reward models and critics."""

import json
from pathlib import Path

import pytest
import torch
from torch import Tensor
from transformers import AutoModelForSequenceClassification

from rayrlhf.config import ModelConfig, RecipeError
from rayrlhf.models.causal_lm import build_causal_lm
from rayrlhf.models.folder import run_trunk
from rayrlhf.models.scalar_head import ScalarHeadModel, last_scores, row_ends, values_before

EOS, PAD, V = 0, 1, 40


@pytest.fixture
def causal_lm(tmp_path: Path) -> Path:
    """Return the folder of a random Llama whose weights are large enough to matter."""
    cfg = ModelConfig(
        hidden_size=32,
        num_layers=2,
        num_heads=4,
        num_kv_heads=2,
        intermediate_size=48,
        max_length=64,
    )
    model = build_causal_lm(cfg, vocab_size=V, eos_token_id=EOS, pad_token_id=PAD, seed=0)
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.ndim > 1:
                parameter.mul_(8)
    model.save_pretrained(tmp_path / "lm")
    return tmp_path / "lm"


def rows(lengths: tuple[int, ...], *, left: int = 0, right: int = 0) -> tuple[Tensor, Tensor]:
    """Return texts that end in end-of-text, with that much padding around."""
    S = left + max(lengths) + right
    ids, mask = torch.full((len(lengths), S), PAD), torch.zeros(len(lengths), S, dtype=torch.long)
    for b, length in enumerate(lengths):
        generator = torch.Generator().manual_seed(b)
        ids[b, left : left + length] = torch.randint(2, V, (length,), generator=generator)
        ids[b, left + length - 1] = EOS
        mask[b, left : left + length] = 1
    return ids, mask


@pytest.mark.parametrize("padding", [0, 5, 17])
@pytest.mark.parametrize("side", ["left", "right"])
def test_09_rm_reads_score_at_eos_position_whatever_the_padding(
    causal_lm: Path, padding: int, side: str
) -> None:
    model = ScalarHeadModel.from_causal_lm(causal_lm, 1)
    lengths = (9, 4, 6)
    alone = []
    for b, length in enumerate(lengths):
        ids, mask = rows(lengths)
        alone.append(model(ids[b : b + 1, :length], mask[b : b + 1, :length])[0, -1])
    ids, mask = rows(lengths, **{side: padding})
    scores = last_scores(model(ids, mask), row_ends(mask))
    torch.testing.assert_close(scores, torch.stack(alone), atol=1e-5, rtol=0)
    if side == "right":
        torch.testing.assert_close(scores, last_scores(model(ids, mask), torch.tensor(lengths)))


def test_06_score_is_at_eos_when_pad_is_eos(causal_lm: Path) -> None:
    model = ScalarHeadModel.from_causal_lm(causal_lm, 1)
    ids, mask = rows((9, 4))
    outputs = model(ids, mask)
    as_eos = model(ids.masked_fill(mask == 0, EOS), mask)
    ends = row_ends(mask)
    assert ends.tolist() == [9, 4]
    assert torch.equal(last_scores(as_eos, ends), last_scores(outputs, ends))


def test_28_zero_head_starts_at_0_and_random_head_is_small(causal_lm: Path) -> None:
    ids, mask = rows((9, 4))
    critic = ScalarHeadModel.from_causal_lm(causal_lm, zero_head=True)
    assert (critic(ids, mask) == 0).all()
    first, again, other = (
        ScalarHeadModel.from_causal_lm(causal_lm, seed).hf.score.weight for seed in (3, 3, 4)
    )
    assert torch.equal(first, again)
    assert not torch.equal(first, other)
    assert first.std().item() == pytest.approx(33**-0.5, rel=0.4)


def test_28_critic_from_the_reward_model_says_what_it_says(causal_lm: Path, tmp_path: Path) -> None:
    reward = ScalarHeadModel.from_causal_lm(causal_lm, 1)
    reward.shift = 0.75
    reward.save_pretrained(tmp_path / "reward")
    critic = ScalarHeadModel.from_pretrained(tmp_path / "reward")
    ids, mask = rows((9, 4))
    ends = row_ends(mask)
    assert torch.equal(last_scores(critic(ids, mask), ends), last_scores(reward(ids, mask), ends))


def test_24_shift_is_subtracted_stored_and_reloaded(causal_lm: Path, tmp_path: Path) -> None:
    model = ScalarHeadModel.from_causal_lm(causal_lm, 1)
    ids, mask = rows((9, 4, 6))
    before = last_scores(model(ids, mask), row_ends(mask))
    model.shift = before.mean().item()
    model.save_pretrained(tmp_path / "reward")
    assert json.loads((tmp_path / "reward/config.json").read_text())["score_shift"] == model.shift
    again = ScalarHeadModel.from_pretrained(tmp_path / "reward")
    after = last_scores(again(ids, mask), row_ends(mask))
    torch.testing.assert_close(after, before - before.mean())
    torch.testing.assert_close(after.mean(), torch.tensor(0.0), atol=1e-6, rtol=0)


def test_29_value_does_not_see_its_token_but_the_one_before(causal_lm: Path) -> None:
    critic = ScalarHeadModel.from_causal_lm(causal_lm, 1)
    ids, mask = rows((9,))
    positions = torch.arange(3, 9)[None]  # the response starts at column 3
    values = values_before(critic(ids, mask), positions)
    for column in range(2, 9):
        other = ids.clone()
        other[0, column] = (other[0, column] + 1) % V
        changed = values_before(critic(other, mask), positions) != values
        # V before token t may change with what stands before t, and with nothing else.
        assert changed[0].tolist() == [t > column for t in range(3, 9)]


def test_saved_folder_loads_in_plain_transformers(causal_lm: Path, tmp_path: Path) -> None:
    model = ScalarHeadModel.from_causal_lm(causal_lm, 1)
    model.shift = 2.0
    weights = {name: p.detach() + 0.01 for name, p in model.named_parameters()}
    model.save_pretrained(tmp_path / "final", weights)
    plain, report = AutoModelForSequenceClassification.from_pretrained(
        tmp_path / "final", output_loading_info=True
    )
    assert not report["missing_keys"]
    assert not report["unexpected_keys"]
    assert plain.num_labels == 1
    again = ScalarHeadModel.from_pretrained(tmp_path / "final")
    ids, mask = rows((9, 4, 6))
    raw = plain(input_ids=ids, attention_mask=mask).logits.squeeze(-1)
    torch.testing.assert_close(last_scores(again(ids, mask), row_ends(mask)), raw - 2.0)


def test_folder_without_a_head_is_refused(causal_lm: Path) -> None:
    with pytest.raises(RecipeError, match=r"score\.weight"):
        ScalarHeadModel.from_pretrained(causal_lm)


@pytest.mark.parametrize("kept_in", [torch.float32, torch.bfloat16])
def test_head_computes_in_float32_under_autocast_and_on_bfloat16_weights(
    causal_lm: Path, kept_in: torch.dtype
) -> None:
    """DDP computes in bfloat16 by autocast, ZeRO on weights in bfloat16."""
    model = ScalarHeadModel.from_causal_lm(causal_lm, 1, dtype=kept_in)
    ids, mask = rows((9, 4))
    with torch.autocast("cpu", torch.bfloat16, enabled=kept_in == torch.float32):
        outputs = model(ids, mask)
        hidden = run_trunk(model.hf, ids, mask)
    assert outputs.dtype == torch.float32
    assert not torch.equal(outputs, outputs.bfloat16().float())
    by_hand = hidden.float() @ model.hf.score.weight.float().T  # (b, S, 1)
    torch.testing.assert_close(outputs, by_hand.squeeze(-1))


def test_gradient_reaches_trunk_and_head(causal_lm: Path) -> None:
    model = ScalarHeadModel.from_causal_lm(causal_lm, 1, dropout=0.1).train()
    ids, mask = rows((9, 4))
    last_scores(model(ids, mask), row_ends(mask)).sum().backward()
    for name, parameter in model.named_parameters():
        assert parameter.grad is not None, name
        assert parameter.grad.abs().sum() > 0, name
