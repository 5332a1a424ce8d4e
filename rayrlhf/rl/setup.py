"""What a run starts from: its prompts, and what every role has to know."""

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

import torch
from transformers import AutoConfig, AutoTokenizer, PreTrainedTokenizerFast

from rayrlhf import lineage
from rayrlhf.config import PPOConfig, Recipe, RecipeError, Role, key_of
from rayrlhf.data import builtin, encoded
from rayrlhf.data.datasets import batch_indices
from rayrlhf.data.tokenizer import check_vocabulary
from rayrlhf.external.functions import place_of
from rayrlhf.models import lora
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


@contextmanager
def single_threaded() -> Iterator[None]:
    """Let PyTorch compute with one thread in this process meanwhile.

    The controller's tensors are small, and several threads spin beside the roles that need the
    cores.
    """
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        yield
    finally:
        torch.set_num_threads(before)


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

    Raises RecipeError when a model is missing, or has fewer rows than the tokenizer has ids, and
    when it, or what was saved, does not fit the adapters that are asked for.
    """
    policy = _model(lineage.start_model(recipe, "ppo"), tokenizer)
    scorers = reward_places(recipe, tokenizer)
    states = {
        role: str(checkpoint / STATE_DIR / role) if checkpoint else None
        for role in ("actor", "critic")
    }
    models: dict[Role, str] = {
        "reference": policy,
        "reward": policy if cfg.rewards else scorers[0][0],  # its rewards name their own
        "rollout": policy,
    }
    adapters: dict[Role, str | None] = {}
    # The actor's weights are the checkpoint itself, the critic's are in its state folder.
    start = policy if cfg.init is None else _model(cfg.init, tokenizer)
    models["actor"], adapters["actor"] = trained_model(
        "actor", cfg, start, str(checkpoint) if checkpoint else None
    )
    zero_head = False
    if cfg.has_critic:
        start = _model(lineage.start_model(recipe, "ppo.critic"), tokenizer)
        models["critic"], adapters["critic"] = trained_model("critic", cfg, start, states["critic"])
        zero_head = models["critic"] == start and not any(lineage.scoring_models(recipe))
    assert isinstance(tokenizer.eos_token_id, int), "load_tokenizer checks it"
    pad_id = tokenizer.pad_token_id
    return {
        role: RoleSettings(
            ppo=cfg,
            model_path=path,
            state_path=states.get(role),
            adapter_path=adapters.get(role),
            tokenizer_path=str((recipe.path / "tokenizer").absolute()),
            rewards=scorers if cfg.rewards else (),
            zero_head=role == "critic" and zero_head,
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


def reward_places(
    recipe: Recipe, tokenizer: PreTrainedTokenizerFast
) -> tuple[tuple[str, ...], ...]:
    """Return where each reward is: folders of its models, its function, or its URL.

    Without `ppo.rewards`: the run's own reward model. Raises RecipeError as `role_settings` does.
    """
    models = lineage.scoring_models(recipe)
    if recipe.ppo is None or not recipe.ppo.rewards:
        return tuple(tuple(_model(name, tokenizer) for name in names) for names in models)
    places: list[tuple[str, ...]] = []
    for index, (reward, names) in enumerate(zip(recipe.ppo.rewards, models, strict=True)):
        key = key_of(index, reward)
        if reward.function is not None:
            places.append((place_of(reward.function),))
        elif reward.url is not None:
            places.append((reward.url,))
        elif reward.members is not None and len(names) < 2:
            raise RecipeError(
                f"{key}: an ensemble has two models or more, and there is {len(names)} here: name "
                "the folder `reward` of a run with reward.num_members=2 or above, or set model"
            )
        else:
            places.append(tuple(_scorer(key, name, tokenizer) for name in names))
    return tuple(places)


def _scorer(key: str, name: str, tokenizer: PreTrainedTokenizerFast) -> str:
    """Return `_model` of a reward model that reads the policy's token ids as they are meant."""
    try:
        path = _model(name, tokenizer)
    except RecipeError as error:
        raise RecipeError(f"{key}: {error}") from None
    try:
        theirs = AutoTokenizer.from_pretrained(path).get_vocab()
    except (OSError, ValueError):  # it says nothing of its tokenizer
        return path
    other = [
        token for token, number in tokenizer.get_vocab().items() if theirs.get(token) != number
    ]
    if other:
        raise RecipeError(
            f"{key}: {path} has another tokenizer than the policy ({len(other)} tokens differ, "
            f"{other[0]!r} first), whose token ids it is given: serve it, and set url"
        )
    return path


def trained_model(
    role: Role, cfg: PPOConfig, start: str, saved: str | None
) -> tuple[str, str | None]:
    """Return where the weights of a trained role are, and its adapters if there are any yet.

    `saved` is what a checkpoint has of it. With adapters the weights are those of the start model,
    and what was saved beside them is merged with these. Raises RecipeError as `role_settings` does.
    """
    adapter = cfg.lora_of(role)
    if adapter is not None:
        lora.check_adapter(start, adapter, saved=Path(saved) if saved else None)
        return start, saved
    if saved is not None and lora.has_saved(Path(saved)):
        raise RecipeError(
            f"{saved}: the {role} was trained with lora, and this run has none: set ppo.lora, or "
            "start afresh in another run_dir"
        )
    return saved or start, None


def _model(name: str, tokenizer: PreTrainedTokenizerFast) -> str:
    """Return the absolute path or hub name of a model that exists and fits the tokenizer."""
    path = builtin.resolve(name)
    try:
        config = AutoConfig.from_pretrained(path)
    except (OSError, ValueError) as error:
        raise RecipeError(
            f"{path}: PPO needs this model, but it cannot be read "
            f"({str(error).splitlines()[0]}): run the stage before, or correct the path"
        ) from None
    check_vocabulary(tokenizer, config.vocab_size)
    return str(Path(path).absolute()) if Path(path).exists() else path
