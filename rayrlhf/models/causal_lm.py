"""Causal language models: build, load, save, and the log-probs of tokens.

`CausalLMModel` is what a training backend wraps. Its forward returns log-probs, not logits, so
that everything that touches parameters happens inside the wrapper (DDP averages gradients and
ZeRO-3 gathers weights only there), and so that the output layer is computed only where a
log-prob is wanted: PPO asks for response tokens alone, which saves most of the (b, S, V) logits.
"""

from collections.abc import Iterable, Iterator, Mapping
from pathlib import Path
from typing import Any, Self

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from transformers import (
    AutoModelForCausalLM,
    GPT2Config,
    LlamaConfig,
    PreTrainedConfig,
    PreTrainedModel,
)

from rayrlhf.config import ModelConfig, RecipeError, StageConfig
from rayrlhf.models import lora
from rayrlhf.models.folder import (
    LOGIT_TRANSFORMS,
    add_residual_dropout,
    checkpoint_weights,
    load_config,
    load_weights,
    run_trunk,
    save_folder,
)
from rayrlhf.models.neftune import EmbeddingNoise, document_lengths
from rayrlhf.models.output_head import OutputHead
from rayrlhf.models.sequence import WHOLE, WholeSequence

INIT_STD = 0.02
"""Of every matrix (GPT-2)."""
RESIDUAL_MATRICES = ("o_proj.weight", "down_proj.weight", "c_proj.weight")
"""Names of those that write to the residual stream, in Llama and in GPT-2."""


class CausalLMModel(nn.Module):
    """A Hugging Face causal LM, `.hf`, that maps tokens to their log-probs."""

    def __init__(self, hf: PreTrainedModel) -> None:
        super().__init__()
        settings = hf.config.to_dict()
        transforms = [name for name in LOGIT_TRANSFORMS if settings.get(name) not in (None, 1.0)]
        if transforms:
            raise RecipeError(
                f"{type(hf).__name__} changes its logits by {transforms[0]}, which is not "
                "supported: use a Llama, Qwen, Mistral or GPT-2 model"
            )
        hf.set_output_embeddings(OutputHead(hf.get_output_embeddings()))
        self.hf = hf
        self.sequence = WHOLE
        self.noise: EmbeddingNoise | None = None

    @classmethod
    def from_pretrained(
        cls, path: str | Path, *, dropout: float = 0.0, dtype: torch.dtype = torch.float32
    ) -> Self:
        """Load an HF folder; see `load_causal_lm`."""
        return cls(load_causal_lm(path, dropout=dropout, dtype=dtype))

    @classmethod
    def to_finetune(
        cls, start: str | Path, cfg: StageConfig, *, checkpoint: Path | None, seed: int
    ) -> Self:
        """Load the model that a stage starts from, with what `cfg` adds, or that of `checkpoint`.

        Under `cfg.lora` it is always the start model, with new adapters or those of `checkpoint`.
        """
        if cfg.lora is None:
            return cls.from_pretrained(checkpoint or start, dropout=cfg.dropout)
        hf = load_causal_lm(start, dropout=cfg.dropout, quantization=lora.quantization(cfg))
        model = cls(hf)
        lora.add_adapter(hf, cfg.lora, base=str(start), seed=seed, folder=checkpoint)
        return model

    @property
    def config(self) -> PreTrainedConfig:
        """The config of the HF model."""
        return self.hf.config

    def forward(
        self,
        input_ids: Tensor,
        attention_mask: Tensor,
        *,
        positions: Tensor | None = None,
        temperature: float = 1.0,
        with_entropy: bool = False,
    ) -> Any:
        """Return the log-probs, or with_entropy (log-probs, entropies); see `token_log_probs`."""
        if self.noise is not None:
            self.noise.lengths = self.sequence.own(document_lengths(attention_mask))
        log_probs, entropies = _token_statistics(
            self.hf,
            self.sequence,
            input_ids,
            attention_mask,
            positions,
            temperature=temperature,
            with_entropy=with_entropy,
        )
        return (log_probs, entropies) if with_entropy else log_probs

    def add_noise(self, alpha: float) -> None:
        """Add NEFTune's noise to the embeddings in train mode, from now on; see neftune.py."""
        self.noise = EmbeddingNoise(alpha)
        self.hf.get_input_embeddings().register_forward_hook(self.noise)

    def generate(self, **settings: Any) -> Any:
        """Return what the HF model generates; FSDP gathers the weights for calls of this method."""
        return self.hf.generate(**settings)

    def save_pretrained(
        self, folder: str | Path, state_dict: Mapping[str, Tensor] | None = None
    ) -> None:
        """Write an HF folder, without tokenizer, that transformers and vLLM load.

        `state_dict` holds the full weights where training keeps them elsewhere, keyed like
        `self.named_parameters()` (`hf.model...`) or like the HF model's; a tied head may be
        there or not. Raises ValueError unless it is complete.
        """
        save_folder(self.hf, folder, state_dict)


