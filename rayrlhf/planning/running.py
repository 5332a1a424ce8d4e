"""What a running Ray cluster has registered."""

from collections.abc import Mapping

import ray

from rayrlhf.config import RecipeError


def nodes(address: str) -> list[Mapping[str, float]]:
    """Return the resources of each node that is alive; raises RecipeError where none answers."""
    joined = not ray.is_initialized()
    if joined:
        try:
            ray.init(address=address, log_to_driver=False, logging_level="error")
        except (ConnectionError, RuntimeError, ValueError) as error:
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
