"""Every backend against one plain PyTorch process, on 2, 4 and 1 ranks that hand on their state.

Processes start once per number of ranks: they take longer to start than to check.
"""

import math
import os
from collections.abc import Iterator
from functools import cache, partial
from pathlib import Path
from typing import Any
from unittest import mock

import pytest
import torch
import torch.distributed as dist
import torch.multiprocessing as mp
from torch import Tensor
from torch._dynamo.utils import counters
from transformers import AutoModelForCausalLM

from rayrlhf.config import ModelConfig, TrainingConfig
from rayrlhf.models.causal_lm import CausalLMModel, build_causal_lm
from rayrlhf.training.backend import Backend, make_backend

pytestmark = pytest.mark.slow

V, S = 97, 12
CPU = torch.device("cpu")
SETTINGS: dict[str, Any] = {
    "learning_rate": 1e-2,
    "min_learning_rate_ratio": 1.0,
    "adam_eps": 1e-3,  # below it, gradients of rounding errors would count as others do
    "weight_decay": 0.1,
    "grad_clip": 0.5,
}
SHARDED = {f"zero{stage}": {"backend": "deepspeed", "zero_stage": stage} for stage in (1, 2, 3)}
BACKENDS: dict[str, dict[str, Any]] = {
    "ddp": {},
    "zero1": SHARDED["zero1"],
    "fsdp": {"backend": "fsdp"},
    "zero2": SHARDED["zero2"],
    "zero0": {"backend": "deepspeed", "zero_stage": 0},
    "zero3": SHARDED["zero3"],
}
VARIANTS: dict[str, dict[str, Any]] = {
    **{f"{name} cpu": {**keys, "offload": "cpu"} for name, keys in SHARDED.items()},
    **{f"{name} bfloat16": {**keys, "precision": "bfloat16"} for name, keys in SHARDED.items()},
    "zero3 cpu bfloat16": {**SHARDED["zero3"], "offload": "cpu", "precision": "bfloat16"},
    "fsdp bfloat16": {"backend": "fsdp", "precision": "bfloat16"},
    "fsdp cpu": {"backend": "fsdp", "offload": "cpu"},
}
COMPILED = ("zero2", "fsdp")
"""Backends of shards whose layers may be compiled."""
WORLDS = (2, 4, 1)
"""Numbers of ranks, one after the other; each does two steps, in 4 micro-batches over all ranks."""


def make_model() -> CausalLMModel:
    """Return a model with a tied head and rows that 4 ranks cannot share evenly."""
    cfg = ModelConfig(
        hidden_size=30,
        num_layers=2,
        num_heads=3,
        num_kv_heads=3,
        intermediate_size=41,
        max_length=S,
        tie_embeddings=True,
    )
    return CausalLMModel(build_causal_lm(cfg, vocab_size=V, eos_token_id=0, pad_token_id=1, seed=0))


def make_rows(step: int) -> tuple[Tensor, Tensor]:
    """Return token ids and mask (8, S) of a step: ragged, two rows without a token to predict."""
    generator = torch.Generator().manual_seed(step)
    lengths = torch.randint(3, S + 1, (8, 1), generator=generator)
    lengths[2], lengths[5] = 1, 1
    ids = torch.randint(2, V, (8, S), generator=generator)
    return ids, (torch.arange(S) < lengths).long()


def start(keys: dict[str, Any], weights: dict[str, Tensor] | None = None) -> Backend:
    model = make_model()
    if weights is not None:
        model.load_state_dict(weights, strict=False)
    cfg = TrainingConfig(**{**SETTINGS, **keys})
    return make_backend(model, cfg, total_steps=2 * len(WORLDS), device=CPU)


def train(
    backend: Backend,
    first: int,
    *,
    num_steps: int = 2,
    bad: bool = False,
    norm_limit: float = math.inf,
    norms: list[float] | None = None,
) -> list[float]:
    """Do steps from `first` on; return their losses, nats per token. `bad`: rank 0 has an Inf."""
    losses = []
    for step in range(first, first + num_steps):
        ids, mask = (tensor[backend.rank :: backend.world_size] for tensor in make_rows(step))
        count = backend.global_sum(float(mask[:, 1:].sum()))
        total, num_micros = 0.0, 4 // backend.world_size
        for index, (row, valid) in enumerate(
            zip(ids.chunk(num_micros), mask.chunk(num_micros), strict=True)
        ):
            loss = -backend(row, valid).sum()
            total += loss.item()
            scale = math.inf if bad and backend.rank == 0 and index == 0 else 1.0
            backend.backward(loss * scale, count, is_last=index == num_micros - 1)
        norm = backend.step(norm_limit)["grad_norm"]
        if norms is not None:
            norms.append(norm)
        losses.append(backend.global_sum(total) / count)
    return losses


def weights_of(backend: Backend) -> dict[str, Tensor]:
    return {name: weight.clone() for name, weight in backend.full_weights()}