def build_causal_lm(
    cfg: ModelConfig,
    *,
    vocab_size: int,
    eos_token_id: int,
    pad_token_id: int,
    seed: int,
    dropout: float = 0.0,
) -> PreTrainedModel:
    """Build a model in float32 with random weights, the same for a seed.

    Matrices are normal(0, 0.02), those that write to the residual stream divided by sqrt(2 layers)
    (GPT-2). The global random state stays as it was. `dropout` as in `load_causal_lm`.
    """
    config = _config(cfg, vocab_size, dropout)
    config.update(
        {"bos_token_id": None, "eos_token_id": eos_token_id, "pad_token_id": pad_token_id}
    )
    with torch.random.fork_rng(devices=[]):
        model = AutoModelForCausalLM.from_config(config, dtype=torch.float32)
    model.get_input_embeddings().padding_idx = None
    generator = torch.Generator().manual_seed(seed)
    residual_std = INIT_STD / (2 * cfg.num_layers) ** 0.5
    for name, parameter in model.named_parameters():
        if name.endswith(".bias"):
            nn.init.zeros_(parameter)
        elif parameter.ndim < 2:
            nn.init.ones_(parameter)
        else:
            writes_residual = name.endswith(RESIDUAL_MATRICES)
            std = residual_std if writes_residual else INIT_STD
            nn.init.normal_(parameter, std=std, generator=generator)
    add_residual_dropout(model, dropout)
    return model.eval()


def parameter_shapes(cfg: ModelConfig, *, vocab_size: int) -> dict[str, tuple[int, ...]]:
    """Return the parameters' shapes of `build_causal_lm`'s model, shared ones once."""
    with torch.device("meta"):
        model = AutoModelForCausalLM.from_config(_config(cfg, vocab_size))
    return {name: tuple(parameter.shape) for name, parameter in model.named_parameters()}


def _config(cfg: ModelConfig, vocab_size: int, dropout: float = 0.0) -> PreTrainedConfig:
    config = _gpt2_config(cfg, dropout) if cfg.architecture == "gpt2" else _llama_config(cfg)
    config.update({"vocab_size": vocab_size, "tie_word_embeddings": cfg.tie_embeddings})
    return config


def _llama_config(cfg: ModelConfig) -> PreTrainedConfig:
    return LlamaConfig(
        hidden_size=cfg.hidden_size,
        intermediate_size=cfg.intermediate_size,
        num_hidden_layers=cfg.num_layers,
        num_attention_heads=cfg.num_heads,
        num_key_value_heads=cfg.num_kv_heads,
        max_position_embeddings=cfg.max_length,
    )


def _gpt2_config(cfg: ModelConfig, dropout: float) -> PreTrainedConfig:
    return GPT2Config(
        n_embd=cfg.hidden_size,
        n_inner=cfg.intermediate_size,
        n_layer=cfg.num_layers,
        n_head=cfg.num_heads,
        n_positions=cfg.max_length,
        resid_pdrop=dropout,
        embd_pdrop=0.0,
        attn_pdrop=0.0,
    )


