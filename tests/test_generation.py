"""The engine: the real vLLM in a process of its own (it changes torch for the whole process)."""

import json
from pathlib import Path
from typing import Any

import pytest

from rayrlhf.generation import engine_arguments, request_seed
from tests.rl.inline import engine_model
from tests.scripts import result_of

SCRIPT = """
import json, os, sys, threading, time
os.environ["OMP_NUM_THREADS"] = "2"  # what threads begin with; the engine is to have one
import torch
from rayrlhf.generation import Engine, request_seed
from rayrlhf.models.causal_lm import load_causal_lm, named_weights, CausalLMModel

folder, changed = sys.argv[1:3]
options = dict(max_length=320, num_threads=1, memory_gib=0.02)
prompts = [[40 + i % 5] * (1 + i % 4) for i in range(24)]
seeds = [request_seed(0, 0, i, 0) for i in range(24)]
greedy = dict(max_tokens=8, temperature=0.0, seeds=[0] * 24)
sampled = dict(max_tokens=8, seeds=seeds)
# Longer than two blocks of the prefix cache (128 tokens on CPU), which it fills.
long = [[40 + i * i % 7 for i in range(290)]]
long_greedy = dict(max_tokens=8, temperature=0.0, seeds=[0])

def plain(completions):
    return [(c.token_ids, c.log_probs, c.finish_reason, c.weight_versions) for c in completions]

def gap(path, completions, temperature):
    model, worst = CausalLMModel(load_causal_lm(path)), 0.0
    for prompt, c in zip(prompts, completions):
        ids = torch.tensor([prompt + c.token_ids])
        with torch.no_grad():
            found = model(ids, torch.ones_like(ids), temperature=temperature)[0, len(prompt):]
        worst = max(worst, (found - torch.tensor(c.log_probs)).abs().max().item())
    return worst

out = {}
engine = Engine(folder, **options)
first = engine.generate(prompts, temperature=1.0, **sampled)
out["rerun"] = plain(engine.generate(prompts, temperature=1.0, **sampled)) == plain(first)
reversed_ = engine.generate(prompts[::-1], temperature=1.0, max_tokens=8, seeds=seeds[::-1])
out["order"] = [c.token_ids for c in reversed_[::-1]] == [c.token_ids for c in first]
out["distinct"] = len({tuple(c.token_ids) for c in engine.generate(
    [[40]] * 24, temperature=1.0, **sampled)})
spread = engine.generate([[40]] * 400, max_tokens=1, temperature=1.0, seeds=list(range(400)))
out["first_tokens"] = len({c.token_ids[0] for c in spread})
out["gap_1.0"] = gap(folder, first, 1.0)
out["gap_0.6"] = gap(folder, engine.generate(prompts, temperature=0.6, **sampled), 0.6)
out["version_0"] = first[0].weight_versions[0]
engine.generate(long, **long_greedy)
from vllm import SamplingParams
from vllm.inputs import TokensPrompt
again, = engine._llm.generate([TokensPrompt(prompt_token_ids=long[0])],
                              SamplingParams(max_tokens=1), use_tqdm=False)
out["cached_tokens"] = again.num_cached_tokens
# More tokens of prompts than the engine reads in a step.
many = [[2 + (i * i + j * (i + 3)) % 290 for j in range(280 + i % 8)] for i in range(30)]
together = engine.generate(many, temperature=1.0, max_tokens=4, seeds=list(range(30)))
alone = engine.generate(many[-1:], temperature=1.0, max_tokens=4, seeds=[29])
out["long_prompts"] = [sum(map(len, many)), together[-1].token_ids == alone[0].token_ids]

new = CausalLMModel(load_causal_lm(changed))
weights = [(name, tensor.numpy()) for name, tensor in named_weights(new)]
try:
    engine.load_weights(weights[1:], 7)
except ValueError as error:
    out["incomplete"] = str(error)
try:
    engine.load_weights([(n, w[:1] if i == 0 else w) for i, (n, w) in enumerate(weights)], 7)
except ValueError as error:
    out["misshapen"] = str(error)
out["kept"] = plain(engine.generate(prompts, temperature=1.0, **sampled)) == plain(first)
for version in (1, 2):                                     # twice: repacking must not wear out
    out["acknowledged"] = engine.load_weights(weights, version)
synced = [plain(engine.generate(long, **long_greedy)),  # first: nothing refills the cache
          plain(engine.generate(prompts, **greedy)),
          plain(engine.generate(prompts, temperature=1.0, **sampled))]
out["moved"] = synced[2][0][0] != first[0].token_ids
stopped = [c for c in engine.generate(prompts * 20, temperature=1.0, max_tokens=20,
                                      seeds=list(range(480))) if c.finish_reason == "stop"]
out["stopped"] = len(stopped)
out["stop_is_eos"] = all(c.token_ids[-1] == engine.eos_token_id and
                         engine.eos_token_id not in c.token_ids[:-1] for c in stopped)
fresh = Engine(changed, **options)
fresh._llm.llm_engine.set_weight_version("2")
out["fresh_long"] = synced[0] == plain(fresh.generate(long, **long_greedy))
out["fresh"] = synced[1:] == [plain(fresh.generate(prompts, **greedy)),
                              plain(fresh.generate(prompts, temperature=1.0, **sampled))]

# New weights in the middle of responses: they come from another thread, at the tenth step.
old = CausalLMModel(load_causal_lm(folder))
engine.load_weights([(name, tensor.numpy()) for name, tensor in named_weights(old)], 3)
threads = []
def load():
    engine.load_weights(weights, 4)
    threads.append(torch.get_num_threads())
loader = threading.Thread(target=load)
step, steps = engine._llm.llm_engine.step, []
def counted():
    steps.append(1)
    if len(steps) == 10:
        loader.start()
        while not engine._has_new_weights:
            time.sleep(0.001)
    return step()
engine._llm.llm_engine.step = counted
mixed = engine.generate(prompts, temperature=1.0, max_tokens=24, seeds=seeds)
loader.join()
worst, tokens = 0.0, {3: 0, 4: 0}
for prompt, c in zip(prompts, mixed):
    assert c.weight_versions == sorted(c.weight_versions)
    for version, model in ((3, old), (4, new)):
        mine = torch.tensor(c.weight_versions) == version
        tokens[version] += int(mine.sum())
        ids = torch.tensor([prompt + c.token_ids])
        with torch.no_grad():
            found_ = model(ids, torch.ones_like(ids), temperature=1.0)[0, len(prompt):]
        gaps = (found_ - torch.tensor(c.log_probs)).abs()[mine]
        worst = max([worst, *gaps.tolist()])
out["mixed_tokens"], out["mixed_gap"] = [tokens[3], tokens[4]], worst
out["mixed_responses"] = sum(set(c.weight_versions) == {3, 4} for c in mixed)
out["version_after"] = engine.weight_version
def answer():
    engine.generate(prompts[:1], temperature=1.0, max_tokens=1, seeds=[0])
    threads.append(torch.get_num_threads())
other = threading.Thread(target=answer)
other.start()
other.join()
out["threads"] = threads
print("RESULT" + json.dumps(out))
"""


