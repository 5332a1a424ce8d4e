"""The tables that `rayrlhf plan` prints."""

from rayrlhf.config import RecipeError
from rayrlhf.console import table
from rayrlhf.planning.advice import Change, written
from rayrlhf.planning.devices import GIB
from rayrlhf.planning.estimate import Estimate
from rayrlhf.planning.fit import Shortfall, host_peak
from rayrlhf.planning.memory import MARGIN, Memory
from rayrlhf.planning.needs import Need


def size(count: float) -> str:
    """Return bytes as a person reads them."""
    if count >= 10 * GIB:
        return f"{count / GIB:.1f} GiB"
    return f"{count / GIB:.2f} GiB" if count >= GIB else f"{count / 2**20:.0f} MiB"


def memory_table(now: Estimate) -> str:
    """Return what each process holds on its device, in GiB."""
    header = (
        "process",
        "model",
        "workers",
        "on",
        "weights",
        "gradients",
        "optimizer",
        "activations",
        "logits",
        "KV cache",
        "buffers",
        "process",
        "margin",
        "in all",
        "host",
    )
    rows = [_row(name, need) for name, need in now.stages.items()]
    rows += [_row(f"ppo {role}", need) for role, need in now.roles.items()]
    return table(header, rows)


def _row(name: str, need: Need) -> tuple[object, ...]:
    held = need.memory
    margin = (MARGIN - 1) * held.passing if need.device.is_gpu else 0.0
    device = need.device.name if need.device.is_gpu else "CPU"
    parts = (
        held.weights,
        held.gradients,
        held.masters + held.moments,
        held.activations,
        held.outputs,
        held.cache,
        held.buffers,
        held.process,
        margin,
    )
    host = (host_peak(need) if need.device.is_gpu else 0.0) + need.imports
    return (
        name,
        f"{need.shape.num_params / 1e9:.3g}B",
        f"{need.num_workers} x {need.width}" if need.width > 1 else f"{need.num_workers}",
        device,
        *(part / GIB for part in parts),
        _in_all(held, margin) / GIB,
        host / GIB,
    )


def _in_all(held: Memory, margin: float) -> float:
    return max(held.kept + held.passing + margin, held.starts)


def time_lines(now: Estimate) -> list[str]:
    """Return seconds, tokens per second and money, of the stages and of PPO."""
    lines = []
    rows: list[tuple[object, ...]] = [
        (name, step.seconds, f"{step.tokens_per_s:,.0f}", f"{step.cost(now.cluster):.3g}")
        for name, step in now.stage_steps.items()
    ]
    if now.step is not None:
        rows.append(
            (
                "ppo",
                now.step.seconds,
                f"{now.step.tokens_per_s:,.0f}",
                f"{now.step.cost(now.cluster):.3g}",
            )
        )
    lines.append(table(("step of", "seconds", "tokens/s", "$ per million tokens"), rows))
    if now.step is not None:
        phases = ", ".join(f"{name} {s:.3g} s" for name, s in now.step.phases.items())
        beside = "; rollouts run beside the learner" if now.step.overlaps else ""
        lines.append(f"a PPO step: {phases}{beside}")
        lines.append(f"the bottleneck: {now.step.bottleneck}")
    return lines


def change_line(change: Change, before: Estimate, after: Estimate) -> str:
    """Return the line on the first change that would help."""
    assert before.step is not None and after.step is not None
    return (
        f"first change that helps: {written(change)}: a step of {after.step.seconds:.3g} s, "
        f"before {before.step.seconds:.3g} s"
    )


def refusal(now: Estimate, change: Change | None) -> RecipeError:
    """Return the error of a recipe that does not fit: role, device, bytes missing, the change."""
    worst: Shortfall = now.shortfalls[0]
    others = sorted({short.who for short in now.shortfalls[1:]} - {worst.who})
    more = f" (and {', '.join(others)})" if others else ""
    fix = (
        f"smallest change that fits: {written(change)}"
        if change is not None
        else "no single change that plan knows, nor two of them, make it fit: take a smaller "
        "model, larger devices, or more of them"
    )
    return RecipeError(
        f"{worst.who}: {size(worst.needed)} on {worst.where} of {size(worst.there)}: "
        f"{worst.missing:.0f} bytes ({size(worst.missing)}) are missing{more}\n{fix}"
    )
