"""What each role and stage of a recipe needs: its work at a time, and the memory for it."""

from dataclasses import dataclass

from rayrlhf.config import Recipe, Role, TrainingConfig
from rayrlhf.data.packing import microbatches
from rayrlhf.planning import lengths, memory, shapes
from rayrlhf.planning.devices import CPU, DEVICES, Device
from rayrlhf.planning.lengths import Lengths
from rayrlhf.planning.memory import MIN_FILL, Memory, Work
from rayrlhf.planning.shapes import Shape


@dataclass(frozen=True)
class Need:
    """A role of PPO or a training stage: how many processes it has, and what each of them holds."""

    name: str
    shape: Shape
    num_workers: int
    """Ranks, or engines."""
    width: int
    """Devices of each: above 1 for an engine with tensor parallelism."""
    device: Device
    memory: Memory
    """Of one device."""
    tokens: float
    """Of a step, prompts included."""
    micros: int = 1
    """Micro-batches of an optimizer step on a rank."""

    @property
    def imports(self) -> float:
        """Bytes of the host's memory that the libraries of a process take."""
        return memory.ENGINE_IMPORTS if self.name == "rollout" else memory.CPU_IMPORTS


def of_ppo(recipe: Recipe, device: Device) -> tuple[dict[Role, Need], Lengths]:
    """Return the needs of PPO's roles on a cluster of `device`, and the lengths behind them."""
    cfg, resources = recipe.ppo, recipe.resources
    assert cfg is not None
    policy = shapes.policy(recipe)
    found = lengths.of_ppo(recipe, policy.vocab_size)
    tokens = cfg.num_responses * found.total
    needs: dict[Role, Need] = {}
    for role in recipe.roles:
        own = resources.role(role)
        on = device if own.gpus else DEVICES[CPU]
        width = max(1, int(own.gpus))
        micros = 1
        if role in ("actor", "critic"):
            shape = policy if role == "actor" else shapes.critic(recipe)
            training = cfg.actor if role == "actor" else cfg.critic
            work = _trained_work(recipe, role, training, found, on)
            held, micros = memory.trained(shape, training, work), work.micros
        elif role == "rollout":
            shape = policy
            if on.is_gpu:
                part = resources.rollout_gpu_memory
                held = memory.engine_on_gpu(shape, cfg.actor, on, width, part)
            else:
                held = memory.engine_on_cpu(shape, cfg.actor, cfg.rollout_memory_gib)
        else:
            training = cfg.actor if role == "reference" else cfg.critic
            models = (policy,) if role == "reference" else shapes.scorers(recipe)
            shape = max(models, key=lambda each: each.num_params, default=policy)
            work = _inference_work(recipe, role, training, found, on)
            held = memory.inference(models, training, work)
        needs[role] = Need(role, shape, own.num_workers, width, on, held, tokens, micros)
    return needs, found


def _trained_work(
    recipe: Recipe, role: Role, training: TrainingConfig, found: Lengths, device: Device
) -> Work:
    cfg = recipe.ppo
    assert cfg is not None
    ranks = recipe.resources.role(role).num_workers
    rows = max(1, cfg.minibatch_size // ranks)
    budget = training.tokens_per_microbatch
    padded = _padded(found, rows, budget)
    if training.backend == "fsdp" or training.zero_stage == 3:
        tokens = max(padded)  # one graph is kept, see rl/ranks.py
    else:
        tokens = min(budget, sum(padded))
    # One long response fills a micro-batch by itself.
    tokens = max(tokens, round(found.prompt) + found.longest_response)
    outputs = tokens * found.response / found.total
    if role == "actor" and cfg.ptx_coef > 0 and recipe.corpus is not None:
        ptx = min(budget, cfg.ptx_batch_size * recipe.corpus.row_length // ranks)
        tokens, outputs = max(tokens, ptx), max(outputs, ptx)
    return Work(
        ranks,
        tokens,
        outputs,
        len(padded) * (2 if role == "actor" and cfg.ptx_coef > 0 else 1),
        device,
        scalar=role == "critic",
        lora=cfg.lora_of(role),
    )


def _padded(found: Lengths, rows: int, budget: int) -> list[int]:
    """Return the tokens, padding included, of the micro-batches that `rows` responses make."""
    totals = [round(found.prompt) + response for response in found.responses(rows)]
    groups = microbatches(totals, budget, min_fill=MIN_FILL)
    return [len(group) * totals[group[0]] for group in groups]


def _inference_work(
    recipe: Recipe, role: Role, training: TrainingConfig, found: Lengths, device: Device
) -> Work:
    cfg = recipe.ppo
    assert cfg is not None
    resources = recipe.resources
    if role == "reference":  # on the micro-batches of the actor
        rows = max(1, cfg.minibatch_size // resources.actor.num_workers)
    else:
        rows = -(-cfg.num_responses // resources.reward.num_workers)
    longest = round(found.prompt) + found.longest_response
    tokens = max(*_padded(found, rows, training.tokens_per_microbatch), longest)
    outputs = tokens * found.response / found.total
    return Work(1, tokens, outputs, 1, device, scalar=role == "reward")


def of_stages(recipe: Recipe, device: Device) -> dict[str, Need]:
    """Return the needs of the stages that Ray Train runs, by their names."""
    resources = recipe.resources
    on = device if resources.gpus_per_worker else DEVICES[CPU]
    ranks = max(1, resources.num_workers // resources.sequence_parallel)
    needs = {}
    for stage in recipe.stages:
        cfg = recipe.training(stage)
        if cfg is None:
            continue
        shape = shapes.of_stage(recipe, stage)
        tokens = step_tokens(recipe, stage, shape)
        mine = tokens / ranks
        budget = cfg.tokens_per_microbatch
        micros = max(1, -(-round(mine) // budget))
        largest = min(budget, mine)
        if stage in ("reward", "dpo"):  # a comparison is never cut
            largest = max(largest, tokens / cfg.batch_size)
        work = Work(
            resources.num_workers,
            largest,
            largest,
            micros,
            on,
            scalar=stage == "reward",
            lora=cfg.lora,
            quantized=cfg.quantization == "nf4",
            split=resources.sequence_parallel,
        )
        held = memory.trained(shape, cfg, work)
        needs[stage] = Need(stage, shape, resources.num_workers, 1, on, held, tokens, micros)
    return needs


def step_tokens(recipe: Recipe, stage: str, shape: Shape) -> float:
    """Return the tokens of an optimizer step of a training stage, over all ranks."""
    cfg = recipe.training(stage)
    assert cfg is not None
    if stage == "pretrain":
        row = recipe.corpus.row_length if recipe.corpus else recipe.model.max_length
        return float(cfg.batch_size * row)
    path = train_file(recipe, stage)
    mean, _, _ = lengths.of_records(recipe, path, shape.vocab_size)
    per_record = lengths.responses_per_comparison(path) if stage in ("reward", "dpo") else 1.0
    return cfg.batch_size * per_record * mean


def train_file(recipe: Recipe, stage: str) -> str:
    """Return the records that sft, reward or dpo trains on."""
    section = {"sft": recipe.sft, "reward": recipe.reward, "dpo": recipe.dpo}[stage]
    assert section is not None
    return section.train