def test_request_seeds_are_distinct_and_reproducible() -> None:
    places = [
        (seed, step, prompt, sample)
        for seed in range(2)
        for step in range(5)
        for prompt in range(20)
        for sample in range(4)
    ]
    seeds = [request_seed(*place) for place in places]
    assert len(set(seeds)) == len(places)
    assert seeds == [request_seed(*place) for place in places]
    assert all(0 <= seed < 2**63 for seed in seeds)


@pytest.mark.parametrize("tensor_parallel", [1, 2])
def test_memory_gib_is_the_kv_cache_on_cpu_only(tensor_parallel: int) -> None:
    """On a GPU vLLM sizes it by gpu_memory_utilization."""
    cpu, gpu = (
        engine_arguments(on_gpu=on_gpu, memory_gib=0.25, tensor_parallel=tensor_parallel)
        for on_gpu in (False, True)
    )
    assert cpu["kv_cache_memory_bytes"] == 2**28
    assert "kv_cache_memory_bytes" not in gpu
    assert (cpu["enforce_eager"], gpu["enforce_eager"]) == (True, False)
    for arguments in (cpu, gpu):
        assert arguments["tensor_parallel_size"] == tensor_parallel
        assert arguments["distributed_executor_backend"] == ("uni", "mp")[tensor_parallel - 1]


