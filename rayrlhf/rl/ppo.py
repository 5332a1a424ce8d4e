"""PPO for RLHF and its kin: one controller process, the roles in workers of their own.

    repeat  1 roll out   y ~ pi_old(.|x)                              rollout (vLLM)
            2 evaluate   log pi_old, log pi_ref, V(s_t), score(x,y)   actor reference critic reward
            3 credit     r_t = -beta*kl_t, r_last += score;  A = GAE  here, on CPU: credit.py
            4 update     K epochs of clipped policy and value losses  actor critic
            5 sync       theta -> rollout;  beta <- KL controller     actor -> rollout

GRPO, RLOO and REINFORCE++ are the same loop with another step 3 and without a critic.
Shapes: B responses, T response tokens, right-padded; N response tokens of all rows, flat.
Departures from InstructGPT: old log-probs are the learner's, on its own micro-batches, or the
engine's where the two agree (gate.py); the value function may be warmed up alone; beta may be
adaptive.
Source: PPO arXiv:1707.06347, GAE 1506.02438, KL controller 1909.08593, InstructGPT 2203.02155.
"""

from functools import partial
from pathlib import Path

from transformers import PreTrainedTokenizerFast

from rayrlhf import session
from rayrlhf.config import PPOConfig, Recipe, RecipeError
from rayrlhf.data.tokenizer import load_tokenizer
from rayrlhf.metrics import MetricsLogger, Timer
from rayrlhf.rl import ppo_async
from rayrlhf.rl.credit import Evaluation, assign_credit
from rayrlhf.rl.gate import Gate
from rayrlhf.rl.off_policy import correct
from rayrlhf.rl.placement import Roles, cluster_nodes, launch, plan
from rayrlhf.rl.profile import Profile
from rayrlhf.rl.reporting import NOT_UPDATED, is_due, log_samples, rollout_metrics
from rayrlhf.rl.reward_function import check_functions
from rayrlhf.rl.setup import Prompts, load_prompts, role_settings, single_threaded
from rayrlhf.rl.state import State, go_back, restore, resume_point, save
from rayrlhf.rl.supervision import GoBack
from rayrlhf.rl.waiting import absent, share, wait_all
from rayrlhf.rl.weight_sync import send_frozen, sync_weights
from rayrlhf.training.checkpoint import begin, commit, is_complete
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
    checkpoint, rollback = resume_point(stage_dir)
    state = restore(cfg, checkpoint, rollback)
    if is_complete(stage_dir / "final") and state.step >= cfg.steps:
        return stage_dir / "final"
    tokenizer = load_tokenizer(recipe)
    prompts = load_prompts(recipe, cfg)
    check_functions(recipe)
    settings = role_settings(recipe, cfg, tokenizer, prompts, checkpoint)

    session.connect(recipe)
    session.require(plan(recipe).demand, wait_s=recipe.resources.wait_s, stage="ppo")
    layout = plan(recipe, cluster_nodes())
    with launch(
        layout, settings, deadline_s=cfg.deadline_s, wait_s=recipe.resources.wait_s
    ) as roles:
        while True:
            try:
                return _run(recipe, cfg, roles, prompts, state, tokenizer)
            except GoBack as why:  # a dead learner, or KL above budget: the other roles stay
                settings_from = partial(role_settings, recipe, cfg, tokenizer, prompts)
                state = go_back(cfg, roles, stage_dir, settings_from, why)


def _run(
    recipe: Recipe,
    cfg: PPOConfig,
    roles: Roles,
    prompts: Prompts,
    state: State,
    tokenizer: PreTrainedTokenizerFast,
) -> Path:
    """Run the steps that are left, and write the final folder."""
    stage_dir = recipe.path.absolute() / "ppo"
    with (
        single_threaded(),
        MetricsLogger(
            stage_dir, start_step=state.step, num_steps=cfg.steps, trackers=recipe.tracking
        ) as log,
    ):
        run_steps(cfg, roles, prompts, state, log, tokenizer)
        final = begin(stage_dir, None)
        roles.actor.export(str(final)).wait()
        write_card(recipe, "ppo", final)
        return commit(final)


def run_steps(
    cfg: PPOConfig,
    roles: Roles,
    prompts: Prompts,
    state: State,
    log: MetricsLogger,
    tokenizer: PreTrainedTokenizerFast,
) -> None:
    """Run the steps that are left, in the loop that `cfg` asks for."""
    send_frozen(cfg, roles.actor, roles.rollout)
    loop = ppo_async.optimize if cfg.max_staleness else optimize
    loop(cfg, roles, prompts, state, log, tokenizer)


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
    gate = Gate(cfg, roles, prompts)
    profile = Profile(roles, log.dir / "profile" if cfg.profile else None, cfg.steps - state.step)

    for step in range(state.step, cfg.steps):
        timer = Timer()
        with timer("step"):
            with timer("probe"):  # engine and learner agree, or the run ends here
                probed = gate.probe(step, state.version)

            with timer("rollout"):  # 1. on-policy by construction
                rollout = roles.rollout.generate(prompts.take(step), step).wait()
                shared = share(rollout)

            with timer("evaluate"):  # 2. start all, then wait once
                (old_log_probs, known), ref_log_probs, values, (scores, parts) = wait_all(
                    gate.old_log_probs(rollout, shared, step, state.version),
                    roles.reference.log_probs(shared, step),
                    roles.critic.values(shared, step) if roles.critic else absent(),
                    roles.reward.score(shared, cfg.rewards),
                )  # 3 x (N,), (B,)

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

            with timer("sync"):  # 5. no rollout on old weights
                if trains_actor:
                    state.version += 1
                    sync_weights(roles.actor, roles.rollout, version=state.version)
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
            **rollout_metrics(rollout, timer.seconds["time/rollout_s"]),
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
