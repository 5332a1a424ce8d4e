"""The recipe: overrides, errors that name the fix, cross-field checks."""

from pathlib import Path
from typing import Any

import pytest
import yaml

from rayrlhf import config

ROOT = Path(__file__).parents[1]
MINIMAL: dict[str, Any] = {
    "name": "toy",
    "corpus": {"sources": {"movies": {"path": "movies.jsonl"}}},
    "pretrain": {},
    "sft": {"train": "demonstrations.jsonl"},
    "reward": {"train": "comparisons.jsonl"},
    "dpo": {"train": "comparisons.jsonl"},
    "ppo": {"prompts": "prompts.jsonl"},
    "rounds": {"num_rounds": 1, "judge": "vader"},
    "evaluate": {"prompts": "prompts.jsonl", "comparisons": "comparisons.jsonl"},
}


def refuse(changes: dict[str, Any]) -> str:
    with pytest.raises(config.RecipeError) as caught:
        config.parse({**MINIMAL, **changes})
    return str(caught.value)


@pytest.mark.parametrize("path", sorted((ROOT / "configs").rglob("*.yaml")), ids=lambda p: p.name)
def test_shipped_recipes_load(path: Path) -> None:
    assert config.load(path).name == path.stem


def test_instructgpts_settings() -> None:
    """arXiv:2203.02155, section 3.5 and appendix C.1, for 1.3B and 6B."""
    sft = config.load(ROOT / "configs" / "instructgpt-sft.yaml").sft
    assert sft is not None
    assert (sft.epochs, sft.dropout, sft.batch_size, sft.learning_rate) == (16, 0.2, 32, 9.65e-6)
    assert (sft.warmup_ratio, sft.min_learning_rate_ratio) == (0, 0.1)


def test_overoptimisation_needs_a_gold_reward_model_of_its_own_data() -> None:
    evaluate = {**MINIMAL["evaluate"], "overoptimisation": {}}
    assert "has no gold reward model: set reward.gold.train" in refuse({"evaluate": evaluate})
    same = {"train": "a.jsonl", "gold": {"train": "a.jsonl"}}
    assert "reward.gold.train=a.jsonl is reward.train" in refuse({"reward": same})
    gold = {"train": "a.jsonl", "gold": {"train": "b.jsonl"}}
    assert config.parse({**MINIMAL, "evaluate": evaluate, "reward": gold}).evaluate is not None
    evaluate["overoptimisation"] = {"gold": "runs/gold/reward/final"}
    assert config.parse({**MINIMAL, "evaluate": evaluate}).evaluate is not None
    without = {key: part for key, part in MINIMAL.items() if key not in ("reward", "ppo", "rounds")}
    with pytest.raises(config.RecipeError, match="the recipe has no reward section"):
        config.parse({**without, "evaluate": evaluate})


def test_few_shot_needs_demonstrations() -> None:
    without = {key: part for key, part in MINIMAL.items() if key != "sft"}
    evaluate = {**MINIMAL["evaluate"], "few_shot": {}}
    with pytest.raises(config.RecipeError, match="few_shot shows demonstrations of sft.train"):
        config.parse({**without, "evaluate": evaluate})


def test_stages_are_the_sections_in_order() -> None:
    assert config.parse(MINIMAL).stages == config.STAGES
    some = {k: v for k, v in MINIMAL.items() if k in ("name", "corpus", "pretrain")}
    assert config.parse(some).stages == ("corpus", "pretrain")


def test_overrides_reach_any_depth(tmp_path: Path) -> None:
    file = tmp_path / "toy.yaml"
    file.write_text(yaml.safe_dump(MINIMAL))
    recipe = config.load(
        file,
        [
            "ppo.steps=7",
            "ppo.actor.learning_rate=1e-3",
            "sft=null",
            "tracking=[tensorboard]",
            "resources.actor.num_workers=2",
            "run_dir=/tmp/x",
        ],
    )
    assert recipe.ppo is not None
    assert recipe.ppo.steps == 7
    assert recipe.ppo.actor.learning_rate == 1e-3
    assert recipe.sft is None
    assert recipe.tracking == ("tensorboard",)
    assert recipe.resources.role("actor").num_workers == 2
    assert recipe.path == Path("/tmp/x")


