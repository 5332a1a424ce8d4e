"""Seconds per phase of a PPO step and per step of a training stage, tokens per second, and money.

    rollout   prefill at the forward rate; then one token of every running response at a time: the
              weights and the running keys and values are read once a token (or the products take
              longer), and each token costs the engine a fixed time besides. Responses end one after
              the other, and waiting ones take their place (continuous batching).
    evaluate  a forward pass of actor, critic, reference and reward over all tokens
    update    forward, backward, optimizer; a graph kept by evaluate saves its forward
    sync      the weights out of the actor, through Ray's store, into the engines

A pass takes its model FLOPs (2 a matrix entry and token forward, 4 backward, 2 more with gradient
checkpointing; attention over half of the sequence) over an achieved rate, or its communication
where that is longer: shards are gathered for a forward and again for a backward pass, gradients
are reduced once. Passes of different roles add up where they share a device, as cores of a CPU do.
"""

import heapq
from collections.abc import Mapping
from dataclasses import dataclass, replace

from rayrlhf.config import ROLES, PPOConfig, Recipe, Role, TrainingConfig
from rayrlhf.planning.devices import Cluster, Device
from rayrlhf.planning.lengths import Lengths
from rayrlhf.planning.memory import precision_of, width
from rayrlhf.planning.needs import Need
from rayrlhf.planning.shapes import Shape

LARGE_BATCH_FROM = 70 * 2**30
"""Bytes of a GPU from which on vLLM runs 1,024 sequences at a time, but on an A100; else 256."""
OVERLAP = 0.9
"""Part of the shorter of computation and communication that is hidden behind the longer."""
PADDED = 1.05
"""Tokens with padding over those without."""


@dataclass(frozen=True)
class Rates:
    """What one device achieves; of a CPU, one core."""

    train: float
    """FLOP/s of forward and backward, in the precision that they compute in; so the next."""
    forward: float
    bandwidth: float
    """Bytes/s of memory."""
    token_s: float
    """Fixed seconds of an engine's step, in which every running response gains a token."""
    response_s: float
    """Seconds of such a step for each running response."""
    layer_s: float
    """Fixed seconds of a layer's forward pass over a micro-batch; the backward takes twice that."""
    sync_s: float
    """Fixed seconds of bringing weights to the engines."""
    sync_bandwidth: float
    """Bytes/s of the way through Ray's object store into an engine."""
    call_s: float
    """Seconds of a phase that no role computes in: Ray, and the controller."""
    source: str


def rates_of(device: Device, precision: str) -> Rates:
    """Return what `device` is expected to achieve; `probe` measures it in place of this.

    GPUs: 42% of the peak in training and 50% forward, between the 59% of a measured matmul that
    tests/benchmarks/utilization.py found compiled on an H200 (46% of the peak) and the 39% of small
    layers; 70% of the bandwidth, as vLLM's paged attention reaches; 6 ms for the engine's host
    work. CPU: per core, measured on the EPYC of the README.
    """
    if device.is_gpu:
        peak = device.float32 if precision == "float32" else device.bfloat16
        return Rates(
            train=0.42 * peak,
            forward=0.5 * peak,
            bandwidth=0.7 * device.bandwidth,
            token_s=6e-3,
            response_s=1e-5,
            layer_s=2e-4,
            sync_s=0.5,
            sync_bandwidth=2e9,
            call_s=0.05,
            source="the table of devices",
        )
    return Rates(
        train=0.55 * device.float32,
        forward=0.6 * device.float32,
        bandwidth=device.bandwidth,
        token_s=4e-3,
        response_s=1e-4,
        layer_s=1e-3,
        sync_s=0.03,
        sync_bandwidth=1.2e9,
        call_s=0.02,
        source="the table of devices",
    )


