"""Bytes that a process of each role and stage holds, on its device and in the host's memory.

Of N parameters, T of them trained, over R ranks, in a forward of b = 4 (float32) or 2 bytes:

             weights            gradients             masters   moments  when it starts
    ddp, 0   4 N                4 T                   -         8 T      4 N
    fsdp     4 N / R            4 T / R, or 4 T       -         8 T / R  a layer
    zero 1   b N                4 T                   4 T / R   8 T / R  4 N
    zero 2   b N                4 T / R               4 T / R   8 T / R  4 N
    zero 3   b N / R            4 T / R               4 T / R   8 T / R  4 N

FSDP keeps gradients whole until the last micro-batch of an optimizer step (backend/fsdp.py), so
that they are in shards only where a step has a single one. DeepSpeed brings the whole model to
the device before it shards it (backend/deepspeed.py). Autocast (bfloat16 with ddp) adds copies of
the matrices in 2 bytes. Every rank reads all of a model in float32 into the host's memory.

Activations of a token and a layer of width d, attention a, keys k, feed-forward f are those that
autograd saves: (6 d + 2 a + 2 k + 4 f) entries, and 2 (a - k) where keys are repeated for padded
rows; bfloat16 norms keep 4 d bytes more, autocast 26 d bytes in place of the 6 d entries. With
gradient checkpointing it is d entries, and one layer at a time is whole. All of it is measured by
tests/planning/test_memory.py.
The output layer's logits are those of the tokens that it is asked for, up to LOGITS_BYTES.
"""

from dataclasses import dataclass, replace
from typing import Literal

from rayrlhf.config import LoraConfig, TrainingConfig
from rayrlhf.planning.devices import GIB, Device, has_bfloat16
from rayrlhf.planning.shapes import Shape

MIB = 2**20
LOGITS_BYTES = 2**29
"""Of models/output_head.py, which imports torch; so are the next two of rl/."""
BUCKET_BYTES = 2**28
MIN_FILL = 0.9
MARGIN = 1.1
"""Of what comes and goes on a GPU: the allocator's blocks do not fit it exactly."""
HEAP = 1.2
"""The same of activations on a CPU, whose allocator is glibc's: measured."""
CPU_PROCESS = 27 * MIB
"""Of a process with torch beyond its imports: kernels that are loaded and made at the first use."""
CPU_ENGINE = 70 * MIB
"""The same of an engine of vLLM."""
CPU_IMPORTS = 480 * MIB
"""Of torch, transformers and this package; measured, as is the next."""
ENGINE_IMPORTS = 640 * MIB
GPU_CONTEXT = 0.6 * GIB
"""CUDA's context and the kernels of torch and cuBLAS; 0.5 to 0.7 GiB on Hopper."""
NCCL = 0.4 * GIB
"""Buffers of a process group within and between nodes."""
ENGINE_RESERVE = 2.0 * GIB
"""vLLM's activations of the largest batch and its CUDA graphs, beside weights and cache."""
SAMPLED = 256
"""Rows of the engine's largest batch of logits (max_num_seqs)."""
LOGITS_COPIES = 3
"""Of such a batch in float32, while it is sampled from."""
REDUCE_BUCKET = 500_000_000
"""Entries of DeepSpeed's buckets of gradients; two of them where communication overlaps."""
MAX_LIVE = 1_000_000_000
"""Entries of ZeRO-3's weights that are whole at the same time (stage3_max_live_parameters)."""
NF4_BYTES = 0.516
"""Of a weight in 4 bits, with its doubly quantized scales (QLoRA: 0.127 bits more)."""

Precision = Literal["float32", "autocast", "bfloat16"]


@dataclass(frozen=True)
class Memory:
    """What one process holds, in bytes."""

    weights: float = 0.0
    gradients: float = 0.0
    masters: float = 0.0
    """Float32 weights of the optimizer, where the forward has others."""
    moments: float = 0.0
    """Adam's."""
    activations: float = 0.0
    """For the backward pass, or of the widest layer of a forward pass alone."""
    outputs: float = 0.0
    """Logits, and what their reduction takes."""
    cache: float = 0.0
    """Keys and values."""
    buffers: float = 0.0
    """Of communication, of gathered layers, and of a gradient beside the one it is added to."""
    process: float = 0.0
    starts: float = 0.0
    """The most that it holds while it loads."""
    host: float = 0.0
    """In the host's memory besides, while it runs."""
    host_starts: float = 0.0
    """In the host's memory while it loads."""

    @property
    def kept(self) -> float:
        """What is there all the time."""
        state = self.weights + self.gradients + self.masters + self.moments
        return state + self.cache + self.process

    @property
    def passing(self) -> float:
        """What comes and goes."""
        return self.activations + self.outputs + self.buffers

    @property
    def total(self) -> float:
        """The peak, without a margin."""
        return max(self.kept + self.passing, self.starts)

    @property
    def resting(self) -> float:
        """What stays on the device while another role has its turn (rl/turns.py)."""
        return self.weights + self.masters + self.process


