"""DPO's stage: the reference equals the start model, log-probs are of responses alone, ranks."""

import math
import shutil
import threading
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import AutoModelForCausalLM

from rayrlhf.config import Recipe, RecipeError
from rayrlhf.metrics import read_jsonl
from rayrlhf.training import loop
from rayrlhf.training.backend import make_backend
from rayrlhf.training.checkpoint import load_tensors
from rayrlhf.training.dpo import DPOStage, PreferenceBatch
from tests.training.ranks import Run, run_on_ranks
from tests.training.test_loop import comparable

MakeRecipe = Callable[..., Recipe]
CPU = torch.device("cpu")


def lines(recipe: Recipe) -> list[dict[str, Any]]:
    return read_jsonl(recipe.path / "dpo" / "metrics.jsonl")


def log_probs_one_by_one(folder: Path, stage: DPOStage) -> dict[int, float]:
    """Return log pi of each training response by number: alone, with plain transformers."""
    model = AutoModelForCausalLM.from_pretrained(folder)
    found = {}
    for start, comparison in zip(stage.train.starts, stage.train.comparisons, strict=True):
        for k, ids in enumerate(comparison.ids):
            with torch.no_grad():
                logits = model(torch.tensor([ids])).logits[0].log_softmax(dim=1)
            picked = logits[:-1].gather(1, torch.tensor(ids[1:])[:, None])[:, 0]
            found[int(start) + k] = float(picked[comparison.prompt_length - 1 :].sum())
    return found


@pytest.mark.parametrize("budget", [1, 24, 4096])
def test_log_probs_of_packed_rows_are_those_of_each_response_alone(
    make_recipe: MakeRecipe, budget: int
) -> None:
    stage = DPOStage(make_recipe(dpo={"tokens_per_microbatch": budget}))
    backend = make_backend(stage.build(None), stage.cfg, total_steps=1, device=CPU)
    micros = stage.microbatches(range(stage.num_records))
    found = {}
    for micro in micros:
        assert micro.num_tokens <= budget or micro.groups.unique().numel() == 1
        values = stage.response_log_probs(backend, micro).tolist()
        found |= dict(zip(micro.numbers.tolist(), values, strict=True))
    wanted = log_probs_one_by_one(Path(stage.start), stage)
    assert sorted(found) == list(range(len(wanted)))
    assert found == pytest.approx(wanted, rel=1e-5)
    assert sum(micro.count for micro in micros) == stage.num_records
    comparisons = stage.train.comparisons
    assert sum(micro.num_tokens for micro in micros) == comparisons.lengths.sum()
    responses = sum(len(ids) - c.prompt_length for c in comparisons for ids in c.ids)
    assert sum(int(micro.response_mask.sum()) for micro in micros) == responses


def test_ranks_stay_with_their_responses(make_recipe: MakeRecipe) -> None:
    stage = DPOStage(make_recipe(dpo={"tokens_per_microbatch": 24}))
    wanted = {
        int(start) + k: (index, rank)
        for index, start in enumerate(stage.train.starts)
        for k, rank in enumerate(stage.train.comparisons[index].ranks)
    }
    seen = []
    for micro in stage.microbatches(range(stage.num_records)):
        numbers, groups = micro.numbers.tolist(), micro.groups.tolist()
        assert micro.ranks.tolist() == [wanted[number][1] for number in numbers]
        pairs = {(wanted[number][0], group) for number, group in zip(numbers, groups, strict=True)}
        assert len(pairs) == micro.count == len(set(groups))
        seen += numbers
    assert sorted(seen) == sorted(wanted)


def test_the_first_loss_is_log_2_and_the_reference_is_the_start_model(
    make_recipe: MakeRecipe,
) -> None:
    stage = DPOStage(make_recipe(dpo={"dropout": 0.0, "max_steps": 3}))
    loop.run(stage, CPU)
    first, *_, last = lines(stage.recipe)
    assert first["loss"] == pytest.approx(math.log(2), abs=1e-6)
    for name in ("reward_margin", "chosen_reward", "rejected_reward", "log_ratio"):
        assert first[name] == 0.0  # the same number, not only nearly
    assert first["pair_accuracy"] == 0.5
    wanted = log_probs_one_by_one(Path(stage.start), stage)
    tensors, _ = load_tensors(stage.folder / "reference" / "train.safetensors")
    values = dict(enumerate(tensors["log_probs"].tolist()))
    assert values == pytest.approx(wanted, rel=1e-5)
    assert last["eval/loss"] < first["loss"] and last["eval/reward_margin"] > 0
    assert last["eval/reward_margin"] == pytest.approx(
        last["eval/chosen_reward"] - last["eval/rejected_reward"]
    )


