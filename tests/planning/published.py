"""Step times that others published, with model, hardware and lengths, as recipes of this project.

NeMo RL 0.4, docs/about/performance-summary.md (GRPO on H100, bfloat16): total step time, responses
of a step (G-GBS) and their mean length with the prompt (G-Average Seq len), read on GitHub at
commit 06beed91. Its prompts are OpenMathInstruct-2's; 100 tokens are assumed. It trains with
Megatron's tensor and pipeline parallelism, here with FSDP on as many GPUs.

DeepSpeed-Chat, blogs/deepspeed-chat/README.md (PPO of OPT on A100 80 GB, reward model of 350M;
read at commit 040679e5): hours for 67.5M prompt and 67.5M response tokens, in steps of 1,024
prompts of 256 and responses of 256 tokens. Its text says 131.9k prompts, half of what 67.5M tokens
are; the page of its settings (DeepSpeedExamples, BenckmarkSetting.md) says 264,292, which fits: 258
steps. Left out are its figures of 64 GPUs for 30B and 66B, which plan takes for twice as fast: they
are of LoRA, says the paper of trlX (table 3), and its rank is not stated.

Neither sends weights through Ray's store: those of the engine are the learner's own, on the same
GPUs, so a second stands for the way.
"""

from dataclasses import dataclass, replace
from typing import Any

from rayrlhf.config import Recipe, parse
from rayrlhf.planning import memory
from rayrlhf.planning.devices import DEVICES, Cluster, parse_cluster
from rayrlhf.planning.lengths import Lengths
from rayrlhf.planning.memory import Work
from rayrlhf.planning.needs import Need
from rayrlhf.planning.shapes import KNOWN, Shape
from rayrlhf.planning.speed import StepTime, ppo_step, rates_of


def opt(name: str, width: int, layers: int, heads: int) -> Shape:
    return Shape(
        name,
        width,
        layers,
        heads,
        heads,
        width // heads,
        4 * width,
        50272,
        tied=True,
        gated=False,
        num_positions=2050,
    )


OPT = {
    "350m": opt("opt-350m", 1024, 24, 16),
    "6.7b": opt("opt-6.7b", 4096, 32, 32),
    "13b": opt("opt-13b", 5120, 40, 40),
    "30b": opt("opt-30b", 7168, 48, 56),
    "66b": opt("opt-66b", 9216, 64, 72),
}
STEPS_OF_DSCHAT = 264_292 / 1024


@dataclass(frozen=True)
class Figure:
    """A published step time, in seconds, and what it was measured with."""

    name: str
    seconds: float
    shape: Shape
    cluster: str
    responses: int
    prompt: float
    response: float
    longest: int
    parallel: int
    """GPUs of an engine."""
    critic: Shape | None = None
    minibatches: int = 1
    staleness: int = 0
    learners: int = 0
    """GPUs of the learner where the engines have others; 0: all GPUs are shared."""

    @property
    def gpus(self) -> Cluster:
        return parse_cluster(self.cluster)


FIGURES = (
    Figure(
        "NeMo RL, Llama 3.1 8B, 16 H100", 97.7, KNOWN["llama-3.1-8b"], "2x8xH100",
        2048, 100, 960, 3996, 1, minibatches=4,
    ),
    Figure(
        "NeMo RL, Qwen3 32B, 32 H100", 393.0, KNOWN["qwen3-32b"], "4x8xH100",
        2048, 100, 3106, 3996, 4, minibatches=4,
    ),
    *(
        Figure(
            f"DeepSpeed-Chat, OPT {size}, {cluster}", 3600 * time / STEPS_OF_DSCHAT, OPT[size],
            cluster, 1024, 256, 256, 256, 1 if size in ("6.7b", "13b") else 8, critic=OPT["350m"],
        )
        for size, cluster, time in (
            ("6.7b", "1x8xA100", 4.1),
            ("13b", "1x8xA100", 9.0),
            ("30b", "1x8xA100", 18.0),
            ("13b", "8x8xA100", 1.25),
        )
    ),
)  # fmt: skip


def recipe_of(figure: Figure) -> Recipe:
    """Return a recipe with the layout of the figure: all roles take turns on all GPUs."""
    gpus = figure.gpus.num_devices
    trained = {
        "precision": "bfloat16",
        "backend": "fsdp",
        "gradient_checkpointing": True,
        "tokens_per_microbatch": 8192,
    }
    every = {"num_workers": gpus, "gpus": 1}
    tree: dict[str, Any] = {
        "name": "published",
        "tokenizer": {"path": "tokenizer"},
        "model": {"path": figure.shape.name, "max_length": figure.longest + 256},
        "ppo": {
            "prompts": "prompts.jsonl",
            "batch_size": figure.responses,
            "max_response_tokens": figure.longest,
            "num_minibatches": figure.minibatches,
            "actor": trained,
            "critic": trained,
            "rewards": [{"function": "rewards.py:score"}],
        },
        "resources": {
            "layout": "colocated",
            **dict.fromkeys(("actor", "critic", "reference", "reward"), every),
            "rollout": {"num_workers": gpus // figure.parallel, "gpus": figure.parallel},
        },
    }
    if figure.critic is None:
        tree["ppo"] |= {"advantage_estimator": "reinforce_pp"}
        del tree["ppo"]["critic"]
    return parse(tree)


def predicted(figure: Figure) -> StepTime:
    """Return what `plan` says of a step."""
    recipe, cluster = recipe_of(figure), figure.gpus
    cfg = recipe.ppo
    assert cfg is not None
    found = Lengths(figure.prompt, figure.response, figure.longest, "published")
    tokens = figure.responses * found.total
    gpu = DEVICES[cluster.device.name]
    needs = {}
    for role in recipe.roles:
        shape = figure.shape
        if role in ("critic", "reward"):
            if figure.critic is None:
                continue
            shape = figure.critic
        workers = recipe.resources.role(role)
        held = memory.Memory()
        if role in ("actor", "critic"):
            work = Work(cluster.num_devices, 8192, 8192, 4, gpu, scalar=role == "critic")
            held = memory.trained(shape, cfg.actor, work)
        if role == "rollout":
            held = memory.engine_on_gpu(shape, cfg.actor, gpu, figure.parallel, 0.8)
        micros = max(1, round(tokens / cluster.num_devices / figure.minibatches / 8192))
        needs[role] = Need(
            role, shape, workers.num_workers, figure.parallel if role == "rollout" else 1, gpu,
            held, tokens, micros,
        )  # fmt: skip
    rates = rates_of(gpu, "bfloat16")
    rates = replace(rates, sync_s=1.0, sync_bandwidth=1e15)
    return ppo_step(recipe, cluster, needs, found, rates)