@pytest.mark.parametrize(
    ("changes", "says"),
    [
        ({"pretran": {}}, ["unknown key pretran", "did you mean pretrain?"]),
        ({"sft": {"train": "x", "lerning_rate": 1}}, ["did you mean sft.learning_rate?"]),
        ({"ppo": {"prompts": "x", "actor": {"lr": 1}}}, ["unknown key ppo.actor.lr"]),
        (
            {"corpus": {"sources": {"m": {"path": "x", "epoch": 1}}}},
            ["did you mean corpus.sources.m.epochs?"],
        ),
        ({"sft": {}}, ["sft.train is missing", "add it"]),
        ({"sft": {"train": "x", "batch_size": 0}}, ["sft.batch_size=0", "greater than 0"]),
        ({"pretrain": {"zero_stage": 2}}, ["zero_stage=2", "set backend=deepspeed"]),
        ({"pretrain": {"offload": "cpu"}}, ["offload=cpu needs shards", "set backend=fsdp"]),
        (
            {"pretrain": {"backend": "deepspeed", "zero_stage": 2, "offload": "nvme"}},
            ["offload=nvme needs backend=deepspeed zero_stage=3"],
        ),
        (
            {"pretrain": {"backend": "deepspeed", "zero_stage": 3, "offload": "nvme"}},
            ["offload_dir=None", "set offload_dir to a folder on the NVMe disk"],
        ),
        ({"pretrain": {"offload_dir": "/nvme"}}, ["offload=none with offload_dir=/nvme"]),
        ({"model": {"hidden_size": 190}}, ["model.hidden_size=190", "set hidden_size=186"]),
        ({"model": {"num_heads": 4, "num_kv_heads": 3}}, ["set num_kv_heads=4"]),
        ({"model": {"num_heads": 4, "num_kv_heads": 4}}, ["= 48 is a head size", "change one"]),
        (
            {"corpus": {"sources": {"m": {"path": "x"}}, "row_length": 256}},
            ["corpus.row_length=256", "model.max_length=128"],
        ),
        ({"ppo": {"prompts": "x", "batch_size": 10}}, ["10 responses", "ppo.num_minibatches=8"]),
        ({"ppo": {"prompts": "x", "max_response_tokens": 128}}, ["leaves no room for a prompt"]),
        ({"corpus": None}, ["no corpus section"]),
        ({"pretrain": None}, ["no model to start from"]),
        ({"resources": {"actor": {"num_workers": 3}}}, ["resources.actor.num_workers=3"]),
        (
            {"ppo": {"prompts": "x", "actor": {"precision": "auto"}}},
            ["ppo.actor.precision='auto'", "float32"],
        ),
        ({"name": "a/b"}, ["name='a/b'"]),
        (
            {"resources": {"actor": {"cpus": 0}}},
            ["resources.actor.cpus=0", "set resources.actor.cpus=0.01"],
        ),
        (
            {"resources": {"critic": {"gpus": 2}}},
            ["resources.critic.gpus=2", "raise resources.critic.num_workers"],
        ),
        ({"resources": {"rollout": {"gpus": 1.5}}}, ["set resources.rollout.gpus=1"]),
        ({"resources": {"gpus_per_worker": 2}}, ["raise resources.num_workers"]),
        (
            {"dpo": {"train": "x", "loss": "ipo", "label_smoothing": 0.1}},
            ["dpo.label_smoothing=0.1", "dpo.loss=ipo", "label_smoothing=0"],
        ),
        ({"dpo": {"train": "x", "label_smoothing": 0.5}}, ["dpo.label_smoothing=0.5"]),
        ({"dpo": {"train": "x", "loss": "hinge"}}, ["dpo.loss='hinge'", "'plackett_luce'"]),
        ({"dpo": {"train": "x", "beta": 0}}, ["dpo.beta=0"]),
        ({"tracking": ["wnadb"]}, ["tracking.0='wnadb'", "'wandb'"]),
        ({"run_dir": "s3://bucket/x"}, ["run_dir=s3://bucket/x", "mount the bucket"]),
        ({"run_dir": "file://host/x"}, ["run_dir=file://host/x", "mount"]),
        ({"run_dir": "file:///"}, ["run_dir=file:///"]),
    ],
)
def test_errors_name_the_value_and_the_fix(changes: dict[str, Any], says: list[str]) -> None:
    message = refuse(changes)
    for text in says:
        assert text in message
    assert len(message.splitlines()) <= 2


