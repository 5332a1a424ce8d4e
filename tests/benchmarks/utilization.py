"""Model FLOPs utilisation of the training step on one device, without Ray, vLLM or data.

    python tests/benchmarks/utilization.py --device cuda [--models 135m 1b] [--tokens 2048]

Random weights and random tokens, through the same model, head, backend and counting as the stages:
forward, backward, clip and AdamW, in bfloat16 over float32 masters on a GPU that has it. A model
runs in every way (plain, compiled layers, gradient checkpointing; documents apart with sdpa and
with flex attention), and its utilisation is against matmuls measured on the device just before.
Needs torch, transformers, pydantic and PyYAML only.
"""

import argparse
import gc
import json
import statistics
import sys
import time
from dataclasses import dataclass
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).parents[2]))

import torch
from torch import Tensor

from rayrlhf.config import ModelConfig, TrainingConfig
from rayrlhf.models.causal_lm import CausalLMModel, build_causal_lm
from rayrlhf.training.backend import Backend, forward_precision, make_backend
from rayrlhf.training.flops import ModelFlops, attended_pairs, model_flops
from rayrlhf.training.utilization import matmul_rate, peak_memory

SHAPES: dict[str, dict[str, int]] = {
    "toy": {"hidden_size": 128, "num_layers": 2, "num_heads": 4, "num_kv_heads": 2}
    | {"intermediate_size": 256},
    # SmolLM2-135M and Llama 3.2 1B
    "135m": {"hidden_size": 576, "num_layers": 30, "num_heads": 9, "num_kv_heads": 3}
    | {"intermediate_size": 1536},
    "1b": {"hidden_size": 2048, "num_layers": 16, "num_heads": 32, "num_kv_heads": 8}
    | {"intermediate_size": 8192},
}
VOCABULARY = {"toy": 1000, "135m": 49152, "1b": 128256}


@dataclass(frozen=True)
class Way:
    """How a step runs, and whether its rows are of one document or of eight."""

    keys: dict[str, Any]
    apart: bool = False


WAYS = {
    "plain": Way({}),
    "compiled": Way({"compile": True}),
    "checkpointing": Way({"gradient_checkpointing": True}),
    "apart, sdpa": Way({"attention": "sdpa"}, apart=True),
    "apart, flex": Way({"attention": "flex"}, apart=True),
}


def make_rows(rows: int, tokens: int, vocabulary: int, *, apart: bool) -> tuple[Tensor, Tensor]:
    """Return ids and attention mask (rows, tokens): one document a row, or eight."""
    ids = torch.randint(2, vocabulary, (rows, tokens))
    number = torch.arange(tokens) * 8 // tokens + 1
    return ids, number.expand(rows, -1).contiguous() if apart else torch.ones_like(ids)


def make(name: str, way: Way, tokens: int, device: torch.device) -> tuple[Backend, ModelFlops]:
    model = build_causal_lm(
        ModelConfig(**SHAPES[name], max_length=tokens),
        vocab_size=VOCABULARY[name],
        eos_token_id=0,
        pad_token_id=1,
        seed=0,
    )
    module = CausalLMModel(model)
    module.train()
    flops = model_flops(module)
    cfg = TrainingConfig(precision="auto", **way.keys)
    return make_backend(module, cfg, total_steps=1000, device=device), flops


def step_seconds(backend: Backend, ids: Tensor, mask: Tensor, steps: int) -> list[float]:
    """Return the seconds of each of `steps` training steps, after two that warm up."""
    times = []
    for _ in range(steps + 2):
        started = time.perf_counter()
        log_probs = backend(ids, mask)
        backend.backward(-log_probs.sum(), ids.numel(), is_last=True)
        backend.step()  # reads the gradient's norm, and so waits for the device
        if ids.device.type == "cuda":
            torch.cuda.synchronize(ids.device)
        times.append(time.perf_counter() - started)
    return times[2:]


def measure(
    name: str, way: Way, args: argparse.Namespace, device: torch.device
) -> dict[str, float]:
    """Return mfu, tokens_per_s, matmul_tflops and peak_gib of one model in one way."""
    if device.type == "cuda":
        torch.cuda.empty_cache()
        torch.cuda.reset_peak_memory_stats(device)
    backend, flops = make(name, way, args.tokens, device)
    is_float32 = forward_precision(backend.cfg, device) == "float32"
    rate = matmul_rate(device, torch.float32 if is_float32 else torch.bfloat16)
    ids, mask = make_rows(args.rows, args.tokens, VOCABULARY[name], apart=way.apart)
    total = flops.total(
        num_tokens=ids.numel(),
        num_pairs=attended_pairs(mask),
        num_outputs=int((mask[:, 1:] == mask[:, :-1]).sum()),
    )
    seconds = statistics.median(step_seconds(backend, ids.to(device), mask.to(device), args.steps))
    return {
        "mfu": total / (seconds * rate),
        "tokens_per_s": ids.numel() / seconds,
        "matmul_tflops": rate / 1e12,
        "peak_gib": peak_memory(device) / 2**30,
    }


def main() -> None:
    """Measure, print a table, and as the last line a JSON object."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    parser.add_argument("--models", nargs="+", choices=list(SHAPES), default=["135m", "1b"])
    parser.add_argument("--ways", nargs="+", choices=list(WAYS), default=None)
    parser.add_argument("--rows", type=int, default=8)
    parser.add_argument("--tokens", type=int, default=2048)
    parser.add_argument("--steps", type=int, default=10)
    parser.add_argument("--quick", action="store_true", help="a toy model")
    args = parser.parse_args()
    if args.quick:
        args.models, args.rows, args.tokens, args.steps = ["toy"], 2, 64, 2
    device = torch.device(args.device)
    # Flex attention trains on GPUs only, and --quick should not compile for a minute.
    left_out = {"apart, flex"} if device.type == "cpu" else set()
    left_out |= {"compiled"} if args.quick else set()
    ways = args.ways or [way for way in WAYS if way not in left_out]
    figures: dict[str, float] = {}
    for name in args.models:
        for way in ways:
            found = measure(name, WAYS[way], args, device)
            gc.collect()
            print(
                f"{name:>5} {way:<14} mfu {found['mfu']:6.3f} {found['tokens_per_s']:>12,.0f} "
                f"tokens/s {found['peak_gib']:7.2f} GiB, "
                f"matmul {found['matmul_tflops']:.2f} TFLOP/s",
                flush=True,
            )
            key = f"{name}_{way.replace(', ', '_')}"
            figures[f"ratio_{key}_to_matmul"] = found["mfu"]
            figures[f"tokens_per_s_{key}"] = found["tokens_per_s"]
            figures[f"peak_gib_{key}"] = found["peak_gib"]
    ratios_first = sorted(figures.items(), key=lambda item: not item[0].startswith("ratio"))
    print(json.dumps({name: round(value, 4) for name, value in ratios_first}))


if __name__ == "__main__":
    main()
