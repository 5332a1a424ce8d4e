"""Does PPO learn what TRL's last PPO trainer learns from as many responses? A toy task, over seeds.

    python tests/benchmarks/ppo_toy_vs_trl.py [--seeds 5] [--steps 100] [--plot ppo_toy.png]
                                              [--peer-env FOLDER]

The reward is the share of one token in a response of up to 6 tokens of 12. Both sides start from
the same weights of policy and value model, and have the same prompts, batch, learning rate, clip
and KL coefficient; ours is rl/ppo.py with its workers in this process and transformers for the
engine. `ratio_at_equal_kl`: our mean reward over TRL's, each seed's read off where it is first as
far from the start as the seed that moved least; `ratio_after_all` is that of the last steps. The
bounds `..._low` and `..._high` are those of a 95% interval (Student's t over the differences of
the seeds): `ratio_at_equal_kl_high` below 1 would mean that TRL learns more.
"""

import argparse
import json
import math
import os
import statistics
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import Any

ROOT = Path(__file__).parents[2]
sys.path.insert(0, str(ROOT))
os.environ.setdefault("HF_HUB_OFFLINE", "1")

TOKEN, EOS, PAD, PROMPT, RESPONSE = 5, 0, 1, 3, 6
BATCH, RATE, CLIP, KL_COEF = 32, 1e-3, 0.2, 0.02
T_95 = {2: 12.706, 3: 4.303, 4: 3.182, 5: 2.776, 8: 2.365, 10: 2.262}
"""Student's t, two-sided 95%, by the number of seeds."""
SMOOTH = 5
"""Steps of a running mean."""


def prepare(folder: Path) -> None:
    """Write the models and a tokenizer of their vocabulary."""
    from tokenizers import Tokenizer, models
    from transformers import PreTrainedTokenizerFast

    from tests.rl.inline import VOCAB, write_small_critic, write_small_model

    words = {"<eos>": EOS, "<pad>": PAD, **{f"t{i}": i for i in range(2, VOCAB)}}
    tokenizer = PreTrainedTokenizerFast(
        tokenizer_object=Tokenizer(models.WordLevel(words, unk_token="<pad>")),
        eos_token="<eos>",
        pad_token="<pad>",
    )
    write_small_model(folder / "policy")
    write_small_critic(folder / "critic", folder / "policy")
    for name in ("policy", "critic"):
        tokenizer.save_pretrained(folder / name)


def prompts() -> list[list[int]]:
    """Return the prompts, none of which has end-of-text or padding."""
    return [[3, 4, 2 + i % 10] for i in range(20)]


def run_ours(folder: Path, seed: int, num_steps: int) -> list[tuple[float, float]]:
    """Train; return (mean reward, KL per response) of each step."""
    import torch
    from transformers import AutoTokenizer

    from rayrlhf.metrics import MetricsLogger, read_jsonl
    from rayrlhf.rl import waiting
    from rayrlhf.rl.experience import Rollout, Rows
    from rayrlhf.rl.ppo import optimize
    from rayrlhf.rl.scoring import RewardWorker
    from rayrlhf.rl.setup import Prompts
    from rayrlhf.rl.state import restore
    from tests.rl.inline import InlineRay, inline_roles, inline_settings

    class Share(RewardWorker):
        def score(self, rollout: Rollout) -> Rows:
            shares = [torch.tensor([row.count(TOKEN) / len(row)]) for row in rollout.responses()]
            return Rows.of(list(range(len(rollout))), shares)

    # TRL's loop clips no gradient, and its AdamW is that of transformers.
    role = {
        "learning_rate": RATE,
        "min_learning_rate_ratio": 1.0,
        "adam_beta2": 0.999,
        "grad_clip": 1e9,
    }
    own = inline_settings(
        folder / "policy",
        folder / "policy",
        seed=seed,
        steps=num_steps,
        batch_size=BATCH,
        num_minibatches=1,
        max_response_tokens=RESPONSE,
        actor=role,
        critic=role,
        clip=CLIP,
        value_clip=CLIP,
        kl_coef=KL_COEF,
        missing_eos_penalty=0.0,
        sample_every=num_steps,
        save_every=num_steps,
    )
    waiting.ray = InlineRay  # type: ignore[attr-defined]
    roles = inline_roles(own, folder / "critic", reward=Share)
    tokenizer = AutoTokenizer.from_pretrained(folder / "policy")
    with tempfile.TemporaryDirectory() as stage:
        with MetricsLogger(stage) as log:
            optimize(
                own.ppo,
                roles,
                Prompts(prompts(), seed, BATCH),
                restore(own.ppo, None),
                log,
                tokenizer,
            )
        lines = read_jsonl(Path(stage) / "metrics.jsonl")
    return [(line["reward/score_mean"], line["kl/ref_per_response"]) for line in lines]


