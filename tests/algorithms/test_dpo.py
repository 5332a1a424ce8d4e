"""The losses of DPO: by hand, against loops over pairs, and their gradients."""

import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from rayrlhf.algorithms.dpo import PreferenceLoss, beats, dpo_loss
from rayrlhf.algorithms.ranking import ranking_loss

LOSSES: tuple[PreferenceLoss, ...] = ("sigmoid", "robust", "ipo", "plackett_luce")


def softplus(x: float) -> float:
    return math.log1p(math.exp(x))


def naive(
    ratios: list[float], ranks: list[int], groups: list[int], beta: float, loss: str, s: float
) -> float:
    """Loop over prompts and pairs, straight from the papers."""
    total = 0.0
    for group in set(groups):
        members = [i for i, g in enumerate(groups) if g == group]
        pairs = [(i, j) for i in members for j in members if ranks[i] < ranks[j]]
        if loss == "plackett_luce":
            for i in members:
                below = [j for j in members if ranks[i] < ranks[j]]
                chances = [math.exp(beta * ratios[j]) for j in (i, *below)]
                total -= math.log(chances[0] / sum(chances))
            continue
        found = []
        for i, j in pairs:
            d = ratios[i] - ratios[j]
            if loss == "ipo":
                found.append((d - 0.5 / beta) ** 2)
            elif loss == "sigmoid":
                found.append((1 - s) * softplus(-beta * d) + s * softplus(beta * d))
            else:
                clean = (1 - s) * softplus(-beta * d) - s * softplus(beta * d)
                found.append(clean / (1 - 2 * s))
        total += sum(found) / len(found) if found else 0.0
    return total


def test_by_hand() -> None:
    ratios = torch.tensor([2.0, 0.0, -1.0, 5.0])
    ranks, groups = torch.tensor([1, 2, 3, 1]), torch.tensor([7, 7, 7, 9])
    loss, metrics = dpo_loss(ratios, ranks, groups, beta=0.5)
    # prompt 7: beta * (2 - 0), beta * (2 + 1), beta * (0 + 1); prompt 9 has one response, no pair
    assert loss.item() == pytest.approx((softplus(-1.0) + softplus(-1.5) + softplus(-0.5)) / 3)
    assert {name: value.item() for name, value in metrics.items()} == pytest.approx(
        {
            "dpo/loss": loss.item(),
            "dpo/num_pairs": 3,
            "dpo/num_correct": 3,
            "dpo/chosen_reward": 1.0 + 1.0 + 0.0,
            "dpo/rejected_reward": 0.0 - 0.5 - 0.5,
            "dpo/num_responses": 4,
            "dpo/log_ratio": 6.0,
        }
    )
    ipo, _ = dpo_loss(ratios, ranks, groups, beta=0.5, loss="ipo")
    assert ipo.item() == pytest.approx(((2 - 1) ** 2 + (3 - 1) ** 2 + (1 - 1) ** 2) / 3)
    ranking, _ = dpo_loss(ratios, ranks, groups, beta=0.5, loss="plackett_luce")
    e = math.exp
    chance = e(1) / (e(1) + e(0) + e(-0.5)) * e(0) / (e(0) + e(-0.5))
    assert ranking.item() == pytest.approx(-math.log(chance))


@pytest.mark.parametrize("loss", LOSSES)
@settings(max_examples=25, deadline=None)
@given(data=st.data(), seed=st.integers(0, 10_000), beta=st.sampled_from([0.1, 0.5, 2.0]))
def test_matches_loops_and_central_differences(
    data: st.DataObject, seed: int, beta: float, loss: PreferenceLoss
) -> None:
    size = data.draw(st.integers(1, 10))
    ranks = data.draw(st.lists(st.integers(1, 4), min_size=size, max_size=size))
    groups = data.draw(st.lists(st.integers(0, 3), min_size=size, max_size=size))
    smoothing = 0.2 if loss in ("sigmoid", "robust") else 0.0
    generator = torch.Generator().manual_seed(seed)
    ratios = torch.randn(size, generator=generator, dtype=torch.float64).requires_grad_()

    def value(of: torch.Tensor) -> torch.Tensor:
        kind = {"beta": beta, "loss": loss, "label_smoothing": smoothing}
        return dpo_loss(of, torch.tensor(ranks), torch.tensor(groups), **kind)[0]  # type: ignore[arg-type]

    wanted = naive(ratios.tolist(), ranks, groups, beta, loss, smoothing)
    assert value(ratios).item() == pytest.approx(wanted, rel=1e-9, abs=1e-9)
    if value(ratios).requires_grad:
        assert torch.autograd.gradcheck(value, (ratios,))
    order = torch.randperm(size, generator=generator)
    shuffled, _ = dpo_loss(
        ratios[order],
        torch.tensor(ranks)[order],
        torch.tensor(groups)[order],
        beta=beta,
        loss=loss,
        label_smoothing=smoothing,
    )
    assert shuffled.item() == pytest.approx(wanted, rel=1e-9, abs=1e-9)


