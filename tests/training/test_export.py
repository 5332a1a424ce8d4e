"""What a stage leaves loads elsewhere: plain transformers and vLLM, for every family of models."""

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import (
    AutoConfig,
    AutoModelForCausalLM,
    AutoModelForSequenceClassification,
    AutoTokenizer,
    PreTrainedTokenizerFast,
)

from rayrlhf.config import Recipe, RecipeError
from rayrlhf.models.causal_lm import load_causal_lm, token_log_probs
from rayrlhf.models.scalar_head import ScalarHeadModel
from rayrlhf.training.reward import RewardStage
from rayrlhf.training.sft import SFTStage
from rayrlhf.training.stage import Stage
from tests.scripts import result_of
from tests.training.ranks import Run, run_on_ranks

MakeRecipe = Callable[..., Recipe]
IDS = torch.tensor([[5, 9, 40, 41, 7, 100, 3, 77]])
# Heads of 32 each: one of the sizes that vLLM has on CPU.
SHAPE = {
    "hidden_size": 64,
    "intermediate_size": 128,
    "num_hidden_layers": 2,
    "num_attention_heads": 2,
    "num_key_value_heads": 1,
    "max_position_embeddings": 64,
}
FAMILIES: dict[str, dict[str, Any]] = {
    "llama": {**SHAPE, "tie_word_embeddings": False},
    "mistral": {**SHAPE, "sliding_window": None, "head_dim": 32},
    "qwen2": {**SHAPE, "tie_word_embeddings": True},
    "qwen3": {**SHAPE, "tie_word_embeddings": True, "head_dim": 32},
    "gpt2": {"n_embd": 64, "n_layer": 2, "n_head": 2, "n_positions": 64},
}


@pytest.fixture(scope="module")
def models(tmp_path_factory: pytest.TempPathFactory, tiny_tokenizer: Path) -> dict[str, Path]:
    """Return the folder of a random model of every family."""
    tokenizer = PreTrainedTokenizerFast.from_pretrained(tiny_tokenizer)
    folders = {}
    for family, shape in FAMILIES.items():
        config = AutoConfig.for_model(
            family,
            vocab_size=len(tokenizer),
            bos_token_id=None,
            eos_token_id=tokenizer.eos_token_id,
            pad_token_id=tokenizer.pad_token_id,
            **shape,
        )
        torch.manual_seed(0)
        folders[family] = tmp_path_factory.mktemp(family)
        AutoModelForCausalLM.from_config(config).save_pretrained(folders[family])
        tokenizer.save_pretrained(folders[family])
    return folders


def one_step(make_recipe: MakeRecipe, kind: type[Stage], family: str, model: Path) -> Path:
    """Train one step; return the folder of the result."""
    section = {kind.name: {"init": str(model), "max_steps": 1, "learning_rate": 1e-2}}
    recipe = make_recipe(f"{family}-{kind.name}", **section)
    run_on_ranks([Run(recipe, kind)], 1, recipe.path)
    return recipe.path / kind.name / "final"


@pytest.mark.parametrize("family", FAMILIES)
def test_plain_transformers_computes_what_was_trained(
    make_recipe: MakeRecipe, models: dict[str, Path], family: str
) -> None:
    final = one_step(make_recipe, SFTStage, family, models[family])
    assert not list(final.rglob("*.bin")) and list(final.glob("*.safetensors"))
    plain, report = AutoModelForCausalLM.from_pretrained(final, output_loading_info=True)
    assert not report["missing_keys"] and not report["unexpected_keys"]
    assert AutoTokenizer.from_pretrained(final).eos_token_id == plain.config.eos_token_id
    start = AutoModelForCausalLM.from_pretrained(models[family])
    with torch.no_grad():
        logits = plain(IDS).logits
        ours = token_log_probs(load_causal_lm(final), IDS, torch.ones_like(IDS))[0, 1:]
        assert (logits - start(IDS).logits).abs().max() > 1e-2
    theirs = logits.log_softmax(-1)[0, :-1].gather(1, IDS[0, 1:, None]).squeeze(1)
    torch.testing.assert_close(ours, theirs, rtol=1e-5, atol=1e-5)

    final = one_step(make_recipe, RewardStage, family, models[family])
    scorer, report = AutoModelForSequenceClassification.from_pretrained(
        final, output_loading_info=True
    )
    assert not report["missing_keys"] and not report["unexpected_keys"]
    model = ScalarHeadModel.from_pretrained(final)
    with torch.no_grad():
        score = model(IDS, torch.ones_like(IDS))[0, -1] + model.shift
        torch.testing.assert_close(scorer(IDS).logits[0, 0], score, rtol=1e-5, atol=1e-5)


def test_a_folder_with_pickles_only_is_refused(
    make_recipe: MakeRecipe, tiny_model: Path, tmp_path: Path
) -> None:
    """Loading a pickle runs the code of whoever wrote it."""
    model = AutoModelForCausalLM.from_pretrained(tiny_model)
    AutoTokenizer.from_pretrained(tiny_model).save_pretrained(tmp_path / "old")
    model.config.save_pretrained(tmp_path / "old")
    torch.save(model.state_dict(), tmp_path / "old" / "pytorch_model.bin")
    with pytest.raises(RecipeError, match=r"safetensors"):
        load_causal_lm(tmp_path / "old")


SCRIPT = """
import json, os, sys
from rayrlhf.generation import ENVIRONMENT, Engine
os.environ.update(ENVIRONMENT)
prompt = json.loads(sys.argv[1])
found, engines = {}, []  # the end of one would end what they share
for family, policy in json.loads(sys.argv[2]).items():
    engine = Engine(policy, max_length=48, memory_gib=0.01)
    engines.append(engine)
    answer, = engine.generate([prompt], max_tokens=12, temperature=0.0, seeds=[0])
    sampled, = engine.generate([prompt], max_tokens=12, temperature=1.0, seeds=[0])
    found[family] = [answer.token_ids, sampled.token_ids, sampled.log_probs]
print("RESULT" + json.dumps(found))
"""


@pytest.mark.slow
def test_vllm_generates_what_transformers_computes(
    make_recipe: MakeRecipe, models: dict[str, Path]
) -> None:
    """Greedy tokens and log-probs of sampled ones, of every family in one process."""
    finals = {
        family: str(one_step(make_recipe, SFTStage, family, model))
        for family, model in models.items()
    }
    prompt = IDS[0].tolist()
    found = result_of(SCRIPT, json.dumps(prompt), json.dumps(finals))
    for family, final in finals.items():
        model = AutoModelForCausalLM.from_pretrained(final)
        greedy, sampled, log_probs = found[family]
        with torch.no_grad():
            expected = torch.tensor([prompt + greedy])
            for position in range(len(prompt), expected.shape[1]):
                logits = model(expected[:, :position]).logits[0, -1]
                chosen = logits[greedy[position - len(prompt)]]
                assert logits.max() - chosen < 1e-4, family  # a tie rounds either way
            ids = torch.tensor([prompt + sampled])
            all_log_probs = model(ids).logits.log_softmax(-1)[0, len(prompt) - 1 : -1]
        theirs = all_log_probs.gather(1, torch.tensor(sampled)[:, None]).squeeze(1)
        torch.testing.assert_close(torch.tensor(log_probs), theirs, rtol=1e-3, atol=1e-4)
