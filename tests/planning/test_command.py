"""`rayrlhf plan` as a person at the keyboard meets it."""

import os
import re
import shlex
import subprocess
import sys
from collections.abc import Sequence
from pathlib import Path

import pytest

from rayrlhf import cli
from rayrlhf.config import RecipeError, load
from rayrlhf.planning import advice, devices, running
from rayrlhf.planning.devices import GIB, parse_cluster
from rayrlhf.planning.estimate import estimate

ROOT = Path(__file__).parents[2]
RECIPES = {
    "llama-3.1-8b": "1x8xH100",
    "qwen3-32b": "4x8xH100",
    "llama-3.1-70b": "8x8xH200",
}


def plan(name: str, *words: str) -> int:
    return cli.main(["plan", str(ROOT / "configs" / f"{name}.yaml"), *words])


def refused(capsys: pytest.CaptureFixture[str], name: str, *words: str) -> str:
    assert plan(name, *words) == 2
    said = capsys.readouterr()
    assert said.out == ""
    assert len(said.err.splitlines()) <= 2
    return said.err


@pytest.mark.parametrize(("name", "cluster"), RECIPES.items())
def test_shipped_recipes_fit_the_hardware_that_they_name(name: str, cluster: str) -> None:
    path = ROOT / "configs" / f"{name}.yaml"
    recipe = load(path)
    assert recipe.stages == ("sft", "reward", "ppo", "evaluate")
    assert f"rayrlhf plan configs/{name}.yaml --cluster {cluster}\n" in path.read_text()
    now = estimate(recipe, parse_cluster(cluster))
    assert now.shortfalls == ()
    assert set(now.roles) == {"actor", "critic", "reference", "reward", "rollout"}


@pytest.mark.parametrize(("name", "cluster"), RECIPES.items())
def test_shipped_recipes_do_not_fit_half_of_it(
    name: str, cluster: str, capsys: pytest.CaptureFixture[str]
) -> None:
    half = cluster.replace("x8x", "x4x")
    said = refused(capsys, name, "--cluster", half)
    assert said.startswith(("rayrlhf: sft: ", "rayrlhf: ppo: "))
    assert "asked for, " in said


def test_a_plan_says_memory_time_and_money(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    run = tmp_path / "run"
    words = ("--cluster", "1x8xH100", "--price", "2", f"run_dir={run}")
    assert plan("llama-3.1-8b", *words) == 0
    said = capsys.readouterr().out
    assert "1 node(s) of 8 H100, $2 an hour each (--price)" in said
    for word in ("ppo actor", "KV cache", "tokens/s", "$ per million tokens", "the bottleneck: "):
        assert word in said
    assert "first change that helps" in said or "no single change" in said
    assert not run.exists()  # neither lock nor log


def test_a_plan_beside_a_run_that_holds_the_folder(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    from rayrlhf import run_dir

    recipe = load(ROOT / "configs" / "quickstart.yaml", [f"run_dir={tmp_path}"])
    with run_dir.held(recipe):
        assert plan("quickstart", f"run_dir={tmp_path}") == 0
    assert "on this machine" in capsys.readouterr().out


def test_what_is_missing_is_named_with_the_change_that_fits(
    capsys: pytest.CaptureFixture[str],
) -> None:
    """A Llama 3.1 8B under DDP in float32 takes 16 bytes a parameter; DeepSpeed would shard it."""
    words = ["sft.backend=ddp", "sft.zero_stage=0", "--cluster", "1x8xH100"]
    said = refused(capsys, "llama-3.1-8b", *words)
    first, fix = said.splitlines()
    assert first.startswith("rayrlhf: sft: ")
    assert "on a GPU (H100) of 79.2 GiB: " in first and "bytes (" in first
    assert fix == "smallest change that fits: sft.backend=fsdp sft.zero_stage=0"
    missing = int(first.partition("79.2 GiB: ")[2].partition(" bytes")[0])
    recipe = load(ROOT / "configs" / "llama-3.1-8b.yaml", words[:2])
    now = estimate(recipe, parse_cluster("1x8xH100"))
    assert missing == round(now.shortfalls[0].missing)


@pytest.mark.parametrize(
    ("name", "cluster", "overrides", "blamed", "fix"),
    [
        (
            "llama-3.1-8b",
            "1x8xH100",
            ("resources.rollout_gpu_memory=0.8",),
            "rollout",
            "resources.rollout_gpu_memory=",
        ),
        (
            "llama-3.1-8b",
            "1x8xH100",
            ("sft.gradient_checkpointing=false", "sft.tokens_per_microbatch=32768"),
            "sft",
            "sft.tokens_per_microbatch=",
        ),
        (
            "qwen3-32b",
            "4x8xH100",
            ("resources.rollout.gpus=1", "resources.rollout.num_workers=6"),
            "rollout",
            "",
        ),
        ("qwen3-32b", "4x8xH100", ("ppo.num_minibatches=8",), "actor", "ppo.actor."),
    ],
)
def test_the_change_is_the_smallest_that_was_tried(
    capsys: pytest.CaptureFixture[str],
    name: str,
    cluster: str,
    overrides: Sequence[str],
    blamed: str,
    fix: str,
) -> None:
    recipe = load(ROOT / "configs" / f"{name}.yaml", overrides)
    now = estimate(recipe, parse_cluster(cluster))
    if not fix:  # 61 GiB of weights leave room for the cache of the longest sequence, and no more
        assert now.roles["rollout"].memory.cache > 0 and not now.shortfalls
        return
    said = refused(capsys, name, *overrides, "--cluster", cluster)
    assert said.startswith(f"rayrlhf: {blamed}: ")
    assert f"smallest change that fits: {fix}" in said
    change = shlex.split(said.partition("that fits: ")[2])
    again = load(ROOT / "configs" / f"{name}.yaml", [*overrides, *change])
    assert estimate(again, parse_cluster(cluster)).shortfalls == ()


def test_a_reference_that_no_gpu_holds_is_named(capsys: pytest.CaptureFixture[str]) -> None:
    said = refused(capsys, "llama-3.1-70b", "--cluster", "8x8xH100")
    assert re.match(r"rayrlhf: reference: 13\d\.\d GiB on a GPU \(H100\) of 79\.2 GiB: ", said)
    assert "no single change that plan knows" in said


def test_the_memory_of_this_machine_is_shared(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    small = devices.this_machine()
    small = devices.Cluster(1, 2, small.device, 4 * GIB, 2.0, "this machine")
    monkeypatch.setattr("rayrlhf.planning.command.this_machine", lambda: small)
    said = refused(capsys, "smollm2")
    assert "on the memory of the machine of 3.80 GiB: " in said


def test_an_impossible_layout_is_refused_within_two_seconds() -> None:
    """Of the processor, imports included: what else runs on the machine does not count."""
    words = ["plan", "configs/llama-3.1-70b.yaml", "--cluster", "8x8xH100"]
    before = os.times()
    done = subprocess.run(
        [sys.executable, "-m", "rayrlhf.cli", *words], cwd=ROOT, capture_output=True, check=False
    )
    after = os.times()
    assert done.returncode == 2
    user, system = "children_user", "children_system"
    assert sum(getattr(after, key) - getattr(before, key) for key in (user, system)) < 2.0


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["plan", "--cluster", "8xH100"], "nodes x devices of each x device, such as 8x8xH100"),
        (["plan", "--cluster", "1x8xV100"], "one of A100, H100, H200, B200, L4, CPU"),
        (["plan", "--cluster", "1x8xH100", "--address", "auto"], "both name a cluster"),
        (["plan", "--probe", "--cluster", "1x8xH100"], "--probe measures the device at hand"),
        (["plan", "--price", "-1"], "0 or more"),
        (["plan", "--simulate", "ppo.steps=3"], "the plot is a PNG: name a file that ends with"),
        (["plan", "--render", "kuberay", "--cluster", "1x8xH100"], "--cluster=1x8xH100 goes with"),
        (["plan", "--simulate", "--cluster", "1x8xH100", "ppo=null"], "no section ppo"),
    ],
)
def test_options_that_do_not_fit_are_refused(
    words: list[str], message: str, capsys: pytest.CaptureFixture[str]
) -> None:
    command, *options = words
    assert cli.main([command, str(ROOT / "configs" / "quickstart.yaml"), *options]) == 2
    assert message in capsys.readouterr().err


