"""What is tried in a process of its own, which ends at its deadline whatever it hangs in.

    python -m rayrlhf.doctor.selftest collective|build|engine '{"...": ...}'

It prints one line of JSON that begins with RESULT, or ends with an error.
"""

import json
import os
import re
import signal
import subprocess
import sys
import sysconfig
import tempfile
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

RESULT = "RESULT "
NUMBERS = 1000
"""How many numbers each rank brings to the all-reduce."""
BUILD_WAIT_S = 5.0
SOURCE = (
    "#include <Python.h>\n#include <vector>\nint main() { return std::vector<int>().size(); }\n"
)


def in_process(
    test: str, arguments: Sequence[Mapping[str, Any]], deadline_s: float
) -> list[dict[str, Any]]:
    """Run `test` once per entry of `arguments`, all at the same time; return what each found.

    The result of one that failed, or has not ended after `deadline_s`, has the key `error`.
    """
    ends = time.monotonic() + deadline_s
    running = [_start(test, each) for each in arguments]
    return [_result(process, ends - time.monotonic(), deadline_s) for process in running]


def _start(test: str, arguments: Mapping[str, Any]) -> "subprocess.Popen[str]":
    # Ray hides the GPUs from a worker that asked for none.
    hidden = ("CUDA_VISIBLE_DEVICES",)
    env = {name: value for name, value in os.environ.items() if name not in hidden}
    package = Path(__file__).parents[2]
    env["PYTHONPATH"] = os.pathsep.join(filter(None, [str(package), env.get("PYTHONPATH")]))
    return subprocess.Popen(
        [sys.executable, "-m", __spec__.name, test, json.dumps(arguments)],
        env=env,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        start_new_session=True,
    )


def _result(process: "subprocess.Popen[str]", left_s: float, deadline_s: float) -> dict[str, Any]:
    try:
        said, errors = process.communicate(timeout=max(left_s, 0))
    except subprocess.TimeoutExpired:
        os.killpg(process.pid, signal.SIGKILL)
        process.communicate()
        return {"error": f"not done after {deadline_s:g} s"}
    lines = [line for line in said.splitlines() if line.startswith(RESULT)]
    if process.returncode == 0 and lines:
        result: dict[str, Any] = json.loads(lines[-1].removeprefix(RESULT))
        return result
    told = [line for line in errors.splitlines() if line.strip()]
    raised = [line for line in told if re.match(r"[\w.]+(Error|Exception)\b", line)]
    last = (raised or told or [f"ended with exit code {process.returncode}"])[-1]
    return {"error": last[:300]}


@dataclass(frozen=True)
class Rank:
    """One process of the collective."""

    rank: int
    world_size: int
    master: str
    """Address of the node of rank 0."""
    port: int
    backend: str
    device: int
    """Which GPU of its node; of no effect with gloo."""
    limit_s: float


def collective(own: Rank) -> dict[str, Any]:
    """Sum numbers over all ranks, and tell whether the sum is right."""
    from datetime import timedelta

    import torch
    import torch.distributed as dist

    where = torch.device("cuda", own.device) if own.backend == "nccl" else torch.device("cpu")
    limit = timedelta(seconds=own.limit_s)
    store = dist.TCPStore(
        own.master, own.port, own.world_size, is_master=own.rank == 0, timeout=limit
    )
    dist.init_process_group(
        own.backend, store=store, rank=own.rank, world_size=own.world_size, timeout=limit
    )
    numbers = torch.arange(NUMBERS, dtype=torch.float64, device=where)
    reduced = numbers * (own.rank + 1)
    began = time.monotonic()
    dist.all_reduce(reduced)
    expected = numbers * (own.world_size * (own.world_size + 1) // 2)
    is_right = bool(torch.equal(reduced, expected))
    seconds = time.monotonic() - began
    dist.barrier()
    dist.destroy_process_group()
    return {"is_right": is_right, "seconds": seconds}


def build() -> dict[str, Any]:
    """Compile a C++ file against Python's headers with ninja, as DeepSpeed compiles its parts.

    Under the lock of such builds, in their folder (`training.backend.native_ops`).
    """
    from rayrlhf.training.backend import native_ops

    compiler = os.environ.get("CXX", "c++")

    def compile_it() -> None:
        with tempfile.TemporaryDirectory(dir=native_ops.folder()) as folder:
            include = sysconfig.get_paths()["include"]
            Path(folder, "try.cpp").write_text(SOURCE, encoding="utf-8")
            Path(folder, "build.ninja").write_text(
                f"rule compile\n  command = {compiler} -I{include} -c $in -o $out\n"
                "build try.o: compile try.cpp\n",
                encoding="utf-8",
            )
            _call(["ninja", "-C", folder], folder)

    native_ops.build(compile_it, wait_s=BUILD_WAIT_S)
    version = _call([compiler, "--version"]).splitlines()[0]
    return {"compiler": version, "folder": str(native_ops.folder())}


def _call(words: list[str], hidden: str = "") -> str:
    done = subprocess.run(words, capture_output=True, text=True, check=False)
    if done.returncode:
        lines = (done.stdout + done.stderr).splitlines()
        said = [each for each in lines if "error" in each or "not found" in each]
        text = " ".join(said[:1]) or f"exit code {done.returncode}"
        raise RuntimeError(f"{words[0]}: {text.replace(hidden, '')}")
    return done.stdout


def engine(*, max_tokens: int) -> dict[str, Any]:
    """Generate a few tokens with a tiny model of random weights, as a rollout does."""
    import torch
    from transformers import LlamaConfig, LlamaForCausalLM

    from rayrlhf.generation import Engine

    began = time.monotonic()
    with tempfile.TemporaryDirectory() as folder:
        torch.manual_seed(0)
        LlamaForCausalLM(
            LlamaConfig(
                vocab_size=128,
                hidden_size=64,
                intermediate_size=64,
                num_hidden_layers=1,
                num_attention_heads=2,
                num_key_value_heads=2,
                max_position_embeddings=64,
                bos_token_id=None,
                eos_token_id=0,
                pad_token_id=0,
            )
        ).save_pretrained(folder)
        # A tenth of a GPU: others may be computing there.
        made = Engine(folder, max_length=64, memory_gib=0.05, gpu_memory=0.1, eos_token_id=0)
        loaded = time.monotonic()
        (answer,) = made.generate([[1, 2, 3]], max_tokens=max_tokens, temperature=1.0, seeds=[0])
    return {
        "num_tokens": len(answer.token_ids),
        "load_s": loaded - began,
        "generate_s": time.monotonic() - loaded,
    }


def main() -> None:
    """Run the test that the command line names."""
    test, arguments = sys.argv[1], json.loads(sys.argv[2])
    if test == "collective":
        result = collective(Rank(**arguments))
    elif test == "build":
        result = build()
    else:
        result = engine(**arguments)
    sys.stdout.flush()
    print(f"\n{RESULT}{json.dumps(result)}", flush=True)


if __name__ == "__main__":
    main()
