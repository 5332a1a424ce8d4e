"""Optimizer and weights on a disk: the numbers stay those of plain ZeRO-3, on and after a resume.

DeepSpeed compiles its reader of disks with libaio's headers (Debian's libaio-dev), which takes a
minute, and its buffers take 2 GiB.
"""

import ctypes.util
import math
from pathlib import Path

import pytest
import torch

from rayrlhf.config import ModelConfig, TrainingConfig
from rayrlhf.models.causal_lm import CausalLMModel, build_causal_lm
from rayrlhf.training.backend import Backend, make_backend
from tests.scripts import result_of

pytestmark = [
    pytest.mark.slow,
    pytest.mark.skipif(ctypes.util.find_library("aio") is None, reason="needs libaio-dev"),
]
SCRIPT = """
import json, sys
from tests.training.test_nvme import losses
print("RESULT" + json.dumps(losses(sys.argv[1], sys.argv[2])))
"""
SHAPE = ModelConfig(
    hidden_size=256,
    num_layers=2,
    num_heads=4,
    num_kv_heads=4,
    intermediate_size=512,
    max_length=32,
)


def make(offload: str, disk: Path, module: CausalLMModel) -> Backend:
    place = {"offload_dir": str(disk)} if offload == "nvme" else {}
    cfg = TrainingConfig.model_validate(
        {
            "backend": "deepspeed",
            "zero_stage": 3,
            "offload": offload,
            "learning_rate": 1e-2,
            **place,
        }
    )
    return make_backend(module, cfg, total_steps=6, device=torch.device("cpu"))


def losses(offload: str, folder: str) -> dict[str, list[float]]:
    """Train three steps, save, and train three more: in place, and as a run that resumes."""
    model = build_causal_lm(SHAPE, vocab_size=2000, eos_token_id=0, pad_token_id=1, seed=0)
    disk, state = Path(folder) / offload, Path(folder) / f"state {offload}"
    state.mkdir()
    generator = torch.Generator().manual_seed(0)
    rows = torch.randint(2, 2000, (6, 2, 32), generator=generator)

    def step(backend: Backend, number: int) -> float:
        ids = rows[number]
        log_probs = backend(ids, torch.ones_like(ids))
        backend.backward(-log_probs.sum(), ids.numel(), is_last=True)
        backend.step()
        return -float(log_probs.detach().sum()) / ids.numel()

    backend = make(offload, disk / "first", CausalLMModel(model))
    found = [step(backend, number) for number in range(3)]
    backend.save_state(state)
    weights = {name: weight.clone() for name, weight in backend.full_weights()}
    found += [step(backend, number) for number in range(3, 6)]

    again = build_causal_lm(SHAPE, vocab_size=2000, eos_token_id=0, pad_token_id=1, seed=1)
    again.load_state_dict(
        {name.removeprefix("hf."): w for name, w in weights.items()}, strict=False
    )
    resumed = make(offload, disk / "second", CausalLMModel(again))
    resumed.load_state(state)
    on_disk = sum(file.stat().st_size for file in disk.rglob("*") if file.is_file())
    return {
        "losses": found,
        "resumed": [step(resumed, number) for number in range(3, 6)],
        "mib_on_disk": [on_disk / 2**20],
    }


def test_a_disk_changes_no_number(tmp_path: Path) -> None:
    plain, disk = (result_of(SCRIPT, offload, str(tmp_path)) for offload in ("none", "nvme"))
    assert plain["losses"][0] == pytest.approx(math.log(2000), abs=0.5)
    assert plain["losses"][-1] < plain["losses"][0]
    assert disk["losses"] == pytest.approx(plain["losses"], abs=1e-6)
    assert disk["resumed"] == disk["losses"][3:]  # bit for bit
    parameters = sum(p.numel() for p in make_model().parameters())
    assert disk["mib_on_disk"][0] > 2 * 4 * parameters / 2**20  # moments, at least, of a run
    assert plain["mib_on_disk"] == [0.0]


def make_model() -> torch.nn.Module:
    return build_causal_lm(SHAPE, vocab_size=2000, eos_token_id=0, pad_token_id=1, seed=0)