def test_the_gradient_is_that_of_the_paper() -> None:
    """Of a pair: -beta sigmoid(-beta d) on the better response, the opposite on the worse."""
    ratios = torch.tensor([0.7, -0.4], requires_grad=True)
    dpo_loss(ratios, torch.tensor([2, 1]), torch.zeros(2), beta=0.3)[0].backward()
    weight = 0.3 / (1 + math.exp(0.3 * (-0.4 - 0.7)))
    assert ratios.grad is not None
    assert ratios.grad.tolist() == pytest.approx([weight, -weight])


@pytest.mark.parametrize("loss", ["sigmoid", "robust", "plackett_luce"])
def test_equal_models_have_log_2_per_pair_whatever_the_smoothing(loss: PreferenceLoss) -> None:
    smoothing = 0.3 if loss == "sigmoid" else 0.0
    found, metrics = dpo_loss(
        torch.zeros(2),
        torch.tensor([1, 2]),
        torch.zeros(2),
        beta=0.1,
        loss=loss,
        label_smoothing=smoothing,
    )
    assert found.item() == pytest.approx(math.log(2), abs=1e-7)
    assert metrics["dpo/num_correct"] == 0.5


def test_robust_loss_under_flipped_labels_is_the_true_loss_on_average() -> None:
    ratios, groups, s = torch.tensor([1.3, -0.6]), torch.zeros(2), 0.2

    def robust(ranks: list[int]) -> float:
        kind = {"beta": 0.5, "label_smoothing": s}
        found, _ = dpo_loss(ratios, torch.tensor(ranks), groups, loss="robust", **kind)  # type: ignore[arg-type]
        return found.item()

    true = dpo_loss(ratios, torch.tensor([1, 2]), groups, beta=0.5)[0].item()
    assert (1 - s) * robust([1, 2]) + s * robust([2, 1]) == pytest.approx(true, rel=1e-6)


def test_it_is_the_ranking_loss_of_implicit_rewards() -> None:
    ratios = torch.randn(9, generator=torch.Generator().manual_seed(0))
    ranks = torch.tensor([1, 2, 2, 1, 3, 4, 4, 1, 2])
    groups = torch.tensor([0, 0, 0, 1, 1, 1, 1, 2, 2])
    loss, metrics = dpo_loss(ratios, ranks, groups, beta=0.1)
    wanted, others = ranking_loss(0.1 * ratios, ranks, groups)
    torch.testing.assert_close(loss, wanted)
    for name in ("num_pairs", "num_correct"):
        assert metrics[f"dpo/{name}"] == others[f"reward/{name}"]


@pytest.mark.parametrize("loss", LOSSES)
def test_ties_alone_and_no_response_at_all_give_0_with_a_gradient_of_0(
    loss: PreferenceLoss,
) -> None:
    for size in (0, 3):
        ratios = torch.full((size,), 0.5, requires_grad=True)
        ranks, groups = torch.full((size,), 2), torch.zeros(size)
        found, metrics = dpo_loss(ratios, ranks, groups, beta=0.1, loss=loss)
        found.backward()
        assert found == 0 and metrics["dpo/num_pairs"] == 0
        assert ratios.grad is not None and (ratios.grad == 0).all()
        assert metrics["dpo/num_responses"] == size


def test_who_beats_whom() -> None:
    found = beats(torch.tensor([1, 2, 1, 2]), torch.tensor([0, 0, 1, 0]))
    assert found.nonzero().tolist() == [[0, 1], [0, 3]]
