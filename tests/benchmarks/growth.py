"""What the controller of PPO costs as the workers grow in number: its seconds and its memory.

    python tests/benchmarks/growth.py [--steps 30] [--repeats 3]

A Ray cluster of 1, 2, 4 and 8 nodes on this machine (`ray.cluster_utils.Cluster`), 8 engines on
each, one worker of every other role, all of them stubs that answer at once: what remains is the
controller (`rl/ppo.py`, as it is) and Ray in its process. Its seconds per step are those of the
processor, of all its threads, so that it does not matter how many stubs share the cores.

`ratio_64_engines_to_8` at the same batch, at most 2; `ratio_batch_...` is the growth of the seconds
per step over the growth of the batch with 8 engines: 1 would be linear, below 1 is better.
"""

import argparse
import json
import os
import pickle
import statistics
import sys
import tempfile
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import psutil

sys.path.insert(0, str(Path(__file__).parents[2]))
os.environ["RAY_ADDRESS"] = "local"

ENGINES_PER_NODE = 8
NODES = (1, 2, 4, 8)
BATCHES = (4096, 16384)
PROMPT, RESPONSE, VOCABULARY = 16, 48, 1000
WEIGHTS_BYTES = 1 << 20


class Sent:
    """A value that a stub gives back without knowing the package: it saves it 200 MB and 3 s."""

    def __init__(self, pickled: bytes) -> None:
        self.pickled = pickled

    def __reduce__(self) -> tuple[Any, ...]:
        return pickle.loads, (self.pickled,)


class Stub:
    """A worker of any role: it gives the answers that it was told to give."""

    def __init__(self, answers: dict[str, bytes]) -> None:
        self.answers = {name: Sent(pickled) for name, pickled in answers.items()}

    def generate(self, *_: Any) -> Sent:
        return self.answers["generate"]

    def probe(self, *_: Any) -> Sent:
        return self.answers["probe"]

    def log_probs(self, *_: Any) -> Sent:
        return self.answers["log_probs"]

    def values(self, *_: Any) -> Sent:
        return self.answers["values"]

    def score(self, *_: Any) -> Sent:
        return self.answers["score"]

    def update(self, *_: Any) -> dict[str, float]:
        return {}

    def weights(self, dtype: str) -> Iterator[bytes | None]:
        yield b"0" * WEIGHTS_BYTES
        yield None

    def dtype(self) -> str:
        return "float32"

    def load_weights(self, version: int, *_: bytes) -> int:
        return version

    def save(self, folder: str) -> None:
        (Path(folder) / "training_state").mkdir(exist_ok=True)


class Words:
    """What the sample log asks of a tokenizer."""

    def decode(self, ids: list[int], **_: Any) -> str:
        return " ".join(map(str, ids))


def rollout_of(num: int) -> Any:
    """Return `num` responses of one length."""
    import torch

    from rayrlhf.generation import Completion
    from rayrlhf.rl.experience import Rollout

    tokens = torch.arange(num * RESPONSE).remainder(VOCABULARY).view(num, RESPONSE)
    completions = [
        Completion(row, [-1.0] * RESPONSE, "stop", [0] * RESPONSE) for row in tokens.tolist()
    ]
    return Rollout.from_completions([[1] * PROMPT] * num, completions)


