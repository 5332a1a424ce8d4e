"""Verdicts that were paid for, kept on disk as they come, so that nobody pays twice."""

import hashlib
import json
import threading
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from rayrlhf import console


class VerdictCache:
    """Verdicts by the whole of what was asked; one line each in a JSONL file.

    A line is written when its verdict is there: a run that is killed leaves all but those that
    were under way. A line that was cut off by that is left out when the file is read.
    """

    def __init__(self, path: Path) -> None:
        """Read what is at `path`, if there is a file."""
        self.path = path
        self._lock = threading.Lock()
        self._verdicts: dict[str, str] = {}
        self._ends_in_line = True
        if path.is_file():
            self._read()

    def __len__(self) -> int:
        return len(self._verdicts)

    def get(self, key: str) -> str | None:
        """Return the verdict with the key, or None."""
        return self._verdicts.get(key)

    def add(self, key: str, verdict: str, reply: str) -> None:
        """Keep a verdict, and what was said with it."""
        line = json.dumps({"key": key, "verdict": verdict, "reply": reply}) + "\n"
        with self._lock:
            self.path.parent.mkdir(parents=True, exist_ok=True)
            with self.path.open("a", encoding="utf-8") as file:
                file.write(line if self._ends_in_line else "\n" + line)
            self._ends_in_line = True
            self._verdicts[key] = verdict

    def _read(self) -> None:
        content = self.path.read_bytes()
        self._ends_in_line = not content or content.endswith(b"\n")
        broken = 0
        for line in content.splitlines():
            try:
                entry = json.loads(line) if line else None
                if entry is not None:
                    self._verdicts[entry["key"]] = entry["verdict"]
            except (ValueError, KeyError, TypeError):
                broken += 1
        if broken:
            console.say(f"{self.path}: broken lines, asked for again: {broken}")


def key_of_request(url: str, body: Mapping[str, Any]) -> str:
    """Return the SHA-256 of all that is asked, and where: any change is a new question."""
    asked = json.dumps({"url": url.partition("?")[0], **body}, sort_keys=True)
    return hashlib.sha256(asked.encode()).hexdigest()
