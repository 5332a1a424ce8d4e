"""What a running Ray cluster has registered."""

import socket
from collections.abc import Mapping

import ray

from rayrlhf.config import RecipeError

ANSWER_S = 5.0
"""Longest wait for something that listens; Ray itself waits for minutes, and ends the process."""


def nodes(address: str) -> list[Mapping[str, float]]:
    """Return the resources of each node that is alive; raises RecipeError where none answers."""
    joined = not ray.is_initialized()
    if joined:
        host, colon, port = address.removeprefix("ray://").rpartition(":")
        try:
            if colon and port.isdigit():
                socket.create_connection((host, int(port)), timeout=ANSWER_S).close()
            ray.init(address=address, log_to_driver=False, logging_level="error")
        except (OSError, RuntimeError, ValueError) as error:
            said = " ".join(str(error).split())[:200]
            raise RecipeError(
                f"--address={address}: no Ray cluster answers there ({said}): check it with `ray "
                "status --address`, or name the cluster with --cluster"
            ) from None
    try:
        return [node["Resources"] for node in ray.nodes() if node["Alive"]]
    finally:
        if joined:
            ray.shutdown()
