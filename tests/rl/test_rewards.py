"""`ppo.rewards`: the score is the weighted sum of what models, functions and endpoints say."""

import contextlib
import gc
import time
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import psutil
import pytest
import torch
from transformers import PreTrainedTokenizerFast

from rayrlhf import lineage, pipeline
from rayrlhf.config import Recipe, RecipeError, parse
from rayrlhf.models.scalar_head import ScalarHeadModel
from rayrlhf.rl import groups
from rayrlhf.rl.experience import Rollout, scatter_rows
from rayrlhf.rl.layout import plan
from rayrlhf.rl.ranks import RoleSettings
from rayrlhf.rl.rollout import RolloutWorker
from rayrlhf.rl.scoring import RewardWorker
from rayrlhf.rl.setup import Prompts, reward_places, role_settings
from rayrlhf.rl.waiting import share
from rayrlhf.rl.workers import CriticWorker
from tests.rl.inline import PAD, PROMPTS, InlineHandle, SmallEngine
from tests.rl.test_learners import LEARNERS

Make = Callable[..., RoleSettings]
FUNCTIONS = """
import math
import os
import time

def length(prompts, responses):
    return [float(len(response)) for response in responses]

def fives(prompts, responses):
    return [response.count({five!r}) for response in responses]

def both(prompts, responses):
    assert len(prompts) == len(responses)
    return [len(prompt) + 100 * len(text) for prompt, text in zip(prompts, responses)]

def short(prompts, responses):
    return [0.0]

def nan(prompts, responses):
    return [math.nan if i == 2 else 0.0 for i in range(len(responses))]

def words(prompts, responses):
    return ["good"] * len(responses)

def broken(prompts, responses):
    return {{}}["key"]

def sometimes(prompts, responses):
    while responses[0] == open(os.path.join(os.path.dirname(__file__), "late.txt")).read():
        pass
    return [len(response) for response in responses]

def slow(prompts, responses):
    time.sleep(5)
    return [0.0] * len(responses)
"""


@pytest.fixture
def functions(tmp_path: Path, tokenizer: PreTrainedTokenizerFast) -> str:
    """Return the path of a file of functions."""
    file = tmp_path / "functions.py"
    file.write_text(FUNCTIONS.format(five=tokenizer.decode([5])), encoding="utf-8")
    return str(file)


def sample(own: RoleSettings) -> Rollout:
    worker = RolloutWorker(own)
    worker.engine = SmallEngine(own.model_path)  # type: ignore[assignment]
    return worker.generate(PROMPTS[:16], 0, step=0)


def scores_of(own: RoleSettings, rollout: Rollout) -> tuple[torch.Tensor, dict[str, float]]:
    """Return what the group says of a rollout; needs the fixture `inline_ray`."""
    worker = RewardWorker(own)
    worker.start()
    group = groups.RewardGroup([InlineHandle(worker)], deadline_s=60)
    return group.score(share(rollout), own.ppo.rewards).wait()


def plain(own: RoleSettings, model: Path, rollout: Rollout) -> torch.Tensor:
    """Return the scores of one reward model without `ppo.rewards`."""
    worker = RewardWorker(replace(own, model_path=str(model)))
    worker.start()
    return scatter_rows([worker.score(rollout)])


@pytest.fixture
def members(tmp_path: Path, small_model: Path) -> list[str]:
    """Return the folders of three reward models."""
    folders = [tmp_path / f"member-{seed}" for seed in range(3)]
    for seed, folder in enumerate(folders):
        ScalarHeadModel.from_causal_lm(small_model, seed=seed).save_pretrained(folder)
    return [str(folder) for folder in folders]


def test_the_score_is_the_weighted_sum_and_every_part_is_a_metric(
    settings: Make, inline_ray: None, functions: str, small_critic: Path
) -> None:
    own = settings(
        rewards=[
            {"function": f"{functions}:length", "weight": -0.5},
            {"model": str(small_critic), "name": "quality", "weight": 2.0},
            {"function": f"{functions}:fives", "weight": 0.0},
        ]
    )
    rollout = sample(own)
    model = plain(settings(), small_critic, rollout)
    counts = torch.tensor([float(row.count(5)) for row in rollout.responses()])
    # Every token is one character, but for end-of-text and padding, which are none.
    lengths = torch.tensor([float(sum(id > PAD for id in row)) for row in rollout.responses()])
    found, parts = scores_of(own, rollout)
    torch.testing.assert_close(found, 2 * model - 0.5 * lengths, atol=1e-5, rtol=0)
    assert parts == pytest.approx(
        {
            "reward/length": float(lengths.mean()),
            "reward/quality": float(model.mean()),
            "reward/fives": float(counts.mean()),
        },
        abs=1e-5,
    )


