"""Hugging Face folders in and out: every weight accounted for, dropout only where it is asked for.

Works for decoder-only models of transformers whose layers are called `self_attn` and `mlp` (Llama,
Qwen, Mistral and their kin) and for GPT-2.
"""

from collections.abc import Iterable, Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from transformers import AutoConfig, PreTrainedConfig, PreTrainedModel
from transformers.utils import logging

from rayrlhf.config import RecipeError
from rayrlhf.models import lora
from rayrlhf.models.sequence import WHOLE, WholeSequence

PREFIX = "hf."
"""Of the parameter names in both wrappers of this package, which hold the HF model as `.hf`."""

SUB_LAYERS = ("self_attn", "mlp")
"""What adds to the residual stream in a layer of a Llama-like model."""

LOGIT_TRANSFORMS = ("final_logit_softcapping", "logit_scale", "logits_scaling")
"""Config fields of models (Gemma 2, Cohere, Granite) whose logits are not those of the head."""


def load_config(path: str | Path, *, dropout: float = 0.0, **changes: Any) -> PreTrainedConfig:
    """Read the config of an HF folder or hub name: every dropout 0, but `dropout` on the residual.

    Raises RecipeError when there is no model at `path`.
    """
    try:
        config = AutoConfig.from_pretrained(path, **changes)
    except (OSError, ValueError) as error:
        reason = str(error).split("\n")[0]
        raise RecipeError(
            f"{path}: not a folder with a Hugging Face model ({reason}); "
            "give a folder with config.json and model.safetensors"
        ) from None
    settings = config.to_dict()
    config.update({name: 0.0 for name, value in settings.items() if _is_dropout(name, value)})
    if "resid_pdrop" in settings:
        config.update({"resid_pdrop": dropout})
    return config


def load_weights(
    auto_class: Any,
    path: str | Path,
    config: PreTrainedConfig,
    *,
    dtype: torch.dtype,
    may_miss: tuple[str, ...] = (),
    quantization: Mapping[str, Any] | None = None,
) -> PreTrainedModel:
    """Load an HF model, in eval mode, on the CPU, of the kind of `auto_class`.

    `quantization` are arguments of `from_pretrained`, as `lora.quantization` gives them.
    Raises RecipeError if weights are missing there, other than those that `may_miss` names, since
    transformers would go on with random ones.
    """
    with quiet():
        try:
            model, report = auto_class.from_pretrained(
                path,
                config=config,
                dtype=dtype,
                output_loading_info=True,
                use_safetensors=True,  # no pickles
                **(quantization or {}),
            )
        except OSError as error:
            raise RecipeError(f"{path}: cannot be loaded: {str(error).splitlines()[0]}") from None
    missing = sorted(set(report["missing_keys"]) - set(may_miss))
    if missing:
        raise RecipeError(
            f"{path} ({config.architectures}) lacks {len(missing)} weights that "
            f"{type(model).__name__} needs, {missing[0]} first: give a folder of that kind"
        )
    # With pad == eos, a padding_idx would cut the gradient of end-of-text.
    model.get_input_embeddings().padding_idx = None
    return model.eval()


def add_residual_dropout(model: PreTrainedModel, dropout: float) -> None:
    """Drop what each sub-layer adds to the residual stream, in train mode; GPT-2 has its own.

    Raises RecipeError for a model whose sub-layers are not known.
    """
    if dropout == 0 or "resid_pdrop" in model.config.to_dict():
        return

    def drop(module: nn.Module, _: Any, output: Any) -> Any:
        if isinstance(output, tuple):
            return (F.dropout(output[0], dropout, module.training), *output[1:])
        return F.dropout(output, dropout, module.training)

    found = [m for name, m in model.named_modules() if name.rpartition(".")[2] in SUB_LAYERS]
    if not found:
        raise RecipeError(
            f"dropout={dropout}: where the residual stream is in {type(model).__name__} is not "
            "known; set dropout=0"
        )
    for module in found:
        module.register_forward_hook(drop)


