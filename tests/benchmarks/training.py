"""Tokens per second of the supervised stages, against a bare PyTorch loop and against TRL.

    pip install trl; python tests/benchmarks/training.py [--repeats 3] [--only pretrain-6m ...]

Float32, two threads, one worker, in turn in one run; each repeat gives one ratio. Seconds are those
between the ends of the first and the last step, so that nobody's start counts; tokens are those of
the texts, without padding.

pretrain-6m, pretrain-135m   the stage through Ray Train, against a loop of model(ids),
                             cross_entropy, backward, clip, AdamW on the same rows
sft                          SmolLM2-135M on the built-in demonstrations, against TRL's SFTTrainer
                             as it comes, by length and with packing: `ratio_sft` is against the
                             fastest of these
reward                       SmolLM2-135M, once over comparisons of K = 9, against TRL's
                             RewardTrainer on the same as 36 pairs each, as many per step, with the
                             same learning rates; what counts is comparisons per second at the
                             same `accuracy_...` on the pairs of other comparisons

TRL is left out where it is not installed.
"""

import argparse
import importlib.util
import json
import os
import shutil
import statistics
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

THREADS = 2
os.environ.setdefault("HF_HUB_OFFLINE", "1")
RATINGS = "builtin:human-ratings"
SMOLLM2 = "builtin:smollm2-135m-instruct"
SHAPES: dict[str, dict[str, Any]] = {
    "pretrain-6m": {"hidden_size": 256, "num_layers": 6, "num_heads": 8, "num_kv_heads": 8}
    | {"intermediate_size": 704, "max_length": 128},
    "pretrain-135m": {"hidden_size": 576, "num_layers": 30, "num_heads": 9, "num_kv_heads": 3}
    | {"intermediate_size": 1536, "max_length": 128},
}
NUM_HELD_OUT = 30
"""Comparisons: 1,080 pairs."""
REWARD_BATCH, REWARD_RATE = 2, 2e-5
ACCURACIES: dict[str, float] = {}
"""On the held-out pairs, of the last run of each side."""
Way = Callable[[Path, int], float]
"""way(folder, steps) -> items per second"""


def recipe_of(folder: Path, **sections: Any) -> Any:
    from rayrlhf.config import parse

    return parse(
        {
            "name": "benchmark",
            "run_dir": str(folder / "run"),
            "resources": {"cpus_per_worker": 1, "num_threads": THREADS},
            **sections,
        }
    )


def rate_of_stage(recipe: Any, kind: Any, key: str = "tokens") -> float:
    """Run a stage through Ray Train; return what it does per second after its first step."""
    from rayrlhf import session
    from rayrlhf.metrics import read_jsonl
    from rayrlhf.training.loop import train_stage

    session.connect(recipe)
    shutil.rmtree(recipe.path / kind.name, ignore_errors=True)
    train_stage(recipe, kind)
    lines = read_jsonl(recipe.path / kind.name / "metrics.jsonl")
    seconds = lines[-1]["time"] - lines[0]["time"]
    return float(sum(line[key] for line in lines[1:]) / seconds)


def pretrain_recipe(folder: Path, name: str, steps: int) -> Any:
    small = name == "pretrain-6m"
    return recipe_of(
        folder,
        tokenizer={"vocab_size": 4096} if small else {"path": SMOLLM2},
        model=SHAPES[name],
        corpus={
            "row_length": 128,
            "sources": {"movies": {"path": f"{RATINGS}/corpus.movies.train.jsonl"}},
        },
        pretrain={
            "batch_size": 32 if small else 8,
            "tokens_per_microbatch": 4096 if small else 1024,
            "max_steps": steps,
            "num_samples": 0,
            "save_every": 10**6,
        },
    )


def pretrain_stage(name: str) -> Way:
    def way(folder: Path, steps: int) -> float:
        from rayrlhf.data.corpus import build_corpus
        from rayrlhf.training.pretrain import PretrainStage

        recipe = pretrain_recipe(folder, name, steps)
        build_corpus(recipe)
        return rate_of_stage(recipe, PretrainStage)

    return way


