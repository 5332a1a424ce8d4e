"""Samples per second of a PPO step, against TRL's last PPO trainer (TRL 1.12.0).

    python tests/benchmarks/ppo_vs_trl.py [--repeats 3] [--steps 3] [--only cut natural]
                                          [--peer-env FOLDER]

SmolLM2-135M as policy and reference, SmolLM2-135M with a head as reward and value model, the same
folders for both sides; prompts of 16 tokens, 32 per step, one epoch, one minibatch, float32, two
threads. Each side is a process of its own, in turn; TRL has an environment of its own, made in
--peer-env where it is missing. Seconds are those between the ends of the first and the last step.

cut        nothing ends a response before 48 tokens: end-of-text is a token nobody samples
natural    end-of-text is the frequent token with which responses of up to 128 tokens are nearest
           to 40 long on average; TRL samples all 128 and cuts

`utilization_update_...` is the share of the measured float32 matmul rate that the FLOPs of the
models reach in the update; `ratio_overhead_...` the share of a step in which no role computes and
no weights travel.
"""

import argparse
import json
import os
import shutil
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

ROOT = Path(__file__).parents[2]
sys.path.insert(0, str(ROOT))
os.environ.setdefault("HF_HUB_OFFLINE", "1")

PEER = "trl==1.12.0"
MODEL = "builtin:smollm2-135m-instruct"
THREADS, BATCH, PROMPT = 2, 32, 16
CASES = {"cut": 48, "natural": 128}
"""Longest response, tokens."""
MEAN_LENGTH = 40
UNUSED = "<file_sep>"
"""A token of SmolLM2 that no text has."""
PAD = "<gh_stars>"
RATE, CLIP, KL_COEF, VALUE_COEF = 1e-6, 0.2, 0.05, 0.1


def prepare(folder: Path, *, quick: bool) -> None:
    """Write prompts, and for each case the four models with a tokenizer that ends its responses."""
    import torch
    from transformers import AutoModelForCausalLM, AutoTokenizer

    from rayrlhf.data import builtin
    from rayrlhf.data.records import read_records
    from rayrlhf.models.scalar_head import ScalarHeadModel

    torch.manual_seed(0)
    source = _toy(folder / "toy") if quick else builtin.resolve(MODEL)
    tokenizer = AutoTokenizer.from_pretrained(source)
    policy = AutoModelForCausalLM.from_pretrained(source, dtype=torch.float32)
    prompts: list[list[int]] = []
    for record in read_records("builtin:human-ratings/prompts.train.jsonl", "prompt"):
        ids = tokenizer.encode(record["prompt"] * 4, add_special_tokens=False)[:PROMPT]
        if len(ids) == PROMPT and tokenizer.encode(tokenizer.decode(ids)) == ids:
            prompts.append(ids)
    ends = {"cut": UNUSED, "natural": _frequent(policy, tokenizer, prompts[: 2 * BATCH])}
    for case in CASES:
        tokenizer.eos_token, tokenizer.pad_token = ends[case], PAD
        tokenizer.save_pretrained(folder / case / "policy")
        policy.config.pad_token_id = tokenizer.pad_token_id
        policy.config.eos_token_id = policy.generation_config.eos_token_id = tokenizer.eos_token_id
        policy.save_pretrained(folder / case / "policy")
        scorer = ScalarHeadModel.from_causal_lm(folder / case / "policy", 0)
        scorer.save_pretrained(str(folder / case / "reward"))
        tokenizer.save_pretrained(folder / case / "reward")
        left = [ids for ids in prompts if tokenizer.eos_token_id not in ids]
        lines = [{"prompt": tokenizer.decode(ids), "ids": ids} for ids in left]
        text = "".join(json.dumps(line) + "\n" for line in lines)
        (folder / case / "prompts.jsonl").write_text(text, encoding="utf-8")


def _frequent(policy: Any, tokenizer: Any, prompts: list[list[int]]) -> str:
    """Return the token with which responses that it ends have nearly the wanted mean length."""
    import torch

    longest = CASES["natural"]
    ids = policy.generate(
        torch.tensor(prompts),
        max_new_tokens=longest,
        min_new_tokens=longest,
        do_sample=True,
        top_k=0,
        pad_token_id=0,
    )[:, PROMPT:]
    means = {}
    for token in ids.unique().tolist():
        hits = ids == token  # (B, T)
        first = torch.where(hits.any(1), hits.int().argmax(1) + 1, longest)
        means[token] = float(first.float().mean())
    best = min(means, key=lambda token: abs(means[token] - MEAN_LENGTH))
    return str(tokenizer.convert_ids_to_tokens(best))


def _toy(folder: Path) -> str:
    """Write a model of the same tokenizer that takes no time."""
    from transformers import AutoConfig, AutoModelForCausalLM, AutoTokenizer

    from rayrlhf.data import builtin

    source = builtin.resolve(MODEL)
    config = AutoConfig.from_pretrained(source)
    config.update(
        {
            "hidden_size": 64,
            "intermediate_size": 128,
            "num_hidden_layers": 2,
            "num_attention_heads": 2,
            "num_key_value_heads": 1,
            "head_dim": 32,
        }
    )
    AutoModelForCausalLM.from_config(config).save_pretrained(folder)
    AutoTokenizer.from_pretrained(source).save_pretrained(folder)
    return str(folder)


