"""Gradients, clipping, schedule and state of the backends, by hand and against one process."""

import math
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist
import torch.multiprocessing as mp
from torch import Tensor, nn

from rayrlhf.config import ModelConfig, TrainingConfig
from rayrlhf.models.causal_lm import CausalLMModel, build_causal_lm
from rayrlhf.training.backend import (
    Backend,
    DDPBackend,
    clip_gradients,
    has_bfloat16,
    learning_rate,
    make_backend,
    make_optimizer,
)

CPU = torch.device("cpu")
LENGTHS = (5, 1, 7, 3, 2, 6, 4, 0)  # of 8 rows; the last is empty


def make_net() -> nn.Module:
    torch.manual_seed(0)
    return nn.Sequential(
        nn.Embedding(11, 6), nn.Linear(6, 8), nn.Tanh(), nn.LayerNorm(8), nn.Linear(8, 1)
    )


def make_data() -> tuple[Tensor, Tensor]:
    """Return tokens (8, 7) and a ragged mask (8, 7)."""
    generator = torch.Generator().manual_seed(1)
    tokens = torch.randint(0, 11, (8, 7), generator=generator)
    return tokens, (torch.arange(7) < torch.tensor(LENGTHS)[:, None]).float()


def make(cfg: TrainingConfig | None = None, total_steps: int = 10) -> Backend:
    return make_backend(make_net(), cfg or TrainingConfig(), total_steps=total_steps, device=CPU)


def accumulate(backend: Backend, num_micros: int) -> None:
    """Add the gradient of the mean error over all valid tokens, in this rank's micro-batches."""
    tokens, mask = make_data()
    rank, world = backend.rank, backend.world_size
    mine = mask[rank::world]
    count = backend.global_sum(float(mine.sum()))
    parts = list(zip(tokens[rank::world].chunk(num_micros), mine.chunk(num_micros), strict=True))
    for index, (ids, valid) in enumerate(parts):
        loss = ((backend(ids).squeeze(-1) - 1) ** 2 * valid).sum()
        backend.backward(loss, count, is_last=index == num_micros - 1)


def gradients(backend: Backend) -> list[Tensor]:
    return [p.grad.clone() for p in backend.module.parameters() if p.grad is not None]


def naive_gradients() -> list[Tensor]:
    net, (tokens, mask) = make_net(), make_data()
    (((net(tokens).squeeze(-1) - 1) ** 2 * mask).sum() / mask.sum()).backward()
    return [p.grad for p in net.parameters() if p.grad is not None]


def _ranks(rank: int, folder: str) -> None:
    """Check four ranks, then two of them alone: processes take longer to start than to check."""
    torch.set_num_threads(1)
    for world_size in (4, 2):
        if rank < world_size:
            dist.init_process_group(
                "gloo",
                init_method=f"file://{folder}/{world_size}",
                rank=rank,
                world_size=world_size,
            )
            for num_micros in (1, 2, 4) if world_size == 2 else (1, 2):
                check_gradients(num_micros)
            check_inf()
            dist.destroy_process_group()


def check_gradients(num_micros: int) -> None:
    backend = make()
    accumulate(backend, num_micros)
    for got, expected in zip(gradients(backend), naive_gradients(), strict=True):
        torch.testing.assert_close(got, expected, rtol=1e-5, atol=1e-7)


def check_inf() -> None:
    """Inf on rank 1 alone: no rank steps, and the next step is a good one."""
    backend = make(TrainingConfig(learning_rate=0.1))
    assert isinstance(backend, DDPBackend)
    accumulate(backend, 1)
    backend.step()
    before = [p.clone() for p in backend.module.parameters()]
    moments = [state["exp_avg"].clone() for state in backend.optimizer.state.values()]
    bad = float("inf") if backend.rank == 1 else 1.0
    backend.backward(backend(make_data()[0]).sum() * bad, 1.0, is_last=True)
    stats = backend.step()
    assert not math.isfinite(stats["grad_norm"]) and stats["skipped_steps"] == 1
    for old, new in zip(before, backend.module.parameters(), strict=True):
        assert torch.equal(old, new)
    for moment, state in zip(moments, backend.optimizer.state.values(), strict=True):
        assert torch.equal(moment, state["exp_avg"]) and state["step"] == 1
    accumulate(backend, 2)
    assert math.isfinite(backend.step()["grad_norm"]) and backend.num_skipped == 1
    total = sum(float(p.detach().sum()) for p in backend.module.parameters())
    assert backend.global_max(total) == -backend.global_max(-total)  # equal on every rank