def load_causal_lm(
    path: str | Path,
    *,
    dropout: float = 0.0,
    dtype: torch.dtype = torch.float32,
    quantization: Mapping[str, Any] | None = None,
) -> PreTrainedModel:
    """Load an HF causal LM in eval mode, on the CPU; every dropout is 0 but `dropout`.

    `dropout` acts in train mode on what attention and MLP add to the residual stream
    (InstructGPT section 3.5). Raises RecipeError for a path without a complete causal LM.
    """
    config = load_config(path, dropout=dropout)
    model = load_weights(AutoModelForCausalLM, path, config, dtype=dtype, quantization=quantization)
    add_residual_dropout(model, dropout)
    return model


def token_log_probs(
    model: PreTrainedModel,
    input_ids: Tensor,
    attention_mask: Tensor,
    *,
    positions: Tensor | None = None,
    temperature: float = 1.0,
) -> Tensor:
    """Return log p(token t | tokens before t), nats, float32, under logits / temperature.

    `input_ids` and `attention_mask` are (b, S): 0 on padding, at either end, 1 on tokens; numbers
    1, 2, ... on the documents of a packed row keep these apart. `positions` says which tokens:

    - None: all that have one before them in their run; result (b, S), 0 elsewhere (column 0 too);
    - bool (b, S): those, of the above; result (b, S), 0 elsewhere;
    - int64 (b, T): columns of tokens, from 1 on; result (b, T). Repeated ones cost nothing.
    """
    return _token_statistics(
        model, WHOLE, input_ids, attention_mask, positions, temperature=temperature
    )[0]


def named_weights(
    model: CausalLMModel, weights: Iterable[tuple[str, Tensor]] | None = None
) -> Iterator[tuple[str, Tensor]]:
    """Yield (HF checkpoint name, tensor) for vLLM's weight loader; a tied head is left out.

    `weights` are what a backend gathers, named like `model.named_parameters()`; None takes the
    model's own tensors, detached, not copied.
    """
    return checkpoint_weights(model.hf, weights)


def _token_statistics(
    model: PreTrainedModel,
    sequence: WholeSequence,
    input_ids: Tensor,
    attention_mask: Tensor,
    positions: Tensor | None,
    **options: Any,
) -> tuple[Tensor, Tensor]:
    """Return log-probs and entropies (0 unless asked for), shaped as `positions` says.

    A token is computed where the token before it is, which may be on another rank than its own.
    `options` are the head's temperature and with_entropy.
    """
    wanted = _places(attention_mask, positions)  # (b, S)
    wanted = sequence.own(F.pad(wanted[:, 1:], (0, 1)))  # (b, S') of the token after each
    following = sequence.own(F.pad(input_ids[:, 1:], (0, 1)))  # (b, S')
    # Before the layers: their number has to be known, for which the CPU waits for the GPU.
    places = wanted.flatten().nonzero().squeeze(1)  # (n,) in (b * S')
    hidden = run_trunk(model, input_ids, attention_mask, sequence)  # (b, S', d)
    # index_select: its backward adds whole rows, a boolean index adds element by element.
    states = hidden.flatten(0, 1).index_select(0, places)  # (n, d) before each token
    tokens = following.flatten()[places]
    head = model.get_output_embeddings()
    if not isinstance(head, OutputHead):
        head = OutputHead(head)
    log_probs, entropies = head(states, tokens, **options)

    def spread(flat: Tensor) -> Tensor:
        parts = flat.new_zeros(wanted.numel()).index_copy(0, places, flat).view_as(wanted)
        padded = F.pad(sequence.join(parts, input_ids.shape[1])[:, :-1], (1, 0))  # (b, S)
        if positions is None or positions.dtype == torch.bool:
            return padded
        return padded.gather(1, positions)  # (b, T)

    return spread(log_probs), spread(entropies)


def _places(attention_mask: Tensor, positions: Tensor | None) -> Tensor:
    """Return a bool (b, S): tokens to compute, each with one of the same run before it."""
    has_previous = torch.zeros_like(attention_mask, dtype=torch.bool)
    has_previous[:, 1:] = (attention_mask[:, 1:] > 0) & (
        attention_mask[:, 1:] == attention_mask[:, :-1]
    )
    if positions is None:
        return has_previous
    if positions.dtype == torch.bool:
        return has_previous & positions
    return has_previous & torch.zeros_like(has_previous).scatter(1, positions, True)
