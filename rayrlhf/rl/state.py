"""What the controller remembers from step to step, and its checkpoints."""

import json
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path

from rayrlhf import console
from rayrlhf.algorithms.kl import KLController, make_kl_controller
from rayrlhf.config import PPOConfig, Role
from rayrlhf.rl.placement import Roles
from rayrlhf.rl.ranks import RoleSettings
from rayrlhf.rl.supervision import LearnerLost
from rayrlhf.rl.waiting import wait_all
from rayrlhf.training.checkpoint import STATE_DIR, begin, commit, newest_checkpoint


@dataclass
class State:
    """What changes from step to step, beside the weights."""

    step: int
    """Steps that are done."""
    version: int
    """Version of the actor's weights: how many steps have updated them."""
    kl: KLController


def save(cfg: PPOConfig, roles: Roles, state: State, stage_dir: Path) -> None:
    """Write a checkpoint: the actor as a Hugging Face folder, and all that resuming needs."""
    folder = begin(stage_dir, state.step)
    wait_all(*[group.save(str(folder)) for group in roles.trained])
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


def go_back(
    cfg: PPOConfig,
    roles: Roles,
    stage_dir: Path,
    settings_from: Callable[[Path | None], Mapping[Role, RoleSettings]],
) -> State:
    """Start the trained roles again from the newest checkpoint, or from the start models.

    Returns the state to go on from. `settings_from(checkpoint)` is what the roles load. A rank
    that dies meanwhile is counted like any other, and all of them start once more.
    """
    while True:
        checkpoint = newest_checkpoint(stage_dir)
        state = restore(cfg, checkpoint)
        console.say(f"ppo: back to step {state.step}: {checkpoint or 'the start models'}")
        try:
            roles.renew_trained(settings_from(checkpoint))
        except LearnerLost:
            continue
        return state
