"""LoRA (arXiv:2106.09685) through `peft`: adapters train, the weights beside them stay as they are.

A folder that is saved holds the merged weights, W + alpha / rank * B A, so that transformers and
vLLM load it as any model, and in `adapter/` what was trained, in the form of `peft`. Training goes
on from the base model and `adapter/`, not from the merged weights. With nf4 (QLoRA,
arXiv:2305.14314) the merged W is the dequantized one, which is what the adapters were trained
beside, and not the weight that the base model's folder has.
"""

import importlib.util
import json
from collections import defaultdict
from collections.abc import Iterable, Iterator, Mapping
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file, save_file
from torch import Tensor, nn
from transformers import AutoConfig, AutoModelForCausalLM, PreTrainedModel
from transformers.pytorch_utils import Conv1D

from rayrlhf.config import LoraConfig, RecipeError, StageConfig

ADAPTER = "adapter"
"""Folder of the adapter in that of a merged model."""
WEIGHTS = "adapter_model.safetensors"
HEAD = "score.weight"
"""Of a reward model: new, so it trains, and goes with the adapter."""
_BASE = ".base_layer."
_PEFT = "base_model.model."


def check(path: str | Path, cfg: StageConfig) -> None:
    """Raise RecipeError unless `cfg` can be met here and on the causal LM at `path`.

    It builds the model without weights.
    """
    if cfg.lora is None:
        return
    check_adapter(path, cfg.lora, saved=None)
    if cfg.quantization == "nf4":
        _require("bitsandbytes", "quantization=nf4", "pip install 'rayrlhf[qlora]', or set none")


def check_adapter(path: str | Path, cfg: LoraConfig, *, saved: Path | None) -> None:
    """Raise RecipeError unless a model of the kind at `path` can have the adapters of `cfg`.

    And unless `saved`, the folder of a checkpoint, has those; see `add_adapter`.
    """
    _require("peft", "lora", "pip install 'rayrlhf[lora]', or take lora out")
    with torch.device("meta"):
        model = AutoModelForCausalLM.from_config(AutoConfig.from_pretrained(path))
    names = targets(model, cfg, leave=(model.get_output_embeddings(),))
    if saved is not None:
        _check_saved(saved, cfg, names)


def has_saved(folder: Path) -> bool:
    """Tell whether what is in the folder of a model was trained as an adapter."""
    return (folder / ADAPTER).exists()


def targets(model: nn.Module, cfg: LoraConfig, leave: Iterable[nn.Module] = ()) -> list[str]:
    """Return the names of the modules that get an adapter, without their layer.

    Raises RecipeError for one that no linear module but those in `leave` has.
    """
    left = {id(module) for module in leave}
    linear = [
        name
        for name, module in model.named_modules()
        if isinstance(module, (nn.Linear, Conv1D)) and id(module) not in left
    ]
    names = sorted({name.rpartition(".")[2] for name in linear})
    for target in cfg.target_modules or ():
        if not any(f".{name}".endswith(f".{target}") for name in linear):
            raise RecipeError(
                f"lora.target_modules: no linear module of {type(model).__name__} is called "
                f"{target!r}: choose from {', '.join(names)}"
            )
    return sorted(cfg.target_modules or names)


def quantization(cfg: StageConfig) -> dict[str, Any]:
    """Return what `from_pretrained` needs for the weights of `cfg.quantization`."""
    if cfg.quantization == "none":
        return {}
    from transformers import BitsAndBytesConfig

    return {
        "quantization_config": BitsAndBytesConfig(
            load_in_4bit=True,
            bnb_4bit_quant_type="nf4",
            bnb_4bit_use_double_quant=True,  # of the scales, too (QLoRA, section 3)
            bnb_4bit_compute_dtype=torch.bfloat16 if cfg.precision == "bfloat16" else torch.float32,
            llm_int8_skip_modules=["lm_head", "score"],
        ),
        "device_map": {"": "cpu"},
    }


def add_adapter(
    model: PreTrainedModel, cfg: LoraConfig, *, base: str, seed: int, folder: Path | None
) -> None:
    """Freeze `model` and put adapters beside its linear modules, in place.

    A is drawn from `seed` and B is 0, so that the model computes what it did; with `folder`, both
    are those of its `adapter/`. `base` names the model in adapter_config.json. Raises RecipeError
    for wrong target_modules, and for a `folder` with other adapters than those of `cfg`.
    """
    import peft

    names = targets(model, cfg)
    if folder is not None:
        _check_saved(folder, cfg, names)

    _keep_packing(model)
    conv = any(isinstance(module, Conv1D) for module in model.modules())
    settings = peft.LoraConfig(
        r=cfg.rank,
        lora_alpha=cfg.alpha,
        lora_dropout=cfg.dropout,
        target_modules=names,
        fan_in_fan_out=conv,
        base_model_name_or_path=base,
    )
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        peft.inject_adapter_in_model(settings, model)
    for name, parameter in model.named_parameters():
        parameter.requires_grad_(_is_trained(name))
    if folder is not None:
        _load(model, folder / ADAPTER / WEIGHTS)


def has_adapter(model: nn.Module) -> bool:
    """Tell whether `add_adapter` was called on a model."""
    return any(".lora_A." in name for name, _ in model.named_parameters())


def adapted(names: Iterable[str]) -> set[str]:
    """Return those of the names that training with adapters changes, once `merged`.

    They are the weights that have an adapter, and the adapters themselves.
    """
    names = set(names)
    parts = {name for name in names if ".lora_" in name}
    return parts | (names & {f"{name.partition('.lora_')[0]}{_BASE}weight" for name in parts})


