"""The tokenizer and the model that everything starts from."""

from typing import Annotated, Literal, Self

from pydantic import Field, model_validator

from rayrlhf.config.section import Positive, Section


class TokenizerConfig(Section):
    """A trained byte-level BPE, or an existing tokenizer."""

    path: str | None = None
    """Folder or hub name of an existing tokenizer; None trains one on the corpus."""
    vocab_size: Annotated[int, Field(ge=262)] = 4096
    """Size of the trained vocabulary: 256 bytes, the special tokens, and merges."""


Size = Literal[
    "gpt3-125m",
    "gpt3-350m",
    "gpt3-760m",
    "gpt3-1.3b",
    "gpt3-2.7b",
    "gpt3-6.7b",
    "gpt3-13b",
    "gpt3-175b",
    "llama-7b",
    "llama-13b",
    "llama-33b",
    "llama-65b",
]


class ModelConfig(Section):
    """An existing causal LM (`path`), or the shape of one trained from scratch."""

    path: str | None = None
    """Folder, hub name or `builtin:` name of an existing model; None starts from scratch."""
    size: Size | None = None
    """Fills in what the recipe does not set of the model's shape and of its pretraining, as in the
    paper (config/sizes.py)."""
    architecture: Literal["llama", "gpt2"] = "llama"
    """Class of the model from scratch: RMSNorm, SwiGLU and rotary positions, or GPT-2's LayerNorm,
    GELU, biases and learned positions."""
    hidden_size: Positive = 192
    num_layers: Positive = 4
    num_heads: Positive = 6
    num_kv_heads: Positive = 6
    intermediate_size: Positive = 512
    max_length: Positive = 128
    """Longest sequence in tokens, prompt and response together."""
    tie_embeddings: bool = True
    """Share the input embedding with the output layer."""

    @model_validator(mode="after")
    def _heads_divide(self) -> Self:
        if self.hidden_size % self.num_heads:
            raise ValueError(
                f"model.hidden_size={self.hidden_size} is not a multiple of "
                f"model.num_heads={self.num_heads}: set hidden_size="
                f"{max(1, self.hidden_size // self.num_heads) * self.num_heads}"
            )
        if self.num_heads % self.num_kv_heads:
            raise ValueError(
                f"model.num_heads={self.num_heads} is not a multiple of "
                f"model.num_kv_heads={self.num_kv_heads}: set num_kv_heads={self.num_heads}"
            )
        if self.architecture == "gpt2" and self.num_kv_heads != self.num_heads:
            raise ValueError(
                f"model.num_kv_heads={self.num_kv_heads}: GPT-2 has as many as "
                f"model.num_heads={self.num_heads}: set num_kv_heads={self.num_heads}"
            )
        if self.path is not None and self.size is not None:
            raise ValueError(
                f"model.path={self.path} has a size of its own: take out model.size={self.size}"
            )
        return self