def run_ours(folder: Path, case: str, num_steps: int) -> dict[str, float]:
    """Train; return samples per second, mean length and where the time went."""
    from rayrlhf.config import parse
    from rayrlhf.metrics import read_jsonl
    from rayrlhf.pipeline import prepare
    from rayrlhf.rl.ppo import train_ppo
    from rayrlhf.rl.profile import MEASURED, TRACED, WARM_UP

    role = {"learning_rate": RATE, "tokens_per_microbatch": 4096}
    # Two roles compute at a time: with a thread each, none waits for the threads of another.
    one = dict.fromkeys(("actor", "critic", "reference", "reward"), {"num_threads": 1})
    recipe = parse(
        {
            "name": "benchmark",
            "run_dir": str(folder / "run"),
            "tokenizer": {"path": str(folder / case / "policy")},
            "model": {"path": str(folder / case / "policy"), "max_length": PROMPT + CASES[case]},
            "resources": {**one, "rollout": {"num_threads": THREADS}},
            "ppo": {
                "prompts": str(folder / case / "prompts.jsonl"),
                "steps": max(num_steps, WARM_UP + TRACED + MEASURED),
                "batch_size": BATCH,
                "max_response_tokens": CASES[case],
                "num_minibatches": 1,
                "actor": role,
                "critic": role,
                "clip": CLIP,
                "value_clip": CLIP,
                "kl_coef": KL_COEF,
                "missing_eos_penalty": 0,
                "rollout_memory_gib": 0.5,
                "sample_every": 10**6,
                "save_every": 10**6,
                "profile": True,
            },
        }
    )
    shutil.rmtree(folder / "run", ignore_errors=True)
    shutil.copytree(folder / case / "reward", recipe.path / "reward" / "final")
    prepare(recipe)
    train_ppo(recipe)
    lines = read_jsonl(recipe.path / "ppo" / "metrics.jsonl")[WARM_UP + TRACED :]
    table = json.loads((recipe.path / "ppo" / "profile" / "table.json").read_text())
    updates = [phase for phase in table["phases"] if phase["name"] == "update"]
    seconds = statistics.mean(line["time/step_s"] for line in lines)
    return {
        "samples_per_s": BATCH / seconds,
        "mean_length": statistics.mean(line["rollout/response_length"] for line in lines),
        "update_flops_per_s": 1e12
        * sum(phase["tflop"] for phase in updates)
        / max(phase["seconds"] for phase in updates),
        "overhead": table["idle_share"],
        "sync": statistics.mean(line["time/sync_s"] for line in lines) / seconds,
    }


def run_trl(folder: Path, case: str, num_steps: int) -> dict[str, float]:
    """Train with TRL; return samples per second, the same of its own count of lengths."""
    import torch
    from datasets import Dataset
    from transformers import (
        AutoModelForCausalLM,
        AutoModelForSequenceClassification,
        AutoTokenizer,
        TrainerCallback,
    )
    from trl.experimental.ppo import PPOConfig, PPOTrainer

    torch.set_num_threads(THREADS)
    policy, reward = str(folder / case / "policy"), str(folder / case / "reward")
    tokenizer = AutoTokenizer.from_pretrained(policy, padding_side="left")
    lines = (folder / case / "prompts.jsonl").read_text(encoding="utf-8").splitlines()
    prompts = Dataset.from_list([{"input_ids": json.loads(line)["ids"]} for line in lines])
    ends: list[float] = []

    class Ends(TrainerCallback):
        def on_step_end(self, *_: Any, **__: Any) -> None:
            ends.append(time.perf_counter())

    def scorer() -> Any:
        return AutoModelForSequenceClassification.from_pretrained(
            reward, num_labels=1, dtype=torch.float32
        )

    # At once, 32 responses of 128 tokens take more than 24 GiB.
    accumulation = 2 if case == "natural" else 1
    trainer = PPOTrainer(
        PPOConfig(
            output_dir=str(folder / "trl"),
            per_device_train_batch_size=BATCH // accumulation,
            gradient_accumulation_steps=accumulation,
            num_mini_batches=1,
            num_ppo_epochs=1,
            local_rollout_forward_batch_size=BATCH,
            total_episodes=BATCH * (1 + num_steps),
            response_length=CASES[case],
            stop_token="eos",
            temperature=1.0,
            learning_rate=RATE,
            kl_coef=KL_COEF,
            cliprange=CLIP,
            cliprange_value=CLIP,
            vf_coef=VALUE_COEF,
            missing_eos_penalty=None,
            num_sample_generations=0,
            bf16=False,
            use_cpu=True,
            report_to="none",
            save_strategy="no",
            seed=0,
        ),
        processing_class=tokenizer,
        model=AutoModelForCausalLM.from_pretrained(policy, dtype=torch.float32),
        ref_model=AutoModelForCausalLM.from_pretrained(policy, dtype=torch.float32),
        reward_model=scorer(),
        value_model=scorer(),
        train_dataset=prompts,
        callbacks=[Ends()],
    )
    trainer.train()
    return {"samples_per_s": BATCH * num_steps / (ends[-1] - ends[0])}


