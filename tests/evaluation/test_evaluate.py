"""The whole command: with an engine that answers in no time, and once with vLLM."""

import json
import shutil
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any

import pytest
import torch

from rayrlhf.config import (
    DPOConfig,
    FewShotConfig,
    OveroptimisationConfig,
    Recipe,
    RecipeError,
    VarietyConfig,
    parse,
)
from rayrlhf.evaluation import evaluate as module
from rayrlhf.evaluation.evaluate import evaluate
from rayrlhf.generation import Completion
from rayrlhf.models.causal_lm import CausalLMModel
from rayrlhf.models.scalar_head import ScalarHeadModel

WORDS = (" good", " bad", " long", " happy")


class FakeEngine:
    """Samples with plain transformers; counts how often it was built and got weights."""

    built = 0
    versions: list[int] = []

    def __init__(self, path: str, **_: Any) -> None:
        self.model = CausalLMModel.from_pretrained(path)
        type(self).built += 1

    def load_weights(self, weights: Iterable[tuple[str, torch.Tensor]], version: int) -> None:
        self.model.hf.load_state_dict(dict(weights), strict=False)
        self.versions.append(version)

    def generate(
        self,
        prompts: Sequence[list[int]],
        *,
        max_tokens: int,
        temperature: float,
        seeds: Sequence[int],
    ) -> list[Completion]:
        return [
            self._answer(ids, max_tokens, temperature, seed)
            for ids, seed in zip(prompts, seeds, strict=True)
        ]

    @torch.no_grad()
    def _answer(self, ids: list[int], max_tokens: int, temperature: float, seed: int) -> Completion:
        generator = torch.Generator().manual_seed(seed)
        tokens: list[int] = []
        log_probs: list[float] = []
        for _ in range(max_tokens):
            logits = self.model.hf(torch.tensor([ids + tokens])).logits[0, -1] / temperature
            chances = logits.log_softmax(dim=-1)
            token = int(torch.multinomial(chances.exp(), 1, generator=generator))
            tokens.append(token)
            log_probs.append(float(chances[token]))
            if token == 0:
                return Completion(tokens, log_probs, "stop", [0] * len(tokens))
        return Completion(tokens, log_probs, "length", [0] * len(tokens))


@pytest.fixture
def run_dir(tmp_path: Path, tiny_model: Path, tiny_tokenizer: Path) -> Path:
    """Return a run directory with base, SFT (the same weights), PPO and reward model."""
    shutil.copytree(tiny_tokenizer, tmp_path / "tokenizer")
    (tmp_path / "tokenizer" / "rayrlhf_origin.json").write_text(
        json.dumps({"origin": str(tiny_model)})
    )
    shutil.copytree(tiny_model, tmp_path / "sft" / "final")
    model = CausalLMModel.from_pretrained(tiny_model)
    with torch.no_grad():
        model.hf.model.embed_tokens.weight.mul_(3)
    shutil.copytree(tiny_model, tmp_path / "ppo" / "final")
    model.save_pretrained(tmp_path / "ppo" / "final")
    shutil.copytree(tiny_tokenizer, tmp_path / "reward" / "final")
    ScalarHeadModel.from_causal_lm(tiny_model, 1).save_pretrained(tmp_path / "reward" / "final")
    (tmp_path / "prompts.jsonl").write_text(
        "".join(json.dumps({"prompt": f"The movie is a{word}"}) + "\n" for word in WORDS)
    )
    (tmp_path / "comparisons.jsonl").write_text(
        "".join(
            json.dumps(
                {
                    "prompt": "Review:",
                    "responses": [f"{word} {i}" for i in range(3)],
                    "ranks": [1, 2, 3],
                    "ratings": [2.0 + n, 1.0, -1.0 - n],
                    "source": ("movies", "tweets")[n % 2],
                }
            )
            + "\n"
            for n, word in enumerate(WORDS)
        )
    )
    return tmp_path


def recipe_of(
    run_dir: Path,
    model: str | Path,
    *,
    stages: Sequence[str] = ("sft", "reward", "ppo"),
    **reward: Any,
) -> Recipe:
    sections: dict[str, dict[str, Any]] = {
        "sft": {"train": "x"},
        "reward": {"train": "x", **reward},
        "ppo": {"prompts": "x"},
    }
    return parse(
        {
            "name": "toy",
            "run_dir": str(run_dir),
            "model": {"path": str(model), "max_length": 48},
            "resources": {"rollout": {"num_threads": 1}},
            **{stage: sections[stage] for stage in stages},
            "evaluate": {
                "prompts": str(run_dir / "prompts.jsonl"),
                "num_prompts": 3,
                "comparisons": str(run_dir / "comparisons.jsonl"),
                "num_samples": 2,
                "max_response_tokens": 8,
            },
        }
    )


@pytest.fixture
def fake_engine(monkeypatch: pytest.MonkeyPatch) -> type[FakeEngine]:
    monkeypatch.setattr(module, "Engine", FakeEngine)
    monkeypatch.setattr(FakeEngine, "built", 0)
    monkeypatch.setattr(FakeEngine, "versions", [])
    return FakeEngine