def test_metrics_of_a_step_by_the_models_before_and_after(make_recipe: MakeRecipe) -> None:
    """From the folders alone: what evaluation says of the last model."""
    stage = DPOStage(make_recipe(dpo={"beta": 0.3}))
    loop.run(stage, CPU)
    before = log_probs_one_by_one(Path(stage.start), stage)
    after = log_probs_one_by_one(stage.folder / "final", stage)
    pairs, losses = [], []
    for start, comparison in zip(stage.train.starts, stage.train.comparisons, strict=True):
        own = [
            (int(start) + i, int(start) + j)
            for i, better in enumerate(comparison.ranks)
            for j, worse in enumerate(comparison.ranks)
            if better < worse
        ]
        gaps = [0.3 * (after[i] - before[i] - after[j] + before[j]) for i, j in own]
        losses.append(sum(math.log1p(math.exp(-gap)) for gap in gaps) / len(gaps))
        pairs += own
    found = lines(stage.recipe)[-1]  # validation is the training set here
    num = len(pairs)
    wanted = {
        "loss": sum(losses) / len(losses),
        "num_pairs": num,
        "chosen_reward": sum(0.3 * (after[i] - before[i]) for i, _ in pairs) / num,
        "rejected_reward": sum(0.3 * (after[j] - before[j]) for _, j in pairs) / num,
        "chosen_log_prob": sum(after[i] for i, _ in pairs) / num,
        "rejected_log_prob": sum(after[j] for _, j in pairs) / num,
        "log_ratio": sum(after[n] - before[n] for n in after) / len(after),
    }
    assert {name: found[f"eval/{name}"] for name in wanted} == pytest.approx(wanted, rel=1e-3)


def test_only_what_the_training_uses_is_computed(make_recipe: MakeRecipe) -> None:
    stage = DPOStage(make_recipe(dpo={"max_steps": 1, "validation": None}))
    loop.run(stage, CPU)
    known = ~stage.train.reference.values.isnan()
    assert 0 < int(known.sum()) < len(known)
    assert not any("eval/" in name for name in lines(stage.recipe)[-1])


def test_a_batch_larger_than_the_data(make_recipe: MakeRecipe) -> None:
    """A comparison that occurs twice in a step has one reference."""
    stage = DPOStage(make_recipe(dpo={"batch_size": 20, "max_steps": 2}))
    assert stage.num_records < 20
    loop.run(stage, CPU)
    first = lines(stage.recipe)[0]
    assert first["loss"] == pytest.approx(math.log(2), abs=1e-6)
    assert abs(first["log_ratio"]) < 1e-5


@pytest.mark.slow
def test_two_ranks_have_the_numbers_of_one(make_recipe: MakeRecipe, tmp_path: Path) -> None:
    """DDP, whole and killed; FSDP; ZeRO-3 with a rank without work; Ulysses, which shares rows."""
    uneven = {"batch_size": 1, "max_steps": 3}
    zero = {**uneven, "backend": "deepspeed", "zero_stage": 3}
    fsdp = {"backend": "fsdp"}
    sections: dict[str, dict[str, Any]] = {"ddp": {}, "killed": {}, "zero3": zero, "fsdp": fsdp}
    recipes = {name: make_recipe(name, dpo=section) for name, section in sections.items()}
    shared = {"num_workers": 2, "sequence_parallel": 2}
    recipes["ulysses"] = make_recipe("ulysses", resources=shared)
    alone = {
        "ddp": make_recipe("ddp-alone"),
        "zero3": make_recipe("zero3-alone", dpo=uneven),
    }
    for recipe in alone.values():
        loop.run(DPOStage(recipe), CPU)
    run_on_ranks(
        [Run(r, DPOStage, 5 if name == "killed" else None) for name, r in recipes.items()],
        2,
        tmp_path,
    )
    for name, recipe in recipes.items():
        wanted = lines(alone.get(name, alone["ddp"]))
        keys = ("loss", "reward_margin", "chosen_log_prob", "eval/loss", "grad_norm")
        for got, line in zip(lines(recipe), wanted, strict=True):
            close = pytest.approx({k: line[k] for k in keys if k in line}, rel=2e-3, abs=1e-5)
            assert {k: got[k] for k in keys if k in line} == close, (name, line["step"])
        first = lines(recipe)[0]
        assert first["loss"] == pytest.approx(math.log(2), abs=1e-6), name
        assert first["reward_margin"] == 0.0, name
    assert comparable(recipes["killed"].path / "dpo") == comparable(recipes["ddp"].path / "dpo")


