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
from typing import Any

import pytest
import ray
from ray._private import state as ray_state
from safetensors.torch import load_file

from rayrlhf.config import Recipe, RecipeError
from rayrlhf.metrics import read_jsonl
from rayrlhf.training.checkpoint import MANIFEST, is_complete
from rayrlhf.training.sft import finetune
from tests.training.test_loop import comparable

MakeRecipe = Callable[..., Recipe]
pytestmark = [pytest.mark.ray, pytest.mark.slow]


@pytest.fixture(scope="module")
def cluster() -> Iterator[None]:
    ray.init(address="local", num_cpus=4, include_dashboard=False, log_to_driver=False)
    yield
    ray.shutdown()


def losses(folder: Path, key: str = "loss") -> list[float]:
    return [line[key] for line in read_jsonl(folder / "metrics.jsonl") if key in line]


@pytest.mark.usefixtures("cluster")
def test_fsdp_zero_and_ulysses_have_the_losses_of_ddp(make_recipe: MakeRecipe) -> None:
    """Two workers of Ray Train; without dropout, whose draws follow the rank."""
    finals, curves = {}, {}
    for name, section in {
        "ddp": {},
        "fsdp": {"backend": "fsdp"},
        "zero2": {"backend": "deepspeed", "zero_stage": 2},
        "zero3": {"backend": "deepspeed", "zero_stage": 3},
        "ulysses": {},
    }.items():
        recipe = make_recipe(
            name,
            resources={"num_workers": 2, "sequence_parallel": 1 + (name == "ulysses")},
            sft={**section, "max_steps": 4, "dropout": 0.0},
        )
        shutil.rmtree(recipe.path / "sft")
        final = finetune(recipe)
        finals[name] = load_file(final / "model.safetensors")
        curves[name] = losses(recipe.path / "sft") + losses(recipe.path / "sft", "eval/loss")
        assert is_complete(recipe.path / "sft" / "checkpoints" / "step-00000002")
    assert curves["ddp"][3] < curves["ddp"][0]
    for name in ("fsdp", "zero2", "zero3", "ulysses"):
        assert curves[name] == pytest.approx(curves["ddp"], rel=1e-4)
        assert finals[name].keys() == finals["ddp"].keys()
        for key, weight in finals[name].items():
            assert weight.shape == finals["ddp"][key].shape
            assert (weight - finals["ddp"][key]).abs().max() < 2e-3


def num_workers_started() -> int:
    """Count the workers of Ray Train that the cluster has had."""
    classes = [actor["ActorClassName"] for actor in ray_state.actors().values()]
    return sum("TrainWorker" in name for name in classes)


@pytest.mark.usefixtures("cluster")
def test_a_workers_recipe_error_ends_the_run_at_once(
    make_recipe: MakeRecipe, capsys: pytest.CaptureFixture[str]
) -> None:
    """A checkpoint without the state of one rank: found by the workers, mended by no restart."""
    recipe = make_recipe(resources={"num_workers": 2}, sft={"max_steps": 3})
    shutil.rmtree(recipe.path / "sft")
    finetune(recipe)
    assert "sft 13 records, 3 steps of 4 sequences, on average 2 per rank on 2" in (
        capsys.readouterr().out
    )
    shutil.rmtree(recipe.path / "sft" / "final")
    state = next((recipe.path / "sft" / "checkpoints").glob("step-*/training_state"))
    lost = state / "optimizer-00001-of-00002-00000.safetensors"
    lost.rename(state / "lost")
    manifest = state.parent / MANIFEST
    manifest.write_text('{"files": {}}', encoding="utf-8")
    before = num_workers_started()
    with pytest.raises(RecipeError, match="does not hold the optimizer state of every") as caught:
        finetune(recipe)
    assert len(str(caught.value).splitlines()) == 1
    assert num_workers_started() - before == 2


COMMAND = """
import pickle, sys
sys.path.insert(0, {root!r})
from rayrlhf.training.reward import train_reward
for path in sys.argv[1:]:
    with open(path, "rb") as file:
        train_reward(pickle.load(file))
"""


def test_sigkill_of_the_whole_group_then_the_same_command(
    make_recipe: MakeRecipe, tmp_path: Path
) -> None:
    section: dict[str, Any] = {"max_steps": 100, "save_every": 10, "eval_every": 20, "epochs": 1000}
    section["early_stopping"] = None
    metrics, saved = {}, {}
    for name in ("killed", "whole"):
        recipe = make_recipe(name, resources={"num_workers": 2}, reward=section)
        metrics[name] = recipe.path / "reward" / "metrics.jsonl"
        saved[name] = tmp_path / f"{name}.pickle"
        saved[name].write_bytes(pickle.dumps(recipe))
    code = COMMAND.format(root=str(Path(__file__).parents[2]))
    command = [sys.executable, "-c", code, str(saved["killed"])]

    with (tmp_path / "log").open("w") as log:
        run = subprocess.Popen(command, start_new_session=True, stdout=log, stderr=log)
        deadline = time.monotonic() + 240
        while len(read_jsonl(metrics["killed"])) < 25:
            assert run.poll() is None, (tmp_path / "log").read_text()
            assert time.monotonic() < deadline
            time.sleep(0.02)
        os.killpg(run.pid, signal.SIGKILL)
        run.wait()
        assert len(read_jsonl(metrics["killed"])) < 100
        # The same command; a run that nothing interrupts shares its cluster.
        subprocess.run(
            [*command, str(saved["whole"])],
            start_new_session=True,
            stdout=log,
            stderr=log,
            timeout=400,
            check=True,
        )

    resumed, expected = (comparable(metrics[name].parent) for name in ("killed", "whole"))
    assert len(expected) == 100
    assert resumed == expected