def peer_python(folder: Path) -> Path:
    """Return the interpreter of TRL's environment, which is made where it is missing."""
    python = folder / "bin" / "python"
    if not python.exists():
        print(f"making TRL's environment in {folder}, some minutes", flush=True)
        subprocess.run([sys.executable, "-m", "venv", folder], check=True)
        torch = f"torch=={_version('torch')}"
        subprocess.run([python, "-m", "pip", "install", "-q", torch, PEER], check=True)
    return python


def _version(package: str) -> str:
    from importlib.metadata import version

    return version(package).split("+")[0]


def in_a_process(python: Path | str, side: str, folder: Path, args: argparse.Namespace) -> Any:
    """Run one side once; return what it measured."""
    command = [str(python), __file__, "--side", side, "--folder", str(folder)]
    command += ["--case", args.case, "--steps", str(args.steps), *["--quick"] * args.quick]
    threads = {"OMP_NUM_THREADS": str(THREADS), "RAY_ADDRESS": "local"}
    ran = subprocess.run(
        command, env={**os.environ, **threads}, stdout=subprocess.PIPE, text=True, check=False
    )
    if ran.returncode:
        raise SystemExit(f"{side} failed:\n{ran.stdout}")
    return json.loads(ran.stdout.splitlines()[-1])


def machine_rate() -> float:
    """Measure FLOP/s of float32 matmuls with all threads."""
    import torch

    from rayrlhf.training.utilization import matmul_rate

    torch.set_num_threads(THREADS)
    return matmul_rate(torch.device("cpu"), torch.float32)


def compare(folder: Path, args: argparse.Namespace) -> dict[str, float]:
    """Let the sides take turns, for each case; return the figures, ratios first."""
    sides: dict[str, Path | str] = {"ours": sys.executable}
    if not args.quick:
        sides["trl"] = peer_python(args.peer_env)
    ratios: dict[str, float] = {}
    more: dict[str, float] = {}
    for case in args.only:
        args.case = case
        found: dict[str, list[Any]] = {side: [] for side in sides}
        for repeat in range(args.repeats):
            for side, python in sides.items():
                found[side].append(in_a_process(python, side, folder, args))
                said = ", ".join(f"{key} {value:.4g}" for key, value in found[side][-1].items())
                print(f"{case} {repeat} {side:>4}: {said}", flush=True)
        ours = found["ours"]
        mean = {key: statistics.mean(each[key] for each in ours) for key in ours[0]}
        if "trl" in found:
            pairs = zip(ours, found["trl"], strict=True)
            each = [mine["samples_per_s"] / theirs["samples_per_s"] for mine, theirs in pairs]
            ratios[f"ratio_{case}"] = statistics.median(each)
            ratios[f"ratio_{case}_least"], ratios[f"ratio_{case}_most"] = (
                min(each),
                max(each),
            )
        ratios[f"ratio_overhead_{case}"] = mean.pop("overhead")
        ratios[f"ratio_sync_{case}"] = mean.pop("sync")
        rate = machine_rate()
        more[f"utilization_update_{case}"] = mean.pop("update_flops_per_s") / rate
        more |= {f"{key}_{case}": value for key, value in mean.items()}
    return ratios | more


def main() -> None:
    """Measure, and print as the last line a JSON object."""
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--repeats", type=int, default=3)
    parser.add_argument("--steps", type=int, default=3, help="that count, per run")
    parser.add_argument("--only", nargs="+", choices=list(CASES), default=list(CASES))
    parser.add_argument("--peer-env", type=Path, default=Path(tempfile.gettempdir()) / PEER)
    parser.add_argument("--folder", type=Path, help="keep the models there, and take them again")
    parser.add_argument("--quick", action="store_true", help="a toy model, without TRL")
    parser.add_argument("--side", choices=["ours", "trl"], help=argparse.SUPPRESS)
    parser.add_argument("--case", choices=list(CASES), help=argparse.SUPPRESS)
    args = parser.parse_args()
    if args.side is not None:
        run = run_ours if args.side == "ours" else run_trl
        print(json.dumps(run(args.folder, args.case, args.steps)))
        return
    if args.quick:
        args.repeats, args.only = 1, ["cut"]
    with tempfile.TemporaryDirectory() as temporary:
        folder = (args.folder or Path(temporary)).absolute()
        if not (folder / "natural" / "reward").is_dir():
            prepare(folder, quick=args.quick)
        figures = compare(folder, args)
    print(json.dumps({name: round(value, 4) for name, value in figures.items()}))


if __name__ == "__main__":
    main()