def first_gradient(keys: dict[str, Any]) -> dict[str, Tensor]:
    """Return the gradient, by what it does: with rate and eps 1, u = g / (|g| + 1)."""
    adam = {"learning_rate": 1.0, "adam_eps": 1.0, "weight_decay": 0.0, "grad_clip": 1e9}
    backend = start({**keys, **adam})
    before = weights_of(backend)
    train(backend, 0, num_steps=1)
    steps = {name: before[name] - weight for name, weight in backend.full_weights()}
    return {name: step / (1 - step.abs()) for name, step in steps.items()}


def compiled_gradient(keys: dict[str, Any]) -> tuple[dict[str, Tensor], int]:
    """Return the first gradient of compiled layers, and how many graphs they were captured in.

    Forward and backward graphs run as they were captured, without what takes long: inductor.
    """
    torch._dynamo.reset()
    counters.clear()
    with mock.patch("torch.compile", partial(torch.compile, backend="aot_eager")):
        gradient = first_gradient({**keys, "compile": True})
    assert not counters["graph_break"]
    return gradient, counters["stats"]["unique_graphs"]


def generated(model: CausalLMModel) -> Tensor:
    with torch.no_grad():
        ids: Tensor = model.generate(
            input_ids=torch.tensor([[5, 6, 7]]),
            attention_mask=torch.ones(1, 3, dtype=torch.int64),
            max_new_tokens=5,
            do_sample=False,
            pad_token_id=1,
            eos_token_id=None,
        )
    return ids


def skips_together(backend: Backend) -> bool:
    """Tell whether all ranks skip, and count, an Inf of one of them and a norm above the limit.

    Nothing is left of the skipped steps: the same step, then done, has the same norm.
    """
    before, skipped = weights_of(backend), backend.num_skipped
    train(backend, 0, num_steps=1, bad=True)
    norms: list[float] = []
    train(backend, 0, num_steps=1, norm_limit=0.01, norms=norms)
    same = all(torch.equal(before[name], weight) for name, weight in backend.full_weights())
    train(backend, 0, num_steps=1, norm_limit=100.0, norms=norms)
    moved = any(not torch.equal(before[name], weight) for name, weight in backend.full_weights())
    as_before = math.isclose(*norms, rel_tol=1e-3)
    return same and moved and as_before and backend.num_skipped == skipped + 2


def resumes_exactly(keys: dict[str, Any], folder: Path) -> bool:
    """Tell whether two more steps after a restart are, to the bit, those without; then, skip."""
    whole = start(keys)
    train(whole, 0)
    if whole.rank == 0:
        folder.mkdir()
    whole.barrier()
    whole.save_state(folder)
    again = start(keys, weights_of(whole))
    again.load_state(folder)
    same_losses = train(whole, 2) == train(again, 2)
    expected = weights_of(whole)
    same = all(torch.equal(expected[name], weight) for name, weight in again.full_weights())
    return same_losses and same and skips_together(again)


def _ranks(rank: int, place: int, folder: Path) -> None:
    torch.set_num_threads(1)
    os.environ.pop("LOCAL_RANK", None)
    world_size = WORLDS[place]
    dist.init_process_group(
        "gloo", init_method=f"file://{folder}/meet-{place}", rank=rank, world_size=world_size
    )
    names = list(BACKENDS)
    for number, name in enumerate(names):
        found: dict[str, Any] = {"gradient": first_gradient(BACKENDS[name])}
        # The state comes from the backend before it in the list, on another number of ranks.
        came_from = folder / f"{place - 1}-{names[number - 1]}"
        weights = torch.load(came_from / "weights") if place else None
        backend = start(BACKENDS[name], weights)
        if place:
            backend.load_state(came_from)
        found["generated"] = generated(backend.module)  # type: ignore[arg-type]
        found["losses"] = train(backend, 2 * place)
        state = folder / f"{place}-{name}"
        if rank == 0:
            state.mkdir()
        backend.barrier()
        backend.save_state(state)
        found["weights"] = weights_of(backend)
        with torch.no_grad():
            found["log_probs"] = backend(make_rows(9)[0], torch.ones(8, S, dtype=torch.int64))
        if rank == 0:
            torch.save(found["weights"], state / "weights")
            assert isinstance(backend.module, CausalLMModel)
            backend.module.save_pretrained(state / "hf", found["weights"])
        found["skips"] = skips_together(backend)
        torch.save(found, state / f"found-{rank}")
    if world_size == 2:
        checks = {**BACKENDS, **VARIANTS}
        exact = {name: resumes_exactly(checks[name], folder / f"exact {name}") for name in checks}
        torch.save(exact, folder / f"exact-{rank}")
        compiled = {name: compiled_gradient(BACKENDS[name]) for name in COMPILED}
        torch.save(compiled, folder / f"compiled-{rank}")
    dist.destroy_process_group()


