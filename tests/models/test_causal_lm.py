"""Causal LMs of four families: log-probs, folders, dropout."""

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file
from torch import Tensor
from transformers import (
    AutoModelForCausalLM,
    GPT2Config,
    LlamaConfig,
    MistralConfig,
    PreTrainedConfig,
    PreTrainedModel,
    Qwen2Config,
    Qwen3Config,
)

from rayrlhf.config import ModelConfig, RecipeError
from rayrlhf.models.causal_lm import (
    CausalLMModel,
    build_causal_lm,
    load_causal_lm,
    named_weights,
    token_log_probs,
)
from rayrlhf.models.scalar_head import ScalarHeadModel

V = 31
FAMILIES = ("llama", "qwen2", "qwen3", "mistral", "gpt2")


def family_config(family: str, **changes: Any) -> PreTrainedConfig:
    if family == "gpt2":
        changes = {"n_embd": 32, "n_layer": 2, "n_head": 2, "n_positions": 64} | changes
        return GPT2Config(
            vocab_size=V, bos_token_id=None, eos_token_id=0, pad_token_id=1, **changes
        )
    kinds = {
        "llama": LlamaConfig,
        "qwen2": Qwen2Config,
        "qwen3": Qwen3Config,
        "mistral": MistralConfig,
    }
    shape = {
        "hidden_size": 32,
        "intermediate_size": 48,
        "num_hidden_layers": 2,
        "num_attention_heads": 4,
        "num_key_value_heads": 2,
        "head_dim": 8,
        "max_position_embeddings": 64,
        "bos_token_id": None,
        "eos_token_id": 0,
        "pad_token_id": 1,
    }
    return kinds[family](vocab_size=V, **(shape | changes))


def make(family: str, seed: int = 0, **changes: Any) -> PreTrainedModel:
    """Return a random model whose weights are large enough for every token to matter."""
    torch.manual_seed(seed)
    model = AutoModelForCausalLM.from_config(family_config(family, **changes))
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.ndim > 1:
                parameter.mul_(8)
    model.get_input_embeddings().padding_idx = None
    return model.eval()


def save(family: str, folder: Path, **changes: Any) -> PreTrainedModel:
    model = make(family, **changes)
    model.save_pretrained(folder)
    return model


def ragged(lengths: tuple[int, ...] = (9, 4, 1, 7), *, left: int = 0) -> tuple[Tensor, Tensor]:
    """Return random ids and a mask: right-padded, with `left` more columns of padding in front."""
    generator = torch.Generator().manual_seed(3)
    S = max(lengths) + left
    columns = torch.arange(S)
    mask = ((columns >= left) & (columns < left + torch.tensor(lengths)[:, None])).long()
    ids = torch.randint(V, (len(lengths), S), generator=generator)
    return ids.masked_fill(mask == 0, 1), mask


@torch.no_grad()
def naive(model: PreTrainedModel, ids: Tensor, mask: Tensor, temperature: float = 1.0) -> Tensor:
    """One row and one token at a time, from the full logits of the row without padding."""
    out = torch.zeros(ids.shape)
    for b, row in enumerate(mask.bool()):
        tokens = ids[b, row]
        logits = model(input_ids=tokens[None]).logits[0].double() / temperature
        columns = row.nonzero().squeeze(1)
        for t in range(1, len(tokens)):
            out[b, columns[t]] = logits[t - 1].log_softmax(0)[tokens[t]]
    return out


def test_01_log_prob_of_a_token_is_read_from_the_logits_before_it() -> None:
    model, ids = make("llama"), torch.tensor([[4, 9, 2]])
    logits = model(input_ids=ids).logits[0]
    found = token_log_probs(model, ids, torch.ones_like(ids))
    wanted = [0.0, logits[0].log_softmax(0)[9].item(), logits[1].log_softmax(0)[2].item()]
    torch.testing.assert_close(found, torch.tensor([wanted]))


@pytest.mark.parametrize("family", FAMILIES)
def test_log_probs_of_ragged_rows_match_a_loop_over_tokens(family: str) -> None:
    model = make(family)
    ids, mask = ragged()
    found = token_log_probs(model, ids, mask)
    torch.testing.assert_close(found, naive(model, ids, mask), atol=1e-5, rtol=1e-5)
    assert found.dtype == torch.float32
    assert (found[mask == 0] == 0).all()


