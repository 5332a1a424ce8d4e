"""What the device at hand achieves, measured on one layer of the recipe's model and on two.

    forward, backward   the seconds of a micro-batch through one layer and through two, with few
                        tokens and with many: their difference is a layer, of which the few tokens
                        tell the fixed part, and the many the FLOP/s
    optimizer           AdamW with clipping on these parameters, as bytes/s
    decode              vLLM on one layer: a step of the engine with one response, and with as many
                        as a step of the recipe has

Rates are per thread, with the threads that the actor and the engine have in the recipe. Time is
that of the processor over the threads: what else runs on the machine does not count. Weights are
random; heads whose size is not that of the width over their number are taken as if it were.
"""

import json
import os
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from dataclasses import replace
from functools import partial
from typing import Any

from rayrlhf.config import ModelConfig, Recipe, RecipeError, TrainingConfig
from rayrlhf.planning import shapes
from rayrlhf.planning.devices import this_machine
from rayrlhf.planning.needs import of_ppo
from rayrlhf.planning.shapes import Shape
from rayrlhf.planning.speed import Rates, forward_flops, rates_of

FEW = 32
"""Tokens whose products take no time beside what a layer always takes."""
LENGTH = 32
"""Tokens of the probe's sequences."""
REPEATS = 5
DECODED = 16
"""Tokens of a response in the engine's probe."""
ENGINE_S = 300.0
"""Longest time of the engine's probe."""


