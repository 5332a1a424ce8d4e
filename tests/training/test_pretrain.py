"""Packed rows as pretraining sees them: documents joined or apart, filling without loss."""

from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import torch

from rayrlhf.config import Recipe, RecipeError
from rayrlhf.training.backend import make_backend
from rayrlhf.training.pretrain import PretrainStage
from tests.training.conftest import ROW_LENGTH, write_corpus

MakeRecipe = Callable[..., Recipe]


def stage_of(recipe: Recipe) -> PretrainStage:
    return PretrainStage(recipe)


def losses(stage: PretrainStage, rows: torch.Tensor) -> torch.Tensor:
    """Return the negative log-probs (n, T), 0 where there is no loss."""
    micro = stage._batch(rows)
    device = torch.device("cpu")
    backend = make_backend(stage.build(None).eval(), stage.cfg, total_steps=1, device=device)
    with torch.no_grad():
        log_probs = backend(micro.input_ids, micro.attention_mask, positions=micro.loss_mask)
    return torch.where(micro.loss_mask, -log_probs, 0.0)


def documents(stage: PretrainStage, *lengths: int, fill: int = 0) -> torch.Tensor:
    """Return one row of documents of random ids, each with its end."""
    rng = torch.Generator().manual_seed(0)
    eos = stage.tokenizer.eos_token_id
    parts = [torch.randint(3, 40, (length,), generator=rng) for length in lengths]
    ids = [part for document in parts for part in (document, torch.tensor([eos]))]
    return torch.cat([*ids, torch.full((fill,), eos)])[None]


def test_joined_documents_predict_everything_but_a_rows_first_token(
    make_recipe: MakeRecipe,
) -> None:
    stage = stage_of(make_recipe())
    micro = stage._batch(documents(stage, 4, 5, 4))
    assert micro.loss_mask.tolist() == [[False] + [True] * 15]
    assert micro.attention_mask.tolist() == [[1] * 16]
    assert (micro.count, micro.num_tokens) == (15.0, 16)


def test_apart_documents_do_not_see_each_other(make_recipe: MakeRecipe) -> None:
    stage = stage_of(make_recipe(pretrain={"documents": "apart"}))
    rows = documents(stage, 4, 5, 4)
    micro = stage._batch(rows)
    assert micro.attention_mask.tolist() == [[1] * 5 + [2] * 6 + [3] * 5]
    assert (~micro.loss_mask).nonzero()[:, 1].tolist() == [0, 5, 11]
    packed = losses(stage, rows)
    other = rows.clone()
    other[:, :4] = 7  # another first document
    assert torch.allclose(losses(stage, other)[:, 5:], packed[:, 5:], atol=1e-6)
    for begin, end in ((0, 5), (5, 11), (11, 16)):
        alone = losses(stage, rows[:, begin:end])
        assert torch.allclose(alone, packed[:, begin:end], atol=1e-5)
    joined = stage_of(make_recipe("joined"))
    assert not torch.allclose(losses(joined, other)[:, 5:], losses(joined, rows)[:, 5:], atol=1e-3)


@pytest.mark.parametrize("kind", ["joined", "apart"])
def test_filling_has_no_loss_and_changes_none(make_recipe: MakeRecipe, kind: str) -> None:
    stage = stage_of(make_recipe(pretrain={"documents": kind}))
    filled, bare = documents(stage, 4, 5, fill=5), documents(stage, 4, 5)
    micro = stage._batch(filled)
    assert micro.num_tokens == 11
    assert not micro.loss_mask[:, 11:].any()
    assert torch.allclose(losses(stage, filled)[:, :11], losses(stage, bare), atol=1e-5)


def test_a_corpus_from_elsewhere(
    make_recipe: MakeRecipe, tiny_tokenizer: Path, tmp_path: Path
) -> None:
    shared = tmp_path / "shared"
    rows = np.random.default_rng(1).integers(2, 40, (9, ROW_LENGTH))
    write_corpus(shared, tiny_tokenizer, train=rows, validation_web=rows[:2])
    stage = stage_of(make_recipe(pretrain={"corpus": f"file://{shared}"}))
    assert stage.rows[range(9)].tolist() == rows.tolist()
    assert list(stage.held_out) == ["web"]
    manifest = shared / "manifest.json"
    manifest.write_text(manifest.read_text().replace('"eos_id": ', '"eos_id": 1'))
    with pytest.raises(RecipeError, match=r"set tokenizer\.path to the corpus's tokenizer"):
        stage_of(make_recipe("other", pretrain={"corpus": str(shared)}))