@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize("left", [1, 5, 17])
def test_10_left_padded_and_unpadded_log_probs_match(family: str, left: int) -> None:
    model = make(family)
    ids, mask = ragged()
    padded_ids, padded_mask = ragged(left=left)
    padded_ids[:, left:] = ids
    plain = token_log_probs(model, ids, mask)
    padded = token_log_probs(model, padded_ids, padded_mask)
    torch.testing.assert_close(padded[:, left:], plain, atol=1e-5, rtol=1e-5)
    assert (padded[:, :left] == 0).all()


@pytest.mark.parametrize("family", FAMILIES)
def test_11_changing_document_a_leaves_document_b_unchanged(family: str) -> None:
    model = make(family)
    ids = torch.tensor([[5, 6, 7, 8, 9, 10, 11, 12, 1]])
    documents = torch.tensor([[1, 1, 1, 2, 2, 2, 2, 3, 0]])
    packed = token_log_probs(model, ids, documents)
    other = ids.clone()
    other[0, :3] = torch.tensor([20, 21, 22])
    torch.testing.assert_close(token_log_probs(model, other, documents)[:, 3:], packed[:, 3:])
    alone = token_log_probs(model, ids[:, 3:7], torch.ones(1, 4))
    torch.testing.assert_close(packed[:, 3:7], alone, atol=1e-5, rtol=1e-5)
    assert packed[0, [0, 3, 7, 8]].tolist() == [0, 0, 0, 0]  # nothing predicts a first token


def test_11_rows_of_a_batch_do_not_see_each_other() -> None:
    model = make("llama")
    ids, mask = ragged()
    other = ids.clone()
    other[0] = (other[0] + 1) % V
    assert torch.equal(
        token_log_probs(model, ids, mask)[1:], token_log_probs(model, other, mask)[1:]
    )


@pytest.mark.parametrize("temperature", [0.6, 1.7])
def test_12_temperature_divides_the_logits(temperature: float) -> None:
    model = make("qwen2")
    ids, mask = ragged()
    found = token_log_probs(model, ids, mask, temperature=temperature)
    wanted = naive(model, ids, mask, temperature)
    torch.testing.assert_close(found, wanted, atol=1e-5, rtol=1e-5)
    assert not torch.allclose(found, token_log_probs(model, ids, mask), atol=0.1)


def test_positions_pick_tokens_by_mask_or_by_column() -> None:
    model = make("mistral")
    ids, mask = ragged((9, 4, 6))
    whole = token_log_probs(model, ids, mask)
    response = torch.zeros_like(mask, dtype=torch.bool)
    response[0, 5:9] = response[1, 2:4] = response[2, 1:6] = True
    by_mask = token_log_probs(model, ids, mask, positions=response)
    torch.testing.assert_close(by_mask, whole * response)
    columns = torch.tensor([[5, 6, 7, 8, 8], [2, 3, 3, 3, 3], [1, 2, 3, 4, 5]])
    by_column = token_log_probs(model, ids, mask, positions=columns)
    torch.testing.assert_close(by_column, whole.gather(1, columns))


@pytest.mark.parametrize("temperature", [1.0, 0.7])
@pytest.mark.parametrize("tied", [True, False])
def test_gradient_equals_that_of_plain_autograd(temperature: float, tied: bool) -> None:
    model = make("llama", tie_word_embeddings=tied)
    ids, mask = ragged()
    weights = torch.randn(ids.shape, generator=torch.Generator().manual_seed(1)) * mask
    weights[:, 0] = 0
    loss = (token_log_probs(model, ids, mask, temperature=temperature) * weights).sum()
    found = torch.autograd.grad(loss, list(model.parameters()))
    logits = model(input_ids=ids, attention_mask=mask).logits[:, :-1] / temperature
    plain = logits.log_softmax(-1).gather(-1, ids[:, 1:, None]).squeeze(-1)
    wanted = torch.autograd.grad((plain * weights[:, 1:]).sum(), list(model.parameters()))
    for a, b in zip(found, wanted, strict=True):
        torch.testing.assert_close(a, b, atol=1e-4, rtol=1e-4)


