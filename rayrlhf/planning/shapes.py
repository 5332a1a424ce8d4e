"""Sizes of models: from a recipe, from a folder's config.json, or by name, without a download.

The table has what the config.json of each release says. Its parameter counts are those of the
published weights, a shared output layer counted once (tests/planning/test_shapes.py).
"""

import json
import re
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from rayrlhf.config import Recipe, RecipeError
from rayrlhf.lineage import scoring_models, start_model


@dataclass(frozen=True)
class Shape:
    """A decoder-only transformer whose layers are all alike."""

    name: str
    hidden_size: int
    num_layers: int
    num_heads: int
    num_kv_heads: int
    head_size: int
    intermediate_size: int
    vocab_size: int
    tied: bool = False
    """Whether the output layer is the embedding."""
    gated: bool = True
    """SwiGLU with three matrices and RMSNorm; else GELU with two, LayerNorm and biases (GPT-2)."""
    qkv_bias: bool = False
    qk_norm: bool = False
    num_positions: int = 0
    """Rows of a table of learned positions; 0 for rotary ones."""

    @property
    def attention_width(self) -> int:
        """Heads times their size."""
        return self.num_heads * self.head_size

    @property
    def kv_width(self) -> int:
        """Entries of a token's key, and of its value, in one layer."""
        return self.num_kv_heads * self.head_size

    @property
    def linears(self) -> tuple[tuple[int, int], ...]:
        """(inputs, outputs) of the matrices of a layer."""
        d, a, k, f = (
            self.hidden_size,
            self.attention_width,
            self.kv_width,
            self.intermediate_size,
        )
        return ((d, a), (d, k), (d, k), (a, d), *([(d, f)] * (1 + self.gated)), (f, d))

    @property
    def layer_matrices(self) -> int:
        """Entries of the matrices of a layer."""
        return sum(rows * columns for rows, columns in self.linears)

    @property
    def layer_params(self) -> int:
        """All parameters of a layer."""
        d, a, k = self.hidden_size, self.attention_width, self.kv_width
        rest = 2 * d + 2 * self.head_size * self.qk_norm
        if self.gated:
            return self.layer_matrices + rest + (a + 2 * k) * self.qkv_bias
        biases = sum(columns for _, columns in self.linears)
        return self.layer_matrices + 2 * rest + biases

    @property
    def embedding_params(self) -> int:
        """Entries of the embedding, which are those of the output layer, too."""
        return self.vocab_size * self.hidden_size

    @property
    def num_params(self) -> int:
        """All parameters of the causal LM."""
        return self.trunk_params + (0 if self.tied else self.embedding_params)

    @property
    def trunk_params(self) -> int:
        """Parameters without the output layer, as in a model with a scalar head."""
        positions = self.num_positions * self.hidden_size
        last_norm = self.hidden_size * (1 if self.gated else 2)
        return self.num_layers * self.layer_params + self.embedding_params + positions + last_norm

    def params(self, *, scalar: bool) -> int:
        """Return the parameters of the causal LM, or of its trunk with a scalar head."""
        return self.trunk_params + self.hidden_size if scalar else self.num_params

    def kv_bytes_per_token(self, bytes_each: int) -> int:
        """Return what keys and values of a token take in all layers."""
        return 2 * self.num_layers * self.kv_width * bytes_each


def _llama(name: str, d: int, layers: int, heads: tuple[int, int, int], f: int, v: int) -> Shape:
    """Return a shape; `heads` are (query heads, key-value heads, size of a head)."""
    return Shape(name, d, layers, *heads, f, v)


def _tied(shape: Shape) -> Shape:
    return replace(shape, tied=True)


def _biased(shape: Shape) -> Shape:
    return replace(shape, qkv_bias=True)


def _normed(shape: Shape) -> Shape:
    return replace(shape, qk_norm=True)


