"""Optimizer state in fragments: what a rank reads, whoever wrote it, and what is refused."""

from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from torch import Tensor, nn

from rayrlhf.config import RecipeError, TrainingConfig
from rayrlhf.training.backend import make_backend
from rayrlhf.training.backend.deepspeed import DeepSpeedBackend, deepspeed_config
from rayrlhf.training.backend.state import SavedState, Slot, file_of, save_slots

MATRIX = torch.arange(15.0).view(5, 3)
BIAS = torch.arange(100.0, 104.0)


def write(folder: Path, world_size: int = 3) -> None:
    """Write the state of a matrix, seven updates old, and of a bias, five: a third per rank."""
    matrix, bias, fresh = MATRIX.clone(), BIAS.clone(), torch.zeros(2)
    state = {
        owner: {"step": torch.tensor(step), "exp_avg": owner + 0.5, "exp_avg_sq": owner * 2}
        for owner, step in ((matrix, 7.0), (bias, 5.0))
    }
    for rank in range(world_size):
        slots = [
            Slot(name, 0, owner.numel(), owner).share(rank, world_size)
            for name, owner in (("matrix", matrix), ("bias", bias), ("fresh", fresh))
        ]
        save_slots(file_of(folder, rank, world_size, 0), slots, state, {"num_steps": 7})


def test_shares_are_all_elements_once() -> None:
    whole = Slot("x", 10, 7, torch.zeros(20), 3)
    shares = [whole.share(rank, 3) for rank in range(3)]
    assert [(s.offset, s.numel, s.start) for s in shares] == [(10, 2, 3), (12, 2, 5), (14, 3, 7)]


@pytest.mark.parametrize("world_size", [1, 2, 3, 16])
def test_a_rank_reads_what_overlaps_with_its_part(tmp_path: Path, world_size: int) -> None:
    """A flat partition: the matrix from its 5th element on, a gap, the bias but its last."""
    write(tmp_path, world_size)
    saved = SavedState(tmp_path)
    saved.check(["matrix", "bias", "fresh"])
    assert saved.meta == {"num_steps": 7}
    partition = torch.zeros(16)
    slots = [Slot("matrix", 4, 11, partition), Slot("bias", 0, 3, partition, 12)]
    state: dict[Tensor, dict[str, Tensor]] = {}
    saved.restore(slots, state)
    expected = torch.cat([torch.arange(4.0, 15.0), torch.tensor([0.0, 100, 101, 102, 0])])
    padding = torch.ones(16, dtype=torch.bool)
    padding[[11, 15]] = False
    kept = state[partition]
    assert torch.equal(kept["exp_avg"], torch.where(padding, expected + 0.5, 0))
    assert torch.equal(kept["exp_avg_sq"], expected * 2)
    assert kept["step"] == 7 and kept["step"].dtype == torch.float32


def test_a_parameter_without_state_gets_none(tmp_path: Path) -> None:
    write(tmp_path)
    parameter = torch.zeros(2)
    state: dict[Tensor, dict[str, Tensor]] = {}
    SavedState(tmp_path).restore([Slot("fresh", 0, 2, parameter)], state)
    assert not state


@pytest.mark.parametrize(
    ("change", "says"),
    [
        (lambda folder: file_of(folder, 1, 3, 0).unlink(), r"every rank \(2 files of ranks \[0"),
        (lambda folder: write(folder, 2), "every rank"),
        (lambda folder: [path.unlink() for path in folder.iterdir()], r"\(0 files of ranks \[\]\)"),
    ],
)
def test_an_incomplete_folder_is_refused(
    tmp_path: Path, change: Callable[[Path], None], says: str
) -> None:
    write(tmp_path)
    change(tmp_path)
    with pytest.raises(RecipeError, match=says):
        SavedState(tmp_path)


def test_state_of_another_model_is_refused(tmp_path: Path) -> None:
    write(tmp_path)
    saved = SavedState(tmp_path)
    with pytest.raises(RecipeError, match="1 parameters that this run does not train, matrix"):
        saved.check(["bias", "other"])
    with pytest.raises(RecipeError, match="15 of the 16 elements of matrix from 0 on"):
        saved.restore([Slot("matrix", 0, 16, torch.zeros(16))], {})


def test_a_run_that_trains_less_is_told(tmp_path: Path) -> None:
    cfg = TrainingConfig()
    nets = [nn.Sequential(nn.Linear(2, 2), nn.Linear(2, 1)) for _ in range(2)]
    nets[1][0].requires_grad_(False)
    backends = [make_backend(net, cfg, total_steps=2, device=torch.device("cpu")) for net in nets]
    backends[0].backward(backends[0](torch.ones(1, 2)).sum(), 1.0, is_last=True)
    backends[0].step()
    backends[0].save_state(tmp_path)
    with pytest.raises(RecipeError, match=r"2 parameters that this run does not train, 0\.bias"):
        backends[1].load_state(tmp_path)


def test_the_config_of_an_offload() -> None:
    def made(stage: int, offload: str, largest: int = 10) -> dict[str, object]:
        keys = {"offload_dir": "/nvme"} if offload == "nvme" else {}
        cfg = TrainingConfig.model_validate(
            {"backend": "deepspeed", "zero_stage": stage, "offload": offload, **keys}
        )
        config = deepspeed_config(cfg, "bfloat16", on_gpu=True, largest_parameter=largest)
        assert config["zero_force_ds_cpu_optimizer"] is False
        zero: dict[str, object] = config["zero_optimization"]
        return {key: value for key, value in zero.items() if "offload" in key}

    cpu = {"device": "cpu", "pin_memory": True}
    assert made(3, "none") == {}
    assert made(2, "cpu") == {"offload_optimizer": cpu}
    assert made(3, "cpu") == {"offload_optimizer": cpu, "offload_param": cpu}
    nvme = {"device": "nvme", "pin_memory": True, "nvme_path": "/nvme"}
    assert made(3, "nvme", 3 * 10**8) == {
        "offload_optimizer": nvme,
        "offload_param": {**nvme, "buffer_size": 3 * 10**8},
    }


@pytest.mark.slow
def test_a_machine_without_libaio_is_told_what_to_install(monkeypatch: pytest.MonkeyPatch) -> None:
    from deepspeed.ops.op_builder import AsyncIOBuilder

    monkeypatch.setattr(AsyncIOBuilder, "is_compatible", lambda *_, **__: False)
    cfg = TrainingConfig(backend="deepspeed", zero_stage=3, offload="nvme", offload_dir="/nvme")
    with pytest.raises(RecipeError, match="apt install libaio-dev, or set offload=cpu"):
        DeepSpeedBackend(nn.Linear(1, 1), cfg, 1, torch.device("cpu"))
