"""What a GPU changes: kernels, precision, memory and devices; against the CPU, or by hand."""

import gc
import json
from collections.abc import Callable, Iterator
from copy import deepcopy
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor
from transformers import LlamaConfig, LlamaForCausalLM

from rayrlhf.config import TrainingConfig
from rayrlhf.metrics import read_jsonl
from rayrlhf.models.causal_lm import CausalLMModel, load_causal_lm
from rayrlhf.models.output_head import OutputHead
from rayrlhf.rl.buckets import unpacked
from rayrlhf.rl.experience import Experience, Rollout
from rayrlhf.rl.ranks import RoleSettings
from rayrlhf.rl.rollout import RolloutWorker
from rayrlhf.rl.scoring import RewardWorker
from rayrlhf.rl.workers import ActorWorker, CriticWorker, ReferenceWorker
from rayrlhf.training.backend import Backend, make_backend
from tests import toy
from tests.rl.inline import (
    SmallEngine,
    inline_settings,
    write_small_critic,
    write_small_model,
)
from tests.scripts import result_of

pytestmark = pytest.mark.skipif(not torch.cuda.is_available(), reason="needs an NVIDIA GPU")

CPU, GPU = torch.device("cpu"), torch.device("cuda:0")
WAYS: dict[str, dict[str, Any]] = {
    "ddp": {},
    "checkpointing": {"gradient_checkpointing": True},
    "compiled": {"compile": True},
    "fsdp": {"backend": "fsdp"},
    "fsdp cpu": {"backend": "fsdp", "offload": "cpu"},
    "zero 0": {"backend": "deepspeed", "zero_stage": 0},
    "zero 1": {"backend": "deepspeed", "zero_stage": 1},
    "zero 2": {"backend": "deepspeed", "zero_stage": 2},
    "zero 2 cpu": {"backend": "deepspeed", "zero_stage": 2, "offload": "cpu"},
    "zero 3": {"backend": "deepspeed", "zero_stage": 3},
    "zero 3 cpu": {"backend": "deepspeed", "zero_stage": 3, "offload": "cpu"},
    "zero 3 nvme": {"backend": "deepspeed", "zero_stage": 3, "offload": "nvme"},
}
SHAPE: dict[str, Any] = {
    "vocab_size": 999,
    "hidden_size": 128,
    "intermediate_size": 192,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "pad_token_id": 1,
}
BACKENDS = """
import json, sys
from tests.gpu.test_gpu import train
print("RESULT" + json.dumps(train(sys.argv[1], sys.argv[2], sys.argv[3])))
"""


@pytest.fixture(autouse=True)
def _exact_float32() -> Iterator[None]:
    """Forbid TF32, whose products have ten bits."""
    torch.set_float32_matmul_precision("highest")
    yield
    gc.collect()
    torch.cuda.empty_cache()


def llama(**keys: Any) -> CausalLMModel:
    torch.manual_seed(0)
    return CausalLMModel(LlamaForCausalLM(LlamaConfig(**{**SHAPE, **keys})))