KNOWN = {
    shape.name: shape
    for shape in (
        _tied(_llama("llama-3.2-1b", 2048, 16, (32, 8, 64), 8192, 128256)),
        _tied(_llama("llama-3.2-3b", 3072, 28, (24, 8, 128), 8192, 128256)),
        _llama("llama-3-8b", 4096, 32, (32, 8, 128), 14336, 128256),
        _llama("llama-3.1-8b", 4096, 32, (32, 8, 128), 14336, 128256),
        _llama("llama-3-70b", 8192, 80, (64, 8, 128), 28672, 128256),
        _llama("llama-3.1-70b", 8192, 80, (64, 8, 128), 28672, 128256),
        _llama("llama-3.3-70b", 8192, 80, (64, 8, 128), 28672, 128256),
        _llama("llama-3.1-405b", 16384, 126, (128, 8, 128), 53248, 128256),
        _tied(_biased(_llama("qwen2.5-0.5b", 896, 24, (14, 2, 64), 4864, 151936))),
        _tied(_biased(_llama("qwen2.5-1.5b", 1536, 28, (12, 2, 128), 8960, 151936))),
        _tied(_biased(_llama("qwen2.5-3b", 2048, 36, (16, 2, 128), 11008, 151936))),
        _biased(_llama("qwen2.5-7b", 3584, 28, (28, 4, 128), 18944, 152064)),
        _biased(_llama("qwen2.5-14b", 5120, 48, (40, 8, 128), 13824, 152064)),
        _biased(_llama("qwen2.5-32b", 5120, 64, (40, 8, 128), 27648, 152064)),
        _biased(_llama("qwen2.5-72b", 8192, 80, (64, 8, 128), 29568, 152064)),
        _tied(_normed(_llama("qwen3-0.6b", 1024, 28, (16, 8, 128), 3072, 151936))),
        _tied(_normed(_llama("qwen3-1.7b", 2048, 28, (16, 8, 128), 6144, 151936))),
        _tied(_normed(_llama("qwen3-4b", 2560, 36, (32, 8, 128), 9728, 151936))),
        _normed(_llama("qwen3-8b", 4096, 36, (32, 8, 128), 12288, 151936)),
        _normed(_llama("qwen3-14b", 5120, 40, (40, 8, 128), 17408, 151936)),
        _normed(_llama("qwen3-32b", 5120, 64, (64, 8, 128), 25600, 151936)),
        _llama("mistral-7b", 4096, 32, (32, 8, 128), 14336, 32768),
        _llama("mistral-nemo", 5120, 40, (32, 8, 128), 14336, 131072),
        _llama("mistral-large", 12288, 88, (96, 8, 128), 28672, 32768),
        _tied(_llama("smollm2-135m", 576, 30, (9, 3, 64), 1536, 49152)),
        _tied(_llama("smollm2-360m", 960, 32, (15, 5, 64), 2560, 49152)),
        _tied(_llama("smollm2-1.7b", 2048, 24, (32, 32, 64), 8192, 49152)),
    )
}
"""By the name of the release without its owner and what follows the size: `-Instruct`, `-v0.3`."""


def known(name: str) -> Shape | None:
    """Return the shape of a hub or `builtin:` name, None where the table has none.

    `meta-llama/Llama-3.1-8B-Instruct` and `Qwen/Qwen3-32B` are such names.
    """
    own = name.rpartition(":")[2].rpartition("/")[2].lower()
    own = own.removeprefix("meta-").replace("llama3", "llama-3")
    if re.search(r"-a\d+b", own):  # experts, of which a token sees a few
        return None
    fitting = [key for key in KNOWN if re.match(rf"{re.escape(key)}(?![\d.]*[a-z0-9.])", own)]
    return KNOWN[max(fitting, key=len)] if fitting else None