@pytest.fixture(scope="module")
def found(tiny_model: Path, tmp_path_factory: pytest.TempPathFactory) -> dict[str, Any]:
    """Run SCRIPT on two models of one shape."""
    first, changed = (
        engine_model(tmp_path_factory.mktemp("engine"), tiny_model, seed=seed) for seed in (0, 5)
    )
    # What a model's folder says of sampling must not reach PPO: it changes the distribution.
    cut = {"do_sample": True, "top_k": 2, "top_p": 0.3, "min_p": 0.5, "repetition_penalty": 2.0}
    (first / "generation_config.json").write_text(json.dumps(cut), encoding="utf-8")
    result: dict[str, Any] = result_of(SCRIPT, str(first), str(changed))
    return result


@pytest.mark.slow
def test_sampling_is_reproducible_whatever_stands_beside_it(found: dict[str, Any]) -> None:
    assert found["rerun"] and found["order"]
    assert found["distinct"] == 24  # one prompt, 24 seeds


@pytest.mark.slow
def test_nothing_cuts_the_distribution(found: dict[str, Any]) -> None:
    """No top-k, top-p, min-p or repetition penalty, whatever generation_config.json asks for."""
    assert found["first_tokens"] > 50
    assert found["gap_1.0"] < 1e-4


@pytest.mark.slow
def test_log_probs_are_those_of_the_learner_at_the_temperature(found: dict[str, Any]) -> None:
    assert found["gap_1.0"] < 1e-4
    assert found["gap_0.6"] < 1e-4


@pytest.mark.slow
def test_finish_reason_stop_means_end_of_text(found: dict[str, Any]) -> None:
    assert found["stopped"] > 0
    assert found["stop_is_eos"]


@pytest.mark.slow
def test_loaded_weights_equal_a_fresh_engine(found: dict[str, Any]) -> None:
    """Greedy output, sampled output and log-probs, to the bit; the head is tied."""
    assert found["version_0"] == 0
    assert found["acknowledged"] == 2
    assert found["moved"]
    assert found["fresh"]


@pytest.mark.slow
def test_38_prefix_cache_goes_with_the_old_weights(found: dict[str, Any]) -> None:
    """The cache holds blocks of the prompt, computed with the old weights, when new ones come."""
    assert found["cached_tokens"] >= 128
    assert found["fresh_long"]


@pytest.mark.slow
def test_incomplete_weights_are_refused(found: dict[str, Any]) -> None:
    assert found["incomplete"] == "weights of version 7 lack model.embed_tokens.weight"
    assert "shape" in found["misshapen"]
    assert found["kept"]


@pytest.mark.slow
def test_prompts_of_more_tokens_than_a_step_reads(found: dict[str, Any]) -> None:
    num_tokens, is_same = found["long_prompts"]
    assert num_tokens > 2 * 4096 and is_same


@pytest.mark.slow
def test_an_interrupted_response_goes_on_under_new_weights(found: dict[str, Any]) -> None:
    """Every token has the log-prob of the weights that sampled it, given all tokens before it."""
    assert found["version_after"] == 4
    assert found["mixed_responses"] >= 20
    assert min(found["mixed_tokens"]) >= 100
    assert found["mixed_gap"] < 1e-4


@pytest.mark.slow
def test_every_thread_of_python_computes_with_the_engines_number(found: dict[str, Any]) -> None:
    """vLLM makes torch.set_num_threads do nothing, and the kernels of AVX2 need one number."""
    assert found["threads"] == [1, 1]