def test_one_model_of_weight_1_is_bit_equal_to_none_named(
    settings: Make, inline_ray: None, small_critic: Path
) -> None:
    own = settings(rewards=[{"model": str(small_critic)}])
    rollout = sample(own)
    scores, parts = scores_of(own, rollout)
    assert torch.equal(scores, plain(settings(), small_critic, rollout))
    assert list(parts) == [f"reward/{small_critic.name}"]


def test_an_ensemble_is_the_mean_less_k_standard_deviations(
    settings: Make, inline_ray: None, members: list[str]
) -> None:
    own = settings(rewards=[{"members": members, "std_penalty": 0.7}])
    rollout = sample(own)
    each = torch.stack([plain(settings(), Path(member), rollout) for member in members])  # (3, B)
    mean = each.sum(dim=0) / 3
    std = ((each - mean) ** 2).mean(dim=0).sqrt()
    found, parts = scores_of(own, rollout)
    assert float(std.min()) > 0
    torch.testing.assert_close(found, mean - 0.7 * std, atol=1e-5, rtol=0)
    assert parts["reward/ensemble_std"] == pytest.approx(float(std.mean()), abs=1e-5)


def test_several_workers_give_the_rows_of_one(
    settings: Make, inline_ray: None, functions: str, small_critic: Path
) -> None:
    rewards = [{"model": str(small_critic)}, {"function": f"{functions}:both"}]
    own = settings(rewards=rewards)
    rollout = sample(own)
    whole, _ = scores_of(own, rollout)
    workers = [RewardWorker(replace(own, rank=rank, world_size=3)) for rank in range(3)]
    for worker in workers:
        worker.start()
    group = groups.RewardGroup([InlineHandle(worker) for worker in workers], deadline_s=60)
    scores, _ = group.score(share(rollout), own.ppo.rewards).wait()
    torch.testing.assert_close(scores, whole, atol=1e-5, rtol=0)


@pytest.mark.parametrize(
    ("name", "error", "said"),
    [
        ("short", RecipeError, "functions.py:short: it gave 1 scores for 16 responses"),
        ("nan", RecipeError, "it gave nan for response 3 of 16: return one finite number"),
        ("words", RecipeError, "no list of numbers"),
        ("broken", RuntimeError, "functions.py:broken: it raised KeyError: 'key'"),
        ("slow", TimeoutError, "it is not done after timeout_s=0.2 s for 16 responses"),
    ],
)
def test_a_function_that_fails_is_named_with_its_key(
    settings: Make, functions: str, name: str, error: type[Exception], said: str
) -> None:
    own = settings(
        rewards=[
            {"function": f"{functions}:length"},
            {"function": f"{functions}:{name}", "timeout_s": 0.2 if name == "slow" else 30},
        ]
    )
    worker = RewardWorker(own)
    worker.start()
    with pytest.raises(error) as found:
        worker.score(sample(own))
    assert "ppo.rewards.1.function=" in str(found.value)
    assert said in str(found.value)


def test_what_is_late_has_the_default_score_and_is_shown(
    settings: Make,
    inline_ray: None,
    functions: str,
    tokenizer: PreTrainedTokenizerFast,
    capsys: pytest.CaptureFixture[str],
) -> None:
    reward = {
        "function": f"{functions}:sometimes",
        "timeout_s": 3,
        "request_size": 1,
        "default_score": -2.5,
        "weight": 2.0,
    }
    own = settings(rewards=[reward])
    rollout = sample(own)
    responses = rollout.responses()
    lengths = torch.tensor([float(sum(id > PAD for id in row)) for row in responses])
    late = tokenizer.decode(responses[3], skip_special_tokens=True)
    Path(functions).with_name("late.txt").write_text(late)
    is_late = torch.tensor([row == responses[3] for row in responses])
    scores, parts = scores_of(own, rollout)
    assert torch.equal(scores, 2 * lengths.masked_fill(is_late, -2.5))
    assert parts["reward/sometimes_missing"] == float(is_late.float().mean())
    said = capsys.readouterr().out.splitlines()
    assert len(said) == int(is_late.sum())
    assert "sometimes: it is not done after timeout_s=3 s for 1 responses: default_s" in said[0]


def test_a_worker_that_is_gone_leaves_no_process(settings: Make, functions: str) -> None:
    own = settings(rewards=[{"function": f"{functions}:length"}])
    worker = RewardWorker(own)
    worker.start()
    assert num_processes(functions) == 1
    del worker
    gc.collect()
    end = time.monotonic() + 20
    while num_processes(functions):
        assert time.monotonic() < end
        time.sleep(0.05)