@dataclass(frozen=True)
class StepTime:
    """A step, in seconds."""

    phases: Mapping[str, float]
    """rollout, evaluate, update, sync of PPO; of a stage its one phase."""
    roles: Mapping[str, float]
    """Seconds that each role computes by itself, by `phase role`."""
    tokens: float
    """Tokens of the step: prompts and responses, or what is trained on."""
    overlaps: bool = False
    """Whether rollouts run beside the learner (ppo.max_staleness)."""

    @property
    def seconds(self) -> float:
        """Of the whole step."""
        parts = dict(self.phases)
        if not self.overlaps:
            return sum(parts.values())
        rollout = parts.pop("rollout")
        return parts.pop("sync") + max(rollout, sum(parts.values()))

    @property
    def tokens_per_s(self) -> float:
        """Of the whole cluster."""
        return self.tokens / self.seconds

    def cost(self, cluster: Cluster) -> float:
        """Return US dollars for a million tokens."""
        return cluster.price / 3600 * self.seconds / self.tokens * 1e6

    @property
    def bottleneck(self) -> str:
        """The phase that takes the longest, and the role that it waits for."""
        phase = max(self.phases, key=lambda name: self.phases[name])
        own = {key: s for key, s in self.roles.items() if key.startswith(f"{phase} ")}
        if not own:
            return phase
        return f"{phase} ({max(own, key=lambda key: own[key]).partition(' ')[2]})"


@dataclass(frozen=True)
class _Step:
    """What the phases of a PPO step are computed from."""

    recipe: Recipe
    cluster: Cluster
    found: Lengths
    measured: Rates | None

    @property
    def cfg(self) -> PPOConfig:
        assert self.recipe.ppo is not None
        return self.recipe.ppo

    def training(self, need: Need) -> TrainingConfig:
        """Return the settings that a role computes by."""
        return self.cfg.actor if need.name in ("actor", "reference") else self.cfg.critic

    def rates(self, need: Need) -> Rates:
        """Return what the device of a role achieves, with the threads that it has there."""
        own = self.measured or rates_of(need.device, self.cfg.actor.precision)
        threads = 1 if need.device.is_gpu else self.recipe.resources.role(_role(need)).num_threads
        return replace(own, train=own.train * threads, forward=own.forward * threads)


def forward_flops(shape: Shape, tokens: float, length: float, outputs: float) -> float:
    """Return the FLOPs of a forward pass over `tokens` in sequences of `length`."""
    matrices = 2 * shape.num_layers * shape.layer_matrices * tokens
    attention = 2 * shape.num_layers * shape.attention_width * length * tokens
    return matrices + attention + 2 * shape.embedding_params * outputs


def decode_s(need: Need, responses: list[int], prompt: float, rates: Rates, b: int) -> float:
    """Return the seconds in which an engine of `need.width` devices samples `responses`.

    A response takes a place as soon as there is one: at most as many run as the engine allows and
    as its cache holds.
    """
    shape = need.shape
    at_once = engine_batch(need, prompt + sum(responses) / len(responses), b)
    speed = rates.bandwidth * need.width
    weights = b * (shape.num_params - (0 if shape.tied else shape.embedding_params))
    kv = shape.kv_bytes_per_token(b)
    flops = forward_flops(shape, 1, 0, 1)
    # Two all-reduces a layer, whose latency no bandwidth hides.
    fixed = rates.token_s + (need.width > 1) * 2 * shape.num_layers * 1.5e-5
    waiting = sorted(responses)  # the longest are last to be taken
    running: list[int] = []
    now, held, seconds = 0, 0.0, 0.0
    while waiting or running:
        while waiting and len(running) < at_once:
            heapq.heappush(running, now + waiting.pop())
            held += prompt
        ends = running[0]
        steps, active = ends - now, len(running)
        context = held + active * steps / 2
        read = (weights + kv * context) / speed
        computed = active * flops / (rates.forward * need.width)
        seconds += steps * (fixed + active * rates.response_s + max(read, computed))
        held += active * steps
        now = ends
        while running and running[0] == now:
            heapq.heappop(running)
            held -= held / (len(running) + 1)
    return seconds


def lone_token_s(need: Need, rates: Rates, b: int) -> float:
    """Return the seconds of a token of an engine that has one response left."""
    return decode_s(need, [2], 0.0, rates, b) / 2


def engine_batch(need: Need, tokens: float, b: int) -> int:
    """Return how many responses of `tokens` each an engine runs at a time."""
    device = need.device
    large = device.memory >= LARGE_BATCH_FROM and device.name != "A100"
    most = 1024 if large else 256
    room = need.memory.cache * need.width / (need.shape.kv_bytes_per_token(b) * tokens)
    return max(1, min(most, int(room)))


