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

from pathlib import Path

from torch import Tensor
from transformers import PreTrainedTokenizerFast

from rayrlhf import session
from rayrlhf.algorithms.advantages import (
    clip_scores,
    explained_variance,
    gae,
    token_rewards,
    whiten,
)
from rayrlhf.algorithms.kl import kl_estimate
from rayrlhf.config import PPOConfig, Recipe, RecipeError
from rayrlhf.data.tokenizer import load_tokenizer
from rayrlhf.metrics import MetricsLogger, Timer
from rayrlhf.rl.experience import Experience, Rollout, flatten, pad_rows
from rayrlhf.rl.groups import share, wait_all
from rayrlhf.rl.placement import Roles, cluster_nodes, launch, plan
from rayrlhf.rl.reporting import NOT_UPDATED, is_due, log_samples, rollout_metrics
from rayrlhf.rl.setup import Prompts, load_prompts, role_settings
from rayrlhf.rl.state import State, restore, save
from rayrlhf.rl.weight_sync import sync_weights
from rayrlhf.training.checkpoint import begin, commit, is_complete, newest_checkpoint
from rayrlhf.training.model_card import write_card


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