def run_trl(folder: Path, seed: int, num_steps: int) -> list[tuple[float, float]]:
    """Train with TRL; return the same."""
    import torch
    from datasets import Dataset
    from transformers import (
        AutoModelForCausalLM,
        AutoModelForSequenceClassification,
        AutoTokenizer,
        TrainerCallback,
    )
    from transformers.modeling_outputs import BaseModelOutput
    from trl.experimental.ppo import PPOConfig, PPOTrainer

    class Shares(torch.nn.Module):
        """The share of the token among the response up to each position."""

        def forward(self, input_ids: Any, **_: Any) -> BaseModelOutput:
            hits = (input_ids == TOKEN).float()
            hits[:, :PROMPT] = 0
            counted = torch.arange(input_ids.shape[1]) - PROMPT + 1
            shares = hits.cumsum(1) / counted.clamp(min=1)
            return BaseModelOutput(hidden_states=(shares.unsqueeze(-1),))

    class Reward(torch.nn.Module):
        base_model_prefix = "shares"

        def __init__(self) -> None:
            super().__init__()
            self.shares, self.score = Shares(), torch.nn.Identity()

    found: list[tuple[float, float]] = []

    class Watch(TrainerCallback):
        def on_log(self, *_: Any, logs: dict[str, float], **__: Any) -> None:
            if "objective/scores" in logs:
                found.append((logs["objective/scores"], logs["objective/kl"]))

    torch.set_num_threads(1)
    # TRL takes a padding token that the policy samples for the end of the response, free of charge,
    # so that its own is one more token, which is never sampled.
    tokenizer = AutoTokenizer.from_pretrained(folder / "policy", padding_side="left")
    tokenizer.add_special_tokens({"pad_token": "<unused>"})
    policy, reference = (AutoModelForCausalLM.from_pretrained(folder / "policy") for _ in range(2))
    value = AutoModelForSequenceClassification.from_pretrained(folder / "critic", num_labels=1)
    for model in (policy, reference, value):
        model.resize_token_embeddings(len(tokenizer))
        model.config.pad_token_id = tokenizer.pad_token_id
    for model in (policy, reference):
        model.generation_config.pad_token_id = tokenizer.pad_token_id
        model.register_forward_hook(without(tokenizer.pad_token_id))
    trainer = PPOTrainer(
        PPOConfig(
            output_dir=str(folder / "trl"),
            per_device_train_batch_size=BATCH,
            gradient_accumulation_steps=1,
            num_mini_batches=1,  # of several it accumulates the gradients into one update
            num_ppo_epochs=1,
            local_rollout_forward_batch_size=BATCH,
            total_episodes=BATCH * num_steps,
            response_length=RESPONSE,
            stop_token="eos",
            temperature=1.0,
            learning_rate=RATE,
            lr_scheduler_type="constant",
            kl_coef=KL_COEF,
            cliprange=CLIP,
            cliprange_value=CLIP,
            missing_eos_penalty=None,
            num_sample_generations=0,
            logging_steps=1,
            bf16=False,
            use_cpu=True,
            report_to="none",
            save_strategy="no",
            seed=seed,
        ),
        processing_class=tokenizer,
        model=policy,
        ref_model=reference,
        reward_model=Reward(),
        value_model=value,
        train_dataset=Dataset.from_list([{"input_ids": ids} for ids in prompts() * 8]),
        callbacks=[Watch()],
    )
    trainer.train()
    return found


def without(token: int) -> Any:
    """Return a hook after which a causal LM never samples `token`."""

    def hook(_: Any, __: Any, found: Any) -> Any:
        import torch

        found.logits = found.logits.index_fill(-1, torch.tensor([token]), -1e9)
        return found

    return hook


def in_a_process(python: Path | str, side: str, folder: Path, args: argparse.Namespace) -> Any:
    """Run all seeds of one side; return their curves."""
    command = [str(python), __file__, "--side", side, "--folder", str(folder)]
    command += ["--seeds", str(args.seeds), "--steps", str(args.steps)]
    ran = subprocess.run(command, stdout=subprocess.PIPE, text=True, check=False)
    if ran.returncode:
        raise SystemExit(f"{side} failed:\n{ran.stdout}")
    return json.loads(ran.stdout.splitlines()[-1])


def smooth(curve: list[tuple[float, float]]) -> list[tuple[float, float]]:
    """Return the running means of a curve's rewards and KLs."""
    width = min(SMOOTH, len(curve))
    windows = [curve[i : i + width] for i in range(len(curve) - width + 1)]
    return [tuple(statistics.mean(x) for x in zip(*w, strict=True)) for w in windows]  # type: ignore[misc]


