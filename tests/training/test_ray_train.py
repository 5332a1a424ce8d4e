"""The stages on a real Ray Train cluster: ZeRO against DDP, SIGKILL and resume."""

import os
import pickle
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
import ray
from safetensors.torch import load_file

from rayrlhf.config import Recipe
from rayrlhf.metrics import read_jsonl
from rayrlhf.training.checkpoint import is_complete
from rayrlhf.training.reward import train_reward
from rayrlhf.training.sft import finetune

MakeRecipe = Callable[..., Recipe]
pytestmark = [pytest.mark.ray, pytest.mark.slow]


@pytest.fixture
def cluster() -> Iterator[None]:
    ray.init(address="local", num_cpus=4, include_dashboard=False, log_to_driver=False)
    yield
    ray.shutdown()


def losses(folder: Path, key: str = "loss") -> list[float]:
    return [line[key] for line in read_jsonl(folder / "metrics.jsonl") if key in line]


@pytest.mark.usefixtures("cluster")
def test_zero_2_and_3_have_the_losses_of_ddp(make_recipe: MakeRecipe) -> None:
    finals, curves = {}, {}
    for name, section in {
        "ddp": {},
        "zero2": {"backend": "deepspeed", "zero_stage": 2},
        "zero3": {"backend": "deepspeed", "zero_stage": 3},
    }.items():
        recipe = make_recipe(name, resources={"num_workers": 2}, sft={**section, "max_steps": 4})
        shutil.rmtree(recipe.path / "sft")
        final = finetune(recipe)
        finals[name] = load_file(final / "model.safetensors")
        curves[name] = losses(recipe.path / "sft") + losses(recipe.path / "sft", "eval/loss")
        assert is_complete(recipe.path / "sft" / "checkpoints" / "step-00000002")
    assert curves["ddp"][3] < curves["ddp"][0]
    for name in ("zero2", "zero3"):
        assert curves[name] == pytest.approx(curves["ddp"], rel=1e-4)
        assert finals[name].keys() == finals["ddp"].keys()
        for key, weight in finals[name].items():
            assert weight.shape == finals["ddp"][key].shape
            assert (weight - finals["ddp"][key]).abs().max() < 2e-3


COMMAND = """
import os, pickle, sys
sys.path.insert(0, {root!r})
from rayrlhf.training.reward import train_reward
train_reward(pickle.load(open({recipe!r}, "rb")))
"""


def test_sigkill_of_the_whole_group_then_the_same_command(
    make_recipe: MakeRecipe, tmp_path: Path
) -> None:
    recipe = make_recipe(
        "killed",
        resources={"num_workers": 2},
        reward={"max_steps": 300, "save_every": 20, "eval_every": 30, "epochs": 1000},
    )
    saved = tmp_path / "recipe.pickle"
    saved.write_bytes(pickle.dumps(recipe))
    code = COMMAND.format(root=str(Path(__file__).parents[2]), recipe=str(saved))
    metrics = recipe.path / "reward" / "metrics.jsonl"

    with (tmp_path / "log").open("w") as log:
        run = subprocess.Popen(
            [sys.executable, "-c", code], start_new_session=True, stdout=log, stderr=log
        )
        deadline = time.monotonic() + 120
        while len(read_jsonl(metrics)) < 45:
            assert run.poll() is None and time.monotonic() < deadline, (
                tmp_path / "log"
            ).read_text()
            time.sleep(0.02)
        os.killpg(run.pid, signal.SIGKILL)
        run.wait()
        before = read_jsonl(metrics)
        assert len(before) < 300
        subprocess.run(
            [sys.executable, "-c", code],
            start_new_session=True,
            stdout=log,
            stderr=log,
            timeout=180,
            check=True,
        )
    resumed = read_jsonl(metrics)

    whole = make_recipe("whole", resources={"num_workers": 2}, reward=recipe.reward.model_dump())
    ray.init(address="local", num_cpus=4, include_dashboard=False, log_to_driver=False)
    try:
        train_reward(whole)
    finally:
        ray.shutdown()
    expected = read_jsonl(whole.path / "reward" / "metrics.jsonl")
    clocks = ("time", "time/step_s", "tokens_per_s")
    assert [{k: v for k, v in line.items() if k not in clocks} for line in resumed] == [
        {k: v for k, v in line.items() if k not in clocks} for line in expected
    ]
