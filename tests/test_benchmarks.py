"""Every benchmark runs, and its last line is one JSON object of numbers, ratios first."""

import json
import subprocess
import sys
from pathlib import Path

import pytest

BENCHMARKS = sorted((Path(__file__).parent / "benchmarks").glob("*.py"))


@pytest.mark.ray
@pytest.mark.slow
@pytest.mark.parametrize("path", BENCHMARKS, ids=lambda path: path.stem)
def test_benchmark_ends_with_its_figures(path: Path) -> None:
    ran = subprocess.run(
        [sys.executable, str(path), "--quick"], capture_output=True, text=True, timeout=900
    )
    assert ran.returncode == 0, ran.stderr
    figures = json.loads(ran.stdout.splitlines()[-1])
    assert all(value > 0 for value in figures.values())
    assert next(iter(figures)).startswith("ratio")
