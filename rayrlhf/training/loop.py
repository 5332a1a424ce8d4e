"""The one training loop of pretraining, SFT, reward modelling and DPO, as Ray Train runs it.

A step is a pure function of (weights, optimizer, seed, step): the batch comes from (seed, step),
dropout from (seed, step, rank). So a killed run that resumes from its newest checkpoint computes
what an uninterrupted one does, bit by bit on CPU with as many workers.
"""

import hashlib
import os
import time
from concurrent.futures import Future, ThreadPoolExecutor
from pathlib import Path
from typing import Any

import ray.train
import torch
from ray.train import FailureConfig, RunConfig, ScalingConfig, TrainingFailedError
from ray.train.torch import TorchTrainer, get_device
from torch import nn

from rayrlhf import console, session
from rayrlhf.config import Recipe, RecipeError
from rayrlhf.data.datasets import shard
from rayrlhf.metrics import MetricsLogger, read_jsonl
from rayrlhf.training import checkpoint
from rayrlhf.training.backend import Backend, make_backend
from rayrlhf.training.best import Best, best_of
from rayrlhf.training.failures import NoSecondTry, cause_of
from rayrlhf.training.flops import model_flops
from rayrlhf.training.model_card import write_card
from rayrlhf.training.stage import Stage, add, padded
from rayrlhf.training.utilization import Meter


def train_stage(recipe: Recipe, kind: type[Stage]) -> Path:
    """Train a stage on Ray Train and return its `final` folder; resumes what was begun.

    A stage whose `final` is there is left alone. Raises RecipeError before any actor starts when
    the data, the start model or the cluster do not fit the recipe.
    """
    finals = kind.finals(recipe)
    final = finals[0]
    if all(map(checkpoint.is_complete, finals)):
        return final
    stage = kind(recipe)  # reads and checks all inputs
    console.say(derived_numbers(stage))
    session.connect(recipe)
    resources = recipe.resources
    session.require(resources.bundles(kind.name), wait_s=resources.wait_s, stage=kind.name)

    # How often the controller looks at the workers: a stage may be over in seconds.
    os.environ.setdefault("RAY_TRAIN_HEALTH_CHECK_INTERVAL_S", "0.5")
    if session.is_local():
        # No node of a local Ray is ever preempted, and the watcher is one more process to start.
        os.environ.setdefault("RAY_TRAIN_ENABLE_PREEMPTION_WATCHER", "0")
    trainer = TorchTrainer(
        _worker,
        train_loop_config={"recipe": recipe, "kind": kind, "directory": os.getcwd()},
        scaling_config=ScalingConfig(
            num_workers=resources.num_workers,
            use_gpu=resources.gpus_per_worker > 0,
            resources_per_worker={
                "CPU": resources.cpus_per_worker,
                "GPU": resources.gpus_per_worker,
            },
        ),
        run_config=RunConfig(
            name="ray_train",
            storage_path=str(final.parent.resolve()),
            failure_config=FailureConfig(max_failures=resources.max_restarts),
            callbacks=[NoSecondTry()],
        ),
    )
    try:
        trainer.fit()
    except TrainingFailedError as error:
        raise cause_of(error) from error
    for place in finals:
        assert checkpoint.is_complete(place), f"{place} was not written"
        _say_what_was_best(stage, place.parent)
    return final


def derived_numbers(stage: Stage) -> str:
    """Return the line on what follows from a stage's batch size and its data."""
    cfg, resources = stage.cfg, stage.recipe.resources
    ranks = resources.num_workers // resources.sequence_parallel
    each = "rank" if resources.sequence_parallel == 1 else f"{resources.sequence_parallel} ranks"
    unit = "prompts" if stage.name in ("reward", "dpo") else "sequences"
    first = stage.batch_sizes.before(1)
    grows = f"{first} to " if first < cfg.batch_size else ""
    return (
        f"{stage.name:>9} {stage.num_records} records, {stage.total_steps} steps of "
        f"{grows}{cfg.batch_size} {unit}, on average {cfg.batch_size / ranks:g} per {each} on "
        f"{ranks}, micro-batches of up to {cfg.tokens_per_microbatch} tokens"
    )


