"""Scaling laws: known parameters come back, and what can't be fitted is said."""

import importlib.util
import json
import math
import random
import sys
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest

from rayrlhf import config
from rayrlhf.config import RecipeError
from rayrlhf.evaluation import scaling_law
from rayrlhf.evaluation.scaling_law import TrainedRun, fit, multiplied_parameters, read_run
from tests import toy

ROOT = Path(__file__).parents[2]


def by_compute(
    num: int = 6, *, E: float = 1.8, A: float = 60.0, alpha: float = 0.15, noise: float = 0.0
) -> list[TrainedRun]:
    """Return runs from 1e12 operations on, each three times the one before."""
    rng = random.Random(0)
    runs = []
    for i in range(num):
        parameters, tokens = round(1e5 * 3**i), 10**7
        loss = E + A * (6.0 * parameters * tokens) ** -alpha
        runs.append(TrainedRun(f"r{i}", parameters, tokens, loss * (1 + rng.gauss(0, noise))))
    return runs


def test_the_law_in_compute_comes_back() -> None:
    law = fit(by_compute())
    assert law.irreducible == pytest.approx(1.8, rel=1e-3)
    assert law.coefficients == (pytest.approx(60, rel=0.01),)
    assert law.exponents == (pytest.approx(0.15, rel=2e-3),)
    assert law.exponent_interval() == (pytest.approx(0.15, rel=0.01),) * 2


def test_the_law_in_size_comes_back() -> None:
    """Chinchilla's own: E = 1.69, A = 406.4, alpha = 0.34, B = 410.7, beta = 0.28."""
    runs = [
        TrainedRun(f"{n}-{d}", n, d, 1.69 + 406.4 * n**-0.34 + 410.7 * d**-0.28)
        for n in (10**8, 10**9, 10**10)
        for d in (10**9, 10**10, 10**11)
    ]
    law = fit(runs, "size", num_bootstrap=5)
    assert law.irreducible == pytest.approx(1.69, rel=0.01)
    assert law.exponents == (pytest.approx(0.34, rel=0.01), pytest.approx(0.28, rel=0.01))
    assert law.coefficients == (pytest.approx(406.4, rel=0.1), pytest.approx(410.7, rel=0.1))
    assert law.predict(7e10, 1.4e12) == pytest.approx(
        1.69 + 406.4 * 7e10**-0.34 + 410.7 * 1.4e12**-0.28, rel=1e-3
    )


def test_a_prediction_from_noisy_runs_is_within_its_noise() -> None:
    *small, large = by_compute(7, noise=0.003)
    law = fit(small, num_bootstrap=20)
    assert large.loss is not None
    assert law.predict(large.flops) == pytest.approx(large.loss, rel=0.01)
    low, high = law.interval(large.flops)
    assert low < law.predict(large.flops) < high
    assert high - low < 0.1 * large.loss
    again = fit(small, num_bootstrap=20)
    assert again.interval(large.flops) == (low, high)  # the bootstrap is seeded


def test_an_outlier_hardly_moves_the_law() -> None:
    runs = by_compute(8)
    assert runs[3].loss is not None
    runs[3] = replace(runs[3], loss=runs[3].loss * 1.1)
    assert fit(runs, num_bootstrap=0).predict(1e16) == pytest.approx(
        1.8 + 60 * 1e16**-0.15, rel=0.005
    )


@pytest.mark.parametrize(
    ("runs", "form", "says"),
    [
        (by_compute(3), "compute", "3 runs of different size.*needs 4 or more: train more sizes"),
        (by_compute(1) * 5, "compute", "1 runs of different size"),
        (by_compute(5), "size", "5 runs.*needs 6 or more.*--form compute"),
        (by_compute(7), "size", "1 different numbers of tokens.*3 or more"),
        (
            [replace(run, corpus=(i,)) for i, run in enumerate(by_compute(4))],
            "compute",
            "r1 and r0",
        ),
        ([replace(run, loss=None) for run in by_compute(4)], "compute", "r0 has no held-out loss"),
    ],
)
def test_what_cannot_be_fitted_is_said(runs: list[TrainedRun], form: Any, says: str) -> None:
    with pytest.raises(RecipeError, match=says):
        fit(runs, form)


def test_parameters_that_multiply() -> None:
    tied = {"model.embed_tokens.weight": (10, 4), "layer.weight": (4, 4), "norm.weight": (4,)}
    assert multiplied_parameters(tied) == 40 + 16 + 4
    assert multiplied_parameters({**tied, "lm_head.weight": (10, 4)}) == 40 + 16 + 4
    gpt2 = {"transformer.wte.weight": (10, 4), "transformer.wpe.weight": (7, 4)}
    assert multiplied_parameters(gpt2) == 40


@pytest.fixture
def write_run(tmp_path: Path) -> Callable[[TrainedRun], Path]:
    """Return a function that writes what a finished pretraining leaves of a run."""

    def write(run: TrainedRun) -> Path:
        assert run.loss is not None
        return toy.write_pretrained_run(tmp_path / run.name, run.parameters, run.tokens, run.loss)

    return write


