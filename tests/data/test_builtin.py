"""Fetching: pip failures, wrong hashes, offline use, and the real small model."""

import shutil
import sys
from pathlib import Path

import pytest
import torch
from transformers import AutoModelForCausalLM, AutoTokenizer

from rayrlhf.config import RecipeError, parse
from rayrlhf.data import builtin

NAME = "builtin:human-ratings/prompts.test.jsonl"
PIP = '#!/bin/sh\necho "$@" >> "$PIP_CALLS"\nfor last; do :; done\n'


@pytest.fixture
def empty_cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setenv("RAYRLHF_CACHE", str(tmp_path / "cache"))
    monkeypatch.setenv("PIP_CALLS", str(tmp_path / "calls"))
    return tmp_path / "cache"


def fake_pip(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, script: str) -> None:
    """Stand in for the interpreter that runs `-m pip download ... --dest DIR ...`."""
    python = tmp_path / "python"
    python.write_text(PIP + script, encoding="utf-8")
    python.chmod(0o755)
    monkeypatch.setattr(sys, "executable", str(python))


def test_pip_fails(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, empty_cache: Path) -> None:
    fake_pip(tmp_path, monkeypatch, 'echo "ERROR: No matching distribution" >&2; exit 1\n')
    with pytest.raises(RecipeError) as caught:
        builtin.resolve(NAME)
    message = str(caught.value)
    assert "vaderSentiment==3.3.2 was not fetched: ERROR: No matching distribution" in message
    assert "-m pip download" in message
    assert f"--dest {empty_cache}/downloads vaderSentiment==3.3.2" in message
    assert "network" in message
    # The same command again can succeed: nothing half-done is left behind.
    assert sorted(p.name for p in empty_cache.rglob("*")) == [".lock", "downloads"]


def test_pip_finds_another_hash(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, empty_cache: Path
) -> None:
    fake_pip(
        tmp_path,
        monkeypatch,
        'echo "    Expected sha256 5d7c" >&2\necho "         Got        beef" >&2\nexit 1\n',
    )
    with pytest.raises(RecipeError, match="wrong SHA-256: expected sha256 5d7c, got beef"):
        builtin.resolve(NAME)


def test_a_file_with_another_hash_is_refused(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, empty_cache: Path
) -> None:
    fake_pip(
        tmp_path,
        monkeypatch,
        "while [ $1 != --dest ]; do shift; done\necho wrong > $2/vaderSentiment-3.3.2.tar.gz\n",
    )
    wanted = builtin.RATINGS_PACKAGE.sha256
    with pytest.raises(RecipeError, match=f"wrong SHA-256: expected {wanted}, got [0-9a-f]{{64}}"):
        builtin.resolve(NAME)
    placed = empty_cache / "downloads" / builtin.RATINGS_PACKAGE.file
    placed.write_text("wrong")
    with pytest.raises(RecipeError, match="wrong SHA-256"):
        builtin.resolve(NAME)


def test_a_placed_archive_needs_no_pip_and_gives_the_same_bytes(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    known = Path(builtin.resolve(NAME)).parent
    archive = builtin.cache_dir() / "downloads" / builtin.RATINGS_PACKAGE.file
    downloads = tmp_path / "cache" / "downloads"
    downloads.mkdir(parents=True)
    archive_copy = Path(shutil.copy(archive, downloads))
    monkeypatch.setenv("RAYRLHF_CACHE", str(tmp_path / "cache"))
    monkeypatch.setenv("PIP_CALLS", str(tmp_path / "calls"))
    fake_pip(tmp_path, monkeypatch, "exit 1\n")
    first = Path(builtin.resolve(NAME))
    times = {p: p.stat().st_mtime_ns for p in first.parent.iterdir()}
    archive_copy.unlink()  # complete: not even the archive is needed again
    assert Path(builtin.resolve(NAME)) == first
    assert {p: p.stat().st_mtime_ns for p in first.parent.iterdir()} == times
    assert not (tmp_path / "calls").exists()
    assert {p.name: p.read_bytes() for p in known.iterdir()} == {
        p.name: p.read_bytes() for p in times
    }


def test_a_cache_that_cannot_be_written(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "file").touch()
    monkeypatch.setenv("RAYRLHF_CACHE", str(tmp_path / "file" / "cache"))
    with pytest.raises(RecipeError, match="set RAYRLHF_CACHE"):
        builtin.resolve(NAME)


def test_cache_dir_follows_the_environment(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("RAYRLHF_CACHE", raising=False)
    monkeypatch.setenv("XDG_CACHE_HOME", "/xdg")
    assert builtin.cache_dir() == Path("/xdg/rayrlhf")
    monkeypatch.delenv("XDG_CACHE_HOME")
    assert builtin.cache_dir() == Path.home() / ".cache" / "rayrlhf"
    monkeypatch.setenv("RAYRLHF_CACHE", "/own")
    assert builtin.cache_dir() == Path("/own")


def test_prepare_checks_every_file_that_the_recipe_names(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    bad = tmp_path / "comparisons.jsonl"
    bad.write_text('{"prompt": "a", "responses": ["b"], "ranks": [1]}\n')
    tree = {
        "name": "x",
        "model": {"path": "somewhere"},
        "sft": {"train": "builtin:human-ratings/demonstrations.validation.jsonl"},
        "reward": {"train": "builtin:human-ratings/comparisons.validation.jsonl"},
        "evaluate": {"prompts": NAME, "comparisons": str(bad)},
    }
    with pytest.raises(RecipeError, match=r"comparisons\.jsonl:1: 1 responses, but K must be"):
        builtin.prepare(parse(tree))
    bad.write_text('{"prompt": "a", "responses": ["b", "c"], "ranks": [1, 2]}\n')
    builtin.prepare(parse(tree))
    out = capsys.readouterr().out
    assert f"data: {bad}: 1 comparison records" in out
    assert "of 4 data files are valid" in out
    assert [line for line in out.splitlines() if line.startswith("comparisons     train")]


@pytest.mark.slow
def test_smollm2_is_a_plain_model_folder() -> None:
    folder = builtin.resolve("builtin:smollm2-135m-instruct")
    tokenizer = AutoTokenizer.from_pretrained(folder)
    model = AutoModelForCausalLM.from_pretrained(folder)
    assert model.dtype == torch.float32
    assert sum(p.numel() for p in model.parameters()) == 134_515_008
    assert model.lm_head.weight is model.model.embed_tokens.weight
    assert len(tokenizer) == model.config.vocab_size
    assert tokenizer.eos_token == "<|im_end|>"
    assert tokenizer.eos_token_id == model.config.eos_token_id
    text = "Two  spaces,\n\u00e9\u4e2d\U0001f600 123"
    assert tokenizer.decode(tokenizer.encode(text)) == text
    chat = [{"role": "user", "content": "What is the capital of France?"}]
    ids = tokenizer.apply_chat_template(
        chat, add_generation_prompt=True, return_tensors="pt", return_dict=True
    )["input_ids"]
    answer = model.generate(ids, max_new_tokens=8, do_sample=False)[0, ids.shape[1] :]
    assert tokenizer.decode(answer) == "The capital of France is Paris.<|im_end|>"