def check_results(run_dir: Path, tiny_model: Path) -> dict[str, Any]:
    found: dict[str, Any] = json.loads((run_dir / "evaluation" / "results.json").read_text())
    assert set(found["reward_model"]) == {"movies", "tweets"}
    assert found["reward_model"]["movies"]["num_pairs"] == 14  # of 15, one has equal ratings
    for row in found["reward_model"].values():
        assert -1 <= row["pearson"] <= 1 and 0 <= row["pair_accuracy"] <= 1
    for key in (
        "win_rate_vs_sft",
        "entropy_nats_per_token",
        "distinct_2",
        "held_out_loss",
        "kl_ref_per_response",
        "ratings",
    ):
        assert set(found[key]) == {"base", "sft", "ppo"}
    assert set(found["win_rate_vs_sft"]["ppo"]) == {"vader", "reward"}
    # base and sft are the same weights, and have the same random numbers
    assert found["win_rate_vs_sft"]["base"] == {"vader": 0.5, "reward": 0.5}
    assert found["kl_ref_per_response"]["sft"] == 0.0
    assert found["kl_ref_per_response"]["base"] == pytest.approx(0.0, abs=1e-4)
    assert found["ratings"]["sft"]["elo"] == 1000
    assert set(found["held_out_loss"]["ppo"]) == {"movies", "tweets"}
    assert max(found["engine_mismatch"].values()) < 1e-3
    assert len(found["samples"]) == 2
    assert set(found["samples"][0]["answers"]) == {"base", "sft", "ppo"}
    assert (run_dir / "evaluation" / "win_rate.png").read_bytes().startswith(b"\x89PNG")
    assert "data:image/png;base64" in (run_dir / "report.html").read_text(encoding="utf-8")
    return found


def test_everything_is_written_with_one_engine(
    run_dir: Path,
    tiny_model: Path,
    fake_engine: type[FakeEngine],
    capsys: pytest.CaptureFixture[str],
) -> None:
    assert evaluate(recipe_of(run_dir, tiny_model)) == run_dir / "evaluation"
    first = check_results(run_dir, tiny_model)
    assert (fake_engine.built, fake_engine.versions) == (1, [1, 2])
    out = capsys.readouterr().out
    assert "wins by VADER" in out and str(run_dir / "report.html") in out
    phases = [line.removeprefix(" evaluate ") for line in out.splitlines()[:5]]
    assert phases == [
        "3 prompts, answered by base, sft, ppo",
        "9 answers, judged by vader, reward",
        "entropy, KL and the loss on 12 held-out rows, batches of up to 768 tokens",
        "agreement with people on 12 texts",
        "figures and report",
    ]
    evaluate(recipe_of(run_dir, tiny_model))
    second = check_results(run_dir, tiny_model)
    for changing in ("created", "seconds"):
        first.pop(changing), second.pop(changing)
    assert first == second  # the seed decides everything


def test_what_rlhf_costs(
    run_dir: Path, tiny_model: Path, fake_engine: type[FakeEngine], tmp_path: Path
) -> None:
    demonstrations = tmp_path / "demonstrations.jsonl"
    demonstrations.write_text(
        "".join(
            json.dumps({"prompt": "The film", "response": f" is{word}"}) + "\n" for word in WORDS
        )
    )
    recipe = recipe_of(run_dir, tiny_model, gold={"train": "y"})
    assert recipe.sft is not None and recipe.evaluate is not None
    recipe = recipe.model_copy(
        update={
            "sft": recipe.sft.model_copy(update={"train": str(demonstrations)}),
            "evaluate": recipe.evaluate.model_copy(
                update={
                    "few_shot": FewShotConfig(demonstrations=2, separator=None),
                    "variety": VarietyConfig(prompts=2, samples=3),
                    "overoptimisation": OveroptimisationConfig(
                        prompts=2, samples=4, checkpoint_samples=2
                    ),
                }
            ),
        }
    )
    with pytest.raises(RecipeError, match="reward/gold/final, which is no complete reward model"):
        evaluate(recipe)
    shutil.copytree(run_dir / "reward" / "final", run_dir / "reward" / "gold" / "final")
    step = run_dir / "ppo" / "checkpoints" / "step-00000010"
    shutil.copytree(run_dir / "ppo" / "final", step)
    (step / "manifest.json").write_text("{}")
    (run_dir / "ppo" / "checkpoints" / "step-00000020").mkdir()  # half-written
    evaluate(recipe)
    assert fake_engine.built == 2  # its memory is given back before models run without it
    found = json.loads((run_dir / "evaluation" / "results.json").read_text())

    assert found["few_shot"]["mean_demonstrations"] == 2.0
    assert set(found["few_shot"]["win_rate"]) == {"vader", "reward"}
    for model in ("base", "sft", "ppo"):
        row = found["variety"][model]
        assert 1 <= row["distinct_answers"]["value"] <= 3
        assert row["distinct_2"]["value"] == found["distinct_2"][model]
        low, high = found["entropy_intervals"][model]
        assert low <= found["entropy_nats_per_token"][model] <= high
    assert found["variety"]["base"] == found["variety"]["sft"]  # the same weights and seeds
    assert found["alignment_tax"]["sft"] == {"movies": 0.0, "tweets": 0.0}
    assert set(found["alignment_tax"]) == {"sft", "ppo"}

    cost = found["overoptimisation"]
    assert [point["n"] for point in cost["best_of_n"]["points"]] == [1, 2, 4]
    assert [point["step"] for point in cost["ppo"]["points"]] == [10]
    first = cost["best_of_n"]["points"][0]
    assert (first["kl"], first["proxy"]) == (0.0, pytest.approx(0.0, abs=1e-9))
    # Proxy and gold are the same model here, and the best of more is never worse by it.
    for point in cost["best_of_n"]["points"]:
        assert point["proxy"] == pytest.approx(point["gold"])
    assert cost["best_of_n"]["peak"] == {**cost["best_of_n"]["peak"], "n": 4, "is_last": True}
    assert (run_dir / "evaluation" / "overoptimisation.png").is_file()
    assert found["hacking"]["trained"] == "ppo" and len(found["hacking"]["gains"]) == 2
    assert "demonstration copy" in found["hacking"]["rules"]


