"""Memory against what autograd saves, what modules hold, and what workers take."""

from pathlib import Path
from typing import Any

import pytest
import torch

from rayrlhf.config import LoraConfig, ModelConfig, Role, TrainingConfig, load
from rayrlhf.models import output_head
from rayrlhf.models.causal_lm import build_causal_lm
from rayrlhf.planning import memory, shapes
from rayrlhf.planning.devices import CPU, DEVICES, this_machine
from rayrlhf.planning.memory import Precision, Work
from rayrlhf.planning.needs import of_ppo
from rayrlhf.planning.shapes import Shape
from rayrlhf.rl import buckets, experience
from rayrlhf.training.backend import forward_precision
from tests.planning.measure import peak_of

ROOT = Path(__file__).parents[2]
H100, CORE = DEVICES["H100"], DEVICES[CPU]
GROUPED = Shape("grouped", 192, 3, 6, 2, 32, 512, 512, tied=True)
PLAIN = Shape("plain", 192, 3, 6, 6, 32, 512, 512, tied=True)
N = shapes.KNOWN["llama-3.1-8b"].num_params


def saved(shape: Shape, layers: int, precision: Precision) -> int:
    """Return the bytes that a forward pass over 4 x 32 tokens, some of them padding, saves."""
    cfg = ModelConfig(
        hidden_size=shape.hidden_size,
        num_layers=layers,
        num_heads=shape.num_heads,
        num_kv_heads=shape.num_kv_heads,
        intermediate_size=shape.intermediate_size,
    )
    model = build_causal_lm(cfg, vocab_size=512, eos_token_id=0, pad_token_id=1, seed=0)
    if precision == "bfloat16":
        model = model.to(torch.bfloat16)
    weights = {parameter.untyped_storage().data_ptr() for parameter in model.parameters()}
    found: dict[int, int] = {}

    def keep(tensor: torch.Tensor) -> torch.Tensor:
        place = tensor.untyped_storage().data_ptr()
        if place not in weights:
            found[place] = tensor.untyped_storage().nbytes()
        return tensor

    ids = torch.randint(2, 512, (4, 32))
    mask = torch.ones_like(ids)
    mask[0, 20:] = 0
    with (
        torch.autograd.graph.saved_tensors_hooks(keep, lambda tensor: tensor),
        torch.autocast("cpu", torch.bfloat16, enabled=precision == "autocast"),
    ):
        out = model.base_model(ids, mask)
    total = sum(found.values())
    del out
    return total


@pytest.mark.parametrize("shape", [GROUPED, PLAIN], ids=lambda shape: shape.name)
@pytest.mark.parametrize("precision", ["float32", "bfloat16", "autocast"])
def test_activations_are_what_autograd_saves(shape: Shape, precision: Precision) -> None:
    tokens = 128
    real = saved(shape, 3, precision) - saved(shape, 2, precision)
    if precision == "autocast":  # saves its casts of the matrices, which are counted as buffers
        real -= 2 * shape.layer_matrices
    every = memory.activations(shape, precision, tokens, checkpointing=False)
    ends = tokens * 16 * shape.hidden_size
    assert (every - ends) / shape.num_layers == pytest.approx(real, rel=0.05)


def test_constants_are_those_of_the_code_that_imports_torch() -> None:
    assert memory.LOGITS_BYTES == output_head.LOGITS_BYTES
    assert memory.BUCKET_BYTES == buckets.BUCKET_BYTES
    assert memory.MIN_FILL == experience.MIN_FILL


@pytest.mark.parametrize("precision", ["float32", "bfloat16", "auto"])
@pytest.mark.parametrize(
    "backend", [{}, {"backend": "fsdp"}, {"backend": "deepspeed", "zero_stage": 2}]
)
def test_the_precision_is_the_backend_s(precision: Any, backend: dict[str, Any]) -> None:
    cfg = TrainingConfig(precision=precision, **backend)
    assert memory.precision_of(cfg, CORE) == forward_precision(cfg, torch.device("cpu"))


