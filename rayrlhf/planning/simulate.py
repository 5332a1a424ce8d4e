"""A PPO run on 1 to 4,096 devices: throughput, and the work that failures cost.

The recipe's layout, made for n0 devices, is repeated: on n devices a step has n / n0 of its
prompts, and every device the work that it has in the plan (weak scaling). What changes with n:

rollout     The step waits for its longest response. With R responses of a mean m that are cut at
            max_response_tokens L, the longest is about min(L, s ln(2 R)), s being the scale of the
            exponential that, cut at L, has the mean m; the engine that has it runs on alone, at the
            seconds of a step of the engine for one response.
learner     Every layer's collectives pass ceil(log2(ranks)) hops of HOP_S, forward and backward.
sync        The bytes of the plan, and once more through the network for each of the
            ceil(log2(nodes)) levels of the tree in which Ray's store copies them to the nodes.
staleness   Versions that a response is behind those that learn from it: 0 where rollouts and
            updates take turns, else ceil(rollout / (evaluate + update + sync)), at most
            ppo.max_staleness, since `stale: wait` starts no batch earlier.
failures    Each device fails with FAILURES_PER_DEVICE_DAY; the node goes with it. Mean time between
            failures M = 1 / (rate n). Those of rollout, reference and reward workers cost their own
            part of a rollout, repeated by the successor; those of the learner, with part
            p = learners / devices, cost the way back to the newest checkpoint and RESTART_S.
checkpoint  C seconds: weights, and moments of actor and critic, WRITE_BYTES_PER_S per node with
            ranks of the learner, but the weights through rank 0 alone. The interval is Daly's
            (2006, eq. 37); Young's (1974), sqrt(2 C M), stands beside it; M is M / p in both.

`goodput` draws failures (seeded) and plays a run through with these terms: work done over time
passed. `lost` is its complement, which `lost_part` gives to the first order:
C / t + p (t / 2 + RESTART_S) / M + own part of a rollout.
"""

import math
import random
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from rayrlhf.console import table
from rayrlhf.planning.estimate import Estimate
from rayrlhf.planning.lengths import exponential_scale
from rayrlhf.planning.speed import lone_token_s, rates_of

SIZES = tuple(2**power for power in range(13))
HOP_S = 1.5e-5
"""Latency of a hop of a collective."""
FAILURES_PER_DEVICE_DAY = 419 / (54 * 16384)
"""Unexpected interruptions of Llama 3's pretraining: 419 in 54 days on 16,384 H100
(arXiv:2407.21783, section 3.3.4): 0.00047, one in 5.8 years of a device."""
RESTART_S = 300.0
"""From the death of a rank to its first step after: noticed, placed anew, loaded."""
WRITE_BYTES_PER_S = 2e9
"""To the file system, per node."""
DAY_S = 86_400.0
DAYS = 30
"""Length of a simulated run."""


@dataclass(frozen=True)
class Terms:
    """The terms of the model at one size, in seconds where nothing else is said."""

    devices: int
    rollout: float
    learner: float
    """evaluate and update."""
    sync: float
    overlaps: bool
    staleness: int
    tokens: float
    """Of a step."""
    between_failures: float
    """M: mean, of any device."""
    learner_part: float
    """p: part of the devices, whose death goes back to a checkpoint."""
    checkpoint: float
    """C."""

    @property
    def step(self) -> float:
        """Seconds of a step without failures."""
        if self.overlaps:
            return max(self.rollout, self.learner) + self.sync
        return self.rollout + self.learner + self.sync

    @property
    def young(self) -> float:
        """Return the checkpoint interval by Young."""
        return young(self.checkpoint, self.between_failures / self.learner_part)

    @property
    def daly(self) -> float:
        """Return the checkpoint interval by Daly."""
        return daly(self.checkpoint, self.between_failures / self.learner_part)


def young(checkpoint: float, between: float) -> float:
    """Return sqrt(2 C M), seconds. Source: J. W. Young, Comm. ACM 17 (1974)."""
    return math.sqrt(2 * checkpoint * between)