def of_config(name: str, tree: dict[str, Any]) -> Shape:
    """Return the shape that a config.json of transformers describes; raises RecipeError."""
    try:
        if tree["model_type"] == "gpt2":
            d, heads = tree["n_embd"], tree["n_head"]
            return Shape(
                name,
                d,
                tree["n_layer"],
                heads,
                heads,
                d // heads,
                tree.get("n_inner") or 4 * d,
                tree["vocab_size"],
                tied=tree.get("tie_word_embeddings", True),
                gated=False,
                num_positions=tree["n_positions"],
            )
        d, heads = tree["hidden_size"], tree["num_attention_heads"]
        return Shape(
            name,
            d,
            tree["num_hidden_layers"],
            heads,
            tree.get("num_key_value_heads") or heads,
            tree.get("head_dim") or d // heads,
            tree["intermediate_size"],
            tree["vocab_size"],
            tied=tree.get("tie_word_embeddings", False),
            qkv_bias=tree["model_type"] == "qwen2" or tree.get("attention_bias", False),
            qk_norm=tree["model_type"] == "qwen3",
        )
    except KeyError as error:
        raise RecipeError(
            f"{name}: config.json has no {error.args[0]}: plan knows Llama, Qwen, Mistral and "
            "GPT-2 models"
        ) from None


def named(name: str) -> Shape:
    """Return the shape of a folder, or of a model by its name; raises RecipeError."""
    file = Path(name) / "config.json"
    if file.is_file():
        return of_config(name, json.loads(file.read_text(encoding="utf-8")))
    found = known(name)
    if found is None:
        raise RecipeError(
            f"{name}: plan knows neither a folder nor a model of this name: download it and name "
            f"the folder, or take one of {', '.join(sorted(KNOWN))}"
        )
    return found


def policy(recipe: Recipe) -> Shape:
    """Return the shape of the policy: the recipe's `model`."""
    cfg = recipe.model
    if cfg.path is not None:
        return named(cfg.path)
    return Shape(
        recipe.name,
        cfg.hidden_size,
        cfg.num_layers,
        cfg.num_heads,
        cfg.num_kv_heads,
        cfg.hidden_size // cfg.num_heads,
        cfg.intermediate_size,
        recipe.tokenizer.vocab_size if recipe.tokenizer.path is None else _vocabulary(recipe),
        tied=cfg.tie_embeddings,
        gated=cfg.architecture == "llama",
        num_positions=0 if cfg.architecture == "llama" else cfg.max_length,
    )


def of_stage(recipe: Recipe, stage: str) -> Shape:
    """Return the shape of what a training stage trains: that of its start model."""
    section = recipe.training(stage)
    if section is not None and section.init is not None:
        return _of_model(recipe, section.init)
    return policy(recipe)


def scorers(recipe: Recipe) -> tuple[Shape, ...]:
    """Return the shape of each reward model that PPO's reward role holds."""
    return tuple(_of_model(recipe, name) for names in scoring_models(recipe) for name in names)


def critic(recipe: Recipe) -> Shape:
    """Return the shape of PPO's critic."""
    return _of_model(recipe, start_model(recipe, "ppo.critic"))


def _of_model(recipe: Recipe, name: str) -> Shape:
    """Return the shape of a model that may be one that the recipe is still to make."""
    own = Path(name)
    if recipe.path in own.parents and not (own / "config.json").is_file():
        made_by = own.relative_to(recipe.path).parts[0]
        return of_stage(recipe, made_by) if made_by == "reward" else policy(recipe)
    return named(name)


def _vocabulary(recipe: Recipe) -> int:
    """Return how many ids the tokenizer has that a model from scratch is made for."""
    path = recipe.tokenizer.path
    assert path is not None
    file = Path(path) / "tokenizer.json"
    if file.is_file():
        tree = json.loads(file.read_text(encoding="utf-8"))
        ids = [*tree["model"]["vocab"].values(), *(t["id"] for t in tree.get("added_tokens", []))]
        return max(ids) + 1
    found = known(path)
    if found is None:
        raise RecipeError(
            f"tokenizer.path={path}: plan cannot read how many tokens it has: name a local folder "
            "with a tokenizer.json"
        )
    return found.vocab_size
