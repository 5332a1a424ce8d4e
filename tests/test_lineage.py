"""Which stages need to run again, and which do not."""

import shutil
from pathlib import Path
from typing import Any

import pytest

from rayrlhf import config, lineage, pipeline, run_dir
from rayrlhf.config import Recipe, RecipeError
from rayrlhf.data.tokenizer import load_tokenizer


def toy(folder: Path, **changes: Any) -> Recipe:
    (folder / "movies.jsonl").write_text('{"text": "A film."}\n')
    (folder / "demos.jsonl").write_text('{"prompt": "A", "response": " film."}\n')
    return config.parse(
        {
            "name": "toy",
            "run_dir": str(folder / "run"),
            "corpus": {"sources": {"movies": {"path": str(folder / "*.jsonl")}}},
            "pretrain": {},
            "sft": {"train": str(folder / "demos.jsonl")},
            **changes,
        }
    )


def finish(recipe: Recipe, stage: str, text: str = "x") -> bool:
    """Run `stage` as a stand-in that writes one file; return whether it had to run."""
    with pipeline.tracked(recipe, stage) as needed:
        if needed:
            output = recipe.path / lineage.OUTPUTS[stage]
            if output.suffix:
                output.write_text(text)
            else:
                output.mkdir(parents=True, exist_ok=True)
                (output / "config.json").write_text(text)
    return needed


def test_an_unchanged_stage_is_skipped(tmp_path: Path) -> None:
    recipe = toy(tmp_path)
    assert finish(recipe, "corpus")
    assert finish(recipe, "pretrain")
    assert not finish(recipe, "corpus")
    assert not finish(recipe, "pretrain")
    entry = lineage.load(recipe)["corpus"]
    assert set(entry) == {"inputs", "outputs", "versions", "commit", "seconds", "finished"}
    assert "torch" in entry["versions"]


def test_a_changed_section_runs_its_stage_and_keeps_the_old_folder(tmp_path: Path) -> None:
    recipe = toy(tmp_path)
    finish(recipe, "corpus")
    finish(recipe, "pretrain")
    changed = toy(tmp_path, pretrain={"epochs": 2})
    assert not finish(changed, "corpus")
    assert finish(changed, "pretrain", "y")
    assert (recipe.path / "pretrain.previous" / "final" / "config.json").read_text() == "x"
    assert finish(toy(tmp_path, pretrain={"epochs": 3}), "pretrain")
    assert len(list(recipe.path.glob("pretrain.previous*"))) == 2


def test_a_folder_that_a_page_writes_to_is_not_moved(tmp_path: Path) -> None:
    recipe = toy(tmp_path)
    finish(recipe, "corpus")
    finish(recipe, "pretrain")
    says = "pretrain/label: another command writes there"
    with run_dir.held(recipe, "pretrain/label"), pytest.raises(RecipeError, match=says):
        finish(toy(tmp_path, pretrain={"epochs": 2}), "pretrain")
    assert (recipe.path / "pretrain" / "final" / "config.json").read_text() == "x"
    assert not list(recipe.path.glob("pretrain.previous*"))


def test_how_a_judge_is_reached_does_not_begin_rounds_again(tmp_path: Path) -> None:
    judge = {"url": "http://h/v1", "llm": "m"}

    def read(**changes: Any) -> dict[str, str]:
        recipe = toy(
            tmp_path,
            reward={"train": "r.jsonl"},
            ppo={"prompts": "p.jsonl"},
            rounds={"num_rounds": 1, "judge": {**judge, **changes}},
        )
        return lineage.inputs(recipe, "rounds", {})

    assert read() == read(timeout_s=90, retries=9, max_pending=2, key_env="KEY")
    assert read() != read(question="Which one is shorter?")


def test_changed_data_runs_the_stage_and_those_after_it(tmp_path: Path) -> None:
    recipe = toy(tmp_path)
    finish(recipe, "corpus")
    finish(recipe, "pretrain")
    (tmp_path / "more.jsonl").write_text('{"text": "Another."}\n')
    assert finish(recipe, "corpus", "changed")
    assert finish(recipe, "pretrain")