def num_processes(named: str) -> int:
    """Count the children of this process with a name in their command."""
    count = 0
    for each in psutil.Process().children():
        with contextlib.suppress(psutil.Error):  # it ends just now
            count += named in " ".join(each.cmdline())
    return count


def test_reward_rises_with_a_function(train: Callable[..., Any], functions: str) -> None:
    """The function counts token 5 in the text, as the bandit's score does in the ids."""
    rows = train(
        **LEARNERS["grpo"],
        rewards=[
            {"function": f"{functions}:fives"},
            {"function": f"{functions}:length", "weight": 0},
        ],
        steps=8,
        kl_coef=0.0,
        missing_eos_penalty=0.0,
        actor={"learning_rate": 2e-2},
    )
    means = [row["reward/fives"] for row in rows]
    assert means == [row["reward/score_mean"] for row in rows]
    assert sum(means[-2:]) / 2 > 1.5 + sum(means[:2]) / 2
    assert all(0 < row["reward/length"] <= 6 for row in rows)


def test_the_line_of_a_long_wait_and_the_deadline_name_who_is_slow(
    settings: Make, inline_ray: None, functions: str
) -> None:
    own = settings(rewards=[{"function": f"{functions}:length"}])
    worker = RewardWorker(own)
    worker.start()
    group = groups.RewardGroup([InlineHandle(worker)], deadline_s=60)
    pending = group.score(share(sample(own)), own.ppo.rewards)
    assert pending.call == f"score (ppo.rewards.0.function={functions}:length)"


def recipe(folder: Path, model: Path, rewards: list[dict[str, Any]], **changes: Any) -> Recipe:
    (folder / "prompts.jsonl").write_text('{"prompt": "The movie"}\n')
    return parse(
        {
            "name": "x",
            "run_dir": str(folder / "run"),
            "model": {"path": str(model), "max_length": 64},
            "ppo": {"prompts": str(folder / "prompts.jsonl"), "rewards": rewards},
            **changes,
        }
    )


@pytest.fixture
def own_settings(
    tmp_path: Path, tiny_model: Path, tokenizer: PreTrainedTokenizerFast
) -> Callable[..., dict[Any, RoleSettings]]:
    """Return own_settings(rewards): what the roles of a recipe have to know."""

    def make(
        rewards: list[dict[str, Any]], checkpoint: Path | None = None, **changes: Any
    ) -> dict[Any, RoleSettings]:
        own = recipe(tmp_path, tiny_model, rewards, **changes)
        assert own.ppo is not None
        return role_settings(own, own.ppo, tokenizer, Prompts([[3]], 0, 1), checkpoint)

    return make


def test_without_a_reward_model_the_critic_starts_at_0(
    own_settings: Callable[..., dict[Any, RoleSettings]], functions: str, tiny_model: Path
) -> None:
    found = own_settings([{"function": f"{functions}:length"}])
    assert found["critic"].zero_head and not found["actor"].zero_head
    assert found["reward"].rewards == ((f"{functions}:length",),)
    critic = CriticWorker(found["critic"])
    critic.start(("", 0))
    assert isinstance(critic.model, ScalarHeadModel)
    assert not critic.model.hf.score.weight.any()
    trunk = critic.model.hf.state_dict()["model.embed_tokens.weight"]
    assert torch.equal(
        trunk, ScalarHeadModel.from_causal_lm(tiny_model).hf.model.embed_tokens.weight
    )


def test_a_critic_with_adapters_that_started_at_0_goes_on_from_its_own_head(
    own_settings: Callable[..., dict[Any, RoleSettings]], functions: str, tmp_path: Path
) -> None:
    rewards = [{"function": f"{functions}:length"}]
    ppo = {"prompts": "p", "rewards": rewards, "critic": {"lora": {"rank": 4}}}
    critics = [CriticWorker(own_settings(rewards, ppo=ppo)["critic"])]
    critics[0].start(("", 0))
    with torch.no_grad():
        for name, parameter in critics[0].model.named_parameters():
            if "score" in name or "lora_B" in name:
                parameter.fill_(0.1)
    critics[0].save(str(tmp_path / "step"))
    critics.append(CriticWorker(own_settings(rewards, tmp_path / "step", ppo=ppo)["critic"]))
    critics[1].start(("", 0))
    ids = torch.tensor([[5, 9, 40]])
    values = [critic.model(ids, torch.ones_like(ids)) for critic in critics]
    assert values[0].abs().min() > 0
    assert torch.equal(*values)