def probe(recipe: Recipe) -> Rates:
    """Return the rates of this machine; raises RecipeError without PPO, which they are for."""
    if recipe.ppo is None:
        raise RecipeError(
            "--probe measures a layer of PPO's policy, but the recipe has no ppo section: add it, "
            "or take --probe out"
        )
    import torch

    shape = shapes.policy(recipe)
    needs, found = of_ppo(recipe, this_machine().device)
    threads = recipe.resources.actor.num_threads
    torch.set_num_threads(threads)
    tokens = max(2 * FEW, round(min(recipe.ppo.actor.tokens_per_microbatch,
                                    recipe.ppo.minibatch_size * found.total)))  # fmt: skip
    table = rates_of(needs["actor"].device, recipe.ppo.actor.precision)
    forward, train, layer_s, optimizer = _passes(shape, recipe.ppo.actor, tokens)
    per_engine = -(-recipe.ppo.num_responses // needs["rollout"].num_workers)
    alone, together = _decode(recipe, shape, min(256, per_engine))
    each = max(0.0, together - alone) / max(1, min(256, per_engine) - 1)
    flops = forward_flops(replace(shape, num_layers=1), 1, 0, 1)
    engine_threads = recipe.resources.rollout.num_threads
    return replace(
        table,
        forward=forward / threads,
        train=train / threads,
        bandwidth=optimizer,
        # Of the probe's own layer, and of the others, which take what they take in training.
        token_s=alone + (shape.num_layers - 1) * layer_s,
        response_s=max(0.0, each - flops / (forward / threads * engine_threads)),
        layer_s=layer_s,
        source="a probe of one layer on this machine",
    )


class _Layers:
    """A model of a few layers, ready to train, and a micro-batch for it."""

    def __init__(self, shape: Shape, training: TrainingConfig, layers: int) -> None:
        import torch

        from rayrlhf.models.causal_lm import CausalLMModel, build_causal_lm
        from rayrlhf.training.backend import make_backend

        hf = build_causal_lm(
            model_config(shape, layers),
            vocab_size=shape.vocab_size,
            eos_token_id=0,
            pad_token_id=1,
            seed=0,
        )
        self.num_params = sum(parameter.numel() for parameter in hf.parameters())
        self.backend = make_backend(
            CausalLMModel(hf),
            TrainingConfig(precision=training.precision),
            total_steps=100,
            device=torch.device("cpu"),
        )
        self._vocab_size = shape.vocab_size

    def take(self, tokens: int) -> None:
        """Take as many tokens from now on; half of them are responses."""
        import torch

        self._ids = torch.randint(2, self._vocab_size, (tokens // LENGTH, LENGTH))
        self._half = torch.zeros_like(self._ids, dtype=torch.bool)
        self._half[:, LENGTH // 2 :] = True
        self._mask = torch.ones_like(self._ids)

    def forward(self) -> Any:
        """Return log-probs without a graph."""
        import torch

        with torch.no_grad():
            return self.backend(self._ids, self._mask, positions=self._half)

    def both(self) -> None:
        """Do a forward and a backward pass."""
        log_probs = self.backend(self._ids, self._mask, positions=self._half)
        self.backend.backward(log_probs.sum(), 1.0, is_last=True)

    def update_s(self) -> float:
        """Return the seconds of clipping and AdamW."""
        self.both()
        return _seconds(self.backend.step)


def _passes(
    shape: Shape, training: TrainingConfig, tokens: int
) -> tuple[float, float, float, float]:
    """Return FLOP/s forward, FLOP/s forward and backward, seconds of a layer, bytes/s of AdamW."""
    many = tokens // LENGTH * LENGTH
    one, two = _Layers(shape, training, 1), _Layers(shape, training, 2)
    seconds: dict[int, float] = {}
    for size in (FEW, many):
        one.take(size)
        two.take(size)
        seconds[size] = max(1e-6, _best(two.forward) - _best(one.forward))
    fixed = min(seconds[FEW], 0.9 * seconds[many])
    flops = forward_flops(replace(shape, num_layers=1), many, LENGTH, many / 2)
    # Of one layer with embedding and output layer, beyond what is fixed.
    forward = flops / max(1e-6, _best(one.forward) - fixed)
    train = 3 * flops / max(1e-6, _best(one.both) - 3 * fixed)
    one.update_s()
    update_s = min(one.update_s() for _ in range(REPEATS))
    return forward, train, fixed, 36 * one.num_params / update_s


def model_config(shape: Shape, layers: int) -> ModelConfig:
    """Return the model of a probe: the shape with so many layers."""
    return ModelConfig(
        architecture="llama" if shape.gated else "gpt2",
        hidden_size=shape.hidden_size,
        num_layers=layers,
        num_heads=shape.num_heads,
        num_kv_heads=shape.num_kv_heads,
        intermediate_size=shape.intermediate_size,
        max_length=4 * LENGTH,
        tie_embeddings=shape.tied,
    )


def _best(run: Callable[[], Any]) -> float:
    """Return the shortest of REPEATS runs, in seconds."""
    run()
    return min(_seconds(run) for _ in range(REPEATS))


def _seconds(run: Callable[[], Any]) -> float:
    """Return the seconds of the processor that `run` takes of each thread of torch."""
    import torch

    started = time.process_time()
    run()
    return (time.process_time() - started) / torch.get_num_threads()


def _decode(recipe: Recipe, shape: Shape, count: int) -> tuple[float, float]:
    """Return the seconds of a step of an engine of one layer: with one response, and `count`.

    In a process of its own, for an engine changes the one that it is in.
    """
    assert recipe.ppo is not None
    cfg = model_config(shape, 1)
    keys = {
        "model": cfg.model_dump(mode="json"),
        "vocab_size": shape.vocab_size,
        "count": count,
        "threads": recipe.resources.rollout.num_threads,
        "dtype": recipe.ppo.actor.precision,
    }
    with tempfile.TemporaryDirectory() as place:
        done = subprocess.run(
            [sys.executable, "-m", "rayrlhf.planning.probe", place, json.dumps(keys)],
            env={**os.environ, "HF_HUB_OFFLINE": "1"},
            capture_output=True,
            text=True,
            timeout=ENGINE_S,
            check=False,
        )
    if done.returncode:
        last = (done.stderr.strip().splitlines() or ["it said nothing"])[-1]
        raise RuntimeError(f"the probe's engine ended with exit code {done.returncode}: {last}")
    alone, together = json.loads(done.stdout.splitlines()[-1])
    return float(alone), float(together)


def _main(place: str, text: str) -> None:
    """Time an engine on a model of one layer in the folder `place`; print two numbers."""
    keys = json.loads(text)
    from rayrlhf.generation import Engine
    from rayrlhf.models.causal_lm import build_causal_lm

    hf = build_causal_lm(
        ModelConfig(**keys["model"]),
        vocab_size=keys["vocab_size"],
        eos_token_id=0,
        pad_token_id=1,
        seed=0,
    )
    hf.save_pretrained(place)
    engine = Engine(
        place,
        max_length=4 * LENGTH,
        dtype=keys["dtype"],
        num_threads=keys["threads"],
        eos_token_id=0,
    )

    def token_s(count: int) -> float:
        """Return the seconds of a token: of DECODED + 1 of them less those of one."""

        def run(length: int) -> None:
            prompts = [[2 + index % 50, 3, 4, 5] for index in range(count)]
            engine.generate(prompts, max_tokens=length, temperature=1.0, seeds=range(count))

        return max(1e-6, _best(partial(run, DECODED + 1)) - _best(partial(run, 1))) / DECODED

    print(json.dumps([token_s(1), token_s(keys["count"])]))


if __name__ == "__main__":
    _main(*sys.argv[1:])