def test_a_damaged_output_is_not_current(tmp_path: Path) -> None:
    recipe = toy(tmp_path)
    finish(recipe, "corpus")
    (recipe.path / "corpus" / "manifest.json").write_text("damaged")
    assert finish(recipe, "corpus")


def test_workers_are_not_an_input(tmp_path: Path) -> None:
    finish(toy(tmp_path), "corpus")
    assert not finish(toy(tmp_path, resources={"num_workers": 2}), "corpus")


def test_a_failed_stage_leaves_no_entry_and_resumes_in_place(tmp_path: Path) -> None:
    recipe = toy(tmp_path)
    finish(recipe, "corpus")
    try:
        with pipeline.tracked(recipe, "pretrain"):
            (recipe.path / "pretrain" / "checkpoints").mkdir()
            raise RuntimeError("killed")
    except RuntimeError:
        assert "pretrain" not in lineage.load(recipe)
    with pipeline.tracked(recipe, "pretrain") as needed:
        assert needed
        assert (recipe.path / "pretrain" / "checkpoints").is_dir()
        (recipe.path / "pretrain" / "final").mkdir()


def test_a_corpus_from_elsewhere_is_an_input(tmp_path: Path) -> None:
    elsewhere = tmp_path / "elsewhere"
    elsewhere.mkdir()
    (elsewhere / "manifest.json").write_text("{}")
    recipe = toy(tmp_path, pretrain={"corpus": str(elsewhere)})
    finish(recipe, "corpus")
    assert finish(recipe, "pretrain")
    assert not finish(recipe, "pretrain")
    (elsewhere / "manifest.json").write_text('{"row_length": 8}')
    assert finish(recipe, "pretrain")


def test_the_files_of_a_named_tokenizer_are_an_input(tmp_path: Path, tiny_tokenizer: Path) -> None:
    own = tmp_path / "own"
    shutil.copytree(tiny_tokenizer, own)
    recipe = toy(tmp_path, tokenizer={"path": str(own)})
    assert finish(recipe, "corpus")
    copy = recipe.path / "tokenizer" / "tokenizer.json"
    load_tokenizer(recipe)
    (own / "config.json").write_text("a model's, not the tokenizer's")
    assert not finish(recipe, "corpus")
    (own / "tokenizer.json").write_text((own / "tokenizer.json").read_text() + "\n")
    assert finish(recipe, "corpus")
    assert not copy.exists()  # the run's copy was of the files before


def test_an_evaluation_without_its_report_is_not_complete(tmp_path: Path) -> None:
    files = {"prompts": str(tmp_path / "demos.jsonl"), "comparisons": str(tmp_path / "demos.jsonl")}
    recipe = toy(tmp_path, evaluate=files)
    for stage in ("corpus", "pretrain", "sft"):
        finish(recipe, stage)
    report = recipe.path / "report.html"
    for content in ("a", "b"):
        with pipeline.tracked(recipe, "evaluate") as needed:
            assert needed
            (recipe.path / "evaluation" / "results.json").write_text("{}")
            report.write_text(content)
        assert lineage.load(recipe)["evaluate"]["outputs"].keys() == {
            "evaluation/results.json",
            "report.html",
        }
        assert pipeline.is_current(recipe, "evaluate")
        report.write_text("damaged") if content == "a" else report.unlink()
        assert not pipeline.is_current(recipe, "evaluate")


def test_start_models_follow_the_road(tmp_path: Path) -> None:
    recipe = toy(tmp_path)
    run = recipe.path
    assert lineage.start_model(recipe, "sft") == str(run / "pretrain/final")
    assert lineage.start_model(recipe, "reward") == str(run / "sft/final")
    assert lineage.start_model(recipe, "dpo") == str(run / "sft/final")
    assert lineage.start_model(recipe, "ppo") == str(run / "sft/final")
    assert lineage.start_model(recipe, "ppo.critic") == str(run / "reward/final")
    short = toy(tmp_path, pretrain=None, corpus=None, model={"path": "builtin:m"})
    assert lineage.start_model(short, "sft") == "builtin:m"
    other = toy(tmp_path, sft={"train": "x", "init": "elsewhere"})
    assert lineage.start_model(other, "sft") == "elsewhere"
    other = toy(tmp_path, dpo={"train": "x", "init": "elsewhere"})
    assert lineage.start_model(other, "dpo") == "elsewhere"
