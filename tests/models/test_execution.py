"""Attention kernels, gradient checkpointing and compilation change nothing but speed and memory."""

from collections.abc import Callable, Iterator
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch._dynamo.utils import counters
from torch.autograd.graph import saved_tensors_hooks
from transformers import (
    GPT2Config,
    GPT2LMHeadModel,
    LlamaConfig,
    LlamaForCausalLM,
    LlamaForSequenceClassification,
    PreTrainedModel,
)

from rayrlhf.config import RecipeError, TrainingConfig, parse
from rayrlhf.models import execution
from rayrlhf.models.causal_lm import CausalLMModel
from rayrlhf.models.folder import add_residual_dropout
from rayrlhf.models.scalar_head import ScalarHeadModel
from rayrlhf.training.backend import make_backend

CPU = torch.device("cpu")
SHAPE: dict[str, Any] = {
    "vocab_size": 60,
    "hidden_size": 32,
    "intermediate_size": 64,
    "num_hidden_layers": 3,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "pad_token_id": 1,
    "num_labels": 1,
}


def llama() -> CausalLMModel:
    torch.manual_seed(0)
    model = LlamaForCausalLM(LlamaConfig(**SHAPE))
    add_residual_dropout(model, 0.2)
    return CausalLMModel(model)


def gpt2() -> CausalLMModel:
    torch.manual_seed(0)
    return CausalLMModel(
        GPT2LMHeadModel(GPT2Config(vocab_size=60, n_embd=32, n_layer=3, n_head=4, n_positions=64))
    )


def scorer() -> ScalarHeadModel:
    torch.manual_seed(0)
    return ScalarHeadModel(LlamaForSequenceClassification(LlamaConfig(**SHAPE)))


MODELS = [llama, gpt2, scorer]


@pytest.fixture(autouse=True)
def _may_compile() -> Iterator[None]:
    """Let torch compile: a vLLM engine that computes eagerly forbids it to its process."""
    with torch._dynamo.config.patch(disable=False):
        yield