@pytest.mark.parametrize("num_micros", [1, 2, 4, 8])
def test_accumulation_equals_one_batch(num_micros: int) -> None:
    check_gradients(num_micros)


def test_ranks_equal_one_batch_and_skip_together(tmp_path: Path) -> None:
    """Ragged rows over 4 x (1, 2) and 2 x (1, 2, 4) ranks x micro-batches, some of them empty."""
    mp.spawn(_ranks, (str(tmp_path),), nprocs=4)


def test_a_batch_without_tokens_moves_nothing() -> None:
    backend = make()
    before = [p.clone() for p in backend.module.parameters()]
    tokens, mask = make_data()
    backend.backward((backend(tokens).squeeze(-1) * mask * 0).sum(), 0.0, is_last=True)
    assert backend.step()["grad_norm"] == 0
    assert all(torch.equal(a, b) for a, b in zip(before, backend.module.parameters(), strict=True))


def test_two_losses_with_denominators_of_their_own_add_up() -> None:
    tokens, _ = make_data()
    backend, net = make(), make_net()
    backend.backward(backend(tokens).sum(), 4.0, is_last=False)
    backend.backward((backend(tokens) ** 2).sum(), 10.0, is_last=True)
    (net(tokens).sum() / 4 + (net(tokens) ** 2).sum() / 10).backward()
    for got, parameter in zip(gradients(backend), net.parameters(), strict=True):
        torch.testing.assert_close(got, parameter.grad)


def test_one_step_is_adamw_by_hand() -> None:
    """Decay, bias correction and eps = 1e-5 as configured, over two steps."""
    cfg = TrainingConfig(
        learning_rate=0.1,
        adam_beta1=0.8,
        adam_beta2=0.9,
        adam_eps=1e-5,
        weight_decay=0.5,
        min_learning_rate_ratio=1.0,
        grad_clip=1e9,
    )
    net = nn.Linear(2, 1, bias=False)
    with torch.no_grad():
        net.weight.copy_(torch.tensor([[1.0, -2.0]]))
    backend = make_backend(net, cfg, total_steps=2, device=CPU)
    weight = [1.0, -2.0]
    moment, second = [0.0, 0.0], [0.0, 0.0]
    for step, grad in enumerate([[0.3, 1e-5], [-0.2, 4.0]], start=1):
        backend.backward((backend.module.weight * torch.tensor([grad])).sum(), 1.0, is_last=True)  # type: ignore[operator]
        backend.step()
        for i, g in enumerate(grad):
            moment[i] = 0.8 * moment[i] + 0.2 * g
            second[i] = 0.9 * second[i] + 0.1 * g * g
            corrected = moment[i] / (1 - 0.8**step)
            root = math.sqrt(second[i] / (1 - 0.9**step))
            weight[i] = weight[i] * (1 - 0.1 * 0.5) - 0.1 * corrected / (root + 1e-5)
    torch.testing.assert_close(net.weight, torch.tensor([weight]))


def test_norms_biases_and_embeddings_do_not_decay() -> None:
    groups = make_optimizer(make_net(), TrainingConfig(weight_decay=0.1)).param_groups
    assert [group["weight_decay"] for group in groups] == [0.1, 0.0]
    assert sorted(p.shape for p in groups[0]["params"]) == [(1, 8), (8, 6)]
    assert len(groups[1]["params"]) == 5