def bare_loop(name: str) -> Way:
    """The least that pretraining takes: no packing, no metrics, no checkpoints, no Ray."""

    def way(folder: Path, steps: int) -> float:
        import torch
        import torch.nn.functional as F

        from rayrlhf.data.corpus import build_corpus
        from rayrlhf.data.rows import PackedRows
        from rayrlhf.models.causal_lm import build_causal_lm

        recipe = pretrain_recipe(folder, name, steps)
        build_corpus(recipe)
        cfg = recipe.pretrain
        torch.set_num_threads(THREADS)
        vocab = 4096 if name == "pretrain-6m" else 49152
        model = build_causal_lm(
            recipe.model, vocab_size=vocab, eos_token_id=0, pad_token_id=1, seed=0
        )
        model.train()
        optimizer = torch.optim.AdamW(model.parameters(), lr=cfg.learning_rate, fused=True)
        rows = PackedRows(recipe.path / "corpus", "train")
        size = cfg.tokens_per_microbatch // rows.row_length
        started = tokens = 0.0
        for step in range(steps):
            first = step * cfg.batch_size % (len(rows) - cfg.batch_size)
            for start in range(first, first + cfg.batch_size, size):
                ids = rows[range(start, start + size)]
                logits = model(input_ids=ids, use_cache=False).logits[:, :-1]
                loss = F.cross_entropy(logits.flatten(0, 1), ids[:, 1:].flatten())
                (loss * size / cfg.batch_size).backward()
            torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
            optimizer.step()
            optimizer.zero_grad()
            tokens += cfg.batch_size * rows.row_length if step else 0
            started = started or time.perf_counter()
        return tokens / (time.perf_counter() - started)

    return way


def sft_stage(folder: Path, steps: int) -> float:
    from rayrlhf.training.sft import SFTStage

    recipe = recipe_of(
        folder,
        tokenizer={"path": SMOLLM2},
        model={"path": SMOLLM2, "max_length": 256},
        sft={
            "train": f"{RATINGS}/demonstrations.train.jsonl",
            "batch_size": 32,
            "dropout": 0.0,
            "tokens_per_microbatch": 1024,
            "max_steps": steps,
            "save_every": 10**6,
        },
    )
    return rate_of_stage(recipe, SFTStage)


def trl_sft(*, packing: bool = False, by_length: bool = False) -> Way:
    def way(folder: Path, steps: int) -> float:
        import torch
        from datasets import Dataset
        from transformers import AutoModelForCausalLM, AutoTokenizer
        from trl import SFTConfig, SFTTrainer

        from rayrlhf.data import builtin
        from rayrlhf.data.records import read_records

        torch.set_num_threads(THREADS)
        tokenizer = AutoTokenizer.from_pretrained(builtin.resolve(SMOLLM2))
        records = read_records(f"{RATINGS}/demonstrations.train.jsonl", "demonstration")
        texts = [
            {"prompt": r["prompt"], "completion": r["response"]} for r in records[: 33 * steps]
        ]
        lengths = [
            len(tokenizer(text["prompt"] + text["completion"])["input_ids"]) + 1 for text in texts
        ]
        mean = sum(lengths) / len(lengths)
        # As many texts per step, packed or not.
        batch = max(1, round(32 * mean / 256)) if packing else 32
        config = SFTConfig(
            output_dir=str(folder / "trl"),
            per_device_train_batch_size=batch,
            max_steps=steps,
            max_length=256,
            packing=packing,
            completion_only_loss=True,
            train_sampling_strategy="group_by_length" if by_length else "random",
            **_trl_settings(),
        )
        clock = _clock()
        trainer = SFTTrainer(
            model=AutoModelForCausalLM.from_pretrained(
                builtin.resolve(SMOLLM2), dtype=torch.float32
            ),
            args=config,
            train_dataset=Dataset.from_list(texts),
            processing_class=tokenizer,
            callbacks=[clock],
        )
        trainer.train()
        tokens = batch * 256 if packing else 32 * mean
        return float(tokens / statistics.mean(clock.seconds()))

    return way


