"""Scripts in a process of their own: a vLLM engine changes the one that it is in."""

import json
import subprocess
import sys
from pathlib import Path
from typing import Any


def result_of(script: str, *arguments: str) -> Any:
    """Run Python code; return what it prints as JSON on a line that begins with RESULT."""
    done = subprocess.run(
        [sys.executable, "-c", script, *arguments],
        cwd=Path(__file__).parents[1],
        capture_output=True,
        text=True,
        timeout=300,
        check=False,
    )
    lines = [line for line in done.stdout.splitlines() if line.startswith("RESULT")]
    assert lines, done.stderr[-3000:]
    return json.loads(lines[0].removeprefix("RESULT"))