@dataclass(frozen=True)
class Work:
    """What a rank of a trained model does at a time."""

    ranks: int
    tokens: float
    """Of the largest micro-batch, padding included; with kept graphs all of those together."""
    outputs: float
    """Tokens of them that the output layer is asked for."""
    micros: int
    """Micro-batches of an optimizer step."""
    device: Device
    scalar: bool = False
    """A scalar head in place of the output layer."""
    lora: LoraConfig | None = None
    quantized: bool = False
    split: int = 1
    """Ranks that share each sequence."""


def precision_of(cfg: TrainingConfig, device: Device) -> Precision:
    """Return what a backend computes in, as training/backend/precision.py does without torch."""
    if cfg.precision == "float32" or (cfg.precision == "auto" and not has_bfloat16(device)):
        return "float32"
    return "bfloat16" if cfg.zero_stage > 0 or cfg.backend == "fsdp" else "autocast"


def width(precision: Precision) -> int:
    """Return the bytes of an entry of the forward pass."""
    return 4 if precision == "float32" else 2


def adapter_params(shape: Shape, cfg: LoraConfig) -> int:
    """Return the parameters of adapters to all matrices of the layers."""
    return shape.num_layers * sum(cfg.rank * (i + o) for i, o in shape.linears)


def activations(shape: Shape, precision: Precision, tokens: float, *, checkpointing: bool) -> float:
    """Return what a backward pass over `tokens` needs of the forward."""
    d, a, k, f = (
        shape.hidden_size,
        shape.attention_width,
        shape.kv_width,
        shape.intermediate_size,
    )
    b = width(precision)
    feed = 4 * f if shape.gated else 2 * f
    norms = {"float32": 24 * d, "autocast": 26 * d, "bfloat16": 16 * d}[precision]
    layer = norms + b * (2 * a + 2 * k + feed + 2 * (a - k))
    ends = 16 * d  # embedding and last norm, in float32
    if checkpointing:
        # The layer that is computed again, and the gradients on their way through it.
        return tokens * (shape.num_layers * b * d + 2 * layer + ends)
    return tokens * (shape.num_layers * layer + ends)


