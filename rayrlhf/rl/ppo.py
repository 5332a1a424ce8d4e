"""PPO for RLHF: one controller process, five roles in workers of their own.

    repeat  1 roll out   y ~ pi_old(.|x)                              rollout (vLLM)
            2 evaluate   log pi_old, log pi_ref, V(s_t), score(x,y)   actor reference critic reward
            3 credit     r_t = -beta*kl_t, r_last += score;  A = GAE  here, on CPU
            4 update     K epochs of clipped policy and value losses  actor critic
            5 sync       theta -> rollout;  beta <- KL controller     actor -> rollout

Shapes: B responses, T response tokens, right-padded; mask (B, T) is 1 on generated tokens.
Departures from InstructGPT: old log-probs are the learner's, on its own micro-batches, and the
engine's only check them; the value function may be warmed up alone; beta may be adaptive.
Source: PPO arXiv:1707.06347, GAE 1506.02438, KL controller 1909.08593, InstructGPT 2203.02155.
"""

import json
import math
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from torch import Tensor
from transformers import AutoConfig, PreTrainedTokenizerFast

from rayrlhf import lineage, session
from rayrlhf.algorithms.advantages import (
    clip_scores,
    explained_variance,
    gae,
    token_rewards,
    whiten,
)
from rayrlhf.algorithms.kl import KLController, kl_estimate, make_kl_controller
from rayrlhf.config import PPOConfig, Recipe, RecipeError, Role
from rayrlhf.data import builtin, encoded
from rayrlhf.data.datasets import batch_indices
from rayrlhf.data.tokenizer import check_vocabulary, load_tokenizer
from rayrlhf.metrics import MetricsLogger, Timer
from rayrlhf.rl.experience import Experience, Rollout, flatten, pad_rows
from rayrlhf.rl.groups import share, wait_all
from rayrlhf.rl.placement import Roles, cluster_nodes, launch, plan
from rayrlhf.rl.ranks import RoleSettings
from rayrlhf.rl.weight_sync import sync_weights
from rayrlhf.training.checkpoint import STATE_DIR, begin, commit, is_complete, newest_checkpoint
from rayrlhf.training.model_card import write_card

NUM_SAMPLES = 3
"""Responses that each line of samples shows."""
NOT_UPDATED = dict.fromkeys(
    (
        "policy/loss",
        "policy/clip_fraction",
        "policy/approx_kl",
        "policy/first_ratio",
        "policy/first_clip_fraction",
    ),
    math.nan,
)
"""Of a step that warms up the critic alone; the log has them as null."""


@dataclass(frozen=True)
class Prompts:
    """The prompts as token ids; which ones a step takes is a pure function of the step."""

    ids: Sequence[list[int]]
    seed: int
    batch_size: int

    def take(self, step: int) -> list[list[int]]:
        """Return the P prompts of `step`."""
        chosen = batch_indices(
            seed=self.seed, step=step, batch_size=self.batch_size, num_records=len(self.ids)
        )
        return [self.ids[index] for index in chosen]


@dataclass
class State:
    """What changes from step to step, beside the weights."""

    step: int
    """Steps that are done."""
    version: int
    """Version of the actor's weights: how many steps have updated them."""
    kl: KLController


def train_ppo(recipe: Recipe) -> Path:
    """Run PPO up to `ppo.steps` and return the final folder; resumes from the newest checkpoint.

    Raises RecipeError before any worker starts when prompts, models or resources do not fit.
    """
    cfg = recipe.ppo
    if cfg is None:
        raise RecipeError("the recipe has no ppo section: add one with `prompts:`")
    # Workers write checkpoints, too, and Ray may have started them in another folder.
    stage_dir = recipe.path.absolute() / "ppo"
    checkpoint = newest_checkpoint(stage_dir)
    state = restore(cfg, checkpoint)
    if is_complete(stage_dir / "final") and state.step >= cfg.steps:
        return stage_dir / "final"
    tokenizer = load_tokenizer(recipe)
    prompts = load_prompts(recipe, cfg)
    settings = role_settings(recipe, cfg, tokenizer, prompts, checkpoint)

    session.connect(recipe)
    session.require(plan(recipe).demand, wait_s=recipe.resources.wait_s, stage="ppo")
    layout = plan(recipe, cluster_nodes())
    with (
        launch(layout, settings, deadline_s=cfg.deadline_s) as roles,
        MetricsLogger(
            stage_dir, start_step=state.step, num_steps=cfg.steps, trackers=recipe.tracking
        ) as log,
    ):
        optimize(cfg, roles, prompts, state, log, tokenizer)
        final = begin(stage_dir, None)
        roles.actor.export(str(final)).wait()
        write_card(recipe, "ppo", final)
        return commit(final)


