"""Battles with models and judges from outside the run, from the recipe to results.json."""

import json
import math
import shutil
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
from transformers import (
    AutoTokenizer,
    LlamaConfig,
    LlamaForCausalLM,
    PreTrainedTokenizerFast,
)

from rayrlhf import pipeline
from rayrlhf.config import Recipe, RecipeError, parse
from rayrlhf.data.records import prompt_text
from rayrlhf.evaluation import evaluate as module
from rayrlhf.evaluation import plots
from rayrlhf.evaluation.battles import standings
from rayrlhf.evaluation.contestants import contestants
from rayrlhf.evaluation.evaluate import as_prompts, evaluate
from rayrlhf.evaluation.judges import Answer
from rayrlhf.evaluation.panel import panel
from rayrlhf.evaluation.ratings import outcomes
from rayrlhf.models.scalar_head import ScalarHeadModel
from tests.evaluation.test_evaluate import FakeEngine, recipe_of, run_dir
from tests.evaluation.test_llm_judge import fair, replying
from tests.external.scorer import serving

__all__ = ["run_dir"]  # a fixture

PROMPTS = [{"prompt": "The movie is"}]
CHATS = [{"messages": [{"role": "user", "content": "Say it."}]}]


@pytest.fixture(scope="session")
def stranger(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Return the folder of a random Llama with a vocabulary of its own, 270 ids."""
    core = Tokenizer(models.BPE())
    core.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    core.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=270,
        special_tokens=["</s>"],
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    core.train_from_iterator(["The movie is a movie."] * 20, trainer)
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=core, eos_token="</s>")
    model = LlamaForCausalLM(
        LlamaConfig(
            vocab_size=len(tokenizer),
            hidden_size=32,
            intermediate_size=32,
            num_hidden_layers=1,
            num_attention_heads=1,
            num_key_value_heads=1,
            max_position_embeddings=64,
            eos_token_id=tokenizer.eos_token_id,
        )
    )
    folder = tmp_path_factory.mktemp("stranger")
    model.save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    return folder


def with_battles(recipe: Recipe, **changes: Any) -> Recipe:
    tree = recipe.model_dump(mode="json", exclude_unset=True)
    tree["evaluate"] |= changes
    return parse(tree)


def test_the_whole_field_before_every_kind_of_judge(
    run_dir: Path,  # noqa: F811
    tiny_model: Path,
    stranger: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    monkeypatch.setattr(module, "Engine", FakeEngine)
    monkeypatch.setattr(plots, "figures", lambda *_: [])  # test_report.py draws them
    monkeypatch.setenv("no_proxy", "127.0.0.1")
    shutil.copytree(run_dir / "ppo" / "final", run_dir / "elsewhere")
    gold = run_dir / "gold"
    shutil.copytree(stranger, gold)
    ScalarHeadModel.from_causal_lm(stranger, 3).save_pretrained(gold)
    (run_dir / "taste.py").write_text("def brevity(p, r): return [-len(x) for x in r]\n")
    longer = replying(lambda a, b: "[[A]]" if len(a) > len(b) else "[[B]]")
    with serving(longer) as server:
        recipe = with_battles(
            recipe_of(run_dir, tiny_model),
            max_response_tokens=4,
            models={"again": str(run_dir / "elsewhere"), "stranger": str(stranger)},
            judges=[
                {"function": f"{run_dir}/taste.py:brevity"},
                {"model": str(gold)},
                {"url": server.url, "llm": "long-lover"},
            ],
        )
        evaluate(recipe)
        asked = len(server.bodies)
        evaluate(recipe)
        assert asked > 0 and len(server.bodies) == asked  # all verdicts are kept
    found = json.loads((run_dir / "evaluation" / "results.json").read_text())
    assert set(found["models"]) == {"base", "sft", "ppo"}  # what was there before is as before
    battles = found["battles"]
    names = ["base", "sft", "ppo", "again", "stranger"]
    assert battles["models"] == names and battles["anchor"] == "sft"
    assert list(battles["judges"]) == ["vader", "reward", "brevity", "gold", "long-lover"]
    for judge in battles["judges"].values():
        assert judge["num_battles"] == 3 * 10
        assert judge["win_rate"]["again"]["ppo"] == 0.5  # the same weights, the same random numbers
        assert judge["win_rate"]["base"]["sft"] == 0.5
        for a, row in judge["win_rate"].items():
            for b, rate in row.items():
                assert rate + judge["win_rate"][b][a] == pytest.approx(1.0)
        assert judge["ratings"]["sft"]["elo"] == 1000
        assert judge["ratings"]["again"]["elo"] == pytest.approx(judge["ratings"]["ppo"]["elo"])
        assert set(judge["length_controlled_win_rate"]) == set(names) - {"sft"}
    old = found["win_rate_vs_sft"]["ppo"]
    assert battles["judges"]["vader"]["win_rate"]["ppo"]["sft"] == pytest.approx(old["vader"])
    long_lover, brevity = (battles["judges"][name] for name in ("long-lover", "brevity"))
    assert long_lover["positions"]["undecided"] == 0
    for a in names:
        for b, rate in brevity["win_rate"][a].items():
            assert long_lover["win_rate"][a][b] == pytest.approx(1 - rate)
    assert "judged by long-lover" in capsys.readouterr().out
    page = (run_dir / "report.html").read_text(encoding="utf-8")
    assert "rating, long-lover" in page and "against stranger" in page


def test_undecided_battles_are_left_out_of_standings() -> None:
    def answers(lengths: list[int]) -> list[Answer]:
        return [Answer("p", "x" * n, [], [], [], ended=True) for n in lengths]

    field = {"a": answers([1, 2, 3, 4]), "b": answers([4, 3, 2, 1])}
    won = outcomes(np.array([[1.0, 0.0], [0.0, 0.0], [1.0, 0.0], [1.0, 0.0]]))
    won[3] = math.nan
    found = standings(won, field, anchor="b")
    assert found["num_battles"] == 4
    assert found["tie_share"] == pytest.approx(1 / 3)
    assert found["win_rate"]["a"]["b"] == pytest.approx(2.5 / 3)
    odds = (2.5 + 0.5) / (0.5 + 0.5)
    assert found["ratings"]["a"]["elo"] == pytest.approx(1000 + 400 * math.log10(odds))


def test_a_judge_reads_the_whole_chat(tiny_tokenizer: Path) -> None:
    assert prompt_text({"prompt": "Go on:"}) == "Go on:"
    assert prompt_text(CHATS[0]) == "Say it."
    turns = [{"role": "system", "content": "Be kind."}, {"role": "user", "content": "Hi."}]
    assert prompt_text({"messages": turns}) == "system: Be kind.\n\nuser: Hi."
    tokenizer = AutoTokenizer.from_pretrained(tiny_tokenizer)
    tokenizer.chat_template = "{% for each in messages %}{{ each.content }}\n{% endfor %}"
    [prompt] = as_prompts([{"messages": turns}], tokenizer)
    assert prompt.text == "system: Be kind.\n\nuser: Hi." and prompt.is_chat
    assert "Be kind." in tokenizer.decode(prompt.ids) and "Hi." in tokenizer.decode(prompt.ids)
    calls = {"role": "assistant", "content": None, "tool_calls": [{"id": 1}]}
    assert prompt_text({"messages": [calls, *turns]}).startswith('assistant: [{"id": 1}]\n\n')


def test_a_model_that_cannot_fight_is_named(
    run_dir: Path,  # noqa: F811
    tiny_model: Path,
    tiny_tokenizer: Path,
    stranger: Path,
    tmp_path: Path,
) -> None:
    def check(folder: Path, records: list[dict[str, Any]] = PROMPTS, **changes: Any) -> None:
        recipe = recipe_of(run_dir, tiny_model, stages=("sft",))
        contestants(with_battles(recipe, models={"guest": str(folder)}, **changes), records)

    check(stranger)
    with pytest.raises(RecipeError, match=r"models\.guest: .*no chat template, and evaluate\.prom"):
        check(stranger, CHATS)
    with pytest.raises(RecipeError, match=r"models\.guest: .*/none: not a folder with a Hugging"):
        check(tmp_path / "none")
    with pytest.raises(RecipeError, match=r"models\.guest: .*_tokens=63 is more than the 64 that"):
        check(stranger, max_response_tokens=63)
    bare = tmp_path / "bare"
    bare.mkdir()
    for name in ("config.json", "model.safetensors"):
        shutil.copy(stranger / name, bare)
    with pytest.raises(RecipeError, match=r"models\.guest: .*bare: .*put the tokenizer of the"):
        check(bare)
    shutil.copytree(tiny_tokenizer, bare, dirs_exist_ok=True)  # 300 ids, the model has 270
    with pytest.raises(RecipeError, match=r"models\.guest: the tokenizer has ids up to 299"):
        check(bare)
    (bare / "model.safetensors").unlink()
    with pytest.raises(RecipeError, match=r"models\.guest: .*bare: no \*\.safetensors"):
        check(bare)


def test_a_judge_that_cannot_judge_is_named(
    run_dir: Path,  # noqa: F811
    tiny_model: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setenv("no_proxy", "127.0.0.1")
    monkeypatch.delenv("NO_SUCH_KEY", raising=False)
    tokenizer = PreTrainedTokenizerFast.from_pretrained(tiny_model)
    file = run_dir / "taste.py"
    file.write_text("def one(p, r): return [1.0]\ndef nan(p, r): return [float('nan')] * len(r)\n")
    answers = [Answer("p", "x", [5], [6], [0.0], ended=True)] * 2

    def judges(*entries: dict[str, Any]) -> Any:
        recipe = with_battles(recipe_of(run_dir, tiny_model, stages=("sft",)), judges=entries)
        return panel(recipe, PROMPTS * 2, tokenizer, 64)

    with pytest.raises(RecipeError, match=r"judges\.0\.model=acme/none: acme/none: "):
        judges({"model": "acme/none"})
    with pytest.raises(RecipeError, match=r"judges\.1\.function=.*taste\.py has no two"):
        judges({"function": f"{file}:one"}, {"function": f"{file}:two"})
    one, nan = judges({"function": f"{file}:one"}, {"function": f"{file}:nan"})
    with pytest.raises(RecipeError, match="function=.*:one: it gave 1 scores for 2 responses"):
        one.score(answers)
    with pytest.raises(RecipeError, match="function=.*:nan: it gave NaN or infinity"):
        nan.score(answers)
    with serving(replying(fair)) as server:
        url = server.url
        judges({"url": url, "llm": "x"})
    with pytest.raises(RecipeError, match=r"judges\.0\.url=http://127.*there is no answer"):
        judges({"url": url, "llm": "y", "retries": 0})

    keyless = {"url": url, "llm": "y", "key_env": "NO_SUCH_KEY"}
    recipe = with_battles(recipe_of(run_dir, tiny_model, stages=("sft",)), judges=[keyless])
    with pytest.raises(RecipeError, match="key_env=NO_SUCH_KEY is not set"):
        pipeline.check_judges(recipe)


def test_what_fights_and_judges_is_an_input_of_the_stage(
    run_dir: Path,  # noqa: F811
    tiny_model: Path,
    stranger: Path,
    tmp_path_factory: pytest.TempPathFactory,
) -> None:
    folder = tmp_path_factory.mktemp("outside")
    shutil.copytree(stranger, folder / "guest")
    (folder / "taste.py").write_text("def score(p, r): return [0.0] * len(r)\n")
    recipe = with_battles(
        recipe_of(run_dir, tiny_model, stages=("sft",)),
        models={"guest": str(folder / "guest")},
        judges=[{"function": f"{folder}/taste.py:score"}, {"model": str(folder / "guest")}],
    )
    pipeline.check_judges(recipe)
    pipeline.check_models(recipe)
    before = pipeline._inputs(recipe, "evaluate")
    (folder / "guest" / "config.json").write_text("{}")
    (folder / "taste.py").write_text("def score(p, r): return [1.0] * len(r)\n")
    after = pipeline._inputs(recipe, "evaluate")
    assert {key for key in before if before[key] != after[key]} == {
        "evaluate.models.guest",
        "evaluate.judges.0.function",
        "evaluate.judges.1.model",
    }
    (folder / "guest" / "model.safetensors").unlink()
    with pytest.raises(RecipeError, match=r"evaluate\.models\.guest: "):
        pipeline.check_models(recipe)