def state(**keys: Any) -> dict[str, float]:
    """Return the bytes per parameter of a Llama 3.1 8B on each of 8 H100."""
    work = Work(8, 4096, 4096, keys.pop("micros", 2), H100, lora=keys.pop("lora", None))
    held = memory.trained(shapes.KNOWN["llama-3.1-8b"], TrainingConfig(**keys), work)
    parts = ("weights", "gradients", "masters", "moments", "host", "host_starts")
    return {part: vars(held)[part] / N for part in parts if vars(held)[part]}


def test_the_table_of_backends() -> None:
    """The rows of the module's docstring, in bytes per parameter."""
    bf16 = {"precision": "bfloat16"}
    start = {"host_starts": 4}
    every = pytest.approx
    assert state() == every({"weights": 4, "gradients": 4, "moments": 8, **start})
    fsdp = {"weights": 0.5, "gradients": 4, "moments": 1, **start}
    assert state(backend="fsdp", **bf16) == every(fsdp)
    assert state(backend="fsdp", micros=1, **bf16) == every({**fsdp, "gradients": 0.5})
    zero = {"backend": "deepspeed", **bf16}
    masters = {"masters": 0.5, "moments": 1, **start}
    assert state(zero_stage=1, **zero) == every({"weights": 2, "gradients": 4, **masters})
    assert state(zero_stage=2, **zero) == every({"weights": 2, "gradients": 0.5, **masters})
    assert state(zero_stage=3, **zero) == every({"weights": 0.25, "gradients": 0.5, **masters})


def test_offload_moves_bytes_to_the_host() -> None:
    zero = {"backend": "deepspeed", "precision": "bfloat16", "offload": "cpu"}
    kept = state(zero_stage=2, **zero)
    assert kept == pytest.approx({"weights": 2, "host": 0.5 + 1 + 0.5, "host_starts": 4})
    assert state(zero_stage=3, **zero) == pytest.approx({"host": 2.25, "host_starts": 4})
    away = state(backend="fsdp", offload="cpu", precision="bfloat16", micros=1)
    assert away == pytest.approx({"host": 2, "host_starts": 4})


def test_lora_trains_little() -> None:
    full, own = state(), state(lora=LoraConfig(rank=16))
    adapters = memory.adapter_params(shapes.KNOWN["llama-3.1-8b"], LoraConfig(rank=16))
    assert adapters == 41_943_040  # peft's print_trainable_parameters for all linear layers, r=16
    assert own["weights"] == pytest.approx(full["weights"], rel=0.01)
    assert own["gradients"] == pytest.approx(4 * adapters / N)
    assert own["moments"] == pytest.approx(8 * adapters / N)


def test_gradient_checkpointing_keeps_inputs_only() -> None:
    shape = shapes.KNOWN["llama-3.1-8b"]
    whole = memory.activations(shape, "bfloat16", 4096, checkpointing=False)
    inputs = memory.activations(shape, "bfloat16", 4096, checkpointing=True)
    assert inputs < whole / 8
    assert inputs > 4096 * shape.num_layers * 2 * shape.hidden_size


def test_logits_are_never_more_than_a_block() -> None:
    shape = shapes.KNOWN["llama-3.1-8b"]
    small, large, larger = (
        memory.logits(shape, "float32", tokens, on_gpu=False) for tokens in (100, 10_000, 100_000)
    )
    assert small == 100 * shape.vocab_size * 4 + 16 * 2**18
    assert large == larger <= memory.LOGITS_BYTES + 16 * 2**18


@pytest.mark.slow
@pytest.mark.parametrize("role", ["actor", "critic", "rollout"])
def test_a_role_of_the_quickstart_takes_what_is_planned(role: Role) -> None:
    """Within 15% of the peak of its worker alone in a process, beyond the imports.

    Or within 20 MiB, by which the peak of so small a process differs from run to run. All five
    roles, and a larger model: tests/benchmarks/plan.py.
    """
    path = ROOT / "configs" / "quickstart.yaml"
    needs, _ = of_ppo(load(path), this_machine().device)
    assert needs[role].memory.total == pytest.approx(peak_of(path, role), rel=0.15, abs=20 * 2**20)