def optimize(
    cfg: PPOConfig,
    roles: Roles,
    prompts: Prompts,
    state: State,
    log: MetricsLogger,
    tokenizer: PreTrainedTokenizerFast,
) -> None:
    """Run the steps that are left, with a checkpoint every `save_every` and after the last."""
    sync_weights(roles.actor, roles.rollout, version=state.version)

    for step in range(state.step, cfg.steps):
        timer = Timer()
        with timer("step"):
            with timer("rollout"):  # 1. on-policy by construction
                rollout = roles.rollout.generate(prompts.take(step), step).wait()
                shared, mask = share(rollout), rollout.mask  # mask (B, T)

            with timer("evaluate"):  # 2. start all, then wait once
                (old_log_probs, entropy), ref_log_probs, values, scores = wait_all(
                    roles.actor.log_probs(shared, step),
                    roles.reference.log_probs(shared, step),
                    roles.critic.values(shared, step),
                    roles.reward.score(shared),
                )
                mismatch = check_mismatch(old_log_probs, rollout, cfg)  # 3 x (N,), (B,)

            kl = pad_rows(kl_estimate(old_log_probs, ref_log_probs), rollout.response_lengths)
            values_BT = pad_rows(values, rollout.response_lengths)  # 3. nats (B, T); (B, T)
            rewards = token_rewards(
                judge(scores, rollout.truncated, cfg), kl, mask, kl_coef=state.kl.coef
            )  # (B, T)
            advantages, returns = gae(
                rewards, values_BT, mask, gamma=cfg.gamma, gae_lambda=cfg.gae_lambda
            )  # (B, T) each
            if cfg.whiten_advantages:
                advantages = whiten(advantages, mask)
            experience = share(
                Experience(
                    rollout,
                    old_log_probs=old_log_probs,
                    advantages=flatten(advantages, mask),
                    old_values=values,
                    returns=flatten(returns, mask),
                )
            )

            is_warm = step >= cfg.critic_warmup_steps
            with timer("update"):  # 4. V must be sane first
                updates = [roles.critic.update(experience, step)]
                if is_warm:
                    updates.append(roles.actor.update(experience, step))
                losses = wait_all(*updates)

            with timer("sync"):  # 5. no rollout on old weights
                if is_warm:
                    state.version += 1
                    sync_weights(roles.actor, roles.rollout, version=state.version)
            kl_coef, kl_per_response = state.kl.coef, float(kl.sum(dim=1).mean())
            state.kl.update(kl_per_response, num_responses=len(rollout))
            state.step = step + 1

        metrics = {
            "reward/score_mean": float(scores.mean()),
            "reward/score_std": float(scores.std(correction=0)),
            "reward/return_mean": float(rewards.sum(dim=1).mean()),
            "kl/ref_per_response": kl_per_response,
            "kl/coef": kl_coef,
            "kl/rollout_mismatch": mismatch,
            "policy/entropy": entropy,
            "value/explained_variance": explained_variance(values_BT, returns, mask),
            "weights/version": state.version,
            **NOT_UPDATED,
            **rollout_metrics(rollout, timer),
            **timer.seconds,
        }
        for part in losses:
            metrics |= part
        log.log(state.step, metrics)
        if is_due(state.step, cfg.sample_every, cfg.steps):
            log_samples(log, state.step, rollout, scores, tokenizer)
        if is_due(state.step, cfg.save_every, cfg.steps):
            save(cfg, roles, state, log.dir)


def check_mismatch(log_probs: Tensor, rollout: Rollout, cfg: PPOConfig) -> float:
    """Return mean |log-prob of the engine - of the learner|, nats per token.

    Raises RuntimeError beyond `ppo.kl_rollout_mismatch_max`: what was sampled would not be what is
    learned from.
    """
    mismatch = float((log_probs - rollout.log_probs).abs().mean())
    if not mismatch <= cfg.kl_rollout_mismatch_max:
        raise RuntimeError(
            f"kl/rollout_mismatch={mismatch:.3g} nats per token is beyond "
            f"ppo.kl_rollout_mismatch_max={cfg.kl_rollout_mismatch_max:g}: the engine samples from "
            "another distribution than the actor learns on. Set ppo.actor.precision=float32, or, "
            "with bfloat16, ppo.kl_rollout_mismatch_max=0.1"
        )
    return mismatch


def judge(scores: Tensor, truncated: Tensor, cfg: PPOConfig) -> Tensor:
    """Return (B,): scores clipped to +-reward_clip, less the penalty of truncated responses."""
    return clip_scores(scores, clip=cfg.reward_clip) - cfg.missing_eos_penalty * truncated.float()


def rollout_metrics(rollout: Rollout, timer: Timer) -> dict[str, float]:
    """Return lengths in tokens, the fraction of truncated responses, and tokens per second."""
    lengths = rollout.response_lengths.float()
    return {
        "rollout/response_length": float(lengths.mean()),
        "rollout/truncated_fraction": float(rollout.truncated.float().mean()),
        "rollout/tokens_per_s": float(lengths.sum()) / timer.seconds["time/rollout_s"],
    }


