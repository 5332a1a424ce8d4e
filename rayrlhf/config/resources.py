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
    """GPUs per worker; above 1 only for `rollout` (tensor parallelism). With `layout: colocated` 1
    or more where the role is on the GPUs that are shared, whose parts are computed."""
    shares: Role | None = None
    """Worker i of this role is on the device of worker i of that one; together they ask for at most
    one GPU (`critic.gpus: 0.5`, `reward: {gpus: 0.5, shares: critic}`)."""
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
    layout: Literal["disaggregated", "colocated"] = "disaggregated"
    """PPO's roles have devices of their own, or all share the same ones and take turns: the engine
    sleeps while others compute (vLLM's sleep mode, level 1; on CPU vLLM has none, and it keeps its
    memory), and the optimizer states of actor and critic are in host memory but for their turns."""
    rollout_gpu_memory: Annotated[float, Field(gt=0, le=1)] = 0.9
    """Part of a GPU's memory that an engine takes, weights and KV cache together. What the others
    keep beside it while it is awake (their weights, with `layout: colocated`) has to fit, too."""
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
            self._can_share(role, own)
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

    def _can_share(self, role: Role, own: RoleResources) -> None:
        key = f"resources.{role}"
        if self.layout == "colocated" and own.shares is not None:
            raise ValueError(
                f"{key}.shares={own.shares} has no effect with resources.layout=colocated, where "
                "all roles share: take it out"
            )
        if self.layout == "colocated" and own.gpus != int(own.gpus):
            raise ValueError(
                f"{key}.gpus={own.gpus:g} with resources.layout=colocated, which computes the "
                f"parts: set {key}.gpus=1"
            )
        if own.shares is None:
            return
        host = self.role(own.shares)
        if own.shares == role or host.shares is not None:
            raise ValueError(
                f"{key}.shares={own.shares}, which does not have devices of its own: name a role "
                "that has"
            )
        guests = [each for each in ROLES if self.role(each).shares == own.shares]
        gpus = host.gpus + sum(self.role(guest).gpus for guest in guests)
        if (own.gpus > 0) != (host.gpus > 0) or gpus > 1 + 1e-6:
            raise ValueError(
                f"{key}.shares={own.shares}: {', '.join([own.shares, *guests])} ask for {gpus:g} "
                "GPU together, and share one: set parts such as gpus=0.5 for each of them"
            )

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

    def bundles(self, stage: str) -> list[dict[str, float]]:
        """Return what a stage but PPO asks of the cluster: a bundle of CPU and GPU per worker."""
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
