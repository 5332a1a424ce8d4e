"""The output layer under ZeRO-3, whose ranks gather its weight together."""

from pathlib import Path

import pytest
import torch
import torch.distributed as dist
import torch.multiprocessing as mp
from torch import Tensor

from rayrlhf.config import ModelConfig, TrainingConfig
from rayrlhf.models import output_head
from rayrlhf.models.causal_lm import CausalLMModel, build_causal_lm
from rayrlhf.training.backend import Backend, make_backend

V = 2000  # times the width of 128: DeepSpeed keeps smaller weights whole
LENGTHS = (8, 45)


def backend_of(tied: bool, **keys: object) -> Backend:
    cfg = ModelConfig(
        hidden_size=128,
        num_layers=1,
        num_heads=4,
        num_kv_heads=4,
        intermediate_size=64,
        max_length=64,
        tie_embeddings=tied,
    )
    model = build_causal_lm(cfg, vocab_size=V, eos_token_id=0, pad_token_id=1, seed=0)
    training = TrainingConfig(learning_rate=1e-2, adam_eps=1e-3, **keys)  # type: ignore[arg-type]
    return make_backend(CausalLMModel(model), training, total_steps=2, device=torch.device("cpu"))


def train(backend: Backend, rows: list[Tensor]) -> dict[str, Tensor]:
    """Do two steps on rows, one a micro-batch; return the weights."""
    for _ in range(2):
        for number, row in enumerate(rows):
            log_probs = backend(row, torch.ones_like(row))
            backend.backward(-log_probs.sum(), sum(LENGTHS), is_last=number == len(rows) - 1)
        backend.step()
    return dict(backend.full_weights())


def make_rows() -> list[Tensor]:
    generator = torch.Generator().manual_seed(0)
    return [torch.randint(2, V, (1, length), generator=generator) for length in LENGTHS]


def _rank(rank: int, folder: Path) -> None:
    torch.set_num_threads(1)
    dist.init_process_group("gloo", init_method=f"file://{folder}/meet", rank=rank, world_size=2)
    output_head.LOGITS_BYTES = 4 * V * 10  # 10 tokens a part: one part here, five there
    for tied in (False, True):
        weights = train(backend_of(tied, backend="deepspeed", zero_stage=3), [make_rows()[rank]])
        torch.save(weights, folder / f"{tied} {rank}")
    dist.destroy_process_group()


@pytest.mark.slow
def test_ranks_compute_their_logits_in_different_numbers_of_parts(tmp_path: Path) -> None:
    mp.spawn(_rank, (tmp_path,), nprocs=2)
    for tied in (False, True):
        expected = train(backend_of(tied), make_rows())
        for rank in range(2):
            found = torch.load(tmp_path / f"{tied} {rank}")
            assert found.keys() == expected.keys()
            for name, weight in expected.items():
                torch.testing.assert_close(found[name], weight, atol=1e-5, rtol=0)