def test_gradient_across_blocks_and_a_second_backward_is_refused(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    model = make("llama")
    ids, mask = ragged()
    whole = torch.autograd.grad(token_log_probs(model, ids, mask).sum(), list(model.parameters()))
    monkeypatch.setattr(
        "rayrlhf.models.output_head._blocks",
        lambda logits: (slice(i, i + 2) for i in range(0, len(logits), 2)),
    )
    loss = token_log_probs(model, ids, mask).sum()
    blocks = torch.autograd.grad(loss, list(model.parameters()), retain_graph=True)
    for a, b in zip(blocks, whole, strict=True):
        torch.testing.assert_close(a, b)
    with pytest.raises(RuntimeError, match="inplace"):
        torch.autograd.grad(loss, list(model.parameters()))


@pytest.mark.parametrize("bfloat16", [False, True])
def test_large_logits_are_never_held_and_change_nothing(
    monkeypatch: pytest.MonkeyPatch, bfloat16: bool
) -> None:
    model = CausalLMModel(make("llama"))
    ids, mask = ragged()
    sizes: list[int] = []
    linear = torch.nn.functional.linear

    def watched(states: Tensor, weight: Tensor, bias: Tensor | None = None) -> Tensor:
        if len(weight) == V:
            sizes.append(len(states))
        return linear(states, weight, bias)

    monkeypatch.setattr("torch.nn.functional.linear", watched)

    def run() -> tuple[Tensor, Tensor, tuple[Tensor, ...]]:
        with torch.autocast("cpu", torch.bfloat16, enabled=bfloat16):
            log_probs, entropy = model(ids, mask, temperature=0.7, with_entropy=True)
        weights = torch.arange(log_probs.numel()).view_as(log_probs) / 10
        return (
            log_probs,
            entropy,
            torch.autograd.grad((log_probs * weights).sum(), list(model.parameters())),
        )

    whole = run()
    assert len(sizes) == 1
    count = sizes.pop()
    monkeypatch.setattr("rayrlhf.models.output_head.LOGITS_BYTES", 4 * V * 3)
    chunked = run()
    assert max(sizes) == 3 < count
    assert sum(sizes) == 2 * count  # forward, and again for backward
    torch.testing.assert_close(chunked[:2], whole[:2])
    bound = {"atol": 0.1, "rtol": 0.02} if bfloat16 else {"atol": 1e-5, "rtol": 1e-5}
    torch.testing.assert_close(chunked[2], whole[2], **bound)


def test_entropy_of_every_prediction() -> None:
    model = CausalLMModel(make("llama"))
    ids, mask = ragged()
    log_probs, entropy = model(ids, mask, temperature=0.7, with_entropy=True)
    logits = (model.hf(input_ids=ids, attention_mask=mask).logits / 0.7).log_softmax(-1)
    wanted = -(logits.exp() * logits).sum(-1)[:, :-1] * mask[:, 1:]
    torch.testing.assert_close(entropy[:, 1:], wanted.detach(), atol=1e-5, rtol=1e-5)
    assert not entropy.requires_grad
    assert torch.equal(log_probs, model(ids, mask, temperature=0.7))


def test_31_micro_batch_without_work_gives_zero_gradients_for_all_parameters() -> None:
    model = CausalLMModel(make("llama"))
    ids, mask = ragged()
    nothing = torch.zeros_like(mask, dtype=torch.bool)
    model(ids, mask, positions=nothing).sum().backward()
    for name, parameter in model.named_parameters():
        assert parameter.grad is not None, name
        assert (parameter.grad == 0).all(), name


def test_06_end_of_text_equal_to_pad_keeps_log_prob_and_gradient(tmp_path: Path) -> None:
    save("llama", tmp_path, pad_token_id=0, tie_word_embeddings=False)
    model = load_causal_lm(tmp_path)
    ids, mask = torch.tensor([[5, 0, 6, 0, 0]]), torch.tensor([[1, 1, 1, 1, 0]])
    log_probs = token_log_probs(model, ids, mask)
    assert log_probs[0, 3] != 0
    assert log_probs[0, 4] == 0
    log_probs[0, 2].backward()  # predicted from the end-of-text in the middle
    grad = model.get_input_embeddings().weight.grad
    assert grad[0].abs().sum() > 0


@pytest.mark.parametrize("family", FAMILIES)
def test_15_dropout_of_a_checkpoint_is_off_in_every_role(family: str, tmp_path: Path) -> None:
    rates = ("attn_pdrop", "embd_pdrop", "resid_pdrop") if family == "gpt2" else ()
    save(family, tmp_path, **dict.fromkeys(rates or ("attention_dropout",), 0.5))
    ids, mask = ragged()
    for model in (
        CausalLMModel.from_pretrained(tmp_path),
        ScalarHeadModel.from_causal_lm(tmp_path),
    ):
        model.train()
        assert torch.equal(model(ids, mask), model(ids, mask))


@pytest.mark.parametrize("family", FAMILIES)
def test_residual_dropout_acts_in_train_mode_only(family: str, tmp_path: Path) -> None:
    save(family, tmp_path)
    plain = CausalLMModel.from_pretrained(tmp_path)
    model = CausalLMModel.from_pretrained(tmp_path, dropout=0.2)
    ids, mask = ragged()
    assert torch.equal(model(ids, mask), plain(ids, mask))
    model.train()
    first, second = model(ids, mask), model(ids, mask)
    assert not torch.allclose(first, second)
    torch.manual_seed(5)
    once = model(ids, mask)
    torch.manual_seed(5)
    assert torch.equal(model(ids, mask), once)


def test_residual_dropout_drops_a_fifth_of_each_sub_layer(tmp_path: Path) -> None:
    save("llama", tmp_path)
    model = load_causal_lm(tmp_path, dropout=0.2).train()
    outputs: list[Tensor] = []
    for layer in model.model.layers:
        layer.self_attn.register_forward_hook(lambda m, a, out: outputs.append(out[0]))
        layer.mlp.register_forward_hook(lambda m, a, out: outputs.append(out))
    token_log_probs(model, torch.randint(V, (16, 32)), torch.ones(16, 32))
    assert len(outputs) == 4
    for output in outputs:
        assert (output == 0).float().mean().item() == pytest.approx(0.2, abs=0.02)


def test_16_bfloat16_copy_of_the_same_weights_has_no_kl(tmp_path: Path) -> None:
    save("llama", tmp_path)
    actor, ref = (CausalLMModel.from_pretrained(tmp_path, dtype=torch.bfloat16) for _ in range(2))
    ids = torch.randint(V, (4, 60), generator=torch.Generator().manual_seed(0))
    log_probs, ref_log_probs = actor(ids, torch.ones_like(ids)), ref(ids, torch.ones_like(ids))
    assert log_probs.dtype == torch.float32
    assert (log_probs - ref_log_probs).sum(dim=1).abs().max() < 1e-4


def test_16_reduction_over_the_vocabulary_is_in_float32(tmp_path: Path) -> None:
    model = make("llama").to(torch.bfloat16)
    ids, mask = ragged()
    logits = model(input_ids=ids, attention_mask=mask).logits[:, :-1].float().log_softmax(-1)
    wanted = logits.gather(-1, ids[:, 1:, None]).squeeze(-1) * mask[:, 1:]
    found = token_log_probs(model, ids, mask)[:, 1:]
    # The same bfloat16 logits, reduced without rounding: log-probs are not multiples of 2^-8.
    torch.testing.assert_close(found, wanted, atol=2e-2, rtol=2e-2)
    assert not torch.equal(found, found.bfloat16().float())


def test_build_is_a_function_of_the_seed_and_leaves_the_global_state() -> None:
    cfg = ModelConfig(hidden_size=64, num_layers=3, num_heads=2, num_kv_heads=1, max_length=32)
    torch.manual_seed(1)
    state = torch.random.get_rng_state()
    first, again, other = (
        build_causal_lm(cfg, vocab_size=500, eos_token_id=0, pad_token_id=1, seed=seed)
        for seed in (4, 4, 5)
    )
    assert torch.equal(torch.random.get_rng_state(), state)
    for name, parameter in first.named_parameters():
        assert torch.equal(parameter, again.get_parameter(name))
        if parameter.ndim > 1:
            assert not torch.equal(parameter, other.get_parameter(name))
    layer = first.model.layers[0]
    assert layer.self_attn.q_proj.weight.std().item() == pytest.approx(0.02, rel=0.1)
    assert layer.mlp.down_proj.weight.std().item() == pytest.approx(0.02 / 6**0.5, rel=0.1)
    assert layer.self_attn.o_proj.weight.std().item() == pytest.approx(0.02 / 6**0.5, rel=0.1)
    assert first.config.vocab_size == 500
    assert first.lm_head.weight is first.model.embed_tokens.weight
    assert (first.config.eos_token_id, first.config.bos_token_id) == (0, None)
    ids = torch.randint(500, (2, 32))
    uniform = token_log_probs(first, ids, torch.ones_like(ids))[:, 1:].mean().item()
    assert uniform == pytest.approx(-torch.tensor(500.0).log().item(), abs=0.1)


def test_gpt2_is_built_as_gpt2(tmp_path: Path) -> None:
    cfg = ModelConfig(
        architecture="gpt2",
        hidden_size=48,
        num_layers=3,
        num_heads=4,
        num_kv_heads=4,
        intermediate_size=192,
        max_length=40,
    )
    model = build_causal_lm(
        cfg, vocab_size=500, eos_token_id=0, pad_token_id=1, seed=4, dropout=0.3
    )
    layer = model.transformer.h[0]
    assert layer.mlp.c_fc.weight.shape == (48, 192)
    assert model.transformer.wpe.weight.shape == (40, 48)
    assert layer.mlp.c_fc.weight.std().item() == pytest.approx(0.02, rel=0.1)
    for matrix in (layer.mlp.c_proj, layer.attn.c_proj):
        assert matrix.weight.std().item() == pytest.approx(0.02 / 6**0.5, rel=0.1)
        assert not matrix.bias.any()
    assert (layer.ln_1.weight == 1).all() and not layer.ln_1.bias.any()
    assert model.lm_head.weight is model.transformer.wte.weight
    assert (layer.mlp.dropout.p, model.transformer.drop.p) == (0.3, 0.0)
    CausalLMModel(model).save_pretrained(tmp_path)
    again = AutoModelForCausalLM.from_pretrained(tmp_path)
    ids = torch.randint(500, (2, 40))
    torch.testing.assert_close(again(ids).logits, model(ids).logits)


@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize("tied", [True, False])
def test_saved_folder_loads_in_plain_transformers(family: str, tied: bool, tmp_path: Path) -> None:
    save(family, tmp_path / "start", tie_word_embeddings=tied)
    model = CausalLMModel.from_pretrained(tmp_path / "start")
    # What training gathers: float32, by the wrapper's names, after an update.
    weights = {name: p.detach() + 0.01 for name, p in model.named_parameters()}
    model.to(torch.bfloat16).save_pretrained(tmp_path / "final", weights)
    plain, report = AutoModelForCausalLM.from_pretrained(
        tmp_path / "final", output_loading_info=True
    )
    assert not report["missing_keys"]
    assert not report["unexpected_keys"]
    assert plain.dtype == torch.float32
    for name, value in weights.items():
        assert torch.equal(plain.get_parameter(name.removeprefix("hf.")), value)
    assert json.loads((tmp_path / "final/config.json").read_text())["dtype"] == "float32"
    assert ("lm_head.weight" in load_file(tmp_path / "final/model.safetensors")) != tied
    assert (tmp_path / "final/generation_config.json").is_file()


def test_save_takes_the_own_weights_or_a_full_state_dict_and_refuses_half_of_it(
    tmp_path: Path,
) -> None:
    save("llama", tmp_path / "start", tie_word_embeddings=True)
    model = CausalLMModel.from_pretrained(tmp_path / "start")
    model.save_pretrained(tmp_path / "own")
    model.save_pretrained(tmp_path / "full", model.state_dict())  # the tied head twice
    model.save_pretrained(tmp_path / "plain", model.hf.state_dict())
    files = [
        (tmp_path / name / "model.safetensors").read_bytes()
        for name in ("own", "full", "plain", "start")
    ]
    assert len(set(files)) == 1
    half = dict(list(model.named_parameters())[:3])
    with pytest.raises(ValueError, match="not those of the model"):
        model.save_pretrained(tmp_path / "half", half)


@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize("tied", [True, False])
def test_38_named_weights_are_those_of_the_checkpoint(
    family: str, tied: bool, tmp_path: Path
) -> None:
    save(family, tmp_path, tie_word_embeddings=tied)
    model = CausalLMModel.from_pretrained(tmp_path)
    stored = load_file(tmp_path / "model.safetensors")
    own = dict(named_weights(model))
    assert own.keys() == stored.keys()
    assert all(torch.equal(own[name], stored[name]) for name in stored)
    assert not any(tensor.requires_grad for tensor in own.values())
    gathered = dict(named_weights(model, ((n, p.double()) for n, p in model.named_parameters())))
    assert gathered.keys() == stored.keys()


def test_paths_without_a_causal_lm_are_refused(tmp_path: Path) -> None:
    with pytest.raises(RecipeError, match=r"config\.json"):
        load_causal_lm(tmp_path / "nothing")
    save("llama", tmp_path / "llama", tie_word_embeddings=False)
    ScalarHeadModel.from_causal_lm(tmp_path / "llama").save_pretrained(tmp_path / "reward")
    with pytest.raises(RecipeError, match=r"lacks 1 weights .* lm_head\.weight"):
        load_causal_lm(tmp_path / "reward")
    config = json.loads((tmp_path / "llama/config.json").read_text())
    (tmp_path / "empty").mkdir()
    (tmp_path / "empty/config.json").write_text(json.dumps(config))
    with pytest.raises(RecipeError, match="cannot be loaded"):
        load_causal_lm(tmp_path / "empty")


def test_models_that_change_their_logits_are_refused() -> None:
    model = make("llama")
    model.config.update({"final_logit_softcapping": 30.0})
    with pytest.raises(RecipeError, match="final_logit_softcapping"):
        CausalLMModel(model)
