"""Sequence parallelism: what ranks that share rows compute is what one process computes."""

import json
import shutil
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any
from unittest import mock

import numpy as np
import pytest
import torch
import torch.distributed as dist
import torch.multiprocessing as mp
import torch.nn.functional as F
from safetensors.torch import load_file
from torch import Tensor
from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast

from rayrlhf.config import Recipe, RecipeError, TrainingConfig
from rayrlhf.metrics import read_jsonl
from rayrlhf.models.causal_lm import CausalLMModel, token_log_probs
from rayrlhf.training import loop
from rayrlhf.training.backend import Backend, make_backend
from rayrlhf.training.backend.ulysses import _attend
from rayrlhf.training.dpo import DPOStage
from rayrlhf.training.pretrain import PretrainStage
from rayrlhf.training.reward import RewardStage
from rayrlhf.training.sft import SFTStage
from rayrlhf.training.stage import Stage
from tests.training.conftest import ROW_LENGTH, write_corpus

MakeRecipe = Callable[..., Recipe]
CPU = torch.device("cpu")
KEYS = (
    *("loss", "eval/loss", "grad_norm", "skipped_steps", "tokens"),
    *("pair_accuracy", "num_pairs", "eval/num_pairs"),
)
NOISE = (DPOStage, "pair_accuracy")
"""The policy starts as the reference: which of two responses it prefers is rounding."""
FSDP = {"backend": "fsdp"}
ZERO3 = {"backend": "deepspeed", "zero_stage": 3}
GROUPED = {"num_heads": 4, "num_kv_heads": 2}
GPT2 = {"architecture": "gpt2", "num_heads": 4, "num_kv_heads": 4}
SPIKE = 3
"""The step that has one."""


class NoisyStage(SFTStage):
    """Noise of NEFTune that is 1, not random: its scale is what the ranks have to agree on."""

    def loss(self, backend: Backend, micro: Any) -> tuple[Tensor, dict[str, Tensor]]:
        with mock.patch.object(Tensor, "uniform_", lambda noise, *_: noise.fill_(1.0)):
            return super().loss(backend, micro)


class SpikingStage(PretrainStage):
    """A hundred times the loss in one step."""

    def loss(self, backend: Backend, micro: Any) -> tuple[Tensor, dict[str, Tensor]]:
        loss_sum, sums = super().loss(backend, micro)
        factor = 100.0 if backend.num_steps == SPIKE - 1 else 1.0
        return loss_sum * factor, {name: value * factor for name, value in sums.items()}


STAGES: dict[str, tuple[type[Stage], dict[str, Any]]] = {
    "joined": (PretrainStage, {}),
    "apart": (PretrainStage, {"documents": "apart"}),
    "sft": (SFTStage, {}),
    "lora": (SFTStage, {"lora": {"rank": 4, "dropout": 0.0}, "adam_eps": 1e-4}),
    "reward": (RewardStage, {}),
    # Gradients of a pair cancel where its responses agree: Adam would take rounding to size 1.
    "dpo": (DPOStage, {"adam_eps": 1e-4}),
    "gpt2": (PretrainStage, {"documents": "apart"}),
    "noisy": (NoisyStage, {"neftune_alpha": 5.0}),
    "spike": (
        SpikingStage,
        {"max_steps": 5, "learning_rate": 1e-7, "loss_spike": {"window": 4, "threshold": 20}},
    ),
    "bfloat16": (SFTStage, {"precision": "bfloat16", "adam_eps": 1e-3}),
}
SHARDED = ("apart", "reward", "noisy", "spike", "bfloat16")
FLOAT32, BFLOAT16 = 1e-5, 2**-8
"""Tolerances; the second is a step of bfloat16: shards round weights, autocast does not."""
SPLITS: dict[str, tuple[int, int, dict[str, Any]]] = {
    "2-by-2": (2, 2, {}),
    "4-by-2": (4, 2, {"gradient_checkpointing": True}),
    "4-by-4": (4, 4, {}),
    "2-by-2-zero3": (2, 2, ZERO3),
    "4-by-2-fsdp": (4, 2, FSDP),
}


@pytest.fixture(scope="module")
def grouped_model(tmp_path_factory: pytest.TempPathFactory, tiny_tokenizer: Path) -> Path:
    """Return the folder of a random Llama with two query heads to a key-value head."""
    tokenizer = PreTrainedTokenizerFast.from_pretrained(tiny_tokenizer)
    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=len(tokenizer),
        hidden_size=32,
        intermediate_size=64,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=2,
        max_position_embeddings=64,
        bos_token_id=None,
        eos_token_id=tokenizer.eos_token_id,
        pad_token_id=tokenizer.pad_token_id,
    )
    folder = tmp_path_factory.mktemp("grouped")
    LlamaForCausalLM(config).save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    return folder


