"""What a role of PPO really holds: its worker alone in this process, on batches as planned.

    python -m tests.planning.measure RECIPE ROLE [key.sub=value ...]

The last line is the peak in bytes above what the imports take. Models have random weights.
"""

import os

os.environ["HF_HUB_OFFLINE"] = "1"
os.environ["TOKENIZERS_PARALLELISM"] = "false"

import subprocess
import sys
import tempfile
from pathlib import Path
from typing import Any

import torch

from rayrlhf.config import ModelConfig, Recipe, Role, load
from rayrlhf.models.causal_lm import build_causal_lm
from rayrlhf.models.scalar_head import ScalarHeadModel
from rayrlhf.planning import shapes
from rayrlhf.planning.devices import this_machine
from rayrlhf.planning.lengths import Lengths
from rayrlhf.planning.needs import of_ppo
from rayrlhf.planning.shapes import Shape
from rayrlhf.rl.experience import Experience, Rollout
from rayrlhf.rl.ranks import RoleSettings
from rayrlhf.rl.rollout import RolloutWorker
from rayrlhf.rl.scoring import RewardWorker
from rayrlhf.rl.workers import ActorWorker, CriticWorker, ReferenceWorker

ROOT = Path(__file__).parents[2]
STEPS = 2
"""The optimizer has its moments from the second on."""


def peak_of(recipe: Path, role: Role, *overrides: str, timeout_s: float = 600) -> int:
    """Return the peak, in bytes, of a role in a process of its own."""
    done = subprocess.run(
        [sys.executable, "-m", "tests.planning.measure", str(recipe), role, *overrides],
        cwd=ROOT,
        capture_output=True,
        text=True,
        timeout=timeout_s,
        check=False,
    )
    assert done.returncode == 0, done.stderr[-3000:]
    return int(done.stdout.splitlines()[-1])


def write_model(shape: Shape, folder: Path, *, max_length: int) -> None:
    """Write a causal LM of this shape with random weights."""
    cfg = ModelConfig(
        hidden_size=shape.hidden_size,
        num_layers=shape.num_layers,
        num_heads=shape.num_heads,
        num_kv_heads=shape.num_kv_heads,
        intermediate_size=shape.intermediate_size,
        max_length=max_length,
        tie_embeddings=shape.tied,
    )
    model = build_causal_lm(
        cfg, vocab_size=shape.vocab_size, eos_token_id=0, pad_token_id=1, seed=0
    )
    model.save_pretrained(folder)


def rollout_of(recipe: Recipe, found: Lengths, vocab_size: int, seed: int) -> Rollout:
    """Return a rollout with the planned lengths, in a random order."""
    assert recipe.ppo is not None
    generator = torch.Generator().manual_seed(seed)
    count = recipe.ppo.num_responses
    order = torch.randperm(count, generator=generator)
    responses = torch.tensor(found.responses(count))[order]
    prompts = torch.full((count,), round(found.prompt))

    def ids(lengths: torch.Tensor) -> torch.Tensor:
        return torch.randint(2, vocab_size, (int(lengths.sum()),), generator=generator)

    return Rollout(
        ids(prompts),
        prompts,
        ids(responses),
        responses,
        -torch.rand(int(responses.sum()), generator=generator),
        torch.zeros(count, dtype=torch.bool),
        torch.zeros(count, dtype=torch.int64),
        torch.zeros(count, dtype=torch.int64),
    )


def work(worker: Any, role: Role, rollout: Rollout, step: int) -> None:
    """Do a step's part of a role."""
    count = int(rollout.response_lengths.sum())
    if role == "rollout":
        prompts = rollout.prompt_ids.split(rollout.prompt_lengths.tolist())
        worker.generate([prompt.tolist() for prompt in prompts], 0, step)
    elif role == "reward":
        worker.score(rollout)
    elif role == "critic":
        worker.values(rollout, step)
    else:
        worker.log_probs(rollout, step)
    if role in ("actor", "critic"):
        targets = torch.randn(count)
        learned = Experience(
            rollout,
            old_log_probs=rollout.log_probs,
            advantages=targets,
            old_values=torch.zeros(count),
            returns=targets,
        )
        worker.update(learned, step)


def peak() -> int:
    """Return the most that this program has held; getrusage has that of who started it, too."""
    lines = Path("/proc/self/status").read_text().splitlines()
    return next(int(line.split()[1]) for line in lines if line.startswith("VmHWM")) * 1024


def main(path: str, role: Role, *overrides: str) -> int:
    recipe = load(path, overrides)
    cfg = recipe.ppo
    assert cfg is not None
    _, found = of_ppo(recipe, this_machine().device)
    shape = shapes.policy(recipe)
    kinds = {
        "actor": ActorWorker,
        "critic": CriticWorker,
        "reference": ReferenceWorker,
        "reward": RewardWorker,
        "rollout": RolloutWorker,
    }
    with tempfile.TemporaryDirectory() as place:
        # Made in another process: what it takes here would count.
        made = [sys.executable, "-c", _MAKE, path, role, place, *overrides]
        subprocess.run(made, cwd=ROOT, check=True, stdout=subprocess.DEVNULL)
        settings = RoleSettings(
            ppo=cfg,
            model_path=place,
            state_path=None,
            adapter_path=None,
            tokenizer_path="",
            corpus_path="",
            documents_apart=False,
            actor_ranks=recipe.resources.actor.num_workers,
            max_length=round(found.prompt) + cfg.max_response_tokens,
            pad_id=1,
            eos_id=0,
            seed=0,
            num_threads=recipe.resources.role(role).num_threads,
            zero_head=True,
        )
        import transformers.models.llama.modeling_llama  # noqa: F401

        if role == "rollout":
            from vllm import LLM  # noqa: F401
        imported = peak()
        worker = kinds[role](settings)
        if isinstance(worker, ActorWorker | CriticWorker):
            worker.start(("127.0.0.1", 0))
        else:
            worker.start()
        for step in range(STEPS):
            work(worker, role, rollout_of(recipe, found, shape.vocab_size, step), step)
        return peak() - imported


def make(path: str, role: str, place: str, *overrides: str) -> None:
    """Write the model that a role starts from."""
    recipe = load(path, overrides)
    write_model(shapes.policy(recipe), Path(place), max_length=recipe.model.max_length)
    if role == "reward":
        ScalarHeadModel.from_causal_lm(place).save_pretrained(place)


_MAKE = "import sys; from tests.planning.measure import make; make(*sys.argv[1:])"

if __name__ == "__main__":
    print(main(*sys.argv[1:]))  # type: ignore[arg-type]
