"""The section `serve`, and what `rayrlhf serve` says before anything starts."""

from pathlib import Path
from typing import Any

import pytest
import yaml

from rayrlhf.cli import main
from rayrlhf.config import Recipe, RecipeError, parse
from rayrlhf.serving.weights import LiveWeights

ONE = {"models": {"a": {"path": "somewhere"}}}


def recipe(**serve: Any) -> Recipe:
    return parse({"name": "toy", "serve": {**ONE, **serve}})


def test_shares_sum_to_one() -> None:
    models = {"a": {"path": "x", "share": 3}, "b": {"path": "y"}}
    cfg = recipe(models=models, follow="ppo", follow_share=4).serve
    assert cfg is not None
    assert cfg.shares == {"a": 3 / 8, "b": 1 / 8, "ppo": 0.5}
    assert recipe().stages == ()


@pytest.mark.parametrize(
    ("serve", "says"),
    [
        ({"models": {}}, "serve has no model"),
        ({"models": {"a b": {"path": "x"}}}, "'a b': a name is up to 40 letters"),
        ({"models": {"ppo": {"path": "x"}}, "follow": "ppo"}, "have the same name"),
        ({"models": {"toy": {"path": "x"}, "b": {"path": "y"}}}, "has the recipe's name"),
        ({"follow": "reward"}, "serve.follow='reward'"),
        ({"token_variable": "no good"}, "serve.token_variable"),
        ({"limits": {"max_body_byte": 1}}, "did you mean serve.limits.max_body_bytes"),
        ({"models": {"a": {"path": "x", "share": 0}}}, "serve.models.a.share=0"),
    ],
)
def test_what_is_wrong_is_named(serve: dict[str, Any], says: str) -> None:
    with pytest.raises(RecipeError, match=says):
        recipe(**serve)


def test_one_model_may_have_the_recipes_name() -> None:
    assert recipe(models={"toy": {"path": "x"}}).serve is not None


def write(folder: Path, **serve: Any) -> str:
    tree = {"name": "toy", "run_dir": str(folder / "run"), "serve": {**ONE, **serve}}
    path = folder / "recipe.yaml"
    path.write_text(yaml.safe_dump(tree), encoding="utf-8")
    return str(path)


def test_what_is_wrong_is_said_before_ray_starts(
    tmp_path: Path,
    tiny_model: Path,
    monkeypatch: pytest.MonkeyPatch,
    capfd: pytest.CaptureFixture[str],
) -> None:
    place, model = write(tmp_path), f"serve.models.a.path={tiny_model}"

    def says(*args: str | Path) -> str:
        assert main(["serve", *map(str, args)]) == 2
        said = capfd.readouterr().err
        assert len(said.splitlines()) <= 2, said
        return said

    assert "no section serve" in says(place, "serve=null", "model.path=x", "tokenizer.path=x")
    assert "serve.models.a.path: somewhere: not a folder" in says(place)
    assert "has no whole checkpoint" in says(place, model, "serve.follow=ppo")
    long = says(place, model, "serve.max_length=100000")
    assert f"serve.max_length=100000: serve.models.a.path={tiny_model} reads " in long
    assert "serve.reward: nowhere: not a folder" in says(place, model, "serve.reward=nowhere")
    assert "cannot listen there" in says(place, model, "serve.host=203.0.113.1")
    monkeypatch.setenv("RAYRLHF_SERVE_TOKEN", "short")
    assert "RAYRLHF_SERVE_TOKEN has 5 characters" in says(place, model)
    assert "no such recipe" in says("--follow", tmp_path / "run" / "ppo")
    assert "which recipe?" in says()
    assert main(["ppo", place, "--follow", str(tmp_path)]) == 2
    assert "ppo serves nothing" in capfd.readouterr().err


def test_a_model_without_safetensors_is_refused(
    tmp_path: Path, tiny_model: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / "config.json").write_bytes((tiny_model / "config.json").read_bytes())
    assert main(["serve", write(tmp_path, models={"a": {"path": str(tmp_path)}})]) == 2
    assert "nothing else is loaded" in capfd.readouterr().err


def test_a_cluster_builds_the_endpoint_from_arguments(
    tmp_path: Path, tiny_model: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """As Serve does with `import_path: rayrlhf.serving.openai:app` and its `args`."""
    from ray.serve import Application
    from ray.serve._private.api import call_user_app_builder_with_args_if_necessary

    from rayrlhf.serving.openai import app

    monkeypatch.delenv("RAYRLHF_SERVE_TOKEN", raising=False)
    recipe = write(tmp_path, models={"a": {"path": str(tiny_model)}}, replicas=2)
    args = {"recipe": recipe, "overrides": ["serve.port=8001"]}
    built = call_user_app_builder_with_args_if_necessary(app, args)
    assert isinstance(built, Application)
    assert (tmp_path / "run" / "serve" / "token").stat().st_mode & 0o777 == 0o600
    live = LiveWeights(tmp_path / "run" / "serve").of("a")
    assert (live.folder, live.version) == (str(tiny_model), 1)
    for wrong in ({}, {"recipe": recipe, "receipt": 1}):
        with pytest.raises(ValueError, match="rec"):
            call_user_app_builder_with_args_if_necessary(app, wrong)
    with pytest.raises(RecipeError, match="no section serve"):
        call_user_app_builder_with_args_if_necessary(
            app, {"recipe": recipe, "overrides": ["serve=null", "tokenizer.path=x"]}
        )