def _say_what_was_best(stage: Stage, folder: Path) -> None:
    """Print which step `final` is, where it is not the last one."""
    best = best_of(stage.selection, stage.cfg)
    if best is None:
        return
    records = read_jsonl(folder / "metrics.jsonl")
    for record in records:
        best.observe(record["step"], record)
    if best.step is not None and best.step < stage.total_steps:
        console.say(
            f"{stage.name:>9} {folder / 'final'} is step {best.step}, with the best "
            f"{best.selection.metric}, {best.value:.4g}; training ended at step "
            f"{records[-1]['step']} of {stage.total_steps}"
        )


def run(stage: Stage, device: torch.device) -> None:
    """Train `stage` from its newest checkpoint to its end; every rank calls it."""
    cfg, total = stage.cfg, stage.total_steps
    newest = checkpoint.newest_checkpoint(stage.folder)
    start = checkpoint.step_of(newest) if newest is not None else 0
    module = stage.build(newest)
    module.train()
    flops = model_flops(module)  # while the weights are whole
    backend = _backend(stage, module, device)
    meter = Meter(flops, backend)
    if newest is not None:
        backend.load_state(newest / checkpoint.STATE_DIR)
        stage.load_state(newest / checkpoint.STATE_DIR)
    best = best_of(stage.selection, cfg)
    if best is not None and newest is not None:
        best.load(newest / checkpoint.STATE_DIR)
    stage.prepare(backend, resumed=newest is not None)
    log = (
        MetricsLogger(
            stage.folder, start_step=start, num_steps=total, trackers=stage.recipe.tracking
        )
        if backend.rank == 0
        else None
    )

    ahead = Prefetch(stage, backend.data_rank, backend.data_size)
    for step in range(start + 1, total + 1):
        if best is not None and best.is_over:
            break
        micros, waited = ahead.take(step)
        torch.manual_seed(_seed(stage.recipe.seed, step, backend.rank))
        metrics = train_step(stage, backend, step, micros)
        metrics |= meter.metrics(micros, metrics["time/step_s"])
        note = stage.observe(step, metrics)
        metrics["time/data_wait_s"] = backend.global_max(waited)
        if step == total or _due(step, cfg.eval_every):
            metrics |= stage.evaluate(backend)
        is_best = best is not None and best.observe(step, metrics)
        samples = stage.samples(backend, step)
        if log is not None:
            log.log(step, metrics)
            if note is not None:
                log.note(step, note)
            for sample in samples:
                log.sample(step, sample)
        if step < total and (is_best or _due(step, cfg.save_every)):
            save(stage, backend, step, best)
    ahead.close()
    if best is not None and best.step not in (None, backend.num_steps):
        folder = _best_folder(stage, best.step)
        del module, backend, meter  # their memory is needed
        backend = _backend(stage, stage.build(folder), device)
    stage.finish(backend)
    save(stage, backend, None, best)
    if log is not None:
        log.close()


def _backend(stage: Stage, module: nn.Module, device: torch.device) -> Backend:
    backend = make_backend(
        module,
        stage.cfg,
        total_steps=stage.total_steps,
        device=device,
        sequence_parallel=stage.recipe.resources.sequence_parallel,
    )
    backend.rate = stage.learning_rate
    return backend


class Prefetch:
    """Reads the batch of the next step while the current one trains."""

    def __init__(self, stage: Stage, rank: int, world_size: int) -> None:
        self._stage, self._rank, self._world_size = stage, rank, world_size
        self._pool = ThreadPoolExecutor(1, thread_name_prefix="data")
        self._next: tuple[int, Future[list[Any]]] | None = None

    def take(self, step: int) -> tuple[list[Any], float]:
        """Return this rank's micro-batches of `step` (from 1), and the seconds waited for them."""
        started = time.perf_counter()
        if self._next is None or self._next[0] != step:
            self._next = (step, self._pool.submit(self._read, step))
        micros = self._next[1].result()
        self._next = None
        if step < self._stage.total_steps:
            self._next = (step + 1, self._pool.submit(self._read, step + 1))
        return micros, time.perf_counter() - started

    def close(self) -> None:
        """End the thread."""
        self._pool.shutdown(cancel_futures=True)

    def _read(self, step: int) -> list[Any]:
        stage = self._stage
        indices = stage.batch(step - 1)
        mine = shard(indices, self._rank, self._world_size, stage.costs(indices))
        return stage.microbatches(mine)


