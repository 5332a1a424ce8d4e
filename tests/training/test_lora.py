"""LoRA: adapters train and nothing else; folders hold merged weights, and the adapter for peft.

A random adapter would hide errors of scale, so models train first: B starts at 0.
"""

import importlib.util
import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import peft
import pytest
import torch
from safetensors.torch import load_file
from transformers import (
    AutoModelForCausalLM,
    AutoModelForSequenceClassification,
    GPT2Config,
    GPT2LMHeadModel,
    PreTrainedTokenizerFast,
)

from rayrlhf.config import LoraConfig, Recipe, RecipeError, SFTConfig, parse
from rayrlhf.models import lora
from rayrlhf.models.causal_lm import CausalLMModel
from rayrlhf.models.scalar_head import ScalarHeadModel
from rayrlhf.training.checkpoint import newest_checkpoint
from rayrlhf.training.reward import RewardStage
from rayrlhf.training.sft import SFTStage
from rayrlhf.training.stage import Stage
from tests.training.ranks import Run, run_on_ranks
from tests.training.test_loop import comparable

CPU = torch.device("cpu")
MakeRecipe = Callable[..., Recipe]
LORA = {"rank": 4, "alpha": 8, "dropout": 0.1}
IDS = torch.tensor([[5, 9, 40, 41, 7, 100, 3]])


def trained(recipe: Recipe, kind: type[Stage]) -> Path:
    """Train a stage, and return its folder."""
    run_on_ranks([Run(recipe, kind)], 1, recipe.path)
    return recipe.path / kind.name


@pytest.fixture
def gpt2(tmp_path: Path, tiny_tokenizer: Path) -> Path:
    """Return the folder of a random GPT-2, whose linear modules are transposed."""
    torch.manual_seed(0)
    tokenizer = PreTrainedTokenizerFast.from_pretrained(tiny_tokenizer)
    model = GPT2LMHeadModel(
        GPT2Config(vocab_size=len(tokenizer), n_embd=64, n_layer=2, n_head=2, n_positions=64)
    )
    model.save_pretrained(tmp_path / "gpt2")
    tokenizer.save_pretrained(tmp_path / "gpt2")
    return tmp_path / "gpt2"


@pytest.mark.parametrize("base", ["llama", "gpt2"])
def test_the_base_stays_and_the_merged_folder_computes_what_base_and_adapter_do(
    make_recipe: MakeRecipe, gpt2: Path, base: str
) -> None:
    init = {"init": str(gpt2)} if base == "gpt2" else {}
    recipe = make_recipe(sft={"lora": LORA, **init})
    start = SFTStage(recipe).start
    before = load_file(Path(start) / "model.safetensors")
    folder = trained(recipe, SFTStage)
    for saved in (folder / "final", folder / "checkpoints" / "step-00000004"):
        merged = AutoModelForCausalLM.from_pretrained(saved)
        plain = AutoModelForCausalLM.from_pretrained(start)
        with torch.no_grad():
            unadapted = plain(IDS).logits
            adapted = peft.PeftModel.from_pretrained(plain, saved / "adapter").eval()(IDS).logits
            found = merged(IDS).logits
        torch.testing.assert_close(found, adapted, rtol=1e-5, atol=2e-6)
        assert (found - unadapted).abs().max() > 0.05
        after = load_file(saved / "model.safetensors")
        assert after.keys() == before.keys()
        changed = {name for name in before if not torch.equal(before[name], after[name])}
        kinds = {name.split(".")[-2] for name in changed}
        linear = {"c_attn", "c_fc", "c_proj"}
        if base == "llama":
            linear = {f"{x}_proj" for x in ("q", "k", "v", "o", "gate", "up", "down")}
        assert kinds == linear
        assert all(name.endswith("weight") for name in changed)
    settings = json.loads((saved / "adapter" / "adapter_config.json").read_text())
    assert settings["base_model_name_or_path"] == str(start)
    assert settings["target_modules"] == sorted(linear)
    losses = [line["loss"] for line in comparable(folder)]
    assert losses[-1] < losses[0]


def test_the_optimizer_holds_adapters_only(make_recipe: MakeRecipe) -> None:
    folder = trained(make_recipe(sft={"lora": LORA, "save_every": 5}), SFTStage)
    state = folder / "checkpoints" / "step-00000005" / "training_state"
    moments = load_file(state / "optimizer-00000-of-00001-00000.safetensors")
    moments = {name: value for name, value in moments.items() if name.startswith("exp_avg/")}
    assert len(moments) == 2 * 7 * 2  # A and B of 7 modules of 2 layers
    assert all(".lora_" in name for name in moments)


