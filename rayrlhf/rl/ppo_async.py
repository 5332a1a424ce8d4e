"""PPO with rollouts ahead of the learner (`ppo.max_staleness`); compare with ppo.py, line by line.

    start n batches of rollouts
    repeat  1 take       y ~ pi_engine(.|x), up to n versions old     rollout (vLLM)
            2 evaluate   log pi_old, log pi_ref, V(s_t), score(x,y)   actor reference critic reward
            3 credit     as in ppo.py;  A *= min(pi_old/pi_engine, cap)   here, on CPU
            4 update     K epochs, clipped around pi_old              actor critic
            5 sync       theta -> rollout, behind what it is at; start the next batch

The engines roll out the next batches during 2 to 5. Departures from ppo.py: pi_old is the learner
as the step begins and not who sampled, which the importance weights make up for (off_policy.py);
the KL penalty is that of pi_old; engine and learner are compared where both have the same weights,
which is the first step, and the first after each checkpoint; `time/rollout_s` is the wait alone,
and tokens per second are those of the whole step.
Source: decoupled PPO arXiv:2110.00641, AReaL 2505.24298.
"""

from transformers import PreTrainedTokenizerFast

from rayrlhf.algorithms.advantages import (
    explained_variance,
    gae,
    token_rewards,
    whiten,
)
from rayrlhf.algorithms.kl import kl_estimate
from rayrlhf.config import PPOConfig
from rayrlhf.metrics import MetricsLogger, Timer
from rayrlhf.rl.experience import Experience, flatten, pad_rows
from rayrlhf.rl.groups import share, wait_all
from rayrlhf.rl.off_policy import check_mismatch, correct, fresh_part, staleness
from rayrlhf.rl.placement import Roles
from rayrlhf.rl.ppo import judge
from rayrlhf.rl.reporting import NOT_UPDATED, is_due, log_samples, rollout_metrics
from rayrlhf.rl.setup import Prompts
from rayrlhf.rl.state import State, save
from rayrlhf.rl.stream import make_stream


def optimize(
    cfg: PPOConfig,
    roles: Roles,
    prompts: Prompts,
    state: State,
    log: MetricsLogger,
    tokenizer: PreTrainedTokenizerFast,
) -> None:
    """Run the steps that are left, with a checkpoint every `save_every` and after the last."""
    stream = make_stream(cfg, roles, prompts)
    stream.advance(state.step, state.version)

    for step in range(state.step, cfg.steps):
        timer = Timer()
        with timer("step"):
            with timer("rollout"):  # 1. what is not there yet is waited for
                rollout, num_dropped = stream.take(step)
                shared, mask = share(rollout), rollout.mask  # mask (B, T)

            with timer("evaluate"):  # 2. start all, then wait once
                (old_log_probs, entropy), ref_log_probs, values, scores = wait_all(
                    roles.actor.log_probs(shared, step),
                    roles.reference.log_probs(shared, step),
                    roles.critic.values(shared, step),
                    roles.reward.score(shared),
                )
                fresh = fresh_part(old_log_probs, rollout, state.version)
                mismatch = check_mismatch(*fresh, cfg)  # 3 x (N,), (B,)
                behind = staleness(rollout, state.version)

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
            experience = Experience(
                rollout,
                old_log_probs=old_log_probs,
                advantages=flatten(advantages, mask),
                old_values=values,
                returns=flatten(returns, mask),
            )
            experience, importance = correct(experience, cfg)  # of the engine's old weights
            shared = share(experience)

            is_warm = step >= cfg.critic_warmup_steps
            with timer("update"):  # 4. V must be sane first
                updates = [roles.critic.update(shared, step)]
                if is_warm:
                    updates.append(roles.actor.update(shared, step))
                losses = wait_all(*updates)

            with timer("sync"):  # 5. rollouts to come start on new weights
                state.version += is_warm
                stream.advance(step + 1, state.version)
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
            **importance,
            **NOT_UPDATED,
            "rollout/dropped": num_dropped,
            **behind,
            **rollout_metrics(rollout, timer.seconds["time/step_s"]),
            **timer.seconds,
        }
        for part in losses:
            metrics |= part
        log.log(state.step, metrics)
        if is_due(state.step, cfg.sample_every, cfg.steps):
            log_samples(log, state.step, rollout, scores, tokenizer)
        if is_due(state.step, cfg.save_every, cfg.steps):
            save(cfg, roles, state, log.dir)