def test_a_killed_reference_goes_on_where_it_was(
    make_recipe: MakeRecipe, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("rayrlhf.training.dpo.SAVE_EVERY_S", 0.0)
    recipe = make_recipe(dpo={"batch_size": 2, "max_steps": 3})
    computed: list[list[int]] = []
    killed = threading.Event()
    find = DPOStage._log_probs_by_number

    def counted(self: DPOStage, backend: Any, micros: list[PreferenceBatch]) -> Any:
        if len(computed) == 2 and not killed.is_set():
            killed.set()
            raise KeyboardInterrupt
        found = find(self, backend, micros)
        computed.append(sorted(found))
        return found

    monkeypatch.setattr(DPOStage, "_log_probs_by_number", counted)
    with pytest.raises(KeyboardInterrupt):
        loop.run(DPOStage(recipe), CPU)
    before = {number for numbers in computed for number in numbers}
    computed.clear()
    loop.run(DPOStage(recipe), CPU)
    assert len(computed) == 2  # the third step, and the validation set
    assert not set(computed[0]) & before
    assert len(lines(recipe)) == 3


@pytest.mark.parametrize("damage", ["gone", "other data"])
def test_a_resumed_run_without_its_reference_is_refused(
    make_recipe: MakeRecipe, damage: str
) -> None:
    recipe = make_recipe()
    stage = DPOStage(recipe)
    loop.run(stage, CPU)
    shutil.rmtree(stage.folder / "final")
    if damage == "gone":
        shutil.rmtree(stage.folder / "reference")
    else:
        assert recipe.dpo is not None
        data = Path(recipe.dpo.train)
        records = data.read_text().splitlines(keepends=True)
        data.write_text("".join(records[::-1]))
    with pytest.raises(RecipeError, match=r"train\.safetensors lacks log-probs of the start model"):
        loop.run(DPOStage(recipe), CPU)


def test_another_start_model_has_another_reference(
    make_recipe: MakeRecipe, tmp_path: Path, tiny_model: Path
) -> None:
    recipe = make_recipe(dpo={"max_steps": 1, "save_every": 5})
    loop.run(DPOStage(recipe), CPU)
    place = recipe.path / "dpo" / "reference" / "train.safetensors"
    first = load_tensors(place)[0]["log_probs"]
    for name in ("final", "checkpoints"):
        shutil.rmtree(recipe.path / "dpo" / name, ignore_errors=True)
    trained = DPOStage(make_recipe("other", dpo={"max_steps": 3}))
    loop.run(trained, CPU)
    shutil.rmtree(recipe.path / "sft" / "final")
    shutil.copytree(trained.folder / "final", recipe.path / "sft" / "final")
    loop.run(DPOStage(recipe), CPU)
    again = load_tensors(place)[0]["log_probs"]
    assert (again - first).nan_to_num().abs().max() > 1e-3
    assert lines(recipe)[0]["reward_margin"] == 0.0


def test_a_broken_start_model_is_named(make_recipe: MakeRecipe) -> None:
    recipe = make_recipe()
    model = DPOStage(recipe).build(None)
    with torch.no_grad():
        model.hf.model.norm.weight.fill_(torch.nan)
    model.save_pretrained(recipe.path / "sft" / "final")
    with pytest.raises(RecipeError, match="log-prob that is no number"):
        loop.run(DPOStage(recipe), CPU)


def test_samples_continue_held_out_prompts(make_recipe: MakeRecipe) -> None:
    recipe = make_recipe(dpo={"num_samples": 1})
    loop.run(DPOStage(recipe), CPU)
    found = read_jsonl(recipe.path / "dpo" / "samples.jsonl")
    assert [(s["step"], s["prompt"], s["kind"]) for s in found] == [
        (3, "A", "greedy"),
        (3, "A", "sampled"),
        (6, "A", "greedy"),
        (6, "A", "sampled"),
    ]


@pytest.mark.parametrize("loss", ["robust", "ipo", "plackett_luce"])
def test_every_loss_separates_the_pairs(make_recipe: MakeRecipe, loss: str) -> None:
    stage = DPOStage(make_recipe(dpo={"loss": loss, "max_steps": 12}))
    loop.run(stage, CPU)
    first, *_, last = lines(stage.recipe)
    assert last["eval/reward_margin"] > 0.05
    assert last["eval/pair_accuracy"] > 0.6
    if loss == "ipo":
        assert first["loss"] == pytest.approx(25.0)  # (1 / (2 * 0.1))^2


def test_adapters_alone_are_trained_against_the_model_that_they_start_from(
    make_recipe: MakeRecipe,
) -> None:
    recipe = make_recipe(dpo={"lora": {"rank": 4}, "max_steps": 8, "num_samples": 1})
    stage = DPOStage(recipe)
    loop.run(stage, CPU)
    first, *_, last = lines(recipe)
    assert first["loss"] == pytest.approx(math.log(2), abs=1e-6)
    assert first["reward_margin"] == 0.0
    assert last["eval/loss"] < first["loss"]
    # `final` holds the merged weights: what plain transformers loads is what evaluation saw.
    after = log_probs_one_by_one(stage.folder / "final", stage)
    before = log_probs_one_by_one(Path(stage.start), stage)
    drift = sum(after[n] - before[n] for n in after) / len(after)
    assert last["eval/log_ratio"] == pytest.approx(drift, rel=1e-3, abs=1e-4)
