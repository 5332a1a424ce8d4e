"""A PPO run whose workers and driver are killed, against one that is left alone.

    python tests/benchmarks/chaos.py [key.sub=value ...] [--steps 30] [--seed 0] [--folder FOLDER]

Two runs of a toy recipe with the real Ray and vLLM. In the second, a worker of each role and the
driver get SIGKILL, each once, in random order at random moments; the driver's command is given
again. The run must end, and must equal the first in

    every metric of every step, bit by bit, but for the clock (`time`, `time/*`,
    `rollout/tokens_per_s`) and the counters of deaths (`restarts/*`)
    every weight of ppo/final, bit by bit

Prompts, seeds and micro-batches follow from the step alone, so a successor's answer is that of who
died, and a learner from a checkpoint does the same steps again. `ppo.interrupt` and `ppo.stale:
drop` are not reproducible, and would fail here without being wrong.

`went on after` counts from the kill to the end of the step that was interrupted, steps done again
included. Runs left in --folder can be looked at; without it they go to a temporary folder.
"""

import argparse
import json
import os
import random
import shutil
import signal
import subprocess
import sys
import tempfile
import time
from dataclasses import dataclass
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).parents[2]))
os.environ.setdefault("HF_HUB_OFFLINE", "1")

WORKERS = {
    "rollout": "RolloutWorker",
    "reference": "ReferenceWorker",
    "reward": "RewardWorker",
    "actor": "ActorWorker",
    "critic": "CriticWorker",
}
WAIT_S = 600.0
"""Longest wait for a step."""


@dataclass
class Kill:
    """What was killed, and when."""

    role: str
    doing: str
    """Call that the worker was in; empty between two."""
    done: int
    """Steps that were done then."""
    at: float
    """Unix seconds."""
    restarts: float
    """Deaths of the role that the run had counted before."""


class Run:
    """A run of the command in a folder of its own."""

    def __init__(self, folder: Path, start: Path, args: argparse.Namespace) -> None:
        self.folder, self.metrics = folder, folder / "ppo" / "metrics.jsonl"
        self.said = folder / "said.txt"
        self.recipe = write_recipe(folder, start, args.steps, args.save_every)
        self.overrides = args.overrides
        self.command: subprocess.Popen[bytes] | None = None

    def start(self) -> None:
        """Give the command, for the first time or again."""
        from tests.toy import command, environment

        with self.said.open("ab") as sink:
            self.command = subprocess.Popen(
                command("ppo", self.recipe, *self.overrides),
                cwd=Path(__file__).parents[2],
                env=environment(),
                stdout=sink,
                stderr=sink,
            )

    def rows(self) -> list[dict[str, Any]]:
        """Return the metrics so far, without a line that is being written."""
        from rayrlhf.metrics import read_jsonl

        return read_jsonl(self.metrics) if self.metrics.exists() else []

    def wait_for(self, is_there: Any) -> None:
        """Wait until `is_there(rows)`; the run must be alive until then."""
        ends = time.monotonic() + WAIT_S
        while not is_there(self.rows()):
            assert self.command is not None
            if self.command.poll() is not None and not is_there(self.rows()):
                sys.exit(f"the run ended with {self.command.returncode}:\n{self.tail()}")
            if time.monotonic() > ends:
                sys.exit(f"nothing new within {WAIT_S:g} s:\n{self.tail()}")
            time.sleep(0.02)

    def finish(self) -> None:
        """Wait for the end, which must be a good one."""
        assert self.command is not None
        if self.command.wait(timeout=WAIT_S) != 0:
            sys.exit(f"the run ended with {self.command.returncode}:\n{self.tail()}")

    def kill(self, role: str) -> Kill:
        """Send SIGKILL to a role's worker or to the driver."""
        import psutil

        assert self.command is not None
        driver = psutil.Process(self.command.pid)
        victim, doing = driver, ""
        while role != "driver":
            if self.command.poll() is not None:
                sys.exit(f"the run ended before {role} was killed:\n{self.tail()}")
            found = [(each, title(each)) for each in driver.children(recursive=True)]
            mine = [(each, name) for each, name in found if WORKERS[role] in name]
            if mine:
                victim, name = mine[0]
                doing = name.partition(".")[2]
                break
        rows = self.rows()
        victim.send_signal(signal.SIGKILL)
        counted = rows[-1][f"restarts/{role}"] if role in WORKERS else 0.0
        struck = Kill(role, doing, len(rows), time.time(), counted)
        if role == "driver":
            self.command.wait()
            self.start()
        return struck

    def tail(self) -> str:
        """Return the last that the command said."""
        return self.said.read_text(errors="replace")[-3000:]


