"""The tasks for lm-eval: their records come out of the cache, their templates fit the records.

lm-eval has an environment of its own (it asks for other versions), so its part stands in here.
"""

import importlib.util
import json
import sys
from pathlib import Path
from types import ModuleType
from typing import Any

import jinja2
import pytest
import yaml

FOLDER = Path(__file__).parents[2] / "jobs" / "lm_eval"


class Loader(yaml.SafeLoader):
    """Reads `!function module.name` as that name."""


Loader.add_constructor("!function", lambda loader, node: loader.construct_scalar(node))


def task(name: str) -> dict[str, Any]:
    loaded: dict[str, Any] = yaml.load((FOLDER / f"{name}.yaml").read_text(), Loader)
    return loaded


@pytest.fixture
def ratings(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> ModuleType:
    """Return jobs/lm_eval/human_ratings.py over a cache of a few records."""
    datasets = ModuleType("datasets")
    datasets.Dataset = type("Dataset", (), {"from_list": staticmethod(list)})  # type: ignore[attr-defined]
    monkeypatch.setitem(sys.modules, "datasets", datasets)
    monkeypatch.setenv("RAYRLHF_CACHE", str(tmp_path))
    spec = importlib.util.spec_from_file_location("human_ratings", FOLDER / "human_ratings.py")
    assert spec is not None and spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def write(tmp_path: Path, name: str, *records: dict[str, Any]) -> None:
    folder = tmp_path / "human-ratings-0123"
    folder.mkdir(exist_ok=True)
    (folder / name).write_text("".join(json.dumps(record) + "\n" for record in records))


def test_best_response_is_the_target(ratings: ModuleType, tmp_path: Path) -> None:
    record = {"prompt": "Tweet:", "responses": [" bad", " fine", " good"], "ranks": [3, 2, 1]}
    write(tmp_path, "comparisons.test.jsonl", {**record, "source": "tweets", "id": "1"})
    own = task("human_ratings_best")
    (row,) = getattr(ratings, own["custom_dataset"].partition(".")[2])()["test"]
    env = jinja2.Environment(undefined=jinja2.StrictUndefined)
    said = {
        key: env.from_string(own[f"doc_to_{key}"]).render(row)
        for key in ("text", "choice", "target")
    }
    assert said == {"text": "Tweet:", "choice": str(record["responses"]), "target": "2"}
    assert own["target_delimiter"] == "" and own["output_type"] == "multiple_choice"


def test_texts_are_of_all_sources(ratings: ModuleType, tmp_path: Path) -> None:
    sources = ["movies", "products", "editorials", "tweets"]
    for source in sources:
        write(tmp_path, f"corpus.{source}.test.jsonl", {"text": f"{source}.", "source": source})
    own = task("human_ratings_texts")
    rows = getattr(ratings, own["custom_dataset"].partition(".")[2])()["test"]
    assert [row["source"] for row in rows] == sources
    said = jinja2.Template(own["doc_to_target"]).render(rows[0])
    assert said == "movies." and own["output_type"] == "loglikelihood_rolling"


def test_missing_data_says_how_to_get_it(ratings: ModuleType) -> None:
    with pytest.raises(FileNotFoundError, match=r"run `rayrlhf data configs/quickstart\.yaml`"):
        ratings.comparisons()