def rows(count: int, tokens: int, *, apart: bool = True) -> tuple[Tensor, Tensor]:
    """Return ids and mask (count, tokens): three documents a row, and some padding."""
    generator = torch.Generator().manual_seed(count * tokens)
    ids = torch.randint(2, SHAPE["vocab_size"], (count, tokens), generator=generator)
    mask = torch.ones_like(ids)
    if apart:
        mask[:, tokens // 4 :] = 2
        mask[:, tokens // 2 :] = 3
        mask[0, -5:] = 0
    return ids, mask


def train(way: str, precision: str, folder: str, device: torch.device = GPU) -> list[float]:
    """Train four steps of two micro-batches; return the losses, then the sum of each weight."""
    place = {"offload_dir": folder} if way.endswith("nvme") else {}
    keys = {"learning_rate": 1e-2, "adam_eps": 1e-3, "precision": precision}
    cfg = TrainingConfig.model_validate({**keys, **WAYS[way], **place})
    backend = make_backend(llama(), cfg, total_steps=4, device=device)
    ids, mask = rows(4, 48)
    found = []
    for step in range(4):
        if step == 2:
            backend.rest(asleep=True)
        for half in (0, 1):
            part = slice(2 * half, 2 * half + 2)
            log_probs = backend(ids[part].to(device), mask[part].to(device))
            backend.backward(-log_probs.sum(), ids.numel(), is_last=half == 1)
            found.append(float(log_probs.detach().sum()) / ids[part].numel())
        backend.step()
    sums = [float(weight.double().sum()) for _, weight in backend.full_weights()]
    backend.save_state(folder)
    backend.load_state(folder)
    again = [float(weight.double().sum()) for _, weight in backend.full_weights()]
    assert again == sums
    return found + sums


@pytest.mark.parametrize("way", WAYS)
def test_backends_compute_what_the_cpu_does(way: str, tmp_path: Path) -> None:
    expected = train("ddp", "float32", str(tmp_path), CPU)
    (tmp_path / "other").mkdir()
    found = result_of(BACKENDS, way, "float32", str(tmp_path / "other"))
    torch.testing.assert_close(found, expected, atol=1e-4, rtol=1e-4)


@pytest.mark.parametrize("way", ["ddp", "fsdp", "zero 1", "zero 3", "zero 3 cpu"])
def test_bfloat16_is_near_float32(way: str, tmp_path: Path) -> None:
    expected = train("ddp", "float32", str(tmp_path), CPU)[:8]
    (tmp_path / "other").mkdir()
    found = result_of(BACKENDS, way, "bfloat16", str(tmp_path / "other"))[:8]
    torch.testing.assert_close(found, expected, atol=0.02, rtol=0)
    assert found[-1] > found[0] + 0.5  # it learns


@pytest.mark.parametrize("attention", ["sdpa", "flex", "auto"])
def test_packed_documents_are_alone(attention: str) -> None:
    """In rows of 1,200 tokens, where `auto` takes flex attention, outputs and gradients."""
    ids, mask = rows(2, 1200)
    results = []
    for packed in (True, False):
        cfg = TrainingConfig(precision="float32", attention=attention)
        backend = make_backend(llama(), cfg, total_steps=1, device=GPU)
        if packed:
            log_probs = backend(ids.to(GPU), mask.to(GPU))
        else:
            log_probs = torch.zeros(ids.shape, device=GPU)
            for row in range(2):
                for number in (1, 2, 3):
                    places = mask[row] == number
                    alone = ids[row, places][None].to(GPU)
                    log_probs[row, places.to(GPU)] = backend(alone, torch.ones_like(alone))[0]
        backend.backward(-log_probs.sum(), 1.0, is_last=True)
        gradients = [p.grad for p in backend.module.parameters()]
        results.append((log_probs.detach(), gradients))
    torch.testing.assert_close(results[0], results[1], atol=1e-4, rtol=1e-4)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_the_head_in_one_kernel_is_exact(dtype: torch.dtype) -> None:
    torch.manual_seed(0)
    linear = torch.nn.Linear(32, 3001, bias=False)
    states, tokens = torch.randn(70, 32), torch.randint(3001, (70,))
    grads = torch.randn(70)
    results = []
    for device in (CPU, GPU):
        head = OutputHead(linear.to(device)).to(dtype)
        inputs = states.to(device, dtype).requires_grad_()
        found, entropy = head(inputs, tokens.to(device), temperature=0.7, with_entropy=True)
        (by_inputs,) = torch.autograd.grad((found * grads.to(device)).sum(), [inputs])
        results.append([part.detach().float().cpu() for part in (found, entropy, by_inputs)])
        head.float()
    bound = 1e-4 if dtype == torch.float32 else 0.03
    torch.testing.assert_close(results[0], results[1], atol=bound, rtol=bound)


def test_logits_are_never_held_whole() -> None:
    """8,192 tokens x 50,000 words take 1.5 GiB in float32, and 0.8 in bfloat16."""
    head = OutputHead(torch.nn.Linear(64, 50_000, bias=False, device=GPU)).bfloat16()
    states = torch.randn(8192, 64, device=GPU, dtype=torch.bfloat16, requires_grad=True)
    tokens = torch.randint(50_000, (8192,), device=GPU)
    head(states, tokens, with_entropy=True)[0].sum().backward()  # the kernels are compiled now
    torch.cuda.reset_peak_memory_stats()
    before = torch.cuda.memory_allocated()
    head(states, tokens, with_entropy=True)[0].sum().backward()
    assert torch.cuda.max_memory_allocated() - before < 2**30  # a part: 0.25 in bfloat16, twice


def test_a_rest_gives_the_device_back() -> None:
    backend: Backend = make_backend(llama(), TrainingConfig(), total_steps=2, device=GPU)
    ids, mask = rows(2, 48)
    for _ in range(2):
        backend.backward(-backend(ids.to(GPU), mask.to(GPU)).sum(), 1.0, is_last=True)
        backend.step()
        torch.cuda.synchronize()
    held = torch.cuda.memory_allocated()
    moments = 8 * sum(parameter.numel() for parameter in backend.module.parameters())
    backend.rest(asleep=True)
    assert torch.cuda.memory_allocated() <= held - moments
    backend.rest(asleep=False)
    assert torch.cuda.memory_allocated() <= held + 2**20


@pytest.fixture
def make_settings(tmp_path: Path, tiny_tokenizer: Path) -> Callable[..., RoleSettings]:
    """Return settings of a toy run of PPO; its critic and reward model are at `critic`."""
    model = write_small_model(tmp_path / "small")
    write_small_critic(tmp_path / "critic", model)

    def make(num_gpus: float, **keys: Any) -> RoleSettings:
        own = inline_settings(model, tiny_tokenizer, batch_size=16, num_minibatches=2, **keys)
        return replace(own, num_gpus=num_gpus)

    return make


def ppo_step(settings: RoleSettings, critic: Path) -> tuple[dict[str, Any], dict[str, Any]]:
    """Do what the roles do in a step; return what they found, and the actor's new weights."""
    rollout_worker = RolloutWorker(replace(settings, num_gpus=0))
    rollout_worker.engine = SmallEngine(settings.model_path)  # type: ignore[assignment]
    rollout: Rollout = rollout_worker.generate(
        [[3, 4, 2 + i % 8] for i in range(settings.ppo.batch_size)], 0, step=0
    )
    scalar = replace(settings, model_path=str(critic))
    actor, value = ActorWorker(settings), CriticWorker(scalar)
    reference, reward = ReferenceWorker(settings), RewardWorker(scalar)
    actor.start(("", 0))
    value.start(("", 0))
    reference.start()
    reward.start()
    found: dict[str, Any] = {}

    def flat(name: str, parts: Any) -> Tensor:
        by_row = dict(zip(*parts, strict=True))
        found[name] = torch.cat([by_row[row] for row in range(len(rollout))])
        return found[name]

    old, _ = actor.log_probs(rollout, 0)
    old = flat("actor", old)
    values = flat("values", value.values(rollout, 0))
    flat("reference", reference.log_probs(rollout, 0))
    flat("scores", reward.score(rollout))
    targets = torch.linspace(-1, 1, len(old))
    experience = Experience(
        rollout, old_log_probs=old, advantages=targets, old_values=values, returns=targets.flip(0)
    )
    found |= actor.update(experience, 0) | value.update(experience, 0)
    return found, dict(
        unpacked(deepcopy([bucket for bucket in actor.weights("float32") if bucket]))
    )


@pytest.mark.parametrize("way", ["ddp", "lora", "ptx"])
def test_the_roles_of_ppo_compute_what_they_do_on_a_cpu(
    make_settings: Callable[..., RoleSettings], tmp_path: Path, way: str
) -> None:
    keys: dict[str, Any] = {"actor": {"learning_rate": 3e-3, "adam_eps": 1e-3}}
    keys["critic"] = dict(keys["actor"])
    if way == "lora":
        keys["lora"] = {"rank": 4}
    if way == "ptx":
        from tests.rl.inline import write_corpus

        corpus = write_corpus(tmp_path / "corpus", [[2 + i % 9, 3, 4, 5] for i in range(12)])
        keys |= {"ptx_coef": 0.5, "ptx_batch_size": 4, "corpus_path": str(corpus)}
    for section in ("actor", "critic"):
        keys[section]["precision"] = "float32"
    on_cpu = ppo_step(make_settings(0, **keys), tmp_path / "critic")
    on_gpu = ppo_step(make_settings(1, **keys), tmp_path / "critic")
    assert on_gpu[0].keys() == on_cpu[0].keys()
    for expected, found in zip(on_cpu, on_gpu, strict=True):
        for name, value in expected.items():
            torch.testing.assert_close(found[name], value, atol=1e-4, rtol=1e-3, msg=name)


def test_bfloat16_roles_agree_to_the_bit_where_weights_are_equal(
    make_settings: Callable[..., RoleSettings], tmp_path: Path
) -> None:
    keys: dict[str, Any] = {"actor": {"precision": "bfloat16"}, "critic": {"precision": "bfloat16"}}
    found, _ = ppo_step(make_settings(1, **keys), tmp_path / "critic")
    assert torch.equal(found["actor"], found["reference"])
    assert found["policy/first_ratio"] == 1


@pytest.fixture(scope="module")
def trained(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Return the run directory of all supervised stages, by the command, with a GPU a worker."""
    folder = tmp_path_factory.mktemp("stages")
    resources = {"cpus_per_worker": 1, "gpus_per_worker": 1}
    path = toy.write_recipe(folder, resources=resources)
    for stage in ("corpus", "pretrain", "sft", "reward", "dpo"):
        done = toy.run(stage, path)
        assert done.returncode == 0, done.stderr[-3000:]
    return folder / "run"


@pytest.mark.parametrize("stage", ["pretrain", "sft", "reward", "dpo"])
def test_stages_train_on_the_gpu(trained: Path, stage: str) -> None:
    lines = read_jsonl(trained / stage / "metrics.jsonl")
    assert lines[0]["perf/matmul_tflops"] > 50  # no CPU has that
    loss = "loss" if "loss" in lines[0] else next(name for name in lines[0] if "loss" in name)
    assert lines[-1][loss] < lines[0][loss], json.dumps(lines[-1])


def test_what_the_gpu_trained_speaks(trained: Path) -> None:
    model = load_causal_lm(trained / "pretrain" / "final").to(GPU)
    ids = torch.tensor([[5, 6, 7]], device=GPU)
    assert model.generate(ids, max_new_tokens=5, do_sample=False).shape[1] > 3