def write_rows(recipe: Recipe) -> None:
    """Write rows of documents of all lengths, some cut by the end of their row."""
    rng = np.random.default_rng(1)
    rows = np.where(rng.random((19, ROW_LENGTH)) < 0.2, 0, rng.integers(2, 40, (19, ROW_LENGTH)))
    tokenizer = recipe.path / "tokenizer"
    write_corpus(recipe.path / "corpus", tokenizer, train=rows, validation_books=rows[:5])


@dataclass(frozen=True)
class Job:
    recipe: Recipe
    kind: type[Stage]
    world_size: int


def _ranks(rank: int, folder: str, jobs: Sequence[Job], model: str) -> None:
    """Do the jobs of two ranks, then those of four: processes are slow to start."""
    torch.set_num_threads(1)
    for world_size in (2, 4):
        if rank >= world_size:
            continue
        dist.init_process_group(
            "gloo", init_method=f"file://{folder}/{world_size}", rank=rank, world_size=world_size
        )
        for job in jobs:
            if job.world_size == world_size:
                loop.run(job.kind(job.recipe), CPU)
        check_packed_row(model, world_size)
        dist.destroy_process_group()


def check_packed_row(model: str, size: int) -> None:
    """Documents of a packed row have the log-probs of each alone; a rank has S/n hidden states."""
    plain = CausalLMModel.from_pretrained(model)
    split = CausalLMModel.from_pretrained(model)
    backend = make_backend(
        split, TrainingConfig(), total_steps=1, device=CPU, sequence_parallel=size
    )
    shapes = []
    for layer in split.hf.model.layers:
        layer.register_forward_hook(lambda *call: shapes.append(tuple(call[-1].shape)))
    lengths = (1, 4, 6, 2)
    ids = torch.randint(2, 250, (1, sum(lengths)), generator=torch.Generator().manual_seed(3))
    numbers = torch.cat([torch.full((1, n), i + 1) for i, n in enumerate(lengths)], dim=1)
    with torch.no_grad():
        found = backend(ids, numbers)[0].split(lengths)
        for document, own in zip(ids[0].split(lengths), found, strict=True):
            alone = token_log_probs(plain.hf, document[None], torch.ones_like(document[None]))[0]
            torch.testing.assert_close(own, alone, rtol=1e-5, atol=1e-6)
        # What is not split is still computed whole: samples, with their cache.
        whole = token_log_probs(split.hf, ids, torch.ones_like(ids))
        torch.testing.assert_close(whole, token_log_probs(plain.hf, ids, torch.ones_like(ids)))
    part = -(-sum(lengths) // size)
    assert shapes == [(1, part, 32)] * 2 + [(1, sum(lengths), 32)] * 2
    generated = [
        each.hf.generate(input_ids=ids, attention_mask=ids * 0 + 1, max_new_tokens=5)
        for each in (plain, split)
    ]
    assert torch.equal(*generated)


def outcome(job: Job) -> tuple[list[dict[str, float]], dict[str, Tensor]]:
    folder = job.recipe.path / job.kind.name
    lines = [
        {key: line[key] for key in KEYS if key in line and (job.kind, key) != NOISE}
        for line in read_jsonl(folder / "metrics.jsonl")
    ]
    return lines, load_file(folder / "final" / "model.safetensors")


def config_of(job: Job) -> dict[str, Any]:
    """Return the saved config without the shift, a mean whose last digits depend on the order."""
    file = job.recipe.path / job.kind.name / "final" / "config.json"
    config: dict[str, Any] = json.loads(file.read_text(encoding="utf-8"))
    config.pop("score_shift", None)
    return config


@pytest.mark.slow
def test_ranks_that_share_rows_equal_one_process(
    make_recipe: MakeRecipe, grouped_model: Path, tmp_path: Path
) -> None:
    """Losses, held-out losses, gradient norms and weights of all stages; ragged lengths.

    Two key-value heads: over four ranks each is held twice.
    """

    def job(name: str, stage: str, world_size: int, size: int, backend: dict[str, Any]) -> Job:
        kind, section = STAGES[stage]
        section = {"dropout": 0.0, "max_steps": 2, "save_every": 99, **section, **backend}
        recipe = make_recipe(
            f"{name}-{stage}",
            {"num_workers": world_size, "sequence_parallel": size},
            model=GPT2 if stage == "gpt2" else GROUPED,
            **{kind.name: section},
        )
        write_rows(recipe)
        shutil.rmtree(recipe.path / "pretrain")
        if kind is not PretrainStage:
            shutil.copytree(grouped_model, recipe.path / "pretrain" / "final")
        shutil.rmtree(recipe.path / "sft")
        if kind in (RewardStage, DPOStage):
            shutil.copytree(grouped_model, recipe.path / "sft" / "final")
        return Job(recipe, kind, world_size)

    alone = {stage: job("alone", stage, 1, 1, {}) for stage in STAGES}
    for each in alone.values():
        loop.run(each.kind(each.recipe), CPU)
    split = {
        (name, stage): job(name, stage, *how)
        for name, how in SPLITS.items()
        for stage in STAGES
        if how[-1] not in (ZERO3, FSDP) or stage in SHARDED
    }
    mp.spawn(_ranks, (str(tmp_path), list(split.values()), str(grouped_model)), nprocs=4)

    for (name, stage), each in split.items():
        lines, weights = outcome(each)
        expected_lines, expected = outcome(alone[stage])
        tolerance = BFLOAT16 if stage == "bfloat16" else FLOAT32
        wanted = [pytest.approx(line, rel=tolerance) for line in expected_lines]
        assert lines and lines == wanted, (name, stage)
        if stage == "spike":
            assert [line["skipped_steps"] for line in lines] == [0, 0, 1, 1, 1]
        if stage == "bfloat16":  # what is kept is not
            assert any(not weight.equal(weight.bfloat16().float()) for weight in weights.values())
        assert weights.keys() == expected.keys()
        for key, weight in weights.items():
            torch.testing.assert_close(
                weight, expected[key], rtol=tolerance, atol=tolerance, msg=f"{name} {stage} {key}"
            )
        assert config_of(each) == config_of(alone[stage])


def test_attention_is_that_of_each_document_alone() -> None:
    """Forward and backward, against a mask over whole rows; a document ends with its row."""
    generator = torch.Generator().manual_seed(0)
    query = torch.randn(2, 7, 4, 3, generator=generator, dtype=torch.float64, requires_grad=True)
    key, value = (
        torch.randn(2, 7, 2, 3, generator=generator, dtype=torch.float64, requires_grad=True)
        for _ in range(2)
    )
    lengths = [3, 1, 3, 5, 2]
    numbers = torch.arange(5).repeat_interleave(torch.tensor(lengths)).view(2, 7)
    seen = (numbers[:, :, None] == numbers[:, None]) & torch.ones(7, 7).tril().bool()
    found = _attend(query, key, value, lengths=lengths, scale=0.5, dropout=0.0)
    wanted = F.scaled_dot_product_attention(
        query.transpose(1, 2),
        key.repeat_interleave(2, 2).transpose(1, 2),
        value.repeat_interleave(2, 2).transpose(1, 2),
        attn_mask=seen[:, None],
        scale=0.5,
    ).transpose(1, 2)
    torch.testing.assert_close(found, wanted)
    weights = torch.randn(found.shape, generator=generator, dtype=torch.float64)
    for got, right in zip(
        torch.autograd.grad((found * weights).sum(), (query, key, value)),
        torch.autograd.grad((wanted * weights).sum(), (query, key, value)),
        strict=True,
    ):
        torch.testing.assert_close(got, right)


@pytest.mark.parametrize(
    ("model", "size", "rule"),
    [
        ({}, 4, "has 2 attention heads.*set it to one of 1, 2"),
        ({"num_heads": 8, "num_kv_heads": 8}, 3, "has 8 attention heads.*one of 1, 2, 4, 8"),
        (
            {"hidden_size": 24, "num_heads": 12, "num_kv_heads": 4},
            6,
            "has 4 key-value heads.*one of 1, 2, 4",
        ),
    ],
)
def test_heads_that_do_not_divide_are_refused(
    make_recipe: MakeRecipe, model: dict[str, int], size: int, rule: str
) -> None:
    resources = {"num_workers": size, "sequence_parallel": size}
    with pytest.raises(RecipeError, match=f"(?s)resources.sequence_parallel={size}.*{rule}"):
        make_recipe(resources=resources, model=model)


def test_workers_that_do_not_divide_are_refused(make_recipe: MakeRecipe) -> None:
    with pytest.raises(RecipeError, match=r"num_workers=3.*sequence_parallel=2.*change one"):
        make_recipe(resources={"num_workers": 3, "sequence_parallel": 2})


def test_a_start_model_that_cannot_be_split_is_refused_before_training(
    make_recipe: MakeRecipe, grouped_model: Path
) -> None:
    recipe = make_recipe(
        resources={"num_workers": 8, "sequence_parallel": 8},
        model={"hidden_size": 32, "num_heads": 8, "num_kv_heads": 8},
    )
    with pytest.raises(RecipeError, match="sequence_parallel=8.*has 2 attention heads"):
        SFTStage(recipe)  # of tiny_model


@pytest.mark.parametrize("setting", [{"compile": True}, {"attention": "flex"}])
def test_what_another_attention_needs_is_refused(
    make_recipe: MakeRecipe, setting: dict[str, Any]
) -> None:
    name = next(iter(setting))
    with pytest.raises(RecipeError, match=rf"{name}=.*sequence_parallel=2.*set {name}="):
        make_recipe(resources={"num_workers": 2, "sequence_parallel": 2}, sft=setting)


def test_what_follows_from_the_batch_size_counts_groups(make_recipe: MakeRecipe) -> None:
    recipe = make_recipe(resources={"num_workers": 4, "sequence_parallel": 2})
    said = loop.derived_numbers(PretrainStage(recipe))
    assert "on average 2 per 2 ranks on 2," in said
