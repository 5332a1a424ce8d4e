"""What the person at the terminal sees: useful lines, and a progress bar where there is a terminal.

`capture(log)` sends everything else that the process and its libraries print, C code included, to
a log file, and keeps the real terminal for `say`, `warn` and `Progress`.
"""

import os
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any, TextIO

_terminal: dict[str, TextIO] = {}


@contextmanager
def capture(log: str | Path) -> Iterator[None]:
    """Send file descriptors 1 and 2 to the file `log` while the block runs."""
    path = Path(log)
    path.parent.mkdir(parents=True, exist_ok=True)
    sys.stdout.flush()
    sys.stderr.flush()
    saved = {"out": os.dup(1), "err": os.dup(2)}
    sink = os.open(path, os.O_WRONLY | os.O_CREAT | os.O_APPEND, 0o644)
    os.dup2(sink, 1)
    os.dup2(sink, 2)
    os.close(sink)
    _terminal["out"] = os.fdopen(saved["out"], "w", encoding="utf-8", buffering=1)
    _terminal["err"] = os.fdopen(saved["err"], "w", encoding="utf-8", buffering=1)
    try:
        yield
    finally:
        sys.stdout.flush()
        sys.stderr.flush()
        os.dup2(_terminal["out"].fileno(), 1)
        os.dup2(_terminal["err"].fileno(), 2)
        _terminal.pop("out").close()
        _terminal.pop("err").close()


def say(text: str = "") -> None:
    """Print a line on the terminal."""
    print(text, file=_terminal.get("out", sys.stdout), flush=True)


def warn(text: str) -> None:
    """Print a line on the terminal's stderr."""
    print(text, file=_terminal.get("err", sys.stderr), flush=True)


def table(header: tuple[str, ...], rows: list[tuple[Any, ...]]) -> str:
    """Return aligned columns; floats with three decimals, numbers to the right."""
    cells = [header, *[tuple(_cell(value) for value in row) for row in rows]]
    widths = [max(len(row[i]) for row in cells) for i in range(len(header))]
    numeric = [
        all(isinstance(row[i], int | float | None) for row in rows) for i in range(len(header))
    ]
    lines = [
        "  ".join(
            cell.rjust(w) if right else cell.ljust(w)
            for cell, w, right in zip(row, widths, numeric, strict=True)
        ).rstrip()
        for row in cells
    ]
    return "\n".join([lines[0], "-" * len(lines[0]), *lines[1:]])


class Progress:
    """Show the records of one stage: a bar on a terminal, else a line every `log_every` steps."""

    def __init__(self, stage: str, log_every: int, keys: dict[str, str]) -> None:
        """`keys` maps a metric's name to its short label, in the order of display."""
        self.stage, self.log_every, self.keys = stage, log_every, keys
        self._bar: Any = None
        if _terminal.get("out", sys.stdout).isatty():
            from tqdm import tqdm

            self._bar = tqdm(desc=stage, file=_terminal.get("out", sys.stdout), dynamic_ncols=True)

    def show(self, kind: str, record: dict[str, Any]) -> None:
        """Take one line of metrics.jsonl, samples.jsonl or notes.jsonl."""
        step = int(record["step"])
        if kind == "notes":
            self._line(f"{self.stage:>9} step {step:>5}  {record['text']}")
            return
        if kind == "samples":
            prompt, text = (" ".join(str(record[key]).split()) for key in ("prompt", "text"))
            self._line(f"{self.stage:>9} step {step:>5}  sample: {prompt} | {text}")
            return
        total = int(record.get("num_steps", 0))
        shown = "  ".join(
            f"{label} {record[key]:.4g}"
            for key, label in self.keys.items()
            if record.get(key) is not None
        )
        if self._bar is not None:
            self._bar.total, self._bar.n = total, step
            self._bar.set_postfix_str(shown)
        elif step % self.log_every == 0 or step == total or step == 1:
            self._line(f"{self.stage:>9} step {step:>5}/{total}  {shown}")

    def close(self) -> None:
        """Leave the bar as it is and free the line."""
        if self._bar is not None:
            self._bar.close()

    def _line(self, text: str) -> None:
        if self._bar is not None:
            self._bar.write(text, file=_terminal.get("out", sys.stdout))
        else:
            say(text)


def _cell(value: Any) -> str:
    if value is None:
        return "-"
    return f"{value:.3f}" if isinstance(value, float) else str(value)
