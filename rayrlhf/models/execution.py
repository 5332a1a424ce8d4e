"""How a model runs, never what it computes: attention kernel, recomputation, compilation."""

from collections.abc import Callable
from typing import Any, Literal

import torch
from torch import Tensor, nn
from torch._inductor.cpp_builder import get_cpp_compiler
from torch._inductor.exc import InvalidCxxCompiler
from torch.nn.attention.flex_attention import BlockMask
from transformers import AttentionInterface, AttentionMaskInterface, Cache, PreTrainedModel
from transformers.integrations.flex_attention import flex_attention_forward
from transformers.integrations.sdpa_attention import sdpa_attention_forward
from transformers.masking_utils import flex_attention_mask, sdpa_mask
from transformers.modeling_layers import GradientCheckpointingLayer

from rayrlhf.config import RecipeError

Attention = Literal["auto", "sdpa", "flex"]

FLEX_FROM = 1024
"""Tokens of a row from which `auto` takes flex attention on a GPU. Its masks are made of blocks of
128 x 128: shorter rows have few blocks to leave out."""

RECOMPILE_LIMIT = 32
"""Variants of a layer: with gradients or without, masked or causal, one row or several."""


def set_execution(
    model: PreTrainedModel,
    *,
    attention: Attention = "auto",
    gradient_checkpointing: bool = False,
    compile: bool = False,
    device: torch.device,
) -> None:
    """Set, in place, how `model` will run on `device`; parameters and their names stay.

    Raises RecipeError where the model or the machine cannot.
    """
    set_attention(model, attention, device)
    if gradient_checkpointing:
        if not model.supports_gradient_checkpointing:
            raise RecipeError(
                f"gradient_checkpointing: {type(model).__name__} does not support it; set it to "
                "false and lower tokens_per_microbatch"
            )
        model.gradient_checkpointing_enable({"use_reentrant": False})
    if compile:
        compile_layers(model)


def huggingface_model(module: nn.Module) -> PreTrainedModel | None:
    """Return the outermost Hugging Face model in `module`, None where there is none."""
    return next((m for m in module.modules() if isinstance(m, PreTrainedModel)), None)


def set_attention(model: PreTrainedModel, attention: Attention, device: torch.device) -> None:
    """Choose the kernel of rows whose documents are apart; all other rows take sdpa."""
    flex = attention == "flex" or (attention == "auto" and device.type == "cuda")
    if not flex or not (model._supports_flex_attn and model._supports_sdpa):
        if attention == "flex":
            raise RecipeError(
                f"attention=flex: {type(model).__name__} does not support it; set attention=sdpa"
            )
        return
    name = f"rayrlhf_flex_{attention}"
    shortest = FLEX_FROM if attention == "auto" else 0

    def mask(*args: Any, **kwargs: Any) -> Tensor | BlockMask | None:
        # Only where documents are apart must the mask be more than causal.
        apart = not kwargs["allow_is_causal_skip"] and kwargs["q_length"] >= shortest
        return (flex_attention_mask if apart else sdpa_mask)(*args, **kwargs)

    AttentionInterface.register(name, _attend)
    AttentionMaskInterface.register(name, mask)
    model.set_attn_implementation(name)


def _attend(
    module: nn.Module,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attention_mask: Tensor | BlockMask | None,
    **kwargs: Any,
) -> tuple[Tensor, Tensor | None]:
    """Attend by the kernel that the mask is for."""
    flex = isinstance(attention_mask, BlockMask)
    kernel = flex_attention_forward if flex else sdpa_attention_forward
    return kernel(module, query, key, value, attention_mask, **kwargs)


def compile_layers(model: PreTrainedModel) -> None:
    """Compile the decoder layers, which share one code, for any number of rows and tokens.

    Generation runs them as they are: with its cache every layer and every token is another case.
    """
    check_compiler()
    layers = [m for m in model.modules() if isinstance(m, GradientCheckpointingLayer)]
    if not layers:
        raise RecipeError(
            f"compile: the layers of {type(model).__name__} are not known; set compile=false"
        )
    for layer in layers:
        layer.forward = _without_cache(layer.forward)


def _without_cache(forward: Callable[..., Any]) -> Callable[..., Any]:
    how: dict[str, Any] = {"dynamic": True, "recompile_limit": RECOMPILE_LIMIT}
    compiled = torch.compile(forward, **how)

    def call(*args: Any, **kwargs: Any) -> Any:
        cached = any(isinstance(value, Cache) for value in (*args, *kwargs.values()))
        return forward(*args, **kwargs) if cached else compiled(*args, **kwargs)

    return call


def check_compiler() -> None:
    """Raise RecipeError unless this machine has the C++ compiler that torch.compile calls."""
    if not has_compiler():
        raise RecipeError(
            "compile=true needs a C++ compiler on every worker's node, and there is none: install "
            "g++ (apt-get install g++), or set compile=false"
        )


def has_compiler() -> bool:
    """Tell whether this machine has the C++ compiler that torch.compile calls."""
    try:
        get_cpp_compiler()
    except InvalidCxxCompiler:
        return False
    return True