@pytest.mark.parametrize("architecture", ["llama", "gpt2"])
@pytest.mark.parametrize("tied", [True, False])
def test_what_decays_of_a_language_model(architecture: Any, tied: bool) -> None:
    """A tied head is the embedding; a head of its own, and GPT-2's Conv1D, are matrices."""
    cfg = ModelConfig(
        architecture=architecture,
        hidden_size=16,
        num_layers=1,
        num_heads=2,
        num_kv_heads=2,
        intermediate_size=24,
        max_length=8,
        tie_embeddings=tied,
    )
    model = CausalLMModel(
        build_causal_lm(cfg, vocab_size=11, eos_token_id=0, pad_token_id=1, seed=0)
    )
    decayed, others = make_optimizer(model, TrainingConfig(weight_decay=0.1)).param_groups
    assert (decayed["weight_decay"], others["weight_decay"]) == (0.1, 0.0)
    names = {id(parameter): name for name, parameter in model.named_parameters()}
    found = [
        {names[id(parameter)].removeprefix("hf.") for parameter in group["params"]}
        for group in (decayed, others)
    ]
    assert sum(map(len, found)) == len(names)
    kinds = {
        "llama": ("q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"),
        "gpt2": ("attn.c_attn", "attn.c_proj", "mlp.c_fc", "mlp.c_proj"),
    }[architecture]
    matrices = {n for n in found[0] if n.endswith(tuple(f"{kind}.weight" for kind in kinds))}
    assert len(matrices) == len(kinds)
    assert found[0] - matrices == (set() if tied else {"lm_head.weight"})
    spared = ("norm", ".ln_", "bias", "embed_tokens", "wte", "wpe")
    assert all(any(part in name for part in spared) for name in found[1])


def test_schedule() -> None:
    cfg = TrainingConfig(learning_rate=1.0, warmup_ratio=0.2, min_learning_rate_ratio=0.1)
    rates = [learning_rate(step, cfg, 11) for step in range(11)]
    assert rates[:3] == [0.5, 1.0, 1.0]  # 2 steps of warm-up, then the peak
    assert rates[6] == pytest.approx(0.55)  # half of the cosine
    assert rates[10] == pytest.approx(0.1)
    assert learning_rate(0, cfg, 1) == 1.0
    backend = make(cfg, total_steps=11)
    logged = []
    for _ in range(11):
        accumulate(backend, 1)
        logged.append(backend.step()["learning_rate"])
    assert logged == rates


def test_clip_scales_to_the_norm_and_reports_the_one_before() -> None:
    parameters = [nn.Parameter(torch.zeros(2)), nn.Parameter(torch.zeros(1))]
    parameters[0].grad, parameters[1].grad = torch.tensor([3.0, 0.0]), torch.tensor([4.0])
    assert clip_gradients(parameters, 1.0) == pytest.approx(5.0)
    torch.testing.assert_close(parameters[0].grad, torch.tensor([0.6, 0.0]))
    assert clip_gradients(parameters, 2.0) == pytest.approx(1.0)
    torch.testing.assert_close(parameters[1].grad, torch.tensor([0.8]))


@pytest.mark.parametrize("precision", ["float32", "bfloat16"])
def test_state_resumes_exactly(tmp_path: Path, precision: Any) -> None:
    cfg = TrainingConfig(learning_rate=0.05, weight_decay=0.1, precision=precision)
    whole = make(cfg)
    for _ in range(3):
        accumulate(whole, 2)
        whole.step()
    whole.save_state(tmp_path)
    weights = {name: weight.clone() for name, weight in whole.full_weights()}
    net = make_net()
    net.load_state_dict(weights)
    again = make_backend(net, cfg, total_steps=10, device=CPU)
    again.load_state(tmp_path)
    for _ in range(3):
        accumulate(whole, 2)
        accumulate(again, 2)
        assert whole.step() == again.step()
    for (_, a), (_, b) in zip(whole.full_weights(), again.full_weights(), strict=True):
        assert torch.equal(a, b)


@pytest.mark.parametrize("has_it", [True, False])
def test_auto_takes_bfloat16_where_the_device_has_it(
    monkeypatch: pytest.MonkeyPatch, has_it: bool
) -> None:
    monkeypatch.setattr(
        torch.cpu, "get_capabilities", lambda: {"avx512_bf16": has_it, "avx2": True}
    )
    assert has_bfloat16(CPU) is has_it
    module = nn.Linear(4, 3)
    backend = make_backend(module, TrainingConfig(precision="auto"), total_steps=1, device=CPU)
    assert backend(torch.ones(2, 4)).dtype == (torch.bfloat16 if has_it else torch.float32)
    assert next(module.parameters()).dtype == torch.float32


def test_full_weights_name_shared_tensors_once() -> None:
    net = nn.ModuleDict({"a": nn.Linear(2, 2, bias=False), "b": nn.Linear(2, 2, bias=False)})
    net["b"].weight = net["a"].weight
    net.register_buffer("kept", torch.ones(1))
    net.register_buffer("lost", torch.ones(1), persistent=False)
    backend = make_backend(net, TrainingConfig(), total_steps=1, device=CPU)
    assert [name for name, _ in backend.full_weights()] == ["a.weight", "kept"]