def test_nodes_of_a_cluster_become_a_cluster() -> None:
    node = {"CPU": 128.0, "GPU": 8.0, "memory": 1.5e12, "object_store_memory": 5e11}
    hopper = {**node, "accelerator_type:H100": 1.0}
    head = {"CPU": 16.0, "memory": 6e10}
    found = devices.of_nodes("auto", [head, hopper, hopper])
    assert (found.num_nodes, found.per_node, found.device.name) == (2, 8, "H100")
    assert (found.host_memory, found.num_gpus) == (2e12, 16)
    amd = {**node, "accelerator_type:AMD-Instinct-MI300X-OAM": 1.0}
    with pytest.raises(RecipeError, match="AMD-Instinct-MI300X-OAM, and plan knows A100"):
        devices.of_nodes("auto", [amd])
    cores = devices.of_nodes("auto", [head])
    assert (cores.per_node, cores.device.name, cores.num_gpus) == (16, "CPU", 0)


@pytest.mark.ray
def test_a_running_cluster_is_asked_for_its_nodes(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    import ray

    context = ray.init(
        address="local",
        num_cpus=64,
        num_gpus=8,
        resources={"accelerator_type:H100": 1},
        include_dashboard=False,
        logging_level="error",
    )
    try:
        (node,) = running.nodes(context.address_info["address"])
        assert node["GPU"] == 8
        assert plan("llama-3.1-8b", "--address", context.address_info["address"]) == 2
        said = capsys.readouterr().err  # its memory is that of this machine
        assert "on the memory of the machine of " in said
    finally:
        ray.shutdown()
    assert plan("quickstart", "--address", "127.0.0.1:1") == 2
    assert "no Ray cluster answers there" in capsys.readouterr().err


def test_a_change_is_written_as_it_is_typed() -> None:
    change = (("sft.lora", {}), ("sft.gradient_checkpointing", True), ("a.b", 0.5), ("c", 4))
    assert advice.written(change) == "sft.lora='{}' sft.gradient_checkpointing=true a.b=0.5 c=4"
    recipe = load(ROOT / "configs" / "llama-3.1-8b.yaml")
    again = advice.changed(recipe, (("sft.tokens_per_microbatch", 4096),))
    assert again.sft is not None and again.sft.tokens_per_microbatch == 4096
    assert again.ppo == recipe.ppo
