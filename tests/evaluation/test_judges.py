"""Judges: VADER sees text, the reward model sees end-of-text; padding changes nothing."""

from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch

from rayrlhf.evaluation.judges import Answer, RewardJudge, VaderJudge
from rayrlhf.models.scalar_head import ScalarHeadModel

HEADERS = ("Movie review:", "Product review:", "Editorial:", "Tweet:")
EOS = 0


def answer(
    prompt: str = "",
    response: str = "",
    *,
    prompt_ids: tuple[int, ...] = (),
    response_ids: tuple[int, ...] = (),
) -> Answer:
    return Answer(
        prompt,
        response,
        list(prompt_ids),
        list(response_ids),
        [0.0] * len(response_ids),
        ended=True,
    )


@pytest.fixture(scope="module")
def reward(tiny_model: Path) -> RewardJudge:
    return RewardJudge(
        ScalarHeadModel.from_causal_lm(tiny_model, 3),
        eos_id=EOS,
        tokens_per_batch=40,
        device=torch.device("cpu"),
    )


@pytest.mark.parametrize("header", HEADERS)
def test_vader_takes_the_headers_for_neutral(header: str) -> None:
    judge = VaderJudge()
    said, plain = judge.score_texts([f"{header} I loved it!", "I loved it!"])
    assert judge.score_texts([header])[0] == 0
    assert said == plain > 0.5


def test_vader_prefers_praise_to_blame() -> None:
    scores = VaderJudge().score(
        [
            answer("A movie", " that is wonderful."),
            answer("A movie", ""),
            answer("A movie", " that is horrible."),
        ]
    )
    assert scores[0] > scores[1] == 0 > scores[2]


def test_vader_takes_an_answer_in_a_chat_for_a_text_of_its_own() -> None:
    asked = answer("How was it", "Great")
    plain, chat = VaderJudge().score([asked, replace(asked, is_chat=True)])
    assert plain == 0 < chat


def test_reward_scores_in_batches_equal_those_of_each_alone(reward: RewardJudge) -> None:
    rng = np.random.default_rng(0)
    sequences = [[*rng.integers(2, 290, size=n).tolist(), EOS] for n in (3, 25, 9, 14, 1)]
    alone = [reward.score_ids([ids])[0] for ids in sequences]
    assert reward.score_ids(sequences) == pytest.approx(alone, abs=1e-5)
    assert len(set(alone)) == 5


def test_reward_reads_end_of_text_whether_or_not_the_response_was_cut_off(
    reward: RewardJudge,
) -> None:
    ended = answer(prompt_ids=(5, 6), response_ids=(7, 8, EOS))
    cut = answer(prompt_ids=(5, 6), response_ids=(7, 8))
    assert reward.score([ended])[0] == pytest.approx(reward.score([cut])[0], abs=1e-6)
    assert reward.score([ended])[0] == pytest.approx(reward.score_ids([[5, 6, 7, 8, EOS]])[0])


def test_reward_shift_is_subtracted(tiny_model: Path) -> None:
    model = ScalarHeadModel.from_causal_lm(tiny_model, 3)
    scores = []
    for shift in (0.0, 2.5):
        model.shift = shift
        judge = RewardJudge(model, eos_id=EOS, tokens_per_batch=40, device=torch.device("cpu"))
        scores.append(judge.score_ids([[5, 6, EOS]])[0])
    assert scores[0] - scores[1] == pytest.approx(2.5, abs=1e-5)
