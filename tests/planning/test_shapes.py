"""Sizes by name, by folder and by recipe, against published weights and real modules."""

import json
from pathlib import Path

import pytest

from rayrlhf.config import ModelConfig, RecipeError, load
from rayrlhf.models.causal_lm import parameter_shapes
from rayrlhf.planning import shapes

ROOT = Path(__file__).parents[2]
# The totals of the safetensors files at the hub.
PUBLISHED = {
    "meta-llama/Llama-3.2-1B-Instruct": 1_235_814_400,
    "meta-llama/Llama-3.2-3B": 3_212_749_824,
    "meta-llama/Meta-Llama-3-8B-Instruct": 8_030_261_248,
    "meta-llama/Llama-3.1-8B": 8_030_261_248,
    "meta-llama/Llama-3.1-70B-Instruct": 70_553_706_496,
    "meta-llama/Llama-3.3-70B-Instruct": 70_553_706_496,
    "meta-llama/Llama-3.1-405B": 405_853_388_800,
    "Qwen/Qwen2.5-0.5B": 494_032_768,
    "Qwen/Qwen2.5-1.5B-Instruct": 1_543_714_304,
    "Qwen/Qwen2.5-3B": 3_085_938_688,
    "Qwen/Qwen2.5-7B-Instruct": 7_615_616_512,
    "Qwen/Qwen2.5-14B": 14_770_033_664,
    "Qwen/Qwen2.5-32B-Instruct": 32_763_876_352,
    "Qwen/Qwen2.5-72B": 72_706_203_648,
    "Qwen/Qwen3-0.6B": 596_049_920,
    "Qwen/Qwen3-1.7B": 1_720_574_976,
    "Qwen/Qwen3-4B": 4_022_468_096,
    "Qwen/Qwen3-8B": 8_190_735_360,
    "Qwen/Qwen3-14B": 14_768_307_200,
    "Qwen/Qwen3-32B": 32_762_123_264,
    "mistralai/Mistral-7B-Instruct-v0.3": 7_248_023_552,
    "mistralai/Mistral-Nemo-Instruct-2407": 12_247_782_400,
    "mistralai/Mistral-Large-Instruct-2407": 122_610_069_504,
    "HuggingFaceTB/SmolLM2-135M-Instruct": 134_515_008,
    "HuggingFaceTB/SmolLM2-360M": 361_821_120,
    "HuggingFaceTB/SmolLM2-1.7B": 1_711_376_384,
    "builtin:smollm2-135m-instruct": 134_515_008,
}


@pytest.mark.parametrize(("name", "count"), PUBLISHED.items())
def test_known_models_have_the_published_parameters(name: str, count: int) -> None:
    assert shapes.named(name).num_params == count


@pytest.mark.parametrize("name", ["acme/Llama-3.1-80B", "acme/Qwen3-32B-A3B", "acme/other", ""])
def test_an_unknown_name_is_refused_with_the_list(name: str) -> None:
    with pytest.raises(RecipeError, match=r"plan knows neither a folder nor.*qwen3-32b"):
        shapes.named(name)


@pytest.mark.parametrize("architecture", ["llama", "gpt2"])
@pytest.mark.parametrize("tied", [True, False])
def test_a_shape_counts_what_the_module_has(architecture: str, tied: bool) -> None:
    cfg = ModelConfig(architecture=architecture, tie_embeddings=tied, intermediate_size=700)
    real = parameter_shapes(cfg, vocab_size=500)
    recipe = load(ROOT / "configs" / "quickstart.yaml", ["tokenizer.vocab_size=500"])
    recipe = recipe.model_copy(update={"model": cfg})
    count = 0
    for sizes in real.values():
        entries = 1
        for size in sizes:
            entries *= size
        count += entries
    assert shapes.policy(recipe).num_params == count


def test_a_folder_says_its_own_shape(tiny_model: Path, tmp_path: Path) -> None:
    shape = shapes.named(str(tiny_model))
    assert (shape.hidden_size, shape.num_layers, shape.num_kv_heads, shape.tied) == (64, 2, 2, True)
    (tmp_path / "config.json").write_text(json.dumps({"model_type": "mamba", "hidden_size": 4}))
    with pytest.raises(RecipeError, match="config.json has no num_attention_heads"):
        shapes.named(str(tmp_path))


def test_the_critic_has_the_shape_of_the_reward_model() -> None:
    recipe = load(ROOT / "configs" / "smollm2.yaml", ["reward.init=HuggingFaceTB/SmolLM2-360M"])
    assert shapes.policy(recipe).name == "smollm2-135m"
    assert shapes.critic(recipe).name == "smollm2-360m"
    assert [shape.name for shape in shapes.scorers(recipe)] == ["smollm2-360m"]
    assert shapes.of_stage(recipe, "sft").name == "smollm2-135m"
