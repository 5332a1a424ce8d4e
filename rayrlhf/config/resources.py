"""Workers, devices and where they are placed."""

from typing import Annotated, Literal, Self

from pydantic import Field, model_validator

from rayrlhf.config.section import NonNegative, Positive, PositiveFloat, RecipeError, Section

Role = Literal["actor", "critic", "reference", "reward", "rollout"]
ROLES: tuple[Role, ...] = ("actor", "critic", "reference", "reward", "rollout")
TRAINED_STAGES = ("pretrain", "sft", "reward", "dpo")


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
    """Ray Train workers of `pretrain`, `sft`, `reward` and `dpo` (data-parallel ranks)."""
    cpus_per_worker: PositiveFloat = 1
    """Logical CPUs of each Ray Train worker."""
    gpus_per_worker: NonNegative = 0
    """GPUs of each Ray Train worker, at most 1: more ranks use more GPUs."""
    num_threads: Positive = 1
    """Threads of torch in each Ray Train worker."""
    sequence_parallel: Positive = 1
    """Ray Train workers that share each sequence (DeepSpeed Ulysses, arXiv:2309.14509): activations
    take 1/n of the memory. Divides num_workers and the heads of the model."""
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
        if self.num_workers % self.sequence_parallel:
            raise ValueError(
                f"resources.num_workers={self.num_workers} does not divide into groups of "
                f"resources.sequence_parallel={self.sequence_parallel} workers that share a "
                "sequence: change one of the two"
            )
        return self

    def check_heads(self, num_heads: int, num_kv_heads: int) -> None:
        """Raise RecipeError unless a model's attention can be split over `sequence_parallel`."""
        ranks = self.sequence_parallel
        if num_heads % ranks:
            raise RecipeError(
                f"resources.sequence_parallel={ranks}, but the model has {num_heads} attention "
                f"heads, which do not divide into as many parts: set it to one of "
                f"{_divisors(num_heads)}"
            )
        if num_kv_heads % ranks and ranks % num_kv_heads:
            raise RecipeError(
                f"resources.sequence_parallel={ranks}, but the model has {num_kv_heads} key-value "
                f"heads: of the two numbers one must be a multiple of the other: set it to one of "
                f"{_divisors(num_kv_heads)}"
            )

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

    def bundles(self, stage: str, roles: tuple[Role, ...] = ROLES) -> list[dict[str, float]]:
        """Return what `stage` asks of the cluster: one bundle of CPU and GPU per worker.

        `roles` are those that PPO runs.
        """
        if stage == "ppo":
            return [
                {"CPU": self.role(role).cpus, "GPU": self.role(role).gpus}
                for role in roles
                for _ in range(self.role(role).num_workers)
            ]
        if stage in TRAINED_STAGES:
            return [{"CPU": self.cpus_per_worker, "GPU": self.gpus_per_worker}] * self.num_workers
        return [{"CPU": 1.0}]


def _divisors(number: int) -> str:
    return ", ".join(str(each) for each in range(1, number + 1) if number % each == 0)


def _whole_beyond_one(key: str, gpus: float) -> None:
    if gpus > 1 and gpus != int(gpus):
        raise ValueError(
            f"{key}={gpus:g}: Ray shares out parts of one GPU, or whole ones: set {key}={int(gpus)}"
        )
