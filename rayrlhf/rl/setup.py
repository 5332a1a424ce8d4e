"""What a run starts from: its prompts, and what every role has to know."""

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from transformers import AutoConfig, PreTrainedTokenizerFast

from rayrlhf import lineage
from rayrlhf.config import PPOConfig, Recipe, RecipeError, Role
from rayrlhf.data import builtin, encoded
from rayrlhf.data.datasets import batch_indices
from rayrlhf.data.tokenizer import check_vocabulary
from rayrlhf.rl.ranks import RoleSettings
from rayrlhf.training.checkpoint import STATE_DIR


@dataclass(frozen=True)
class Prompts:
    """The prompts as token ids; which ones a step takes is a pure function of the step."""

    ids: Sequence[list[int]]
    seed: int
    batch_size: int

    def take(self, step: int) -> list[list[int]]:
        """Return the P prompts of `step`."""
        chosen = batch_indices(
            seed=self.seed, step=step, batch_size=self.batch_size, num_records=len(self.ids)
        )
        return [self.ids[index] for index in chosen]


def load_prompts(recipe: Recipe, cfg: PPOConfig) -> Prompts:
    """Read and tokenize the prompts that leave room for a response."""
    room = recipe.model.max_length - cfg.max_response_tokens
    if room < 1:
        raise RecipeError(
            f"ppo.max_response_tokens={cfg.max_response_tokens} leaves no room for a "
            f"prompt within model.max_length={recipe.model.max_length}: set it lower"
        )
    return Prompts(encoded.prompts(recipe, cfg.prompts, room), recipe.seed, cfg.batch_size)


def role_settings(
    recipe: Recipe,
    cfg: PPOConfig,
    tokenizer: PreTrainedTokenizerFast,
    prompts: Prompts,
    checkpoint: Path | None,
) -> dict[Role, RoleSettings]:
    """Return what each role has to know.

    Raises RecipeError when a model is missing, or has fewer rows than the tokenizer has ids.
    """
    policy = _model(lineage.start_model(recipe, "ppo"), tokenizer)
    reward = _model(lineage.start_model(recipe, "ppo.reward"), tokenizer)
    states = {
        role: str(checkpoint / STATE_DIR / role) if checkpoint else None
        for role in ("actor", "critic")
    }
    models: dict[Role, str] = {
        "actor": str(checkpoint) if checkpoint else policy,
        "reference": policy,
        "reward": reward,
        "rollout": policy,
    }
    if cfg.has_critic:
        # Its state folder holds its weights, too; the actor's are the checkpoint itself.
        start = _model(lineage.start_model(recipe, "ppo.critic"), tokenizer)
        models["critic"] = states["critic"] or start
    assert isinstance(tokenizer.eos_token_id, int), "load_tokenizer checks it"
    pad_id = tokenizer.pad_token_id
    return {
        role: RoleSettings(
            ppo=cfg,
            model_path=path,
            state_path=states.get(role),
            tokenizer_path=str((recipe.path / "tokenizer").absolute()),
            corpus_path=str((recipe.path / "corpus").absolute()),
            documents_apart=recipe.pretrain is not None and recipe.pretrain.documents == "apart",
            actor_ranks=recipe.resources.actor.num_workers,
            max_length=int(max(encoded.token_counts(prompts.ids))) + cfg.max_response_tokens,
            pad_id=pad_id if isinstance(pad_id, int) else tokenizer.eos_token_id,
            eos_id=tokenizer.eos_token_id,
            seed=recipe.seed,
            num_threads=recipe.resources.role(role).num_threads,
            gpu_memory=recipe.resources.rollout_gpu_memory,
        )
        for role, path in models.items()
    }


def _model(name: str, tokenizer: PreTrainedTokenizerFast) -> str:
    """Return the absolute path or hub name of a model that exists and fits the tokenizer."""
    path = builtin.resolve(name)
    try:
        config = AutoConfig.from_pretrained(path)
    except (OSError, ValueError) as error:
        raise RecipeError(
            f"{path}: PPO starts from this model, but it cannot be read "
            f"({str(error).splitlines()[0]}): run the stage before, or correct "
            "model.path"
        ) from None
    check_vocabulary(tokenizer, config.vocab_size)
    return str(Path(path).absolute()) if Path(path).exists() else path