def daly(checkpoint: float, between: float) -> float:
    """Return Daly's interval of work between checkpoints, seconds.

    Source: J. T. Daly, Future Generation Computer Systems 22 (2006), eq. 37.
    """
    if checkpoint >= 2 * between:
        return between
    ratio = checkpoint / (2 * between)
    return young(checkpoint, between) * (1 + math.sqrt(ratio) / 3 + ratio / 9) - checkpoint


def longest_response(mean: float, longest: int, count: float) -> float:
    """Return about the longest of `count` responses of this mean that are cut at `longest`."""
    scale = exponential_scale(mean, longest)
    if math.isinf(scale):
        return float(longest)
    return min(float(longest), max(mean, scale * math.log(2 * max(1.0, count))))


def terms_of(plan: Estimate, devices: int) -> Terms:
    """Return the terms on `devices` of what is planned for the recipe's own number of them."""
    step, found, cfg = plan.step, plan.lengths, plan.recipe.ppo
    assert step is not None and found is not None and cfg is not None
    cluster, device = plan.cluster, plan.cluster.device
    times = devices / used_devices(plan)
    nodes = max(1, math.ceil(devices / cluster.per_node))

    rollout_need, actor = plan.roles["rollout"], plan.roles["actor"]
    engine = rates_of(rollout_need.device, cfg.actor.precision)
    own = -(-cfg.num_responses // rollout_need.num_workers)
    planned = max(found.responses(own))
    tail = longest_response(found.response, found.longest_response, times * cfg.num_responses)
    b = 2 if cfg.actor.precision == "bfloat16" else 4
    rollout = step.phases["rollout"]
    rollout += max(0.0, tail - planned) * lone_token_s(rollout_need, engine, b)

    ranks = max(1.0, times * actor.num_workers)
    micros = cfg.epochs * cfg.num_minibatches * actor.micros
    hops = math.ceil(math.log2(ranks)) if ranks > 1 else 0
    learner = step.phases["evaluate"] + step.phases["update"]
    learner += hops * HOP_S * 3 * micros * actor.shape.num_layers

    weights = b * actor.shape.num_params
    levels = math.ceil(math.log2(nodes)) if nodes > 1 else 0
    sync = step.phases["sync"] + levels * weights / device.network

    learners = [need for name, need in plan.roles.items() if name in ("actor", "critic")]
    part = min(1.0, sum(need.num_workers for need in learners) / used_devices(plan))
    if plan.recipe.resources.layout == "colocated" or not device.is_gpu:
        part = 1.0  # a device that dies takes a rank of the learner along
    holding = max(1, math.ceil(part * nodes))
    state = sum(8.0 * need.shape.num_params for need in learners) / holding
    whole = sum(4.0 * need.shape.num_params for need in learners)
    behind = math.ceil(rollout / (learner + sync)) if step.overlaps else 0
    return Terms(
        devices,
        rollout,
        learner,
        sync,
        step.overlaps,
        min(cfg.max_staleness, behind),
        times * step.tokens,
        DAY_S / (FAILURES_PER_DEVICE_DAY * devices),
        part,
        (state + whole) / WRITE_BYTES_PER_S,
    )


def used_devices(plan: Estimate) -> int:
    """Return how many devices the roles of PPO have."""
    needs = plan.roles.values()
    if not plan.cluster.device.is_gpu:
        return plan.cluster.num_devices
    on_gpu = [need.num_workers * need.width for need in needs if need.device.is_gpu]
    if plan.recipe.resources.layout == "colocated":
        return max(on_gpu, default=1)
    return max(1, sum(on_gpu))


def lost_part(terms: Terms, interval: float) -> float:
    """Return the part of the time that is lost with this interval, to the first order."""
    back = terms.learner_part * (interval / 2 + RESTART_S)
    own = (1 - terms.learner_part) * terms.rollout / 2
    return terms.checkpoint / interval + (back + own) / terms.between_failures


def goodput(terms: Terms, interval: float, *, days: float = DAYS, seed: int = 0) -> float:
    """Return the part of the time in which a simulated run does work that stays.

    Steps of work and checkpoints alternate; a failure falls on any moment.
    """
    rng = random.Random(seed)
    end = days * DAY_S
    now = done = since = 0.0  # seconds passed, of work that is saved, of work since
    failure = rng.expovariate(1 / terms.between_failures)
    while now < end:
        # To the next checkpoint, and through it.
        left = interval - since + terms.checkpoint
        if now + left <= failure:
            now, done, since = now + left, done + interval, 0.0
            continue
        since = min(interval, since + max(0.0, failure - now))
        now = failure
        if rng.random() < terms.learner_part:
            since = 0.0
            now += RESTART_S
        else:
            now += terms.rollout / 2  # its successor repeats what it was doing
        failure = now + rng.expovariate(1 / terms.between_failures)
    return min(1.0, (done + since) / now)


def simulate_sizes(plan: Estimate, path: Path, sizes: Sequence[int] = SIZES) -> list[str]:
    """Write the plot and return the lines of the table; an empty path is plan.png of the run."""
    every = [terms_of(plan, devices) for devices in sizes]
    parts = [goodput(terms, terms.daly) for terms in every]
    place = plan.recipe.path / "plan.png" if path == Path() else path
    place.parent.mkdir(parents=True, exist_ok=True)
    place.write_bytes(_plot(every, parts))
    header = (
        "devices",
        "tokens/s",
        "after failures",
        "lost %",
        "failures a day",
        "checkpoint every s (Daly)",
        "(Young)",
        "sync s",
        "versions behind",
    )
    rows = [
        (
            terms.devices,
            f"{terms.tokens / terms.step:,.0f}",
            f"{part * terms.tokens / terms.step:,.0f}",
            f"{100 * (1 - part):.2f}",
            f"{DAY_S / terms.between_failures:.2g}",
            f"{terms.daly:,.0f}",
            f"{terms.young:,.0f}",
            f"{terms.sync:.3g}",
            terms.staleness,
        )
        for terms, part in zip(every, parts, strict=True)
    ]
    cfg = plan.recipe.ppo
    assert cfg is not None and plan.step is not None
    own = terms_of(plan, used_devices(plan))
    every_s = cfg.save_every * own.step
    return [
        f"\na run of {DAYS} days, prompts in proportion to the devices:",
        table(header, rows),
        f"ppo.save_every={cfg.save_every} is {every_s:,.0f} s on {own.devices} devices, where "
        f"{own.daly:,.0f} s lose the least ({100 * lost_part(own, own.daly):.2f}% of the time, "
        f"{100 * lost_part(own, every_s):.2f}% as it is)",
        f"plot: {place}",
    ]


def _plot(every: Sequence[Terms], parts: Sequence[float]) -> bytes:
    """Draw throughput and lost work over the size; returns a PNG."""
    from matplotlib.figure import Figure as Canvas

    from rayrlhf.evaluation.plots.canvas import Theme, render

    sizes = [terms.devices for terms in every]
    speed = [terms.tokens / terms.step for terms in every]

    def draw(theme: Theme, canvas: Canvas) -> None:
        left, right = canvas.subplots(1, 2)
        ideal = [speed[0] * size / sizes[0] for size in sizes]
        left.plot(sizes, ideal, color=theme.colours["faint"], label="linear")
        left.plot(sizes, speed, color=theme.colours["sft"], label="without failures")
        after = [part * each for part, each in zip(parts, speed, strict=True)]
        left.plot(sizes, after, color=theme.colours["ppo"], label="with failures")
        left.set(xscale="log", yscale="log", xlabel="devices", ylabel="tokens/s")
        left.set_title("throughput")
        left.legend()
        lost = [100 * (1 - part) for part in parts]
        first = [100 * lost_part(terms, terms.daly) for terms in every]
        right.plot(sizes, lost, color=theme.colours["ppo"], label="simulated, 30 days")
        right.plot(sizes, first, color=theme.colours["faint"], label="first order")
        right.set(xscale="log", xlabel="devices", ylabel="% of the time")
        right.set_title("lost work")
        right.legend()

    caption = "Throughput and lost work over the number of devices."
    return render("plan", "A run on 1 to 4,096 devices", caption, draw, size=(9.0, 3.4)).light