def logits(shape: Shape, precision: Precision, outputs: float, *, on_gpu: bool) -> float:
    """Return what the output layer takes of `outputs` tokens."""
    rows = min(outputs, max(1, LOGITS_BYTES // (4 * shape.vocab_size)))
    # A block's reduction in float32: one kernel on a GPU, four tensors on a CPU.
    block = 4 * min(rows * shape.vocab_size, 2**27) if on_gpu else 16 * 2**18
    return rows * shape.vocab_size * width(precision) + block


def trained(shape: Shape, cfg: TrainingConfig, work: Work) -> Memory:
    """Return what a rank of a trained model holds."""
    precision, on_gpu = precision_of(cfg, work.device), work.device.is_gpu
    parameters = shape.params(scalar=work.scalar)
    learned = parameters
    if work.lora is not None:
        learned = adapter_params(shape, work.lora) + shape.hidden_size * work.scalar
        parameters += learned
    tokens = work.tokens / work.split
    memory = _state(shape, cfg, work, parameters, learned)
    buffers = memory.buffers
    if learned == parameters:
        # The gradient of the largest parameter, beside the one that it is added to; a shared
        # output layer gives it a second.
        each = 4 if cfg.backend == "ddp" or not cfg.zero_stage else width(precision)
        buffers += each * shape.embedding_params * (1 + (shape.tied and not work.scalar))
    heap = 1.0 if on_gpu else HEAP
    kept = activations(shape, precision, tokens, checkpointing=cfg.gradient_checkpointing)
    memory = replace(
        memory,
        activations=heap * kept,
        outputs=0.0
        if work.scalar
        else logits(shape, precision, work.outputs / work.split, on_gpu=on_gpu),
        buffers=buffers,
        process=(GPU_CONTEXT + NCCL * (work.ranks > 1)) if on_gpu else CPU_PROCESS,
        host_starts=4.0 * parameters if on_gpu else 0.0,
    )
    return replace(memory, starts=memory.starts + memory.process)


def _state(
    shape: Shape, cfg: TrainingConfig, work: Work, parameters: float, learned: float
) -> Memory:
    """Return weights, gradients, optimizer and the buffers of sharding: the table above."""
    b, ranks = width(precision_of(cfg, work.device)), work.ranks
    outside = parameters - shape.num_layers * shape.layer_params
    if cfg.backend == "fsdp":
        shards = 1 if work.micros > 1 else ranks
        memory = Memory(
            weights=4 * parameters / ranks,
            gradients=4 * learned / shards,
            moments=8 * learned / ranks,
            # Two layers, and the root's embedding and output layer, are whole at the same time.
            buffers=b * (2 * shape.layer_params + outside) if ranks > 1 else 0.0,
            starts=4 * parameters / ranks + 4 * max(outside, shape.layer_params),
        )
        if cfg.offload == "cpu":
            away = memory.weights + 4 * learned / ranks + memory.moments
            whole = memory.gradients if shards == 1 and ranks > 1 else 0.0
            memory = replace(memory, weights=0.0, gradients=whole, moments=0.0, host=away)
        return memory
    if not cfg.zero_stage:
        weights = 4.0 * parameters
        if work.quantized:
            packed = shape.num_layers * shape.layer_matrices
            weights -= packed * (4 - NF4_BYTES)
        casts = 2.0 * (parameters - shape.embedding_params * (not shape.tied or work.scalar))
        return Memory(
            weights=weights,
            gradients=4 * learned,
            moments=8 * learned,
            buffers=casts if precision_of(cfg, work.device) == "autocast" else 0.0,
            starts=weights,
        )
    stage = cfg.zero_stage
    bucket = min(REDUCE_BUCKET, learned) * b * (1 + work.device.is_gpu) if ranks > 1 else 0.0
    live = min(MAX_LIVE, parameters) * b if stage == 3 and ranks > 1 else 0.0
    memory = Memory(
        weights=b * parameters / (ranks if stage == 3 else 1),
        gradients=4 * learned / (1 if stage == 1 else ranks),
        masters=4 * learned / ranks,
        moments=8 * learned / ranks,
        buffers=bucket + live,
        starts=4.0 * parameters,
    )
    if cfg.offload == "none":
        return memory
    away = memory.masters + memory.moments + 4 * learned / ranks
    if stage == 3:
        away += memory.weights
        memory = replace(memory, weights=0.0)
    memory = replace(memory, gradients=0.0, masters=0.0, moments=0.0)
    # From NVMe a few partitions of the largest parameters are in memory at a time.
    return replace(memory, host=away if cfg.offload == "cpu" else min(away, 4.0 * GIB))


def inference(shapes: tuple[Shape, ...], cfg: TrainingConfig, work: Work) -> Memory:
    """Return what a worker of `reference` or `reward` holds: whole models, one after the other."""
    precision, on_gpu = precision_of(cfg, work.device), work.device.is_gpu
    # Under autocast the weights are in float32, and a layer's are cast when they are read.
    b = 2 if precision == "bfloat16" else 4
    weights = sum(float(b) * shape.params(scalar=work.scalar) for shape in shapes)
    passing = outputs = 0.0
    for shape in shapes:
        wide = 3 * shape.intermediate_size + 2 * shape.hidden_size
        cast = 2 * shape.layer_matrices if precision == "autocast" else 0
        passing = max(passing, width(precision) * wide * work.tokens + cast)
        if not work.scalar:
            outputs = max(outputs, logits(shape, precision, work.outputs, on_gpu=on_gpu))
    process = GPU_CONTEXT if on_gpu else CPU_PROCESS
    return Memory(
        weights=weights,
        activations=passing,
        outputs=outputs,
        process=process,
        starts=weights + process,
        host_starts=weights if on_gpu else 0.0,
    )


def engine_on_cpu(shape: Shape, cfg: TrainingConfig, cache_gib: float) -> Memory:
    """Return what a process of vLLM holds on a CPU: a tied output layer is a copy there."""
    b = 2 if cfg.precision == "bfloat16" else 4
    weights = float(b) * (shape.num_params + shape.tied * shape.embedding_params)
    return Memory(
        weights=weights,
        outputs=4.0 * LOGITS_COPIES * SAMPLED * shape.vocab_size,
        cache=cache_gib * GIB,
        process=CPU_ENGINE,
    )


def engine_on_gpu(
    shape: Shape, cfg: TrainingConfig, device: Device, parallel: int, part: float
) -> Memory:
    """Return what one of an engine's `parallel` GPUs holds: `part` of it, whatever it needs.

    The cache is what is left, and below 0 where nothing is.
    """
    b = 2 if cfg.precision == "bfloat16" else 4
    weights = float(b) * shape.num_params / parallel
    outputs = 4.0 * LOGITS_COPIES * SAMPLED * shape.vocab_size / parallel
    reserve = ENGINE_RESERVE + NCCL * (parallel > 1)
    return Memory(
        weights=weights,
        outputs=outputs,
        cache=part * device.memory - weights - outputs - reserve,
        buffers=reserve,
        host=weights,  # asleep
        host_starts=weights,
    )
