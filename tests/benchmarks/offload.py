"""Seconds of a ZeRO-3 step whose optimizer and weights lie elsewhere, against one on the device.

    apt-get install libaio-dev; python tests/benchmarks/offload.py [--dir /nvme] [--places cpu nvme]

A model of 3M parameters trains six steps with each; the losses have to be those of plain ZeRO-3 to
1e-6, and a run that resumes after the third step has to repeat the last three bit by bit. For nvme
DeepSpeed compiles its reader of disks (minutes, once per environment), and its buffers take 2 GiB.
"""

import argparse
import json
import os
import statistics
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).parents[2]))
os.environ.setdefault("OMP_NUM_THREADS", "1")

import torch

from rayrlhf.config import ModelConfig, TrainingConfig
from rayrlhf.console import table
from rayrlhf.models.causal_lm import CausalLMModel, build_causal_lm
from rayrlhf.training.backend import Backend, make_backend

VOCABULARY, STEPS, TOKENS = 4000, 6, 64
SHAPE = ModelConfig(
    hidden_size=256,
    num_layers=3,
    num_heads=4,
    num_kv_heads=4,
    intermediate_size=512,
    max_length=TOKENS,
)


def make(place: str, disk: Path, *, seed: int, weights: dict[str, torch.Tensor]) -> Backend:
    """Return the model under ZeRO-3, its state at `place`, with `weights` if there are any."""
    model = build_causal_lm(SHAPE, vocab_size=VOCABULARY, eos_token_id=0, pad_token_id=1, seed=seed)
    if weights:
        model.load_state_dict(weights, strict=False)  # a tied head has the embedding's
    keys = {"offload": place} | ({"offload_dir": str(disk)} if place == "nvme" else {})
    cfg = TrainingConfig.model_validate(
        {"backend": "deepspeed", "zero_stage": 3, "learning_rate": 1e-3, **keys}
    )
    device = torch.device("cuda:0" if torch.cuda.is_available() else "cpu")
    return make_backend(CausalLMModel(model), cfg, total_steps=STEPS, device=device)


def train(backend: Backend, rows: torch.Tensor) -> tuple[list[float], list[float]]:
    """Take a step on each of `rows`; return losses and seconds."""
    losses, seconds = [], []
    for ids in rows.to(backend.device):
        begun = time.perf_counter()
        log_probs = backend(ids, torch.ones_like(ids))
        backend.backward(-log_probs.sum(), ids.numel(), is_last=True)
        backend.step()
        losses.append(-float(log_probs.detach().sum()) / ids.numel())
        seconds.append(time.perf_counter() - begun)
    return losses, seconds


def measure(place: str, folder: Path) -> dict[str, Any]:
    """Train whole, and from the middle again."""
    rows = torch.randint(
        2, VOCABULARY, (STEPS, 4, TOKENS), generator=torch.Generator().manual_seed(0)
    )
    state, half = folder / "state", STEPS // 2
    state.mkdir(parents=True)
    backend = make(place, folder / "whole", seed=0, weights={})
    losses, seconds = train(backend, rows[:half])
    backend.save_state(state)
    weights = {name.removeprefix("hf."): w.clone() for name, w in backend.full_weights()}
    more, late = train(backend, rows[half:])
    resumed = make(place, folder / "resumed", seed=1, weights=weights)
    resumed.load_state(state)
    again, _ = train(resumed, rows[half:])
    assert again == more, f"{place}: the resumed run has other losses: {again}, not {more}"
    return {"losses": losses + more, "seconds": statistics.median(seconds[1:] + late)}


def main() -> None:
    """Measure, and print as the last line a JSON object."""
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--places", nargs="+", choices=["cpu", "nvme"], default=["cpu", "nvme"])
    parser.add_argument("--dir", type=Path, help="a folder on the disk (default: a temporary one)")
    parser.add_argument("--quick", action="store_true", help="without nvme, which compiles")
    args = parser.parse_args()
    places = ["cpu"] if args.quick else args.places
    figures: dict[str, float] = {}
    rows: list[tuple[Any, ...]] = []
    with tempfile.TemporaryDirectory(dir=args.dir) as name:
        plain = measure("none", Path(name) / "none")
        rows.append(("none", plain["seconds"], 1.0, 0.0))
        for place in places:
            found = measure(place, Path(name) / place)
            worst = max(abs(a - b) for a, b in zip(found["losses"], plain["losses"], strict=True))
            assert worst <= 1e-6, f"{place}: losses differ from plain ZeRO-3's by {worst}"
            ratio = found["seconds"] / plain["seconds"]
            figures[f"ratio_step_{place}_to_none"] = ratio
            rows.append((place, found["seconds"], ratio, worst))
    print(table(("offload", "s per step", "ratio", "largest gap of losses"), rows))
    figures["seconds_per_step_none"] = plain["seconds"]
    print(json.dumps({name: round(value, 4) for name, value in figures.items()}))


if __name__ == "__main__":
    main()
