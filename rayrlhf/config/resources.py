"""Workers, devices and where they are placed."""

from typing import Annotated, Literal, Self

from pydantic import Field, model_validator

from rayrlhf.config.section import NonNegative, Positive, PositiveFloat, Section

Role = Literal["actor", "critic", "reference", "reward", "rollout"]
ROLES: tuple[Role, ...] = ("actor", "critic", "reference", "reward", "rollout")
TRAINED_STAGES = ("pretrain", "sft", "reward")


class RoleResources(Section):
    """What one PPO role gets."""

    num_workers: Positive = 1
    """Ray actors of the role: data-parallel ranks, or engines for `rollout`."""
    cpus: NonNegative = 0.25
    """Logical CPUs per worker; below 1 because the roles take turns."""
    gpus: NonNegative = 0
    """GPUs per worker; above 1 only for `rollout` (tensor parallelism)."""
    num_threads: Positive = 1
    """Threads of torch in each worker."""


class ResourcesConfig(Section):
    """Workers, devices and waiting time."""

    num_workers: Positive = 1
    """Ray Train workers of `pretrain`, `sft` and `reward` (data-parallel ranks)."""
    cpus_per_worker: PositiveFloat = 1
    """Logical CPUs of each Ray Train worker."""
    gpus_per_worker: NonNegative = 0
    """GPUs of each Ray Train worker, at most 1: more ranks use more GPUs."""
    num_threads: Positive = 1
    """Threads of torch in each Ray Train worker."""
    actor: RoleResources = RoleResources()
    critic: RoleResources = RoleResources()
    reference: RoleResources = RoleResources()
    reward: RoleResources = RoleResources()
    rollout: RoleResources = RoleResources()
    placement: Literal["PACK", "SPREAD", "STRICT_PACK", "STRICT_SPREAD"] = "PACK"
    """Strategy of the placement group that holds the PPO roles."""
    wait_s: NonNegative = 0
    """Seconds to wait for an autoscaler to bring what is missing; 0 fails at once."""
    max_restarts: Annotated[int, Field(ge=0)] = 3
    """How often Ray Train restarts its workers from the newest checkpoint after one died."""

    @model_validator(mode="after")
    def _workers_can_be_placed(self) -> Self:
        for role in ROLES:
            own = self.role(role)
            if own.cpus == 0:
                raise ValueError(
                    f"resources.{role}.cpus=0: Ray places a worker only where it holds something: "
                    f"set resources.{role}.cpus=0.01"
                )
            if own.gpus > 1 and role != "rollout":
                raise ValueError(
                    f"resources.{role}.gpus={own.gpus:g}: a worker of this role computes on one "
                    f"GPU: set resources.{role}.gpus=1 and raise resources.{role}.num_workers"
                )
            _whole_beyond_one(f"resources.{role}.gpus", own.gpus)
        if self.gpus_per_worker > 1:
            raise ValueError(
                f"resources.gpus_per_worker={self.gpus_per_worker:g}: a worker computes on one "
                "GPU: set resources.gpus_per_worker=1 and raise resources.num_workers"
            )
        return self

    def role(self, role: Role) -> RoleResources:
        """Return what `role` gets."""
        roles: dict[Role, RoleResources] = {
            "actor": self.actor,
            "critic": self.critic,
            "reference": self.reference,
            "reward": self.reward,
            "rollout": self.rollout,
        }
        return roles[role]

    def bundles(self, stage: str) -> list[dict[str, float]]:
        """Return what `stage` asks of the cluster: one bundle of CPU and GPU per worker."""
        if stage == "ppo":
            return [
                {"CPU": self.role(role).cpus, "GPU": self.role(role).gpus}
                for role in ROLES
                for _ in range(self.role(role).num_workers)
            ]
        if stage in TRAINED_STAGES:
            return [{"CPU": self.cpus_per_worker, "GPU": self.gpus_per_worker}] * self.num_workers
        return [{"CPU": 1.0}]


def _whole_beyond_one(key: str, gpus: float) -> None:
    if gpus > 1 and gpus != int(gpus):
        raise ValueError(
            f"{key}={gpus:g}: Ray shares out parts of one GPU, or whole ones: set {key}={int(gpus)}"
        )
