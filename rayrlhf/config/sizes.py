"""Sizes of GPT-3 and LLaMA: `model.size` fills in what a recipe does not set.

    gpt3-*   arXiv:2005.14165, table 2.1 (shape, batch, learning rate) and appendix B (AdamW,
             clipping, warm-up, cosine, growing batch)
    llama-*  arXiv:2302.13971, table 2 (shape, batch, learning rate) and section 2.3 (AdamW,
             clipping, warm-up, cosine)

Batches there are in tokens, here in sequences: 0.5M, 1M, 2M and 4M are taken as powers of two, 3.2M
as 1,600 sequences of 2,048. What the papers leave open, and what is not taken from them:

- GPT-3's batch grows over "the first 4-12 billion tokens, depending on the model size"; the sizes
  between the ends are spaced here by batch: 4, 6, 8 and 12 billion.
- GPT-3 1.3B has 24 heads of 128 in a width of 2,048 there, which does not divide: here 16 of 128.
  13B has a width of 5,140 there, which is not 40 heads of 128: here 5,120, which is.
- GPT-3 is GPT-2 with attention that is dense and locally banded in turn; here all of it is dense.
- LLaMA gives no epsilon of Adam: here that of GPT-3. Its feed-forward widths are those of the
  published weights: 8/3 of the width, rounded up to a multiple of 256.
- The data are the recipe's own, and so is the tokenizer unless it is trained, with as many ids.
"""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

CONTEXT = 2048
"""Tokens of a row in both papers."""
START_TOKENS = 32_768
"""Of GPT-3's first batches (32k)."""


@dataclass(frozen=True)
class _Size:
    """A row of a paper's table."""

    layers: int
    width: int
    heads: int
    batch_tokens: int
    learning_rate: float
    ramp_tokens: int | None = None
    feed_forward: int = 0


_HALF_M, _M = 2**19, 2**20
_B = 10**9
GPT3 = {
    "gpt3-125m": _Size(12, 768, 12, _HALF_M, 6.0e-4, 4 * _B),
    "gpt3-350m": _Size(24, 1024, 16, _HALF_M, 3.0e-4, 4 * _B),
    "gpt3-760m": _Size(24, 1536, 16, _HALF_M, 2.5e-4, 4 * _B),
    "gpt3-1.3b": _Size(24, 2048, 16, _M, 2.0e-4, 6 * _B),
    "gpt3-2.7b": _Size(32, 2560, 32, _M, 1.6e-4, 6 * _B),
    "gpt3-6.7b": _Size(32, 4096, 32, 2 * _M, 1.2e-4, 8 * _B),
    "gpt3-13b": _Size(40, 5120, 40, 2 * _M, 1.0e-4, 8 * _B),
    "gpt3-175b": _Size(96, 12288, 96, 1600 * CONTEXT, 0.6e-4, 12 * _B),
}
LLAMA = {
    "llama-7b": _Size(32, 4096, 32, 4 * _M, 3.0e-4, feed_forward=11008),
    "llama-13b": _Size(40, 5120, 40, 4 * _M, 3.0e-4, feed_forward=13824),
    "llama-33b": _Size(60, 6656, 52, 4 * _M, 1.5e-4, feed_forward=17920),
    "llama-65b": _Size(80, 8192, 64, 4 * _M, 1.5e-4, feed_forward=22016),
}
SIZES = GPT3 | LLAMA

_COMMON = {
    "min_learning_rate_ratio": 0.1,
    "adam_beta1": 0.9,
    "adam_beta2": 0.95,
    "adam_eps": 1e-8,
    "weight_decay": 0.1,
    "grad_clip": 1.0,
    "dropout": 0.0,
}
_TOGETHER = (
    {"warmup_ratio", "warmup_steps", "warmup_tokens"},
    {"batch_size", "batch_size_start", "batch_ramp_tokens"},
)
"""Keys that say one thing: with one of them in the recipe, none of the others is filled in."""


def fill(tree: Mapping[str, Any]) -> dict[str, Any]:
    """Return a recipe's plain data with the settings of its `model.size` where it has none.

    A recipe without a size, or one that is not in the table, comes back as it is.
    """
    model = tree.get("model")
    if not isinstance(model, Mapping) or not isinstance(name := model.get("size"), str):
        return dict(tree)
    if name not in SIZES:
        return dict(tree)
    filled = dict(tree)
    filled["model"] = _shape(name) | dict(model)
    context = filled["model"]["max_length"]
    if isinstance(tree.get("corpus"), Mapping):
        filled["corpus"] = {"row_length": context} | dict(tree["corpus"])
        context = filled["corpus"]["row_length"]
    tokenizer = tree.get("tokenizer", {})
    if isinstance(tokenizer, Mapping) and tokenizer.get("path") is None:
        vocab_size = 50_257 if name in GPT3 else 32_000
        filled["tokenizer"] = {"vocab_size": vocab_size} | dict(tokenizer)
    if isinstance(tree.get("pretrain"), Mapping) and isinstance(context, int) and context > 0:
        own = dict(tree["pretrain"])
        taken: set[str] = set()
        for keys in _TOGETHER:
            taken |= keys if keys & own.keys() else set()
        settings = _pretraining(name, context)
        filled["pretrain"] = {k: v for k, v in settings.items() if k not in taken} | own
    return filled


def _shape(name: str) -> dict[str, Any]:
    size = SIZES[name]
    return {
        "architecture": "gpt2" if name in GPT3 else "llama",
        "hidden_size": size.width,
        "num_layers": size.layers,
        "num_heads": size.heads,
        "num_kv_heads": size.heads,
        "intermediate_size": size.feed_forward or 4 * size.width,
        "max_length": CONTEXT,
        "tie_embeddings": name in GPT3,
    }


def _pretraining(name: str, row_length: int) -> dict[str, Any]:
    size = SIZES[name]
    settings: dict[str, Any] = {
        **_COMMON,
        "learning_rate": size.learning_rate,
        "batch_size": max(1, round(size.batch_tokens / row_length)),
        "loss_spike": {},
    }
    if size.ramp_tokens is None:
        return settings | {"warmup_steps": 2000}
    return settings | {
        "warmup_tokens": 375_000_000,
        "decay_tokens": 260 * _B,
        "batch_size_start": max(1, round(START_TOKENS / row_length)),
        "batch_ramp_tokens": size.ramp_tokens,
    }
