"""The gate on the real vLLM, made wrong in each way that it names; in a process of its own."""

from pathlib import Path
from typing import Any

import pytest

from tests.rl.inline import engine_model, write_small_critic
from tests.scripts import result_of

SCRIPT = """
import json, sys
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path
from unittest.mock import patch
import torch, vllm
from rayrlhf.generation import Engine
from rayrlhf.rl import waiting
from rayrlhf.rl.gate import Gate
from rayrlhf.rl.setup import Prompts
from rayrlhf.rl.weight_sync import send_frozen, sync_weights
from tests.rl.inline import InlineRay, inline_roles, inline_settings
from tests.rl.test_lora import update

model, critic, tokenizer, folder = map(Path, sys.argv[1:])
waiting.ray = InlineRay
# Two blocks of the prefix cache (128 tokens on CPU) and more.
PROMPTS = Prompts([[40 + (i + j * j) % 7 for j in range(290)] for i in range(4)], 0, 4)
OPTIONS = dict(max_length=320, num_threads=1, memory_gib=0.02)

def roles_of(engine, **keys):
    own = inline_settings(model, tokenizer, max_response_tokens=8, **keys)
    roles = inline_roles(replace(own, max_length=320), critic)
    roles.rollout.seats[0].worker.worker.engine = engine
    return roles, own.ppo

def moved(roles):
    torch.manual_seed(1)
    with torch.no_grad():
        for weight in roles.actor.seats[0].worker.worker.model.parameters():
            weight += 0.05 * torch.randn(weight.shape)

real, engine = vllm.SamplingParams, Engine(str(model), **OPTIONS)
runner = engine._llm.llm_engine.model_executor.driver_worker.model_runner

def half(**keys):
    wanted = keys.pop("temperature")
    return real(temperature=wanted if wanted in (0, 1) else wanted / 2, **keys)

def kept(**keys):
    return real(**{**keys, "top_p": 0.6})

@contextmanager
def raw():
    sampler, mode = runner.sampler, "raw_logprobs"
    with (patch.object(sampler, "logprobs_mode", mode),
          patch.object(sampler.topk_topp_sampler, "logprobs_mode", mode)):
        yield

@contextmanager
def acknowledges_only():
    load, count = engine.load_weights, []
    def miss(weights, version):
        count.append(1)
        return version if len(count) == 1 else load(weights, version)
    with patch.object(engine, "load_weights", miss):
        yield

@contextmanager
def keeps_cache():
    reset, count = engine._llm.reset_prefix_cache, []
    def forget(**keys):
        count.append(1)
        return True if len(count) == 1 else reset(**keys)
    with patch.object(engine._llm, "reset_prefix_cache", forget):
        yield

@contextmanager
def sound():
    yield

FAULTS = {
    "sound": sound(),
    "half temperature": patch("vllm.SamplingParams", half),
    "raw log-probs": raw(),
    "top-p": patch("vllm.SamplingParams", kept),
    "stale cache": keeps_cache(),
    "missed update": acknowledges_only(),
}
found = {}
for name, fault in FAULTS.items():
    roles, cfg = roles_of(engine, kl_rollout_mismatch_max=1e-3, temperature=0.7)
    sync_weights(roles.actor, roles.rollout, version=0)
    gate = Gate(cfg, roles, PROMPTS)
    gate.probe(0, 0)  # fills the cache
    moved(roles)
    with fault:
        sync_weights(roles.actor, roles.rollout, version=1)
        try:
            found[name] = Gate(cfg, roles, PROMPTS).probe(0, 1)
        except RuntimeError as error:
            found[name] = str(error)

rounds = Engine(str(model), dtype="bfloat16", **OPTIONS)
roles, cfg = roles_of(rounds, kl_rollout_mismatch_max=1e-3, temperature=0.7)
sync_weights(roles.actor, roles.rollout, version=0)
try:
    found["bfloat16"] = Gate(cfg, roles, PROMPTS).probe(0, 0)
except RuntimeError as error:
    found["bfloat16"] = str(error)
roles, cfg = roles_of(rounds, kl_rollout_mismatch_max=1e-4, old_log_probs="auto")
gate = Gate(cfg, roles, PROMPTS)
found["bfloat16 auto"] = [gate.probe(0, 0)["gate/sampled"], gate.takes_rollout]

# What a LoRA run leaves is a plain model, and the engine in the run had the same weights.
lora = {"rank": 4, "alpha": 8}
roles, cfg = roles_of(engine, lora=lora, actor={"learning_rate": 3e-2}, num_minibatches=1)
worker = roles.actor.seats[0].worker.worker
update(worker, roles.rollout.seats[0].worker.worker.generate(PROMPTS.take(0), 0, step=0))
send_frozen(cfg, roles.actor, roles.rollout)
sync_weights(roles.actor, roles.rollout, version=1)
asked = dict(max_tokens=8, temperature=0.0, seeds=[0] * 4)
ours = engine.generate(list(PROMPTS.ids), **asked)
folder.mkdir()
worker.export(str(folder))
final = Engine(str(folder), **OPTIONS)
theirs = final.generate(list(PROMPTS.ids), **asked)
start = Engine(str(model), **OPTIONS).generate(list(PROMPTS.ids), **asked)
found["lora"] = {
    "same_tokens": [c.token_ids for c in ours] == [c.token_ids for c in theirs],
    "gap": max(abs(a - b) for o, t in zip(ours, theirs)
               for a, b in zip(o.log_probs, t.log_probs)),
    "learned": max(abs(a - b) for o, s in zip(start, theirs)
                   for a, b in zip(o.log_probs, s.log_probs)),
    "version": final.weight_version,
}
print("RESULT" + json.dumps(found))
"""


@pytest.fixture(scope="module")
def found(
    tiny_model: Path, tiny_tokenizer: Path, tmp_path_factory: pytest.TempPathFactory
) -> dict[str, Any]:
    """Run SCRIPT."""
    folder = tmp_path_factory.mktemp("gate")
    model = engine_model(folder / "model", tiny_model)
    critic = write_small_critic(folder / "critic", model)
    found: dict[str, Any] = result_of(
        SCRIPT, str(model), str(critic), str(tiny_tokenizer), str(folder / "final")
    )
    return found


@pytest.mark.slow
@pytest.mark.parametrize(
    ("fault", "reason"),
    [
        ("half temperature", "temperature: the engine's log-probs are those of 0.35, not of 0.7"),
        ("raw log-probs", "temperature: the engine's log-probs are those of 1, not of 0.7"),
        ("top-p", "top-p, top-k or min-p: the engine keeps "),
        ("stale cache", "a stale prefix cache"),
        ("missed update", "weights of another version in an engine"),
        ("bfloat16", "dtype: the engines compute in bfloat16, the actor in float32"),
    ],
)
def test_a_fault_of_vllm_is_named(found: dict[str, Any], fault: str, reason: str) -> None:
    assert reason in found[fault], found[fault]


@pytest.mark.slow
def test_a_sound_vllm_passes_and_auto_computes_around_rounding(found: dict[str, Any]) -> None:
    assert all(0 <= gap < 1e-4 for gap in found["sound"].values())
    gap, takes_rollout = found["bfloat16 auto"]
    assert gap > 1e-4 and not takes_rollout


@pytest.mark.slow
def test_vllm_loads_what_a_lora_run_leaves(found: dict[str, Any]) -> None:
    """The engine of the run, which got base and adapters, and one that reads the folder agree."""
    lora = found["lora"]
    assert lora["same_tokens"] and lora["gap"] < 1e-4 < 1e-2 < lora["learned"], lora
    assert lora["version"] == 0