def test_only_rollout_takes_several_gpus() -> None:
    resources = {"rollout": {"gpus": 2}, "actor": {"gpus": 1}, "critic": {"gpus": 0.5}}
    assert config.parse({**MINIMAL, "resources": resources}).resources.rollout.gpus == 2
    assert "one GPU" in refuse({"resources": {"actor": {"gpus": 2}}})


def test_head_sizes_are_limited_where_vllm_runs_on_cpu() -> None:
    changes = {"model": {"num_heads": 4, "num_kv_heads": 4}}
    assert "= 48 is a head size" in refuse(changes)
    config.parse({**MINIMAL, **changes, "resources": {"rollout": {"gpus": 1}}})


@pytest.mark.parametrize(
    ("run_dir", "path"),
    [
        ("", "runs/toy"),
        ("/a b/c", "/a b/c"),
        ("file:///mnt/a%20b/c", "/mnt/a b/c"),
        ("file://localhost/mnt/c", "/mnt/c"),
    ],
)
def test_the_run_directory_is_a_local_path(run_dir: str, path: str) -> None:
    assert config.parse({**MINIMAL, "run_dir": run_dir}).path == Path(path)


def test_ptx_needs_a_corpus() -> None:
    tree = {
        **MINIMAL,
        "model": {"path": "x"},
        "pretrain": None,
        "corpus": None,
        "ppo": {"prompts": "x", "ptx_coef": 0.5},
    }
    with pytest.raises(config.RecipeError, match=r"ppo\.ptx_coef=0\.5.*no corpus section"):
        config.parse(tree)


def test_files_that_are_not_recipes(tmp_path: Path) -> None:
    (tmp_path / "toy.yaml").write_text("name: toy")
    with pytest.raises(config.RecipeError, match=r"no such recipe; did you mean .*toy\.yaml"):
        config.load(tmp_path / "tyo.yaml")
    broken = tmp_path / "broken.yaml"
    broken.write_text("a: [1")
    with pytest.raises(config.RecipeError, match="not valid YAML"):
        config.load(broken)
    broken.write_bytes(b"name: \xff")
    with pytest.raises(config.RecipeError, match="not UTF-8 at byte 6"):
        config.load(broken)
    broken.write_text("- 1")
    with pytest.raises(config.RecipeError, match="mapping"):
        config.load(broken)


@pytest.mark.parametrize("override", ["ppo.steps", "=3", "name.sub=1"])
def test_overrides_that_are_none(tmp_path: Path, override: str) -> None:
    file = tmp_path / "toy.yaml"
    file.write_text(yaml.safe_dump(MINIMAL))
    with pytest.raises(config.RecipeError, match=override.replace(".", r"\.")):
        config.load(file, [override])


def test_a_recipe_is_frozen() -> None:
    recipe = config.parse(MINIMAL)
    with pytest.raises(ValueError, match="frozen"):
        recipe.seed = 3  # type: ignore[misc]


def test_every_field_says_what_it_is() -> None:
    def sections(model: type[config.Section]) -> set[type[config.Section]]:
        found = {model}
        for field in model.model_fields.values():
            for kind in (field.annotation, *getattr(field.annotation, "__args__", ())):
                if isinstance(kind, type) and issubclass(kind, config.Section):
                    found |= sections(kind)
        return found

    obvious = {
        "hidden_size",
        "num_layers",
        "num_heads",
        "num_kv_heads",
        "intermediate_size",
        "batch_size",
        "actor",
        "critic",
        "reference",
        "reward",
        "rollout",
    }
    for section in sections(config.Recipe):
        assert section.__doc__
    documented = config.PPOConfig.model_fields
    assert all(
        field.description
        for name, field in documented.items()
        if name not in obvious | {"whiten_advantages", "gamma", "keep_checkpoints"}
    )