def reward_records(steps: int) -> tuple[list[dict[str, Any]], list[dict[str, Any]]]:
    """Return comparisons of K = 9 without ties: those of `steps` steps, and others."""
    from rayrlhf.data.records import read_records

    ratings = read_records(f"{RATINGS}/comparisons.train.jsonl", "comparison")
    nine = [
        {key: r[key] for key in ("prompt", "responses", "ranks")}
        for r in ratings
        if len(r["responses"]) == 9 and len(set(r["ranks"])) == 9
    ]
    return nine[NUM_HELD_OUT:][: steps * REWARD_BATCH], nine[:NUM_HELD_OUT]


def reward_stage(folder: Path, steps: int) -> float:
    from rayrlhf.training.reward import RewardStage

    files = []
    for name, records in zip(("train", "held_out"), reward_records(steps), strict=True):
        files.append(folder / f"{name}.jsonl")
        lines = [json.dumps(record) + "\n" for record in records]
        files[-1].write_text("".join(lines), encoding="utf-8")
    recipe = recipe_of(
        folder,
        tokenizer={"path": SMOLLM2},
        model={"path": SMOLLM2, "max_length": 256},
        reward={
            "train": str(files[0]),
            "validation": str(files[1]),
            "init": SMOLLM2,
            "batch_size": REWARD_BATCH,
            "learning_rate": REWARD_RATE,
            "tokens_per_microbatch": 1024,
            "max_steps": steps,
            "save_every": 10**6,
        },
    )
    rate_of_stage(recipe, RewardStage)
    from rayrlhf.metrics import read_jsonl

    lines = read_jsonl(recipe.path / "reward" / "metrics.jsonl")
    ACCURACIES["stage"] = lines[-1]["eval/pair_accuracy"]
    # The last line also holds the seconds of the evaluation.
    return REWARD_BATCH / statistics.mean(
        line["time/step_s"] + line["time/data_wait_s"] for line in lines[1:]
    )


def trl_reward(folder: Path, steps: int) -> float:
    import torch
    from datasets import Dataset
    from transformers import AutoModelForSequenceClassification, AutoTokenizer
    from trl import RewardConfig, RewardTrainer

    from rayrlhf.data import builtin

    torch.set_num_threads(THREADS)
    tokenizer = AutoTokenizer.from_pretrained(builtin.resolve(SMOLLM2))
    train, held_out = (Dataset.from_list(pairs_of(part)) for part in reward_records(steps))
    clock = _clock()
    config = RewardConfig(
        output_dir=str(folder / "trl"),
        # A comparison has 36 pairs. A third at a time: 5 GB of activations, not 11.
        per_device_train_batch_size=12,
        per_device_eval_batch_size=36,
        gradient_accumulation_steps=3 * REWARD_BATCH,
        max_steps=steps,
        max_length=256,
        learning_rate=REWARD_RATE,
        lr_scheduler_type="cosine_with_min_lr",
        lr_scheduler_kwargs={"min_lr_rate": 0.1},
        train_sampling_strategy="random",
        **_trl_settings(),
    )
    trainer = RewardTrainer(
        model=AutoModelForSequenceClassification.from_pretrained(
            builtin.resolve(SMOLLM2), dtype=torch.float32, num_labels=1
        ),
        args=config,
        train_dataset=train,
        eval_dataset=held_out,
        processing_class=tokenizer,
        callbacks=[clock],
    )
    trainer.train()
    ACCURACIES["TRL"] = trainer.evaluate()["eval_accuracy"]
    return REWARD_BATCH / statistics.mean(clock.seconds())