def title(process: Any) -> str:
    """Return `ActorWorker.update` for a worker of Ray that is in this call, or its class alone."""
    import psutil

    try:
        return str((process.cmdline() or [""])[0]).removeprefix("ray::")
    except psutil.Error:  # it ended meanwhile
        return ""


def has_recovered(kill: Kill, rows: list[dict[str, Any]]) -> bool:
    """Tell whether the step that was interrupted is done, by a successor."""
    after = [row for row in rows if row["step"] > kill.done and row["time"] > kill.at]
    is_driver = kill.role == "driver"
    return any(is_driver or row[f"restarts/{kill.role}"] > kill.restarts for row in after)


def outcome(kill: Kill, rows: list[dict[str, Any]]) -> tuple[float, int]:
    """Return seconds until the interrupted step was done, and steps that were done again."""
    again = [row for row in rows if row["step"] <= kill.done and row["time"] > kill.at]
    number = kill.done + 1
    while not has_recovered(kill, rows[:number]):
        number += 1
    return rows[number - 1]["time"] - kill.at, len(again)


def write_start(folder: Path) -> Path:
    """Write a random model as small as vLLM allows, with a tokenizer, and a reward model beside."""
    import torch
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
    from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast

    from rayrlhf.models.scalar_head import ScalarHeadModel
    from tests.toy import write_records

    write_records(folder)
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=320,
        special_tokens=["<|endoftext|>", "<|pad|>"],
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    tokenizer.train([str(folder / "corpus.train.jsonl")], trainer)
    torch.manual_seed(0)
    model = LlamaForCausalLM(
        LlamaConfig(
            vocab_size=tokenizer.get_vocab_size(),
            hidden_size=64,
            head_dim=32,
            intermediate_size=128,
            num_hidden_layers=2,
            num_attention_heads=2,
            num_key_value_heads=2,
            max_position_embeddings=512,
            tie_word_embeddings=True,
            bos_token_id=None,
            eos_token_id=0,
            pad_token_id=1,
        )
    )
    model.save_pretrained(folder / "model")
    PreTrainedTokenizerFast(
        tokenizer_object=tokenizer, eos_token="<|endoftext|>", pad_token="<|pad|>"
    ).save_pretrained(folder / "model")
    reward = ScalarHeadModel.from_causal_lm(folder / "model", seed=1)
    reward.save_pretrained(folder / "reward_model")
    return folder


def write_recipe(folder: Path, start: Path, steps: int, save_every: int) -> Path:
    """Write the recipe of a run in `folder`."""
    import yaml

    shutil.copytree(start / "reward_model", folder / "reward" / "final")
    training = {"learning_rate": 1e-3}
    recipe = {
        "name": "chaos",
        "run_dir": str(folder),
        "model": {"path": str(start / "model"), "max_length": 64},
        "resources": {"cpus_per_worker": 0.2},
        "ppo": {
            "prompts": str(start / "prompts.jsonl"),
            "steps": steps,
            "batch_size": 128,
            "num_minibatches": 4,
            "max_response_tokens": 32,
            "save_every": save_every,
            "kl_target": 0.1,
            "kl_horizon": 200,
            "rollout_memory_gib": 0.02,
            "actor": training,
            "critic": training,
        },
    }
    path = folder / "recipe.yaml"
    path.write_text(yaml.safe_dump(recipe), encoding="utf-8")
    return path


def moments(victims: list[str], steps: int, rng: random.Random) -> list[tuple[str, int]]:
    """Return (victim, steps that are done when it dies), each in its own part of the run."""
    rng.shuffle(victims)
    length = (steps - 2) / len(victims)  # what dies in the last step may have done its part
    return [(victim, 1 + int(length * (i + rng.random()))) for i, victim in enumerate(victims)]