def ppo_step(
    recipe: Recipe,
    cluster: Cluster,
    needs: Mapping[Role, Need],
    found: Lengths,
    rates: Rates | None = None,
) -> StepTime:
    """Return the time of a PPO step; `rates` None takes those of the table."""
    step = _Step(recipe, cluster, found, rates)
    cfg = step.cfg
    roles: dict[str, float] = {}
    for role, need in needs.items():
        if role == "rollout":
            roles["rollout rollout"] = _rollout_s(step, need)
            continue
        if role != "actor" or cfg.old_log_probs != "rollout":
            roles[f"evaluate {role}"] = _pass_s(step, need)
        if role in ("actor", "critic"):
            roles[f"update {role}"] = _update_s(step, need)
    engine = step.rates(needs["rollout"])
    phases = {}
    for phase in ("rollout", "evaluate", "update"):
        own = {role: roles[f"{phase} {role}"] for role in needs if f"{phase} {role}" in roles}
        phases[phase] = engine.call_s + _together(step, needs, own)
    b = 2 if cfg.actor.precision == "bfloat16" else 4
    sent = b * needs["actor"].shape.num_params
    phases["sync"] = engine.sync_s + sent / engine.sync_bandwidth
    return StepTime(phases, roles, cfg.num_responses * found.total, overlaps=cfg.max_staleness > 0)


def stage_step(
    recipe: Recipe, stage: str, need: Need, cluster: Cluster, rates: Rates | None = None
) -> StepTime:
    """Return the time of an optimizer step of a training stage."""
    cfg = recipe.training(stage)
    assert cfg is not None
    own = rates or rates_of(need.device, precision_of(cfg, need.device))
    ranks = need.num_workers
    mine = PADDED * need.tokens / ranks
    # Half of the longest is a guess at records; the rows of a corpus are full.
    length = min(cfg.tokens_per_microbatch, recipe.model.max_length) / (2 - (stage == "pretrain"))
    forward = forward_flops(need.shape, mine, length, 0.0 if stage == "reward" else mine)
    factor = (2 if cfg.lora else 3) + cfg.gradient_checkpointing
    threads = recipe.resources.num_threads if not need.device.is_gpu else 1
    compute = factor * forward / (own.train * threads)
    compute += 3 * need.micros * need.shape.num_layers * own.layer_s
    comm = _comm_s(need, cluster, cfg, need.micros, updates=1)
    seconds = _overlapped(compute, comm) + _optimizer_s(need, cfg, own)
    if not need.device.is_gpu:
        cores = cluster.num_nodes * cluster.num_cpus
        seconds = max(seconds, seconds * ranks * threads / cores)
    phase = f"step {stage}"
    return StepTime({"step": seconds + own.call_s}, {phase: seconds}, need.tokens)