def pairs_of(records: list[dict[str, Any]]) -> list[dict[str, str]]:
    """Return every pair of every comparison, the better response first."""
    pairs = []
    for record in records:
        ranked = sorted(zip(record["ranks"], record["responses"], strict=True))
        texts = [record["prompt"] + text for _, text in ranked]
        pairs += [
            {"chosen": better, "rejected": worse}
            for place, better in enumerate(texts)
            for worse in texts[place + 1 :]
        ]
    return pairs


def _trl_settings() -> dict[str, Any]:
    return {
        "use_cpu": True,
        "bf16": False,
        "gradient_checkpointing": False,
        "save_strategy": "no",
        "report_to": "none",
        "logging_strategy": "no",
        "disable_tqdm": True,
        "dataloader_pin_memory": False,
        "optim": "adamw_torch_fused",
        "adam_beta2": 0.95,
        "dataloader_num_workers": 1,  # reads ahead, as ours does
    }


def _clock() -> Any:
    from transformers import TrainerCallback

    class Clock(TrainerCallback):  # type: ignore[misc]
        """Notes when each step ends."""

        def __init__(self) -> None:
            self.ends: list[float] = []

        def on_step_end(self, *args: Any, **kwargs: Any) -> None:
            self.ends.append(time.perf_counter())

        def seconds(self) -> list[float]:
            return [b - a for a, b in zip(self.ends, self.ends[1:], strict=False)]

    return Clock()


def comparisons(with_trl: bool) -> dict[str, dict[str, Way]]:
    """Return {what: {way: ...}}; the first way is rayrlhf's."""
    found: dict[str, dict[str, Way]] = {
        name: {"stage": pretrain_stage(name), "bare loop": bare_loop(name)} for name in SHAPES
    }
    if with_trl:
        found["sft"] = {
            "stage": sft_stage,
            "TRL": trl_sft(),
            "TRL, by length": trl_sft(by_length=True),
            "TRL, packing": trl_sft(packing=True),
        }
        found["reward"] = {"stage": reward_stage, "TRL": trl_reward}
    return found


STEPS = {"pretrain-6m": 30, "pretrain-135m": 4, "sft": 6, "reward": 80}


def main() -> None:
    """Measure, print a table, and as the last line a JSON object."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--repeats", type=int, default=3)
    parser.add_argument("--only", nargs="+", choices=list(STEPS), default=list(STEPS))
    parser.add_argument("--quick", action="store_true", help="three steps of the 6M model")
    parser.add_argument("--steps", type=int, help="optimizer steps, in place of the defaults")
    args = parser.parse_args()
    steps = {name: args.steps or default for name, default in STEPS.items()}
    if args.quick:
        args.repeats, args.only, steps["pretrain-6m"] = 1, ["pretrain-6m"], 3
    figures: dict[str, float] = {}
    folder = Path(tempfile.mkdtemp(prefix="rayrlhf-training-"))
    try:
        for what, ways in comparisons(importlib.util.find_spec("trl") is not None).items():
            if what not in args.only:
                continue
            rates: dict[str, list[float]] = {way: [] for way in ways}
            for _ in range(args.repeats):
                for way, run in ways.items():
                    place = folder / what
                    place.mkdir(exist_ok=True)
                    rates[way].append(run(place, steps[what]))
            for way, found in rates.items():
                print(f"{what:>14} {way:<14} {statistics.median(found):>10,.1f}/s", flush=True)
            best = [max(found) for found in zip(*list(rates.values())[1:], strict=True)]
            ratios = [own / other for own, other in zip(rates["stage"], best, strict=True)]
            name = what.replace("-", "_")
            figures |= {
                f"ratio_{name}": statistics.median(ratios),
                f"low_{name}": min(ratios),
                f"high_{name}": max(ratios),
            }
            if what == "reward":
                figures |= {f"accuracy_reward_{way}": value for way, value in ACCURACIES.items()}
    finally:
        shutil.rmtree(folder)
    print(json.dumps({name: round(value, 3) for name, value in figures.items()}))


if __name__ == "__main__":
    main()
