"""Documents of a packed row: whatever stands beside one, its log-probs are those it has alone."""

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor
from transformers import PreTrainedModel

from rayrlhf.data.packing import pack_best_fit
from rayrlhf.data.row_masks import row_masks
from rayrlhf.models.causal_lm import load_causal_lm, token_log_probs

EOS, ROW_LENGTH = 0, 24
DOCUMENTS = st.lists(
    st.lists(st.integers(2, 250), min_size=1, max_size=ROW_LENGTH - 1), min_size=1, max_size=6
)


@pytest.fixture(scope="module")
def model(tiny_model: str) -> PreTrainedModel:
    return load_causal_lm(tiny_model)


def log_probs(model: PreTrainedModel, rows: Tensor) -> Tensor:
    """Return the log-probs (n, T) of rows of documents apart, 0 where there is no loss."""
    attention_mask, loss_mask = row_masks(rows, EOS, apart=True)
    with torch.no_grad():
        return token_log_probs(model, rows, attention_mask, positions=loss_mask)


def places(rows: Tensor) -> dict[tuple[int, ...], tuple[int, int]]:
    """Return {document: (row, column where it begins)} of whole documents in rows (n, T)."""
    found = {}
    for number, row in enumerate(rows.tolist()):
        begin = 0
        for column, token in enumerate(row):
            if token == EOS:
                if column > begin:
                    found[tuple(row[begin:column])] = (number, begin)
                begin = column + 1
    return found


@settings(max_examples=25, deadline=None)
@given(DOCUMENTS)
def test_a_document_has_the_log_probs_that_it_has_alone(
    model: PreTrainedModel, documents: list[list[int]]
) -> None:
    packed, filling = pack_best_fit(documents, ROW_LENGTH, EOS)
    rows = torch.from_numpy(packed).long()
    found = log_probs(model, rows)
    assert places(rows).keys() == {tuple(document) for document in documents}
    for document, (row, begin) in places(rows).items():
        ids = torch.tensor([[*document, EOS]])
        alone = log_probs(model, ids)[0]
        own = found[row, begin : begin + len(document) + 1]
        assert torch.allclose(own, alone, atol=1e-5)
        # Another text in all the other places of the row changes nothing here.
        other = rows.clone()
        inside = torch.zeros(ROW_LENGTH, dtype=torch.bool)
        inside[begin : begin + len(document) + 1] = True
        other[row] = torch.where(inside | (rows[row] == EOS), rows[row], 251 - rows[row] % 200)
        changed = log_probs(model, other)[row, begin : begin + len(document) + 1]
        assert torch.allclose(changed, own, atol=1e-5)
    counted = sum(len(document) + 1 for document in documents) + filling
    assert counted == rows.numel()