def run_trunk(
    model: PreTrainedModel,
    input_ids: Tensor,
    attention_mask: Tensor,
    sequence: WholeSequence = WHOLE,
) -> Tensor:
    """Return the hidden states after the last norm: (b, S, d), or this rank's part of them.

    `attention_mask` (b, S) is 0 on padding, at either end, and 1 on tokens; in a packed row it
    numbers the documents 1, 2, ..., which then do not see each other. Position ids count from 0
    within each run. Attention needs nothing but them: causal attention never looks at padding on
    the right, and transformers keeps runs apart where position ids start again.
    """
    is_plain = not (attention_mask[:, 1:] > attention_mask[:, :-1]).any()
    position_ids = None if is_plain else document_positions(attention_mask)
    return sequence.trunk(model, input_ids, position_ids)


def document_positions(attention_mask: Tensor) -> Tensor:
    """Return (b, S) int64: how many tokens of its own run of equal numbers stand before each."""
    columns = torch.arange(attention_mask.shape[1], device=attention_mask.device)
    starts = F.pad(attention_mask[:, 1:] != attention_mask[:, :-1], (1, 0), value=True)  # (b, S)
    return columns - torch.where(starts, columns, 0).cummax(dim=1).values


def checkpoint_weights(
    model: PreTrainedModel, weights: Iterable[tuple[str, Tensor]] | None = None
) -> Iterator[tuple[str, Tensor]]:
    """Yield (name in an HF checkpoint, tensor), a tied head left out; one pass, nothing copied.

    `weights` are pairs as a training backend gathers them, named as the parameters of the wrapper
    (`hf.model...`) or of the HF model; None takes the model's own.
    """
    tied = set(model.all_tied_weights_keys)
    pairs = model.named_parameters() if weights is None else weights
    for name, tensor in pairs:
        plain = name.removeprefix(PREFIX)
        if plain not in tied:
            yield plain, tensor.detach()


def save_folder(
    model: PreTrainedModel, folder: str | Path, state_dict: Mapping[str, Tensor] | None
) -> None:
    """Write config.json, generation_config.json and model.safetensors, with the weights' dtype.

    `state_dict` as the pairs of `checkpoint_weights`; raises ValueError unless it is complete.
    Adapters are merged into the weights, and written once more to `adapter/`.
    """
    pairs = None if state_dict is None else state_dict.items()
    weights = dict(checkpoint_weights(model, pairs))
    if lora.has_adapter(model):
        lora.save_adapter(model, folder, weights)
        model, weights = lora.skeleton(model), dict(lora.merged(model, weights.items()))
    wanted = {name for name, _ in checkpoint_weights(model)}
    if weights.keys() != wanted:
        wrong = sorted(weights.keys() ^ wanted)
        raise ValueError(
            f"weights to save in {folder} are not those of the model: {len(wrong)} differ, "
            f"{wrong[0]} first"
        )
    dtype = next(iter(weights.values())).dtype
    with quiet():
        model.save_pretrained(folder, state_dict=weights)
    # DeepSpeed trains a bfloat16 copy of float32 weights; the folder holds the latter.
    config = AutoConfig.from_pretrained(folder)
    config.dtype = dtype
    config.save_pretrained(folder)


@contextmanager
def quiet() -> Iterator[None]:
    """Keep transformers' progress bars and load reports off the terminal inside the block."""
    verbosity, had_bars = logging.get_verbosity(), logging.is_progress_bar_enabled()
    logging.set_verbosity_error()
    logging.disable_progress_bar()
    try:
        yield
    finally:
        logging.set_verbosity(verbosity)
        if had_bars:
            logging.enable_progress_bar()


def _is_dropout(name: str, value: Any) -> bool:
    is_number = isinstance(value, (int, float)) and not isinstance(value, bool)
    return is_number and ("dropout" in name or name.endswith("pdrop"))