def test_an_ensemble_is_measured_beside_the_model_of_ppo(
    run_dir: Path, tiny_model: Path, fake_engine: type[FakeEngine]
) -> None:
    recipe = recipe_of(run_dir, tiny_model, stages=("sft", "reward"))
    assert recipe.reward is not None
    pair = recipe.model_copy(update={"reward": recipe.reward.model_copy(update={"num_members": 2})})
    with pytest.raises(RecipeError, match="reward/members/01/final, which is no complete model"):
        evaluate(pair)
    other = ScalarHeadModel.from_causal_lm(tiny_model, 2)
    other.save_pretrained(run_dir / "reward" / "members" / "01" / "final")
    evaluate(pair)
    found = json.loads((run_dir / "evaluation" / "results.json").read_text())
    for row in found["reward_model"].values():
        ensemble = row["ensemble"]
        assert ensemble["member_pair_accuracy"][0] == pytest.approx(row["pair_accuracy"])
        assert ensemble["num_members"] == 2 and ensemble["disagreement"] > 0
        assert sum(third["num_pairs"] for third in ensemble["by_disagreement"]) == row["num_pairs"]
        assert sum(fifth["num_pairs"] for fifth in row["by_length"]) == row["num_pairs"]
    assert (run_dir / "evaluation" / "reward_errors.png").is_file()
    assert "disagreeing third" in (run_dir / "report.html").read_text(encoding="utf-8")


def test_without_ppo_and_reward(
    run_dir: Path, tiny_model: Path, fake_engine: type[FakeEngine]
) -> None:
    evaluate(recipe_of(run_dir, tiny_model, stages=("sft",)))
    found = json.loads((run_dir / "evaluation" / "results.json").read_text())
    assert set(found["models"]) == {"base", "sft"}
    assert found["judges"] == ["vader"] and found["reward_model"] == {}


def test_a_base_model_from_the_hub(
    run_dir: Path, hub_model: str, fake_engine: type[FakeEngine]
) -> None:
    evaluate(recipe_of(run_dir, hub_model, stages=("sft",)))
    found = json.loads((run_dir / "evaluation" / "results.json").read_text())
    assert found["models"]["base"] == hub_model
    assert found["win_rate_vs_sft"]["base"] == {"vader": 0.5}
    with pytest.raises(RecipeError, match="acme/none: "):
        module.models_of(recipe_of(run_dir, "acme/none", stages=("sft",)))


def test_the_model_of_ppo_ptx_has_its_name(run_dir: Path, tiny_model: Path) -> None:
    recipe = recipe_of(run_dir, tiny_model)
    assert recipe.ppo is not None
    mixed = recipe.model_copy(update={"ppo": recipe.ppo.model_copy(update={"ptx_coef": 0.1})})
    assert list(module.models_of(recipe)) == ["base", "sft", "ppo"]
    assert list(module.models_of(mixed)) == ["base", "sft", "ppo_ptx"]


def test_dpo_stands_beside_ppo(run_dir: Path, tiny_model: Path) -> None:
    recipe = recipe_of(run_dir, tiny_model).model_copy(update={"dpo": DPOConfig(train="x")})
    with pytest.raises(RecipeError, match="dpo/final, which is no complete model"):
        module.models_of(recipe)
    shutil.copytree(run_dir / "ppo" / "final", run_dir / "dpo" / "final")
    assert list(module.models_of(recipe)) == ["base", "sft", "dpo", "ppo"]


def test_a_missing_model_is_named(run_dir: Path, tiny_model: Path) -> None:
    shutil.rmtree(run_dir / "ppo")
    with pytest.raises(RecipeError, match="ppo/final, which is no complete model"):
        evaluate(recipe_of(run_dir, tiny_model))


@pytest.mark.slow
def test_with_vllm(run_dir: Path, tiny_model: Path) -> None:
    evaluate(recipe_of(run_dir, tiny_model))
    check_results(run_dir, tiny_model)