def timeless(rows: list[dict[str, Any]]) -> list[dict[str, Any]]:
    """Return the metrics without the clock and the counters of deaths."""
    left_out = ("time", "restarts/", "rollout/tokens_per_s")
    return [{k: v for k, v in row.items() if not k.startswith(left_out)} for row in rows]


def compare(whole: Run, struck: Run) -> int:
    """Return how many metrics are equal in how many steps, times; exits where one is not."""
    from safetensors.torch import load_file

    pairs = list(zip(timeless(whole.rows()), timeless(struck.rows()), strict=True))
    for expected, found in pairs:
        wrong = {k: (v, found.get(k)) for k, v in expected.items() if found.get(k) != v}
        if wrong or expected.keys() != found.keys():
            sys.exit(f"step {expected['step']} differs, (undisturbed, killed): {wrong}")
    first, second = (
        load_file(run.folder / "ppo" / "final" / "model.safetensors") for run in (whole, struck)
    )
    unequal = [name for name in first if not first[name].equal(second[name])]
    if unequal or first.keys() != second.keys():
        sys.exit(f"ppo/final differs in {', '.join(unequal)}")
    return sum(len(expected) - 1 for expected, _ in pairs)


def main() -> None:
    """Run both, print a table, and as the last line a JSON object."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("overrides", metavar="key.sub=value", nargs="*")
    parser.add_argument("--steps", type=int, default=30)
    parser.add_argument("--save-every", type=int, default=5)
    parser.add_argument("--seed", type=int, default=0, help="of who dies when")
    parser.add_argument("--folder", type=Path)
    parser.add_argument("--quick", action="store_true", help="8 steps, two deaths")
    args = parser.parse_args()
    if args.quick:
        args.steps, args.save_every = 8, 3
    if args.folder is not None:
        report(args, args.folder)
        return
    with tempfile.TemporaryDirectory() as folder:
        report(args, Path(folder))


def report(args: argparse.Namespace, folder: Path) -> None:
    """Run undisturbed, then with kills; print what it cost."""
    from rayrlhf.console import table

    start = write_start(folder / "start")
    whole, struck = (Run(folder / name, start, args) for name in ("whole", "struck"))
    begin = time.monotonic()
    whole.start()
    whole.finish()
    undisturbed_s = time.monotonic() - begin
    step_s = (whole.rows()[-1]["time"] - whole.rows()[0]["time"]) / (args.steps - 1)

    rng = random.Random(args.seed)
    victims = ["rollout", "critic"] if args.quick else [*WORKERS, "driver"]
    begin = time.monotonic()
    struck.start()
    lines, redone, seconds = [], 0, {}
    for role, done in moments(victims, args.steps, rng):
        struck.wait_for(lambda rows, done=done: len(rows) >= done)
        time.sleep(rng.random() * step_s)
        kill = struck.kill(role)
        struck.wait_for(lambda rows, kill=kill: has_recovered(kill, rows))
        seconds[f"seconds_{role}"], again = outcome(kill, struck.rows())
        redone += again
        lines.append((role, kill.doing or "-", kill.done + 1, seconds[f"seconds_{role}"], again))
    struck.finish()
    struck_s = time.monotonic() - begin

    equal = compare(whole, struck)
    header = ("killed", "in", "during step", "went on after, s", "steps again")
    print(table(header, lines))
    print(f"seed {args.seed}", *args.overrides, sep=", ")
    print(f"a step takes {step_s:.2f} s undisturbed; a checkpoint every {args.save_every} steps")
    print(f"with the start: {undisturbed_s:.1f} s undisturbed, {struck_s:.1f} s with the kills")
    print(f"equal: {equal} metrics of {args.steps} steps, and every weight of ppo/final")
    figures = {
        "ratio_seconds": struck_s / undisturbed_s,
        "ratio_steps": (args.steps + redone) / args.steps,
        "equal_metrics": equal,
        "num_kills": len(lines),
        **seconds,
    }
    print(json.dumps({name: round(value, 3) for name, value in figures.items()}))


if __name__ == "__main__":
    main()
