"""Presets of GPT-3 and LLaMA: the papers' tables, and that a recipe's own keys win."""

import math
from pathlib import Path
from typing import Any, get_args

import pytest
import yaml

from rayrlhf import config
from rayrlhf.config.model import Size
from rayrlhf.config.sizes import SIZES

TREE: dict[str, Any] = {
    "name": "big",
    "corpus": {"sources": {"web": {"path": "web.jsonl"}}},
    "pretrain": {},
}
# arXiv:2005.14165, table 2.1: layers, width, heads, batch in millions of tokens, learning rate;
# arXiv:2302.13971, table 2: the same. In brackets what the tables say where it can't be.
TABLES = {
    "gpt3-125m": (12, 768, 12, 0.5, 6.0e-4),
    "gpt3-350m": (24, 1024, 16, 0.5, 3.0e-4),
    "gpt3-760m": (24, 1536, 16, 0.5, 2.5e-4),
    "gpt3-1.3b": (24, 2048, 16, 1, 2.0e-4),  # (24 heads)
    "gpt3-2.7b": (32, 2560, 32, 1, 1.6e-4),
    "gpt3-6.7b": (32, 4096, 32, 2, 1.2e-4),
    "gpt3-13b": (40, 5120, 40, 2, 1.0e-4),  # (a width of 5140)
    "gpt3-175b": (96, 12288, 96, 3.2, 0.6e-4),
    "llama-7b": (32, 4096, 32, 4, 3.0e-4),
    "llama-13b": (40, 5120, 40, 4, 3.0e-4),
    "llama-33b": (60, 6656, 52, 4, 1.5e-4),
    "llama-65b": (80, 8192, 64, 4, 1.5e-4),
}
PARAMETERS = {  # billions, as the papers say
    "gpt3-125m": 0.125,
    "gpt3-350m": 0.350,
    "gpt3-760m": 0.760,
    "gpt3-1.3b": 1.3,
    "gpt3-2.7b": 2.7,
    "gpt3-6.7b": 6.7,
    "gpt3-13b": 13.0,
    "gpt3-175b": 175.0,
    "llama-7b": 6.7,
    "llama-13b": 13.0,
    "llama-33b": 32.5,
    "llama-65b": 65.2,
}


def sized(size: str, **sections: dict[str, Any]) -> config.Recipe:
    tree = {**TREE, **sections, "model": {"size": size, **sections.get("model", {})}}
    return config.parse(tree)


@pytest.mark.parametrize("size", get_args(Size))
def test_the_papers_tables(size: str) -> None:
    recipe = sized(size)
    model, pretrain = recipe.model, recipe.pretrain
    assert pretrain is not None and recipe.corpus is not None
    layers, width, heads, batch, rate = TABLES[size]
    assert (model.num_layers, model.hidden_size, model.num_heads) == (layers, width, heads)
    assert model.max_length == recipe.corpus.row_length == 2048
    assert pretrain.batch_size * 2048 == pytest.approx(batch * 1e6, rel=0.05)
    assert pretrain.learning_rate == rate
    assert (pretrain.adam_beta1, pretrain.adam_beta2, pretrain.adam_eps) == (0.9, 0.95, 1e-8)
    assert (pretrain.weight_decay, pretrain.grad_clip) == (0.1, 1.0)
    assert pretrain.min_learning_rate_ratio == 0.1 and pretrain.loss_spike is not None
    if size.startswith("gpt3"):
        assert (pretrain.warmup_tokens, pretrain.decay_tokens) == (375_000_000, 260_000_000_000)
        assert pretrain.batch_size_start == 16
        assert pretrain.batch_ramp_tokens is not None
        assert 4e9 <= pretrain.batch_ramp_tokens <= 12e9
        assert model.architecture == "gpt2" and model.tie_embeddings
        assert recipe.tokenizer.vocab_size == 50_257
    else:
        assert (pretrain.warmup_steps, pretrain.warmup_ratio) == (2000, 0)
        assert pretrain.batch_size_start is pretrain.decay_tokens is None
        assert model.architecture == "llama" and not model.tie_embeddings
        assert recipe.tokenizer.vocab_size == 32_000


