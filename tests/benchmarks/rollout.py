"""Tokens per second of a rollout worker, against a bare `vllm.LLM.generate` on the same engine.

    python tests/benchmarks/rollout.py [--repeats 5] [--prompts 64] [--tokens 64] [--quick]

SmolLM2-135M, float32, two threads, prompts of 16 tokens, responses that nothing ends before
--tokens. The worker is a Ray actor and called as PPO calls it, so what counts against it is the way
there and back, the log-probs and weight versions of all tokens, and its own Python; the bare call
wants nothing but tokens, with the same seeds. Both take turns on one engine.
"""

import argparse
import json
import os
import statistics
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

ROOT = Path(__file__).parents[2]
sys.path.insert(0, str(ROOT))
os.environ["RAY_ADDRESS"] = "local"
os.environ.setdefault("HF_HUB_OFFLINE", "1")

MODEL = "builtin:smollm2-135m-instruct"
PROMPT, THREADS = 16, 2


def worker_class() -> type:
    """Return the rollout worker with a bare call beside."""
    from rayrlhf.rl.rollout import RolloutWorker

    class WithBare(RolloutWorker):
        def bare(self, prompts: list[list[int]], step: int) -> float:
            """Return the seconds of a plain call of the engine's `vllm.LLM`."""
            from vllm import SamplingParams
            from vllm.inputs import TokensPrompt

            params = [
                SamplingParams(
                    temperature=self.cfg.temperature,
                    max_tokens=self.cfg.max_response_tokens,
                    seed=step * len(prompts) + number,
                    ignore_eos=True,
                    detokenize=False,
                )
                for number in range(len(prompts))
            ]
            self.engine._set_threads()
            begun = time.perf_counter()
            asked = [TokensPrompt(prompt_token_ids=ids) for ids in prompts]
            self.engine._llm.generate(asked, params, use_tqdm=False)
            return time.perf_counter() - begun

    return WithBare


def model_folder(folder: Path, *, quick: bool) -> tuple[Path, int]:
    """Return the model, its end-of-text a token that nobody samples, and its vocabulary's size."""
    from transformers import AutoConfig, AutoModelForCausalLM, AutoTokenizer

    from rayrlhf.data import builtin

    source = builtin.resolve(MODEL)
    tokenizer = AutoTokenizer.from_pretrained(source)
    tokenizer.save_pretrained(folder)
    if not quick:
        model = AutoModelForCausalLM.from_pretrained(source, dtype="float32")
    else:
        config = AutoConfig.from_pretrained(source)
        small = {"hidden_size": 64, "intermediate_size": 128, "num_hidden_layers": 2}
        config.update({**small, "num_attention_heads": 2, "num_key_value_heads": 1, "head_dim": 32})
        model = AutoModelForCausalLM.from_config(config)
    never = tokenizer.convert_tokens_to_ids("<file_sep>")
    model.config.eos_token_id = model.generation_config.eos_token_id = never
    model.save_pretrained(folder)
    return folder, never


def settings_of(model: Path, never: int, args: argparse.Namespace) -> Any:
    from rayrlhf.config import PPOConfig
    from rayrlhf.rl.ranks import RoleSettings

    cfg = PPOConfig(
        prompts="none",
        batch_size=args.prompts,
        max_response_tokens=args.tokens,
        rollout_memory_gib=0.5,
        actor={"precision": "float32"},
    )
    return RoleSettings(
        ppo=cfg,
        model_path=str(model),
        state_path=None,
        adapter_path=None,
        tokenizer_path=str(model),
        corpus_path="",
        documents_apart=False,
        actor_ranks=1,
        max_length=PROMPT + args.tokens,
        pad_id=0,
        eos_id=never,
        seed=0,
        num_threads=THREADS,
    )


def measure(args: argparse.Namespace, folder: Path) -> dict[str, float]:
    """Let both take turns; return the median ratio and what each did per second."""
    import ray

    from rayrlhf.console import table

    model, never = model_folder(folder, quick=args.quick)
    ray.init(address="local", num_cpus=THREADS, include_dashboard=False, log_to_driver=False)
    try:
        worker = ray.remote(num_cpus=THREADS)(worker_class()).remote(
            settings_of(model, never, args)
        )
        ray.get(worker.start.remote())
        ratios, ours, bare = [], [], []
        for step in range(args.repeats + 1):
            # Prompts of each step are new: neither finds what the other has read.
            sides: dict[str, float] = {}
            for side in ("ours", "bare") if step % 2 else ("bare", "ours"):
                first = 100 + 7 * step + 3 * (side == "bare")
                prompts = [
                    [first + (31 * row + place) % 9000 for place in range(PROMPT)]
                    for row in range(args.prompts)
                ]
                begun = time.perf_counter()
                if side == "bare":
                    sides[side] = ray.get(worker.bare.remote(prompts, step))
                else:
                    rollout = ray.get(worker.generate.remote(prompts, 0, step))
                    sides[side] = time.perf_counter() - begun
                    assert int(rollout.response_lengths.sum()) == args.prompts * args.tokens
            if step:  # the first warms up
                print(
                    f"repeat {step}: {sides['ours']:.2f} s, bare {sides['bare']:.2f} s", flush=True
                )
                ratios.append(sides["bare"] / sides["ours"])
                ours.append(args.prompts * args.tokens / sides["ours"])
                bare.append(args.prompts * args.tokens / sides["bare"])
    finally:
        ray.shutdown()
    rows = list(zip(range(1, args.repeats + 1), ours, bare, ratios, strict=True))
    print(table(("repeat", "tokens/s", "of the bare engine", "ratio"), rows))
    return {
        "ratio_rollout_to_bare": statistics.median(ratios),
        "ratio_rollout_to_bare_least": min(ratios),
        "ratio_rollout_to_bare_most": max(ratios),
        "tokens_per_s_rollout": statistics.median(ours),
        "tokens_per_s_bare": statistics.median(bare),
    }


def main() -> None:
    """Measure, and print as the last line a JSON object."""
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--repeats", type=int, default=5)
    parser.add_argument("--prompts", type=int, default=64)
    parser.add_argument("--tokens", type=int, default=64)
    parser.add_argument("--quick", action="store_true", help="a toy model")
    args = parser.parse_args()
    if args.quick:
        args.repeats, args.prompts, args.tokens = 2, 8, 8
    with tempfile.TemporaryDirectory() as folder:
        figures = measure(args, Path(folder))
    print(json.dumps({name: round(value, 4) for name, value in figures.items()}))


if __name__ == "__main__":
    main()