def launch(num_engines: int, batch_size: int, num_probes: int) -> Any:
    """Start the stubs; return the roles."""
    import ray
    import torch

    from rayrlhf.rl.experience import Rows
    from rayrlhf.rl.groups import (
        ActorGroup,
        CriticGroup,
        ReferenceGroup,
        RewardGroup,
        RolloutGroup,
    )
    from rayrlhf.rl.placement import Roles

    def rows(num: int) -> Any:
        return Rows.of(list(range(num)), list(torch.full((num, RESPONSE), -1.0)))

    scores = Rows.of(list(range(batch_size)), [torch.tensor([i % 7.0]) for i in range(batch_size)])
    stub = ray.remote(num_cpus=0, resources={"seat": 1})(Stub)

    def workers(num: int, **answers: Any) -> list[Any]:
        told = ray.put({name: pickle.dumps(answer) for name, answer in answers.items()})
        return [stub.remote(told) for _ in range(num)]

    probed = rows(num_engines * num_probes)
    engine = {"generate": rollout_of(batch_size // num_engines), "probe": rollout_of(num_probes)}
    return Roles(
        ActorGroup(workers(1, log_probs=(rows(batch_size), 0.0), probe=probed), deadline_s=600),
        CriticGroup(workers(1, values=rows(batch_size)), deadline_s=600),
        ReferenceGroup(workers(1, log_probs=rows(batch_size)), deadline_s=600),
        RewardGroup(workers(1, score=scores), deadline_s=600),
        RolloutGroup(workers(num_engines, **engine), deadline_s=600),
    )


def seconds_per_step(num_engines: int, batch_size: int, args: argparse.Namespace) -> list[float]:
    """Run the controller on new stubs; return the processor's seconds per step, per repeat."""
    import ray

    from rayrlhf.config import PPOConfig
    from rayrlhf.metrics import MetricsLogger
    from rayrlhf.rl.ppo import optimize
    from rayrlhf.rl.setup import Prompts, single_threaded
    from rayrlhf.rl.state import restore

    roles = launch(num_engines, batch_size, PPOConfig(prompts="none").gate.num_prompts)
    prompts = Prompts([[1] * PROMPT] * batch_size, seed=0, batch_size=batch_size)
    seconds = []
    for num_steps in (3, *[args.steps] * args.repeats):  # the first warm up
        cfg = PPOConfig(
            prompts="none",
            steps=num_steps,
            batch_size=batch_size,
            max_response_tokens=RESPONSE,
            num_minibatches=1,
            sample_every=num_steps,
            save_every=num_steps,
        )
        with (
            tempfile.TemporaryDirectory() as folder,
            MetricsLogger(folder) as log,
            single_threaded(),
        ):
            begun = time.process_time()
            optimize(cfg, roles, prompts, restore(cfg, None), log, Words())  # type: ignore[arg-type]
            seconds.append((time.process_time() - begun) / num_steps)
    for group in roles.groups:
        for seat in group.seats:
            ray.kill(seat.worker)
    return seconds[1:]


def measure(args: argparse.Namespace) -> dict[str, float]:
    """Let the cluster grow, and print a line per point; return the figures, ratios first."""
    import ray
    from ray.cluster_utils import Cluster

    from rayrlhf.console import table

    per_node = 2 if args.quick else ENGINES_PER_NODE
    nodes, batches = ((1, 2), (8, 16)) if args.quick else (NODES, BATCHES)
    seats = {"num_cpus": 1, "resources": {"seat": per_node + 4}, "object_store_memory": 10**8}
    head = {**seats, "include_dashboard": False}
    cluster = Cluster(initialize_head=True, connect=False, head_node_args=head)
    ray.init(address=cluster.address, log_to_driver=False, logging_level="error")
    found: dict[tuple[int, int], list[float]] = {}
    rows: list[tuple[float, ...]] = []
    try:
        for num_nodes in nodes:
            while len(cluster.list_all_nodes()) < num_nodes:
                cluster.add_node(**seats)
            cluster.wait_for_nodes()
            for batch_size in batches:
                point = (num_nodes * per_node, batch_size)
                found[point] = seconds_per_step(*point, args)
                took = [1000 * seconds for seconds in found[point]]
                memory = psutil.Process().memory_info().rss / 2**20
                spread = statistics.median(took), min(took), max(took)
                rows.append((num_nodes, *point, *spread, memory))
                print(
                    f"{num_nodes} nodes, {point[0]:2} engines, batch {batch_size:4}: "
                    f"{spread[0]:.1f} ms per step, {memory:.0f} MiB",
                    flush=True,
                )
    finally:
        ray.shutdown()
        cluster.shutdown()
    print(table(("nodes", "engines", "batch", "ms per step", "least", "most", "MiB"), rows))
    few, many, small, large = per_node, nodes[-1] * per_node, batches[0], batches[-1]
    growth = [seconds * small / large for seconds in found[few, large]]
    return {
        **spread_of(f"ratio_{many}_engines_to_{few}", found[many, large], found[few, large]),
        **spread_of(
            f"ratio_{many}_engines_to_{few}_small_batch", found[many, small], found[few, small]
        ),
        **spread_of("ratio_batch_growth", growth, found[few, small]),
        "driver_ms_per_step": 1000 * statistics.median(found[many, large]),
        "driver_mib": psutil.Process().memory_info().rss / 2**20,
    }


def spread_of(name: str, more: list[float], less: list[float]) -> dict[str, float]:
    """Return the ratio of two medians, and the least and most that any two repeats give."""
    return {
        name: statistics.median(more) / statistics.median(less),
        f"{name}_least": min(more) / max(less),
        f"{name}_most": max(more) / min(less),
    }


def main() -> None:
    """Measure, and print as the last line a JSON object."""
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--steps", type=int, default=30, help="per measurement")
    parser.add_argument("--repeats", type=int, default=3, help="measurements per point, median")
    parser.add_argument("--quick", action="store_true", help="2 and 4 engines, a few steps")
    args = parser.parse_args()
    if args.quick:
        args.steps, args.repeats = 2, 1
    figures = measure(args)
    print(json.dumps({name: round(value, 4) for name, value in figures.items()}))


if __name__ == "__main__":
    main()