def batch(rows: int, tokens: int, *, apart: bool = True) -> tuple[Tensor, Tensor]:
    """Return ids and mask (rows, tokens): two documents a row and padding, or one."""
    generator = torch.Generator().manual_seed(rows * tokens)
    ids = torch.randint(2, 60, (rows, tokens), generator=generator)
    mask = torch.ones_like(ids)
    if apart:
        mask[:, tokens // 3 :] = 2
        mask[0, -3:] = 0
    return ids, mask


def gradients(module: nn.Module, **keys: Any) -> tuple[dict[str, Tensor], int]:
    """Return the gradients by name, and the bytes that the forward pass kept for backward."""
    backend = make_backend(module, TrainingConfig(**keys), total_steps=1, device=CPU)
    module.train()
    kept: dict[int, int] = {}

    def note(tensor: Tensor) -> Tensor:
        kept[tensor.untyped_storage().data_ptr()] = tensor.untyped_storage().nbytes()
        return tensor

    ids, mask = batch(4, 32)
    torch.manual_seed(3)
    with saved_tensors_hooks(note, lambda tensor: tensor):
        loss = backend(ids, mask).sum()
    backend.backward(loss, 1.0, is_last=True)
    found = {n: p.grad for n, p in module.named_parameters() if p.grad is not None}
    weights = {p.data_ptr() for p in module.parameters()}
    return found, sum(size for place, size in kept.items() if place not in weights)


@pytest.mark.parametrize("make", MODELS)
def test_checkpointing_keeps_the_gradients_and_less_memory(make: Callable[[], nn.Module]) -> None:
    plain, most = gradients(make())
    found, least = gradients(make(), gradient_checkpointing=True)
    assert least < 0.5 * most
    assert found.keys() == plain.keys()
    for name, gradient in plain.items():
        assert torch.equal(found[name], gradient), name


def test_a_model_that_cannot_checkpoint_is_refused() -> None:
    model = llama().hf
    model.supports_gradient_checkpointing = False
    with pytest.raises(RecipeError, match="gradient_checkpointing: LlamaForCausalLM"):
        execution.set_execution(model, gradient_checkpointing=True, device=CPU)


@pytest.fixture
def eager() -> Iterator[None]:
    """Run flex attention and its masks without compiling them, which takes a minute."""
    with torch.compiler.set_stance("force_eager"):
        yield


@pytest.mark.parametrize("make", [llama, scorer])
@pytest.mark.parametrize("apart", [True, False])
def test_flex_attention_is_exact(eager: None, make: Callable[[], nn.Module], apart: bool) -> None:
    ids, mask = batch(3, 40, apart=apart)
    plain, other = make().eval(), make().eval()
    model = execution.huggingface_model(other)
    assert model is not None
    execution.set_execution(model, attention="flex", device=CPU)
    with torch.no_grad():
        wanted, found = plain(ids, mask), other(ids, mask)
    assert torch.allclose(found[mask > 0], wanted[mask > 0], atol=1e-5)


def test_flex_attention_is_for_documents_apart(
    eager: None, monkeypatch: pytest.MonkeyPatch
) -> None:
    calls = []

    def counting(*args: Any, **kwargs: Any) -> Any:
        calls.append(1)
        return flex(*args, **kwargs)

    flex = execution.flex_attention_forward
    monkeypatch.setattr(execution, "flex_attention_forward", counting)
    model = llama().eval()
    execution.set_execution(model.hf, attention="flex", device=CPU)
    with torch.no_grad():
        model(*batch(2, 20, apart=False))
        assert not calls
        model(*batch(2, 20))
    assert len(calls) == 3  # one per layer


def test_auto_takes_flex_on_gpus_for_long_rows(
    eager: None, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(execution, "FLEX_FROM", 30)
    calls = []

    def counting(*args: Any, **kwargs: Any) -> Any:
        calls.append(args[1].shape[2])
        return flex(*args, **kwargs)

    flex = execution.flex_attention_forward
    monkeypatch.setattr(execution, "flex_attention_forward", counting)
    on_cpu, on_gpu = llama().eval(), llama().eval()
    execution.set_execution(on_cpu.hf, device=CPU)
    execution.set_execution(on_gpu.hf, device=torch.device("cuda"))
    with torch.no_grad():
        for model in (on_cpu, on_gpu):
            for tokens in (29, 30):
                model(*batch(2, tokens))
    assert calls == [30, 30, 30]


def test_a_model_without_flex_attention_is_refused_and_auto_takes_sdpa() -> None:
    model = gpt2().hf
    with pytest.raises(RecipeError, match="attention=flex: GPT2LMHeadModel does not support it"):
        execution.set_execution(model, attention="flex", device=CPU)
    execution.set_execution(model, device=torch.device("cuda"))
    assert model.config._attn_implementation == "sdpa"


def test_zero3_and_a_missing_compiler_are_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    section = {"train": "x", "compile": True, "backend": "deepspeed", "zero_stage": 3}
    with pytest.raises(RecipeError, match="compile=true does not go with zero_stage=3"):
        parse({"name": "x", "sft": section})

    def missing() -> str:
        raise execution.InvalidCxxCompiler

    monkeypatch.setattr(execution, "get_cpp_compiler", missing)
    with pytest.raises(RecipeError, match="install g\\+\\+"):
        make_backend(llama(), TrainingConfig(compile=True), total_steps=1, device=CPU)


@pytest.fixture
def no_inductor(monkeypatch: pytest.MonkeyPatch) -> None:
    """Let graphs run as they were captured: what is compiled, and how often, stays the same."""
    compiler = torch.compile

    def capture(function: Any, **how: Any) -> Any:
        return compiler(function, backend="eager", **how)

    monkeypatch.setattr(torch, "compile", capture)


def same(plain: nn.Module, other: nn.Module, rows: int, tokens: int, apart: bool) -> None:
    """Check outputs, and gradients where the modules train."""
    ids, mask = batch(rows, tokens, apart=apart)
    results = []
    for module in (plain, other):
        module.zero_grad()
        torch.manual_seed(rows)
        with torch.set_grad_enabled(module.training):
            out = module(ids, mask)
        if module.training:
            out.sum().backward()
        results.append((out[mask > 0], [p.grad for p in module.parameters()]))
    (wanted, wanted_grads), (found, grads) = results
    assert torch.allclose(found, wanted, atol=1e-5)
    if plain.training:
        for gradient, own in zip(wanted_grads, grads, strict=True):
            assert gradient is not None and own is not None
            assert torch.allclose(own, gradient, atol=1e-4)


SIZES = [(3, 20, True), (5, 33, True), (2, 17, False), (7, 40, False), (4, 26, True)]


@pytest.mark.slow
@pytest.mark.parametrize(
    ("make", "checkpointed", "variants"), [(llama, False, 4), (gpt2, False, 4), (scorer, True, 6)]
)
def test_layers_are_compiled_once_for_all_layers_and_sizes(
    no_inductor: None, make: Callable[[], nn.Module], checkpointed: bool, variants: int
) -> None:
    torch._dynamo.reset()
    counters.clear()
    plain, other = make(), make()
    names = list(other.state_dict())
    model = execution.huggingface_model(other)
    assert model is not None
    execution.set_execution(model, compile=True, gradient_checkpointing=checkpointed, device=CPU)
    assert list(other.state_dict()) == names
    assert [name for name, _ in other.named_parameters()] == [
        name for name, _ in plain.named_parameters()
    ]
    for training in (True, False):
        plain.train(training), other.train(training)
        for size in SIZES:
            same(plain, other, *size)
    # With and without a mask, while training and not, and again in the backward pass where it is
    # computed there; not per layer, and not per size.
    assert counters["stats"]["unique_graphs"] == variants
    assert not counters["graph_break"]


def test_a_compiled_model_generates_as_before(no_inductor: None) -> None:
    counters.clear()
    texts = []
    for compile in (False, True):
        model: PreTrainedModel = llama().eval().hf
        execution.set_execution(model, compile=compile, device=CPU)
        ids = batch(1, 9, apart=False)[0]
        texts.append(model.generate(input_ids=ids, max_new_tokens=8, do_sample=False))
    assert texts[0].tolist() == texts[1].tolist()
    assert not counters["stats"]


@pytest.mark.slow
def test_compiled_layers_compute_the_same() -> None:
    """With the real compiler, without dropout, whose draws are its own."""
    torch._dynamo.reset()
    plain, other = scorer().train(), scorer().train()
    execution.set_execution(other.hf, compile=True, device=CPU)
    for size in SIZES[:2]:
        same(plain, other, *size)