def _rollout_s(step: _Step, need: Need) -> float:
    cfg, found, own = step.cfg, step.found, step.rates(need)
    count = -(-cfg.num_responses // need.num_workers)
    b = 2 if cfg.actor.precision == "bfloat16" else 4
    # The cache keeps a prompt that others of its group have read.
    prompts = count / cfg.samples_per_prompt * found.prompt
    prefill = forward_flops(need.shape, prompts, found.prompt, 0) / (own.forward * need.width)
    return prefill + decode_s(need, found.responses(count), found.prompt, own, b)


def _pass_s(step: _Step, need: Need) -> float:
    """Return the seconds of a role's forward pass over all tokens of a step."""
    found, own, training = step.found, step.rates(need), step.training(need)
    mine = PADDED * need.tokens / need.num_workers
    outputs = 0.0 if need.name in ("critic", "reward") else mine * found.response / found.total
    by_tokens = -(-round(need.tokens / need.num_workers) // training.tokens_per_microbatch)
    micros = max(1, by_tokens)
    if need.name != "reward":  # which knows no minibatches
        micros = max(by_tokens, step.cfg.num_minibatches * need.micros)
    compute = forward_flops(need.shape, mine, found.total, outputs) / own.forward
    compute += micros * need.shape.num_layers * own.layer_s
    if need.name in ("reference", "reward"):
        return compute
    comm = _comm_s(need, step.cluster, training, micros, updates=0)
    return _overlapped(compute, comm)


def _update_s(step: _Step, need: Need) -> float:
    """Return the seconds of a trained role's update: forward, backward, optimizer."""
    cfg, found, own, training = step.cfg, step.found, step.rates(need), step.training(need)
    mine = PADDED * cfg.epochs * need.tokens / need.num_workers
    outputs = 0.0 if need.name == "critic" else mine * found.response / found.total
    updates = cfg.epochs * cfg.num_minibatches
    micros = updates * need.micros
    evaluated = need.name == "critic" or cfg.old_log_probs != "rollout"
    factor = (2 if cfg.lora_of(need.name) else 3) + training.gradient_checkpointing
    compute = (factor - evaluated / micros) * (
        forward_flops(need.shape, mine, found.total, outputs) / own.train
    )
    compute += 3 * micros * need.shape.num_layers * own.layer_s
    corpus = step.recipe.corpus
    if need.name == "actor" and cfg.ptx_coef > 0 and corpus is not None:
        rows = updates * cfg.ptx_batch_size * corpus.row_length / need.num_workers
        compute += factor * forward_flops(need.shape, rows, corpus.row_length, rows) / own.train
    comm = _comm_s(need, step.cluster, training, micros, updates=updates)
    return _overlapped(compute, comm) + updates * _optimizer_s(need, training, own)


def _comm_s(
    need: Need,
    cluster: Cluster,
    cfg: TrainingConfig,
    micros: int,
    *,
    updates: int,
) -> float:
    """Return the seconds of communication of `micros` micro-batches.

    `updates` of the optimizer belong to them; 0 is a forward pass alone.
    """
    backward = updates > 0
    ranks, count = need.num_workers, need.shape.num_params
    if ranks == 1:
        return 0.0
    device = need.device
    speed = device.link
    if ranks > cluster.per_node:
        # A ring goes through every adapter of a node at the same time, and through its links.
        speed = min(speed, cluster.per_node * device.network)
    speed *= 0.7
    part = (ranks - 1) / ranks
    b = width(precision_of(cfg, device))
    gathered = reduced = 0.0
    if cfg.backend == "fsdp" or cfg.zero_stage == 3:
        gathered = b * count * micros * (1 + backward)
    if cfg.backend == "fsdp":
        reduced = 4.0 * count * updates
    elif cfg.zero_stage >= 2:
        reduced = float(b) * count * micros * backward
    else:
        reduced = 2 * 4.0 * count * updates
    if 0 < cfg.zero_stage < 3:
        gathered = float(b) * count * updates
    return part * (gathered + reduced) / speed


def _optimizer_s(need: Need, cfg: TrainingConfig, rates: Rates) -> float:
    """Return the seconds of clipping and AdamW: 36 bytes a parameter of the rank."""
    shards = cfg.backend == "fsdp" or cfg.zero_stage > 0
    memory = need.memory
    learned = (memory.moments or 8 * need.shape.num_params / need.num_workers) / 8
    if not need.device.is_gpu or cfg.offload == "none":
        return 36 * learned / rates.bandwidth
    away = need.shape.num_params / (need.num_workers if shards else 1)
    # Gradients go to the host and weights come back; the host's cores share its bandwidth.
    return away * (6 / need.device.host_link + 36 / 2e10)


def _overlapped(compute: float, comm: float) -> float:
    return max(compute, comm) + (1 - OVERLAP) * min(compute, comm)


def _together(step: _Step, needs: Mapping[Role, Need], own: Mapping[Role, float]) -> float:
    """Return the seconds of a phase in which these roles compute."""
    resources = step.recipe.resources
    on_gpu = {role: s for role, s in own.items() if needs[role].device.is_gpu}
    on_cpu = {role: s for role, s in own.items() if role not in on_gpu}
    seconds = [0.0]
    if resources.layout == "colocated":
        seconds.append(sum(on_gpu.values()))
    else:
        groups: dict[Role, float] = {}
        for role, each in on_gpu.items():
            host = resources.role(role).shares or role
            groups[host] = groups.get(host, 0.0) + each
        seconds += groups.values()
    if on_cpu:
        busy = sum(
            s * needs[role].num_workers * resources.role(role).num_threads
            for role, s in on_cpu.items()
        )
        seconds += [max(on_cpu.values()), busy / (step.cluster.num_nodes * step.cluster.num_cpus)]
    return max(seconds)


def _role(need: Need) -> Role:
    return next(role for role in ROLES if role == need.name)
