"""What the controller remembers from step to step, and its checkpoints."""

import json
import os
from collections.abc import Callable, Mapping
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from rayrlhf import console
from rayrlhf.algorithms.kl import KLController, make_kl_controller
from rayrlhf.config import PPOConfig, Role
from rayrlhf.rl.budget import KLBudget, OverBudget, Rollback
from rayrlhf.rl.placement import Roles
from rayrlhf.rl.ranks import RoleSettings
from rayrlhf.rl.supervision import GoBack, LearnerLost
from rayrlhf.rl.waiting import wait_all
from rayrlhf.training.checkpoint import (
    STATE_DIR,
    begin,
    commit,
    newest_checkpoint,
    place_of,
    remove,
    step_of,
)

CONTROLLER = "controller.json"
"""The controller's part of a checkpoint's training state."""


@dataclass
class State:
    """What changes from step to step, beside the weights."""

    step: int
    """Steps that are done."""
    version: int
    """Version of the actor's weights: how many steps have updated them."""
    kl: KLController
    budget: KLBudget


def save(cfg: PPOConfig, roles: Roles, state: State, stage_dir: Path) -> None:
    """Write a checkpoint: the actor as a Hugging Face folder, and all that resuming needs."""
    folder = begin(stage_dir, state.step)
    wait_all(*[group.save(str(folder)) for group in roles.trained])
    controller = {
        "step": state.step,
        "version": state.version,
        "kl_coef": state.kl.coef,
        "kl_budget": state.budget.state,
    }
    (folder / STATE_DIR / CONTROLLER).write_text(json.dumps(controller), encoding="utf-8")
    commit(folder, keep=cfg.keep_checkpoints, best=state.budget.good_step)


def restore(cfg: PPOConfig, checkpoint: Path | None, rollback: Rollback | None = None) -> State:
    """Return the state in `checkpoint`, or that of a fresh run; prompts follow from the step.

    `rollback` is the one that went there after it was written. A coefficient without a target is
    the recipe's, times what each rollback so far has made of it, whatever it was before.
    """
    kl = make_kl_controller(cfg.kl_coef, cfg.kl_target, cfg.kl_horizon)
    state = State(step=0, version=0, kl=kl, budget=KLBudget(cfg))
    if checkpoint is not None:
        saved = _controller(checkpoint)
        state.step, state.version, kl.coef = saved["step"], saved["version"], saved["kl_coef"]
        state.budget = KLBudget(cfg, **saved.get("kl_budget", {}))
    if rollback is not None:
        kl.coef = rollback.kl_coef
        state.budget.rollbacks, state.budget.count = rollback.number, rollback.count
    if cfg.kl_target is None:
        kl.coef = cfg.kl_coef * cfg.kl.coef_factor**state.budget.rollbacks
    return state


def resume_point(stage_dir: Path) -> tuple[Path | None, Rollback | None]:
    """Return the checkpoint to go on from, and the rollback that went there after it was written.

    A rollback leaves checkpoints behind that are newer than where it went; they are removed here.
    """
    place = _rollback_place(stage_dir)
    last = Rollback(**json.loads(place.read_text(encoding="utf-8"))) if place.exists() else None
    while (checkpoint := newest_checkpoint(stage_dir)) is not None:
        if last is None or _controller(checkpoint)["kl_budget"]["rollbacks"] == last.number:
            return checkpoint, None
        if step_of(checkpoint) <= last.step:
            break
        remove(checkpoint)
    return checkpoint, last


def go_back(
    cfg: PPOConfig,
    roles: Roles,
    stage_dir: Path,
    settings_from: Callable[[Path | None], Mapping[Role, RoleSettings]],
    why: GoBack,
) -> State:
    """Start the trained roles again from the checkpoint to go on from, or from the start models.

    Returns the state to go on from. `settings_from(checkpoint)` is what the roles load. A rank
    that dies meanwhile is counted like any other, and all of them start once more.
    """
    if isinstance(why, OverBudget):
        _remember(stage_dir, why.rollback)
    while True:
        checkpoint, rollback = resume_point(stage_dir)
        state = restore(cfg, checkpoint, rollback)
        console.say(f"ppo: back to step {state.step}: {checkpoint or 'the start models'}")
        try:
            roles.renew_trained(settings_from(checkpoint))
        except LearnerLost:
            continue
        return state


def _controller(checkpoint: Path) -> dict[str, Any]:
    """Return what the controller wrote into a checkpoint."""
    path = checkpoint / STATE_DIR / CONTROLLER
    saved: dict[str, Any] = json.loads(path.read_text(encoding="utf-8"))
    return saved


def _rollback_place(stage_dir: Path) -> Path:
    """Return the file of the last rollback: beside the checkpoints, and removed with them."""
    return place_of(stage_dir, 0).with_name("kl_rollback.json")


def _remember(stage_dir: Path, rollback: Rollback) -> None:
    """Let every later start of the run know: the checkpoint it goes back to was written before."""
    place = _rollback_place(stage_dir)
    place.parent.mkdir(parents=True, exist_ok=True)
    tmp = place.with_suffix(".writing")
    with tmp.open("w", encoding="utf-8") as file:
        json.dump(asdict(rollback), file)
        file.flush()
        os.fsync(file.fileno())
    tmp.replace(place)
