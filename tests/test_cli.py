"""Exit codes and messages, as a person at the keyboard meets them."""

from pathlib import Path

import pytest

from rayrlhf import cli, console


def test_a_wrong_recipe_exits_2_with_one_line(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    file = tmp_path / "toy.yaml"
    file.write_text("name: toy\nsfft: {}\n")
    assert cli.main(["sft", str(file)]) == 2
    said = capsys.readouterr().err
    assert "did you mean sft?" in said
    assert len(said.splitlines()) == 1


def test_a_stage_that_the_recipe_lacks_exits_2(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    file = tmp_path / "toy.yaml"
    file.write_text(
        f"name: toy\nrun_dir: {tmp_path}/run\nmodel: {{path: m}}\nsft: {{train: demos.jsonl}}\n"
    )
    assert cli.main(["ppo", str(file)]) == 2
    assert "no section ppo" in capsys.readouterr().err


def test_a_stage_before_its_input_exits_2(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    file = tmp_path / "toy.yaml"
    file.write_text(
        f"name: toy\nrun_dir: {tmp_path}/run\npretrain: {{}}\n"
        "corpus: {sources: {m: {path: m.jsonl}}}\n"
    )
    assert cli.main(["pretrain", str(file)]) == 2
    assert "run `rayrlhf corpus`" in capsys.readouterr().err


def test_an_unknown_command_exits_2(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as caught:
        cli.main(["trian", "x.yaml"])
    assert caught.value.code == 2
    assert "invalid choice: 'trian'" in capsys.readouterr().err


def test_anything_else_exits_1_and_keeps_the_traceback(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    file = tmp_path / "toy.yaml"
    file.write_text(
        f"name: toy\nrun_dir: {tmp_path}/run\nmodel: {{path: m}}\nsft: {{train: demos.jsonl}}\n"
    )

    def fail(command: str, recipe: object) -> int:
        raise OSError("the disk is full")

    monkeypatch.setattr(cli, "_run", fail)
    assert cli.main(["sft", str(file)]) == 1
    assert "OSError: the disk is full" in capsys.readouterr().err
    assert "Traceback" in (tmp_path / "run" / "log.txt").read_text()


def test_a_log_that_cannot_be_written_leaves_the_traceback_on_the_terminal(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    file = tmp_path / "toy.yaml"
    file.write_text(
        f"name: toy\nrun_dir: {tmp_path}/run\nmodel: {{path: m}}\nsft: {{train: demos.jsonl}}\n"
    )

    def fail(command: str, recipe: object) -> int:
        (tmp_path / "run").rename(tmp_path / "gone")
        raise OSError("the disk is gone")

    monkeypatch.setattr(cli, "_run", fail)
    assert cli.main(["sft", str(file)]) == 1
    said = capsys.readouterr().err
    assert said.startswith("rayrlhf: OSError: the disk is gone")
    assert "Traceback" in said and "raise OSError" in said


def test_noise_goes_to_the_log_and_lines_to_the_terminal(
    tmp_path: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    import os

    with console.capture(tmp_path / "log.txt"):
        os.write(1, b"noise of a C library\n")
        console.say("a useful line")
        console.warn("a useful warning")
    said = capfd.readouterr()
    assert said.out == "a useful line\n"
    assert said.err == "a useful warning\n"
    assert (tmp_path / "log.txt").read_text() == "noise of a C library\n"


def test_progress_prints_a_line_per_interval(capsys: pytest.CaptureFixture[str]) -> None:
    progress = console.Progress("sft", 10, {"loss": "loss"})
    for step in range(1, 26):
        progress.show("metrics", {"step": step, "num_steps": 25, "loss": 1.5})
    progress.show("samples", {"step": 25, "prompt": "The\nfilm", "text": " is  good"})
    progress.close()
    lines = capsys.readouterr().out.splitlines()
    assert [line.split("step")[1].split("/")[0].strip() for line in lines[:4]] == [
        "1",
        "10",
        "20",
        "25",
    ]
    assert "loss 1.5" in lines[0]
    assert lines[4].endswith("sample: The film | is good")


def test_table_aligns() -> None:
    text = console.table(("stage", "loss"), [("base", 3.14159), ("sft", None), ("ppo", 12)])
    assert text.splitlines()[2:] == ["base   3.142", "sft        -", "ppo       12"]