@pytest.fixture(scope="module")
def found(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Return the folder in which all ranks left what they found."""
    folder = tmp_path_factory.mktemp("ranks")
    for place, world_size in enumerate(WORLDS):
        mp.spawn(_ranks, (place, folder), nprocs=world_size)
    return folder


def findings(folder: Path) -> Iterator[tuple[int, str, dict[str, Any]]]:
    """Yield (place of the number of ranks, backend, what a rank found)."""
    for place, world_size in enumerate(WORLDS):
        for name in BACKENDS:
            for rank in range(world_size):
                yield place, name, torch.load(folder / f"{place}-{name}" / f"found-{rank}")


@cache
def plain() -> tuple[dict[str, Tensor], list[float], list[dict[str, Tensor]]]:
    """Return the first gradient, the losses and, after every second step, the weights."""
    torch.manual_seed(0)
    hf = make_model().hf
    matrices = [p for name, p in hf.named_parameters() if name.endswith("proj.weight")]
    others = [p for name, p in hf.named_parameters() if not name.endswith("proj.weight")]
    optimizer = torch.optim.AdamW(
        [{"params": matrices, "weight_decay": 0.1}, {"params": others, "weight_decay": 0.0}],
        lr=1e-2,
        betas=(0.9, 0.95),
        eps=1e-3,
    )
    gradient, losses, weights = {}, [], []
    for step in range(2 * len(WORLDS)):
        ids, mask = make_rows(step)
        logits = hf(input_ids=ids).logits[:, :-1]
        nll = torch.nn.functional.cross_entropy(
            logits.transpose(1, 2), ids[:, 1:], reduction="none"
        )
        loss = (nll * mask[:, 1:]).sum() / mask[:, 1:].sum()
        optimizer.zero_grad()
        loss.backward()
        if step == 0:
            gradient = {n: p.grad.clone() for n, p in hf.named_parameters() if p.grad is not None}
        torch.nn.utils.clip_grad_norm_(hf.parameters(), 0.5)
        optimizer.step()
        losses.append(loss.item())
        if step % 2:
            weights.append({name: p.detach().clone() for name, p in hf.named_parameters()})
    return gradient, losses, weights


def test_gradients_of_all_splits_equal_those_of_one_process(found: Path) -> None:
    """1x4, 2x2 and 4x1 ranks x micro-batches, ragged, some without a token."""
    expected, _, _ = plain()
    for place, name, own in findings(found):
        assert own["gradient"].keys() == {f"hf.{key}" for key in expected}
        for key, gradient in expected.items():
            torch.testing.assert_close(
                own["gradient"][f"hf.{key}"],
                gradient,
                rtol=1e-5,
                atol=1e-6,
                msg=lambda text, at=(place, name, key): f"{at}: {text}",
            )


def test_compiled_layers_have_those_gradients_and_share_one_graph(found: Path) -> None:
    expected, _, _ = plain()
    for rank in range(2):
        compiled = torch.load(found / f"compiled-{rank}")
        assert compiled.keys() == set(COMPILED)
        for name, (own, num_graphs) in compiled.items():
            assert num_graphs == 1, name
            for key, gradient in expected.items():
                torch.testing.assert_close(own[f"hf.{key}"], gradient, rtol=1e-5, atol=1e-6)


def test_state_goes_on_with_other_ranks_and_another_backend(found: Path) -> None:
    """Two ranks, then four, then one; each time under the backend that is next in the list."""
    _, losses, weights = plain()
    for place, name, own in findings(found):
        expected = losses[2 * place : 2 * place + 2]
        assert own["losses"] == pytest.approx(expected, rel=1e-5), (place, name)
        for key, weight in weights[place].items():
            torch.testing.assert_close(own["weights"][f"hf.{key}"], weight, rtol=0, atol=1e-5)


def test_resume_on_as_many_ranks_is_exact(found: Path) -> None:
    """Offload and bfloat16 too."""
    for rank in range(2):
        exact = torch.load(found / f"exact-{rank}")
        assert exact.keys() == {*BACKENDS, *VARIANTS}
        assert [name for name, same in exact.items() if not same] == []


def test_an_inf_on_one_rank_or_too_large_a_norm_makes_all_of_them_skip(found: Path) -> None:
    assert [(p, name) for p, name, own in findings(found) if not own["skips"]] == []


def test_folders_load_in_plain_transformers_with_the_same_logits(found: Path) -> None:
    ids, _ = make_rows(9)
    for place, name, own in findings(found):
        if name in ("zero3", "fsdp"):
            model = AutoModelForCausalLM.from_pretrained(found / f"{place}-{name}" / "hf")
            with torch.no_grad():
                log_probs = model(input_ids=ids).logits.log_softmax(dim=2)[:, :-1]
            expected = log_probs.gather(2, ids[:, 1:, None]).squeeze(2)
            torch.testing.assert_close(own["log_probs"][:, 1:], expected, rtol=0, atol=1e-5)


def test_generation_gathers_what_it_needs(found: Path) -> None:
    """Before the first forward of a backend, and between forwards and updates."""
    expected = generated(make_model())
    for place, name, own in findings(found):
        if place == 0:
            assert torch.equal(own["generated"], expected), name