@pytest.mark.parametrize("killed_after", [2, 5])
@pytest.mark.parametrize("kind", [SFTStage, RewardStage])
def test_resume_equals_uninterrupted(
    make_recipe: MakeRecipe, tmp_path: Path, kind: type[Stage], killed_after: int
) -> None:
    start = str(make_recipe("start").path / "pretrain" / "final")
    section = {kind.name: {"lora": LORA, "dropout": 0.2, "init": start}}
    whole, killed = (make_recipe(name, **section) for name in ("whole", "killed"))
    run_on_ranks([Run(whole, kind), Run(killed, kind, killed_after)], 1, tmp_path)
    folders = [recipe.path / kind.name for recipe in (whole, killed)]
    assert comparable(folders[1]) == comparable(folders[0])
    names = ["model.safetensors", "config.json"]
    names += [f"adapter/{name}" for name in ("adapter_config.json", lora.WEIGHTS)]
    for name in names:
        left, right = ((folder / "final" / name).read_bytes() for folder in folders)
        assert left == right, name


def test_a_reward_model_trains_its_head_with_the_adapter(make_recipe: MakeRecipe) -> None:
    recipe = make_recipe(reward={"lora": LORA})
    stage = RewardStage(recipe)
    new = ScalarHeadModel.from_causal_lm(stage.start, recipe.seed).hf.score.weight
    final = trained(recipe, RewardStage) / "final"
    merged = AutoModelForSequenceClassification.from_pretrained(final)
    assert not torch.equal(merged.score.weight, new)
    base = AutoModelForSequenceClassification.from_pretrained(stage.start, num_labels=1)
    ours = ScalarHeadModel.from_pretrained(final)
    adapted = peft.PeftModel.from_pretrained(base, final / "adapter").eval()
    with torch.no_grad():
        scores = adapted(IDS).logits
        torch.testing.assert_close(merged(IDS).logits, scores, rtol=1e-5, atol=1e-6)
        outputs = ours(IDS, torch.ones_like(IDS)) + ours.shift
    torch.testing.assert_close(outputs[:, -1:], scores, rtol=1e-5, atol=1e-6)


@pytest.mark.slow
def test_two_ranks_of_every_backend(make_recipe: MakeRecipe, tmp_path: Path) -> None:
    """Resume equals uninterrupted, and all have DDP's losses and merged weights."""
    start = make_recipe("start").path / "pretrain" / "final"
    backends: dict[str, dict[str, Any]] = {
        "ddp": {},
        "fsdp": {"backend": "fsdp"},
        "zero0": {"backend": "deepspeed"},
        "zero2": {"backend": "deepspeed", "zero_stage": 2},
        "zero3": {"backend": "deepspeed", "zero_stage": 3},
        "zero3-bfloat16": {"backend": "deepspeed", "zero_stage": 3, "precision": "bfloat16"},
    }
    recipes = {
        (name, run): make_recipe(f"{name}-{run}", sft={"lora": LORA, "init": str(start), **section})
        for name, section in backends.items()
        for run in ("whole", "killed")
    }
    runs = [
        Run(recipe, SFTStage, 5 if run == "killed" else None)
        for (_, run), recipe in recipes.items()
    ]
    run_on_ranks(runs, 2, tmp_path)
    reference = recipes["ddp", "whole"].path / "sft"
    weights = load_file(reference / "final" / "model.safetensors")
    before = load_file(start / "model.safetensors")
    for name in backends:
        whole, killed = (recipes[name, run].path / "sft" for run in ("whole", "killed"))
        assert newest_checkpoint(killed) == killed / "checkpoints" / "step-00000004"
        assert comparable(killed) == comparable(whole), name
        for file in ("model.safetensors", f"adapter/{lora.WEIGHTS}"):
            left, right = (folder / "final" / file for folder in (whole, killed))
            assert left.read_bytes() == right.read_bytes(), (name, file)
        if "bfloat16" in name:
            continue
        losses, expected = ([line["loss"] for line in comparable(f)] for f in (whole, reference))
        assert losses == pytest.approx(expected, rel=1e-4), name
        found = load_file(whole / "final" / "model.safetensors")
        assert found.keys() == weights.keys() == before.keys()
        for key, weight in found.items():
            assert (weight - weights[key]).abs().max() < 2e-3, (name, key)
            if "proj" not in key:
                assert torch.equal(weight, before[key]), (name, key)


def test_checkpointed_layers_compute_the_same(make_recipe: MakeRecipe, tmp_path: Path) -> None:
    """Nothing that enters the first layer has a gradient."""
    recipes = [
        make_recipe(str(on), sft={"lora": LORA, "gradient_checkpointing": on})
        for on in (False, True)
    ]
    run_on_ranks([Run(recipe, SFTStage) for recipe in recipes], 1, tmp_path)
    losses = [[line["loss"] for line in comparable(r.path / "sft")] for r in recipes]
    assert losses[1] == pytest.approx(losses[0], rel=1e-5)
    assert losses[1][-1] < losses[1][0]


def test_a_name_without_a_linear_module(make_recipe: MakeRecipe) -> None:
    for wrong in ("q_prj", "embed_tokens", "lm_head"):
        recipe = make_recipe(sft={"lora": {"target_modules": ["v_proj", wrong]}})
        with pytest.raises(RecipeError) as caught:
            SFTStage(recipe)
        assert f"is called '{wrong}'" in str(caught.value)
        assert "choose from down_proj, gate_proj, k_proj, o_proj, q_proj, up_proj, v_proj" in str(
            caught.value
        )