@pytest.mark.parametrize("size", get_args(Size))
def test_parameters_are_those_of_the_papers(size: str) -> None:
    from rayrlhf.models.causal_lm import parameter_shapes

    recipe = sized(size)
    shapes = parameter_shapes(recipe.model, vocab_size=recipe.tokenizer.vocab_size)
    found = sum(map(math.prod, shapes.values()))
    assert found / 1e9 == pytest.approx(PARAMETERS[size], rel=0.02)


def test_every_size_is_in_the_table() -> None:
    assert set(get_args(Size)) == set(SIZES) == set(TABLES)


def test_a_recipes_own_keys_win() -> None:
    recipe = sized(
        "gpt3-125m",
        model={"num_layers": 6},
        corpus={**TREE["corpus"], "row_length": 1024},
        tokenizer={"vocab_size": 8192},
        pretrain={"batch_size": 64, "warmup_ratio": 0.01, "weight_decay": 0.0, "loss_spike": None},
    )
    assert (recipe.model.num_layers, recipe.model.hidden_size) == (6, 768)
    assert recipe.tokenizer.vocab_size == 8192
    pretrain = recipe.pretrain
    assert pretrain is not None
    assert (pretrain.batch_size, pretrain.batch_size_start, pretrain.batch_ramp_tokens) == (
        *(64, None, None),
    )
    assert (pretrain.warmup_ratio, pretrain.warmup_tokens) == (0.01, None)
    assert (pretrain.weight_decay, pretrain.loss_spike) == (0.0, None)
    assert pretrain.learning_rate == 6e-4
    shorter = sized("gpt3-125m", corpus={**TREE["corpus"], "row_length": 1024}).pretrain
    assert shorter is not None
    assert (shorter.batch_size, shorter.batch_size_start) == (512, 32)  # as many tokens


@pytest.mark.parametrize("size", ["gpt3-125m", "llama-7b"])
def test_the_written_recipe_has_the_numbers_and_reads_back(size: str) -> None:
    recipe = sized(size)
    written = yaml.safe_load(yaml.safe_dump(recipe.model_dump(mode="json")))
    assert written["model"]["hidden_size"] == recipe.model.hidden_size
    assert written["pretrain"]["learning_rate"] == TABLES[size][4]
    assert config.parse(written) == recipe


def test_shipped_examples_take_their_numbers_from_the_size() -> None:
    configs = Path(__file__).parents[1] / "configs"
    for name, size in (("gpt3-125m", "gpt3-125m"), ("llama-7b", "llama-7b")):
        recipe = config.load(configs / f"pretrain-{name}.yaml")
        assert recipe.model.size == size and recipe.pretrain is not None
        assert recipe.pretrain.learning_rate == TABLES[size][4]
        assert recipe.pretrain.batch_size * 2048 == pytest.approx(TABLES[size][3] * 1e6, rel=0.05)


@pytest.mark.parametrize(
    ("changes", "says"),
    [
        ({"model": {"size": "gpt3-1b"}}, ["model.size='gpt3-1b'", "gpt3-1.3b"]),
        (
            {"model": {"size": "llama-7b", "path": "x"}, "tokenizer": {"path": "x"}},
            ["model.path=x", "take out model.size=llama-7b"],
        ),
        (
            {"model": {"architecture": "gpt2", "num_kv_heads": 3}},
            ["num_kv_heads=3", "set num_kv_heads=6"],
        ),
        (
            {"pretrain": {"warmup_steps": 3, "warmup_tokens": 9}},
            ["warmup_steps=3 and warmup_tokens=9", "keep one"],
        ),
        (
            {"pretrain": {"warmup_ratio": 0.1, "warmup_steps": 9}},
            ["warmup_ratio=0.1 and warmup_steps=9"],
        ),
        ({"pretrain": {"batch_size_start": 4}}, ["batch_ramp_tokens=None", "set both"]),
        (
            {"pretrain": {"batch_size_start": 40, "batch_ramp_tokens": 9}},
            ["batch_size_start=40 is larger than pretrain.batch_size=32"],
        ),
        (
            {"pretrain": {"warmup_tokens": 9, "decay_tokens": 9}},
            ["decay_tokens=9 is not beyond pretrain.warmup_tokens=9"],
        ),
    ],
)
def test_errors_name_the_value_and_the_fix(changes: dict[str, Any], says: list[str]) -> None:
    with pytest.raises(config.RecipeError) as caught:
        config.parse({**TREE, **changes})
    for text in says:
        assert text in str(caught.value)