def merged(
    model: PreTrainedModel, weights: Iterable[tuple[str, Tensor]]
) -> Iterator[tuple[str, Tensor]]:
    """Yield the weights by their names in a plain HF model, each adapter added to its own.

    Those of the model stay as they are. `weights` may be a part of them, with the adapters to it;
    a weight is held until its adapter has come.
    """
    held: dict[str, dict[str, Tensor]] = defaultdict(dict)
    for name, tensor in weights:
        place, is_base, kind = name.rpartition(_BASE)
        if is_base and kind != "weight":
            yield f"{place}.{kind}", tensor
        elif is_base or ".lora_" in name:
            place = place or name.partition(".lora_")[0]
            parts = held[place]
            parts[name.removeprefix(f"{place}.")] = tensor
            if len(parts) == 3:
                yield f"{place}.weight", _sum(model, place, held.pop(place))
        else:
            yield name, _dequantized(model.get_parameter(name), tensor)
    assert not held, f"{next(iter(held))}: a weight came without its adapter"


def _sum(model: PreTrainedModel, place: str, parts: Mapping[str, Tensor]) -> Tensor:
    """Return W + alpha / rank * B A of the layer at `place`."""
    layer = model.get_submodule(place)
    parameter = model.get_parameter(f"{place}{_BASE}weight")
    weight = _dequantized(parameter, parts["base_layer.weight"])
    a, b = (parts[f"lora_{part}.default.weight"] for part in "AB")
    change = (b.float() @ a.float()) * layer.scaling["default"]
    return weight + (change.T if layer.fan_in_fan_out else change).to(weight.device)


def skeleton(model: PreTrainedModel) -> PreTrainedModel:
    """Return the plain model of the same kind and config, without weights."""
    settings = model.config.to_dict()
    settings.pop("quantization_config", None)
    with torch.device("meta"):
        plain = type(model)(type(model.config).from_dict(settings))
    if model.can_generate():
        plain.generation_config = model.generation_config
    return plain


def save_adapter(model: PreTrainedModel, folder: str | Path, weights: Mapping[str, Tensor]) -> None:
    """Write `adapter/` into `folder`, as `peft.PeftModel.from_pretrained` reads it."""
    place = Path(folder) / ADAPTER
    place.mkdir(parents=True, exist_ok=True)
    is_scorer = HEAD in weights
    settings = model.peft_config["default"].to_dict() | {
        "task_type": "SEQ_CLS" if is_scorer else "CAUSAL_LM",
        "modules_to_save": ["score"] if is_scorer else None,
        "inference_mode": True,
    }
    # The order of a set differs from process to process.
    plain = {key: sorted(v) if isinstance(v, set) else v for key, v in settings.items()}
    text = json.dumps(plain, indent=2, sort_keys=True) + "\n"
    (place / "adapter_config.json").write_text(text, encoding="utf-8")
    trained = {
        _PEFT + name.replace(".default.", "."): tensor.detach().cpu().contiguous()
        for name, tensor in weights.items()
        if _is_trained(name)
    }
    save_file(trained, str(place / WEIGHTS), metadata={"format": "pt"})


def _check_saved(folder: Path, cfg: LoraConfig, names: list[str]) -> None:
    """Raise RecipeError unless `adapter/` in `folder` is of `cfg`, beside the modules `names`."""
    if not has_saved(folder):
        raise RecipeError(
            f"{folder}: was trained without lora, and this run has it: take lora out, or start "
            "afresh in another run_dir"
        )
    saved = json.loads((folder / ADAPTER / "adapter_config.json").read_text(encoding="utf-8"))
    for key, field, wanted in (
        ("rank", "r", cfg.rank),
        ("alpha", "lora_alpha", cfg.alpha),
        ("target_modules", "target_modules", names),
    ):
        if saved[field] != wanted:
            raise RecipeError(
                f"{folder}: its adapters have {key}={saved[field]}, and lora.{key} says {wanted}: "
                "set what it was trained with, or start afresh in another run_dir"
            )


@torch.no_grad()
def _load(model: PreTrainedModel, file: Path) -> None:
    """Put back what `save_adapter` wrote."""
    saved = load_file(str(file))
    for name, parameter in model.named_parameters():
        if _is_trained(name):
            parameter.copy_(saved[_PEFT + name.replace(".default.", ".")])


def _is_trained(name: str) -> bool:
    return ".lora_" in name or name == HEAD


def _keep_packing(model: nn.Module) -> None:
    """Keep bitsandbytes from packing weights anew in eval mode, in place.

    It does so on CPUs with AVX512-BF16, and a layer so packed computes no gradient: evaluating
    would end the training of what is below it.
    """
    packed = [module for module in model.modules() if type(module).__name__ == "Linear4bit"]
    for module in packed:
        module.support_avx512bf16_for_cpu = False  # type: ignore[assignment]


def _dequantized(parameter: nn.Parameter, tensor: Tensor) -> Tensor:
    """Return `tensor`, or the float32 values of a parameter that is held in 4 bits."""
    if parameter.dtype != torch.uint8:
        return tensor
    from bitsandbytes.functional import dequantize_4bit

    state = parameter.quant_state  # type: ignore[attr-defined]
    return dequantize_4bit(parameter.data, state).detach().to("cpu", torch.float32)


def _require(package: str, what: str, fix: str) -> None:
    if importlib.util.find_spec(package) is None:
        raise RecipeError(f"{what} needs the package {package}, which is not installed: {fix}")