def test_the_critic_starts_from_the_first_reward_model_that_is_named(
    own_settings: Callable[..., dict[Any, RoleSettings]],
    functions: str,
    tmp_path: Path,
    tiny_model: Path,
) -> None:
    folder = tmp_path / "judge" / "final"
    ScalarHeadModel.from_causal_lm(tiny_model).save_pretrained(folder)
    found = own_settings([{"function": f"{functions}:length"}, {"model": str(folder)}])
    assert (found["critic"].model_path, found["critic"].zero_head) == (str(folder), False)
    assert found["reward"].rewards[1] == (str(folder),)


def test_an_ensemble_of_a_run_is_its_reward_folder(
    tmp_path: Path, tiny_model: Path, tokenizer: PreTrainedTokenizerFast
) -> None:
    stage = tmp_path / "other" / "reward"
    finals = [stage / "final", stage / "members/01/final", stage / "members/02/final"]
    for folder in finals:
        ScalarHeadModel.from_causal_lm(tiny_model).save_pretrained(folder)
    for named in (stage, stage / "members"):
        own = recipe(tmp_path, tiny_model, [{"members": str(named), "std_penalty": 1}])
        assert reward_places(own, tokenizer) == (tuple(map(str, finals)),)

    # Of the recipe's own run, those that it trains, whatever an earlier one has left.
    mine = tmp_path / "run" / "reward"
    rewards = [{"members": str(mine), "std_penalty": 1}]
    trains = {"reward": {"train": "x", "num_members": 2}}
    own = recipe(tmp_path, tiny_model, rewards, **trains)
    assert lineage.scoring_models(own) == ((f"{mine}/final", f"{mine}/members/01/final"),)
    pipeline.check_models(own)  # they are not there yet
    alone = recipe(tmp_path, tiny_model, rewards, reward={"train": "x"})
    with pytest.raises(RecipeError, match=r"ppo\.rewards\.0\.members=.*two models or more"):
        reward_places(alone, tokenizer)


def test_a_reward_model_is_looked_at_before_any_stage(
    tmp_path: Path, tiny_model: Path, tokenizer: PreTrainedTokenizerFast
) -> None:
    own = recipe(tmp_path, tiny_model, [{"model": str(tmp_path / "none")}])
    pipeline.require_reward_model(own)  # ppo.rewards stands for it
    with pytest.raises(RecipeError, match=r"ppo\.rewards\.0\.model: .*/none: not a folder"):
        pipeline.check_models(own)
    with pytest.raises(RecipeError, match=r"ppo\.rewards\.0\.model=.*/none: PPO needs this model"):
        reward_places(own, tokenizer)

    folder = tmp_path / "foreign"
    ScalarHeadModel.from_causal_lm(tiny_model).save_pretrained(folder)
    own = recipe(tmp_path, tiny_model, [{"model": str(folder)}])
    tokenizer.save_pretrained(folder)
    assert reward_places(own, tokenizer) == ((str(folder),),)
    text = (folder / "tokenizer.json").read_text(encoding="utf-8")
    (folder / "tokenizer.json").write_text(
        text.replace('"!": 2,', '"!": 3,', 1).replace('"\\"": 3,', '"\\"": 2,', 1), encoding="utf-8"
    )
    with pytest.raises(RecipeError, match=r"another tokenizer than the policy \(2 tokens differ"):
        reward_places(own, tokenizer)


def test_a_changed_function_or_model_makes_ppo_run_again(
    tmp_path: Path, tiny_model: Path, functions: str
) -> None:
    folder = tmp_path / "judge"
    ScalarHeadModel.from_causal_lm(tiny_model).save_pretrained(folder)
    rewards = [{"function": f"{functions}:length"}, {"model": str(folder)}]
    own = recipe(tmp_path, tiny_model, rewards)

    def run() -> bool:
        with pipeline.tracked(own, "ppo") as needed:
            if needed:
                (own.path / "ppo" / "final").mkdir(parents=True)
        return needed

    assert run() and not run()
    with open(functions, "a", encoding="utf-8") as file:
        file.write("\n# the same\n")
    assert run() and not run()
    ScalarHeadModel.from_causal_lm(tiny_model, seed=7).save_pretrained(folder)
    assert run() and not run()


def test_a_recipe_with_rewards_loads_again_and_needs_no_other_workers(
    tmp_path: Path, tiny_model: Path
) -> None:
    own = recipe(
        tmp_path,
        tiny_model,
        [{"url": "http://scorer:8000/score"}, {"members": ["a", "b"], "std_penalty": 0}],
    )
    assert parse(own.model_dump(mode="json")) == own
    assert plan(own) == plan(recipe(tmp_path, tiny_model, []))
