"""What a worker of vLLM can do besides, in the process that holds the weights.

vLLM puts this class under its own worker (`worker_extension_cls`), so that it is called by
`collective_rpc`; it imports nothing of vLLM itself.
"""

import os
import threading
import time
from collections.abc import Iterator, Mapping
from contextlib import suppress
from pathlib import Path
from typing import TYPE_CHECKING, Any

from rayrlhf.serving.weights import tensors

LOOK_EVERY_S = 1.0
LOWEST_PRIORITY = 19


class FolderWorker:
    """Reads new weights from a folder, and ends with the replica that it belongs to."""

    if TYPE_CHECKING:

        def reload_weights(self, weights_iterator: Iterator[tuple[str, Any]]) -> None:
            """Replace the weights by those of an HF checkpoint, in place; vLLM's own."""

    def load_folder(self, folder: str, tied: Mapping[str, str]) -> None:
        """Replace all weights by those in the safetensors of `folder`.

        `tied` maps the name of a parameter that no file holds to the one that it shares: on CPU a
        tied head is a repacked copy, and stays old unless it is sent.
        """
        self.reload_weights(weights_iterator=_with_tied(Path(folder), tied))

    def end_with(self, process: int) -> None:
        """End this process when that one is gone: killed, it could not end its engine."""
        threading.Thread(target=_end_with, args=(process,), daemon=True).start()

    def yield_cores(self) -> None:
        """Let every other process go first on this machine's cores.

        An engine on CPU keeps all of them busy. Whoever brings it a request, or an answer away,
        needs a moment of one, and while that waits the engine's batch is not full.
        """
        for thread in Path("/proc/self/task").iterdir():  # niceness is a thread's on Linux
            with suppress(ProcessLookupError):  # it ended meanwhile
                os.setpriority(os.PRIO_PROCESS, int(thread.name), LOWEST_PRIORITY)


def _with_tied(folder: Path, tied: Mapping[str, str]) -> Iterator[tuple[str, Any]]:
    for name, tensor in tensors(folder):
        yield name, tensor
        for other, source in tied.items():
            if source == name:
                yield other, tensor


def _end_with(process: int) -> None:
    while True:
        try:
            os.kill(process, 0)
        except ProcessLookupError:
            os._exit(1)
        time.sleep(LOOK_EVERY_S)