def test_chosen_modules_get_an_adapter(make_recipe: MakeRecipe) -> None:
    stage = SFTStage(make_recipe(sft={"lora": {"target_modules": ["mlp.up_proj", "q_proj"]}}))
    names = [name for name, p in stage.build(None).named_parameters() if p.requires_grad]
    assert {name.split(".lora_")[0].rpartition(".")[2] for name in names} == {"up_proj", "q_proj"}
    assert len(names) == 2 * 2 * 2


def test_new_adapters_change_nothing_and_follow_from_the_seed(
    make_recipe: MakeRecipe, tiny_model: Path
) -> None:
    plain = CausalLMModel.from_pretrained(tiny_model)
    cfg = SFTConfig(train="x", lora=LoraConfig(**LORA))
    state = torch.get_rng_state()
    models = [
        CausalLMModel.to_finetune(tiny_model, cfg, checkpoint=None, seed=seed).eval()
        for seed in (0, 0, 1)
    ]
    assert torch.equal(torch.get_rng_state(), state)
    with torch.no_grad():
        expected = plain(IDS, torch.ones_like(IDS))
        for model in models:
            assert torch.equal(model(IDS, torch.ones_like(IDS)), expected)
    a = [dict(model.named_parameters())[A_OF_Q] for model in models]
    assert torch.equal(a[0], a[1]) and not torch.equal(a[0], a[2])


A_OF_Q = "hf.model.layers.0.self_attn.q_proj.lora_A.default.weight"


@pytest.mark.parametrize("package", ["peft", "bitsandbytes"])
def test_a_package_that_is_missing(
    make_recipe: MakeRecipe, monkeypatch: pytest.MonkeyPatch, package: str
) -> None:
    recipe = make_recipe(sft={"lora": LORA, "quantization": "nf4"})
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None if name == package else True)
    extra = {"peft": "lora", "bitsandbytes": "qlora"}[package]
    with pytest.raises(RecipeError, match=rf"{package}, .*pip install 'rayrlhf\[{extra}\]'"):
        lora.check(recipe.path / "sft" / "final", recipe.sft)


@pytest.mark.parametrize("kind", [SFTStage, RewardStage])
def test_nf4_trains_beside_weights_of_4_bits(
    make_recipe: MakeRecipe, tmp_path: Path, kind: type[Stage]
) -> None:
    start = str(make_recipe("start").path / "pretrain" / "final")
    section = {kind.name: {"lora": LORA, "quantization": "nf4", "init": start}}
    whole, killed = (make_recipe(name, **section) for name in ("whole", "killed"))
    stage = kind(whole)
    module: Any = stage.build(None)
    held = module.hf.model.layers[1].mlp.up_proj.base_layer.weight
    assert held.dtype == torch.uint8 and held.numel() == 64 * 128 / 2  # two to a byte
    run_on_ranks([Run(whole, kind), Run(killed, kind, 5)], 1, tmp_path)
    folders = [recipe.path / kind.name for recipe in (whole, killed)]
    assert comparable(folders[1]) == comparable(folders[0])
    left, right = (folder / "final" / "model.safetensors" for folder in folders)
    assert left.read_bytes() == right.read_bytes()
    assert "quantization_config" not in json.loads((folders[0] / "final/config.json").read_text())

    before, after = load_file(Path(start) / "model.safetensors"), load_file(left)
    assert after.keys() - {lora.HEAD} == before.keys()
    for name, weight in before.items():
        assert after[name].dtype == torch.float32 and after[name].shape == weight.shape
        if "proj" not in name:
            assert torch.equal(after[name], weight)
    checkpoint = folders[0] / "checkpoints" / "step-00000004"
    beside: Any = stage.build(checkpoint)
    merged = type(beside).from_pretrained(checkpoint)
    with torch.no_grad():
        adapted, found = (model.eval()(IDS, torch.ones_like(IDS)) for model in (beside, merged))
    torch.testing.assert_close(found, adapted, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize(
    ("stage", "section", "says"),
    [
        ("sft", {"quantization": "nf4"}, "add `lora: {}`"),
        (
            "sft",
            {"quantization": "nf4", "lora": {}, "backend": "deepspeed"},
            "needs backend=ddp, not deepspeed",
        ),
        ("pretrain", {"lora": {}}, "take lora out"),
    ],
)
def test_sections_that_make_no_sense(stage: str, section: dict[str, Any], says: str) -> None:
    tree = {
        "name": "x",
        "model": {"path": "x"},
        "tokenizer": {"path": "x"},
        stage: {"corpus": "x"} if stage == "pretrain" else {"train": "x"},
    }
    tree[stage] |= section
    with pytest.raises(RecipeError, match=says):
        parse(tree)