def train_step(stage: Stage, backend: Backend, step: int, micros: list[Any]) -> dict[str, float]:
    """Do optimizer step `step` (from 1) on this rank's part of its batch; return its metrics."""
    started = time.perf_counter()
    count, num_tokens = backend.global_sums(
        [sum(micro.count for micro in micros), sum(micro.num_tokens for micro in micros)]
    )
    micros = padded(stage, backend, micros)
    totals: dict[str, torch.Tensor] = {}
    for index, micro in enumerate(micros):
        loss_sum, sums = stage.loss(backend, micro.to(backend.device))
        backend.backward(loss_sum, count, is_last=index == len(micros) - 1)
        add(totals, sums)
    # Before the update, since a spike has none.
    values = backend.global_sums([float(total) for total in totals.values()])
    metrics = stage.metrics(dict(zip(totals, values, strict=True)), count)
    update = backend.step(stage.norm_limit(metrics))
    step_s = time.perf_counter() - started
    return {
        **metrics,
        **update,
        "tokens": num_tokens,
        "tokens_per_s": num_tokens / step_s,
        "epoch": stage.batch_sizes.before(step) / stage.num_records,
        "time/step_s": step_s,
    }


def save(stage: Stage, backend: Backend, step: int | None, best: Best | None = None) -> None:
    """Write the checkpoint of `step`, or `final` for None; every rank calls it.

    The folder of the best step so far stays, however many are kept.
    """
    if backend.rank == 0:
        checkpoint.begin(stage.folder, step)
    backend.barrier()
    folder = checkpoint.writing_place(stage.folder, step)
    # Gathering is collective; only one rank keeps what it is given.
    weights = {}
    for name, weight in backend.full_weights():
        if backend.rank == 0:
            weights[name] = weight
    if backend.rank == 0:
        stage.save(backend.module, folder, weights)
        stage.tokenizer.save_pretrained(folder)
        if step is None:
            write_card(stage.recipe, stage.name, folder, None if best is None else best.step)
        else:
            (folder / checkpoint.STATE_DIR).mkdir()
            if best is not None:
                best.save(folder / checkpoint.STATE_DIR)
            stage.save_state(folder / checkpoint.STATE_DIR)
    backend.barrier()
    if step is not None:
        backend.save_state(folder / checkpoint.STATE_DIR)
    if backend.rank == 0:
        keep = None if step is None else stage.cfg.keep_checkpoints
        checkpoint.commit(folder, keep, None if best is None else best.step)
    backend.barrier()


def _best_folder(stage: Stage, step: int) -> Path:
    folder = checkpoint.place_of(stage.folder, step)
    if not checkpoint.is_complete(folder):
        raise RecipeError(
            f"{folder}: the best checkpoint is not there any more, or damaged: move "
            f"{stage.folder} away and train again"
        )
    return folder


def _worker(config: dict[str, Any]) -> None:
    """Run in every Ray Train worker."""
    # Paths of the recipe are relative to where the command was given.
    os.chdir(config["directory"])
    recipe: Recipe = config["recipe"]
    torch.set_num_threads(recipe.resources.num_threads)
    for stage in config["kind"].runs(recipe):
        if not checkpoint.is_complete(stage.folder / "final"):
            run(stage, get_device())
    # Once, at the end, on every rank: Ray Train waits for all of them.
    ray.train.report({})


def _seed(seed: int, step: int, rank: int) -> int:
    digest = hashlib.sha256(f"{seed}/{step}/{rank}".encode()).digest()
    return int.from_bytes(digest[:8], "little") >> 1


def _due(step: int, every: int | None) -> bool:
    return every is not None and step % every == 0