def log_samples(
    log: MetricsLogger,
    step: int,
    rollout: Rollout,
    scores: Tensor,
    tokenizer: PreTrainedTokenizerFast,
) -> None:
    """Write the first few responses of the step, as text."""
    prompts = rollout.prompt_ids.split(rollout.prompt_lengths.tolist())
    for index, response in enumerate(rollout.responses()[:NUM_SAMPLES]):
        log.sample(
            step,
            {
                "prompt": tokenizer.decode(prompts[index].tolist(), skip_special_tokens=True),
                "text": tokenizer.decode(response, skip_special_tokens=True),
                "score": round(float(scores[index]), 4),
            },
        )


def is_due(step: int, every: int, last: int) -> bool:
    """Tell whether something that happens every so many steps, and after the last, is due."""
    return step % every == 0 or step == last


def save(cfg: PPOConfig, roles: Roles, state: State, stage_dir: Path) -> None:
    """Write a checkpoint: the actor as a Hugging Face folder, and all that resuming needs."""
    folder = begin(stage_dir, state.step)
    wait_all(roles.actor.save(str(folder)), roles.critic.save(str(folder)))
    (folder / STATE_DIR / "controller.json").write_text(
        json.dumps({"step": state.step, "version": state.version, "kl_coef": state.kl.coef}),
        encoding="utf-8",
    )
    commit(folder, keep=cfg.keep_checkpoints)


def restore(cfg: PPOConfig, checkpoint: Path | None) -> State:
    """Return the state in `checkpoint`, or that of a fresh run; prompts follow from the step."""
    kl = make_kl_controller(cfg.kl_coef, cfg.kl_target, cfg.kl_horizon)
    if checkpoint is None:
        return State(step=0, version=0, kl=kl)
    saved = json.loads((checkpoint / STATE_DIR / "controller.json").read_text(encoding="utf-8"))
    kl.coef = saved["kl_coef"]
    return State(step=saved["step"], version=saved["version"], kl=kl)


def load_prompts(recipe: Recipe, cfg: PPOConfig) -> Prompts:
    """Read and tokenize the prompts that leave room for a response."""
    room = recipe.model.max_length - cfg.max_response_tokens
    if room < 1:
        raise RecipeError(
            f"ppo.max_response_tokens={cfg.max_response_tokens} leaves no room for a "
            f"prompt within model.max_length={recipe.model.max_length}: set it lower"
        )
    return Prompts(encoded.prompts(recipe, cfg.prompts, room), recipe.seed, cfg.batch_size)


def role_settings(
    recipe: Recipe,
    cfg: PPOConfig,
    tokenizer: PreTrainedTokenizerFast,
    prompts: Prompts,
    checkpoint: Path | None,
) -> dict[Role, RoleSettings]:
    """Return what each role has to know.

    Raises RecipeError when a model is missing, or has fewer rows than the tokenizer has ids.
    """
    policy = _model(lineage.start_model(recipe, "ppo"), tokenizer)
    critic = _model(lineage.start_model(recipe, "ppo.critic"), tokenizer)
    reward = _model(lineage.start_model(recipe, "ppo.reward"), tokenizer)
    states = {
        role: str(checkpoint / STATE_DIR / role) if checkpoint else None
        for role in ("actor", "critic")
    }
    # The critic's state folder holds its weights, too; the actor's are the checkpoint itself.
    models: dict[Role, str] = {
        "actor": str(checkpoint) if checkpoint else policy,
        "critic": states["critic"] or critic,
        "reference": policy,
        "reward": reward,
        "rollout": policy,
    }
    assert isinstance(tokenizer.eos_token_id, int), "load_tokenizer checks it"
    pad_id = tokenizer.pad_token_id
    return {
        role: RoleSettings(
            ppo=cfg,
            model_path=path,
            state_path=states.get(role),
            tokenizer_path=str((recipe.path / "tokenizer").absolute()),
            corpus_path=str((recipe.path / "corpus").absolute()),
            documents_apart=recipe.pretrain is not None and recipe.pretrain.documents == "apart",
            actor_ranks=recipe.resources.actor.num_workers,
            max_length=int(max(encoded.token_counts(prompts.ids))) + cfg.max_response_tokens,
            pad_id=pad_id if isinstance(pad_id, int) else tokenizer.eos_token_id,
            eos_id=tokenizer.eos_token_id,
            seed=recipe.seed,
            num_threads=recipe.resources.role(role).num_threads,
        )
        for role, path in models.items()
    }


def _model(name: str, tokenizer: PreTrainedTokenizerFast) -> str:
    """Return the absolute path or hub name of a model that exists and fits the tokenizer."""
    path = builtin.resolve(name)
    try:
        config = AutoConfig.from_pretrained(path)
    except (OSError, ValueError) as error:
        raise RecipeError(
            f"{path}: PPO starts from this model, but it cannot be read "
            f"({str(error).splitlines()[0]}): run the stage before, or correct "
            "model.path"
        ) from None
    check_vocabulary(tokenizer, config.vocab_size)
    return str(Path(path).absolute()) if Path(path).exists() else path
