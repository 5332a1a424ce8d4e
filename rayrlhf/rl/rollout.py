"""The engine as a worker."""

from itertools import chain

import torch
from transformers import AutoConfig, AutoModelForCausalLM

from rayrlhf.generation import Engine, request_seed
from rayrlhf.rl.buckets import Bucket, unpacked
from rayrlhf.rl.clock import timed
from rayrlhf.rl.experience import Rollout
from rayrlhf.rl.ranks import Worker
from rayrlhf.training.flops import ModelFlops, model_flops
from rayrlhf.transfer import Described, Meeting

PROBE_TOKENS = 16
"""Longest answer to a prompt of a probe (gate.py)."""


class RolloutWorker(Worker):
    """One engine."""

    _flops: ModelFlops | None = None
    _frozen: tuple[Bucket, ...] = ()

    def start(self) -> None:
        """Load the engine."""
        settings = self.settings
        self.engine = Engine(
            settings.model_path,
            max_length=settings.max_length,
            dtype=self.cfg.actor.precision,
            memory_gib=self.cfg.rollout_memory_gib,
            seed=settings.seed,
            num_threads=settings.num_threads,
            tensor_parallel=len(settings.spread) or max(1, int(settings.num_gpus)),
            bundles=settings.spread,
            gpu_share=settings.gpu_share,
            gpu_memory=settings.gpu_memory,
            sleeps=settings.takes_turns,
            eos_token_id=settings.eos_id,
            receives=self.cfg.weight_transfer == "broadcast",
        )
        if self.cfg.profile:
            with torch.device("meta"):
                config = AutoConfig.from_pretrained(settings.model_path)
                model = AutoModelForCausalLM.from_config(config)
            self._flops = model_flops(model, forward_only=True)

    @timed
    def generate(self, prompts: list[list[int]], first: int, step: int) -> Rollout:
        """Sample G responses per prompt; prompts[0] is number `first` of the step's batch."""
        samples = range(self.cfg.samples_per_prompt)
        repeated = [prompt for prompt in prompts for _ in samples]
        seeds = [
            request_seed(self.settings.seed, step, first + number, sample)
            for number in range(len(prompts))
            for sample in samples
        ]
        completions = self.engine.generate(
            repeated,
            max_tokens=self.cfg.max_response_tokens,
            temperature=self.cfg.temperature,
            seeds=seeds,
        )
        rollout = Rollout.from_completions(repeated, completions)
        if self._flops is not None:
            tokens = rollout.prompt_lengths + rollout.response_lengths - 1  # the last is not read
            self.clock.count(
                self._flops.total(
                    num_tokens=int(tokens.sum()),
                    num_pairs=int((tokens * (tokens + 1)).sum()) // 2,
                    num_outputs=int(rollout.response_lengths.sum()),
                )
            )
        return rollout

    def probe(self, prompts: list[list[int]], temperature: float) -> Rollout:
        """Answer each prompt once, the same at every call; 0 is greedy."""
        completions = self.engine.generate(
            prompts,
            max_tokens=min(PROBE_TOKENS, self.cfg.max_response_tokens),
            temperature=temperature,
            seeds=[request_seed(self.settings.seed, -1, i, 0) for i in range(len(prompts))],
        )
        return Rollout.from_completions(prompts, completions)

    def rest(self, asleep: bool) -> None:
        """Leave the device's memory to another role, or take it again (turns.py)."""
        self.engine.rest(asleep)

    def reset_prefix_cache(self) -> None:
        """Forget keys and values of prompts."""
        self.engine.reset_prefix_cache()

    def dtype(self) -> str:
        """Return what the engine computes in."""
        return self.engine.dtype

    def keep_weights(self, *frozen: Bucket) -> None:
        """Take the weights that every version has; they lie in Ray's store, for all of its node."""
        self._frozen = frozen

    @timed
    def load_weights(self, version: int, *weights: Bucket) -> int:
        """Replace all weights; returns the version that the engine now has."""
        return self.engine.load_weights(unpacked(chain(self._frozen, weights)), version)

    def join_transfer(self, meeting: Meeting, width: int) -> None:
        """Meet the trainer; every engine has `width` processes, and the trainer is rank 0."""
        self.engine.join_transfer(meeting, 1 + self.settings.rank * width)

    @timed
    def receive_weights(self, described: Described, version: int) -> int:
        """Take all weights as the trainer sends them; returns the version that the engine has."""
        return self.engine.receive_weights(described, version)