def at_kl(curve: list[tuple[float, float]], kl: float) -> float:
    """Return the reward where a smooth curve is first `kl` nats from the start."""
    return next((reward for reward, far in curve if far >= kl), curve[-1][0])


def ratios(name: str, ours: list[float], theirs: list[float]) -> dict[str, float]:
    """Return the ratio of the means, and the bounds of its interval by the seeds' differences."""
    gaps = [mine - other for mine, other in zip(ours, theirs, strict=True)]
    wide = T_95[len(gaps)] * statistics.stdev(gaps) / math.sqrt(len(gaps))
    base, gap = statistics.mean(theirs), statistics.mean(gaps)
    bounds = {"": gap, "_low": gap - wide, "_high": gap + wide}
    return {f"ratio_{name}{end}": 1 + each / base for end, each in bounds.items()}


def compare(sides: dict[str, list[list[tuple[float, float]]]]) -> dict[str, float]:
    """Return the figures, ratios first."""
    curves = {side: [smooth(curve) for curve in runs] for side, runs in sides.items()}
    kl = min(max(far for _, far in curve) for runs in curves.values() for curve in runs)
    equal = {side: [at_kl(curve, kl) for curve in runs] for side, runs in curves.items()}
    last = {side: [curve[-1][0] for curve in runs] for side, runs in curves.items()}
    return {
        **ratios("at_equal_kl", equal["ours"], equal["trl"]),
        **ratios("after_all", last["ours"], last["trl"]),
        "kl": kl,
        "reward_at_equal_kl": statistics.mean(equal["ours"]),
        "reward_at_equal_kl_trl": statistics.mean(equal["trl"]),
        "reward_after_all": statistics.mean(last["ours"]),
        "reward_after_all_trl": statistics.mean(last["trl"]),
    }


def draw(sides: dict[str, list[list[tuple[float, float]]]], path: Path) -> None:
    """Draw reward over responses, and reward over KL."""
    from matplotlib.figure import Figure

    canvas = Figure(figsize=(10, 4), layout="constrained")
    left, right = canvas.subplots(1, 2, sharey=True)
    for (side, runs), colour in zip(sides.items(), ("tab:blue", "tab:orange"), strict=True):
        for number, curve in enumerate(map(smooth, runs)):
            rewards, distances = zip(*curve, strict=True)
            seen = [BATCH * (i + SMOOTH) for i in range(len(curve))]
            style: dict[str, Any] = {"color": colour, "alpha": 0.6, "linewidth": 1.2}
            left.plot(seen, rewards, label=side if number == 0 else None, **style)
            right.plot(distances, rewards, **style)
    left.set(xlabel="responses", ylabel="reward: share of one token")
    right.set(xlabel="KL to the start, nats per response")
    left.legend()
    canvas.suptitle(f"The same toy task, {len(runs)} seeds each, mean of {SMOOTH} steps")
    canvas.savefig(path, dpi=120)


def main() -> None:
    """Measure, and print as the last line a JSON object."""
    from rayrlhf.console import table
    from tests.benchmarks.ppo_vs_trl import PEER, peer_python

    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--seeds", type=int, default=5, choices=sorted(T_95))
    parser.add_argument("--steps", type=int, default=100)
    parser.add_argument("--plot", type=Path, default=Path("ppo_toy.png"))
    parser.add_argument("--peer-env", type=Path, default=Path(tempfile.gettempdir()) / PEER)
    parser.add_argument("--quick", action="store_true", help="a few steps, ours against ours")
    parser.add_argument("--side", choices=["ours", "trl"], help=argparse.SUPPRESS)
    parser.add_argument("--folder", type=Path, help=argparse.SUPPRESS)
    args = parser.parse_args()
    if args.side is not None:
        run = run_ours if args.side == "ours" else run_trl
        print(json.dumps([run(args.folder, seed, args.steps) for seed in range(args.seeds)]))
        return
    if args.quick:
        args.seeds, args.steps = 2, 8
    with tempfile.TemporaryDirectory() as temporary:
        folder = Path(temporary)
        prepare(folder)
        if args.quick:
            args.plot = folder / "plot.png"
        sides = {"ours": in_a_process(sys.executable, "ours", folder, args)}
        sides["trl"] = (
            sides["ours"]
            if args.quick
            else in_a_process(peer_python(args.peer_env), "trl", folder, args)
        )
        draw(sides, args.plot)
    figures = compare(sides)
    print(table(("figure", "value"), list(figures.items())))
    print(f"plot: {args.plot}")
    print(json.dumps({name: round(value, 4) for name, value in figures.items()}))


if __name__ == "__main__":
    main()
