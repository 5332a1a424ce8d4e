"""PPO with rollouts ahead of the learner (`ppo.max_staleness`): ppo.py, line by line, but for 1, 5.

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

from rayrlhf.config import PPOConfig
from rayrlhf.metrics import MetricsLogger, Timer
from rayrlhf.rl.credit import Evaluation, assign_credit
from rayrlhf.rl.gate import Gate
from rayrlhf.rl.off_policy import correct, staleness
from rayrlhf.rl.placement import Roles
from rayrlhf.rl.profile import Profile
from rayrlhf.rl.reporting import NOT_UPDATED, is_due, log_samples, rollout_metrics
from rayrlhf.rl.setup import Prompts
from rayrlhf.rl.state import State, save
from rayrlhf.rl.stream import make_stream
from rayrlhf.rl.waiting import absent, share, wait_all


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
    gate = Gate(cfg, roles, prompts, settle=stream.catch_up)
    profile = Profile(roles, log.dir / "profile" if cfg.profile else None, cfg.steps - state.step)

    for step in range(state.step, cfg.steps):
        timer = Timer()
        with timer("step"):
            with timer("probe"):  # engine and learner agree, or the run ends here
                probed = gate.probe(step, state.version)

            with timer("rollout"):  # 1. what is not there yet is waited for
                rollout, num_dropped = stream.take(step)
                shared = share(rollout)

            with timer("evaluate"):  # 2. start all, then wait once
                (old_log_probs, known), ref_log_probs, values, (scores, parts) = wait_all(
                    gate.old_log_probs(rollout, shared, step, state.version),
                    roles.reference.log_probs(shared, step),
                    roles.critic.values(shared, step) if roles.critic else absent(),
                    roles.reward.score(shared, cfg.rewards),
                )  # 3 x (N,), (B,)

            behind = staleness(rollout, state.version)
            credit = assign_credit(  # 3. (B, T) inside
                cfg,
                rollout,
                Evaluation(old_log_probs, ref_log_probs, values, scores),
                kl_coef=state.kl.coef,
            )
            credit = state.budget.keep(credit, ref_log_probs, step, state.kl.coef)
            experience, importance = correct(credit.experience, cfg)  # of the engine's policy
            shared = share(experience)

            trains_actor = credit.updates_actor and step >= cfg.critic_warmup_steps
            with timer("update"):  # 4. V must be sane first
                updates = [roles.critic.update(shared, step)] if roles.critic else []
                if trains_actor:
                    updates.append(roles.actor.update(shared, step))
                losses = wait_all(*updates)

            with timer("sync"):  # 5. rollouts to come start on new weights
                state.version += trains_actor
                stream.advance(step + 1, state.version)
            state.kl.update(credit.kl_per_response, num_responses=len(rollout))
            state.step = step + 1

        metrics = {
            **credit.metrics,
            **parts,
            "weights/version": state.version,
            **importance,
            **roles.restarts(),
            **NOT_UPDATED,
            **probed,
            "rollout/dropped": num_dropped,
            **behind,
            **rollout_metrics(rollout, timer.seconds["time/step_s"]),
            **timer.seconds,
        }
        for part in (known, *losses):
            metrics |= gate.watch(part, state.version)
        log.log(state.step, metrics)
        profile.step_done()
        if is_due(state.step, cfg.sample_every, cfg.steps):
            log_samples(log, state.step, rollout, scores, tokenizer)
        if is_due(state.step, cfg.save_every, cfg.steps):
            save(cfg, roles, state, log.dir)