@pytest.fixture
def job() -> ModuleType:
    """Return jobs/scaling_law.py as a module."""
    spec = importlib.util.spec_from_file_location("job", ROOT / "jobs" / "scaling_law.py")
    assert spec is not None and spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def test_the_job_reads_runs_and_writes_prediction_and_plot(
    write_run: Callable[[TrainedRun], Path],
    job: ModuleType,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
    tmp_path: Path,
) -> None:
    runs = [
        TrainedRun(f"r{i}", n, 1000, 1.8 + 60 * (6000.0 * n) ** -0.15)
        for i, n in enumerate((1000, 3000, 9000, 27_000, 81_000))
    ]
    folders = [write_run(run) for run in runs]
    found = read_run(folders[0])
    assert (found.parameters, found.tokens, found.loss) == (1000, 1000, runs[0].loss)
    assert found.corpus == (9, 4, ("validation-web", 3))

    argv = ["scaling_law", *map(str, folders[:4]), "--next", str(folders[4])]
    monkeypatch.setattr(sys, "argv", argv)
    assert job.main() == 0
    said = capsys.readouterr().out
    assert "L = 1.8" in said and f"measured {runs[4].loss:.4f}" in said
    results = json.loads((tmp_path / "scaling_law.json").read_text())
    assert results["next"]["predicted"] == pytest.approx(runs[4].loss, rel=1e-3)
    assert (tmp_path / "scaling_law.png").read_bytes()[:4] == b"\x89PNG"

    argv[-1] = "1e9"
    assert job.main() == 0
    assert "next at C = 1.00e+09: predicted 4.4" in capsys.readouterr().out
    for changed, message in (
        ([*argv[:-1], "nothing"], "--next nothing: neither"),
        ([*argv[:3]], "2 runs of different size"),
        (["x", str(tmp_path)], "not a run whose pretraining is done"),
        (["x", str(ROOT / "configs/scaling.yaml"), "--widths", "32", "48"], "--widths has 2 sizes"),
        (
            ["x", str(ROOT / "configs/scaling.yaml"), "--widths", "32", "40", "48", "64", "96"],
            "--widths 40 is not a multiple of the recipe's heads of 16",
        ),
    ):
        monkeypatch.setattr(sys, "argv", changed)
        assert job.main() == 2
        assert message in capsys.readouterr().err


def test_the_plot_of_the_law_in_size(tmp_path: Path) -> None:
    runs = [
        TrainedRun(f"{n}-{d}", n, d, 1.69 + 406.4 * n**-0.34 + 410.7 * d**-0.28)
        for n in (10**8, 10**9, 10**10)
        for d in (10**9, 10**10, 10**11)
    ]
    law = fit(runs, "size", num_bootstrap=3)
    scaling_law.write_plot(tmp_path / "deep" / "law.png", law, runs, replace(runs[0], loss=None))
    assert (tmp_path / "deep" / "law.png").stat().st_size > 10_000
    assert math.isfinite(law.interval(1e9, 1e9)[0])


def test_the_job_trains_each_width_alike(
    job: ModuleType, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """The recipe is 192 wide: a third of it has a third of the heads and three times the rate."""
    commands: list[list[str]] = []
    monkeypatch.setattr(job, "_command", commands.append)
    monkeypatch.setattr(scaling_law, "read_run", lambda folder: TrainedRun(folder.name, 1, 1, 1.0))
    monkeypatch.setattr(job.scaling_law, "fit", lambda runs, form: by_compute_fit)
    by_compute_fit = fit(by_compute(), num_bootstrap=2)
    written: list[Any] = []
    monkeypatch.setattr(job.scaling_law, "write_results", lambda *args: written.append(args))
    monkeypatch.setattr(job.scaling_law, "write_plot", lambda *args: None)
    recipe = str(ROOT / "configs/scaling.yaml")
    widths = ["64", "32", "192", "96", "128"]
    monkeypatch.setattr(sys, "argv", ["x", recipe, "seed=3", "--widths", *widths])
    assert job.main() == 0
    assert commands[0] == ["corpus", recipe, "seed=3"]
    trained = [config.load(recipe, command[2:]) for command in commands[1:]]
    assert [each.model.hidden_size for each in trained] == [32, 64, 96, 128, 192]
    changed = trained[1]
    assert changed.seed == 3 and changed.pretrain is not None
    shape = changed.model
    assert (shape.hidden_size, shape.num_heads, shape.intermediate_size) == (64, 4, 170)
    assert changed.pretrain.learning_rate == pytest.approx(3 * 2e-3)
    assert changed.path == Path("runs/scaling/width-64")
    assert changed.pretrain.corpus == "runs/scaling/corpus"
    assert [run.name for run in written[0][2]] == ["width-32", "width-64", "width-96", "width-128"]
    assert written[0][3].name == "width-192"
    assert "measured 1.0000" in capsys.readouterr().out
